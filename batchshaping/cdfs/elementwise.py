"""Functions of several tensors that broadcast: their operands, their gradients, and vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["as_operands", "elementwise_vmap", "sum_to", "to_front"]


def sum_to(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient in the shape and dtype of the operand that was broadcast."""
    return gradient.sum_to_size(like.shape).to(like.dtype)


def to_front(tensor: Tensor, dim: int | None, ndim: int) -> Tensor:
    """Bring the dimension that vmap maps to the front, before ``ndim`` others; None changes nothing."""
    if dim is None:
        return tensor
    tensor = tensor.movedim(dim, 0)
    padding = [1] * (ndim - tensor.ndim + 1)
    return tensor.reshape(tensor.shape[0], *padding, *tensor.shape[1:])


def elementwise_vmap(function: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> Any:
    """Vmap of an elementwise function: bring the mapped dimension to the front of every operand."""
    mapped = [d is not None for d in in_dims]
    rank = max(t.ndim - m for t, m in zip(tensors, mapped, strict=True))
    return function(*(to_front(t, d, rank) for t, d in zip(tensors, in_dims, strict=True)))


def as_operands(**given: Tensor | float) -> list[Tensor]:
    """The operands as tensors that broadcast, the last of them in the dtype of the result."""
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, received {tensor.dtype}")
    # As everywhere in torch, a number or a tensor without dimensions does not widen the result.
    deciding = [t for t in tensors.values() if t.ndim] or list(tensors.values())
    dtype = deciding[0].dtype if deciding else torch.get_default_dtype()
    for tensor in deciding:
        dtype = torch.promote_types(dtype, tensor.dtype)
    device = deciding[0].device if deciding else None
    operands = [
        value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device=device)
        for value in given.values()
    ]
    operands[-1] = operands[-1].to(dtype)
    try:
        torch.broadcast_shapes(*(t.shape for t in operands))
    except RuntimeError:
        shapes = ", ".join(f"{k} {tuple(t.shape)}" for k, t in zip(given, operands, strict=True))
        raise ValueError(f"shapes must broadcast, received {shapes}") from None
    return operands
