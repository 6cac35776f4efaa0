"""Writing a file as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replaced"]


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file that replaces another as a whole, once it is written.

    An interruption or an error leaves the earlier file, or none where there was none.

    Args:
        path: the file to replace or to make.

    Yields:
        Where to write instead.

    Raises:
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "result.json"
        >>> with replaced(path) as partial:
        ...     _ = partial.write_text("{}")
        >>> path.read_text()
        '{}'
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        # What is not on the disk yet could be lost after the old file is.
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
