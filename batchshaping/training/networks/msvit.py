"""Vision Transformers with tokens of two scales: a small one for small images, and timm's for large ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from batchshaping.gates.gate import Gate
from batchshaping.mixed_scale.msvit import MSViT
from batchshaping.mixed_scale.packed import PACKINGS
from batchshaping.mixed_scale.rules import ChanceGate, EntropyGate
from batchshaping.mixed_scale.tokens import scale_of_tokens
from batchshaping.mixed_scale.vits import adapter_of
from batchshaping.training.data.dataset import Data
from batchshaping.training.networks.network import Network
from batchshaping.training.regions import findings_on_regions
from batchshaping.training.sections import Count, Share

__all__ = ["TIMM_NETWORKS", "MixedScaleViT"]

TIMM_NETWORKS = {f"msvit-{size}16": f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
"""Names of the networks for large images, with those that timm has for the ViTs in them."""


class MixedScaleViT(Network):
    """A Vision Transformer with a gate for each region of the image, or the same without gates.

    Example:
        >>> import torch
        >>> network = MixedScaleViT(network="msvit-mini").build(classes=10, shape=(1, 64, 64))
        >>> network(torch.randn(2, 1, 64, 64)).shape, network.gate.decisions.shape
        (torch.Size([2, 10]), torch.Size([2, 16]))
    """

    kind = "mixed-scale tokens"
    names = ("msvit-mini", *TIMM_NETWORKS)

    patch: Count = 8
    """Number of pixels along the side of a fine patch of a small ViT (msvit-mini)."""
    embedding: Count = 64
    """Width of the tokens of a small ViT."""
    depth: Count = 3
    """Number of blocks of a small ViT."""
    heads: Count = 4
    """Number of attention heads of a small ViT."""
    pretrained: bool = False
    """Whether a ViT for large images starts from timm's weights."""
    gated: bool = True
    """Whether the tokens have two scales, chosen by gates."""
    coarse_side: Annotated[int, Field(ge=2, le=4, multiple_of=2)] = 2
    """Number of patches along the side of a coarse region."""
    gate: Literal["learned", "entropy", "chance"] = "learned"
    """What chooses the scale of a region: a gate that is learned; a threshold of the entropy of its pixels;
    or chance."""
    density: Share | None = None
    """Share of regions that are fine where entropy or chance chooses."""
    scale_hidden: Count = 32
    """Width of the hidden layers of the gate that chooses scales."""
    scale_layers: Count = 4
    """Number of layers of the gate that chooses scales."""
    gate_bias: Annotated[float, Field(allow_inf_nan=False)] = 3.0
    """Added to the gates' initial logits. With 0, half of the regions start fine; with 3, nearly all."""

    @model_validator(mode="after")
    def _density_of_a_rule(self) -> MixedScaleViT:
        if (self.gate == "learned") != (self.density is None):
            needed = "none for a learned gate" if self.gate == "learned" else f"given for gate {self.gate}"
            raise ValueError(f"density must be {needed}, received {self.density}")
        return self

    @property
    def without_effect(self) -> tuple[str, ...]:
        return ("pretrained",) if self._is_small else ("patch", "embedding", "depth", "heads")

    @property
    def _is_small(self) -> bool:
        return self.name not in TIMM_NETWORKS

    @property
    def reference(self) -> str:
        if not self._is_small:
            return f"ViT-{self.name.removeprefix('msvit-').removesuffix('16').capitalize()}/16, all fine"
        return f"ViT/{self.patch}, width {self.embedding}, depth {self.depth}, {self.heads} heads, all fine"

    def recipe(self, budget: float) -> dict[str, Any]:
        # Of k² patches in a region, a coarse one leaves one token.
        patches = self.coarse_side**2
        density = min(max((patches * budget - 1) / (patches - 1), 0.02), 0.98)
        return {
            **super().recipe(budget),
            "scale_layers": 3,
            "gate_bias": round(math.log(density / (1 - density)), 3),
            "hyperprior": (round(10 * density, 3), round(10 * (1 - density), 3)),
            "shaping": 20.0,
            "shaping_end": None,
            "penalty": 0.0,
            "noise_end": 0.8,
            "learning_rate": 1e-3,
            "gate_learning_rate": 4e-3,
            "prior_learning_rate": 0.05,
        }

    @property
    def library_weights(self) -> str | None:
        return f"timm:{TIMM_NETWORKS[self.name]}" if self.pretrained else None

    def ungated(self, classes: int, shape: tuple[int, int, int]) -> nn.Module:
        channels, *size = shape
        if any(side % self._patch for side in size):
            raise ValueError(
                f"patch must divide the sides of images of {size[0]} x {size[1]} pixels, "
                f"received {self._patch}"
            )
        settings: dict[str, Any] = {"num_classes": classes, "in_chans": channels, "img_size": tuple(size)}
        if not self._is_small:
            import timm

            vit: nn.Module = timm.create_model(TIMM_NETWORKS[self.name], **settings)
            return vit
        if self.embedding % self.heads:
            raise ValueError(f"embedding must be a multiple of {self.heads} heads, received {self.embedding}")
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            patch_size=self.patch,
            embed_dim=self.embedding,
            depth=self.depth,
            num_heads=self.heads,
            **settings,
        )

    @property
    def _patch(self) -> int:
        return self.patch if self._is_small else 16

    def with_gates(self, network: nn.Module) -> nn.Module:
        if not self.gated:
            return network
        return MSViT(
            network,
            self.coarse_side * self._patch,
            hidden=self.scale_hidden,
            layers=self.scale_layers,
            bias=self.gate_bias,
            gate=None if self.density is None else _RULES[self.gate](self.density),
        )

    def findings(self, network: nn.Module, data: Data, metrics: dict[str, Any]) -> dict[str, Any]:
        return {"regions": findings_on_regions(network, data, metrics)} if isinstance(network, MSViT) else {}

    def inference_copies(self, network: nn.Module, example: Tensor | None = None) -> dict[str, nn.Module]:
        flat: Any = super().inference_copies(network, example)["conditional"]
        others = {packing: flat.inference_twin(packing) for packing in PACKINGS if packing != flat.packing}
        return {"conditional": flat, **others}

    def after_gates(self, network: nn.Module) -> nn.Module:
        vit = network.vit if isinstance(network, MSViT) else network
        return next(iter(adapter_of(vit).blocks))

    def facts(self, copy: nn.Module, images: Tensor) -> dict[str, float]:
        assert isinstance(copy, MSViT)
        cut = copy.cut(images)
        prefix = len(adapter_of(copy.vit).prefix())
        lengths = (scale_of_tokens(copy.gate.decisions, cut, prefix) != 0).sum(dim=1).double()
        return {
            "tokens": lengths.mean().item(),
            "padded tokens": lengths.max().item(),
            "tokens of the ViT": prefix + cut.patches,
        }


_RULES: dict[str, Callable[[float], Gate]] = {"entropy": EntropyGate, "chance": ChanceGate}
