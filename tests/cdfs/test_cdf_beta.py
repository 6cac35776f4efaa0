"""The regularized incomplete beta function against mpmath, SciPy and its own laws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import log_tails_of_beta, regularized_beta, regularized_beta_slopes, scipy, tails_of_beta
from scipy import special, stats
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import batchshaping as bs
from batchshaping.cdfs import beta
from batchshaping.cdfs.beta import BetaCDF, fixed_beta_cdf

concentrations = st.floats(-2, 3).map(lambda exponent: 10.0**exponent)
probabilities = st.floats(0, 1)
F64 = torch.float64


def tensor(*values: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def points(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a and b log-uniform in [0.01, 1000]; x a quantile, far in either tail, or anywhere in (0, 1)."""
    rng = np.random.default_rng(seed)
    a, b = 10 ** rng.uniform(-2, 3, (2, n))
    far = 10 ** rng.uniform(-300, 0, n)
    choices = [
        special.betaincinv(a, b, rng.uniform(size=n)),
        special.betaincinv(a, b, far),
        1 - special.betaincinv(b, a, far),
        special.expit(rng.uniform(-40, 40, n)),
    ]
    x = np.choose(rng.integers(len(choices), size=n), choices)
    return a, b, np.clip(np.nan_to_num(x), 0, 1)


