"""The cumulative distribution function of the Normal distribution, with its derivatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchshaping.cdfs.prepared import CDFDerivatives, LogCDFDerivatives, PreparedCDF

__all__ = ["NormalCDF", "normal_cdf"]


class NormalCDF(PreparedCDF):
    """The CDF and its derivatives as a function of x, without a graph; mean, std and x broadcast.

    Args:
        mean: mean of the distribution.
        std: standard deviation, positive.
        gradients: whether to return the derivatives in the mean and the deviation as well.
    """

    def __init__(self, mean: Tensor, std: Tensor, *, gradients: bool = False) -> None:
        self.mean, self.gradients = mean, gradients
        self.inverse = math.sqrt(0.5) / std
        self.height = self.inverse / math.sqrt(math.pi)

    def __call__(self, x: Tensor) -> CDFDerivatives:
        z = (x - self.mean).mul_(self.inverse)
        cdf = torch.erfc(-z).mul_(0.5)
        pdf = (z * z).neg_().exp_().mul_(self.height)
        if not self.gradients:
            return CDFDerivatives(cdf, pdf)
        # An infinite z has density 0, and its product with z is 0 as well.
        return CDFDerivatives(cdf, pdf, (-pdf, z.clamp_(-1e6, 1e6).mul_(pdf).mul_(-math.sqrt(2.0))))

    def logs(self, x: Tensor) -> LogCDFDerivatives:
        z = (x - self.mean).mul_(self.inverse)
        standard = z * math.sqrt(2.0)
        # The density over the CDF, which is 1 / erfcx(-z) up to a factor, and over the survival function.
        slope = 2 * self.height
        cdf_by_x = slope / torch.special.erfcx(-z)
        sf_by_x = -slope / torch.special.erfcx(z)
        parameters: tuple[tuple[Tensor, Tensor], ...] = ()
        if self.gradients:
            scaled = z.mul_(math.sqrt(2.0))
            parameters = ((-cdf_by_x, -sf_by_x), (-cdf_by_x * scaled, -sf_by_x * scaled))
        return LogCDFDerivatives(
            torch.special.log_ndtr(standard), torch.special.log_ndtr(-standard), cdf_by_x, sf_by_x, parameters
        )


def normal_cdf(x: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    """The CDF alone, differentiable in everything and relatively exact in the lower tail."""
    return 0.5 * torch.erfc((x - loc) / scale * -math.sqrt(0.5))
