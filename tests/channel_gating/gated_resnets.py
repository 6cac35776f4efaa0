"""Gated ResNets whose every layer has a part in the output, small ones and published ones."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import batchshaping as bs
from batchshaping.channel_gating.resnets import SmallImageResNet


def with_statistics(model: nn.Module) -> nn.Module:
    """With normalizations that do something."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def tiny(block: type[nn.Module], channels: int = 64, stride: int = 1, **arguments: int) -> nn.Sequential:
    """Two blocks between a stem and a head."""
    out = channels * block.expansion
    downsample = nn.Sequential(nn.Conv2d(24, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        block(24, channels, stride, downsample, **arguments),
        block(out, channels, **arguments),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(out, 5),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: tiny(BasicBlock, stride=2),
    "basic, no multiple of 16": lambda: tiny(BasicBlock, 50),
    "bottleneck": lambda: tiny(Bottleneck, stride=2),
    "bottleneck, no multiple of 16": lambda: tiny(Bottleneck, 50),
    "ResNeXt": lambda: tiny(Bottleneck, stride=2, groups=8, base_width=8),
    "ResNeXt, groups that gates divide": lambda: tiny(Bottleneck, groups=2, base_width=24),
    "dilated": lambda: tiny(Bottleneck, dilation=2),
    "small images": lambda: SmallImageResNet(8, 5, width=32),
}
LARGE: dict[str, Callable[[], nn.Module]] = {
    **{
        name: lambda name=name: torchvision.models.get_model(name, num_classes=5)
        for name in ("resnet18", "resnet34", "resnet50", "resnext50_32x4d")
    },
    **{
        f"timm {name}": lambda name=name: timm.create_model(name, num_classes=5)
        for name in ("resnet18", "resnet26d", "seresnet50", "resnetaa50")
    },
    **{
        name: lambda name=name: torchvision.models.get_model(name, weights_backbone=None, num_classes=3)
        for name in ("fcn_resnet50", "deeplabv3_resnet50")
    },
}


def make(name: str, gates: object = 8) -> nn.Module:
    torch.manual_seed(0)
    return bs.gate_resnet(with_statistics({**NETWORKS, **LARGE}[name]()), gates_per_layer=gates).eval()


def output(y: Tensor | dict[str, Tensor]) -> Tensor:
    return y["out"] if isinstance(y, dict) else y
