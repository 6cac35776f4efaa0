"""Gates that chance decides for, whatever they compute: for tests, benchmarks and what-if."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from batchshaping.gates.gate import is_recomputing, named_gates, whole_number

__all__ = ["gates_forced"]


class _Forced:
    """Decides at random, whatever the logits are.

    Chance follows from the seed, the gate and the number of the model's forward pass, so that what runs again
    in the backward pass, to save memory, meets the same decisions. So a gate that runs several times in one
    forward pass decides the same each time.
    """

    def __init__(self, share: float, seed: int) -> None:
        self.share = share
        self.seed = seed
        self.passes = 0
        self.drawn: dict[int, Tensor] = {}
        # torch.compile does not know the hash, and calls this as it is. Here, since to say so loads the
        # compiler, which takes as long as torch itself.
        self.chance = torch.compiler.disable(_chance)

    def draw(self, gate: int, last: Tensor) -> None:
        """Decide beforehand for a pass like the last one: where time is measured, chance takes none."""
        self.passes += 1
        self.drawn[gate] = self(last, gate)
        self.passes -= 1

    def count(self, *_: object) -> None:
        """Another forward pass begins, unless it is one within a backward pass."""
        self.passes += not is_recomputing()

    def __call__(self, logits: Tensor, gate: int) -> Tensor:
        drawn = None if torch.compiler.is_compiling() else self.drawn.pop(gate, None)
        if drawn is not None and self.passes == 1 and _are_alike(drawn, logits):
            return drawn
        if self.share in (0, 1):
            return torch.full_like(logits, self.share)
        decisions: Tensor = self.chance(self.share, f"{self.seed} {gate} {self.passes}", logits)
        return decisions


def _are_alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _chance(share: float, key: str, logits: Tensor) -> Tensor:
    """Zeros and ones of the logits' shape by a hash: making a random generator takes longer than a gate."""
    numbers = np.frombuffer(hashlib.shake_128(key.encode()).digest(4 * logits.numel()), "<u4")
    return torch.from_numpy((numbers < share * 2**32).reshape(logits.shape)).to(logits)


@contextmanager
def gates_forced(model: nn.Module, share: float, seed: int = 0) -> Iterator[None]:
    """Let chance decide for the gates of a model, whatever they compute: for tests, benchmarks and what-if.

    Args:
        model: a module that holds :class:`~batchshaping.gates.gate.Gate` s.
        share: each gate is open for each example with this probability: 1 opens all, 0 closes all.
        seed: of the decisions, not negative; the same seed and batches give the same decisions, on every
            device. A backward pass that computes layers again belongs within the context too.

    Raises:
        ValueError: if the share is not in [0, 1], the seed is negative or no integer, or the model has no
            gates.

    Example:
        >>> import batchshaping as bs
        >>> gate = bs.ChannelGate(8, 4).eval()
        >>> with gates_forced(gate, share=1.0):
        ...     gate(torch.randn(2, 8))
        tensor([[1., 1., 1., 1.],
                [1., 1., 1., 1.]])
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], received {share}")
    gates = named_gates(model).values()
    forced = _Forced(share, whole_number("seed", seed, least=0))
    counting = model.register_forward_pre_hook(forced.count)
    try:
        for index, gate in enumerate(gates):
            gate._forced = (*gate._forced, partial(forced, gate=index))
            # A tracer leaves what is no tensor.
            if gate._runs and isinstance(gate._runs[-1][0], Tensor):
                forced.draw(index, gate._runs[-1][0])
        yield
    finally:
        counting.remove()
        for gate in gates:
            gate._forced = tuple(f for f in gate._forced if getattr(f, "func", None) is not forced)
