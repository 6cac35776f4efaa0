"""Checks of the input: of its type always, and of its values where reading them costs nothing."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_values", "extent", "is_index", "known_to_hold"]


def check_values(x: object) -> None:
    """Refuse what is not a tensor of floating-point numbers.

    Raises:
        TypeError: with the type or dtype that was received.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, received a {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, received {x.dtype}")


def is_index(value: Any) -> bool:
    """Whether a value is a whole number; as in torch, True and False are not."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except (TypeError, RuntimeError):
        return False
    return True


def known_to_hold(condition: Tensor) -> bool:
    """Whether all of a condition holds; True where it cannot be read without stopping a device or a tracer.

    Values that are not checked propagate as NaN.
    """
    if not _readable(condition):
        return True
    try:
        return bool(condition.all())
    except RuntimeError:  # under vmap there is no single answer
        return True


def extent(values: Tensor) -> tuple[float, float] | None:
    """The least and the greatest value, both NaN if a value is; None if there are no values to read."""
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