def inner_points(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points where the function is neither 0 nor 1 nor changing within a few floats."""
    rng = np.random.default_rng(seed)
    a, b = 10 ** rng.uniform(-1, 2.5, (2, n))
    x = special.betaincinv(a, b, rng.uniform(0.02, 0.98, n))
    return a, b, np.clip(x, 1e-3, 1 - 1e-3)


# The oracle


def test_the_oracle_agrees_with_mpmath_and_with_quadrature() -> None:
    a, b, x = inner_points(10, seed=1)
    for p, q, y in zip(*(v.tolist() for v in (np.clip(a, 1, 20), np.clip(b, 1, 20), x)), strict=True):
        with mpmath.workdps(30):
            by_mpmath = mpmath.betainc(p, q, 0, y, regularized=True)
            mass = mpmath.quad(lambda t, p=p, q=q: t ** (p - 1) * (1 - t) ** (q - 1), [0, y / 2, y])
            expected = regularized_beta(p, q, y)
            assert abs(by_mpmath - expected) < 1e-25
            assert abs(mass / mpmath.beta(p, q) - expected) < 1e-5


# Accuracy


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-7)])
def test_it_equals_mpmath_from_tail_to_tail(dtype: torch.dtype, tolerance: float) -> None:
    a, b, x = (torch.as_tensor(v).to(dtype) for v in points(200, seed=2))
    # A point at the end of the interval says nothing; float32 rounds some there.
    result = bs.betainc(a, b, x)
    assert result.dtype == dtype
    for p, q, y, value in zip(*(t.tolist() for t in (a, b, x, result)), strict=True):
        assert abs(value - regularized_beta(p, q, y)) < tolerance, (p, q, y)


def test_it_equals_mpmath_at_the_corners_of_its_range() -> None:
    extremes = (0.01, 0.5, 1.0, 2.0, 1000.0)
    for a, b in itertools.product(extremes, extremes):
        mean = a / (a + b)
        for x in (1e-300, 1e-10, mean / 2, mean, (a + 1) / (a + b + 2), (1 + mean) / 2, 1 - 1e-10):
            assert abs(bs.betainc(a, b, tensor(x)).item() - regularized_beta(a, b, x)) < 1e-12, (a, b, x)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-7)])
def test_it_equals_scipy_on_a_broad_sweep(dtype: torch.dtype, tolerance: float) -> None:
    a, b, x = (torch.as_tensor(v).to(dtype) for v in points(20_000, seed=3))
    expected = scipy(special.betainc, a, b, x)
    error = (bs.betainc(a, b, x).double() - expected).abs()
    worst = int(error.argmax())
    assert error[worst] < tolerance, (a[worst].item(), b[worst].item(), x[worst].item())


@pytest.mark.parametrize("parameters", [(0.6, 0.4), (2.0, 6.0), (30.0, 70.0), (0.01, 0.01), (1000.0, 1000.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-7)])
def test_one_parameter_pair_serves_many_values(
    parameters: tuple[float, float], dtype: torch.dtype, tolerance: float
) -> None:
    x = torch.linspace(0, 1, 20_001, dtype=dtype)
    a, b = (torch.tensor(p, dtype=dtype) for p in parameters)
    expected = scipy(special.betainc, a, b, x)
    torch.testing.assert_close(bs.betainc(a, b, x).double(), expected, rtol=0, atol=tolerance)


@given(a=concentrations, b=concentrations, single=st.booleans())
def test_any_one_parameter_pair_serves_many_values(a: float, b: float, single: bool) -> None:
    dtype, tolerance = (torch.float32, 5e-7) if single else (torch.float64, 1e-12)
    mean, width = a / (a + b), (a * b / (a + b + 1)) ** 0.5 / (a + b)
    x = torch.cat(
        [torch.linspace(0, 1, 501, dtype=F64), mean + width * torch.linspace(-8, 8, 501, dtype=F64)]
    )
    x = x.clamp(0, 1).to(dtype)
    result = bs.betainc(a, b, x).double()
    torch.testing.assert_close(result, scipy(special.betainc, a, b, x), rtol=0, atol=tolerance)


@given(st.floats(-2.9, 2.9), st.floats(-2.9, 2.9))
def test_a_pair_of_numbers_has_the_tails_that_it_has_among_others(log_a: float, log_b: float) -> None:
    """A pair alone is evaluated in no more steps than it needs, which changes nothing but roundings."""
    a, b = 10.0**log_a, 10.0**log_b
    x = torch.cat([torch.as_tensor(special.betaincinv(a, b, np.linspace(0.001, 0.999, 199))), torch.rand(99)])
    split = (a + 1) / (a + b + 2)
    x = torch.cat(
        [x, split * (1 - torch.logspace(-12, 0, 99)), split + (1 - split) * torch.logspace(-12, 0, 99)]
    )
    x = x.double().clamp(1e-300, 1 - 1e-16)
    among = BetaCDF(*(torch.tensor([[p], [p]], dtype=F64) for p in (a, b)), x.dtype).parts(x)
    alone = fixed_beta_cdf(a, b, x.dtype).parts(x)
    # The density has an error of its own, which is that of the tail too.
    found, expected = alone.tail / alone.pdf, among.tail[0] / among.pdf[0]
    is_normal = (expected > 1e-290) & expected.isfinite() & (among.pdf[0] > 1e-290)
    torch.testing.assert_close(found[is_normal], expected[is_normal], rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.floats(-2.0, 0.6), st.floats(-2.0, 0.6))
def test_values_on_both_sides_are_evaluated_as_those_on_one(
    dtype: torch.dtype, log_a: float, log_b: float
) -> None:
    """Values of both sides and inside of (0, 1) have operations of their own, in few buffers."""
    cdf = fixed_beta_cdf(10.0**log_a, 10.0**log_b, dtype)
    x = torch.cat([torch.rand(20, dtype=dtype), torch.tensor([1e-30, 1e-3, 0.999], dtype=dtype)])
    x = x.clamp(torch.finfo(dtype).smallest_normal, 1 - torch.finfo(dtype).eps)
    before = x.clone()
    found = cdf(x)
    assert torch.equal(x, before)
    for k in range(len(x)):
        alone = cdf(x[k : k + 1])
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.cdf[k], alone.cdf[0], rtol=8 * eps, atol=4 * eps)
        torch.testing.assert_close(found.pdf[k], alone.pdf[0], rtol=16 * eps, atol=0)


def test_the_left_tail_is_relatively_exact() -> None:
    a, b, x = 2.0, 6.0, tensor(1e-150, 1e-60, 1e-10, 1e-3)
    expected = tensor(*(float(regularized_beta(a, b, y)) for y in x.tolist()))
    torch.testing.assert_close(bs.betainc(a, b, x), expected, rtol=1e-12, atol=0)


# Derivatives


def test_the_derivatives_in_a_and_b_equal_mpmath() -> None:
    a, b, x = (torch.as_tensor(v) for v in points(70, seed=4))
    interior = (x > 0) & (x < 1)
    a, b, x = (t[interior].requires_grad_(t is not x) for t in (a, b, x))
    by_a, by_b = torch.autograd.grad(bs.betainc(a, b, x).sum(), (a, b))
    for p, q, y, d_a, d_b in zip(*(t.tolist() for t in (a, b, x, by_a, by_b)), strict=True):
        expected_a, expected_b = regularized_beta_slopes(p, q, y)
        assert abs(d_a - expected_a) < 1e-8, (p, q, y)
        assert abs(d_b - expected_b) < 1e-8, (p, q, y)


def test_the_derivatives_in_single_precision_follow_those_in_double() -> None:
    singles = [torch.as_tensor(v).float() for v in inner_points(500, seed=5)]
    gradients = []
    for dtype in (torch.float32, torch.float64):
        operands = [t.detach().to(dtype).requires_grad_() for t in singles]
        gradients.append(torch.autograd.grad(bs.betainc(*operands).sum(), operands))
    for single, double in zip(*gradients, strict=True):
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=2e-4, atol=2e-5)


def test_the_derivative_in_x_is_the_density() -> None:
    a, b, x = (torch.as_tensor(v) for v in inner_points(1000, seed=6))
    x.requires_grad_()
    (density,) = torch.autograd.grad(bs.betainc(a, b, x).sum(), x)
    expected = torch.as_tensor(stats.beta.pdf(x.detach(), a, b))
    torch.testing.assert_close(density, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "shapes",
    [
        ((), (), ()),
        ((3,), (3,), (3,)),
        ((3, 1), (4,), ()),
        ((), (3, 1), (2, 1, 4)),
        ((2, 1, 1), (3, 1), (4,)),
    ],
    ids=str,
)
def test_gradcheck_in_all_three_with_broadcasting(shapes: tuple[tuple[int, ...], ...]) -> None:
    a, b = (0.3 + 3 * torch.rand(shape, dtype=F64) for shape in shapes[:2])
    x = 0.1 + 0.8 * torch.rand(shapes[2], dtype=F64)
    assert gradcheck(bs.betainc, [t.requires_grad_() for t in (a, b, x)])


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=3))[1:], ids=str)
def test_gradcheck_whichever_of_the_three_is_needed(needed: tuple[bool, bool, bool]) -> None:
    operands = [tensor(0.6, 2.0, 30.0), tensor(0.4, 6.0, 70.0), tensor(0.3, 0.2, 0.31)]
    assert gradcheck(bs.betainc, [t.requires_grad_(n) for t, n in zip(operands, needed, strict=True)])


def test_gradgradcheck_in_x() -> None:
    a, b, x = tensor(0.6, 2.0, 30.0), tensor(0.4, 6.0, 70.0), tensor(0.3, 0.2, 0.31).requires_grad_()
    assert gradgradcheck(lambda y: bs.betainc(a, b, y), [x])
    assert gradgradcheck(lambda y: bs.betainc(2.0, 6.0, y), [x])


def test_second_derivatives_through_the_density_are_closed_forms() -> None:
    a, b, x = (t.requires_grad_() for t in (tensor(0.6, 2.0), tensor(0.4, 6.0), tensor(0.3, 0.2)))
    (density,) = torch.autograd.grad(bs.betainc(a, b, x).sum(), x, create_graph=True)
    by_a, by_b, by_x = torch.autograd.grad(density.sum(), (a, b, x))
    p, q, y = (t.detach().numpy() for t in (a, b, x))
    f = stats.beta.pdf(y, p, q)
    digamma = special.digamma
    expected = {
        "a": (by_a, f * (np.log(y) - digamma(p) + digamma(p + q))),
        "b": (by_b, f * (np.log1p(-y) - digamma(q) + digamma(p + q))),
        "x": (by_x, f * ((p - 1) / y - (q - 1) / (1 - y))),
    }
    for name, (gradient, closed_form) in expected.items():
        torch.testing.assert_close(
            gradient, torch.as_tensor(closed_form), rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("parameter", [0, 1], ids=["a", "b"])
def test_a_second_derivative_in_a_parameter_is_refused(parameter: int) -> None:
    operands = [t.requires_grad_() for t in (tensor(2.0), tensor(6.0), tensor(0.3))]
    (first,) = torch.autograd.grad(bs.betainc(*operands).sum(), operands[parameter], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"once in a and b.*second derivative"):
        torch.autograd.grad(first.sum(), operands[parameter])


# torch.func


def loop(in_dims: tuple[int | None, ...], operands: list[Tensor]) -> list[list[Tensor]]:
    size = next(t.shape[d] for t, d in zip(operands, in_dims, strict=True) if d is not None)
    return [
        [t if d is None else t.select(d, k) for t, d in zip(operands, in_dims, strict=True)]
        for k in range(size)
    ]


@pytest.mark.parametrize("in_dims", list(itertools.product((None, 0, 1), repeat=3))[1:], ids=str)
@pytest.mark.parametrize("function", [bs.betainc, bs.betaincinv])
def test_vmap_equals_a_loop(function, in_dims: tuple[int | None, ...]) -> None:
    shapes = [{None: (4,), 0: (3, 4), 1: (4, 3)}[d] for d in in_dims]
    operands = [0.3 + 3 * torch.rand(shape, dtype=F64) for shape in shapes[:2]]
    operands.append(0.1 + 0.8 * torch.rand(shapes[2], dtype=F64))
    expected = torch.stack([function(*each) for each in loop(in_dims, operands)])
    torch.testing.assert_close(torch.func.vmap(function, in_dims)(*operands), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("in_dims", [(0, None, 0), (0, 0, None), (None, 1, 2), (0, None, 2)], ids=str)
def test_vmap_over_operands_of_unequal_rank_equals_a_loop(in_dims: tuple[int | None, ...]) -> None:
    a = 0.3 + torch.rand(() if in_dims[0] is None else (3,), dtype=F64)
    b = 0.3 + torch.rand((4,) if in_dims[1] is None else (3, 4) if in_dims[1] == 0 else (4, 3), dtype=F64)
    x = torch.rand({None: (2, 4), 0: (3, 2, 4), 2: (2, 4, 3)}[in_dims[2]], dtype=F64)
    expected = torch.stack([bs.betainc(*each) for each in loop(in_dims, [a, b, x])])
    torch.testing.assert_close(torch.func.vmap(bs.betainc, in_dims)(a, b, x), expected, rtol=1e-13, atol=0)


def test_nested_vmap_equals_broadcasting() -> None:
    a, x = 0.3 + torch.rand(3, dtype=F64), torch.rand(4, dtype=F64)
    outer = torch.func.vmap(torch.func.vmap(bs.betainc, (None, None, 0)), (0, None, None))
    torch.testing.assert_close(outer(a, tensor(0.4)[0], x), bs.betainc(a[:, None], 0.4, x))


def test_func_grad_and_vmap_of_it_equal_the_closed_forms() -> None:
    a, b, x = (torch.as_tensor(v) for v in inner_points(20, seed=7))
    gradient = torch.func.grad(bs.betainc, argnums=(0, 1, 2))
    by_loop = [
        torch.stack(g) for g in zip(*(gradient(*each) for each in zip(a, b, x, strict=True)), strict=True)
    ]
    by_vmap = torch.func.vmap(gradient)(a, b, x)
    slopes = [regularized_beta_slopes(*each) for each in zip(*(t.tolist() for t in (a, b, x)), strict=True)]
    closed = [tensor(*(float(s[k]) for s in slopes)) for k in (0, 1)]
    closed.append(torch.as_tensor(stats.beta.pdf(x, a, b)))
    for looped, mapped, expected in zip(by_loop, by_vmap, closed, strict=True):
        torch.testing.assert_close(looped, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(mapped, looped, rtol=1e-12, atol=1e-14)


def test_func_grad_over_vmap_and_twice_in_x_equal_the_closed_forms() -> None:
    x = torch.linspace(0.1, 0.9, 9, dtype=F64)
    total = torch.func.grad(lambda y: torch.func.vmap(lambda z: bs.betainc(2.0, 6.0, z))(y).sum())
    density = torch.as_tensor(stats.beta.pdf(x, 2, 6))
    torch.testing.assert_close(total(x), density)
    twice = torch.func.vmap(torch.func.grad(torch.func.grad(lambda y: bs.betainc(2.0, 6.0, y))))
    torch.testing.assert_close(twice(x), density * (1 / x - 5 / (1 - x)))


# Laws


@given(a=concentrations, b=concentrations, x=probabilities)
def test_it_is_symmetric_under_exchange_of_the_ends(a: float, b: float, x: float) -> None:
    y = 1 - x
    x = 1 - y  # now exactly
    total = bs.betainc(a, b, tensor(x)) + bs.betainc(b, a, tensor(y))
    torch.testing.assert_close(total, tensor(1.0), rtol=0, atol=1e-12)


@given(a=concentrations, b=concentrations, x=st.lists(probabilities, min_size=2, max_size=20))
def test_it_increases_from_0_to_1(a: float, b: float, x: list[float]) -> None:
    cdf = bs.betainc(a, b, tensor(0.0, *sorted(x), 1.0))
    assert cdf[0] == 0
    assert cdf[-1] == 1
    assert bool((cdf >= 0).all())
    assert bool((cdf <= 1).all())
    assert bool((cdf.diff() >= -1e-12).all())


@given(a=concentrations, b=concentrations)
def test_it_increases_from_0_to_1_in_single_precision(a: float, b: float) -> None:
    cdf = bs.betainc(a, b, torch.linspace(0, 1, 101))
    assert bool((cdf >= 0).all())
    assert bool((cdf <= 1).all())
    assert bool((cdf.diff() >= -5e-7).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("parameters", [(0.6, 0.4), (1.0, 1.0), (2.0, 6.0), (300.0, 0.01)])
def test_outside_the_support_it_is_0_or_1_with_gradients_of_0(
    parameters: tuple[float, float], dtype: torch.dtype
) -> None:
    inf = torch.inf
    x = torch.tensor([-inf, -1e30, -1.0, -1e-30, 1.0 + 1e-6, 2.0, 1e30, inf], dtype=dtype).requires_grad_()
    a, b = (torch.full_like(x, p).requires_grad_() for p in parameters)
    cdf = bs.betainc(a, b, x)
    assert cdf.tolist() == [0.0] * 4 + [1.0] * 4
    for gradient in torch.autograd.grad(cdf.sum(), (a, b, x)):
        assert gradient.tolist() == [0.0] * 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_at_and_near_the_ends_it_is_exact_and_its_gradients_are_finite(dtype: torch.dtype) -> None:
    info, tolerance = torch.finfo(dtype), {torch.float64: 1e-12, torch.float32: 5e-7}[dtype]
    subnormal = info.smallest_normal * info.eps
    x = torch.tensor([0.0, -0.0, subnormal, info.tiny, info.eps, 1 - info.eps, 1.0], dtype=dtype)
    for p, q in itertools.product((0.01, 0.4, 1.0, 6.0, 1000.0), repeat=2):
        a, b, y = (t.clone().requires_grad_() for t in (torch.full_like(x, p), torch.full_like(x, q), x))
        cdf = bs.betainc(a, b, y)
        assert cdf[:2].tolist() == [0.0, 0.0]
        assert cdf[-1] == 1
        for k in range(len(x)):
            expected = regularized_beta(a[k].item(), b[k].item(), x[k].item())
            assert abs(cdf[k].item() - expected) < tolerance, (p, q, x[k])
        by_a, by_b, by_x = torch.autograd.grad(cdf.sum(), (a, b, y))
        assert bool(by_a.isfinite().all()), (p, q)
        assert bool(by_b.isfinite().all()), (p, q)
        # The density next to 0 can be larger than any float.
        assert bool(by_x[[0, 1, 4, 5, 6]].isfinite().all()), (p, q)
        assert bool((by_x >= 0).all()), (p, q)


@pytest.mark.parametrize("position", [0, 1, 2], ids=["a", "b", "x"])
def test_nan_gives_nan_and_touches_no_neighbour(position: int) -> None:
    operands = [tensor(0.6, 0.6), tensor(0.4, 0.4), tensor(0.3, 0.3)]
    operands[position][0] = torch.nan
    operands = [t.requires_grad_() for t in operands]
    cdf = bs.betainc(*operands)
    assert cdf.isnan().tolist() == [True, False]
    for gradient in torch.autograd.grad(cdf.sum(), operands):
        assert gradient.isnan().tolist() == [True, False]


@pytest.mark.parametrize("wrong", [0.0, -0.5, -1.0, -2.0, torch.nan])
@pytest.mark.parametrize("x", [-1.0, 0.0, 0.3, 1.0, 2.0])
def test_parameters_that_are_not_positive_give_nan(wrong: float, x: float) -> None:
    assert bool(bs.betainc(wrong, 0.4, tensor(x)).isnan().all())
    assert bool(bs.betainc(0.6, wrong, tensor(x)).isnan().all())


def test_many_parameters_equal_a_loop_over_them() -> None:
    n = 2**14 + 3
    a, b = (10 ** (torch.rand(n, dtype=F64) * 3 - 1.5) for _ in range(2))
    x = torch.rand(2, n, dtype=F64)
    operands = [t.requires_grad_() for t in (a, b, x)]
    cdf = bs.betainc(*operands)
    gradients = torch.autograd.grad(cdf.sum(), operands)
    expected = scipy(special.betainc, a, b, x)
    torch.testing.assert_close(cdf.detach(), expected, rtol=0, atol=1e-12)
    for start in range(0, n, 1000):
        part = [t.detach()[..., start : start + 1000].requires_grad_() for t in operands]
        for whole, of_part in zip(gradients, torch.autograd.grad(bs.betainc(*part).sum(), part), strict=True):
            torch.testing.assert_close(whole[..., start : start + 1000], of_part, rtol=1e-10, atol=1e-12)


def test_strides_do_not_matter() -> None:
    a, b, x = (0.2 + torch.rand(6, 10, dtype=F64) for _ in range(3))
    x = x / 2
    strided = [t.T[::2, 1::2].requires_grad_() for t in (a, b, x)]
    dense = [t.detach().contiguous().requires_grad_() for t in strided]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(bs.betainc(*strided), bs.betainc(*dense))
    for one, other in zip(
        torch.autograd.grad(bs.betainc(*strided).sum(), strided),
        torch.autograd.grad(bs.betainc(*dense).sum(), dense),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_operands_are_left_as_they_were() -> None:
    operands = [tensor(0.6, 2.0), tensor(0.4, 6.0), tensor(-1.0, 0.3)]
    before = [t.clone() for t in operands]
    for t in operands:
        t.requires_grad_()
    bs.betainc(*operands).sum().backward()
    bs.betaincinv(*operands[:2], operands[2].abs().detach())
    for t, original in zip(operands, before, strict=True):
        assert torch.equal(t.detach(), original)


@pytest.mark.parametrize("shapes", [((0,), (), ()), ((), (), (0, 3)), ((3, 0), (1,), (3, 1))], ids=str)
@pytest.mark.parametrize("function", [bs.betainc, bs.betaincinv])
def test_empty_in_empty_out(function, shapes: tuple[tuple[int, ...], ...]) -> None:
    operands = [torch.full(shape, 0.5, requires_grad=True) for shape in shapes]
    result = function(*operands)
    assert result.shape == torch.broadcast_shapes(*shapes)
    for t, gradient in zip(operands, torch.autograd.grad(result.sum(), operands), strict=True):
        assert gradient.shape == t.shape
        assert not gradient.any()


# Types


@pytest.mark.parametrize("function", [bs.betainc, bs.betaincinv])
def test_the_result_has_the_widest_dtype_of_the_operands_with_dimensions(function) -> None:
    single, double = torch.full((2,), 0.5), torch.full((2,), 0.5, dtype=F64)
    scalar = torch.tensor(0.5, dtype=F64)
    assert function(0.6, 0.4, single).dtype == torch.float32
    assert function(0.6, 0.4, double).dtype == torch.float64
    assert function(single, single, double).dtype == torch.float64
    assert function(double, 0.4, single).dtype == torch.float64
    assert function(scalar, scalar, single).dtype == torch.float32
    assert function(0.6, 0.4, scalar).dtype == torch.float64
    assert function(0.6, 0.4, 0.5).dtype == torch.get_default_dtype()
    assert function(single, 0.4, 0.5).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [bs.betainc, bs.betaincinv])
def test_half_precision_rounds_the_result_and_nothing_else(function, dtype: torch.dtype) -> None:
    x = torch.linspace(0.01, 0.99, 50).to(dtype)
    a = torch.linspace(0.5, 3, 50).to(dtype)
    result = function(a, 0.4, x)
    assert result.dtype == dtype
    assert torch.equal(result, function(a.double(), 0.4, x.double()).to(dtype))


def test_numbers_are_used_in_double_precision() -> None:
    x = tensor(0.1, 0.5, 0.9)
    torch.testing.assert_close(
        bs.betainc(0.6, 0.4, x), scipy(special.betainc, 0.6, 0.4, x), rtol=1e-14, atol=0
    )


def test_gradients_come_in_the_dtype_of_their_operand() -> None:
    operands = [torch.tensor([0.6]), tensor(0.4), torch.tensor([0.3])]
    operands = [t.requires_grad_() for t in operands]
    gradients = torch.autograd.grad(bs.betainc(*operands).sum(), operands)
    assert [g.dtype for g in gradients] == [torch.float32, torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("function", [bs.betainc, bs.betaincinv])
def test_integers_are_refused_by_dtype(function, position: int, dtype: torch.dtype) -> None:
    operands: list[Tensor | float] = [0.6, 0.4, 0.5]
    operands[position] = torch.ones(3, dtype=dtype)
    with pytest.raises(TypeError, match=f"floating point.*{dtype}"):
        function(*operands)


@pytest.mark.parametrize("function", [bs.betainc, bs.betaincinv])
def test_shapes_that_do_not_broadcast_are_named(function) -> None:
    with pytest.raises(ValueError, match=r"broadcast.*a \(2,\), b \(\), \w \(3,\)"):
        function(torch.ones(2), 0.4, torch.ones(3))


# The inverse


def test_the_inverse_maps_to_the_float_whose_probability_is_asked_for() -> None:
    rng = np.random.default_rng(8)
    a, b = 10 ** rng.uniform(-2, 3, (2, 2000))
    p = np.concatenate([rng.uniform(size=1000), 10 ** rng.uniform(-280, 0, 1000)])
    x = bs.betaincinv(*(torch.as_tensor(v) for v in (a, b, p))).numpy()
    # A step of four floats on either side must enclose the probability.
    step = 4 * np.spacing(np.maximum(x, np.finfo(float).tiny))
    below = special.betainc(a, b, np.maximum(x - step, 0))
    above = special.betainc(a, b, np.minimum(x + step, 1))
    slack = 1e-12 * np.minimum(p, 1)
    worst = np.argmax(np.maximum(below - p - slack, p - slack - above))
    assert np.all(below - slack <= p), (a[worst], b[worst], p[worst], x[worst])
    assert np.all(p <= above + slack), (a[worst], b[worst], p[worst], x[worst])


def test_the_inverse_equals_scipy() -> None:
    a, b, x = inner_points(2000, seed=9)
    p = special.betainc(a, b, x)
    result = bs.betaincinv(*(torch.as_tensor(v) for v in (a, b, p)))
    torch.testing.assert_close(result, torch.as_tensor(special.betaincinv(a, b, p)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result, torch.as_tensor(x), rtol=1e-9, atol=1e-12)


def test_the_inverse_in_single_precision_is_that_in_double_rounded() -> None:
    a, b, x = inner_points(500, seed=10)
    a, b, p = (torch.as_tensor(v).float() for v in (a, b, special.betainc(a, b, x)))
    expected = scipy(special.betaincinv, a, b, p)
    torch.testing.assert_close(bs.betaincinv(a, b, p).double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("a", "b"), [(2.0, 6.0), (6.0, 2.0), (30.0, 70.0), (1.0, 0.4), (0.05, 3.0)])
def test_the_inverse_undoes_mpmath_far_in_the_left_tail(a: float, b: float) -> None:
    x = [1e-3, 1e-6, 10 ** (-30 / a), 10 ** (-250 / a) if a > 1 else 1e-250]
    p = tensor(*(float(regularized_beta(a, b, y)) for y in x))
    torch.testing.assert_close(bs.betaincinv(a, b, p), tensor(*x), rtol=1e-11, atol=0)


@given(a=concentrations, b=concentrations, p=st.lists(probabilities, min_size=2, max_size=20))
def test_the_inverse_increases_from_0_to_1(a: float, b: float, p: list[float]) -> None:
    x = bs.betaincinv(a, b, tensor(0.0, *sorted(p), 1.0))
    assert x[0] == 0
    assert x[-1] == 1
    assert bool((x >= 0).all())
    assert bool((x <= 1).all())
    assert bool((x.diff() >= -1e-12).all())


@pytest.mark.parametrize("p", [-1e-9, 1 + 1e-9, -torch.inf, torch.inf, torch.nan])
def test_the_inverse_of_what_is_no_probability_is_nan(p: float) -> None:
    assert bs.betaincinv(0.6, 0.4, tensor(p, 0.5)).isnan().tolist() == [True, False]


@pytest.mark.parametrize("wrong", [0.0, -0.5, torch.nan])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_the_inverse_with_parameters_that_are_not_positive_is_nan(wrong: float, p: float) -> None:
    assert bool(bs.betaincinv(wrong, 0.4, tensor(p)).isnan().all())
    assert bool(bs.betaincinv(0.6, wrong, tensor(p)).isnan().all())


@pytest.mark.parametrize("shapes", [((3,), (3,), (3,)), ((3, 1), (1,), (4,))], ids=str)
def test_gradcheck_of_the_inverse_in_all_three(shapes: tuple[tuple[int, ...], ...]) -> None:
    a, b = (0.5 + 3 * torch.rand(shape, dtype=F64) for shape in shapes[:2])
    p = 0.2 + 0.6 * torch.rand(shapes[2], dtype=F64)
    assert gradcheck(bs.betaincinv, [t.requires_grad_() for t in (a, b, p)])


def test_the_slope_of_the_inverse_is_one_over_the_density() -> None:
    a, b, x = inner_points(200, seed=11)
    p = torch.as_tensor(special.betainc(a, b, x)).requires_grad_()
    (slope,) = torch.autograd.grad(bs.betaincinv(torch.as_tensor(a), torch.as_tensor(b), p).sum(), p)
    torch.testing.assert_close(slope, 1 / torch.as_tensor(stats.beta.pdf(x, a, b)), rtol=1e-8, atol=1e-12)


def test_func_grad_and_vmap_of_the_inverse_equal_autograd() -> None:
    operands = [tensor(0.6, 2.0), tensor(0.4, 6.0), tensor(0.3, 0.7)]
    mapped = torch.func.vmap(torch.func.grad(bs.betaincinv, argnums=(0, 1, 2)))(*operands)
    operands = [t.requires_grad_() for t in operands]
    expected = torch.autograd.grad(bs.betaincinv(*operands).sum(), operands)
    for one, other in zip(mapped, expected, strict=True):
        torch.testing.assert_close(one, other)


# What is made once for two numbers


@pytest.mark.parametrize(
    "first", [lambda: torch.device("meta"), torch.inference_mode], ids=["meta", "inference"]
)
@pytest.mark.parametrize("single", [False, True], ids=["float64", "float32"])
def test_no_mode_around_the_first_call_changes_the_later_ones(first, single: bool) -> None:
    dtype = torch.float32 if single else F64
    x = torch.linspace(0.01, 0.99, 20, dtype=dtype)
    expected = scipy(special.betainc, 2.25, 6.75, x)
    operands = [torch.tensor(v, dtype=F64) for v in (2.25, 6.75)]
    prior = bs.Beta(2.25, 6.75)
    fixed_beta_cdf.cache_clear()
    with first():
        inside = bs.betainc(2.25, 6.75, x), prior.cdf(x), prior.icdf(x), prior.log_cdf(x)
    assert all(t.device.type == "cpu" for t in inside)
    leaf = x.clone().requires_grad_()
    for cdf in (inside[0], bs.betainc(*operands, leaf)):
        torch.testing.assert_close(cdf.detach().double(), expected, rtol=0, atol=5e-7)
    (slope,) = torch.autograd.grad(bs.betainc(*operands, leaf).sum(), leaf)
    torch.testing.assert_close(slope.double(), scipy(stats.beta.pdf, x, 2.25, 6.75), rtol=1e-5, atol=1e-6)
    bs.batch_shaping(leaf, prior, statistic="anderson_darling").backward()
    assert bool(leaf.grad.isfinite().all())


# Parameters of any size

SIZES = [
    (3000.0, 3000.0),
    (1e5, 1e5),
    (1e5, 3e3),
    (1e5, 0.5),
    (0.01, 1e5),
    (1e5, 1e-3),
    (1e8, 3e8),
    (1e15, 0.5),
    (1e15, 1e15),
    (1e30, 1e30),
    (1e-12, 40.0),
]


def both_orders(a: float, b: float) -> list[tuple[float, float]]:
    return [(a, b)] if a == b else [(a, b), (b, a)]


def around_the_mean(a: float, b: float) -> list[float]:
    """Numbers within some standard deviations of the mean, and in both tails."""
    mean, spread = a / (a + b), (a / (a + b) * (b / (a + b)) / (a + b + 1)) ** 0.5
    x = [*(mean + k * spread for k in (-30, -2, 0.5, 5)), mean * 1e-30, np.nextafter(1, 0)]
    return [float(y) for y in x if 0 < y < 1]


@pytest.mark.parametrize(("a", "b"), SIZES)
def test_at_any_size_of_the_parameters_it_equals_mpmath(a: float, b: float) -> None:
    for p, q in both_orders(a, b):
        x = tensor(*around_the_mean(p, q))
        prior = bs.Beta(p, q)
        columns = (
            t.tolist() for t in (x, prior.cdf(x), prior.log_cdf(x), prior.log_sf(x), prior.log_prob(x))
        )
        for y, value, *logs, log_density in zip(*columns, strict=True):
            expected = log_tails_of_beta(p, q, y)
            assert abs(value - mpmath.exp(expected[0])) < 1e-13, y
            for log, tail in zip(logs, expected, strict=True):
                # A tail that is all but 1 has a logarithm below the smallest number.
                assert abs(log - tail) <= 1e-11 * abs(tail) + 1e-299, y
            with mpmath.workdps(100):
                c, d = mpmath.mpf(p), mpmath.mpf(q)
                log_beta = mpmath.loggamma(c) + mpmath.loggamma(d) - mpmath.loggamma(c + d)
                power = (c - 1) * mpmath.log(y) + (d - 1) * mpmath.log1p(-mpmath.mpf(y)) - log_beta
            assert abs(log_density - power) <= 1e-12 * (1 + abs(power)), y


def test_at_the_largest_and_the_smallest_parameters_it_is_its_limit() -> None:
    # A Gamma variable over b, here of shape 1/2; a power; two atoms; and one.
    y = tensor(0.01, 0.5, 2.0, 50.0)
    error, complement = scipy(special.erf, y.sqrt()), scipy(special.erfc, y.sqrt())
    torch.testing.assert_close(bs.betainc(0.5, 1e299, y / 1e299), error, rtol=1e-12, atol=0)
    torch.testing.assert_close(bs.Beta(0.5, 1e299).log_sf(y / 1e299), complement.log(), rtol=1e-12, atol=0)
    at = BetaCDF(*tensor(1e299, 0.5), F64, tails=True).logs_at_logits(math.log(1e299) - y.log())
    torch.testing.assert_close(at.log_cdf, complement.log(), rtol=1e-10, atol=0)
    torch.testing.assert_close(at.log_sf, error.log(), rtol=1e-10, atol=1e-12)
    x = tensor(1e-300, 1e-10, 0.5, 0.9)
    torch.testing.assert_close(bs.Beta(1e-299, 1.0).log_cdf(x), 1e-299 * x.log(), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        bs.Beta(1e-299, 1.0).log_sf(x), math.log(1e-299) + (-x.log()).log(), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(bs.betainc(3e-299, 1e-299, x), torch.full_like(x, 0.25), rtol=1e-12, atol=0)
    around = tensor(0.3, np.nextafter(0.5, 0), 0.5, np.nextafter(0.5, 1), 0.7)
    torch.testing.assert_close(bs.betainc(1e299, 1e299, around), tensor(0.0, 0.0, 0.5, 1.0, 1.0))
    for a, b in (
        (0.5, 1e299),
        (1e299, 0.5),
        (1e-299, 1.0),
        (3e-299, 1e-299),
        (1e299, 1e299),
        (1e299, 1e-299),
    ):
        operands = [tensor(a).requires_grad_(), tensor(b).requires_grad_(), around.clone().requires_grad_()]
        for function in (bs.betainc, bs.betaincinv, lambda a, b, x: bs.Beta(a, b).log_prob(x)):
            result = function(*operands)
            for found in (result, *torch.autograd.grad(result.sum(), operands)):
                assert bool(found.isfinite().all()), (a, b, function)


def slopes_of_tails(a: float, b: float, x: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """The derivatives of I_x(a, b) in a and b by central differences at many digits."""
    with mpmath.workdps(60):
        a, b = mpmath.mpf(a), mpmath.mpf(b)
        # Far below what the tails notice of a parameter.
        h, k = (p * mpmath.mpf(10) ** -7 / mpmath.sqrt(1 + p) for p in (a, b))
        return (
            (tails_of_beta(a + h, b, x)[0] - tails_of_beta(a - h, b, x)[0]) / (2 * h),
            (tails_of_beta(a, b + k, x)[0] - tails_of_beta(a, b - k, x)[0]) / (2 * k),
        )


@pytest.mark.parametrize(("a", "b"), [s for s in SIZES if max(s) < 1e20])
def test_the_derivatives_at_any_size_of_the_parameters_equal_mpmath(a: float, b: float) -> None:
    x = [y for y in around_the_mean(a, b) if 1e-12 < bs.betainc(a, b, tensor(y)).item() < 1 - 1e-12][:2]
    operands = [torch.full((len(x),), p, dtype=F64, requires_grad=True) for p in (a, b)]
    by_a, by_b = torch.autograd.grad(bs.betainc(*operands, tensor(*x)).sum(), operands)
    for y, d_a, d_b in zip(x, by_a.tolist(), by_b.tolist(), strict=True):
        expected_a, expected_b = slopes_of_tails(a, b, y)
        # What a relative change of a parameter does.
        assert abs(a * (d_a - expected_a)) < 1e-9 * (1 + abs(a * expected_a)), y
        assert abs(b * (d_b - expected_b)) < 1e-9 * (1 + abs(b * expected_b)), y


@pytest.fixture
def _unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All parameters take the path of those that cannot be read, as on a device."""
    fixed_beta_cdf.cache_clear()
    monkeypatch.setattr(beta, "_FRACTION_LIMIT", 0.0)
    yield
    fixed_beta_cdf.cache_clear()


@pytest.mark.usefixtures("_unread")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-7)])
def test_parameters_that_are_not_read_give_the_same(dtype: torch.dtype, tolerance: float) -> None:
    a, b, x = (torch.as_tensor(v).to(dtype) for v in points(5000, seed=12))
    expected = scipy(special.betainc, a, b, x)
    assert (bs.betainc(a, b, x).double() - expected).abs().max() < tolerance


