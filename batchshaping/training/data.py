"""Images to train on and to test on, with their labels.

Data sets that fit in memory are tensors, from which a batch is taken, shifted and flipped at once, on the
device that trains. Folders of images are read by torchvision.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from batchshaping.training.config import RunConfig

__all__ = ["Data", "DataError", "Images", "ImagesInMemory", "batches", "load_data", "shift_and_flip"]

Batch = tuple[Tensor, Tensor]


class DataError(Exception):
    """Says in one line which file or folder is not what was expected."""


class Images(Protocol):
    """Images that are taken a batch at a time: uint8 of shape (N, C, H, W), and labels of shape (N,)."""

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
        mean: of each channel over the training images, in [0, 1].
        std: their standard deviation.
        padding: by how many pixels an image may be shifted without losing its class.
        flip: whether a flip from left to right keeps the class.
    """

    train: Images
    test: Images
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool

    def normalize(self, images: Tensor) -> Tensor:
        """Floating point images with mean 0 and standard deviation 1 in each channel."""
        mean, std = (torch.tensor(v, device=images.device).reshape(-1, 1, 1) for v in (self.mean, self.std))
        return (images / 255 - mean) / std


def load_data(config: RunConfig) -> Data:
    """The data that a configuration names.

    Raises:
        DataError: in one line, if a file is missing or is not what it should be.

    Example:
        >>> data = load_data(RunConfig(data="digits"))
        >>> len(data.train), len(data.test), data.shape, data.test.__getitems__([0, 1])[0].shape
        (1347, 450, (1, 8, 8), torch.Size([2, 1, 8, 8]))
    """
    data = _LOADERS[config.data](config)
    if config.train_images is not None:
        data = _fewer(data, config.train_images)
    if len(data.train) < config.batch_size:
        raise DataError(
            f"batch_size must be at most the number of training images, {len(data.train)}, "
            f"received {config.batch_size}"
        )
    return data


def batches(images: Images, size: int, *, seed: int = 0, **settings: Any) -> DataLoader[Batch]:
    """Images a batch at a time, in their order or that of a sampler.

    Args:
        images: where they come from.
        size: images in a batch.
        seed: of what the processes that load images draw; the state of PyTorch's own generator stays.
        settings: those of ``torch.utils.data.DataLoader``, such as ``sampler`` and ``num_workers``.
    """
    return DataLoader(
        images,  # type: ignore[arg-type]
        batch_size=size,
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(seed),
        **settings,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def shift_and_flip(images: Tensor, padding: int, flip: bool) -> Tensor:
    """Shift each image at random by up to ``padding`` pixels, zeros coming in, and flip half of them.

    Args:
        images: of shape (N, C, H, W).
        padding: the largest shift in each direction.
        flip: whether half of the images, at random, are flipped from left to right.

    Example:
        >>> images = torch.arange(9, dtype=torch.uint8).reshape(1, 1, 3, 3)
        >>> shift_and_flip(images, padding=1, flip=True).shape
        torch.Size([1, 1, 3, 3])
    """
    n, _, height, width = images.shape
    device = images.device
    corner = torch.randint(0, 2 * padding + 1, (2, n, 1), device=device)
    rows = corner[0] + torch.arange(height, device=device)
    columns = corner[1] + torch.arange(width, device=device)
    if flip:
        flipped = torch.rand(n, 1, device=device) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    padded = F.pad(images, [padding] * 4)
    example = torch.arange(n, device=device)[:, None, None]
    shifted = padded.movedim(1, 3)[example, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
    # Not .contiguous(): with one channel it would keep strides that pass for channels last, a format in which
    # the CPU convolutions of torch 2.14 write out of bounds for 4 channels.
    return shifted.clone(memory_format=torch.contiguous_format)


def _fewer(data: Data, count: int) -> Data:
    """The first of the training images, after a shuffle that is always the same."""
    if count > len(data.train):
        raise DataError(f"train_images must be at most {len(data.train)}, received {count}")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    train = _Subset(data.train, order[:count])
    return Data(**{**vars(data), "train": train})


@dataclass(frozen=True)
class _Subset:
    images: Images
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.images.__getitems__(self.indices[torch.as_tensor(indices)].tolist())


def _in_memory(
    train: ImagesInMemory, test: ImagesInMemory, classes: Sequence[str], padding: int, flip: bool
) -> Data:
    # In double precision by channel; the images together would be a large temporary.
    channels = range(train.images.shape[1])
    moments = [torch.std_mean(train.images[:, channel].double() / 255) for channel in channels]
    _, channels_of_image, height, width = train.images.shape
    return Data(
        train,
        test,
        tuple(classes),
        (channels_of_image, height, width),
        tuple(mean.item() for _, mean in moments),
        tuple(max(std.item(), 1e-6) for std, _ in moments),
        padding,
        flip,
    )


# scikit-learn's digits


def _digits(config: RunConfig) -> Data:
    """The handwritten digits that ship with scikit-learn, three quarters of them to train on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy((digits.images * 255 / 16).round().astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    parts = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=digits.target, random_state=0)
    train, test = (ImagesInMemory(images[part], labels[part]) for part in parts)
    return _in_memory(train, test, [str(digit) for digit in range(10)], padding=1, flip=False)


# Fashion-MNIST

_FASHION = (
    *["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag"],
    "Ankle boot",
)
_FASHION_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("data/FashionMNIST/raw"))


def _fashion_mnist(config: RunConfig) -> Data:
    folder = _folder_of(config, _FASHION_FOLDERS, "train-images-idx3-ubyte*")
    if folder is None:
        if not config.download:
            places = config.data_folder or " or ".join(map(str, _FASHION_FOLDERS))
            raise DataError(
                f"fashion-mnist: expected train-images-idx3-ubyte.gz and three more files in {places}, "
                "found none; install the Debian package dataset-fashion-mnist, or set download"
            )
        from torchvision.datasets import FashionMNIST

        root = config.data_folder or Path("data")
        _download(lambda: FashionMNIST(str(root), download=True))
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
    return _in_memory(parts["train"], parts["t10k"], _FASHION, padding=2, flip=True)


def _idx(folder: Path, name: str, dims: int) -> Tensor:
    """An array of bytes in the IDX format: two zeros, the type, the number of dimensions, sizes, values."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.exists()), folder / f"{name}.gz")
    content = _content(path)
    header = 4 + 4 * dims
    expected = f"{path}: expected an IDX file of bytes in {dims} dimensions"
    if content[:4] != bytes([0, 0, 8, dims]) or len(content) < header:
        raise DataError(f"{expected}, received something else")
    shape = np.frombuffer(content, ">u4", dims, 4).tolist()
    if len(content) - header != math.prod(shape) or 0 in shape:
        raise DataError(f"{expected}, {shape} by its header, received {len(content) - header} values")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


# CIFAR


@dataclass(frozen=True)
class _Cifar:
    """One of the two data sets of Krizhevsky (2009), in the binary version, which needs no unpickling."""

    url: str
    md5: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    label_bytes: int

    def __call__(self, config: RunConfig) -> Data:
        places = (Path("data") / self.folder,)
        folder = _folder_of(config, places, self.train[0])
        if folder is None:
            if not config.download:
                raise DataError(
                    f"{config.data}: expected {self.train[0]} and more files of the binary version in "
                    f"{config.data_folder or places[0]}, found none; set download, or unpack {self.url}"
                )
            from torchvision.datasets.utils import download_and_extract_archive

            root = config.data_folder or Path("data")
            _download(lambda: download_and_extract_archive(self.url, str(root), md5=self.md5))
            folder = root / self.folder
        classes = _content(folder / self.names).decode(errors="replace").split()
        train, test = (self._read(folder, files, classes) for files in (self.train, self.test))
        return _in_memory(train, test, classes, padding=4, flip=True)

    def _read(self, folder: Path, files: tuple[str, ...], classes: list[str]) -> ImagesInMemory:
        size = self.label_bytes + 3072
        images, labels = [], []
        for path in (folder / name for name in files):
            content = _content(path)
            if not content or len(content) % size:
                raise DataError(f"{path}: expected records of {size} bytes, received {len(content)} bytes")
            records = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, size).copy())
            images.append(records[:, self.label_bytes :].reshape(-1, 3, 32, 32))
            labels.append(records[:, self.label_bytes - 1].long())
            if labels[-1].max() >= len(classes):
                raise DataError(
                    f"{path}: expected labels below {len(classes)}, received {labels[-1].max().item()}"
                )
        return ImagesInMemory(torch.cat(images), torch.cat(labels))


