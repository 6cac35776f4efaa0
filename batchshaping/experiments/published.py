"""The eight published runs: what they start from, what they minimize, and the loss they were printed with.

``python -m batchshaping.experiments.published [FOLDER]`` repeats them all, prints their final losses beside
the published ones, and draws their animations into the folder.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from batchshaping.batch_shaping_loss import Prior, gbas_loss
from batchshaping.experiments.fit import Fit, GeneralizedFit, Progress, fit, fit_generalized, published_start
from batchshaping.losses.generalized import GeneralizedBatchShapingLoss
from batchshaping.priors.closed_form import ClosedFormPrior
from batchshaping.priors.families import Beta, Normal, RelaxedBernoulli, SymBeta

__all__ = [
    "PUBLISHED_GENERALIZED_RUN",
    "PUBLISHED_RUNS",
    "PublishedGeneralizedLoss",
    "PublishedGeneralizedRun",
    "PublishedRun",
]


@dataclass(frozen=True)
class PublishedRun:
    """One published run of the batch-shaping loss: 500 values, Adam with learning rate 0.1.

    Attributes:
        name: name of its animation, without the extension.
        prior: what its values are shaped to.
        arguments: the same prior as ``gbas_loss`` takes it: the family and its parameters.
        draw: its place among the runs that share one random stream.
        steps: how often its values are moved.
        loss: its published final loss, as printed.
        init: its logits start from U(-init, init).

    Example:
        >>> run = PUBLISHED_RUNS[4]
        >>> run.prior, run.loss, f"{run.fit().losses[-1]:.2e}"
        (Normal(loc=0.6, scale=0.1), '1.79e-08', '1.79e-08')
    """

    name: str
    prior: ClosedFormPrior
    arguments: tuple[Prior, float] | tuple[Prior, float, float]
    draw: int
    steps: int
    loss: str
    init: float = 4.0

    def fit(self, progress: Progress | None = None) -> Fit:
        """Repeat the run, on the published loss."""
        return fit(
            published_start(self.init, draw=self.draw),
            self.prior,
            steps=self.steps,
            learning_rate=0.1,
            loss=lambda x: gbas_loss(x, *self.arguments),
            progress=progress,
        )


class PublishedGeneralizedLoss(GeneralizedBatchShapingLoss):
    """The generalized loss on ``gbas_loss``, which clips the values to [1e-3, 1 - 1e-3], as published.

    The arrays lie along the first dimension of x; the hyperprior is Beta(3, 7).

    Args:
        arrays: how many arrays there are, and so how many learned priors.

    Raises:
        ValueError: if a mask is given: the published loss has none.

    Example:
        >>> loss = PublishedGeneralizedLoss(30)
        >>> loss(torch.rand(30, 500)).shape
        torch.Size([])
    """

    def __init__(self, arrays: int) -> None:
        super().__init__(arrays, Beta(3, 7), dim=1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The total loss of x, of shape (T, N)."""
        if mask is not None:
            raise ValueError("mask must be None: the published loss has none")
        temperature = self.temperature
        prior_loss = gbas_loss(x, Prior.RELAXED_BERNOULLI, self.mean, temperature, True, dim=0)
        hyperprior_loss = gbas_loss(self.mean, Prior.BETA, 3, 7)
        penalty = 0.1 * temperature.mean()
        self.prior_loss = prior_loss.detach()
        self.hyperprior_loss = hyperprior_loss.detach()
        self.temperature_penalty = penalty.detach()
        return prior_loss + hyperprior_loss + penalty


