r"""What takes the place of a gated residual block in inference: it computes the open channels only.

The gates of a block cut the channels between its convolutions into groups, and

.. math::
    y = \sum_{g \text{ open}} W_2^g * \mathrm{ReLU}(W_1^g * x + b_1^g) + b_2

is a sum over groups like experts, which run or do not. On the CPU native code computes it
(:mod:`~batchshaping.gates.native`), several blocks at a time. Where there is none, so for other devices and
precisions, for convolutions with groups, and without a compiler, there are several ways to compute it:

- *gathered*: one convolution each with the weights of the open channels side by side. Copying them costs
  little where they are few and pixels many. Where it is the other way round, convolutions are products of
  matrices, which read the open channels in place;
- *masked*: all channels, and closed ones are set to zero. This is best where nearly all gates are open.

A batch whose images have different gates is computed image by image, with a thread for each, or group by
group, each for the images that have it open.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchshaping.channel_gating.branches import BranchedLayer, add_branches, can_branch
from batchshaping.gates import native
from batchshaping.gates.channel import ChannelGate, to_channels
from batchshaping.gates.cost import ConvolutionTerm, Run, convolution_terms
from batchshaping.gates.gate import Gate, OneStep, is_exporting
from batchshaping.gates.packed import (
    PackedConvolution,
    channels_last,
    convolve,
    convolve_add,
    folded,
    is_plain,
)
from batchshaping.gates.shifted import ShiftedGate
from batchshaping.gates.workers import side_by_side

__all__ = ["ConditionalBlock", "FoldedGate", "OpenChannels", "Step", "SwitchedConvolution", "open_channels"]


# Open channels


@dataclass(frozen=True)
class OpenChannels:
    """Which channels of a layer are open.

    Attributes:
        gates: indices of the open gates.
        runs: first channel, and the one after the last, of each run of open channels.
        channels: how many are open.
        is_all: whether all are.
    """

    gates: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    channels: int
    is_all: bool

    def index(self, device: torch.device) -> Tensor:
        """The indices of the open channels."""
        channels = [channel for first, end in self.runs for channel in range(first, end)]
        return torch.tensor(channels, device=device)

    def select(self, values: Tensor, dim: int) -> Tensor:
        """The values of the open channels along a dimension; a view if they are neighbours."""
        if self.is_all:
            return values
        if len(self.runs) > _MANY_RUNS:
            return values.index_select(dim, self.index(values.device))
        parts = [values.narrow(dim, first, end - first) for first, end in self.runs]
        if len(parts) > 1:
            return torch.cat(parts, dim)
        return parts[0] if parts else values.narrow(dim, 0, 0)


_MANY_RUNS = 16
"""Above so many runs, channels are copied by index instead of run by run."""


@lru_cache(maxsize=1024)
def open_channels(sizes: tuple[int, ...], decisions: Decisions) -> OpenChannels:
    """Which channels gates open.

    Args:
        sizes: how many channels each gate switches.
        decisions: of each gate, 0 or 1.

    Example:
        >>> open_channels((3, 3, 2, 2), (1.0, 0.0, 1.0, 1.0)).runs
        ((0, 3), (6, 10))
    """
    gates: list[int] = []
    runs: list[tuple[int, int]] = []
    end = 0
    for gate, (size, is_open) in enumerate(zip(sizes, decisions, strict=True)):
        first, end = end, end + size
        if is_open:
            gates.append(gate)
            # A neighbour of the last run continues it.
            begin = runs.pop()[0] if runs and runs[-1][1] == first else first
            runs.append((begin, end))
    channels = sum(stop - first for first, stop in runs)
    return OpenChannels(tuple(gates), tuple(runs), channels, channels == end)


Gates = tuple[int, ...]
"""Indices of gates."""

Decisions = tuple[bool, ...]
"""Whether each gate is open."""


# A convolution of open channels


class SwitchedConvolution(PackedConvolution):
    """A convolution for inference whose input channels, output channels or both are switched by gates.

    Args:
        layer: the convolution.
        norm: the batch normalization after it, or None.
        relu: whether a ReLU follows.
        inputs: how many input channels each gate switches; None if all are computed.
        outputs: how many output channels each gate switches; None if all are computed.
    """

    def __init__(
        self,
        layer: nn.Conv2d,
        norm: nn.Module | None,
        relu: bool,
        inputs: tuple[int, ...] | None,
        outputs: tuple[int, ...] | None,
    ) -> None:
        super().__init__(layer, norm, relu)
        self.inputs = inputs
        self.outputs = outputs
        self.unit = layer.in_channels if inputs is None else math.gcd(*inputs)

    # Gate by gate

    def of_gate(self, gate: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the output channels that a gate switches."""
        sizes = self.outputs or ()
        return channels_last(self.weight.split(sizes)[gate]), self.bias.split(sizes)[gate]

    def by_input_gate(self) -> Sequence[Tensor]:
        """The weight of the input channels of each gate, copied once."""
        sizes = self.inputs or ()
        return self.kept("by input gate", lambda: map(channels_last, self.weight.split(sizes, dim=1)))

    # All open channels at once

    def of_open(self, x: Tensor, inputs: OpenChannels | None, outputs: OpenChannels) -> Tensor:
        """The open output channels, side by side, of the open input channels, side by side."""
        if outputs.channels == 0 or (inputs is not None and inputs.channels == 0):
            return self._constant(x, outputs)
        if self.groups > 1:
            return self._of_open_groups(x, inputs, outputs)
        if self._is_product(x):
            return self._product(x, inputs, outputs)
        weight = self._gathered(inputs, outputs)
        return convolve(x, weight, outputs.select(self.bias, 0), self.settings, self.relu)

    def can_be_cut(self) -> bool:
        """Whether its gates switch whole groups of the convolution, the same of inputs and of outputs."""
        width = self.weight.shape[0] // self.groups
        sizes = self.inputs or ()
        return self.groups == 1 or (self.inputs == self.outputs and all(size % width == 0 for size in sizes))

    def add_open(self, x: Tensor, inputs: OpenChannels, other: Tensor, relu: bool, inplace: bool) -> Tensor:
        """What the open input channels, side by side, add to all output channels."""
        if not self._is_product(x):
            weight = self._gathered(inputs, None)
            return convolve_add(other, x, weight, self.bias, self.settings, relu, inplace)
        pixels = _as_matrix(other)
        y = pixels.add_(self.bias) if inplace else pixels + self.bias
        for columns, weight in self._factors(x, inputs):
            y.addmm_(columns, weight)
        if relu:
            y.relu_()
        return _as_images(y, *other.shape[2:])

    def size(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the output for some images."""
        return self.size_of((x.shape[2], x.shape[3]))

    def _constant(self, x: Tensor, outputs: OpenChannels) -> Tensor:
        """The open output channels where no input channel is open."""
        bias = outputs.select(self.bias, 0)
        value = (bias.relu() if self.relu else bias).reshape(1, -1, 1, 1)
        return channels_last(value.expand(len(x), -1, *self.size(x)))

    def _of_open_groups(self, x: Tensor, inputs: OpenChannels | None, outputs: OpenChannels) -> Tensor:
        """The same for a convolution with groups: those of the open outputs, and zeros for closed inputs."""
        assert inputs is not None
        if inputs.runs != outputs.runs:
            spread = x.new_zeros(len(x), len(self.weight), *x.shape[2:])
            spread.index_copy_(1, inputs.index(x.device), x)
            x = channels_last(outputs.select(spread, 1))
        groups = self.groups * outputs.channels // len(self.weight)
        weight = self._gathered(None, outputs)
        settings = self.settings._replace(groups=groups)
        return convolve(x, weight, outputs.select(self.bias, 0), settings, self.relu)

    def _gathered(self, inputs: OpenChannels | None, outputs: OpenChannels | None) -> Tensor:
        """The weights of the open channels."""
        weight = self.weight.permute(0, 2, 3, 1)
        if outputs is not None:
            weight = outputs.select(weight, 0)
        if inputs is not None:
            weight = inputs.select(weight, 3)
        return weight.permute(0, 3, 1, 2)

    # As products of matrices, whose parts are read in place

    def _is_product(self, x: Tensor) -> bool:
        """Whether there are fewer pixels than channels, so that weights are what is large."""
        height, width = self.size(x)
        return len(x) * height * width <= len(self.weight)

    def _product(self, x: Tensor, inputs: OpenChannels | None, outputs: OpenChannels) -> Tensor:
        height, width = self.size(x)
        if len(outputs.runs) > _MANY_RUNS and (inputs is None or inputs.is_all):
            weight = outputs.select(self._matrix(), 0)
            y = torch.addmm(outputs.select(self.bias, 0), self._columns(x), weight.t())
        elif len(outputs.runs) > _MANY_RUNS or (inputs is not None and len(inputs.runs) > _MANY_RUNS):
            y = self.bias.expand(len(x) * height * width, -1).contiguous()
            for columns, weight in self._factors(x, inputs):
                y.addmm_(columns, weight)
            y = outputs.select(y, 1)
        else:
            y = x.new_empty(len(x) * height * width, outputs.channels)
            factors = [*self._factors(x, inputs)]
            at = 0
            for first, end in outputs.runs:
                part = y[:, at : at + end - first]
                at += end - first
                for k, (columns, weight) in enumerate(factors):
                    torch.addmm(part if k else self.bias[first:end], columns, weight[:, first:end], out=part)
        return _as_images(y.relu_() if self.relu else y, height, width)

    def _factors(self, x: Tensor, inputs: OpenChannels | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of matrices, pixels x rows and rows x output channels, whose products add up."""
        columns = self._columns(x)
        if inputs is None or inputs.is_all:
            yield columns, self._matrix().t()
            return
        rows = self.weight[0, 0].numel()
        if len(inputs.runs) > _MANY_RUNS:
            (by_input,) = self.kept("by input", lambda: [self._matrix().t().contiguous()])
            by_unit = by_input.view(-1, rows * self.unit, by_input.shape[1])
            unit = inputs.index(x.device)[:: self.unit] // self.unit
            yield columns, by_unit.index_select(0, unit).flatten(0, 1)
            return
        at = 0
        for first, end in inputs.runs:
            length = (end - first) * rows
            yield columns[:, at : at + length], self._matrix()[:, first * rows : end * rows].t()
            at += length

    def _matrix(self) -> Tensor:
        """The weights, output channels x rows: unit by unit of input channels, place by place within it."""
        (matrix,) = self.kept("matrix", lambda: [self._make_matrix()])
        return matrix

    def _make_matrix(self) -> Tensor:
        outputs, _, height, width = self.weight.shape
        by_unit = self.weight.permute(0, 2, 3, 1).reshape(outputs, height, width, -1, self.unit)
        return by_unit.permute(0, 3, 1, 2, 4).reshape(len(self.weight), -1)

    def _columns(self, x: Tensor) -> Tensor:
        """What each output pixel sees, pixels x rows, in the order of the weights."""
        (down, right), (top, left), (low, wide), _ = self.settings
        height, width = self.weight.shape[2:]
        if (height, width) == (down, right) == (1, 1) and (top, left) == (0, 0):
            return _as_matrix(x)
        n, channels = x.shape[:2]
        padded = x.new_zeros(n, x.shape[2] + 2 * top, x.shape[3] + 2 * left, channels)
        padded[:, top : top + x.shape[2], left : left + x.shape[3]].copy_(x.permute(0, 2, 3, 1))
        of_image, of_row, of_pixel, _ = padded.stride()
        unit = min(self.unit, channels)
        sees = padded.as_strided(
            (n, *self.size(x), channels // unit, height, width, unit),
            (of_image, down * of_row, right * of_pixel, unit, low * of_row, wide * of_pixel, 1),
        )
        return sees.reshape(math.prod(sees.shape[:3]), -1)


def _as_matrix(x: Tensor) -> Tensor:
    """Images in the order of channels_last as a matrix, pixels x channels, without a copy."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _as_images(y: Tensor, height: int, width: int) -> Tensor:
    return y.view(-1, height, width, y.shape[1]).permute(0, 3, 1, 2)


# The block


class FoldedGate(Gate):
    """A channel gate for inference, with its batch normalization folded in.

    It reads the sums of the feature maps, since the gates of a block share them, and gives what each gate
    decided, since channels are switched by leaving them out. It is made in single precision at least: a
    decision has no rounding error that is small.

    Args:
        gate: the gate; its weights are copied.

    Attributes:
        sizes: how many channels each gate switches; one number more is that of channels without a gate.
        gates: how many gates there are.

    Shape:
        From sums (N, channels) to zeros and ones (N, sizes), where channels without a gate are open.
    """

    sizes: tuple[int, ...]
    first_weight: Tensor
    first_bias: Tensor
    last_weight: Tensor
    last_bias: Tensor

    def __init__(self, gate: ChannelGate) -> None:
        layers: Any = gate.to_logits
        first, norm, _, last = layers
        super().__init__(gate.temperature, device="cpu")
        self.sizes = gate.sizes or (1,) * gate.gates
        self.gates = gate.gates
        self._has_ungated = len(self.sizes) > self.gates
        least = torch.promote_types(last.weight.dtype, torch.float32)
        for name, layer, after in (("first", first, norm), ("last", last, None)):
            weight, bias = folded(copy.deepcopy(layer).to(least), after)
            self.register_buffer(f"{name}_weight", weight.t().contiguous())
            self.register_buffer(f"{name}_bias", bias)
        self.to(last.weight.device)

    def forward(self, sums: Tensor, scale: float = 1.0) -> Tensor:
        """Zeros and ones of shape (N, sizes), from sums over pixels and one over their number."""
        return self._with_ungated(self.decide(self._logits(sums, scale)))

    def rows(self, sums: Tensor, scale: float) -> tuple[Tensor, list[Decisions]]:
        """What is positive where a gate is open, and whether each is, in as few operations as can be."""
        logits = self._logits(sums, scale)
        if self._forced:
            logits = self.decide(logits)
        else:
            self._keep(logits, None)
        positive = self._with_ungated(logits)
        return positive, _rows(positive)

    def forced_for(self, images: int) -> Tensor | float | None:
        """What decides in place of logits above 0: zeros and ones for the images, or another threshold."""
        if not self._forced:
            return None
        decide = self._forced[-1]
        if isinstance(decide, ShiftedGate):
            return decide.shift
        like = self._buffers["last_bias"].new_empty((images, self.gates))  # type: ignore[union-attr]
        return decide(like).contiguous()

    def keep_run(self, logits: Tensor, forced: Tensor | float | None) -> None:
        """Keep what was computed elsewhere, with what decided."""
        self._keep(logits, (logits > forced).to(logits) if isinstance(forced, float) else forced)

    def gating(self) -> native.Gating:
        """As native code reads it."""
        return native.Gating(self.sizes, self.first_weight, self.first_bias, self.last_weight, self.last_bias)

    def _logits(self, sums: Tensor, scale: float) -> Tensor:
        first = torch.addmm(self.first_bias, sums.to(self.first_weight.dtype), self.first_weight, alpha=scale)
        return torch.addmm(self.last_bias, first.relu_(), self.last_weight)

    def _with_ungated(self, values: Tensor) -> Tensor:
        return F.pad(values, (0, 1), value=1.0) if self._has_ungated else values

    def _decided(self, logits: Tensor) -> Tensor:
        # The same as binary_concrete in evaluation, without what a gradient would need.
        return (logits > 0).to(logits.dtype)


class Ungated(nn.Module):
    """What a layer without gates has in the place of a :class:`FoldedGate`: all of its channels are open.

    Args:
        channels: how many there are.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sizes, self.gates = (channels,), 0

    def forward(self, sums: Tensor, scale: float = 1.0) -> Tensor:
        """Ones of shape (N, 1)."""
        return sums.new_ones(sums.shape[0], 1)

    def gating(self) -> None:
        """As :meth:`FoldedGate.gating`: nothing."""

    def rows(self, sums: Tensor, scale: float) -> tuple[Tensor, list[Decisions]]:
        """As :meth:`FoldedGate.rows`."""
        return self.forward(sums), [(True,)] * sums.shape[0]


class Step(NamedTuple):
    """A convolution of a block, with what belongs to it.

    Attributes:
        name: of the convolution in the block.
        layer: the convolution.
        norm: the batch normalization after it, which is folded in; None if there is none.
        activation: what comes after that; None if there is nothing.
        gate: name and module of the gates of its output; None if all channels are computed.
    """

    name: str
    layer: nn.Conv2d
    norm: nn.Module | None
    activation: nn.Module | None
    gate: tuple[str, ChannelGate] | None


def _folded_gate(step: Step) -> FoldedGate | Ungated:
    return Ungated(step.layer.out_channels) if step.gate is None else FoldedGate(step.gate[1])


class _Batch(NamedTuple):
    """What a block computes.

    Attributes:
        x: its input.
        other: what the residual branch is added to, of the shape of the output.
        decisions: for each image whether each gate is open, those of all layers side by side.
        gates: the same, of shape (N, gates), one tensor a layer, positive where a gate is open.
        inplace: whether the result may take the place of ``other``.
    """

    x: Tensor
    other: Tensor
    decisions: Sequence[Decisions]
    gates: Sequence[Tensor]
    inplace: bool


_OfOpen = Callable[[Tensor, Tensor, Decisions, bool], Tensor]
"""Computes images that have the same gates: input, what is added, decisions, whether that is in place."""


class _Inner(NamedTuple):
    """A convolution of a block that has gates, with those, and what follows it if that is no ReLU."""

    convolution: SwitchedConvolution
    gate: FoldedGate | Ungated
    activation: nn.Module | None

    def activated(self, y: Tensor) -> Tensor:
        """What follows the convolution."""
        return y if self.activation is None else self.activation(y)

    def mask(self, decided: Tensor, y: Tensor) -> Tensor:
        """One for the channels whose gates are open, where the values are positive."""
        return to_channels((decided > 0).to(y.dtype), self.gate.sizes)[:, :, None, None]


class ConditionalBlock(OneStep):
    """A gated residual block for inference, which computes the open channels only.

    Args:
        steps: its convolutions in their order. The last has no gates.
        downsample: what the shortcut computes, or None.
        end: what comes after the last convolution in the residual branch, or None.
        activation: what comes after the sum.

    Attributes:
        plans: the fastest ways that were measured, by the size of the images and by whether there are
            several. Each is the largest share of open gates for which a way is used, with its name.
    """

    downsample: nn.Module | None
    end: nn.Module | None

    def __init__(
        self,
        steps: Sequence[Step],
        downsample: nn.Module | None,
        end: nn.Module | None,
        activation: nn.Module,
    ) -> None:
        super().__init__()
        self.plans: dict[tuple[int, ...], tuple[tuple[float, str], ...]] = {}
        self._native: native.OfSizes[native.Block | None] = native.OfSizes()
        self._inner: list[_Inner] = []
        names: list[str | None] = [None]
        for step in steps:
            relu = type(step.activation) is nn.ReLU
            inputs = self._inner[-1].gate.sizes if self._inner else None
            gate = None if step is steps[-1] else _folded_gate(step)
            outputs = gate.sizes if gate else None
            made = SwitchedConvolution(step.layer, step.norm, relu, inputs, outputs)
            follows = None if relu else step.activation
            self.add_module(step.name, made)
            self.add_module(f"{step.name}_activation", follows)
            names.append(step.gate and step.gate[0])
            if gate is None:
                # A tuple, since the module has another name as one of the block.
                self._last = (made,)
            else:
                self._inner.append(_Inner(made, gate, follows))
        for name, inner in zip(names[1:], self._inner, strict=False):
            if name is not None:
                self.add_module(name, inner.gate)
        self._convolutions = {
            step.name: gates for step, gates in zip(steps, itertools.pairwise(names), strict=True)
        }
        self._layers = (*(inner.convolution for inner in self._inner), *self._last)
        self.downsample = downsample
        self.end = end
        self.activation = activation
        self._ways = (*self._possible_ways(),)
        self.folded_gates = [inner.gate for inner in self._inner if isinstance(inner.gate, FoldedGate)]
        # Whether the last convolution can do all that comes after the sum.
        self._relu = end is None and type(activation) is nn.ReLU
        self.eval()

    def cost_terms(self, run: Run) -> Iterator[ConvolutionTerm]:
        """The convolutions, each with the gates of its input and of its output."""
        return convolution_terms(run, self._convolutions)

    def inference_twin(self) -> nn.Module:
        """The block itself, which is one."""
        return self

    # The forward pass

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        if not is_plain() and native.can_compute(x):
            block = self.native_for(x.shape)
            if block is not None:
                return self._by_native(block, x)
        # Sums are exact in half precision too, and the gates divide them.
        sums = x.sum(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        scale = 1 / (x.shape[2] * x.shape[3])
        if is_plain():
            return self._plain(x, sums, scale)
        gates = [inner.gate.rows(sums, scale) for inner in self._inner]
        shortcut = channels_last(self.downsample(x)) if self.downsample is not None else x
        if self.end is None:
            y = self._add_branch(x, shortcut, gates, inplace=self.downsample is not None)
            return y if self._relu else self.activation(y)
        branch = self._add_branch(x, torch.zeros_like(shortcut), gates, inplace=True)
        return self.activation(self.end(branch) + shortcut)  # type: ignore[no-any-return]

    def _by_native(self, block: native.Block, x: Tensor) -> Tensor:
        """The open channels, in native code."""
        other = None
        if not block.has_shortcut:
            other = x if self.downsample is None else channels_last(self.downsample(x))
        y = _computed(native.Chain([block]), self.folded_gates, x, other)
        return y if self._relu else self.activation(y)

    def joined(self, modules: nn.Sequential) -> nn.Sequential:
        """Blocks that are computed together."""
        return ConditionalBlocks(OrderedDict(modules._modules))

    def made_of(self) -> list[object]:
        """Whether nobody watches the block, and the generations of its weights."""
        return [
            not self._forward_hooks and not self._forward_pre_hooks,
            *[layer.generation for layer in self._layers],
        ]

    @property
    def is_whole(self) -> bool:
        """Whether native code computes all of the block, and nobody watches it."""
        return self._relu and bool(self.made_of()[0])

    def native_for(self, shape: tuple[int, ...]) -> native.Block | None:
        """The block in native code for images of a shape, or None where there is none."""
        _, channels, height, width = shape
        found = self._native.of((height, width), self.made_of(), lambda: self._make_native((height, width)))
        return found if found is not None and found.channels == channels else None

    def _make_native(self, size: tuple[int, int]) -> native.Block | None:
        if self.end is not None or any(inner.activation is not None for inner in self._inner):
            return None
        shortcut = None
        if isinstance(self.downsample, nn.Sequential):
            first, *rest = self.downsample
            if isinstance(first, PackedConvolution) and all(type(layer) is nn.Identity for layer in rest):
                shortcut = first
        gates = [inner.gate.gating() for inner in self._inner]
        found = native.Block.of(self._layers, gates, shortcut, self._relu, size)
        # What does not fit is an error elsewhere.
        is_fitting = found is not None and (found.outputs, found.height, found.width) == (
            found.channels,
            *size,
        )
        return found if is_fitting or self.downsample is not None else None

    def _plain(self, x: Tensor, sums: Tensor, scale: float) -> Tensor:
        """All channels, or a branch for each gate, by operations that can be counted, compiled, exported."""
        gates = [inner.gate(sums, scale) for inner in self._inner]
        shortcut = x if self.downsample is None else self.downsample(x)
        layers = [BranchedLayer(i.convolution, i.activation, i.gate.sizes, i.gate.gates) for i in self._inner]
        if is_exporting() and can_branch(x, layers):
            if self.end is None:
                return self.activation(add_branches(x, shortcut, gates, layers, *self._last))  # type: ignore[no-any-return]
            h = add_branches(x, torch.zeros_like(shortcut), gates, layers, *self._last)
        else:
            h = x
            for inner, decided in zip(self._inner, gates, strict=True):
                h = inner.activated(inner.convolution(h))
                h = h * inner.mask(decided, h)
            h = self._last[0](h)
        branch = h if self.end is None else self.end(h)
        return self.activation(branch + shortcut)  # type: ignore[no-any-return]

    def measure_plan(self, x: Tensor) -> None:
        """Measure each way with several shares of open gates, and keep which is the fastest for which share.

        Args:
            x: an input of the block; what the plan holds for are images of its size, one or several.
        """
        x = channels_last(x)
        shortcut = x if self.downsample is None else channels_last(self.downsample(x))
        random = torch.Generator().manual_seed(0)
        plan = []
        for share in _MEASURED_SHARES:
            gates = [
                share - torch.rand(len(x), len(inner.gate.sizes), generator=random, device="cpu").to(x)
                for inner in self._inner
            ]
            batch = _Batch(x, shortcut, _side_by_side(map(_rows, gates)), gates, inplace=False)
            ways = {way: partial(_WAYS[way], self, batch) for way in self._ways}
            seconds = _medians(ways, x.device)
            plan.append((share + _MEASURED_SHARES[0] / 2, min(seconds, key=lambda name: seconds[name])))
        self.plans = {**self.plans, _size(x): tuple(plan)}

    def _add_branch(
        self, x: Tensor, other: Tensor, gates: Sequence[tuple[Tensor, list[Decisions]]], inplace: bool
    ) -> Tensor:
        """The residual branch added to other images, with the ReLU if nothing else comes after the sum."""
        decisions = gates[0][1] if len(gates) == 1 else _side_by_side([rows for _, rows in gates])
        if all(map(all, decisions)):
            return self._masked(_Batch(x, other, decisions, (), inplace))
        batch = _Batch(x, other, decisions, [positive for positive, _ in gates], inplace)
        return _WAYS[self._way(batch)](self, batch)

    # Ways for batches

    def _possible_ways(self) -> Iterator[str]:
        """The names of the ways that this block has."""
        yield "masked"
        if all(inner.convolution.can_be_cut() for inner in self._inner):
            yield "gathered"
            few = all(len(inner.gate.sizes) <= _MANY_RUNS for inner in self._inner)
            if few and all(inner.convolution.groups == 1 for inner in self._inner):
                yield "by group"

    def _way(self, batch: _Batch) -> str:
        """The way that was measured to be the fastest, or a rule of thumb."""
        share = sum(map(sum, batch.decisions)) / len(batch.decisions) / len(batch.decisions[0])
        plan = self.plans.get(_size(batch.x))
        if plan is not None:
            return next((way for limit, way in plan if share <= limit), "masked")
        if share > _WORTH_IT or "gathered" not in self._ways:
            return "masked"
        if not batch.x.is_cpu and len(batch.x) > 1:
            return "by group" if "by group" in self._ways else "masked"
        return "gathered"

    def _masked(self, batch: _Batch) -> Tensor:
        """All channels; closed ones are set to zero."""
        h = batch.x
        for inner, decided in itertools.zip_longest(self._inner, batch.gates):
            h = inner.activated(inner.convolution(h))
            if decided is not None:
                h = h * inner.mask(decided, h)
        (last,) = self._last
        weight, bias = last.whole(h)
        return convolve_add(batch.other, h, weight, bias, last.settings, self._relu, batch.inplace)

    def _by_image(self, way: _OfOpen, batch: _Batch) -> Tensor:
        """Images one by one, side by side; together if all have the same gates."""
        if len({*batch.decisions}) == 1:
            return way(batch.x, batch.other, batch.decisions[0], batch.inplace)
        y = batch.other if batch.inplace else batch.other.clone()

        def compute(n: int, decisions: Decisions) -> None:
            way(batch.x[n : n + 1], y[n : n + 1], decisions, True)

        tasks = [partial(compute, n, decisions) for n, decisions in enumerate(batch.decisions)]
        threads = torch.get_num_threads() if y.is_cpu else 1
        if threads > 1 and len(tasks) >= 2 * threads:
            side_by_side(tasks, threads)
        else:
            for task in tasks:
                task()
        return y

    def _by_group(self, batch: _Batch) -> Tensor:
        """Gate by gate, each for the images that have it open."""
        (last,) = self._last
        h, y = batch.x, batch.other if batch.inplace else batch.other.clone()
        y += last.bias.reshape(-1, 1, 1)
        columns = [*zip(*batch.decisions, strict=True)]
        for inner in self._inner:
            layer, sizes = inner.convolution, inner.gate.sizes
            is_last = inner is self._inner[-1]
            channels = 0 if is_last else sum(sizes)
            outputs = channels_last(h.new_zeros(h.shape[0], channels, *layer.size(h)))
            parts = outputs.split(sizes, dim=1) if channels else ()
            for gate, decisions in enumerate(columns[: len(sizes)]):
                which = [n for n, is_open in enumerate(decisions) if is_open]
                if not which:
                    continue
                index = torch.tensor(which, device=h.device)
                x = h if len(which) == h.shape[0] else channels_last(h.index_select(0, index))
                weight, bias = layer.of_gate(gate)
                part = inner.activated(convolve(x, weight, bias, layer.settings, layer.relu))
                if is_last:
                    weight = last.by_input_gate()[gate]
                    y.index_add_(0, index, convolve(part, weight, None, last.settings, relu=False))
                else:
                    parts[gate].index_copy_(0, index, part)
            del columns[: len(sizes)]
            h = outputs
        return y.relu_() if self._relu else y

    # Ways for images that have the same gates

    def _open(self, decisions: Decisions) -> list[OpenChannels]:
        opened, at = [], 0
        for inner in self._inner:
            sizes = inner.gate.sizes
            opened.append(open_channels(sizes, decisions[at : at + len(sizes)]))
            at += len(sizes)
        return opened

    def _gathered(self, x: Tensor, other: Tensor, decisions: Decisions, inplace: bool) -> Tensor:
        """The open channels of each convolution side by side."""
        opened = self._open(decisions)
        if opened[-1].channels == 0:
            return self._closed(other, inplace)
        before: OpenChannels | None = None
        for inner, now in zip(self._inner, opened, strict=True):
            x = inner.activated(inner.convolution.of_open(x, before, now))
            before = now
        return self._last[0].add_open(x, opened[-1], other, self._relu, inplace)

    def _closed(self, other: Tensor, inplace: bool) -> Tensor:
        """Nothing but the shortcut and the bias."""
        bias = self._last[0].bias.reshape(-1, 1, 1)
        y = other.add_(bias) if inplace else other + bias
        return y.relu_() if self._relu else y


def _computed(chain: native.Chain, gates: Sequence[FoldedGate], x: Tensor, other: Tensor | None) -> Tensor:
    """The output of blocks in native code, whose gates keep what they decided."""
    forced = [gate.forced_for(x.shape[0]) for gate in gates]
    y, logits = chain.compute(x, other, forced)
    for gate, values, decided in zip(gates, logits, forced, strict=True):
        gate.keep_run(values, decided)
    return y


class ConditionalBlocks(nn.Sequential):
    """Blocks one after the other, which native code computes in one call.

    Between two calls the interpreter's own data have left the caches, so that each call costs more than it
    seems to.
    """

    def __init__(self, blocks: OrderedDict[str, nn.Module]) -> None:
        super().__init__(blocks)
        self._chains: native.OfSizes[tuple[native.Chain, list[FoldedGate]] | None] = native.OfSizes()

    def forward(self, x: Tensor) -> Tensor:
        found = None
        if type(x) is Tensor and not is_plain() and native.can_compute(x):
            made_of = [part for block in self._modules.values() for part in block.made_of()]  # type: ignore[operator]
            found = self._chains.of(x.shape[1:], made_of, lambda: self._make_chain(x.shape))
        if found is None:
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]
        chain, gates = found
        return _computed(chain, gates, channels_last(x), None)

    def _make_chain(self, shape: tuple[int, ...]) -> tuple[native.Chain, list[FoldedGate]] | None:
        """The blocks as one call for images of a shape, with their gates; None where that cannot be."""
        blocks, made = [*self], []
        for block in blocks:
            found = block.native_for(shape) if block.is_whole else None
            if found is None or not (found.has_shortcut or block.downsample is None):
                return None
            made.append(found)
            shape = (shape[0], found.outputs, found.height, found.width)
        return native.Chain(made), [gate for block in blocks for gate in block.folded_gates]


_WAYS: Mapping[str, Callable[[ConditionalBlock, _Batch], Tensor]] = {
    "masked": ConditionalBlock._masked,
    "gathered": lambda block, batch: block._by_image(block._gathered, batch),
    "by group": ConditionalBlock._by_group,
}
"""The ways to compute a batch, by their names."""

_WORTH_IT = 0.85
"""Above this share of open gates, computing all channels is faster."""

_MEASURED_SHARES = (0.2, 0.4, 0.6, 0.8)
"""Shares of open gates for which the ways are measured."""


def _rows(positive: Tensor) -> list[Decisions]:
    """Whether each gate is open, an example a row."""
    return [tuple([value > 0 for value in row]) for row in positive.tolist()]


def _side_by_side(layers: Iterable[list[Decisions]]) -> list[Decisions]:
    """The decisions of all layers for each example."""
    return [tuple(itertools.chain.from_iterable(rows)) for rows in zip(*layers, strict=True)]


def _size(x: Tensor) -> tuple[int, ...]:
    """What a plan depends on: the size of the images, and whether there are several."""
    n, _, height, width = x.shape
    return min(n, 2), height, width


def _medians(candidates: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Median seconds of each, taken in turn for a tenth of a second, but three times at least."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    begin = time.perf_counter()
    while len(next(iter(seconds.values()))) < 3 or time.perf_counter() - begin < 0.1:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
