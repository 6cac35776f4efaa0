"""Values in files: NumPy arrays, comma-separated text and PyTorch tensors. No code in a file is run."""

from __future__ import annotations

import csv
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from batchshaping.storage.files import quoted, replaced

__all__ = ["read_values", "write_values"]


def read_values(path: str | PathLike[str]) -> Tensor:
    r"""The real numbers in a file, in its shape; as float64 if the file is or is text, and as float32 if not.

    Numbers in text are decimal, or nan or inf. The first line is skipped if it holds names only: a name
    begins with a letter, an underscore or #, and is no word for a number or for a missing one, such as nan or
    null. What could be a number in another notation, such as 0x1A or 1_000, is an error.

    Args:
        path: a file that ends with .npy (as ``numpy.save`` writes it), .csv (one column or several) or .pt
            (one tensor as ``torch.save`` writes it).

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it has another ending, is broken or empty, or holds anything but real numbers. The
            message is one line that starts with the path.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "gates.csv")
        ...     _ = path.write_text("left,right\n0.1,0.9\n0.2,0.7\n")
        ...     read_values(path)
        tensor([[0.1000, 0.9000],
                [0.2000, 0.7000]], dtype=torch.float64)
    """
    path = Path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"{path}: expected a name that ends with {' or '.join(_READERS)}")
    try:
        values = read(path)
        if values.numel() == 0:
            raise _ContentError(f"expected at least one value, received shape {tuple(values.shape)}")
    except _ContentError as error:
        raise ValueError(f"{path}: {error}") from None
    return values


def write_values(path: str | PathLike[str], values: Tensor) -> None:
    """Write values as a NumPy array, whatever the name of the file.

    Raises:
        OSError: if the file cannot be written; an earlier one is then as it was.
    """
    with replaced(Path(path)) as partial, partial.open("wb") as file:
        np.save(file, values.numpy(force=True), allow_pickle=False)


class _ContentError(Exception):
    """Says what was expected from a file and what was received."""


def _read_npy(path: Path) -> Tensor:
    with path.open("rb") as file, _foreign("an array of numbers as numpy.save writes it"):
        # numpy.load would take other formats too.
        array = np.lib.format.read_array(file, allow_pickle=False)
        if array.dtype.kind not in "biuf":
            raise _ContentError(f"expected real numbers, received an array of {array.dtype}")
        double = array.dtype.kind == "f" and array.dtype.itemsize > 4
        return torch.from_numpy(array.astype(np.float64 if double else np.float32))


def _read_pt(path: Path) -> Tensor:
    with path.open("rb") as file, _foreign("one tensor as torch.save writes it, and no code"):
        # What torch.save writes is not compressed. Parts that are could be of any size.
        parts = zipfile.ZipFile(file).infolist() if zipfile.is_zipfile(file) else []
        if sum(part.file_size for part in parts) > path.stat().st_size:
            raise ValueError
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(content, Tensor) or content.is_complex():
            received = content.dtype if isinstance(content, Tensor) else f"a {type(content).__name__}"
            raise _ContentError(f"expected one tensor of real numbers, received {received}")
        if content.is_nested or content.is_quantized or content.is_meta:
            raise ValueError
        # A sparse or expanded tensor of any size fits in a short file.
        if content.numel() > max(path.stat().st_size, _MOST_VALUES):
            raise _ContentError(f"expected at most {_MOST_VALUES} values, received {content.numel()}")
        dtype = torch.float64 if content.dtype == torch.float64 else torch.float32
        return content.detach().to_dense().to("cpu", dtype)


_MOST_VALUES = 2**26
"""Of a tensor that has more of them than its file has bytes."""


@contextmanager
def _foreign(expected: str) -> Iterator[None]:
    """Any error or warning is the file's fault here: what is no such file can fail to parse in any way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (OSError, _ContentError):
            raise
        except Exception:
            raise _ContentError(f"expected {expected}, received something else") from None


def _read_csv(path: Path) -> Tensor:
    numbers: list[list[float]] = []
    with path.open(encoding="utf-8-sig", newline="") as file, _foreign("numbers with commas between them"):
        lines = csv.reader(file)
        for row in filter(None, lines):
            if lines.line_num == 1 and all(_NAME.fullmatch(cell) for cell in row):
                continue
            wrong = [cell for cell in row if not _NUMBER.fullmatch(cell)]
            if wrong:
                raise _ContentError(f"expected numbers, received {quoted(wrong[0])} in line {lines.line_num}")
            numbers.append([float(cell) for cell in row])
            if len(row) != len(numbers[0]):
                raise _ContentError(
                    f"expected {len(numbers[0])} numbers a line, received {len(row)} in line {lines.line_num}"
                )
    values = torch.tensor(numbers, dtype=torch.float64)
    return values.squeeze(1) if values.shape[1:] == (1,) else values


_NUMBER = re.compile(
    r"\s*[-+]?([0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|nan|inf(inity)?)\s*",
    re.ASCII | re.IGNORECASE,
)
_NAME = re.compile(
    r"\s*(?!(nan|inf|infinity|na|n/a|null|none|true|false)\s*\Z)[^\W\d][^\0]*|\s*#[^\0]*", re.IGNORECASE
)

_READERS: dict[str, Callable[[Path], Tensor]] = {".npy": _read_npy, ".csv": _read_csv, ".pt": _read_pt}
