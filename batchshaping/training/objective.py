"""What training minimizes beside the cross-entropy, and how the weights of its terms change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributions import Distribution

from batchshaping.losses.distributed import Group
from batchshaping.losses.generalized import GeneralizedBatchShapingLoss
from batchshaping.losses.modules import BatchShapingLoss
from batchshaping.priors.families import Beta
from batchshaping.training.schedules import Ramp
from batchshaping.training.sections import ObjectiveSettings

__all__ = ["LearnedPriors", "Objective"]


class Objective(nn.Module):
    r"""The losses of the gates: batch-shaping, and a penalty on the cost above a budget.

    With p the gates' probabilities of being open, c the cost of a batch as a share of the cost with all gates
    open, and e the share of training that is done, they are

    .. math::
        \gamma(e) \sum_\text{layers} L(p; \mathrm{prior})
        \quad\text{and}\quad \lambda(e) \max(0, c - \mathrm{budget}).

    The weight :math:`\gamma` falls linearly to 0, and :math:`\lambda` rises linearly from 0. With budget 0
    and the share of open gates as the cost, this is the objective of Bejnordi, Blankevoort and Welling (ICLR
    2020, https://arxiv.org/abs/1907.06627).

    Parameters of the prior that are ``nn.Parameter`` s are parameters of this module, and learned with it.
    With a hyperprior in the settings each gate has a learned prior: see :class:`LearnedPriors`.

    Args:
        settings: the objective section of a configuration.
        prior: the prior of each gate, in place of the Beta prior of the settings.
        across_ranks: whether the batch extends over all ranks of torch.distributed.
        gates: number of gates of the network, needed where their priors are learned.

    Attributes:
        penalized: name of the cost that is penalized.
        budget: cost above which there is a penalty.
        shaping: weight of the batch-shaping loss as a function of progress.
        penalty: weight of the penalty as a function of progress.
        noise: scale of the gates' noise as a function of progress.

    Example:
        >>> objective = Objective(ObjectiveSettings(budget=0.5))
        >>> probabilities = [torch.rand(8, 16), torch.rand(8, 32)]
        >>> costs = {"multiply-adds": torch.tensor(0.75), "open-gates": torch.tensor(0.5)}
        >>> list(objective(probabilities, costs.get, progress=0.0))
        ['batch_shaping']
        >>> objective(probabilities, costs.get, progress=1.0)
        {'penalty': tensor(0.7500)}
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        prior: Distribution | None = None,
        across_ranks: bool = False,
        gates: int = 0,
    ) -> None:
        super().__init__()
        group: Group = "world" if across_ranks else None
        if settings.hyperprior is None or prior is not None:
            prior = Beta(*settings.prior) if prior is None else prior
            self.batch_shaping: nn.Module = BatchShapingLoss(prior, dim=0, group=group)
        else:
            self.batch_shaping = LearnedPriors(gates, settings, group)
        self.across_ranks = across_ranks
        self.penalized, self.budget = settings.penalized, settings.budget
        last_shaping = settings.shaping if settings.shaping_end is None else 0.0
        self.shaping = Ramp(settings.shaping, last_shaping, 0.0, settings.shaping_end or 1.0)
        self.penalty = Ramp(0.0, settings.penalty, settings.penalty_begin, settings.penalty_end)
        last_noise = 1.0 if settings.noise_end is None else 0.0
        self.noise = Ramp(1.0, last_noise, 0.0, settings.noise_end or 1.0)

    def forward(
        self, probabilities: Sequence[Tensor], cost: Callable[[str], Tensor], progress: float
    ) -> dict[str, Tensor]:
        """The weighted losses by their names, without those whose weight is 0.

        Args:
            probabilities: probability of each gate, of shape (N, gates) for each layer.
            cost: the cost of the batch as a function of its name, as a share of the cost with all gates open.
                It must be the cost of the decisions, with the gradient of the probabilities: a penalty on the
                expected cost would let the network end above its budget once the noise is gone.
            progress: share of training that is done, in [0, 1].
        """
        shaping, penalty = self.shaping(progress), self.penalty(progress)
        losses = {}
        if shaping > 0:
            losses["batch_shaping"] = shaping * self.batch_shaping(probabilities)
        if penalty > 0:
            spent = cost(self.penalized)
            # The ranks together are above the budget or not, as one process with the whole batch would be.
            above = self._mean_over_ranks(spent.detach()) - self.budget
            losses["penalty"] = penalty * (above > 0) * (spent - self.budget)
        return losses

    def weights(self, progress: float) -> dict[str, float]:
        """The weights of the losses and the scale of the gates' noise, by their names."""
        return {
            "shaping": self.shaping(progress),
            "penalty": self.penalty(progress),
            "noise": self.noise(progress),
        }

    def learned_priors(self) -> dict[str, list[float]] | None:
        """Mean and temperature of the learned prior of each gate; None where priors are not learned."""
        priors = self.batch_shaping
        return priors.parameters_of_priors() if isinstance(priors, LearnedPriors) else None

    def check_budget(self, least: float) -> None:
        """Refuse a budget that cannot be met.

        Args:
            least: multiply-adds with all gates closed, as a share of those with all gates open.

        Raises:
            ValueError: in one line, if multiply-adds are penalized and the budget is between 0 and that.
        """
        if self.penalized == "multiply-adds" and 0 < self.budget < least:
            raise ValueError(
                f"budget must be 0 or at least {least:.3g}, the share of the multiply-adds that no gate can "
                f"save, received {self.budget}"
            )

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        if not self.across_ranks:
            return value
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total / torch.distributed.get_world_size()


class LearnedPriors(nn.Module):
    """Generalized batch-shaping: a learned Relaxed Bernoulli prior for each gate, and a hyperprior of all.

    The loss is the mean over the gates of all layers. Their means start near that of the hyperprior.

    Args:
        gates: number of gates.
        settings: the hyperprior and its weights.
        group: over which ranks the batch extends.

    Attributes:
        loss: the loss, with the learned priors.

    Raises:
        ValueError: if there are no gates.

    Example:
        >>> priors = LearnedPriors(24, ObjectiveSettings(hyperprior=(2, 8)), group=None)
        >>> loss = priors([torch.rand(32, 16), torch.rand(32, 8)])
        >>> priors.loss.mean.shape
        torch.Size([24])
    """

    def __init__(self, gates: int, settings: ObjectiveSettings, group: Group) -> None:
        super().__init__()
        assert settings.hyperprior is not None
        if gates < 1:
            raise ValueError(f"hyperprior needs a network with gates, received {gates} gates")
        a, b = settings.hyperprior
        self.loss = GeneralizedBatchShapingLoss(
            gates,
            Beta(a, b),
            hyperprior_weight=settings.hyperprior_weight,
            temperature_weight=settings.temperature_weight,
            group=group,
        )
        with torch.no_grad():
            self.loss.mean_logits.add_(math.log(a) - math.log(b))

    def forward(self, probabilities: Sequence[Tensor]) -> Tensor:
        """The loss of the probabilities of each layer, of shape (N, gates)."""
        loss: Tensor = self.loss(torch.cat([*probabilities], dim=1))
        return loss

    def parameters_of_priors(self) -> dict[str, list[float]]:
        """Mean and temperature of the prior of each gate."""
        return {"mean": self.loss.mean.tolist(), "temperature": self.loss.temperature.tolist()}
