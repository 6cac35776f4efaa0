"""The statistics against SciPy and mpmath, their gradients, and the laws that hold for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
import torch.distributions as td
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    DIGITS,
    FAMILIES,
    Family,
    each_family,
    each_prior,
    inside,
    learned,
    log_tails,
    mean_of_terms,
)
from scipy import integrate, optimize, special, stats
from torch import Tensor
from torch.autograd import gradcheck

import batchshaping as bs
from batchshaping.experiments.fit import fit, published_start
from batchshaping.priors.closed_form import ClosedFormPrior
from batchshaping.statistics import STATISTICS
from batchshaping.statistics.epps_pulley import EppsPulley
from batchshaping.statistics.samples import Samples
from batchshaping.statistics.statistic import ClosedFormStatistic, Statistic, Terms

F64 = torch.float64
NORMAL = FAMILIES["Normal"]
# By their formulas, as functions of the sorted values, the plotting positions and the parameters.
TERMS: dict[str, Callable[[Family], Callable[..., np.ndarray]]] = {
    "cramer_von_mises": lambda family: lambda x, p, *given: (family.cdf(x, *given) - p) ** 2,
    "anderson_darling": lambda family: lambda x, p, *given: relative_entropy(p, family.cdf(x, *given)),
    "wasserstein": lambda family: lambda x, p, *given: (x - family.icdf(p, *given)) ** 2,
}
each_statistic = pytest.mark.parametrize("statistic", TERMS)
each_way = pytest.mark.parametrize("logits", [False, True], ids=["values", "logits"])
each_ties = pytest.mark.parametrize("ties", [False, True], ids=["consecutive", "ties"])
# Of the statistics that a Normal prior has, and of one that all priors have.
each_of_all = pytest.mark.parametrize(
    ("statistic", "family"),
    [
        pytest.param(statistic, family, id=f"{statistic}-{name}")
        for statistic in STATISTICS
        for name, family in FAMILIES.items()
        if statistic in TERMS or name == "Normal"
    ],
)


def relative_entropy(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Twice that of a coin of probability p to one of probability q."""
    return 2 * (special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q))


class Plain(Statistic):
    """Another statistic's terms, differentiated by autograd."""

    def __init__(self, name: str) -> None:
        self.terms_of = STATISTICS[name].terms

    def terms(self, values: Tensor, positions: Tensor, prior: td.Distribution) -> Tensor:
        return self.terms_of(values, positions, prior)


class AbsoluteDistance(Statistic):
    """The distance whose mean is the 1-Wasserstein distance."""

    def terms(self, values: Tensor, positions: Tensor, prior: td.Distribution) -> Tensor:
        return (values - prior.icdf(positions)).abs()


def mask_of(shape: tuple[int, ...]) -> Tensor:
    """A random mask of matrices of samples by arrays that leaves every array at least one sample."""
    mask = torch.rand(shape) < 0.6
    mask[0] = True
    return mask


def tied(x: Tensor) -> Tensor:
    """Values of which about half occur more than once within an array."""
    return torch.where(torch.rand(x.shape) < 0.5, x.reshape(-1)[:3].mean(), x)


