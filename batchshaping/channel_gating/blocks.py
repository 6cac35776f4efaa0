r"""Residual blocks with gated inner channels, and how a given ResNet gets them.

A gated block computes

.. math::
    y = \mathrm{BN}(W_2 * (G(x) \cdot \mathrm{ReLU}(\mathrm{BN}(W_1 * x)))), \qquad
    x' = \mathrm{ReLU}(y + \mathrm{shortcut}(x))

where the gates G(x) of 0 or 1 read the input x of the block. There is one for each inner channel, or one for
several neighbouring ones. A bottleneck has two inner convolutions and gates for both.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from batchshaping.channel_gating.inference import ConditionalBlock, Step
from batchshaping.channel_gating.pruning import ClosedBlock, GatedLayer, keep_layers, what_stays
from batchshaping.gates.channel import ChannelGate
from batchshaping.gates.cost import ConvolutionTerm, Run, convolution_terms
from batchshaping.gates.gate import keep_every_run, whole_number
from batchshaping.gates.inference import fold_and_pack
from batchshaping.gates.packed import can_be_folded, can_be_packed

__all__ = [
    "GATED_BLOCKS",
    "GatedBasicBlock",
    "GatedBlock",
    "GatedBottleneck",
    "GatedTimmBasicBlock",
    "GatedTimmBottleneck",
    "GatesPerLayer",
    "gate_resnet",
]

_Network = TypeVar("_Network", bound=nn.Module)

GatesPerLayer: TypeAlias = int | Sequence[int | None] | None
"""How many gates a layer has: None for a gate a channel; several numbers for the layers of a block."""


class GatedBlock(nn.Module):
    """What gated residual blocks share: they take over the layers of an ungated one, and add gates.

    The layers keep their names, so that weights of the ungated block are weights of this one. A subclass is
    made for one class of blocks, whose forward pass it repeats with gates.

    Args:
        block: the residual block; its layers are shared, not copied.
        hidden: width of the MLP in each gate.
        bias: added to the gates' initial logits: the higher, the more channels are open at first.
        gates_per_layer: how many gates a layer has, as in :func:`gate_resnet`.

    Raises:
        ValueError: if a setting is out of range; or if the block is of another class, has other layers than
            convolutions where it should have those, mixes channels between an inner convolution and the next
            one, or has something under the name of a gate already.
    """

    ungated: ClassVar[str]
    """The class of the blocks, by module and name. It is not imported: its blocks exist only where it is."""

    convolutions: Mapping[str, tuple[str | None, str | None]]
    """Names of the convolutions, with those of the gates of their input and output, or None without gates."""

    inner: Mapping[str, str] = {}
    """Names of layers other than activations between an inner convolution and the next, with that of the gate
    of their channels. They must treat each channel alone, since closed channels are left out."""

    after: ClassVar[Mapping[str, tuple[str, ...]]]
    """Names of the layers that follow each convolution, up to the gates of its output or to the shortcut."""

    last: ClassVar[str]
    """Name of the activation after the shortcut is added."""

    before_last: ClassVar[str | None] = None
    """Name of a layer between the last gates and the last convolution."""

    optional: ClassVar[tuple[str, ...]] = ("downsample",)
    """Names of layers that a block may have or not."""

    conv1: nn.Conv2d
    bn1: nn.Module
    conv2: nn.Conv2d
    bn2: nn.Module
    downsample: nn.Module | None
    gate1: ChannelGate | None

    def __init__(
        self,
        block: nn.Module,
        hidden: int = 16,
        bias: float = 0.0,
        gates_per_layer: GatesPerLayer = None,
    ) -> None:
        ungated = self.ungated_class()
        if ungated is None or not isinstance(block, ungated):
            library, *_, name = self.ungated.split(".")
            raise ValueError(f"block must be a {name} of {library}, received {_class_of(block)}")
        super().__init__()
        self.train(block.training)
        for name, layer in block.named_children():
            self.add_module(name, layer)
        for name in self.optional:
            setattr(self, name, getattr(block, name, None))
        for name in self.inner:
            if not _treats_channels_alone(getattr(block, name)):
                raise ValueError(
                    f"the block's {name} must treat each channel alone, as batch normalization, average "
                    f"pooling and BlurPool2d do, received {_class_of(getattr(block, name))}"
                )
        numbers = iter(self._numbers_of_gates(gates_per_layer))
        for convolution, (_, gate) in self.convolutions.items():
            layer = getattr(block, convolution)
            if not isinstance(layer, nn.Conv2d):
                raise ValueError(f"the block's {convolution} must be a Conv2d, received {_class_of(layer)}")
            if gate is None:
                continue
            if hasattr(block, gate):
                raise ValueError(
                    f"the block must not have a {gate} yet, received {_class_of(block)} with one"
                )
            # Chance is that of the CPU, and in single precision, wherever the block is and whatever its type.
            made = ChannelGate(
                self.conv1.in_channels,
                layer.out_channels,
                hidden,
                bias,
                _number_of_gates(layer.out_channels, next(numbers)),
                device="cpu",
                dtype=torch.float32,
            )
            self.add_module(gate, made.to(layer.weight).train(block.training))

    @classmethod
    def ungated_class(cls) -> type[nn.Module] | None:
        """The class of the blocks, or None if nobody has imported it: then there is no block of it."""
        module, _, name = cls.ungated.rpartition(".")
        return getattr(sys.modules.get(module), name, None)

    @classmethod
    def _numbers_of_gates(cls, gates_per_layer: GatesPerLayer) -> tuple[int | None, ...]:
        """What was asked for each layer that has gates, in their order."""
        layers = sum(gate is not None for _, gate in cls.convolutions.values())
        if isinstance(gates_per_layer, tuple | list):
            numbers = tuple(gates_per_layer)
        else:
            numbers = (gates_per_layer,) * layers
        if len(numbers) != layers:
            raise ValueError(
                f"gates_per_layer must be one number, or one for each gated layer of a block ({layers} in a "
                f"{cls.ungated.rpartition('.')[2]}), received {gates_per_layer!r}"
            )
        return tuple(
            number if number is None else whole_number("gates_per_layer", number, least=1)
            for number in numbers
        )

    def cost_terms(self, run: Run) -> Iterator[ConvolutionTerm]:
        """The convolutions, each with the gates of its input and of its output."""
        yield from convolution_terms(run, self.convolutions)
        for name, gate in self.inner.items():
            layer = run.of(name)
            if layer.macs > 0:
                yield ConvolutionTerm(layer.name, layer.macs, 1, (run.gate(gate),))

    def inference_twin(self) -> nn.Module:
        """The block that takes its place in inference; the block itself if its layers cannot be cut."""
        if not isinstance(getattr(self, self.before_last or "", None), nn.Identity | None):
            return self
        steps = []
        *_, outer = self.convolutions
        for name, (_, gate) in self.convolutions.items():
            convolution: nn.Conv2d = getattr(self, name)
            layers = [
                layer for layer in (getattr(self, after) for after in self.after[name]) if layer is not None
            ]
            norm = layers.pop(0) if layers and can_be_folded(layers[0]) else None
            layers = [layer for layer in layers if not _is_identity_in_evaluation(layer)]
            if not can_be_packed(convolution) or (name != outer and not all(map(_is_elementwise, layers))):
                return self
            activation = layers[0] if len(layers) == 1 else nn.Sequential(*layers) if layers else None
            steps.append(
                Step(name, convolution, norm, activation, (gate, getattr(self, gate)) if gate else None)
            )
        *inner, last = steps
        downsample, end = (
            layer if layer is None else fold_and_pack(copy.deepcopy(layer).eval())
            for layer in (self.downsample, last.activation)
        )
        return ConditionalBlock(
            [*inner, last._replace(activation=None)], downsample, end, getattr(self, self.last)
        )

    def remove_static_gates(self, always: Mapping[str, Sequence[bool | None]]) -> None:
        """Remove gates that are always open or always closed, and the channels of the latter, in place.

        The block stays a gated one if anything is left between its convolutions, and else becomes a
        :class:`~batchshaping.channel_gating.pruning.ClosedBlock`.

        Args:
            always: for each gate, by the name of its module in the block, whether it is always open (True),
                always closed (False) or neither (None).
        """
        *inner, last = self.convolutions
        layers = []
        for name, after in itertools.pairwise(self.convolutions):
            _, gate = self.convolutions[name]
            channels = getattr(self, name).out_channels
            layers.append(
                GatedLayer(
                    getattr(self, gate).sizes or (1,) * channels if gate else (channels,),
                    always[gate] if gate else (),
                    getattr(self, after).groups,
                    self._can_be_cut(name, after),
                )
            )
        kept = what_stays(layers, may_close=can_be_folded(getattr(self, self.after[last][0])))
        if kept is None:
            ClosedBlock.take_the_place_of(self, last, self.after[last], self.last)
            return
        convolutions = [getattr(self, name) for name in self.convolutions]
        keep_layers(convolutions, [self._between(name) for name in inner], kept)
        gone = set()
        for name, layer in zip(inner, kept, strict=True):
            _, gate = self.convolutions[name]
            if gate and layer.gates:
                getattr(self, gate).keep(layer.gates, layer.sizes)
            elif gate:
                setattr(self, gate, None)
                gone.add(gate)
        # Of this block, and no longer of its class.
        self.inner = {name: gate for name, gate in self.inner.items() if gate not in gone}
        self.convolutions = {
            name: (None if before in gone else before, None if after in gone else after)
            for name, (before, after) in self.convolutions.items()
        }

    def _between(self, convolution: str) -> list[nn.Module]:
        """The layers between a convolution and the next."""
        names = [*self.after[convolution]]
        if convolution == [*self.convolutions][-2] and self.before_last is not None:
            names.append(self.before_last)
        return [layer for layer in (getattr(self, name) for name in names) if layer is not None]

    def _can_be_cut(self, convolution: str, after: str) -> bool:
        """Whether channels between a convolution and the next can be left out and change places."""
        first, *_, last = self.convolutions
        for name in (convolution, after):
            layer = getattr(self, name)
            # The weights of a parametrized convolution, for example, are none of its own.
            if type(layer) is not nn.Conv2d or "weight" not in layer._parameters:
                return False
            if name in (first, last) and layer.groups > 1:
                return False
        return all(
            _treats_channels_alone(layer) or _is_elementwise(layer) for layer in self._between(convolution)
        )

    def shortcut(self, x: Tensor) -> Tensor:
        """The block's input, in the shape of its output."""
        return x if self.downsample is None else self.downsample(x)


