"""The loss against brute force over SciPy's CDFs, its gradients against finite differences, and its laws."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as td
from hypothesis import given
from hypothesis import strategies as st
from oracles import FAMILIES, Family, arrays_of, brute_force, each_family, each_prior, inside, learned, scipy
from scipy import special, stats
from torch import Tensor, nn
from torch.autograd import gradcheck

import batchshaping as bs
from batchshaping.statistics import STATISTICS
from batchshaping.statistics.cramer_von_mises import CramerVonMises
from batchshaping.statistics.statistic import Statistic

F64 = torch.float64
BETA = FAMILIES["Beta"]
SHAPE = (5, 4, 6)
DIMS = [None, 0, 1, 2, -1, -2, -3, (0,), (0, 1), (0, 2), (1, 2), (2, 0), (0, -1), (-3, -2), (0, 1, 2)]
each_dim = pytest.mark.parametrize("dim", DIMS, ids=str)
each_ties = pytest.mark.parametrize("ties", [False, True], ids=["consecutive", "ties"])


def left_by(dim: int | tuple[int, ...] | None, shape: tuple[int, ...] = SHAPE) -> tuple[int, ...]:
    """The shape of the arrays."""
    return arrays_of(torch.empty(shape), dim)[1]


def mask_of(shape: tuple[int, ...], dim: int | tuple[int, ...] | None = None) -> Tensor:
    """A random mask that leaves every array at least one sample."""
    dims = tuple(range(len(shape))) if dim is None else dim
    mask = torch.rand(shape) < 0.6
    return torch.where(mask.any(dims, keepdim=True), mask, True)


def tied(x: Tensor) -> Tensor:
    """Values of which about half occur more than once within an array."""
    flat = x.reshape(-1)
    return torch.where(torch.rand(x.shape) < 0.5, flat[:3].mean(), x)


# Brute force


@each_prior
@each_dim
def test_the_loss_equals_brute_force(
    family: Family, parameters: tuple[float, ...], dim: int | tuple[int, ...] | None
) -> None:
    prior = family.prior(*parameters)
    distinct = inside(family, parameters, SHAPE)
    some = mask_of(SHAPE, dim)
    for x, mask, ties in itertools.product((distinct, tied(distinct)), (None, some), (False, True)):
        expected = torch.as_tensor(brute_force(x, family.cdf, parameters, dim, mask, ties))
        loss = bs.batch_shaping(x, prior, dim, mask=mask, ties=ties, reduction="none")
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
        expected = torch.as_tensor(brute_force(x.float(), family.cdf, parameters, dim, mask, ties))
        single = bs.batch_shaping(x.float(), prior, dim, mask=mask, ties=ties, reduction="none")
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-6)


@each_family
@pytest.mark.parametrize(
    ("dim", "first", "second"),
    [
        (0, (6,), ()),
        (0, (4, 6), (4, 6)),
        (0, (4, 1), (6,)),
        (1, (5, 6), (1, 6)),
        ((0, 2), (4,), (4,)),
        ((0, 1), (6,), (1,)),
        (-1, (5, 4), (5, 1)),
        (None, (), ()),
    ],
    ids=str,
)
def test_one_prior_an_array_equals_brute_force(
    family: Family, dim: int | tuple[int, ...] | None, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    example = family.examples[0]
    parameters = [
        (p * (0.7 + 0.6 * torch.rand(shape, dtype=F64)))
        for p, shape in zip(example, (first, second), strict=False)
    ]
    x, mask = inside(family, example, SHAPE), mask_of(SHAPE, dim)
    for keep, ties in ((None, False), (mask, False), (mask, True)):
        loss = bs.batch_shaping(x, family.prior(*parameters), dim, mask=keep, ties=ties, reduction="none")
        expected = torch.as_tensor(brute_force(x, family.cdf, tuple(parameters), dim, keep, ties))
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)


@given(
    name=st.sampled_from(sorted(FAMILIES)),
    shape=st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple),
    data=st.data(),
)
def test_any_shape_and_dims_equal_brute_force(name: str, shape: tuple[int, ...], data: st.DataObject) -> None:
    family = FAMILIES[name]
    parameters = data.draw(st.sampled_from(family.examples))
    dims = data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True)) if shape else None
    dim = data.draw(st.sampled_from([None] if dims is None else [None, tuple(dims), dims[0]]))
    values = st.floats(-2, 3) | st.sampled_from([0.0, 1.0, 0.5])
    n = int(np.prod(shape, dtype=int))
    x = torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)), dtype=F64).reshape(shape)
    ties = data.draw(st.booleans())
    loss = bs.batch_shaping(x, family.prior(*parameters), dim, ties=ties, reduction="none")
    expected = torch.as_tensor(brute_force(x, family.cdf, parameters, dim, ties=ties))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 1000, 200_003])
@each_family
def test_few_and_many_samples_equal_brute_force(family: Family, n: int) -> None:
    parameters = family.examples[1]
    x = inside(family, parameters, (n,), upper=0.7).requires_grad_()
    loss = bs.batch_shaping(x, family.prior(*parameters))
    (gradient,) = torch.autograd.grad(loss, x)
    expected = torch.as_tensor(brute_force(x, family.cdf, parameters))
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-10, atol=1e-14)
    rank = stats.rankdata(x.detach().numpy(), method="ordinal")
    density = family.prior(*learned(parameters)).log_prob(x.detach()).exp().detach()
    residual = scipy(family.cdf, x, *parameters) - torch.as_tensor(rank / (n + 1))
    torch.testing.assert_close(gradient, 2 / n * residual * density, rtol=1e-9, atol=1e-12)


@each_family
def test_long_arrays_with_gaps_and_ties_equal_brute_force(family: Family) -> None:
    example = family.examples[0]
    given = learned(example, (3,), 0.2)
    x = tied(inside(family, example, (60_000, 3))).requires_grad_()
    mask = mask_of(x.shape, 0)
    loss = bs.batch_shaping(x, family.prior(*given), 0, mask=mask, ties=True, reduction="none")
    expected = torch.as_tensor(brute_force(x, family.cdf, tuple(given), 0, mask, ties=True))
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-9, atol=1e-13)
    for column, keep in zip(torch.autograd.grad(loss.sum(), x)[0].T, mask.T, strict=True):
        assert not column[~keep].any()
    by_parameter = torch.autograd.grad(
        bs.batch_shaping(x.detach(), family.prior(*given), 0, mask=mask), given
    )
    for k, gradient in enumerate(by_parameter):
        h = 1e-4 * abs(example[k])
        moved = [
            brute_force(x, family.cdf, tuple(p + s * h * (j == k) for j, p in enumerate(given)), 0, mask)
            for s in (1, -1)
        ]
        difference = torch.as_tensor(moved[0] - moved[1]) / (2 * h) / 3
        torch.testing.assert_close(gradient, difference, rtol=1e-4, atol=1e-6)


@each_family
def test_many_arrays_with_a_prior_each_equal_one_formula(family: Family) -> None:
    given = [p.detach() for p in learned(family.examples[0], (20_000,), 0.3)]
    x = inside(family, family.examples[0], (3, 20_000))
    loss = bs.batch_shaping(x, family.prior(*given), 0, reduction="none")
    position = torch.tensor([[0.25], [0.5], [0.75]], dtype=F64)
    expected = (scipy(family.cdf, x.sort(dim=0).values, *given) - position).square().mean(dim=0)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-13)


@each_family
def test_a_call_in_inference_mode_leaves_training_as_it_was(family: Family) -> None:
    # Parameters that no other test has, so that nothing is prepared for them yet.
    parameters = tuple(p * 1.0371 for p in family.examples[0])
    x = inside(family, parameters, (20,))
    with torch.inference_mode():
        value = bs.batch_shaping(x, family.prior(*parameters)).item()
    x.requires_grad_()
    loss = bs.batch_shaping(x, family.prior(*parameters))
    loss.backward()
    assert loss.item() == value
    assert bool(x.grad.isfinite().all())


def test_with_ties_the_empirical_cdf_is_the_exact_one() -> None:
    x = torch.tensor([0.3, 0.1, 0.3, 0.8, 0.3, 0.1], dtype=F64)
    ecdf = stats.ecdf(x.numpy()).cdf.evaluate(x.numpy())
    position = torch.as_tensor(ecdf) * 6 / 7
    expected = (scipy(special.betainc, 0.6, 0.4, x) - position).square().mean()
    torch.testing.assert_close(bs.batch_shaping(x, bs.Beta(0.6, 0.4), ties=True), expected)


def test_the_loss_is_0_at_the_plotting_positions_and_at_most_1() -> None:
    prior = bs.Beta(2.0, 6.0)
    x = torch.as_tensor(special.betaincinv(2, 6, np.arange(1, 100) / 100))
    assert bs.batch_shaping(x, prior) < 1e-24
    for value in (-5.0, 0.0, 1.0, 5.0):
        assert 0 < bs.batch_shaping(torch.full((99,), value), prior) <= 1


# Dimensions, reductions, masks


@each_dim
def test_reductions_are_those_of_torch(dim: int | tuple[int, ...] | None) -> None:
    x, prior = torch.rand(SHAPE), bs.Beta(0.6, 0.4)
    each = bs.batch_shaping(x, prior, dim, reduction="none")
    assert each.shape == left_by(dim)
    torch.testing.assert_close(bs.batch_shaping(x, prior, dim, reduction="sum"), each.sum())
    torch.testing.assert_close(bs.batch_shaping(x, prior, dim, reduction="mean"), each.mean())
    torch.testing.assert_close(bs.batch_shaping(x, prior, dim), each.mean())
    assert bs.batch_shaping(x, prior, dim).shape == ()


@pytest.mark.parametrize("dim", [0, 1, (0, 2), None], ids=str)
@each_prior
@each_ties
def test_a_mask_equals_leaving_values_out(
    family: Family, parameters: tuple[float, ...], dim: int | tuple[int, ...] | None, ties: bool
) -> None:
    given = learned(parameters)
    x = tied(inside(family, parameters, SHAPE)).requires_grad_()
    mask = mask_of(SHAPE, dim)
    loss = bs.batch_shaping(x, family.prior(*given), dim, mask=mask, ties=ties)
    by_mask = torch.autograd.grad(loss, (x, *given))

    rows = zip(arrays_of(x, dim)[0], arrays_of(mask, dim)[0], strict=True)
    each = [bs.batch_shaping(row[keep], family.prior(*given), ties=ties) for row, keep in rows]
    left_out = torch.stack(each).mean()
    torch.testing.assert_close(loss, left_out, rtol=1e-10, atol=1e-14)
    for one, other in zip(by_mask, torch.autograd.grad(left_out, (x, *given)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert not by_mask[0][~mask].any()


@pytest.mark.parametrize("shape", [(5, 4, 6), (4, 6), (6,), (5, 1, 1), (1, 4, 1)], ids=str)
def test_a_mask_broadcasts_to_x(shape: tuple[int, ...]) -> None:
    x, prior = torch.rand(SHAPE, dtype=F64), bs.Beta(0.6, 0.4)
    mask = torch.rand(shape) < 0.7
    mask.view(-1)[0] = True
    loss = bs.batch_shaping(x, prior, mask=mask)
    torch.testing.assert_close(loss, bs.batch_shaping(x, prior, mask=mask.expand(SHAPE)))
    torch.testing.assert_close(loss, torch.as_tensor(brute_force(x, BETA.cdf, (0.6, 0.4), None, mask)))


def test_a_mask_of_true_changes_nothing() -> None:
    x = torch.rand(SHAPE, dtype=F64)
    for ties in (False, True):
        masked = bs.batch_shaping(x, bs.Normal(0.6, 0.1), 0, mask=torch.tensor(True), ties=ties)
        torch.testing.assert_close(masked, bs.batch_shaping(x, bs.Normal(0.6, 0.1), 0, ties=ties))


@each_family
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_what_is_masked_is_not_looked_at(family: Family, garbage: float) -> None:
    parameters = family.examples[0]
    x, mask = inside(family, parameters, (20, 3)), mask_of((20, 3), 0)
    results = []
    for y in (x, torch.where(mask, x, garbage)):
        given = learned(parameters)
        y = y.requires_grad_()
        loss = bs.batch_shaping(y, family.prior(*given), 0, mask=mask, ties=True)
        results.append((loss.detach(), *torch.autograd.grad(loss, (y, *given))))
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(dirty, clean)
    assert not results[1][1][~mask].any()


def test_infinite_samples_are_told_from_masked_ones() -> None:
    x = torch.tensor([0.2, torch.inf, 0.5, 0.9, torch.inf, -torch.inf], dtype=F64)
    mask = torch.tensor([True, True, True, False, True, True])
    for ties in (False, True):
        expected = torch.as_tensor(brute_force(x, FAMILIES["Normal"].cdf, (0.6, 0.1), None, mask, ties))
        loss = bs.batch_shaping(x, bs.Normal(0.6, 0.1), mask=mask, ties=ties)
        torch.testing.assert_close(loss, expected)


# Gradients


def coordinates(family: Family, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Coordinates in which the CDF is smooth enough for finite differences, and the way back to x.

    Near 0 and 1 a U-shaped density grows beyond all bounds; in the logit of x it does not.
    """
    if family is FAMILIES["Normal"]:
        scale = x.abs().mean()
        return x / scale, lambda z: z * scale
    return torch.logit(x), torch.sigmoid