@dataclass(frozen=True)
class PublishedGeneralizedRun:
    """The published run of the generalized loss: 30 arrays of 500 values, and their priors, learned.

    Adam with learning rate 0.3 after 20 steps of warm-up.

    Attributes:
        name: name of its animation, without the extension.
        steps: how often its values are moved.
        loss: its published final loss, as printed.
        shape: how many arrays, and how many values in each.

    Example:
        >>> PUBLISHED_GENERALIZED_RUN.shape, PUBLISHED_GENERALIZED_RUN.steps, PUBLISHED_GENERALIZED_RUN.loss
        ((30, 500), 350, '3.52e-02')
    """

    name: str
    steps: int
    loss: str
    shape: tuple[int, int] = (30, 500)

    def fit(self, progress: Progress | None = None) -> GeneralizedFit:
        """Repeat the run, on the published loss."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(42)
            loss = PublishedGeneralizedLoss(self.shape[0])
        return fit_generalized(
            published_start(n=self.shape),
            loss,
            steps=self.steps,
            learning_rate=0.3,
            warmup_steps=20,
            progress=progress,
        )


PUBLISHED_RUNS = (
    PublishedRun(
        name="batch_shaping_relaxed_bernoulli_p1=0.2_p2=0.25",
        prior=RelaxedBernoulli(0.2, 0.25),
        arguments=(Prior.RELAXED_BERNOULLI, 0.2, 0.25),
        draw=0,
        steps=100,
        loss="2.38e-02",
    ),
    PublishedRun(
        name="batch_shaping_symbeta_p1=0.9",
        prior=SymBeta(0.9),
        arguments=(Prior.SYMBETA, 0.9),
        draw=1,
        steps=120,
        loss="1.86e-02",
    ),
    PublishedRun(
        name="batch_shaping_beta_p1=2_p2=6",
        prior=Beta(2, 6),
        arguments=(Prior.BETA, 2, 6),
        draw=2,
        steps=100,
        loss="3.1e-06",
    ),
    PublishedRun(
        name="test_outside_support",
        prior=Normal(0.6, 0.1),
        arguments=(Prior.NORMAL, 0.6, 0.1),
        draw=3,
        steps=200,
        loss="1.29e-03",
    ),
    PublishedRun(
        name="test_inside_support",
        prior=Normal(0.6, 0.1),
        arguments=(Prior.NORMAL, 0.6, 0.1),
        draw=4,
        steps=200,
        loss="1.79e-08",
        init=1.0,
    ),
    PublishedRun(
        name="test_high_temperature",
        prior=RelaxedBernoulli(0.8, 0.4),
        arguments=(Prior.RELAXED_BERNOULLI, 0.8, 0.4),
        draw=5,
        steps=200,
        loss="2.70e-03",
    ),
    PublishedRun(
        name="test_low_temperature",
        prior=RelaxedBernoulli(0.8, 0.01),
        arguments=(Prior.RELAXED_BERNOULLI, 0.8, 0.01),
        draw=6,
        steps=200,
        loss="1.65e-01",
    ),
)
"""The seven published runs of the batch-shaping loss, in the order of their random stream."""

PUBLISHED_GENERALIZED_RUN = PublishedGeneralizedRun(
    name="generalized_batch_shaping_hyperprior=beta_p1=3_p2=7", steps=350, loss="3.52e-02"
)
"""The published run of the generalized loss."""


def main(folder: Path) -> None:
    """Repeat the eight runs, print their final losses and draw their animations into a folder."""
    from batchshaping.figures.fits import animate_fit, animate_generalized_fit

    folder.mkdir(parents=True, exist_ok=True)
    print(f"{'run':<52}{'steps':>5}{'final loss':>12}{'published':>11}")
    for run in PUBLISHED_RUNS:
        shaped = run.fit()
        _print(run, shaped.losses)
        animate_fit(shaped, folder / f"{run.name}.gif")
    generalized = PUBLISHED_GENERALIZED_RUN.fit()
    _print(PUBLISHED_GENERALIZED_RUN, generalized.losses)
    animate_generalized_fit(generalized, folder / f"{PUBLISHED_GENERALIZED_RUN.name}.gif")


def _print(run: PublishedRun | PublishedGeneralizedRun, losses: Tensor) -> None:
    print(f"{run.name:<52}{run.steps:>5}{losses[-1].item():>12.2e}{run.loss:>11}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs"))
