r"""The tails of the Beta distribution by a continued fraction, for parameters of ordinary size.

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

import copy
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from batchshaping.cdfs.beta_density import (
    log_beta,
)
from batchshaping.cdfs.beta_point import Point, Rate, value_range
from batchshaping.cdfs.prepared import CDFDerivatives

__all__ = ["ByFraction", "Fraction", "steps_of_fraction"]

# What float32 needs for a CDF good to 5e-7: above this size of a log(mean), exponents relative to the mean;
_LARGE_EXPONENT = 4.0
# above this sum of the parameters, the fraction in the offset from the mean;
_LARGE_TOTAL = 8.0
# and above this sum, float64.
_FLOAT32_LIMIT = 112.0


def steps_of_fraction(largest: float, precise: bool, gradients: bool) -> int:
    """How many steps of the fraction reach float64 (precise) or float32 precision, for every q.

    Measured against 600 steps for p and q in [0.001, 3000] at the split, where convergence is slowest; the
    count grows like the cube root of p.
    """
    root: float = largest ** (1 / 3)
    if precise:
        return math.ceil(10 + 7.5 * root)
    return math.ceil(5 + 3.4 * root if gradients else max(4 + 2.9 * root, 3 + 3.3 * root))


class Fraction:
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

    def opposite(self) -> Fraction:
        """The fraction of one pair without gradients, of the opposite sign."""
        fraction = copy.copy(self)
        fraction.constants = tuple(-constant for constant in self.constants)
        fraction.numbers = [(-slope, factor) for slope, factor in self.numbers]
        return fraction

    def fold_into(
        self,
        t: Tensor,
        square: Tensor,
        offset: Tensor,
        line: Tensor,
        constants: Sequence[Tensor] | None = None,
    ) -> None:
        """The fraction of one pair without gradients at y, given its square; line is written over."""
        constants = self.constants if constants is None else constants
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

    The rest of the fraction is replaced by a secant, since it is all but straight. That takes the place of
    two steps or three. What is left of the secant's error in the value of the fraction grows with a power of
    y, so that it is smallest where both points of the secant are near the end.
    """
    first, second = 0.8, 0.98
    # Points that crowd at the end, next to which the fraction may have its singularity.
    share = torch.linspace(0.0, 1.0, 17, dtype=end.dtype, device=end.device)
    crowd = 1 - torch.logspace(-1, -9, 33, dtype=end.dtype, device=end.device)
    share = torch.cat([share, crowd, share.new_tensor([first, second])])
    lines = constant.reshape(-1, 1) + slope.reshape(-1, 1) * (end * share)
    numerators = factor.reshape(-1, 1) * (end * share).square()
    tail, backwards = lines[-1], [lines[-1]]
    for line, numerator in zip(lines[:-1].flip(0), numerators[:-1].flip(0), strict=True):
        tail = torch.addcdiv(line, numerator, tail)
        backwards.append(tail)
    tails = torch.stack(backwards[::-1])
    # How much of a relative error of each tail is left in the value of the fraction.
    weights = torch.cat([torch.ones_like(lines[:1]), numerators[:-1] / (tails[1:] * tails[:-1])])
    rises = (tails[:, -1] - tails[:, -2]) / (second - first)
    starts = tails[:, -1] - second * rises
    secants = starts.unsqueeze(-1) + rises.unsqueeze(-1) * share
    errors = (weights.cumprod(dim=0) * (secants / tails - 1)).abs().amax(dim=1)
    steps = next((k for k, error in enumerate(errors.tolist(), 1) if error <= accuracy), len(tails))
    constant, slope = constant[:steps].clone(), slope[:steps].clone()
    constant[-1], slope[-1] = starts[steps - 1], rises[steps - 1] / end
    return constant, slope, factor[:steps]


