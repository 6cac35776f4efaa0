"""A network with one gate an image, whose cost and answers at every shift are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from batchshaping.gates.cost import GateRun, Run, Term
from batchshaping.gates.gate import Gate


class OfInput(Gate):
    """A gate whose logits are its input."""

    def forward(self, logits: Tensor) -> Tensor:
        return self.decide(logits)


class Switch(nn.Module):
    """A fifth of the multiply-adds is always spent; where the gate is open, all.

    The first value of an image is the logit of its gate. The class is the second where the gate is closed,
    and the third where it is open; without such values it is 0 and 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = OfInput()
        self.fixed = nn.Linear(1, 1, bias=False)
        self.switched = nn.Linear(4, 1, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        decided = self.gate(self.logits(x[:, :1]))
        self.fixed(x[:, :1]), self.switched(x[:, :1].expand(-1, 4))
        if x.shape[1] == 1:
            x = torch.stack([x[:, 0], torch.zeros(len(x)), torch.ones(len(x))], dim=1)
        closed, opened = x[:, 1:].unbind(dim=1)
        chosen = torch.where(decided[:, 0] > 0, opened, closed).long()
        return nn.functional.one_hot(chosen, 2).float()

    def cost_terms(self, run: Run) -> Iterator[Term]:
        yield Spent(run.of("switched").name, run.of("switched").macs, (run.gate("gate"),))


class Spent:
    """The multiply-adds of a layer where its gate is open."""

    def __init__(self, layer: str, macs: float, gates: tuple[GateRun, ...]) -> None:
        self.layer, self.macs, self.gates = layer, macs, gates

    def per_example(self, gates: Mapping[str, Tensor]) -> Tensor:
        return self.macs * self.gates[0].of(gates)[:, 0]
