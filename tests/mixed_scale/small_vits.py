"""Small Vision Transformers of both libraries, with all that the libraries let vary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

import batchshaping as bs

PATCH = 4
SIZE = 16


def of_timm(**settings: Any) -> nn.Module:
    given = {"img_size": SIZE, "in_chans": 2, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    vit: nn.Module = timm.models.VisionTransformer(patch_size=PATCH, **{**given, **settings})
    return vit


def of_torchvision(**settings: Any) -> nn.Module:
    vit = TorchvisionViT(SIZE, PATCH, 2, 3, 24, 48, num_classes=5, **settings)
    vit.conv_proj = nn.Conv2d(2, 24, PATCH, PATCH)
    nn.init.normal_(vit.heads.head.weight, std=0.1)
    made: nn.Module = vit
    return made


VITS: dict[str, Callable[[], nn.Module]] = {
    "timm": of_timm,
    "registers, no positions of class tokens": lambda: of_timm(reg_tokens=3, no_embed_class=True),
    "registers, with positions": lambda: of_timm(reg_tokens=2),
    "average": lambda: of_timm(global_pool="avg", class_token=False),
    "average, class token": lambda: of_timm(global_pool="avg", pool_include_prefix=True),
    "average and maximum": lambda: of_timm(global_pool="avgmax"),
    "attention pool": lambda: of_timm(global_pool="map", class_token=False),
    "no pool": lambda: of_timm(global_pool=""),
    "no positions": lambda: of_timm(pos_embed="none"),
    "normalized": lambda: of_timm(
        qk_norm=True, pre_norm=True, init_values=0.5, embed_norm_layer=nn.LayerNorm
    ),
    "parallel scaling": lambda: of_timm(block_fn=ParallelScalingBlock),
    "parallel things": lambda: of_timm(block_fn=ParallelThingsBlock),
    "post-norm": lambda: of_timm(block_fn=ResPostBlock),
    "differential attention": lambda: of_timm(attn_layer="diff", num_heads=2),
    "any size": lambda: of_timm(dynamic_img_size=True),
    "any size, filled up": lambda: of_timm(dynamic_img_size=True, dynamic_img_pad=True, reg_tokens=1),
    "torchvision": of_torchvision,
    "torchvision, deeper head": lambda: of_torchvision(representation_size=7),
}
SIZES = {"any size": (28, 20), "any size, filled up": (26, 11)}
"""Sizes of images that are not those that a ViT was made for; patches do not fill the last regions."""


def made(name: str, side: int = 2, **settings: Any) -> tuple[nn.Module, bs.MSViT, Tensor]:
    """A ViT in evaluation, the MSViT around it, and images."""
    torch.manual_seed(0)
    vit = VITS[name]().eval()
    for parameter in vit.parameters():  # what starts at zero or one would hide mistakes
        if parameter.ndim > 1 and parameter.abs().max() < 1e-4:
            nn.init.normal_(parameter, std=0.5)
    msvit = bs.MSViT(vit, coarse=side * PATCH, **settings).eval()
    return vit, msvit, torch.randn(6, 2, *SIZES.get(name, (SIZE, SIZE)))


def decide(msvit: bs.MSViT, decisions: Tensor) -> None:
    """Let the gate of an MSViT and of its twin give these decisions."""
    msvit.gate._forced = (lambda logits: decisions.to(logits),)
