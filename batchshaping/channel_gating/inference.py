r"""What takes the place of a gated residual block in inference: it computes the open channels only.

The gates of a block cut the channels between its convolutions into groups, and

.. math::
    y = \sum_{g \text{ open}} W_2^g * \mathrm{ReLU}(W_1^g * x + b_1^g) + b_2

is a sum over groups like experts, which run or do not. There are several ways to compute it:

- *sliced*: the two slices of each open group, one group after the other, with weights that were packed once;
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchshaping.gates.channel import ChannelGate, to_channels
from batchshaping.gates.cost import ConvolutionTerm, Run, convolution_terms
from batchshaping.gates.gate import Gate
from batchshaping.gates.packed import (
    PackedConvolution,
    channels_last,
    convolve,
    convolve_add,
    folded,
    is_plain,
)
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
        parts = [np.arange(first, end) for first, end in self.runs]
        return torch.from_numpy(np.concatenate(parts)).to(device)

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
def open_channels(sizes: tuple[int, ...], decisions: bytes) -> OpenChannels:
    """Which channels gates open.

    Args:
        sizes: how many channels each gate switches.
        decisions: of each gate, 0 or 1.

    Example:
        >>> open_channels((3, 3, 2, 2), bytes([1, 0, 1, 1])).runs
        ((0, 3), (6, 10))
    """
    is_open = np.frombuffer(decisions, np.bool_)
    ends = np.cumsum(sizes)
    padded = np.concatenate([[False], is_open, [False]])
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    starts = np.concatenate([[0], ends])
    runs = tuple((int(starts[a]), int(starts[b])) for a, b in zip(edges[::2], edges[1::2], strict=True))
    channels = sum(end - first for first, end in runs)
    return OpenChannels(
        tuple(int(g) for g in np.flatnonzero(is_open)), runs, channels, channels == int(ends[-1])
    )


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

    # One gate

    def of_output_gate(self, x: Tensor, gate: int) -> Tensor:
        """The output channels of one gate, from all input channels."""
        first, end = _range(self.outputs, gate)
        weight = self.part(x, ("output", gate), lambda: self.weight[first:end])
        return convolve(x, weight, self.bias[first:end], self.settings, self.relu)

    def of_input_gate(self, x: Tensor, gate: int) -> Tensor:
        """What the input channels of one gate add to all output channels, without the bias."""
        return convolve(x, self._of_input_gate(x, gate), None, self.settings, relu=False)

    def add_of_input_gate(
        self, x: Tensor, gate: int, other: Tensor, bias: bool, relu: bool, inplace: bool
    ) -> Tensor:
        """The same, added to other images, with the bias or without."""
        weight = self._of_input_gate(x, gate)
        return convolve_add(other, x, weight, self.bias if bias else None, self.settings, relu, inplace)

    def _of_input_gate(self, x: Tensor, gate: int) -> Tensor:
        first, end = _range(self.inputs, gate)
        return self.part(x, ("input", gate), lambda: self.weight[:, first:end])

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

    def is_aligned(self) -> bool:
        """Whether gates of inputs and of outputs switch the same whole groups of the convolution."""
        width = len(self.weight) // self.groups
        return self.inputs == self.outputs and all(size % width == 0 for size in self.inputs or ())

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
        """Height and width of the output."""
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, s, p, d, k in zip(x.shape[2:], *self.settings[:3], self.weight.shape[2:], strict=True)
        )
        return height, width

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
            by_input = self.kept("by input", lambda: self._matrix().t().contiguous())
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
        return self.kept("matrix", self._make_matrix)

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


def _range(sizes: tuple[int, ...] | None, gate: int) -> tuple[int, int]:
    """The channels of a gate."""
    assert sizes is not None
    first = sum(sizes[:gate])
    return first, first + sizes[gate]


def _as_matrix(x: Tensor) -> Tensor:
    """Images in the order of channels_last as a matrix, pixels x channels, without a copy."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _as_images(y: Tensor, height: int, width: int) -> Tensor:
    return y.view(-1, height, width, y.shape[1]).permute(0, 3, 1, 2)


# The block


