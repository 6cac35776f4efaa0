"""What a gate decides, what its gradient is, and that a loss can reach it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import batchshaping as bs
from batchshaping.gates import (
    ChannelGate,
    Gate,
    GateCounts,
    binary_concrete,
    gate_decisions,
    gate_probabilities,
    gate_statistics,
    gates_forced,
    l0_penalty,
    named_gates,
    straight_through_decisions,
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


# The noise


@given(logits=some_logits, temperature=temperatures, seed=seeds)
def test_training_without_noise_is_evaluation_gradient_included(
    logits: list[float], temperature: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    noiseless = binary_concrete(x, temperature, training=True, noise=0.0)
    evaluated = binary_concrete(x, temperature, training=False)
    assert torch.equal(noiseless, evaluated)
    assert torch.equal(*(torch.autograd.grad(gates.sum(), x)[0] for gates in (noiseless, evaluated)))


@pytest.mark.parametrize("make", [float, torch.tensor])
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0, 3.0])
def test_the_noise_is_logistic_with_the_given_scale(noise: float, make: type) -> None:
    n, logits = 100_000, torch.tensor([-4.0, -1.0, -0.1, 0.0, 0.5, 3.0])
    share = binary_concrete(logits.expand(n, 6), noise=make(noise)).double().mean(dim=0).numpy()
    p = stats.logistic(scale=noise).cdf(logits.double().numpy())
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / n) + 1e-9).all()


def test_a_schedule_can_take_the_noise_of_a_network_away() -> None:
    network, x = Network(), images()
    for gate in named_gates(network).values():
        gate.noise.fill_(0.0)
    network(x)
    for decisions, probabilities in zip(gate_decisions(network), gate_probabilities(network), strict=True):
        assert torch.equal(decisions.bool(), probabilities > 0.5)


class Fixed(Gate):
    """A gate whose logits are its parameter."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, examples: int) -> Tensor:
        return self.decide(self.logits.expand(examples, *self.logits.shape))


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5, 1.0, 3.0])
def test_open_probabilities_are_those_of_the_decisions_and_probabilities_those_of_the_full_noise(
    noise: float,
) -> None:
    n, logits = 100_000, torch.tensor([-30.0, -4.0, -1.0, -0.1, 0.0, 1e-30, 0.5, 1.0, 30.0])
    gate = Fixed(logits)
    gate.noise.fill_(noise)
    with torch.no_grad():
        gate(n)
        share = gate.decisions.double().mean(dim=0).numpy()
        p = gate.open_probabilities[0].double().numpy()
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / n) + 1e-9).all()
    z = logits.double().numpy()
    expected = stats.logistic(scale=noise).cdf(z) if noise else (z > 0).astype(float)
    np.testing.assert_allclose(p, expected, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(gate.probabilities[0].detach().numpy(), stats.logistic.cdf(z), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_open_probabilities_in_any_precision_have_a_finite_gradient(dtype: torch.dtype) -> None:
    gate = Fixed(torch.tensor([-2.0, 0.0, 1e-4, 2.0])).to(dtype)
    for noise, expected in ((0.0, [0.0, 0.0, 1.0, 1.0]), (0.01, None)):
        gate.noise.fill_(noise)
        gate(1)
        found = gate.open_probabilities
        assert found.dtype == dtype and (expected is None or found[0].tolist() == expected)
        assert bool(torch.autograd.grad(found.sum(), gate.logits)[0].isfinite().all())


def test_a_gate_can_be_surer_than_its_probability() -> None:
    gate = Fixed(torch.tensor([1.0]))
    gate.noise.fill_(0.1)
    gate(2)
    assert gate.probabilities[0].item() == pytest.approx(0.731, abs=1e-3)
    assert gate.open_probabilities[0].item() == pytest.approx(0.99995, abs=1e-5)
    gate.eval()
    assert gate.open_probabilities[0].item() == 1


@pytest.mark.parametrize("noise", [0.0, 1e-30, 0.3, 1.0])
def test_open_probabilities_have_their_derivative_and_it_is_finite(noise: float) -> None:
    logits = torch.tensor([-torch.inf, -2.0, -1e-20, 0.0, 1e-20, 0.2, torch.inf], dtype=torch.float64)
    gate = Fixed(logits).double()
    gate.noise.fill_(noise)
    gate(1)
    (gradient,) = torch.autograd.grad(gate.open_probabilities.sum(), gate.logits)
    expected = stats.logistic(scale=noise).pdf(logits.numpy()) if noise else np.zeros(7)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-9, atol=0)
    gate = Fixed(torch.tensor([torch.nan, 1.0]))
    gate.noise.fill_(noise)
    gate(1)
    assert gate.open_probabilities[0].isnan().tolist() == [True, False]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("noise", [0.0, 0.2, 1.0])
def test_straight_through_decisions_have_the_gradient_of_the_probabilities(
    noise: float, training: bool
) -> None:
    network, x = Network().train(training), images()
    for gate in named_gates(network).values():
        gate.noise.fill_(noise)
    network(x)
    parameters = [p for gate in named_gates(network).values() for p in gate.parameters()]
    found = straight_through_decisions(network)
    for layer, decisions in zip(found, gate_decisions(network), strict=True):
        assert torch.equal(layer, decisions)
    read = (found, gate_probabilities(network))
    weights = [torch.randn_like(layer) for layer in found]
    sums = [sum((w * v).sum() for w, v in zip(weights, values, strict=True)) for values in read]
    one, other = (torch.autograd.grad(value, parameters, retain_graph=True) for value in sums)
    for name, other_name in zip(one, other, strict=True):
        torch.testing.assert_close(name, other_name)


def test_straight_through_decisions_without_a_gradient_are_no_silent_constant() -> None:
    network = Network()
    with torch.no_grad():
        network(images())
        assert len(straight_through_decisions(network)) == 2
    with pytest.raises(RuntimeError, match=r"gate 'first_gate'.* kept no gradient"):
        straight_through_decisions(network)


@pytest.mark.parametrize("noise", [-1.0, float("nan"), float("inf")])
def test_a_noise_without_a_distribution_is_refused(noise: float) -> None:
    with pytest.raises(ValueError, match=f"noise must be finite and not negative, received {noise}"):
        binary_concrete(torch.zeros(2), noise=noise)


def test_the_noise_is_no_part_of_the_weights() -> None:
    gate = ChannelGate(3, 7)
    assert "noise" not in gate.state_dict()
    assert gate.noise.item() == 1.0


def test_another_noise_does_not_compile_the_network_anew() -> None:
    torch.compiler.reset()
    gate, counter = ChannelGate(3, 7), CompileCounter()
    compiled, x = torch.compile(gate, backend=counter, fullgraph=True), images()
    for noise in (1.0, 0.5, 0.0):
        gate.noise.fill_(noise)
        decisions = compiled(x).flatten(1)
    assert counter.frame_count == 1
    assert torch.equal(decisions.bool(), gate.probabilities > 0.5)


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


READINGS = ["decisions", "probabilities", "open_probabilities", "straight_through_decisions"]


@pytest.mark.parametrize("reading", READINGS)
def test_before_a_forward_pass_a_gate_has_nothing_to_read(reading: str) -> None:
    gate = ChannelGate(3, 7)
    assert not hasattr(gate, reading)
    assert getattr(gate, reading, None) is None
    for kind in (RuntimeError, AttributeError):
        with pytest.raises(kind, match=r"^the gate has decided nothing before a forward pass .*$"):
            getattr(gate, reading)
    with torch.no_grad():
        gate(images())
    assert hasattr(gate, reading) == (reading == "decisions"), "a loss cannot reach what has no gradient"
    gate(images())
    assert getattr(gate, reading).shape == (32, 7)


def test_what_a_gate_never_has_is_missed_as_in_any_module() -> None:
    with pytest.raises(AttributeError, match="'ChannelGate' object has no attribute 'decision'"):
        _ = ChannelGate(3, 7).decision


def test_one_gate_an_example_may_have_logits_without_a_dimension_of_gates() -> None:
    gate = Fixed(torch.tensor(1.0)).eval()
    assert gate(4).tolist() == [1.0] * 4
    assert all(getattr(gate, reading).shape == (4, 1) for reading in READINGS)
    with pytest.raises(ValueError, match=r"logits must have shape \(N, ...\), received a single number"):
        gate.decide(torch.tensor(1.0))


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


def test_decisions_are_what_the_forward_pass_used_without_a_gradient() -> None:
    gate = ChannelGate(3, 7)
    gates = gate(images())
    assert gates.requires_grad
    (decisions,) = gate_decisions(gate)
    assert torch.equal(decisions, gates.flatten(1)) and not decisions.requires_grad


def test_decisions_before_a_forward_pass_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"gate 'first_gate': .* decided nothing before a forward pass"):
        gate_decisions(Network())


