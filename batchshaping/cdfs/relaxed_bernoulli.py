"""The cumulative distribution function of the Relaxed Bernoulli distribution, with its derivatives.

Also called binary concrete (Maddison, Mnih and Teh, 2017; Jang, Gu and Poole, 2017): the sigmoid of a
logistic variable, so that its CDF is a sigmoid in the logit of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchshaping.cdfs.prepared import (
    CDFDerivatives,
    LogCDFDerivatives,
    PreparedCDF,
    nearest_inside,
    smallest_positive,
)

__all__ = ["RelaxedBernoulliCDF", "sigmoid_with_tails"]


class RelaxedBernoulliCDF(PreparedCDF):
    """The CDF and its derivatives as a function of x, without a graph; mean, temperature and x broadcast.

    Outside (0, 1) the CDF is 0 or 1 and the density 0, as at the ends themselves.

    Args:
        mean: probability of the Bernoulli that is relaxed, in (0, 1).
        temperature: temperature, positive.
        gradients: whether to return the derivatives in the mean and the temperature as well.
    """

    def __init__(self, mean: Tensor, temperature: Tensor, *, gradients: bool = False) -> None:
        self.temperature, self.gradients = temperature, gradients
        self.shift = torch.logit(mean)
        self.mean_factor = -1 / (mean * (1 - mean))

    def __call__(self, x: Tensor) -> CDFDerivatives:
        at = self.at_logits(torch.logit(x, eps=0.0))
        slope = torch.maximum((1 - x).mul_(x), smallest_positive(x))
        # The density can exceed what the dtype holds; at the ends and beyond it is 0 here.
        return at._replace(pdf=at.pdf.div_(slope).clamp_max_(torch.finfo(x.dtype).max))

    def at_logits(self, logits: Tensor) -> CDFDerivatives:
        u = (logits * self.temperature).sub_(self.shift)
        cdf = torch.sigmoid(u)
        # The survival function is not 1 less the CDF, which is 0 where the CDF rounds to 1.
        spread = u.neg_().sigmoid_().mul_(cdf)
        if not self.gradients:
            return CDFDerivatives(cdf, spread.mul_(self.temperature))
        by_temperature = logits.clamp(-_HIGHEST_LOGIT, _HIGHEST_LOGIT).mul_(spread)
        return CDFDerivatives(cdf, spread * self.temperature, (spread * self.mean_factor, by_temperature))

    def logs(self, x: Tensor) -> LogCDFDerivatives:
        nearest, inside = nearest_inside(x)
        stretch = (1 - nearest).mul_(nearest).reciprocal_().clamp_max_(torch.finfo(x.dtype).max).mul_(inside)
        return self.logs_at_logits(torch.logit(nearest))._replace(stretch=stretch)

    def logs_at_logits(self, logits: Tensor) -> LogCDFDerivatives:
        # The CDF is the sigmoid of this, and the derivative of log sigmoid(u) is sigmoid(-u).
        u = (logits * self.temperature).sub_(self.shift)
        cdf, sf = torch.sigmoid(u), torch.sigmoid(-u)
        logsigmoid = torch.nn.functional.logsigmoid
        slopes: list[Tensor] = [self.mean_factor, logits] if self.gradients else []
        return LogCDFDerivatives(
            logsigmoid(u),
            logsigmoid(-u),
            sf * self.temperature,
            -cdf * self.temperature,
            tuple((sf * slope, -cdf * slope) for slope in slopes),
        )


def sigmoid_with_tails(u: Tensor) -> Tensor:
    """The sigmoid, whose gradient is exact where the sigmoid rounds to 1 too."""
    is_lower = u < 0
    tail = torch.sigmoid(torch.where(is_lower, u, -u))
    return torch.where(is_lower, tail, 1 - tail)


# Beyond the logit of every float64 in (0, 1); an infinite one would turn a product with 0 to NaN.
_HIGHEST_LOGIT = 1e3
