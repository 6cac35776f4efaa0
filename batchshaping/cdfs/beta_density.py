r"""The Beta density, and the ratio of a tail to it, at concentrations of any size.

Everything is relative to the mean :math:`\mu = a / (a + b)`, where the logarithm of
:math:`x^a (1 - x)^b` has its maximum. With :math:`u = (x - \mu) / \mu` and
:math:`v = (\mu - x) / (1 - \mu)` the terms of first order cancel exactly, :math:`a u + b v = 0`, and

.. math::
    a \log \frac{x}{\mu} + b \log \frac{1 - x}{1 - \mu}
    = a \, (\log(1 + u) - u) + b \, (\log(1 + v) - v),

two terms of one sign, however large a and b are. What is left of 1 / B(a, b) has no cancellation either.

The lower tail over the density of logit(x) is an integral of one smooth, decreasing function,

.. math::
    \int_0^1 (1 - r)^{a - 1} \left( 1 + \frac{x r}{1 - x} \right)^{b - 1} \frac{dr}{1 - x},

which a Gauss-Legendre rule with a fixed number of points finds to 14 digits for every a above some tens and
every b, as long as x is left of (a + 1) / (a + b + 2).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "LARGEST_CONCENTRATION",
    "Mean",
    "SMALL",
    "SMALLEST_CONCENTRATION",
    "digamma_remainder",
    "hazard",
    "log1p_less",
    "log_beta",
    "log_density",
    "small_tail",
    "valid_concentration",
]

SMALLEST_CONCENTRATION = 1e-300
"""Above this, no intermediate result underflows or loses its digits."""

LARGEST_CONCENTRATION = 1e300
"""Below this, no intermediate result overflows or loses its digits."""

SMALL = 1e-3
"""Below this concentration, a tail is so close to 1 that its logarithm has a series of its own."""

_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)
# Log Gamma(1 + p) / p in powers of p.
_LOG_GAMMA = (
    *(-0.5772156649015329, 0.8224670334241132, -0.40068563438653143),
    *(0.27058080842778454, -0.207385551028674, 0.16955717699740822),
)
# Where the integrand has fallen to exp(-38), below what double precision notices.
_END = 38.0
_POINTS = 32
# Numbers that are computed at once.
_TOGETHER = 4096


def _stirling_series(z: Tensor, powers: tuple[float, ...]) -> Tensor:
    inverse_square = z.pow(-2)
    series = torch.zeros_like(z)
    for coefficient in reversed(powers):
        series = series * inverse_square + coefficient
    return series


def _stirling_remainder(z: Tensor) -> Tensor:
    r"""Log Gamma(z) less its Stirling approximation (z - 1/2) log z - z + log(2 pi) / 2."""
    large, small = z.clamp_min(10.0), z.clamp_max(10.0)
    exact = torch.lgamma(small) - ((small - 0.5) * small.log() - small + 0.5 * math.log(2 * math.pi))
    return torch.where(z < 10.0, exact, _stirling_series(large, _STIRLING) / large)


def digamma_remainder(z: Tensor) -> Tensor:
    """Digamma(z) + 1 / z less log z, of which nothing cancels at large z, nor at small z but the log."""
    large, small = z.clamp_min(10.0), z.clamp_max(10.0)
    powers = tuple(-(2 * k + 1) * coefficient for k, coefficient in enumerate(_STIRLING))
    series = (0.5 + _stirling_series(large, powers) / large) / large
    return torch.where(z < 10.0, torch.digamma(small + 1) - small.log(), series)


def valid_concentration(value: Tensor) -> Tensor:
    """Where a concentration is one that this module can take."""
    return (value >= SMALLEST_CONCENTRATION) & (value <= LARGEST_CONCENTRATION)


def log_beta(a: Tensor, b: Tensor) -> Tensor:
    """The logarithm of B(a, b), without the cancellation of three log-gammas at large a and b."""
    total = a + b
    log_mean, log_far = _log_shares(a, b)
    return (
        0.5 * math.log(2 * math.pi)
        + (_stirling_remainder(a) + _stirling_remainder(b) - _stirling_remainder(total))
        + (a - 0.5) * log_mean
        + (b - 0.5) * log_far
        - 0.5 * total.log()
    )


def _log_shares(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of a / (a + b) and of b / (a + b)."""
    larger, smaller = torch.maximum(a, b), torch.minimum(a, b)
    ratio = smaller / larger
    log_larger = -torch.log1p(ratio)
    is_normal = ratio > 1e-290
    log_ratio = torch.where(is_normal, ratio, 1.0).log()
    log_smaller = log_larger + torch.where(is_normal, log_ratio, smaller.log() - larger.log())
    is_larger = a >= b
    return torch.where(is_larger, log_larger, log_smaller), torch.where(is_larger, log_smaller, log_larger)


