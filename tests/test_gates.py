"""What a gate decides, what its gradient is, and that a loss can reach it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchshaping as bs
from batchshaping.gates import (
    ChannelGate,
    Gate,
    binary_concrete,
    gate_probabilities,
    gate_statistics,
    l0_penalty,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

temperatures = st.floats(0.05, 20.0)
some_logits = st.lists(st.floats(-50, 50), min_size=1, max_size=20)
seeds = st.integers(0, 2**32 - 1)


class Network(nn.Module):
    """Two gated layers, one inside of the other's module."""

    def __init__(self) -> None:
        super().__init__()
        self.first_gate = ChannelGate(3, 5)
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.inner = nn.ModuleDict({"gate": ChannelGate(5, 7), "layer": nn.Conv2d(5, 7, 3)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_gate(x) * self.first(x)
        x = self.inner["gate"](x) * self.inner["layer"](x)
        return x.mean(dim=(2, 3))


def images(n: int = 32) -> Tensor:
    return torch.randn(n, 3, 6, 6)


def shaping(probabilities: Sequence[Tensor]) -> Tensor:
    return torch.stack([bs.batch_shaping(p, bs.Beta(0.6, 0.4), dim=0) for p in probabilities]).sum()


# Binary concrete


@given(
    logits=st.lists(st.floats(allow_nan=False, width=16), min_size=1, max_size=20),
    temperature=temperatures,
    training=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_a_decision_is_exactly_0_or_1(
    logits: list[float], temperature: float, training: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.tensor(logits, dtype=dtype, requires_grad=True)
    gates = binary_concrete(x, temperature, training)
    assert gates.dtype == dtype
    assert bool(((gates == 0) | (gates == 1)).all())
    gates.sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


@given(logits=some_logits, temperature=temperatures, seed=seeds)
def test_in_training_the_gradient_is_that_of_the_concrete_sample_with_the_same_noise(
    logits: list[float], temperature: float, seed: int
) -> None:
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(-1.0, 2.0, len(logits), dtype=torch.float64)
    torch.manual_seed(seed)
    gates = binary_concrete(x, temperature, training=True)
    (gradient,) = torch.autograd.grad((gates * weights).sum(), x)

    torch.manual_seed(seed)
    u = torch.rand(len(logits), dtype=torch.float64).numpy()
    s = 1 / (1 + np.exp(-(np.array(logits) + np.log(u) - np.log1p(-u)) / temperature))
    assert gates.tolist() == (s > 0.5).astype(float).tolist()
    expected = weights.numpy() * s * (1 - s) / temperature
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-9, atol=1e-12)


@given(logits=some_logits, temperature=temperatures)
def test_in_evaluation_a_gate_is_open_iff_its_logit_is_positive(
    logits: list[float], temperature: float
) -> None:
    state = torch.get_rng_state()
    gates = binary_concrete(torch.tensor(logits), temperature, training=False)
    assert gates.tolist() == [float(z > 0) for z in torch.tensor(logits).tolist()]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.1, 2 / 3, 5.0])
def test_in_training_a_gate_is_open_with_the_probability_that_its_logit_says(
    temperature: float, dtype: torch.dtype
) -> None:
    n, logits = 100_000, torch.tensor([-4.0, -1.0, 0.0, 0.5, 3.0], dtype=dtype)
    share = binary_concrete(logits.expand(n, 5), temperature).double().mean(dim=0)
    p = torch.sigmoid(logits.double())
    assert bool(((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all())


def test_nan_logits_give_nan_gates() -> None:
    gates = binary_concrete(torch.tensor([torch.nan, 1.0]), training=False)
    assert gates.isnan().tolist() == [True, False]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be positive, received {temperature}"):
        binary_concrete(torch.zeros(2), temperature)


def test_integer_logits_are_refused() -> None:
    with pytest.raises(TypeError, match=r"logits must be floating point, received torch\.int64"):
        binary_concrete(torch.tensor([1, 2]))


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


@pytest.mark.parametrize("shape", [(3,), (4, 5), (4, 5, 3)])
def test_another_number_of_channels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(N, 3, \.\.\.\), received \("):
        ChannelGate(3, 7)(torch.randn(shape))


# Reading the probabilities


def test_there_is_one_tensor_of_probabilities_for_each_gate_module_in_order() -> None:
    network = Network()
    network(images())
    assert [tuple(p.shape) for p in gate_probabilities(network)] == [(32, 5), (32, 7)]


def test_the_loss_reaches_every_parameter_of_the_gates() -> None:
    network = Network()
    network(images())
    shaping(gate_probabilities(network)).backward()
    for gate in (network.first_gate, network.inner["gate"]):
        for name, parameter in gate.named_parameters():
            assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_the_loss_moves_the_gates_towards_the_prior() -> None:
    network, x = Network(), images(256)
    gates = [p for m in network.modules() if isinstance(m, Gate) for p in m.parameters()]
    optimizer = torch.optim.SGD(gates, lr=0.5)
    losses = []
    for _ in range(20):
        network(x)
        loss = shaping(gate_probabilities(network))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[-1] < 0.8 * losses[0]


def test_a_forward_pass_without_gradient_is_no_silent_constant() -> None:
    network = Network()
    with torch.no_grad():
        network(images())
        assert len(gate_probabilities(network)) == 2
    with pytest.raises(RuntimeError, match=r"gate 'first_gate'.* kept no gradient"):
        gate_probabilities(network)
    assert not gate_probabilities(network.eval())[0].requires_grad


def test_gates_that_do_not_learn_can_be_read() -> None:
    network = Network().requires_grad_(False)
    network(images())
    assert not gate_probabilities(network)[0].requires_grad


def test_reading_before_a_forward_pass_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"gate 'first_gate': .* before a forward pass"):
        gate_probabilities(Network())
    with pytest.raises(RuntimeError, match=r"gate 'ChannelGate': .* before a forward pass"):
        gate_probabilities(ChannelGate(3, 7))


def test_a_model_without_gates_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one Gate, received a Linear"):
        gate_probabilities(nn.Linear(2, 3))


def test_a_gate_of_ones_own_is_read_like_any_other() -> None:
    class Bias(Gate):
        def __init__(self) -> None:
            super().__init__(temperature=0.5)
            self.logits = nn.Parameter(torch.tensor([-1.0, 1.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.decide(self.logits.expand(len(x), 2))

    gate = Bias().eval()
    assert gate(torch.ones(3, 2)).tolist() == [[0.0, 1.0]] * 3
    (probabilities,) = gate_probabilities(gate)
    assert torch.equal(probabilities, torch.sigmoid(gate.logits).expand(3, 2))


def gradients(network: Network, forward: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    task = forward(x).square().mean()
    (task + shaping(gate_probabilities(network))).backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


class Checkpointed(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.network, x, use_reentrant=False)


@pytest.mark.parametrize(
    "wrap", [Checkpointed, lambda network: torch.compile(network, backend="aot_eager", fullgraph=True)]
)
def test_checkpointing_and_compiling_change_no_gradient(wrap: type[nn.Module]) -> None:
    network, x = Network(), images()
    other = copy.deepcopy(network)
    expected, found = gradients(network, network, x), gradients(other, wrap(other), x)
    assert len(expected) == len(found) == len(list(network.parameters()))
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_network_can_be_copied_after_a_forward_pass(copied: type[nn.Module]) -> None:
    network, x = Network(), images()
    network(x)
    other = copied(network)
    with pytest.raises(RuntimeError, match="before a forward pass"):
        gate_probabilities(other)
    assert torch.equal(network.eval()(x), other.eval()(x))


# The L0 penalty


@given(n=st.integers(1, 5), widths=st.lists(st.integers(1, 4), min_size=1, max_size=3), seed=seeds)
def test_the_penalty_is_the_mean_over_all_gates_and_its_gradient_the_same_for_each(
    n: int, widths: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    layers = [torch.rand(n, width, dtype=torch.float64, requires_grad=True) for width in widths]
    penalty = l0_penalty(layers)
    penalty.backward()
    everything = np.concatenate([p.detach().numpy().ravel() for p in layers])
    assert penalty.item() == pytest.approx(everything.mean(), rel=1e-12)
    for p in layers:
        assert p.grad is not None
        np.testing.assert_allclose(p.grad.numpy(), 1 / len(everything))
    assert torch.equal(l0_penalty(torch.cat(layers, dim=1)), penalty)


@pytest.mark.parametrize("empty", [[], torch.empty(0, 3), torch.empty(3, 0)])
def test_there_is_no_mean_of_no_gates(empty: Tensor | list[Tensor]) -> None:
    for function in (l0_penalty, gate_statistics):
        with pytest.raises(ValueError, match="at least one example and one gate"):
            function(empty)


# The statistics


@given(
    n=st.integers(1, 6),
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from([torch.bool, torch.int64, torch.float32]),
    seed=seeds,
)
def test_statistics_equal_a_count_of_every_gate(
    n: int, widths: list[int], p: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    layers = [(torch.rand(n, width) < p).to(dtype) for width in widths]
    columns = [column.tolist() for layer in layers for column in layer.T]
    on = sum(all(column) for column in columns)
    off = sum(not any(column) for column in columns)
    total = len(columns)
    statistics = gate_statistics(layers)
    assert statistics == pytest.approx(
        (on / total, off / total, (total - on - off) / total, sum(map(sum, columns)) / (n * total))
    )
    assert gate_statistics(torch.cat(layers, dim=1)) == statistics


@pytest.mark.parametrize("wrong", [0.3, -1.0, 2.0, float("nan")])
def test_a_probability_is_no_decision(wrong: float) -> None:
    with pytest.raises(ValueError, match=f"decisions must be 0 or 1, received {wrong:g}"):
        gate_statistics(torch.tensor([[1.0, wrong]]))
