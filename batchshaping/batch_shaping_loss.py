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

import operator
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from batchshaping.cdf_beta import clip_density, to_front
from batchshaping.checks import check_values, is_index, known_to_hold
from batchshaping.derivatives import CDFDerivatives, LogCDFDerivatives, PreparedCDF
from batchshaping.distributed import Collect, Columns, Deal, Group, resolve_group
from batchshaping.memory import Memory
from batchshaping.prior_module import PriorModule
from batchshaping.priors import Beta, ClosedFormPrior, Normal, RelaxedBernoulli, SymBeta, check_parameters
from batchshaping.statistics import STATISTICS, ClosedFormStatistic, Statistic

__all__ = ["BatchShapingLoss", "GeneralizedBatchShapingLoss", "Prior", "batch_shaping", "gbas_loss"]

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "none": lambda loss: loss,
}


@torch.library.custom_op("batchshaping::loss_and_gradients", mutates_args=())
def _compiled_loss_and_gradients(
    x: Tensor,
    count: Tensor | None,
    current: Tensor | None,
    parameters: Sequence[Tensor],
    statistic: str,
    prior: str,
    ties: bool,
    logits: bool,
    needs_x: bool,
    needs_parameters: bool,
) -> list[Tensor]:
    """A statistic and its gradients as one opaque operation, for torch.compile.

    The statistic and the family of the prior are given by their keys.
    """
    method = ClosedFormStatistic.by_key(statistic).loss_and_gradients
    family = ClosedFormPrior.by_key[prior]
    return method(x, count, current, parameters, family, ties, logits, needs_x, needs_parameters)


@_compiled_loss_and_gradients.register_fake
def _(
    x: Tensor,
    count: Tensor | None,
    current: Tensor | None,
    parameters: Sequence[Tensor],
    statistic: str,
    prior: str,
    ties: bool,
    logits: bool,
    needs_x: bool,
    needs_parameters: bool,
) -> list[Tensor]:
    arrays = x.shape[:-1]
    by_parameter = [x.new_empty(arrays if needs_parameters else 0) for _ in parameters]
    return [x.new_empty(arrays), x.new_empty(x.shape if needs_x else 0), x.new_empty(arrays), *by_parameter]


def _loss_and_gradients(
    x: Tensor,
    count: Tensor | None,
    current: Tensor | None,
    statistic: ClosedFormStatistic,
    prior: type[ClosedFormPrior],
    flags: tuple[bool, bool, bool, bool],
    parameters: tuple[Tensor, ...],
) -> list[Tensor]:
    if torch.compiler.is_compiling():
        which = statistic.key, prior.key
        opaque: list[Tensor] = _compiled_loss_and_gradients(x, count, current, parameters, *which, *flags)
        return opaque
    return statistic.loss_and_gradients(x, count, current, parameters, prior, *flags)


