"""The loss of sorted arrays as one autograd function, whose forward pass computes the gradients too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.cdfs.elementwise import to_front
from batchshaping.priors.closed_form import ClosedFormPrior
from batchshaping.statistics.samples import Batch, Options
from batchshaping.statistics.statistic import ClosedForm, Discrepancy, Needs

__all__ = ["Weights", "loss_of_arrays", "weighted_sum"]

Weights = float | Tensor | None
"""What the losses of the arrays are multiplied by before they are added up: a number, or one for each array.
None if they are not added up."""


def weighted_sum(losses: Tensor, weights: Weights) -> Tensor:
    """The sum of the losses of arrays with these weights, or without them the losses as they are."""
    if weights is None:
        return losses
    if isinstance(weights, Tensor):
        return losses.reshape(-1) @ weights.to(losses)
    return losses.sum() * weights


class _Task(NamedTuple):
    """What is to be computed of a batch."""

    statistic: ClosedForm
    prior: type[ClosedFormPrior]
    options: Options
    needs: Needs
    weights: Weights = None

    def run(self, batch: Batch, parameters: Sequence[Tensor]) -> list[Any]:
        """The weighted losses and their gradients, as :meth:`ClosedForm.loss_and_gradients` returns them."""
        losses, gradient, factor, *in_parameters = self._of_arrays(batch, parameters)
        weights = self.weights
        if weights is not None:
            factor = factor * (weights.to(losses).view_as(losses) if isinstance(weights, Tensor) else weights)
        return [weighted_sum(losses, weights), gradient, factor, *in_parameters]

    def run_to_tensors(self, batch: Batch, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The same as contiguous tensors, with a factor for each loss where there is one for all."""
        losses, gradient, factor, *in_parameters = self.run(batch, parameters)
        factor = factor if isinstance(factor, Tensor) else torch.full_like(losses, factor)
        return [losses, gradient.contiguous(), factor, *in_parameters]

    def _of_arrays(self, batch: Batch, parameters: Sequence[Tensor]) -> list[Any]:
        if torch.compiler.is_compiling():
            flags = [*self.options, *self.needs]
            opaque: list[Tensor] = _compiled(
                list(batch), parameters, self.statistic.key, self.prior.key, flags
            )
            return opaque
        return self.statistic.loss_and_gradients(batch, self.prior, parameters, self.options, self.needs)


@torch.library.custom_op("batchshaping::loss_and_gradients", mutates_args=())
def _compiled(
    batch: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    statistic: str,
    prior: str,
    flags: Sequence[bool],
) -> list[Tensor]:
    """A task as one opaque operation for torch.compile, with statistic and prior given by their keys."""
    ties, logits, *needs = flags
    task = _Task(
        ClosedForm.by_key(statistic), ClosedFormPrior.by_key[prior], Options(ties, logits), Needs(*needs)
    )
    return task.run_to_tensors(Batch(*batch), parameters)  # type: ignore[arg-type]


@_compiled.register_fake
def _(batch: Any, parameters: Any, statistic: Any, prior: Any, flags: Any) -> list[Tensor]:
    x, needs = batch[0], Needs(*flags[2:])
    arrays = x.shape[:-1]
    in_parameters = [x.new_empty(arrays) for _ in parameters] if needs.parameters else []
    gradient = x.new_empty(x.shape if needs.values else 0)
    return [x.new_empty(arrays), gradient, x.new_empty(arrays), *in_parameters]


