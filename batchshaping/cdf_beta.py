r"""The cumulative distribution function of the Beta distribution, its inverse and every derivative.

The regularized incomplete beta function is evaluated by the continued fraction of Didonato and Morris
(1992), the even part of `DLMF 8.17.22 <https://dlmf.nist.gov/8.17.E22>`_,

.. math::
    I_x(a, b) = \frac{x^a (1 - x)^b}{B(a, b)} \Big/ t_0, \qquad
    t_n = \beta_n + \alpha_{n+1} x^2 / t_{n+1},

whose coefficients depend on the parameters only: they are made once a parameter, however many values
follow. It converges fast left of :math:`(a + 1) / (a + b + 2)`; right of it stands
:math:`I_x(a, b) = 1 - I_{1-x}(b, a)`. Both sides are evaluated at clamped arguments and added up, which on
vector hardware costs less than choosing. The derivatives in a and b differentiate the fraction itself,
term by term, as in Boik and Robison-Cox (1998).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from batchshaping.derivatives import CDFDerivatives, LogCDFDerivatives, PreparedCDF, nearest_inside

__all__ = [
    "BetaCDF",
    "beta_pdf",
    "clip_density",
    "betainc",
    "betaincinv",
    "fixed_beta_cdf",
    "get_beta_cdf_factory",
    "log_beta",
    "to_front",
]

# What float32 needs for a CDF good to 5e-7: above this size of a log(mean), exponents relative to the mean;
_LARGE_EXPONENT = 4.0
# above this sum of the parameters, the fraction in the offset from the mean;
_LARGE_TOTAL = 8.0
# and above this sum, float64.
_FLOAT32_LIMIT = 112.0
_CHUNK = 2**14
_TILE = 2**18
_NEWTON_STEPS = 15
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)


def _stirling_remainder(z: Tensor) -> Tensor:
    r"""Log Gamma(z) less its Stirling approximation (z - 1/2) log z - z + log(2 pi) / 2."""
    large = z.clamp_min(10.0)
    inverse_square = large.pow(-2)
    series = torch.zeros_like(large)
    for coefficient in reversed(_STIRLING):
        series = series * inverse_square + coefficient
    small = z.clamp_max(10.0)
    exact = torch.lgamma(small) - ((small - 0.5) * small.log() - small + 0.5 * math.log(2 * math.pi))
    return torch.where(z < 10.0, exact, series / large)


def log_beta(a: Tensor, b: Tensor) -> Tensor:
    """The logarithm of B(a, b), without the cancellation of three log-gammas at large a and b."""
    total = a + b
    return (
        0.5 * math.log(2 * math.pi)
        + (_stirling_remainder(a) + _stirling_remainder(b) - _stirling_remainder(total))
        + (a - 0.5) * (a / total).log()
        + (b - 0.5) * (b / total).log()
        - 0.5 * total.log()
    )


class _Parts(NamedTuple):
    """The CDF, the density and, with gradients, the CDF's derivatives in a and b.

    The tail is I_x left of (a + 1) / (a + b + 2) and 1 - I_x right of it, to full relative precision.
    """

    cdf: Tensor
    tail: Tensor
    pdf: Tensor
    a: Tensor | None = None
    b: Tensor | None = None


def _steps(p: Tensor, precise: bool, gradients: bool) -> int:
    """How many steps of the fraction reach float64 (precise) or float32 precision, for every q.

    Measured against 600 steps for p and q in [0.001, 3000] at the split, where convergence is slowest; the
    count grows like the cube root of p. A parameter whose value cannot be read without stopping the device
    gets what p = 1000 needs.
    """
    largest = float(p.max()) if p.device.type == "cpu" and p.numel() else 1000.0
    root = max(largest, 0.0) ** (1 / 3) if math.isfinite(largest) else 0.0
    if precise:
        return math.ceil(10 + 7.5 * root)
    return math.ceil(5 + 3.4 * root if gradients else max(4 + 2.9 * root, 3 + 3.3 * root))


class _Fraction:
    """The continued fraction as a function of y, at most (p + 1) / (p + q + 2), with its coefficients made.

    t_n = p + 2 n + slope_n y + factor_n y^2 / t_{n+1}. Returned is t_0, with gradients its derivatives in p
    and in q too. The coefficients have the shape of the parameters; for one pair without gradients they are
    numbers, which makes two passes over y a step instead of five.

    Where p is large, p + slope_0 y cancels near the mean. There the lines are taken in the offset of y from a
    centre, in which they are exact; elsewhere the centre is 0 and the offset y itself.
    """

    def __init__(
        self, p: Tensor, q: Tensor, steps: int, gradients: bool, centre: Tensor, working: torch.dtype
    ) -> None:
        n = torch.arange(steps, dtype=p.dtype, device=p.device).reshape(-1, *[1] * p.ndim)
        # The first slope has no term over p - 1, which may be zero.
        odd, even = p + (2 * n + 1), torch.where(n > 0, p + (2 * n - 1), 1.0)
        product = (p + n) * (p + q + n)
        weight = (n + 1) / odd.square()
        first = n / even
        slope = first * (q - n) - product / odd
        self.constant = (p + 2 * n + slope * centre).to(working)
        self.slope = slope.to(working)
        self.factor = (product * weight * (q - n - 1)).to(working)
        self._method: Callable[[Tensor, Tensor], tuple[Tensor, ...]] = self._fold_many
        if gradients:
            product_p = 2 * p + q + 2 * n
            slope_p = product / odd.square() - product_p / odd - first * (q - n) / even
            self.slope_p, self.slope_q = slope_p.to(working), (first - (p + n) / odd).to(working)
            self.factor_p = (weight * (q - n - 1) * (product_p - 2 * product / odd)).to(working)
            self.factor_q = (weight * (p + n) * (p + 2 * q - 1)).to(working)
            self._method = self._fold_gradients
        if p.numel() == 1 and p.device.type == "cpu":
            tables = (self.slope, self.factor, *((self.slope_p, self.slope_q) if gradients else ()))
            tables = (*tables, *((self.factor_p, self.factor_q) if gradients else ()))
            self.numbers = list(zip(*(table.reshape(-1).tolist() for table in tables), strict=True))
            self._method = self._fold_one_with_gradients if gradients else self._fold_one

    def __call__(self, y: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        return self._method(y, offset)

    def _fold_one(self, y: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        # One pass makes a line on the CPU; a tensor there does not mix with those of another device.
        constant = (self.constant if y.is_cpu else self.constant.to(y.device, non_blocking=True)).reshape(-1)
        y_square = y * y
        t = torch.add(constant[-1], offset, alpha=self.numbers[-1][0])
        line = torch.empty_like(t)
        for k in range(len(constant) - 2, -1, -1):
            slope, factor = self.numbers[k]
            torch.add(constant[k], offset, alpha=slope, out=line)
            torch.addcdiv(line, y_square, t, value=factor, out=t)
        return (t,)

    def _fold_one_with_gradients(self, y: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        if not y.is_cpu:
            return self._fold_gradients(y, offset)
        constant, one = self.constant.reshape(-1), y.new_ones(())
        y_square = y * y
        slope, _, slope_p, slope_q, *_ = self.numbers[-1]
        t = torch.add(constant[-1], offset, alpha=slope)
        t_p, t_q = torch.add(one, y, alpha=slope_p), y * slope_q
        ratio, decay = torch.empty_like(t), torch.empty_like(t)
        for k in range(len(constant) - 2, -1, -1):
            slope, factor, slope_p, slope_q, factor_p, factor_q = self.numbers[k]
            torch.div(y_square, t, out=ratio)
            torch.div(ratio, t, out=decay).mul_(-factor)
            t_p.mul_(decay).add_(y, alpha=slope_p).add_(ratio, alpha=factor_p).add_(1.0)
            t_q.mul_(decay).add_(y, alpha=slope_q).add_(ratio, alpha=factor_q)
            torch.add(constant[k], offset, alpha=slope, out=t).add_(ratio, alpha=factor)
        return t, t_p, t_q

    def _fold_many(self, y: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        y_square = y * y
        t = offset * self.slope[-1]
        t += self.constant[-1]
        ratio = torch.empty_like(t)
        for k in range(len(self.slope) - 2, -1, -1):
            torch.mul(y_square, self.factor[k], out=ratio)
            ratio /= t
            torch.mul(offset, self.slope[k], out=t)
            t += self.constant[k]
            t += ratio
        return (t,)

    def _fold_gradients(self, y: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        y_square = y * y
        t = offset * self.slope[-1]
        t += self.constant[-1]
        t_p = y * self.slope_p[-1]
        t_p += 1.0
        t_q = y * self.slope_q[-1]
        ratio, decay, line = torch.empty_like(t), torch.empty_like(t), torch.empty_like(t)
        for k in range(len(self.slope) - 2, -1, -1):
            torch.div(y_square, t, out=ratio)
            torch.div(ratio, t, out=decay).mul_(-self.factor[k])
            torch.mul(y, self.slope_p[k], out=line).add_(1.0)
            t_p.mul_(decay).add_(line).addcmul_(ratio, self.factor_p[k])
            t_q.mul_(decay).add_(torch.mul(y, self.slope_q[k], out=line)).addcmul_(ratio, self.factor_q[k])
            torch.mul(offset, self.slope[k], out=t)
            t += self.constant[k]
            t += ratio.mul_(self.factor[k])
        return t, t_p, t_q


def _choose(left: Tensor | None, right: Tensor | None, in_right: Tensor) -> Tensor:
    """Values of the side that each element is on; a side that no element is on need not be there."""
    if left is None or right is None:
        return cast("Tensor", right if left is None else left)
    # Weights 0 and 1 make lerp an exact choice, several times faster than where.
    return torch.lerp(left, right, in_right)


class BetaCDF(PreparedCDF):
    """I_x(a, b) and its derivatives as a function of x, without a graph, all that depends on a and b made.

    a, b and x broadcast. Outside (0, 1) the CDF is 0 or 1 and the density 0, as at the ends themselves,
    where the density of a U-shaped Beta has no finite value. NaN in, NaN out.

    Args:
        a: first concentration, positive.
        b: second concentration, positive.
        dtype: floating dtype of the values to come, and of what is returned for them.
        gradients: whether to return the derivatives in a and b as well.
        tails: whether tails need relative precision, as their logarithms do, besides the absolute one.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        dtype: torch.dtype,
        *,
        gradients: bool = False,
        tails: bool = False,
    ) -> None:
        # A number beside a learned tensor stands on the CPU, and joins it where that is.
        device = next((p.device for p in (a, b) if not p.is_cpu), a.device)
        a, b = (p.to(device, torch.float64, non_blocking=True) for p in (a, b))
        a, b = torch.broadcast_tensors(a, b)
        self.dtype, self.shape, self.gradients = dtype, a.shape, gradients
        self.readable = a.device.type == "cpu" and a.numel() > 0
        total = a + b
        # In float32 a log x is precise where it is small, and a log(x / mean) near the mean.
        sizes = (-a * (a / total).log(), -b * (b / total).log(), total)
        limits = (_LARGE_EXPONENT, _LARGE_EXPONENT, _LARGE_TOTAL)
        above = [(s > limit).flatten() for s, limit in zip(sizes, limits, strict=True)]
        single = dtype == torch.float32 and self.readable and bool((total <= _FLOAT32_LIMIT).all())
        single = single and all(bool((large == (large[0] and not tails)).all()) for large in above)
        self.working = working = torch.float32 if single else torch.float64
        finfo = torch.finfo(working)
        self._tiny, self._eps = finfo.smallest_normal, finfo.eps
        self._lowest = math.log(finfo.smallest_normal * finfo.eps)
        self.large_a, self.large_b, self.centred = (single and bool(large[0]) for large in above)
        centre = (a / total).to(working)
        self.centre, self.far_centre = centre, 1 - centre
        self.a, self.b = a.to(working), b.to(working)
        self.numbers = (float(self.a), float(self.b)) if self.readable and a.ndim == 0 else None
        self.split = ((a + 1) / (total + 2)).to(working)
        self.split_range = (float(self.split.min()), float(self.split.max())) if self.readable else (0.0, 1.0)
        # The exponent is taken relative to the centre, where it is 0: the rest of 1 / B(a, b) multiplies.
        log_centre, log_far = centre.double().log(), torch.log1p(-centre.double())
        self.scale = (a * log_centre + b * log_far - log_beta(a, b)).exp().to(working)
        self.peak = (a * log_centre * (not self.large_a) + b * log_far * (not self.large_b)).to(working)
        precise, zero = dtype == torch.float64, torch.zeros_like(a)
        self.left = _Fraction(
            a, b, _steps(a, precise, gradients), gradients, centre.double() if self.centred else zero, working
        )
        self.right = _Fraction(
            b,
            a,
            _steps(b, precise, gradients),
            gradients,
            1 - centre.double() if self.centred else zero,
            working,
        )
        if gradients:
            digamma_total = torch.digamma(total)
            self.shift_a = (digamma_total - torch.digamma(a) + log_centre * self.large_a).to(working)
            self.shift_b = (digamma_total - torch.digamma(b) + log_far * self.large_b).to(working)

    def __call__(self, x: Tensor) -> CDFDerivatives:
        found = self.parts(x)
        return CDFDerivatives(found.cdf, found.pdf, tuple(g for g in found[3:] if g is not None))

    def at_logits(self, logits: Tensor) -> CDFDerivatives:
        """The same as a function of logit(x), with the density and no rounding of it."""
        found = self._parts(*self._from_logits(logits), in_logits=True)
        return CDFDerivatives(found.cdf, found.pdf, tuple(g for g in found[3:] if g is not None))

    def parts(self, x: Tensor) -> _Parts:
        """The same with the tail that the CDF is made of."""
        return self._parts(*self._from_values(x), in_logits=False)

    def cdf(self, x: Tensor) -> Tensor:
        """The CDF alone."""
        x, complement, log_x, log_complement = self._from_values(x)
        mass = self._exponent(log_x, log_complement).exp_().mul_(self.scale)
        in_right, fraction, *_ = self._sides(x, complement)
        return torch.sub(in_right, mass.div_(fraction)).abs_().to(self.dtype)

    def logs(self, x: Tensor) -> LogCDFDerivatives:
        """Log I_x(a, b) and log(1 - I_x(a, b)) with their derivatives, as far into the tails as x goes.

        Where x is 0 or 1 or beyond, they are those of the nearest number inside, with derivative 0 in x.
        """
        nearest, inside = nearest_inside(x)
        found = self._logs(*self._from_values(nearest), in_logits=False)
        return found._replace(
            cdf_by_x=torch.where(inside, found.cdf_by_x, 0.0), sf_by_x=torch.where(inside, found.sf_by_x, 0.0)
        )

    def logs_at_logits(self, logits: Tensor) -> LogCDFDerivatives:
        """The same as a function of logit(x), finite however large the logit."""
        return self._logs(*self._from_logits(logits), in_logits=True)

    def _from_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, 1 - x and the logarithms of both, the latter less that of the centre where it is large."""
        x = x.to(self.working).clamp(0.0, 1.0)
        offset = x - self.centre if self.large_a or self.large_b else x
        log_x = torch.log1p(offset / self.centre) if self.large_a else x.log()
        log_complement = torch.log1p(offset / -self.far_centre) if self.large_b else torch.log1p(-x)
        return x, 1.0 - x, log_x, log_complement

    def _from_logits(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = logits.to(self.working)
        log_x, log_complement = (torch.nn.functional.logsigmoid(v) for v in (logits, -logits))
        if self.large_a:
            log_x = log_x - self.centre.log()
        if self.large_b:
            log_complement = log_complement - self.far_centre.log()
        return torch.sigmoid(logits), torch.sigmoid(-logits), log_x, log_complement

    def _exponent(self, log_x: Tensor, log_complement: Tensor) -> Tensor:
        """The exponent of x^a (1 - x)^b relative to the centre; with numbers it takes half of the passes."""
        if self.numbers is not None and log_x.is_cpu:
            a, b = self.numbers
            return torch.add(-self.peak, log_x, alpha=a).add_(log_complement, alpha=b)
        return (log_x * self.a).sub_(self.peak).add_(log_complement * self.b)

    def _sides(self, x: Tensor, complement: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Where x is right of the split, and t_0 there with the logarithms' derivatives in a and in b."""
        shape = torch.broadcast_shapes(self.shape, x.shape)
        some_left = some_right = True
        if self.readable and x.is_cpu and x.numel():
            least, greatest = (float(v) for v in torch.aminmax(x))
            some_left, some_right = not least > self.split_range[1], not greatest <= self.split_range[0]
        left: tuple[Tensor | None, ...] = (None, None, None)
        right = left
        if some_left:
            y = torch.minimum(x, self.split).expand(shape)
            left = self.left(y, y - self.centre if self.centred else y)
        if some_right:
            y = torch.minimum(complement, 1 - self.split).expand(shape)
            right = self.right(y, self.centre - torch.maximum(x, self.split) if self.centred else y)
        if some_left and some_right:
            # Into numbers at once, several times faster than into booleans.
            in_right = torch.gt(x, self.split, out=torch.empty(shape, dtype=self.working, device=x.device))
        else:
            in_right = torch.full((), float(some_right), dtype=self.working, device=x.device)
        fraction = _choose(left[0], right[0], in_right)
        if not self.gradients:
            return in_right, fraction, None, None
        t_a, t_b = _choose(left[1], right[2], in_right), _choose(left[2], right[1], in_right)
        return in_right, fraction, t_a.div(fraction), t_b.div(fraction)

    def _parts(
        self, x: Tensor, complement: Tensor, log_x: Tensor, log_complement: Tensor, in_logits: bool
    ) -> _Parts:
        mass = self._exponent(log_x, log_complement).exp_().mul_(self.scale)
        in_right, fraction, t_a, t_b = self._sides(x, complement)
        tail = mass / fraction
        # The tail itself left of the split, and 1 less it right of it.
        cdf = (in_right - tail).abs_()
        # x^a (1 - x)^b / B(a, b) is the density of logit(x); that of x is over x (1 - x).
        pdf = mass if in_logits else mass.div_(complement.mul_(x).clamp_min_(self._tiny))
        found = [cdf, tail, pdf]
        if t_a is not None and t_b is not None:
            signed_tail = tail * (1.0 - 2.0 * in_right)
            found += [
                (log_x.clamp_min_(self._lowest) + self.shift_a).sub_(t_a).mul_(signed_tail),
                (log_complement.clamp_min_(self._lowest) + self.shift_b).sub_(t_b).mul_(signed_tail),
            ]
        return _Parts(*(t.to(self.dtype) for t in found))

    def _logs(
        self, x: Tensor, complement: Tensor, log_x: Tensor, log_complement: Tensor, in_logits: bool
    ) -> LogCDFDerivatives:
        exponent = self._exponent(log_x, log_complement)
        in_right, fraction, t_a, t_b = self._sides(x, complement)
        # The logarithm of the tail and its derivatives have closed forms; those of what is left over follow.
        near = (exponent + self.scale.log()).sub_(fraction.log()).clamp_max_(-self._eps)
        far = torch.log1p(-near.exp())
        odds = (near - far).exp()
        slope = fraction if in_logits else fraction / complement.mul(x).clamp_min_(self._tiny)
        by_parameter = []
        is_right = in_right > 0.5
        if t_a is not None and t_b is not None:
            by_a = (log_x + self.shift_a).sub_(t_a)
            by_b = (log_complement + self.shift_b).sub_(t_b)
            for by in (by_a, by_b):
                by_parameter.append(
                    (torch.where(is_right, -by * odds, by), torch.where(is_right, by, -by * odds))
                )
        return LogCDFDerivatives(
            torch.where(is_right, far, near).to(self.dtype),
            torch.where(is_right, near, far).to(self.dtype),
            torch.where(is_right, slope * odds, slope).to(self.dtype),
            torch.where(is_right, -slope, -slope * odds).to(self.dtype),
            tuple((cdf.to(self.dtype), sf.to(self.dtype)) for cdf, sf in by_parameter),
        )


