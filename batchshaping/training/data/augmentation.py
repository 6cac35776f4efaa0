"""Random shifts and flips of training images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["shift_and_flip"]


def shift_and_flip(images: Tensor, padding: int, flip: bool) -> Tensor:
    """Shift each image at random by up to ``padding`` pixels, and flip half of them.

    Pixels that come in at the border are 0.

    Args:
        images: of shape (N, C, H, W).
        padding: the largest shift in each direction.
        flip: whether half of the images, at random, are flipped from left to right.

    Example:
        >>> images = torch.arange(9, dtype=torch.uint8).reshape(1, 1, 3, 3)
        >>> shift_and_flip(images, padding=1, flip=True).shape
        torch.Size([1, 1, 3, 3])
    """
    n, _, height, width = images.shape
    device = images.device
    corner = torch.randint(0, 2 * padding + 1, (2, n, 1), device=device)
    rows = corner[0] + torch.arange(height, device=device)
    columns = corner[1] + torch.arange(width, device=device)
    if flip:
        flipped = torch.rand(n, 1, device=device) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    padded = F.pad(images, [padding] * 4)
    example = torch.arange(n, device=device)[:, None, None]
    shifted = padded.movedim(1, 3)[example, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
    # Not .contiguous(): with one channel, it would keep strides that count as channels last. In this format,
    # the CPU convolutions of torch 2.14 write out of bounds for 4 channels.
    return shifted.clone(memory_format=torch.contiguous_format)