@each_prior
@pytest.mark.parametrize(("masked", "ties"), [(False, False), (True, True)], ids=["all", "masked-ties"])
def test_gradcheck_in_x_and_every_parameter(
    family: Family, parameters: tuple[float, ...], masked: bool, ties: bool
) -> None:
    start, to_line = coordinates(family, inside(family, parameters, (6, 3), upper=0.7))
    mask = mask_of((6, 3), 0) if masked else None
    given = learned(parameters, (3,), spread=0.1)

    def loss(z: Tensor, *given: Tensor) -> Tensor:
        x = to_line(z)
        return bs.batch_shaping(x, family.prior(*given), 0, mask=mask, ties=ties, reduction="none")

    assert gradcheck(loss, (start.requires_grad_(), *given))


@each_family
@pytest.mark.parametrize(
    ("dim", "first", "second"),
    [(0, (3, 1), ()), ((0, 2), (), (3,)), (1, (4, 1), (2,)), (None, (), ()), (-1, (4, 3), (1, 3))],
    ids=str,
)
def test_gradcheck_in_parameters_that_broadcast(
    family: Family, dim: int | tuple[int, ...] | None, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    example = family.examples[0]
    start, to_line = coordinates(family, inside(family, example, (4, 3, 2)))
    given = [learned((p,), shape, 0.1)[0] for p, shape in zip(example, (first, second), strict=False)]
    loss = lambda z, *given: bs.batch_shaping(to_line(z), family.prior(*given), dim)  # noqa: E731
    assert gradcheck(loss, (start.requires_grad_(), *given))


@each_family
@each_ties
def test_gradcheck_when_tied_values_move_together(family: Family, ties: bool) -> None:
    parameters = family.examples[0]
    start, to_line = coordinates(family, inside(family, parameters, (4,)))
    which = torch.tensor([0, 1, 1, 2, 3, 3, 3, 0])
    given = learned(parameters)
    loss = lambda z, *given: bs.batch_shaping(to_line(z)[which], family.prior(*given), ties=ties)  # noqa: E731
    assert gradcheck(loss, (start.requires_grad_(), *given))


@each_family
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_of_each_reduction(family: Family, reduction: str) -> None:
    prior = family.prior(*family.examples[0])
    start, to_line = coordinates(family, inside(family, family.examples[0], (4, 3)))
    loss = lambda z: bs.batch_shaping(to_line(z), prior, 0, reduction=reduction)  # noqa: E731
    assert gradcheck(loss, (start.requires_grad_(),))


@each_family
def test_single_precision_gradients_follow_those_in_double(family: Family) -> None:
    parameters = family.examples[0]
    x = inside(family, parameters, (50, 4)).float()
    gradients = []
    for dtype in (torch.float32, torch.float64):
        given = [torch.full((4,), p, dtype=torch.float32).to(dtype).requires_grad_() for p in parameters]
        y = x.to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad(bs.batch_shaping(y, family.prior(*given), 0), (y, *given)))
    for single, double in zip(*gradients, strict=True):
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-5)


