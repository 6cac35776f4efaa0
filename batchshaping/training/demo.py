r"""The demonstration: a small gated network learns handwritten digits, without the loss and with it.

Both runs minimize

.. math::
    \mathrm{CE} + \gamma(e) \sum_{\text{layers}} L(p; \mathrm{Beta}(0.6, 0.4))
    + \lambda(e) \, \mathrm{mean} \, p,

with p the probabilities of the gates and one array a gate. They share seed, data, start and every setting but
one: without the loss, γ is 0. The recipe is that of Bejnordi, Blankevoort and Welling (ICLR 2020,
https://arxiv.org/abs/1907.06627) for CIFAR-10, scaled to fewer epochs.

Needs the extras ``vision`` and ``viz``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from batchshaping.batch_shaping_loss import batch_shaping
from batchshaping.gates import (
    ChannelGate,
    Gate,
    GateStatistics,
    gate_probabilities,
    gate_statistics,
    l0_penalty,
)
from batchshaping.priors import Beta
from batchshaping.training.schedules import Ramp
from batchshaping.viz_utils import COLORS, house_style, plot_density

__all__ = ["PRIOR", "Digits", "Outcome", "digits", "draw", "train"]

PRIOR = Beta(0.6, 0.4)
"""What the loss shapes every gate to: open or closed, and open for most examples."""

_GAMMA = Ramp(0.75, 0.0, begin=0.0, end=0.2)
_LAMBDA = Ramp(0.0, 0.5, begin=0.2, end=0.6)
_BATCH = 64
_LEARNING_RATE = 0.1
# In so few epochs, gates would not get far at the rate of the other layers.
_GATES_LEARNING_RATE = 0.3
_MILESTONES = (0.6, 0.75, 0.9)


class Digits(NamedTuple):
    """Images of shape (N, 1, 8, 8) with values in [0, 1], and their labels 0 ... 9 of shape (N,)."""

    images: Tensor
    labels: Tensor


def digits(seed: int) -> tuple[Digits, Digits]:
    """The handwritten digits that ship with scikit-learn, split at random into 1347 to train and 450 to test.

    Example:
        >>> train, test = digits(seed=0)
        >>> train.images.shape, test.images.shape
        (torch.Size([1347, 1, 8, 8]), torch.Size([450, 1, 8, 8]))
    """
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target)
    every = torch.arange(len(labels)).numpy()
    parts = train_test_split(every, test_size=0.25, stratify=data.target, random_state=seed)
    train, test = (Digits(images[part], labels[part]) for part in parts)
    return train, test


class _GatedBlock(nn.Module):
    """A residual block whose inner channels are switched for each example by a gate that reads its input."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.gate = ChannelGate(in_channels, channels)
        self.inner = nn.Sequential(_convolution(in_channels, channels, 3, stride), nn.ReLU())
        self.outer = _convolution(channels, channels, 3)
        same = in_channels == channels and stride == 1
        self.shortcut = nn.Identity() if same else _convolution(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.outer(self.gate(x) * self.inner(x)) + self.shortcut(x))


def _convolution(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def _network() -> nn.Sequential:
    """Three gated blocks of 32 channels, 96 gates in all."""
    return nn.Sequential(
        _convolution(1, 16, 3),
        nn.ReLU(),
        _GatedBlock(16, 32, stride=2),
        _GatedBlock(32, 32),
        _GatedBlock(32, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class Outcome(NamedTuple):
    """What a run came to, measured on the test set.

    Attributes:
        accuracy: share of digits that are recognized.
        gates: what the gates do.
        distance: the mean of the gates' batch-shaping losses to the prior.
        before: probabilities of being open before training, of shape (N, gates).
        after: those after training.
    """

    accuracy: float
    gates: GateStatistics
    distance: float
    before: Tensor
    after: Tensor


def train(
    *,
    shaped: bool,
    epochs: int = 40,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Train the network on the digits and measure it.

    Args:
        shaped: whether the batch-shaping loss takes part.
        epochs: how often every digit is seen, at least once.
        seed: of the split, the start, the order of the digits and the gates' noise; the same seed and number
            of epochs give the same outcome, whatever the state of PyTorch's own generator.
        progress: called after each epoch with the epochs done and all epochs.

    Raises:
        ValueError: if there is no epoch.

    Example:
        >>> outcome = train(shaped=True, epochs=1)
        >>> outcome.before.shape, outcome.after.shape
        (torch.Size([450, 96]), torch.Size([450, 96]))
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, received {epochs}")
    training, test = digits(seed)
    with _reproducible(seed):
        network = _network()
        _, before = _evaluate(network, test)
        _fit(network, training, epochs, shaped, progress)
        accuracy, after = _evaluate(network, test)
    return Outcome(
        accuracy=accuracy,
        gates=gate_statistics(after > 0.5),
        distance=batch_shaping(after, PRIOR, dim=0).item(),
        before=before,
        after=after,
    )


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """One stream of random numbers; and one thread, which sums in one order, and fast for a small net."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _fit(
    network: nn.Module,
    data: Digits,
    epochs: int,
    shaped: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    batches = len(data.labels) // _BATCH
    steps = epochs * batches
    optimizer = _optimizer(network)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(m * steps) for m in _MILESTONES])
    network.train()
    for epoch in range(epochs):
        order = torch.randperm(len(data.labels))[: batches * _BATCH]
        for batch, indices in enumerate(order.split(_BATCH)):
            done = (epoch * batches + batch) / steps
            loss = F.cross_entropy(network(data.images[indices]), data.labels[indices])
            gates = gate_probabilities(network)
            if shaped and _GAMMA(done) > 0:
                loss = loss + _GAMMA(done) * sum(batch_shaping(p, PRIOR, dim=0) for p in gates)
            loss = loss + _LAMBDA(done) * l0_penalty(gates)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        if progress is not None:
            progress(epoch + 1, epochs)


def _optimizer(network: nn.Module) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, and weight decay on everything but the gates."""
    gates = [p for module in network.modules() if isinstance(module, Gate) for p in module.parameters()]
    in_gates = set(gates)
    others = [p for p in network.parameters() if p not in in_gates]
    groups = [
        {"params": others, "lr": _LEARNING_RATE, "weight_decay": 5e-4},
        {"params": gates, "lr": _GATES_LEARNING_RATE, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


@torch.no_grad()
def _evaluate(network: nn.Module, data: Digits) -> tuple[float, Tensor]:
    """The accuracy, and the probabilities of all gates, of shape (N, gates)."""
    network.eval()
    correct = network(data.images).argmax(dim=1) == data.labels
    return correct.double().mean().item(), torch.cat(gate_probabilities(network), dim=1)


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
