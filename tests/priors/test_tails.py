"""The tails of distributions that are not ours against mpmath, far beyond where a CDF rounds to 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
import torch.distributions as td
from mpmath import mpf
from oracles import DIGITS
from torch import Tensor

import batchshaping as bs
from batchshaping.priors.tails import log_tails
from batchshaping.statistics.line import on_the_line

F64 = torch.float64


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def normal_tails(z: Any) -> tuple[Any, Any]:
    root = mpmath.sqrt(2)
    return mpmath.erfc(-z / root) / 2, mpmath.erfc(z / root) / 2


def log_normal(x: Any) -> tuple[Any, Any]:
    return normal_tails((mpmath.log(x) - mpf(0.25)) / mpf(0.75))


def half_normal(x: Any) -> tuple[Any, Any]:
    z = x / mpf(0.75) / mpmath.sqrt(2)
    return mpmath.erf(z), mpmath.erfc(z)


def laplace(x: Any) -> tuple[Any, Any]:
    z = (x - mpf(0.25)) / mpf(0.75)
    small = mpmath.exp(-abs(z)) / 2
    return (small, 1 - small) if z < 0 else (1 - small, small)


def cauchy(x: Any) -> tuple[Any, Any]:
    lower = 0.5 + mpmath.atan((x - mpf(0.25)) / mpf(0.75)) / mpmath.pi
    return lower, 1 - lower


def half_cauchy(x: Any) -> tuple[Any, Any]:
    lower = 2 * mpmath.atan(x / mpf(0.75)) / mpmath.pi
    return lower, 1 - lower


def exponential(x: Any) -> tuple[Any, Any]:
    return -mpmath.expm1(-2 * x), mpmath.exp(-2 * x)


def weibull(x: Any) -> tuple[Any, Any]:
    hazard = (x / mpf(0.75)) ** mpf(1.5)
    return -mpmath.expm1(-hazard), mpmath.exp(-hazard)


def gumbel(x: Any) -> tuple[Any, Any]:
    hazard = mpmath.exp((mpf(0.25) - x) / mpf(0.75))
    return mpmath.exp(-hazard), -mpmath.expm1(-hazard)


def gamma(x: Any) -> tuple[Any, Any]:
    return tuple(mpmath.gammainc(2, *ends, regularized=True) for ends in ((0, 3 * x), (3 * x, mpmath.inf)))


def inverse_gamma(x: Any) -> tuple[Any, Any]:
    return gamma(1 / x)[::-1]


def pareto(x: Any) -> tuple[Any, Any]:
    upper = (mpf(0.75) / x) ** mpf(1.5)
    return 1 - upper, upper


def generalized_pareto(x: Any) -> tuple[Any, Any]:
    upper = (1 + mpf(0.5) * x / 2) ** -2
    return 1 - upper, upper


def kumaraswamy(x: Any) -> tuple[Any, Any]:
    upper = (1 - x ** mpf(0.75)) ** mpf(1.5)
    return 1 - upper, upper


def uniform(x: Any) -> tuple[Any, Any]:
    return (x + 1) / 4, (3 - x) / 4


def continuous_bernoulli(odds: float) -> Callable[[Any], tuple[Any, Any]]:
    def tails(x: Any) -> tuple[Any, Any]:
        t = mpf(td.ContinuousBernoulli(number(odds)).logits.item())
        if t == 0:
            return x, 1 - x
        lower = mpmath.expm1(t * x) / mpmath.expm1(t)
        return lower, 1 - lower

    return tails


def mixture(x: Any) -> tuple[Any, Any]:
    first, second = normal_tails((x + 1) * 2), normal_tails((x - 2) * 4)
    return tuple(mpf(0.25) * a + mpf(0.75) * b for a, b in zip(first, second, strict=True))


LINE = [-60.0, -18.0, -5.0, -0.3, 0.25, 1.0, 6.0, 18.0, 60.0]
HALF = [1e-12, 1e-4, 0.3, 1.0, 6.0, 18.0, 60.0]
UNIT = [1e-12, 1e-4, 0.3, 0.5, 0.8, 1 - 1e-4, 1 - 2**-40]
FAMILIES: dict[str, tuple[Callable[[], td.Distribution], Callable[[Any], tuple[Any, Any]], list[float]]] = {
    "Normal": (lambda: td.Normal(number(0.0), number(1.0)), normal_tails, [x / 2 for x in LINE]),
    "LogNormal": (lambda: td.LogNormal(number(0.25), number(0.75)), log_normal, HALF),
    "HalfNormal": (lambda: td.HalfNormal(number(0.75)), half_normal, HALF[:-1]),
    "Laplace": (lambda: td.Laplace(number(0.25), number(0.75)), laplace, LINE),
    "Cauchy": (lambda: td.Cauchy(number(0.25), number(0.75)), cauchy, [-1e9, *LINE, 1e9]),
    "HalfCauchy": (lambda: td.HalfCauchy(number(0.75)), half_cauchy, [*HALF, 1e9]),
    "Exponential": (lambda: td.Exponential(number(2.0)), exponential, HALF),
    "Weibull": (lambda: td.Weibull(number(0.75), number(1.5)), weibull, HALF),
    "Gumbel": (lambda: td.Gumbel(number(0.25), number(0.75)), gumbel, [-4.0, *LINE[3:]]),
    "Gamma": (lambda: td.Gamma(number(2.0), number(3.0)), gamma, HALF),
    "InverseGamma": (
        lambda: td.InverseGamma(number(2.0), number(3.0)),
        inverse_gamma,
        [0.05, *HALF[2:], 1e6],
    ),
    "Pareto": (lambda: td.Pareto(number(0.75), number(1.5)), pareto, [0.8, 1.0, 6.0, 60.0, 1e9]),
    "Kumaraswamy": (lambda: td.Kumaraswamy(number(0.75), number(1.5)), kumaraswamy, UNIT),
    "Uniform": (lambda: td.Uniform(number(-1.0), number(3.0)), uniform, [-1 + 2**-40, 0.3, 3 - 2**-40]),
    **{
        f"ContinuousBernoulli({odds})": (
            lambda odds=odds: td.ContinuousBernoulli(number(odds)),
            continuous_bernoulli(odds),
            UNIT,
        )
        for odds in (0.2, 0.5, 0.50003, 0.999999)
    },
    "mixture": (
        lambda: td.MixtureSameFamily(
            td.Categorical(torch.tensor([0.25, 0.75], dtype=F64)),
            td.Normal(torch.tensor([-1.0, 2.0], dtype=F64), torch.tensor([0.5, 0.25], dtype=F64)),
        ),
        mixture,
        [x / 6 for x in LINE],
    ),
    "mirrored": (
        lambda: td.TransformedDistribution(
            td.Exponential(number(2.0)), td.AffineTransform(number(0.0), number(-1.0))
        ),
        lambda x: exponential(-x)[::-1],
        [-x for x in HALF],
    ),
}
if hasattr(td, "GeneralizedPareto"):
    FAMILIES["GeneralizedPareto"] = (
        lambda: td.GeneralizedPareto(number(0.0), number(2.0), number(0.5)),
        generalized_pareto,
        HALF,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_both_tails_and_their_slopes_are_those_of_mpmath(name: str) -> None:
    make, oracle, values = FAMILIES[name]
    x = torch.tensor(values, dtype=F64, requires_grad=True)
    found = log_tails(make(), x)
    slopes = [torch.autograd.grad(tail.sum(), x, retain_graph=True)[0] for tail in found]
    with mpmath.workdps(DIGITS):
        for k, value in enumerate(values):
            point = mpf(value)
            h = min(abs(point), abs(1 - point) if 0.5 < value < 1 else abs(point), 1) * mpf(10) ** -20
            h = min(h, mpf(10) ** -20)
            ends = [oracle(point + s * h) for s in (1, -1)]
            for side in (0, 1):
                expected = mpmath.log(oracle(point)[side])
                slope = (mpmath.log(ends[0][side]) - mpmath.log(ends[1][side])) / (2 * h)
                assert abs(found[side][k].item() - expected) <= 1e-12 * abs(expected) + 1e-15
                # Beside a probability of nearly 1 the slope has the absolute precision of its distance to 1.
                assert abs(slopes[side][k].item() - slope) <= 1e-9 * abs(slope) + 1e-14


@pytest.mark.parametrize("name", FAMILIES)
def test_single_precision_follows_double(name: str) -> None:
    make, _, values = FAMILIES[name]
    prior = make()
    x = torch.tensor(values, dtype=torch.float32)
    x = x[prior.support.check(x)]
    if name.startswith(("Kumaraswamy", "ContinuousBernoulli", "Uniform")):
        x = x[1:-1]
    exact = log_tails(prior, x.double())
    # The parameters stay in double precision, and so do the results.
    for tail, other in zip(log_tails(prior, x), exact, strict=True):
        torch.testing.assert_close(tail.double(), other, rtol=2e-5, atol=1e-6)


def test_at_18_standard_deviations_the_gradient_points_back() -> None:
    for value in (18.0, -18.0, 40.0, 80.0):
        x = torch.tensor([value], requires_grad=True)
        loss = bs.batch_shaping(x, td.Laplace(0.0, 1.0), statistic="anderson_darling")
        (gradient,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(loss.item(), abs(value) - 0.6931472, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient.item(), 1.0 if value > 0 else -1.0, rtol=1e-6, atol=0)


class Logistic(td.Distribution):
    """A distribution of one's own with a CDF and nothing else."""

    arg_constraints = {}
    support = td.constraints.real

    def __init__(self) -> None:
        super().__init__(validate_args=False)

    def cdf(self, value: Tensor) -> Tensor:
        return torch.sigmoid(value)


