"""A pruned network gives what the network gives on the images, without what its static gates switch."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
from gated_resnets import LARGE, NETWORKS, make, output, with_statistics
from hypothesis import given, settings
from hypothesis import strategies as st
from test_timm_blocks import NETWORKS as TIMM
from test_timm_blocks import make as make_timm
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models.resnet import BasicBlock

import batchshaping as bs
from batchshaping.channel_gating.blocks import GatedBlock
from batchshaping.channel_gating.pruning import ClosedBlock, GatedLayer, what_stays
from batchshaping.gates.channel import ChannelGate, even_sizes
from batchshaping.gates.gate import keep_every_run, named_gates
from batchshaping.gates.static import StaticGates, find_static_gates, prune_static_gates

KINDS = [True, False, None]


def decide(gate: ChannelGate, always: Sequence[bool | None]) -> None:
    """Let gates be always open, always closed, or decide by the images."""
    bias = gate.to_logits[-1].bias
    with torch.no_grad():
        for k, kind in enumerate(always):
            if kind is not None:
                bias[k] = 1e4 if kind else -1e4


def with_static_gates(
    network: nn.Module, x: Tensor, seed: int = 0, kinds: Sequence[bool | None] = KINDS
) -> nn.Module:
    """The network with some of its gates static, chosen at random; the others open for half of the images."""
    random = torch.Generator().manual_seed(seed)
    gates = named_gates(network).values()
    for gate in gates:
        which = torch.randint(len(kinds), (gate.gates,), generator=random).tolist()
        decide(gate, [kinds[k] for k in which])
    if None in kinds:
        training = network.training
        # Each gate before those that read what it switches.
        hooks = [gate.to_logits.register_forward_hook(open_for_half) for gate in gates]
        with torch.no_grad():
            network.eval()(x)
        for hook in hooks:
            hook.remove()
        network.train(training)
    return network


def open_for_half(to_logits: nn.Sequential, _: Any, logits: Tensor) -> Tensor:
    """Shift the logits of a batch so that each gate that is not static is open for half of it."""
    ordered = logits.sort(dim=0).values
    middle = ordered[len(logits) // 2 - 1 : len(logits) // 2 + 1].mean(dim=0)
    shift = torch.where(middle.abs() < 100, middle, 0)
    to_logits[-1].bias -= shift
    return logits - shift


def assert_same(network: nn.Module, other: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected, found = output(network(x)), output(other(x))
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def some_images(size: int = 32) -> Tensor:
    return torch.randn(7, 3, size, size)


# It gives the same


@pytest.mark.parametrize("gates", [8, 3, None])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_stay_and_so_do_those_of_an_inference_copy(name: str, gates: int | None) -> None:
    # Of many gates in a layer some are of each kind, whatever the seed.
    for seed in range(2 if gates else 1):
        x = some_images(21)
        network = with_static_gates(make(name, gates), x, seed)
        pruned, _ = prune_static_gates(network, x.split(3))
        fast = bs.conditional_inference(pruned)
        assert_same(network, pruned, x)
        for images in (x, x[:1]):
            assert_same(pruned, fast, images)
        assert torch.equal(bs.count_macs(pruned, x[:2]), bs.count_macs(fast, x[:2]))


@pytest.mark.parametrize("name", LARGE)
def test_published_architectures_give_the_same(name: str) -> None:
    x = torch.randn(2, 3, 32, 32)
    network = with_static_gates(make(name), x)
    pruned, _ = prune_static_gates(network, [x])
    assert_same(network, pruned, x)
    assert_same(pruned, bs.conditional_inference(pruned), x)


@pytest.mark.parametrize("gates", [1, None])
@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm_give_the_same(name: str, gates: int | None) -> None:
    x = torch.randn(4, 3, 32, 32)
    network = with_static_gates(bs.gate_resnet(make_timm(name), gates_per_layer=gates).eval(), x, seed=4)
    pruned, _ = prune_static_gates(network, [x])
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in network.parameters())
    assert_same(network, pruned, x)
    assert_same(pruned, bs.conditional_inference(pruned), x)


@settings(max_examples=40)
@given(
    always=st.lists(st.lists(st.sampled_from(KINDS), min_size=8, max_size=8), min_size=2, max_size=2),
    name=st.sampled_from(["basic", "bottleneck", "ResNeXt", "bottleneck, no multiple of 16"]),
)
def test_any_pattern_of_static_gates_gives_the_same(always: list[list[bool | None]], name: str) -> None:
    """Of both gates of a bottleneck, and of the blocks one after the other."""
    network, x = make(name), some_images(17)
    for k, gate in enumerate(named_gates(network).values()):
        decide(gate, always[k % 2][: gate.gates])
    pruned, _ = prune_static_gates(network, [x])
    assert_same(network, pruned, x)
    assert_same(pruned, bs.conditional_inference(pruned), x)


# What is gone


@pytest.mark.parametrize("gates", [8, 3, None])
@pytest.mark.parametrize("name", ["basic", "basic, no multiple of 16", "small images"])
def test_channels_that_are_ever_open_stay_and_gates_that_are_conditional(
    name: str, gates: int | None
) -> None:
    x = some_images()
    network = with_static_gates(make(name, gates), x, seed=1)
    with torch.no_grad():
        network(x)
        decisions = dict(zip(named_gates(network), bs.gate_decisions(network), strict=True))
        pruned, static = prune_static_gates(network, x.split(2))
        pruned(x)
    assert static.images == 7
    for name, decided in decisions.items():
        share = decided.mean(dim=0)
        found = dict(enumerate(share.tolist()))
        assert [found[k] for k, kind in enumerate(static.always[name]) if kind is not None] == [
            float(kind) for kind in static.always[name] if kind is not None
        ]
        block = pruned.get_submodule(name.rpartition(".")[0])
        before = network.get_submodule(name)
        channels = torch.tensor(before.sizes or (1,) * before.gates)[share > 0].sum().item()
        if channels == 0:
            assert isinstance(block, ClosedBlock)
            continue
        assert block.conv1.out_channels == block.conv1.weight.shape[0] == channels
        assert block.bn1.num_features == len(block.bn1.running_var) == channels
        assert block.conv2.in_channels == block.conv2.weight.shape[1] == channels
        conditional = decided[:, (share > 0) & (share < 1)]
        if conditional.shape[1] == 0:
            assert block.gate1 is None
        else:
            assert torch.equal(block.gate1.decisions, conditional)


@pytest.mark.parametrize("gates", [8, None])
def test_what_is_computed_costs_the_same_but_for_the_gates(gates: int | None) -> None:
    x = some_images()
    network = with_static_gates(make("basic", gates), x, seed=2)
    pruned, static = prune_static_gates(network, [x])
    removed = sum(kind is not None for always in static.always.values() for kind in always)
    # Of each gate's MLP the last layer, 16 multiply-adds a gate, shrinks.
    expected = bs.count_macs(network, x) - 16 * removed
    gone = [name for name, always in static.always.items() if None not in always]
    expected -= sum(16 * network.get_submodule(name).in_channels for name in gone)
    assert torch.equal(bs.count_macs(pruned, x), expected)


def test_pruning_again_removes_nothing() -> None:
    x = some_images()
    network = with_static_gates(make("bottleneck"), x, seed=3)
    pruned, _ = prune_static_gates(network, [x])
    again, static = prune_static_gates(pruned, [x])
    assert {kind for always in static.always.values() for kind in always} <= {None}
    assert list(again.state_dict()) == list(pruned.state_dict())
    assert_same(pruned, again, x)


@pytest.mark.parametrize("name", ["basic", "bottleneck", "small images"])
def test_closed_blocks_are_their_shortcut_and_a_bias(name: str) -> None:
    x = some_images()
    network = with_static_gates(make(name), x, kinds=[False])
    pruned, _ = prune_static_gates(network, [x])
    blocks = [module for module in pruned.modules() if isinstance(module, ClosedBlock)]
    assert len(blocks) == sum(isinstance(module, GatedBlock) for module in network.modules())
    assert all({*block._modules} <= {"downsample", "relu"} for block in blocks)
    assert_same(network, pruned, x)
    assert_same(pruned, bs.conditional_inference(pruned), x)
    assert bs.count_macs(pruned, x)[0] < bs.count_macs(network, x)[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_open_networks_are_the_ungated_ones(name: str) -> None:
    x = some_images()
    network = with_static_gates(make(name), x, kinds=[True])
    ungated = with_statistics(NETWORKS[name]())
    pruned, _ = prune_static_gates(network, [x])
    assert [*pruned.state_dict()] == [*ungated.state_dict()]
    with bs.gates_forced(network, 1.0), torch.no_grad():
        expected = network(x)
    with torch.no_grad():
        assert torch.equal(pruned(x), expected)
    assert_same(network, bs.conditional_inference(pruned), x)
    assert torch.equal(bs.count_macs(pruned, x), bs.count_macs(ungated, x))
    # A network without gates that could be static is left as it is.
    again, static = prune_static_gates(pruned, [x])
    assert not static.always and "all" in str(static)
    assert_same(pruned, again, x)


def test_a_first_layer_that_is_always_closed_keeps_one_gate_for_a_second_that_is_not() -> None:
    network, x = make("bottleneck"), some_images()
    for name, gate in named_gates(network).items():
        decide(gate, [False if name.endswith("gate1") else None] * gate.gates)
    pruned, _ = prune_static_gates(network, [x])
    for block in (pruned[3], pruned[4]):
        assert block.conv1.out_channels == 16 and block.gate1.gates == 1
    assert_same(network, pruned, x)
    assert_same(pruned, bs.conditional_inference(pruned), x)


def test_what_nobody_reads_goes_whatever_its_gates_do() -> None:
    """A block whose second layer is always closed needs no first one."""
    network, x = make("bottleneck"), some_images()
    for name, gate in named_gates(network).items():
        decide(gate, [not name.endswith("gate2")] * gate.gates)
    pruned, _ = prune_static_gates(network, [x])
    assert isinstance(pruned[3], ClosedBlock) and isinstance(pruned[4], ClosedBlock)
    assert_same(network, pruned, x)


def test_groups_of_a_convolution_go_as_a_whole() -> None:
    network, x = make("ResNeXt", 4), some_images()  # 8 groups of 8 channels; a gate for two groups
    for gate in named_gates(network).values():
        decide(gate, [None, True, False, True])
    static = StaticGates(7, dict.fromkeys(named_gates(network), (None, True, False, True)))
    pruned = static.remove_from(network)
    for block in (pruned[3], pruned[4]):
        assert block.conv2.groups == 6 and block.conv2.weight.shape[:2] == (48, 8)
        assert block.conv1.out_channels == block.conv3.in_channels == 48
        # The order of channels must stay, and so must gates that are always open, beside those that are not.
        assert block.gate1.gates == block.gate2.gates == 3
    assert_same(network, pruned, x)


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6), st.booleans()),
        min_size=1,
        max_size=3,
    )
)
def test_what_stays_is_ever_open_in_an_order_that_gates_agree_with(
    layers: list[tuple[list[bool | None], bool]],
) -> None:
    given_layers = [GatedLayer(even_sizes(12, len(always)), always, 1, cut) for always, cut in layers]
    kept = what_stays(given_layers)
    for layer, stay in zip(given_layers, kept or [], strict=True) if kept else ():
        kind = [layer.always[gate] for gate, size in enumerate(layer.sizes) for _ in range(size)]
        assert len({*stay.channels}) == len(stay.channels) == sum(stay.sizes) > 0
        # Channel by channel, the gate that it had, or none where it was always open.
        of = [gate for gate, size in enumerate(layer.sizes) for _ in range(size)]
        at = 0
        for gate, size in zip(stay.gates, stay.sizes, strict=False):
            assert {of[channel] for channel in stay.channels[at : at + size]} == {gate}
            at += size
        assert all(kind[channel] is True for channel in stay.channels[at:])
        assert len(stay.sizes) - len(stay.gates) == (at < len(stay.channels))
        gone = {*range(12)} - {*stay.channels}
        assert all(kind[channel] is False for channel in gone) or layer is not given_layers[-1]
        assert layer.can_be_cut or not gone
    if kept is None:
        assert given_layers[-1].can_be_cut and {*given_layers[-1].always} == {False}


# What cannot be cut


def test_layers_that_mix_channels_or_have_other_weights_keep_their_channels() -> None:
    torch.manual_seed(0)
    mixed = BasicBlock(16, 16, norm_layer=lambda n: nn.GroupNorm(2, n))
    other = with_statistics(BasicBlock(16, 16))
    parametrizations.weight_norm(other.conv1)
    network = bs.gate_resnet(nn.Sequential(mixed, other), gates_per_layer=None).eval()
    x = torch.randn(5, 16, 9, 9)
    with_static_gates(network, x)
    pruned, _ = prune_static_gates(network, [x])
    for block in pruned:
        assert block.conv1.out_channels == block.conv2.in_channels == 16
    assert_same(network, pruned, x)
    for gate in named_gates(network).values():
        decide(gate, [True] * 16)
    opened, _ = prune_static_gates(network, [x])
    assert all(block.gate1 is None for block in opened)
    assert_same(network, opened, x)
    for gate in named_gates(network).values():
        decide(gate, [False] * 16)
    closed, _ = prune_static_gates(network, [x])
    assert_same(network, closed, x)


# A gated network as any other


def test_it_can_be_copied_saved_and_built_again() -> None:
    x = some_images()
    network = with_static_gates(make("bottleneck"), x, seed=5)
    pruned, static = prune_static_gates(network, [x])
    assert_same(network, copy.deepcopy(pruned), x)
    buffer = io.BytesIO()
    torch.save(pruned, buffer)
    buffer.seek(0)
    assert_same(network, torch.load(buffer, weights_only=False), x)
    written = json.loads(json.dumps(dataclasses.asdict(static)))
    again = StaticGates(**written).remove_from(make("bottleneck"))
    again.load_state_dict(pruned.state_dict())
    assert_same(network, again, x)


def test_it_can_be_trained_in_the_mode_of_the_network() -> None:
    x = some_images()
    network = with_static_gates(make("basic"), x, seed=5).train()
    network[0].weight.requires_grad_(False)
    pruned, _ = prune_static_gates(network, [x])
    assert all(module.training for module in pruned.modules())
    logits = pruned(x)
    loss = logits.square().mean() + bs.batch_shaping(bs.gate_probabilities(pruned), bs.Beta(0.6, 0.4), dim=0)
    loss.backward()
    learned = {name for name, p in pruned.named_parameters() if p.grad is not None}
    assert learned == {name for name, _ in pruned.named_parameters()} - {"0.weight"}


def test_forced_gates_are_those_that_are_left() -> None:
    x = some_images()
    network = with_static_gates(make("basic"), x, seed=6)
    pruned, _ = prune_static_gates(network, [x])
    fast = bs.conditional_inference(pruned)
    for share in (0.0, 0.5, 1.0):
        with bs.gates_forced(pruned, share, 1), bs.gates_forced(fast, share, 1):
            assert_same(pruned, fast, x)
        for one, other in zip(bs.gate_decisions(pruned), bs.gate_decisions(fast), strict=True):
            assert torch.equal(one, other)


def test_a_gate_that_runs_twice_is_static_if_it_is_in_both_runs() -> None:
    block = with_statistics(BasicBlock(32, 32))
    network = bs.gate_resnet(nn.Sequential(block, nn.Conv2d(32, 32, 1), block), gates_per_layer=2).eval()
    keep_every_run(network)
    x = torch.randn(9, 32, 9, 9)
    with torch.no_grad():
        network(x)
    runs = network[0].gate1.decisions.unflatten(1, (2, 2)).flatten(0, 1)
    share = runs.mean(dim=0).tolist()
    static = find_static_gates(network, [x])
    assert static.always["0.gate1"] == tuple({0.0: False, 1.0: True}.get(value) for value in share)
    pruned = static.remove_from(network)
    assert pruned[0] is pruned[2]
    assert_same(network, pruned, x)


def test_the_network_stays_as_it_is() -> None:
    x = some_images()
    network = with_static_gates(make("bottleneck"), x)
    before = copy.deepcopy(network.state_dict())
    prune_static_gates(network, [x])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(type(module.gate1) is ChannelGate for module in network.modules() if hasattr(module, "gate1"))


def test_images_may_come_as_a_data_loader_gives_them() -> None:
    x = some_images()
    network = with_static_gates(make("basic"), x)
    data = torch.utils.data.TensorDataset(x, torch.zeros(len(x)))
    by_loader = find_static_gates(network, torch.utils.data.DataLoader(data, batch_size=3))
    assert by_loader == find_static_gates(network, [x]) == find_static_gates(network, x.split(1))


def test_static_gates_are_shown_as_a_table() -> None:
    static = StaticGates(1234, {"layer1.0.gate1": (True, False, None, None), "layer2.0.gate1": (False,)})
    assert str(static).splitlines() == [
        "1,234 images    gates  always open  always closed  conditional",
        "layer1.0.gate1      4            1              1            2",
        "layer2.0.gate1      1            0              1            0",
        "all                 5            1              2            2",
    ]


# What is refused


@pytest.mark.parametrize(
    ("model", "images", "message"),
    [
        (nn.Linear(2, 2), [torch.ones(1, 2)], r"^model must hold a module [^\n]*, received a Linear without"),
        (nn.Sequential(bs.ChannelGate(3, 4)), [torch.ones(1, 3)], r"^model must hold a module [^\n]*$"),
        (make("basic"), [], r"^images must hold at least one, received none$"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(model: nn.Module, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune_static_gates(model, images)


def test_static_gates_of_another_network_are_refused_in_one_line() -> None:
    static = find_static_gates(make("basic", 2), [some_images()])
    with pytest.raises(ValueError, match=r"^model must have the gates [^\n]*, 2 in '3.gate1', received 4$"):
        static.remove_from(make("basic", 4))
    with pytest.raises(ValueError, match=r"^model must have the gates [^\n]*, 0 in '3.gate2', received 2$"):
        static.remove_from(make("bottleneck", 2))


def test_inference_copies_and_vision_transformers_are_refused() -> None:
    vit = bs.MSViT(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2))
    for model in (bs.conditional_inference(make("basic")), vit):
        with pytest.raises(ValueError, match=r"^model must hold a module that knows what is left"):
            prune_static_gates(model, [torch.randn(2, 3, 224, 224)])
