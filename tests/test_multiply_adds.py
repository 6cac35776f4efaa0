"""Multiply-adds against PyTorch's own count of networks from which the closed channels are really removed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18, resnet50, resnext50_32x4d
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.segmentation import fcn_resnet50

import batchshaping as bs
from batchshaping.channel_gating.multiply_adds import MultiplyAdds, count_macs
from batchshaping.channel_gating.resnets import SmallImageResNet
from batchshaping.gates import ChannelGate, gate_decisions, gate_probabilities, gates_forced, named_gates


def multiply_adds(model: nn.Module, x: Tensor) -> float:
    """Of one example: PyTorch counts a multiplication and an addition as two operations."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(x[:1])
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
GROUPED: dict[str, Callable[[], nn.Module]] = {
    "ResNeXt": lambda: tiny(Bottleneck, groups=4, width_per_group=8),
    "as many groups as channels": lambda: tiny(Bottleneck, groups=64, width_per_group=1),
}


# Slim networks


def slim_convolution(layer: nn.Conv2d, inputs: Tensor | None, outputs: Tensor | None) -> nn.Conv2d:
    weight = layer.weight.detach()
    weight = weight if outputs is None else weight[outputs]
    weight = weight if inputs is None else weight[:, inputs]
    slim = nn.Conv2d(
        weight.shape[1], weight.shape[0], layer.kernel_size, layer.stride, layer.padding, bias=False
    )
    slim.weight.data = weight
    return slim


def slim_normalization(layer: nn.BatchNorm2d, channels: Tensor) -> nn.BatchNorm2d:
    slim = nn.BatchNorm2d(len(channels))
    slim.load_state_dict(
        {name: value[channels] if value.ndim else value for name, value in layer.state_dict().items()}
    )
    return slim


def residual_blocks(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, BasicBlock | Bottleneck))