@each_family
def test_only_what_requires_grad_gets_one(family: Family) -> None:
    parameters = family.examples[0]
    x = inside(family, parameters, (10,))
    for k in range(len(parameters)):
        given = learned(parameters)
        for j, p in enumerate(given):
            p.requires_grad_(j == k)
        bs.batch_shaping(x, family.prior(*given)).backward()
        assert [p.grad is not None for p in given] == [j == k for j in range(len(given))]
    assert not bs.batch_shaping(x, family.prior(*parameters)).requires_grad
    with torch.no_grad():
        assert not bs.batch_shaping(x.requires_grad_(), family.prior(*learned(parameters))).requires_grad


@each_family
def test_a_descent_step_lowers_the_loss(family: Family) -> None:
    prior = family.prior(*family.examples[0])
    x = torch.rand(100, 3, dtype=F64, requires_grad=True)
    loss = bs.batch_shaping(x, prior, 0)
    (gradient,) = torch.autograd.grad(loss, x)
    assert bs.batch_shaping(x - 1e-4 * gradient, prior, 0) < loss


@each_family
@pytest.mark.parametrize("shape", [(64, 32), (32, 64)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_one_tensor_of_the_size_of_x_is_saved(family: Family, shape: tuple[int, int], masked: bool) -> None:
    given = [torch.full((32,), p, requires_grad=True) for p in family.examples[0]]
    x = inside(family, family.examples[0], shape).float().requires_grad_()
    dim = shape.index(64)
    mask = mask_of(shape, dim) if masked else None
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = bs.batch_shaping(x, family.prior(*given), dim, mask=mask)
    # The mask itself may be kept too.
    sizes = [t.numel() for t in saved if t.is_floating_point() or not masked]
    assert [n for n in sizes if n > 32 * 4] == [64 * 32]
    assert sum(sizes) <= 64 * 32 + 10 * 32
    loss.backward()


@each_family
def test_a_second_backward_is_an_error_and_no_wrong_number(family: Family) -> None:
    x = inside(family, family.examples[0], (10,)).requires_grad_()
    given = learned(family.examples[0])
    loss = bs.batch_shaping(x, family.prior(*given))
    first = torch.autograd.grad(loss, (x, *given), create_graph=True)
    for gradient in first:
        with pytest.raises(RuntimeError, match=r"differentia|does not require grad"):
            torch.autograd.grad(gradient.sum(), x, retain_graph=True)


def test_func_grad_of_grad_is_an_error_and_no_wrong_number() -> None:
    x = torch.rand(10, dtype=F64)
    first = torch.func.grad(lambda y: bs.batch_shaping(y, bs.Beta(0.6, 0.4)))
    with pytest.raises(RuntimeError, match=r"differentia|does not require grad"):
        torch.func.grad(lambda y: first(y).sum())(x)


# torch.func


@each_family
def test_vmap_equals_a_loop(family: Family) -> None:
    parameters = family.examples[0]
    x = inside(family, parameters, (7, 3, 4))
    given = [p.detach() for p in learned(parameters, (3, 4), 0.2)]
    loss = lambda x, *given: bs.batch_shaping(x, family.prior(*given), 0, reduction="none")  # noqa: E731
    for x_dim, p_dim in [(1, 0), (2, 1), (1, None), (None, 0)]:
        shared = [p if p_dim is not None else p[0] for p in given]
        y = x if x_dim is not None else x[:, 0]
        in_dims = (x_dim, *[p_dim] * len(shared))
        size = y.shape[x_dim] if x_dim is not None else shared[0].shape[p_dim]
        if p_dim is not None and x_dim is None:
            shared = [p.reshape(3, 4) for p in shared]
        expected = torch.stack(
            [
                loss(
                    y if x_dim is None else y.select(x_dim, k),
                    *(p if p_dim is None else p.select(p_dim, k) for p in shared),
                )
                for k in range(size)
            ]
        )
        torch.testing.assert_close(torch.func.vmap(loss, in_dims)(y, *shared), expected)


@each_family
def test_vmap_over_priors_of_one_array_equals_a_loop(family: Family) -> None:
    given = [p.detach() for p in learned(family.examples[0], (5,), 0.2)]
    x = inside(family, family.examples[0], (20,))
    loss = lambda *given: bs.batch_shaping(x, family.prior(*given))  # noqa: E731
    expected = torch.stack([loss(*each) for each in zip(*given, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(*given), expected)


@each_ties
def test_vmap_with_a_mask_equals_a_loop(ties: bool) -> None:
    x, mask = torch.rand(5, 20, 3, dtype=F64), mask_of((5, 20, 3), 1)
    loss = lambda x, m: bs.batch_shaping(x, bs.Beta(0.6, 0.4), 0, mask=m, ties=ties)  # noqa: E731
    expected = torch.stack([loss(*each) for each in zip(x, mask, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(x, mask), expected)
    shared = torch.stack([loss(each, mask[0]) for each in x])
    torch.testing.assert_close(torch.func.vmap(loss, (0, None))(x, mask[0]), shared)


@each_family
@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap"])
def test_func_grad_and_vmap_equal_autograd(family: Family, order: str) -> None:
    parameters = family.examples[0]
    x = inside(family, parameters, (5, 20))
    given = [p.detach() for p in learned(parameters, (5,), 0.2)]
    argnums = tuple(range(1 + len(given)))
    loss = lambda x, *given: bs.batch_shaping(x, family.prior(*given))  # noqa: E731
    if order == "vmap of grad":
        gradients = torch.func.vmap(torch.func.grad(loss, argnums))(x, *given)
    else:
        total = lambda *operands: torch.func.vmap(loss)(*operands).sum()  # noqa: E731
        gradients = torch.func.grad(total, argnums)(x, *given)
    operands = [t.clone().requires_grad_() for t in (x, *given)]
    for k in range(5):
        loss(*(t[k] for t in operands)).backward()
    for operand, gradient in zip(operands, gradients, strict=True):
        torch.testing.assert_close(gradient, operand.grad)


# Laws


@each_family
@given(seed=st.integers(0, 10**6), ties=st.booleans())
def test_the_order_of_samples_does_not_matter(family: Family, seed: int, ties: bool) -> None:
    torch.manual_seed(seed)
    prior = family.prior(*family.examples[0])
    x = torch.rand(30, 3, dtype=F64).mul(8).round().div(8) if ties else torch.rand(30, 3, dtype=F64)
    order = torch.randperm(30)
    results = []
    for y in (x, x[order]):
        y = y.clone().requires_grad_()
        loss = bs.batch_shaping(y, prior, 0, ties=ties)
        results.append((loss.detach(), torch.autograd.grad(loss, y)[0]))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1][order])


@each_family
def test_tied_values_get_the_same_gradient_where_ties_are_shared(family: Family) -> None:
    x = torch.tensor([0.3, 0.7, 0.3, 0.3, 0.5, 0.7], dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(bs.batch_shaping(x, family.prior(*family.examples[0]), ties=True), x)
    assert g[0] == g[2] == g[3]
    assert g[1] == g[5]


@each_family
def test_strides_do_not_matter(family: Family) -> None:
    prior = family.prior(*family.examples[0])
    dense = torch.rand(6, 8, dtype=F64)
    views = [dense.T, dense[::2, 1::3], dense.flip(0), dense[:, :1].expand(6, 5), dense[0].expand(4, 8)]
    for view in views:
        one, other = view.detach().requires_grad_(), view.contiguous().clone().requires_grad_()
        losses = [bs.batch_shaping(t, prior, 0) for t in (one, other)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(torch.autograd.grad(losses[0], one), torch.autograd.grad(losses[1], other))


@each_family
def test_x_is_left_as_it_was(family: Family) -> None:
    x = torch.rand(20, 3, dtype=F64)
    before = x.clone()
    bs.batch_shaping(x.requires_grad_(), family.prior(*learned(family.examples[0])), 0).backward()
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_family
def test_half_precision_is_computed_in_single(family: Family, dtype: torch.dtype) -> None:
    x = torch.rand(100, 3).to(dtype)
    half, single = x.clone().requires_grad_(), x.float().requires_grad_()
    parameters = [
        [torch.tensor(p, dtype=torch.float32).requires_grad_() for p in family.examples[0]] for _ in "ab"
    ]
    losses = [
        bs.batch_shaping(t, family.prior(*given), 0, ties=True)
        for t, given in zip((half, single), parameters, strict=True)
    ]
    assert losses[0].dtype == dtype
    torch.testing.assert_close(losses[0].float(), losses[1], rtol=torch.finfo(dtype).eps, atol=1e-7)
    # Scaled up, so that the gradient of a mean does not underflow in half precision.
    (losses[0].float() * 64).backward()
    (losses[1] * 64).backward()
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad.float(), single.grad, rtol=0.02, atol=1e-4)
    for p, q in zip(*parameters, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision_get_gradients_in_theirs(dtype: torch.dtype) -> None:
    a = torch.full((3,), 0.6, dtype=dtype, requires_grad=True)
    loss = bs.batch_shaping(torch.rand(20, 3).to(dtype), bs.Beta(a, 0.4), 0)
    (gradient,) = torch.autograd.grad(loss, a)
    assert gradient.dtype == dtype


@each_family
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_the_loss_has_the_dtype_of_x_and_gradients_that_of_their_operand(
    family: Family, x_dtype: torch.dtype, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    parameters = [torch.full(shape, p, dtype=dtype) for p in family.examples[0]]
    x = torch.rand(10, 3).to(x_dtype)
    exact = [p.double() for p in parameters]
    expected = torch.as_tensor(brute_force(x, family.cdf, tuple(exact), 0).mean())
    operands = [t.requires_grad_() for t in (x, *parameters)]
    loss = bs.batch_shaping(x, family.prior(*parameters), 0)
    assert loss.dtype == x_dtype
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-4, atol=1e-7)
    gradients = torch.autograd.grad(loss, operands)
    assert [g.dtype for g in gradients] == [t.dtype for t in operands]


@each_family
def test_autocast_leaves_single_precision_as_it_is(family: Family) -> None:
    x = torch.rand(100, 3)
    results = []
    for enabled in (False, True):
        operands = [torch.full((3,), p, requires_grad=True) for p in family.examples[0]]
        y = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = bs.batch_shaping(y, family.prior(*operands), 0)
        results.append((loss.detach(), *torch.autograd.grad(loss, (y, *operands))))
    for plain, cast in zip(*results, strict=True):
        torch.testing.assert_close(cast, plain)


# Any distribution with a CDF

FOREIGN: dict[str, tuple[Callable[..., td.Distribution], tuple[float, ...], Callable[..., np.ndarray]]] = {
    "Uniform": (td.Uniform, (0.1, 0.8), lambda x, low, high: stats.uniform.cdf(x, low, high - low)),
    "LogNormal": (td.LogNormal, (0.2, 0.7), lambda x, m, s: stats.lognorm.cdf(x, s, scale=np.exp(m))),
    "Gumbel": (td.Gumbel, (0.2, 0.7), stats.gumbel_r.cdf),
    "Laplace": (td.Laplace, (0.2, 0.7), stats.laplace.cdf),
    "Exponential": (td.Exponential, (2.0,), lambda x, rate: stats.expon.cdf(x, scale=1 / rate)),
    "Cauchy": (td.Cauchy, (0.2, 0.7), stats.cauchy.cdf),
    "HalfNormal": (td.HalfNormal, (0.7,), lambda x, s: stats.halfnorm.cdf(x, scale=s)),
    "Gamma": (td.Gamma, (2.0, 3.0), lambda x, a, rate: stats.gamma.cdf(x, a, scale=1 / rate)),
    "Pareto": (td.Pareto, (0.3, 2.0), lambda x, s, a: stats.pareto.cdf(x, a, scale=s)),
    "Kumaraswamy": (td.Kumaraswamy, (2.0, 3.0), lambda x, a, b: 1 - (1 - np.clip(x, 0, 1) ** a) ** b),
}
each_foreign = pytest.mark.parametrize("name", FOREIGN)


def foreign(name: str, shape: tuple[int, ...] = ()) -> tuple[td.Distribution, list[Tensor]]:
    make, parameters, _ = FOREIGN[name]
    given = learned(parameters, shape, 0.1)
    return make(*given), given


@each_foreign
@each_ties
@pytest.mark.parametrize("shape", [(), (4,), (3, 1), (3, 4)], ids=str)
def test_a_foreign_prior_equals_brute_force(name: str, ties: bool, shape: tuple[int, ...]) -> None:
    prior, given = foreign(name, shape)
    # Half of these lie outside a support that has ends.
    x = torch.empty(20, 3, 4, dtype=F64).uniform_(-1, 2).mul(10).round().div(10) + 0.0123
    for mask in (None, mask_of(x.shape, 0)):
        loss = bs.batch_shaping(x, prior, 0, mask=mask, ties=ties, reduction="none")
        expected = torch.as_tensor(brute_force(x, FOREIGN[name][2], tuple(given), 0, mask, ties))
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-10, atol=1e-12)


@each_foreign
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_gradcheck_of_a_foreign_prior(name: str, masked: bool) -> None:
    _, given = foreign(name, (3,))
    x = torch.linspace(0.41, 0.69, 18, dtype=F64)[torch.randperm(18)].reshape(6, 3).requires_grad_()
    mask = mask_of((6, 3), 0) if masked else None
    differentiable = given[:1] if name == "Gamma" else given  # torch has no derivative of gammainc in a
    if name == "Gamma":
        loss = lambda x, rate: bs.batch_shaping(x, td.Gamma(2.0, rate), 0, mask=mask)  # noqa: E731
        differentiable = given[1:]
    else:
        loss = lambda x, *p: bs.batch_shaping(x, FOREIGN[name][0](*p), 0, mask=mask)  # noqa: E731
    assert gradcheck(loss, (x, *differentiable), eps=1e-7, atol=1e-5)


@each_foreign
def test_outside_the_support_of_a_foreign_prior_gradients_are_finite(name: str) -> None:
    prior, given = foreign(name)
    bounds = (getattr(prior.support, name, None) for name in ("lower_bound", "upper_bound"))
    ends = [torch.as_tensor(bound).item() for bound in bounds if bound is not None]
    values = [-50.0, -5.0, 0.5, 5.0, 50.0, *ends, *(e + 1e-3 for e in ends)]
    x = torch.tensor(values, dtype=F64, requires_grad=True)
    loss = bs.batch_shaping(x, prior)
    expected = brute_force(x, FOREIGN[name][2], tuple(given))
    torch.testing.assert_close(loss.detach(), torch.as_tensor(expected), rtol=1e-9, atol=1e-12)
    inputs = (x, *given[1:]) if name == "Gamma" else (x, *given)
    for gradient in torch.autograd.grad(loss, inputs, allow_unused=True):
        assert gradient is None or bool(gradient.isfinite().all())


@each_foreign
def test_a_foreign_prior_is_left_as_it_was(name: str) -> None:
    make, parameters, _ = FOREIGN[name]
    prior = make(*parameters, validate_args=True)
    bs.batch_shaping(torch.full((5,), -7.0), prior)
    with pytest.raises(ValueError, match="support"):
        prior.log_prob(torch.tensor(torch.nan))


@each_ties
@pytest.mark.parametrize("dim", [0, None, (0, 2)], ids=str)
def test_the_normal_of_torch_equals_ours_gradients_included(
    dim: int | tuple[int, ...] | None, ties: bool
) -> None:
    results = []
    values = tied(torch.randn(20, 3, 4, dtype=F64))
    mask = mask_of((20, 3, 4), dim)
    shape = left_by(dim, (20, 3, 4))
    for family in (td.Normal, bs.Normal):
        torch.manual_seed(1)
        given = learned((0.3, 1.2), shape, 0.2)
        x = values.clone().requires_grad_()
        loss = bs.batch_shaping(x, family(*given), dim, mask=mask, ties=ties)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, *given))))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-12)


