"""What a data set is: images to train on and to test on, with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from batchshaping.training.data.augmentation import shift_and_flip

__all__ = ["Batch", "Data", "DataError", "Images", "ImagesInMemory", "data_in_memory", "fewer"]

Batch = tuple[Tensor, Tensor]
"""Images and their labels."""


class DataError(Exception):
    """Data that cannot be used; the message says in one line which file or folder, and what was expected."""


class Images(Protocol):
    """A sequence of images; a batch of it is uint8 images of shape (N, C, H, W) and labels of shape (N,)."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Batch: ...


@dataclass(frozen=True)
class ImagesInMemory:
    """Images in one tensor.

    Attributes:
        images: uint8 of shape (N, C, H, W).
        labels: classes 0, 1, ... of shape (N,).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]


@dataclass(frozen=True)
class Data:
    """A data set: images to train on and to test on.

    Attributes:
        train: images to train on.
        test: images to test on.
        classes: names of the classes.
        shape: channels, height and width of the images.
        mean: mean of each channel over the training images, whose values are in [0, 1].
        std: standard deviation of each channel over the training images.
        padding: number of pixels by which an image may be shifted without losing its class.
        flip: whether a flip from left to right keeps the class.
        validation: images to choose settings on, in neither of the others, if there are any.
    """

    train: Images
    test: Images
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool
    validation: Images | None = None

    def normalize(self, images: Tensor, like: Tensor | None = None) -> Tensor:
        """Floating-point images, whose channels have mean 0 and standard deviation 1 in training.

        Args:
            images: the images.
            like: a tensor whose device and dtype they get, such as a parameter of a network.
        """
        if like is not None:
            return self.normalize(images.to(like.device)).to(like.dtype)
        mean, std = (torch.tensor(v, device=images.device).reshape(-1, 1, 1) for v in (self.mean, self.std))
        return (images / 255 - mean) / std

    def augment(self, images: Tensor) -> Tensor:
        """Images shifted and flipped at random, as far as that keeps their class."""
        return shift_and_flip(images, self.padding, self.flip) if self.padding or self.flip else images


def data_in_memory(
    train: ImagesInMemory, test: ImagesInMemory, classes: Sequence[str], padding: int, flip: bool
) -> Data:
    """A data set of images in memory, with the mean and standard deviation of its channels."""
    # One channel at a time, since all images in double precision would take much memory.
    channels, height, width = train.images.shape[1:]
    moments = [torch.std_mean(train.images[:, channel].double() / 255) for channel in range(channels)]
    return Data(
        train,
        test,
        tuple(classes),
        (channels, height, width),
        tuple(mean.item() for _, mean in moments),
        tuple(max(std.item(), 1e-6) for std, _ in moments),
        padding,
        flip,
    )


def fewer(data: Data, count: int) -> Data:
    """The same data with some of the training images, chosen by a shuffle that is always the same.

    Raises:
        DataError: if there are fewer training images.
    """
    if count > len(data.train):
        raise DataError(f"train_images must be at most {len(data.train)}, received {count}")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    train = _Subset(data.train, order[:count])
    return replace(data, train=train)


@dataclass(frozen=True)
class _Subset:
    """Some of the images, by their indices."""

    images: Images
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.images.__getitems__(self.indices[torch.as_tensor(indices)].tolist())
