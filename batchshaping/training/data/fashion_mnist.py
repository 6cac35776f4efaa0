"""Fashion-MNIST, in the IDX format of MNIST."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from batchshaping.training.data.dataset import Data, DataError, ImagesInMemory, data_in_memory
from batchshaping.training.data.files import content, download, folder_of
from batchshaping.training.sections import DataSettings

__all__ = ["fashion_mnist"]

_CLASSES = (
    *["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag"],
    "Ankle boot",
)
_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("data/FashionMNIST/raw"))


def fashion_mnist(settings: DataSettings) -> Data:
    """The images of Xiao, Rasul and Vollgraf (2017), from Debian's package, a folder or a download."""
    folder = folder_of(settings, _FOLDERS, "train-images-idx3-ubyte*")
    if folder is None:
        if not settings.download:
            places = settings.data_folder or " or ".join(map(str, _FOLDERS))
            raise DataError(
                f"fashion-mnist: expected train-images-idx3-ubyte.gz and three more files in {places}, "
                "found none; install the Debian package dataset-fashion-mnist, or set download"
            )
        from torchvision.datasets import FashionMNIST

        root = settings.data_folder or Path("data")
        download(lambda: FashionMNIST(str(root), download=True))
        folder = root / "FashionMNIST" / "raw"
    parts = {}
    for part in ("train", "t10k"):
        images = _idx(folder, f"{part}-images-idx3-ubyte", dims=3)
        labels = _idx(folder, f"{part}-labels-idx1-ubyte", dims=1)
        if len(images) != len(labels) or labels.max() > 9:
            raise DataError(
                f"{folder}/{part}-labels-idx1-ubyte: expected {len(images)} labels from 0 to 9, "
                f"received {len(labels)} from {labels.min()} to {labels.max()}"
            )
        parts[part] = ImagesInMemory(images.unsqueeze(1), labels.long())
    sizes = [tuple(part.images.shape[1:]) for part in parts.values()]
    if sizes[0] != sizes[1]:
        raise DataError(f"{folder}: expected test images of shape {sizes[0]}, received {sizes[1]}")
    return data_in_memory(parts["train"], parts["t10k"], _CLASSES, padding=2, flip=True)


def _idx(folder: Path, name: str, dims: int) -> Tensor:
    """An array of bytes in the IDX format: two zeros, the type, the number of dimensions, sizes, values."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.exists()), folder / f"{name}.gz")
    values = content(path)
    header = 4 + 4 * dims
    expected = f"{path}: expected an IDX file of bytes in {dims} dimensions"
    if values[:4] != bytes([0, 0, 8, dims]) or len(values) < header:
        raise DataError(f"{expected}, received something else")
    shape = np.frombuffer(values, ">u4", dims, 4).tolist()
    if len(values) - header != math.prod(shape) or 0 in shape:
        raise DataError(f"{expected}, {shape} by its header, received {len(values) - header} values")
    return torch.from_numpy(np.frombuffer(values, np.uint8, offset=header).reshape(shape).copy())
