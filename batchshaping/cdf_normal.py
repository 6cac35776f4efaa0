"""The CDF of the Normal distribution under its published name."""

from __future__ import annotations

from torch import Tensor

from batchshaping.cdfs.normal import NormalCDF, normal_cdf

__all__ = ["NormalCDF", "get_normal_cdf"]


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
        >>> import torch
        >>> get_normal_cdf(torch.tensor([0.5, 0.6, 0.7]), 0.6, 0.1)
        tensor([0.1587, 0.5000, 0.8413])
    """
    return normal_cdf(x_in, mean, std)