def test_a_cdf_written_by_hand_is_a_prior() -> None:
    class Triangle(td.Distribution):
        arg_constraints: dict[str, td.constraints.Constraint] = {}
        support = td.constraints.unit_interval

        def cdf(self, value: Tensor) -> Tensor:
            return value.square()

    x = torch.tensor([-1.0, 0.2, 0.7, 0.4, 3.0], dtype=F64)
    expected = brute_force(x, lambda v: np.clip(v, 0, 1) ** 2, ())
    torch.testing.assert_close(bs.batch_shaping(x, Triangle()), torch.as_tensor(expected))


class LogDistance(Statistic):
    """A statistic of one's own that asks more of a prior than its CDF."""

    def terms(self, values: Tensor, positions: Tensor, prior: td.Distribution) -> Tensor:
        return (prior.log_cdf(values) - positions.log()).square() + (prior.cdf(values) - positions).abs()


# What torch.func sees: priors that are not ours, statistics that are the user's.
MAPPED: dict[str, Callable[[Tensor], td.Distribution]] = {
    "Beta": lambda a: bs.Beta(a, 0.7),
    "RelaxedBernoulli": lambda a: bs.RelaxedBernoulli(a, 0.7),
    "Normal": lambda a: bs.Normal(a, 0.7),
    "Laplace": lambda a: td.Laplace(a, 0.7, validate_args=False),
    "Kumaraswamy": lambda a: td.Kumaraswamy(a, 0.7 * torch.ones_like(a), validate_args=False),
    "LogNormal": lambda a: td.LogNormal(a, 0.7 * torch.ones_like(a), validate_args=False),
    "Uniform": lambda a: td.Uniform(a * 0.1, 1 + a, validate_args=False),
}


