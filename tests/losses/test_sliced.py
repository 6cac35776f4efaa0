"""The sliced loss against loops and LeJEPA's formula, its directions, and what it does to an embedding."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributions as td
from hypothesis import given
from hypothesis import strategies as st
from oracles import FAMILIES, brute_force, mean_of_terms
from scipy import special, stats
from torch import Tensor
from torch.autograd import gradcheck

import batchshaping as bs
from batchshaping.losses.sliced import SlicedBatchShapingLoss
from batchshaping.statistics import STATISTICS
from batchshaping.statistics.statistic import Statistic

F64 = torch.float64


# Directions


@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(1, 50))
def test_directions_are_unit_vectors(seed: int, dimensions: int, slices: int) -> None:
    directions = SlicedBatchShapingLoss(slices, seed=seed).directions(dimensions)
    assert directions.shape == (dimensions, slices)
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(slices))


def test_directions_are_uniform_on_the_sphere() -> None:
    directions = SlicedBatchShapingLoss(4000).directions(8)
    # A coordinate t of such a vector has (t + 1) / 2 ~ Beta(7/2, 7/2).
    for row in directions:
        assert stats.kstest((row.numpy() + 1) / 2, stats.beta(3.5, 3.5).cdf).pvalue > 1e-3
    correlation = directions @ directions.T / 4000
    torch.testing.assert_close(correlation, torch.eye(8) / 8, rtol=0, atol=0.01)


def test_modules_of_the_same_seed_draw_the_same_directions_at_every_step() -> None:
    one, other = SlicedBatchShapingLoss(16, seed=3), SlicedBatchShapingLoss(16, seed=3)
    x = torch.randn(32, 5)
    seen = []
    for _ in range(4):
        torch.rand(7)  # the generator of torch has no part in it
        assert torch.equal(one.directions(5), other.directions(5))
        seen.append(one.directions(5))
        assert torch.equal(one(x), other(x))
    assert len({tuple(d.flatten().tolist()) for d in seen}) == 4
    assert not torch.equal(seen[0], SlicedBatchShapingLoss(16, seed=4).directions(5))


def test_the_generator_of_torch_is_left_alone() -> None:
    state = torch.get_rng_state()
    SlicedBatchShapingLoss(16)(torch.zeros(8, 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_counts_its_steps_and_evaluation_does_not() -> None:
    loss, x = SlicedBatchShapingLoss(16), torch.randn(32, 5)
    values = [loss(x).item() for _ in range(3)]
    assert loss.step.item() == 3 and len(set(values)) == 3
    loss.eval()
    assert loss(x) == loss(x)
    assert loss.step.item() == 3
    with torch.no_grad():
        expected = loss(x)
    # Evaluation shows the directions of the next pass.
    assert loss.train()(x) == expected


def test_a_resumed_run_goes_on_as_if_undisturbed() -> None:
    loss, x = SlicedBatchShapingLoss(16, seed=5), torch.randn(32, 5)
    for _ in range(3):
        loss(x)
    state = copy.deepcopy(loss.state_dict())
    expected = [loss(x) for _ in range(3)]
    resumed = SlicedBatchShapingLoss(16, seed=5)
    resumed.load_state_dict(state)
    assert [resumed(x) for _ in range(3)] == expected


# The loss


@pytest.mark.parametrize("shape", [(40, 6), (8, 5, 6)], ids=str)
def test_the_loss_is_the_mean_of_that_of_each_slice(shape: tuple[int, ...]) -> None:
    loss = SlicedBatchShapingLoss(20)
    x = torch.randn(shape, dtype=F64)
    directions = loss.directions(6).double()
    each = [
        brute_force(x.reshape(-1, 6) @ direction, FAMILIES["Normal"].cdf, (0.0, 1.0))
        for direction in directions.T
    ]
    assert loss(x).item() == pytest.approx(np.mean(each), rel=1e-9)


def test_a_prior_and_a_statistic_of_choice_are_used() -> None:
    x = torch.rand(40, 3, dtype=F64)
    for prior, frozen in (
        (bs.Normal(0.5, 2.0), stats.norm(0.5, 2.0)),
        (td.Laplace(0.0, 1.0), stats.laplace()),
    ):
        terms = {
            "anderson_darling": lambda v, p, cdf=frozen.cdf: (
                2 * (special.rel_entr(p, cdf(v)) + special.rel_entr(1 - p, 1 - cdf(v)))
            ),
            "wasserstein": lambda v, p, icdf=frozen.ppf: (v - icdf(p)) ** 2,
        }
        for statistic, formula in terms.items():
            loss = SlicedBatchShapingLoss(12, prior, statistic=statistic)
            projections = x @ loss.directions(3).double()
            expected = mean_of_terms(projections, formula, (), 0).mean()
            assert loss(x).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [2, 17, 256])
def test_epps_pulley_is_the_formula_of_lejepa(n: int) -> None:
    generator = np.random.default_rng(n)
    x = generator.normal(0.2, 1.3, (n, 10))
    loss = SlicedBatchShapingLoss(15, statistic="epps_pulley")
    projections = x @ loss.directions(10).double().numpy()
    # SIGReg, Balestriero and LeCun, 2025: N times the weighted integral of the squared distance of the
    # empirical characteristic function to that of N(0, 1), by the trapezoidal rule, averaged over slices.
    t = np.linspace(-3, 3, 33)
    empirical = np.exp(1j * projections[:, :, None] * t).mean(axis=0)
    target = np.exp(-(t**2) / 2)
    sigreg = (n * np.trapezoid(np.abs(empirical - target) ** 2 * target, t, axis=-1)).mean()
    assert n * loss(torch.from_numpy(x)).item() == pytest.approx(sigreg, rel=1e-9)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_gradcheck(statistic: str) -> None:
    loss = SlicedBatchShapingLoss(5, statistic=statistic).eval()
    assert gradcheck(loss, (torch.randn(6, 3, dtype=F64, requires_grad=True),))


def test_a_learned_prior_gets_its_gradient() -> None:
    scale = torch.tensor(1.0, requires_grad=True)
    SlicedBatchShapingLoss(32, bs.Normal(0.0, scale))(3 * torch.randn(200, 8)).backward()
    assert scale.grad < 0  # the data are wider than the prior


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_the_loss_has_the_dtype_of_the_embedding(dtype: torch.dtype) -> None:
    x = torch.randn(50, 4).to(dtype).requires_grad_()
    loss = SlicedBatchShapingLoss(8)(x)
    loss.backward()
    assert loss.dtype == x.grad.dtype == dtype
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_projected_in_single(half: torch.dtype) -> None:
    x = torch.randn(64, 16).to(half)
    loss = SlicedBatchShapingLoss(32, statistic="epps_pulley").eval()
    exact = loss(x.float())
    with torch.autocast("cpu", dtype=half):
        assert loss(x.float()) == exact
        assert loss(x) == exact.to(half)
    assert loss(x) == exact.to(half)


# What it is for


def spectrum(x: Tensor) -> Tensor:
    """The standard deviations of the embedding along its principal axes."""
    centred = x.detach() - x.detach().mean(dim=0)
    return torch.linalg.svdvals(centred) / math.sqrt(len(x))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_collapsed_embedding_is_worse_than_a_round_one(statistic: str) -> None:
    loss = SlicedBatchShapingLoss(256, statistic=statistic).eval()
    round_cloud = torch.randn(256, 8)
    line = torch.randn(256, 1) * torch.randn(8)
    point = torch.zeros(256, 8) + 0.01 * torch.randn(256, 8)
    shifted = round_cloud + 1.0
    for collapsed in (line, point, shifted):
        assert loss(collapsed) > 3 * loss(round_cloud)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_descent_makes_a_collapsed_embedding_round(statistic: str) -> None:
    # All but a trace of it lies on a line.
    start = torch.randn(128, 1) @ torch.full((1, 4), 0.5) + 0.05 * torch.randn(128, 4)
    x = start.clone().requires_grad_()
    loss = SlicedBatchShapingLoss(64, statistic=statistic)
    optimizer = torch.optim.Adam([x], lr=0.03)
    assert spectrum(x)[-1] < 0.06
    for _ in range(400):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
    after = spectrum(x)
    assert after[-1] > 0.8 and after[0] < 1.25
    assert loss.eval()(x) < 0.1 * loss(start)


# What bad input gets


@pytest.mark.parametrize("slices", [0, -3])
def test_no_slices_are_refused(slices: int) -> None:
    with pytest.raises(ValueError, match=f"slices must be at least 1, received {slices}"):
        SlicedBatchShapingLoss(slices)


@pytest.mark.parametrize("x", [torch.tensor(0.3), torch.rand(5)], ids=["scalar", "vector"])
def test_what_is_no_embedding_is_refused_with_its_shape(x: Tensor) -> None:
    loss = SlicedBatchShapingLoss(8)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., D\)") as error:
        loss(x)
    assert str(tuple(x.shape)) in str(error.value)
    assert loss.step == 0  # what was refused was no step


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        SlicedBatchShapingLoss(8)(torch.rand(0, 4))


def test_integers_are_refused_by_dtype() -> None:
    with pytest.raises(TypeError, match=r"floating point, received torch\.int64"):
        SlicedBatchShapingLoss(8)(torch.ones(5, 4, dtype=torch.int64))


def test_a_nan_makes_the_loss_nan() -> None:
    x = torch.randn(20, 3)
    x[4, 1] = torch.nan
    assert bool(SlicedBatchShapingLoss(8)(x).isnan())


def test_what_is_no_prior_is_refused_when_the_module_is_made() -> None:
    with pytest.raises(ValueError, match="prior must be"):
        SlicedBatchShapingLoss(8, 3.0)


def test_the_module_prints_what_it_was_made_with() -> None:
    loss = SlicedBatchShapingLoss(8, bs.Normal(0.0, 2.0), statistic="wasserstein", seed=7)
    for part in ("slices=8", "Normal(loc=0, scale=2)", "'wasserstein'", "seed=7"):
        assert part in repr(loss)


def test_a_statistic_of_ones_own_is_used() -> None:
    class Absolute(Statistic):
        def terms(self, values: Tensor, positions: Tensor, prior: td.Distribution) -> Tensor:
            return (prior.cdf(values) - positions).abs()

    x = torch.randn(30, 4, dtype=F64)
    loss = SlicedBatchShapingLoss(6, statistic=Absolute())
    projections = x @ loss.directions(4).double()
    expected = mean_of_terms(projections, lambda v, p: np.abs(stats.norm.cdf(v) - p), (), 0).mean()
    assert loss(x).item() == pytest.approx(expected, rel=1e-9)
