"""The Wasserstein statistic: the squared distance of the samples to the quantiles of the prior."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.statistics.statistic import ClosedFormStatistic, Comparison, Terms

__all__ = ["Wasserstein"]


class Wasserstein(ClosedFormStatistic):
    r"""The squared distance of the samples to the prior's quantiles, :math:`(x_{(i)} - F^{-1}(p_i))^2`."""

    def terms(self, values: Tensor, positions: Tensor, prior: Distribution) -> Tensor:
        return (values - prior.icdf(positions)).square()

    def closed_form(self, comparison: Comparison) -> Callable[[slice], Terms]:
        prior, parameters, samples, logits, gradients = comparison
        prepared = comparison.prepared()
        quantiles = prior.quantile(parameters, samples.positions()).to(samples.values.dtype)

        def terms(tile: slice) -> Terms:
            values, quantile = samples.values[..., tile], quantiles[..., tile]
            x = torch.sigmoid(values) if logits else values
            distance = x - quantile
            derivative = distance * (torch.sigmoid(-values) * x) if logits else distance
            parameter_derivatives: tuple[Tensor, ...] = ()
            if gradients:
                # Where F(q) = p stays as it is, dq = -dF / f.
                # A quantile that has rounded to the end of the support moves with nothing.
                at = prepared(quantile)
                moves = (at.pdf > 0) & at.pdf.isfinite()
                scaled = torch.where(moves, distance / at.pdf, 0.0)
                parameter_derivatives = tuple(scaled * slope for slope in at.parameters)
            return Terms(distance * distance, derivative, parameter_derivatives)

        return terms
