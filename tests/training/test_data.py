"""Data is what its files hold, in every format; a file that is not what it should be is named in one line."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader

from batchshaping.training.data import Data, DataError, load_data, shift_and_flip
from batchshaping.training.sections import DataSettings

Array = np.ndarray[Any, np.dtype[np.uint8]]
RANDOM = np.random.default_rng(0)


def load(name: str, folder: Path | None = None, **settings: Any) -> Data:
    return load_data(DataSettings(data=name, data_folder=folder, **settings))


def refused(name: str, folder: Path | None = None, **settings: Any) -> str:
    """The one line with which data is refused."""
    with pytest.raises(DataError, match=r"\A[^\n]+\Z") as error:
        load(name, folder, **settings)
    return str(error.value)


def everything(images: Any) -> tuple[Tensor, Tensor]:
    pixels, labels = images.__getitems__(range(len(images)))
    assert pixels.dtype == torch.uint8 and labels.dtype == torch.long
    return pixels, labels


# Digits


def test_the_digits_are_those_of_scikit_learn_apart_and_in_equal_shares() -> None:
    data = load("digits")
    (train, train_labels), (test, test_labels) = everything(data.train), everything(data.test)
    original = load_digits()
    found = Counter(
        (tuple(image.flatten().tolist()), label)
        for image, label in zip(
            torch.cat([train, test]), torch.cat([train_labels, test_labels]).tolist(), strict=True
        )
    )
    grey = np.round(original.images * 255 / 16).astype(int)
    assert found == Counter(
        (tuple(image.flatten().tolist()), label)
        for image, label in zip(grey, original.target.tolist(), strict=True)
    )
    assert len(test) == 450
    for digit in range(10):
        assert abs((test_labels == digit).sum() - (original.target == digit).mean() * 450) < 1
    again = load("digits")
    assert torch.equal(everything(again.train)[0], train) and torch.equal(everything(again.test)[0], test)


def test_normalized_images_have_mean_0_and_standard_deviation_1(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    for data in (load("digits"), load("cifar10", tmp_path)):
        normalized = data.normalize(everything(data.train)[0]).double()
        torch.testing.assert_close(
            normalized.mean(dim=(0, 2, 3)), torch.zeros(data.shape[0]).double(), atol=1e-6, rtol=0
        )
        torch.testing.assert_close(
            normalized.std(dim=(0, 2, 3)), torch.ones(data.shape[0]).double(), atol=1e-4, rtol=0
        )


def test_fewer_training_images_are_some_of_all() -> None:
    every, some = load("digits"), load("digits", train_images=100)
    (images, labels), (all_images, all_labels) = everything(some.train), everything(every.train)
    assert len(some.train) == 100 and len(some.test) == len(every.test)
    assert (some.mean, some.std) == (every.mean, every.std)
    places = (images[:, None] == all_images).flatten(2).all(dim=2)
    assert places.sum() >= 100 and places.any(dim=1).all()
    assert torch.equal(labels, all_labels[places.int().argmax(dim=1)])
    assert len(images.unique(dim=0)) == 100
    more = everything(load("digits", train_images=200).train)[0]
    assert torch.equal(more[:100], images)
    assert not torch.equal(images, all_images[:100])


def test_more_images_than_there_are_are_refused() -> None:
    assert refused("digits", train_images=1348).endswith("train_images must be at most 1347, received 1348")


# Fashion-MNIST

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


IDX_TYPES = {"u1": 0x08, "i1": 0x09, ">i2": 0x0B, ">i4": 0x0C}


def idx(array: Array, kind: str = "u1") -> bytes:
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, IDX_TYPES[kind], array.ndim]) + sizes + array.astype(kind).tobytes()


def write_fashion(folder: Path, compressed: bool = True) -> dict[str, Array]:
    arrays = {}
    folder.mkdir(parents=True, exist_ok=True)
    for part, examples in (("train", 12), ("t10k", 5)):
        arrays[f"{part}-images-idx3-ubyte"] = RANDOM.integers(0, 256, (examples, 28, 28), np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = RANDOM.integers(0, 10, examples, np.uint8)
    for name, array in arrays.items():
        content = idx(array)
        path = folder / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(content) if compressed else content)
    return arrays


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("within", ["", "FashionMNIST/raw"])
def test_fashion_mnist_is_what_its_files_hold(compressed: bool, within: str, tmp_path: Path) -> None:
    arrays = write_fashion(tmp_path / within, compressed)
    data = load("fashion-mnist", tmp_path)
    assert data.shape == (1, 28, 28) and len(data.classes) == 10 and data.classes[9] == "Ankle boot"
    for images, part in ((data.train, "train"), (data.test, "t10k")):
        pixels, labels = everything(images)
        np.testing.assert_array_equal(pixels[:, 0].numpy(), arrays[f"{part}-images-idx3-ubyte"])
        np.testing.assert_array_equal(labels.numpy(), arrays[f"{part}-labels-idx1-ubyte"])
    assert data.mean[0] == pytest.approx(arrays[NAMES[0]].mean() / 255)
    assert data.std[0] == pytest.approx((arrays[NAMES[0]] / 255).std(ddof=1))


def becomes(content: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Harm to what a compressed file holds."""
    return lambda path: path.write_bytes(gzip.compress(content(gzip.decompress(path.read_bytes()))))


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


