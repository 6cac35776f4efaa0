r"""Tokens of two scales: how an image is cut into regions, and what tokens each region has.

A region of ``side`` x ``side`` patches is either fine, with a token for each of its patches, or coarse, with
one token. The coarse token is the region itself reduced to the size of one patch, each pixel the mean of
``side`` x ``side`` pixels (for a side of 2 this is linear interpolation), and embedded by the same patch
embedding. Its position embedding is the mean of those of the region's patches.

Where the patches of an image do not fill its last regions, these have fewer patches. For their gates and
coarse tokens, the image is continued with its outermost pixels.

After the blocks, features lie on the grid of fine patches again, those of a coarse token repeated over all
patches of its region (:func:`on_fine_grid`). So whatever reads features of patches, such as an average pool
or a decoder for dense prediction, need not know of scales, and no region is lost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from batchshaping.mixed_scale.vits import ViTAdapter, with_prefix

__all__ = ["Cut", "Tokenizer", "on_fine_grid", "scale_of_tokens"]


class Cut(NamedTuple):
    """How the patches of an image are cut into regions.

    Attributes:
        rows: number of rows of fine patches.
        columns: number of columns of fine patches.
        side: number of patches along the side of a region.

    Example:
        >>> Cut(rows=3, columns=4, side=2).region_of_patch().tolist()
        [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3]
    """

    rows: int
    columns: int
    side: int

    @property
    def patches(self) -> int:
        """Number of fine patches."""
        return self.rows * self.columns

    @property
    def grid_of_regions(self) -> tuple[int, int]:
        """Rows and columns of regions."""
        return -(-self.rows // self.side), -(-self.columns // self.side)

    @property
    def regions(self) -> int:
        """Number of regions."""
        down, across = self.grid_of_regions
        return down * across

    def region_of_patch(self, device: torch.device | str | None = None) -> Tensor:
        """The region that each patch is in, in the order of rows, of shape (patches,)."""
        rows, columns = self.grid_of_regions
        region = torch.arange(self.regions, device=device).reshape(rows, 1, columns, 1)
        grid = region.expand(-1, self.side, -1, self.side).reshape(rows * self.side, columns * self.side)
        return grid[: self.rows, : self.columns].flatten()

    def patches_of_region(self, device: torch.device | str | None = None) -> Tensor:
        """How many patches each region has, of shape (regions,)."""
        return self.region_of_patch(device).bincount(minlength=self.regions)


def scale_of_tokens(decisions: Tensor, cut: Cut, prefix: int) -> Tensor:
    """Which tokens are on: those of the prefix, the patches of fine regions, and the coarse regions.

    Args:
        decisions: 1 for each region that is fine and 0 for each that is coarse, of shape (N, regions).
        cut: how the patches are cut into regions.
        prefix: number of tokens before those of the patches.

    Returns:
        Zeros and ones of shape (N, prefix + patches + regions), with the gradient of the decisions.
    """
    always = decisions.new_ones(len(decisions), prefix)
    return torch.cat([always, decisions[:, cut.region_of_patch(decisions.device)], 1 - decisions], dim=1)


def on_fine_grid(fine: Tensor, coarse: Tensor, decisions: Tensor, cut: Cut) -> Tensor:
    """Features on the grid of fine patches, those of a coarse region repeated over all of its patches.

    Args:
        fine: features of all patches, of shape (N, patches, width); those in coarse regions are not read.
        coarse: features of all regions as one token each, of shape (N, regions, width).
        decisions: 1 for each region that is fine and 0 for each that is coarse, of shape (N, regions).
        cut: how the patches are cut into regions.

    Returns:
        Features of shape (N, patches, width). The gradient of a decision is the difference between its fine
        and its coarse features.

    Example:
        >>> fine, coarse = torch.arange(1.0, 5.0).reshape(1, 4, 1), torch.tensor([[[9.0], [8.0]]])
        >>> cut = Cut(rows=1, columns=4, side=2)
        >>> on_fine_grid(fine, coarse, torch.tensor([[0.0, 1.0]]), cut).flatten()
        tensor([9., 9., 3., 4.])
    """
    region = cut.region_of_patch(fine.device)
    is_fine, repeated = decisions[:, region, None].to(fine.dtype), coarse[:, region]
    chosen = torch.where(is_fine == 0, repeated, fine)
    if not is_fine.requires_grad:
        return chosen
    # The difference is exactly 0, and has the gradient.
    return chosen + (is_fine - is_fine.detach()) * (fine - repeated)


class Tokenizer:
    """Makes tokens of two scales of images, with the patch and position embeddings of a ViT.

    Args:
        vit: the adapter of the ViT.
        side: number of patches along the side of a region.
    """

    def __init__(self, vit: ViTAdapter, side: int) -> None:
        self.vit = vit
        self.side = side
        self.patch = vit.embedding.kernel_size[0]

    def cut(self, images: Tensor) -> Cut:
        """How images of shape (N, channels, H, W) are cut into regions.

        Raises:
            ValueError: if the images have another number of channels or are of a size that the ViT does not
                take.
        """
        channels = self.vit.embedding.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images must have shape (N, {channels}, H, W), received {tuple(images.shape)}")
        return Cut(*self.vit.grid(*images.shape[2:]), self.side)

    def padded(self, images: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
        """The images, as many pixels as their patches have, and as many as their regions have.

        A ViT that takes images whose patches are not complete fills them with zeros, and so does this.
        """
        rows, columns = cut.rows * self.patch, cut.columns * self.patch
        images = _padded(images, rows, columns, "constant")
        down, across = (n * self.side * self.patch for n in cut.grid_of_regions)
        return images, _padded(images, down, across, "replicate")

    def regions(self, whole_regions: Tensor) -> Tensor:
        """The pixels of each region, of shape (N, regions, channels, height, width)."""
        size = self.side * self.patch
        return patches_of(whole_regions, size).flatten(1, 2)

    def reduced(self, whole_regions: Tensor) -> Tensor:
        """The images in which a region has the size of a patch."""
        return _sums_over_squares(whole_regions, self.side) / self.side**2

    def positions(self, cut: Cut) -> tuple[Tensor, Tensor]:
        """The position embeddings of the patches, (patches, width), and of the regions, (regions, width)."""
        fine = self.vit.positions((cut.rows, cut.columns))
        down, across = (n * self.side for n in cut.grid_of_regions)
        grid = _padded(fine.T.unflatten(1, (cut.rows, cut.columns))[None], down, across, "constant")
        sums = _sums_over_squares(grid, self.side)[0].flatten(1).T
        return fine, sums / cut.patches_of_region(fine.device)[:, None]

    def all_tokens(self, images: Tensor, whole_regions: Tensor, cut: Cut) -> Tensor:
        """The tokens of both scales: the prefix, all patches, all regions as one token each.

        Args:
            images: as many pixels as their patches have.
            whole_regions: the images as many pixels as their regions have.
            cut: how the patches are cut into regions.

        Returns:
            Tokens of shape (N, prefix + patches + regions, width).
        """
        fine_positions, coarse_positions = self.positions(cut)
        prefix = self.vit.prefix().expand(len(images), -1, -1)
        fine = self.vit.embed(images) + fine_positions
        coarse = self.vit.embed(self.reduced(whole_regions)) + coarse_positions
        return torch.cat([prefix, fine, coarse], dim=1)

    def fine_tokens(self, images: Tensor, cut: Cut) -> Tensor:
        """The tokens that the ViT itself has, to the bit: the prefix and all patches."""
        prefix = self.vit.prefix().expand(len(images), -1, -1)
        return with_prefix(prefix, self.vit.embed(images) + self.vit.positions((cut.rows, cut.columns)))

    def tokens_that_are_on(self, images: Tensor, whole_regions: Tensor, cut: Cut, on: Tensor) -> Tensor:
        """The tokens that are on, and no others: those of the prefix, then of patches, then of regions.

        Args:
            images: as many pixels as their patches have.
            whole_regions: the images as many pixels as their regions have.
            cut: how the patches are cut into regions.
            on: which tokens are on, booleans of shape (N, prefix + patches + regions).

        Returns:
            Tokens of shape (how many are on, width), those of each of the three in the order of examples.
        """
        prefix = self.vit.prefix()
        _, fine, coarse = on.split([len(prefix), cut.patches, cut.regions], dim=1)
        chosen, positions = [], []
        pictures = (images, self.reduced(whole_regions))
        for picture, is_on, at in zip(pictures, (fine, coarse), self.positions(cut), strict=True):
            patches = patches_of(picture, self.patch)
            chosen.append(patches[is_on.unflatten(1, patches.shape[1:3])])
            positions.append(at[is_on.nonzero()[:, 1]])
        embedded = self.vit.embed_patches(torch.cat(chosen)) + torch.cat(positions)
        return torch.cat([prefix.repeat(len(images), 1), embedded])


def patches_of(images: Tensor, size: int) -> Tensor:
    """The squares of an image, of shape (N, rows, columns, channels, size, size): a view of it."""
    n, channels, height, width = images.shape
    squares = images.reshape(n, channels, height // size, size, width // size, size)
    return squares.permute(0, 2, 4, 1, 3, 5)


def _sums_over_squares(images: Tensor, side: int) -> Tensor:
    """The sum over each square of side x side pixels, bit for bit that of a pool, which takes longer."""
    first, *others = (images[..., i::side, j::side] for i in range(side) for j in range(side))
    total = first.clone()
    for pixels in others:
        total += pixels
    return total


def _padded(images: Tensor, height: int, width: int, mode: str) -> Tensor:
    """The images with rows and columns added below and to the right."""
    below, right = height - images.shape[2], width - images.shape[3]
    return F.pad(images, (0, right, 0, below), mode=mode) if below or right else images