class LogisticWithDensity(Logistic):
    def log_prob(self, value: Tensor) -> Tensor:
        return -value.abs() - 2 * torch.log1p(torch.exp(-value.abs()))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_distribution_of_ones_own_has_a_limit_and_beyond_it_the_gradient_of_its_density(
    dtype: torch.dtype,
) -> None:
    x = torch.tensor([-800.0, -20.0, -1.0, 1.0, 10.0, 50.0, 800.0], dtype=dtype, requires_grad=True)
    finfo = torch.finfo(dtype)
    lower, upper = log_tails(LogisticWithDensity(), x)
    exact = torch.nn.functional.logsigmoid(-x.detach().double()).clamp_min(torch.log(number(8 * finfo.eps)))
    torch.testing.assert_close(upper.detach().double(), exact, rtol=2e-3, atol=1e-6)
    assert upper[-1] == upper[-2]
    for tail, sign in ((lower, 1), (upper, -1)):
        (slope,) = torch.autograd.grad(tail.sum(), x, retain_graph=True)
        torch.testing.assert_close(slope, sign * torch.sigmoid(-sign * x.detach()), rtol=0.05, atol=1e-6)
    lower, upper = log_tails(Logistic(), x)
    for tail in (lower, upper):
        (slope,) = torch.autograd.grad(tail.sum(), x, retain_graph=True)
        assert bool(tail.isfinite().all()) and bool(slope.isfinite().all())


class Shifted(td.Normal):
    """A subclass with a CDF of its own."""

    def cdf(self, value: Tensor) -> Tensor:
        return super().cdf(value - 1)


def test_a_subclass_with_a_cdf_of_its_own_is_asked_for_it() -> None:
    x = torch.linspace(-2, 3, 11, dtype=F64)
    lower, upper = log_tails(Shifted(number(0.0), number(1.0)), x)
    torch.testing.assert_close(lower, torch.special.log_ndtr(x - 1))
    torch.testing.assert_close(upper, torch.special.log_ndtr(1 - x))


@pytest.mark.parametrize("name", FAMILIES)
def test_nan_stays_nan(name: str) -> None:
    prior, x = on_the_line(FAMILIES[name][0]()), torch.full((2,), torch.nan, dtype=F64)
    for tail in (prior.log_cdf(x), prior.log_sf(x)):
        assert bool(tail.isnan().all())