@functools.lru_cache(maxsize=256)
def fixed_beta_cdf(
    a: float, b: float, dtype: torch.dtype, gradients: bool = False, tails: bool = False
) -> BetaCDF:
    """:class:`BetaCDF` of two numbers, made once for all calls."""
    # What is kept must serve every later call, whatever the default device and the modes of the first.
    with torch.inference_mode(False):
        both = torch.tensor([a, b], dtype=torch.float64, device="cpu")
        return BetaCDF(both[0], both[1], dtype, gradients=gradients, tails=tails)


def _cdf(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """The CDF alone, for any number of parameters and values."""
    if not a.numel() == b.numel() == 1 or not (a.is_cpu and b.is_cpu and x.is_cpu):
        return _elementwise(a, b, x).cdf
    cdf = fixed_beta_cdf(float(a.detach()), float(b.detach()), x.dtype)
    shape = torch.broadcast_shapes(a.shape, b.shape, x.shape)
    found = x.new_empty(shape)
    for out, values in zip(found.view(-1).split(_TILE), x.reshape(-1).split(_TILE), strict=True):
        out.copy_(cdf.cdf(values))
    return found


def _elementwise(a: Tensor, b: Tensor, x: Tensor, gradients: bool = False) -> _Parts:
    """:class:`BetaCDF` at x for any number of parameters and values, in parts where there are many.

    The coefficients take tens of times the memory of the parameters, and values that stay in a core's cache
    are evaluated faster.
    """
    one_pair = a.numel() == b.numel() == 1 and a.is_cpu and b.is_cpu
    if max(a.numel(), b.numel()) <= _CHUNK and not (one_pair and x.numel() > _TILE and x.is_cpu):
        return BetaCDF(a, b, x.dtype, gradients=gradients).parts(x)
    a, b, x = (a, b, x) if one_pair else torch.broadcast_tensors(a, b, x)
    if one_pair:
        cdf = fixed_beta_cdf(float(a.detach()), float(b.detach()), x.dtype, gradients)
        parts = [cdf.parts(y) for y in torch.split(x.reshape(-1), _TILE)]
    else:
        chunks = (torch.split(t.reshape(-1), _CHUNK) for t in (a, b, x))
        parts = [
            BetaCDF(p, q, y.dtype, gradients=gradients).parts(y) for p, q, y in zip(*chunks, strict=True)
        ]
    shape = torch.broadcast_shapes(a.shape, b.shape, x.shape)
    fields = (torch.cat(field).reshape(shape) for field in zip(*parts, strict=True) if None not in field)
    return _Parts(*fields)


def beta_pdf(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """The Beta density, differentiable in everything; 0 outside the support, and where it is infinite."""
    inside = (x > 0) & (x < 1) | x.isnan()
    interior = torch.where(inside, x, 0.5).double()
    a, b = a.double(), b.double()
    exponent = (a - 1) * interior.log() + (b - 1) * torch.log1p(-interior) - log_beta(a, b)
    return torch.where(inside, exponent.exp(), 0.0).to(x.dtype)


def _sum_to(gradient: Tensor, like: Tensor) -> Tensor:
    return gradient.sum_to_size(like.shape).to(like.dtype)


def to_front(tensor: Tensor, dim: int | None, ndim: int) -> Tensor:
    """Bring the dimension that vmap maps to the front, before ``ndim`` others; None changes nothing."""
    if dim is None:
        return tensor
    tensor = tensor.movedim(dim, 0)
    padding = [1] * (ndim - tensor.ndim + 1)
    return tensor.reshape(tensor.shape[0], *padding, *tensor.shape[1:])


def _elementwise_vmap(function: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> Any:
    """Vmap of an elementwise function: bring the mapped dimension to the front of every operand."""
    mapped = [d is not None for d in in_dims]
    rank = max(t.ndim - m for t, m in zip(tensors, mapped, strict=True))
    return function(*(to_front(t, d, rank) for t, d in zip(tensors, in_dims, strict=True)))


class _ParameterGradients(torch.autograd.Function):
    """The derivatives of I_x(a, b) in a and b; themselves differentiable in nothing."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        derivatives = _elementwise(a, b, x, gradients=True)
        assert derivatives.a is not None and derivatives.b is not None
        return derivatives.a, derivatives.b

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError(
            "betainc is differentiable once in a and b, twice in x; received a second derivative in a or b"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        return _elementwise_vmap(_ParameterGradients.apply, in_dims, *tensors), (0, 0)


class _BetaInc(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return _cdf(a, b, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        a, b, x = ctx.saved_tensors
        needs_a, needs_b, needs_x = ctx.needs_input_grad
        needs_parameters = needs_a or needs_b
        pdf: Any
        cdf_a: Any
        cdf_b: Any
        if torch.is_grad_enabled():
            pdf = beta_pdf(a, b, x) if needs_x else None
            cdf_a, cdf_b = _ParameterGradients.apply(a, b, x) if needs_parameters else (None, None)
        else:
            at = _elementwise(a, b, x, needs_parameters)
            pdf, cdf_a, cdf_b = at.pdf, at.a, at.b
        return (
            _sum_to(gradient * cdf_a, a) if needs_a else None,
            _sum_to(gradient * cdf_b, b) if needs_b else None,
            _sum_to(gradient * pdf, x) if needs_x else None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        return _elementwise_vmap(_BetaInc.apply, in_dims, *tensors), 0


def _operands(**given: Tensor | float) -> list[Tensor]:
    """The operands as tensors that broadcast, the last of them in the dtype of the result."""
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, received {tensor.dtype}")
    # As everywhere in torch, a number or a tensor without dimensions does not widen the result.
    deciding = [t for t in tensors.values() if t.ndim] or list(tensors.values())
    dtype = deciding[0].dtype if deciding else torch.get_default_dtype()
    for tensor in deciding:
        dtype = torch.promote_types(dtype, tensor.dtype)
    device = deciding[0].device if deciding else None
    operands = [
        value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device=device)
        for value in given.values()
    ]
    operands[-1] = operands[-1].to(dtype)
    try:
        torch.broadcast_shapes(*(t.shape for t in operands))
    except RuntimeError:
        shapes = ", ".join(f"{k} {tuple(t.shape)}" for k, t in zip(given, operands, strict=True))
        raise ValueError(f"shapes must broadcast, received {shapes}") from None
    return operands


def betainc(a: Tensor | float, b: Tensor | float, x: Tensor | float) -> Tensor:
    r"""The regularized incomplete beta function, the CDF of Beta(a, b) at x.

    .. math::
        I_x(a, b) = \frac{1}{B(a, b)} \int_0^x t^{a - 1} (1 - t)^{b - 1} \, dt

    Exact derivatives in a and b (once) and in x (any number of times); works under ``torch.func.vmap`` and
    ``torch.func.grad``. For a and b in [0.01, 1000] the absolute error is below 1e-12 in float64 and 5e-7
    in float32; the derivatives in a and b are good to 1e-8 in float64.

    Args:
        a: first concentration, positive, of any shape.
        b: second concentration, positive, of a shape that broadcasts with a's.
        x: where to evaluate, of a shape that broadcasts with theirs; 0 is returned below 0, 1 above 1,
            NaN at NaN or where a or b is not positive.

    Returns:
        A tensor of the broadcast shape, in the widest dtype among the given tensors.

    Raises:
        TypeError: if an operand is an integer tensor.
        ValueError: if the shapes do not broadcast.

    References:
        DLMF, section 8.17, https://dlmf.nist.gov/8.17.
        Didonato and Morris, Significant digit computation of the incomplete beta function ratios, 1992.
        Boik and Robison-Cox, Derivatives of the incomplete beta function, 1998.

    Example:
        >>> a = torch.tensor(2.0, requires_grad=True)
        >>> betainc(a, 6.0, torch.tensor([0.1, 0.25, 0.9]))
        tensor([0.1497, 0.5551, 1.0000], grad_fn=<_BetaIncBackward>)
    """
    result: Tensor = _BetaInc.apply(*_operands(a=a, b=b, x=x))
    return result


def _invert(a: Tensor, b: Tensor, p: Tensor) -> Tensor:
    """Newton's method on the logarithm of the tail, in the logarithm of the distance to the nearer end.

    There the CDF is concave and close to a line of slope a (or b), so the iteration neither overshoots nor
    leaves the interval, and the asymptotic start is exact where the solution underflows.
    """
    a, b, p = (t.to(p.device, torch.float64) for t in (a, b, p))
    split = (a + 1) / (a + b + 2)
    in_right = p > _elementwise(a, b, split).cdf
    target = torch.where(in_right, 1 - p, p).log()
    slope = torch.where(in_right, b, a)
    limit = torch.where(in_right, 1 - split, split)
    end = torch.minimum((target + slope.log() + log_beta(a, b)) / slope, limit.log())
    smallest = 4 * torch.finfo(torch.float64).tiny
    for _ in range(_NEWTON_STEPS):
        y = end.exp()
        x = torch.where(in_right, 1 - y, y)
        at = _elementwise(a, b, x)
        # Rounding can carry 1 - y to the other side of the split, where the tail is the other one.
        tail = torch.where((x > split) == in_right, at.tail, 1 - at.tail)
        distance = torch.where(in_right, 1 - x, x)
        step = (tail.log() - target) * tail / (at.pdf * distance)
        step = torch.where((distance > smallest) & step.isfinite(), step, 0.0)
        end = torch.minimum(end - step, limit.log())
        if step.device.type == "cpu" and not bool((step.abs() > 1e-9).any()):
            break
    x = torch.where(in_right, 1 - end.exp(), end.exp())
    x = torch.where(p == 0, 0.0, torch.where(p == 1, 1.0, x))
    return torch.where((p >= 0) & (p <= 1) & (a > 0) & (b > 0), x, torch.nan)


class _BetaIncInv(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, p: Tensor) -> Tensor:
        return _invert(a, b, p).to(p.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2], output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # The implicit function theorem at I_x(a, b) = p: dx = (dp - I_a da - I_b db) / f.
        a, b, x = ctx.saved_tensors
        needs_a, needs_b, needs_p = ctx.needs_input_grad
        # Where x has rounded to 0 or 1 it moves with nothing.
        pdf = beta_pdf(a, b, x)
        scaled = torch.where(pdf > 0, gradient / pdf, 0.0)
        gradient_a = gradient_b = None
        if needs_a or needs_b:
            cdf_a, cdf_b = _ParameterGradients.apply(a, b, x)
            gradient_a = _sum_to(-scaled * cdf_a, a) if needs_a else None
            gradient_b = _sum_to(-scaled * cdf_b, b) if needs_b else None
        return gradient_a, gradient_b, scaled if needs_p else None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        return _elementwise_vmap(_BetaIncInv.apply, in_dims, *tensors), 0


def betaincinv(a: Tensor | float, b: Tensor | float, p: Tensor | float) -> Tensor:
    r"""The inverse of :func:`betainc` in its last argument, the quantile function of Beta(a, b).

    .. math::
        x = \inf \{ t : I_t(a, b) \ge p \}

    Differentiable in a, b and p by the implicit function theorem.

    Args:
        a: first concentration, positive, of any shape.
        b: second concentration, positive, of a shape that broadcasts with a's.
        p: probability in [0, 1], of a shape that broadcasts with theirs; NaN is returned outside.

    Returns:
        A tensor of the broadcast shape with values in [0, 1], in the widest dtype among the given tensors.

    Raises:
        TypeError: if an operand is an integer tensor.
        ValueError: if the shapes do not broadcast.

    Example:
        >>> betaincinv(2.0, 6.0, torch.tensor([0.1, 0.5, 0.9]))
        tensor([0.0788, 0.2285, 0.4526])
    """
    operands = torch.broadcast_tensors(*_operands(a=a, b=b, p=p))
    result: Tensor = _BetaIncInv.apply(*operands)
    return result


def clip_density(pdf: Tensor, a: Tensor, b: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """The density between two limits, which it exceeds at the ends of a U-shaped Beta."""
    infinite = (x == 0) & (a < 1) | (x == 1) & (b < 1)
    return torch.where(infinite, high, pdf.clamp(low, high))


class _ClippedBetaCDF:
    """What :func:`get_beta_cdf_factory` makes: the CDF under ``apply``, as on an autograd function."""

    def __init__(self, parameters: tuple[Any, Any] | None, symmetric: bool, low: float, high: float) -> None:
        self._parameters = parameters
        self._symmetric = symmetric
        self._low, self._high = low, high

    def apply(self, x: Tensor, *parameters: Tensor) -> Tensor:
        a, *rest = parameters or self._parameters or ()
        b = 1 - a if self._symmetric else rest[0]
        a, b, x = _operands(a=a, b=b, x=x)
        with torch.no_grad():
            density = clip_density(_elementwise(a, b, x).pdf, a, b, x, self._low, self._high)
        # x less itself is nothing in the forward pass and the clipped density in the backward pass.
        return betainc(a, b, x.detach()) + (x - x.detach()) * density


def get_beta_cdf_factory(
    trainable_params: bool,
    symmetric: bool,
    beta_a: Tensor | float,
    beta_b: Tensor | float | None = None,
    pdf_clip_min: float = 1e-3,
    pdf_clip_max: float = 100,
) -> _ClippedBetaCDF:
    """The Beta CDF under its published name, its density clipped in the backward pass.

    Args:
        trainable_params: whether ``apply`` takes the parameters, ``apply(x, a)`` or ``apply(x, a, b)``, and
            differentiates in them; otherwise ``apply(x)`` uses those given here.
        symmetric: whether b is 1 - a.
        beta_a: first concentration, positive.
        beta_b: second concentration, positive; not read if ``symmetric``.
        pdf_clip_min: lower limit of the density in the backward pass.
        pdf_clip_max: upper limit of the density in the backward pass.

    Returns:
        An object whose ``apply`` is the CDF.

    Raises:
        ValueError: if there is no b.

    Example:
        >>> get_beta_cdf_factory(False, False, 2.0, 6.0).apply(torch.tensor([0.1, 0.25, 0.9]))
        tensor([0.1497, 0.5551, 1.0000])
    """
    if not symmetric and beta_b is None:
        raise ValueError("beta_b must be given unless symmetric is True, received None")
    fixed = (
        None
        if trainable_params
        else tuple(v.detach() if isinstance(v, Tensor) else v for v in (beta_a, beta_b))
    )
    return _ClippedBetaCDF(cast("tuple[Any, Any] | None", fixed), symmetric, pdf_clip_min, pdf_clip_max)