@pytest.mark.usefixtures("_unread")
def test_derivatives_in_parameters_that_are_not_read_equal_mpmath() -> None:
    a, b, x = (torch.as_tensor(v).requires_grad_() for v in inner_points(30, seed=13))
    by_a, by_b, by_x = torch.autograd.grad(bs.betainc(a, b, x).sum(), (a, b, x))
    torch.testing.assert_close(by_x, scipy(stats.beta.pdf, x, a, b), rtol=1e-10, atol=1e-14)
    for p, q, y, d_a, d_b in zip(*(t.tolist() for t in (a, b, x, by_a, by_b)), strict=True):
        expected_a, expected_b = regularized_beta_slopes(p, q, y)
        assert abs(d_a - expected_a) < 1e-12 and abs(d_b - expected_b) < 1e-12


@pytest.mark.parametrize("gradients", [False, True])
def test_the_work_is_bounded_whatever_the_parameters(gradients: bool) -> None:
    """Steps of a fraction and points of a rule are all that there is to repeat."""
    for size in (1e3, 1e6, 1e15, 1e30, 1e300):
        a = torch.full((3,), size, dtype=F64)
        for p, q in ((a, a), (a, 1 / a), (1 / a, a)):
            cdf = BetaCDF(p, q, F64, gradients=gradients)
            tables = [t for side in (cdf._tails.left, cdf._tails.right) for t in vars(side).values()]
            assert sum(t.numel() for t in tables if isinstance(t, Tensor)) < 6000


