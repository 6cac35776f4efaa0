"""The Cramér-von Mises statistic: the squared distance of two CDFs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.distributions import Distribution

from batchshaping.statistics.statistic import ClosedFormStatistic, Comparison, Terms

__all__ = ["CramerVonMises"]


class CramerVonMises(ClosedFormStatistic):
    r"""The squared distance of the CDF to the plotting positions, :math:`(F(x_{(i)}) - p_i)^2`."""

    def terms(self, values: Tensor, positions: Tensor, prior: Distribution) -> Tensor:
        return (prior.cdf(values) - positions).square()

    def closed_form(self, comparison: Comparison) -> Callable[[slice], Terms]:
        samples, prepared = comparison.samples, comparison.prepared()
        evaluate = prepared.at_logits if comparison.logits else prepared.within(samples.extent)

        def terms(tile: slice) -> Terms:
            at = evaluate(samples.values[..., tile])
            residual = at.cdf.sub_(samples.positions(tile))
            parameter_derivatives = tuple(residual * slope for slope in at.parameters)
            derivative = at.pdf.mul_(residual)
            # A product, which has just been in use: a small batch takes longer to call another operation.
            return Terms(residual.mul_(residual), derivative, parameter_derivatives)

        return terms
