"""One sort: order statistics, where they came from, and their ranks.

Everything here works along the last dimension; the caller brings the samples there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["OrderStatistics", "order_statistics", "ranks"]


class OrderStatistics(NamedTuple):
    """Sorted values of shape (..., N) and, for each, its index before sorting; NaN comes last."""

    values: Tensor
    indices: Tensor

    def unsort(self, sorted_values: Tensor) -> Tensor:
        """Bring something computed at the order statistics back to where the values came from."""
        return torch.empty_like(sorted_values).scatter_(-1, self.indices, sorted_values)


def order_statistics(x: Tensor, mask: Tensor | None = None) -> OrderStatistics:
    """Sort x along its last dimension; values where the mask is False count as infinite and go to the end."""
    if mask is not None:
        x = x.masked_fill(~mask, torch.inf)
    return OrderStatistics(*torch.sort(x, dim=-1))


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
    # Infinite samples equal the masked values behind them.
    return torch.minimum(shared, torch.as_tensor(count, dtype=values.dtype, device=values.device))
