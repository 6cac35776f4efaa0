"""Any distribution as a distribution on the whole line, with all methods that a statistic calls."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.priors.closed_form import ClosedFormPrior
from batchshaping.priors.tails import log_tails

__all__ = ["on_the_line"]


class _OnTheLine(Distribution):
    """A distribution whose CDF is defined on the whole line: 0 left of its support and 1 right of it."""

    def __init__(self, prior: Distribution) -> None:
        self.prior = _unvalidated(prior)
        super().__init__(prior.batch_shape, validate_args=False)
        self.lower = getattr(prior.support, "lower_bound", -torch.inf)
        self.upper = getattr(prior.support, "upper_bound", torch.inf)

    def cdf(self, value: Tensor) -> Tensor:
        inside, above, x = self._within(value)
        return torch.where(inside, self.prior.cdf(x), above.to(value.dtype))

    def icdf(self, value: Tensor) -> Tensor:
        try:
            return self.prior.icdf(value)
        except NotImplementedError:
            name = type(self.prior).__name__
            raise ValueError(f"this statistic needs a prior with an icdf, received {name}") from None

    def log_cdf(self, value: Tensor) -> Tensor:
        """The logarithm of the CDF; where the CDF is 0, that of the smallest normal number."""
        inside, above, x = self._within(value)
        return torch.where(inside, log_tails(self.prior, x)[0], self._log_smallest(~above, value.dtype))

    def log_sf(self, value: Tensor) -> Tensor:
        """The logarithm of 1 - CDF, likewise."""
        inside, above, x = self._within(value)
        return torch.where(inside, log_tails(self.prior, x)[1], self._log_smallest(above, value.dtype))

    def _within(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which values are inside of the support, which are above, and all values moved inside."""
        lower, upper = (
            torch.as_tensor(v, dtype=value.dtype, device=value.device) for v in (self.lower, self.upper)
        )
        middle = torch.where(upper.isfinite(), (lower + upper) / 2, lower + 1).nan_to_num(0.0, 0.0, 0.0)
        inside = (value > lower) & (value < upper) | value.isnan()
        return inside, value >= upper, torch.where(inside, value, middle)

    @staticmethod
    def _log_smallest(is_empty: Tensor, dtype: torch.dtype) -> Tensor:
        return is_empty.to(dtype) * math.log(torch.finfo(dtype).smallest_normal)


def _unvalidated(prior: Distribution) -> Distribution:
    """A copy that does not refuse values outside of its support."""
    prior = copy.copy(prior)
    prior._validate_args = False
    base = vars(prior).get("base_dist")
    if base is not None:
        vars(prior)["base_dist"] = _unvalidated(base)
    return prior


def on_the_line(prior: Distribution) -> Distribution:
    """The prior with ``cdf``, ``icdf``, ``log_cdf`` and ``log_sf`` for values on the whole line."""
    return prior if isinstance(prior, ClosedFormPrior) and prior.in_closed_form else _OnTheLine(prior)