HARM: dict[str, Callable[[Path], object]] = {
    "truncated gzip": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "half a gzip": lambda path: path.write_bytes(path.read_bytes()[:25]),
    "no gzip": lambda path: path.write_bytes(b"spam" * 100),
    "harmed gzip": lambda path: path.write_bytes(
        path.read_bytes()[:20] + b"\xff" * 8 + path.read_bytes()[28:]
    ),
    "empty file": lambda path: path.write_bytes(b""),
    "empty array": becomes(lambda content: b""),
    "other magic number": becomes(lambda content: b"\1" + content[1:]),
    "other type": becomes(lambda content: content[:2] + b"\x0d" + content[3:]),
    "other dimensions": becomes(lambda content: content[:3] + b"\2" + content[4:]),
    "half a header": becomes(lambda content: content[:6]),
    "one value less": becomes(lambda content: content[:-1]),
    "one value more": becomes(lambda content: content + b"\0"),
    "no examples": becomes(lambda content: content[:4] + bytes(4) + content[8:]),
    "one example more": becomes(lambda content: content[:7] + bytes([content[7] + 1]) + content[8:]),
    "a folder": make_folder,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", NAMES)
def test_a_harmed_file_of_fashion_mnist_is_named(name: str, harm: str, tmp_path: Path) -> None:
    write_fashion(tmp_path)
    HARM[harm](tmp_path / f"{name}.gz")
    line = refused("fashion-mnist", tmp_path)
    assert str(tmp_path) in line and name in line


@pytest.mark.parametrize(("part", "labels"), [("train", 12), ("t10k", 5), ("t10k", 6)])
def test_labels_that_are_none_are_refused(part: str, labels: int, tmp_path: Path) -> None:
    write_fashion(tmp_path)
    path = tmp_path / f"{part}-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.array([3] * (labels - 1) + [10 if labels != 6 else 9], np.uint8))))
    line = refused("fashion-mnist", tmp_path)
    assert f"{tmp_path}/{part}-labels-idx1-ubyte" in line and f"received {labels} from 3 to" in line


# Other data in the format of MNIST


@pytest.mark.parametrize("kind", ["u1", ">i2", ">i4"])
def test_idx_files_are_read_with_as_many_classes_as_they_have(kind: str, tmp_path: Path) -> None:
    write_fashion(tmp_path, compressed=False)
    classes = {"u1": 200, ">i2": 3000, ">i4": 70_000}[kind]
    expected = {}
    for part, examples in (("train", 12), ("t10k", 5)):
        expected[part] = RANDOM.integers(0, classes, examples)
        expected[part][0] = classes - 1
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(expected[part], kind))
    data = load("idx", tmp_path)
    assert data.shape == (1, 28, 28) and not data.flip
    assert len(data.classes) == classes and data.classes[-1] == str(classes - 1)
    for images, part in ((data.train, "train"), (data.test, "t10k")):
        np.testing.assert_array_equal(everything(images)[1].numpy(), expected[part])


