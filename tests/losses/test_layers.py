"""One call for the tensors of a list equals a call for each: values, gradients, refusals."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributions as td
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import batchshaping as bs
from batchshaping.losses import closed_form
from batchshaping.statistics import STATISTICS
from batchshaping.statistics.statistic import Statistic

F64 = torch.float64
SHAPES = ((4,), (2, 3), (1,), (), (5,))


class Distance(Statistic):
    """One's own, by autograd."""

    def terms(self, values: Tensor, positions: Tensor, prior: td.Distribution) -> Tensor:
        return (prior.cdf(values) - positions).abs()


def learned(shape: tuple[int, ...], low: float = 0.3) -> Tensor:
    return (low + 0.4 * torch.rand(shape, dtype=F64)).requires_grad_()


# Each makes a prior for arrays of a shape; numbers of a family are the same at each use.
PRIORS: dict[str, Callable[[tuple[int, ...]], td.Distribution]] = {
    "Beta": lambda _: bs.Beta(0.6, 0.4),
    "another Beta": lambda _: bs.Beta(2.0, 5.0),
    "learned Beta": lambda _: bs.Beta(learned(()), 0.4),
    "a Beta an array": lambda shape: bs.Beta(learned(shape), learned(shape)),
    "a half fixed Beta an array": lambda shape: bs.Beta(learned(shape), 0.7),
    "SymBeta": lambda _: bs.SymBeta(0.3),
    "a SymBeta an array": lambda shape: bs.SymBeta(learned(shape)),
    "RelaxedBernoulli": lambda _: bs.RelaxedBernoulli(0.3, 0.5),
    "a RelaxedBernoulli an array": lambda shape: bs.RelaxedBernoulli(learned(shape), learned(shape)),
    "Normal": lambda _: bs.Normal(0.5, 0.2),
    "a Normal an array": lambda shape: bs.Normal(learned(shape), learned(shape)),
    "Laplace": lambda _: td.Laplace(torch.tensor(0.5, dtype=F64), torch.tensor(0.2, dtype=F64)),
    "a Laplace an array": lambda shape: td.Laplace(learned(shape), learned(shape)),
}
ALL_STATISTICS = {**STATISTICS, "one's own": Distance()}


def leaves_of(*priors: td.Distribution) -> list[Tensor]:
    """The learned tensors of priors, each once."""
    held = [value for prior in priors for value in vars(prior).values()]
    given = [tensor for prior in priors for tensor in getattr(prior, "given", {}).values()]
    found = [t for t in (*held, *given) if isinstance(t, Tensor) and t.requires_grad and t.is_leaf]
    return list({id(t): t for t in found}.values())


def values(samples: int, shapes: Sequence[tuple[int, ...]], ties: bool = False) -> list[Tensor]:
    made = [torch.rand(samples, *shape, dtype=F64) * 0.96 + 0.02 for shape in shapes]
    return [
        ((x * 8).round() / 8).clamp(0.02, 0.98).requires_grad_() if ties else x.requires_grad_() for x in made
    ]


def masks_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    masks = [torch.rand(tensor.shape) < 0.6 for tensor in tensors]
    for mask in masks:
        mask[0] = True
    return masks


def assert_equals_own_calls(
    tensors: Sequence[Tensor], priors: Any, masks: Any = None, tolerance: float = 1e-10, **options: Any
) -> None:
    """The list has the losses of each tensor and their sum, and the gradients are those of the sum."""
    each = priors if isinstance(priors, list) else [priors] * len(tensors)
    each_mask = masks if isinstance(masks, list) else [masks] * len(tensors)
    leaves = [*tensors, *leaves_of(*each)]
    alone = [
        bs.batch_shaping(x, prior, 0, mask=mask, reduction="none", **options)
        for x, prior, mask in zip(tensors, each, each_mask, strict=True)
    ]
    for reduction, reduce in (("none", torch.sum), ("mean", torch.mean), ("sum", torch.sum)):
        together = bs.batch_shaping(tensors, priors, 0, mask=masks, reduction=reduction, **options)
        if reduction == "none":
            assert isinstance(together, list)
            torch.testing.assert_close(together, alone, rtol=tolerance, atol=1e-13)
            together = sum(t.sum() for t in together)
        expected = sum(reduce(t) for t in alone)
        torch.testing.assert_close(together, expected, rtol=tolerance, atol=1e-13)
        found, wanted = (
            torch.autograd.grad(t, leaves, allow_unused=True, retain_graph=True) for t in (together, expected)
        )
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=1e-12)


def can_be(statistic: str, prior: str) -> bool:
    """Whether a statistic has this prior."""
    return statistic != "epps_pulley" or "Normal" in prior


CASES = [(s, p) for s in ALL_STATISTICS for p in PRIORS if can_be(s, p)]


