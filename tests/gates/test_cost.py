"""Multiply-adds against PyTorch's own count of networks from which the closed channels are really removed."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18, resnet50, resnext50_32x4d, swin_t, vit_b_16
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.segmentation import fcn_resnet50

import batchshaping as bs
from batchshaping.channel_gating import multiply_adds as former
from batchshaping.channel_gating.resnets import SmallImageResNet
from batchshaping.gates.channel import ChannelGate
from batchshaping.gates.cost import Constant, ConvolutionTerm, GateRun, MultiplyAdds, Switched, count_macs
from batchshaping.gates.forced import gates_forced
from batchshaping.gates.gate import gate_decisions, gate_probabilities, keep_every_run, named_gates


def multiply_adds(model: nn.Module, x: Tensor) -> float:
    """Of one example: PyTorch counts a multiplication and an addition as two operations.

    It counts neither the kernels of attention on the CPU nor the fused ones of its transformer layers.
    """
    counter, fused = FlopCounterMode(display=False), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(x[:1])
    torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() / 2


def tiny(block: type[nn.Module], **settings: int) -> ResNet:
    """A torchvision ResNet of two stages with few channels."""
    network = ResNet(block, [2, 1, 1, 1], num_classes=5, **settings)
    network.layer3, network.layer4 = nn.Identity(), nn.Identity()
    network.fc = nn.LazyLinear(5)
    network(torch.randn(2, 3, 32, 32))
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "basic, small images": lambda: SmallImageResNet(14, 5, width=16),
    "basic": lambda: tiny(BasicBlock),
    "bottleneck": lambda: tiny(Bottleneck),
}
UNEVEN: dict[str, Callable[[], nn.Module]] = {
    "basic, no multiples of 16": lambda: SmallImageResNet(8, 5, width=50)
}
GROUPED: dict[str, Callable[[], nn.Module]] = {
    "ResNeXt": lambda: tiny(Bottleneck, groups=4, width_per_group=8),
    "as many groups as channels": lambda: tiny(Bottleneck, groups=64, width_per_group=1),
}


# Slim networks


class Nothing(nn.Module):
    """A convolution without an input channel or without an output channel, which torch does not compute."""

    def __init__(self, layer: nn.Conv2d, channels: int) -> None:
        super().__init__()
        self.layer = [layer]
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self.layer
        settings = zip(
            x.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in settings]
        return x.new_zeros(len(x), self.channels, *size)


def slim_convolution(layer: nn.Conv2d, inputs: Tensor | None, outputs: Tensor | None) -> nn.Module:
    weight = layer.weight.detach()
    weight = weight if outputs is None else weight[outputs]
    weight = weight if inputs is None else weight[:, inputs]
    if weight.numel() == 0:
        return Nothing(layer, len(weight))
    slim = nn.Conv2d(
        weight.shape[1], weight.shape[0], layer.kernel_size, layer.stride, layer.padding, bias=False
    )
    slim.weight.data = weight
    return slim


def slim_normalization(layer: nn.BatchNorm2d, channels: Tensor) -> nn.Module:
    if len(channels) == 0:
        return nn.Identity()
    slim = nn.BatchNorm2d(len(channels))
    slim.load_state_dict(
        {name: value[channels] if value.ndim else value for name, value in layer.state_dict().items()}
    )
    return slim


def residual_blocks(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, BasicBlock | Bottleneck))


def slim_network(ungated: nn.Module, decisions: list[Tensor]) -> nn.Module:
    """A network with only the channels that are open for one example.

    Decisions are a vector for each gate module, with a value for each channel.
    """
    slim = copy.deepcopy(ungated)
    kept = iter([layer.nonzero().flatten() for layer in decisions])
    for block in residual_blocks(slim):
        first = next(kept)
        block.conv1 = slim_convolution(block.conv1, None, first)
        block.bn1 = slim_normalization(block.bn1, first)
        if isinstance(block, BasicBlock):
            block.conv2 = slim_convolution(block.conv2, first, None)
        else:
            second = next(kept)
            block.conv2 = slim_convolution(block.conv2, first, second)
            block.bn2 = slim_normalization(block.bn2, second)
            block.conv3 = slim_convolution(block.conv3, second, None)
    assert next(kept, None) is None
    return slim


def without_branches(ungated: nn.Module) -> nn.Module:
    """A network whose blocks are their shortcuts."""
    bare = copy.deepcopy(ungated)
    for block in residual_blocks(bare):
        block.forward = lambda x, block=block: x if block.downsample is None else block.downsample(x)
    return bare


def cost_of_gates(gated: nn.Module) -> int:
    """Two matrices each, once an example."""
    return sum(
        gate.in_channels * first.out_features + last.in_features * last.out_features
        for gate in named_gates(gated).values()
        for first, _, _, last in [gate.to_logits]
    )


def by_channel(gated: nn.Module, decisions: list[Tensor], n: int) -> list[Tensor]:
    """What was decided for each channel of one example."""
    values = []
    for gate, layer in zip(named_gates(gated).values(), decisions, strict=True):
        sizes = gate.sizes or [1] * layer.shape[1]
        values.append(torch.cat([value.expand(size) for value, size in zip(layer[n], sizes, strict=True)]))
    return values


@pytest.mark.parametrize(
    ("gates_per_layer", "share", "seed"), [(None, 0.3, 0), (None, 0.9, 1), (2, 0.5, 1), (8, 0.3, 2)]
)
@pytest.mark.parametrize("name", [*NETWORKS, *UNEVEN])
def test_an_example_costs_what_the_network_of_its_open_channels_does(
    name: str, gates_per_layer: int | None, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    ungated = {**NETWORKS, **UNEVEN}[name]()
    gated = bs.gate_resnet(copy.deepcopy(ungated), hidden=3, gates_per_layer=gates_per_layer).eval()
    x = torch.randn(2, 3, 32, 24)
    with gates_forced(gated, share, seed):
        found = count_macs(gated, x)
    decisions = gate_decisions(gated)
    with gates_forced(gated, share, seed), torch.no_grad():
        outputs = gated(x)
    assert found.shape == (2,)
    for n in range(2):
        slim = slim_network(ungated, by_channel(gated, decisions, n))
        example = x[n : n + 1]
        expected = multiply_adds(slim, example) + cost_of_gates(gated)
        assert found[n].item() == pytest.approx(expected, rel=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(slim(example)[0], outputs[n], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [resnet18, resnet50])
def test_the_full_networks_cost_what_their_slim_ones_do(make: Callable[..., nn.Module]) -> None:
    ungated = make()
    gated = bs.gate_resnet(copy.deepcopy(ungated))
    x = torch.randn(1, 3, 64, 64)
    with gates_forced(gated, 0.3, seed=1):
        found = count_macs(gated, x)
    slim = slim_network(ungated, [layer[0] for layer in gate_decisions(gated)])
    assert found.item() == pytest.approx(multiply_adds(slim, x) + cost_of_gates(gated), rel=1e-6)


@pytest.mark.parametrize("name", GROUPED)
def test_with_groups_an_example_costs_the_pairs_of_open_channels_within_each(name: str) -> None:
    ungated = GROUPED[name]()
    gated = bs.gate_resnet(copy.deepcopy(ungated), hidden=3)
    x = torch.randn(2, 3, 16, 16)
    cost = MultiplyAdds.measure(gated, x)
    with gates_forced(gated, 0.6, seed=2):
        gated(x)
    decisions = gate_decisions(gated)
    layers = cost.per_layer(decisions)
    sizes = output_sizes(ungated, x)
    gates = iter(decisions)
    for block_name, block in gated.named_modules():
        if not hasattr(block, "gate1"):
            continue
        first, second = next(gates), next(gates)
        width, groups = block.conv2.in_channels, block.conv2.groups
        for n in range(2):
            pairs = sum(
                first[n, i].item() * second[n, o].item()
                for i, o in itertools.product(range(width), repeat=2)
                if i * groups // width == o * groups // width
            )
            found = layers[f"{block_name}.conv2"][n].item()
            assert found == pytest.approx(9 * sizes[f"{block_name}.conv2"] * pairs, rel=1e-6)
            reduced = block.conv1.in_channels * sizes[f"{block_name}.conv1"] * first[n].sum().item()
            assert layers[f"{block_name}.conv1"][n].item() == pytest.approx(reduced, rel=1e-6)
            expanded = block.conv3.out_channels * sizes[f"{block_name}.conv3"] * second[n].sum().item()
            assert layers[f"{block_name}.conv3"][n].item() == pytest.approx(expanded, rel=1e-6)


def output_sizes(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Height times width of what each convolution gives."""
    sizes: dict[str, int] = {}

    def see(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _, __, output: sizes.update({name: output[0, 0].numel()})

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(see(name))
    with torch.no_grad():
        model(x)
    return sizes


# All gates open, and all closed


@pytest.mark.parametrize("name", [*NETWORKS, *GROUPED])
def test_open_networks_cost_what_the_ungated_ones_do_and_their_gates(name: str) -> None:
    ungated = {**NETWORKS, **GROUPED}[name]()
    gated = bs.gate_resnet(copy.deepcopy(ungated), hidden=3)
    x = torch.randn(2, 3, 32, 24)
    cost, dense = MultiplyAdds.measure(gated, x), multiply_adds(ungated, x)
    assert (cost.dense, cost.gates) == (dense, cost_of_gates(gated))
    assert multiply_adds(gated, x) == dense + cost.gates
    with gates_forced(gated, 1.0):
        assert count_macs(gated, x).tolist() == [dense + cost.gates] * 2
    assert count_macs(ungated, x).tolist() == [dense] * 2
    assert MultiplyAdds.measure(ungated, x).gates == 0


@pytest.mark.parametrize("name", [*NETWORKS, *GROUPED])
def test_closed_networks_cost_what_their_shortcuts_do_and_their_gates(name: str) -> None:
    ungated = {**NETWORKS, **GROUPED}[name]()
    gated = bs.gate_resnet(copy.deepcopy(ungated), hidden=3)
    x = torch.randn(2, 3, 32, 24)
    fixed = multiply_adds(without_branches(ungated), x) + cost_of_gates(gated)
    assert MultiplyAdds.measure(gated, x).fixed == fixed
    with gates_forced(gated, 0.0):
        assert count_macs(gated, x).tolist() == [fixed] * 2


@pytest.mark.parametrize("make", [resnet18, resnet50, resnext50_32x4d])
def test_the_cost_of_the_networks_of_torchvision_is_that_of_pytorch(make: Callable[..., nn.Module]) -> None:
    network, x = make(), torch.randn(2, 3, 64, 64)
    dense = multiply_adds(network, x)
    assert MultiplyAdds.measure(network, x).dense == dense
    assert MultiplyAdds.measure(bs.gate_resnet(network), x).dense == dense


# Other layers


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 8, 3, dilation=2, padding=2), (2, 3, 11, 9)),
        (nn.Conv2d(3, 8, (1, 5), stride=(2, 3), bias=False), (2, 3, 11, 9)),
        (nn.Conv2d(6, 8, 3, groups=2, padding="same"), (2, 6, 11, 9)),
        (nn.Conv1d(4, 8, 3, stride=2), (2, 4, 11)),
        (nn.Conv3d(2, 4, 3), (2, 2, 5, 6, 7)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 7, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (2, 4, 7, 5)),
        (nn.ConvTranspose1d(4, 6, 4, stride=2), (2, 4, 7)),
        (nn.Linear(5, 7), (2, 5)),
        (nn.Linear(5, 7, bias=False), (2, 9, 5)),
        (nn.Linear(5, 7), (2, 3, 4, 5)),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.ReLU(), nn.Dropout()), (2, 3, 4)),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2)), (2, 3, 4, 4)),
    ],
)
def test_a_layer_costs_what_pytorch_counts(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert count_macs(layer, x).tolist() == [multiply_adds(layer, x)] * 2


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_cost_of_an_example_is_that_of_its_own_whatever_the_batch(batch: int) -> None:
    network = SmallImageResNet(8, width=4)
    assert (
        count_macs(network, torch.randn(batch, 3, 16, 16)).tolist()
        == [multiply_adds(network, torch.randn(1, 3, 16, 16))] * batch
    )


def test_layers_that_run_twice_are_counted_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 3, 3, padding=1)
            self.same = self.convolution
            self.never = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.same(nn.functional.max_pool2d(self.convolution(x), 2))

    x = torch.randn(2, 3, 8, 8)
    assert count_macs(Twice(), x).tolist() == [9 * 9 * (64 + 16)] * 2 == [multiply_adds(Twice(), x)] * 2


