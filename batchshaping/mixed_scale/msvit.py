"""MSViT: a Vision Transformer whose tokens have two scales, region by region."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchshaping.gates.cost import Run, is_measuring
from batchshaping.gates.gate import Gate, whole_number
from batchshaping.mixed_scale.attention import AttentionSettings, GatedAttention, run_with_attention
from batchshaping.mixed_scale.cost import TokenTerm
from batchshaping.mixed_scale.gate import ScaleGate
from batchshaping.mixed_scale.packed import PACKINGS, Sequences, through
from batchshaping.mixed_scale.tokens import Cut, Tokenizer, on_fine_grid, scale_of_tokens
from batchshaping.mixed_scale.vits import ViTAdapter, adapter_of

__all__ = ["MSViT", "PackedMSViT"]


class MSViT(nn.Module):
    r"""A Vision Transformer that looks closely only where it matters: tokens of two scales, region by region.

    The image is cut into regions. A gate reads each region and decides: fine (open) gives a token for each of
    the region's patches, coarse (closed) gives one token for the region reduced to the size of a patch. The
    tokens go through the blocks of the ViT, which stays as it is, with its weights.

    As a module it computes all tokens of both scales, with those that are off masked out of every attention,
    so that the gates can be trained. :func:`~batchshaping.gates.inference.conditional_inference` makes a
    :class:`PackedMSViT` of it, which computes only the tokens that are on.

    Where all regions are fine the outputs are those of the ViT: to the bit in :class:`PackedMSViT`, and here
    up to rounding, since an attention with a mask adds up in another order.

    Args:
        vit: a ``VisionTransformer`` of timm or torchvision. It is used, not copied. Register tokens, any pool
            and head, position embeddings with the class token or without, and images of dynamic size are
            supported.
        coarse: pixels along the side of a region: 2 or 4 patches.
        hidden: width of the gate's hidden layers.
        layers: number of the gate's layers.
        bias: added to the gate's initial logits: with log(p / (1 - p)), about a share p of the regions is
            fine at first.
        gate: another gate in place of this one, which is then not made: a rule, or one of your own that maps
            regions of shape (N, regions, channels, coarse, coarse) to decisions of shape (N, regions).

    Shape:
        images are (N, channels, H, W), of a size that the ViT takes. The gates are (N, regions), by rows.

    Raises:
        ValueError: if the ViT is of another class, or has parts with no place among tokens of two scales; if
            the size of a region is not 2 or 4 patches; if images are of a size that the ViT does not take.

    References:
        Havtorn, Royer, Blankevoort and Bejnordi, MSViT: Dynamic Mixed-Scale Tokenization for Vision
        Transformers, ICCV Workshops 2023, https://arxiv.org/abs/2307.02321.

    Example:
        >>> import timm, batchshaping as bs
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
        >>> msvit = MSViT(vit, coarse=32)
        >>> msvit(torch.randn(2, 3, 224, 224)).shape, msvit.gate.decisions.shape
        (torch.Size([2, 10]), torch.Size([2, 49]))
        >>> shape = bs.GeneralizedBatchShapingLoss(49, hyperprior=bs.Beta(3, 7))
        >>> loss = shape(msvit.gate.probabilities)
    """

    def __init__(
        self,
        vit: nn.Module,
        coarse: int = 32,
        *,
        hidden: int = 32,
        layers: int = 4,
        bias: float = 0.0,
        gate: Gate | None = None,
    ) -> None:
        super().__init__()
        adapter = adapter_of(vit)
        embedding = adapter.embedding
        patch = embedding.kernel_size[0]
        coarse = whole_number("coarse", coarse, least=1)
        if coarse not in (2 * patch, 4 * patch):
            raise ValueError(
                f"coarse must be 2 or 4 patches, {2 * patch} or {4 * patch} pixels, received {coarse}"
            )
        self.coarse = coarse
        self._adapter = type(adapter)
        self._last_cut: Cut | None = None
        self.vit = vit
        if gate is None:
            # Chance is that of the CPU, and in single precision, wherever the ViT is and whatever its type.
            features = embedding.in_channels * coarse**2
            gate = ScaleGate(features, hidden, layers, bias, device="cpu", dtype=torch.float32)
        self.gate = gate.to(embedding.weight)
        self.attention = GatedAttention()
        self.train(vit.training)

    @property
    def tokenizer(self) -> Tokenizer:
        """What makes tokens of images."""
        adapter = self._adapter(self.vit)
        return Tokenizer(adapter, self.coarse // adapter.embedding.kernel_size[0])

    def cut(self, images: Tensor) -> Cut:
        """How images of shape (N, channels, H, W) are cut into regions."""
        return self.tokenizer.cut(images)

    def forward(self, images: Tensor) -> Tensor:
        """The outputs of the ViT for images of shape (N, channels, H, W)."""
        features = self._features(images)
        return self._adapter(self.vit).head(features.prefix, features.patches)

    def grid_features(self, images: Tensor) -> Tensor:
        """The features of all patches before the head, those of a coarse token repeated over its region.

        For dense prediction, such as segmentation: no region is lost. They carry a gradient for the gates.

        Args:
            images: of shape (N, channels, H, W).

        Returns:
            Features of shape (N, width, rows, columns), one for each fine patch.

        Example:
            >>> import timm
            >>> msvit = MSViT(timm.create_model("vit_tiny_patch16_224", depth=1))
            >>> to_classes = nn.Conv2d(192, 21, kernel_size=1)
            >>> to_classes(msvit.grid_features(torch.randn(2, 3, 224, 224))).shape
            torch.Size([2, 21, 14, 14])
        """
        features = self._features(images)
        grid = (features.cut.rows, features.cut.columns)
        by_patch = features.patches().transpose(1, 2)
        return by_patch.reshape(*by_patch.shape[:2], *grid)

    def _features(self, images: Tensor) -> _Features:
        tokenizer = self.tokenizer
        vit = tokenizer.vit
        self._last_cut = cut = tokenizer.cut(images)
        images, whole_regions = tokenizer.padded(images, cut)
        decisions = self.gate(tokenizer.regions(whole_regions))
        tokens = vit.before_blocks(tokenizer.all_tokens(images, whole_regions, cut))
        sizes = [tokens.shape[1] - cut.patches - cut.regions, cut.patches, cut.regions]
        tokens = self._through_blocks(vit, tokens, scale_of_tokens(decisions, cut, sizes[0]))
        prefix, fine, coarse = vit.after_blocks(tokens).split(sizes, dim=1)
        return _Features(prefix, lambda: on_fine_grid(fine, coarse, decisions, cut), cut)

    def extra_repr(self) -> str:
        return f"coarse={self.coarse}"

    def _through_blocks(self, vit: ViTAdapter, tokens: Tensor, on: Tensor) -> Tensor:
        def attend(query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
            attended: Tensor = self.attention(query, key, value, on, settings)
            return attended

        def run(block: nn.Module, tokens: Tensor) -> Tensor:
            # Within what may be computed again in the backward pass, where no mode of the forward pass is on.
            return run_with_attention(block, tokens, attend)

        for block in vit.blocks:
            if vit.recomputes and torch.is_grad_enabled():
                tokens = checkpoint(run, block, tokens, use_reentrant=False)
            else:
                tokens = run(block, tokens)
        return tokens

    def inference_twin(self, packing: str = "flat") -> PackedMSViT:
        """The module that computes only the tokens that are on, for inference, with the same outputs.

        It shares the ViT and the gate with this module: nothing is copied, and what is done to the gate of
        one, such as forcing it, holds for the other.

        Args:
            packing: how sequences of different lengths are computed in one batch, see :class:`PackedMSViT`.
        """
        return PackedMSViT(self, packing)

    def cost_terms(self, run: Run) -> Iterator[TokenTerm]:
        """The patch embedding and the layers of the blocks, by the tokens that they have to compute."""
        vit, cut, gates = self._adapter(self.vit), self._last_cut, run.gate("gate")
        assert cut is not None  # the run that was measured
        patches = cut.patches_of_region("cpu").double()
        fine, coarse = (inner for inner in run if inner.module is vit.embedding)
        yield TokenTerm(fine.name, fine.macs / cut.patches, gates, 0, patches)
        yield TokenTerm(coarse.name, coarse.macs / cut.regions, gates, cut.regions, -torch.ones_like(patches))
        prefix = len(vit.prefix())
        every, coarsest = prefix + cut.patches + cut.regions, prefix + cut.regions
        blocks = {*vit.blocks}
        for block in (inner for inner in run if inner.module in blocks):
            for layer in block:
                degree = 2 if layer.module is self.attention else 1
                if layer.macs > 0:
                    macs = layer.macs / every**degree
                    yield TokenTerm(layer.name, macs, gates, coarsest, patches - 1, degree)


class _Features(NamedTuple):
    """What the blocks made of images: features of shape (N, tokens, width).

    Attributes:
        prefix: of the tokens before those of the patches.
        patches: gives those of the patches, on the fine grid.
        cut: how the images were cut.
    """

    prefix: Tensor
    patches: Callable[[], Tensor]
    cut: Cut


class PackedMSViT(MSViT):
    """An MSViT for inference, which computes only the tokens that are on.

    Its outputs are those of the MSViT up to rounding, and where all regions are fine those of the ViT, to the
    bit; in a copy by ``conditional_inference``, which has packed weights, these too up to rounding.
    Multiply-adds are counted as those of the MSViT.

    Args:
        msvit: the MSViT, with which it shares the ViT and the gate.
        packing: how sequences of different lengths are computed in one batch. A batch in which all have the
            same length, such as one image, is computed as any other in each case.

            - ``"flat"``: linear layers over all tokens of the batch, attention for sequences of the same
              length together. On CUDA devices in half precision it is torch's ``varlen_attn`` if there is
              one.
            - ``"buckets"``: sequences of the same length go through the blocks together.
            - ``"padded"``: all sequences are filled up to the longest, and the filling is masked.

    Raises:
        ValueError: if there is no such packing.
        RuntimeError: if it is called in training.

    Example:
        >>> import timm, batchshaping as bs
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10)
        >>> msvit, images = MSViT(vit).eval(), torch.randn(2, 3, 224, 224)
        >>> fast = PackedMSViT(msvit)
        >>> with torch.no_grad():
        ...     torch.allclose(fast(images), msvit(images), atol=1e-5)
        True
    """

    def __init__(self, msvit: MSViT, packing: str = "flat") -> None:
        nn.Module.__init__(self)
        if packing not in PACKINGS:
            raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, received {packing!r}")
        self.packing = packing
        self.coarse, self._adapter, self._last_cut = msvit.coarse, msvit._adapter, msvit._last_cut
        self.vit, self.gate, self.attention = msvit.vit, msvit.gate, msvit.attention
        self.training = msvit.training

    def inference_twin(self, packing: str | None = None) -> PackedMSViT:
        """The same with another packing, or the module itself."""
        return self if packing in (None, self.packing) else PackedMSViT(self, packing or self.packing)

    @torch.no_grad()
    def _features(self, images: Tensor) -> _Features:
        if self.training or self.gate.training or self.vit.training:
            raise RuntimeError("inference must be in evaluation, received a module in training: call eval()")
        if is_measuring():
            return super()._features(images)
        tokenizer = self.tokenizer
        vit, cut = tokenizer.vit, tokenizer.cut(images)
        images, whole_regions = tokenizer.padded(images, cut)
        decisions = self.gate(tokenizer.regions(whole_regions))
        sizes = [len(vit.prefix()), cut.patches, cut.regions]
        # Not a number counts as on, as in the masked attention.
        on = scale_of_tokens(decisions, cut, sizes[0]) != 0
        on_by_scale = on.split(sizes, dim=1)
        if on_by_scale[1].all() and not on_by_scale[2].any():
            # The ViT's own sequence, in its own order in memory too.
            fine = vit.before_blocks(tokenizer.fine_tokens(images, cut))
            fine = vit.after_blocks(through(vit.blocks, fine))
            return _Features(fine[:, : sizes[0]], lambda: fine[:, sizes[0] :], cut)
        sequences = Sequences.of(on)
        places = sequences.place.split(sizes, dim=1)
        tokens = tokenizer.tokens_that_are_on(images, whole_regions, cut, on)
        if len(images) > 1:  # Those of one image are in order.
            of_scales = zip(places, on_by_scale, strict=True)
            order = torch.cat([place[is_on] for place, is_on in of_scales])
            tokens = torch.empty_like(tokens).index_copy_(0, order, tokens)
        tokens = vit.after_blocks(PACKINGS[self.packing](vit.before_blocks(tokens), sequences, vit.blocks))

        def patches() -> Tensor:
            region = cut.region_of_patch(on.device)
            return tokens[torch.where(on_by_scale[1], places[1], places[2][:, region])]

        return _Features(tokens[places[0]], patches, cut)
