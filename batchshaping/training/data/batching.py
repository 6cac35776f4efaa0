"""Images in batches."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch.utils.data import DataLoader

__all__ = ["batches"]


def batches(images: Sized, size: int, *, seed: int = 0, **settings: Any) -> DataLoader[Any]:
    """Images in batches, in their order or in the order of a sampler.

    Args:
        images: the images; a method ``__getitems__`` gives a batch of them by their indices.
        size: number of images in a batch.
        seed: seed of the processes that load images; the state of PyTorch's own generator does not change.
        settings: other arguments of ``torch.utils.data.DataLoader``, such as ``sampler`` and ``num_workers``.
    """
    return DataLoader(
        images,  # type: ignore[arg-type]
        batch_size=size,
        collate_fn=_unchanged,
        generator=torch.Generator().manual_seed(seed),
        **settings,
    )


def _unchanged(batch: Any) -> Any:
    return batch
