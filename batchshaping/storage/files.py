"""Files: written as a whole or not at all, a folder by one process at a time, and quoted in one line."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["created", "only_writer", "quoted", "replaced", "write_json"]


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file that replaces another as a whole, once it is written.

    An interruption or an error leaves the earlier file, or none where there was none. Of several processes
    that write the same file, the last one to finish wins, whole. The permissions of an earlier file are kept.
    Where the path is a symbolic link, the link is replaced, and what it points to stays as it is.

    Args:
        path: the file to replace or to make.

    Yields:
        Where to write instead: an empty file of a random name in the same folder.

    Raises:
        OSError: if the file cannot be written, or the path is a folder, a device or a pipe.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "result.json"
        >>> with replaced(path) as partial:
        ...     _ = partial.write_text("{}")
        >>> path.read_text()
        '{}'
    """
    # A rename would make a plain file of a device, such as /dev/null.
    if path.exists() and not path.is_file():
        code = errno.EISDIR if path.is_dir() else errno.EINVAL
        raise OSError(code, os.strerror(code) if path.is_dir() else "Not a regular file", str(path))
    with _written(path, _replace) as partial:
        yield partial


def write_json(content: Any, path: Path) -> None:
    """Write a JSON file, as a whole or not at all.

    Raises:
        OSError: if the file cannot be written; an earlier one is then as it was.
    """
    with replaced(path) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")


@contextmanager
def created(path: Path) -> Iterator[Path]:
    """A file that appears as a whole once it is written, and replaces nothing.

    Of several processes that write the same file, the first one to finish wins.

    Args:
        path: the file to make.

    Yields:
        Where to write instead: an empty file of a random name in the same folder.

    Raises:
        FileExistsError: if there is something at the path, once the file is written.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "config.yaml"
        >>> for text in ("first", "second"):
        ...     try:
        ...         with created(path) as partial:
        ...             _ = partial.write_text(text)
        ...     except FileExistsError:
        ...         print(path.read_text())
        first
    """
    with _written(path, _link) as partial:
        yield partial


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder, so that no other process that asks for it gets it.

    It is held until the block ends or the process does, however that comes. What an earlier holder that was
    killed left half written is removed. Where the system has no such locks, nothing is held or removed.

    Args:
        folder: the folder.

    Raises:
        BlockingIOError: if it is held already.
        OSError: if there is no such folder.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with only_writer(folder):
        ...     with only_writer(folder):
        ...         pass
        Traceback (most recent call last):
        ...
        BlockingIOError: ...
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # some network file systems
            pass
        else:
            for partial in folder.glob(".*.partial"):
                partial.unlink(missing_ok=True)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def quoted(value: object) -> str:
    r"""A value as it is shown in an error, cut to a line.

    Example:
        >>> print(quoted("a\nb"))
        'a\nb'
        >>> len(quoted(list(range(1000))))
        80
    """
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested without end, or an int of thousands of digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= _LINE else f"{text[: _LINE - 1]}…"


_LINE = 80

_held: set[int] = set()


def _let_go() -> None:
    # A process that loads images lives on for seconds after its parent is killed, and would hold the folder.
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def _written(path: Path, finish: Callable[[Path, Path], object]) -> Iterator[Path]:
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    # Exclusively: what is there already, a symbolic link too, is an error. The permissions are those that
    # the process gives to any new file.
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield partial
        # What is not on the disk yet could be lost after the old file is.
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        finish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _replace(partial: Path, path: Path) -> None:
    if path.is_file() and not path.is_symlink():
        partial.chmod(stat.S_IMODE(path.stat().st_mode))
    partial.replace(path)


def _link(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: of two that finish at once, both may win
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        partial.replace(path)
