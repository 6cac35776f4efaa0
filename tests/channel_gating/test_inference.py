"""An inference copy gives what the network gives, whatever is open, and computes what is open alone."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gated_resnets import LARGE, NETWORKS, make, output, with_statistics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, ResNet

import batchshaping as bs
from batchshaping.channel_gating import inference
from batchshaping.channel_gating.blocks import GatedBlock
from batchshaping.channel_gating.inference import ConditionalBlock, SwitchedConvolution, open_channels
from batchshaping.gates import native
from batchshaping.gates.forced import gates_forced
from batchshaping.gates.gate import Gate, gate_decisions, gate_probabilities, keep_every_run, named_gates
from batchshaping.gates.packed import PackedConvolution, only_plain

SHARES = [0.0, 0.3, 0.6, 1.0]
WAYS = ["native", "masked", "gathered", "by group"]
AS_CHOSEN = ["native", "PyTorch"]
"""With native code, where there is a compiler, and without, in the way that a block chooses."""


@contextmanager
def by(way: str) -> Iterator[None]:
    """Let blocks compute in one way wherever they can."""
    with pytest.MonkeyPatch.context() as patch:
        if way != "native":
            patch.setattr(native, "library", lambda: None)
        if way not in AS_CHOSEN:
            patch.setattr(ConditionalBlock, "_way", lambda self, _: way if way in self._ways else "masked")
        yield


def computed(model: nn.Module, x: Tensor, share: float | None) -> tuple[Tensor, list[Tensor]]:
    """What it gives, and what its gates decided: by themselves without a share."""
    with torch.no_grad(), nullcontext() if share is None else gates_forced(model, share, seed=1):
        return output(model(x)), gate_decisions(model)


def assert_equal(
    network: nn.Module,
    fast: nn.Module,
    x: Tensor,
    share: float | None,
    ways: Sequence[str] = AS_CHOSEN,
    tolerance: float = 1e-5,
) -> None:
    """Both give the same with the same gates, in whichever of these ways the copy computes."""
    expected, decided = computed(network, x, share)
    for way in ways:
        with by(way):
            found, decisions = computed(fast, x, share)
        for one, other in zip(decisions, decided, strict=True):
            assert torch.equal(one, other), way
        assert found.shape == expected.shape and found.dtype == expected.dtype, way
        assert len(x) == 0 or (found - expected).abs().max() <= tolerance * expected.abs().max(), way


def blocks(fast: nn.Module) -> list[ConditionalBlock]:
    return [module for module in fast.modules() if isinstance(module, ConditionalBlock)]


@contextmanager
def without_onednn() -> Iterator[None]:
    """As ``torch.backends.mkldnn.flags(enabled=False)``, which warns."""
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)


# It gives the same


@pytest.mark.parametrize("gates", [8, 3, None])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_gives_what_the_network_gives_whatever_is_open(name: str, gates: int | None) -> None:
    network = make(name, gates)
    fast = bs.conditional_inference(network)
    assert len(blocks(fast)) == sum(isinstance(module, GatedBlock) for module in network.modules())
    for n, size in ((1, 32), (3, 21)):
        x = torch.randn(n, 3, size, size)
        for share in (None, *SHARES):
            assert_equal(network, fast, x, share)


@pytest.mark.parametrize("gates", [8, None])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_way_gives_the_same(name: str, gates: int | None) -> None:
    """Also when a size comes again, for which weights are packed then."""
    network = make(name, gates)
    fast = bs.conditional_inference(network)
    for n, size in ((1, 32), (3, 32), (6, 9)):
        for share in (0.2, 0.7, 0.5):
            assert_equal(network, fast, torch.randn(n, 3, size, size), share, WAYS)


@pytest.mark.parametrize("name", LARGE)
def test_published_architectures_give_the_same(name: str) -> None:
    network = make(name)
    fast = bs.conditional_inference(network)
    for n, share in ((1, 0.5), (2, None)):
        assert_equal(network, fast, torch.randn(n, 3, 64, 64), share)


@pytest.mark.parametrize("gates", [(4, 2), (None, 4), (1, 4)])
def test_layers_of_a_bottleneck_can_have_other_gates(gates: tuple[int | None, int | None]) -> None:
    network = make("bottleneck", gates)
    fast = bs.conditional_inference(network)
    for share in SHARES:
        assert_equal(network, fast, torch.randn(3, 3, 32, 32), share)


@settings(max_examples=30, deadline=None)
@given(
    bits=st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=1, max_size=9),
    way=st.sampled_from(WAYS),
    name=st.sampled_from(["basic", "bottleneck", "ResNeXt"]),
)
def test_any_pattern_of_gates_gives_the_same(bits: list[list[bool]], way: str, name: str) -> None:
    """Each image has its own; some have the same, all open, or none."""
    network, fast = PAIRS[name]
    decided = torch.tensor(bits).float()

    def decide(logits: Tensor, layer: int) -> Tensor:
        return decided.roll(layer, dims=0)[:, : logits.shape[1]].contiguous()

    for model in (network, fast):
        for layer, gate in enumerate(named_gates(model).values()):
            gate._forced = (lambda logits, layer=layer: decide(logits, layer),)
    assert_equal(network, fast, torch.randn(len(bits), 3, 17, 17), None, [way])


PAIRS = {
    name: (network, bs.conditional_inference(network))
    for name in ("basic", "bottleneck", "ResNeXt")
    for network in [make(name)]
}


@pytest.mark.parametrize("gates", [8, None])
@pytest.mark.parametrize("name", ["basic", "bottleneck", "ResNeXt"])
def test_without_onednn_it_gives_the_same(name: str, gates: int | None) -> None:
    network = make(name, gates)
    fast = bs.conditional_inference(network)
    with without_onednn():
        assert_equal(network, fast, torch.randn(3, 3, 32, 32), 0.5, WAYS)
        assert_equal(network, fast, torch.randn(1, 3, 32, 32), 0.5)
    for layer in packed(fast):
        for parts in layer._by_size.values():
            assert not any(weight.is_mkldnn for part in parts.values() for weight, _ in part)


@pytest.mark.parametrize("name", ["basic", "bottleneck", "ResNeXt"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_give_the_same_to_theirs(name: str, dtype: torch.dtype) -> None:
    network = make(name).to(dtype)
    fast = bs.conditional_inference(network)
    x = torch.randn(3, 3, 32, 32, dtype=dtype)
    assert_equal(network, fast, x, 0.5, WAYS, 1e-12 if dtype == torch.float64 else 0.03)


def test_images_in_any_order_of_memory_give_the_same() -> None:
    network = make("basic")
    fast = bs.conditional_inference(network)
    x = torch.randn(3, 32, 32, 3).permute(0, 3, 1, 2)
    assert_equal(network, fast, x, 0.5)
    assert_equal(network, fast, x[:, :, ::2, 1:], 0.5)
    assert_equal(network, fast, x[:0], 0.5)


def test_a_network_in_training_is_copied_as_in_evaluation() -> None:
    network = make("basic").train()
    fast = bs.conditional_inference(network)
    assert network.training and not fast.training
    assert_equal(network.eval(), fast, torch.randn(2, 3, 32, 32), 0.5)


def test_a_block_alone_and_one_that_is_used_twice_give_the_same() -> None:
    block = bs.gate_resnet(with_statistics(BasicBlock(32, 32)), gates_per_layer=2)
    x = torch.randn(3, 32, 9, 9)
    assert_equal(block, bs.conditional_inference(block), x, 0.5)
    twice = bs.gate_resnet(
        nn.Sequential(*[with_statistics(BasicBlock(32, 32))] * 2), gates_per_layer=2
    ).eval()
    keep_every_run(twice)
    fast = bs.conditional_inference(twice)
    assert fast[0] is fast[1]
    assert_equal(twice, fast, x, None)
    assert gate_decisions(fast)[0].shape == (3, 4)


def test_layers_that_follow_a_convolution_elsewhere_too_are_not_folded() -> None:
    class Odd(nn.Module):
        """With a normalization that two convolutions share, and an output that is used twice."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(3, 32, 1)
            self.three, self.norm3 = nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)
            self.norm, self.relu = nn.BatchNorm2d(32), nn.ReLU()
            self.block = BasicBlock(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.norm(self.one(x))) + self.relu(self.norm(self.two(x)))
            z = self.three(y)
            return self.block(self.norm3(z)) + z

    network = bs.gate_resnet(with_statistics(Odd()), gates_per_layer=2).eval()
    fast = bs.conditional_inference(network)
    assert isinstance(fast.norm, nn.BatchNorm2d) and isinstance(fast.norm3, nn.BatchNorm2d)
    assert_equal(network, fast, torch.randn(2, 3, 9, 9), 0.5)


