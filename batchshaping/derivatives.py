"""What evaluating a cumulative distribution function gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CDFDerivatives", "LogCDFDerivatives", "PreparedCDF", "nearest_inside", "smallest_positive"]


class CDFDerivatives(NamedTuple):
    """The CDF at x, the density, and the CDF's derivative in each parameter (empty where not asked for)."""

    cdf: Tensor
    pdf: Tensor
    parameters: tuple[Tensor, ...] = ()


class LogCDFDerivatives(NamedTuple):
    """The logarithms of the CDF and of the survival function (1 less it) at x, and their derivatives.

    ``parameters`` holds a pair for each parameter, of log CDF and of log survival function.

    The derivatives in x are ``cdf_by_x`` and ``sf_by_x`` times ``slope``, where None is 1. The slope is apart
    because that of logit(x) is huge near 0: a product that begins with the small factors stays finite.
    """

    log_cdf: Tensor
    log_sf: Tensor
    cdf_by_x: Tensor
    sf_by_x: Tensor
    parameters: tuple[tuple[Tensor, Tensor], ...] = ()
    slope: Tensor | None = None

    def by_x(self, by: Tensor) -> Tensor:
        """A combination of ``cdf_by_x`` and ``sf_by_x``, written over, as a derivative in x.

        It is the largest number of its dtype where it exceeds that.
        """
        if self.slope is None:
            return by
        largest = torch.finfo(by.dtype).max
        return by.mul_(self.slope).clamp_(-largest, largest)


class PreparedCDF(ABC):
    """A CDF whose parameters are set, as a function of x or of logit(x).

    It is outside of autograd, and returns new tensors in the dtype of the values.
    """

    @abstractmethod
    def __call__(self, x: Tensor) -> CDFDerivatives:
        """The CDF at x."""

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
        return at._replace(slope=slope if at.slope is None else at.slope.mul_(slope))


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
