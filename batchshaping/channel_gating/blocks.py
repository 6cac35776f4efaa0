r"""Residual blocks with gated inner channels, and a given ResNet made of them.

A gated block computes

.. math::
    y = \mathrm{BN}(W_2 * (G(x) \cdot \mathrm{ReLU}(\mathrm{BN}(W_1 * x)))), \qquad
    x' = \mathrm{ReLU}(y + \mathrm{shortcut}(x))

where the gates G(x) of 0 or 1 read the input x of the block. A bottleneck has two inner convolutions and
gates for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from batchshaping.gates import ChannelGate

__all__ = ["GatedBasicBlock", "GatedBlock", "GatedBottleneck", "gate_resnet"]

_Network = TypeVar("_Network", bound=nn.Module)


class GatedBlock(nn.Module):
    """What gated residual blocks share: they take over the layers of an ungated one, and add gates.

    The layers keep their names, so that weights of the ungated block are weights of this one.

    Args:
        block: a residual block of torchvision; its layers are shared, not copied.
        hidden: width of the MLP in each gate.
        bias: added to the gates' initial logits: the higher, the more channels are open at first.

    Raises:
        ValueError: if the block is of another class, has other layers than convolutions where it should have
            those, or has something under the name of a gate already.
    """

    convolutions: ClassVar[Mapping[str, tuple[str | None, str | None]]]
    """Names of the convolutions, with that of the gate of their input and of their output."""

    conv1: nn.Conv2d
    bn1: nn.Module
    conv2: nn.Conv2d
    bn2: nn.Module
    relu: nn.Module
    downsample: nn.Module | None
    gate1: ChannelGate

    def __init__(self, block: nn.Module, hidden: int = 16, bias: float = 0.0) -> None:
        for ungated, gated in _gated_classes().items():
            if isinstance(self, gated) and not isinstance(block, ungated):
                raise ValueError(
                    f"block must be a {ungated.__name__} of torchvision, received {_class_of(block)}"
                )
        super().__init__()
        self.train(block.training)
        for name, layer in block.named_children():
            self.add_module(name, layer)
        self.downsample = getattr(block, "downsample", None)
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
                self.conv1.in_channels, layer.out_channels, hidden, bias, device="cpu", dtype=torch.float32
            )
            self.add_module(gate, made.to(layer.weight).train(block.training))

    def shortcut(self, x: Tensor) -> Tensor:
        """The block's input, in the shape of its output."""
        return x if self.downsample is None else self.downsample(x)


class GatedBasicBlock(GatedBlock):
    """Two 3 x 3 convolutions with gated channels between them.

    Args:
        block: a ``torchvision.models.resnet.BasicBlock``; its layers are shared, not copied.
        hidden: width of the MLP in each gate.
        bias: added to the gates' initial logits.

    Example:
        >>> import torch
        >>> from torchvision.models.resnet import BasicBlock
        >>> block = GatedBasicBlock(BasicBlock(16, 16))
        >>> block(torch.randn(4, 16, 8, 8)).shape, block.gate1.decisions.shape
        (torch.Size([4, 16, 8, 8]), torch.Size([4, 16]))
    """

    convolutions = {"conv1": (None, "gate1"), "conv2": ("gate1", None)}

    def forward(self, x: Tensor) -> Tensor:
        inner = self.gate1(x) * self.relu(self.bn1(self.conv1(x)))
        outer: Tensor = self.bn2(self.conv2(inner))
        return self.relu(outer + self.shortcut(x))  # type: ignore[no-any-return]


class GatedBottleneck(GatedBlock):
    """A 1 x 1, a 3 x 3 and a 1 x 1 convolution, with gated channels between them.

    Args:
        block: a ``torchvision.models.resnet.Bottleneck``; its layers are shared, not copied.
        hidden: width of the MLP in each gate.
        bias: added to the gates' initial logits.

    Example:
        >>> import torch
        >>> from torchvision.models.resnet import Bottleneck
        >>> block = GatedBottleneck(Bottleneck(64, 16))
        >>> block(torch.randn(4, 64, 8, 8)).shape, block.gate2.decisions.shape
        (torch.Size([4, 64, 8, 8]), torch.Size([4, 16]))
    """

    convolutions = {"conv1": (None, "gate1"), "conv2": ("gate1", "gate2"), "conv3": ("gate2", None)}

    conv3: nn.Conv2d
    bn3: nn.Module
    gate2: ChannelGate

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.gate1(x) * self.relu(self.bn1(self.conv1(x)))
        inner = self.gate2(x) * self.relu(self.bn2(self.conv2(reduced)))
        outer: Tensor = self.bn3(self.conv3(inner))
        return self.relu(outer + self.shortcut(x))  # type: ignore[no-any-return]


def gate_resnet(resnet: _Network, hidden: int = 16, bias: float = 0.0) -> _Network:
    """Gate the inner channels of every residual block of a ResNet, in place.

    All weights stay, under their names; the gates' are new. Each block stays the object that it is, with its
    hooks and whatever else it has, and becomes a gated one by its class. As long as all gates are open the
    outputs are the same, to the bit. Gate before the optimizer is made, so that it knows the gates.

    Args:
        resnet: a torchvision ResNet, ResNeXt or Wide ResNet, or a module that holds one, such as its FCN and
            DeepLab; or a block of one.
        hidden: width of the MLP in each gate.
        bias: added to the gates' initial logits. 0 suits training from the start, where half of the channels
            are open at first; a trained network keeps more of what it knows with 2 or 3.

    Returns:
        The same module.

    Raises:
        ValueError: if it has no residual blocks of torchvision, or one with another forward pass, such as a
            subclass; if it is gated already; or if it is wrapped for many processes, which would not keep the
            gates the same in all of them. Nothing is changed then.

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
    gated = {}
    for name, module in resnet.named_modules():
        if isinstance(module, GatedBlock):
            raise ValueError(f"resnet must not be gated yet, received a gated {type(resnet).__name__}")
        wrapper = _SYNCHRONIZED & {parent.__name__ for parent in type(module).__mro__}
        if wrapper:
            raise ValueError(f"resnet must be gated before it is wrapped, received a {wrapper.pop()}")
        for ungated, gated_class in _gated_classes().items():
            if isinstance(module, ungated):
                # A subclass, or a forward pass of the object's own: the gates would have no place in it.
                if type(module) is not ungated or "forward" in vars(module):
                    where = f"{name!r}, " if name else ""
                    raise ValueError(
                        f"resnet must hold blocks with torchvision's own forward pass, received {where}"
                        f"{_class_of(module)} ({gated_class.__name__}(block) makes a gated one of its layers)"
                    )
                gated[module] = gated_class(module, hidden, bias)
    if not gated:
        raise ValueError(
            "resnet must hold residual blocks of torchvision (BasicBlock or Bottleneck), "
            f"received a {type(resnet).__name__} without any"
        )
    for block, made in gated.items():
        block.__class__ = type(made)
        for name, layer in made.named_children():
            block.add_module(name, layer)
    return resnet


_SYNCHRONIZED = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
"""Classes of modules that keep weights the same across processes, those they were made with.

By name, since importing them takes long.
"""


def _gated_classes() -> dict[type[nn.Module], type[GatedBlock]]:
    """The gated block of each block of torchvision."""
    from torchvision.models.resnet import BasicBlock, Bottleneck

    return {BasicBlock: GatedBasicBlock, Bottleneck: GatedBottleneck}


def _class_of(value: object) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"