def smooth(family: Family, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Coordinates in which no density is so large that finite differences fail, and the way back to x."""
    if family is NORMAL:
        scale = x.abs().mean()
        return x / scale, lambda z: z * scale
    return torch.logit(x), torch.sigmoid


def as_logits(family: Family, x: Tensor) -> Tensor:
    """Logits of values inside the support; those of a Normal are squeezed into (0, 1) first."""
    return torch.logit(torch.sigmoid(x) if family is NORMAL else x)


# What they are


@each_statistic
@each_prior
def test_a_statistic_is_the_mean_of_its_terms(
    statistic: str, family: Family, parameters: tuple[float, ...]
) -> None:
    terms = TERMS[statistic](family)
    # Nearer to 1, single precision does not tell values of a U-shaped prior apart.
    distinct = inside(family, parameters, (30, 4), upper=0.7)
    mask = mask_of((30, 4))
    for priors in (parameters, learned(parameters, (4,), 0.1)):
        prior = family.prior(*priors)
        for x, keep, ties in itertools.product((distinct, tied(distinct)), (None, mask), (False, True)):
            for y, rtol, atol in ((x, 1e-9, 1e-12), (x.float(), 1e-3, 1e-5)):
                loss = bs.batch_shaping(
                    y, prior, 0, statistic=statistic, mask=keep, ties=ties, reduction="none"
                )
                assert loss.dtype == y.dtype
                expected = torch.as_tensor(mean_of_terms(y, terms, tuple(priors), 0, keep, ties))
                torch.testing.assert_close(loss.detach().double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("statistic", "name"),
    [
        (statistic, name)
        for statistic, name in itertools.product(TERMS, FAMILIES)
        if statistic != "wasserstein" or "Beta" not in name  # whose quantiles take long
    ],
)
def test_many_samples_with_gaps_and_ties_equal_the_formula(statistic: str, name: str) -> None:
    family, parameters = FAMILIES[name], FAMILIES[name].examples[0]
    x = tied(inside(family, parameters, (50_000, 3)))
    mask = mask_of(x.shape)
    loss = bs.batch_shaping(
        x, family.prior(*parameters), 0, statistic=statistic, mask=mask, ties=True, reduction="none"
    )
    expected = mean_of_terms(x, TERMS[statistic](family), parameters, 0, mask, ties=True)
    torch.testing.assert_close(loss, torch.as_tensor(expected), rtol=1e-9, atol=1e-12)


def converted(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The plotting positions i / (N + 1), and what has to be added to get SciPy's (2 i - 1) / (2 N)."""
    p = np.arange(1, n + 1) / (n + 1)
    return p, (2 * np.arange(1, n + 1) - 1) / (2 * n) - p


@pytest.mark.parametrize("n", [1, 2, 30, 1000])
@each_prior
def test_cramer_von_mises_is_that_of_scipy_at_its_positions(
    family: Family, parameters: tuple[float, ...], n: int
) -> None:
    x = inside(family, parameters, (n,), upper=0.7)
    loss = bs.batch_shaping(x, family.prior(*parameters)).item()
    p, shift = converted(n)
    distance = family.cdf(np.sort(x.numpy()), *parameters) - p
    # The sum of (distance - shift)^2, of which the loss gives the first of three sums.
    total = n * loss - 2 * np.sum(shift * distance) + np.sum(shift**2)
    if n > 1:
        expected = stats.cramervonmises(x.numpy(), lambda v: family.cdf(v, *parameters)).statistic
        assert 1 / (12 * n) + total == pytest.approx(expected, rel=1e-10)
    assert total == pytest.approx(np.sum((distance - shift) ** 2), rel=1e-9)


@pytest.mark.parametrize("n", [2, 30, 1000])
@pytest.mark.parametrize(
    ("prior", "known", "distribution"),
    [
        (bs.Normal(0.6, 0.1), {"loc": 0.6, "scale": 0.1}, stats.norm),
        (bs.Beta(2.0, 6.0), {"a": 2.0, "b": 6.0, "loc": 0.0, "scale": 1.0}, stats.beta),
        (bs.SymBeta(0.6), {"a": 0.6, "b": 0.4, "loc": 0.0, "scale": 1.0}, stats.beta),
    ],
    ids=["Normal", "Beta", "SymBeta"],
)
def test_anderson_darling_is_that_of_scipy_at_its_positions(
    prior: td.Distribution, known: dict[str, float], distribution: Any, n: int
) -> None:
    # Drawn from something else, so that the statistic is not near its least.
    x = np.random.default_rng(n).uniform(0.05, 0.95, n)
    loss = bs.batch_shaping(torch.from_numpy(x), prior, statistic="anderson_darling").item()
    p, shift = converted(n)
    frozen = distribution(**known)
    log_odds = frozen.logcdf(np.sort(x)) - frozen.logsf(np.sort(x))
    entropy = special.entr(p) + special.entr(1 - p)
    expected = stats.goodness_of_fit(
        distribution, x, known_params=known, statistic="ad", n_mc_samples=1
    ).statistic
    assert n * loss + 2 * entropy.sum() - 2 * np.sum(shift * log_odds) - n == pytest.approx(
        expected, rel=1e-9
    )


@pytest.mark.parametrize("n", [1, 2, 30, 200])
@each_prior
def test_wasserstein_is_that_of_scipy_between_samples_and_quantiles(
    family: Family, parameters: tuple[float, ...], n: int
) -> None:
    x = inside(family, parameters, (n,)) * 0.9
    quantiles = family.icdf(np.arange(1, n + 1) / (n + 1), *parameters)
    prior = family.prior(*parameters)
    first = stats.wasserstein_distance(x.numpy(), quantiles)
    assert bs.batch_shaping(x, prior, statistic=AbsoluteDistance()).item() == pytest.approx(first, rel=1e-9)
    # Squared, it is the cheapest way to carry the samples to the quantiles.
    cost = (x.numpy()[:, None] - quantiles) ** 2
    cheapest = cost[optimize.linear_sum_assignment(cost)].mean()
    second = bs.batch_shaping(x, prior, statistic="wasserstein").item()
    assert second == pytest.approx(cheapest, rel=1e-9, abs=1e-18)
    assert second >= first**2 * (1 - 1e-9)


@each_of_all
def test_a_statistic_is_least_at_the_quantiles(statistic: str, family: Family) -> None:
    parameters = family.examples[0]
    prior = family.prior(*parameters)
    x = torch.as_tensor(family.icdf(np.arange(1, 200) / 200, *parameters))
    best = bs.batch_shaping(x, prior, statistic=statistic).item()
    # The characteristic function of 199 quantiles is not quite that of the Normal.
    assert -1e-12 < best < (1e-4 if statistic == "epps_pulley" else 1e-12)
    for moved in (x + 0.05 * (x.max() - x), 0.9 * x + 0.1 * x.mean(), x[:150]):
        assert bs.batch_shaping(moved, prior, statistic=statistic).item() > 1e-5 + best


# Gradients


@each_way
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked-ties"])
@each_statistic
@each_prior
def test_gradcheck_in_x_and_every_parameter(
    statistic: str, family: Family, parameters: tuple[float, ...], logits: bool, masked: bool
) -> None:
    x = inside(family, parameters, (5, 2), upper=0.7)
    start, back = (as_logits(family, x), lambda z: z) if logits else smooth(family, x)
    mask = mask_of((5, 2)) if masked else None
    given = learned(parameters, (2,), spread=0.1)

    def loss(z: Tensor, *given: Tensor) -> Tensor:
        prior = family.prior(*given)
        return bs.batch_shaping(
            back(z),
            prior,
            0,
            statistic=statistic,
            mask=mask,
            ties=masked,
            logits=logits,
            reduction="none",
        )

    # Sums of squares of up to 20^2 (Normal(-3, 20)) carry the rounding of their size.
    assert gradcheck(loss, (start.requires_grad_(), *given), atol=1e-5, rtol=1e-4)


@each_way
@each_statistic
@each_family
@each_ties
def test_the_closed_form_equals_autograd(statistic: str, family: Family, logits: bool, ties: bool) -> None:
    parameters = family.examples[0]
    x = inside(family, parameters, (20, 3, 4))
    x = tied(as_logits(family, x) if logits else x)
    mask = mask_of((20, 3, 4))
    for shapes, keep in itertools.product((((), ()), ((4,), (3, 1)), ((3, 4), (3, 4))), (None, mask)):
        results = []
        given = [learned((p,), shape, 0.1)[0] for p, shape in zip(parameters, shapes, strict=False)]
        for which in (statistic, Plain(statistic)):
            y = x.clone().requires_grad_()
            loss = bs.batch_shaping(
                y, family.prior(*given), 0, statistic=which, mask=keep, ties=ties, logits=logits
            )
            results.append((loss.detach(), *torch.autograd.grad(loss, (y, *given))))
        for closed, plain in zip(*results, strict=True):
            torch.testing.assert_close(closed, plain, rtol=1e-8, atol=1e-12)


@each_of_all
def test_single_precision_follows_double(statistic: str, family: Family) -> None:
    parameters = family.examples[0]
    x = inside(family, parameters, (200, 3), upper=0.8)
    results = []
    for dtype in (F64, torch.float32):
        y = x.to(dtype).requires_grad_()
        given = [torch.full((3,), p, dtype=dtype, requires_grad=True) for p in parameters]
        loss = bs.batch_shaping(y, family.prior(*given), 0, statistic=statistic)
        gradients = torch.autograd.grad(loss, (y, *given))
        assert all(g.dtype == dtype for g in (loss, *gradients))
        results.append([t.detach().double() for t in (loss, *gradients)])
    for double, single in zip(*results, strict=True):
        torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-5 * float(double.abs().max()) + 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_of_all
def test_half_precision_is_computed_in_single(statistic: str, family: Family, dtype: torch.dtype) -> None:
    x = inside(family, family.examples[0], (50, 2)).to(dtype)
    prior = family.prior(*family.examples[0])
    half, single = x.clone().requires_grad_(), x.float().requires_grad_()
    losses = [bs.batch_shaping(y, prior, 0, statistic=statistic, ties=True) for y in (half, single)]
    for loss in losses:
        loss.backward()
    assert losses[0].dtype == half.grad.dtype == dtype
    torch.testing.assert_close(losses[0], losses[1].to(dtype))
    torch.testing.assert_close(half.grad, single.grad.to(dtype))


def largest_error(found: Tensor, expected: list[Any]) -> float:
    """Relative to what is expected, which may be too large or too small for a float64 to tell."""
    pairs = zip(found.detach().reshape(-1).tolist(), expected, strict=True)
    return max(float(abs((mpmath.mpf(one) - other) / other)) for one, other in pairs)


class Tails:
    """Anderson-Darling of single values by mpmath, at 50 digits: each is an array of one, of position 1/2."""

    def __init__(self, name: str, parameters: tuple[float, ...], logits: bool = False) -> None:
        self.name, self.logits = name, logits
        self.parameters = [mpmath.mpf(p) for p in parameters]

    def value(self, x: Any, parameters: list[Any] | None = None) -> Any:
        with mpmath.workdps(DIGITS):
            both = (1 / (1 + mpmath.exp(-x)), 1 / (1 + mpmath.exp(x))) if self.logits else (x, None)
            given = self.parameters if parameters is None else parameters
            lower, upper = log_tails(self.name, tuple(given), *both)
            return -2 * mpmath.log(2) - lower - upper

    def slope(self, x: float) -> Any:
        """The derivative in x, from steps that are small beside the distance to the ends of the support."""
        with mpmath.workdps(DIGITS):
            x = mpmath.mpf(x)
            size = min(abs(x), abs(1 - x)) if self.name != "Normal" and not self.logits else 1
            h = size * mpmath.mpf(10) ** -15
            return (self.value(x + h) - self.value(x - h)) / (2 * h)

    def slope_in(self, k: int, x: float) -> Any:
        """The derivative in the k-th parameter."""
        with mpmath.workdps(DIGITS):
            h = mpmath.mpf(10) ** -15 * abs(self.parameters[k])
            ends = (
                self.value(mpmath.mpf(x), [p + s * h * (j == k) for j, p in enumerate(self.parameters)])
                for s in (1, -1)
            )
            return (next(ends) - next(ends)) / (2 * h)


UNIT = [1e-300, 1e-100, 1e-20, 1e-8, 0.3, 0.9, 1 - 1e-8, 1 - 2**-53]
FAR: list[tuple[str, tuple[float, ...], list[float]]] = [
    ("Normal", (0.5, 2.0), [0.5 + 2.0 * z for z in (-40, -20, -5, -1, 0.25, 1, 5, 20, 40)]),
    ("Beta", (2.0, 6.0), UNIT),
    ("Beta", (0.6, 0.4), UNIT),
    ("Beta", (30.0, 70.0), UNIT),
    ("Beta", (0.05, 3.0), UNIT),
    ("SymBeta", (0.9,), UNIT),
    ("RelaxedBernoulli", (0.2, 0.25), UNIT),
    ("RelaxedBernoulli", (0.8, 0.01), UNIT),
    ("RelaxedBernoulli", (0.3, 5.0), UNIT),
]
LOGITS = [-700.0, -300.0, -40.0, -2.0, 0.0, 1.0, 40.0, 300.0, 700.0]
each_tail = pytest.mark.parametrize(
    ("name", "parameters", "values", "logits"),
    [(*case, False) for case in FAR] + [(*case[:2], LOGITS, True) for case in FAR if case[0] != "Normal"],
    ids=str,
)


@each_tail
def test_anderson_darling_in_the_far_tails_is_that_of_mpmath(
    name: str, parameters: tuple[float, ...], values: list[float], logits: bool
) -> None:
    oracle = Tails(name, parameters, logits)
    x = torch.tensor([values], dtype=F64, requires_grad=True)
    given = [torch.tensor(p, dtype=F64).expand(len(values)).clone().requires_grad_() for p in parameters]
    prior = FAMILIES[name].prior(*given)
    loss = bs.batch_shaping(x, prior, 0, statistic="anderson_darling", logits=logits, reduction="none")
    assert largest_error(loss, [oracle.value(mpmath.mpf(v)) for v in values]) < 1e-10
    by_x, *by_parameter = torch.autograd.grad(loss.sum(), (x, *given))
    # Where the derivative is zero or nearly, the error is in what cancels.
    slopes = [oracle.slope(v) for v in values]
    clear = [k for k, (v, s) in enumerate(zip(values, slopes, strict=True)) if abs(s * v) > 1e-3]
    assert len(clear) >= len(values) - 3
    assert largest_error(by_x[0, clear], [slopes[k] for k in clear]) < 1e-10
    for k, gradient in enumerate(by_parameter):
        expected = [oracle.slope_in(k, v) for v in values]
        scale = max(1.0, parameters[k])
        clear = [j for j, e in enumerate(expected) if abs(e) * scale > 1e-3]
        assert largest_error(gradient[clear], [expected[j] for j in clear]) < 1e-8


@pytest.mark.parametrize(("name", "parameters", "values"), FAR, ids=str)
def test_many_samples_in_the_far_tails_are_those_of_mpmath(
    name: str, parameters: tuple[float, ...], values: list[float]
) -> None:
    n = len(values)
    x = torch.tensor(values, dtype=F64)[torch.randperm(n)].requires_grad_()
    loss = bs.batch_shaping(x, FAMILIES[name].prior(*parameters), statistic="anderson_darling")
    with mpmath.workdps(DIGITS):
        total = mpmath.mpf(0)
        for i, value in enumerate(values, 1):
            lower, upper = log_tails(name, parameters, value)
            p = mpmath.mpf(i) / (n + 1)
            total += 2 * (p * (mpmath.log(p) - lower) + (1 - p) * (mpmath.log(1 - p) - upper))
        assert largest_error(loss, [total / n]) < 1e-10


# Where the gradient of the plain loss vanishes


@pytest.mark.parametrize(
    ("statistic", "prior", "logits"),
    [
        ("anderson_darling", bs.Normal(0.6, 0.1), False),
        ("wasserstein", bs.Normal(0.6, 0.1), False),
        ("anderson_darling", bs.Beta(2.0, 6.0), True),
        ("anderson_darling", bs.RelaxedBernoulli(0.2, 0.25), True),
    ],
    ids=str,
)
def test_the_gradient_does_not_vanish_with_the_distance(
    statistic: str, prior: td.Distribution, logits: bool
) -> None:
    x = torch.tensor([[-200.0, -50.0, -10.0, 10.0, 50.0, 200.0]], requires_grad=True)
    loss = bs.batch_shaping(x, prior, 0, statistic=statistic, logits=logits, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    assert bool((gradient.sign() == x.detach().sign()).all())
    assert bool((gradient[0].diff() >= -1e-6).all())
    assert bool((gradient.abs() > 1e-2).all())
    (of_plain,) = torch.autograd.grad(bs.batch_shaping(x, bs.Normal(0.6, 0.1), 0), x)
    assert not of_plain.any()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("statistic", ["cramer_von_mises", "anderson_darling"])
def test_logits_do_not_saturate(statistic: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[-50.0, 50.0]], dtype=dtype, requires_grad=True)
    prior = bs.RelaxedBernoulli(0.5, 0.01)
    loss = bs.batch_shaping(x, prior, 0, statistic=statistic, logits=True, reduction="sum")
    (by_logits,) = torch.autograd.grad(loss, x)
    # Half of the mass is on each side, and the logits there are of the order of 1 / temperature.
    cdf = special.expit(0.01 * np.array([-50.0, 50.0]))
    by_cdf = 2 * (cdf - 0.5) if statistic == "cramer_von_mises" else 1 / (1 - cdf) - 1 / cdf
    expected = torch.as_tensor(by_cdf * 0.01 * cdf * (1 - cdf)).to(dtype)
    torch.testing.assert_close(by_logits[0], expected, rtol=1e-5, atol=0)
    values = torch.sigmoid(x.detach().float()).requires_grad_()
    saturated = bs.batch_shaping(values, prior, 0, statistic=statistic)
    (by_values,) = torch.autograd.grad(saturated, values)
    assert values[0, 1] == 1.0 and by_values[0, 1] == 0.0


@pytest.mark.parametrize(
    "prior",
    [bs.RelaxedBernoulli(0.2, 0.25), bs.RelaxedBernoulli(0.5, 8.0), bs.Beta(5.0, 2.0), bs.Beta(0.6, 0.4)],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "lowest"), [(torch.float32, -88.0), (F64, -700.0), (F64, -709.0)], ids=str)
