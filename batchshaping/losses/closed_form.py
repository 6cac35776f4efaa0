"""The loss of sorted arrays as one autograd function, whose forward pass computes the gradients too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.cdfs.elementwise import to_front
from batchshaping.priors.closed_form import ClosedFormPrior
from batchshaping.statistics.statistic import ClosedFormStatistic, Statistic

__all__ = ["loss_of_arrays"]


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


def loss_of_arrays(
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
