"""Files of data sets: where they are, what is in them, and downloading them."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from batchshaping.training.data.dataset import DataError
from batchshaping.training.sections import DataSettings

__all__ = ["content", "download", "folder_of"]


def folder_of(settings: DataSettings, usual: Sequence[Path], pattern: str) -> Path | None:
    """The folder that contains the files of a data set; None if there is none.

    Args:
        settings: if they name a data folder, this and the usual folders within it are searched.
        usual: folders that are searched otherwise.
        pattern: a name that one of the files has.
    """
    places = usual
    if settings.data_folder is not None:
        within = (place.relative_to("data") for place in usual if not place.is_absolute())
        places = (settings.data_folder, *(settings.data_folder / place for place in within))
    return next((place for place in places if any(place.glob(pattern))), None)


def content(path: Path) -> bytes:
    """The bytes of a file, decompressed if it is a gzip file.

    Raises:
        DataError: in one line, if the file cannot be read or is not a complete gzip file.
    """
    try:
        read = path.read_bytes()
        return gzip.decompress(read) if path.suffix == ".gz" else read
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path}: expected a gzip file, received something else or a part of one") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def download(fetch: Callable[[], object]) -> None:
    """Download by calling a function.

    Raises:
        DataError: in one line, if the download fails.
    """
    try:
        fetch()
    except (OSError, RuntimeError) as error:
        raise DataError(f"the download failed: {' '.join(str(error).split())}") from None
