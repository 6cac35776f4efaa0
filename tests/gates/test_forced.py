"""Gates that chance decides for."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from gated_networks import (
    Checkpointed,
    Network,
    gradients,
    images,
    same,
    shaping,
)
from torch import Tensor, nn

from batchshaping.gates.forced import gates_forced
from batchshaping.gates.gate import gate_decisions, gate_probabilities, named_gates

# Gates that chance decides for


def forced_decisions(
    network: nn.Module, share: float, seed: int = 0, n: int = 32, batches: int = 1
) -> list[Tensor]:
    """Of all batches, one tensor a gate module."""
    with gates_forced(network, share, seed):
        found = []
        for _ in range(batches):
            network(images(n))
            found.append(gate_decisions(network))
    return [torch.cat(layer) for layer in zip(*found, strict=True)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_gates_can_be_closed_or_opened(share: float, training: bool) -> None:
    network = Network().train(training)
    assert all((d == share).all() for d in forced_decisions(network, share))


@pytest.mark.parametrize("share", [0.05, 0.5, 0.8])
def test_a_share_is_the_probability_of_each_gate_for_each_example(share: float) -> None:
    n = 20_000
    decisions = torch.cat(forced_decisions(Network().eval(), share, n=n), dim=1).double()
    within = 5 * (share * (1 - share) / n) ** 0.5
    assert bool(((decisions.mean(dim=0) - share).abs() < within).all())
    # One gate says nothing about another.
    correlation = decisions.T.corrcoef() - torch.eye(decisions.shape[1])
    assert bool((correlation.abs() < 5 / n**0.5).all())


def test_a_seed_decides_the_same_whatever_the_gates_compute_and_another_seed_differently() -> None:
    first = forced_decisions(Network(), 0.5, seed=3, batches=2)
    torch.manual_seed(1)
    assert same(forced_decisions(Network().eval(), 0.5, seed=3, batches=2), first)
    other = forced_decisions(Network(), 0.5, seed=4, batches=2)
    assert not any(torch.equal(o, f) for o, f in zip(other, first, strict=True))
    assert not torch.equal(first[0][:32], first[0][32:]), "each batch has decisions of its own"


def test_chance_draws_from_a_stream_of_its_own() -> None:
    network, x = Network(), images()
    state = torch.get_rng_state()
    with gates_forced(network, 0.5):
        network(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_forced_gates_can_be_nested_and_end_with_their_block() -> None:
    network, x = Network().eval(), images()
    network(x)
    own = gate_decisions(network)
    with gates_forced(network, 1.0):
        with gates_forced(network, 0.0):
            network(x)
            assert all((d == 0).all() for d in gate_decisions(network))
        network(x)
        assert all((d == 1).all() for d in gate_decisions(network))
        with gates_forced(network.inner, 0.0):
            network(x)
            assert [d.mean().item() for d in gate_decisions(network)] == [1.0, 0.0]
    network(x)
    assert same(gate_decisions(network), own)


def test_forced_gates_may_end_in_another_order_than_they_began() -> None:
    network, x = Network().eval(), images()
    network(x)
    own = gate_decisions(network)
    first, second = ExitStack(), ExitStack()
    first.enter_context(gates_forced(network, 1.0))
    second.enter_context(gates_forced(network, 0.0))
    first.close()
    network(x)
    assert all((d == 0).all() for d in gate_decisions(network))
    second.close()
    network(x)
    assert same(gate_decisions(network), own)


def test_gates_decide_again_after_an_error() -> None:
    network, x = Network().eval(), images()
    network(x)
    own = gate_decisions(network)
    with pytest.raises(KeyError), gates_forced(network, 1.0):
        raise KeyError
    network(x)
    assert same(gate_decisions(network), own)


def test_forced_gates_keep_the_probabilities_with_their_gradient() -> None:
    network, x = Network(), images()
    with gates_forced(network, 0.5):
        network(x)
        shaping(gate_probabilities(network)).backward()
    for gate in named_gates(network).values():
        assert all(p.grad is not None and bool((p.grad != 0).any()) for p in gate.parameters())


def test_forced_gates_of_a_compiled_network_are_those_of_the_network() -> None:
    torch.compiler.reset()
    network, x = Network().eval(), images()
    compiled = torch.compile(network, backend="aot_eager")
    with torch.no_grad():
        own = compiled(x)
        for share in (0.0, 0.5, 1.0):
            expected = forced_decisions(network, share, seed=2)
            assert same(forced_decisions(compiled, share, seed=2), expected)
            with gates_forced(network, share, seed=2):
                found = compiled(x)
            with gates_forced(network, share, seed=2):
                torch.testing.assert_close(found, network(x))
        torch.testing.assert_close(compiled(x), own)


def test_checkpointing_changes_no_gradient_of_forced_gates() -> None:
    network, x = Network(), images()
    other = copy.deepcopy(network)
    with gates_forced(network, 0.5, seed=2):
        expected = gradients(network, network, x)
    with gates_forced(other, 0.5, seed=2):
        found = gradients(other, Checkpointed(other), x)
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_beyond_0_and_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"share must be in \[0, 1\], received {share}"):
        forced_decisions(Network(), share)


@pytest.mark.parametrize("seed", [-1, 0.5, "a"])
def test_a_seed_that_is_none_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed must be an integer, at least 0, received {seed!r}"):
        forced_decisions(Network(), 0.5, seed)


def test_a_model_without_gates_cannot_be_forced() -> None:
    with (
        pytest.raises(ValueError, match="at least one Gate, received a Linear"),
        gates_forced(nn.Linear(2, 3), 1),
    ):
        pass
