"""What the tests compare with: SciPy, mpmath and loops, and nothing of this package but its classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mpmath
import numpy as np
import torch
import torch.distributions as td
from scipy import special, stats
from torch import Tensor
from torch.distributions import Distribution

import batchshaping as bs

DIGITS = 50


def regularized_beta(a: Any, b: Any, x: Any) -> mpmath.mpf:
    """I_x(a, b), good to 40 digits of 1, by a series whose terms are all positive.

    The half of the interval is chosen so that its terms fall at least like 2^-n in the end.
    """
    with mpmath.workdps(DIGITS):
        a, b, x = mpmath.mpf(a), mpmath.mpf(b), mpmath.mpf(x)
        if x > 0.5:
            return 1 - regularized_beta(b, a, 1 - x)
        if x == 0:
            return mpmath.mpf(0)
        term, total, n = mpmath.mpf(1), mpmath.mpf(1), 0
        while n < a + b or term > total * mpmath.mpf(10) ** -DIGITS:
            term *= (a + b + n) / (a + 1 + n) * x
            total += term
            n += 1
        log_beta = mpmath.loggamma(a) + mpmath.loggamma(b) - mpmath.loggamma(a + b)
        return total * mpmath.exp(a * mpmath.log(x) + b * mpmath.log1p(-x) - log_beta) / a


def regularized_beta_slopes(a: float, b: float, x: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """The derivatives of I_x(a, b) in a and b, by central differences at 50 digits, good to 20."""
    with mpmath.workdps(DIGITS):
        a, b = mpmath.mpf(a), mpmath.mpf(b)
        h, k = a * mpmath.mpf(10) ** -15, b * mpmath.mpf(10) ** -15
        return (
            (regularized_beta(a + h, b, x) - regularized_beta(a - h, b, x)) / (2 * h),
            (regularized_beta(a, b + k, x) - regularized_beta(a, b - k, x)) / (2 * k),
        )


def log_tails_of_beta(a: Any, b: Any, x: Any, complement: Any = None) -> tuple[mpmath.mpf, mpmath.mpf]:
    """Log I_x(a, b) and log(1 - I_x(a, b)), each good to 20 digits of itself, for parameters of any size.

    The tail on whose side of the mean x is, is integrated over the logit, in which the density has one peak:
    from x outwards it falls. ``complement`` is 1 - x where x is too close to 1 to tell.
    """
    size = max(float(a), float(b), 1.0) / min(float(a), float(b), 1.0)
    with mpmath.workdps(int(30 + mpmath.log10(size))):
        a, b, x = mpmath.mpf(a), mpmath.mpf(b), mpmath.mpf(x)
        complement = 1 - x if complement is None else mpmath.mpf(complement)
        if x * b > complement * a:
            return log_tails_of_beta(b, a, complement, x)[::-1]

        def relative_density(distance: mpmath.mpf) -> mpmath.mpf:
            return mpmath.exp(-a * distance - (a + b) * mpmath.log1p(x * mpmath.expm1(-distance)))

        width = mpmath.mpf(1)
        while relative_density(width) < mpmath.mpf(10) ** -25:
            width /= 4
        while relative_density(width) > mpmath.mpf(10) ** -35:
            width *= mpmath.mpf(1.5)
        parts = [mpmath.mpf(0), *(width / 4**k for k in (2, 0))]
        log_beta = mpmath.loggamma(a) + mpmath.loggamma(b) - mpmath.loggamma(a + b)
        power = a * mpmath.log(x) + b * mpmath.log(complement) - log_beta
        near = mpmath.log(mpmath.quad(relative_density, parts)) + power
        return near, mpmath.log1p(-mpmath.exp(near)) if near < -1 else mpmath.log(-mpmath.expm1(near))


def tails_of_beta(a: Any, b: Any, x: Any, complement: Any = None) -> tuple[mpmath.mpf, mpmath.mpf]:
    """I_x(a, b) and 1 - I_x(a, b), each good to 20 digits of itself."""
    with mpmath.workdps(DIGITS):
        lower, upper = log_tails_of_beta(a, b, x, complement)
        return mpmath.exp(lower), mpmath.exp(upper)


def log_tails(name: str, parameters: tuple[float, ...], x: Any, complement: Any = None) -> tuple[Any, Any]:
    """Log CDF and log survival function, each good to 40 digits of itself, however far in its tail x is.

    ``complement`` is 1 - x where x is too close to 1 to tell. The smaller of the two is computed, and the
    other follows from it.
    """
    with mpmath.workdps(DIGITS):
        given, x = [mpmath.mpf(p) for p in parameters], mpmath.mpf(x)
        complement = 1 - x if complement is None else mpmath.mpf(complement)
        if name == "Normal":
            z = (x - given[0]) / given[1]
            small, is_lower = mpmath.log(mpmath.erfc(abs(z) / mpmath.sqrt(2)) / 2), z < 0
        elif name == "RelaxedBernoulli":
            mean, temperature = given
            u = temperature * mpmath.log(x / complement) - mpmath.log(mean / (1 - mean))
            small, is_lower = -mpmath.log1p(mpmath.exp(abs(u))), u < 0
        else:
            a, b = given if name == "Beta" else (given[0], 1 - given[0])
            is_lower = x <= complement
            small = _log_lower_beta(a, b, x, complement) if is_lower else _log_lower_beta(b, a, complement, x)
        large = mpmath.log1p(-mpmath.exp(small))
        return (small, large) if is_lower else (large, small)


def _log_lower_beta(a: Any, b: Any, x: Any, complement: Any) -> Any:
    """Log I_x(a, b) for x up to 1/2, by the series of :func:`regularized_beta`."""
    term, total, n = mpmath.mpf(1), mpmath.mpf(1), 0
    while n < a + b or term > total * mpmath.mpf(10) ** -DIGITS:
        term *= (a + b + n) / (a + 1 + n) * x
        total += term
        n += 1
    log_beta = mpmath.loggamma(a) + mpmath.loggamma(b) - mpmath.loggamma(a + b)
    return mpmath.log(total / a) + a * mpmath.log(x) + b * mpmath.log(complement) - log_beta


class Family(NamedTuple):
    """A family of priors: how it is made here, and SciPy's or the closed form of its CDF and quantiles."""

    prior: Callable[..., Distribution]
    names: tuple[str, ...]
    cdf: Callable[..., np.ndarray]
    icdf: Callable[..., np.ndarray]
    moments: Callable[..., tuple[float, float]] | None
    examples: tuple[tuple[float, ...], ...]


