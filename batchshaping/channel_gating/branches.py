"""A gated block as a program with branches, one for each gate: for torch.export, and what is made of that.

An exported program has no Python that could choose what to run. What it can have are branches
(:func:`~batchshaping.gates.export.choose`): here one for each gate, around the slices of the convolutions
that the gate switches. The slices are parts of constant weights, so that a runtime can prepare each of them
once.

The decisions of one image choose a branch. So a program for one image has branches; one for batches computes
all channels and sets closed ones to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchshaping.gates.channel import to_channels
from batchshaping.gates.export import choose
from batchshaping.gates.packed import PackedConvolution

__all__ = ["DENSE_ABOVE", "MOST_BRANCHES", "BranchedLayer", "add_branches", "can_branch"]

MOST_BRANCHES = 16
"""A layer with more gates has no branches, which would be too small to be fast."""

DENSE_ABOVE = 0.7
"""Above this share of open gates all channels are computed: few large convolutions are faster then."""


class BranchedLayer(NamedTuple):
    """A convolution whose output channels are switched by gates.

    Attributes:
        convolution: with the normalization, and a ReLU if that follows, folded in.
        activation: what follows it, if that is no ReLU.
        sizes: how many channels each gate switches; one number more is that of channels without a gate.
        gates: how many gates there are.
    """

    convolution: PackedConvolution
    activation: nn.Module | None
    sizes: tuple[int, ...]
    gates: int

    def compute(self, x: Tensor, channels: slice = slice(None)) -> Tensor:
        """Some of the output channels, or all."""
        layer = self.convolution
        y = F.conv2d(x, layer.weight[channels].contiguous(), layer.bias[channels], *layer.settings)
        y = y.relu() if layer.relu else y
        return (y if self.activation is None else self.activation(y)).contiguous()

    def parts(self, decided: Tensor) -> list[tuple[slice, Tensor | None]]:
        """The channels of each gate, with whether it is open; None for those without a gate."""
        ends = pairwise(accumulate(self.sizes, initial=0))
        return [
            (slice(first, end), decided[0, k] > 0 if k < self.gates else None)
            for k, (first, end) in enumerate(ends)
        ]


def can_branch(x: Tensor, layers: Sequence[BranchedLayer]) -> bool:
    """Whether a program for these images has branches."""
    one_image = isinstance(x.shape[0], int) and x.shape[0] == 1
    return (
        one_image
        and any(layer.gates for layer in layers)
        and all(layer.gates <= MOST_BRANCHES and layer.convolution.groups == 1 for layer in layers)
    )


def add_branches(
    x: Tensor,
    other: Tensor,
    gates: Sequence[Tensor],
    layers: Sequence[BranchedLayer],
    last: PackedConvolution,
) -> Tensor:
    """The residual branch of a block added to another image.

    Args:
        x: the input of the block, one image.
        other: what is added, of the shape of the output.
        gates: for each switched convolution, zero or one for each of its ``sizes``, of shape (1, sizes).
        layers: the switched convolutions in their order.
        last: the last convolution.
    """

    def dense(x: Tensor, other: Tensor, *gates: Tensor) -> Tensor:
        for layer, decided in zip(layers, gates, strict=True):
            x = layer.compute(x) * to_channels(decided, layer.sizes)[:, :, None, None]
        y = F.conv2d(x, last.weight.contiguous(), last.bias, *last.settings)
        return (other + y).contiguous()

    def sparse(x: Tensor, other: Tensor, *gates: Tensor) -> Tensor:
        for layer, decided in zip(layers[:-1], gates, strict=False):
            x = torch.cat([_part(x, layer, *part) for part in layer.parts(decided)], dim=1)
        y = (other + last.bias[:, None, None]).contiguous()
        for channels, is_open in layers[-1].parts(gates[-1]):
            y = _added(y, x, layers[-1], last, channels, is_open)
        return y

    share = torch.cat(
        [decided[:, : layer.gates] for layer, decided in zip(layers, gates, strict=True)], dim=1
    ).mean()
    operands = (x.contiguous(), other.contiguous(), *gates)
    return choose(share > DENSE_ABOVE, dense, sparse, operands)


def _part(x: Tensor, layer: BranchedLayer, channels: slice, is_open: Tensor | None) -> Tensor:
    """The channels of a gate, zeros if it is closed."""

    def opened(x: Tensor) -> Tensor:
        return layer.compute(x, channels)

    if is_open is None:
        return opened(x)

    def closed(x: Tensor) -> Tensor:
        # Of the same shape; a number in a branch would be taken for one that changes.
        return torch.zeros_like(layer.compute(x, channels))

    return choose(is_open, opened, closed, (x,))


def _added(
    y: Tensor,
    x: Tensor,
    layer: BranchedLayer,
    last: PackedConvolution,
    channels: slice,
    is_open: Tensor | None,
) -> Tensor:
    """What the channels of a gate add to the output, if it is open."""

    def opened(y: Tensor, x: Tensor) -> Tensor:
        weight = last.weight[:, channels].contiguous()
        return (y + F.conv2d(layer.compute(x, channels), weight, None, *last.settings)).contiguous()

    def closed(y: Tensor, x: Tensor) -> Tensor:
        return y.clone()

    if is_open is None:
        return opened(y, x)
    return choose(is_open, opened, closed, (y, x))
