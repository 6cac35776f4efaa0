"""What each statistic is, against SciPy and mpmath; the laws of all of them are those of the loss."""

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
from oracles import DIGITS, FAMILIES, Family, characteristic_distance, log_tails, mean_of_terms
from scipy import integrate, optimize, special, stats
from sweeps import (
    TERMS,
    each_family,
    each_masked,
    each_prior,
    each_ties,
    each_way,
    formula,
    inside,
    learned,
    mask_of,
    tied,
)
from torch import Tensor
from torch.autograd import gradcheck

import batchshaping as bs
from batchshaping.experiments.fit import fit, published_start
from batchshaping.statistics.cramer_von_mises import CramerVonMises
from batchshaping.statistics.epps_pulley import EppsPulley
from batchshaping.statistics.samples import Samples
from batchshaping.statistics.statistic import Comparison, Statistic, Terms

F64 = torch.float64


class AbsoluteDistance(Statistic):
    """The distance whose mean is the 1-Wasserstein distance."""

    def terms(self, values: Tensor, positions: Tensor, prior: td.Distribution) -> Tensor:
        return (values - prior.icdf(positions)).abs()


class OfFields(CramerVonMises):
    """A closed form that takes the fields of a comparison, and gives them on."""

    def closed_form(  # type: ignore[override]
        self, prior: Any, parameters: Any, samples: Samples, logits: bool, gradients: bool
    ) -> Callable[[slice], Terms]:
        terms_of: Callable[[slice], Terms] = super().closed_form(  # type: ignore[call-arg]
            prior, parameters, samples, logits=logits, gradients=gradients
        )
        return terms_of


class OfOperands(OfFields):
    """One that gives on what it gets."""

    def closed_form(self, *operands: Any) -> Callable[[slice], Terms]:
        return super().closed_form(*operands)


class OfAComparison(OfOperands):
    """One that takes a comparison, above others that take its fields."""

    def closed_form(self, comparison: Comparison) -> Callable[[slice], Terms]:  # type: ignore[override]
        return super().closed_form(comparison)


# What they are


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


# Far tails


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


@pytest.mark.parametrize("statistic", ["epps_pulley", "cramer_von_mises", "wasserstein"])
def test_where_the_sigmoid_rounds_to_1_the_gradient_in_logits_is_that_of_double(statistic: str) -> None:
    gradients = []
    for dtype in (torch.float32, F64):
        z = torch.tensor([-20.0, -1.0, 0.5, 18.0, 20.0, 30.0], dtype=dtype, requires_grad=True)
        loss = bs.batch_shaping(z, bs.Normal(0.3, 1.2), statistic=statistic, logits=True)
        gradients.append(torch.autograd.grad(loss, z)[0].double())
    assert bool((gradients[0][-3:].abs() > 1e-15).all())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=0)


@pytest.mark.parametrize("statistic", ["cramer_von_mises", "anderson_darling", "wasserstein"])
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
    terms = TERMS[statistic](FAMILIES["Normal"])(torch.sigmoid(z.double()).numpy(), positions, 0.5, 0.7)
    for loss in losses:
        torch.testing.assert_close(loss.double(), torch.tensor(terms.mean(), dtype=F64), rtol=1e-4, atol=1e-7)


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


class Recorder(Statistic):
    """Keeps what it is given."""

    def terms(self, values: Tensor, positions: Tensor, prior: td.Distribution) -> Tensor:
        self.given = values, positions
        return (prior.cdf(values) - positions).abs() + 0 * prior.log_cdf(values) * prior.log_sf(values)


@each_ties
@each_masked
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


def test_wasserstein_to_a_distribution_without_quantiles_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Gamma.*icdf|icdf.*Gamma"):
        bs.batch_shaping(torch.rand(5), td.Gamma(2.0, 3.0), statistic="wasserstein")


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
        return formula("wasserstein", family, x, others).numpy()

    for k, gradient in enumerate(torch.autograd.grad(loss, given)):
        h = 1e-5 * parameters[k]
        expected = torch.as_tensor((moved(k, h) - moved(k, -h)) / (2 * h)).to(dtype)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


# Epps-Pulley


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


@each_masked
@each_way
def test_gradcheck_of_epps_pulley_with_other_points(masked: bool, logits: bool) -> None:
    x = torch.randn(6, 3, dtype=F64, requires_grad=True)
    settings = {"mask": mask_of((6, 3)) if masked else None, "logits": logits, "reduction": "none"}
    for shape in ((), (3,)):
        assert gradcheck(
            lambda x, *given: bs.batch_shaping(
                x, bs.Normal(*given), 0, statistic=EppsPulley(5.0, 9), **settings
            ),
            (x, *learned((0.4, 0.8), shape, 0.2)),
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


@pytest.mark.parametrize("statistic", [OfFields, OfOperands, OfAComparison])
@pytest.mark.parametrize("logits", [False, True])
def test_a_closed_form_takes_a_comparison_or_its_fields(
    statistic: type[CramerVonMises], logits: bool
) -> None:
    x, a, b = torch.randn(20), torch.tensor(2.0), torch.tensor(6.0)
    found = []
    for each in (statistic(), CramerVonMises()):
        assert each.in_closed_form
        operands = [t.clone().requires_grad_() for t in (x if logits else torch.sigmoid(x), a, b)]
        loss = bs.batch_shaping(operands[0], bs.Beta(*operands[1:]), statistic=each, logits=logits)
        found.append([loss, *torch.autograd.grad(loss, operands)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
