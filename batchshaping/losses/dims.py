"""Which dimensions hold the samples, and how they get to the end."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from batchshaping.priors.checks import is_index

__all__ = ["canonical_dims", "samples_last"]


def canonical_dims(dim: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """The sample dimensions, counted from the front and in order."""
    dims = _indices(dim)
    if not dims:  # as in torch, no dimension means all of them
        return tuple(range(ndim))
    span = max(ndim, 1)
    for d in dims:
        if not -span <= d < span:
            raise IndexError(
                f"dim must be in [{-span}, {span - 1}] for x with {ndim} dimensions, received {d}"
            )
    found = sorted({d % span for d in dims})
    if len(found) != len(dims):
        raise ValueError(f"dim must name each dimension once, received {dims}")
    return tuple(found) if ndim else ()


def _indices(dim: object) -> tuple[int, ...]:
    if is_index(dim):
        return (operator.index(dim),)  # type: ignore[arg-type]
    named: tuple[Any, ...] = () if dim is None else tuple(dim) if isinstance(dim, Iterable) else (dim,)
    if not all(map(is_index, named)):
        raise TypeError(f"dim must be an int, a sequence of ints or None, received {dim!r}")
    return tuple(map(operator.index, named))


def samples_last(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Move the sample dimensions to the end and join them: (arrays..., N)."""
    kept = [d for d in range(x.ndim) if d not in dims]
    moved = x.permute((*kept, *dims))
    if len(dims) == 1:
        return moved
    # The product, and not -1, since there may be no values at all.
    return moved.reshape(*moved.shape[: len(kept)], moved.shape[len(kept) :].numel())