@pytest.mark.parametrize("wrong", [1.1e300, 1e-301, 5e-324, 1.7e308, torch.inf])
def test_parameters_beyond_what_is_computed_give_nan_and_touch_no_neighbour(wrong: float) -> None:
    for a, b in ((tensor(wrong, 800.0), 2.0), (2.0, tensor(wrong, 800.0))):
        expected = scipy(special.betainc, a, b, 0.5)
        found = bs.betainc(a, b, tensor(0.5))
        assert found.isnan().tolist() == [True, False]
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-13)
        assert bs.betaincinv(a, b, tensor(0.5)).isnan().tolist() == [True, False]


def test_nan_among_the_parameters_leaves_large_ones_as_they_are() -> None:
    a = tensor(torch.nan, 800.0)
    torch.testing.assert_close(bs.betainc(a, 800.0, tensor(0.49))[1], scipy(special.betainc, 800, 800, 0.49))


# Next to the ends


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (0.05, 3.0), (5.0, 2.0), (1e4, 0.3)])
def test_the_density_of_denormal_values_is_that_of_the_formula(
    a: float, b: float, dtype: torch.dtype
) -> None:
    finfo = torch.finfo(dtype)
    x = torch.tensor([1.0, 3.0, 1e4, 1e6], dtype=dtype) * (finfo.smallest_normal * finfo.eps)
    x = torch.cat([x, torch.zeros(1, dtype=dtype)]).requires_grad_()
    (density,) = torch.autograd.grad(bs.betainc(a, b, x).sum(), x)
    exact = x[:-1].detach().double()
    # Relative to the smallest number, powers stay within range.
    expected = ((a - 1) * exact.log() - special.betaln(a, b)).clamp(max=math.log(finfo.max)).exp()
    torch.testing.assert_close(density[:-1].double(), expected, rtol=1e-5, atol=finfo.smallest_normal)
    assert density[-1] == 0


