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
        super().__init__()
        self.train(block.training)
        for name, layer in block.named_children():
            self.add_module(name, layer)
        self.downsample = getattr(block, "downsample", None)
        in_channels = self.conv1.in_channels
        for convolution, (_, gate) in self.convolutions.items():
            if gate is not None:
                layer = self.get_submodule(convolution)
                assert isinstance(layer, nn.Conv2d)
                made = ChannelGate(in_channels, layer.out_channels, hidden, bias=bias)
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

    All weights stay, under their names; the gates' are new. As long as all gates are open the outputs are the
    same, to the bit. Gate before the optimizer is made, so that it knows the gates.

    Args:
        resnet: a torchvision ResNet, ResNeXt or Wide ResNet, or a module that holds one, such as its FCN and
            DeepLab.
        hidden: width of the MLP in each gate.
        bias: added to the gates' initial logits. 0 suits training from the start, where half of the channels
            are open at first; a trained network keeps more of what it knows with 2 or 3.

    Returns:
        The same module.

    Raises:
        ValueError: if it has no residual blocks of torchvision, or is gated already.

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
    from torchvision.models.resnet import BasicBlock, Bottleneck

    gated_by_type: dict[type[nn.Module], type[GatedBlock]] = {
        BasicBlock: GatedBasicBlock,
        Bottleneck: GatedBottleneck,
    }
    if any(isinstance(module, GatedBlock) for module in resnet.modules()):
        raise ValueError(f"resnet must not be gated yet, received a gated {type(resnet).__name__}")
    gated = {
        block: gated_by_type[type(block)](block, hidden, bias)
        for block in resnet.modules()
        if type(block) in gated_by_type
    }
    if not gated:
        raise ValueError(
            "resnet must hold residual blocks of torchvision (BasicBlock or Bottleneck), "
            f"received a {type(resnet).__name__} without any"
        )
    if resnet in gated:
        raise ValueError(
            "resnet must hold residual blocks, received a block; GatedBasicBlock(block) gates one"
        )
    for parent in [*resnet.modules()]:
        # Not named_children, which leaves out a block that is used a second time.
        for name, child in [*parent._modules.items()]:
            if child in gated:
                setattr(parent, name, gated[child])
    return resnet
