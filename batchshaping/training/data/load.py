"""Loading the data set that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from batchshaping.training.data.canvases import CANVASES, CENTRED_CANVASES, FORMS
from batchshaping.training.data.cifar import CIFAR10, CIFAR100
from batchshaping.training.data.dataset import Data, DataError, fewer
from batchshaping.training.data.digits import digits
from batchshaping.training.data.fashion_mnist import fashion_mnist
from batchshaping.training.data.folder import folder_of_images
from batchshaping.training.data.idx import idx
from batchshaping.training.sections import DataSettings

__all__ = ["load_data"]


def load_data(settings: DataSettings) -> Data:
    """Load a data set.

    Args:
        settings: the data section of a configuration. A whole configuration is accepted too, as in earlier
            versions.

    Raises:
        DataError: in one line, if a file is missing or its content is not as expected, if there are fewer
            training images than wanted, or no validation images to evaluate on.

    Example:
        >>> data = load_data(DataSettings(data="digits"))
        >>> len(data.train), len(data.test), data.shape, data.test.__getitems__([0, 1])[0].shape
        (1347, 450, (1, 8, 8), torch.Size([2, 1, 8, 8]))
    """
    if not isinstance(settings, DataSettings):  # a RunConfig
        settings = settings.data
    data = _LOADERS[settings.name](settings)
    if settings.evaluate_on == "validation":
        if data.validation is None:
            raise DataError(f"evaluate_on must be test for {settings.name}, which has no validation images")
        data = replace(data, test=data.validation)
    return data if settings.train_images is None else fewer(data, settings.train_images)


_LOADERS: dict[str, Callable[[DataSettings], Data]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "canvases": CANVASES,
    "canvases-centred": CENTRED_CANVASES,
    "forms": FORMS,
    "idx": idx,
    "folder": folder_of_images,
}
