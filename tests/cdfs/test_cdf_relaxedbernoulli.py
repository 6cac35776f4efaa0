"""The CDF of the Relaxed Bernoulli against torch's samples, its closed form and its own derivatives."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import scipy
from scipy import special, stats
from torch.autograd import gradcheck
from torch.distributions import RelaxedBernoulli

import batchshaping as bs
from batchshaping.cdf_relaxedbernoulli import get_relaxed_bernoulli_cdf, get_relaxed_bernoulli_pdf
from batchshaping.cdfs.relaxed_bernoulli import RelaxedBernoulliCDF

F64 = torch.float64
means = st.floats(0.01, 0.99)
temperatures = st.floats(-2, 1).map(lambda e: 10.0**e)


def closed_form(x: np.ndarray, mean: float, temperature: float) -> np.ndarray:
    return special.expit(temperature * special.logit(x) - special.logit(mean))


@pytest.mark.parametrize(("mean", "temperature"), [(0.2, 0.25), (0.8, 0.4), (0.5, 1.0), (0.3, 2.0)])
def test_samples_of_torch_follow_it(mean: float, temperature: float) -> None:
    n = 20_000
    prior = RelaxedBernoulli(torch.tensor(temperature, dtype=F64), torch.tensor(mean, dtype=F64))
    cdf = get_relaxed_bernoulli_cdf(prior.sample((n,)), mean, temperature, eps=1e-12)
    assert stats.kstest(cdf.numpy(), "uniform").statistic < 1.95 / n**0.5


@given(mean=means, temperature=temperatures, x=st.lists(st.floats(0, 1), min_size=1))
def test_it_is_the_closed_form_at_clipped_values(mean: float, temperature: float, x: list[float]) -> None:
    values = torch.tensor(x, dtype=F64)
    clipped = values.clip(1e-3, 1 - 1e-3)
    expected = scipy(closed_form, clipped, mean, temperature)
    torch.testing.assert_close(get_relaxed_bernoulli_cdf(values, mean, temperature), expected)


@pytest.mark.parametrize("eps", [1e-3, 0.1])
@pytest.mark.parametrize("function", [get_relaxed_bernoulli_cdf, get_relaxed_bernoulli_pdf])
def test_beyond_the_clip_it_is_constant(function, eps: float) -> None:
    x = torch.tensor([-1.0, 0.0, eps / 2, 1 - eps / 2, 1.0, 2.0], dtype=F64, requires_grad=True)
    ends = torch.tensor([eps] * 3 + [1 - eps] * 3, dtype=F64)
    value = function(x, 0.2, 0.25, eps)
    torch.testing.assert_close(value, function(ends, 0.2, 0.25, eps))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.tolist() == [0.0] * 6


@given(mean=means, temperature=temperatures, x=st.floats(0.01, 0.99))
def test_the_density_adds_eps_to_its_denominator(mean: float, temperature: float, x: float) -> None:
    for eps in (1e-3, 1e-2):
        root = mean * x**-temperature + (1 - mean) * (1 - x) ** -temperature
        numerator = temperature * mean * (1 - mean) * (x * (1 - x)) ** (-temperature - 1)
        value = get_relaxed_bernoulli_pdf(torch.tensor(x, dtype=F64), mean, temperature, eps)
        np.testing.assert_allclose(value.item(), numerator / (root**2 + eps), rtol=1e-9)


@given(mean=means, temperature=temperatures)
def test_the_density_is_the_derivative_of_the_cdf_when_eps_is_small(mean: float, temperature: float) -> None:
    x = torch.linspace(0.01, 0.99, 99, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(get_relaxed_bernoulli_cdf(x, mean, temperature, 1e-15).sum(), x)
    density = get_relaxed_bernoulli_pdf(x.detach(), mean, temperature, 1e-15)
    torch.testing.assert_close(slope, density, rtol=1e-9, atol=1e-12)


def test_the_density_is_that_of_torch_when_eps_is_small() -> None:
    x = torch.linspace(0.01, 0.99, 99, dtype=F64)
    prior = RelaxedBernoulli(torch.tensor(0.25, dtype=F64), torch.tensor(0.2, dtype=F64))
    torch.testing.assert_close(get_relaxed_bernoulli_pdf(x, 0.2, 0.25, 1e-15), prior.log_prob(x).exp())


@pytest.mark.parametrize("shapes", [((), (), ()), ((4,), (), (3, 1)), ((2, 1, 4), (3, 1), (4,))], ids=str)
@pytest.mark.parametrize("function", [get_relaxed_bernoulli_cdf, get_relaxed_bernoulli_pdf])
def test_gradcheck_in_all_three_with_broadcasting(function, shapes: tuple[tuple[int, ...], ...]) -> None:
    x, mean = (0.1 + 0.8 * torch.rand(shape, dtype=F64) for shape in shapes[:2])
    temperature = 0.2 + torch.rand(shapes[2], dtype=F64)
    assert gradcheck(function, [t.requires_grad_() for t in (x, mean, temperature)])


def test_the_closed_derivatives_are_those_of_autograd() -> None:
    operands = [torch.tensor(0.2, dtype=F64), torch.tensor(0.25, dtype=F64)]
    operands = [t.requires_grad_() for t in (*operands, torch.linspace(0.01, 0.99, 99, dtype=F64))]
    mean, temperature, x = operands
    cdf = torch.sigmoid(temperature * (x.log() - torch.log1p(-x)) - torch.logit(mean))
    at = RelaxedBernoulliCDF(mean.detach(), temperature.detach(), gradients=True)(x.detach())
    torch.testing.assert_close(at.cdf, cdf.detach())
    for derivative, operand in zip((at.pdf, *at.parameters), (x, mean, temperature), strict=True):
        (expected,) = torch.autograd.grad(cdf.sum(), operand, retain_graph=True)
        torch.testing.assert_close(derivative.sum_to_size(operand.shape), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [0.01, 0.25, 1.0, 10.0])
def test_at_and_beyond_the_ends_the_closed_derivatives_are_finite(
    temperature: float, dtype: torch.dtype
) -> None:
    info = torch.finfo(dtype)
    x = torch.tensor([-torch.inf, -1.0, 0.0, info.tiny, 1 - info.eps, 1.0, 2.0, torch.inf], dtype=dtype)
    mean, tau = torch.tensor(0.2, dtype=dtype), torch.tensor(temperature, dtype=dtype)
    at = RelaxedBernoulliCDF(mean, tau, gradients=True)(x)
    assert at.cdf[:3].tolist() == [0.0] * 3
    assert at.cdf[-3:].tolist() == [1.0] * 3
    for derivative in (at.pdf, *at.parameters):
        assert bool(derivative.isfinite().all())
        assert derivative[[0, 1, 2, 5, 6, 7]].abs().tolist() == [0.0] * 6


@pytest.mark.parametrize("temperature", [0.25, 2.0, 8.0])
def test_in_both_tails_single_precision_has_the_derivatives_of_double(temperature: float) -> None:
    tail = [2.0**-149, 1e-40, 2.0**-126, 1e-30, 1e-20, 1e-7, 1e-4, 0.01]
    x = torch.tensor([*tail, 0.5, 0.9, 0.99, 0.9999, 1 - 2.0**-23, 1 - 2.0**-24])
    logits = torch.tensor([-80.0, -30.0, -8.0, 0.0, 8.0, 30.0, 80.0])
    prepared = (
        RelaxedBernoulliCDF(*(torch.tensor(p, dtype=dtype) for p in (0.2, temperature)), gradients=True)
        for dtype in (torch.float32, F64)
    )
    largest = torch.finfo(torch.float32).max
    single, double = prepared
    for at, exact in (
        (single(x), double(x.double())),
        (single.at_logits(logits), double.at_logits(logits.double())),
    ):
        # Where the CDF itself is subnormal in single precision it has few digits, or none.
        held = exact.cdf > torch.finfo(torch.float32).smallest_normal
        for found, expected in zip((at.pdf, *at.parameters), (exact.pdf, *exact.parameters), strict=True):
            expected = expected.clamp(-largest, largest).float()
            torch.testing.assert_close(found[held], expected[held], rtol=2e-4, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_where_the_cdf_rounds_to_1_autograd_has_the_density_too(dtype: torch.dtype) -> None:
    x = torch.tensor([0.5, 0.99, 0.9999, 1 - 2.0**-20], dtype=dtype, requires_grad=True)
    mean, temperature = 0.2, 2.0
    cdf = bs.RelaxedBernoulli(mean, temperature).cdf(x)
    (found,) = torch.autograd.grad(cdf.sum(), x)
    with mpmath.workdps(50):
        for value, slope in zip(x.tolist(), found.tolist(), strict=True):
            odds = (mpmath.mpf(value) / (1 - mpmath.mpf(value))) ** 2 * 4
            expected = temperature * odds / (1 + odds) ** 2 / (mpmath.mpf(value) * (1 - mpmath.mpf(value)))
            assert slope == pytest.approx(float(expected), rel=1e-4 if dtype == torch.float32 else 1e-11)


def test_nan_stays_nan() -> None:
    x = torch.tensor([torch.nan, 0.3])
    for function in (get_relaxed_bernoulli_cdf, get_relaxed_bernoulli_pdf):
        assert function(x, 0.2, 0.25).isnan().tolist() == [True, False]
    at = RelaxedBernoulliCDF(torch.tensor(0.2), torch.tensor(0.25), gradients=True)(x)
    for derivative in (at.cdf, at.pdf, *at.parameters):
        assert derivative.isnan().tolist() == [True, False]


def test_single_precision_stays_single() -> None:
    x = torch.rand(10)
    for function in (get_relaxed_bernoulli_cdf, get_relaxed_bernoulli_pdf):
        assert function(x, 0.2, 0.25).dtype == torch.float32
        assert function(x, torch.tensor(0.2), torch.tensor(0.25)).dtype == torch.float32
