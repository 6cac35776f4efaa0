"""The logarithms of the CDF and of the survival function, 1 - CDF, of distributions of other libraries.

The survival function is never computed from a CDF that has rounded to 1. Each family of
``torch.distributions`` has its own formula, with relative precision as far into both tails as its values go.
Any other distribution has the precision of its own ``cdf``, up to a limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor

__all__ = ["log_tails"]

_Tails = tuple[Tensor, Tensor]


def log_tails(prior: td.Distribution, x: Tensor) -> _Tails:
    """The logarithms of the CDF and of the survival function, differentiable in x and in the parameters.

    Args:
        prior: a distribution with a ``cdf``, whose own checks of values are off.
        x: values inside of its support, of a shape that broadcasts with its ``batch_shape``.

    Returns:
        Both logarithms. For a family that is not known here, that of the survival function stops at the
        logarithm of eight times the machine epsilon, and that of the CDF where the CDF underflows. Beyond,
        their gradient is that of ``log_prob``, whose sign points back to the mass, or 0 if there is none.

    Example:
        >>> log_tails(td.Laplace(0.0, 1.0), torch.tensor([-2.0, 2.0]))
        (tensor([-2.6931, -0.0701]), tensor([-0.0701, -2.6931]))
    """
    for family, tails in _TAILS.items():
        # A subclass with a CDF of its own is not of the family.
        if isinstance(prior, family) and type(prior).cdf is family.cdf:
            return tails(prior, x)
    cdf = prior.cdf(x)
    finfo = torch.finfo(cdf.dtype)
    return _log(cdf, finfo.smallest_normal, prior, x), _log(1 - cdf, 8 * finfo.eps, prior, x)


def _log(probability: Tensor, limit: float, prior: td.Distribution, x: Tensor) -> Tensor:
    """The logarithm of a tail probability, which below the limit keeps its value and moves as the density."""
    is_below = probability <= limit
    log = torch.where(is_below, 1.0, probability).log()
    try:
        # Elsewhere the density is not needed, and its derivative may be infinite.
        density = prior.log_prob(torch.where(is_below, x, x.detach()))
    except NotImplementedError:
        density = torch.zeros_like(log)
    density = torch.where(density.isfinite(), density, 0.0)
    return torch.where(is_below, math.log(limit) + (density - density.detach()), log)


def _log1mexp(u: Tensor) -> Tensor:
    """Log(1 - exp(-u)) for positive u, precise for small and for large ones (Mächler, 2012)."""
    middle = math.log(2.0)
    is_small = u < middle
    small = torch.log(-torch.expm1(-torch.where(is_small, u, middle)))
    return torch.where(is_small, small, torch.log1p(-torch.exp(-torch.where(is_small, middle, u))))


def _exp(x: Tensor) -> Tensor:
    """The exponential function, finite, but for a NaN, whose gradient is NaN too."""
    largest = math.log(torch.finfo(x.dtype).max)
    return torch.exp(torch.where(x > largest, largest, x))


def _normal(prior: td.Normal, x: Tensor) -> _Tails:
    z = (x - prior.loc) / prior.scale
    return torch.special.log_ndtr(z), torch.special.log_ndtr(-z)


def _half_normal(prior: td.HalfNormal, x: Tensor) -> _Tails:
    z = x / prior.scale
    return torch.erf(z * math.sqrt(0.5)).log(), torch.special.log_ndtr(-z) + math.log(2.0)


def _cauchy(prior: td.Cauchy, x: Tensor) -> _Tails:
    z = (x - prior.loc) / prior.scale
    one = torch.ones_like(z)
    return (torch.atan2(one, -z) / math.pi).log(), (torch.atan2(one, z) / math.pi).log()


def _half_cauchy(prior: td.HalfCauchy, x: Tensor) -> _Tails:
    z = x / prior.scale
    one = torch.ones_like(z)
    return (torch.atan2(z, one) * (2 / math.pi)).log(), (torch.atan2(one, z) * (2 / math.pi)).log()


def _laplace(prior: td.Laplace, x: Tensor) -> _Tails:
    z = (x - prior.loc) / prior.scale

    def tail(z: Tensor) -> Tensor:
        is_lower = z < 0
        upper = torch.log1p(-torch.exp(-torch.where(is_lower, 0.0, z)) / 2)
        return torch.where(is_lower, z - math.log(2.0), upper)

    return tail(z), tail(-z)


def _exponential(prior: td.Exponential, x: Tensor) -> _Tails:
    return _log1mexp(prior.rate * x), -prior.rate * x


def _gamma(prior: td.Gamma, x: Tensor) -> _Tails:
    # In double precision both functions underflow later.
    scaled = (prior.rate * x).double()
    concentration = torch.as_tensor(prior.concentration, dtype=scaled.dtype, device=x.device)
    limit = torch.finfo(scaled.dtype).smallest_normal
    lower, upper = (
        _log(function(concentration, scaled), limit, prior, x).to(x.dtype)
        for function in (torch.special.gammainc, torch.special.gammaincc)
    )
    return lower, upper


def _uniform(prior: td.Uniform, x: Tensor) -> _Tails:
    width = prior.high - prior.low
    return ((x - prior.low) / width).log(), ((prior.high - x) / width).log()


def _gumbel(prior: td.Gumbel, x: Tensor) -> _Tails:
    u = _exp((prior.loc - x) / prior.scale)
    return -u, _log1mexp(u)


def _kumaraswamy(prior: td.Kumaraswamy, x: Tensor) -> _Tails:
    log_power = prior.concentration1 * x.log()
    log_sf = prior.concentration0 * _log1mexp(-log_power)
    # F is b x^a where that is small, and may be too small for 1 - F to tell.
    log_cdf = log_power + prior.concentration0.log()
    is_small = log_cdf < math.log(torch.finfo(x.dtype).eps)
    return torch.where(is_small, log_cdf, _log1mexp(-torch.where(is_small, -1.0, log_sf))), log_sf


def _continuous_bernoulli(prior: td.ContinuousBernoulli, x: Tensor) -> _Tails:
    """F(x) = expm1(t x) / expm1(t), with t the logit of the parameter; the survival function mirrors it."""
    t = prior.logits
    return (
        x.log() + _log_expm1_over(t * x) - _log_expm1_over(t),
        torch.log1p(-x) + _log_expm1_over(-t * (1 - x)) - _log_expm1_over(-t),
    )


def _log_expm1_over(y: Tensor) -> Tensor:
    """Log(expm1(y) / y), by its series where y is small."""
    is_small = y.abs() < 0.1
    square = y * y
    series = y / 2 + square / 24 * (1 - square / 120 * (1 - square / 63))
    size = torch.where(is_small, 1.0, y.abs())
    return torch.where(is_small, series, y.clamp_min(0.0) + _log1mexp(size) - size.log())


def _mixture(prior: td.MixtureSameFamily, x: Tensor) -> _Tails:
    weights = prior.mixture_distribution.logits.log_softmax(dim=-1)
    lower, upper = log_tails(prior.component_distribution, x.unsqueeze(-1))
    return torch.logsumexp(lower + weights, dim=-1), torch.logsumexp(upper + weights, dim=-1)


def _transformed(prior: td.TransformedDistribution, x: Tensor) -> _Tails:
    sign: Tensor | int = 1
    for transform in reversed(prior.transforms):
        x = transform.inv(x)
        sign = sign * transform.sign
    lower, upper = log_tails(prior.base_dist, x)
    rises = torch.as_tensor(sign, device=x.device) > 0
    return torch.where(rises, lower, upper), torch.where(rises, upper, lower)


def _generalized_pareto(prior: Any, x: Tensor) -> _Tails:
    z = (x - prior.loc) / prior.scale
    is_exponential = prior.concentration == 0
    concentration = torch.where(is_exponential, 1.0, prior.concentration)
    hazard = torch.where(is_exponential, z, torch.log1p(concentration * z) / concentration)
    return _log1mexp(hazard), -hazard


_TAILS: dict[type[td.Distribution], Callable[..., _Tails]] = {
    td.Cauchy: _cauchy,
    td.ContinuousBernoulli: _continuous_bernoulli,
    td.Exponential: _exponential,
    td.Gamma: _gamma,
    td.Gumbel: _gumbel,
    td.HalfCauchy: _half_cauchy,
    td.HalfNormal: _half_normal,
    td.Kumaraswamy: _kumaraswamy,
    td.Laplace: _laplace,
    td.MixtureSameFamily: _mixture,
    td.Normal: _normal,
    td.Uniform: _uniform,
}
if hasattr(td, "GeneralizedPareto"):  # since torch 2.8
    _TAILS[td.GeneralizedPareto] = _generalized_pareto
_TAILS[td.TransformedDistribution] = _transformed  # last, since some of the others are subclasses of it
