"""ResNets whose channels are gated: those for small images, and torchvision's for large ones."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import nn

from batchshaping.channel_gating.blocks import gate_resnet
from batchshaping.channel_gating.resnets import SmallImageResNet
from batchshaping.training.networks.network import Network
from batchshaping.training.sections import Count

__all__ = ["IMAGENET_NETWORKS", "SMALL_IMAGE_NETWORKS", "GatedResNet"]

SMALL_IMAGE_NETWORKS = {f"resnet{depth}": depth for depth in (8, 14, 20, 32, 44, 56, 110)}
"""Names of the networks for small images, with their depth."""

IMAGENET_NETWORKS = ("resnet18", "resnet34", "resnet50")
"""Names of the networks for large images, which are torchvision's."""


class GatedResNet(Network):
    """A ResNet with a gate for each inner channel of its blocks, or the same without gates.

    Example:
        >>> import torch
        >>> network = GatedResNet(network="resnet8", width=8).build(classes=10, shape=(1, 8, 8))
        >>> network(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    kind = "channel gating"
    names = (*SMALL_IMAGE_NETWORKS, *IMAGENET_NETWORKS)

    name: str = Field("resnet8", alias="network")
    """ResNet: resnet8, 14, 20, 32, 44, 56 or 110 for small images; resnet18, 34 or 50 for large ones."""
    width: Count = 16
    """Number of channels in the first stage of a ResNet for small images."""
    stem_stride: Annotated[int, Field(ge=1, le=2)] = 1
    """Stride of the first convolution of a ResNet for small images."""
    inner: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the channels inside the blocks of a ResNet for small images that are there: below 1, the
    ungated network of the form that gates give."""
    pretrained: bool = False
    """Whether a ResNet for large images starts from torchvision's weights."""
    hidden: Count = 16
    """Width of the hidden layer in each gate."""
    gates_per_layer: Count | None = None
    """Number of gates in a layer, each for as many channels, at least 16; none is a gate for each channel."""
    gate_bias: Annotated[float, Field(allow_inf_nan=False)] = 3.0
    """Added to the gates' initial logits. With 0, half of the channels start open; with 3, nearly all."""

    @property
    def without_effect(self) -> tuple[str, ...]:
        return ("pretrained",) if self._is_small else ("width", "stem_stride", "inner")

    @property
    def _is_small(self) -> bool:
        return self.name in SMALL_IMAGE_NETWORKS

    @property
    def reference(self) -> str:
        depth = self.name.removeprefix("resnet")
        parts = [f"ResNet-{depth}"]
        if self._is_small:
            parts += [f"width {self.width}", *[f"stem stride {self.stem_stride}"] * (self.stem_stride > 1)]
            parts += [f"{self.inner:.0%} of the inner channels"] * (self.inner < 1)
        return ", ".join([*parts, "ungated"])

    def recipe(self, budget: float) -> dict[str, Any]:
        # Groups of channels save time, not only multiply-adds.
        return {
            **super().recipe(budget),
            "gates_per_layer": 8,
            "learning_rate": 0.05,
            "gate_learning_rate": 0.05,
            # Early, since the network is trained; stronger, since the teacher holds against it.
            "penalty": 10.0,
            "penalty_begin": 0.1,
            "penalty_end": 0.5,
        }

    @property
    def library_weights(self) -> str | None:
        return f"torchvision:{self.name}" if self.pretrained else None

    def ungated(self, classes: int, shape: tuple[int, int, int]) -> nn.Module:
        channels = shape[0]
        if self._is_small:
            depth = SMALL_IMAGE_NETWORKS[self.name]
            return SmallImageResNet(depth, classes, channels, self.width, self.stem_stride, self.inner)
        from torchvision.models import get_model

        resnet: Any = get_model(self.name, num_classes=classes)
        first = resnet.conv1
        if channels != first.in_channels:
            resnet.conv1 = nn.Conv2d(
                channels, first.out_channels, first.kernel_size, first.stride, first.padding, bias=False
            )
        return resnet  # type: ignore[no-any-return]

    def with_gates(self, network: nn.Module) -> nn.Module:
        if not self.gated:
            return network
        return gate_resnet(network, self.hidden, self.gate_bias, self.gates_per_layer)
