"""What a gate decides, what its gradient is, and that a loss can reach it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

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


def test_there_are_no_statistics_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one example and one gate"):
        GateCounts(classes=2).statistics()


def test_a_gate_in_training_says_that_it_needs_two_examples() -> None:
    gate = ChannelGate(3, 4)
    with pytest.raises(ValueError, match="needs at least 2 examples, received 1"):
        gate(torch.randn(1, 3))
    assert gate.eval()(torch.randn(1, 3)).shape == (1, 4)