def test_values_that_are_subnormal_have_the_gradient_of_their_logits(
    prior: td.Distribution, dtype: torch.dtype, lowest: float
) -> None:
    results = []
    for logits in (False, True):
        z = torch.tensor([0.0, lowest, 2.0], dtype=dtype, requires_grad=True)
        x = z if logits else torch.sigmoid(z)
        loss = bs.batch_shaping(x, prior, statistic="anderson_darling", logits=logits)
        results.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@each_of_all
def test_all_is_finite_however_near_to_0_a_value_is(
    statistic: str, family: Family, dtype: torch.dtype
) -> None:
    finfo = torch.finfo(dtype)
    tiny = finfo.smallest_normal
    for parameters in family.examples:
        x = torch.tensor([0.0, tiny * finfo.eps, tiny / 8, tiny, 0.3, 1.0], dtype=dtype, requires_grad=True)
        given = [torch.tensor(p, dtype=dtype, requires_grad=True) for p in parameters]
        loss = bs.batch_shaping(x, family.prior(*given), statistic=statistic)
        for number in (loss, *torch.autograd.grad(loss, (x, *given))):
            assert bool(number.isfinite().all())


@pytest.mark.parametrize("statistic", ["epps_pulley", "cramer_von_mises", "wasserstein"])
def test_where_the_sigmoid_rounds_to_1_the_gradient_in_logits_is_that_of_double(statistic: str) -> None:
    gradients = []
    for dtype in (torch.float32, F64):
        z = torch.tensor([-20.0, -1.0, 0.5, 18.0, 20.0, 30.0], dtype=dtype, requires_grad=True)
        loss = bs.batch_shaping(z, bs.Normal(0.3, 1.2), statistic=statistic, logits=True)
        gradients.append(torch.autograd.grad(loss, z)[0].double())
    assert bool((gradients[0][-3:].abs() > 1e-15).all())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=0)