class ByFraction:
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
        # Exponents are large only where the fraction is centred.
        self.lean = a.ndim == 0 and a.is_cpu and not (gradients or self.centred) and working == dtype
        centre = (a / total).to(working)
        self.centre, self.far_centre = centre, 1 - centre
        self.a, self.b = a.to(working), b.to(working)
        self.numbers: tuple[float, ...] = (float(self.a), float(self.b)) if a.ndim == 0 else ()
        self.split = ((a + 1) / (total + 2)).to(working)
        self.far_split, self.one = 1 - self.split, torch.ones((), dtype=working, device=a.device)
        self.split_range = value_range(self.split)
        # The exponent is taken relative to the centre, where it is 0: the rest of 1 / B(a, b) multiplies.
        log_centre, log_far = centre.double().log(), torch.log1p(-centre.double())
        self.scale = (a * log_centre + b * log_far - log_beta(a, b)).exp().to(working)
        self.minus_peak = -(a * log_centre * (not self.large_a) + b * log_far * (not self.large_b)).to(
            working
        )
        precise = dtype == torch.float64
        steps = [steps_of_fraction(p, precise, gradients) for p in largest]
        centres = (centre.double(), 1 - centre.double()) if self.centred else (None, None)
        # One pair of numbers is evaluated many times: it gets no more steps than it needs.
        fixed = a.ndim == 0 and a.is_cpu and not gradients
        accuracy = torch.finfo(dtype).eps / 4 if fixed else None
        self.left = Fraction(a, b, steps[0], gradients, working, centres[0], accuracy=accuracy)
        self.right = Fraction(b, a, steps[1], gradients, working, centres[1], accuracy=accuracy)
        if self.lean:
            self.minus_right = self.right.opposite()
            self.scale_number, self.zero = float(self.scale), torch.zeros_like(self.one)
        if gradients:
            digamma_total = torch.digamma(total)
            self.shift_a = (digamma_total - torch.digamma(a + 1) + log_centre * self.large_a).to(working)
            self.shift_b = (digamma_total - torch.digamma(b + 1) + log_far * self.large_b).to(working)
            self.inverse_a, self.inverse_b = (1 / a).to(working), (1 / b).to(working)

    def cdf_and_density(self, x: Tensor) -> CDFDerivatives:
        """The CDF and the density of one pair of numbers at x in (0, 1), on the CPU.

        They are those of ``BetaCDF.parts``, in few operations of few kinds and with five new tensors: for a
        small batch, to call an operation, more so one that is not in the processor's caches, takes longer
        than the numbers.
        """
        (a, b), scale = self.numbers, self.scale_number
        complement = torch.sub(self.one, x)
        # Of the rounding of 1 - x, b times as much is left in the exponent.
        first = torch.log(x)
        second = torch.log(complement) if b <= 1.0 else torch.neg(x).log1p_()
        mass = torch.add(self.minus_peak, first, alpha=a).add_(second, alpha=b).exp_()
        y, line, left, right = first, second, torch.empty_like(x), torch.empty_like(x)
        torch.minimum(x, self.split, out=y)
        self.left.fold_into(left, y * y, y, line)
        torch.minimum(complement, self.far_split, out=y)
        self.minus_right.fold_into(right, y * y, y, line)
        in_right = torch.gt(x, self.split, out=y)
        # Right of the split it is of the opposite sign, so that one less the tail is a sum.
        signed = torch.lerp(left, right, in_right, out=left)
        cdf = torch.addcdiv(in_right, mass, signed, value=scale, out=left)
        return CDFDerivatives(cdf, torch.addcdiv(self.zero, mass, complement.mul_(x), value=scale, out=mass))

    def from_values(self, x: Tensor, lowest: float) -> Point:
        x, (least, greatest) = x.to(self.working), value_range(x)
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
        return Point(x, self.one - x, log_x, log_complement, exponent, (least, greatest))

    def from_logits(self, logits: Tensor) -> Point:
        logits = logits.to(self.working)
        log_x, log_complement = (torch.nn.functional.logsigmoid(v) for v in (logits, -logits))
        if self.large_a:
            log_x = log_x - self.centre.log()
        if self.large_b:
            log_complement = log_complement - self.far_centre.log()
        x, exponent = torch.sigmoid(logits), self._exponent(log_x, log_complement)
        return Point(x, torch.sigmoid(-logits), log_x, log_complement, exponent, value_range(x))

    def _exponent(self, log_x: Tensor, log_complement: Tensor) -> Tensor:
        """The exponent of x^a (1 - x)^b relative to the centre; with numbers it takes half of the passes."""
        if self.numbers and log_x.is_cpu:
            a, b = self.numbers
            return torch.add(self.minus_peak, log_x, alpha=a).add_(log_complement, alpha=b)
        return (log_x * self.a).add_(self.minus_peak).add_(log_complement * self.b)

    def rate(self, point: Point) -> Rate:
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
            return Rate(in_right, value)
        t_a, t_b = _choose(left[1], right[2], in_right), _choose(left[2], right[1], in_right)
        # The tail of either side vanishes like the other side's parameter.
        by_a = torch.sub(self.shift_a, t_a.div_(value)).addcmul_(in_right, self.inverse_a)
        by_b = torch.sub(self.shift_b, t_b.div_(value)).addcmul_(1.0 - in_right, self.inverse_b)
        return Rate(in_right, value, by_a, by_b)

    def logs(self, point: Point) -> tuple[Rate, Tensor, Tensor]:
        """The rate, the logarithm of the tail that it is of, and that of the other tail."""
        rate = self.rate(point)
        near = (point.exponent + self.scale.log()).sub_(rate.value.log())
        near.clamp_max_(-torch.finfo(self.working).eps)
        return rate, near, torch.log1p(-near.exp())


def _log_relative(value: Tensor, offset: Tensor, centre: Tensor) -> Tensor:
    """Log(value / centre): by the offset from the centre, which has no digits left where value is small."""
    near = torch.log1p(offset / centre)
    return torch.where(value < 0.5 * centre, (value / centre).log(), near)


def _choose(left: Tensor | None, right: Tensor | None, in_right: Tensor) -> Tensor:
    """Values of the side that each element is on; a side that no element is on need not be there."""
    if left is None or right is None:
        return cast("Tensor", right if left is None else left)
    # Weights 0 and 1 make lerp an exact choice, several times faster than where.
    return torch.lerp(left, right, in_right, out=left)
