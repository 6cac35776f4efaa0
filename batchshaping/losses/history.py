"""The values of past batches, for batches that are too small to tell how their values are distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from batchshaping.priors.checks import known_to_hold

__all__ = ["History", "Memory"]


class History(nn.Module):
    """The values of past batches, the oldest of which go first, kept in ``state_dict``.

    Its state is three tensors: ``values`` of all batches side by side, of shape (arrays..., N); ``sizes``,
    the number of values in each batch; and ``counts``, how many of these are samples, of shape (batches,
    arrays...). The module keeps them as plain attributes, because DistributedDataParallel overwrites buffers
    with those of rank 0.

    Args:
        batches: how many to keep.
    """

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.batches = batches
        self.values: list[Tensor] = []
        self.counts: list[Tensor | None] = []

    def join(self, values: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Append the past batches to values of shape (arrays..., N).

        Returned are the joined values and, if some are masked, the number of samples of each array.
        """
        for past in self.values:
            if past.shape[:-1] != values.shape[:-1]:
                raise ValueError(
                    f"the history holds arrays of shape {tuple(past.shape[:-1])}, "
                    f"received {tuple(values.shape[:-1])}"
                )
        joined = torch.cat([values, *(past.to(values) for past in self.values)], dim=-1)
        counts = [count, *self.counts]
        if all(known is None for known in counts):
            return joined, None
        total = torch.zeros(values.shape[:-1], dtype=torch.int64, device=values.device)
        for known, past in zip(counts, (values, *self.values), strict=True):
            total = total + (past.shape[-1] if known is None else known.to(values.device))
        return joined, total

    def remember(self, values: Tensor, count: Tensor | None) -> None:
        """In training, add a batch and drop the oldest one if there are too many; in evaluation, do nothing.

        A batch with a NaN is not added. Where values cannot be read without stopping a device, it is added
        without the arrays that have a NaN.
        """
        if not self.training:
            return
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "history cannot remember values inside of torch.func transforms, call eval() on the loss"
            )
        values = values.detach()
        broken = values.isnan().any(dim=-1)
        if not known_to_hold(~broken):
            return
        if values.device.type != "cpu" or torch.compiler.is_compiling():
            values = values.masked_fill(broken.unsqueeze(-1), torch.inf)
            everything = torch.full_like(broken, values.shape[-1], dtype=torch.int64)
            count = (everything if count is None else count).masked_fill(broken, 0)
        self.values = [values.clone(), *self.values][: self.batches]
        self.counts = [count, *self.counts][: self.batches]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> History:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.values = [fn(values) for values in self.values]
        self.counts = [count if count is None else fn(count) for count in self.counts]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        sizes = [values.shape[-1] for values in self.values]
        counts = [
            torch.full(values.shape[:-1], values.shape[-1]) if count is None else count.cpu()
            for values, count in zip(self.values, self.counts, strict=True)
        ]
        destination[f"{prefix}values"] = torch.cat(self.values, dim=-1) if sizes else torch.zeros(0)
        destination[f"{prefix}sizes"] = torch.tensor(sizes, dtype=torch.int64)
        destination[f"{prefix}counts"] = torch.stack(counts) if sizes else torch.zeros(0, dtype=torch.int64)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = {
            key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)
        }
        former = state.pop("_extra_state", None)  # lists, the format of earlier versions
        if former is not None:
            values, counts = list(former["values"]), list(former["counts"])
        else:
            names = ("values", "sizes", "counts")
            missing = [f"{prefix}{name}" for name in names if name not in state]
            if missing:
                missing_keys.extend(missing if strict else [])
                return
            side_by_side, sizes, of_each = (state.pop(name) for name in names)
            parts = side_by_side.split(sizes.tolist(), dim=-1) if len(sizes) else ()
            values = [part.detach().clone() for part in parts]
            counts = [
                None if bool((count == size).all()) else count.clone()
                for count, size in zip(of_each, sizes.tolist(), strict=True)
            ]
        unexpected_keys.extend(f"{prefix}{name}" for name in state if strict)
        self.values, self.counts = values[: self.batches], counts[: self.batches]

    def extra_repr(self) -> str:
        return f"batches={self.batches}"


# The former name, which pickles of earlier versions have.
Memory = History
