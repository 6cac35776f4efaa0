"""Small networks with gates, and what the tests of gates ask of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchshaping as bs
from batchshaping.gates.channel import ChannelGate
from batchshaping.gates.gate import gate_probabilities

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

temperatures = st.floats(0.05, 20.0)
some_logits = st.lists(st.floats(-50, 50), min_size=1, max_size=20)
seeds = st.integers(0, 2**32 - 1)


class Network(nn.Module):
    """Two gated layers, one inside of the other's module."""

    def __init__(self) -> None:
        super().__init__()
        self.first_gate = ChannelGate(3, 5)
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.inner = nn.ModuleDict({"gate": ChannelGate(5, 7), "layer": nn.Conv2d(5, 7, 3)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_gate(x) * self.first(x)
        x = self.inner["gate"](x) * self.inner["layer"](x)
        return x.mean(dim=(2, 3))


def images(n: int = 32) -> Tensor:
    return torch.randn(n, 3, 6, 6)


def shaping(probabilities: Sequence[Tensor]) -> Tensor:
    return torch.stack([bs.batch_shaping(p, bs.Beta(0.6, 0.4), dim=0) for p in probabilities]).sum()


def gradients(network: Network, forward: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    task = forward(x).square().mean()
    (task + shaping(gate_probabilities(network))).backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


class Checkpointed(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.network, x, use_reentrant=False)


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