FAMILIES = {
    "Beta": Family(
        bs.Beta,
        ("a", "b"),
        lambda x, a, b: special.betainc(a, b, np.clip(x, 0, 1)),
        lambda p, a, b: special.betaincinv(a, b, p),
        lambda a, b: stats.beta.stats(a, b),
        ((2.0, 6.0), (0.6, 0.4), (1.0, 1.0), (30.0, 70.0), (0.05, 3.0)),
    ),
    "SymBeta": Family(
        bs.SymBeta,
        ("a",),
        lambda x, a: special.betainc(a, 1 - a, np.clip(x, 0, 1)),
        lambda p, a: special.betaincinv(a, 1 - a, p),
        lambda a: stats.beta.stats(a, 1 - a),
        ((0.6,), (0.9,), (0.2,)),
    ),
    "RelaxedBernoulli": Family(
        bs.RelaxedBernoulli,
        ("mean", "temperature"),
        lambda x, mean, t: special.expit(t * special.logit(np.clip(x, 0, 1)) - special.logit(mean)),
        lambda p, mean, t: special.expit((special.logit(p) + special.logit(mean)) / t),
        None,
        ((0.2, 0.25), (0.8, 0.4), (0.5, 1.0), (0.3, 5.0)),
    ),
    "Normal": Family(
        bs.Normal,
        ("loc", "scale"),
        lambda x, loc, scale: stats.norm.cdf(x, loc, scale),
        lambda p, loc, scale: stats.norm.ppf(p, loc, scale),
        lambda loc, scale: stats.norm.stats(loc, scale),
        ((0.6, 0.1), (-3.0, 20.0), (0.0, 1.0)),
    ),
}

