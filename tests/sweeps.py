"""What laws are swept over: every statistic with every family of priors that it takes, and their inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracles import (
    FAMILIES,
    FOREIGN,
    Family,
    arrays_of,
    characteristic_distance,
    mean_of_terms,
    relative_entropy,
)
from torch import Tensor
from torch.distributions import Distribution

import batchshaping as bs
from batchshaping.statistics import STATISTICS
from batchshaping.statistics.samples import Batch, Options
from batchshaping.statistics.statistic import ClosedFormStatistic, Comparison, Discrepancy, Statistic, Terms

F64 = torch.float64


class LogDistance(Statistic):
    """A statistic of one's own that asks more of a prior than its CDF."""

    def terms(self, values: Tensor, positions: Tensor, prior: Distribution) -> Tensor:
        return (prior.log_cdf(values) - positions.log()).square() + (prior.cdf(values) - positions) ** 4

    def __repr__(self) -> str:
        return "one's own"


class Quartic(ClosedFormStatistic):
    """A closed form of one's own: the fourth power of the distance of the CDF."""

    def terms(self, values: Tensor, positions: Tensor, prior: Distribution) -> Tensor:
        return (prior.cdf(values) - positions) ** 4

    def closed_form(self, comparison: Comparison) -> Callable[[slice], Terms]:
        samples, prepared = comparison.samples, comparison.prepared()
        evaluate = prepared.at_logits if comparison.logits else prepared

        def terms(tile: slice) -> Terms:
            at = evaluate(samples.values[..., tile])
            residual = at.cdf - samples.positions(tile)
            cubed = 2 * residual**3
            return Terms(residual**4, at.pdf * cubed, tuple(d * cubed for d in at.parameters))

        return terms

    def __repr__(self) -> str:
        return "one's own in closed form"


class Plain(Discrepancy):
    """Another statistic without its closed form: autograd differentiates it."""

    def __init__(self, statistic: str | Discrepancy) -> None:
        self.plain = STATISTICS[statistic] if isinstance(statistic, str) else statistic

    def loss(self, batch: Batch, prior: Distribution, options: Options) -> Tensor:
        return self.plain.loss(batch, prior, options)


ONES_OWN, QUARTIC = LogDistance(), Quartic()
POINTS = np.linspace(-3, 3, 33)
# By their formulas: the terms, or for Epps-Pulley their sum, as functions of the sorted values, the plotting
# positions and the parameters.
TERMS: dict[Any, Callable[[Family], Callable[..., np.ndarray]]] = {
    "cramer_von_mises": lambda family: lambda x, p, *given: (family.cdf(x, *given) - p) ** 2,
    "anderson_darling": lambda family: lambda x, p, *given: relative_entropy(p, family.cdf(x, *given)),
    "wasserstein": lambda family: lambda x, p, *given: (x - family.icdf(p, *given)) ** 2,
    "epps_pulley": lambda family: (
        lambda x, p, loc, scale: np.trapezoid(characteristic_distance((x - loc) / scale, POINTS), POINTS)
    ),
    ONES_OWN: lambda family: (
        lambda x, p, *given: np.log(family.cdf(x, *given) / p) ** 2 + (family.cdf(x, *given) - p) ** 4
    ),
    QUARTIC: lambda family: lambda x, p, *given: (family.cdf(x, *given) - p) ** 4,
}
NORMALS = (FAMILIES["Normal"], FOREIGN["Normal of torch"])


def takes(statistic: str | Discrepancy, family: Family) -> bool:
    """Whether a statistic is one for the priors of a family."""
    if statistic == "epps_pulley":
        return family in NORMALS
    return statistic != "wasserstein" or family is not FOREIGN["Gamma"]  # torch has no quantiles of it


def has_closed_form(statistic: str | Discrepancy, family: Family) -> bool:
    """Whether there is more than autograd to differentiate a statistic for the priors of a family."""
    return family in FAMILIES.values() and statistic is not ONES_OWN and not isinstance(statistic, Plain)


def _cases(families: dict[str, Family]) -> list[Any]:
    return [
        pytest.param(statistic, family, id=f"{statistic}-{name}")
        for statistic in TERMS
        for name, family in families.items()
        if takes(statistic, family)
    ]


each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
each_prior = pytest.mark.parametrize(
    ("family", "parameters"),
    [
        pytest.param(family, parameters, id=f"{name}{parameters}")
        for name, family in FAMILIES.items()
        for parameters in family.examples
    ],
)
each_statistic = pytest.mark.parametrize("statistic", TERMS, ids=str)
# Every statistic, and two of one's own, with every family that it takes: ours, or those of torch too.
each_case = pytest.mark.parametrize(("statistic", "family"), _cases(FAMILIES))
CASES_OF_ALL = _cases({**FAMILIES, **FOREIGN})
each_case_of_all = pytest.mark.parametrize(("statistic", "family"), CASES_OF_ALL)
# The same with every example of a family, in which the shapes of the density differ.
_EXAMPLES = [
    pytest.param(statistic, family, parameters, id=f"{statistic}-{name}{parameters}")
    for statistic in TERMS
    for name, family in {**FAMILIES, **FOREIGN}.items()
    if takes(statistic, family)
    for parameters in family.examples
]
each_example = pytest.mark.parametrize(("statistic", "family", "parameters"), _EXAMPLES)


