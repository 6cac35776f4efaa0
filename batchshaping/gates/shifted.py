"""Gates whose threshold is shifted: one trained network at another cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from batchshaping.gates.gate import Gate, named_gates

__all__ = ["ShiftedGate", "gates_shifted"]


class ShiftedGate:
    """Decides for a gate as it would if its logits were lower by the shift.

    In training gates decide as without it: the losses shape the logits themselves, whose threshold is 0.

    Args:
        gate: the gate.
        shift: what the logits exceed where it is open.
    """

    def __init__(self, gate: Gate, shift: float) -> None:
        self.gate = gate
        self.shift = shift

    def __call__(self, logits: Tensor) -> Tensor:
        if self.gate.training:
            return self.gate._decided(logits)
        if math.isinf(self.shift):
            return torch.full_like(logits, self.shift < 0)
        return self.gate._decided(logits - self.shift)


@contextmanager
def gates_shifted(model: nn.Module, shift: float) -> Iterator[None]:
    r"""Shift the threshold of all gates of a model in evaluation, so that it spends more or less.

    A gate is open iff

    .. math::
        \log \alpha > \text{shift}

    so that a higher shift closes gates, and with 0 they decide as always. It works on networks and on their
    inference copies, whatever family they are of; :func:`~batchshaping.gates.calibration.calibrate` finds the
    shift for a budget. Probabilities, and decisions in training, stay as they are.

    As with :func:`~batchshaping.gates.forced.gates_forced`, the innermost of several contexts decides, for
    all threads that run the model; a copy that is made of the model has its gates without the shift, so that
    an inference copy is shifted itself.

    Args:
        model: a module that holds :class:`~batchshaping.gates.gate.Gate` s.
        shift: of the threshold, in units of the logits; ``-math.inf`` opens all gates, ``math.inf`` closes
            all.

    Raises:
        ValueError: if the shift is not a number, or the model has no gates.

    Example:
        >>> import batchshaping as bs
        >>> network, x = bs.gated_resnet20().eval(), torch.randn(2, 3, 32, 32)
        >>> with torch.no_grad(), gates_shifted(network, -math.inf):
        ...     y = network(x)
        >>> bs.gate_decisions(network)[0].mean()
        tensor(1.)
    """
    if math.isnan(shift):
        raise ValueError(f"shift must be a number, received {shift}")
    shifted = [ShiftedGate(gate, float(shift)) for gate in named_gates(model).values()]
    try:
        for each in shifted:
            each.gate._forced = (*each.gate._forced, each)
        yield
    finally:
        for each in shifted:
            each.gate._forced = tuple(other for other in each.gate._forced if other is not each)
