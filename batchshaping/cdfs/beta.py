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
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from batchshaping.cdfs.beta_density import (
    SMALL,
    SMALLEST_CONCENTRATION,
    Mean,
    digamma_remainder,
    hazard,
    log1p_less,
    log_beta,
    log_density,
    small_tail,
    valid_concentration,
)
from batchshaping.cdfs.prepared import CDFDerivatives, LogCDFDerivatives, PreparedCDF

__all__ = ["BetaCDF", "CHUNK", "EPS", "beta_cdf", "beta_cdf_parts", "beta_pdf", "fixed_beta_cdf"]

# What float32 needs for a CDF good to 5e-7: above this size of a log(mean), exponents relative to the mean;
_LARGE_EXPONENT = 4.0
# above this sum of the parameters, the fraction in the offset from the mean;
_LARGE_TOTAL = 8.0
# and above this sum, float64.
_FLOAT32_LIMIT = 112.0
# Up to here, the fraction alone takes the least time.
_FRACTION_LIMIT = 1000.0
# Where there are larger parameters, or there may be, it takes those up to here, and quadrature the others.
_SHORT_FRACTION_LIMIT = 50.0
CHUNK = 2**14
"""Number of pairs of parameters whose coefficients are made at a time."""

_TILE = 2**18
EPS = torch.finfo(torch.float64).eps
"""Distance from 1 to the next number in double precision."""


class _Parts(NamedTuple):
    """The CDF, the density and, with gradients, the CDF's derivatives in a and b.

    The tail is I_x left of (a + 1) / (a + b + 2) and 1 - I_x right of it, to full relative precision.
    """

    cdf: Tensor
    tail: Tensor
    pdf: Tensor
    a: Tensor | None = None
    b: Tensor | None = None

    @property
    def derivatives(self) -> CDFDerivatives:
        """The CDF with its derivatives alone."""
        return CDFDerivatives(self.cdf, self.pdf, () if self.a is None or self.b is None else self[3:])  # type: ignore[arg-type]


def _steps(largest: float, precise: bool, gradients: bool) -> int:
    """How many steps of the fraction reach float64 (precise) or float32 precision, for every q.

    Measured against 600 steps for p and q in [0.001, 3000] at the split, where convergence is slowest; the
    count grows like the cube root of p.
    """
    root: float = largest ** (1 / 3)
    if precise:
        return math.ceil(10 + 7.5 * root)
    return math.ceil(5 + 3.4 * root if gradients else max(4 + 2.9 * root, 3 + 3.3 * root))