@each_statistic
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_ties_among_logits_are_those_of_the_logits_whatever_the_prior(
    statistic: str, dtype: torch.dtype
) -> None:
    """Large logits are different numbers, though their sigmoids are the same."""
    z = torch.tensor([-1.0, 0.3, 40.0, 41.0, 42.0, 42.0], dtype=dtype)
    losses = [
        bs.batch_shaping(z, family(0.5, 0.7), statistic=statistic, ties=True, logits=True)
        for family in (bs.Normal, td.Normal)
    ]
    positions = torch.tensor([1, 2, 3, 4, 6, 6], dtype=F64).numpy() / 7
    terms = TERMS[statistic](NORMAL)(torch.sigmoid(z.double()).numpy(), positions, 0.5, 0.7)
    for loss in losses:
        torch.testing.assert_close(loss.double(), torch.tensor(terms.mean(), dtype=F64), rtol=1e-4, atol=1e-7)


@each_of_all
@pytest.mark.parametrize("foreign", [False, True], ids=["closed", "autograd"])
def test_an_infinite_logit_is_a_sample_with_a_mask_and_without(
    statistic: str, family: Family, foreign: bool
) -> None:
    z = torch.tensor([[-torch.inf, -1.0, 0.2, torch.inf, 2.0], [0.1, torch.inf, torch.inf, -3.0, 1.0]])
    prior: td.Distribution = family.prior(*family.examples[0])
    if foreign:
        prior = td.Normal(0.5, 0.7)
    call = partial(bs.batch_shaping, prior=prior, dim=1, statistic=statistic, logits=True, reduction="none")
    plain = call(z)
    assert bool(plain.isfinite().all())
    torch.testing.assert_close(call(z, mask=torch.ones_like(z, dtype=torch.bool)), plain)
    padded = torch.cat([z, torch.full((2, 1), torch.nan)], dim=1)
    torch.testing.assert_close(call(padded, mask=~padded.isnan()), plain)