def test_a_model_that_gives_a_dictionary_is_counted() -> None:
    ungated = fcn_resnet50(weights=None, weights_backbone=None, num_classes=3)
    x = torch.randn(2, 3, 32, 32)
    dense = multiply_adds(ungated, x)
    gated = bs.gate_resnet(copy.deepcopy(ungated))
    assert MultiplyAdds.measure(gated, x).dense == dense
    with gates_forced(gated, 0.5, seed=1):
        found = count_macs(gated, x)
    slim_backbone = slim_of_dilated(ungated, [layer[0] for layer in gate_decisions(gated)])
    expected = multiply_adds(slim_backbone, x) + cost_of_gates(gated)
    assert found[0].item() == pytest.approx(expected, rel=1e-6)


def slim_of_dilated(ungated: nn.Module, decisions: list[Tensor]) -> nn.Module:
    """The same, where the 3 x 3 convolutions may have a dilation."""
    slim = slim_network(ungated, decisions)
    for block, original in zip(residual_blocks(slim), residual_blocks(ungated), strict=True):
        block.conv2.dilation = original.conv2.dilation
    return slim


# What the count leaves alone


def hooks(module: nn.Module) -> tuple[int, int]:
    return len(module._forward_pre_hooks), len(module._forward_hooks)


@pytest.mark.parametrize("training", [True, False])
def test_counting_changes_nothing_in_the_model(training: bool) -> None:
    model = bs.gate_resnet(SmallImageResNet(8, width=4), hidden=3).train(training)
    model.layer2.train(not training)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    random, registered = torch.get_rng_state(), [hooks(module) for module in model.modules()]
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    count_macs(model, x)
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    assert [hooks(module) for module in model.modules()] == registered
    assert all(p.grad is None for p in model.parameters())


