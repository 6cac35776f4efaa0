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
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.losses.arguments import (
    check_broadcast,
    check_prior,
    check_same_samples,
    chosen_reduction,
    chosen_statistic,
    mask_like,
    one_for_each,
    tensors_of,
)
from batchshaping.losses.closed_form import Weights, loss_of_arrays, weighted_sum
from batchshaping.losses.distributed import Collect, Columns, Group, resolve_group
from batchshaping.losses.history import History
from batchshaping.losses.layers import Layers, Part
from batchshaping.priors.checks import known_to_hold
from batchshaping.priors.closed_form import check_parameters
from batchshaping.statistics.samples import Batch, Options
from batchshaping.statistics.statistic import Discrepancy

__all__ = ["Settings", "batch_shaping", "shaping_loss"]


@overload
def batch_shaping(
    x: Tensor,
    prior: Distribution,
    dim: int | Sequence[int] | None = None,
    *,
    statistic: str | Discrepancy = ...,
    mask: Tensor | None = ...,
    ties: bool = ...,
    logits: bool = ...,
    reduction: str = ...,
    group: Group = ...,
) -> Tensor: ...
@overload
def batch_shaping(
    x: Sequence[Tensor],
    prior: Distribution | Sequence[Distribution],
    dim: int | Sequence[int] | None = None,
    *,
    statistic: str | Discrepancy = ...,
    mask: Tensor | Sequence[Tensor | None] | None = ...,
    ties: bool = ...,
    logits: bool = ...,
    reduction: str = ...,
    group: Group = ...,
) -> Any: ...
def batch_shaping(
    x: Tensor | Sequence[Tensor],
    prior: Distribution | Sequence[Distribution],
    dim: int | Sequence[int] | None = None,
    *,
    statistic: str | Discrepancy = "cramer_von_mises",
    mask: Tensor | Sequence[Tensor | None] | None = None,
    ties: bool = False,
    logits: bool = False,
    reduction: str = "mean",
    group: Group = None,
) -> Any:
    r"""The batch-shaping loss: the squared distance of the samples' empirical CDF to that of a prior.

    .. math::
        L = \frac{1}{N} \sum_{i=1}^N \left( F(x_{(i)}) - \frac{i}{N + 1} \right)^2

    The gradient in x and in every parameter of the prior that requires one is exact; one tensor of x's size
    is kept for it. Half precision is computed in float32. A NaN in x makes its array's loss and gradient NaN.

    A list of tensors, such as the probabilities of the gates in each layer of a network, is computed in one
    sort and, across ranks, one exchange, which takes a fraction of the time of a call for each tensor. The
    loss is the sum of those of the tensors.

    Args:
        x: values of any shape and floating dtype, on any device; or a list or tuple of tensors of the same
            dtype and device with the same number of samples along ``dim``.
        prior: a distribution with a ``cdf``. Its ``batch_shape`` broadcasts to the shape of x without
            ``dim``: one prior for all arrays, or one for each. For a list of tensors, one prior for all of
            them or a list with a prior for each.
        dim: the dimension or dimensions that hold the samples; None takes all values as one array.
        statistic: "cramer_von_mises" (the formula above), "anderson_darling" or "wasserstein", or a
            :class:`~batchshaping.statistics.statistic.Statistic` of one's own.
        mask: booleans that broadcast to x's shape; values where it is False are left out. For a list of
            tensors, one mask that broadcasts to each of them or a list with a mask or None for each.
        ties: whether equal values of x share the largest of their ranks, as in the exact empirical CDF,
            instead of taking consecutive ones.
        logits: whether x are logits, of which the prior's values are the sigmoid: the loss of sigmoid(x), and
            a gradient that does not vanish where the sigmoid saturates.
        reduction: "mean" or "sum" over the arrays, or "none" for one loss each. For a list of tensors, "mean"
            is the sum of the means of the tensors.
        group: a ``torch.distributed`` process group, or "world" for all ranks if there are any: the samples
            of all ranks are one batch, of which x is this rank's shard. All ranks must call with the same
            arrays; their numbers of samples may differ, or be 0. Every rank gets the loss of the whole batch.
            The gradients are scaled so that their *average* over the ranks, which DistributedDataParallel
            takes, is the gradient that one process with the whole batch would have.

    Returns:
        The loss in x's dtype: a scalar, or for "none" of x's shape without ``dim``, and for a list a list of
        such. It is 0 at the best fit, and that of Cramér and von Mises of one array is at most 1.

    Raises:
        TypeError: if x is not floating point, or the mask not boolean.
        ValueError: if there are no samples along ``dim``, the mask leaves an array empty, shapes do not
            broadcast, the prior is not a distribution with a CDF, the statistic or the reduction is unknown,
            or the tensors of a list differ in dtype, device or number of samples.
        RuntimeError: if a rank of the group is lost.

    References:
        Bejnordi, Blankevoort and Welling, Batch-Shaping for Learning Conditional Channel Gated Networks, ICLR
        2020, https://arxiv.org/abs/1907.06627.

    Example:
        >>> import batchshaping as bs
        >>> gates = torch.tensor([[0.1, 0.9], [0.5, 0.8], [0.9, 0.7]])
        >>> bs.batch_shaping(gates, bs.Beta(0.6, 0.4), dim=0, reduction="none")
        tensor([0.0103, 0.0271])
        >>> bs.batch_shaping([gates, gates[:, :1]], bs.Beta(0.6, 0.4), dim=0)
        tensor(0.0290)
    """
    settings = Settings(dim, statistic, ties, logits, reduction, group)
    return shaping_loss(x, prior, settings, mask)