class _Fraction:
    """The continued fraction as a function of y, at most (p + 1) / (p + q + 2), with its coefficients made.

    t_n = p + 2 n + slope_n y + factor_n y^2 / t_{n+1}. Returned is t_0, with gradients its derivatives in p
    and in q too; that in p is less t_0 / p, to which the rest is nothing where p is tiny. The coefficients
    have the shape of the parameters; for one pair without gradients they are numbers, which makes two passes
    over y a step instead of five, and no more steps than that pair needs.

    Where p is large, p + slope_0 y cancels near the mean. There the lines are taken in the offset of y from a
    centre, in which they are exact; elsewhere the centre is 0 and the offset y itself. Where q is huge, y is
    given in a unit that is as small.
    """

    def __init__(
        self,
        p: Tensor,
        q: Tensor,
        steps: int,
        gradients: bool,
        working: torch.dtype,
        centre: Tensor | None = None,
        unit: Tensor | float = 1.0,
        accuracy: float | None = None,
    ) -> None:
        n = torch.arange(steps, dtype=p.dtype, device=p.device).reshape(-1, *[1] * p.ndim)
        # The first slope has no term over p - 1, which may be zero.
        odd, even = p + (2 * n + 1), torch.where(n > 0, p + (2 * n - 1), 1.0)
        # p, q and n in that unit, by which every slope is smaller, and every factor twice.
        in_p, in_q, in_n = p * unit, q * unit, n * unit
        rising, falling, next_falling = p + n, in_q - in_n, in_q - (in_n + unit)
        product = rising * (in_p + in_q + in_n)
        weight = (n + 1) / odd.square()
        first = n / even
        slope = first * falling - product / odd
        constant, factor = p + 2 * n, product * weight * next_falling
        if accuracy is not None:
            constant, slope, factor = _shortened(constant, slope, factor, (p + 1) / (p + q + 2), accuracy)
        self.constant = (constant if centre is None else constant + slope * centre).to(working)
        self.slope = slope.to(working)
        self.factor = factor.to(working)
        self._method: Callable[[Tensor, Tensor], tuple[Tensor, ...]] = self._fold_many
        if gradients:
            product_p = (2 * in_p + in_q) + 2 * in_n
            slope_p = product / odd.square() - product_p / odd - first * falling / even
            factor_p = weight * next_falling * (product_p - 2 * product / odd)
            # Of t_0 = p (1 + ...) what is in the brackets, times p.
            slope_p[0] = p * next_falling[0] / odd[0].square()
            factor_p[0] = slope_p[0] * (unit - in_p - 2 * in_q) / odd[0]
            self.slope_p, self.slope_q = slope_p.to(working), ((first - rising / odd) * unit).to(working)
            self.factor_p = factor_p.to(working)
            self.factor_q = (weight * rising * ((in_p - unit + 2 * in_q) * unit)).to(working)
            self._method = self._fold_gradients
        if p.numel() == 1 and p.device.type == "cpu":
            tables = (self.slope, self.factor, *((self.slope_p, self.slope_q) if gradients else ()))
            tables = (*tables, *((self.factor_p, self.factor_q) if gradients else ()))
            self.numbers = list(zip(*(table.reshape(-1).tolist() for table in tables), strict=True))
            self.constants = self.constant.reshape(-1).unbind()
            self._method = self._fold_one_with_gradients if gradients else self._fold_one

    def __call__(self, y: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        return self._method(y, offset)

    def _fold_one(self, y: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        constants = self.constants
        if not y.is_cpu:  # a tensor of the CPU does not mix with those of another device
            constants = self.constant.to(y.device, non_blocking=True).reshape(-1).unbind()
        t = torch.empty_like(offset)
        self.fold_into(t, y * y, offset, torch.empty_like(offset), constants)
        return (t,)

    def fold_into(
        self, t: Tensor, square: Tensor, offset: Tensor, line: Tensor, constants: Sequence[Tensor]
    ) -> None:
        """The fraction of one pair without gradients at y, given its square; line is written over."""
        last = len(constants) - 1
        torch.add(constants[last], offset, alpha=self.numbers[last][0], out=t)
        for k in range(last - 1, -1, -1):
            slope, factor = self.numbers[k]
            torch.add(constants[k], offset, alpha=slope, out=line)
            torch.addcdiv(line, square, t, value=factor, out=t)

    def _fold_one_with_gradients(self, y: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        if not y.is_cpu:
            return self._fold_gradients(y, offset)
        constants, one = self.constants, y.new_ones(())
        y_square = y * y
        slope, _, slope_p, slope_q, *_ = self.numbers[-1]
        t = torch.add(constants[-1], offset, alpha=slope)
        t_p, t_q = torch.add(one, y, alpha=slope_p), y * slope_q
        ratio, decay = torch.empty_like(t), torch.empty_like(t)
        for k in range(len(constants) - 2, -1, -1):
            slope, factor, slope_p, slope_q, factor_p, factor_q = self.numbers[k]
            torch.div(y_square, t, out=ratio)
            torch.div(ratio, t, out=decay).mul_(-factor)
            t_p.mul_(decay).add_(y, alpha=slope_p).add_(ratio, alpha=factor_p).add_(float(k > 0))
            t_q.mul_(decay).add_(y, alpha=slope_q).add_(ratio, alpha=factor_q)
            torch.add(constants[k], offset, alpha=slope, out=t).add_(ratio, alpha=factor)
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
            torch.mul(y, self.slope_p[k], out=line).add_(float(k > 0))
            t_p.mul_(decay).add_(line).addcmul_(ratio, self.factor_p[k])
            t_q.mul_(decay).add_(torch.mul(y, self.slope_q[k], out=line)).addcmul_(ratio, self.factor_q[k])
            torch.mul(offset, self.slope[k], out=t)
            t += self.constant[k]
            t += ratio.mul_(self.factor[k])
        return t, t_p, t_q


def _shortened(
    constant: Tensor, slope: Tensor, factor: Tensor, end: Tensor, accuracy: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As few steps of the fraction of one pair of parameters as reach a relative accuracy up to the end.

    The rest of the fraction is replaced by its secant from 0 to the end, where it is all but straight. That
    takes the place of one step or two.
    """
    # Points that crowd at the end, next to which the fraction may have its singularity.
    share = torch.linspace(0.0, 1.0, 17, dtype=end.dtype, device=end.device)
    share = torch.cat([share, 1 - torch.logspace(-1, -9, 33, dtype=end.dtype, device=end.device)])
    lines = constant.reshape(-1, 1) + slope.reshape(-1, 1) * (end * share)
    numerators = factor.reshape(-1, 1) * (end * share).square()
    tail, backwards = lines[-1], [lines[-1]]
    for line, numerator in zip(lines[:-1].flip(0), numerators[:-1].flip(0), strict=True):
        tail = torch.addcdiv(line, numerator, tail)
        backwards.append(tail)
    tails = torch.stack(backwards[::-1])
    # How much of a relative error of each tail is left in the value of the fraction.
    weights = torch.cat([torch.ones_like(lines[:1]), numerators[:-1] / (tails[1:] * tails[:-1])])
    secants = tails[:, :1] + (tails[:, 16:17] - tails[:, :1]) * share
    errors = (weights.cumprod(dim=0) * (secants / tails - 1)).abs().amax(dim=1)
    steps = next((k for k, error in enumerate(errors.tolist(), 1) if error <= accuracy), len(tails))
    slope = slope[:steps].clone()
    slope[-1] = (tails[steps - 1, 16] - tails[steps - 1, 0]) / end
    return constant[:steps], slope, factor[:steps]


class _Point(NamedTuple):
    """Where the CDF is asked for: x, 1 - x, their logarithms less constants, and what these make of them."""

    x: Tensor
    complement: Tensor
    log_x: Tensor
    log_complement: Tensor
    exponent: Tensor
    range: tuple[float, float] = (0.0, 1.0)
    """The least and the greatest x, where reading them is free."""
    deviations: tuple[Tensor, ...] = ()
    """x over the mean, and 1 - x over its mean, both less 1."""


class _Rate(NamedTuple):
    """The density of logit(x) over the tail: the derivative of the tail's logarithm in the logit, up to sign.

    With gradients, the derivatives of the tail's logarithm in a, less that of x^a, and in b, less that of
    (1 - x)^b.
    """

    in_right: Tensor
    value: Tensor
    a: Tensor | None = None
    b: Tensor | None = None


def _range(x: Tensor) -> tuple[float, float]:
    if not (x.is_cpu and x.numel()):
        return 0.0, 1.0
    least, greatest = torch.aminmax(x)
    return float(least), float(greatest)


class _ByFraction:
    """The tails by a continued fraction on each side, for parameters known to be of ordinary size.

    The numbers of a point are in float32 where that is precise enough.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        largest: tuple[float, float],
        dtype: torch.dtype,
        gradients: bool,
        tails: bool,
    ) -> None:
        self.shape, self.gradients = a.shape, gradients
        total = a + b
        # In float32 a log x is precise where it is small, and a log(x / mean) near the mean.
        sizes = (-a * (a / total).log(), -b * (b / total).log(), total)
        limits = (_LARGE_EXPONENT, _LARGE_EXPONENT, _LARGE_TOTAL)
        above = [(s > limit).flatten() for s, limit in zip(sizes, limits, strict=True)]
        single = dtype == torch.float32 and bool((total <= _FLOAT32_LIMIT).all())
        single = single and all(bool((large == (large[0] and not tails)).all()) for large in above)
        self.working = working = torch.float32 if single else torch.float64
        self.large_a, self.large_b, self.centred = (single and bool(large[0]) for large in above)
        self.lean = (
            a.ndim == 0 and a.is_cpu and not (gradients or self.large_a or self.centred) and working == dtype
        )
        centre = (a / total).to(working)
        self.centre, self.far_centre = centre, 1 - centre
        self.a, self.b = a.to(working), b.to(working)
        self.numbers = (float(self.a), float(self.b)) if a.ndim == 0 else ()
        self.split = ((a + 1) / (total + 2)).to(working)
        self.far_split, self.one = 1 - self.split, torch.ones((), dtype=working, device=a.device)
        self.split_range = _range(self.split)
        # The exponent is taken relative to the centre, where it is 0: the rest of 1 / B(a, b) multiplies.
        log_centre, log_far = centre.double().log(), torch.log1p(-centre.double())
        self.scale = (a * log_centre + b * log_far - log_beta(a, b)).exp().to(working)
        self.minus_peak = -(a * log_centre * (not self.large_a) + b * log_far * (not self.large_b)).to(
            working
        )
        precise = dtype == torch.float64
        steps = [_steps(p, precise, gradients) for p in largest]
        centres = (centre.double(), 1 - centre.double()) if self.centred else (None, None)
        # One pair of numbers is evaluated many times: it gets no more steps than it needs.
        fixed = a.ndim == 0 and a.is_cpu and not gradients
        accuracy = torch.finfo(dtype).eps / 4 if fixed else None
        self.left = _Fraction(a, b, steps[0], gradients, working, centres[0], accuracy=accuracy)
        self.right = _Fraction(b, a, steps[1], gradients, working, centres[1], accuracy=accuracy)
        if gradients:
            digamma_total = torch.digamma(total)
            self.shift_a = (digamma_total - torch.digamma(a + 1) + log_centre * self.large_a).to(working)
            self.shift_b = (digamma_total - torch.digamma(b + 1) + log_far * self.large_b).to(working)
            self.inverse_a, self.inverse_b = (1 / a).to(working), (1 / b).to(working)

    def lean_parts(self, x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
        """The CDF and the density of one pair of numbers at x in (0, 1), on the CPU.

        The operations are those of :meth:`BetaCDF.parts`, in few calls and five new tensors: for a small
        batch, calls and fresh memory would take longer than the numbers.
        """
        first, second = torch.log(x), torch.neg(x).log1p_()
        mass = torch.add(self.minus_peak, first, alpha=a).add_(second, alpha=b).exp_().mul_(self.scale)
        y, line, left, right = first, second, torch.empty_like(x), torch.empty_like(x)
        torch.minimum(x, self.split, out=y)
        self.left.fold_into(left, y * y, y, line, self.left.constants)
        complement = torch.sub(self.one, x)
        torch.minimum(complement, self.far_split, out=y)
        self.right.fold_into(right, y * y, y, line, self.right.constants)
        in_right = torch.gt(x, self.split, out=y)
        tail = torch.div(mass, torch.lerp(left, right, in_right, out=left), out=left)
        return torch.sub(in_right, tail, out=in_right).abs_(), mass.div_(complement.mul_(x))

    def from_values(self, x: Tensor, lowest: float) -> _Point:
        x, (least, greatest) = x.to(self.working), _range(x)
        if not (x.is_cpu and least >= 0.0 and greatest <= 1.0):
            x, least, greatest = x.clamp(0.0, 1.0), max(least, 0.0), min(greatest, 1.0)
        offset = x - self.centre if self.large_a or self.large_b else x
        log_x = _log_relative(x, offset, self.centre) if self.large_a else x.log()
        log_complement = (
            _log_relative(1.0 - x, -offset, self.far_centre) if self.large_b else x.neg().log1p_()
        )
        if lowest > -math.inf:
            log_x.clamp_min_(lowest)
        exponent = self._exponent(log_x, log_complement)
        return _Point(x, self.one - x, log_x, log_complement, exponent, (least, greatest))

    def from_logits(self, logits: Tensor) -> _Point:
        logits = logits.to(self.working)
        log_x, log_complement = (torch.nn.functional.logsigmoid(v) for v in (logits, -logits))
        if self.large_a:
            log_x = log_x - self.centre.log()
        if self.large_b:
            log_complement = log_complement - self.far_centre.log()
        x, exponent = torch.sigmoid(logits), self._exponent(log_x, log_complement)
        return _Point(x, torch.sigmoid(-logits), log_x, log_complement, exponent, _range(x))

    def _exponent(self, log_x: Tensor, log_complement: Tensor) -> Tensor:
        """The exponent of x^a (1 - x)^b relative to the centre; with numbers it takes half of the passes."""
        if self.numbers and log_x.is_cpu:
            a, b = self.numbers
            return torch.add(self.minus_peak, log_x, alpha=a).add_(log_complement, alpha=b)
        return (log_x * self.a).add_(self.minus_peak).add_(log_complement * self.b)

    def rate(self, point: _Point) -> _Rate:
        x = point.x
        shape = torch.broadcast_shapes(self.shape, x.shape) if self.shape else x.shape
        least, greatest = point.range
        some_left, some_right = not least > self.split_range[1], not greatest <= self.split_range[0]
        left: tuple[Tensor | None, ...] = (None, None, None)
        right = left
        if some_left:
            y = torch.minimum(x, self.split).expand(shape)
            left = self.left(y, y - self.centre if self.centred else y)
        if some_right:
            y = torch.minimum(point.complement, self.far_split).expand(shape)
            right = self.right(y, self.centre - torch.maximum(x, self.split) if self.centred else y)
        if some_left and some_right:
            # Into numbers at once, several times faster than into booleans.
            in_right = torch.gt(x, self.split, out=torch.empty(shape, dtype=self.working, device=x.device))
        else:
            in_right = x.new_full((), float(some_right))
        value = _choose(left[0], right[0], in_right)
        if not self.gradients:
            return _Rate(in_right, value)
        t_a, t_b = _choose(left[1], right[2], in_right), _choose(left[2], right[1], in_right)
        # The tail of either side vanishes like the other side's parameter.
        by_a = torch.sub(self.shift_a, t_a.div_(value)).addcmul_(in_right, self.inverse_a)
        by_b = torch.sub(self.shift_b, t_b.div_(value)).addcmul_(1.0 - in_right, self.inverse_b)
        return _Rate(in_right, value, by_a, by_b)

    def logs(self, point: _Point) -> tuple[_Rate, Tensor, Tensor]:
        """The rate, the logarithm of the tail that it is of, and that of the other tail."""
        rate = self.rate(point)
        near = (point.exponent + self.scale.log()).sub_(rate.value.log())
        near.clamp_max_(-torch.finfo(self.working).eps)
        return rate, near, torch.log1p(-near.exp())


def _log_relative(value: Tensor, offset: Tensor, centre: Tensor) -> Tensor:
    """Log(value / centre): by the offset from the centre, which has no digits left where value is small."""
    near = torch.log1p(offset / centre)
    return torch.where(value < 0.5 * centre, (value / centre).log(), near)


class _AtAnySize:
    """The tails of any parameters, read or not: by a short fraction or, where that is too short, quadrature.

    It takes the same time whatever the parameters. The logarithms of a point are relative to the mean.
    """

    working = torch.float64

    def __init__(self, a: Tensor, b: Tensor, readable: bool, gradients: bool, tails: bool) -> None:
        self.a, self.b, self.gradients = a, b, gradients
        self.has_small = tails and not (readable and not bool(((a < SMALL) | (b < SMALL)).any()))
        self.mean = Mean.of(a, b)
        self.log_scale = self.mean.log_scale
        self.scale = self.log_scale.exp()
        size = a + b + 2
        self.split, self.far_split = (a + 1) / size, (b + 1) / size
        self.split_deviation = (b - a) / size / a
        self.unit = 1 / size
        short = [p.clamp_max(_SHORT_FRACTION_LIMIT) for p in (a, b)]
        steps = _steps(_SHORT_FRACTION_LIMIT, precise=True, gradients=gradients)
        self.left = _Fraction(short[0], b, steps, gradients, self.working, unit=self.unit)
        self.right = _Fraction(short[1], a, steps, gradients, self.working, unit=self.unit)
        if gradients:
            total = digamma_remainder(a + b) - 1 / (a + b)
            self.shift_a, self.shift_b = total - digamma_remainder(a), total - digamma_remainder(b)
            self.inverse_a, self.inverse_b = 1 / a, 1 / b

    def from_values(self, x: Tensor, lowest: float) -> _Point:
        x = x.double().clamp(0.0, 1.0)
        return self._point(x, 1 - x, x.log().clamp_min_(lowest), torch.log1p(-x))

    def from_logits(self, logits: Tensor) -> _Point:
        logits = logits.double()
        logs = (torch.nn.functional.logsigmoid(v) for v in (logits, -logits))
        return self._point(torch.sigmoid(logits), torch.sigmoid(-logits), *logs)

    def _point(self, x: Tensor, complement: Tensor, log_x: Tensor, log_complement: Tensor) -> _Point:
        u, v = self.mean.deviations(x, complement)
        log_x = _log_ratio(x, self.mean.value, u, log_x, self.mean.log)
        log_complement = _log_ratio(complement, self.mean.far, v, log_complement, self.mean.log_far)
        inner = (u.abs() < 0.5) & (v.abs() < 0.5)
        near = self.a * log1p_less(u) + self.b * log1p_less(v)
        exponent = torch.where(inner, near, self.a * log_x + self.b * log_complement)
        return _Point(x, complement, log_x, log_complement, exponent, deviations=(u, v))

    def rate(self, point: _Point) -> _Rate:
        x, complement = point.x, point.complement
        # Next to 1 only the complement tells, and next to the mean only the deviation from it.
        is_right = torch.where(self.split > 0.5, complement < self.far_split, x > self.split)
        u, _ = point.deviations
        is_right = torch.where(u.abs() < 0.5, u > self.split_deviation, is_right)
        left_y = torch.minimum(x, self.split) / self.unit
        right_y = torch.minimum(complement, self.far_split) / self.unit
        left, right = self.left(left_y, left_y), self.right(right_y, right_y)
        # What the fraction gives for a on the left is for b on the right.
        short = [torch.where(is_right, r, t) for t, r in zip(left, (right[0], *right[:0:-1]), strict=True)]
        p, q, y, far, u = (
            torch.where(is_right, r, t)
            for t, r in (
                (self.a, self.b),
                (self.b, self.a),
                (x, complement),
                (complement, x),
                point.deviations,
            )
        )
        long = hazard(p, q, y, far, u, self.gradients)
        by_quadrature = p > _SHORT_FRACTION_LIMIT
        value = torch.where(by_quadrature, long[0], short[0])
        in_right = is_right.double()
        if not self.gradients:
            return _Rate(in_right, value)
        long_a, long_b = torch.where(is_right, long[2], long[1]), torch.where(is_right, long[1], long[2])
        t_a = torch.where(by_quadrature, long_a, short[1] / short[0])
        t_b = torch.where(by_quadrature, long_b, short[2] / short[0])
        by_a = self.shift_a - t_a + torch.where(is_right, self.inverse_a, 0.0)
        by_b = self.shift_b - t_b + torch.where(is_right, 0.0, self.inverse_b)
        return _Rate(in_right, value, by_a, by_b)

    def logs(self, point: _Point) -> tuple[_Rate, Tensor, Tensor]:
        rate = self.rate(point)
        near = (point.exponent + self.log_scale).sub_(rate.value.log())
        if self.has_small:
            rate, near = self._where_small(point, rate, near)
        near.clamp_max_(-SMALLEST_CONCENTRATION)
        far = torch.where(near > -0.7, torch.log(-torch.expm1(near)), torch.log1p(-near.exp()))
        return rate, near, far

    def _where_small(self, point: _Point, rate: _Rate, near: Tensor) -> tuple[_Rate, Tensor]:
        """A tail that is all but 1 since its parameter is all but 0, to the precision of the other tail."""
        is_right = rate.in_right > 0.5
        log_y = torch.where(is_right, point.log_complement + self.mean.log_far, point.log_x + self.mean.log)
        p, q = torch.where(is_right, self.b, self.a), torch.where(is_right, self.a, self.b)
        y, is_small = torch.where(is_right, point.complement, point.x), p < SMALL
        log_tail, by_q = small_tail(p.clamp_max(SMALL), q, y, log_y, self.gradients)
        near = torch.where(is_small, log_tail, near)
        if rate.a is None or rate.b is None:
            return rate, near
        by_a = torch.where(is_small & is_right, by_q - point.log_x, rate.a)
        by_b = torch.where(is_small & ~is_right, by_q - point.log_complement, rate.b)
        return rate._replace(a=by_a, b=by_b), near


def _log_ratio(value: Tensor, mean: Tensor, deviation: Tensor, log_value: Tensor, log_mean: Tensor) -> Tensor:
    """Log(value / mean), by whichever of three ways is precise where value and mean are."""
    ratio = value / mean
    direct = (value > 1e-290) & (mean > 1e-290) & (ratio < torch.inf)
    by_division = torch.where(direct, ratio.log(), log_value - log_mean)
    return torch.where(deviation.abs() < 0.5, torch.log1p(deviation), by_division)


def _choose(left: Tensor | None, right: Tensor | None, in_right: Tensor) -> Tensor:
    """Values of the side that each element is on; a side that no element is on need not be there."""
    if left is None or right is None:
        return cast("Tensor", right if left is None else left)
    # Weights 0 and 1 make lerp an exact choice, several times faster than where.
    return torch.lerp(left, right, in_right, out=left)


class BetaCDF(PreparedCDF):
    """I_x(a, b) and its derivatives as a function of x, without a graph, all that depends on a and b made.

    a, b and x broadcast. Outside (0, 1) the CDF is 0 or 1 and the density 0, as at the ends themselves,
    where the density of a U-shaped Beta has no finite value. NaN in, NaN out.

    Args:
        a: first concentration, from 1e-300 to 1e300; beyond, all is NaN.
        b: second concentration, likewise.
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
        ranges = [_range(p) for p in (a, b)] if a.is_cpu and a.numel() and b.numel() else []
        smallest = SMALL if tails else SMALLEST_CONCENTRATION
        ordinary = bool(ranges) and all(
            least >= smallest and greatest <= _FRACTION_LIMIT for least, greatest in ranges
        )
        if not ordinary:
            a, b = (torch.where(valid_concentration(p), p, torch.nan) for p in (a, b))
        a, b = torch.broadcast_tensors(a, b)
        self.dtype = dtype
        self._tails: _ByFraction | _AtAnySize = (
            _ByFraction(a, b, (ranges[0][1], ranges[1][1]), dtype, gradients, tails)
            if ordinary
            else _AtAnySize(a, b, bool(ranges), gradients, tails)
        )
        tails_of = self._tails
        self._lean = tails_of if isinstance(tails_of, _ByFraction) and tails_of.lean else None
        self._least = torch.finfo(dtype).smallest_normal
        finfo = torch.finfo(self._tails.working)
        self._lowest = math.log(finfo.smallest_normal) + math.log(finfo.eps)

    def __call__(self, x: Tensor) -> CDFDerivatives:
        if self._lean is not None and x.is_cpu and x.dtype == self._lean.working:
            least, greatest = _range(x)
            if self._least <= least <= self._lean.split_range[0] < greatest < 1.0:
                return CDFDerivatives(*self._lean.lean_parts(x, *self._lean.numbers))
        return self.parts(x).derivatives

    def at_logits(self, logits: Tensor) -> CDFDerivatives:
        """The same as a function of logit(x), with the density and no rounding of it."""
        return self._parts(self._tails.from_logits(logits), in_logits=True).derivatives

    def parts(self, x: Tensor) -> _Parts:
        """The same with the tail that the CDF is made of."""
        return self._parts(self._tails.from_values(x, -math.inf), in_logits=False)

    def cdf(self, x: Tensor) -> Tensor:
        """The CDF alone."""
        point = self._tails.from_values(x, -math.inf)
        mass = point.exponent.exp_().mul_(self._tails.scale)
        rate = self._tails.rate(point)
        return torch.sub(rate.in_right, mass.div_(rate.value)).abs_().to(self.dtype)

    def logs(self, x: Tensor) -> LogCDFDerivatives:
        """Log I_x(a, b) and log(1 - I_x(a, b)) with their derivatives, as far into the tails as x goes.

        Where x is 0 or 1 or beyond, they are those of the number of its dtype next to 0 or 1, with derivative
        0 in x. The derivatives in x are given in logit(x), with what they have yet to be multiplied by.
        """
        finfo = torch.finfo(self.dtype)
        inside = (x > 0) & (x < 1) | x.isnan()
        smallest = math.log(finfo.smallest_normal) + math.log(finfo.eps)
        point = self._tails.from_values(x.clamp(max=1 - finfo.eps / 2), smallest)
        found = self._logs(point)
        stretch = (1 / point.x).div_(point.complement).clamp_max_(finfo.max).to(self.dtype)
        return found._replace(stretch=torch.where(inside, stretch, 0.0))

    def logs_at_logits(self, logits: Tensor) -> LogCDFDerivatives:
        """The same as a function of logit(x), finite however large the logit."""
        return self._logs(self._tails.from_logits(logits))

    def _parts(self, point: _Point, in_logits: bool) -> _Parts:
        mass = point.exponent.exp_().mul_(self._tails.scale)
        in_right, value, by_a, by_b = self._tails.rate(point)
        tail = torch.div(mass, value, out=value)
        # The tail itself left of the split, and 1 less it right of it.
        cdf = (in_right - tail).abs_()
        # x^a (1 - x)^b / B(a, b) is the density of logit(x); that of x is over x (1 - x).
        pdf = mass if in_logits else self._per_x(mass, point)
        found = [cdf, tail, pdf]
        if by_a is not None and by_b is not None:
            signed_tail = tail * (1.0 - 2.0 * in_right)
            found += [
                by_a.add_(point.log_x.clamp_min_(self._lowest)).mul_(signed_tail),
                by_b.add_(point.log_complement.clamp_min_(self._lowest)).mul_(signed_tail),
            ]
        return _Parts(*(found if self._tails.working == self.dtype else [t.to(self.dtype) for t in found]))

    def _per_x(self, mass: Tensor, point: _Point) -> Tensor:
        """The density of x from that of its logit: 0 at the ends, and finite next to them."""
        finfo = torch.finfo(self.dtype)
        least, greatest = point.range
        slope = point.complement.mul_(point.x)
        if least >= finfo.smallest_normal and greatest < 1.0:
            return mass.div_(slope)
        return torch.where(slope == 0, 0.0, mass.div_(slope).clamp_max_(finfo.max))

    def _logs(self, point: _Point) -> LogCDFDerivatives:
        # The logarithm of the tail and its derivatives have closed forms; those of what is left over follow.
        (in_right, value, by_a, by_b), near, far = self._tails.logs(point)
        odds = (near - far).exp()
        by_parameter = []
        is_right = in_right > 0.5
        if by_a is not None and by_b is not None:
            for by in (by_a.add_(point.log_x), by_b.add_(point.log_complement)):
                by_parameter.append(
                    (torch.where(is_right, -by * odds, by), torch.where(is_right, by, -by * odds))
                )
        return LogCDFDerivatives(
            torch.where(is_right, far, near).to(self.dtype),
            torch.where(is_right, near, far).to(self.dtype),
            torch.where(is_right, value * odds, value).to(self.dtype),
            torch.where(is_right, -value, -value * odds).to(self.dtype),
            tuple((cdf.to(self.dtype), sf.to(self.dtype)) for cdf, sf in by_parameter),
        )

    def slopes_of_quantile(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives of the quantile x = sigmoid(logit) in its probability, in a and in b."""
        point = self._tails.from_logits(logits)
        (in_right, value, by_a, by_b), near, _ = self._tails.logs(point)
        assert by_a is not None and by_b is not None
        log_slope = torch.nn.functional.logsigmoid(logits) + torch.nn.functional.logsigmoid(-logits)
        by_p = (log_slope - near).exp() / value
        # Where the tail stays as it is, the logarithms' derivatives in the logit and in a parameter cancel.
        per_tail = log_slope.exp() * (2.0 * in_right - 1.0) / value
        return by_p, per_tail * by_a.add_(point.log_x), per_tail * by_b.add_(point.log_complement)


@functools.lru_cache(maxsize=256)
def fixed_beta_cdf(
    a: float, b: float, dtype: torch.dtype, gradients: bool = False, tails: bool = False
) -> BetaCDF:
    """:class:`BetaCDF` of two numbers, made once for all calls."""
    # What is kept must serve every later call, whatever the default device and the modes of the first.
    with torch.inference_mode(False):
        both = torch.tensor([a, b], dtype=torch.float64, device="cpu")
        return BetaCDF(both[0], both[1], dtype, gradients=gradients, tails=tails)


def beta_cdf(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """The CDF alone, for any number of parameters and values."""
    if not a.numel() == b.numel() == 1 or not (a.is_cpu and b.is_cpu and x.is_cpu):
        return beta_cdf_parts(a, b, x).cdf
    cdf = fixed_beta_cdf(float(a.detach()), float(b.detach()), x.dtype)
    shape = torch.broadcast_shapes(a.shape, b.shape, x.shape)
    found = x.new_empty(shape)
    for out, values in zip(found.view(-1).split(_TILE), x.reshape(-1).split(_TILE), strict=True):
        out.copy_(cdf.cdf(values))
    return found


def beta_cdf_parts(a: Tensor, b: Tensor, x: Tensor, gradients: bool = False) -> _Parts:
    """:class:`BetaCDF` at x for any number of parameters and values, in parts where there are many.

    The coefficients take tens of times the memory of the parameters, and values that stay in a core's cache
    are evaluated faster.
    """
    one_pair = a.numel() == b.numel() == 1 and a.is_cpu and b.is_cpu
    if max(a.numel(), b.numel()) <= CHUNK and not (one_pair and x.numel() > _TILE and x.is_cpu):
        return BetaCDF(a, b, x.dtype, gradients=gradients).parts(x)
    a, b, x = (a, b, x) if one_pair else torch.broadcast_tensors(a, b, x)
    if one_pair:
        cdf = fixed_beta_cdf(float(a.detach()), float(b.detach()), x.dtype, gradients)
        parts = [cdf.parts(y) for y in torch.split(x.reshape(-1), _TILE)]
    else:
        chunks = (torch.split(t.reshape(-1), CHUNK) for t in (a, b, x))
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
    density = log_density(a.double(), b.double(), interior).exp()
    return torch.where(inside, density, 0.0).to(x.dtype)
