"""The CDF of the Beta distribution and its derivatives, as functions of x with the parameters set.

Parameters of ordinary size take a continued fraction; where there are others, or may be, quadrature helps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from batchshaping.cdfs.beta_any_size import AtAnySize
from batchshaping.cdfs.beta_density import (
    SMALL,
    SMALLEST_CONCENTRATION,
    log_density,
    valid_concentration,
)
from batchshaping.cdfs.beta_fraction import ByFraction
from batchshaping.cdfs.beta_point import Point, value_range
from batchshaping.cdfs.prepared import CDFDerivatives, LogCDFDerivatives, PreparedCDF

__all__ = ["BetaCDF", "CHUNK", "EPS", "beta_cdf", "beta_cdf_parts", "beta_pdf", "fixed_beta_cdf"]

# Up to here, the fraction alone takes the least time.
_FRACTION_LIMIT = 1000.0

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
        ranges = [value_range(p) for p in (a, b)] if a.is_cpu and a.numel() and b.numel() else []
        smallest = SMALL if tails else SMALLEST_CONCENTRATION
        ordinary = bool(ranges) and all(
            least >= smallest and greatest <= _FRACTION_LIMIT for least, greatest in ranges
        )
        if not ordinary:
            a, b = (torch.where(valid_concentration(p), p, torch.nan) for p in (a, b))
        a, b = torch.broadcast_tensors(a, b)
        self.dtype = dtype
        self._tails: ByFraction | AtAnySize = (
            ByFraction(a, b, (ranges[0][1], ranges[1][1]), dtype, gradients, tails)
            if ordinary
            else AtAnySize(a, b, bool(ranges), gradients, tails)
        )
        tails_of = self._tails
        self._lean = tails_of if isinstance(tails_of, ByFraction) and tails_of.lean else None
        self._least = torch.finfo(dtype).smallest_normal
        finfo = torch.finfo(self._tails.working)
        self._lowest = math.log(finfo.smallest_normal) + math.log(finfo.eps)

    def __call__(self, x: Tensor) -> CDFDerivatives:
        if self._lean is not None and x.is_cpu and x.dtype == self._lean.working:
            evaluate = self._known_within(value_range(x))
            if evaluate is not None:
                return evaluate(x)
        return self.parts(x).derivatives

    def within(self, extent: tuple[float, float] | None) -> Callable[[Tensor], CDFDerivatives]:
        return (self._known_within(extent) if extent is not None else None) or self

    def _known_within(self, extent: tuple[float, float]) -> Callable[[Tensor], CDFDerivatives] | None:
        """What evaluates values of this extent in the fewest steps; None where they need them all."""
        if self._lean is None:
            return None
        least, greatest = extent
        suits = self._least <= least <= self._lean.split_range[0] < greatest < 1.0
        return self._lean.cdf_and_density if suits else None

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

    def _parts(self, point: Point, in_logits: bool) -> _Parts:
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

    def _per_x(self, mass: Tensor, point: Point) -> Tensor:
        """The density of x from that of its logit: 0 at the ends, and finite next to them."""
        finfo = torch.finfo(self.dtype)
        least, greatest = point.range
        slope = point.complement.mul_(point.x)
        if least >= finfo.smallest_normal and greatest < 1.0:
            return mass.div_(slope)
        return torch.where(slope == 0, 0.0, mass.div_(slope).clamp_max_(finfo.max))

    def _logs(self, point: Point) -> LogCDFDerivatives:
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
