"""The one sort: order statistics, their indices before sorting, and their ranks.

Everything here works along the last dimension.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Extent", "FEW", "OrderStatistics", "order_and_extent", "order_statistics", "ranks"]

Extent = tuple[float, float]
"""The least and the greatest of some values."""

FEW = 2**15
"""Up to so many values on the CPU, the time is that of the calls: NumPy's take less than torch's, which uses
all cores for more."""


class OrderStatistics(NamedTuple):
    """Sorted values of shape (..., N) and, for each, its index before sorting; NaN comes last."""

    values: Tensor
    indices: Tensor

    def unsort(self, sorted_values: Tensor) -> Tensor:
        """Put values computed at the order statistics back into the order before sorting."""
        return torch.empty_like(sorted_values).scatter_(-1, self.indices, sorted_values)


def order_statistics(x: Tensor) -> OrderStatistics:
    """Sort x along its last dimension, stably: equal values keep their order; NaN comes last.

    On the CPU NumPy's vectorised sort is used, with the same result as ``torch.sort(stable=True)`` except
    that -0.0 may come back as 0.0.
    """
    return order_and_extent(x)[0]


def order_and_extent(x: Tensor) -> tuple[OrderStatistics, Extent | None]:
    """The order statistics of x, and its least and greatest value; None if unknown, as there may be NaN."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if x.device.type == "cpu" and x.numel() and not traced:
        method = _CPU_SORTS.get(x.dtype)
        found = method(x.detach()) if method is not None else None
        if found is not None:
            return found
    return OrderStatistics(*torch.sort(x, dim=-1, stable=True)), None


def _sort_float32(x: Tensor) -> tuple[OrderStatistics, Extent] | None:
    """Sort as float64 with the index in the bits that a float32 leaves free; None if not exact, or for NaN.

    The index is less than half a unit in the last place of the float32, so that rounding removes it.
    """
    n = x.shape[-1]
    if n > _INDEX_BITS:
        return None
    floats = (x if x.numel() <= FEW else x.contiguous()).numpy()
    # Positive numbers have the order of their bits, and to compare those gives no warning of NaN.
    bits = floats.view(np.int32)
    lowest, highest = bits.min(), bits.max()
    if lowest >= _SMALLEST_NORMAL and highest < _INFINITY:
        extent = float(lowest.view(np.float32)), float(highest.view(np.float32))
        return _sort_keys(floats.astype(np.float64, order="C"), negative=False), extent
    # Numbers that round to infinity, and comparisons with NaN, are intended here.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        least, greatest = float(floats.min()), float(floats.max())
        if math.isnan(least):
            return None
        # An infinity has no free bits, so a finite number takes its place that rounds to infinity. A zero
        # with an index in its bits would be subnormal, and 0 on a processor that flushes subnormal numbers,
        # so a normal number takes its place that rounds to 0. All other values stay the same.
        keys = floats.astype(np.float64, order="C")
        np.clip(keys, -_ROUNDS_TO_INFINITY, _ROUNDS_TO_INFINITY, out=keys)
        keys += _ROUNDS_TO_ZERO
        return _sort_keys(keys, negative=least < 0), (least, greatest)


def _sort_keys(keys: Any, negative: bool) -> OrderStatistics:
    """Sort float64 numbers that have room for their index in the last bits, by themselves and then by it."""
    n, few = keys.shape[-1], keys.size <= FEW
    bits: Any = keys.view(np.int64) if few else torch.from_numpy(keys).view(torch.int64)
    bits |= np.arange(n) if few else torch.arange(n, device="cpu")
    # A negative number gets smaller with the index, so its index is counted backwards.
    if negative:
        bits ^= (bits >> 63) & _INDEX_BITS
    keys.sort(axis=-1)
    values = torch.from_numpy(keys.astype(np.float32))
    if negative:
        bits ^= (bits >> 63) & _INDEX_BITS
    bits &= _INDEX_BITS
    return OrderStatistics(values, torch.from_numpy(bits) if few else bits)


def _sort_float64(x: Tensor) -> tuple[OrderStatistics, Extent] | None:
    """Sort by NumPy's argsort, which is vectorised but not stable; None if there are equal values or NaN."""
    indices = torch.from_numpy(x.contiguous().numpy().argsort(axis=-1))
    values = x.gather(-1, indices)
    greatest = float(values[..., -1].max())
    if bool((values[..., 1:] == values[..., :-1]).any()) or math.isnan(greatest):
        return None
    return OrderStatistics(values, indices), (float(values[..., 0].min()), greatest)


# A float32 leaves 29 bits of a float64 free; an index of 28 bits is rounded off.
_INDEX_BITS = 2**28 - 1
# The bits of two float32.
_SMALLEST_NORMAL, _INFINITY = 0x00800000, 0x7F800000
_ROUNDS_TO_INFINITY = 2.0**1000
_ROUNDS_TO_ZERO = 2.0**-1000
_CPU_SORTS = {torch.float32: _sort_float32, torch.float64: _sort_float64}


def ranks(values: Tensor, count: Tensor | int, ties: bool) -> Tensor:
    """Ranks 1 ... N of sorted values; with ties, every value gets the largest rank among its equals.

    Args:
        values: sorted values, of shape (..., N).
        count: how many of them are samples, at most N, of a shape that broadcasts with (..., 1).
        ties: whether equal values share a rank.

    Returns:
        Ranks in the dtype of the values, of shape (N,) without ties and (..., N) with them.
    """
    n = values.shape[-1]
    rank = torch.arange(1, n + 1, dtype=values.dtype, device=values.device)
    if not ties:
        return rank
    last_of_group = torch.ones_like(values, dtype=torch.bool)
    last_of_group[..., :-1] = values[..., :-1] != values[..., 1:]
    candidates = torch.where(last_of_group, rank, torch.inf)
    shared = candidates.flip(-1).cummin(-1).values.flip(-1)
    # Infinite samples are equal to the masked values behind them, which are also infinite.
    return shared.clamp_max(count)
