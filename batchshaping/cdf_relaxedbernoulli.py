"""The cumulative distribution function of the Relaxed Bernoulli distribution, with its derivatives.

Also called binary concrete (Maddison, Mnih and Teh, 2017; Jang, Gu and Poole, 2017): the sigmoid of a
logistic variable, so that its CDF is a sigmoid in the logit of x.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "RelaxedBernoulliDerivatives",
    "evaluate",
    "get_relaxed_bernoulli_cdf",
    "get_relaxed_bernoulli_pdf",
]


class RelaxedBernoulliDerivatives(NamedTuple):
    """The CDF, its derivative in x (the density) and, where asked for, in the mean and the temperature."""

    cdf: Tensor
    pdf: Tensor
    mean: Tensor | None = None
    temperature: Tensor | None = None


def evaluate(
    mean: Tensor, temperature: Tensor, x: Tensor, *, gradients: bool = False
) -> RelaxedBernoulliDerivatives:
    """The CDF and its derivatives in one pass, without a graph; all three broadcast.

    Outside (0, 1) the CDF is 0 or 1 and the density 0, as at the ends themselves.
    """
    tiny, eps = torch.finfo(x.dtype).smallest_normal, torch.finfo(x.dtype).eps
    x = x.clamp(0.0, 1.0)
    logit = x.log().sub_(torch.log1p(-x))
    cdf = torch.addcmul(-torch.logit(mean), temperature, logit).sigmoid_()
    spread = cdf * (1 - cdf)
    pdf = (temperature * spread).div_((x * (1 - x)).clamp_min_(tiny))
    if not gradients:
        return RelaxedBernoulliDerivatives(cdf, pdf)
    lowest = math.log(tiny * eps)
    return RelaxedBernoulliDerivatives(
        cdf, pdf, -spread / (mean * (1 - mean)), spread * logit.clamp_(lowest, -lowest)
    )


def get_relaxed_bernoulli_cdf(
    x_in: Tensor, mean: Tensor | float, temperature: Tensor | float, eps: float = 1e-3
) -> Tensor:
    r"""The CDF of a Relaxed Bernoulli distribution on clipped values, differentiable in everything.

    .. math::
        F(x) = \mathrm{sigmoid}( \tau \, \mathrm{logit}(x) - \mathrm{logit}(\mu) )

    Args:
        x_in: where to evaluate, of any shape and floating dtype; clipped to [eps, 1 - eps].
        mean: probability of the Bernoulli that is relaxed, in (0, 1), broadcasting with x.
        temperature: temperature, positive, broadcasting with x.
        eps: how far to stay from 0 and 1.

    Returns:
        A tensor of the broadcast shape with values in [0, 1].

    Example:
        >>> get_relaxed_bernoulli_cdf(torch.tensor([0.1, 0.5, 0.9]), 0.2, 0.25)
        tensor([0.6978, 0.8000, 0.8739])
    """
    x = x_in.clamp(eps, 1 - eps)
    return torch.sigmoid(temperature * torch.logit(x) - torch.logit(_as_tensor(mean, x)))


def get_relaxed_bernoulli_pdf(
    x_in: Tensor, mean: Tensor | float, temperature: Tensor | float, eps: float = 1e-3
) -> Tensor:
    r"""The density of a Relaxed Bernoulli distribution on clipped values.

    .. math::
        f(x) = \frac{\tau \mu (1 - \mu) (x (1 - x))^{-\tau - 1}}
                    {(\mu x^{-\tau} + (1 - \mu) (1 - x)^{-\tau})^2 + \epsilon}

    Args:
        x_in: where to evaluate, of any shape and floating dtype; clipped to [eps, 1 - eps].
        mean: probability of the Bernoulli that is relaxed, in (0, 1), broadcasting with x.
        temperature: temperature, positive, broadcasting with x.
        eps: how far to stay from 0 and 1, and what is added to the denominator.

    Returns:
        A tensor of the broadcast shape.

    Example:
        >>> get_relaxed_bernoulli_pdf(torch.tensor([0.1, 0.5, 0.9]), 0.2, 0.25)
        tensor([0.5853, 0.1599, 0.3061])
    """
    x = x_in.clamp(eps, 1 - eps)
    root = mean * x**-temperature + (1 - mean) * (1 - x) ** -temperature
    return temperature * mean * (1 - mean) * (x * (1 - x)) ** (-temperature - 1) / (root**2 + eps)


def _as_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)