@pytest.mark.parametrize("statistic", [*(s for s in STATISTICS if s != "epps_pulley"), "one's own"])
@pytest.mark.parametrize("name", MAPPED)
@each_ties
def test_vmap_grad_and_jacrev_equal_loops_for_every_prior_and_statistic(
    name: str, statistic: str, ties: bool
) -> None:
    chosen = LogDistance() if statistic == "one's own" else statistic
    x = torch.rand(4, 12, 3, dtype=F64) * 0.8 + 0.1
    a = torch.rand(4, 3, dtype=F64) * 0.5 + 0.3
    mask = torch.rand(4, 12, 3) > 0.3

    def loss(x: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        return bs.batch_shaping(x, MAPPED[name](a), 0, statistic=chosen, ties=ties, mask=mask)

    y, b = x.clone().requires_grad_(), a.clone().requires_grad_()
    losses = torch.stack([loss(*operands) for operands in zip(y, b, mask, strict=True)])
    expected = torch.autograd.grad(losses.sum(), (y, b))
    torch.testing.assert_close(torch.func.vmap(loss)(x, a, mask), losses.detach())
    gradients = torch.func.grad(loss, argnums=(0, 1))
    torch.testing.assert_close(torch.func.vmap(gradients)(x, a, mask), expected)
    torch.testing.assert_close(gradients(x[1], a[1], mask[1]), tuple(g[1] for g in expected))
    torch.testing.assert_close(torch.func.jacrev(loss, argnums=1)(x[2], a[2], mask[2]), expected[1][2])
    shared = torch.func.vmap(loss, in_dims=(None, 0, None))(x[0], a, mask[0])
    torch.testing.assert_close(shared, torch.stack([loss(x[0], each, mask[0]) for each in a]))


# What bad input gets

PRIORS = [
    bs.Beta(0.6, 0.4),
    bs.Beta(2.0, 6.0),
    bs.Beta(1.0, 1.0),
    bs.SymBeta(0.9),
    bs.RelaxedBernoulli(0.2, 0.25),
    bs.RelaxedBernoulli(0.8, 3.0),
    bs.Normal(0.6, 0.1),
]
WITH_FOREIGN = [*PRIORS, td.Normal(0.6, 0.1), td.Uniform(0.1, 0.8), td.Laplace(0.2, 0.7)]
each_made = pytest.mark.parametrize("prior", PRIORS, ids=repr)
each_made_or_foreign = pytest.mark.parametrize(
    "prior", WITH_FOREIGN, ids=lambda p: repr(p) if p in PRIORS else f"{type(p).__name__} of torch"
)


@each_made_or_foreign
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@each_ties
def test_nan_makes_its_array_nan_and_no_other(prior: td.Distribution, masked: bool, ties: bool) -> None:
    clean = torch.rand(12, 3, dtype=F64)
    dirty = clean.clone()
    dirty[4, 1] = torch.nan
    mask = torch.ones(12, 3, dtype=torch.bool)
    mask[7] = False
    results = []
    for y in (clean, dirty):
        y = y.requires_grad_()
        loss = bs.batch_shaping(y, prior, 0, mask=mask if masked else None, ties=ties, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), y)
        results.append((loss.detach(), gradient))
    assert results[1][0].isnan().tolist() == [False, True, False]
    kept = mask[:, 1] if masked else torch.ones(12, dtype=torch.bool)
    assert bool(results[1][1][kept, 1].isnan().all())
    for clean_result, dirty_result in zip(*results, strict=True):
        torch.testing.assert_close(dirty_result[..., [0, 2]], clean_result[..., [0, 2]])


