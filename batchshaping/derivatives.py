"""What evaluating a cumulative distribution function gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["CDF", "CDFDerivatives"]


class CDFDerivatives(NamedTuple):
    """The CDF at x, the density, and the CDF's derivative in each parameter (empty where not asked for)."""

    cdf: Tensor
    pdf: Tensor
    parameters: tuple[Tensor, ...] = ()


CDF = Callable[[Tensor], CDFDerivatives]
"""A CDF whose parameters are set, as a function of x; outside of autograd, and returning new tensors."""