@each_statistic
@each_prior
@each_ties
def test_logits_give_the_loss_of_their_sigmoid(
    statistic: str, family: Family, parameters: tuple[float, ...], ties: bool
) -> None:
    z = tied(torch.empty(40, 3, dtype=F64).uniform_(-5, 5))
    mask = mask_of((40, 3))
    results = []
    for logits in (True, False):
        y = z.clone().requires_grad_()
        given = learned(parameters)
        values = y if logits else torch.sigmoid(y)
        loss = bs.batch_shaping(
            values, family.prior(*given), 0, statistic=statistic, mask=mask, ties=ties, logits=logits
        )
        results.append((loss.detach(), *torch.autograd.grad(loss, (y, *given))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def descended(statistic: str, start: Tensor, prior: td.Distribution, steps: int) -> float:
    """The plain loss after descent on a statistic from a published start."""
    shaped = fit(
        start,
        prior,
        steps=steps,
        learning_rate=0.1,
        loss=partial(bs.batch_shaping, prior=prior, statistic=statistic),
    )
    return bs.batch_shaping(shaped.values[-1].double(), prior).item()


def test_from_outside_the_support_the_other_statistics_arrive() -> None:
    start, prior = published_start(draw=3), bs.Normal(0.6, 0.1)
    assert descended("cramer_von_mises", start, prior, 200) > 1e-3
    assert descended("anderson_darling", start, prior, 200) < 1e-5
    assert descended("wasserstein", start, prior, 200) < 1e-8


def test_at_low_temperature_logits_arrive() -> None:
    prior = bs.RelaxedBernoulli(0.8, 0.01)
    # At this temperature logits span hundreds, and so do the steps.
    z = published_start(draw=6).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=10.0)
    for _ in range(300):
        optimizer.zero_grad()
        bs.batch_shaping(z, prior, logits=True).backward()
        optimizer.step()
    assert bs.batch_shaping(z.detach().double(), prior, logits=True).item() < 1e-4


# One's own


class Quartic(ClosedFormStatistic):
    """The fourth power of the distance of the CDF."""

    def terms(self, values: Tensor, positions: Tensor, prior: td.Distribution) -> Tensor:
        return (prior.cdf(values) - positions) ** 4

    def closed_form(
        self,
        prior: type[ClosedFormPrior],
        parameters: tuple[Tensor, ...],
        samples: Samples,
        logits: bool,
        gradients: bool,
    ) -> Callable[[slice], Terms]:
        prepared = prior.prepare(parameters, samples.values.dtype, gradients=gradients)

        def terms(tile: slice) -> Terms:
            at = (prepared.at_logits if logits else prepared)(samples.values[..., tile])
            residual = at.cdf - samples.positions(tile)
            cubed = 2 * residual**3
            return Terms(residual**4, at.pdf * cubed, tuple(d * cubed for d in at.parameters))

        return terms


@each_way
@each_family
def test_a_closed_form_of_ones_own_works_with_every_prior(family: Family, logits: bool) -> None:
    parameters = family.examples[0]
    x = tied(inside(family, parameters, (20, 3)))
    mask = mask_of((20, 3))
    given = learned(parameters, (3,), 0.1)
    values = as_logits(family, x) if logits else x
    loss = bs.batch_shaping(
        values, family.prior(*given), 0, statistic=Quartic(), mask=mask, logits=logits, reduction="none"
    )
    seen = torch.sigmoid(values) if logits else values
    expected = mean_of_terms(seen, lambda v, p, *q: (family.cdf(v, *q) - p) ** 4, tuple(given), 0, mask)
    torch.testing.assert_close(loss.detach(), torch.as_tensor(expected), rtol=1e-9, atol=1e-14)
    x = inside(family, parameters, (6, 3))
    start, back = (as_logits(family, x), lambda z: z) if logits else smooth(family, x)
    assert gradcheck(
        lambda z, *p: bs.batch_shaping(back(z), family.prior(*p), 0, statistic=Quartic(), logits=logits),
        (start.requires_grad_(), *given),
    )


class Recorder(Statistic):
    """Keeps what it is given."""

    def terms(self, values: Tensor, positions: Tensor, prior: td.Distribution) -> Tensor:
        self.given = values, positions
        return (prior.cdf(values) - positions).abs() + 0 * prior.log_cdf(values) * prior.log_sf(values)


@each_ties
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@each_family
def test_a_statistic_of_ones_own_gets_order_statistics_and_positions(
    family: Family, masked: bool, ties: bool
) -> None:
    parameters = family.examples[0]
    x = tied(inside(family, parameters, (10, 3, 2)))
    mask = mask_of((10, 3, 2)) if masked else None
    statistic = Recorder()
    given = learned(parameters, (3, 1), 0.1)
    loss = bs.batch_shaping(
        x, family.prior(*given), 0, statistic=statistic, mask=mask, ties=ties, reduction="none"
    )
    values, positions = statistic.given
    assert values.shape == x.shape and torch.broadcast_shapes(values.shape, positions.shape) == x.shape
    for i, j in itertools.product(range(3), range(2)):
        array = x[:, i, j] if mask is None else x[:, i, j][mask[:, i, j]]
        n = len(array)
        torch.testing.assert_close(values[:n, i, j].detach(), array.sort().values)
        rank = stats.rankdata(np.sort(array.numpy()), method="max" if ties else "ordinal")
        torch.testing.assert_close(
            positions.expand(x.shape)[:n, i, j], torch.as_tensor(rank / (n + 1)), check_dtype=False
        )
    expected = mean_of_terms(x, lambda v, p, *q: abs(family.cdf(v, *q) - p), tuple(given), 0, mask, ties)
    torch.testing.assert_close(loss.detach(), torch.as_tensor(expected), rtol=1e-9, atol=1e-13)


def test_modules_take_a_statistic_of_ones_own() -> None:
    x = torch.rand(50, 3)
    prior = bs.Beta(2.0, 6.0)
    expected = bs.batch_shaping(x, prior, 0, statistic=AbsoluteDistance())
    assert bs.BatchShapingLoss(prior, 0, statistic=AbsoluteDistance())(x) == expected
    module = bs.GeneralizedBatchShapingLoss(3, statistic=AbsoluteDistance())
    module(x)
    torch.testing.assert_close(
        module.prior_loss, bs.batch_shaping(x, module.prior, 0, statistic=AbsoluteDistance()).detach()
    )


@each_way
@each_statistic
def test_the_generalized_loss_has_every_statistic(statistic: str, logits: bool) -> None:
    module = bs.GeneralizedBatchShapingLoss(4, statistic=statistic, logits=logits).double()
    z = torch.randn(60, 4, dtype=F64)
    x = z if logits else torch.sigmoid(z)
    total = module(x)
    total.backward()
    mean, temperature = (t.detach() for t in (module.mean, module.temperature))
    family = FAMILIES["RelaxedBernoulli"]
    arrays = mean_of_terms(torch.sigmoid(z), TERMS[statistic](family), (mean, temperature), 0)
    hyper = mean_of_terms(mean, TERMS["cramer_von_mises"](FAMILIES["Beta"]), (3.0, 7.0))
    expected = torch.as_tensor(arrays.mean() + hyper) + 0.1 * temperature.mean()
    torch.testing.assert_close(total.detach(), expected, rtol=1e-9, atol=1e-12)
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in module.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda name: bs.batch_shaping(torch.rand(5), bs.Beta(2.0, 6.0), statistic=name),
        lambda name: bs.BatchShapingLoss(bs.Beta(2.0, 6.0), statistic=name),
        lambda name: bs.GeneralizedBatchShapingLoss(3, statistic=name),
    ],
    ids=["functional", "module", "generalized"],
)
def test_an_unknown_statistic_is_refused_with_the_known_ones(make: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="received 'kolmogorov_smirnov'") as error:
        make("kolmogorov_smirnov")
    message = str(error.value)
    assert "\n" not in message
    assert all(repr(name) in message for name in STATISTICS)