# Families of torch, with a Normal that is not ours. Gamma's shape is fixed: torch has no derivative in it.
FOREIGN = {
    "Uniform": Family(
        partial(td.Uniform, validate_args=False),
        ("low", "high"),
        lambda x, low, high: stats.uniform.cdf(x, low, high - low),
        lambda p, low, high: stats.uniform.ppf(p, low, high - low),
        None,
        ((0.1, 0.8),),
    ),
    "LogNormal": Family(
        partial(td.LogNormal, validate_args=False),
        ("loc", "scale"),
        lambda x, m, s: stats.lognorm.cdf(x, s, scale=np.exp(m)),
        lambda p, m, s: stats.lognorm.ppf(p, s, scale=np.exp(m)),
        None,
        ((0.2, 0.7),),
    ),
    "Gumbel": Family(
        partial(td.Gumbel, validate_args=False),
        ("loc", "scale"),
        stats.gumbel_r.cdf,
        stats.gumbel_r.ppf,
        None,
        ((0.2, 0.7),),
    ),
    "Laplace": Family(
        partial(td.Laplace, validate_args=False),
        ("loc", "scale"),
        stats.laplace.cdf,
        stats.laplace.ppf,
        None,
        ((0.2, 0.7),),
    ),
    "Exponential": Family(
        partial(td.Exponential, validate_args=False),
        ("rate",),
        lambda x, rate: stats.expon.cdf(x, scale=1 / rate),
        lambda p, rate: stats.expon.ppf(p, scale=1 / rate),
        None,
        ((2.0,),),
    ),
    "Cauchy": Family(
        partial(td.Cauchy, validate_args=False),
        ("loc", "scale"),
        stats.cauchy.cdf,
        stats.cauchy.ppf,
        None,
        ((0.2, 0.7),),
    ),
    "HalfNormal": Family(
        partial(td.HalfNormal, validate_args=False),
        ("scale",),
        lambda x, s: stats.halfnorm.cdf(x, scale=s),
        lambda p, s: stats.halfnorm.ppf(p, scale=s),
        None,
        ((0.7,),),
    ),
    "Gamma": Family(
        partial(td.Gamma, 2.0, validate_args=False),
        ("rate",),
        lambda x, rate: stats.gamma.cdf(x, 2.0, scale=1 / rate),
        lambda p, rate: stats.gamma.ppf(p, 2.0, scale=1 / rate),
        None,
        ((3.0,),),
    ),
    "Pareto": Family(
        partial(td.Pareto, validate_args=False),
        ("scale", "alpha"),
        lambda x, s, a: stats.pareto.cdf(x, a, scale=s),
        lambda p, s, a: stats.pareto.ppf(p, a, scale=s),
        None,
        ((0.3, 2.0),),
    ),
    "Kumaraswamy": Family(
        partial(td.Kumaraswamy, validate_args=False),
        ("concentration1", "concentration0"),
        lambda x, a, b: 1 - (1 - np.clip(x, 0, 1) ** a) ** b,
        lambda p, a, b: (1 - (1 - p) ** (1 / b)) ** (1 / a),
        None,
        ((2.0, 3.0),),
    ),
    "Normal of torch": FAMILIES["Normal"]._replace(
        prior=partial(td.Normal, validate_args=False), examples=((0.6, 0.1),)
    ),
}


def relative_entropy(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Twice that of a coin of probability p to one of probability q."""
    return 2 * (special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q))


def characteristic_distance(z: np.ndarray, t: np.ndarray | float) -> np.ndarray:
    """The squared distance of the characteristic function of samples to that of N(0, 1), times the latter."""
    empirical = np.exp(1j * np.multiply.outer(t, z)).mean(axis=-1)
    target = np.exp(-np.square(t) / 2)
    return np.abs(empirical - target) ** 2 * target


def scipy(function: Callable[..., np.ndarray], *operands: Tensor | float) -> Tensor:
    """A function of SciPy on tensors, in double precision."""
    arrays = (t.detach().double().numpy() if isinstance(t, Tensor) else t for t in operands)
    return torch.as_tensor(function(*arrays))


def arrays_of(x: Tensor, dim: int | tuple[int, ...] | None) -> tuple[Tensor, tuple[int, ...]]:
    """The arrays as rows of a matrix of shape (arrays, samples), and the shape that ``dim`` leaves."""
    dims = range(x.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    samples = sorted(d % x.ndim for d in dims) if x.ndim else []
    kept = [d for d in range(x.ndim) if d not in samples]
    shape = tuple(x.shape[d] for d in kept)
    return x.permute((*kept, *samples)).reshape(int(np.prod(shape, dtype=int)), -1), shape


def brute_force(
    x: Tensor,
    cdf: Callable[..., np.ndarray],
    parameters: tuple[float | Tensor, ...],
    dim: int | tuple[int, ...] | None = None,
    mask: Tensor | None = None,
    ties: bool = False,
) -> np.ndarray:
    """The loss of every array: the mean squared distance of SciPy's CDF to the plotting positions."""

    def terms(values: np.ndarray, positions: np.ndarray, *parameters: float) -> np.ndarray:
        return (cdf(values, *parameters) - positions) ** 2

    return mean_of_terms(x, terms, parameters, dim, mask, ties)


def mean_of_terms(
    x: Tensor,
    terms: Callable[..., np.ndarray],
    parameters: tuple[float | Tensor, ...],
    dim: int | tuple[int, ...] | None = None,
    mask: Tensor | None = None,
    ties: bool = False,
) -> np.ndarray:
    """The mean of the terms of every array, array by array: select, sort, rank and average in NumPy.

    The terms are a function of the sorted values, their plotting positions and the array's parameters; a
    statistic that has none returns its value instead.
    """
    rows, shape = arrays_of(x.detach().double(), dim)
    kept = (
        torch.ones_like(rows, dtype=torch.bool) if mask is None else arrays_of(mask.expand(x.shape), dim)[0]
    )
    by_array = [
        np.broadcast_to(np.asarray(p.detach() if isinstance(p, Tensor) else p, float), shape).reshape(-1)
        for p in parameters
    ]
    means = np.empty(len(rows))
    for k, (row, keep) in enumerate(zip(rows.numpy(), kept.numpy(), strict=True)):
        values = np.sort(row[keep])
        rank = stats.rankdata(values, method="max" if ties else "ordinal")
        means[k] = np.mean(terms(values, rank / (len(values) + 1), *(p[k] for p in by_array)))
    return means.reshape(shape)
