"""Reading a tensor's values to refuse bad ones, where that costs nothing."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["known_to_hold"]


def known_to_hold(condition: Tensor) -> bool:
    """Whether all of a condition holds; True where it cannot be read without stopping a device or a tracer.

    What goes unread there shows as NaN.
    """
    if condition.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    try:
        return bool(condition.all())
    except RuntimeError:  # under vmap there is no single answer
        return True