class _ClosedFormLoss(torch.autograd.Function):
    """The loss of each array, with the gradients computed beside it in the forward pass.

    x has shape (..., N), the parameters and the count of samples broadcast with (...).
    """

    @staticmethod
    def forward(
        x: Tensor,
        count: Tensor | None,
        current: Tensor | None,
        statistic: ClosedFormStatistic,
        prior: type[ClosedFormPrior],
        flags: tuple[bool, bool, bool, bool],
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        return tuple(_loss_and_gradients(x, count, current, statistic, prior, flags, parameters))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        # The gradients stay differentiable outputs: deriving one of them leads to backward, which refuses.
        # A compiler derives all of them while tracing, and refuses second derivatives itself.
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():
            ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        ctx.parameter_shapes = [(p.shape, p.dtype) for p in inputs[6:]]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *others: Tensor | None) -> Any:
        if not torch.compiler.is_compiling() and any(other is not None for other in others):
            raise NotImplementedError("the batch-shaping loss is differentiable once, not twice")
        if gradient is None:
            return (None,) * (6 + len(ctx.parameter_shapes))
        by_x, factor, *by_parameter = ctx.saved_tensors
        needs_x, needs_parameters = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        scaled = gradient * factor
        gradient_x = scaled.unsqueeze(-1) * by_x if needs_x else None
        gradient_parameters = [
            (scaled * by).sum_to_size(shape).to(dtype) if needed else None
            for by, (shape, dtype), needed in zip(
                by_parameter, ctx.parameter_shapes, needs_parameters, strict=True
            )
        ]
        return gradient_x, None, None, None, None, None, *gradient_parameters

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, count: Tensor | None, *rest: Any) -> Any:
        current, statistic, prior, flags, *parameters = rest
        size, arrays = info.batch_size, x.ndim - 1 - (in_dims[0] is not None)

        x = x.expand(size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        count = count if count is None else to_front(count, in_dims[1], arrays)
        parameters = [to_front(p, d, arrays) for p, d in zip(parameters, in_dims[6:], strict=True)]
        outputs = _ClosedFormLoss.apply(x, count, current, statistic, prior, flags, *parameters)
        return outputs, tuple(0 for _ in outputs)


def _loss(
    statistic: Statistic,
    prior: Distribution,
    x: Tensor,
    count: Tensor | None,
    current: Tensor | None,
    ties: bool,
    logits: bool,
) -> Tensor:
    """The loss of each array, in closed form where there is one."""
    if (
        not isinstance(statistic, ClosedFormStatistic)
        or not isinstance(prior, ClosedFormPrior)
        or not (statistic.in_closed_form and prior.in_closed_form)
    ):
        return statistic.loss(x, count, current, ties, prior, logits)
    parameters = prior.parameters
    graph = torch.is_grad_enabled()
    # A tensor that vmap maps does not tell whether a transform outside of vmap differentiates in it.
    unknown = torch._C._are_functorch_transforms_active()
    needs_x = graph and (unknown or x.requires_grad)
    needs_parameters = graph and (unknown or any(p.requires_grad for p in parameters))
    flags = (ties, logits, needs_x, needs_parameters)
    family = type(prior)
    if torch.compiler.is_compiling() and not (needs_x or needs_parameters):
        # A compiler miscounts the operands of a function that needs no gradient.
        return _loss_and_gradients(x, count, current, statistic, family, flags, parameters)[0]
    outputs: tuple[Tensor, ...] = _ClosedFormLoss.apply(
        x, count, current, statistic, family, flags, *parameters
    )
    return outputs[0]


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
            :class:`~batchshaping.statistics.Statistic` of one's own.
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
        >>> gates = torch.tensor([[0.1, 0.9], [0.5, 0.8], [0.9, 0.7]])
        >>> batch_shaping(gates, Beta(0.6, 0.4), dim=0, reduction="none")
        tensor([0.0103, 0.0271])
    """
    return _batch_shaping(x, prior, dim, statistic, mask, ties, logits, reduction, group, None)


def _batch_shaping(
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
    _check_prior(prior)
    check_parameters(prior)
    chosen = _statistic(statistic)
    reduce = _reduction(reduction)
    check_values(x)
    dims = _canonical(dim, x.ndim)
    arrays = _samples_last(x, dims)
    shape = arrays.shape[:-1]
    _check_broadcast(prior, shape, x.shape, dim)
    count = None
    if mask is not None:
        mask = _samples_last(_like(x, mask), dims)
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
    loss = _loss(chosen, prior, working, count, current, ties, logits)
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


def _statistic(statistic: str | Statistic) -> Statistic:
    if isinstance(statistic, Statistic):
        return statistic
    if not isinstance(statistic, str) or statistic not in STATISTICS:
        known = ", ".join(map(repr, STATISTICS))
        raise ValueError(f"statistic must be one of {known} or a Statistic, received {statistic!r}")
    return STATISTICS[statistic]


def _reduction(reduction: str) -> Callable[[Tensor], Tensor]:
    if not isinstance(reduction, str) or reduction not in _REDUCTIONS:
        known = ", ".join(map(repr, _REDUCTIONS))
        raise ValueError(f"reduction must be one of {known}, received {reduction!r}")
    return _REDUCTIONS[reduction]


def _check_samples(
    samples: int, count: Tensor | None, dim: int | Sequence[int] | None, shape: torch.Size
) -> None:
    if samples == 0:
        raise ValueError(f"no samples along dim={dim} of x with shape {tuple(shape)}")
    if count is not None and not known_to_hold(count > 0):
        raise ValueError(
            f"mask leaves an array without samples along dim={dim} of x with shape {tuple(shape)}"
        )


def _check_prior(prior: object) -> None:
    known = "Beta, SymBeta, RelaxedBernoulli, Normal or any torch.distributions.Distribution with a cdf"
    if not isinstance(prior, Distribution):
        raise ValueError(f"prior must be {known}, received {prior!r}")
    if not _has_cdf(prior):
        raise ValueError(f"prior must be {known}, received {type(prior).__name__}, which has none")
    if prior.event_shape:
        raise ValueError(f"prior must be univariate, received event_shape {tuple(prior.event_shape)}")


def _has_cdf(prior: Distribution) -> bool:
    """Whether there is a CDF; that of a transformed distribution is made of the one of its base."""
    base = vars(prior).get("base_dist")
    return type(prior).cdf is not Distribution.cdf and (not isinstance(base, Distribution) or _has_cdf(base))


def _check_broadcast(
    prior: Distribution, arrays: torch.Size, shape: torch.Size, dim: int | Sequence[int] | None
) -> None:
    if not prior.batch_shape or prior.batch_shape == arrays:
        return  # what torch takes longer to find out
    try:
        matches = torch.broadcast_shapes(prior.batch_shape, arrays) == arrays
    except RuntimeError:
        matches = False
    if not matches:
        raise ValueError(
            f"prior's batch_shape {tuple(prior.batch_shape)} does not broadcast to {tuple(arrays)}, "
            f"what dim={dim} leaves of x with shape {tuple(shape)}"
        )


def _canonical(dim: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """The sample dimensions, counted from the front and in order."""
    named: Sequence[Any] = () if dim is None else (dim,)
    if not is_index(dim) and isinstance(dim, Iterable):
        named = tuple(dim)
    if not all(map(is_index, named)):
        raise TypeError(f"dim must be an int, a sequence of ints or None, received {dim!r}")
    dims = tuple(map(operator.index, named))
    if not dims:  # as in torch, none named means all
        return tuple(range(ndim))
    span = max(ndim, 1)
    for d in dims:
        if not -span <= d < span:
            raise IndexError(
                f"dim must be in [{-span}, {span - 1}] for x with {ndim} dimensions, received {d}"
            )
    found = sorted({d % span for d in dims})
    if len(found) != len(dims):
        raise ValueError(f"dim must name each dimension once, received {tuple(dims)}")
    return tuple(d for d in found if d < ndim)


def _samples_last(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Move the sample dimensions to the end and join them: (arrays..., N)."""
    kept = [d for d in range(x.ndim) if d not in dims]
    moved = x.permute((*kept, *dims))
    # The product, and not -1, since there may be no values at all.
    return moved.reshape(*moved.shape[: len(kept)], moved.shape[len(kept) :].numel())


def _like(x: Tensor, mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, received a {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, received {mask.dtype}")
    try:
        return mask.expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not broadcast to x with shape {tuple(x.shape)}"
        ) from None


class BatchShapingLoss(PriorModule):
    """The batch-shaping loss as a module; see :func:`batch_shaping` for the formula and the arguments.

    The module owns the prior: its tensors are buffers of the module, or parameters if they were made as
    ``nn.Parameter``, under the names of the prior's arguments. They move with the module, are in
    ``state_dict()``, and may be parametrized. Numbers have no state. Learned parameters start where they
    were and cannot leave their range; ``prior`` has their values. See
    :class:`~batchshaping.prior_module.PriorModule`.

    Args:
        prior: a distribution with a ``cdf``.
        dim: the dimension or dimensions that hold the samples; None takes all values as one array.
        statistic: name of the statistic, or one's own.
        ties: whether equal values share the largest of their ranks.
        logits: whether the values are logits.
        reduction: "mean", "sum" or "none".
        group: process group over which the batch extends, or "world".
        history: how many past batches to remember, for batches too small to tell how their values are
            distributed: the current samples are ranked among the remembered ones, and the loss is the mean
            over the current. The memory is filled in training only, by batches without a NaN, and kept in
            ``state_dict()``.

    Raises:
        ValueError: if the prior is not a distribution with a CDF, or the reduction or the statistic is
            unknown.
        TypeError: if the history is not a whole number.

    Example:
        >>> loss = BatchShapingLoss(Beta(nn.Parameter(torch.tensor(0.6)), 0.4), dim=0)
        >>> loss(torch.tensor([[0.1, 0.9], [0.5, 0.8], [0.9, 0.7]]))
        tensor(0.0187, grad_fn=<MeanBackward0>)
        >>> [name for name, _ in loss.named_parameters()]
        ['a']
    """

    def __init__(
        self,
        prior: Distribution,
        dim: int | Sequence[int] | None = None,
        *,
        statistic: str | Statistic = "cramer_von_mises",
        ties: bool = False,
        logits: bool = False,
        reduction: str = "mean",
        group: Group = None,
        history: int = 0,
    ) -> None:
        super().__init__()
        _check_prior(prior)
        _statistic(statistic)
        _reduction(reduction)
        if not is_index(history):
            raise TypeError(f"history must be a whole number of batches, received {history!r}")
        if history < 0:
            raise ValueError(f"history must be a number of batches, received {history}")
        self.memory = Memory(operator.index(history)) if history else None
        self.dim, self.statistic = dim, statistic
        self.ties, self.logits, self.reduction, self.group = ties, logits, reduction, group
        self.own(prior)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of x, over the values where the mask is True."""
        return _batch_shaping(
            x,
            self.prior,
            self.dim,
            self.statistic,
            mask,
            self.ties,
            self.logits,
            self.reduction,
            self.group,
            self.memory,
        )

    def extra_repr(self) -> str:
        return (
            f"{self._shown()}, dim={self.dim}, statistic={self.statistic!r}, ties={self.ties}, "
            f"logits={self.logits}, reduction={self.reduction!r}"
        )


class GeneralizedBatchShapingLoss(nn.Module):
    r"""The generalized batch-shaping loss: every array has a learned prior, and the priors have one too.

    .. math::
        L = \frac{1}{T} \sum_{k=1}^T L(x^k; \mu_k, \tau_k) + w_h L(\{\mu_1 \dots \mu_T\}; \psi)
            + w_\tau \frac{1}{T} \sum_{k=1}^T \tau_k

    The prior of array k is a Relaxed Bernoulli of mean :math:`\mu_k` and temperature :math:`\tau_k`, both the
    sigmoid of a parameter of this module. The means as a set are shaped to the hyperprior, so that arrays may
    differ while their average is set; the temperatures are kept low by an L1 penalty.

    After a forward pass ``prior_loss``, ``hyperprior_loss`` and ``temperature_penalty`` hold its three terms,
    weights included, detached for logging.

    Args:
        shape: shape of the arrays, what is left of x without ``dim``; an int is one dimension.
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
        statistic: str | Statistic = "cramer_von_mises",
        hyperprior_statistic: str | Statistic = "cramer_von_mises",
        ties: bool = False,
        logits: bool = False,
        group: Group = None,
    ) -> None:
        super().__init__()
        hyperprior = Beta(3, 7) if hyperprior is None else hyperprior
        _statistic(statistic)
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
        return self.mean_shaping.prior

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The total loss of x, over the values where the mask is True."""
        check_values(x)
        left = tuple(s for d, s in enumerate(x.shape) if d not in _canonical(self.dim, x.ndim))
        if left != tuple(self.mean_logits.shape):
            raise ValueError(
                f"dim={self.dim} of x with shape {tuple(x.shape)} leaves {left}, "
                f"but the learned priors have shape {tuple(self.mean_logits.shape)}"
            )
        prior_loss = batch_shaping(
            x,
            self.prior,
            self.dim,
            statistic=self.statistic,
            mask=mask,
            ties=self.ties,
            logits=self.logits,
            group=self.group,
        )
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