def _gated(inner: Tensor, gate: ChannelGate | None, x: Tensor) -> Tensor:
    """Inner channels, switched by gates that read the input of the block, if there are any."""
    if gate is None:
        return inner
    switched: Tensor = gate(x) * inner
    return switched


class GatedBasicBlock(GatedBlock):
    """Two 3 x 3 convolutions with gated channels between them.

    Args:
        block: a ``torchvision.models.resnet.BasicBlock``; its layers are shared, not copied.
        hidden: width of the MLP in each gate.
        bias: added to the gates' initial logits.
        gates_per_layer: how many gates a layer has, as in :func:`gate_resnet`.

    Example:
        >>> import torch
        >>> from torchvision.models.resnet import BasicBlock
        >>> block = GatedBasicBlock(BasicBlock(16, 16))
        >>> block(torch.randn(4, 16, 8, 8)).shape, block.gate1.decisions.shape
        (torch.Size([4, 16, 8, 8]), torch.Size([4, 16]))
    """

    ungated = "torchvision.models.resnet.BasicBlock"
    convolutions = {"conv1": (None, "gate1"), "conv2": ("gate1", None)}
    after = {"conv1": ("bn1", "relu"), "conv2": ("bn2",)}
    last = "relu"

    relu: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        inner = _gated(self.relu(self.bn1(self.conv1(x))), self.gate1, x)
        outer: Tensor = self.bn2(self.conv2(inner))
        return self.relu(outer + self.shortcut(x))  # type: ignore[no-any-return]


