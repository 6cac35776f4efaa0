"""The Vision Transformers of timm and torchvision, behind one interface.

An adapter says where the parts of a library's ViT are. It is chosen by the name of the ViT's class, so that
no library is imported: a ViT of it exists only where somebody else has done so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ADAPTERS", "TimmViT", "TorchvisionViT", "ViTAdapter", "adapter_of", "with_prefix"]


class ViTAdapter(ABC):
    """The parts of a Vision Transformer, by the roles that they have in every one.

    Args:
        vit: the Vision Transformer.
    """

    made_for: ClassVar[str]
    """The class of the ViTs, by module and name."""

    def __init__(self, vit: Any) -> None:
        self.vit = vit

    def refused(self) -> str | None:
        """What the ViT has that has no place among tokens of two scales, if anything."""
        embedding = self.embedding
        if type(embedding) is not nn.Conv2d or embedding.kernel_size != embedding.stride:
            return f"a patch embedding that is a {type(embedding).__name__}"
        if embedding.kernel_size[0] != embedding.kernel_size[1] or embedding.padding not in ((0, 0), "valid"):
            return f"patches of {embedding.kernel_size} pixels and padding {embedding.padding}"
        return None

    @property
    @abstractmethod
    def embedding(self) -> nn.Conv2d:
        """The convolution that embeds the patches of an image."""

    @abstractmethod
    def normalized(self, embedded: Tensor) -> Tensor:
        """Embedded patches, of shape (..., width), as the ViT normalizes them."""

    @abstractmethod
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of so many pixels.

        Raises:
            ValueError: if the ViT does not take images of this size.
        """

    @abstractmethod
    def prefix(self) -> Tensor:
        """The tokens before those of the patches, with position embeddings, of shape (tokens, width)."""

    @abstractmethod
    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position embeddings of the patches in a grid of this size, of shape (rows x columns, width)."""

    @abstractmethod
    def before_blocks(self, tokens: Tensor) -> Tensor:
        """What happens to the tokens before the first block."""

    @property
    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """The blocks, in their order."""

    @property
    def recomputes(self) -> bool:
        """Whether blocks are computed again in the backward pass, to save memory."""
        return False

    @abstractmethod
    def after_blocks(self, tokens: Tensor) -> Tensor:
        """What happens to the tokens after the last block."""

    @abstractmethod
    def head(self, prefix: Tensor, patches: Callable[[], Tensor]) -> Tensor:
        """The ViT's outputs.

        Args:
            prefix: the features of the tokens before those of the patches, of shape (N, tokens, width).
            patches: gives the features of the patches, of shape (N, rows x columns, width), if the head needs
                them.
        """

    def embed(self, images: Tensor) -> Tensor:
        """Images of shape (N, channels, H, W) as embedded patches of shape (N, rows x columns, width)."""
        return self.normalized(self.embedding(images).flatten(2).transpose(1, 2))

    def embed_patches(self, patches: Tensor) -> Tensor:
        """Patches of shape (n, channels, height, width), embedded, of shape (n, width).

        A convolution whose kernel is all of its input is a matrix product, which is faster.
        """
        layer = self.embedding
        return self.normalized(F.linear(patches.flatten(1), layer.weight.flatten(1), layer.bias))


class TimmViT(ViTAdapter):
    """The Vision Transformer of timm, with any of its pools, and its own blocks and attention."""

    made_for = "timm.models.vision_transformer.VisionTransformer"

    def refused(self) -> str | None:
        if not hasattr(self.vit.patch_embed, "proj"):
            return f"a patch embedding that is a {type(self.vit.patch_embed).__name__}"
        if not isinstance(self.vit.patch_drop, nn.Identity):
            return "patch dropout"
        for block in self.vit.blocks:
            if type(block).__module__ != self.vit.__class__.__module__:
                return f"blocks that are of {type(block).__module__}.{type(block).__qualname__}"
            for layer in block.modules():
                if not getattr(layer, "fused_attn", True):
                    return "attention that is not fused (set fused_attn = True in its attention layers)"
        return super().refused()

    @property
    def embedding(self) -> nn.Conv2d:
        return self.vit.patch_embed.proj  # type: ignore[no-any-return]

    def normalized(self, embedded: Tensor) -> Tensor:
        return self.vit.patch_embed.norm(embedded)  # type: ignore[no-any-return]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        embedding = self.vit.patch_embed
        down, across = embedding.patch_size
        if not self.vit.dynamic_img_size and embedding.strict_img_size and embedding.img_size is not None:
            if (height, width) != tuple(embedding.img_size):
                raise ValueError(
                    _wrong_size(f"{embedding.img_size[0]} x {embedding.img_size[1]}", height, width)
                )
        elif (height % down or width % across) and not embedding.dynamic_img_pad:
            raise ValueError(_wrong_size(f"multiples of {down} x {across}", height, width))
        return -(-height // down), -(-width // across)

    def prefix(self) -> Tensor:
        vit = self.vit
        tokens = [token[0] for token in (vit.cls_token, vit.reg_token) if token is not None]
        if not tokens:
            return self.embedding.weight.new_empty(0, vit.embed_dim)
        prefix = torch.cat(tokens)
        has_positions = vit.pos_embed is not None and not vit.no_embed_class
        return prefix + vit.pos_embed[0, : len(prefix)] if has_positions else prefix

    def positions(self, grid: tuple[int, int]) -> Tensor:
        vit = self.vit
        if vit.pos_embed is None:
            return self.embedding.weight.new_zeros(grid[0] * grid[1], vit.embed_dim)
        before = 0 if vit.no_embed_class else vit.num_prefix_tokens
        embeddings: Tensor = vit.pos_embed
        if grid != vit.patch_embed.grid_size:
            from timm.layers.pos_embed import resample_abs_pos_embed

            embeddings = resample_abs_pos_embed(embeddings, [*grid], vit.patch_embed.grid_size, before)
        return embeddings[0, before:]

    def before_blocks(self, tokens: Tensor) -> Tensor:
        return self.vit.norm_pre(self.vit.pos_drop(tokens))  # type: ignore[no-any-return]

    @property
    def blocks(self) -> Iterable[nn.Module]:
        return self.vit.blocks  # type: ignore[no-any-return]

    @property
    def recomputes(self) -> bool:
        return bool(self.vit.grad_checkpointing)

    def after_blocks(self, tokens: Tensor) -> Tensor:
        return self.vit.norm(tokens)  # type: ignore[no-any-return]

    def head(self, prefix: Tensor, patches: Callable[[], Tensor]) -> Tensor:
        reads_patches = self.vit.global_pool != "token"
        tokens = with_prefix(prefix, patches()) if reads_patches else prefix
        return self.vit.forward_head(tokens)  # type: ignore[no-any-return]


class TorchvisionViT(ViTAdapter):
    """The Vision Transformer of torchvision."""

    made_for = "torchvision.models.vision_transformer.VisionTransformer"

    def refused(self) -> str | None:
        for block in self.vit.encoder.layers:
            if type(block).__module__ != self.vit.__class__.__module__:
                return f"blocks that are of {type(block).__module__}.{type(block).__qualname__}"
        return super().refused()

    @property
    def embedding(self) -> nn.Conv2d:
        return self.vit.conv_proj  # type: ignore[no-any-return]

    def normalized(self, embedded: Tensor) -> Tensor:
        return embedded

    def grid(self, height: int, width: int) -> tuple[int, int]:
        size, patch = self.vit.image_size, self.vit.patch_size
        if (height, width) != (size, size):
            raise ValueError(_wrong_size(f"{size} x {size}", height, width))
        return size // patch, size // patch

    def prefix(self) -> Tensor:
        return self.vit.class_token[0] + self.vit.encoder.pos_embedding[0, :1]  # type: ignore[no-any-return]

    def positions(self, grid: tuple[int, int]) -> Tensor:
        return self.vit.encoder.pos_embedding[0, 1:]  # type: ignore[no-any-return]

    def before_blocks(self, tokens: Tensor) -> Tensor:
        return self.vit.encoder.dropout(tokens)  # type: ignore[no-any-return]

    @property
    def blocks(self) -> Iterable[nn.Module]:
        return self.vit.encoder.layers  # type: ignore[no-any-return]

    def after_blocks(self, tokens: Tensor) -> Tensor:
        return self.vit.encoder.ln(tokens)  # type: ignore[no-any-return]

    def head(self, prefix: Tensor, patches: Callable[[], Tensor]) -> Tensor:
        return self.vit.heads(prefix[:, 0])  # type: ignore[no-any-return]


ADAPTERS: tuple[type[ViTAdapter], ...] = (TimmViT, TorchvisionViT)
"""The adapters, each for one class of ViTs. One more class here, and its ViTs can be an MSViT's."""