class _ClosedFormLoss(torch.autograd.Function):
    """The losses of arrays, or their weighted sum, with the gradients computed beside in the forward pass.

    The values have shape (..., N), the parameters and the count of samples broadcast with (...).
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        count: Tensor | None,
        current: Tensor | None,
        task: _Task,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        loss, gradient, factor, *in_parameters = task.run(Batch(values, count, current), parameters)
        _keep(ctx, parameters, gradient, factor, *in_parameters)
        return loss, gradient, *in_parameters

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *others: Tensor | None) -> Any:
        if not torch.compiler.is_compiling() and any(other is not None for other in others):
            raise NotImplementedError("the batch-shaping loss is differentiable once, not twice")
        if gradient is None:
            return (None,) * (4 + len(ctx.parameter_shapes))
        in_values, *in_parameters = ctx.saved_tensors
        scaled = gradient * (in_parameters.pop() if ctx.factor is None else ctx.factor)
        by_array = scaled.unsqueeze(-1) if scaled.ndim else scaled
        gradient_values = by_array * in_values if ctx.needs_input_grad[0] else None
        gradients: list[Tensor | None] = [None] * len(ctx.parameter_shapes)
        for k, by in enumerate(in_parameters):
            if ctx.needs_input_grad[4 + k]:
                shape, dtype = ctx.parameter_shapes[k]
                gradients[k] = (scaled * by).sum_to_size(shape).to(dtype)
        return gradient_values, None, None, None, *gradients


class _TransformedLoss(_ClosedFormLoss):
    """The same for torch.compile and torch.func, which need a forward pass without the context.

    Without them it is avoided, because torch reads the signature of such a forward pass at each call, which
    takes longer than the sort of a small batch.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        values: Tensor, count: Tensor | None, current: Tensor | None, task: _Task, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(task.run_to_tensors(Batch(values, count, current), parameters))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        _keep(ctx, inputs[4:], *output[1:])

    @staticmethod
    def vmap(info: Any, in_dims: Any, values: Tensor, count: Tensor | None, *rest: Any) -> Any:
        current, task, *parameters = rest
        size, arrays = info.batch_size, values.ndim - 1 - (in_dims[0] is not None)
        values = values.expand(size, *values.shape) if in_dims[0] is None else values.movedim(in_dims[0], 0)
        count = count if count is None else to_front(count, in_dims[1], arrays)
        parameters = [to_front(p, d, arrays) for p, d in zip(parameters, in_dims[4:], strict=True)]
        outputs = _TransformedLoss.apply(values, count, current, task, *parameters)
        return outputs, tuple(0 for _ in outputs)


def _keep(
    ctx: Any, parameters: Sequence[Tensor], gradient: Tensor, factor: Tensor | float, *in_parameters: Tensor
) -> None:
    """Save the gradients for the backward pass, and last their factor unless it is a number."""
    # The gradients stay differentiable outputs: deriving one of them leads to backward, which refuses.
    # A compiler derives all of them while tracing, and refuses second derivatives itself.
    ctx.set_materialize_grads(False)
    if torch.compiler.is_compiling():
        ctx.mark_non_differentiable(gradient, factor, *in_parameters)
    is_number = not isinstance(factor, Tensor)
    ctx.factor = factor if is_number else None
    ctx.save_for_backward(gradient, *in_parameters, *(() if is_number else (factor,)))
    ctx.parameter_shapes = [(p.shape, p.dtype) for p in parameters]


def loss_of_arrays(
    statistic: Discrepancy, prior: Distribution, batch: Batch, options: Options, weights: Weights = None
) -> Tensor:
    """The loss of each array, or the weighted sum, in closed form where there is one.

    With the sum in the function that computes the losses, a small batch is derived in less time.
    """
    if (
        not isinstance(statistic, ClosedForm)
        or not isinstance(prior, ClosedFormPrior)
        or not (statistic.in_closed_form and prior.in_closed_form)
    ):
        return weighted_sum(statistic.loss(batch, prior, options), weights)
    parameters = prior.parameters
    graph = torch.is_grad_enabled()
    # A tensor that vmap maps does not tell whether a transform outside of vmap differentiates in it.
    transformed = torch._C._are_functorch_transforms_active()
    needs = Needs(
        graph and (transformed or batch.values.requires_grad),
        graph and (transformed or any(p.requires_grad for p in parameters)),
    )
    task = _Task(statistic, type(prior), options, needs)
    compiling = torch.compiler.is_compiling()
    if not any(needs) and (compiling or not transformed):
        # A compiler miscounts the operands of a function that needs no gradient.
        return weighted_sum(task.run(batch, parameters)[0], weights)
    if compiling or transformed:  # where vmap may add arrays that belong to another sum
        return weighted_sum(_TransformedLoss.apply(*batch, task, *parameters)[0], weights)
    found: Tensor = _ClosedFormLoss.apply(*batch, task._replace(weights=weights), *parameters)[0]
    return found
