r"""The batch-shaping loss: how far values over a batch are from a prior, with a gradient that closes the gap.

For N samples x with order statistics :math:`x_{(1)} \le \dots \le x_{(N)}` and a prior with CDF F,

.. math::
    L = \frac{1}{N} \sum_{i=1}^N \left( F(x_{(i)}) - \frac{i}{N + 1} \right)^2,

the Cramér-von Mises criterion with plotting positions i / (N + 1). Its derivatives are closed forms of the
ranks, F and the density f, all at hand after the sort, so that the forward pass computes them too:

.. math::
    \frac{\partial L}{\partial x_{(i)}} = \frac{2}{N} \left( F(x_{(i)}) - \frac{i}{N + 1} \right) f(x_{(i)}).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.losses.arguments import (
    canonical_dims,
    check_broadcast,
    check_prior,
    chosen_reduction,
    chosen_statistic,
    mask_like,
    samples_last,
)
from batchshaping.losses.closed_form import loss_of_arrays
from batchshaping.losses.distributed import Collect, Columns, Deal, Group, resolve_group
from batchshaping.losses.history import Memory
from batchshaping.priors.checks import check_values, known_to_hold
from batchshaping.priors.closed_form import ClosedFormPrior, check_parameters
from batchshaping.statistics.statistic import Statistic

__all__ = ["batch_shaping", "shaping_loss"]


def batch_shaping(
    x: Tensor,
    prior: Distribution,
    dim: int | Sequence[int] | None = None,
    *,
    statistic: str | Statistic = "cramer_von_mises",
    mask: Tensor | None = None,
    ties: bool = False,
    logits: bool = False,
    reduction: str = "mean",
    group: Group = None,
) -> Tensor:
    r"""The batch-shaping loss: the squared distance of the samples' empirical CDF to that of a prior.

    .. math::
        L = \frac{1}{N} \sum_{i=1}^N \left( F(x_{(i)}) - \frac{i}{N + 1} \right)^2

    The gradient in x and in every parameter of the prior that requires one is exact; one tensor of x's size
    is kept for it. Half precision is computed in float32. A NaN in x makes its array's loss and gradient NaN.

    Args:
        x: values of any shape and floating dtype, on any device.
        prior: a distribution with a ``cdf``. Its ``batch_shape`` broadcasts to the shape of x without
            ``dim``: one prior for all arrays, or one for each.
        dim: the dimension or dimensions that hold the samples; None takes all values as one array.
        statistic: "cramer_von_mises" (the formula above), "anderson_darling" or "wasserstein", or a
            :class:`~batchshaping.statistics.statistic.Statistic` of one's own.
        mask: booleans that broadcast to x's shape; values where it is False are left out.
        ties: whether equal values of x share the largest of their ranks, as in the exact empirical CDF,
            instead of taking consecutive ones.
        logits: whether x are logits, of which the prior's values are the sigmoid: the loss of sigmoid(x), and
            a gradient that does not vanish where the sigmoid saturates.
        reduction: "mean" or "sum" over the arrays, or "none" for one loss each.
        group: a ``torch.distributed`` process group, or "world" for all ranks if there are any: the samples
            of all ranks are one batch, of which x is this rank's shard. All ranks must call with the same
            arrays; their numbers of samples may differ, or be 0. Every rank gets the loss of the whole batch.
            The gradients are scaled so that their *average* over the ranks, which DistributedDataParallel
            takes, is the gradient that one process with the whole batch would have.

    Returns:
        The loss in x's dtype: a scalar, or for "none" of x's shape without ``dim``. It is 0 at the best fit,
        and that of Cramér and von Mises at most 1.

    Raises:
        TypeError: if x is not floating point, or the mask not boolean.
        ValueError: if there are no samples along ``dim``, the mask leaves an array empty, shapes do not
            broadcast, the prior is not a distribution with a CDF, or the statistic or the reduction is
            unknown.
        RuntimeError: if a rank of the group is lost.

    References:
        Bejnordi, Blankevoort and Welling, Batch-Shaping for Learning Conditional Channel Gated Networks, ICLR
        2020, https://arxiv.org/abs/1907.06627.

    Example:
        >>> import batchshaping as bs
        >>> gates = torch.tensor([[0.1, 0.9], [0.5, 0.8], [0.9, 0.7]])
        >>> bs.batch_shaping(gates, bs.Beta(0.6, 0.4), dim=0, reduction="none")
        tensor([0.0103, 0.0271])
    """
    return shaping_loss(x, prior, dim, statistic, mask, ties, logits, reduction, group, None)


def shaping_loss(
    x: Tensor,
    prior: Distribution,
    dim: int | Sequence[int] | None,
    statistic: str | Statistic,
    mask: Tensor | None,
    ties: bool,
    logits: bool,
    reduction: str,
    group: Group,
    memory: Memory | None,
) -> Tensor:
    """:func:`batch_shaping` with a memory of past batches."""
    check_prior(prior)
    check_parameters(prior)
    chosen = chosen_statistic(statistic)
    reduce = chosen_reduction(reduction)
    check_values(x)
    dims = canonical_dims(dim, x.ndim)
    arrays = samples_last(x, dims)
    shape = arrays.shape[:-1]
    check_broadcast(prior, shape, x.shape, dim)
    count = None
    if mask is not None:
        mask = samples_last(mask_like(x, mask), dims)
        count = mask.sum(dim=-1)
        arrays = arrays.masked_fill(~mask, torch.inf)
    seen, own_count, samples = arrays, count, arrays.shape[-1]
    current = None
    if memory is not None:
        arrays, count = memory.join(arrays, count)
        current = torch.arange(arrays.shape[-1], device=x.device) < samples
    process_group = resolve_group(group)
    columns = None
    if process_group is None:
        _check_samples(samples, own_count, dim, x.shape)
    else:
        arrays = arrays.reshape(shape.numel(), arrays.shape[-1])
        columns = Columns(arrays, samples, count is not None, process_group)
        _check_samples(sum(columns.now), None, dim, x.shape)
        if columns.differentiable and not arrays.requires_grad:
            # This rank still has to send the gradients of its arrays to the ranks that ask for them.
            arrays = arrays.detach().requires_grad_()
        current = columns.current if memory is not None else None
        if columns.masked:
            everything = arrays.new_full(arrays.shape[:1], arrays.shape[1], dtype=torch.int64)
            if memory is not None:
                # Arrays need samples in this batch, whatever is remembered of them.
                now = torch.full_like(everything, samples) if own_count is None else own_count.flatten()
                columns.total(now)
            count = columns.total(everything if count is None else count.flatten())
        arrays = Deal.apply(arrays, columns)
        prior = _of_arrays(prior, shape, columns.own)
    working = arrays.float() if arrays.dtype in (torch.float16, torch.bfloat16) else arrays
    loss = loss_of_arrays(chosen, prior, working, count, current, ties, logits)
    if columns is not None:
        loss = Collect.apply(loss, columns).reshape(shape)
    if memory is not None:
        memory.remember(seen, own_count)
    return reduce(loss).to(x.dtype)


def _of_arrays(prior: Distribution, shape: torch.Size, arrays: slice) -> Distribution:
    if isinstance(prior, ClosedFormPrior):
        return prior.of_arrays(shape, arrays)
    if prior.batch_shape not in (torch.Size(), torch.Size([1])):
        raise ValueError(
            f"across ranks, {type(prior).__name__} must be one prior for all arrays, "
            f"received batch_shape {tuple(prior.batch_shape)}"
        )
    return prior


def _check_samples(
    samples: int, count: Tensor | None, dim: int | Sequence[int] | None, shape: torch.Size
) -> None:
    if samples == 0:
        raise ValueError(f"no samples along dim={dim} of x with shape {tuple(shape)}")
    if count is not None and not known_to_hold(count > 0):
        raise ValueError(
            f"mask leaves an array without samples along dim={dim} of x with shape {tuple(shape)}"
        )