def adapter_of(vit: nn.Module) -> ViTAdapter:
    """The adapter of a ViT.

    Raises:
        ValueError: in one line, if the ViT is of another class than those that have an adapter, has a forward
            pass of its own, or parts that have no place among tokens of two scales.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> adapter_of(vit).grid(224, 224)
        (14, 14)
    """
    name = f"{type(vit).__module__}.{type(vit).__qualname__}"
    adapters = {adapter.made_for: adapter for adapter in ADAPTERS}
    if name not in adapters or "forward" in vars(vit):
        own = " with a forward pass of its own" if "forward" in vars(vit) else ""
        raise ValueError(
            "vit must be a VisionTransformer of timm or torchvision with their own forward pass, "
            f"received a {name}{own}"
        )
    adapter = adapters[name](vit)
    refused = adapter.refused()
    if refused is not None:
        raise ValueError(
            f"vit must have patches, blocks and attention of its library, received one with {refused}"
        )
    return adapter


def with_prefix(prefix: Tensor, patches: Tensor) -> Tensor:
    """One sequence of the prefix and the patches, both of shape (N, tokens, width).

    Without a prefix the patches stay as they lie in memory, on which the rounding of sums over them depends.
    """
    return torch.cat([prefix, patches], dim=1) if prefix.shape[1] else patches


def _wrong_size(expected: str, height: int, width: int) -> str:
    return f"images must be of {expected} pixels, as the ViT takes them, received {height} x {width}"
