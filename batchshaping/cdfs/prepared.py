"""What evaluating a cumulative distribution function gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CDFDerivatives",
    "LogCDFDerivatives",
    "PreparedCDF",
    "nearest_inside",
    "smallest_positive",
    "stretched",
]


class CDFDerivatives(NamedTuple):
    """The CDF at x, the density, and the CDF's derivative in each parameter (empty where not asked for)."""

    cdf: Tensor
    pdf: Tensor
    parameters: tuple[Tensor, ...] = ()


class LogCDFDerivatives(NamedTuple):
    """The logarithms of the CDF and of the survival function (1 less it) at x, and their derivatives.

    ``parameters`` holds a pair for each parameter, of log CDF and of log survival function. If there is a
    ``stretch``, both derivatives in x have yet to be multiplied by it: next to 0 they can exceed the largest
    number of the dtype where their weighted sum does not.
    """

    log_cdf: Tensor
    log_sf: Tensor
    cdf_by_x: Tensor
    sf_by_x: Tensor
    parameters: tuple[tuple[Tensor, Tensor], ...] = ()
    stretch: Tensor | None = None


def stretched(by_x: Tensor, stretch: Tensor | None) -> Tensor:
    """A weighted sum of derivatives in x by what they have yet to be multiplied by, finite in its dtype."""
    if stretch is None:
        return by_x
    largest = torch.finfo(by_x.dtype).max
    return (by_x * stretch).clamp_(-largest, largest)


class PreparedCDF(ABC):
    """A CDF whose parameters are set, as a function of x or of logit(x).

    It is outside of autograd, and returns new tensors in the dtype of the values.
    """

    @abstractmethod
    def __call__(self, x: Tensor) -> CDFDerivatives:
        """The CDF at x."""

    def within(self, extent: tuple[float, float] | None) -> Callable[[Tensor], CDFDerivatives]:
        """The CDF for values of which the least and the greatest are known, or not, in the least time."""
        return self

    @abstractmethod
    def logs(self, x: Tensor) -> LogCDFDerivatives:
        """The logarithms at x, with relative precision as far into the tails as x goes."""

    def at_logits(self, logits: Tensor) -> CDFDerivatives:
        """The CDF at sigmoid(logits), its density that of the logits."""
        x, slope = torch.sigmoid(logits), _slope_of_sigmoid(logits)
        at = self(x)
        return at._replace(pdf=at.pdf.mul_(slope))

    def logs_at_logits(self, logits: Tensor) -> LogCDFDerivatives:
        """The logarithms at sigmoid(logits), their derivatives in the logits."""
        x, slope = torch.sigmoid(logits), _slope_of_sigmoid(logits)
        at = self.logs(x)
        return at._replace(stretch=slope if at.stretch is None else at.stretch.mul_(slope))


def _slope_of_sigmoid(logits: Tensor) -> Tensor:
    return torch.sigmoid(logits).mul_(torch.sigmoid(-logits))


def smallest_positive(like: Tensor) -> Tensor:
    """The smallest positive number of a tensor's dtype: subnormal, unless those are flushed to zero."""
    finfo = torch.finfo(like.dtype)
    normal = torch.full((), finfo.smallest_normal, dtype=like.dtype, device=like.device)
    subnormal = normal * finfo.eps
    return torch.where(subnormal > 0, subnormal, normal)


def nearest_inside(x: Tensor) -> tuple[Tensor, Tensor]:
    """The number in (0, 1) nearest to x, and where that is x itself (or x is NaN)."""
    below_one = 1 - torch.finfo(x.dtype).eps / 2
    return torch.maximum(x, smallest_positive(x)).clamp_max_(below_one), ~((x <= 0) | (x >= 1))