@pytest.mark.parametrize(("a", "b"), [(1e-4, 3.0), (1e-9, 0.2), (1e-12, 700.0), (1e-6, 1e6)])
def test_the_logarithms_of_tails_that_are_all_but_1_have_relative_precision(a: float, b: float) -> None:
    logits = tensor(-600.0, -3.0, 0.5, 20.0)
    at = BetaCDF(*tensor(a, b), F64, gradients=True, tails=True).logs_at_logits(logits)
    for k, z in enumerate(logits.tolist()):
        with mpmath.workdps(700):
            x = 1 / (1 + mpmath.exp(-mpmath.mpf(z)))
            complement = 1 / (1 + mpmath.exp(mpmath.mpf(z)))
        expected = log_tails_of_beta(a, b, x, complement)
        for found, log in ((at.log_cdf[k], expected[0]), (at.log_sf[k], expected[1])):
            assert abs(found.item() - log) <= 1e-12 * abs(log) + 1e-299, z
        # The derivative of log(1 - F) in b, of which the part of the larger tail is tiny.
        with mpmath.workdps(50):
            step = mpmath.mpf(b) * mpmath.mpf(10) ** -8
            moved = [log_tails_of_beta(a, b + s * step, x, complement)[1] for s in (1, -1)]
            slope = (moved[0] - moved[1]) / (2 * step)
        assert abs(b * (at.parameters[1][1][k].item() - slope)) <= 1e-8 * (1e-6 + abs(b * slope)), z


