"""What the gates of regions found: masks over images, and whether regions with objects are fine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchshaping.mixed_scale.msvit import MSViT
from batchshaping.training.data.batching import batches
from batchshaping.training.data.dataset import Data, Images

__all__ = ["findings_on_regions", "objects_in_regions"]


@torch.no_grad()
def findings_on_regions(
    msvit: MSViT, data: Data, metrics: dict[str, Any], batch: int = 256
) -> dict[str, Any]:
    """What the gate of an MSViT found in the test images.

    Args:
        msvit: the network, in evaluation.
        data: the data set. Where its test images know their objects, as canvases do, the gate is compared
            with them.
        metrics: what :func:`~batchshaping.training.evaluation.evaluate` found, with the images that took
            the fewest and the most multiply-adds.
        batch: number of images in a forward pass.

    Returns:
        ``grid``, the rows and columns of regions; ``masks``, for each of these images 0 or 1 for each region,
        by rows; and ``objects``, None or ``frequency``, the share of images that have an object in each
        region, and ``auc``, the probability that the gate of a region with an object is more open than that
        of one without.
    """
    example = next(msvit.parameters())

    def probabilities(images: Images, indices: range | list[int]) -> Iterator[Tensor]:
        for some, _ in batches(images, batch, sampler=indices):
            msvit(data.normalize(some, like=example))
            yield msvit.gate.probabilities.double().cpu()

    masks = {}
    for which in ("least", "most"):
        indices = [image["index"] for image in metrics[which]]
        # In evaluation a region is fine iff its probability is above 1/2; chance decides otherwise.
        masks[which] = [
            decided.int().tolist()
            for _ in probabilities(data.test, indices)
            for decided in msvit.gate.decisions.cpu()
        ]
    down, across = msvit.cut(torch.zeros(1, *data.shape)).grid_of_regions
    found: dict[str, Any] = {"grid": [down, across], "masks": masks, "objects": None}
    if hasattr(data.test, "objects"):
        has_object = objects_in_regions(data.test.objects(), msvit.coarse)
        scores = torch.cat([*probabilities(data.test, range(len(data.test)))])
        found["objects"] = {
            "frequency": has_object.double().mean(dim=0).tolist(),
            "auc": _area_under_curve(scores.flatten(), has_object.flatten()),
        }
    return found


def objects_in_regions(masks: Tensor, side: int) -> Tensor:
    """Whether each region has a part of an object.

    Args:
        masks: where objects are, booleans of shape (N, H, W).
        side: pixels along the side of a region.

    Returns:
        Booleans of shape (N, regions), by rows.

    Example:
        >>> objects_in_regions(torch.eye(4).bool()[None], side=2)
        tensor([[ True, False, False,  True]])
    """
    return F.max_pool2d(masks.float().unsqueeze(1), side, ceil_mode=True).flatten(1) > 0


def _area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """The probability that a score of a positive is above that of a negative; a tie counts one half."""
    negatives = scores[~positive].sort().values
    below, not_above = (torch.searchsorted(negatives, scores[positive], side=s) for s in ("left", "right"))
    return ((below + not_above).double().mean() / (2 * len(negatives))).item()
