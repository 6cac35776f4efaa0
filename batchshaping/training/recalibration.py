"""Statistics of batch normalization, taken anew when training has ended."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchshaping.training.data import Data, batches

__all__ = ["recalibrate"]

_IMAGES = 32_768
"""Images from which statistics are taken at most, so that it takes little time for a large data set."""


@torch.no_grad()
def recalibrate(network: nn.Module, data: Data, batch: int, augment: bool = False, workers: int = 0) -> None:
    """Replace the statistics of all batch normalization by those of training images with noiseless gates.

    During training gates may be noisy, and what a layer keeps is a mean over the last steps. Here gates
    decide without noise, as in evaluation, and each batch counts the same: the statistics are the mean over
    batches of their means and of their unbiased variances, as ``torch.optim.swa_utils.update_bn`` takes
    them. Layers that keep no statistics stay as they are.

    Args:
        network: the network. It is in evaluation mode afterwards.
        data: the data set, of whose training images up to 32,768 are taken in an order that is always the
            same.
        batch: number of images in a batch; the last ones that do not make a whole batch are left out.
        augment: whether images are shifted and flipped as in training, whose distribution the weights fit.
        workers: number of processes that load images.

    Example:
        >>> from batchshaping.training.data import load_data
        >>> from batchshaping.training.sections import DataSettings
        >>> network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
        >>> recalibrate(network, load_data(DataSettings(data="digits")), batch=64)
        >>> network[0].running_mean.abs().item() < 0.01
        True
    """
    network.eval()
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    first = next(network.parameters())
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:_IMAGES].tolist()
    passes = _PassesToTheLast(layers)
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
            layer.train()
        for images, _ in batches(data.train, batch, sampler=order, drop_last=True, num_workers=workers):
            images = images.to(first.device)
            passes.run(network, data.normalize(data.augment(images) if augment else images, like=first))
    finally:
        passes.remove_hooks()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        network.eval()


class _LastReachedError(Exception):
    """Ends a forward pass."""


class _PassesToTheLast:
    """Forward passes that end after the last of some layers.

    A vision transformer of two scales has normalization in its gate alone, which comes before all blocks.

    Args:
        layers: each of them runs as often in one pass as in another.
    """

    def __init__(self, layers: list[_BatchNorm]) -> None:
        self._runs, self._of_a_pass = 0, math.inf
        self._hooks = [layer.register_forward_hook(self._count) for layer in layers]

    def _count(self, *_: object) -> None:
        self._runs += 1
        if self._runs == self._of_a_pass:
            raise _LastReachedError

    def run(self, network: nn.Module, x: Tensor) -> None:
        """A pass; the first one, to its end."""
        self._runs = 0
        with contextlib.suppress(_LastReachedError):
            network(x)
            self._of_a_pass = self._runs

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
