"""Reading a tensor's values to refuse bad ones, where that costs nothing."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["extent", "known_to_hold"]


def known_to_hold(condition: Tensor) -> bool:
    """Whether all of a condition holds; True where it cannot be read without stopping a device or a tracer.

    What goes unread there shows as NaN.
    """
    if not _readable(condition):
        return True
    try:
        return bool(condition.all())
    except RuntimeError:  # under vmap there is no single answer
        return True


def extent(values: Tensor) -> tuple[float, float] | None:
    """The least and the greatest value, NaN if one is NaN; None if there are none, or they cannot be read."""
    if not _readable(values) or values.numel() == 0:
        return None
    try:
        if values.ndim == 0:
            return (values.item(),) * 2
        least, greatest = torch.aminmax(values.detach())
        return float(least), float(greatest)
    except RuntimeError:
        return None


def _readable(values: Tensor) -> bool:
    return values.device.type == "cpu" and not torch.compiler.is_compiling()