_CIFAR10 = _Cifar(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    folder="cifar-10-batches-bin",
    train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test=("test_batch.bin",),
    names="batches.meta.txt",
    label_bytes=1,
)
_CIFAR100 = _Cifar(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    folder="cifar-100-binary",
    train=("train.bin",),
    test=("test.bin",),
    names="fine_label_names.txt",
    label_bytes=2,
)


# Folders of images


class _FolderImages:
    """Images in one folder a class, decoded when they are asked for."""

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
    except Exception:  # what is no image can fail to decode in any way
        raise DataError(f"{path}: expected an image, received something else") from None


def _folder(config: RunConfig) -> Data:
    from torchvision import transforms

    if config.data_folder is None:
        raise DataError("folder: data_folder must be a folder with train/CLASS and test/CLASS, received none")
    size = config.image_size
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
    train = _FolderImages(config.data_folder / "train", in_training if config.augment else in_test)
    test = _FolderImages(config.data_folder / "test", in_test)
    if train.classes != test.classes:
        raise DataError(
            f"{config.data_folder}: train and test must have the same classes, "
            f"only one has {', '.join(sorted({*train.classes} ^ {*test.classes})[:5])}"
        )
    # The statistics of ImageNet, which pretrained weights expect.
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Data(train, test, train.classes, (3, size, size), mean, std, padding=0, flip=False)


# Files


def _folder_of(config: RunConfig, usual: Sequence[Path], pattern: str) -> Path | None:
    """The folder that holds the files of a data set, if there is one."""
    places = usual
    if config.data_folder is not None:
        within = (place.relative_to("data") for place in usual if not place.is_absolute())
        places = (config.data_folder, *(config.data_folder / place for place in within))
    return next((place for place in places if any(place.glob(pattern))), None)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path}: expected a gzip file, received something else or a part of one") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _download(fetch: Callable[[], object]) -> None:
    try:
        fetch()
    except (OSError, RuntimeError) as error:
        raise DataError(f"the download failed: {' '.join(str(error).split())}") from None


_LOADERS: dict[str, Callable[[RunConfig], Data]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _CIFAR10,
    "cifar100": _CIFAR100,
    "folder": _folder,
}
