"""The tails of the Beta distribution for parameters of any size, read or not."""

from __future__ import annotations

import torch
from torch import Tensor

from batchshaping.cdfs.beta_density import (
    SMALL,
    SMALLEST_CONCENTRATION,
    Mean,
    digamma_remainder,
    hazard,
    log1p_less,
    small_tail,
)
from batchshaping.cdfs.beta_fraction import Fraction, steps_of_fraction
from batchshaping.cdfs.beta_point import Point, Rate

__all__ = ["AtAnySize"]

# Where there are larger parameters, or there may be, it takes those up to here, and quadrature the others.
_SHORT_FRACTION_LIMIT = 50.0


class AtAnySize:
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
        steps = steps_of_fraction(_SHORT_FRACTION_LIMIT, precise=True, gradients=gradients)
        self.left = Fraction(short[0], b, steps, gradients, self.working, unit=self.unit)
        self.right = Fraction(short[1], a, steps, gradients, self.working, unit=self.unit)
        if gradients:
            total = digamma_remainder(a + b) - 1 / (a + b)
            self.shift_a, self.shift_b = total - digamma_remainder(a), total - digamma_remainder(b)
            self.inverse_a, self.inverse_b = 1 / a, 1 / b

    def from_values(self, x: Tensor, lowest: float) -> Point:
        x = x.double().clamp(0.0, 1.0)
        return self._point(x, 1 - x, x.log().clamp_min_(lowest), torch.log1p(-x))

    def from_logits(self, logits: Tensor) -> Point:
        logits = logits.double()
        logs = (torch.nn.functional.logsigmoid(v) for v in (logits, -logits))
        return self._point(torch.sigmoid(logits), torch.sigmoid(-logits), *logs)

    def _point(self, x: Tensor, complement: Tensor, log_x: Tensor, log_complement: Tensor) -> Point:
        u, v = self.mean.deviations(x, complement)
        log_x = _log_ratio(x, self.mean.value, u, log_x, self.mean.log)
        log_complement = _log_ratio(complement, self.mean.far, v, log_complement, self.mean.log_far)
        inner = (u.abs() < 0.5) & (v.abs() < 0.5)
        near = self.a * log1p_less(u) + self.b * log1p_less(v)
        exponent = torch.where(inner, near, self.a * log_x + self.b * log_complement)
        return Point(x, complement, log_x, log_complement, exponent, deviations=(u, v))

    def rate(self, point: Point) -> Rate:
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
            return Rate(in_right, value)
        long_a, long_b = torch.where(is_right, long[2], long[1]), torch.where(is_right, long[1], long[2])
        t_a = torch.where(by_quadrature, long_a, short[1] / short[0])
        t_b = torch.where(by_quadrature, long_b, short[2] / short[0])
        by_a = self.shift_a - t_a + torch.where(is_right, self.inverse_a, 0.0)
        by_b = self.shift_b - t_b + torch.where(is_right, 0.0, self.inverse_b)
        return Rate(in_right, value, by_a, by_b)

    def logs(self, point: Point) -> tuple[Rate, Tensor, Tensor]:
        rate = self.rate(point)
        near = (point.exponent + self.log_scale).sub_(rate.value.log())
        if self.has_small:
            rate, near = self._where_small(point, rate, near)
        near.clamp_max_(-SMALLEST_CONCENTRATION)
        far = torch.where(near > -0.7, torch.log(-torch.expm1(near)), torch.log1p(-near.exp()))
        return rate, near, far

    def _where_small(self, point: Point, rate: Rate, near: Tensor) -> tuple[Rate, Tensor]:
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