def test_a_forward_pass_that_fails_leaves_the_model_as_it_was() -> None:
    model = bs.gate_resnet(SmallImageResNet(8, width=4), hidden=3)
    registered = [hooks(module) for module in model.modules()]
    with pytest.raises(RuntimeError):
        count_macs(model, torch.randn(2, 5, 8, 8))
    assert all(module.training for module in model.modules())
    assert [hooks(module) for module in model.modules()] == registered


def test_the_gates_counted_are_those_of_evaluation() -> None:
    model, x = bs.gate_resnet(SmallImageResNet(8, width=4), hidden=3), torch.randn(16, 3, 8, 8)
    found = count_macs(model.train(), x)
    assert torch.equal(count_macs(model.eval(), x), found)
    with torch.no_grad():
        model(x)
    assert torch.equal(MultiplyAdds.measure(model, x).per_example(gate_decisions(model)), found)


# By layer, and in expectation


@pytest.mark.parametrize("name", [*NETWORKS, *GROUPED])
def test_the_layers_add_up(name: str) -> None:
    gated = bs.gate_resnet({**NETWORKS, **GROUPED}[name](), hidden=3)
    x = torch.randn(4, 3, 16, 16)
    cost = MultiplyAdds.measure(gated, x)
    with gates_forced(gated, 0.5):
        gated(x)
    layers = cost.per_layer(gate_decisions(gated))
    torch.testing.assert_close(
        torch.stack([*layers.values()]).double().sum(dim=0),
        cost.per_example(gate_decisions(gated)).double(),
        rtol=1e-6,
        atol=0,
    )
    names = {name for name, module in gated.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert set(layers) == names
    assert all(value.shape == (4,) for value in layers.values())


def test_the_layers_of_a_model_without_blocks_add_up_for_each_example() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), ChannelGate(4, 4)).eval(), torch.randn(5, 3, 8, 8)
    cost = MultiplyAdds.measure(model, x)
    model(x)
    found = cost.per_example(gate_decisions(model))
    assert found.tolist() == [36 * 3 * 36 + 2 * 4 * 16] * 5
    assert (
        torch.stack([*cost.per_layer(gate_decisions(model)).values()]).sum(dim=0).tolist() == found.tolist()
    )