def log1p_less(w: Tensor) -> Tensor:
    """Log(1 + w) - w without the cancellation at small w."""
    half = w / (w + 2)
    square = half * half
    series = torch.full_like(w, 1 / 17)
    for k in range(7, 0, -1):
        series = torch.add(1 / (2 * k + 1), series * square)
    small = half * (2 * square * series - w)
    return torch.where(w.abs() < 0.1, small, torch.log1p(w) - w)


class Mean(NamedTuple):
    """The mean a / (a + b) and its distance to 1 as functions of a and b, and what depends on them alone.

    Each comes with the rounding error it has in double precision. Beyond 1e10 the distribution is narrow
    enough to notice.
    """

    value: Tensor
    value_error: Tensor
    far: Tensor
    far_error: Tensor
    log: Tensor
    log_far: Tensor
    log_scale: Tensor
    """The logarithm of mean^a (1 - mean)^b / B(a, b)."""

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Mean:
        total = a + b
        value, far = a / total, b / total
        with torch.no_grad():
            errors = [_division_error(p, q, ratio) for p, q, ratio in ((a, b, value), (b, a, far))]
        return cls(value, errors[0], far, errors[1], *_log_shares(a, b), _log_scale(a, b))

    def deviations(self, x: Tensor, complement: Tensor) -> tuple[Tensor, Tensor]:
        """(x - mean) / mean and (mean - x) / (1 - mean), from whichever of x and 1 - x is the smaller."""
        left, right = (x - self.value) - self.value_error, (self.far - complement) + self.far_error
        offset = torch.where(self.value <= 0.5, left, right)
        return offset / self.value, offset / -self.far


def _log_scale(a: Tensor, b: Tensor) -> Tensor:
    total = a + b
    # a b / (a + b), which neither overflows nor underflows.
    size = torch.minimum(a, b) * (torch.maximum(a, b) / total)
    remainder = _stirling_remainder(a) + _stirling_remainder(b) - _stirling_remainder(total)
    return 0.5 * (size.log() - math.log(2 * math.pi)) - remainder


def _division_error(p: Tensor, q: Tensor, ratio: Tensor) -> Tensor:
    """What has to be added to the rounded p / (p + q) to make it exact, by error-free transformations."""
    # Away from overflow; small parameters make wide distributions, to which the error is nothing.
    p, q = p * 2.0**-40, q * 2.0**-40
    total = p + q
    larger, smaller = torch.maximum(p, q), torch.minimum(p, q)
    total_error = smaller - (total - larger)
    product = ratio * total
    high, low = _split(ratio)
    total_high, total_low = _split(total)
    product_error = ((high * total_high - product) + high * total_low + low * total_high) + low * total_low
    return (((p - product) - product_error) - ratio * total_error) / total


def _split(value: Tensor) -> tuple[Tensor, Tensor]:
    """Two halves of a number's digits, whose products are exact."""
    scaled = value * (2.0**27 + 1)
    high = scaled - (scaled - value)
    return high, value - high