@pytest.mark.parametrize(
    ("part", "labels", "received"),
    [("train", [-1] * 12, "12 from -1 to -1"), ("t10k", [3] * 4 + [1000], "5 from 3 to 1000")],
)
def test_idx_labels_that_no_training_image_has_are_refused(
    part: str, labels: list[int], received: str, tmp_path: Path
) -> None:
    write_fashion(tmp_path, compressed=False)
    path = tmp_path / f"{part}-labels-idx1-ubyte"
    path.write_bytes(idx(np.array(labels), ">i2"))
    line = refused("idx", tmp_path)
    assert str(path) in line and received in line


def test_idx_images_of_another_type_than_bytes_are_refused(tmp_path: Path) -> None:
    write_fashion(tmp_path, compressed=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx(np.zeros((12, 28, 28)), ">i2"))
    assert f"{path}: expected an IDX file of bytes in 3 dimensions" in refused("idx", tmp_path)


def test_idx_needs_a_folder_with_the_files(tmp_path: Path) -> None:
    assert refused("idx").endswith("data_folder, received no data_folder")
    assert refused("idx", tmp_path).endswith(f"data_folder, found none in {tmp_path}")


# CIFAR


def write_cifar10(folder: Path) -> dict[str, Array]:
    records = {}
    for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
        records[name] = RANDOM.integers(0, 256, (4, 3073), np.uint8)
        records[name][:, 0] %= 10
        (folder / name).write_bytes(records[name].tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(f"class{number}" for number in range(10)) + "\n\n")
    return records


def write_cifar100(folder: Path) -> dict[str, Array]:
    records = {}
    for name in ("train.bin", "test.bin"):
        records[name] = RANDOM.integers(0, 256, (6, 3074), np.uint8)
        records[name][:, 1] %= 100
        (folder / name).write_bytes(records[name].tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(f"class{number}" for number in range(100)) + "\n")
    return records


@pytest.mark.parametrize(
    ("name", "write", "within", "classes"),
    [
        ("cifar10", write_cifar10, "cifar-10-batches-bin", 10),
        ("cifar100", write_cifar100, "cifar-100-binary", 100),
    ],
)
@pytest.mark.parametrize("deeper", [False, True])
def test_cifar_is_what_its_files_hold(
    name: str, write: Any, within: str, classes: int, deeper: bool, tmp_path: Path
) -> None:
    folder = tmp_path / within if deeper else tmp_path
    folder.mkdir(exist_ok=True)
    *train, test = write(folder).values()
    data = load(name, tmp_path)
    assert data.shape == (3, 32, 32) and data.classes == tuple(f"class{number}" for number in range(classes))
    for images, records in ((data.train, np.concatenate(train)), (data.test, test)):
        pixels, labels = everything(images)
        np.testing.assert_array_equal(pixels.numpy(), records[:, -3072:].reshape(-1, 3, 32, 32))
        np.testing.assert_array_equal(labels.numpy(), records[:, -3073])


