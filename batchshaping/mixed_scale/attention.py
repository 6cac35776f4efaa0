r"""Attention among the tokens that are on, inside blocks that know nothing of it.

The blocks of a library run as they are. While they do, a torch function mode replaces what they call to
compute attention: ``F.scaled_dot_product_attention``, and ``F.multi_head_attention_forward``, in which
torch's own attention module hides it.

In training all tokens are there, and a gate of 0 or 1 multiplies the exponentials of each key in the softmax:

.. math::
    p_{ij} = \frac{m_j e^{s_{ij}}}{Z_i}, \qquad Z_i = \sum_k m_k e^{s_{ik}}, \qquad o_i = \sum_j p_{ij} v_j

The derivative in the gate of a key that is off is :math:`e^{s_{ij}} / Z_i \cdot (v_j - o_i)`. It has no upper
bound, since the keys that are off do not count in Z. What turning the key on would change is bounded:

.. math::
    o_i^{+j} - o_i = \frac{e^{s_{ij}}}{Z_i + e^{s_{ij}}} (v_j - o_i)

So this difference is what the backward pass hands to the gate of a key that is off. For a key that is on, the
derivative is bounded as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

__all__ = [
    "Attend",
    "AttentionReplaced",
    "AttentionSettings",
    "GatedAttention",
    "gated_softmax",
    "run_with_attention",
]


class AttentionSettings(TypedDict):
    """What attention depends on beside its operands, by the names of ``F.scaled_dot_product_attention``."""

    dropout_p: float
    scale: float | None
    """None for the usual one, the inverse root of the width."""


Attend = Callable[[Tensor, Tensor, Tensor, AttentionSettings], Tensor]
"""Attention as a function of queries, keys and values of shape (N, heads, tokens, width), and of settings."""


class _GatedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, gates: Tensor) -> Tensor:
        # In place where it can be, since the scores of all pairs of tokens are large. Relative to the largest
        # score of a key that is on; one that is off may have any, and from e^80 on its share is 1.
        share = scores.masked_fill(gates == 0, -math.inf).amax(dim=-1, keepdim=True)
        share = (scores - share).clamp_(max=80).exp_()
        total = (share * gates).sum(dim=-1, keepdim=True)
        share /= torch.addcmul(total, share, 1 - gates)
        ctx.save_for_backward(share, gates)
        return share * gates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        share, gates = ctx.saved_tensors
        effect = share * upstream
        mean = (effect * gates).sum(dim=-1, keepdim=True)
        effect.addcmul_(share, mean, value=-1)
        return effect * gates, effect.sum_to_size(gates.shape)


def gated_softmax(scores: Tensor, gates: Tensor) -> Tensor:
    r"""The softmax over the keys that are on, with a bounded gradient for the gates of those that are off.

    .. math::
        p_{ij} = \frac{m_j e^{s_{ij}}}{\sum_k m_k e^{s_{ik}}}

    The gradient of a gate of 1 is the derivative. That of a gate of 0 is the derivative times
    :math:`Z_i / (Z_i + e^{s_{ij}})`, which makes it the exact effect of turning the key on.

    Args:
        scores: of shape (..., queries, keys), any finite values.
        gates: exact zeros and ones of a shape that broadcasts, at least one of them 1 for each query.

    Returns:
        Weights that add up to 1 over the keys, at least in single precision. They can be differentiated once.

    Example:
        >>> scores, gates = torch.tensor([0.0, 0.0, 9.0]), torch.tensor([1.0, 1.0, 0.0])
        >>> gated_softmax(scores, gates.requires_grad_())
        tensor([0.5000, 0.5000, 0.0000], grad_fn=<_GatedSoftmaxBackward>)
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights: Tensor = _GatedSoftmax.apply(scores.to(dtype), gates.to(dtype))
    return weights


class GatedAttention(nn.Module):
    """Attention of all tokens to those that are on.

    Where the gates need a gradient, it is computed with :func:`gated_softmax`, and otherwise by PyTorch's own
    kernels with a boolean mask. It is a module of its own so that what it multiplies and adds, which is
    quadratic in the number of tokens, is counted apart from the rest of the block, which is linear.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, gates: Tensor, settings: AttentionSettings
    ) -> Tensor:
        """Of queries, keys and values of shape (N, heads, tokens, width), and gates of shape (N, tokens)."""
        gates = gates[:, None, None, :]
        if not (gates.requires_grad and torch.is_grad_enabled()):
            # Not a number counts as on, so that no query is left without a key.
            return F.scaled_dot_product_attention(query, key, value, attn_mask=gates != 0, **settings)
        scale = settings["scale"]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        weights = gated_softmax((query * scale) @ key.transpose(-2, -1), gates)
        weights = F.dropout(weights, settings["dropout_p"])
        return weights.to(value.dtype) @ value


class AttentionReplaced(TorchFunctionMode):
    """While it is active, attention is what a function computes.

    Args:
        attend: the function.

    Attributes:
        calls: how many times attention was replaced.
    """

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replacement = self._replacements.get(func)
        if replacement is None:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return replacement(self, *args, **(kwargs or {}))

    def _scaled_dot_product(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None or is_causal or enable_gqa:
            raise ValueError("attention must have no mask of its own here, received one")
        return self.attend(query, key, value, {"dropout_p": dropout_p, "scale": scale})

    def _multi_head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim: int,
        heads: int,
        in_weight: Tensor,
        in_bias: Tensor | None,
        *rest: Any,
        training: bool = True,
        **settings: Any,
    ) -> tuple[Tensor, None]:
        """Self-attention of shape (tokens, N, width), as ``torch.nn.MultiheadAttention`` asks for it."""
        *_, dropout, out_weight, out_bias = rest
        q, k, v = F.linear(query, in_weight, in_bias).unflatten(2, (3, heads, -1)).permute(2, 1, 3, 0, 4)
        attended = self.attend(q, k, v, {"dropout_p": dropout if training else 0.0, "scale": None})
        return F.linear(attended.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias), None

    _replacements: dict[Any, Callable[..., Any]] = {
        F.scaled_dot_product_attention: _scaled_dot_product,
        F.multi_head_attention_forward: _multi_head,
    }


def run_with_attention(block: nn.Module, tokens: Tensor, attend: Attend) -> Tensor:
    """Run a block of a ViT with another function in the place of its attention.

    Raises:
        RuntimeError: if the block computes its attention by other means than those that are replaced.
    """
    with AttentionReplaced(attend) as replaced:
        tokens = block(tokens)
    if replaced.calls == 0:
        raise RuntimeError(
            f"a block must compute its attention by F.scaled_dot_product_attention, received a "
            f"{type(block).__name__} that does not"
        )
    return tokens