def log_density(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """The logarithm of the Beta density at x in [0, 1], differentiable in everything."""
    with torch.no_grad():
        u, v = Mean.of(a, b).deviations(x, 1 - x)
        inner = (u.abs() < 0.5) & (v.abs() < 0.5)
    # Neither branch of a choice may have an infinite derivative where the other is chosen.
    c, d, y = (torch.where(inner, t, safe) for t, safe in ((a, 1.0), (b, 1.0), (x, 0.5)))
    u, v = Mean.of(c, d).deviations(y, 1 - y)
    near = c * log1p_less(u) + d * log1p_less(v) - y.log() - torch.log1p(-y)
    log_mean, log_far = _log_shares(a, b)
    y = torch.where(inner, 0.5, x)
    powers = torch.special.xlogy(a - 1, y) + torch.special.xlog1py(b - 1, -y)
    return torch.where(inner, near, powers - a * log_mean - b * log_far) + _log_scale(a, b)


@functools.cache
def _rule() -> list[tuple[float, float]]:
    """Points and weights on (0, 1), the points squared, so that they crowd where the integrand starts."""
    rule = []
    for k in range(_POINTS):
        # The roots of the Legendre polynomial by Newton's method, its values by their recurrence.
        root = math.cos(math.pi * (k + 0.75) / (_POINTS + 0.5))
        for _ in range(10):
            value, previous = 1.0, 0.0
            for n in range(_POINTS):
                value, previous = ((2 * n + 1) * root * value - n * previous) / (n + 1), value
            slope = _POINTS * (root * value - previous) / (root * root - 1)
            root -= value / slope
        point, weight = (root + 1) / 2, 2 / ((1 - root * root) * slope * slope)
        rule.append((point * point, weight * point))
    return rule


def hazard(
    p: Tensor, q: Tensor, y: Tensor, complement: Tensor, deviation: Tensor, gradients: bool
) -> tuple[Tensor, ...]:
    """The density of logit(y) over I_y(p, q), and its logarithm's derivatives in p (and 1 / p less) and q.

    Args:
        p: first concentration, above some tens.
        q: second concentration, of any size.
        y: where to evaluate, at most (p + 1) / (p + q + 2).
        complement: 1 - y.
        deviation: y / mean - 1.
        gradients: whether to return the derivatives.
    """
    # The integral is over r = r' / p. The exponent is -rate r' plus two terms that start with r'^2.
    odds = y / complement / p
    rate = (odds - 1 / p) - deviation / complement
    first, second, inverse = p - 1, q - 1, -1 / p
    curvature = (first / p / p + second * odds * odds).clamp_min_(0.0)
    end = 2 * _END / (rate + (rate * rate + 2 * _END * curvature).sqrt())
    limit = 0.999 * p
    for _ in range(3):
        end = torch.minimum(end, limit)
        at_p, at_q = end * inverse, end * odds
        exponent = first * log1p_less(at_p) + second * log1p_less(at_q) - rate * end
        slope = rate + first * inverse * at_p / (1 + at_p) + second * odds * at_q / (1 + at_q)
        end = (end + (_END + exponent) / slope).clamp_min_(0.0)
    end = torch.minimum(end, limit)
    scaled_p, scaled_q, scaled_rate = end * inverse, end * odds, end * rate
    total = torch.zeros_like(end)
    by_p, by_q = torch.zeros_like(end), torch.zeros_like(end)
    rule = _rule()
    # Several points at once where an operation on one of them would take longer to start than to run.
    together = min(max(_TOGETHER // max(end.numel(), 1), 1), _POINTS)
    for start in range(0, _POINTS, together):
        points, weights = zip(*rule[start : start + together], strict=True)
        at_p, at_q = _at(points, scaled_p), _at(points, scaled_q)
        less_p, less_q = log1p_less(at_p), log1p_less(at_q)
        exponent = (less_p * first).addcmul_(less_q, second)
        for row, point in zip(exponent, points, strict=True):
            row.sub_(scaled_rate, alpha=point)
        mass = exponent.exp_()
        if gradients:
            less_p.add_(at_p)
            less_q.add_(at_q)
        for k, weight in enumerate(weights):
            total.add_(mass[k], alpha=weight)
            if gradients:
                by_p.addcmul_(mass[k], less_p[k], value=weight)
                by_q.addcmul_(mass[k], less_q[k], value=weight)
    found = p * complement / (end * total)
    if not gradients:
        return (found,)
    return found, -by_p / total - 1 / p, -by_q / total


def _at(points: tuple[float, ...], scale: Tensor) -> Tensor:
    """The points times the scale, one row a point."""
    rows = [scale * point for point in points]
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def small_tail(p: Tensor, q: Tensor, y: Tensor, log_y: Tensor, gradients: bool) -> tuple[Tensor, Tensor]:
    r"""Log I_y(p, q) and its derivative in q for p up to 0.001, precise though both vanish like p.

    .. math::
        I_y(p, q) = \frac{y^p}{p B(p, q)} \left( 1 + p \sum_{n \ge 1} \frac{(1 - q)_n}{n! (p + n)} y^n \right)

    Args:
        p: first concentration, up to 0.001.
        q: second concentration, of any size.
        y: where to evaluate, at most (p + 1) / (p + q + 2).
        log_y: its logarithm.
        gradients: whether to return the derivative, instead of 0.
    """
    term, total = torch.ones_like(y * q), torch.zeros_like(y * q)
    term_q, total_q = torch.zeros_like(total), torch.zeros_like(total)
    for n in range(1, 54):
        if gradients:
            term_q = term_q * ((n - q) * y / n) - term * y / n
            total_q = total_q + term_q / (p + n)
        term = term * ((n - q) * y / n)
        total = total + term / (p + n)
    # Log(p B(p, q)) / p, from Taylor series in p of the log-gammas; that of q starts at q + 1.
    log_gamma, rise, rise_q = torch.zeros_like(p), torch.zeros_like(q + p), torch.zeros_like(q + p)
    for k in range(len(_LOG_GAMMA), 0, -1):
        log_gamma = log_gamma * p + _LOG_GAMMA[k - 1]
        rise = (rise * p + torch.polygamma(k - 1, q + 1)) / k
        rise_q = (rise_q * p + torch.polygamma(k, q + 1)) / k
    log_beta_over_p = log_gamma - rise + torch.log1p(p / q) / p
    log_tail = p * (log_y - log_beta_over_p) + torch.log1p(p * total)
    by_q = p * (total_q / (1 + p * total) + rise_q) + p / q / (q + p)
    return log_tail, by_q if gradients else torch.zeros_like(log_tail)