# Distributions of others

FOREIGN: dict[str, tuple[td.Distribution, Any]] = {
    "Uniform": (td.Uniform(0.1, 0.8), stats.uniform(0.1, 0.7)),
    "Laplace": (td.Laplace(0.2, 0.7), stats.laplace(0.2, 0.7)),
    "Exponential": (td.Exponential(2.0), stats.expon(scale=0.5)),
    "Gumbel": (td.Gumbel(0.2, 0.7), stats.gumbel_r(0.2, 0.7)),
    "LogNormal": (td.LogNormal(0.2, 0.7), stats.lognorm(0.7, scale=np.exp(0.2))),
    "Cauchy": (td.Cauchy(0.2, 0.7), stats.cauchy(0.2, 0.7)),
    "Gamma": (td.Gamma(2.0, 3.0), stats.gamma(2.0, scale=1 / 3)),
}


@each_way
@each_statistic
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_distribution_has_every_statistic(name: str, statistic: str, logits: bool) -> None:
    prior, frozen = FOREIGN[name]
    if name == "Gamma" and statistic == "wasserstein":
        return  # torch has no quantiles of it
    family = Family(lambda: prior, (), frozen.cdf, frozen.ppf, None, ())
    x = torch.empty(20, 3, dtype=F64).uniform_(0.15, 0.75)
    mask = mask_of((20, 3))
    # torch keeps numbers in single precision.
    expected = mean_of_terms(x, TERMS[statistic](family), (), 0, mask)
    values = (torch.logit(x) if logits else x).requires_grad_()
    loss = bs.batch_shaping(values, prior, 0, statistic=statistic, mask=mask, logits=logits, reduction="none")
    torch.testing.assert_close(loss.detach(), torch.as_tensor(expected), rtol=1e-5, atol=1e-6)
    check = lambda z: bs.batch_shaping(z, prior, 0, statistic=statistic, mask=mask, logits=logits)  # noqa: E731
    assert gradcheck(check, (values,), eps=1e-6, atol=1e-5)


def test_wasserstein_to_a_distribution_without_quantiles_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Gamma.*icdf|icdf.*Gamma"):
        bs.batch_shaping(torch.rand(5), td.Gamma(2.0, 3.0), statistic="wasserstein")


@each_way
@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_normal_of_torch_equals_ours(statistic: str, logits: bool) -> None:
    x = torch.randn(30, 3, 4, dtype=F64)
    mask = mask_of((30, 3, 4))
    for keep, shape in itertools.product((None, mask), ((), (4,), (3, 1))):
        results = []
        given = learned((0.3, 1.2), shape, 0.2)
        for family in (td.Normal, bs.Normal):
            y = x.clone().requires_grad_()
            loss = bs.batch_shaping(y, family(*given), 0, statistic=statistic, mask=keep, logits=logits)
            results.append((loss.detach(), *torch.autograd.grad(loss, (y, *given))))
        for theirs, ours in zip(*results, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-8, atol=1e-12)


