"""The residual networks for small images (CIFAR) and for large ones (ImageNet), ungated and gated.

They are built of torchvision's blocks and then gated, so that an ungated and a gated network have the same
weights but for those of the gates.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from batchshaping.channel_gating.blocks import GatesPerLayer, gate_resnet

__all__ = [
    "SmallImageResNet",
    "gated_resnet18",
    "gated_resnet20",
    "gated_resnet32",
    "gated_resnet34",
    "gated_resnet50",
    "gated_resnet56",
]


class SmallImageResNet(nn.Sequential):
    """The residual network for images of 8 to 64 pixels: three stages of basic blocks.

    Args:
        depth: number of layers, 6 n + 2 for n blocks a stage: 8, 14, 20, 32, 44, 56, 110, ...
        num_classes: number of outputs.
        in_channels: channels of the images.
        width: channels of the first stage; the second has twice, the third four times as many.
        stem_stride: stride of the first convolution; 2 makes everything after it four times cheaper.
        inner: share of the channels between the two convolutions of each block that are there, rounded to
            whole channels, at least one. Below 1 it is the ungated network of the form that gates give.

    Raises:
        ValueError: if there is no network of that depth, or the share is not in (0, 1].

    References:
        He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, CVPR 2016,
        https://arxiv.org/abs/1512.03385; shortcuts between stages are 1 x 1 convolutions (their option B).

    Example:
        >>> import torch
        >>> SmallImageResNet(depth=20)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        stem_stride: int = 1,
        inner: float = 1.0,
    ) -> None:
        from torchvision.models.resnet import BasicBlock

        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6 n + 2 with n = 1, 2, ..., received {depth}")
        if not 0 < inner <= 1:
            raise ValueError(f"inner must be in (0, 1], received {inner}")
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False),
            bn1=nn.BatchNorm2d(width),
            relu=nn.ReLU(inplace=True),
        )
        before = width
        for stage, channels in enumerate((width, 2 * width, 4 * width)):
            made = []
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                shortcut = None
                if stride > 1:
                    shortcut = nn.Sequential(
                        nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
                    )
                made.append(BasicBlock(before, channels, stride, shortcut))
                if inner < 1:
                    between = max(round(inner * channels), 1)
                    made[-1].conv1 = nn.Conv2d(before, between, 3, stride, padding=1, bias=False)
                    made[-1].bn1 = nn.BatchNorm2d(between)
                    made[-1].conv2 = nn.Conv2d(between, channels, 3, padding=1, bias=False)
                before = channels
            layers[f"layer{stage + 1}"] = nn.Sequential(*made)
        layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(before, num_classes)
        super().__init__(layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def gated_resnet20(
    num_classes: int = 10, in_channels: int = 3, hidden: int = 16, gates_per_layer: GatesPerLayer = None
) -> SmallImageResNet:
    """The gated ResNet-20 for small images such as CIFAR's: 9 gated basic blocks of 16, 32 and 64 channels.

    Args:
        num_classes: number of outputs.
        in_channels: channels of the images.
        hidden: width of the MLP in each gate.
        gates_per_layer: how many gates each inner layer has, as in
            :func:`~batchshaping.channel_gating.blocks.gate_resnet`.

    Example:
        >>> import torch, batchshaping as bs
        >>> network = bs.gated_resnet20().eval()
        >>> network(torch.randn(2, 3, 32, 32)).shape, len(bs.gate_decisions(network))
        (torch.Size([2, 10]), 9)
    """
    return gate_resnet(
        SmallImageResNet(20, num_classes, in_channels), hidden, gates_per_layer=gates_per_layer
    )


def gated_resnet32(
    num_classes: int = 10, in_channels: int = 3, hidden: int = 16, gates_per_layer: GatesPerLayer = None
) -> SmallImageResNet:
    """The gated ResNet-32 for small images such as CIFAR's: 15 gated basic blocks of 16, 32 and 64 channels.

    Args:
        num_classes: number of outputs.
        in_channels: channels of the images.
        hidden: width of the MLP in each gate.
        gates_per_layer: how many gates each inner layer has, as in
            :func:`~batchshaping.channel_gating.blocks.gate_resnet`.

    Example:
        >>> import torch, batchshaping as bs
        >>> network = bs.gated_resnet32().eval()
        >>> network(torch.randn(2, 3, 32, 32)).shape, len(bs.gate_decisions(network))
        (torch.Size([2, 10]), 15)
    """
    return gate_resnet(
        SmallImageResNet(32, num_classes, in_channels), hidden, gates_per_layer=gates_per_layer
    )


def gated_resnet56(
    num_classes: int = 10, in_channels: int = 3, hidden: int = 16, gates_per_layer: GatesPerLayer = None
) -> SmallImageResNet:
    """The gated ResNet-56 for small images such as CIFAR's: 27 gated basic blocks of 16, 32 and 64 channels.

    Args:
        num_classes: number of outputs.
        in_channels: channels of the images.
        hidden: width of the MLP in each gate.
        gates_per_layer: how many gates each inner layer has, as in
            :func:`~batchshaping.channel_gating.blocks.gate_resnet`.

    Example:
        >>> import torch, batchshaping as bs
        >>> network = bs.gated_resnet56().eval()
        >>> network(torch.randn(2, 3, 32, 32)).shape, len(bs.gate_decisions(network))
        (torch.Size([2, 10]), 27)
    """
    return gate_resnet(
        SmallImageResNet(56, num_classes, in_channels), hidden, gates_per_layer=gates_per_layer
    )


def gated_resnet18(
    num_classes: int = 1000, hidden: int = 16, gates_per_layer: GatesPerLayer = None
) -> nn.Module:
    """The gated ResNet-18 for large images such as ImageNet's: torchvision's with 8 gated basic blocks.

    With pretrained weights: ``bs.gate_resnet(torchvision.models.resnet18(weights="DEFAULT"), bias=3.0)``.

    Args:
        num_classes: number of outputs.
        hidden: width of the MLP in each gate.
        gates_per_layer: how many gates each inner layer has, as in
            :func:`~batchshaping.channel_gating.blocks.gate_resnet`.

    Example:
        >>> import torch, batchshaping as bs
        >>> network = bs.gated_resnet18().eval()
        >>> network(torch.randn(2, 3, 64, 64)).shape, len(bs.gate_decisions(network))
        (torch.Size([2, 1000]), 8)
    """
    from torchvision.models import resnet18

    network: nn.Module = resnet18(num_classes=num_classes)
    return gate_resnet(network, hidden, gates_per_layer=gates_per_layer)


def gated_resnet34(
    num_classes: int = 1000, hidden: int = 16, gates_per_layer: GatesPerLayer = None
) -> nn.Module:
    """The gated ResNet-34 for large images such as ImageNet's: torchvision's with 16 gated basic blocks.

    With pretrained weights: ``bs.gate_resnet(torchvision.models.resnet34(weights="DEFAULT"), bias=3.0)``.

    Args:
        num_classes: number of outputs.
        hidden: width of the MLP in each gate.
        gates_per_layer: how many gates each inner layer has, as in
            :func:`~batchshaping.channel_gating.blocks.gate_resnet`.

    Example:
        >>> import torch, batchshaping as bs
        >>> network = bs.gated_resnet34().eval()
        >>> network(torch.randn(2, 3, 64, 64)).shape, len(bs.gate_decisions(network))
        (torch.Size([2, 1000]), 16)
    """
    from torchvision.models import resnet34

    network: nn.Module = resnet34(num_classes=num_classes)
    return gate_resnet(network, hidden, gates_per_layer=gates_per_layer)


def gated_resnet50(
    num_classes: int = 1000, hidden: int = 16, gates_per_layer: GatesPerLayer = None
) -> nn.Module:
    """The gated ResNet-50 for large images such as ImageNet's: torchvision's with 16 gated bottleneck blocks.

    With pretrained weights: ``bs.gate_resnet(torchvision.models.resnet50(weights="DEFAULT"), bias=3.0)``.

    Args:
        num_classes: number of outputs.
        hidden: width of the MLP in each gate.
        gates_per_layer: how many gates each inner layer has, as in
            :func:`~batchshaping.channel_gating.blocks.gate_resnet`.

    Example:
        >>> import torch, batchshaping as bs
        >>> network = bs.gated_resnet50().eval()
        >>> network(torch.randn(2, 3, 64, 64)).shape, len(bs.gate_decisions(network))
        (torch.Size([2, 1000]), 32)
    """
    from torchvision.models import resnet50

    network: nn.Module = resnet50(num_classes=num_classes)
    return gate_resnet(network, hidden, gates_per_layer=gates_per_layer)
