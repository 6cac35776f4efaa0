"""The softmax over keys that are on, and what its gradient hands to gates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from batchshaping.mixed_scale.attention import (
    AttentionReplaced,
    GatedAttention,
    gated_softmax,
    run_with_attention,
)


def drawn(seed: int, scale: float, shape: tuple[int, ...] = (2, 3, 5, 7)) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, gates of which the first is on, and weights of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    gates = (torch.rand(shape[0], 1, 1, shape[-1], generator=generator) < 0.5).double()
    gates[..., 0] = 1
    return scores, gates, torch.randn(shape, generator=generator, dtype=torch.float64)


@given(st.integers(0, 10**6), st.floats(0, 300))
def test_weights_are_the_softmax_of_what_is_on_whatever_the_scores(seed: int, scale: float) -> None:
    scores, gates, _ = drawn(seed, scale)
    expected = torch.softmax(scores.masked_fill(gates == 0, -torch.inf), dim=-1)
    torch.testing.assert_close(gated_softmax(scores, gates), expected, atol=1e-12, rtol=1e-9)


@given(st.integers(0, 10**6), st.floats(0, 300))
def test_the_gradient_of_scores_is_the_derivative(seed: int, scale: float) -> None:
    scores, gates, weights = drawn(seed, scale)
    found, expected = (scores.clone().requires_grad_() for _ in range(2))
    (gated_softmax(found, gates) * weights).sum().backward()
    (torch.softmax(expected.masked_fill(gates == 0, -torch.inf), dim=-1) * weights).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, atol=1e-12, rtol=1e-7)


@given(st.integers(0, 10**6), st.floats(0, 50))
def test_the_gradient_of_a_gate_that_is_off_is_what_turning_the_key_on_changes(
    seed: int, scale: float
) -> None:
    scores, gates, values = drawn(seed, scale)
    gates.requires_grad_()

    def out(gates: Tensor) -> Tensor:
        """A sum over keys, as of values: what turning one on changes is linear in the output."""
        return (gated_softmax(scores, gates) * values).sum(dim=(1, 2, 3))

    out(gates).sum().backward()
    assert gates.grad is not None
    for key in range(gates.shape[-1]):
        on = gates.detach().clone()
        on[..., key] = 1
        change = out(on) - out(gates.detach())
        off = gates[:, 0, 0, key] == 0
        torch.testing.assert_close(gates.grad[:, 0, 0, key][off], change[off], atol=1e-9, rtol=1e-6)


def test_the_gradient_of_a_gate_that_is_on_is_the_derivative() -> None:
    scores, gates, values = drawn(1, 2.0)

    def plain(gates: Tensor) -> Tensor:
        e = scores.exp() * gates
        return ((e / e.sum(dim=-1, keepdim=True)) * values).sum()

    found, expected = gates.clone().requires_grad_(), gates.clone().requires_grad_()
    (gated_softmax(scores, found) * values).sum().backward()
    plain(expected).backward()
    on = gates == 1
    torch.testing.assert_close(found.grad[on], expected.grad[on])  # type: ignore[index]


@given(st.integers(0, 10**6), st.floats(0, 1e4))
def test_the_gradient_of_gates_is_bounded(seed: int, scale: float) -> None:
    scores, gates, values = drawn(seed, scale)
    gates.requires_grad_()
    (gated_softmax(scores, gates) * values).sum().backward()
    # A share of at most 1 of the difference of two values, for each query of each head.
    assert gates.grad is not None
    assert gates.grad.abs().max() <= 3 * 5 * (values.max() - values.min()) + 1e-9


def test_not_a_number_is_not_lost() -> None:
    scores, gates, _ = drawn(0, 1.0)
    gates[0, ..., 1] = torch.nan
    assert gated_softmax(scores, gates)[0].isnan().any() and not gated_softmax(scores, gates)[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_both_ways_to_compute_attention_agree(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 7, 4, dtype=dtype) for _ in range(3))
    gates = (torch.rand(2, 7) < 0.6).to(dtype)
    gates[:, 0] = 1
    attention = GatedAttention()
    for scale in (None, 0.3):
        settings = {"dropout_p": 0.0, "scale": scale}
        fused = attention(query, key, value, gates, settings)
        own = attention(query, key, value, gates.clone().requires_grad_(), settings)
        assert own.dtype == dtype and own.requires_grad and not fused.requires_grad
        torch.testing.assert_close(
            own, fused, atol=10 * torch.finfo(dtype).eps, rtol=10 * torch.finfo(dtype).eps
        )


def test_dropout_leaves_out_weights_and_keeps_their_mean() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 4, 3) for _ in range(3))
    gates = torch.ones(1, 4, requires_grad=True)
    attention = GatedAttention()
    without = attention(query, key, value, gates, {"dropout_p": 0.0, "scale": None})
    query, key, value = (x.expand(4000, -1, -1, -1) for x in (query, key, value))
    dropped = attention(query, key, value, gates.expand(4000, 4), {"dropout_p": 0.4, "scale": None})
    assert dropped.std(dim=0).min() > 0.05
    torch.testing.assert_close(dropped.mean(dim=0), without[0], atol=0.1, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_the_attention_within_torchs_module_is_replaced_too(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 3, batch_first=True, bias=bias)
    tokens = torch.randn(2, 5, 12)
    expected, _ = layer(tokens, tokens, tokens, need_weights=False)
    with AttentionReplaced(
        lambda q, k, v, settings: F.scaled_dot_product_attention(q, k, v, **settings)
    ) as mode:
        found, _ = layer(tokens, tokens, tokens, need_weights=False)
        # What is computed in its place is not replaced once more.
        assert mode.calls == 1
    torch.testing.assert_close(found, expected)
    layer(tokens, tokens, tokens, need_weights=False)
    assert mode.calls == 1


def test_a_block_that_attends_by_other_means_is_refused() -> None:
    with pytest.raises(RuntimeError, match="received a Linear that does not"):
        run_with_attention(nn.Linear(3, 3), torch.randn(1, 2, 3), lambda q, k, v, settings: q)