def test_a_forward_pass_that_cannot_be_traced_gives_the_same() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.block = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), BasicBlock(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.stem(x))
            return self.block(y if y.sum() > 0 else -y)

    network = bs.gate_resnet(with_statistics(Branching()), gates_per_layer=2).eval()
    assert_equal(network, bs.conditional_inference(network), torch.randn(2, 3, 9, 9), 0.5)


# It computes what is open alone


def test_closed_blocks_compute_nothing_but_the_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = bs.conditional_inference(make("basic"))
    calls = []
    for name in ("of_open", "add_open"):
        original = getattr(SwitchedConvolution, name)
        monkeypatch.setattr(
            SwitchedConvolution,
            name,
            lambda *args, original=original, **kwargs: (calls.append(1), original(*args, **kwargs))[1],
        )
    with by("gathered"):
        for _ in range(3):
            with torch.no_grad(), gates_forced(fast, 0.0):
                fast(torch.randn(2, 3, 32, 32))
            assert not calls
        with torch.no_grad(), gates_forced(fast, 0.5):
            fast(torch.randn(2, 3, 32, 32))
        assert calls


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
@pytest.mark.parametrize("seed", range(4))
def test_the_operations_that_run_are_the_multiply_adds_that_are_counted(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By convolutions alone, since torch's counter does not see products in place."""
    monkeypatch.setattr(SwitchedConvolution, "_is_product", lambda *_: False)
    fast, x = bs.conditional_inference(make(name)), torch.randn(1, 3, 32, 32)
    with gates_forced(fast, 0.5, seed):
        counted = bs.count_macs(fast, x).item()
    with (
        without_onednn(),
        by("gathered"),
        gates_forced(fast, 0.5, seed),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        fast(x)
    found = counter.get_total_flops() / 2
    if all(bool(layer.any()) for layer in gate_decisions(fast)):
        assert found == pytest.approx(counted, rel=1e-6)
    else:  # A block whose last gates are closed leaves out what its first gates opened.
        assert found <= counted


@pytest.mark.parametrize("gates", [8, None])
@pytest.mark.parametrize("name", ["basic", "bottleneck, no multiple of 16", "ResNeXt", "small images"])
def test_a_copy_costs_what_the_network_does(name: str, gates: int | None) -> None:
    network = make(name, gates)
    fast = bs.conditional_inference(network)
    x = torch.randn(3, 3, 16, 16)
    for share in SHARES:
        counts = []
        for model in (network, fast):
            with gates_forced(model, share, 5):
                counts.append(bs.count_macs(model, x))
        assert torch.equal(*counts)


# Its gates


def test_gates_have_the_names_of_the_network_and_can_be_read() -> None:
    network = make("bottleneck")
    fast = bs.conditional_inference(network)
    assert list(named_gates(fast)) == list(named_gates(network))
    x = torch.randn(4, 3, 32, 32)
    computed(network, x, None)
    for way in AS_CHOSEN:
        with by(way):
            computed(fast, x, None)
        for one, other in zip(gate_probabilities(network), gate_probabilities(fast), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# It is a module


def copied(model: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)
    return model.double().float()


def packed(fast: nn.Module) -> list[PackedConvolution]:
    return [module for module in fast.modules() if isinstance(module, PackedConvolution)]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "to"])
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_copies_give_the_same_and_hold_nothing_packed(name: str, how: str) -> None:
    network = make(name)
    fast = bs.conditional_inference(network)
    x = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        assert_equal(network, fast, x, 0.5)
    assert any(parts for layer in packed(fast) for parts in layer._by_size.values())
    other = copied(fast, how)
    assert not any(layer._by_size or layer._made for layer in packed(other))
    assert_equal(network, other, x, 0.5)


def test_a_state_dict_has_all_and_nothing_stale_stays_after_it_is_loaded() -> None:
    networks = [make("basic"), make("basic")]
    with torch.no_grad():
        for p in networks[1].parameters():
            p.add_(0.01 * torch.randn_like(p))
    one, other = map(bs.conditional_inference, networks)
    x = torch.randn(2, 3, 32, 32)
    assert_equal(networks[0], one, x, 0.5, WAYS)
    one.load_state_dict(other.state_dict())
    assert_equal(networks[1], one, x, 0.5, WAYS)
    assert not list(one[3].parameters())


@pytest.mark.usefixtures("random_clock")
def test_the_network_stays_as_it_is() -> None:
    network = make("basic").train()
    before = copy.deepcopy(network.state_dict())
    classes = [type(module) for module in network.modules()]
    hooks = [len(module._forward_pre_hooks) for module in network.modules()]
    fast = bs.conditional_inference(network, torch.randn(1, 3, 32, 32))
    for way in AS_CHOSEN:
        with by(way):
            computed(fast, torch.randn(1, 3, 32, 32), None)
    for tensor in fast.state_dict().values():
        tensor.zero_()
    assert [type(module) for module in network.modules()] == classes
    assert [len(module._forward_pre_hooks) for module in network.modules()] == hooks
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("way", AS_CHOSEN)
def test_threads_can_use_the_same_copy(way: str) -> None:
    network = make("basic")
    fast = bs.conditional_inference(network)
    images = [torch.randn(5, 3, size, size) for size in (24, 32, 40, 48)]
    with torch.no_grad():
        expected = [network(x) for x in images]
    found: list[list[Tensor]] = [[] for _ in images]

    def run(k: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found[k].append(fast(images[k]))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(images))]
    with by(way):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for k, outputs in enumerate(found):
        assert len(outputs) == 5
        for y in outputs:
            torch.testing.assert_close(y, expected[k], rtol=1e-4, atol=1e-5)