@pytest.mark.parametrize(
    ("make", "channels", "groups"), [(BasicBlock, 3, 1), (Bottleneck, 8, 1), (Bottleneck, 8, 2)]
)
def test_probabilities_give_the_expectation_over_all_decisions(
    make: type[nn.Module], channels: int, groups: int
) -> None:
    block = make(channels, channels if make is BasicBlock else channels // 4, groups=groups)
    gated = bs.gate_resnet(nn.Sequential(block), hidden=2)
    x = torch.randn(2, block.conv1.in_channels, 5, 5)
    cost = MultiplyAdds.measure(gated, x)
    widths = [layer.shape[1] for layer in gate_decisions(gated)]
    p = torch.rand(2, sum(widths), dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(2, dtype=torch.float64)
    for outcome in itertools.product([0.0, 1.0], repeat=sum(widths)):
        decisions = torch.tensor([outcome, outcome], dtype=torch.float64)
        chance = (decisions * p + (1 - decisions) * (1 - p)).prod(dim=1)
        expected = expected + chance * cost.per_example(decisions.split(widths, dim=1))
    found = cost.per_example(p.split(widths, dim=1))
    torch.testing.assert_close(found, expected)
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(value @ weights, p)[0] for value in (found, expected)))


def test_the_expected_cost_moves_the_gates() -> None:
    model, x = bs.gate_resnet(SmallImageResNet(8, width=4), hidden=3), torch.randn(8, 3, 8, 8)
    cost = MultiplyAdds.measure(model, x)
    model(x)
    before = cost.per_example(gate_probabilities(model)).mean()
    before.backward()
    with torch.no_grad():
        for gate in named_gates(model).values():
            for parameter in gate.parameters():
                assert parameter.grad is not None and bool((parameter.grad != 0).any())
                parameter -= 1e-5 * parameter.grad
        model(x)
        assert cost.per_example(gate_probabilities(model)).mean() < before


def test_straight_through_decisions_cost_what_decisions_do_and_move_the_gates() -> None:
    model, x = bs.gate_resnet(tiny(Bottleneck), hidden=3), torch.randn(8, 3, 16, 16)
    for gate in named_gates(model).values():
        gate.noise.fill_(0.0)
    cost = MultiplyAdds.measure(model, x)
    model(x)
    spent = cost.per_example(bs.straight_through_decisions(model))
    assert torch.equal(spent, cost.per_example(gate_decisions(model)))
    spent.mean().backward()
    for gate in named_gates(model).values():
        assert all(p.grad is not None and bool((p.grad != 0).any()) for p in gate.parameters())


@pytest.mark.parametrize("noise", [0.1, 0.4, 1.0])
def test_open_probabilities_give_the_mean_of_what_is_spent_under_the_present_noise(noise: float) -> None:
    torch.manual_seed(1)
    model, n = bs.gate_resnet(nn.Sequential(Bottleneck(8, 2))), 20_000
    for module in model.modules():
        module.training = isinstance(module, ChannelGate)  # normalization that couples no examples
    for gate in named_gates(model).values():
        gate.noise.fill_(noise)
    x = torch.randn(1, 8, 3, 3)
    cost = MultiplyAdds.measure(model, x)
    with torch.no_grad():
        model(x.expand(n, -1, -1, -1))
        spent = cost.per_example(gate_decisions(model)).double()
        expected = cost.per_example([gate.open_probabilities for gate in named_gates(model).values()])[0]
    assert abs(spent.mean() - expected).item() < 5 * spent.std().item() / n**0.5 + 1e-3


