"""Multiply-adds of layers that compute tokens, as a function of which regions are fine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchshaping.gates.cost import GateRun

__all__ = ["TokenTerm"]


@dataclass(frozen=True, eq=False)
class TokenTerm:
    r"""A layer whose cost is proportional to the number of tokens, or to its square.

    With gates g, the number of tokens is :math:`T = a + \sum_r b_r g_r`. For probabilities p in their place
    the expectation over independent gates is exact too, also that of the square:

    .. math::
        \mathrm{E}[T^2] = \mathrm{E}[T]^2 + \sum_r b_r^2 \, p_r (1 - p_r)

    For decisions the sum is 0, and its gradient makes that of a decision what flipping it changes.

    Attributes:
        layer: its name.
        macs: multiply-adds of a token, or of a pair of tokens.
        run: the run of the gates.
        coarsest: a, the number of tokens that it computes where all regions are coarse.
        more: b, how many more it computes for each region that is fine.
        degree: 1, or 2 for pairs of tokens.
    """

    layer: str
    macs: float
    run: GateRun
    coarsest: int
    more: Tensor
    degree: int = 1

    @property
    def gates(self) -> Sequence[GateRun]:
        """The run of the gates."""
        return (self.run,)

    def per_example(self, gates: Mapping[str, Tensor]) -> Tensor:
        """Multiply-adds of each example, of shape (N,)."""
        values = self.run.of(gates)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        more = self.more.to(values)
        tokens = self.coarsest + values @ more
        if self.degree == 1:
            return self.macs * tokens
        return self.macs * (tokens.square() + (values * (1 - values)) @ more.square())
