"""The Anderson-Darling statistic: the relative entropy of the plotting positions to the CDF."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.cdfs.prepared import stretched
from batchshaping.statistics.statistic import ClosedFormStatistic, Comparison, Terms

__all__ = ["AndersonDarling"]


class AndersonDarling(ClosedFormStatistic):
    r"""Twice the relative entropy of the plotting positions to the CDF.

    .. math::
        2 p_i \log \frac{p_i}{F(x_{(i)})} + 2 (1 - p_i) \log \frac{1 - p_i}{1 - F(x_{(i)})}

    With positions (2 i - 1) / (2 N) its sum is the classical statistic less its least value. Near the fit it
    is the Cramér-von Mises term over :math:`p_i (1 - p_i)`.
    """

    def terms(self, values: Tensor, positions: Tensor, prior: Distribution) -> Tensor:
        log_cdf, log_sf = prior.log_cdf(values), prior.log_sf(values)  # type: ignore[attr-defined]
        lower = positions * (positions.log() - log_cdf)
        upper = (1 - positions) * (torch.log1p(-positions) - log_sf)
        total: Tensor = 2 * (lower + upper)
        return total

    def closed_form(self, comparison: Comparison) -> Callable[[slice], Terms]:
        samples, prepared = comparison.samples, comparison.prepared(tails=True)

        def terms(tile: slice) -> Terms:
            values = samples.values[..., tile]
            # An infinite logit has an infinite logarithm; a huge one takes its place.
            at = (
                prepared.logs_at_logits(values.clamp(-1e30, 1e30))
                if comparison.logits
                else prepared.logs(values)
            )
            p = samples.positions(tile)
            entropy = torch.special.entr(p) + torch.special.entr(1 - p)

            def mean(lower: Tensor, upper: Tensor) -> Tensor:
                return torch.lerp(upper, lower, p.expand(upper.shape)).neg_()

            # Rounding alone would make a term negative.
            value = mean(at.log_cdf, at.log_sf).sub_(entropy).clamp_min_(0.0).mul_(2)
            parameter_derivatives = tuple(mean(*pair) for pair in at.parameters)
            return Terms(value, stretched(mean(at.cdf_by_x, at.sf_by_x), at.stretch), parameter_derivatives)

        return terms