@pytest.mark.parametrize(("a", "b"), [(1.95, 18.25), (3.46, 13.44), (4.14, 7.83), (18.25, 1.95), (84.0, 1.4)])
def test_the_density_in_float32_is_relatively_exact_next_to_the_ends(a: float, b: float) -> None:
    x = torch.tensor([1e-9, 4.4e-7, 3e-6, 7e-5, 0.01, 0.3, 0.7, 0.99, 1 - 1e-4, 1 - 2**-20]).requires_grad_()
    (density,) = torch.autograd.grad(bs.betainc(a, b, x).sum(), x)
    expected = scipy(stats.beta.pdf, x.detach().double(), a, b)
    torch.testing.assert_close(density.double(), expected, rtol=5e-5, atol=1e-30)


# The inverse at any size


@pytest.mark.parametrize(("a", "b"), [s for s in SIZES if max(s) < 1e20])
def test_the_inverse_at_any_size_of_the_parameters_is_found(a: float, b: float) -> None:
    probabilities_ = (5e-324, 0.25, 1 - 2**-53)
    for p, q in both_orders(a, b):
        x = bs.betaincinv(p, q, tensor(*probabilities_))
        for probability, y in zip(probabilities_, x.tolist(), strict=True):
            lower, upper = tails_of_beta(p, q, y) if 0 < y < 1 else (y, 1 - y)
            # The probability is within the precision of the CDF, or between those of the neighbours.
            if abs(lower - probability) > 1e-12 * min(lower, upper):
                below, above = (tails_of_beta(p, q, v)[0] for v in (np.nextafter(y, 0), np.nextafter(y, 1)))
                assert below <= probability <= above, (p, q, probability, y)


