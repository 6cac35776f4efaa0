"""The published runs end at their published losses."""

from pathlib import Path

import pytest
import torch
from scipy import stats

from batchshaping.batch_shaping_loss import Prior
from batchshaping.experiments.published import (
    PUBLISHED_GENERALIZED_RUN,
    PUBLISHED_RUNS,
    PublishedGeneralizedLoss,
    PublishedRun,
)

OUTPUTS = Path(__file__).parents[2] / "outputs"
SCIPY = {
    Prior.SYMBETA: lambda a: stats.beta(a, 1 - a),
    Prior.BETA: stats.beta,
    Prior.RELAXED_BERNOULLI: None,
    Prior.NORMAL: stats.norm,
}


@pytest.mark.parametrize("run", PUBLISHED_RUNS, ids=lambda run: run.name)
def test_a_run_ends_at_its_published_loss(run: PublishedRun) -> None:
    losses = run.fit().losses
    assert len(losses) == run.steps
    if run.loss == "3.1e-06":
        # Rounding decides its last digit: starts that differ by 1e-7 end between 2.9e-06 and 3.2e-06.
        assert losses[-1].item() == pytest.approx(3.1e-6, abs=0.3e-6)
    else:
        assert f"{losses[-1]:.2e}" == run.loss


def test_the_generalized_run_ends_at_its_published_loss() -> None:
    shaped = PUBLISHED_GENERALIZED_RUN.fit()
    assert f"{shaped.losses[-1]:.2e}" == PUBLISHED_GENERALIZED_RUN.loss
    # Its hyperprior Beta(3, 7) asks for a mean of 0.3.
    assert shaped.means[-1].mean().item() == pytest.approx(0.3, abs=0.01)


def test_a_run_does_not_move_the_generator_of_torch() -> None:
    state = torch.get_rng_state()
    PUBLISHED_RUNS[0].fit()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("run", PUBLISHED_RUNS, ids=lambda run: run.name)
def test_both_ways_to_write_a_prior_mean_the_same(run: PublishedRun) -> None:
    family, *parameters = run.arguments
    x = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    if family is Prior.RELAXED_BERNOULLI:
        assert (run.prior.parameter("mean"), run.prior.parameter("temperature")) == pytest.approx(parameters)
    else:
        expected = torch.from_numpy(SCIPY[family](*parameters).cdf(x.numpy()))
        torch.testing.assert_close(run.prior.cdf(x), expected)


def test_the_runs_share_one_stream_in_their_order() -> None:
    assert [run.draw for run in PUBLISHED_RUNS] == list(range(7))


def test_the_published_generalized_loss_takes_no_mask() -> None:
    x = torch.rand(3, 20)
    with pytest.raises(ValueError, match="mask must be None"):
        PublishedGeneralizedLoss(3)(x, torch.ones(3, 20, dtype=torch.bool))


@pytest.mark.parametrize("run", [*PUBLISHED_RUNS, PUBLISHED_GENERALIZED_RUN], ids=lambda run: run.name)
def test_its_animation_is_in_the_repository_and_small(run: PublishedRun) -> None:
    image = pytest.importorskip("PIL.Image")
    path = OUTPUTS / f"{run.name}.gif"
    assert path.stat().st_size < 1_000_000
    with image.open(path) as animation:
        assert animation.n_frames >= 50