@given(
    st.sampled_from(CASES),
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, "one", "each", "some"]),
)
def test_a_list_equals_a_call_for_each(
    case: tuple[str, str],
    shapes: list[tuple[int, ...]],
    samples: int,
    ties: bool,
    logits: bool,
    mask: str | None,
) -> None:
    statistic, prior = case
    tensors = values(samples, shapes, ties)
    if logits:
        tensors = [x.detach().logit().requires_grad_() for x in tensors]
    masks: Any = None if mask is None else masks_of(tensors)
    if mask == "one":
        masks = torch.ones((), dtype=torch.bool)
    elif mask == "some":
        masks[0] = None
    priors = [PRIORS[prior](shape) for shape in shapes]
    options = {"statistic": ALL_STATISTICS[statistic], "ties": ties, "logits": logits}
    assert_equals_own_calls(tensors, priors, masks, **options)
    assert_equals_own_calls(tensors, PRIORS[prior](()), masks, **options)


@given(st.data(), st.sampled_from([s for s in ALL_STATISTICS if s != "epps_pulley"]))
def test_priors_of_any_families_side_by_side_equal_a_call_for_each(
    data: st.DataObject, statistic: str
) -> None:
    shapes = data.draw(st.lists(st.sampled_from(SHAPES), min_size=2, max_size=5))
    names = [data.draw(st.sampled_from(list(PRIORS))) for _ in shapes]
    priors = [PRIORS[name](shape) for name, shape in zip(names, shapes, strict=True)]
    assert_equals_own_calls(values(7, shapes), priors, statistic=ALL_STATISTICS[statistic])


