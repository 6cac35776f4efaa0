"""Folders of images, one folder for each class, which torchvision reads when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchshaping.training.data.dataset import Batch, Data, DataError
from batchshaping.training.sections import DataSettings

__all__ = ["folder_of_images"]


class _FolderImages:
    """Images in one folder for each class, decoded each time that they are asked for."""

    def __init__(self, folder: Path, transform: Callable[[Any], Tensor]) -> None:
        from torchvision.datasets import ImageFolder

        if not folder.is_dir():
            raise DataError(
                f"{folder}: expected a folder with one folder of images for each class, found none"
            )
        try:
            self._images = ImageFolder(str(folder), transform=transform, loader=_decode)
        except FileNotFoundError as error:
            found = str(error).partition(". ")[0].removesuffix(".")
            raise DataError(f"{folder}: expected a folder of images for each class; {found}") from None
        self.classes = tuple(self._images.classes)

    def __len__(self) -> int:
        return len(self._images)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images, labels = zip(*(self._images[index] for index in indices), strict=True)
        return torch.stack(images), torch.tensor(labels)


def _decode(path: str) -> Any:
    from PIL import Image

    try:
        with open(path, "rb") as file, Image.open(file) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception:  # a broken image can raise any error
        raise DataError(f"{path}: expected an image, received something else") from None


def folder_of_images(settings: DataSettings) -> Data:
    """The images in train/CLASS and test/CLASS of the data folder, cropped to squares."""
    from torchvision import transforms

    if settings.data_folder is None:
        raise DataError("folder: data_folder must be a folder with train/CLASS and test/CLASS, received none")
    size = settings.image_size
    in_test = transforms.Compose(
        [
            transforms.Resize(round(size * 256 / 224)),
            transforms.CenterCrop(size),
            transforms.PILToTensor(),
        ]
    )
    in_training = transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    train = _FolderImages(settings.data_folder / "train", in_training if settings.augment else in_test)
    test = _FolderImages(settings.data_folder / "test", in_test)
    if train.classes != test.classes:
        raise DataError(
            f"{settings.data_folder}: train and test must have the same classes, "
            f"only one has {', '.join(sorted({*train.classes} ^ {*test.classes})[:5])}"
        )
    # The statistics of ImageNet, which pretrained weights expect.
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Data(train, test, train.classes, (3, size, size), mean, std, padding=0, flip=False)
