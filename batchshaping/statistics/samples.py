"""Samples in order, and the plotting positions that belong to them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from batchshaping.statistics.order import order_statistics, ranks

__all__ = ["Samples"]

# Values evaluated at a time: few enough that the intermediate results stay in a core's cache, and that memory
# is bounded however many there are. Other devices take all at once.
_TILE = 2**18

# glibc keeps freed memory for the next request up to the size of the largest block it has seen freed, at most
# 32 MiB. Below, it returns the intermediate results to the system after each step, and the page faults of
# getting them back take a third of the time. So let it see one such block freed, which nobody wrote to.
torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


class Samples:
    """The sorted samples of each array, of shape (..., N), and the plotting positions that belong to them.

    Args:
        x: values of shape (..., N).
        count: number of samples of each array, of shape (...), if not N; the other values of x are infinite.
        ties: whether equal values share the largest of their ranks.
        current: which of the N places hold samples whose terms count, if not all; the others only help to
            rank them.

    Attributes:
        values: the samples in order, behind them the first one again in place of what is no sample.
        counts: which of the values in order contribute a term; None if all do.
        number: how many terms there are to an array.
        poison: NaN for an array with a NaN and 0 otherwise, of shape (...).
    """

    def __init__(self, x: Tensor, count: Tensor | None, ties: bool, current: Tensor | None = None) -> None:
        self.order = order_statistics(x)
        self.values = values = self.order.values
        n = values.shape[-1]
        # A NaN is sorted last, behind what is no sample.
        self.poison = torch.where(values[..., -1].isnan(), torch.nan, 0.0).to(x.dtype)
        self.counts: Tensor | None = None
        self.number: Tensor | int = n
        self._column: Tensor | int = n
        if count is not None:
            self.number, self._column = count.to(x.dtype), count.unsqueeze(-1)
        self._shared = ranks(values, self._column, ties=True) if ties else None
        if count is not None:
            self.counts = is_sample = torch.arange(n, device=x.device) < self._column
            self.values = torch.where(is_sample, values, values[..., :1])
        if current is not None:
            is_current = current[self.order.indices]
            self.counts = is_current if self.counts is None else self.counts & is_current
            self.number = self.counts.sum(dim=-1).to(x.dtype)

    def positions(self, tile: slice = slice(None)) -> Tensor:
        """The plotting positions of a tile, of shape (n,), or (..., n) with a count or ties.

        Behind the samples they are valid ones, since what is computed there is left out.
        """
        if self._shared is not None:
            order = self._shared[..., tile]
        else:
            start, stop, _ = tile.indices(self.values.shape[-1])
            order = torch.arange(start + 1, stop + 1, dtype=self.values.dtype, device=self.values.device)
        return order.clamp_max(self._column) / (self._column + 1)

    def tiles(self) -> Iterator[slice]:
        """Parts of the last dimension, one after the other."""
        n = self.values.shape[-1]
        on_cpu = self.values.device.type == "cpu"
        width = max(1, _TILE * n // max(self.values.numel(), 1)) if on_cpu else max(n, 1)
        return (slice(start, min(start + width, n)) for start in range(0, n, width))
