"""Tokens against loops over regions, patches and pixels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_vits import PATCH, VITS, made
from torch import Tensor

from batchshaping.mixed_scale.tokens import Cut, on_fine_grid, scale_of_tokens

CUTS = [Cut(4, 4, 2), Cut(4, 8, 4), Cut(3, 5, 2), Cut(7, 5, 4), Cut(1, 1, 2)]


def region(cut: Cut, patch: int) -> int:
    """The region of a patch, by the definition."""
    row, column = divmod(patch, cut.columns)
    across = (cut.columns + cut.side - 1) // cut.side
    return (row // cut.side) * across + column // cut.side


@pytest.mark.parametrize("cut", CUTS)
def test_each_patch_is_in_the_region_around_it(cut: Cut) -> None:
    expected = [region(cut, patch) for patch in range(cut.patches)]
    assert cut.region_of_patch().tolist() == expected
    assert cut.patches_of_region().tolist() == [expected.count(r) for r in range(cut.regions)]
    assert cut.patches_of_region().min() > 0


@pytest.mark.parametrize("cut", CUTS)
def test_a_fine_region_has_its_patches_on_and_a_coarse_one_its_one_token(cut: Cut) -> None:
    decisions = (torch.rand(5, cut.regions, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    on = scale_of_tokens(decisions, cut, prefix=3)
    for n in range(5):
        expected = [1.0] * 3
        expected += [decisions[n, region(cut, patch)].item() for patch in range(cut.patches)]
        expected += [1 - decisions[n, r].item() for r in range(cut.regions)]
        assert on[n].tolist() == expected


@pytest.mark.parametrize("cut", CUTS)
def test_features_on_the_fine_grid_are_those_of_the_scale_that_is_on(cut: Cut) -> None:
    torch.manual_seed(0)
    fine, coarse = torch.randn(3, cut.patches, 2), torch.randn(3, cut.regions, 2)
    decisions = (torch.rand(3, cut.regions) < 0.5).float().requires_grad_()
    grid = on_fine_grid(fine, coarse, decisions, cut)
    change = torch.zeros(3, cut.regions)
    weights = torch.randn(3, cut.patches, 2)
    for n in range(3):
        for patch in range(cut.patches):
            r = region(cut, patch)
            expected = fine[n, patch] if decisions[n, r] else coarse[n, r]
            assert torch.equal(grid[n, patch], expected)
            change[n, r] += weights[n, patch] @ (fine[n, patch] - coarse[n, r])
    # The gradient of a gate is what flipping it changes.
    (grid * weights).sum().backward()
    torch.testing.assert_close(decisions.grad, change)


def coarse_pixels(image: Tensor, side: int) -> Tensor:
    """An image of shape (C, H, W) of whole regions, reduced: pixel by pixel."""
    channels, height, width = image.shape
    out = torch.empty(channels, height // side, width // side)
    for row in range(height // side):
        for column in range(width // side):
            square = image[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            out[:, row, column] = square.mean(dim=(1, 2))
    return out


@pytest.mark.parametrize("name", ["timm", "no positions", "any size", "any size, filled up", "torchvision"])
@pytest.mark.parametrize("side", [2, 4])
def test_a_coarse_token_is_the_reduced_region_at_the_mean_of_its_positions(name: str, side: int) -> None:
    _, msvit, images = made(name, side)
    tokenizer = msvit.tokenizer
    cut = tokenizer.cut(images)
    with torch.no_grad():
        tokens = tokenizer.all_tokens(*tokenizer.padded(images, cut), cut)
        coarse = tokens[:, tokens.shape[1] - cut.regions :]
        positions = tokenizer.vit.positions((cut.rows, cut.columns))
        layer = tokenizer.vit.embedding
        down, across = cut.grid_of_regions
        filled = F.pad(
            images, (0, cut.columns * PATCH - images.shape[3], 0, cut.rows * PATCH - images.shape[2])
        )
        last_row, last_column = filled.shape[2] - 1, filled.shape[3] - 1
        rows = torch.arange(down * side * PATCH).clamp(max=last_row)
        columns = torch.arange(across * side * PATCH).clamp(max=last_column)
        whole = filled[:, :, rows][:, :, :, columns]
        for r in range(cut.regions):
            top, left = (n * PATCH for n in divmod(r, across))
            patch = torch.stack([coarse_pixels(image, side) for image in whole])
            patch = patch[:, :, top : top + PATCH, left : left + PATCH]
            own = [p for p in range(cut.patches) if region(cut, p) == r]
            expected = patch.flatten(1) @ layer.weight.flatten(1).T + layer.bias + positions[own].mean(dim=0)
            torch.testing.assert_close(coarse[:, r], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VITS)
def test_the_tokens_that_are_on_are_those_of_all_tokens(name: str) -> None:
    _, msvit, images = made(name)
    tokenizer = msvit.tokenizer
    cut = tokenizer.cut(images)
    padded = tokenizer.padded(images, cut)
    prefix = len(tokenizer.vit.prefix())
    on = scale_of_tokens((torch.rand(len(images), cut.regions) < 0.5).float(), cut, prefix) != 0
    with torch.no_grad():
        every = tokenizer.all_tokens(*padded, cut)
        sizes = [prefix, cut.patches, cut.regions]
        found = tokenizer.tokens_that_are_on(*padded, cut, on)
        of_scales = zip(every.split(sizes, 1), on.split(sizes, 1), strict=True)
        expected = torch.cat([tokens[is_on] for tokens, is_on in of_scales])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