class FoldedGate(Gate):
    """A :class:`~batchshaping.ChannelGate` for inference, with its batch normalization folded in.

    It reads the means of the feature maps, since the gates of a block share them, and gives what each gate
    decided, since channels are switched by leaving them out. It is made in single precision at least: a
    decision has no rounding error that is small.

    Args:
        gate: the gate; its weights are copied.

    Attributes:
        sizes: how many channels each gate switches.

    Shape:
        From means (N, channels) to decisions (N, gates).
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
        self.sizes = gate.sizes or (1,) * last.out_features
        least = torch.promote_types(last.weight.dtype, torch.float32)
        for name, layer, after in (("first", first, norm), ("last", last, None)):
            weight, bias = folded(copy.deepcopy(layer).to(least), after)
            self.register_buffer(f"{name}_weight", weight)
            self.register_buffer(f"{name}_bias", bias)
        self.to(last.weight.device)

    def forward(self, means: Tensor) -> Tensor:
        """Zeros and ones of shape (N, gates)."""
        hidden = F.linear(means.to(self.first_weight.dtype), self.first_weight, self.first_bias)
        return self.decide(F.linear(hidden.relu_(), self.last_weight, self.last_bias))

    def _decided(self, logits: Tensor) -> Tensor:
        # The same as binary_concrete in evaluation, without what a gradient would need.
        return torch.where(logits.isnan(), logits, (logits > 0).to(logits.dtype))


class Step(NamedTuple):
    """A convolution of a block, with what belongs to it.

    Attributes:
        name: of the convolution in the block.
        layer: the convolution.
        norm: the batch normalization after it, which is folded in; None if there is none.
        activation: what comes after that; None if there is nothing.
        gate: name and module of the gates of its output; None for the last convolution.
    """

    name: str
    layer: nn.Conv2d
    norm: nn.Module | None
    activation: nn.Module | None
    gate: tuple[str, ChannelGate] | None


class _Batch(NamedTuple):
    """What a block computes.

    Attributes:
        x: its input.
        other: what the residual branch is added to, of the shape of the output.
        decisions: whether each gate is open, a NumPy array (N, gates of all layers).
        gates: the same, zeros and ones of shape (N, gates), one tensor a layer.
        inplace: whether the result may take the place of ``other``.
    """

    x: Tensor
    other: Tensor
    decisions: Any
    gates: Sequence[Tensor]
    inplace: bool

    def images(self) -> dict[bytes, list[int]]:
        """The images that have the same gates, by these."""
        images: dict[bytes, list[int]] = {}
        for n, row in enumerate(self.decisions):
            images.setdefault(row.tobytes(), []).append(n)
        return images


_OfOpen = Callable[[Tensor, Tensor, Sequence[OpenChannels], bool], Tensor]
"""Computes images that have the same gates: input, what is added, open channels, whether that is in place."""


class ConditionalBlock(nn.Module):
    """A gated residual block for inference, which computes the open channels only.

    Args:
        steps: its convolutions in their order. All but the last have gates.
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
        self.convolutions: dict[str, tuple[str | None, str | None]] = {}
        self.plans: dict[tuple[int, ...], tuple[tuple[float, str], ...]] = {}
        before: tuple[str, ChannelGate] | None = None
        for step in steps:
            relu = type(step.activation) is nn.ReLU
            made = SwitchedConvolution(step.layer, step.norm, relu, _sizes(before), _sizes(step.gate))
            self.add_module(step.name, made)
            self.add_module(f"{step.name}_activation", None if relu else step.activation)
            self.convolutions[step.name] = (before and before[0], step.gate and step.gate[0])
            before = step.gate
        for step in steps:
            if step.gate is not None:
                self.add_module(step.gate[0], FoldedGate(step.gate[1]))
        self.downsample = downsample
        self.end = end
        self.activation = activation
        # The gates of each layer: how many channels each switches, and where they are among those of all.
        sizes = [_sizes(step.gate) or () for step in steps[:-1]]
        ends = [0, *itertools.accumulate(map(len, sizes))]
        self._layers = [*zip(sizes, ends[:-1], ends[1:], strict=True)]
        self.eval()

    def cost_terms(self, run: Run) -> Iterator[ConvolutionTerm]:
        """The convolutions, each with the gates of its input and of its output."""
        return convolution_terms(run, self.convolutions)

    def inference_twin(self) -> nn.Module:
        """The block itself, which is one."""
        return self

    # The forward pass

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        means = x.mean(dim=(2, 3))
        gates = [gate(means) for gate in self._gates()]
        shortcut = x if self.downsample is None else channels_last(self.downsample(x))
        if self.end is None:
            fresh = self.downsample is not None
            y = self._add_branch(x, shortcut, gates, fresh)
            return y if self._ends_with_relu() else self.activation(y)
        branch = self._add_branch(x, torch.zeros_like(shortcut), gates, inplace=True)
        return self.activation(self.end(branch) + shortcut)  # type: ignore[no-any-return]

    def measure_plan(self, x: Tensor) -> None:
        """Measure each way with several shares of open gates, and keep which is the fastest for which share.

        Args:
            x: an input of the block; what the plan holds for are images of its size, one or several.
        """
        x = channels_last(x)
        shortcut = x if self.downsample is None else channels_last(self.downsample(x))
        random = np.random.default_rng(0)
        plan = []
        for share in _MEASURED_SHARES:
            decisions = random.random((len(x), self._layers[-1][2])) < share
            gates = [torch.from_numpy(decisions[:, first:end]).to(x) for _, first, end in self._layers]
            batch = _Batch(x, shortcut, decisions, gates, inplace=False)
            ways = {
                name: partial(way, batch) for name, way in self._ways().items() if self._is_possible(name)
            }
            seconds = _medians(ways, x.device)
            plan.append((share + _MEASURED_SHARES[0] / 2, min(seconds, key=lambda name: seconds[name])))
        self.plans = {**self.plans, _size(x): tuple(plan)}

    def _gates(self) -> list[FoldedGate]:
        return [self._modules[gate] for _, gate in self.convolutions.values() if gate]  # type: ignore[misc]

    def _switched(self) -> list[SwitchedConvolution]:
        return [self._modules[name] for name in self.convolutions]  # type: ignore[misc]

    def _activated(self, name: str, y: Tensor) -> Tensor:
        """What comes after a convolution, where it is no ReLU, which the convolution has done itself."""
        activation = self._modules[f"{name}_activation"]
        return y if activation is None else activation(y)

    def _ends_with_relu(self) -> bool:
        """Whether nothing but a ReLU comes after the sum, so that the last convolution can do it."""
        return self.end is None and type(self.activation) is nn.ReLU

    def _add_branch(self, x: Tensor, other: Tensor, gates: list[Tensor], inplace: bool) -> Tensor:
        """The residual branch added to other images, with the ReLU if it ends with one."""
        if is_plain():
            for (name, (_, gate)), decided in zip(self.convolutions.items(), [*gates, None], strict=True):
                x = self._activated(name, self.get_submodule(name)(x))
                if decided is not None:
                    x = x * self._mask(gate, decided, x)
            y = other + x
            return y.relu() if self._ends_with_relu() else y
        together = gates[0] if len(gates) == 1 else torch.cat(gates, dim=1)
        decisions = together.cpu().numpy() != 0
        batch = _Batch(x, other, decisions, () if decisions.all() else gates, inplace)
        return self._ways()[self._way(batch)](batch)

    def _mask(self, gate: str | None, decided: Tensor, x: Tensor) -> Tensor:
        """What gates decided, for each channel of images."""
        return to_channels(decided.to(x.dtype), self._modules[gate].sizes)[:, :, None, None]  # type: ignore

    # Ways for batches

    def _ways(self) -> dict[str, Callable[[_Batch], Tensor]]:
        return {
            "masked": self._masked,
            "sliced": lambda batch: self._by_image(batch, self._sliced),
            "gathered": lambda batch: self._by_image(batch, self._gathered),
            "by group": self._by_group,
        }

    def _way(self, batch: _Batch) -> str:
        """The way that was measured to be the fastest, or a rule of thumb."""
        if not batch.gates:
            return "masked"
        share = float(batch.decisions.mean())
        plan = self.plans.get(_size(batch.x))
        if plan is not None:
            return next((way for limit, way in plan if share <= limit), "masked")
        if share > _WORTH_IT or not self._is_possible("gathered"):
            return "masked"
        if batch.x.device.type != "cpu" and len(batch.x) > 1:
            return "by group" if self._is_possible("by group") else "masked"
        few_pixels = batch.other.shape[2] * batch.other.shape[3] <= batch.other.shape[1]
        return "sliced" if few_pixels and self._is_possible("sliced") else "gathered"

    def _is_possible(self, way: str) -> bool:
        """Whether a way exists for this block."""
        if way == "masked":
            return True
        middle = [layer for layer in self._switched() if layer.groups > 1]
        if any(not layer.is_aligned() for layer in middle):
            return False
        if way == "gathered":
            return True
        if max(end - first for _, first, end in self._layers) > _MANY_RUNS:
            return False
        return not middle and (way == "by group" or len(self.convolutions) == 2)

    def _masked(self, batch: _Batch) -> Tensor:
        """All channels; closed ones are set to zero."""
        h = batch.x
        *inner, (last, _) = self.convolutions.items()
        for (name, (_, gate)), decided in zip(inner, batch.gates or (None,) * len(inner), strict=True):
            h = self._activated(name, self.get_submodule(name)(h))
            if decided is not None:
                h = h * self._mask(gate, decided, h)
        layer: Any = self._modules[last]
        relu = self._ends_with_relu()
        return convolve_add(batch.other, h, layer.packed(h), layer.bias, layer.settings, relu, batch.inplace)

    def _by_image(self, batch: _Batch, way: _OfOpen) -> Tensor:
        """Images with the same gates together, others side by side."""
        images = batch.images()
        if len(images) == 1:
            (key,) = images
            return way(batch.x, batch.other, self._open(key), batch.inplace)
        y = batch.other if batch.inplace else batch.other.clone()

        def compute(key: bytes, which: list[int]) -> None:
            if len(which) == 1:
                image = slice(which[0], which[0] + 1)
                way(batch.x[image], y[image], self._open(key), True)
            else:
                index = torch.tensor(which, device=y.device)
                x, other = (channels_last(values.index_select(0, index)) for values in (batch.x, y))
                y.index_copy_(0, index, way(x, other, self._open(key), True))

        tasks = [partial(compute, key, which) for key, which in images.items()]
        threads = torch.get_num_threads() if y.device.type == "cpu" else 1
        if threads > 1 and len(tasks) >= 2 * threads:
            side_by_side(tasks, threads)
        else:
            for task in tasks:
                task()
        return y

    def _by_group(self, batch: _Batch) -> Tensor:
        """Gate by gate, each for the images that have it open."""
        *inner, last = self._switched()
        names = [*self.convolutions]
        h, y = batch.x, batch.other if batch.inplace else batch.other.clone()
        y += last.bias.reshape(-1, 1, 1)
        for k, (layer, (sizes, begin, end)) in enumerate(zip(inner, self._layers, strict=True)):
            is_last = k == len(inner) - 1
            inside = None if is_last else channels_last(h.new_zeros(len(h), sum(sizes), *layer.size(h)))
            for gate in range(end - begin):
                which = np.flatnonzero(batch.decisions[:, begin + gate])
                if len(which) == 0:
                    continue
                index = torch.from_numpy(which).to(h.device)
                x = h if len(which) == len(h) else channels_last(h.index_select(0, index))
                part = self._activated(names[k], layer.of_output_gate(x, gate))
                if inside is not None:
                    first, stop = _range(sizes, gate)
                    inside[:, first:stop].index_copy_(0, index, part)
                else:
                    y.index_add_(0, index, last.of_input_gate(part, gate))
            h = h if inside is None else inside
        return y.relu_() if self._ends_with_relu() else y

    # Ways for images that have the same gates

    def _open(self, key: bytes) -> list[OpenChannels]:
        return [open_channels(sizes, key[first:end]) for sizes, first, end in self._layers]

    def _sliced(self, x: Tensor, other: Tensor, opened: Sequence[OpenChannels], inplace: bool) -> Tensor:
        """One open gate after the other, in a block of two convolutions."""
        first, last = self._switched()
        name, relu = next(iter(self.convolutions)), self._ends_with_relu()
        gates = opened[0].gates
        for k, gate in enumerate(gates):
            part = self._activated(name, first.of_output_gate(x, gate))
            is_last = k == len(gates) - 1
            other = last.add_of_input_gate(part, gate, other, k == 0, relu and is_last, inplace or k > 0)
        return other if gates else self._closed(other, inplace)

    def _gathered(self, x: Tensor, other: Tensor, opened: Sequence[OpenChannels], inplace: bool) -> Tensor:
        """The open channels of each convolution side by side."""
        if opened[-1].channels == 0:
            return self._closed(other, inplace)
        *inner, last = self._switched()
        before: OpenChannels | None = None
        for name, layer, now in zip(self.convolutions, inner, opened, strict=False):
            x = self._activated(name, layer.of_open(x, before, now))
            before = now
        assert before is not None
        return last.add_open(x, before, other, self._ends_with_relu(), inplace)

    def _closed(self, other: Tensor, inplace: bool) -> Tensor:
        """Nothing but the shortcut and the bias."""
        bias = self._switched()[-1].bias.reshape(-1, 1, 1)
        y = other.add_(bias) if inplace else other + bias
        return y.relu_() if self._ends_with_relu() else y


_WORTH_IT = 0.85
"""Above this share of open gates, computing all channels is faster."""

_MEASURED_SHARES = (0.2, 0.4, 0.6, 0.8)
"""Shares of open gates for which the ways are measured."""


def _sizes(gate: tuple[str, ChannelGate] | None) -> tuple[int, ...] | None:
    """How many channels each gate switches."""
    if gate is None:
        return None
    last: Any = gate[1].to_logits[-1]
    return gate[1].sizes or (1,) * last.out_features


def _size(x: Tensor) -> tuple[int, ...]:
    """What a plan depends on: the size of the images, and whether there are several."""
    return (min(len(x), 2), *x.shape[2:])


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