@pytest.mark.parametrize("dim", [0, (0, 2), -1, None, (1,)], ids=str)
def test_the_dimensions_of_the_samples_are_those_of_each_tensor(dim: Any) -> None:
    shapes = {0: [(6, 2), (6, 3, 2), (6,)], (0, 2): [(4, 3, 2), (2, 5, 4), (8, 1, 1)]}
    shapes |= {-1: [(2, 6), (6,), (3, 1, 6)], None: [(4, 3), (12,), (2, 3, 2)], (1,): [(2, 6), (3, 6, 2)]}
    tensors = [torch.rand(shape, dtype=F64, requires_grad=True) for shape in shapes[dim]]
    alone = [bs.batch_shaping(x, bs.Beta(0.6, 0.4), dim, reduction="none") for x in tensors]
    together = bs.batch_shaping(tensors, bs.Beta(0.6, 0.4), dim, reduction="none")
    torch.testing.assert_close(together, alone)
    total = bs.batch_shaping(tuple(tensors), bs.Beta(0.6, 0.4), dim)
    torch.testing.assert_close(total, sum(loss.mean() for loss in alone))
    expected = torch.autograd.grad(sum(loss.mean() for loss in alone), tensors)
    torch.testing.assert_close(torch.autograd.grad(total, tensors), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_comes_back_in_itself(dtype: torch.dtype) -> None:
    tensors = [x.detach().to(dtype).requires_grad_() for x in values(20, [(3,), (4,)])]
    assert_equals_own_calls(tensors, bs.Beta(0.6, 0.4), tolerance=1e-2 if dtype.itemsize == 2 else 1e-5)
    assert bs.batch_shaping(tensors, bs.Beta(0.6, 0.4), 0).dtype == dtype


def test_a_nan_stays_in_its_array() -> None:
    tensors = [x.detach().clone() for x in values(6, [(2,), (3,)])]
    tensors[1][4, 2] = torch.nan
    for x in tensors:
        x.requires_grad_()
    first, second = bs.batch_shaping(tensors, bs.Beta(0.6, 0.4), 0, reduction="none")
    assert first.isfinite().all()
    assert second.isnan().tolist() == [False, False, True]
    (first.sum() + second[:2].sum()).backward()
    assert tensors[0].grad is not None
    assert tensors[0].grad.isfinite().all()


def test_tensors_without_arrays_count_as_they_do_alone() -> None:
    tensors = [torch.rand(4, 2), torch.rand(4, 0)]
    total = bs.batch_shaping(tensors, bs.Beta(0.6, 0.4), 0, reduction="sum")
    torch.testing.assert_close(total, bs.batch_shaping(tensors[0], bs.Beta(0.6, 0.4), 0, reduction="sum"))
    assert bs.batch_shaping(tensors, bs.Beta(0.6, 0.4), 0).isnan()  # the mean of nothing
    losses = bs.batch_shaping(tensors, bs.Beta(0.6, 0.4), 0, reduction="none")
    assert [loss.shape for loss in losses] == [(2,), (0,)]


# What is evaluated together


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (("Beta", "Beta", "Beta"), 1),
        (("a Beta an array", "a Beta an array", "a half fixed Beta an array"), 1),
        (("Beta", "another Beta", "another Beta"), 2),
        (("learned Beta", "learned Beta"), 2),
        (("Beta", "a Beta an array"), 2),
        (("Beta", "Normal", "Normal"), 2),
        (("a Laplace an array", "a Laplace an array"), 2),
    ],
)
def test_neighbours_with_one_prior_are_evaluated_at_once(
    names: tuple[str, ...], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[td.Distribution] = []

    def counted(statistic: Any, prior: td.Distribution, *rest: Any) -> Tensor:
        seen.append(prior)
        return closed_form.loss_of_arrays(statistic, prior, *rest)

    monkeypatch.setattr("batchshaping.losses.functional.loss_of_arrays", counted)
    tensors = values(5, [(3,)] * len(names))
    bs.batch_shaping(tensors, [PRIORS[name]((3,)) for name in names], 0)
    assert len(seen) == count


def test_one_learned_prior_for_all_tensors_gets_the_sum_of_their_gradients() -> None:
    tensors = values(9, [(3,), (2,)])
    for prior in (
        PRIORS["learned Beta"](()),
        bs.Beta(learned((1,)), 0.4),
        PRIORS["a Laplace an array"]((1,)),
    ):
        assert_equals_own_calls(tensors, prior)


# Modules


def test_a_module_takes_a_list_of_tensors_and_owns_a_list_of_priors() -> None:
    shapes = [(3,), (2,)]
    tensors = values(9, shapes)
    a = nn.Parameter(torch.full((3,), 0.5, dtype=F64))
    priors = [bs.Beta(a, 0.4), bs.Normal(torch.tensor(0.3, dtype=F64), 0.2)]
    loss = bs.BatchShapingLoss(priors, dim=0)
    assert set(loss.state_dict()) == {"0_a", "0_a_start", "1_loc"}
    assert [name for name, _ in loss.named_parameters()] == ["0_a"]
    total = loss(tensors)
    torch.testing.assert_close(total, bs.batch_shaping(tensors, priors, 0))
    torch.testing.assert_close(
        torch.autograd.grad(total, [a, *tensors]),
        torch.autograd.grad(
            sum(bs.batch_shaping(x, p, 0) for x, p in zip(tensors, priors, strict=True)), [a, *tensors]
        ),
    )
    with torch.no_grad():
        a.fill_(0.7)
    resumed = bs.BatchShapingLoss([bs.Beta(nn.Parameter(torch.ones(3, dtype=F64)), 0.4), priors[1]], dim=0)
    resumed.load_state_dict(loss.state_dict())
    torch.testing.assert_close(resumed(tensors), loss(tensors))
    assert "Beta" in repr(loss)
    assert "Normal" in repr(loss)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_a_history_is_that_of_each_tensor(masked: bool) -> None:
    shapes = [(3,), (2, 2)]
    options: dict[str, Any] = {"dim": 0, "history": 2, "reduction": "none"}
    together = bs.BatchShapingLoss(bs.Beta(2.0, 5.0), **options)
    alone = [bs.BatchShapingLoss(bs.Beta(2.0, 5.0), **options) for _ in shapes]
    for _ in range(4):
        tensors = values(5, shapes)
        masks = masks_of(tensors) if masked else [None] * len(shapes)
        found = together(tensors, masks if masked else None)
        expected = [loss(x, mask) for loss, x, mask in zip(alone, tensors, masks, strict=True)]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(sum(t.sum() for t in found), tensors),
            torch.autograd.grad(sum(t.sum() for t in expected), tensors),
        )
    file = io.BytesIO()
    torch.save(together.state_dict(), file)
    file.seek(0)
    resumed = bs.BatchShapingLoss(bs.Beta(2.0, 5.0), **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    tensors = values(5, shapes)
    torch.testing.assert_close(resumed(tensors), together(tensors))
    with pytest.raises(ValueError, match=r"history holds arrays of shape \(7,\), received \(3,\)"):
        together(tensors[:1])


@pytest.mark.parametrize("logits", [False, True], ids=["values", "logits"])
def test_the_generalized_loss_of_a_list_has_one_hyperprior_for_all_means(logits: bool) -> None:
    tensors = values(9, [(3,), (2, 2)])
    module = bs.GeneralizedBatchShapingLoss(7, logits=logits).double()
    total = module(tensors)
    means, temperatures = (t.split([3, 4]) for t in (module.mean, module.temperature))
    priors = [
        bs.RelaxedBernoulli(means[0], temperatures[0]),
        bs.RelaxedBernoulli(means[1].view(2, 2), temperatures[1].view(2, 2)),
    ]
    shaped = sum(bs.batch_shaping(x, p, 0, logits=logits) for x, p in zip(tensors, priors, strict=True))
    expected = shaped + bs.batch_shaping(module.mean, bs.Beta(3, 7)) + 0.1 * module.temperature.mean()
    torch.testing.assert_close(total, expected)
    leaves = [*tensors, *module.parameters()]
    torch.testing.assert_close(torch.autograd.grad(total, leaves), torch.autograd.grad(expected, leaves))
    with pytest.raises(
        ValueError, match=r"shape \(9, 3\) leaves \(3,\), but the learned priors have shape \(7,\)"
    ):
        module(tensors[:1])


# Compilers and transforms


def test_a_compiled_list_equals_an_eager_one() -> None:
    torch._dynamo.reset()
    shapes = [(3,), (2, 2), (1,)]
    a = learned((3,))

    def loss(tensors: list[Tensor], a: Tensor) -> Tensor:
        priors = [bs.Beta(a, 0.4), bs.Beta(0.6, 0.4), bs.Beta(0.6, 0.4)]
        return bs.batch_shaping([x.sigmoid() for x in tensors], priors, 0)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for samples in (6, 9):
        tensors = values(samples, shapes)
        expected, found = loss(tensors, a), compiled(tensors, a)
        torch.testing.assert_close(found, expected)
        leaves = [*tensors, a]
        torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("statistic", ["cramer_von_mises", "anderson_darling", "wasserstein"])
def test_vmap_and_grad_of_a_list_equal_loops(statistic: str) -> None:
    first, second = torch.rand(4, 6, 3, dtype=F64), torch.rand(4, 6, 2, dtype=F64)
    a = learned((3,)).detach()

    def loss(first: Tensor, second: Tensor, a: Tensor) -> Tensor:
        total: Tensor = bs.batch_shaping(
            [first, second], [bs.Beta(a, 0.4), bs.Beta(0.6, 0.4)], 0, statistic=statistic
        )
        return total

    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, 0, None))(first, second, a)
    for k in range(4):
        leaves = [t.clone().requires_grad_() for t in (first[k], second[k], a)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        torch.testing.assert_close([t[k] for t in found], list(expected))


def test_a_list_is_differentiable_once() -> None:
    tensors = values(6, [(3,), (2,)])
    total = bs.batch_shaping(tensors, bs.Beta(0.6, 0.4), 0)
    gradients = torch.autograd.grad(total, tensors, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        sum(g.sum() for g in gradients).backward()


# Refusals


X = torch.rand(4, 3)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ([], {}, ValueError, "x must be a tensor or a list of tensors, received an empty list"),
        ((), {}, ValueError, "received an empty tuple"),
        ([0.1, 0.2], {}, TypeError, "x must be a tensor or a list of tensors, received a list with a float"),
        ([X, None], {}, TypeError, "received a list with a NoneType"),
        ([X, X.long()], {}, TypeError, "x must be floating point, received torch.int64"),
        ([X, X.double()], {}, ValueError, "the same dtype, received torch.float32 and torch.float64"),
        ([X, X.to("meta")], {}, ValueError, "the same device, received cpu and meta"),
        ([X, X[:3]], {}, ValueError, r"samples along dim=0, received shapes \(4, 3\) and \(3, 3\)"),
        ([X[:0], X[:0]], {}, ValueError, r"no samples along dim=0 of x with shapes \(0, 3\), \(0, 3\)"),
        ([X, X], {"prior": [bs.Beta(0.6, 0.4)]}, ValueError, "prior must be one for all .* list of 1"),
        ([X, X], {"prior": []}, ValueError, "prior must be one for all .* list of 0"),
        ([X, X], {"prior": [bs.Beta(0.6, 0.4), 3]}, ValueError, "prior must be Beta.*received 3"),
        ([X], {"prior": [bs.Beta(torch.ones(2), 1.0)]}, ValueError, r"\(2,\) does not broadcast to \(3,\)"),
        (X, {"prior": [bs.Beta(0.6, 0.4)]}, ValueError, "prior must be Beta"),
        ([X, X], {"mask": [None]}, ValueError, "mask must be one for all .* list of 1"),
        ([X, X], {"mask": [None, X]}, TypeError, "mask must be boolean, received torch.float32"),
        ([X, X], {"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask of shape \(5,\)"),
        ([X, X], {"mask": [None, X > 2]}, ValueError, r"without samples along dim=0 of x with shapes"),
        ([X, X], {"dim": 2}, IndexError, "dim must be in"),
    ],
)
def test_what_cannot_be_joined_is_refused_in_one_line(
    x: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {"prior": bs.Beta(0.6, 0.4), "dim": 0, **options}
    with pytest.raises(error, match=message) as raised:
        bs.batch_shaping(x, **options)
    assert "\n" not in str(raised.value)