class GatedBottleneck(GatedBlock):
    """A 1 x 1, a 3 x 3 and a 1 x 1 convolution, with gated channels between them.

    Args:
        block: a ``torchvision.models.resnet.Bottleneck``; its layers are shared, not copied.
        hidden: width of the MLP in each gate.
        bias: added to the gates' initial logits.
        gates_per_layer: how many gates a layer has, as in :func:`gate_resnet`.

    Example:
        >>> import torch
        >>> from torchvision.models.resnet import Bottleneck
        >>> block = GatedBottleneck(Bottleneck(64, 16))
        >>> block(torch.randn(4, 64, 8, 8)).shape, block.gate2.decisions.shape
        (torch.Size([4, 64, 8, 8]), torch.Size([4, 16]))
    """

    ungated = "torchvision.models.resnet.Bottleneck"
    convolutions = {"conv1": (None, "gate1"), "conv2": ("gate1", "gate2"), "conv3": ("gate2", None)}
    after = {"conv1": ("bn1", "relu"), "conv2": ("bn2", "relu"), "conv3": ("bn3",)}
    last = "relu"

    relu: nn.Module
    conv3: nn.Conv2d
    bn3: nn.Module
    gate2: ChannelGate | None

    def forward(self, x: Tensor) -> Tensor:
        reduced = _gated(self.relu(self.bn1(self.conv1(x))), self.gate1, x)
        inner = _gated(self.relu(self.bn2(self.conv2(reduced))), self.gate2, x)
        outer: Tensor = self.bn3(self.conv3(inner))
        return self.relu(outer + self.shortcut(x))  # type: ignore[no-any-return]