@pytest.mark.parametrize("harm", ["one byte less", "empty", "label", "missing", "folder"])
@pytest.mark.parametrize(
    ("name", "write", "file"),
    [
        ("cifar10", write_cifar10, "data_batch_1.bin"),
        ("cifar10", write_cifar10, "data_batch_3.bin"),
        ("cifar10", write_cifar10, "test_batch.bin"),
        ("cifar100", write_cifar100, "train.bin"),
        ("cifar100", write_cifar100, "test.bin"),
    ],
)
def test_a_harmed_file_of_cifar_is_named(name: str, write: Any, file: str, harm: str, tmp_path: Path) -> None:
    records = write(tmp_path)[file]
    path = tmp_path / file
    if harm == "one byte less":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "label":
        records[2, -3073] = 100
        path.write_bytes(records.tobytes())
    elif harm == "empty":
        path.write_bytes(b"")
    else:
        path.unlink() if harm == "missing" else make_folder(path)
    line = refused(name, tmp_path)
    assert str(tmp_path) in line and file in line


def test_missing_names_of_classes_are_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "batches.meta.txt").unlink()
    assert refused("cifar10", tmp_path) == f"{tmp_path}/batches.meta.txt: No such file or directory"


# Folders of images


def write_images(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 3) -> None:
    for part in ("train", "test"):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                shape = (12 + number, 10, 3)
                image = Image.fromarray(RANDOM.integers(0, 256, shape, np.uint8))
                image.convert(("RGB", "L", "P")[number % 3]).save(folder / part / name / f"{number}.png")


def test_a_folder_of_images_is_read(tmp_path: Path) -> None:
    write_images(tmp_path)
    data = load("folder", tmp_path, image_size=8)
    assert data.classes == ("cat", "dog") and data.shape == (3, 8, 8)
    for images in (data.train, data.test):
        pixels, labels = everything(images)
        assert pixels.shape == (6, 3, 8, 8) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    (grey, _) = data.test.__getitems__([1])
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])
    assert torch.equal(everything(data.test)[0], everything(data.test)[0])
    # Training images are cropped at random, unless they should not be.
    assert not torch.equal(everything(data.train)[0], everything(data.train)[0])
    plain = load("folder", tmp_path, image_size=8, augment=False)
    assert torch.equal(everything(plain.train)[0], everything(plain.train)[0])


def test_an_image_of_one_colour_keeps_it(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part / "red").mkdir(parents=True)
        for number in range(2):
            Image.new("RGBA", (20, 16), (200, 100, 50, 255)).save(tmp_path / part / "red" / f"{number}.png")
    for images in vars(load("folder", tmp_path, image_size=8)).values():
        if hasattr(images, "__getitems__") and not isinstance(images, tuple):
            assert everything(images)[0].amin(dim=(0, 2, 3)).tolist() == [200, 100, 50]
            assert everything(images)[0].amax(dim=(0, 2, 3)).tolist() == [200, 100, 50]


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("harm", ["no folder", "no classes", "no images", "a file", "another class"])
def test_a_folder_that_is_not_one_of_images_is_named(part: str, harm: str, tmp_path: Path) -> None:
    write_images(tmp_path, classes=("cat",))
    folder = tmp_path / part
    images = list((folder / "cat").iterdir())
    if harm == "another class":
        (folder / "cow").mkdir()
        (folder / "cow" / "0.png").write_bytes(images[0].read_bytes())
        line = refused("folder", tmp_path, image_size=8)
        assert line.startswith(str(tmp_path)) and line.endswith("cow")
        return
    for image in images:
        image.unlink()
    if harm != "no images":
        (folder / "cat").rmdir()
    if harm in ("no folder", "a file"):
        folder.rmdir()
    if harm == "a file":
        folder.write_bytes(b"")
    assert refused("folder", tmp_path, image_size=8).startswith(f"{folder}: expected ")


def test_the_folder_must_be_given() -> None:
    assert "data_folder" in refused("folder")


@pytest.mark.parametrize(("workers", "content"), [(0, b""), (0, b"spam"), (0, None), (1, None)])
def test_a_broken_image_is_named_by_whoever_loads_it(
    workers: int, content: bytes | None, tmp_path: Path
) -> None:
    write_images(tmp_path)
    path = tmp_path / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:70] if content is None else content)
    data = load("folder", tmp_path, image_size=8)
    images: Any = data.train
    loader: DataLoader[Any] = DataLoader(images, 6, num_workers=workers, collate_fn=lambda batch: batch)
    with pytest.raises(DataError) as error:
        next(iter(loader))
    assert (
        str(error.value)
        .strip()
        .splitlines()[-1]
        .endswith(f"{path}: expected an image, received something else")
    )


