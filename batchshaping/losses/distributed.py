"""One batch made of the shards of all ranks: arrays are scattered to the ranks, their gradients gathered.

Each rank owns some of the arrays. It sends each of its values once, to the rank that owns the value's array,
and receives one gradient for each. So it exchanges twice its own values, whatever the number of ranks;
gathering the whole batch on every rank would cost its own values times the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from batchshaping.priors.checks import known_to_hold
from batchshaping.statistics.samples import Batch

__all__ = ["Collect", "Columns", "Group", "Scatter", "resolve_group"]

Group = dist.ProcessGroup | Literal["world"] | None
"""The ranks whose batches are one: a process group, "world" for all there are, or None for this process."""
_Result = TypeVar("_Result")
_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def resolve_group(group: Group) -> dist.ProcessGroup | None:
    """The process group that is meant, or None where one process is all there is."""
    if group is None or (isinstance(group, str) and group == "world" and not _initialized()):
        return None
    if isinstance(group, str) and group == "world":
        return dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group must be a process group that this rank belongs to, 'world' or None, received {group!r}"
        )
    return group


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


class Columns:
    """Which arrays each rank owns, and how many samples of each array every rank has.

    Args:
        batch: the samples of this rank, those of the current batch first.
        current: the current batch alone.
        group: the process group.

    Attributes:
        samples: how many samples each rank has.
        now: how many of them are of the current batch.
        current: which of all ranks' samples are of the current batch.
        masked: whether any rank leaves samples out.
        differentiable: whether the values of any rank require a gradient. Then all ranks compute gradients.

    Raises:
        ValueError: on every rank, if the ranks have different numbers of arrays, or different dtypes.
        RuntimeError: if a rank is gone.
    """

    def __init__(self, batch: Batch, current: Batch, group: dist.ProcessGroup) -> None:
        self.group = group
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        x = batch.values
        arrays, samples, now = x.shape[:-1].numel(), x.shape[-1], current.values.shape[-1]
        masked = batch.counts is not None
        facts = [arrays, samples, now, masked, x.requires_grad, _DTYPES.index(x.dtype)]
        own = torch.tensor(facts, device=x.device)
        of_all = [torch.empty_like(own) for _ in range(self.world)]
        self._call(lambda: dist.all_gather(of_all, own, group=group))
        counts, self.samples, self.now, some_masked, some_differentiable, dtypes = (
            list(column) for column in zip(*(facts.tolist() for facts in of_all), strict=True)
        )
        self.masked, self.differentiable = any(some_masked), any(some_differentiable)
        self.current = torch.arange(sum(self.samples), device=x.device) < sum(self.now)
        if len(set(counts)) > 1:
            raise ValueError(f"all ranks must have the same number of arrays, received {counts}")
        if len(set(dtypes)) > 1:
            names = ", ".join(str(_DTYPES[d]) for d in dtypes)
            raise ValueError(f"all ranks must have values of the same dtype, received {names}")
        bounds = [arrays * r // self.world for r in range(self.world + 1)]
        self.arrays = [stop - start for start, stop in pairwise(bounds)]
        self.own = slice(bounds[self.rank], bounds[self.rank + 1])

    def _call(self, collective: Callable[[], _Result]) -> _Result:
        try:
            return collective()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.world} lost another rank while exchanging the batch: {error}"
            ) from error

    def _all_to_all(self, sent: Tensor, sizes: list[int], received_sizes: list[int]) -> Tensor:
        received = sent.new_empty(sum(received_sizes))
        self._call(lambda: dist.all_to_all_single(received, sent, received_sizes, sizes, group=self.group))
        return received

    def scattered(self, batch: Batch, current_count: Tensor | None) -> Batch:
        """The samples of all ranks of the arrays that this rank owns, with a graph to the values of each.

        Args:
            batch: the samples of this rank.
            current_count: how many values of the current batch are samples, for each array, if masks tell.
        """
        values = batch.values.reshape(sum(self.arrays), batch.values.shape[-1])
        if self.differentiable and not values.requires_grad:
            # This rank still has to send the gradients of its arrays to the ranks that ask for them.
            values = values.detach().requires_grad_()
        count = None
        if self.masked:
            everything = values.new_full(values.shape[:1], values.shape[1], dtype=torch.int64)
            if batch.current is not None:
                # Each array needs samples in the current batch, whatever the history has of it.
                now = torch.full_like(everything, self.now[self.rank])
                self.total(now if current_count is None else current_count.flatten())
            count = self.total(everything if batch.counts is None else batch.counts.flatten())
        is_current = None if batch.current is None else self.current
        return Batch(Scatter.apply(values, self), count, is_current)

    def scatter(self, x: Tensor) -> Tensor:
        """Send the values of each array to its owner: (arrays, own samples) -> (own arrays, all samples).

        The samples of the current batch come first, and those of rank 0 before those of rank 1, as in one
        process: the order of equal values decides which rank each of them takes in the sort.
        """
        n, k = self.samples[self.rank], self.arrays[self.rank]
        sizes, received_sizes = [a * n for a in self.arrays], [k * s for s in self.samples]
        received = self._all_to_all(x.reshape(-1), sizes, received_sizes)
        shards = [
            shard.view(k, s).split([now, s - now], dim=1)
            for shard, s, now in zip(received.split(received_sizes), self.samples, self.now, strict=True)
        ]
        return torch.cat([part for parts in zip(*shards, strict=True) for part in parts], dim=1)

    def gather(self, columns: Tensor) -> Tensor:
        """The reverse of :meth:`scatter`: (own arrays, all samples) -> (arrays, own samples)."""
        n, k = self.samples[self.rank], self.arrays[self.rank]
        past = [s - now for s, now in zip(self.samples, self.now, strict=True)]
        shards = columns.split([*self.now, *past], dim=1)
        pairs = zip(shards[: self.world], shards[self.world :], strict=True)
        sent = torch.cat([torch.cat(pair, dim=1).reshape(-1) for pair in pairs])
        received = self._all_to_all(sent, [k * s for s in self.samples], [a * n for a in self.arrays])
        return received.view(sum(self.arrays), n)

    def total(self, count: Tensor) -> Tensor:
        """The number of samples of each array on all ranks, for the arrays of this rank.

        Raises:
            ValueError: on every rank, if an array has none.
        """
        total = count.clone()
        self._call(lambda: dist.all_reduce(total, group=self.group))
        if not known_to_hold(total > 0):
            empty = int((total == 0).sum())
            raise ValueError(f"mask leaves an array without samples on all ranks ({empty} of {len(total)})")
        return total[self.own]

    def collect(self, own: Tensor) -> Tensor:
        """Bring one value of each array from its owner to all ranks: (own arrays,) -> (arrays,)."""
        longest = max(self.arrays)
        padded = own.new_zeros(longest)
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        self._call(lambda: dist.all_gather(parts, padded, group=self.group))
        return torch.cat([part[:count] for part, count in zip(parts, self.arrays, strict=True)])


class Scatter(torch.autograd.Function):
    """:meth:`Columns.scatter`, whose gradients are gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: Columns) -> Tensor:
        ctx.columns = columns
        return columns.scatter(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.columns.gather(gradient), None


class Collect(torch.autograd.Function):
    """:meth:`Columns.collect`. The gradient goes to the owner, times the number of ranks.

    DistributedDataParallel averages the gradients of the ranks, where the sum is needed: each rank knows only
    the part of the gradient that comes from its own shard, or from its own arrays.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, columns: Columns) -> Tensor:
        ctx.columns = columns
        return columns.collect(own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient[ctx.columns.own] * ctx.columns.world, None


# The former name.
Deal = Scatter
