"""What the losses take, and the one line with which they refuse everything else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as td
from scipy import special
from sweeps import left_by

import batchshaping as bs
from batchshaping.statistics import STATISTICS
from batchshaping.statistics.cramer_von_mises import CramerVonMises

F64 = torch.float64


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


@pytest.mark.parametrize(
    "make",
    [
        lambda name: bs.batch_shaping(torch.rand(5), bs.Beta(2.0, 6.0), statistic=name),
        lambda name: bs.BatchShapingLoss(bs.Beta(2.0, 6.0), statistic=name),
        lambda name: bs.GeneralizedBatchShapingLoss(3, statistic=name),
        lambda name: bs.SlicedBatchShapingLoss(3, statistic=name),
    ],
    ids=["functional", "module", "generalized", "sliced"],
)
def test_an_unknown_statistic_is_refused_with_the_known_ones(make: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="received 'kolmogorov_smirnov'") as error:
        make("kolmogorov_smirnov")
    message = str(error.value)
    assert "\n" not in message
    assert all(repr(name) in message for name in STATISTICS)


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