# Downloads, which the tests do not make


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100"])
def test_data_that_is_not_there_is_refused_with_its_remedy(name: str, tmp_path: Path) -> None:
    line = refused(name, tmp_path)
    assert line.startswith(f"{name}: expected ") and str(tmp_path) in line and "download" in line


@pytest.mark.parametrize(
    ("name", "function", "within"),
    [
        ("fashion-mnist", "torchvision.datasets.FashionMNIST", "FashionMNIST/raw"),
        ("cifar10", "torchvision.datasets.utils.download_and_extract_archive", "cifar-10-batches-bin"),
        ("cifar100", "torchvision.datasets.utils.download_and_extract_archive", "cifar-100-binary"),
    ],
)
def test_a_download_goes_to_the_folder_and_its_failure_is_one_line(
    name: str, function: str, within: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = {"fashion-mnist": write_fashion, "cifar10": write_cifar10, "cifar100": write_cifar100}[name]
    calls: list[tuple[object, ...]] = []

    def download(*arguments: object, **_: object) -> None:
        calls.append(arguments)
        (tmp_path / within).mkdir(parents=True)
        write(tmp_path / within)

    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError("no\nconnection")

    monkeypatch.setattr(function, fail)
    assert refused(name, tmp_path, download=True) == "the download failed: no connection"
    monkeypatch.setattr(function, download)
    assert len(load(name, tmp_path, download=True).train) > 2
    assert len(calls) == 1 and str(tmp_path) in calls[0]
    # What is there already is not fetched again.
    load(name, tmp_path, download=True)
    assert len(calls) == 1


# Shifts and flips


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """One image of shape (C, H, W), pixel by pixel."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                out[:, row, column] = image[:, row - down, column - right]
    return out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("padding", "size"), [(0, (4, 5)), (1, (4, 5)), (2, (5, 5)), (3, (2, 3))])
def test_each_image_is_shifted_and_perhaps_flipped(
    padding: int, size: tuple[int, int], flip: bool, channels: int
) -> None:
    image = torch.arange(1, 1 + channels * size[0] * size[1], dtype=torch.uint8).reshape(channels, *size)
    shifts = range(-padding, padding + 1)
    images = [image, image.flip(2)] if flip else [image]
    expected = {
        tuple(shifted(i, down, right).flatten().tolist())
        for i in images
        for down in shifts
        for right in shifts
    }
    given = image.expand(2000, *image.shape).clone()
    found = shift_and_flip(given, padding, flip)
    assert found.dtype == torch.uint8 and torch.equal(given, image.expand_as(given))
    assert {tuple(one.flatten().tolist()) for one in found} == expected


@pytest.mark.parametrize("channels", [1, 3])
def test_shifted_images_lie_in_memory_as_any_others(channels: int) -> None:
    # Strides that could be those of channels last break PyTorch's convolutions of one channel.
    images = torch.zeros(4, channels, 8, 8, dtype=torch.uint8)
    assert shift_and_flip(images, padding=1, flip=True).stride() == images.stride()


def test_shifts_are_those_of_the_seed_and_uniform() -> None:
    image = torch.zeros(1, 5, 5, dtype=torch.uint8)
    image[0, 2, 2] = 1
    images = image.expand(5000, 1, 5, 5)
    torch.manual_seed(3)
    found = shift_and_flip(images, padding=2, flip=False)
    counts = found.sum(dim=(0, 1), dtype=torch.long)
    assert counts.sum() == 5000 and (counts - 200).abs().max() < 5 * 200**0.5
    torch.manual_seed(3)
    assert torch.equal(shift_and_flip(images, padding=2, flip=False), found)
