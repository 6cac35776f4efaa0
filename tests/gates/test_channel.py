"""The gate of channels: its formula, what it reads, and what it refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from gated_networks import (
    images,
    seeds,
)
from hypothesis import given
from hypothesis import strategies as st

from batchshaping.gates.channel import ChannelGate

# The channel gate


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 6, 5), (4, 3, 2, 6, 5)])
def test_gates_multiply_features_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    gates = ChannelGate(3, 7)(torch.randn(shape))
    assert gates.shape == (4, 7, *[1] * (len(shape) - 2))


def test_feature_maps_are_read_as_their_means() -> None:
    gate = ChannelGate(3, 7).eval()
    x = images()
    assert torch.equal(gate(x).flatten(1), gate(x.mean(dim=(2, 3))))


def test_the_logits_are_those_of_the_formula() -> None:
    gate = ChannelGate(3, 7, hidden=4)
    x = images().double()
    gate.double().train()(x)
    first, norm, _, last = gate.to_logits
    z = x.numpy().mean(axis=(2, 3)) @ first.weight.detach().numpy().T
    z = (z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + norm.eps)
    logits = np.maximum(z, 0) @ last.weight.detach().numpy().T + last.bias.detach().numpy()
    np.testing.assert_allclose(
        gate.probabilities.detach().numpy(), 1 / (1 + np.exp(-logits)), rtol=1e-12, atol=0
    )


def test_in_evaluation_a_gate_is_open_iff_its_probability_is_above_one_half() -> None:
    gate = ChannelGate(3, 7).eval()
    gates = gate(images())
    assert torch.equal(gates.flatten(1).bool(), gate.probabilities > 0.5)
    assert 0 < gates.mean() < 1


@given(bias=st.floats(-10, 10), seed=seeds)
def test_the_bias_is_added_to_every_logit_and_changes_nothing_else(bias: float, seed: int) -> None:
    logits = []
    for added in (0.0, bias):
        torch.manual_seed(seed)
        gate, x = ChannelGate(3, 7, bias=added).eval(), images(8)
        gate(x)
        logits.append(gate.probabilities.double().logit())
    torch.testing.assert_close(logits[1] - logits[0], torch.full_like(logits[0], bias), rtol=0, atol=2e-3)


def test_a_high_bias_opens_all_gates_and_a_low_one_closes_them() -> None:
    assert ChannelGate(3, 7, bias=50.0)(images()).mean() == 1
    assert ChannelGate(3, 7, bias=-50.0)(images()).mean() == 0


@pytest.mark.parametrize("shape", [(3,), (4, 5), (4, 5, 3)])
def test_another_number_of_channels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(N, 3, \.\.\.\), received \("):
        ChannelGate(3, 7)(torch.randn(shape))


@pytest.mark.parametrize("examples", [0, 1])
def test_a_gate_in_training_says_that_it_needs_two_examples(examples: int) -> None:
    gate = ChannelGate(3, 4)
    with pytest.raises(ValueError, match=f"needs at least 2 examples, received {examples}"):
        gate(torch.randn(examples, 3))
    assert gate.eval()(torch.randn(examples, 3)).shape == (examples, 4)
    assert gate.decisions.shape == gate.probabilities.shape == (examples, 4)
    gate.train()
    gate.to_logits[1].eval()  # frozen, it needs no batch
    assert gate(torch.randn(examples, 3)).shape == (examples, 4)


@pytest.mark.parametrize("value", [0, -1, 2.5, 16.0, True, "a", None])
@pytest.mark.parametrize("name", ["in_channels", "out_channels", "hidden"])
def test_a_width_that_is_none_is_refused_in_one_line(name: str, value: object) -> None:
    settings = {"in_channels": 3, "out_channels": 4, name: value}
    with pytest.raises(ValueError, match=f"^{name} must be an integer, at least 1, received {value!r}$"):
        ChannelGate(**settings)
    assert isinstance(ChannelGate(**{**settings, name: np.int64(5)}), ChannelGate)


@pytest.mark.parametrize("bias", [float("nan"), float("inf"), -float("inf")])
def test_a_bias_that_is_not_finite_is_refused_in_one_line(bias: float) -> None:
    with pytest.raises(ValueError, match=f"^bias must be finite, received {bias}$"):
        ChannelGate(3, 4, bias=bias)


# A gate for several channels


@given(channels=st.integers(1, 40), gates=st.integers(1, 40), seed=seeds)
def test_neighbouring_channels_share_a_gate_as_evenly_as_can_be(channels: int, gates: int, seed: int) -> None:
    torch.manual_seed(seed)
    gates = min(gates, channels)
    gate, x = ChannelGate(3, channels, gates=gates).eval(), images(4)
    mask, decisions = gate(x), gate.decisions
    assert mask.shape == (4, channels, 1, 1) and decisions.shape == (4, gates)
    assert gate.probabilities.shape == (4, gates)
    parts = np.array_split(np.arange(channels), gates)
    for part, decision in zip(parts, decisions.unbind(dim=1), strict=True):
        assert torch.equal(mask[:, part, 0, 0], decision[:, None].expand(-1, len(part)))
    assert gate.sizes == (None if gates == channels else tuple(len(part) for part in parts))


def test_the_gradient_of_a_gate_is_the_sum_of_those_of_its_channels() -> None:
    gate, x, weight = ChannelGate(3, 7, gates=3), images(), torch.randn(7)
    other = copy.deepcopy(gate)
    torch.manual_seed(1)
    (gate(x).flatten(1) * weight).sum().backward()
    torch.manual_seed(1)
    decisions = other.decide(other.to_logits(x.mean(dim=(2, 3))))
    (decisions * torch.stack([weight[:3].sum(), weight[3:5].sum(), weight[5:].sum()])).sum().backward()
    for p, expected in zip(gate.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad)


@pytest.mark.parametrize("gates", [0, -1, 2.5, True, 8])
def test_a_number_of_gates_that_is_none_is_refused_in_one_line(gates: object) -> None:
    with pytest.raises(ValueError, match=rf"^gates must be [^\n]*, received {gates}$"):
        ChannelGate(3, 7, gates=gates)
