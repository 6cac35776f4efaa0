"""What the gates of a model did, in a few numbers: the penalty of open gates, shares, counts by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchshaping.gates.gate import whole_number

__all__ = ["GateCounts", "GateStatistics", "gate_statistics", "l0_penalty"]


def l0_penalty(probabilities: Tensor | Sequence[Tensor]) -> Tensor:
    r"""The mean probability of being open, over all examples and gates.

    .. math::
        \frac{1}{N G} \sum_{n=1}^N \sum_{g=1}^G p_{n g}

    Args:
        probabilities: a tensor (N, gates), or one for each layer as
            :func:`~batchshaping.gates.gate.gate_probabilities` gives them, or
            :func:`~batchshaping.gates.gate.straight_through_decisions` where there is less than the full
            noise; every gate counts the same, whatever its layer.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: if there are no gates, or layers of different numbers of examples.

    References:
        Louizos, Welling and Kingma, Learning Sparse Neural Networks through L0 Regularization, ICLR 2018,
        https://arxiv.org/abs/1712.01312.

    Example:
        >>> l0_penalty([torch.full((2, 3), 0.5), torch.full((2, 1), 0.9)])
        tensor(0.6000)
    """
    return _all_gates(probabilities).mean()


class GateStatistics(NamedTuple):
    """What gates did over a data set, as shares in [0, 1].

    The first three are shares of the gates and add up to 1.
    """

    always_on: float
    always_off: float
    conditional: float
    mean_open: float


def gate_statistics(decisions: Tensor | Sequence[Tensor]) -> GateStatistics:
    """How many gates are open for every example, for none, or for some, and how many are open on average.

    Args:
        decisions: open or closed over a data set, of shape (N, gates), as booleans or as zeros and ones; or
            one such tensor for each layer, together then.

    Returns:
        The shares of gates always on, always off and conditional, and the mean share of open gates.

    Raises:
        ValueError: if there are no examples or no gates, layers of different numbers of examples, or a
            decision that is neither 0 nor 1.

    Example:
        >>> gate_statistics(torch.tensor([[1, 0, 1, 0], [1, 0, 0, 1]]))
        GateStatistics(always_on=0.25, always_off=0.25, conditional=0.5, mean_open=0.5)
    """
    counts = GateCounts(classes=1)
    decisions = _all_gates(decisions)
    counts.update([decisions], torch.zeros(len(decisions), dtype=torch.long, device="cpu"))
    return counts.statistics()


class GateCounts:
    """Counts over a data set, batch by batch, how often each gate is open for each class.

    Args:
        classes: how many there are, at least one.

    Attributes:
        open: for each layer, in how many examples of each class each gate was open: integers of shape
            (classes, gates).
        examples: how many examples of each class there were, of shape (classes,).

    Example:
        >>> counts = GateCounts(classes=2)
        >>> counts.update([torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])], torch.tensor([0, 1]))
        >>> counts.open
        [tensor([[1, 0, 1],
                [1, 0, 0]])]
        >>> counts.statistics().always_on
        0.3333333333333333
    """

    open: list[Tensor]
    examples: Tensor

    def __init__(self, classes: int) -> None:
        self.open = []
        self.examples = torch.zeros(whole_number("classes", classes, least=1), dtype=torch.long, device="cpu")

    def update(self, decisions: Sequence[Tensor], labels: Tensor) -> None:
        """Count a batch.

        Args:
            decisions: zeros and ones of shape (N, gates) a layer, as
                :func:`~batchshaping.gates.gate.gate_decisions` gives them.
            labels: the examples' classes 0, 1, ..., of shape (N,).

        Raises:
            ValueError: if shapes do not agree, a decision is neither 0 nor 1, or a label is no class. Nothing
                is counted then.
        """
        if labels.ndim != 1 or labels.is_floating_point():
            received = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise ValueError(f"labels must be integers of shape (N,), received {received}")
        labels = labels.to("cpu", torch.long)
        classes = len(self.examples)
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise ValueError(f"labels must be in 0, ..., {classes - 1}, received {wrong[0].item()}")
        shapes = [tuple(layer.shape) for layer in decisions]
        gates: list[Any] = [earlier.shape[1] for earlier in self.open]
        if not self.open:  # The first batch says how many gates there are.
            gates = [shape[1] if len(shape) == 2 else "gates" for shape in shapes]
        expected = [(len(labels), number) for number in gates]
        if shapes != expected:
            raise ValueError(f"decisions must have shapes (N, gates) = {expected}, received {shapes}")
        batch = []
        for layer in decisions:
            is_open = layer.bool()
            undecided = layer[layer != is_open]
            if len(undecided):
                raise ValueError(f"decisions must be 0 or 1, received {undecided[0].item():.6g}")
            empty = torch.zeros(classes, layer.shape[1], dtype=torch.long, device="cpu")
            batch.append(empty.index_add(0, labels, is_open.to("cpu", torch.long)))
        self.open = [old + new for old, new in zip(self.open, batch, strict=True)] if self.open else batch
        self.examples = self.examples + labels.bincount(minlength=classes)

    def statistics(self, layer: int | None = None) -> GateStatistics:
        """What the gates did over all examples so far.

        Args:
            layer: the index of one layer; all together by default.

        Raises:
            ValueError: if nothing was counted.
        """
        examples = self.examples.sum()
        if examples == 0:
            raise ValueError("there must be at least one example and one gate, received none")
        layers = self.open if layer is None else [self.open[layer]]
        total = torch.cat([counts.sum(dim=0) for counts in layers])
        always_on, always_off = total == examples, total == 0
        shares = (always_on, always_off, ~(always_on | always_off), total.double() / examples)
        return GateStatistics(*(share.double().mean().item() for share in shares))


def _all_gates(layers: Tensor | Sequence[Tensor]) -> Tensor:
    """Side by side, (N, gates of all layers)."""
    if not isinstance(layers, Tensor):
        shapes = [tuple(layer.shape) for layer in layers]
        if any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
            raise ValueError(f"layers must have shapes (N, gates) with the same N, received {shapes}")
        layers = torch.cat([*layers], dim=1) if shapes else torch.empty(0, 0, device="cpu")
    if layers.numel() == 0:
        raise ValueError(
            f"there must be at least one example and one gate, received shape {tuple(layers.shape)}"
        )
    return layers
