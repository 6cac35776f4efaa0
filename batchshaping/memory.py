"""A memory of past batches, for batches too small to estimate a distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Memory"]


class Memory(nn.Module):
    """The values of past batches, first in first out, kept in ``state_dict``.

    They are extra state and no buffers: DistributedDataParallel would overwrite those with another rank's.

    Args:
        batches: how many to keep.
    """

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.batches = batches
        self.values: list[Tensor] = []
        self.counts: list[Tensor | None] = []

    def join(self, values: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Put what is remembered behind values of shape (arrays..., N); in training, remember these too.

        Returned are the joined values and, if some are masked, the number of samples of each array.
        """
        for past in self.values:
            if past.shape[:-1] != values.shape[:-1]:
                raise ValueError(
                    f"the memory holds arrays of shape {tuple(past.shape[:-1])}, "
                    f"received {tuple(values.shape[:-1])}"
                )
        joined = torch.cat([values, *(past.to(values) for past in self.values)], dim=-1)
        counts = [count, *self.counts]
        total = None
        if any(c is not None for c in counts):
            sizes = [v.shape[-1] for v in (values, *self.values)]
            shape = values.shape[:-1]
            total = torch.zeros(shape, dtype=torch.int64, device=values.device)
            for known, size in zip(counts, sizes, strict=True):
                total = total + (size if known is None else known.to(values.device))
        if self.training:
            self.values = [values.detach().clone(), *self.values][: self.batches]
            self.counts = [count, *self.counts][: self.batches]
        return joined, total

    def get_extra_state(self) -> dict[str, Any]:
        return {"values": self.values, "counts": self.counts}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.values = list(state["values"])[: self.batches]
        self.counts = list(state["counts"])[: self.batches]

    def extra_repr(self) -> str:
        return f"batches={self.batches}"