class Settings(NamedTuple):
    """The arguments that the function and the modules have in common; see :func:`batch_shaping`."""

    dim: int | Sequence[int] | None = None
    statistic: str | Discrepancy = "cramer_von_mises"
    ties: bool = False
    logits: bool = False
    reduction: str = "mean"
    group: Group = None


def shaping_loss(
    x: Tensor | Sequence[Tensor],
    prior: Distribution | Sequence[Distribution],
    settings: Settings,
    mask: Tensor | Sequence[Tensor | None] | None = None,
    history: History | None = None,
) -> Any:
    """:func:`batch_shaping` with a history of past batches."""
    statistic, reduction = chosen_statistic(settings.statistic), chosen_reduction(settings.reduction)
    priors = one_for_each(prior, x, "prior")
    for each in dict(zip(map(id, priors), priors, strict=True)).values():
        check_prior(each)
        check_parameters(each)
    tensors = tensors_of(x)
    layers = Layers(x, settings.dim)
    check_same_samples(layers, tensors, settings.dim)
    for tensor, each, shape in zip(tensors, priors, layers.shapes, strict=True):
        check_broadcast(each, shape, tensor.shape, settings.dim)
    parts = layers.parts(priors)
    current = _current(layers, tensors, one_for_each(mask, x, "mask"))
    batch = current if history is None else _among_past(current, history)
    group = resolve_group(settings.group)
    columns = None
    if group is None:
        _check_samples(current.values.shape[-1], current.counts, tensors, settings.dim)
    else:
        columns = Columns(batch, current, group)
        _check_samples(sum(columns.now), None, tensors, settings.dim)
        batch = columns.scattered(batch, current.counts)
        parts = [part.within(columns.own) for part in parts]
    options, weights = Options(settings.ties, settings.logits), reduction.weights(layers)
    if columns is None:
        loss = _loss_of_parts(statistic, parts, batch, options, weights)
    else:
        loss = weighted_sum(Collect.apply(_loss_of_parts(statistic, parts, batch, options), columns), weights)
    if history is not None:
        history.remember(current.values, current.counts)
    dtype = tensors[0].dtype
    loss = loss if loss.dtype == dtype else loss.to(dtype)
    if weights is None:
        return layers.split(loss.reshape(layers.shape))
    return loss + reduction.of_none if 0 in layers.sizes else loss


def _current(layers: Layers, tensors: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Batch:
    """The arrays of all tensors, in which masked values are infinite."""
    values = layers.join(tensors)
    if all(mask is None for mask in masks):
        return Batch(values)
    is_sample = layers.join(
        [
            torch.ones_like(tensor, dtype=torch.bool) if mask is None else mask_like(tensor, mask)
            for tensor, mask in zip(tensors, masks, strict=True)
        ]
    )
    return Batch(values.masked_fill(~is_sample, torch.inf), is_sample.sum(dim=-1))


def _among_past(current: Batch, history: History) -> Batch:
    """A batch together with those of the history, which only help to rank it."""
    values, count = history.join(current.values, current.counts)
    is_current = torch.arange(values.shape[-1], device=values.device) < current.values.shape[-1]
    return Batch(values, count, is_current)


def _loss_of_parts(
    statistic: Discrepancy, parts: Sequence[Part], batch: Batch, options: Options, weights: Weights = None
) -> Tensor:
    """The weighted sum of the losses.

    Without weights it is the loss of each array, in the shape of a single part, and in one dimension for
    several.
    """
    values, count, current = batch
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    # A rank without arrays takes part in the backward pass too, so one part stays even if it is empty.
    losses = []
    for prior, shape, place in [part for part in parts if part.shape.numel()] or parts[:1]:
        whole = values.shape[:-1] == shape
        of_part = Batch(
            values if whole else values[place].reshape(*shape, values.shape[-1]),
            count if count is None or whole else count[place].reshape(shape),
            current,
        )
        of_arrays = weights[place] if isinstance(weights, Tensor) else weights
        losses.append(loss_of_arrays(statistic, prior, of_part, options, of_arrays))
    if len(losses) == 1:
        return losses[0]
    if weights is None:
        return torch.cat([loss.reshape(-1) for loss in losses])
    return torch.stack(losses).sum()


def _check_samples(
    samples: int, count: Tensor | None, tensors: Sequence[Tensor], dim: int | Sequence[int] | None
) -> None:
    if samples == 0:
        raise ValueError(f"no samples along dim={dim} of {_shown(tensors)}")
    if count is not None and not known_to_hold(count > 0):
        raise ValueError(f"mask leaves an array without samples along dim={dim} of {_shown(tensors)}")


def _shown(tensors: Sequence[Tensor]) -> str:
    shapes = [str(tuple(tensor.shape)) for tensor in tensors]
    return f"x with {'shape' if len(shapes) == 1 else 'shapes'} {', '.join(shapes)}"