def test_the_inverse_is_found_for_any_parameters() -> None:
    rng = np.random.default_rng(14)
    a, b = 10 ** rng.uniform(-3, 6, (2, 20_000))
    p = np.where(rng.uniform(size=20_000) < 0.5, rng.uniform(size=20_000), 10 ** rng.uniform(-323, 0, 20_000))
    p = np.where(rng.uniform(size=20_000) < 0.2, 1 - np.minimum(p, 1), p)
    a, b, p = (torch.as_tensor(v) for v in (a, b, p))
    x = bs.betaincinv(a, b, p)
    assert not x.isnan().any()
    # As far as x tells: within the probabilities of the floats two steps aside.
    around = [torch.as_tensor(x.numpy() + k * 2 * np.spacing(x.numpy())).clamp(0, 1) for k in (-1, 1)]
    below, above = (bs.betainc(a, b, y) for y in around)
    assert bool((below <= p + 1e-12 * p).all()) and bool((p - 1e-12 * p <= above + 1e-16).all())


@pytest.mark.parametrize(("a", "b"), [(3000.0, 3000.0), (1e5, 0.5), (0.01, 1e3), (1e-3, 1e-3), (1e5, 1e5)])
def test_the_slopes_of_the_inverse_equal_mpmath(a: float, b: float) -> None:
    probabilities_ = tensor(1e-200, 1e-3, 0.25, 0.75, 1 - 1e-3).requires_grad_()
    operands = [torch.full((5,), v, dtype=F64, requires_grad=True) for v in (a, b)]
    x = bs.betaincinv(*operands, probabilities_)
    by_a, by_b, by_p = torch.autograd.grad(x.sum(), (*operands, probabilities_))
    for k, y in enumerate(x.tolist()):
        if not 1e-280 < y < 1 - 1e-6:
            continue
        density = special.betaln(a, b)
        with mpmath.workdps(50):
            power = (a - 1) * mpmath.log(y) + (b - 1) * mpmath.log1p(-mpmath.mpf(y))
            power -= mpmath.loggamma(a) + mpmath.loggamma(b) - mpmath.loggamma(mpmath.mpf(a) + b)
            density = mpmath.exp(power)
        expected = [-slope / density for slope in slopes_of_tails(a, b, y)]
        assert abs(by_p[k].item() * density - 1) < 1e-9, k
        for found, slope in zip((by_a[k].item(), by_b[k].item()), expected, strict=True):
            assert abs(found - slope) <= 1e-7 * abs(slope), k