class _GatedTimmBlock(GatedBlock):
    """The end of timm's blocks: attention over the outer channels, the drop path, the shortcut."""

    optional = ("downsample", "se", "drop_path")

    se: nn.Module | None
    drop_path: nn.Module | None
    drop_block: nn.Module
    aa: nn.Module
    act1: nn.Module
    act2: nn.Module

    def branch(self, outer: Tensor) -> Tensor:
        """What the residual branch adds to the shortcut."""
        if self.se is not None:
            outer = self.se(outer)
        return outer if self.drop_path is None else self.drop_path(outer)


class GatedTimmBasicBlock(_GatedTimmBlock):
    """Two 3 x 3 convolutions with gated channels between them, as timm has them.

    Args:
        block: a ``timm.models.resnet.BasicBlock``; its layers are shared, not copied.
        hidden: width of the MLP in each gate.
        bias: added to the gates' initial logits.
        gates_per_layer: how many gates a layer has, as in :func:`gate_resnet`.

    Example:
        >>> import torch
        >>> from timm.models.resnet import BasicBlock
        >>> block = GatedTimmBasicBlock(BasicBlock(16, 16))
        >>> block(torch.randn(4, 16, 8, 8)).shape, block.gate1.decisions.shape
        (torch.Size([4, 16, 8, 8]), torch.Size([4, 16]))
    """

    ungated = "timm.models.resnet.BasicBlock"
    convolutions = {"conv1": (None, "gate1"), "conv2": ("gate1", None)}
    inner = {"bn1": "gate1", "drop_block": "gate1", "aa": "gate1"}
    after = {"conv1": ("bn1", "drop_block", "act1"), "conv2": ("bn2", "se", "drop_path")}
    before_last = "aa"
    last = "act2"

    def zero_init_last(self) -> None:
        """Let the block start as its shortcut, as ``timm.models.resnet.ResNet.init_weights`` asks for."""
        if getattr(self.bn2, "weight", None) is not None:
            nn.init.zeros_(self.bn2.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        inner = _gated(self.act1(self.drop_block(self.bn1(self.conv1(x)))), self.gate1, x)
        outer = self.branch(self.bn2(self.conv2(self.aa(inner))))
        return self.act2(outer + self.shortcut(x))  # type: ignore[no-any-return]


class GatedTimmBottleneck(_GatedTimmBlock):
    """A 1 x 1, a 3 x 3 and a 1 x 1 convolution, with gated channels between them, as timm has them.

    Args:
        block: a ``timm.models.resnet.Bottleneck``; its layers are shared, not copied.
        hidden: width of the MLP in each gate.
        bias: added to the gates' initial logits.
        gates_per_layer: how many gates a layer has, as in :func:`gate_resnet`.

    Example:
        >>> import torch
        >>> from timm.models.resnet import Bottleneck
        >>> block = GatedTimmBottleneck(Bottleneck(64, 16))
        >>> block(torch.randn(4, 64, 8, 8)).shape, block.gate2.decisions.shape
        (torch.Size([4, 64, 8, 8]), torch.Size([4, 16]))
    """

    ungated = "timm.models.resnet.Bottleneck"
    convolutions = {"conv1": (None, "gate1"), "conv2": ("gate1", "gate2"), "conv3": ("gate2", None)}
    inner = {"bn1": "gate1", "bn2": "gate2", "drop_block": "gate2", "aa": "gate2"}
    after = {
        "conv1": ("bn1", "act1"),
        "conv2": ("bn2", "drop_block", "act2"),
        "conv3": ("bn3", "se", "drop_path"),
    }
    before_last = "aa"
    last = "act3"

    conv3: nn.Conv2d
    bn3: nn.Module
    act3: nn.Module
    gate2: ChannelGate | None

    def zero_init_last(self) -> None:
        """Let the block start as its shortcut, as ``timm.models.resnet.ResNet.init_weights`` asks for."""
        if getattr(self.bn3, "weight", None) is not None:
            nn.init.zeros_(self.bn3.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        reduced = _gated(self.act1(self.bn1(self.conv1(x))), self.gate1, x)
        inner = _gated(self.act2(self.drop_block(self.bn2(self.conv2(reduced)))), self.gate2, x)
        outer = self.branch(self.bn3(self.conv3(self.aa(inner))))
        return self.act3(outer + self.shortcut(x))  # type: ignore[no-any-return]


GATED_BLOCKS: tuple[type[GatedBlock], ...] = (
    GatedBasicBlock,
    GatedBottleneck,
    GatedTimmBasicBlock,
    GatedTimmBottleneck,
)
"""The gated blocks, each for one class of blocks. One more class here, and its blocks can be gated."""


def gate_resnet(
    resnet: _Network, hidden: int = 16, bias: float = 0.0, gates_per_layer: GatesPerLayer = None
) -> _Network:
    """Gate the inner channels of every residual block of a ResNet, in place.

    All weights stay, under their names; the gates' are new. Each block stays the object that it is, with its
    hooks and whatever else it has, and becomes a gated one by its class. As long as all gates are open the
    outputs are the same, to the bit. Gate before the optimizer is made, so that it knows the gates.

    Args:
        resnet: a ResNet, ResNeXt or Wide ResNet of torchvision or timm, or a module that holds one, such as
            torchvision's FCN and DeepLab; or a block of one. Those of timm may have drop paths, drop blocks,
            anti-aliasing layers, average pooling in their shortcuts, and attention over a block's outer
            channels (squeeze and excitation, for example).
        hidden: width of the MLP in each gate.
        bias: added to the gates' initial logits. 0 suits training from the start, where half of the channels
            are open at first; a trained network keeps more of what it knows with 2 or 3.
        gates_per_layer: how many gates each inner layer has. A gate for each channel, as in the paper, by
            default. With 8, each gate switches an eighth of the channels, and at least 16 of them, so that
            narrow layers have fewer gates: then closed gates save time too, see
            :func:`~batchshaping.gates.inference.conditional_inference`. A pair for bottlenecks: the gates
            of their first and of their second layer.

    Returns:
        The same module.

    Raises:
        ValueError: if a setting is out of range; if the module has no residual blocks of these libraries, or
            one with another forward pass, such as a subclass; if a block of timm mixes its inner channels
            (group normalization); if it is gated already; or if it is wrapped for many processes, which would
            not keep the gates the same in all of them. Nothing is changed then.

    References:
        Bejnordi, Blankevoort and Welling, Batch-Shaping for Learning Conditional Channel Gated Networks, ICLR
        2020, https://arxiv.org/abs/1907.06627.

    Example:
        >>> import torch, torchvision, batchshaping as bs
        >>> resnet = torchvision.models.resnet18().eval()
        >>> images = torch.randn(2, 3, 64, 64)
        >>> with torch.no_grad():
        ...     expected = resnet(images)
        ...     with bs.gates_forced(gate_resnet(resnet), share=1.0):
        ...         print(torch.equal(resnet(images), expected))
        True
    """
    known = {ungated: gated for gated in GATED_BLOCKS if (ungated := gated.ungated_class()) is not None}
    gated = {}
    for name, module in resnet.named_modules():
        if isinstance(module, GatedBlock):
            raise ValueError(f"resnet must not be gated yet, received a gated {type(resnet).__name__}")
        wrapper = _SYNCHRONIZED & {parent.__name__ for parent in type(module).__mro__}
        if wrapper:
            raise ValueError(f"resnet must be gated before it is wrapped, received a {wrapper.pop()}")
        for ungated, gated_class in known.items():
            if isinstance(module, ungated):
                # A subclass, or a forward pass of the object's own: the gates would have no place in it.
                if type(module) is not ungated or "forward" in vars(module):
                    where = f"{name!r}, " if name else ""
                    raise ValueError(
                        f"resnet must hold blocks with {ungated.__module__.partition('.')[0]}'s own forward "
                        f"pass, received {where}{_class_of(module)} ({gated_class.__name__}(block) makes a "
                        "gated one of its layers)"
                    )
                gated[module] = gated_class(module, hidden, bias, gates_per_layer)
    if not gated:
        children = {module: {name for name, _ in module.named_children()} for module in resnet.modules()}
        others = sorted(
            {_class_of(module) for module, names in children.items() if {"conv1", "conv2"} <= names}
        )
        raise ValueError(
            "resnet must hold residual blocks of torchvision or timm (BasicBlock or Bottleneck), "
            f"received a {type(resnet).__name__} without any"
            + "".join(f", but with {other}" for other in others)
        )
    for block, made in gated.items():
        block.__class__ = type(made)
        for name, layer in made.named_children():
            block.add_module(name, layer)
    # Where a block is used twice, what it costs depends on both of its runs.
    keep_every_run(resnet)
    return resnet


LEAST_CHANNELS = 16
"""How many channels a gate for several switches at least: fewer make convolutions too small to be fast."""


def _number_of_gates(channels: int, gates_per_layer: int | None) -> int | None:
    """How many gates a layer of so many channels gets; None for a gate a channel."""
    return None if gates_per_layer is None else max(1, min(gates_per_layer, channels // LEAST_CHANNELS))


_SYNCHRONIZED = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
"""Classes of modules that keep weights the same across processes, those they were made with.

By name, since importing them takes long.
"""


def _treats_channels_alone(layer: nn.Module) -> bool:
    """Whether leaving out some channels changes none of the others."""
    return isinstance(layer, _OF_EACH_CHANNEL) or type(layer).__name__ in _OF_EACH_CHANNEL_BY_NAME


def _is_identity_in_evaluation(layer: nn.Module) -> bool:
    """Whether a layer gives what it gets in evaluation."""
    return type(layer) is nn.Identity or type(layer).__name__ in ("DropBlock2d", "DropPath")


def _is_elementwise(layer: nn.Module) -> bool:
    """Whether a layer is an activation, one that does not depend on which channel it is."""
    return next(layer.parameters(), None) is None and type(layer).__module__ in _ACTIVATIONS


_ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations")
_OF_EACH_CHANNEL = (
    nn.Identity,
    nn.AvgPool2d,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
_OF_EACH_CHANNEL_BY_NAME = {"BlurPool2d", "DropBlock2d", "FrozenBatchNorm2d", "FrozenBatchNormAct2d"}
"""Classes of layers that treat each channel alone; by name where importing them would load a library."""


def _class_of(value: object) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"
