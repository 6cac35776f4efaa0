"""CIFAR-10 and CIFAR-100, in the binary version, which needs no unpickling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from batchshaping.training.data.dataset import Data, DataError, ImagesInMemory, data_in_memory
from batchshaping.training.data.files import content, download, folder_of
from batchshaping.training.sections import DataSettings

__all__ = ["CIFAR10", "CIFAR100", "Cifar"]


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets of Krizhevsky (2009); calling it loads it.

    Attributes:
        url: where the archive is.
        md5: checksum of the archive.
        folder: name of the folder in the archive.
        train: names of the files with training images.
        test: names of the files with test images.
        names: name of the file with the names of the classes.
        label_bytes: number of bytes before each image, the last of which is its label.
    """

    url: str
    md5: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    label_bytes: int

    def __call__(self, settings: DataSettings) -> Data:
        places = (Path("data") / self.folder,)
        folder = folder_of(settings, places, self.train[0])
        if folder is None:
            if not settings.download:
                raise DataError(
                    f"{settings.name}: expected {self.train[0]} and more files of the binary version in "
                    f"{settings.data_folder or places[0]}, found none; set download, or unpack {self.url}"
                )
            from torchvision.datasets.utils import download_and_extract_archive

            root = settings.data_folder or Path("data")
            download(lambda: download_and_extract_archive(self.url, str(root), md5=self.md5))
            folder = root / self.folder
        classes = content(folder / self.names).decode(errors="replace").split()
        train, test = (self._read(folder, files, classes) for files in (self.train, self.test))
        return data_in_memory(train, test, classes, padding=4, flip=True)

    def _read(self, folder: Path, files: tuple[str, ...], classes: list[str]) -> ImagesInMemory:
        size = self.label_bytes + 3072
        images, labels = [], []
        for path in (folder / name for name in files):
            values = content(path)
            if not values or len(values) % size:
                raise DataError(f"{path}: expected records of {size} bytes, received {len(values)} bytes")
            records = torch.from_numpy(np.frombuffer(values, np.uint8).reshape(-1, size).copy())
            images.append(records[:, self.label_bytes :].reshape(-1, 3, 32, 32))
            labels.append(records[:, self.label_bytes - 1].long())
            if labels[-1].max() >= len(classes):
                raise DataError(
                    f"{path}: expected labels below {len(classes)}, received {labels[-1].max().item()}"
                )
        return ImagesInMemory(torch.cat(images), torch.cat(labels))


CIFAR10 = Cifar(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    folder="cifar-10-batches-bin",
    train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test=("test_batch.bin",),
    names="batches.meta.txt",
    label_bytes=1,
)
"""Ten classes of 32 x 32 pixel images."""

CIFAR100 = Cifar(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    folder="cifar-100-binary",
    train=("train.bin",),
    test=("test.bin",),
    names="fine_label_names.txt",
    label_bytes=2,
)
"""A hundred classes of 32 x 32 pixel images."""