def test_a_quantile_that_has_rounded_to_an_end_keeps_its_slope() -> None:
    # x = p^(1 / a) is exact for b = 1, as is 1 - x = (1 - p)^(1 / b) for a = 1.
    p = tensor(1e-3, 0.25, 0.5).requires_grad_()
    x = bs.betaincinv(1.0, 0.01, p)
    assert x[2] == 1
    (slope,) = torch.autograd.grad(x.sum(), p)
    torch.testing.assert_close(slope, 100 * (1 - p.detach()) ** 99, rtol=1e-12, atol=0)
    below = bs.betaincinv(1e-3, 1.0, p)
    assert below.tolist()[0] == 0
    (slope,) = torch.autograd.grad(below.sum(), p)
    torch.testing.assert_close(slope, 1e3 * p.detach() ** 999, rtol=1e-9, atol=1e-300)


def test_the_quantiles_of_0_and_1_move_with_nothing() -> None:
    operands = [t.requires_grad_() for t in (tensor(0.5, 0.5), tensor(2.0, 2.0), tensor(0.0, 1.0))]
    for gradient in torch.autograd.grad(bs.betaincinv(*operands).sum(), operands):
        assert gradient.tolist() == [0.0, 0.0]


def test_gradgradcheck_of_the_inverse_in_p() -> None:
    p = tensor(0.3, 0.2, 0.6).requires_grad_()
    assert gradgradcheck(lambda q: bs.betaincinv(tensor(0.6, 2.0, 30.0), tensor(0.4, 6.0, 70.0), q), [p])


# A hostile reader


def test_random_calls_from_end_to_end_have_no_wrong_number() -> None:
    """Values and logits, both dtypes, parameters and values of all sizes; mpmath arbitrates."""
    rng = np.random.default_rng(15)
    for _ in range(40):
        a, b = 10 ** rng.uniform(-3, 6, 2)
        mean, spread = a / (a + b), (a * b / (a + b + 1)) ** 0.5 / (a + b)
        x = rng.choice([mean + spread * rng.normal() * 3, 10 ** rng.uniform(-323, 0), rng.uniform()])
        single = bool(rng.integers(2))
        dtype, tolerance = (torch.float32, 5e-7) if single else (torch.float64, 1e-12)
        value = torch.tensor(float(np.clip(x, 0, 1)), dtype=dtype)
        prior = bs.Beta(a, b)
        if not 0 < value.item() < 1:
            continue
        smallest = torch.finfo(dtype).smallest_normal
        log_lower, log_upper = log_tails_of_beta(a, b, value.item())
        assert abs(prior.cdf(value).item() - mpmath.exp(log_lower)) < tolerance, (a, b, value)
        for log, expected in ((prior.log_cdf(value), log_lower), (prior.log_sf(value), log_upper)):
            assert abs(log.item() - expected) <= 10 * tolerance * abs(expected) + smallest, (a, b, value)
        logit = torch.tensor(float(np.log(mean / (1 - mean)) + rng.normal() * 3), dtype=dtype)
        with mpmath.workdps(60):
            x, complement = (1 / (1 + mpmath.exp(s * mpmath.mpf(logit.item()))) for s in (-1, 1))
        log_lower, log_upper = log_tails_of_beta(a, b, x, complement)
        at = prior.prepare(prior.parameters, dtype, tails=True).logs_at_logits(logit)
        # A rounding of the logit is no error of the function.
        rounding = 4 * torch.finfo(F64).eps * abs(logit.item())
        for log, slope, expected in (
            (at.log_cdf, at.cdf_by_x, log_lower),
            (at.log_sf, at.sf_by_x, log_upper),
        ):
            allowed = 10 * tolerance * abs(expected) + abs(slope.item()) * rounding + smallest
            assert abs(log.item() - expected) <= allowed, (a, b, logit)


LARGE = [(3000.0, 3000.0), (2600.0, 5.0), (1e5, 1e5), (1e5, 0.5), (0.01, 1000.0), (40.0, 9e4)]


@pytest.mark.parametrize(("a", "b"), LARGE, ids=str)
def test_quantiles_of_large_concentrations_are_found(a: float, b: float) -> None:
    p = torch.tensor([1e-300, 1e-20, 1e-3, 0.25, 0.5, 0.75, 0.999, 1 - 1e-12], dtype=F64, requires_grad=True)
    x = bs.betaincinv(a, b, p)
    (slope,) = torch.autograd.grad(x.sum(), p)
    found, slopes = x.detach().numpy(), slope.numpy()
    assert (np.diff(found) >= 0).all()
    inside = (found > 1e-290) & (found < 1)
    assert inside[3:6].all() or a < 1
    found, slopes, p = found[inside], slopes[inside], p.detach().numpy()[inside]
    # What rounding x to double precision changes in the probability is no error of the search.
    density = stats.beta.pdf(found, a, b)
    assert (np.abs(stats.beta.cdf(found, a, b) - p) <= 1e-11 + density * np.spacing(found)).all()
    np.testing.assert_allclose(slopes * density, 1.0, rtol=1e-5)


@pytest.mark.parametrize("size", [1e6, 1e10, 1e15, 1e30, 1e299])
def test_huge_concentrations_are_normal_and_take_no_more_than_others(size: float) -> None:
    z = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0], dtype=F64)
    # A logit is as exact as x is not, beside so small a deviation.
    logits = z * math.sqrt(2 / size)
    a = torch.tensor(size, dtype=F64, requires_grad=True)
    at = BetaCDF(a.detach(), a.detach(), F64, gradients=True).at_logits(logits)
    if size <= 1e15:  # beyond, the rounding of x shows
        torch.testing.assert_close(at.cdf, torch.special.ndtr(z), rtol=0, atol=1e-6)
    assert bool(((at.cdf >= 0) & (at.cdf <= 1)).all()) and abs(at.cdf[2] - 0.5) < 1e-12
    loss = bs.batch_shaping(torch.rand(100, dtype=F64), bs.Beta(a, 2.0))
    loss.backward()
    assert bool(loss.isfinite()) and bool(a.grad.isfinite())