SHAPES = [
    [],
    [(3, 4)],
    [(3, 4), (2, 8), (3, 16)],
    [(3, 8), (3, 4), (3, 16)],
    [(3, 4), (3, 8), (3, 16), (3, 1)],
]


@pytest.mark.parametrize("shapes", SHAPES)
def test_gates_of_another_model_are_refused(shapes: list[tuple[int, ...]]) -> None:
    model, x = bs.gate_resnet(SmallImageResNet(8, width=4), hidden=3), torch.randn(2, 3, 8, 8)
    cost = MultiplyAdds.measure(model, x)
    for read in (cost.per_example, cost.per_layer):
        with pytest.raises(
            ValueError, match=r"^gates must have shapes \[\(N, 4\), \(N, 8\), \(N, 16\)\], rec"
        ):
            read([torch.ones(shape) for shape in shapes])
    with pytest.raises(ValueError, match=r"^gates must have shapes \[\], received \[\(3, 4\)\]$"):
        MultiplyAdds.measure(SmallImageResNet(8, width=4), x).per_example([torch.ones(3, 4)])


# Layers in two places, and models without layers


class Twice(nn.Module):
    """A block that is used twice."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


BLOCKS = {"basic": lambda: BasicBlock(8, 8), "bottleneck": lambda: Bottleneck(8, 2)}


def decided_by_their_input(model: nn.Module) -> nn.Module:
    """With gates of which some are open and some closed, other ones in each run."""
    for gate in named_gates(model).values():
        nn.init.normal_(gate.to_logits[3].weight, std=3.0)
    return model.eval()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_that_is_used_twice_costs_what_two_blocks_with_its_weights_do(name: str) -> None:
    torch.manual_seed(4)
    twice = decided_by_their_input(bs.gate_resnet(Twice(BLOCKS[name]())))
    two = nn.Sequential(copy.deepcopy(twice.block), copy.deepcopy(twice.block))
    x = 3 * torch.randn(6, 8, 5, 5)
    cost, other = MultiplyAdds.measure(twice, x), MultiplyAdds.measure(two, x)
    assert (cost.dense, cost.gates, cost.fixed) == (other.dense, other.gates, other.fixed)
    for inputs in (x, x + 1):
        with torch.no_grad():
            assert torch.equal(twice(inputs), two(inputs))
        runs = gate_decisions(two)
        half = len(runs) // 2
        for found, first, second in zip(gate_decisions(twice), runs[:half], runs[half:], strict=True):
            assert torch.equal(found, torch.cat([first, second], dim=1)) and not torch.equal(first, second)
        expected = other.per_example(runs)
        assert torch.equal(cost.per_example(gate_decisions(twice)), expected)
        assert torch.equal(count_macs(twice, inputs), expected)
    for layer, macs in cost.per_layer(gate_decisions(twice)).items():
        within = layer.removeprefix("block.")
        parts = other.per_layer(runs)
        assert torch.equal(macs, parts[f"0.{within}"] + parts[f"1.{within}"])


def test_a_layer_of_two_blocks_is_switched_by_the_gates_of_each() -> None:
    torch.manual_seed(4)
    first, second = BasicBlock(4, 4), BasicBlock(4, 4)
    second.conv1 = first.conv1
    shared = decided_by_their_input(bs.gate_resnet(nn.Sequential(first, second)))
    x = torch.randn(3, 4, 6, 6)
    assert torch.equal(count_macs(shared, x), count_macs(copy.deepcopy(shared), x))
    apart = nn.Sequential(*(copy.deepcopy(block) for block in shared))
    assert torch.equal(count_macs(apart, x), count_macs(shared, x))


def test_forced_gates_of_a_block_that_is_used_twice_decide_the_same_each_time() -> None:
    model, x = bs.gate_resnet(Twice(BasicBlock(8, 8))), torch.randn(4, 8, 5, 5)
    with gates_forced(model, 0.5, seed=1):
        found = count_macs(model, x)
    (decisions,) = gate_decisions(model)
    assert torch.equal(decisions[:, :8], decisions[:, 8:])
    of_gates = 2 * (8 * 16 + 16 * 8)
    assert torch.equal(found, 2 * 2 * 9 * 8 * 25 * decisions[:, :8].sum(dim=1) + of_gates)


def test_checkpointing_a_block_that_is_used_twice_changes_neither_its_runs_nor_a_gradient() -> None:
    class Checkpointed(Twice):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(self.block, x, use_reentrant=False)
            return x

    torch.manual_seed(4)
    plain = bs.gate_resnet(Twice(BasicBlock(8, 8)))
    saving = bs.gate_resnet(Checkpointed(BasicBlock(8, 8)))
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(6, 8, 5, 5)
    cost, found = MultiplyAdds.measure(plain, x), []
    for model in (plain, saving):
        torch.manual_seed(5)
        model.train().zero_grad()
        spent = model(x).square().mean() + cost.per_example(bs.straight_through_decisions(model)).mean() / 1e6
        before = gate_decisions(model)
        spent.backward()
        assert torch.equal(*before, *gate_decisions(model)) and before[0].shape == (6, 16)
        found.append([*before, *(p.grad for p in model.parameters())])
    for p, s in zip(*found, strict=True):
        torch.testing.assert_close(s, p)


def test_a_model_that_does_not_keep_every_run_of_a_gate_is_refused() -> None:
    """A gated block in a model of which no gate was told."""
    model, x = Twice(bs.gate_resnet(BasicBlock(4, 4))), torch.randn(3, 4, 6, 6)
    cost = MultiplyAdds.measure(model, x)
    assert cost.per_example(gate_decisions(model)).shape == (3,)
    model.eval()(x)
    with pytest.raises(
        ValueError, match=r"\[\(N, 8\)\], received \[\(3, 4\)\]; a gate that runs several [^\n]*$"
    ):
        cost.per_example(gate_decisions(model))
    keep_every_run(model)
    model(x)
    assert torch.equal(cost.per_example(gate_decisions(model)), count_macs(model, x))


def test_a_layer_that_a_block_runs_twice_is_refused_by_name() -> None:
    class Alias(nn.Module):
        """A convolution that hands its input to another one first."""

        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block
            block.bn1 = nn.Sequential(block.bn1, block.conv2)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    with pytest.raises(ValueError, match=r"received 'block', in which conv2 ran 2 times$"):
        count_macs(bs.gate_resnet(Alias(BasicBlock(4, 4))), torch.randn(2, 4, 6, 6))


def test_gates_that_decide_for_other_examples_than_the_models_are_refused() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = BasicBlock(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x.flatten(0, 1))

    model, x = bs.gate_resnet(Frames()), torch.randn(2, 3, 4, 6, 6)
    with pytest.raises(
        ValueError, match=r"for each of the 2 examples, received 'block\.gate1', which decided 6"
    ):
        count_macs(model, x)


def test_a_gated_layer_is_switched_under_whatever_name_it_is_found_first() -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block = BasicBlock(4, 4)
            self.shortcut, self.block = block.conv2, block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    model, x = bs.gate_resnet(Alias()), torch.randn(2, 4, 6, 6)
    with gates_forced(model, 0.0):
        assert count_macs(model, x).tolist() == [cost_of_gates(model)] * 2
    assert MultiplyAdds.measure(model, x).fixed == cost_of_gates(model)


@pytest.mark.filterwarnings("ignore:.*jit.*:FutureWarning")
def test_a_model_whose_layers_are_not_called_is_refused() -> None:
    ungated, x = SmallImageResNet(8, width=4).eval(), torch.randn(2, 3, 8, 8)
    gated = bs.gate_resnet(copy.deepcopy(ungated), hidden=3)
    made = [
        torch.jit.trace(ungated, x),
        torch.jit.trace(gated, x),
        torch.fx.symbolic_trace(gated),
        torch.export.export(ungated, (x,)).module(),
        nn.Sequential(torch.fx.symbolic_trace(gated)),
    ]
    for model in made:
        with pytest.raises(
            ValueError, match="counted in a model before it is traced or exported, received a tr"
        ):
            count_macs(model, x)
    assert torch.equal(count_macs(torch.fx.symbolic_trace(ungated), x), count_macs(ungated, x))


# Precision, devices, and compiled models


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("ambient", ["meta", "float64", "bfloat16"])
def test_a_default_device_or_type_changes_no_cost(ambient: str, gated: bool) -> None:
    model, x = SmallImageResNet(8, width=100), torch.randn(3, 3, 8, 8)
    if gated:
        bs.gate_resnet(model)

    def costs() -> list[Tensor]:
        cost, gates = MultiplyAdds.measure(model, x), gate_decisions(model) if gated else []
        return [count_macs(model, x), cost.per_example(gates), *cost.per_layer(gates).values()]

    expected = costs()
    if ambient == "meta":
        with torch.device("meta"):
            found = costs()
    else:
        torch.set_default_dtype(getattr(torch, ambient))
        try:
            found = costs()
        finally:
            torch.set_default_dtype(torch.float32)
    for e, f in zip(expected, found, strict=True):
        assert e.dtype == f.dtype == torch.float32 and f.device.type == "cpu" and torch.equal(e, f)


@pytest.mark.parametrize("gated", [True, False])
def test_a_model_on_another_device_has_its_costs_there(gated: bool) -> None:
    model = SmallImageResNet(8, width=4)
    x = torch.randn(3, 3, 8, 8)
    if gated:
        bs.gate_resnet(model)
    dense = MultiplyAdds.measure(model, x).dense
    model, x = model.to("meta"), x.to("meta")
    cost = MultiplyAdds.measure(model, x)
    assert cost.dense == dense
    found = count_macs(model, x)
    assert found.shape == (3,) and found.is_meta
    if gated:
        assert all(layer.is_meta for layer in cost.per_layer(gate_decisions(model)).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decisions_in_half_precision_are_counted_as_exactly(dtype: torch.dtype) -> None:
    model, x = bs.gate_resnet(SmallImageResNet(8, width=100), hidden=3), torch.randn(3, 3, 8, 8)
    cost = MultiplyAdds.measure(model, x)
    with gates_forced(model, 0.5):
        model(x)
    decisions = gate_decisions(model)
    found = cost.per_example([layer.to(dtype) for layer in decisions])
    torch.testing.assert_close(
        found.double(), cost.per_example([d.double() for d in decisions]), rtol=1e-6, atol=0
    )


def test_the_count_under_autocast_is_that_of_the_same_gates() -> None:
    model, x = bs.gate_resnet(SmallImageResNet(8, width=100), hidden=3), torch.randn(3, 3, 8, 8)
    found = []
    for enabled in (False, True):
        with gates_forced(model, 0.5, seed=1), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(count_macs(model, x).double())
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


def test_a_compiled_model_costs_the_same_before_and_after_it_ran() -> None:
    torch.compiler.reset()
    model, x = bs.gate_resnet(SmallImageResNet(8, width=4), hidden=3).eval(), torch.randn(3, 3, 8, 8)
    expected = count_macs(model, x)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        with torch.no_grad():
            compiled(x)
        assert torch.equal(count_macs(compiled, x), expected)


# Attention


class Attention(nn.Module):
    """Scaled dot-product attention of given sizes."""

    def __init__(self, queries: int, keys: int, heads: int, groups: int, width: int, of_values: int) -> None:
        super().__init__()
        self.shapes = [(heads, queries, width), (groups, keys, width), (groups, keys, of_values)]

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (x.new_ones(len(x), *shape) for shape in self.shapes)
        return F.scaled_dot_product_attention(
            query, key, value, enable_gqa=self.shapes[0][0] != self.shapes[1][0]
        )


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "groups", "width", "of_values"),
    [(7, 7, 3, 3, 8, 8), (5, 9, 2, 2, 16, 16), (5, 9, 4, 2, 8, 8), (6, 4, 6, 1, 5, 5), (5, 9, 2, 2, 8, 12)],
)
def test_attention_costs_what_its_formula_says_and_pytorch_counts(
    device: str, queries: int, keys: int, heads: int, groups: int, width: int, of_values: int
) -> None:
    model = Attention(queries, keys, heads, groups, width, of_values)
    x = torch.zeros(3, 1, device=device)
    expected = heads * queries * keys * (width + of_values)
    assert MultiplyAdds.measure(model, x).dense == expected == multiply_adds(model, x)
    with torch.inference_mode():
        assert MultiplyAdds.measure(model, x).dense == expected


class SelfAttention(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention, weights: bool) -> None:
        super().__init__()
        self.attention, self.weights = attention, weights

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attention.batch_first else x.transpose(0, 1)
        sizes = (x.shape[-1], self.attention.kdim, self.attention.vdim)
        query, key, value = (x[..., :size] for size in sizes)
        return self.attention(query, key, value, need_weights=self.weights)[0]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"batch_first": True}, {"kdim": 6, "vdim": 4}, {"add_bias_kv": True}]
)
def test_multi_head_attention_costs_what_its_products_do(settings: dict[str, int], weights: bool) -> None:
    model, x = SelfAttention(nn.MultiheadAttention(8, 2, **settings), weights), torch.randn(3, 5, 8)
    of_keys, of_values = settings.get("kdim", 8), settings.get("vdim", 8)
    keys = 5 + ("add_bias_kv" in settings)
    expected = 5 * 8 * (8 + of_keys + of_values + 8) + 5 * keys * (8 + 8)
    assert MultiplyAdds.measure(model, x).per_layer([]) == {"attention": expected}
    assert multiply_adds(model, x) == expected


def test_the_fused_layers_of_pytorch_cost_what_their_parts_do_and_stay_fused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(3, 5, 8)
    expected = 2 * (5 * 4 * 8 * 8 + 5 * 5 * 16 + 2 * 5 * 8 * 16)
    assert count_macs(model, x).tolist() == [expected] * 3
    assert multiply_adds(model, x) == expected
    assert torch.backends.mha.get_fastpath_enabled()


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "vit_b_16": vit_b_16,
    "swin_t": swin_t,
    "vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224", pretrained=False),
    "vit_small": lambda: timm.create_model("vit_small_patch16_224", pretrained=False),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_vision_transformers_cost_what_pytorch_counts(name: str) -> None:
    with torch.device("meta"):
        model, x = TRANSFORMERS[name](), torch.randn(2, 3, 224, 224)
    assert MultiplyAdds.measure(model, x).dense == multiply_adds(model, x)


# The sum of terms


def test_the_cost_is_the_sum_of_its_terms_and_gates_are_known_by_name() -> None:
    first, second = GateRun("a", 0, 2), GateRun("b", 1, 3)
    terms = [Constant("stem", 5.0), ConvolutionTerm("conv", 8.0, 1, (first, second)), Constant("stem", 1.0)]
    cost = MultiplyAdds(terms, {"a": 2, "b": 3})
    assert (cost.dense, cost.gates, cost.fixed) == (14, 0, 6)
    a, b = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    for gates in ([a, b], {"b": b, "a": a}):
        assert cost.per_example(gates).tolist() == [6.0, 10.0]
        layers = {name: macs.tolist() for name, macs in cost.per_layer(gates).items()}
        assert layers == {"stem": [6.0, 6.0], "conv": [0.0, 4.0]}
    with pytest.raises(ValueError, match=r"^gates must be those of \['a', 'b'\], received those of \['a'\]$"):
        cost.per_example({"a": a})


def test_terms_are_added_up_in_double_precision() -> None:
    gates = [GateRun("gate", 0, 1)]
    macs = [2.0**25] + [1.0] * 2000
    cost = MultiplyAdds([ConvolutionTerm(str(i), m, 1, (*gates,)) for i, m in enumerate(macs)], {"gate": 1})
    found = cost.per_example([torch.ones(1, 1)])
    assert found.dtype == torch.float32 and found.item() == sum(macs) == cost.dense


def test_a_switched_module_of_ones_own_says_what_it_costs() -> None:
    class Tokens(nn.Module):
        """Attention of the tokens that are open to each other."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.inner = ChannelGate(3, 5), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.gate(x)
            return self.inner(x.new_ones(len(x), 5, 2))

        def cost_terms(self, run: object) -> list[ConvolutionTerm]:
            layer = run.of("inner")
            return [ConvolutionTerm(layer.name, layer.macs, 1, (run.gate("gate"),))]

    model, x = nn.Sequential(Tokens()).eval(), torch.randn(4, 3)
    assert isinstance(model[0], Switched) and not isinstance(model, Switched)
    found = count_macs(model, x)
    (decisions,) = gate_decisions(model)
    assert torch.equal(found, 2 * 4 * decisions.sum(dim=1) + 3 * 16 + 16 * 5)


