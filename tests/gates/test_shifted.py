"""Gates whose threshold is shifted."""

from __future__ import annotations

import copy
import itertools
import math
from contextlib import ExitStack

import pytest
import torch
from gated_networks import Network, images, same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import batchshaping as bs
from batchshaping.gates.forced import gates_forced
from batchshaping.gates.gate import Gate, gate_decisions, gate_probabilities
from batchshaping.gates.shifted import gates_shifted


class Given(Gate):
    """A gate whose logits are its input."""

    def forward(self, logits: Tensor) -> Tensor:
        return self.decide(logits)


def decided(network: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        network(x)
    return gate_decisions(network)


numbers = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False) | st.sampled_from(
    [0.0, -0.0, math.inf, -math.inf]
)


@given(st.lists(numbers.filter(math.isfinite), min_size=1), numbers)
def test_a_gate_is_open_iff_its_logit_is_above_the_shift(values: list[float], shift: float) -> None:
    gate, logits = Given().eval(), torch.tensor([values])
    with gates_shifted(gate, shift):
        assert torch.equal(gate(logits), (logits > shift).float())
        assert torch.equal(gate.decisions, (logits > shift).float())
    assert torch.equal(gate.probabilities, torch.sigmoid(logits))
    assert torch.equal(gate(logits), (logits > 0).float())


def test_a_lower_shift_opens_more_of_a_layer_and_closes_none() -> None:
    gate, x = bs.ChannelGate(3, 50).eval(), images()
    layers = []
    for shift in (-math.inf, *torch.linspace(-1, 1, 21).tolist(), math.inf):
        with gates_shifted(gate, shift):
            layers.append(gate(x).bool())
    assert layers[0].all() and not layers[-1].any()
    assert all(bool((more | ~fewer).all()) for more, fewer in itertools.pairwise(layers))


def test_not_a_number_stays_visible() -> None:
    gate = Given().eval()
    with gates_shifted(gate, 1.0):
        assert gate(torch.tensor([[math.nan]])).isnan().all()


def test_shifts_can_be_nested_with_each_other_and_with_forced_gates() -> None:
    network, x = Network().eval(), images()
    own = decided(network, x)
    with gates_shifted(network, -0.3):
        outer = decided(network, x)
        with gates_shifted(network, 0.3):
            inner = decided(network, x)
            with gates_forced(network, 1.0):
                assert all(d.all() for d in decided(network, x))
            assert same(decided(network, x), inner)
        assert same(decided(network, x), outer)
        with gates_shifted(network.inner, math.inf):
            first, second = decided(network, x)
            assert torch.equal(first, outer[0]) and not second.any()
    assert same(decided(network, x), own) and not same(inner, outer)


def test_shifts_may_end_in_another_order_than_they_began_and_after_an_error() -> None:
    network, x = Network().eval(), images()
    own = decided(network, x)
    first, second = ExitStack(), ExitStack()
    first.enter_context(gates_shifted(network, -math.inf))
    second.enter_context(gates_shifted(network, math.inf))
    first.close()
    assert not any(d.any() for d in decided(network, x))
    second.close()
    with pytest.raises(KeyError), gates_shifted(network, math.inf):
        raise KeyError
    assert same(decided(network, x), own)


def test_nothing_of_a_shift_is_saved_or_copied() -> None:
    network, x = Network().eval(), images()
    own, state = decided(network, x), set(network.state_dict())
    with gates_shifted(network, math.inf):
        assert set(network.state_dict()) == state
        copied = copy.deepcopy(network)
    assert same(decided(copied, x), own)


def test_a_shift_in_evaluation_keeps_the_gradient_of_the_logits() -> None:
    network, x = Network().eval(), images()
    with gates_shifted(network, 0.5):
        network(x).square().sum().backward()
        gradients = [p.grad for p in network.first_gate.parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert all(p.requires_grad for p in gate_probabilities(network))


def test_a_compiled_network_has_the_shifts_of_the_network() -> None:
    torch.compiler.reset()
    network, x = Network().eval(), images()
    compiled = torch.compile(network, backend="aot_eager")
    with torch.no_grad():
        own = compiled(x)
        for shift in (-math.inf, 0.4, math.inf):
            with gates_shifted(network, shift):
                torch.testing.assert_close(compiled(x), network(x))
        torch.testing.assert_close(compiled(x), own)


@pytest.mark.parametrize(
    ("model", "shift", "message"),
    [
        (Network(), math.nan, "shift must be a number, received nan"),
        (nn.Linear(2, 3), 0.0, "at least one Gate, received a Linear"),
    ],
)
def test_what_cannot_be_shifted_is_refused(model: nn.Module, shift: float, message: str) -> None:
    with pytest.raises(ValueError, match=message), gates_shifted(model, shift):
        pass
