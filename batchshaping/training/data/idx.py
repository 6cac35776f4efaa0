"""Data in the IDX format of MNIST, such as MNIST itself, KMNIST and EMNIST."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchshaping.training.data.dataset import Data, DataError, ImagesInMemory, data_in_memory
from batchshaping.training.data.files import content, folder_of
from batchshaping.training.sections import DataSettings

__all__ = ["PATTERN", "idx", "idx_in"]

PATTERN = "train-images-idx3-ubyte*"
"""The pattern of the name of one of the files, as it is or with ``.gz``."""

_TYPES: dict[int, np.dtype[Any]] = {0x08: np.dtype("u1"), 0x0B: np.dtype(">i2"), 0x0C: np.dtype(">i4")}
"""The types of values by their code in the header: bytes, and signed integers of 16 and 32 bits."""


def idx(settings: DataSettings) -> Data:
    """Images and classes of the four files that ``data_folder`` contains; the classes are numbers.

    The files have the names of MNIST's: ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, and the
    same with ``t10k`` for the test images, each as it is or with ``.gz``. Labels may be bytes, or integers of
    16 or 32 bits for more than 256 classes. In training, images are shifted by up to two pixels, not flipped.

    Raises:
        DataError: in one line, if a file is missing, or not of this format.
    """
    folder = folder_of(settings, (), PATTERN)
    if folder is None:
        given = settings.data_folder
        received = "received no data_folder" if given is None else f"found none in {given}"
        raise DataError(
            f"idx: expected train-images-idx3-ubyte and three more files in data_folder, {received}"
        )
    return idx_in(folder, None, flip=False)


def idx_in(folder: Path, classes: Sequence[str] | None, flip: bool) -> Data:
    """The data of four IDX files.

    Args:
        folder: the folder of the files.
        classes: names of the classes. With None, they are numbers, as many as the training images have.
        flip: whether a flip from left to right keeps the class.

    Raises:
        DataError: in one line, if a file is missing, or not of this format.
    """
    parts = {}
    for part in ("train", "t10k"):
        images = _array(folder, f"{part}-images-idx3-ubyte", dims=3)
        labels = _array(folder, f"{part}-labels-idx1-ubyte", dims=1).long()
        classes = classes or [str(label) for label in range(int(labels.max()) + 1)]
        if len(images) != len(labels) or labels.min() < 0 or labels.max() >= len(classes):
            raise DataError(
                f"{folder}/{part}-labels-idx1-ubyte: expected {len(images)} labels from 0 to "
                f"{len(classes) - 1}, received {len(labels)} from {labels.min()} to {labels.max()}"
            )
        parts[part] = ImagesInMemory(images.unsqueeze(1), labels)
    assert classes is not None
    sizes = [tuple(part.images.shape[1:]) for part in parts.values()]
    if sizes[0] != sizes[1]:
        raise DataError(f"{folder}: expected test images of shape {sizes[0]}, received {sizes[1]}")
    return data_in_memory(parts["train"], parts["t10k"], classes, padding=2, flip=flip)


def _array(folder: Path, name: str, dims: int) -> Tensor:
    """An array in the IDX format: two zeros, the type, the number of dimensions, sizes, values."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.exists()), folder / f"{name}.gz")
    values = content(path)
    header = 4 + 4 * dims
    # Images are bytes, as everywhere.
    types = {0x08: _TYPES[0x08]} if dims == 3 else _TYPES
    expected = f"{path}: expected an IDX file of {'bytes' if dims == 3 else 'integers'} in {dims} dimensions"
    if len(values) < header or values[:2] != b"\0\0" or values[2] not in types or values[3] != dims:
        raise DataError(f"{expected}, received something else")
    shape = np.frombuffer(values, ">u4", dims, 4).tolist()
    kind = types[values[2]]
    if len(values) - header != math.prod(shape) * kind.itemsize or 0 in shape:
        raise DataError(f"{expected}, {shape} by its header, received {len(values) - header} bytes")
    read = np.frombuffer(values, kind, offset=header).reshape(shape)
    return torch.from_numpy(read.astype(kind.newbyteorder("=")))
