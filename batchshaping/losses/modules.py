"""The batch-shaping loss as a module that owns its prior."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, overload

from torch import Tensor
from torch.distributions import Distribution

from batchshaping.losses.arguments import check_prior, chosen_reduction, chosen_statistic
from batchshaping.losses.distributed import Group
from batchshaping.losses.functional import Settings, shaping_loss
from batchshaping.losses.history import History
from batchshaping.priors.checks import is_index
from batchshaping.priors.module import PriorModule
from batchshaping.statistics.statistic import Discrepancy

__all__ = ["BatchShapingLoss"]


class BatchShapingLoss(PriorModule):
    """The batch-shaping loss as a module.

    See :func:`~batchshaping.losses.functional.batch_shaping` for the formula and the arguments.

    The module owns the prior: its tensors are buffers of the module, or parameters if they were made as
    ``nn.Parameter``, under the names of the prior's arguments. They move with the module, are in
    ``state_dict()``, and may be parametrized. Numbers have no state. Learned parameters start where they
    were and cannot leave their range; ``prior`` has their values. See
    :class:`~batchshaping.priors.module.PriorModule`.

    Args:
        prior: a distribution with a ``cdf``, or a list with one for each of the tensors of a list.
        dim: the dimension or dimensions that hold the samples; None takes all values as one array.
        statistic: name of the statistic, or one's own.
        ties: whether equal values share the largest of their ranks.
        logits: whether the values are logits.
        reduction: "mean", "sum" or "none".
        group: process group over which the batch extends, or "world".
        history: how many past batches to keep, for batches that are too small to tell how their values are
            distributed: the current samples are ranked among the past ones, and the loss is the mean over the
            current ones. Batches are added in training only, those with a NaN are not, and the history is
            kept in ``state_dict()``.

    Raises:
        ValueError: if the prior is not a distribution with a CDF, or the reduction or the statistic is
            unknown.
        TypeError: if the history is not a whole number.

    Example:
        >>> import torch, batchshaping as bs
        >>> from torch import nn
        >>> loss = bs.BatchShapingLoss(bs.Beta(nn.Parameter(torch.tensor(0.6)), 0.4), dim=0)
        >>> loss(torch.tensor([[0.1, 0.9], [0.5, 0.8], [0.9, 0.7]]))
        tensor(0.0187, grad_fn=<_ClosedFormLossBackward>)
        >>> [name for name, _ in loss.named_parameters()]
        ['a']
    """

    def __init__(
        self,
        prior: Distribution | Sequence[Distribution],
        dim: int | Sequence[int] | None = None,
        *,
        statistic: str | Discrepancy = "cramer_von_mises",
        ties: bool = False,
        logits: bool = False,
        reduction: str = "mean",
        group: Group = None,
        history: int = 0,
    ) -> None:
        super().__init__()
        for each in prior if isinstance(prior, list | tuple) else (prior,):
            check_prior(each)
        chosen_statistic(statistic)
        chosen_reduction(reduction)
        if not is_index(history):
            raise TypeError(f"history must be a whole number of batches, received {history!r}")
        if history < 0:
            raise ValueError(f"history must be a number of batches, received {history}")
        # The name in the state of the module.
        self.memory = History(operator.index(history)) if history else None
        self.dim, self.statistic = dim, statistic
        self.ties, self.logits, self.reduction, self.group = ties, logits, reduction, group
        self.own(prior)

    @overload
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor: ...
    @overload
    def forward(self, x: Sequence[Tensor], mask: Tensor | Sequence[Tensor | None] | None = None) -> Any: ...
    def forward(
        self, x: Tensor | Sequence[Tensor], mask: Tensor | Sequence[Tensor | None] | None = None
    ) -> Any:
        """The loss of x, over the values where the mask is True."""
        settings = Settings(self.dim, self.statistic, self.ties, self.logits, self.reduction, self.group)
        return shaping_loss(x, self.prior, settings, mask, self.memory)

    def extra_repr(self) -> str:
        return (
            f"{self._shown()}, dim={self.dim}, statistic={self.statistic!r}, ties={self.ties}, "
            f"logits={self.logits}, reduction={self.reduction!r}"
        )
