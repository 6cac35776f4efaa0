"""The one sort: order statistics, their indices before sorting, and their ranks.

Everything here works along the last dimension.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["OrderStatistics", "checked_order", "order_statistics", "ranks"]


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
    return checked_order(x)[0]


def checked_order(x: Tensor) -> tuple[OrderStatistics, bool]:
    """The order statistics of x, and whether it is known that no value is NaN."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if x.device.type == "cpu" and x.numel() and not traced:
        method = _CPU_SORTS.get(x.dtype)
        found = method(x.detach()) if method is not None else None
        if found is not None:
            return found, True
    return OrderStatistics(*torch.sort(x, dim=-1, stable=True)), False


def _sort_float32(x: Tensor) -> OrderStatistics | None:
    """Sort as float64 with the index in the bits that a float32 leaves free; None if not exact, or for NaN.

    The index is less than half a unit in the last place of the float32, so that rounding removes it.
    """
    n = x.shape[-1]
    if n > _INDEX_BITS:
        return None
    # Numbers that round to infinity, and comparisons with NaN, are intended here.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        keys = x.contiguous().numpy().astype(np.float64)
        least, greatest = float(keys.min()), float(keys.max())
        if math.isnan(least):
            return None
        if not 0.0 < least <= greatest < math.inf:
            # An infinity has no free bits, so a finite number takes its place that rounds to infinity. A zero
            # with an index in its bits would be subnormal, and 0 on a processor that flushes subnormal
            # numbers, so a normal number takes its place that rounds to 0. All other values stay the same.
            np.clip(keys, -_ROUNDS_TO_INFINITY, _ROUNDS_TO_INFINITY, out=keys)
            keys += _ROUNDS_TO_ZERO
        bits = torch.from_numpy(keys).view(torch.int64)
        bits |= torch.arange(n, device="cpu")
        # A negative number gets smaller with the index, so its index is counted backwards.
        negative = least < 0
        if negative:
            bits ^= (bits >> 63).bitwise_and_(_INDEX_BITS)
        keys.sort(axis=-1)
        values = torch.from_numpy(keys.astype(np.float32))
    if negative:
        bits ^= (bits >> 63).bitwise_and_(_INDEX_BITS)
    return OrderStatistics(values, bits.bitwise_and_(_INDEX_BITS))


def _sort_float64(x: Tensor) -> OrderStatistics | None:
    """Sort by NumPy's argsort, which is vectorised but not stable; None if there are equal values or NaN."""
    indices = torch.from_numpy(x.contiguous().numpy().argsort(axis=-1))
    values = x.gather(-1, indices)
    if bool((values[..., 1:] == values[..., :-1]).any()) or bool(values[..., -1].isnan().any()):
        return None
    return OrderStatistics(values, indices)


# A float32 leaves 29 bits of a float64 free; an index of 28 bits is rounded off.
_INDEX_BITS = 2**28 - 1
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