@each_family
def test_nan_reaches_the_parameters_of_its_array_and_no_others(family: Family) -> None:
    given = learned(family.examples[0], (3,))
    x = torch.rand(12, 3, dtype=F64)
    x[4, 1] = torch.nan
    for gradient in torch.autograd.grad(bs.batch_shaping(x, family.prior(*given), 0), given):
        assert gradient.isnan().tolist() == [False, True, False]


@each_made_or_foreign
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outside_the_support_the_loss_and_gradients_are_finite(
    prior: td.Distribution, dtype: torch.dtype
) -> None:
    x = torch.tensor(
        [-torch.inf, -1e30, -2.0, 0.3, 0.6, 2.0, 1e30, torch.inf], dtype=dtype, requires_grad=True
    )
    loss = bs.batch_shaping(x, prior)
    (gradient,) = torch.autograd.grad(loss, x)
    assert bool(loss.isfinite())
    assert bool(gradient.isfinite().all())
    assert gradient[[0, 1, 6, 7]].abs().tolist() == [0.0] * 4


@each_made
def test_outside_the_support_the_cdf_counts_as_0_or_1(prior: td.Distribution) -> None:
    left, right = torch.full((9,), -1e6, dtype=F64), torch.full((9,), 1e6, dtype=F64)
    position = torch.arange(1, 10, dtype=F64) / 10
    torch.testing.assert_close(bs.batch_shaping(left, prior), position.square().mean())
    torch.testing.assert_close(bs.batch_shaping(right, prior), (1 - position).square().mean())


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@each_ties
def test_at_0_and_1_the_loss_and_gradients_are_finite(family: Family, dtype: torch.dtype, ties: bool) -> None:
    for parameters in family.examples:
        given = [torch.tensor(p, dtype=torch.float32, requires_grad=True) for p in parameters]
        x = torch.tensor([0.0, 1.0, -0.0, 0.5, 1.0, 0.0], dtype=dtype, requires_grad=True)
        loss = bs.batch_shaping(x, family.prior(*given), ties=ties)
        assert bool(loss.isfinite())
        for gradient in torch.autograd.grad(loss, (x, *given)):
            assert bool(gradient.isfinite().all()), parameters


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_values_that_are_not_floating_point_are_refused_by_dtype(dtype: torch.dtype) -> None:
    for call in (lambda x: bs.batch_shaping(x, bs.Beta(0.6, 0.4)), bs.BatchShapingLoss(bs.Beta(0.6, 0.4))):
        with pytest.raises(TypeError, match=f"x must be floating point, received {dtype}"):
            call(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "dim"), [((0,), None), ((0, 3), 0), ((3, 0), -1), ((0, 3), None), ((2, 0, 3), (1, 2))], ids=str
)
def test_no_samples_is_an_error_that_names_dim_and_shape(shape, dim) -> None:
    with pytest.raises(ValueError, match=re.escape(f"no samples along dim={dim} of x with shape {shape}")):
        bs.batch_shaping(torch.empty(shape), bs.Beta(0.6, 0.4), dim)


@pytest.mark.parametrize(
    ("dim", "empty"), [(0, (slice(None), 1)), (1, 2), (None, ...), ((0, 1), ...)], ids=str
)
def test_a_mask_that_leaves_an_array_empty_is_an_error_that_names_dim_and_shape(dim, empty) -> None:
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[empty] = False
    with pytest.raises(ValueError, match=re.escape(f"dim={dim} of x with shape (4, 3)")):
        bs.batch_shaping(torch.rand(4, 3), bs.Beta(0.6, 0.4), dim, mask=mask)


