r"""The demonstration: a small gated network learns handwritten digits, without the loss and with it.

Both runs are those of ``batchshaping train``, with the defaults of
:class:`~batchshaping.training.config.RunConfig` and a network that is four times cheaper. They share seed,
data, start and every setting but one: without the loss, its weight is 0.

Needs the extras ``cli``, ``vision`` and ``viz``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from batchshaping.figures.distributions import plot_density
from batchshaping.figures.style import COLORS, house_style
from batchshaping.gates.gate import gate_probabilities
from batchshaping.gates.summary import GateStatistics, gate_statistics
from batchshaping.priors.families import Beta
from batchshaping.training import run
from batchshaping.training.config import RunConfig
from batchshaping.training.data import Data, load_data
from batchshaping.training.module import make_network
from batchshaping.training.threads import using_threads

__all__ = ["PRIOR", "Outcome", "draw", "train"]

PRIOR = Beta(*RunConfig().prior)
"""What the loss shapes every gate to at first: open or closed, and open for most examples."""


class Outcome(NamedTuple):
    """What a run came to, measured on the test set.

    Attributes:
        accuracy: share of digits that are recognized.
        multiply_adds: mean over the digits, as a share of those of the ungated network.
        gates: what the gates do.
        before: probabilities of being open before training, of shape (N, gates).
        after: those after training.
    """

    accuracy: float
    multiply_adds: float
    gates: GateStatistics
    before: Tensor
    after: Tensor


def train(*, shaped: bool, epochs: int = 40, seed: int = 0, progress: bool = False) -> Outcome:
    """Train the network on the digits and measure it.

    Args:
        shaped: whether the batch-shaping loss takes part.
        epochs: how often every digit is seen, at least once.
        seed: of the start, the order of the digits and the gates' noise; the same seed and number of epochs
            give the same outcome, whatever the state of PyTorch's own generator.
        progress: whether to show how far the training is.

    Raises:
        ValueError: if there is no epoch.

    Example:
        >>> outcome = train(shaped=True, epochs=1)
        >>> outcome.before.shape, outcome.after.shape
        (torch.Size([450, 112]), torch.Size([450, 112]))
    """
    config = RunConfig(
        stem_stride=2,
        epochs=epochs,
        seed=seed,
        shaping=RunConfig().shaping if shaped else 0.0,
        evaluate_every=epochs,
        logger="none",
        accelerator="cpu",
    )
    data = load_data(config.data)
    # One thread sums in one order, and is fast for a network this small.
    with tempfile.TemporaryDirectory() as folder, _own_chance(seed), using_threads(1):
        before = _probabilities(make_network(config, len(data.classes), data.shape[0]), data)
        result = run.train(config, Path(folder), progress=progress)
        network, _ = run.load_run(Path(folder))
    after = _probabilities(network, data)
    return Outcome(
        accuracy=result["accuracy"],
        multiply_adds=result["multiply_adds"] / result["cost"]["dense"],
        gates=gate_statistics(after > 0.5),
        before=before,
        after=after,
    )


@contextmanager
def _own_chance(seed: int) -> Iterator[None]:
    """A stream of random numbers that starts from the seed; afterwards the caller's goes on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _probabilities(network: nn.Module, data: Data) -> Tensor:
    """The probabilities of all gates for the test digits, of shape (N, gates)."""
    images, _ = data.test.__getitems__(range(len(data.test)))
    network.eval()(data.normalize(images))
    return torch.cat(gate_probabilities(network), dim=1)


def draw(without: Outcome, shaped: Outcome) -> Figure:
    """Histograms of the gates' probabilities before and after both runs, and how often each gate is open.

    Args:
        without: the run without the loss.
        shaped: the run with it.

    Returns:
        A figure, to be saved with ``savefig``.
    """
    columns = {
        "before training": shaped.before,
        "after, without the loss": without.after,
        "after, with the loss": shaped.after,
    }
    with house_style():
        figure = Figure(figsize=(8.0, 4.8), layout="constrained")
        axes = figure.subplots(2, len(columns), sharey="row", sharex="row")
        highest = 0.0
        for (title, probabilities), (above, below) in zip(columns.items(), axes.T, strict=True):
            plot_density(probabilities.flatten(), PRIOR, above)
            above.set(title=title, xlabel="probability of being open", ylabel="")
            handles, _ = above.get_legend_handles_labels()
            above.get_legend().remove()
            highest = max(highest, above.get_ylim()[1])
            _draw_opening(below, probabilities)
        above.set_ylim(0, highest)
        axes[0, 0].set_ylabel("density")
        axes[1, 0].set_ylabel("share of digits\nthat open it")
        gates = shaped.before.shape[1]
        figure.legend(
            handles,
            [f"{gates} gates on the test digits", f"the prior, {PRIOR}"],
            loc="outside upper center",
            ncols=2,
        )
    return figure


def _draw_opening(ax: Axes, probabilities: Tensor) -> None:
    decisions = probabilities > 0.5
    opening = decisions.double().mean(dim=0).sort(descending=True).values
    gates = gate_statistics(decisions)
    ax.stairs(opening.numpy(), fill=True, facecolor=COLORS["values"], edgecolor=COLORS["empirical"])
    ax.set(
        title=f"{gates.always_on:.0%} on, {gates.conditional:.0%} conditional, {gates.always_off:.0%} off",
        xlabel="gate, by how often it is open",
        xlim=(0, len(opening)),
        ylim=(0, 1.05),
    )