def _in_ways(cases: list[Any], plain: str, other: str) -> list[Any]:
    """Cases with values or logits, and with a second flag set or not, named by what it is then.

    Half of these ways for families of torch, which have no closed form to go wrong in one of them alone, and
    for other parameters than the first, of which the flags do not know.
    """
    return [
        pytest.param(*each.values, logits, flag, id=f"{each.id}-{way}-{other if flag else plain}")
        for each in cases
        for (logits, way), flag in itertools.product([(False, "values"), (True, "logits")], (False, True))
        if logits == flag or _is_first_of_ours(*each.values[1:])
    ]


def _is_first_of_ours(family: Family, parameters: tuple[float, ...] | None = None) -> bool:
    return family in FAMILIES.values() and parameters in (None, family.examples[0])


each_example_and_way = pytest.mark.parametrize(
    ("statistic", "family", "parameters", "logits", "masked"), _in_ways(_EXAMPLES, "all", "masked-ties")
)
each_case_of_all_and_way = pytest.mark.parametrize(
    ("statistic", "family", "logits", "ties"), _in_ways(CASES_OF_ALL, "consecutive", "ties")
)


def _by_autograd_too(cases: list[Any]) -> list[Any]:
    """Cases in closed form where they have one, and by autograd."""
    return [
        pytest.param(case, *each.values[1:], id=f"{each.id}-{way}")
        for each in cases
        for case, way in [(each.values[0], "given"), (Plain(each.values[0]), "autograd")]
        if way == "given" or has_closed_form(*each.values[:2])
    ]


each_case_of_all_by_autograd_too = pytest.mark.parametrize(
    ("statistic", "family"), _by_autograd_too(CASES_OF_ALL)
)
each_example_by_autograd_too = pytest.mark.parametrize(
    ("statistic", "family", "parameters"), _by_autograd_too(_EXAMPLES)
)
each_masked = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
each_ties = pytest.mark.parametrize("ties", [False, True], ids=["consecutive", "ties"])
each_way = pytest.mark.parametrize("logits", [False, True], ids=["values", "logits"])


def formula(
    statistic: str | Discrepancy,
    family: Family,
    x: Tensor,
    parameters: tuple[float | Tensor, ...] | list[Tensor],
    dim: int | tuple[int, ...] | None = None,
    mask: Tensor | None = None,
    ties: bool = False,
    logits: bool = False,
) -> Tensor:
    """The loss of every array by the formula of the statistic, in double precision."""
    values = torch.sigmoid(x.detach().double()) if logits else x
    terms = TERMS[statistic](family)
    return torch.as_tensor(mean_of_terms(values, terms, tuple(parameters), dim, mask, ties))


# Inputs


def learned(parameters: tuple[float, ...], shape: tuple[int, ...] = (), spread: float = 0.0) -> list[Tensor]:
    """Parameters in double precision that require grad, each spread a little around its value."""
    return [(p * (1 + spread * (2 * torch.rand(shape, dtype=F64) - 1))).requires_grad_() for p in parameters]


def inside(
    family: Family, parameters: tuple[float, ...], shape: tuple[int, ...], upper: float = 0.95
) -> Tensor:
    """Distinct values of probability 0.05 to ``upper`` under the prior, in random order.

    Evenly spaced probabilities, jittered by less than their distance, so that no small step joins two.
    """
    n = int(np.prod(shape, dtype=int))
    jitter = 0.3 * (torch.rand(n, dtype=F64) - 0.5)
    p = 0.05 + (upper - 0.05) * (torch.randperm(n) + 0.5 + jitter) / n
    return torch.as_tensor(family.icdf(p.numpy(), *parameters)).reshape(shape)


def in_unit_interval(x: Tensor) -> bool:
    return bool(((x > 0) & (x < 1)).all())


def as_logits(x: Tensor) -> Tensor:
    """The logits of values in (0, 1); other values are logits as they are."""
    return torch.logit(x) if in_unit_interval(x) else x


def smooth(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Coordinates in which no density is so large that finite differences fail, and the way back to x."""
    if in_unit_interval(x):
        return torch.logit(x), torch.sigmoid
    scale = x.abs().mean()
    return x / scale, lambda z: z * scale


def tied(x: Tensor) -> Tensor:
    """Values of which about half occur more than once within an array."""
    return torch.where(torch.rand(x.shape) < 0.5, x.reshape(-1)[:3].mean(), x)


def mask_of(shape: tuple[int, ...], dim: int | tuple[int, ...] | None = 0) -> Tensor:
    """A random mask that leaves every array at least one sample."""
    dims = tuple(range(len(shape))) if dim is None else dim
    mask = torch.rand(shape) < 0.6
    return torch.where(mask.any(dims, keepdim=True), mask, True)


def left_by(dim: int | tuple[int, ...] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the arrays."""
    return arrays_of(torch.empty(shape), dim)[1]


def with_gradients(function: Callable[..., Tensor], *operands: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The value of a function and the gradients of its sum in the operands, which are left as they were."""
    leaves = [t.detach().clone().requires_grad_() for t in operands]
    value = function(*leaves)
    return value.detach(), list(torch.autograd.grad(value.sum(), leaves))


def loss_of(
    statistic: str | Discrepancy, family: Family, dim: int | tuple[int, ...] | None = 0, **settings: Any
) -> Callable[..., Tensor]:
    """The loss as a function of the values and of the parameters of the prior."""

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        return bs.batch_shaping(x, family.prior(*parameters), dim, statistic=statistic, **settings)

    return loss
