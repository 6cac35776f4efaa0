"""The arrays of samples that a statistic takes, and the same in order with their plotting positions."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from batchshaping.statistics.order import order_and_extent, ranks

__all__ = ["Batch", "Options", "Samples"]

# Values evaluated at a time: few enough that the intermediate results stay in a core's cache, and that memory
# is bounded however many there are. Other devices take all at once.
_TILE = 2**18

# From so many values on, it pays to keep freed memory.
_LARGE = 2**16

_IN_NUMPY: dict[torch.dtype, type[np.floating[Any]]] = {torch.float32: np.float32, torch.float64: np.float64}


class Batch(NamedTuple):
    """Arrays of samples, side by side in one tensor.

    Attributes:
        values: values of shape (..., N), of which the last dimension holds the samples of an array.
        counts: number of samples of each array, of shape (...), if not N; its other values are infinite.
        current: which of the N places hold samples whose terms count, of shape (N,), if not all; the others
            only help to rank them.
    """

    values: Tensor
    counts: Tensor | None = None
    current: Tensor | None = None


class Options(NamedTuple):
    """How the values of a batch are meant.

    Attributes:
        ties: whether equal values share the largest of their ranks.
        logits: whether they are logits, of which the prior's values are the sigmoid.
    """

    ties: bool = False
    logits: bool = False


class Samples:
    """The sorted samples of each array of a batch, and the plotting positions that belong to them.

    Args:
        batch: arrays of samples, of shape (..., N).
        ties: whether equal values share the largest of their ranks.

    Attributes:
        order: the sorted values, and where they came from.
        values: the same values, each array padded to length N by repeating its first sample.
        contributes: which of the sorted values contribute a term; None if all do.
        number: number of terms of each array.
        extent: the least and the greatest value of all arrays; None if unknown.
        broken: which arrays have a NaN, of shape (...); None if it is known that none has.
    """

    def __init__(self, batch: Batch, ties: bool) -> None:
        if batch.values.numel() >= _LARGE and batch.values.is_cpu:
            _keep_freed_memory()
        self.order, extent = order_and_extent(batch.values)
        self.extent = extent if batch.counts is None else None
        self.values = values = self.order.values
        n = values.shape[-1]
        # A NaN is sorted last, behind the infinite values of the padding too.
        self.broken = None if extent is not None else values[..., -1].isnan()
        self.contributes: Tensor | None = None
        self.number: Tensor | int = n
        self._column: Tensor | int = n
        if batch.counts is not None:
            self.number, self._column = batch.counts.to(values.dtype), batch.counts.unsqueeze(-1)
        self._shared = ranks(values, self._column, ties=True) if ties else None
        if batch.counts is not None:
            self.contributes = is_sample = torch.arange(n, device=values.device) < self._column
            self.values = torch.where(is_sample, values, values[..., :1])
        if batch.current is not None:
            is_current = batch.current[self.order.indices]
            self.contributes = is_current if self.contributes is None else self.contributes & is_current
            self.number = self.contributes.sum(dim=-1).to(values.dtype)

    def positions(self, tile: slice = slice(None)) -> Tensor:
        """The plotting positions of a tile, of shape (n,), or (..., n) with a count or ties.

        Those of the padding are valid numbers, whose terms are left out.
        """
        if self._shared is not None:
            return self._shared[..., tile].clamp_max(self._column) / (self._column + 1)
        start, stop, _ = tile.indices(self.values.shape[-1])
        if self.extent is not None:  # NumPy has sorted, whose calls take less time
            ranks_of_tile = np.arange(start + 1, stop + 1, dtype=_IN_NUMPY[self.values.dtype])
            return torch.from_numpy(ranks_of_tile / (self.values.shape[-1] + 1))
        order = torch.arange(start + 1, stop + 1, dtype=self.values.dtype, device=self.values.device)
        if isinstance(self._column, int):
            return order.div_(self._column + 1)
        return order.clamp_max(self._column) / (self._column + 1)

    def tiles(self) -> Iterator[slice]:
        """Parts of the last dimension, one after the other."""
        n = self.values.shape[-1]
        on_cpu = self.values.device.type == "cpu"
        width = max(1, _TILE * n // max(self.values.numel(), 1)) if on_cpu else max(n, 1)
        return (slice(start, min(start + width, n)) for start in range(0, n, width))


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next request, from the first large batch of a process on.

    It does so for blocks up to the size of the largest one that it has seen freed, at most 32 MiB. With a
    smaller limit it returns the intermediate results to the system after each step, and the page faults of
    getting them back take up to a third of the time. So let it see one such block freed, which nobody wrote
    to and which therefore takes no memory.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")
