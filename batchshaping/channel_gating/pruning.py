"""What is left of a gated block without its static gates: those that are always open or always closed.

A channel whose gate is always closed contributes nothing: it goes, with its normalization and with the
weights that read it. A channel whose gate is always open needs no gate. Between two convolutions channels may
have any order, so that those without a gate are put at the end. A convolution with groups keeps its order and
its groups as a whole: one goes if all of its outputs are closed, and its gates go if all that stay are open.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from torch import Tensor, nn

from batchshaping.gates.channel import keep_channels
from batchshaping.gates.inference import fold_and_pack
from batchshaping.gates.packed import folded

__all__ = ["ClosedBlock", "GatedLayer", "Kept", "keep_layers", "what_stays"]


class GatedLayer(NamedTuple):
    """The channels between two convolutions, and what is known of their gates.

    Attributes:
        sizes: how many channels each gate switches; one number more is that of channels without a gate.
        always: whether each gate is always open (True), always closed (False) or neither (None).
        groups: groups of the convolution that reads these channels.
        can_be_cut: whether channels can be left out and change places.
    """

    sizes: Sequence[int]
    always: Sequence[bool | None]
    groups: int
    can_be_cut: bool


class Kept(NamedTuple):
    """What stays of the channels between two convolutions.

    Attributes:
        channels: indices of the channels that stay, in their new order.
        gates: indices of the gates that stay.
        sizes: how many channels each of them switches, and as one number more how many no gate does.
    """

    channels: list[int]
    gates: list[int]
    sizes: list[int]


def what_stays(layers: Sequence[GatedLayer], may_close: bool = True) -> list[Kept] | None:
    """What stays of the channels of a block, layer by layer; None if no channel of the last layer does.

    A channel stays if its gate is ever open and if something reads it. The first gate of a layer stays where
    it would be left without a channel, but the next one would not.

    Args:
        layers: the channels after each convolution but the last, in their order.
        may_close: whether the last layer may be left without a channel.

    Example:
        >>> what_stays([GatedLayer((2, 2, 2), (True, False, None), groups=1, can_be_cut=True)])
        [Kept(channels=[4, 5, 0, 1], gates=[2], sizes=[2, 2])]
    """
    stays = [_is_ever_open(layer) for layer in layers]
    if may_close and not any(stays[-1]):
        return None
    _stay_if_empty(stays[-1], layers[-1])
    tied = [False] * len(layers)
    for k in reversed(range(len(layers) - 1)):
        before, after = layers[k : k + 2]
        if before.groups > 1:
            tied[k] = tied[k + 1] = True
            parts = [_in_parts(channels, before.groups) for channels in stays[k : k + 2]]
            of_group = [any(part) or not (before.can_be_cut and after.can_be_cut) for part in parts[1]]
            stays[k : k + 2] = [
                [stay for stay, part in zip(of_group, layer, strict=True) for _ in part] for layer in parts
            ]
        else:
            _stay_if_empty(stays[k], before)
    return [
        _kept(layer, channels, may_move=layer.can_be_cut and not is_tied)
        for layer, channels, is_tied in zip(layers, stays, tied, strict=True)
    ]


def _is_ever_open(layer: GatedLayer) -> list[bool]:
    """For each channel whether it is ever open, or cannot be left out."""
    always = [*layer.always, True]
    return [
        always[gate] is not False or not layer.can_be_cut
        for gate, size in enumerate(layer.sizes)
        for _ in range(size)
    ]


def _stay_if_empty(stays: list[bool], layer: GatedLayer) -> None:
    if not any(stays):
        stays[: layer.sizes[0]] = [True] * layer.sizes[0]


def _in_parts(channels: list[bool], groups: int) -> list[list[bool]]:
    width = len(channels) // groups
    return [channels[first : first + width] for first in range(0, len(channels), width)]


def _kept(layer: GatedLayer, stays: Sequence[bool], may_move: bool) -> Kept:
    always = [*layer.always, True]
    by_gate = [
        [channel for channel in range(first, end) if stays[channel]]
        for first, end in pairwise(accumulate(layer.sizes, initial=0))
    ]
    left = [gate for gate, channels in enumerate(by_gate) if channels]
    if may_move or all(always[gate] is True for gate in left):
        gates = [gate for gate in left if always[gate] is not True]
    else:
        gates = [gate for gate in left if gate < len(layer.always)]
    order = [*gates, *(gate for gate in left if gate not in gates)]
    channels = [channel for gate in order for channel in by_gate[gate]]
    sizes = [len(by_gate[gate]) for gate in gates]
    without = len(channels) - sum(sizes)
    return Kept(channels, gates, [*sizes, *[without] * (without > 0)])


def keep_layers(
    convolutions: Sequence[nn.Conv2d], between: Sequence[Sequence[nn.Module]], kept: Sequence[Kept]
) -> None:
    """Leave out all channels between convolutions but some, in place.

    Args:
        convolutions: the convolutions in their order.
        between: the layers after each of them but the last, which treat each channel alone.
        kept: the channels that stay after each of them but the last.
    """
    for convolution, after, layers, stay in zip(convolutions, convolutions[1:], between, kept, strict=False):
        channels = convolution.out_channels
        if stay.channels == [*range(channels)]:
            continue
        for layer in (convolution, *layers):
            keep_channels(layer, channels, stay.channels)
        if after.groups > 1:
            after.groups = after.groups * len(stay.channels) // channels
        else:
            weight = after.weight
            after.weight = nn.Parameter(weight.detach()[:, stay.channels], weight.requires_grad)
        after.in_channels = len(stay.channels)


class ClosedBlock(nn.Module):
    r"""What a residual block is whose gates are always closed: its shortcut and a bias.

    .. math::
        x' = \mathrm{ReLU}(\mathrm{shortcut}(x) + b)

    It has no constructor of its own: a block becomes one (:meth:`take_the_place_of`), with its hooks and its
    other layers.
    """

    bias: nn.Parameter
    downsample: nn.Module | None
    _after: tuple[str, ...]
    _last: str

    @classmethod
    def take_the_place_of(cls, block: nn.Module, convolution: str, after: Sequence[str], last: str) -> None:
        """Make a block one, in place.

        Args:
            block: a residual block.
            convolution: name of its last convolution.
            after: names of the layers after that, first a normalization that can be folded in.
            last: name of the activation after the shortcut is added.
        """
        norm, *others = after
        layer = getattr(block, convolution)
        _, bias = folded(layer, getattr(block, norm))
        learns = any(p.requires_grad for p in (*layer.parameters(), *getattr(block, norm).parameters()))
        for name in [*block._modules]:
            if name not in ("downsample", last, *others):
                del block._modules[name]
        block.__class__ = cls
        block.bias = nn.Parameter(bias, learns)
        block._after, block._last = tuple(others), last  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        branch = self.bias.reshape(-1, 1, 1).expand_as(shortcut)
        for name in self._after:
            layer = getattr(self, name)
            branch = branch if layer is None else layer(branch)
        output: Tensor = getattr(self, self._last)(shortcut + branch)
        return output

    def inference_twin(self) -> nn.Module:
        """The same for inference, with the convolutions of the shortcut packed."""
        twin = copy.deepcopy(self).eval()
        if twin.downsample is not None:
            twin.downsample = fold_and_pack(twin.downsample)
        return twin
