"""What the arguments of a loss can be, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.losses.closed_form import Weights
from batchshaping.losses.layers import Layers
from batchshaping.priors.checks import check_values
from batchshaping.statistics import STATISTICS
from batchshaping.statistics.statistic import Discrepancy

__all__ = [
    "Reduction",
    "check_broadcast",
    "check_prior",
    "check_same_samples",
    "chosen_reduction",
    "chosen_statistic",
    "mask_like",
    "one_for_each",
    "tensors_of",
]

_Value = TypeVar("_Value")


class Reduction(NamedTuple):
    """How the losses of the arrays are added up.

    Attributes:
        weights: what tells the weights of the arrays; it gives None if they are not added up.
        of_none: what is added for a tensor without arrays.
    """

    weights: Callable[[Layers], Weights]
    of_none: float = 0.0


_REDUCTIONS = {
    "mean": Reduction(Layers.weights_of_means, of_none=math.nan),  # as torch's mean of no values
    "sum": Reduction(lambda _: 1.0),
    "none": Reduction(lambda _: None),
}


def tensors_of(x: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors that are given, checked: one, or those of a list."""
    if not isinstance(x, list | tuple):
        check_values(x)
        return (x,)  # type: ignore[return-value]
    tensors = x
    if not tensors:
        raise ValueError(f"x must be a tensor or a list of tensors, received an empty {type(x).__name__}")
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            kinds = f"a {type(x).__name__} with a {type(tensor).__name__}"
            raise TypeError(f"x must be a tensor or a list of tensors, received {kinds}")
        check_values(tensor)
    for name in ("dtype", "device"):
        found = list(dict.fromkeys(getattr(tensor, name) for tensor in tensors))
        if len(found) > 1:
            raise ValueError(
                f"the tensors of a list must have the same {name}, received {' and '.join(map(str, found))}"
            )
    return tensors


def one_for_each(value: _Value | Sequence[_Value], x: Tensor | Sequence[Tensor], name: str) -> list[_Value]:
    """An argument for each tensor that is given: the same one for all, or a list with one for each."""
    if not isinstance(x, list | tuple):
        return [value]  # type: ignore[list-item]
    if not isinstance(value, list | tuple):
        return [value] * len(x)  # type: ignore[list-item]
    if len(value) != len(x):
        raise ValueError(
            f"{name} must be one for all tensors or a list with one for each of the {len(x)}, "
            f"received a list of {len(value)}"
        )
    return list(value)


def check_same_samples(layers: Layers, tensors: Sequence[Tensor], dim: int | Sequence[int] | None) -> None:
    """Refuse a list of tensors that have different numbers of samples."""
    for number, tensor in zip(layers.samples, tensors, strict=True):
        if number != layers.samples[0]:
            raise ValueError(
                f"the tensors of a list must have the same number of samples along dim={dim}, "
                f"received shapes {tuple(tensors[0].shape)} and {tuple(tensor.shape)}"
            )


def chosen_statistic(statistic: str | Discrepancy) -> Discrepancy:
    """The statistic of this name, or the statistic itself."""
    if isinstance(statistic, Discrepancy):
        return statistic
    if not isinstance(statistic, str) or statistic not in STATISTICS:
        known = ", ".join(map(repr, STATISTICS))
        raise ValueError(f"statistic must be one of {known} or a Statistic, received {statistic!r}")
    return STATISTICS[statistic]


def chosen_reduction(reduction: str) -> Reduction:
    """How the losses of the arrays are added up, by its name."""
    if not isinstance(reduction, str) or reduction not in _REDUCTIONS:
        known = ", ".join(map(repr, _REDUCTIONS))
        raise ValueError(f"reduction must be one of {known}, received {reduction!r}")
    return _REDUCTIONS[reduction]


def check_prior(prior: object) -> None:
    """Refuse what is no univariate distribution with a CDF."""
    known = "Beta, SymBeta, RelaxedBernoulli, Normal or any torch.distributions.Distribution with a cdf"
    if not isinstance(prior, Distribution):
        raise ValueError(f"prior must be {known}, received {prior!r}")
    if not _has_cdf(prior):
        raise ValueError(f"prior must be {known}, received {type(prior).__name__}, which has none")
    if prior.event_shape:
        raise ValueError(f"prior must be univariate, received event_shape {tuple(prior.event_shape)}")


def _has_cdf(prior: Distribution) -> bool:
    """Whether there is a CDF; a transformed distribution has one if its base does."""
    base = vars(prior).get("base_dist")
    return type(prior).cdf is not Distribution.cdf and (not isinstance(base, Distribution) or _has_cdf(base))


def check_broadcast(
    prior: Distribution, arrays: torch.Size, shape: torch.Size, dim: int | Sequence[int] | None
) -> None:
    """Refuse a prior whose ``batch_shape`` does not broadcast to the shape of the arrays."""
    if not prior.batch_shape or prior.batch_shape == arrays:
        return  # sooner than torch finds out
    try:
        matches = torch.broadcast_shapes(prior.batch_shape, arrays) == arrays
    except RuntimeError:
        matches = False
    if not matches:
        raise ValueError(
            f"prior's batch_shape {tuple(prior.batch_shape)} does not broadcast to {tuple(arrays)}, "
            f"what dim={dim} leaves of x with shape {tuple(shape)}"
        )


def mask_like(x: Tensor, mask: Tensor) -> Tensor:
    """The mask in the shape of x."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, received a {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, received {mask.dtype}")
    try:
        return mask.expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not broadcast to x with shape {tuple(x.shape)}"
        ) from None
