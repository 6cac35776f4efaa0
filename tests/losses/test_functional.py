"""The loss against its formula, its gradients against finite differences, and the laws of every statistic.

Each law is swept over every statistic, one of one's own among them, and every family of priors that it takes.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as td
from hypothesis import given
from hypothesis import strategies as st
from oracles import FAMILIES, FOREIGN, Family, arrays_of, scipy
from scipy import special, stats
from sweeps import (
    NORMALS,
    ONES_OWN,
    QUARTIC,
    Plain,
    as_logits,
    each_case,
    each_case_of_all,
    each_case_of_all_and_way,
    each_case_of_all_by_autograd_too,
    each_example,
    each_example_and_way,
    each_example_by_autograd_too,
    each_family,
    each_masked,
    each_statistic,
    each_ties,
    each_way,
    formula,
    has_closed_form,
    inside,
    learned,
    left_by,
    loss_of,
    mask_of,
    smooth,
    tied,
    with_gradients,
)
from torch import Tensor
from torch.autograd import gradcheck

import batchshaping as bs
from batchshaping.statistics import samples

F64 = torch.float64
SHAPE = (5, 4, 6)
DIMS = [None, 0, 1, 2, -1, -2, -3, (0,), (0, 1), (0, 2), (1, 2), (2, 0), (0, -1), (-3, -2), (0, 1, 2)]


# The formula


@each_example
@each_way
def test_the_loss_equals_its_formula(
    statistic: Any, family: Family, parameters: tuple[float, ...], logits: bool
) -> None:
    # Nearer to 1, single precision does not tell values of a U-shaped prior apart.
    x = inside(family, parameters, (30, 4), upper=0.7)
    x = tied(as_logits(x) if logits else x)
    both = [learned(parameters), learned(parameters, (4,), 0.02)]
    ways = [*itertools.product((None, mask_of((30, 4))), (False, True))]
    # Families of torch have no closed form to go wrong with a mask or ties alone.
    for k, (mask, ties) in enumerate(ways if has_closed_form(statistic, family) else ways[::3]):
        # In single precision one prior for all arrays and one for each take turns.
        given = [(x, 1e-9, 1e-12, priors) for priors in both] + [(x.float(), 1e-3, 1e-5, both[k % 2])]
        for y, rtol, atol, priors in given:
            options = {"statistic": statistic, "mask": mask, "ties": ties, "logits": logits}
            loss = bs.batch_shaping(y, family.prior(*priors), 0, reduction="none", **options)
            assert loss.dtype == y.dtype
            expected = formula(statistic, family, y, priors, 0, mask, ties, logits)
            torch.testing.assert_close(loss.detach().double(), expected, rtol=rtol, atol=atol)


@each_case
def test_numbers_as_parameters_are_exact(statistic: Any, family: Family) -> None:
    for parameters in family.examples:
        x = inside(family, parameters, (30,), upper=0.7)
        loss = bs.batch_shaping(x, family.prior(*parameters), statistic=statistic)
        torch.testing.assert_close(loss, formula(statistic, family, x, parameters), rtol=1e-9, atol=1e-12)


@given(
    name=st.sampled_from(sorted(FAMILIES)),
    shape=st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple),
    data=st.data(),
)
def test_any_shape_and_dims_equal_the_formula(name: str, shape: tuple[int, ...], data: st.DataObject) -> None:
    family = FAMILIES[name]
    parameters = data.draw(st.sampled_from(family.examples))
    dims = data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True)) if shape else None
    dim = data.draw(st.sampled_from([None] if dims is None else [None, tuple(dims), dims[0]]))
    values = st.floats(-2, 3) | st.sampled_from([0.0, 1.0, 0.5])
    n = int(np.prod(shape, dtype=int))
    x = torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)), dtype=F64).reshape(shape)
    ties = data.draw(st.booleans())
    loss = bs.batch_shaping(x, family.prior(*parameters), dim, ties=ties, reduction="none")
    expected = formula("cramer_von_mises", family, x, parameters, dim, ties=ties)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 1000, 300_003])
@each_family
def test_few_and_many_samples_equal_the_formula_and_so_does_their_gradient(family: Family, n: int) -> None:
    parameters = family.examples[1]
    x = inside(family, parameters, (n,), upper=0.7)
    prior = family.prior(*parameters)
    loss, (gradient,) = with_gradients(lambda x: bs.batch_shaping(x, prior), x)
    expected = formula("cramer_von_mises", family, x, parameters)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-14)
    rank = stats.rankdata(x.numpy(), method="ordinal")
    density = family.prior(*learned(parameters)).log_prob(x).exp().detach()
    residual = scipy(family.cdf, x, *parameters) - torch.as_tensor(rank / (n + 1))
    torch.testing.assert_close(gradient, 2 / n * residual * density, rtol=1e-9, atol=1e-12)


@each_case
@each_way
def test_tiles_change_nothing(
    statistic: Any, family: Family, logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = tied(inside(family, family.examples[0], (50, 3)))
    x = as_logits(x) if logits else x
    given = learned(family.examples[0], (3,), 0.1)
    for mask, ties in itertools.product((None, mask_of(x.shape)), (False, True)):
        loss = loss_of(statistic, family, mask=mask, ties=ties, logits=logits, reduction="none")
        monkeypatch.undo()
        expected = with_gradients(loss, x, *given)
        monkeypatch.setattr(samples, "_TILE", 24)
        torch.testing.assert_close(with_gradients(loss, x, *given), expected, rtol=1e-10, atol=1e-14)


@each_family
def test_many_arrays_with_a_prior_each_equal_one_formula(family: Family) -> None:
    given = [p.detach() for p in learned(family.examples[0], (20_000,), 0.3)]
    x = inside(family, family.examples[0], (3, 20_000))
    loss = bs.batch_shaping(x, family.prior(*given), 0, reduction="none")
    position = torch.tensor([[0.25], [0.5], [0.75]], dtype=F64)
    expected = (scipy(family.cdf, x.sort(dim=0).values, *given) - position).square().mean(dim=0)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-13)


@each_case
def test_a_call_in_inference_mode_leaves_training_as_it_was(statistic: Any, family: Family) -> None:
    # Parameters that no other test has, so that nothing is prepared for them yet.
    prior = family.prior(*(p * 1.0371 for p in family.examples[0]))
    x = inside(family, family.examples[0], (20,))
    with torch.inference_mode():
        value = bs.batch_shaping(x, prior, statistic=statistic).item()
    loss, (gradient,) = with_gradients(lambda x: bs.batch_shaping(x, prior, statistic=statistic), x)
    assert loss.item() == value
    assert bool(gradient.isfinite().all())


def test_with_ties_the_empirical_cdf_is_the_exact_one() -> None:
    x = torch.tensor([0.3, 0.1, 0.3, 0.8, 0.3, 0.1], dtype=F64)
    ecdf = stats.ecdf(x.numpy()).cdf.evaluate(x.numpy())
    position = torch.as_tensor(ecdf) * 6 / 7
    expected = (scipy(special.betainc, 0.6, 0.4, x) - position).square().mean()
    torch.testing.assert_close(bs.batch_shaping(x, bs.Beta(0.6, 0.4), ties=True), expected)


def test_the_loss_is_at_most_1() -> None:
    for value in (-5.0, 0.0, 1.0, 5.0):
        assert 0 < bs.batch_shaping(torch.full((99,), value), bs.Beta(2.0, 6.0)) <= 1


@each_case_of_all
def test_the_loss_is_least_at_the_quantiles(statistic: Any, family: Family) -> None:
    prior = family.prior(*learned(family.examples[0]))
    x = torch.as_tensor(family.icdf(np.arange(1, 200) / 200, *family.examples[0]))
    best = bs.batch_shaping(x, prior, statistic=statistic).item()
    # The characteristic function of 199 quantiles is not quite that of the Normal.
    assert -1e-12 < best < (1e-4 if statistic == "epps_pulley" else 1e-12)
    for moved in (x + 0.05 * (x.max() - x), 0.9 * x + 0.1 * x.mean(), x[:150]):
        loss = bs.batch_shaping(moved, prior, statistic=statistic).item()
        assert loss > best + (1e-8 if statistic is QUARTIC else 1e-5)


# Dimensions, reductions, masks


@each_case_of_all
def test_arrays_along_any_dims_are_the_rows_of_a_matrix(statistic: Any, family: Family) -> None:
    x = inside(family, family.examples[0], SHAPE)
    given = learned(family.examples[0])
    # How the arrays are cut out does not depend on families of torch, which have no closed form.
    for k, dim in enumerate(DIMS if family in FAMILIES.values() else DIMS[::4]):
        mask, left = mask_of(SHAPE, dim), left_by(dim, SHAPE)
        rows, kept = (arrays_of(t, dim)[0] for t in (x, mask))
        expected, gradients = with_gradients(
            loss_of(statistic, family, 1, mask=kept, reduction="none"), rows, *given
        )
        found, by_found = with_gradients(
            loss_of(statistic, family, dim, mask=mask, reduction="none"), x, *given
        )
        assert found.shape == left
        torch.testing.assert_close(found, expected.reshape(left), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(arrays_of(by_found[0], dim)[0], gradients[0], rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(by_found[1:], gradients[1:], rtol=1e-9, atol=1e-12)
        reduction, reduce = [("mean", torch.mean), ("sum", torch.sum)][k % 2]
        reduced = loss_of(statistic, family, dim, mask=mask, reduction=reduction)(x, *given)
        assert reduced.shape == ()
        torch.testing.assert_close(reduced.detach(), reduce(found))


@pytest.mark.parametrize(
    ("dim", "first", "second"),
    [
        (0, (6,), ()),
        (0, (4, 6), (4, 6)),
        (0, (4, 1), (6,)),
        (1, (5, 6), (1, 6)),
        (1, (5, 1), (6,)),
        ((0, 2), (4,), (4,)),
        ((0, 2), (), (4,)),
        ((0, 1), (6,), (1,)),
        (-1, (5, 4), (5, 1)),
        (None, (), ()),
    ],
    ids=str,
)
@each_case
def test_parameters_broadcast_to_the_arrays(
    statistic: Any,
    family: Family,
    dim: int | tuple[int, ...] | None,
    first: tuple[int, ...],
    second: tuple[int, ...],
) -> None:
    example, left = family.examples[0], left_by(dim, SHAPE)
    given = [learned((p,), shape, 0.2)[0] for p, shape in zip(example, (first, second), strict=False)]
    x = inside(family, example, SHAPE)
    for mask, ties in ((None, False), (mask_of(SHAPE, dim), True)):
        loss = loss_of(statistic, family, dim, mask=mask, ties=ties, reduction="none")
        found, (by_x, *by_given) = with_gradients(loss, x, *given)
        full = [p.detach().expand(left) for p in given]
        expected, (by_expected, *by_full) = with_gradients(loss, x, *full)
        torch.testing.assert_close((found, by_x), (expected, by_expected), rtol=1e-10, atol=1e-14)
        summed = [g.sum_to_size(p.shape) for g, p in zip(by_full, given, strict=True)]
        torch.testing.assert_close(by_given, summed, rtol=1e-9, atol=1e-12)
        by_formula = formula(statistic, family, x, full, dim, mask, ties)
        torch.testing.assert_close(found, by_formula, rtol=1e-9, atol=1e-12)


@each_case_of_all_and_way
def test_a_mask_equals_leaving_values_out_whatever_they_are(
    statistic: Any, family: Family, logits: bool, ties: bool
) -> None:
    given = learned(family.examples[0])
    x = inside(family, family.examples[0], (12, 4))
    x = tied(as_logits(x) if logits else x)
    mask = mask_of((12, 4))
    settings = {"ties": ties, "logits": logits}

    def left_out(x: Tensor, *given: Tensor) -> Tensor:
        loss = loss_of(statistic, family, **settings)
        rows = zip(x.T, mask.T, strict=True)
        return torch.stack([loss(row[keep], *given) for row, keep in rows]).mean()

    expected, by_rows = with_gradients(left_out, x, *given)
    # All of these are among the values that are left out.
    others = torch.tensor([0.5, torch.nan, torch.inf, -torch.inf, 1e30], dtype=F64)
    y = x.masked_scatter(~mask, others.repeat(10))
    loss, by_mask = with_gradients(loss_of(statistic, family, mask=mask, **settings), y, *given)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(by_mask, by_rows, rtol=1e-9, atol=1e-12)
    assert not by_mask[0][~mask].any()


@pytest.mark.parametrize("shape", [(5, 4, 6), (4, 6), (6,), (5, 1, 1), (1, 4, 1), ()], ids=str)
@each_case
def test_a_mask_broadcasts_to_x(statistic: Any, family: Family, shape: tuple[int, ...]) -> None:
    x = inside(family, family.examples[0], SHAPE)
    mask = torch.rand(shape) < 0.7
    mask.view(-1)[0] = True
    prior = family.prior(*family.examples[0])
    loss = bs.batch_shaping(x, prior, statistic=statistic, mask=mask)
    torch.testing.assert_close(loss, bs.batch_shaping(x, prior, statistic=statistic, mask=mask.expand(SHAPE)))
    if not shape:
        torch.testing.assert_close(loss, bs.batch_shaping(x, prior, statistic=statistic))


def test_infinite_samples_are_told_from_masked_ones() -> None:
    x = torch.tensor([0.2, torch.inf, 0.5, 0.9, torch.inf, -torch.inf], dtype=F64)
    mask = torch.tensor([True, True, True, False, True, True])
    for ties in (False, True):
        expected = formula("cramer_von_mises", FAMILIES["Normal"], x, (0.6, 0.1), None, mask, ties)
        torch.testing.assert_close(bs.batch_shaping(x, bs.Normal(0.6, 0.1), mask=mask, ties=ties), expected)


# Gradients


@each_example_and_way
def test_gradcheck_in_x_and_every_parameter(
    statistic: Any, family: Family, parameters: tuple[float, ...], logits: bool, masked: bool
) -> None:
    x = inside(family, parameters, (4, 2), upper=0.7)
    start, back = (as_logits(x), lambda z: z) if logits else smooth(x)
    mask = mask_of((4, 2)) if masked else None
    loss = loss_of(statistic, family, mask=mask, ties=masked, logits=logits, reduction="none")
    # Sums of squares of up to 20^2 (Normal(-3, 20)) carry the rounding of their size.
    assert gradcheck(
        lambda z, *given: loss(back(z), *given),
        (start.requires_grad_(), *learned(parameters, (2,), 0.1)),
        atol=1e-5,
        rtol=1e-4,
        fast_mode=True,  # along a random direction, in a tenth of the time
    )


@each_ties
@each_case_of_all
def test_gradcheck_when_tied_values_move_together(statistic: Any, family: Family, ties: bool) -> None:
    parameters = family.examples[0]
    start, back = smooth(inside(family, parameters, (4,), upper=0.7))
    which = torch.tensor([0, 1, 1, 2, 3, 3, 3, 0])
    loss = loss_of(statistic, family, ties=ties)
    assert gradcheck(
        lambda z, *given: loss(back(z)[which], *given),
        (start.requires_grad_(), *learned(parameters)),
        atol=1e-5,
        fast_mode=True,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_case
def test_gradients_of_each_reduction_are_those_of_its_arrays(
    statistic: Any, family: Family, reduction: str
) -> None:
    x = inside(family, family.examples[0], (4, 3))
    prior = family.prior(*family.examples[0])
    weights = torch.tensor([0.5, 2.0, -1.0], dtype=F64) if reduction == "none" else torch.ones(3, dtype=F64)
    _, (found,) = with_gradients(
        lambda x: weights * bs.batch_shaping(x, prior, 0, statistic=statistic, reduction=reduction), x
    )
    each = [
        with_gradients(lambda x: bs.batch_shaping(x, prior, statistic=statistic), column)[1][0]
        for column in x.T
    ]
    # Three weights of the same mean are that of the sum of the gradients.
    torch.testing.assert_close(found, torch.stack(each, dim=1) * (weights if reduction != "sum" else 3.0))


@each_ties
@each_way
@each_case
def test_the_closed_form_equals_autograd(statistic: Any, family: Family, logits: bool, ties: bool) -> None:
    parameters = family.examples[0]
    x = inside(family, parameters, (20, 3, 4))
    x = tied(as_logits(x) if logits else x)
    mask = mask_of((20, 3, 4))
    # The Normal of torch has no closed form either.
    others = [family, *(FOREIGN[name] for name in ["Normal of torch"] if family in NORMALS)]
    for shapes, keep in itertools.product((((), ()), ((4,), (3, 1)), ((3, 4), (3, 4))), (None, mask)):
        given = [learned((p,), shape, 0.1)[0] for p, shape in zip(parameters, shapes, strict=False)]
        settings = {"mask": keep, "ties": ties, "logits": logits}
        closed = with_gradients(loss_of(statistic, family, **settings), x, *given)
        for other in others:
            plain = with_gradients(loss_of(Plain(statistic), other, **settings), x, *given)
            torch.testing.assert_close(closed, plain, rtol=1e-8, atol=1e-12)


@each_case_of_all
def test_only_what_requires_grad_gets_one(statistic: Any, family: Family) -> None:
    x = inside(family, family.examples[0], (10,))
    loss = loss_of(statistic, family)
    for k in range(len(family.examples[0])):
        given = learned(family.examples[0])
        for j, p in enumerate(given):
            p.requires_grad_(j == k)
        loss(x, *given).backward()
        assert [p.grad is not None for p in given] == [j == k for j in range(len(given))]
    assert not loss(x, *(p.detach() for p in given)).requires_grad
    with torch.no_grad():
        assert not loss(x.requires_grad_(), *learned(family.examples[0])).requires_grad


@each_case_of_all
def test_a_descent_step_lowers_the_loss(statistic: Any, family: Family) -> None:
    given = [p.detach() for p in learned(family.examples[0])]
    x = inside(family, family.examples[0], (100, 3)) * 0.9 + 0.05
    loss = loss_of(statistic, family)
    before, (gradient, *_) = with_gradients(loss, x, *given)
    assert loss(x - 1e-4 * gradient, *given) < before


@pytest.mark.parametrize("shape", [(64, 32), (32, 64)], ids=str)
@each_masked
@each_case
def test_one_tensor_of_the_size_of_x_is_saved(
    statistic: Any, family: Family, masked: bool, shape: tuple[int, int]
) -> None:
    if statistic is ONES_OWN:
        return  # autograd keeps what it needs
    given = [torch.full((32,), p, requires_grad=True) for p in family.examples[0]]
    x = inside(family, family.examples[0], shape).float().requires_grad_()
    dim = shape.index(64)
    mask = mask_of(shape, dim) if masked else None
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = loss_of(statistic, family, dim, mask=mask)(x, *given)
    # The mask itself may be kept too.
    sizes = [t.numel() for t in saved if t.is_floating_point() or not masked]
    assert [n for n in sizes if n > 32 * 4] == [64 * 32]
    assert sum(sizes) <= 64 * 32 + 10 * 32
    loss.backward()


@each_case
def test_a_second_backward_is_an_error_and_no_wrong_number(statistic: Any, family: Family) -> None:
    if statistic is ONES_OWN:
        return  # what autograd differentiates once, it does twice
    x = inside(family, family.examples[0], (10,))
    given = learned(family.examples[0])
    leaf = x.clone().requires_grad_()
    first = torch.autograd.grad(loss_of(statistic, family)(leaf, *given), (leaf, *given), create_graph=True)
    for gradient in first:
        with pytest.raises(RuntimeError, match=r"differentia|does not require grad"):
            torch.autograd.grad(gradient.sum(), leaf, retain_graph=True)
    once = torch.func.grad(
        lambda y: bs.batch_shaping(y, family.prior(*family.examples[0]), statistic=statistic)
    )
    with pytest.raises(RuntimeError, match=r"differentia|does not require grad"):
        torch.func.grad(lambda y: once(y).sum())(x)


# Invariance


@each_ties
@each_way
@each_case
def test_the_order_of_samples_does_not_matter(
    statistic: Any, family: Family, logits: bool, ties: bool
) -> None:
    prior = family.prior(*family.examples[0])

    def loss(x: Tensor) -> Tensor:
        return bs.batch_shaping(x, prior, 0, statistic=statistic, ties=ties, logits=logits)

    x = torch.rand(30, 20, dtype=F64) * 0.9 + 0.05
    x = x.mul(8).round().clamp(1, 7).div(8) if ties else x
    x = torch.logit(x) if logits else x
    value, (gradient,) = with_gradients(loss, x)
    for _ in range(2):
        order = torch.randperm(30)
        other, (of_other,) = with_gradients(loss, x[order])
        torch.testing.assert_close(other, value)
        torch.testing.assert_close(of_other, gradient[order])


@each_way
@each_case_of_all
def test_tied_values_get_the_same_gradient_where_ties_are_shared(
    statistic: Any, family: Family, logits: bool
) -> None:
    x = torch.tensor([0.35, 0.7, 0.35, 0.35, 0.5, 0.7], dtype=F64)
    x = torch.logit(x) if logits else x
    given = learned(family.examples[0])
    _, (g, *_) = with_gradients(loss_of(statistic, family, ties=True, logits=logits), x, *given)
    assert g[0] == g[2] == g[3]
    assert g[1] == g[5]


@each_case
def test_strides_do_not_matter(statistic: Any, family: Family) -> None:
    dense = torch.rand(6, 8, dtype=F64) * 0.9 + 0.05
    given = learned(family.examples[0])
    loss = loss_of(statistic, family)
    for view in (dense.T, dense[::2, 1::3], dense.flip(0), dense[:, :1].expand(6, 5), dense[0].expand(4, 8)):
        leaf = view.detach().requires_grad_()
        value = loss(leaf, *given)
        expected, (gradient, *_) = with_gradients(loss, view.contiguous(), *given)
        torch.testing.assert_close(value.detach(), expected)
        torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], gradient)


@each_way
@each_case_of_all
def test_x_and_the_parameters_are_left_as_they_were(statistic: Any, family: Family, logits: bool) -> None:
    x = torch.rand(20, 3, dtype=F64)
    given = learned(family.examples[0], (3,))
    before = [t.detach().clone() for t in (x, *given)]
    loss_of(statistic, family, logits=logits)(x.requires_grad_(), *given).backward()
    assert all(torch.equal(t.detach(), old) for t, old in zip((x, *given), before, strict=True))


# Precision


@each_way
@each_case_of_all
def test_single_precision_follows_double(statistic: Any, family: Family, logits: bool) -> None:
    x = inside(family, family.examples[0], (200, 3), upper=0.8).float()
    x = as_logits(x) if logits else x
    results = []
    for dtype in (F64, torch.float32):
        given = [torch.full((3,), p).to(dtype) for p in family.examples[0]]
        loss, gradients = with_gradients(loss_of(statistic, family, logits=logits), x.to(dtype), *given)
        assert all(t.dtype == dtype for t in (loss, *gradients))
        results.append([t.double() for t in (loss, *gradients)])
    for double, single in zip(*results, strict=True):
        torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-5 * float(double.abs().max()) + 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_case_of_all
def test_half_precision_is_computed_in_single(statistic: Any, family: Family, dtype: torch.dtype) -> None:
    x = inside(family, family.examples[0], (50, 2)).to(dtype)
    given = [torch.tensor(p) for p in family.examples[0]]
    loss = loss_of(statistic, family, ties=True)
    # Scaled up, so that the gradient of a mean does not underflow in half precision.
    half, (by_half, *found) = with_gradients(lambda *t: loss(*t).float() * 64, x, *given)
    single, (by_single, *expected) = with_gradients(lambda *t: loss(*t) * 64, x.float(), *given)
    assert loss(x, *given).dtype == by_half.dtype == dtype
    torch.testing.assert_close(half / 64, (single / 64).to(dtype).float())
    torch.testing.assert_close(by_half, by_single.to(dtype))
    torch.testing.assert_close(found, expected, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("x_dtype", [torch.float32, F64, torch.bfloat16, torch.float16], ids=str)
@each_case
def test_the_loss_has_the_dtype_of_x_and_gradients_that_of_their_operand(
    statistic: Any, family: Family, x_dtype: torch.dtype
) -> None:
    x = inside(family, family.examples[0], (10, 3), upper=0.7).to(x_dtype)
    half = x_dtype in (torch.bfloat16, torch.float16)
    rtol, atol = (2e-2, 1e-3) if half else (1e-3, 1e-5)
    for dtype, shape in itertools.product((torch.float32, F64, torch.bfloat16, torch.float16), ((), (3,))):
        parameters = [torch.full(shape, p, dtype=dtype) for p in family.examples[0]]
        loss, gradients = with_gradients(loss_of(statistic, family), x, *parameters)
        assert loss.dtype == x_dtype
        assert [g.dtype for g in gradients] == [t.dtype for t in (x, *parameters)]
        exact = [p.double() for p in parameters]
        expected = formula(statistic, family, x, exact, 0).mean()
        torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=atol)


# What is not a number, infinite or outside of the support


@each_way
@each_case_of_all_by_autograd_too
def test_nan_makes_its_array_nan_and_no_other(statistic: Any, family: Family, logits: bool) -> None:
    x = inside(family, family.examples[0], (6, 3))
    clean = as_logits(x) if logits else x
    dirty = clean.clone()
    dirty[2, 1] = torch.nan
    mask = torch.ones(6, 3, dtype=torch.bool)
    mask[4] = False
    given = learned(family.examples[0], (3,))
    for keep, ties in itertools.product((None, mask), (False, True)):
        loss = loss_of(statistic, family, mask=keep, ties=ties, logits=logits, reduction="none")
        value, (by_x, *by_parameter) = with_gradients(loss, dirty, *given)
        expected, by_clean = with_gradients(loss, clean, *given)
        for found in (value, *by_parameter):
            assert found.isnan().tolist() == [False, True, False]
        assert bool(by_x[slice(None) if keep is None else mask[:, 1], 1].isnan().all())
        for found, other in zip((value, by_x, *by_parameter), (expected, *by_clean), strict=True):
            torch.testing.assert_close(found[..., [0, 2]], other[..., [0, 2]])


@each_example_by_autograd_too
def test_at_the_ends_of_the_support_and_outside_all_is_finite(
    statistic: Any, family: Family, parameters: tuple[float, ...]
) -> None:
    edges = [-3.0, -1e-9, 0.0, -0.0, 0.0, 1e-30, 0.2, 0.5, 1 - 1e-7, 1.0, 1.0, 1.0 + 1e-6, 4.0, *parameters]
    for dtype, ties in itertools.product((torch.float32, F64, torch.bfloat16), (False, True)):
        finfo = torch.finfo(dtype)
        # Autograd divides by such values, and overflows.
        closed = has_closed_form(statistic, family)
        tiny = [finfo.smallest_normal * by for by in (1, 1 / 8, finfo.eps)] if closed else []
        x = torch.tensor([*edges, *tiny], dtype=dtype)
        given = [torch.tensor(p, dtype=F64 if dtype == F64 else torch.float32) for p in parameters]
        loss = loss_of(statistic, family, ties=ties)
        value, gradients = with_gradients(loss, x, *given)
        assert all(bool(t.isfinite().all()) for t in (value, *gradients)), (dtype, ties)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@each_family
def test_far_outside_the_support_the_cdf_counts_as_0_or_1(family: Family, dtype: torch.dtype) -> None:
    for parameters in family.examples:
        prior = family.prior(*parameters)
        position = torch.arange(1, 10, dtype=dtype) / 10
        for value in (1e6, 1e30, torch.inf):
            for x, expected in ((-value, position), (value, 1 - position)):
                loss, (gradient,) = with_gradients(
                    lambda x, prior=prior: bs.batch_shaping(x, prior), torch.full((9,), x, dtype=dtype)
                )
                torch.testing.assert_close(loss, expected.square().mean())
                assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@each_example
def test_logits_of_any_size_are_finite(
    statistic: Any, family: Family, parameters: tuple[float, ...], dtype: torch.dtype
) -> None:
    x = torch.tensor([-1e5, -800.0, -90.0, -1.0, 0.0, 1.0, 90.0, 800.0, 1e5], dtype=dtype)
    given = [torch.tensor(p, dtype=dtype) for p in parameters]
    loss, gradients = with_gradients(loss_of(statistic, family, logits=True), x, *given)
    assert all(bool(t.isfinite().all()) for t in (loss, *gradients))


@each_case_of_all
def test_infinite_logits_are_samples_of_value_0_and_1_with_a_mask_and_without(
    statistic: Any, family: Family
) -> None:
    rows = [[-torch.inf, -1.0, 0.2, torch.inf, 2.0], [0.1, torch.inf, torch.inf, -3.0, 1.0]]
    z = torch.tensor(rows, dtype=F64)
    given = learned(family.examples[0])
    settings = {"dim": 1, "logits": True, "reduction": "none"}
    plain = loss_of(statistic, family, **settings)(z, *given)
    assert bool(plain.isfinite().all())
    for padding in (0, 1):
        padded = torch.cat([z, torch.full((2, padding), torch.nan, dtype=F64)], dim=1)
        masked = loss_of(statistic, family, mask=~padded.isnan(), **settings)(padded, *given)
        torch.testing.assert_close(masked, plain)
    with np.errstate(divide="ignore"):
        expected = formula(statistic, family, z, given, 1, logits=True)
    # A logarithm of 0 is bounded, but large.
    within = expected.isfinite()
    torch.testing.assert_close(plain.detach()[within], expected[within], rtol=1e-4, atol=1e-4)
    assert bool((plain[~within] > 30).all())


@each_ties
@each_example
def test_logits_give_the_loss_of_their_sigmoid(
    statistic: Any, family: Family, parameters: tuple[float, ...], ties: bool
) -> None:
    z = tied(torch.empty(40, 3, dtype=F64).uniform_(-5, 5))
    given = learned(parameters)
    settings = {"mask": mask_of((40, 3)), "ties": ties}
    by_logits = with_gradients(loss_of(statistic, family, logits=True, **settings), z, *given)
    loss = loss_of(statistic, family, **settings)
    by_values = with_gradients(lambda z, *given: loss(torch.sigmoid(z), *given), z, *given)
    torch.testing.assert_close(by_logits, by_values, rtol=1e-8, atol=1e-12)


@each_ties
@each_masked
@each_statistic
def test_no_arrays_have_what_torch_makes_of_nothing(statistic: Any, masked: bool, ties: bool) -> None:
    priors = [bs.Normal(0.2, 0.7), bs.Normal(torch.zeros(0), 1.0), td.Normal(0.2, 0.7)]
    if statistic != "epps_pulley":
        priors += [bs.Beta(0.6, 0.4), bs.Beta(torch.ones(0), 1.0), td.Laplace(torch.zeros(0), 1.0)]
    mask = torch.ones(5, 0, dtype=torch.bool) if masked else None
    for prior, logits in itertools.product(priors, (False, True)):
        x = torch.empty(5, 0, requires_grad=True)
        settings = {"statistic": statistic, "mask": mask, "ties": ties, "logits": logits}
        losses = bs.batch_shaping(x, prior, 0, reduction="none", **settings)
        assert losses.shape == (0,)
        losses.sum().backward()
        assert x.grad is not None and x.grad.shape == (5, 0)
        assert bool(bs.batch_shaping(x, prior, 0, **settings).isnan())
        assert bs.batch_shaping(x, prior, 0, reduction="sum", **settings) == 0


# Priors of others


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_prior_is_left_as_it_was(name: str) -> None:
    family = FOREIGN[name]
    prior = family.prior(*family.examples[0], validate_args=True)
    bs.batch_shaping(torch.full((5,), -7.0), prior)
    with pytest.raises(ValueError, match="support"):
        prior.log_prob(torch.tensor(torch.nan))


def test_a_cdf_written_by_hand_is_a_prior() -> None:
    class Triangle(td.Distribution):
        arg_constraints: dict[str, td.constraints.Constraint] = {}
        support = td.constraints.unit_interval

        def cdf(self, value: Tensor) -> Tensor:
            return value.square()

    family = Family(Triangle, (), lambda v: np.clip(v, 0, 1) ** 2, np.sqrt, None, ((),))
    x = torch.tensor([-1.0, 0.2, 0.7, 0.4, 3.0], dtype=F64)
    expected = formula("cramer_von_mises", family, x, ())
    torch.testing.assert_close(bs.batch_shaping(x, Triangle()), expected)
