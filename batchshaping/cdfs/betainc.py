"""The regularized incomplete beta function, differentiable in everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchshaping.cdfs.beta import beta_cdf, beta_cdf_parts, beta_pdf
from batchshaping.cdfs.elementwise import as_operands, elementwise_vmap, sum_to

__all__ = ["betainc"]


class _ParameterGradients(torch.autograd.Function):
    """The derivatives of I_x(a, b) in a and b; themselves differentiable in nothing."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        derivatives = beta_cdf_parts(a, b, x, gradients=True)
        assert derivatives.a is not None and derivatives.b is not None
        return derivatives.a, derivatives.b

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError(
            "betainc is differentiable once in a and b, twice in x; received a second derivative in a or b"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        return elementwise_vmap(_ParameterGradients.apply, in_dims, *tensors), (0, 0)


class _BetaInc(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return beta_cdf(a, b, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        a, b, x = ctx.saved_tensors
        needs_a, needs_b, needs_x = ctx.needs_input_grad
        needs_parameters = needs_a or needs_b
        pdf: Any
        cdf_a: Any
        cdf_b: Any
        if torch.is_grad_enabled():
            pdf = beta_pdf(a, b, x) if needs_x else None
            cdf_a, cdf_b = _ParameterGradients.apply(a, b, x) if needs_parameters else (None, None)
        else:
            at = beta_cdf_parts(a, b, x, needs_parameters)
            pdf, cdf_a, cdf_b = at.pdf, at.a, at.b
        return (
            sum_to(gradient * cdf_a, a) if needs_a else None,
            sum_to(gradient * cdf_b, b) if needs_b else None,
            sum_to(gradient * pdf, x) if needs_x else None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        return elementwise_vmap(_BetaInc.apply, in_dims, *tensors), 0


def betainc(a: Tensor | float, b: Tensor | float, x: Tensor | float) -> Tensor:
    r"""The regularized incomplete beta function, the CDF of Beta(a, b) at x.

    .. math::
        I_x(a, b) = \frac{1}{B(a, b)} \int_0^x t^{a - 1} (1 - t)^{b - 1} \, dt

    Exact derivatives in a and b (once) and in x (any number of times); works under ``torch.func.vmap`` and
    ``torch.func.grad``. For a and b in [0.01, 1000] the absolute error is below 1e-12 in float64 and 5e-7
    in float32; the derivatives in a and b are good to 1e-8 in float64.

    Args:
        a: first concentration, positive, of any shape.
        b: second concentration, positive, of a shape that broadcasts with a's.
        x: where to evaluate, of a shape that broadcasts with theirs; 0 is returned below 0, 1 above 1,
            NaN at NaN or where a or b is not positive.

    Returns:
        A tensor of the broadcast shape, in the widest dtype among the given tensors.

    Raises:
        TypeError: if an operand is an integer tensor.
        ValueError: if the shapes do not broadcast.

    References:
        DLMF, section 8.17, https://dlmf.nist.gov/8.17.
        Didonato and Morris, Significant digit computation of the incomplete beta function ratios, 1992.
        Boik and Robison-Cox, Derivatives of the incomplete beta function, 1998.

    Example:
        >>> a = torch.tensor(2.0, requires_grad=True)
        >>> betainc(a, 6.0, torch.tensor([0.1, 0.25, 0.9]))
        tensor([0.1497, 0.5551, 1.0000], grad_fn=<_BetaIncBackward>)
    """
    result: Tensor = _BetaInc.apply(*as_operands(a=a, b=b, x=x))
    return result