def test_under_inference_mode_images_side_by_side_give_the_same() -> None:
    network = make("basic")
    fast = bs.conditional_inference(network)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        x = torch.randn(6, 3, 32, 32)
        with torch.inference_mode():
            assert_equal(network, fast, x, 0.5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_weights_are_packed_for_the_latest_sizes_and_no_pattern_of_gates_adds_any() -> None:
    fast = bs.conditional_inference(make("basic"))

    def number() -> int:
        every = [
            made for layer in packed(fast) for by_name in layer._by_size.values() for made in by_name.items()
        ]
        return sum(len(parts) for name, parts in every if name != "programs")

    with torch.no_grad(), by("masked"):
        numbers = []
        with gates_forced(fast, 1.0):
            for _ in range(2):
                fast(torch.randn(1, 3, 32, 32))
        for seed in range(30):
            with gates_forced(fast, 0.5, seed):
                fast(torch.randn(1, 3, 32, 32))
            numbers.append(number())
        assert numbers[10] == numbers[-1]
        for size in range(20, 40):
            fast(torch.randn(1, 3, size, size))
        assert all(len(layer._by_size) <= PackedConvolution.SIZES for layer in packed(fast))


def test_tracers_follow_a_copy() -> None:
    network = bs.gate_resnet(
        with_statistics(ResNet(BasicBlock, [2, 1, 1, 1], num_classes=5)), gates_per_layer=8
    ).eval()
    fast, x = bs.conditional_inference(network), torch.randn(2, 3, 64, 64)
    torch.compiler.reset()
    with torch.no_grad():
        expected = create_feature_extractor(network, ["layer2", "fc"]).eval()(x)
        exported = torch.export.export(fast.eval(), (x,), strict=False).module()
        outputs = [exported(x), torch.compile(fast, backend="eager")(x)]
        for way in AS_CHOSEN:
            with by(way):
                found = create_feature_extractor(fast, ["layer2", "fc"]).eval()(x)
                outputs += [found["fc"], torch.fx.symbolic_trace(fast)(x)]
            torch.testing.assert_close(found["layer2"], expected["layer2"], rtol=1e-4, atol=1e-4)
    for y in outputs:
        torch.testing.assert_close(y, expected["fc"], rtol=1e-4, atol=1e-4)


# Plans


@pytest.fixture
def random_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by chance: any way may be the fastest, and to measure takes no time."""
    seconds = itertools.accumulate(iter(np.random.default_rng(0).exponential, None))
    monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))


@pytest.mark.usefixtures("random_clock")
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_a_plan_is_measured_for_the_example_and_kept(name: str, n: int) -> None:
    network, x = make(name), torch.randn(n, 3, 16, 16)
    fast = bs.conditional_inference(network, x)
    assert len({way for block in blocks(fast) for plan in block.plans.values() for _, way in plan}) > 1
    for block in blocks(fast):
        ((size, plan),) = block.plans.items()
        assert size[0] == min(n, 2) and all(way in block._ways for _, way in plan)
        assert [limit for limit, _ in plan] == sorted(limit for limit, _ in plan)
    for model in (fast, copy.deepcopy(fast)):
        for share in SHARES:
            assert_equal(network, model, x, share)
        assert_equal(network, model, torch.randn(2, 3, 21, 21), 0.5)
        assert all(block.plans for block in blocks(model))


# What is refused


def test_training_and_gradients_are_refused_in_one_line() -> None:
    fast = bs.conditional_inference(make("basic"))
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(RuntimeError, match=r"^an inference copy gives no gradient, [^\n]*$"):
        fast(x.requires_grad_())
    with torch.no_grad():
        fast(x)
    fast.train()
    with pytest.raises(RuntimeError, match=r"^an inference copy cannot be trained[^\n]*$"):
        fast(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_no_silent_number(value: float) -> None:
    network = make("basic")
    fast = bs.conditional_inference(network)
    x = torch.randn(3, 3, 32, 32)
    y = x.clone()
    x[1, 2, 5, 7] = value
    expected = [computed(network, images, None)[0] for images in (x, y)]
    assert bool(expected[0][1].isnan().any())
    for way in AS_CHOSEN:
        with by(way):
            found = [computed(fast, images, None)[0] for images in (x, y)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert not only_plain.get()
    with torch.no_grad():
        network[3].conv1.weight[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"^weights must be finite, received 3\.conv1\.weight with [^\n]*$"):
        bs.conditional_inference(network)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(bs.ChannelGate(3, 4))])
def test_a_model_without_gated_blocks_is_refused_in_one_line(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"^model must hold [^\n]*, received a [^\n]*$"):
        bs.conditional_inference(model)


# Open channels


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=40))
def test_open_channels_are_those_of_the_open_gates(gates: list[tuple[int, bool]]) -> None:
    sizes, is_open = (tuple(values) for values in zip(*gates, strict=True))
    found = open_channels(sizes, is_open)
    expected = np.flatnonzero(np.repeat(is_open, sizes))
    values = torch.randn(3, sum(sizes))
    assert torch.equal(found.select(values, 1), values[:, expected])
    assert found.channels == len(expected) and found.is_all == all(is_open)
    assert found.gates == tuple(k for k, value in enumerate(is_open) if value)
    assert all(first < end for first, end in found.runs)
    assert all(end < first for (_, end), (first, _) in zip(found.runs, found.runs[1:], strict=False))


def test_a_gate_of_a_copy_is_a_gate() -> None:
    fast = bs.conditional_inference(make("basic"))
    assert all(isinstance(block.gate1, Gate) for block in blocks(fast))
