"""The generalized batch-shaping loss: learned priors, which a hyperprior shapes as a set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from batchshaping.losses.arguments import chosen_statistic, tensors_of
from batchshaping.losses.distributed import Group
from batchshaping.losses.functional import Settings, shaping_loss
from batchshaping.losses.layers import Layers
from batchshaping.losses.modules import BatchShapingLoss
from batchshaping.priors.families import Beta, RelaxedBernoulli
from batchshaping.statistics.statistic import Discrepancy

__all__ = ["GeneralizedBatchShapingLoss"]


class GeneralizedBatchShapingLoss(nn.Module):
    r"""The generalized batch-shaping loss: every array has a learned prior, and the priors have one too.

    .. math::
        L = \frac{1}{T} \sum_{k=1}^T L(x^k; \mu_k, \tau_k) + w_h L(\{\mu_1 \dots \mu_T\}; \psi)
            + w_\tau \frac{1}{T} \sum_{k=1}^T \tau_k

    The prior of array k is a Relaxed Bernoulli of mean :math:`\mu_k` and temperature :math:`\tau_k`, both the
    sigmoid of a parameter of this module. The means as a set are shaped to the hyperprior, so that arrays may
    differ while their average is set; the temperatures are kept low by an L1 penalty.

    A list of tensors is taken as by ``batch_shaping``: the first term is the sum of those of the tensors,
    and the hyperprior is that of all means together.

    After a forward pass ``prior_loss``, ``hyperprior_loss`` and ``temperature_penalty`` hold its three terms,
    weights included, detached for logging.

    Args:
        shape: shape of the arrays, what is left of x without ``dim``; an int is one dimension. For a list of
            tensors, the number of arrays of all of them.
        hyperprior: prior of the means on (0, 1); Beta(3, 7) asks for a density of 0.3.
        dim: the dimension or dimensions of x that hold the samples.
        hyperprior_weight: weight :math:`w_h` of the hyperprior loss.
        temperature_weight: weight :math:`w_\tau` of the penalty on temperatures.
        statistic: name of the statistic of the arrays, or one's own.
        hyperprior_statistic: that of the means; "anderson_darling" also moves them under a narrow hyperprior.
        ties: whether equal values share the largest of their ranks.
        logits: whether the values are logits.
        group: process group over which the batch extends, or "world".

    Raises:
        ValueError: if x without ``dim`` has another shape.

    References:
        Havtorn, Royer, Blankevoort and Bejnordi, MSViT: Dynamic Mixed-Scale Tokenization for Vision
        Transformers, ICCV Workshops 2023, https://arxiv.org/abs/2307.02321.

    Example:
        >>> loss = GeneralizedBatchShapingLoss(30)
        >>> total = loss(torch.rand(500, 30))
        >>> total.backward()
        >>> loss.mean.shape, [name for name, _ in loss.named_parameters()]
        (torch.Size([30]), ['mean_logits', 'temperature_logits'])
    """

    prior_loss: Tensor
    hyperprior_loss: Tensor
    temperature_penalty: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        hyperprior: Distribution | None = None,
        dim: int | Sequence[int] = 0,
        *,
        hyperprior_weight: float = 1.0,
        temperature_weight: float = 0.1,
        statistic: str | Discrepancy = "cramer_von_mises",
        hyperprior_statistic: str | Discrepancy = "cramer_von_mises",
        ties: bool = False,
        logits: bool = False,
        group: Group = None,
    ) -> None:
        super().__init__()
        hyperprior = Beta(3, 7) if hyperprior is None else hyperprior
        chosen_statistic(statistic)
        self.mean_shaping = BatchShapingLoss(hyperprior, statistic=hyperprior_statistic)
        self.dim, self.statistic = dim, statistic
        self.ties, self.logits, self.group = ties, logits, group
        self.hyperprior_weight, self.temperature_weight = hyperprior_weight, temperature_weight
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        self.mean_logits = nn.Parameter(torch.empty(size))
        self.temperature_logits = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start every mean and temperature near 0.5, apart enough to be told from one another."""
        nn.init.normal_(self.mean_logits, std=0.1)
        nn.init.normal_(self.temperature_logits, std=0.1)

    @property
    def mean(self) -> Tensor:
        """The learned means, in (0, 1)."""
        return _open_unit(self.mean_logits)

    @property
    def temperature(self) -> Tensor:
        """The learned temperatures, in (0, 1)."""
        return _open_unit(self.temperature_logits)

    @property
    def prior(self) -> RelaxedBernoulli:
        """The priors as they are now, one an array."""
        return RelaxedBernoulli(self.mean, self.temperature, validate_args=False)

    @property
    def hyperprior(self) -> Distribution:
        """The prior of the means as it is now."""
        hyperprior: Distribution = self.mean_shaping.prior
        return hyperprior

    def forward(
        self, x: Tensor | Sequence[Tensor], mask: Tensor | Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """The total loss of x, over the values where the mask is True."""
        tensors = tensors_of(x)
        layers = Layers(x, self.dim)
        if layers.shape != self.mean_logits.shape:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise ValueError(
                f"dim={self.dim} of x with shape {shapes} leaves {tuple(layers.shape)}, "
                f"but the learned priors have shape {tuple(self.mean_logits.shape)}"
            )
        prior: Any = self.prior
        if not layers.single:
            parameters = zip(layers.split(self.mean), layers.split(self.temperature), strict=True)
            prior = [RelaxedBernoulli(*pair, validate_args=False) for pair in parameters]
        settings = Settings(self.dim, self.statistic, self.ties, self.logits, group=self.group)
        prior_loss = shaping_loss(x, prior, settings, mask)
        hyperprior_loss = self.hyperprior_weight * self.mean_shaping(self.mean)
        penalty = self.temperature_weight * self.temperature.mean()
        self.prior_loss = prior_loss.detach()
        self.hyperprior_loss = hyperprior_loss.detach()
        self.temperature_penalty = penalty.detach()
        total: Tensor = prior_loss + hyperprior_loss + penalty
        return total

    def extra_repr(self) -> str:
        return (
            f"shape={tuple(self.mean_logits.shape)}, dim={self.dim}, "
            f"hyperprior_weight={self.hyperprior_weight}, temperature_weight={self.temperature_weight}"
        )


def _open_unit(logits: Tensor) -> Tensor:
    """The sigmoid, kept off 0 and 1, which it reaches by rounding."""
    eps = torch.finfo(logits.dtype).eps
    return torch.sigmoid(logits).clamp(eps, 1 - eps)
