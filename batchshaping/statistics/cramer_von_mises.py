"""The Cramér-von Mises statistic: the squared distance of two CDFs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.distributions import Distribution

from batchshaping.priors.closed_form import ClosedFormPrior
from batchshaping.statistics.samples import Samples
from batchshaping.statistics.statistic import ClosedFormStatistic, Terms

__all__ = ["CramerVonMises"]


class CramerVonMises(ClosedFormStatistic):
    r"""The squared distance of the CDF to the plotting positions, :math:`(F(x_{(i)}) - p_i)^2`."""

    def terms(self, values: Tensor, positions: Tensor, prior: Distribution) -> Tensor:
        return (prior.cdf(values) - positions).square()

    def closed_form(
        self,
        prior: type[ClosedFormPrior],
        parameters: tuple[Tensor, ...],
        samples: Samples,
        logits: bool,
        gradients: bool,
    ) -> Callable[[slice], Terms]:
        prepared = prior.prepare(parameters, samples.values.dtype, gradients=gradients)
        evaluate = prepared.at_logits if logits else prepared.within(samples.extent)

        def terms(tile: slice) -> Terms:
            at = evaluate(samples.values[..., tile])
            residual = at.cdf.sub_(samples.positions(tile))
            parameter_derivatives = tuple(residual * slope for slope in at.parameters)
            derivative = at.pdf.mul_(residual)
            return Terms(residual.square_(), derivative, parameter_derivatives)

        return terms
