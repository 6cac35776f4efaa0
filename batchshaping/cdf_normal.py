"""The cumulative distribution function of the Normal distribution, with its derivatives."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NormalDerivatives", "evaluate", "get_normal_cdf"]


class NormalDerivatives(NamedTuple):
    """The CDF, its derivative in x (the density) and, where asked for, in the mean and the deviation."""

    cdf: Tensor
    pdf: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None


def evaluate(mean: Tensor, std: Tensor, x: Tensor, *, gradients: bool = False) -> NormalDerivatives:
    """The CDF and its derivatives in one pass, without a graph; mean, std and x broadcast."""
    z = (x - mean) / std
    cdf = torch.erfc(z * -math.sqrt(0.5)).mul_(0.5)
    pdf = z.square().mul_(-0.5).exp_().div_(math.sqrt(2 * math.pi) * std)
    if not gradients:
        return NormalDerivatives(cdf, pdf)
    # An infinite z has density 0, and its product with z is 0 as well.
    return NormalDerivatives(cdf, pdf, -pdf, -pdf * z.clamp(-1e6, 1e6))


def get_normal_cdf(x_in: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    r"""The CDF of a Normal distribution, differentiable in everything.

    .. math::
        F(x) = \Phi\left( \frac{x - \mu}{\sigma} \right)

    Args:
        x_in: where to evaluate, of any shape and floating dtype.
        mean: mean of the distribution, of a shape that broadcasts with x's.
        std: standard deviation, positive, of a shape that broadcasts with x's.

    Returns:
        A tensor of the broadcast shape with values in [0, 1], relatively exact in the lower tail.

    Example:
        >>> get_normal_cdf(torch.tensor([0.5, 0.6, 0.7]), 0.6, 0.1)
        tensor([0.1587, 0.5000, 0.8413])
    """
    return 0.5 * torch.erfc((x_in - mean) / std * -math.sqrt(0.5))
