"""What a gate decides, what its gradient is, and that a loss can reach it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from gated_networks import (
    DTYPES,
    Checkpointed,
    Network,
    gradients,
    images,
    same,
    seeds,
    shaping,
    some_logits,
    temperatures,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import batchshaping as bs
from batchshaping.gates.channel import ChannelGate
from batchshaping.gates.forced import gates_forced
from batchshaping.gates.gate import (
    Gate,
    binary_concrete,
    gate_decisions,
    gate_probabilities,
    keep_every_run,
    named_gates,
    straight_through_decisions,
)
from batchshaping.gates.summary import GateCounts, gate_statistics, l0_penalty

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


# Gates that run several times in one forward pass


class Repeated(nn.Module):
    """Runs its gates several times, and the second one only if it is told to."""

    def __init__(self, times: int = 2) -> None:
        super().__init__()
        self.times, self.both = times, True
        self.first, self.second = ChannelGate(4, 4), ChannelGate(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x * (1 + self.first(x))
        return x * (1 + self.second(x)) if self.both else x


def decisions_one_by_one(model: Repeated, x: Tensor) -> list[Tensor]:
    """Of the first gate in evaluation, by calling it on its own."""
    found = []
    for _ in range(model.times):
        gates = model.first(x)
        found.append(gates)
        x = x * (1 + gates)
    return found


def repeated(times: int = 2) -> Repeated:
    model = Repeated(times).eval()
    nn.init.normal_(model.first.to_logits[3].weight, std=2.0)
    keep_every_run(model)
    return model


@pytest.mark.parametrize("times", [1, 2, 5])
def test_the_runs_of_one_forward_pass_are_side_by_side_and_those_of_another_are_forgotten(times: int) -> None:
    torch.manual_seed(3)
    model = repeated(times)
    for x in torch.randn(4, 9, 4):
        expected = torch.cat(decisions_one_by_one(model, x), dim=1)
        model(x)
        assert torch.equal(model.first.decisions, expected)
        for reading in READINGS:
            assert getattr(model.first, reading).shape == (9, 4 * times)
        assert len(model.first._runs) == times and model.second.decisions.shape == (9, 4)
    copied = copy.deepcopy(model)
    assert not hasattr(copied.first, "decisions")
    copied(x)
    assert torch.equal(copied.first.decisions, expected)
    assert pickle.loads(pickle.dumps(model.first))(x).shape == (9, 4)


def test_a_gate_that_is_called_on_its_own_is_no_part_of_a_forward_pass() -> None:
    model, x = repeated(), torch.randn(9, 4)
    model(x)
    alone = model.first(x)
    assert torch.equal(model.first.decisions, alone)
    model(x)
    assert model.first.decisions.shape == (9, 8)


def test_a_gate_that_does_not_run_in_a_forward_pass_keeps_nothing_of_another_one() -> None:
    model, x = repeated(), torch.randn(9, 4)
    model(x)
    model.both = False
    model(x)
    with pytest.raises(RuntimeError, match=r"gate 'second': .* did not run in the last one$"):
        gate_decisions(model)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_pass_that_fails_is_not_mixed_with_the_next(error: type[BaseException]) -> None:
    model, x = repeated(), torch.randn(9, 4)

    def fail(*_: object) -> None:
        raise error

    failing = model.second.register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(x)
    failing.remove()
    model(x)
    assert model.first.decisions.shape == (9, 8) and model.second.decisions.shape == (9, 4)


def test_the_gates_of_a_part_keep_the_runs_of_the_whole() -> None:
    part = repeated()

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = part

        def forward(self, x: Tensor) -> Tensor:
            return self.part(self.part(x))

    whole, x = Whole(), torch.randn(9, 4)
    whole(x)
    assert part.first.decisions.shape == (9, 8), "nobody asked the whole"
    keep_every_run(whole)
    for _ in range(2):
        whole(x)
        assert part.first.decisions.shape == (9, 16)
    part(x)
    assert part.first.decisions.shape == (9, 8)


def test_a_gate_that_runs_with_other_examples_each_time_is_refused_by_name() -> None:
    model = repeated()
    model.register_forward_hook(lambda module, args, output: module.first(torch.randn(3, 4)), prepend=True)
    model(torch.randn(9, 4))
    message = r"gate 'first': .* the same number of examples each time, received \[9, 9, 3\]$"
    with pytest.raises(RuntimeError, match=message):
        gate_decisions(model)


def test_every_run_is_shaped_and_reached_by_a_loss() -> None:
    model, x = Repeated(), torch.randn(64, 4)
    keep_every_run(model)
    model(x)
    first, _ = gate_probabilities(model)
    gradients = [
        torch.autograd.grad(shaping([part]), model.first.to_logits[3].bias, retain_graph=True)[0]
        for part in (first, *first.split(4, dim=1))
    ]
    torch.testing.assert_close(2 * gradients[0], gradients[1] + gradients[2])
    assert all(bool((gradient != 0).all()) for gradient in gradients)


def test_a_backward_pass_that_runs_layers_again_leaves_the_last_forward_pass_to_be_read() -> None:
    network, first, last = Network(), images(), images()
    saving = Checkpointed(network)
    loss = saving(first).square().mean()
    saving(last)
    decisions = gate_decisions(network)
    loss.backward()
    assert same(gate_decisions(network), decisions)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_keeps_every_run(backend: str) -> None:
    torch.compiler.reset()
    model, x = repeated(), torch.randn(9, 4)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for step in range(2):
        with torch.no_grad():
            compiled(x + step)
            found = model.first.decisions
            model(x + step)
        assert torch.equal(found, model.first.decisions) and found.shape == (9, 8)


# Pickles of before


def test_a_pickle_finds_its_classes_where_they_were() -> None:
    for name, kind in (("ChannelGate", ChannelGate), ("Gate", Gate), ("GateCounts", GateCounts)):
        assert pickle.loads(f"cbatchshaping.gates\n{name}\n.".encode()) is kind


def test_the_state_of_a_gate_of_before_is_taken_over() -> None:
    gate, x = ChannelGate(3, 7).eval(), images()
    state = gate.__getstate__()
    del state["_runs"], state["_pass"]
    former = ChannelGate.__new__(ChannelGate)
    former.__setstate__({**state, "_logits": None, "_decisions": None})
    assert not hasattr(former, "decisions")
    assert torch.equal(former(x), gate(x)) and torch.equal(former.decisions, gate.decisions)
    assert vars(former).keys() == vars(gate).keys()


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
    # Not by the name of the package, which the folder of a clone and of an environment in it has too.
    package = str(Path(bs.__file__).parent)
    ours += [str(w.message) for w in seen if w.filename.startswith(package) or "gate" in str(w.message)]


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
