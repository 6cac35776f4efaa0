"""Where the CDF of a Beta distribution is asked for, and the rate at which its tails change there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Point", "Rate", "value_range"]


class Point(NamedTuple):
    """Where the CDF is asked for: x, 1 - x, their logarithms less constants, and what these make of them."""

    x: Tensor
    complement: Tensor
    log_x: Tensor
    log_complement: Tensor
    exponent: Tensor
    range: tuple[float, float] = (0.0, 1.0)
    """The least and the greatest x, where reading them is free."""
    deviations: tuple[Tensor, ...] = ()
    """x over the mean, and 1 - x over its mean, both less 1."""


class Rate(NamedTuple):
    """The density of logit(x) over the tail: the derivative of the tail's logarithm in the logit, up to sign.

    With gradients, the derivatives of the tail's logarithm in a, less that of x^a, and in b, less that of
    (1 - x)^b.
    """

    in_right: Tensor
    value: Tensor
    a: Tensor | None = None
    b: Tensor | None = None


def value_range(x: Tensor) -> tuple[float, float]:
    """The least and the greatest value where reading them is free, and otherwise 0 and 1."""
    if not (x.is_cpu and x.numel()):
        return 0.0, 1.0
    least, greatest = torch.aminmax(x)
    return float(least), float(greatest)
