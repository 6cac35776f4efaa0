"""Fashion-MNIST, in the IDX format of MNIST."""

from __future__ import annotations

from pathlib import Path

from batchshaping.training.data.dataset import Data, DataError
from batchshaping.training.data.files import download, folder_of
from batchshaping.training.data.idx import PATTERN, idx_in
from batchshaping.training.sections import DataSettings

__all__ = ["fashion_mnist"]

_CLASSES = (
    *["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag"],
    "Ankle boot",
)
_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("data/FashionMNIST/raw"))


def fashion_mnist(settings: DataSettings) -> Data:
    """The images of Xiao, Rasul and Vollgraf (2017), from Debian's package, a folder or a download."""
    folder = folder_of(settings, _FOLDERS, PATTERN)
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
    return idx_in(folder, _CLASSES, flip=True)