def test_a_mask_that_is_not_boolean_or_does_not_broadcast_is_refused() -> None:
    x, prior = torch.rand(4, 3), bs.Beta(0.6, 0.4)
    with pytest.raises(TypeError, match=r"mask must be boolean, received torch\.float32"):
        bs.batch_shaping(x, prior, mask=torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"mask of shape \(4,\) .* x with shape \(4, 3\)"):
        bs.batch_shaping(x, prior, mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask of shape \(2, 4, 3\) .* x with shape \(4, 3\)"):
        bs.batch_shaping(x, prior, mask=torch.ones(2, 4, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("batch", "dim"), [((2,), 0), ((4,), 0), ((1, 3), 0), ((3,), None), ((2, 1), (0,))], ids=str
)
def test_priors_that_do_not_broadcast_to_the_arrays_are_an_error_with_both_shapes(batch, dim) -> None:
    left = left_by(dim, (4, 3))
    for prior in (bs.Beta(torch.full(batch, 0.6), 0.4), td.Normal(torch.zeros(batch), 1.0)):
        with pytest.raises(
            ValueError, match=f"{re.escape(str(batch))} does not broadcast to {re.escape(str(left))}"
        ):
            bs.batch_shaping(torch.rand(4, 3), prior, dim)


@pytest.mark.parametrize("prior", [None, "beta", 0.6, bs.Beta, td.Gamma])
def test_what_is_no_prior_is_refused_with_the_known_ones(prior: object) -> None:
    for call in (lambda: bs.batch_shaping(torch.rand(3), prior), lambda: bs.BatchShapingLoss(prior)):
        with pytest.raises(ValueError, match=r"Beta, SymBeta, RelaxedBernoulli, Normal or any .* with a cdf"):
            call()


@pytest.mark.parametrize(
    "prior", [td.Poisson(2.0), td.VonMises(0.0, 1.0), td.Dirichlet(torch.ones(3))], ids=repr
)
def test_a_distribution_without_a_cdf_is_refused_by_name(prior: td.Distribution) -> None:
    with pytest.raises(ValueError, match=type(prior).__name__):
        bs.batch_shaping(torch.rand(3), prior)


def test_a_prior_of_many_dimensions_is_refused() -> None:
    prior = td.Independent(td.Normal(torch.zeros(3), 1.0), 1)
    with pytest.raises(ValueError, match="prior must be"):
        bs.batch_shaping(torch.rand(4, 3), prior, 0)


def test_an_unknown_reduction_is_refused_with_the_known_ones() -> None:
    for call in (
        lambda: bs.batch_shaping(torch.rand(3), bs.Beta(0.6, 0.4), reduction="max"),
        lambda: bs.BatchShapingLoss(bs.Beta(0.6, 0.4), reduction="max"),
    ):
        with pytest.raises(ValueError, match="'mean', 'sum', 'none', received 'max'"):
            call()


@pytest.mark.parametrize("dim", [2, -3, (0, 5)], ids=str)
def test_a_dim_that_x_does_not_have_is_an_index_error_as_in_torch(dim) -> None:
    with pytest.raises(IndexError, match=r"\[-2, 1\].*received (2|-3|5)"):
        bs.batch_shaping(torch.rand(4, 3), bs.Beta(0.6, 0.4), dim)


@pytest.mark.parametrize("dim", [(0, 0), (0, -2)], ids=str)
def test_a_dim_given_twice_is_refused(dim) -> None:
    with pytest.raises(ValueError, match="each dimension once"):
        bs.batch_shaping(torch.rand(4, 3), bs.Beta(0.6, 0.4), dim)


def test_a_scalar_is_an_array_of_one_sample() -> None:
    x = torch.tensor(0.3, dtype=F64, requires_grad=True)
    expected = (special.betainc(0.6, 0.4, 0.3) - 0.5) ** 2
    for dim in (None, 0, -1):
        loss = bs.batch_shaping(x, bs.Beta(0.6, 0.4), dim)
        assert loss.shape == ()
        assert loss.item() == pytest.approx(expected)
        assert torch.autograd.grad(loss, x)[0].shape == ()


@pytest.mark.parametrize("statistic", [*STATISTICS, "one's own"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@each_ties
def test_no_arrays_have_what_torch_makes_of_nothing(statistic: str, masked: bool, ties: bool) -> None:
    chosen = LogDistance() if statistic == "one's own" else statistic
    priors = [bs.Normal(0.2, 0.7), bs.Normal(torch.zeros(0), 1.0), td.Normal(0.2, 0.7)]
    if statistic != "epps_pulley":
        priors += [bs.Beta(0.6, 0.4), bs.Beta(torch.ones(0), 1.0), td.Laplace(torch.zeros(0), 1.0)]
    mask = torch.ones(5, 0, dtype=torch.bool) if masked else None
    for prior, logits in itertools.product(priors, (False, True)):
        x = torch.empty(5, 0, requires_grad=True)
        settings = {"statistic": chosen, "mask": mask, "ties": ties, "logits": logits}
        losses = bs.batch_shaping(x, prior, 0, reduction="none", **settings)
        assert losses.shape == (0,)
        losses.sum().backward()
        assert x.grad is not None and x.grad.shape == (5, 0)
        assert bool(bs.batch_shaping(x, prior, 0, **settings).isnan())
        assert bs.batch_shaping(x, prior, 0, reduction="sum", **settings) == 0


@pytest.mark.parametrize(
    ("dim", "same"),
    [
        (np.int64(0), 0),
        ((np.int64(0), 1), (0, 1)),
        (torch.tensor(-1), -1),
        (np.array([0, 1]), (0, 1)),
        ([1], 1),
        ((), None),
    ],
    ids=repr,
)
def test_whole_numbers_of_any_kind_are_dimensions(dim: Any, same: Any) -> None:
    x = torch.rand(6, 4)
    expected = bs.batch_shaping(x, bs.Beta(0.6, 0.4), same, reduction="none")
    assert torch.equal(bs.batch_shaping(x, bs.Beta(0.6, 0.4), dim, reduction="none"), expected)
    assert torch.equal(bs.BatchShapingLoss(bs.Beta(0.6, 0.4), dim, reduction="none")(x), expected)


@pytest.mark.parametrize("dim", [True, 0.0, "0", (True,), (0, 1.0), [None]], ids=repr)
def test_what_is_no_dimension_is_refused_as_by_torch(dim: Any) -> None:
    with pytest.raises(TypeError):
        torch.rand(6, 4).mean(dim=dim)
    message = re.escape(f"dim must be an int, a sequence of ints or None, received {dim!r}")
    with pytest.raises(TypeError, match=message):
        bs.batch_shaping(torch.rand(6, 4), bs.Beta(0.6, 0.4), dim)


@pytest.mark.parametrize("x", ["text", np.ones(3), None, 0.5], ids=["text", "array", "None", "number"])
def test_what_is_no_tensor_is_refused_by_its_type(x: Any) -> None:
    message = f"x must be a tensor, received a {type(x).__name__}"
    for loss in (
        lambda x: bs.batch_shaping(x, bs.Beta(0.6, 0.4)),
        bs.BatchShapingLoss(bs.Beta(0.6, 0.4)),
        bs.GeneralizedBatchShapingLoss(3),
        bs.SlicedBatchShapingLoss(3),
    ):
        with pytest.raises(TypeError, match=message):
            loss(x)
    with pytest.raises(TypeError, match="mask must be a tensor, received a list"):
        bs.batch_shaping(torch.rand(3), bs.Beta(0.6, 0.4), mask=[True])


@pytest.mark.parametrize("value", [None, [], 3, CramerVonMises], ids=repr)
def test_what_is_no_statistic_and_no_reduction_is_refused_in_one_line(value: Any) -> None:
    for make in (bs.batch_shaping, lambda _, prior, **settings: bs.BatchShapingLoss(prior, **settings)):
        with pytest.raises(ValueError, match=re.escape(f"or a Statistic, received {value!r}")):
            make(torch.rand(3), bs.Beta(0.6, 0.4), statistic=value)
        with pytest.raises(ValueError, match=re.escape(f"'none', received {value!r}")):
            make(torch.rand(3), bs.Beta(0.6, 0.4), reduction=value)


# The module


def test_the_module_is_the_functional() -> None:
    x, mask = torch.rand(SHAPE), mask_of(SHAPE, 0)
    prior = bs.RelaxedBernoulli(0.2, 0.25)
    for dim, ties, reduction in itertools.product((None, 0, (0, 2)), (False, True), ("mean", "sum", "none")):
        module = bs.BatchShapingLoss(prior, dim, ties=ties, reduction=reduction)
        for keep in (None, mask):
            expected = bs.batch_shaping(x, prior, dim, mask=keep, ties=ties, reduction=reduction)
            torch.testing.assert_close(module(x, keep), expected)
            torch.testing.assert_close(module(x, mask=keep), expected)


@each_family
def test_the_module_registers_learned_parameters_under_their_names(family: Family) -> None:
    parameters = [nn.Parameter(torch.tensor(p)) for p in family.examples[0]]
    module = bs.BatchShapingLoss(family.prior(*parameters), 0)
    assert dict(module.named_parameters()).keys() == set(family.names)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert not list(bs.BatchShapingLoss(family.prior(*family.examples[0])).parameters())
    first_only = bs.BatchShapingLoss(family.prior(parameters[0], *family.examples[0][1:]))
    assert [name for name, _ in first_only.named_parameters()] == [family.names[0]]


@each_family
def test_training_the_module_fits_the_prior_to_the_data(family: Family) -> None:
    x = inside(family, family.examples[1], (200,))
    module = bs.BatchShapingLoss(family.prior(*(nn.Parameter(torch.tensor(p)) for p in family.examples[0])))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    first = module(x).item()
    for _ in range(10):
        optimizer.zero_grad()
        loss = module(x)
        loss.backward()
        optimizer.step()
    assert loss.item() < first


@each_family
def test_the_state_of_the_module_survives_a_round_trip(family: Family) -> None:
    def module(parameters: tuple[float, ...]) -> bs.BatchShapingLoss:
        return bs.BatchShapingLoss(family.prior(*(nn.Parameter(torch.tensor(p)) for p in parameters)))

    one, other = module(family.examples[0]), module(family.examples[1])
    x = torch.rand(20)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


@each_family
def test_parameters_put_in_place_of_those_of_the_module_are_the_ones_used(family: Family) -> None:
    def module(parameters: tuple[float, ...]) -> bs.BatchShapingLoss:
        return bs.BatchShapingLoss(family.prior(*(nn.Parameter(torch.tensor(p)) for p in parameters)))

    x = torch.rand(20)
    one, other = module(family.examples[0]), module(family.examples[1])
    assert torch.equal(torch.func.functional_call(other, one.state_dict(), (x,)), one(x))
    other.load_state_dict(one.state_dict(), assign=True)
    assert torch.equal(other(x), one(x))


@each_family
def test_a_copy_of_the_module_learns_by_itself(family: Family) -> None:
    parameters = [nn.Parameter(torch.tensor(p)) for p in family.examples[0]]
    module = bs.BatchShapingLoss(family.prior(*parameters))
    x = torch.rand(20)
    before = module(x)
    duplicate = copy.deepcopy(module)
    with torch.no_grad():
        for p, value in zip(duplicate.parameters(), family.examples[1], strict=True):
            p.fill_(value)
    assert torch.equal(module(x), before)
    assert not torch.equal(duplicate(x), before)


@each_family
def test_the_module_changes_dtype_with_its_parameters(family: Family) -> None:
    parameters = [nn.Parameter(torch.tensor(p)) for p in family.examples[0]]
    module = bs.BatchShapingLoss(family.prior(*parameters)).double()
    x = torch.rand(20, dtype=F64)
    module(x).backward()
    assert all(p.dtype == F64 and p.grad is not None for p in module.parameters())


def test_the_module_prints_what_it_was_made_with() -> None:
    module = bs.BatchShapingLoss(bs.Beta(0.6, 0.4), (0, 2), ties=True, reduction="none")
    shown = repr(module)
    assert shown.startswith("BatchShapingLoss(")
    for part in ("Beta(a=0.6, b=0.4)", "dim=(0, 2)", "ties=True", "reduction='none'"):
        assert part in shown


def test_a_foreign_prior_is_learned_in_the_module_too() -> None:
    loc = nn.Parameter(torch.tensor(0.2))
    module = bs.BatchShapingLoss(td.Laplace(loc, 0.7))
    module(torch.rand(10)).backward()
    assert loc.grad is not None


# The generalized loss


def sigmoid(logits: Tensor) -> np.ndarray:
    return special.expit(logits.detach().double().numpy())


@pytest.mark.parametrize(
    ("shape", "x_shape", "dim"),
    [
        (4, (20, 4), 0),
        ((4,), (20, 4), 0),
        ((2, 3), (20, 2, 3), 0),
        ((2, 3), (2, 20, 3), 1),
        (3, (5, 3, 4), (0, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_the_generalized_loss_is_the_sum_of_its_parts_by_hand(shape, x_shape, dim, masked: bool) -> None:
    module = bs.GeneralizedBatchShapingLoss(
        shape, bs.Beta(2.0, 5.0), dim, hyperprior_weight=0.7, temperature_weight=0.3
    ).double()
    x = torch.rand(x_shape, dtype=F64)
    mask = mask_of(x_shape, dim) if masked else None
    total = module(x, mask)
    mean, temperature = sigmoid(module.mean_logits), sigmoid(module.temperature_logits)
    given = (torch.as_tensor(mean), torch.as_tensor(temperature))
    prior_loss = brute_force(x, FAMILIES["RelaxedBernoulli"].cdf, given, dim, mask).mean()
    hyperprior_loss = 0.7 * brute_force(given[0], BETA.cdf, (2.0, 5.0))
    penalty = 0.3 * temperature.mean()
    assert module.prior_loss.item() == pytest.approx(prior_loss)
    assert module.hyperprior_loss.item() == pytest.approx(float(hyperprior_loss))
    assert module.temperature_penalty.item() == pytest.approx(penalty)
    assert total.item() == pytest.approx(prior_loss + float(hyperprior_loss) + penalty)
    assert not any(
        p.requires_grad for p in (module.prior_loss, module.hyperprior_loss, module.temperature_penalty)
    )


def test_the_generalized_loss_starts_near_one_half_with_the_published_hyperprior() -> None:
    module = bs.GeneralizedBatchShapingLoss(1000)
    assert module.hyperprior.concentration1 == 3
    assert module.hyperprior.concentration0 == 7
    assert module.temperature_weight == 0.1
    for values in (module.mean, module.temperature):
        assert values.shape == (1000,)
        assert bool(((values > 0.3) & (values < 0.7)).all())
        assert len(values.unique()) > 900


def test_gradcheck_of_the_generalized_loss() -> None:
    module = bs.GeneralizedBatchShapingLoss(3).double()
    x = inside(FAMILIES["RelaxedBernoulli"], (0.5, 0.5), (6, 3))

    def total(x: Tensor, mean_logits: Tensor, temperature_logits: Tensor) -> Tensor:
        logits = {"mean_logits": mean_logits, "temperature_logits": temperature_logits}
        return torch.func.functional_call(module, logits, (x,))

    logits = [torch.tensor([-0.3, 0.1, 0.4], dtype=F64), torch.tensor([0.2, -0.1, 0.0], dtype=F64)]
    assert gradcheck(total, [t.requires_grad_() for t in (x, *logits)], eps=1e-7, atol=1e-5)


def test_the_parameters_of_the_generalized_loss_are_those_of_a_module() -> None:
    model = nn.Sequential(nn.Linear(2, 2), bs.GeneralizedBatchShapingLoss((2, 3)))
    names = dict(model.named_parameters())
    assert names["1.mean_logits"].shape == (2, 3)
    assert names["1.temperature_logits"].shape == (2, 3)
    fresh = bs.GeneralizedBatchShapingLoss((2, 3))
    fresh.load_state_dict(model[1].state_dict())
    x = torch.rand(10, 2, 3)
    assert torch.equal(fresh(x), model[1](x))
    assert torch.equal(fresh.prior.cdf(x), model[1].prior.cdf(x))


def test_training_reduces_the_generalized_loss() -> None:
    module = bs.GeneralizedBatchShapingLoss(12)
    logits = torch.empty(100, 12).uniform_(-4, 4).requires_grad_()
    optimizer = torch.optim.Adam([logits, *module.parameters()], lr=0.1)
    history = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = module(torch.sigmoid(logits))
        loss.backward()
        optimizer.step()
        history.append([loss.item(), module.hyperprior_loss.item(), module.temperature_penalty.item()])
    assert all(last < 0.8 * first for first, last in zip(history[0], history[-1], strict=True))
    assert module.mean.mean().item() == pytest.approx(0.3, abs=0.05)


def test_logits_far_out_give_a_finite_loss_and_gradient() -> None:
    module = bs.GeneralizedBatchShapingLoss(3)
    with torch.no_grad():
        module.mean_logits.copy_(torch.tensor([-200.0, 0.0, 200.0]))
        module.temperature_logits.copy_(torch.tensor([200.0, -200.0, 0.0]))
    x = torch.rand(10, 3, requires_grad=True)
    loss = module(x)
    loss.backward()
    assert bool(loss.isfinite())
    for t in (x, *module.parameters()):
        assert bool(t.grad.isfinite().all())


@pytest.mark.parametrize(("x_shape", "left"), [((20, 5), "(5,)"), ((20,), "()"), ((20, 4, 2), "(4, 2)")])
def test_another_shape_than_that_of_the_learned_priors_is_refused_with_both(x_shape, left: str) -> None:
    module = bs.GeneralizedBatchShapingLoss(4)
    with pytest.raises(ValueError, match=f"leaves {re.escape(left)}.*learned priors have shape \\(4,\\)"):
        module(torch.rand(x_shape))


def test_the_generalized_loss_refuses_what_is_no_hyperprior() -> None:
    with pytest.raises(ValueError, match="prior must be Beta, SymBeta"):
        bs.GeneralizedBatchShapingLoss(4, "beta")


def test_the_generalized_loss_prints_what_it_was_made_with() -> None:
    shown = repr(bs.GeneralizedBatchShapingLoss((2, 3), bs.Normal(0.3, 0.1), 1))
    for part in ("shape=(2, 3)", "Normal(loc=0.3, scale=0.1)", "dim=1", "hyperprior_weight=1.0"):
        assert part in shown