def test_the_former_constructor_measures() -> None:
    model, x = bs.gate_resnet(SmallImageResNet(8, width=4), hidden=3), torch.randn(2, 3, 8, 8)
    cost, expected = former.MultiplyAdds(model, x), MultiplyAdds.measure(model, x)
    assert isinstance(cost, MultiplyAdds) and former.count_macs is count_macs
    assert (cost.dense, cost.gates, cost.fixed) == (expected.dense, expected.gates, expected.fixed)
    assert torch.equal(cost.per_example(gate_decisions(model)), expected.per_example(gate_decisions(model)))
    for made in (cost, expected, former.MultiplyAdds.measure(model, x)):
        assert pickle.loads(pickle.dumps(made)).dense == expected.dense


def test_a_pickle_of_before_gives_the_same_costs() -> None:
    model, x = (
        bs.gate_resnet(tiny(Bottleneck, groups=2, width_per_group=32), hidden=3),
        torch.randn(2, 3, 32, 32),
    )
    expected = MultiplyAdds.measure(model, x)
    numbers = {name: number for number, name in enumerate(named_gates(model))}
    layers = {}
    for term in expected.terms:
        gates = [numbers[run.name] for run in term.gates]
        if term.layer.endswith("conv1") and gates:
            gates.insert(0, None)
        layers[term.layer] = former._Layer(
            term.macs if gates else term.per_example({}).item(), getattr(term, "groups", 1), *gates
        )
    state = {"_layers": layers, "_switched": [layer for layer in layers.values() if layer.gate_of_input]}
    state |= {"_gates": [*expected.widths.values()]}
    state |= {name: getattr(expected, name) for name in ("dense", "gates", "fixed")}
    found = former.MultiplyAdds.__new__(former.MultiplyAdds)
    found.__setstate__(state)
    assert (found.dense, found.gates, found.fixed) == (expected.dense, expected.gates, expected.fixed)
    decisions = gate_decisions(model)
    assert torch.equal(found.per_example(decisions), expected.per_example(decisions))
    assert [*found.per_layer(decisions)] == [*expected.per_layer(decisions)]


def test_layers_of_gates_are_told_from_others_wherever_they_are_found_first() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            gate = ChannelGate(3, 5)
            self.first, self.gate = gate.to_logits[0], gate

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(x)

    cost = MultiplyAdds.measure(Shared(), torch.randn(2, 3))
    assert (cost.dense, cost.gates) == (0, 3 * 16 + 16 * 5)
    assert MultiplyAdds.measure(ChannelGate(3, 5), torch.randn(2, 3)).gates == 3 * 16 + 16 * 5