def slim_network(ungated: nn.Module, decisions: list[Tensor]) -> nn.Module:
    """A network with only the channels that are open for one example: a vector of decisions a gate module."""
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


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_example_costs_what_the_network_of_its_open_channels_does(
    name: str, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    ungated = NETWORKS[name]()
    gated = bs.gate_resnet(copy.deepcopy(ungated), hidden=3).eval()
    x = torch.randn(3, 3, 32, 24)
    with gates_forced(gated, share, seed):
        found = count_macs(gated, x)
    decisions = gate_decisions(gated)
    with gates_forced(gated, share, seed), torch.no_grad():
        outputs = gated(x)
    assert found.shape == (3,)
    for n in range(3):
        slim = slim_network(ungated, [layer[n] for layer in decisions])
        example = x[n : n + 1]
        assert found[n].item() == multiply_adds(slim, example) + cost_of_gates(gated)
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
    cost = MultiplyAdds(gated, x)
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
    cost, dense = MultiplyAdds(gated, x), multiply_adds(ungated, x)
    assert (cost.dense, cost.gates) == (dense, cost_of_gates(gated))
    assert multiply_adds(gated, x) == dense + cost.gates
    with gates_forced(gated, 1.0):
        assert count_macs(gated, x).tolist() == [dense + cost.gates] * 2
    assert count_macs(ungated, x).tolist() == [dense] * 2
    assert MultiplyAdds(ungated, x).gates == 0


@pytest.mark.parametrize("name", [*NETWORKS, *GROUPED])
def test_closed_networks_cost_what_their_shortcuts_do_and_their_gates(name: str) -> None:
    ungated = {**NETWORKS, **GROUPED}[name]()
    gated = bs.gate_resnet(copy.deepcopy(ungated), hidden=3)
    x = torch.randn(2, 3, 32, 24)
    fixed = multiply_adds(without_branches(ungated), x) + cost_of_gates(gated)
    assert MultiplyAdds(gated, x).fixed == fixed
    with gates_forced(gated, 0.0):
        assert count_macs(gated, x).tolist() == [fixed] * 2


@pytest.mark.parametrize("make", [resnet18, resnet50, resnext50_32x4d])
def test_the_cost_of_the_networks_of_torchvision_is_that_of_pytorch(make: Callable[..., nn.Module]) -> None:
    network, x = make(), torch.randn(2, 3, 64, 64)
    dense = multiply_adds(network, x)
    assert MultiplyAdds(network, x).dense == dense
    assert MultiplyAdds(bs.gate_resnet(network), x).dense == dense


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
    assert MultiplyAdds(gated, x).dense == dense
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


@pytest.mark.parametrize("training", [True, False])
def test_counting_changes_nothing_in_the_model(training: bool) -> None:
    model = bs.gate_resnet(SmallImageResNet(8, width=4), hidden=3).train(training)
    model.layer2.train(not training)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    count_macs(model, x)
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    assert all(not module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_forward_pass_that_fails_leaves_the_model_as_it_was() -> None:
    model = bs.gate_resnet(SmallImageResNet(8, width=4), hidden=3)
    with pytest.raises(RuntimeError):
        count_macs(model, torch.randn(2, 5, 8, 8))
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_the_gates_counted_are_those_of_evaluation() -> None:
    model, x = bs.gate_resnet(SmallImageResNet(8, width=4), hidden=3), torch.randn(16, 3, 8, 8)
    found = count_macs(model.train(), x)
    assert torch.equal(count_macs(model.eval(), x), found)
    with torch.no_grad():
        model(x)
    assert torch.equal(MultiplyAdds(model, x).per_example(gate_decisions(model)), found)


# By layer, and in expectation


@pytest.mark.parametrize("name", [*NETWORKS, *GROUPED])
def test_the_layers_add_up(name: str) -> None:
    gated = bs.gate_resnet({**NETWORKS, **GROUPED}[name](), hidden=3)
    x = torch.randn(4, 3, 16, 16)
    cost = MultiplyAdds(gated, x)
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
    cost = MultiplyAdds(model, x)
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
    cost = MultiplyAdds(gated, x)
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
    cost = MultiplyAdds(model, x)
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
    cost = MultiplyAdds(model, x)
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
    cost = MultiplyAdds(model, x)
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
    cost = MultiplyAdds(model, x)
    for read in (cost.per_example, cost.per_layer):
        with pytest.raises(
            ValueError, match=r"^gates must have shapes \[\(N, 4\), \(N, 8\), \(N, 16\)\], rec"
        ):
            read([torch.ones(shape) for shape in shapes])
    with pytest.raises(ValueError, match=r"^gates must have shapes \[\], received \[\(3, 4\)\]$"):
        MultiplyAdds(SmallImageResNet(8, width=4), x).per_example([torch.ones(3, 4)])


# Layers in two places, and models without layers


def test_a_gated_block_that_runs_twice_is_refused_by_name() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = BasicBlock(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    first, second = BasicBlock(4, 4), BasicBlock(4, 4)
    second.conv1 = first.conv1
    for model, name in ((Twice(), "block"), (nn.Sequential(first, second), "0")):
        with pytest.raises(
            ValueError, match=rf"must run once in a forward pass, received '{name}', where conv1"
        ):
            count_macs(bs.gate_resnet(model), torch.randn(2, 4, 6, 6))


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
    assert MultiplyAdds(model, x).fixed == cost_of_gates(model)


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
        cost, gates = MultiplyAdds(model, x), gate_decisions(model) if gated else []
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
    dense = MultiplyAdds(model, x).dense
    model, x = model.to("meta"), x.to("meta")
    cost = MultiplyAdds(model, x)
    assert cost.dense == dense
    found = count_macs(model, x)
    assert found.shape == (3,) and found.is_meta
    if gated:
        assert all(layer.is_meta for layer in cost.per_layer(gate_decisions(model)).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decisions_in_half_precision_are_counted_as_exactly(dtype: torch.dtype) -> None:
    model, x = bs.gate_resnet(SmallImageResNet(8, width=100), hidden=3), torch.randn(3, 3, 8, 8)
    cost = MultiplyAdds(model, x)
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
