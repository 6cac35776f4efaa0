"""The CDF and the density of the Relaxed Bernoulli distribution under their published names."""

from __future__ import annotations

import torch
from torch import Tensor

from batchshaping.cdfs.relaxed_bernoulli import RelaxedBernoulliCDF, sigmoid_with_tails

__all__ = [
    "RelaxedBernoulliCDF",
    "get_relaxed_bernoulli_cdf",
    "get_relaxed_bernoulli_pdf",
    "sigmoid_with_tails",
]


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
    return sigmoid_with_tails(temperature * torch.logit(x) - torch.logit(_as_tensor(mean, x)))


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