@each_statistic
@pytest.mark.parametrize("name", ["Uniform", "Exponential", "LogNormal"])
def test_outside_the_support_of_a_foreign_distribution_all_is_finite(name: str, statistic: str) -> None:
    x = torch.tensor([-5.0, 0.0, 0.1, 0.5, 0.8, 1.0, 7.0], requires_grad=True)
    loss = bs.batch_shaping(x, FOREIGN[name][0], statistic=statistic)
    (gradient,) = torch.autograd.grad(loss, x)
    assert bool(loss.isfinite()) and bool(gradient.isfinite().all())


# Laws of all


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(STATISTICS)), st.booleans(), st.booleans())
def test_the_order_of_samples_does_not_matter(seed: int, statistic: str, ties: bool, logits: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, generator=generator, dtype=F64)
    order = torch.randperm(20, generator=generator)
    prior = bs.Normal(0.3, 0.5)
    results = []
    for y in (x, x[order]):
        y = y.clone().requires_grad_()
        loss = bs.batch_shaping(y, prior, statistic=statistic, ties=ties, logits=logits)
        results.append((loss.detach(), torch.autograd.grad(loss, y)[0]))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1][order], results[1][1])


@each_way
@each_ties
@each_of_all
def test_a_mask_equals_leaving_values_out(statistic: str, family: Family, ties: bool, logits: bool) -> None:
    parameters = family.examples[0]
    given = learned(parameters)
    x = inside(family, parameters, (12, 4))
    x = tied(as_logits(family, x) if logits else x)
    mask = mask_of((12, 4))
    options = {"statistic": statistic, "ties": ties, "logits": logits}
    # What is masked is not looked at.
    y = torch.where(mask, x, torch.nan).requires_grad_()
    loss = bs.batch_shaping(y, family.prior(*given), 0, mask=mask, **options)
    by_mask = torch.autograd.grad(loss, (y, *given))
    x.requires_grad_()
    rows = zip(x.T, mask.T, strict=True)
    each = [bs.batch_shaping(row[keep], family.prior(*given), **options) for row, keep in rows]
    left_out = torch.stack(each).mean()
    torch.testing.assert_close(loss, left_out, rtol=1e-10, atol=1e-14)
    for one, other in zip(by_mask, torch.autograd.grad(left_out, (x, *given)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert not by_mask[0][~mask].any()


@each_way
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("wrap", [lambda s: s, Plain], ids=["closed", "plain"])
@each_of_all
def test_nan_makes_its_array_nan_and_no_other(
    statistic: str, family: Family, wrap: Callable[[str], Any], masked: bool, logits: bool
) -> None:
    if wrap is Plain and statistic == "epps_pulley":
        return  # has no terms
    x = inside(family, family.examples[0], (6, 3))
    x = as_logits(family, x) if logits else x
    x[2, 1] = torch.nan
    x.requires_grad_()
    mask = torch.ones(6, 3, dtype=torch.bool)
    mask[4] = False
    given = learned(family.examples[0], (3,))
    loss = bs.batch_shaping(
        x,
        family.prior(*given),
        0,
        statistic=wrap(statistic),
        mask=mask if masked else None,
        logits=logits,
        reduction="none",
    )
    assert loss.isnan().tolist() == [False, True, False]
    by_x, *by_parameter = torch.autograd.grad(loss.sum(), (x, *given))
    assert bool(by_x[:, [0, 2]].isfinite().all())
    kept = mask[:, 1] if masked else slice(None)
    assert bool(by_x[kept, 1].isnan().all())
    for gradient in by_parameter:
        assert gradient.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@each_ties
@each_statistic
@each_prior
def test_at_0_and_1_and_outside_the_support_all_is_finite(
    statistic: str, family: Family, parameters: tuple[float, ...], ties: bool, dtype: torch.dtype
) -> None:
    values = [-3.0, -1e-9, 0.0, 0.0, 1e-30, 0.2, 0.5, 1 - 1e-7, 1.0, 1.0, 1.0 + 1e-6, 4.0]
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    given = [torch.tensor(p, dtype=dtype, requires_grad=True) for p in parameters]
    for which in (statistic, Plain(statistic)):
        loss = bs.batch_shaping(x, family.prior(*given), statistic=which, ties=ties)
        assert bool(loss.isfinite())
        for gradient in torch.autograd.grad(loss, (x, *given)):
            assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@each_statistic
@each_prior
def test_logits_of_any_size_are_finite(
    statistic: str, family: Family, parameters: tuple[float, ...], dtype: torch.dtype
) -> None:
    x = torch.tensor([-1e5, -800.0, -90.0, -1.0, 0.0, 1.0, 90.0, 800.0, 1e5], dtype=dtype, requires_grad=True)
    given = [torch.tensor(p, dtype=dtype, requires_grad=True) for p in parameters]
    loss = bs.batch_shaping(x, family.prior(*given), statistic=statistic, logits=True)
    assert bool(loss.isfinite())
    for gradient in torch.autograd.grad(loss, (x, *given)):
        assert bool(gradient.isfinite().all())


@each_statistic
@each_family
def test_infinite_logits_are_values_of_0_and_1(statistic: str, family: Family) -> None:
    x = torch.tensor([-torch.inf, -1.0, 0.5, torch.inf], dtype=F64)
    loss = bs.batch_shaping(x, family.prior(*family.examples[0]), statistic=statistic, logits=True)
    if statistic == "anderson_darling" and family is not NORMAL:
        assert loss > 1e3  # a logarithm of 0 that no rounding hides, however it is bounded
    else:
        expected = mean_of_terms(torch.sigmoid(x), TERMS[statistic](family), family.examples[0])
        torch.testing.assert_close(loss, torch.as_tensor(expected))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("RelaxedBernoulli", (0.8, 0.01)),
        ("RelaxedBernoulli", (0.5, 0.002)),
        ("Beta", (0.05, 3.0)),
        ("Beta", (0.01, 0.02)),
        ("SymBeta", (0.02,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_quantiles_that_round_to_0_or_1_do_not_stop_the_parameters(
    name: str, parameters: tuple[float, ...], dtype: torch.dtype
) -> None:
    family = FAMILIES[name]
    x = torch.rand(300, dtype=F64)
    given = [torch.tensor(p, dtype=dtype, requires_grad=True) for p in parameters]
    loss = bs.batch_shaping(x.to(dtype), family.prior(*given), statistic="wasserstein")

    def moved(k: int, by: float) -> np.ndarray:
        others = tuple(p + by * (j == k) for j, p in enumerate(parameters))
        return mean_of_terms(x, TERMS["wasserstein"](family), others)

    for k, gradient in enumerate(torch.autograd.grad(loss, given)):
        h = 1e-5 * parameters[k]
        expected = torch.as_tensor((moved(k, h) - moved(k, -h)) / (2 * h)).to(dtype)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


@each_of_all
def test_vmap_and_func_grad_equal_a_loop(statistic: str, family: Family) -> None:
    parameters = family.examples[0]
    x = inside(family, parameters, (4, 10, 3))
    given = [p.detach() for p in learned(parameters, (4,), 0.1)]

    def loss(x: Tensor, *given: Tensor) -> Tensor:
        return bs.batch_shaping(x, family.prior(*given, validate_args=False), statistic=statistic)

    wanted = tuple(range(len(given) + 1))
    gradients = torch.func.vmap(torch.func.grad(loss, argnums=wanted))(x, *given)
    for k in range(4):
        leaves = [t[k].clone().requires_grad_() for t in (x, *given)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for one, other in zip((g[k] for g in gradients), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# Epps-Pulley


def characteristic_distance(z: np.ndarray, t: np.ndarray | float) -> np.ndarray:
    """The integrand: the squared distance of the characteristic functions under the weight."""
    empirical = np.exp(1j * np.multiply.outer(t, z)).mean(axis=-1)
    target = np.exp(-np.square(t) / 2)
    return np.abs(empirical - target) ** 2 * target


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.0), (0.6, 0.1), (-3.0, 20.0)])
@pytest.mark.parametrize("n", [1, 7, 100])
def test_epps_pulley_is_the_integral_it_approximates(loc: float, scale: float, n: int) -> None:
    z = np.random.default_rng(n).normal(0.3, 1.4, n)
    x = torch.from_numpy(loc + scale * z)
    prior = bs.Normal(loc, scale)
    t = np.linspace(-3, 3, 33)
    rule = np.trapezoid(characteristic_distance(z, t), t)
    assert bs.batch_shaping(x, prior, statistic="epps_pulley").item() == pytest.approx(rule, rel=1e-10)
    exact, _ = integrate.quad(lambda t: characteristic_distance(z, t), -3, 3, epsabs=1e-13, limit=200)
    assert rule == pytest.approx(exact, rel=0.02)
    fine = bs.batch_shaping(x, prior, statistic=EppsPulley(3.0, 3001)).item()
    assert fine == pytest.approx(exact, rel=1e-5)


def test_epps_pulley_on_the_whole_line_has_a_closed_form() -> None:
    z = np.random.default_rng(0).normal(0.3, 1.4, 50)
    # Baringhaus and Henze, 1988, in one dimension: three Gaussian integrals.
    pairs = np.exp(-np.square(z[:, None] - z) / 2).mean()
    alone = np.exp(-np.square(z) / 4).mean()
    expected = np.sqrt(2 * np.pi) * (pairs - 2 / np.sqrt(2) * alone + 1 / np.sqrt(3))
    loss = bs.batch_shaping(torch.from_numpy(z), bs.Normal(0.0, 1.0), statistic=EppsPulley(12.0, 241))
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@each_way
@pytest.mark.parametrize("statistic", ["epps_pulley", EppsPulley(5.0, 9)], ids=["named", "own"])
def test_gradcheck_of_epps_pulley(statistic: Any, masked: bool, logits: bool) -> None:
    x = torch.randn(6, 3, dtype=F64, requires_grad=True)
    mask = mask_of((6, 3)) if masked else None
    for shape in ((), (3,)):
        given = learned((0.4, 0.8), shape, 0.2)
        assert gradcheck(
            lambda x, *given: bs.batch_shaping(
                x,
                bs.Normal(*given),
                0,
                statistic=statistic,
                mask=mask,
                logits=logits,
                reduction="none",
            ),
            (x, *given),
        )


@pytest.mark.parametrize(
    "prior",
    [bs.Beta(2.0, 6.0), bs.SymBeta(0.6), bs.RelaxedBernoulli(0.2, 0.25), td.Laplace(0.0, 1.0)],
    ids=str,
)
def test_epps_pulley_refuses_what_is_not_normal(prior: td.Distribution) -> None:
    with pytest.raises(
        ValueError, match=f"epps_pulley needs a Normal prior, received {type(prior).__name__}"
    ):
        bs.batch_shaping(torch.rand(5), prior, statistic="epps_pulley")


@pytest.mark.parametrize("family", [bs.Normal, td.Normal], ids=["ours", "torch"])
def test_epps_pulley_of_an_infinite_sample_is_nan_with_a_mask_and_without(
    family: Callable[..., td.Distribution],
) -> None:
    x = torch.tensor([0.1, 0.3, torch.inf, -0.4])
    for mask in (None, torch.tensor(True), torch.tensor([True, True, True, False])):
        assert bool(bs.batch_shaping(x, family(0.0, 1.0), statistic="epps_pulley", mask=mask).isnan())


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("statistic", ["epps_pulley", EppsPulley(5.0, 41)], ids=["named", "own"])
def test_epps_pulley_is_the_same_under_compile(statistic: Any, needs_x: bool) -> None:
    torch._dynamo.reset()
    x = torch.randn(50, 3, requires_grad=needs_x)
    loss = lambda x: bs.batch_shaping(x, bs.Normal(0.0, 1.0), 0, statistic=statistic)  # noqa: E731
    torch.testing.assert_close(torch.compile(loss, backend="aot_eager")(x), loss(x))
