"""A fit records what it does, in the order in which it does it."""

import pytest
import torch
from torch import Tensor

import batchshaping as bs
from batchshaping.experiments.fit import fit, fit_generalized, published_start

PRIORS = [
    bs.Beta(2, 6),
    bs.SymBeta(0.6),
    bs.RelaxedBernoulli(0.3, 0.5),
    bs.Normal(0.5, 0.2),
    torch.distributions.Kumaraswamy(torch.tensor(2.0), torch.tensor(3.0)),
]


@pytest.mark.parametrize("draw", [0, 1, 6])
def test_the_start_is_a_draw_from_the_stream_of_a_seeded_run(draw: int) -> None:
    torch.manual_seed(42)
    for _ in range(draw):
        torch.rand(500)
    assert torch.equal(published_start(draw=draw), (2 * torch.rand(500) - 1) * 4)


def test_the_start_neither_reads_nor_moves_the_generator_of_torch() -> None:
    state = torch.get_rng_state()
    first = published_start(1.0, (3, 20), seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(published_start(1.0, (3, 20), seed=7), first)
    assert first.shape == (3, 20)
    assert first.abs().max() <= 1


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_a_fit_shapes_values_to_the_prior_and_keeps_every_step(
    prior: torch.distributions.Distribution,
) -> None:
    start = published_start(2.0, 64)
    kept = start.clone()
    shaped = fit(start, prior, steps=60)
    assert shaped.values.shape == (61, 64)
    assert shaped.losses.shape == (60,)
    assert shaped.steps == 60
    assert shaped.prior is prior
    assert not shaped.values.requires_grad
    assert not shaped.losses.requires_grad
    assert torch.equal(start, kept)
    assert torch.equal(shaped.values[0], torch.sigmoid(start))
    assert shaped.losses[-1] < shaped.losses[0] / 4


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_each_loss_is_that_of_the_values_beside_it(prior: torch.distributions.Distribution) -> None:
    shaped = fit(published_start(2.0, 64), prior, steps=10)
    again = torch.stack([bs.batch_shaping(values, prior) for values in shaped.values[:-1]])
    torch.testing.assert_close(shaped.losses, again)


def test_a_fit_is_adam_on_the_logits() -> None:
    logits = published_start(2.0, 64).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.2)
    shaped = fit(logits, bs.Beta(2, 6), steps=20, learning_rate=0.2)
    for step in range(20):
        torch.testing.assert_close(shaped.values[step], torch.sigmoid(logits))
        optimizer.zero_grad()
        bs.batch_shaping(torch.sigmoid(logits), bs.Beta(2, 6)).backward()
        optimizer.step()
    torch.testing.assert_close(shaped.values[20], torch.sigmoid(logits))


def test_any_loss_can_be_minimized() -> None:
    def distance(x: Tensor) -> Tensor:
        return (x - 0.25).square().mean()

    shaped = fit(published_start(2.0, 64), bs.Beta(2, 6), steps=200, loss=distance)
    torch.testing.assert_close(shaped.values[-1], torch.full((64,), 0.25), atol=1e-3, rtol=0)
    torch.testing.assert_close(shaped.losses[-1], distance(shaped.values[-2]))


def test_values_stay_in_double_precision() -> None:
    assert fit(published_start().double(), bs.Beta(2, 6), steps=2).values.dtype == torch.float64


def test_a_nan_is_not_hidden() -> None:
    start = published_start()
    start[3] = torch.nan
    shaped = fit(start, bs.Beta(2, 6), steps=2)
    assert shaped.losses.isnan().all()
    assert shaped.values[-1].isnan().all()


def test_progress_is_told_after_each_step() -> None:
    told: list[tuple[int, int, float]] = []
    shaped = fit(published_start(), bs.Beta(2, 6), steps=5, progress=lambda *news: told.append(news))
    assert told == [(k + 1, 5, loss) for k, loss in enumerate(shaped.losses.tolist())]


@pytest.mark.parametrize(
    "start", [torch.zeros(2, 3), torch.zeros(0), torch.tensor(0.5)], ids=lambda t: t.shape
)
def test_a_start_of_another_shape_is_refused(start: Tensor) -> None:
    with pytest.raises(ValueError, match=r"start must be logits of shape \(N,\), received shape"):
        fit(start, bs.Beta(2, 6))


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"start must be floating point, received torch\.int64"):
        fit(torch.arange(5), bs.Beta(2, 6))
    with pytest.raises(TypeError, match=r"start must be floating point, received torch\.int64"):
        fit_generalized(torch.zeros(3, 5, dtype=torch.int64))


@pytest.mark.parametrize("steps", [0, -1])
def test_no_step_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps must be at least 1, received {steps}"):
        fit(published_start(), bs.Beta(2, 6), steps=steps)
    with pytest.raises(ValueError, match=f"steps must be at least 1, received {steps}"):
        fit_generalized(published_start(n=(3, 20)), steps=steps)


def test_a_generalized_fit_keeps_values_priors_and_parts_of_the_loss() -> None:
    loss = bs.GeneralizedBatchShapingLoss(4, bs.Beta(2, 2), dim=1)
    before = loss.mean.detach().clone()
    start = published_start(2.0, (4, 64))
    told: list[tuple[int, int, float]] = []
    shaped = fit_generalized(start, loss, steps=30, progress=lambda *news: told.append(news))
    assert shaped.values.shape == (31, 4, 64)
    assert shaped.means.shape == shaped.temperatures.shape == (31, 4)
    assert shaped.prior_losses.shape == shaped.hyperprior_losses.shape == shaped.penalties.shape == (30,)
    assert shaped.steps == 30
    assert shaped.hyperprior is loss.hyperprior
    assert torch.equal(shaped.values[0], torch.sigmoid(start))
    assert torch.equal(shaped.means[0], before)
    assert torch.equal(shaped.means[-1], loss.mean)
    assert torch.equal(shaped.temperatures[-1], loss.temperature)
    torch.testing.assert_close(shaped.losses, torch.tensor([total for _, _, total in told]))
    assert shaped.losses[-1] < shaped.losses[0]
    for step in range(30):
        priors = bs.RelaxedBernoulli(shaped.means[step], shaped.temperatures[step])
        torch.testing.assert_close(
            shaped.prior_losses[step], bs.batch_shaping(shaped.values[step], priors, 1)
        )


def test_the_learning_rate_of_a_generalized_fit_warms_up() -> None:
    shaped = fit_generalized(published_start(2.0, (4, 64)), steps=12, learning_rate=0.3, warmup_steps=10)
    moved = torch.logit(shaped.values.double()).diff(dim=0).abs().amax(dim=(1, 2))
    assert moved[0] == pytest.approx(1e-4, rel=0.01)
    # Adam moves about as far as its learning rate says as long as the gradient keeps its sign.
    assert moved[5] == pytest.approx(0.15, rel=0.3)
    assert (moved[1:5] > moved[:4]).all()


def test_priors_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the learned priors have shape \(5,\)"):
        fit_generalized(published_start(n=(4, 64)), bs.GeneralizedBatchShapingLoss(5, dim=1))


@pytest.mark.parametrize("shape", [(5,), (0, 3), (3, 0), (2, 3, 4)])
def test_a_generalized_start_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"start must be logits of shape \(T, N\), received shape"):
        fit_generalized(torch.zeros(shape))
