"""The demonstration: what it measures, and that it repeats."""

from __future__ import annotations

import pytest
import torch
from matplotlib.figure import Figure

from batchshaping.experiments.demo import Outcome, draw, train


@pytest.fixture(scope="module")
def outcomes() -> tuple[Outcome, Outcome]:
    return train(shaped=False, epochs=8, seed=2), train(shaped=True, epochs=8, seed=2)


def test_both_runs_start_alike_and_the_network_learns(outcomes: tuple[Outcome, Outcome]) -> None:
    without, shaped = outcomes
    assert torch.equal(without.before, shaped.before)
    assert min(without.accuracy, shaped.accuracy) > 0.5


def test_the_measures_are_those_of_the_gates_after_training(outcomes: tuple[Outcome, Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.gates.mean_open == pytest.approx((outcome.after > 0.5).double().mean().item())
        assert 0 < outcome.multiply_adds < 1.1


def test_the_loss_makes_more_gates_conditional(outcomes: tuple[Outcome, Outcome]) -> None:
    without, shaped = outcomes
    assert shaped.gates.conditional > without.gates.conditional


def test_the_seed_decides_everything_and_the_callers_random_numbers_go_on(
    outcomes: tuple[Outcome, Outcome],
) -> None:
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = train(shaped=True, epochs=1, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.manual_seed(6)
    again = train(shaped=True, epochs=1, seed=3)
    assert torch.equal(first.after, again.after)
    assert first[:3] == again[:3]
    assert not torch.equal(first.before, outcomes[1].before), "those have another seed"


def test_no_epochs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"epochs: .* received 0"):
        train(shaped=True, epochs=0)


def test_the_figure_is_labelled(outcomes: tuple[Outcome, Outcome]) -> None:
    figure = draw(*outcomes)
    assert isinstance(figure, Figure)
    assert all(ax.get_xlabel() for ax in figure.axes)
    assert [bool(ax.get_ylabel()) for ax in figure.axes] == [True, False, False] * 2
    assert f"{outcomes[1].gates.conditional:.0%} conditional" in figure.axes[-1].get_title(loc="left")
