"""The CDF of the Normal distribution against SciPy and its own derivatives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import scipy
from scipy import stats
from torch.autograd import gradcheck

from batchshaping.cdf_normal import get_normal_cdf
from batchshaping.cdfs.normal import NormalCDF

F64 = torch.float64


@given(
    mean=st.floats(-100, 100),
    std=st.floats(-3, 3).map(lambda e: 10.0**e),
    z=st.lists(st.floats(-30, 10), min_size=1),
)
def test_it_equals_scipy_relatively_exact_in_the_lower_tail(mean: float, std: float, z: list[float]) -> None:
    x = mean + std * torch.tensor(z, dtype=F64)
    expected = scipy(stats.norm.cdf, x, mean, std)
    torch.testing.assert_close(get_normal_cdf(x, mean, std), expected, rtol=1e-11, atol=0)


def test_single_precision_stays_single_and_close() -> None:
    x = torch.linspace(-5, 5, 1001)
    cdf = get_normal_cdf(x, 0.3, 1.2)
    assert cdf.dtype == torch.float32
    torch.testing.assert_close(cdf.double(), scipy(stats.norm.cdf, x, 0.3, 1.2), rtol=1e-5, atol=1e-7)


def test_it_goes_from_0_to_1_and_keeps_nan() -> None:
    x = torch.tensor([-torch.inf, -1e30, 0.0, 1e30, torch.inf, torch.nan])
    cdf = get_normal_cdf(x, 0.0, 1.0)
    assert cdf[:5].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert cdf[5].isnan()


@pytest.mark.parametrize("shapes", [((), (), ()), ((4,), (), (3, 1)), ((2, 1, 4), (3, 1), (4,))], ids=str)
def test_gradcheck_in_all_three_with_broadcasting(shapes: tuple[tuple[int, ...], ...]) -> None:
    x, mean = (torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes[:2])
    std = (0.5 + torch.rand(shapes[2], dtype=F64)).requires_grad_()
    assert gradcheck(get_normal_cdf, (x, mean, std))


def test_the_closed_derivatives_are_those_of_scipy() -> None:
    x = torch.linspace(-2, 3, 101, dtype=F64)
    mean, std = torch.tensor(0.6, dtype=F64), torch.tensor(0.7, dtype=F64)
    at = NormalCDF(mean, std, gradients=True)(x)
    density = scipy(stats.norm.pdf, x, mean, std)
    torch.testing.assert_close(at.cdf, scipy(stats.norm.cdf, x, mean, std))
    torch.testing.assert_close(at.pdf, density)
    torch.testing.assert_close(at.parameters[0], -density)
    torch.testing.assert_close(at.parameters[1], -density * (x - mean) / std)


def test_infinitely_far_out_every_derivative_is_0() -> None:
    x = torch.tensor([-torch.inf, -1e38, 1e38, torch.inf])
    at = NormalCDF(torch.tensor(0.0), torch.tensor(1e-3), gradients=True)(x)
    for derivative in (at.pdf, *at.parameters):
        assert derivative.abs().tolist() == [0.0] * 4
