"""The CDF of the Beta distribution under its published name."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from batchshaping.cdfs.beta import BetaCDF, beta_cdf_parts, beta_pdf, fixed_beta_cdf
from batchshaping.cdfs.betainc import betainc
from batchshaping.cdfs.betaincinv import betaincinv
from batchshaping.cdfs.elementwise import as_operands, to_front

__all__ = [
    "BetaCDF",
    "beta_pdf",
    "betainc",
    "betaincinv",
    "clip_density",
    "fixed_beta_cdf",
    "get_beta_cdf_factory",
    "to_front",
]


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
        a, b, x = as_operands(a=a, b=b, x=x)
        with torch.no_grad():
            density = clip_density(beta_cdf_parts(a, b, x).pdf, a, b, x, self._low, self._high)
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