def test_gates_are_named_as_their_modules_in_the_order_of_what_is_read() -> None:
    network = Network()
    network(images())
    gates = named_gates(network)
    assert list(gates) == ["first_gate", "inner.gate"]
    assert all(gate is network.get_submodule(name) for name, gate in gates.items())
    for gate, p, decisions in zip(
        gates.values(), gate_probabilities(network), gate_decisions(network), strict=True
    ):
        assert torch.equal(gate.probabilities, p) and torch.equal(gate.decisions, decisions)


@pytest.mark.parametrize("read", [gate_decisions, named_gates])
def test_a_model_without_gates_has_nothing_to_read(read: Callable[[nn.Module], object]) -> None:
    with pytest.raises(ValueError, match="at least one Gate, received a Linear"):
        read(nn.Linear(2, 3))


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


# Networks that are traced, exported, replicated


class OwnGate(Gate):
    """A gate whose computation depends on values, as no tracer can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        logits = self.logits(x.mean(dim=(2, 3)))
        if bool((logits > 0).all()):
            logits = -logits
        return self.decide(scale * logits)[..., None, None]


class OwnNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = OwnGate()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.gate(x, scale=2.0) * self.layer(x)).mean(dim=(2, 3))


@contextmanager
def our_warnings() -> Iterator[list[str]]:
    """Those that name a file of this package."""
    ours: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield ours
    ours += [str(w.message) for w in seen if "batchshaping" in w.filename or "gate" in str(w.message)]


@pytest.mark.parametrize("make", [Network, OwnNetwork])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ran", [True, False])
def test_a_network_traced_by_fx_keeps_its_gates(make: type[nn.Module], training: bool, ran: bool) -> None:
    network, x = make().train(training), images()
    if ran:
        network(x)
    traced = fx.symbolic_trace(network)
    assert list(named_gates(traced).values()) == list(named_gates(network).values())
    assert hasattr(next(iter(named_gates(network).values())), "decisions") == ran
    for mode in (training, not training):  # which may change after tracing
        for forward in (network.train(mode), traced.train(mode)):
            torch.manual_seed(1)
            y = forward(x)
            p = gate_probabilities(forward)
            if forward is network:
                expected, expected_p = y, p
        assert torch.equal(y, expected)
        assert all(torch.equal(a, b) and a.requires_grad for a, b in zip(p, expected_p, strict=True))
    l0_penalty(p).backward()
    with gates_forced(traced, 0.0):
        traced(x)
        assert all(bool((d == 0).all()) for d in gate_decisions(network))
    assert torch.equal(copy.deepcopy(traced).eval()(x), network.eval()(x))


@pytest.mark.parametrize("make", [Network, OwnNetwork])
def test_torchvision_extracts_features_of_a_gated_network(make: type[nn.Module]) -> None:
    network, x = make(), images()
    gates = list(named_gates(network))
    for names in get_graph_node_names(network):
        assert [name for name in names if name in gates] == gates
    features = create_feature_extractor(network, gates)
    for mode in (True, False):
        found = features.train(mode)(x)
        for layer, decisions in zip(found.values(), gate_decisions(features), strict=True):
            assert torch.equal(layer.flatten(1), decisions)
    assert torch.equal(found[gates[0]], network.eval().get_submodule(gates[0])(x, **scale_of(network)))


def scale_of(network: nn.Module) -> dict[str, float]:
    return {"scale": 2.0} if isinstance(network, OwnNetwork) else {}


@pytest.mark.filterwarnings("ignore:.*jit.*:FutureWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ran", [True, False])
def test_jit_traces_a_network_which_has_no_gates_then(ran: bool, training: bool) -> None:
    network, x = Network().train(training), images()
    if ran:
        network(x)
    with our_warnings() as ours:
        traced = torch.jit.trace(network, x, check_trace=False)
    assert not ours
    for other in (x, images(5)):
        outputs = []
        for forward in (network, traced):
            torch.manual_seed(1)
            outputs.append(forward(other))
        torch.testing.assert_close(*outputs)
    with pytest.raises(ValueError, match="must hold at least one Gate, received a TopLevelTracedModule"):
        gate_probabilities(traced)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_an_exported_network_decides_for_batches_of_any_size_and_leaves_no_trace(
    training: bool, strict: bool
) -> None:
    network, x = Network().train(training), images()
    with our_warnings() as ours:
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert not ours
    assert not any(hasattr(gate, "decisions") for gate in named_gates(network).values())
    network(x)
    decisions = gate_decisions(network)
    program.module()(images(7))
    assert same(gate_decisions(network), decisions)
    outputs = []
    for forward in (network, program.module()):
        torch.manual_seed(1)
        outputs.append(forward(x))
    torch.testing.assert_close(*outputs)


def test_what_replicas_of_data_parallel_decide_is_not_mistaken_for_what_the_gate_did() -> None:
    network = Network()
    network(images())
    replica = network.first_gate._replicate_for_data_parallel()
    assert not hasattr(network.first_gate, "decisions") and not hasattr(replica, "decisions")
    with pytest.raises(RuntimeError, match="replica of DataParallel"):
        gate_probabilities(network)


def test_gradients_by_torch_func_are_those_of_autograd() -> None:
    network, x = Network(), images()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    parameters = dict(network.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(1)
        y = torch.func.functional_call(network, parameters, x)
        penalty = l0_penalty(straight_through_decisions(network))
        return y.square().mean() + shaping(gate_probabilities(network)) + penalty

    found = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad)


def test_under_vmap_each_example_is_decided_for_as_in_the_batch() -> None:
    network, x = Network().eval(), images()
    found = torch.func.vmap(lambda example: network(example[None])[0])(x)
    torch.testing.assert_close(found, network(x))


# Devices and types: tensors on the meta device have no values, so that reading one, or mixing it in, raises


def everything(network: Network, x: Tensor) -> list[Tensor]:
    """What there is to compute of a network and its gates."""
    network(x)
    decisions, probabilities = gate_decisions(network), gate_probabilities(network)
    counts = GateCounts(2)
    counts.update(decisions, torch.arange(len(x), device="cpu") % 2)
    with gates_forced(network, 0.5, seed=1):
        forced = network(x)
    return [
        *decisions,
        *probabilities,
        *straight_through_decisions(network),
        *(gate.open_probabilities for gate in named_gates(network).values()),
        forced,
        l0_penalty(probabilities),
        *counts.open,
        counts.examples,
        torch.tensor(counts.statistics(), dtype=torch.float64, device="cpu"),
        torch.tensor(gate_statistics(decisions), dtype=torch.float64, device="cpu"),
    ]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AMBIENT = {
    "meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ambient", AMBIENT)
def test_a_default_device_or_type_changes_nothing(ambient: str, training: bool) -> None:
    network, x = Network().train(training), images()
    other = copy.deepcopy(network)
    torch.manual_seed(1)
    expected = everything(network, x)
    torch.manual_seed(1)
    with AMBIENT[ambient]():
        found = everything(other, x)
    for e, f in zip(expected, found, strict=True):
        assert e.dtype == f.dtype and e.device == f.device and torch.equal(e, f)


@pytest.mark.parametrize("load", ["to_empty", "assign"])
def test_a_network_made_on_the_meta_device_has_its_noise_once_it_has_its_weights(load: str) -> None:
    network, x = Network(), images()
    with torch.device("meta"):
        other = Network()
    assert all(p.is_meta for p in other.parameters())
    if load == "to_empty":
        other.to_empty(device="cpu")
    other.load_state_dict(copy.deepcopy(network.state_dict()), assign=load == "assign")
    outputs = []
    for forward in (network, other):
        torch.manual_seed(1)
        outputs.append(forward(x))
        assert all(gate.noise.item() == 1 for gate in named_gates(forward).values())
    assert torch.equal(*outputs)


def test_the_noise_keeps_its_value_whatever_becomes_of_the_weights() -> None:
    gate = ChannelGate(3, 7)
    gate.noise.fill_(0.25)
    for move in (
        lambda: gate.to_empty(device="cpu"),
        lambda: gate.to("meta"),
        lambda: gate.to_empty(device="cpu"),
        lambda: gate.double(),
        lambda: gate.bfloat16(),
        lambda: gate.float(),
    ):
        move()
        assert gate.noise.item() == 0.25


def test_a_gate_is_made_where_and_of_what_type_it_is_asked_to_be() -> None:
    gate = ChannelGate(3, 7, device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in gate.parameters())


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


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


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


@pytest.mark.parametrize("shapes", [[(2, 3), (3, 3)], [(3,), (3,)], [(2, 3), (2, 3, 1)]])
def test_layers_of_other_examples_are_refused_with_all_shapes(shapes: list[tuple[int, ...]]) -> None:
    layers = [torch.ones(shape) for shape in shapes]
    for function in (l0_penalty, gate_statistics):
        with pytest.raises(ValueError, match=r"^layers must have shapes \(N, gates\)[^\n]*$") as error:
            function(layers)
        assert str(error.value).endswith(f"received {shapes}")


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


# The counts by class


def random_decisions(n: int, widths: Sequence[int], p: float) -> list[Tensor]:
    return [(torch.rand(n, width) < p).float() for width in widths]


@given(
    n=st.integers(1, 12),
    classes=st.integers(1, 4),
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    batch=st.integers(1, 12),
    seed=seeds,
)
def test_counts_equal_a_count_of_every_decision_however_the_data_is_split(
    n: int, classes: int, widths: list[int], p: float, batch: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layers, labels = random_decisions(n, widths, p), torch.randint(classes, (n,))
    counts = GateCounts(classes)
    for part in torch.arange(n).split(batch):
        counts.update([layer[part] for layer in layers], labels[part])
    for found, layer in zip(counts.open, layers, strict=True):
        expected = [
            [sum(int(row[gate]) for row, c in zip(layer, labels, strict=True) if c == k) for gate in range(w)]
            for k, w in [(k, layer.shape[1]) for k in range(classes)]
        ]
        assert found.tolist() == expected
    assert counts.examples.tolist() == [sum(c == k for c in labels.tolist()) for k in range(classes)]
    assert counts.statistics() == gate_statistics(layers)
    for index, layer in enumerate(layers):
        assert counts.statistics(index) == gate_statistics(layer)


def test_a_network_is_counted_after_each_of_its_batches() -> None:
    network, counts = Network().eval(), GateCounts(classes=3)
    seen = []
    for _ in range(3):
        network(images())
        counts.update(gate_decisions(network), torch.arange(32) % 3)
        seen.append(gate_decisions(network))
    everything = [torch.cat(layer) for layer in zip(*seen, strict=True)]
    assert counts.statistics() == gate_statistics(everything)
    assert [layer.sum().item() for layer in counts.open] == [d.sum().item() for d in everything]


@pytest.mark.parametrize("wrong", [0.3, -1.0, 2.0, float("nan")])
def test_a_batch_with_a_probability_is_refused_and_not_counted(wrong: float) -> None:
    counts = GateCounts(classes=2)
    good = [torch.ones(2, 3), torch.zeros(2, 4)]
    counts.update(good, torch.tensor([0, 1]))
    before = counts.statistics()
    with pytest.raises(ValueError, match=f"decisions must be 0 or 1, received {wrong:g}"):
        counts.update([good[0], torch.full((2, 4), wrong)], torch.tensor([0, 1]))
    assert counts.statistics() == before
    assert counts.examples.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("shapes", "labels", "message"),
    [
        ([(2, 3)], [0], r"decisions must have shapes \(N, gates\) = \[\(1, 3\)\], received \[\(2, 3\)\]"),
        ([(2, 4)], [0, 1], r"= \[\(2, 3\)\], received \[\(2, 4\)\]"),
        ([(2, 3), (2, 3)], [0, 1], r"= \[\(2, 3\)\], received \[\(2, 3\), \(2, 3\)\]"),
        ([(2,)], [0, 1], r"received \[\(2,\)\]"),
        ([(2, 3, 1)], [0, 1], r"received \[\(2, 3, 1\)\]"),
        ([(2, 3)], [0, 2], r"labels must be in 0, \.\.\., 1, received 2"),
        ([(2, 3)], [-1, 0], r"labels must be in 0, \.\.\., 1, received -1"),
        ([(2, 3)], [0.0, 1.0], r"labels must be integers of shape \(N,\), received torch.float32"),
        (
            [(2, 3)],
            [[0, 1]],
            r"labels must be integers of shape \(N,\), received torch.int64 of shape \(1, 2",
        ),
    ],
)
def test_a_batch_of_another_shape_or_class_is_refused_and_not_counted(
    shapes: list[tuple[int, ...]], labels: list[int], message: str
) -> None:
    counts = GateCounts(classes=2)
    counts.update([torch.ones(2, 3)], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=message):
        counts.update([torch.ones(shape) for shape in shapes], torch.tensor(labels))
    assert counts.examples.tolist() == [1, 1]
    assert [layer.tolist() for layer in counts.open] == [[[1] * 3] * 2]


@pytest.mark.parametrize("shape", [(3, 4), (2,), (2, 3, 1), ()])
def test_a_first_batch_that_is_not_of_the_labels_examples_is_refused(shape: tuple[int, ...]) -> None:
    counts = GateCounts(classes=2)
    with pytest.raises(ValueError, match=r"decisions must have shapes \(N, gates\) = \[\(2, "):
        counts.update([torch.ones(2, 3), torch.ones(shape)], torch.tensor([0, 1]))
    assert not counts.open and counts.examples.tolist() == [0, 0]


@pytest.mark.parametrize("classes", [0, -1, 1.5])
def test_there_must_be_a_class(classes: int) -> None:
    with pytest.raises(ValueError, match=f"classes must be an integer, at least 1, received {classes}"):
        GateCounts(classes)


def test_there_are_no_statistics_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one example and one gate"):
        GateCounts(classes=2).statistics()


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
