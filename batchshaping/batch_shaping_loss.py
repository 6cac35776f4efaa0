"""The loss under its published names.

New code is better served by :func:`~batchshaping.losses.functional.batch_shaping`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor

from batchshaping.cdf_beta import clip_density
from batchshaping.cdfs.prepared import CDFDerivatives, LogCDFDerivatives, PreparedCDF
from batchshaping.losses.functional import batch_shaping
from batchshaping.losses.generalized import GeneralizedBatchShapingLoss
from batchshaping.losses.modules import BatchShapingLoss
from batchshaping.priors.closed_form import ClosedFormPrior
from batchshaping.priors.families import Beta, Normal, RelaxedBernoulli, SymBeta

__all__ = ["BatchShapingLoss", "GeneralizedBatchShapingLoss", "Prior", "batch_shaping", "gbas_loss"]


class Prior(Enum):
    """The families of priors under their published names."""

    SYMBETA = 0
    BETA = 1
    RELAXED_BERNOULLI = 2
    NORMAL = 3


class _Clipped(PreparedCDF):
    """A CDF whose density, and first the values if need be, are changed as published."""

    def __init__(self, cdf: PreparedCDF, change: Callable[[PreparedCDF, Tensor], CDFDerivatives]) -> None:
        self.cdf, self.change = cdf, change

    def __call__(self, x: Tensor) -> CDFDerivatives:
        return self.change(self.cdf, x)

    def logs(self, x: Tensor) -> LogCDFDerivatives:
        raise NotImplementedError("the published priors have the published statistic only")


class _ClippedBeta(Beta):
    """A Beta prior whose density is clipped in the backward pass."""

    @staticmethod
    def prepare(
        parameters: tuple[Tensor, ...], dtype: torch.dtype, *, gradients: bool = False, tails: bool = False
    ) -> PreparedCDF:
        a, b = parameters

        def clipped(cdf: PreparedCDF, x: Tensor) -> CDFDerivatives:
            at = cdf(x)
            return at._replace(pdf=clip_density(at.pdf, a, b, x, 1e-3, 100.0))

        return _Clipped(Beta.prepare(parameters, dtype, gradients=gradients), clipped)


class _ClippedRelaxedBernoulli(RelaxedBernoulli):
    """A Relaxed Bernoulli prior that clips the values."""

    @staticmethod
    def prepare(
        parameters: tuple[Tensor, ...], dtype: torch.dtype, *, gradients: bool = False, tails: bool = False
    ) -> PreparedCDF:
        def clipped(cdf: PreparedCDF, x: Tensor) -> CDFDerivatives:
            inside = x.clamp(1e-3, 1 - 1e-3)
            at = cdf(inside)
            return at._replace(pdf=at.pdf.mul_(inside == x))

        return _Clipped(RelaxedBernoulli.prepare(parameters, dtype, gradients=gradients), clipped)


# The prior that is meant, which checks its parameters, and the one that behaves as published.
_PUBLISHED: dict[Prior, tuple[Callable[..., ClosedFormPrior], Callable[..., ClosedFormPrior]]] = {
    Prior.SYMBETA: (lambda a, _: SymBeta(a), _ClippedBeta),
    Prior.BETA: (Beta, _ClippedBeta),
    Prior.RELAXED_BERNOULLI: (RelaxedBernoulli, _ClippedRelaxedBernoulli),
    Prior.NORMAL: (Normal, Normal),
}

# As published, the flag of gbas_loss concerns these families only.
_LEARNED_ON_REQUEST = {Prior.SYMBETA, Prior.BETA}


def gbas_loss(
    x_in: Tensor,
    prior: Prior,
    prior_param1: Tensor | float,
    prior_param2: Tensor | float | None = None,
    trainable_prior_params: bool = False,
    dim: int | None = None,
    handle_ties: bool = False,
) -> Tensor:
    """The batch-shaping loss under its published name; new code is better served by :func:`batch_shaping`.

    Here ``dim`` *indexes* the arrays and all other dimensions hold their values. As published, a Beta density
    is clipped to [1e-3, 100] in the backward pass, and values to [1e-3, 1 - 1e-3] under a Relaxed Bernoulli.

    Args:
        x_in: values of any shape and floating dtype.
        prior: family of the prior.
        prior_param1: its first parameter: a number, a 0-d tensor, or a 1-d tensor with one value an array.
        prior_param2: its second parameter, likewise; None for SYMBETA, whose second parameter is 1 less the
            first.
        trainable_prior_params: whether parameters of SYMBETA and BETA get gradients. Those of
            RELAXED_BERNOULLI and NORMAL get theirs whenever they require them.
        dim: the dimension that indexes the arrays; None takes all values as one array.
        handle_ties: whether equal values share the largest of their ranks.

    Returns:
        The mean loss of the arrays, a scalar.

    Raises:
        ValueError: if the prior is unknown, or a parameter is missing, not one of this prior, out of range
            or of another shape.

    Example:
        >>> gbas_loss(torch.tensor([0.1, 0.2, 0.4]), Prior.BETA, 2, 6)
        tensor(0.0081)
    """
    if not isinstance(prior, Prior):
        raise ValueError(f"prior must be one of {', '.join(map(str, Prior))}, received {prior!r}")
    if prior_param2 is None and prior is not Prior.SYMBETA:
        raise ValueError(f"prior_param2 must be given for {prior}, received None")
    if prior_param2 is not None and prior is Prior.SYMBETA:
        raise ValueError(f"prior_param2 must be None for {prior}, received {prior_param2}")
    fixed = prior in _LEARNED_ON_REQUEST and not trainable_prior_params
    parameters = [p.detach() if isinstance(p, Tensor) and fixed else p for p in (prior_param1, prior_param2)]
    arrays = x_in.reshape(1, -1) if dim is None else x_in.movedim(dim, 0).reshape(x_in.shape[dim], -1)
    meant, published = _PUBLISHED[prior]
    return batch_shaping(arrays, published(*meant(*parameters).parameters), dim=1, ties=handle_ties)
