"""The residual networks against the formulas of their paper, and their gated versions against them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet34, resnet50

import batchshaping as bs
from batchshaping.channel_gating.resnets import SmallImageResNet
from batchshaping.gates.cost import MultiplyAdds
from batchshaping.gates.gate import Gate, named_gates

SMALL = {20: bs.gated_resnet20, 32: bs.gated_resnet32, 56: bs.gated_resnet56}
LARGE = {
    "resnet18": (bs.gated_resnet18, resnet18, [64, 64, 128, 128, 256, 256, 512, 512]),
    "resnet34": (bs.gated_resnet34, resnet34, [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3),
    "resnet50": (bs.gated_resnet50, resnet50, [64] * 6 + [128] * 8 + [256] * 12 + [512] * 6),
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def parameters_of_the_paper(depth: int, classes: int, in_channels: int, width: int) -> int:
    """6 n + 1 convolutions of 3 x 3 with a normalization each, two projections, one linear layer."""
    n = (depth - 2) // 6
    widths = [width, 2 * width, 4 * width]
    total = 9 * in_channels * width + 2 * width
    before = width
    for stage in widths:
        total += 9 * before * stage + (2 * n - 1) * 9 * stage * stage + 2 * n * 2 * stage
        if stage != width:
            total += before * stage + 2 * stage
        before = stage
    return total + 4 * width * classes + classes


@pytest.mark.parametrize(
    ("depth", "classes", "in_channels", "width"),
    [(8, 10, 1, 4), (14, 3, 3, 5), (20, 10, 3, 16), (32, 100, 3, 16), (56, 10, 3, 16), (110, 10, 3, 16)],
)
def test_the_number_of_parameters_is_that_of_the_paper(
    depth: int, classes: int, in_channels: int, width: int
) -> None:
    network = SmallImageResNet(depth, classes, in_channels, width)
    assert parameters(network) == parameters_of_the_paper(depth, classes, in_channels, width)


def test_resnet20_has_the_published_size() -> None:
    """0.27 million parameters with the paper's shortcuts without weights; these have 2 688 more."""
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert parameters(SmallImageResNet(20)) - projections == 269_722


@pytest.mark.parametrize("depth", [8, 20, 44])
@pytest.mark.parametrize("gated", [False, True])
def test_the_depth_is_the_number_of_layers_on_the_main_path(depth: int, gated: bool) -> None:
    network = SmallImageResNet(depth, width=4)
    if gated:
        bs.gate_resnet(network, hidden=2)
    aside = ("downsample", "gate")
    layers = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not any(word in name for word in aside)
    ]
    assert len(layers) == depth


@pytest.mark.parametrize("depth", [-4, 0, 1, 2, 7, 9, 18, 51])
def test_another_depth_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth must be 6 n \+ 2 with n = 1, 2, \.\.\., received {depth}$"):
        SmallImageResNet(depth)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("stem_stride", [1, 2])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 32])
def test_each_stage_has_twice_the_channels_and_half_the_size(
    size: int, in_channels: int, stem_stride: int, gated: bool
) -> None:
    network = SmallImageResNet(8, 7, in_channels, width=4, stem_stride=stem_stride)
    if gated:
        bs.gate_resnet(network, hidden=2)
    shapes: list[tuple[int, ...]] = []

    def see(_: nn.Module, __: object, output: Tensor) -> None:
        shapes.append(tuple(output.shape))

    for stage in (network.layer1, network.layer2, network.layer3):
        stage.register_forward_hook(see)
    assert network(torch.randn(2, in_channels, size, size)).shape == (2, 7)
    sides = [-(-size // (stem_stride * shrink)) for shrink in (1, 2, 4)]
    assert shapes == [(2, 4 * 2**k, side, side) for k, side in enumerate(sides)]


@pytest.mark.parametrize("inner", [1.0, 0.25, 0.01])
def test_blocks_may_be_narrow_inside(inner: float) -> None:
    network = SmallImageResNet(8, 7, width=16, inner=inner)
    between = [max(round(inner * channels), 1) for channels in (16, 32, 64)]
    stages = (network.layer1, network.layer2, network.layer3)
    assert [stage[0].conv1.out_channels for stage in stages] == between
    # By hand, on 8 x 8, 4 x 4 and 2 x 2 pixels: two convolutions a block, shortcuts, stem and head.
    shapes = [(64, 16, 16), (16, 16, 32), (4, 32, 64)]
    blocks = sum(9 * n * k * (i + o) for (n, i, o), k in zip(shapes, between, strict=True))
    others = 64 * 9 * 3 * 16 + 16 * 16 * 32 + 4 * 32 * 64 + 64 * 7
    assert MultiplyAdds.measure(network, torch.randn(1, 3, 8, 8)).dense == blocks + others


@pytest.mark.parametrize("inner", [0.0, -0.5, 1.01, float("nan")])
def test_an_impossible_share_of_inner_channels_is_refused(inner: float) -> None:
    with pytest.raises(ValueError, match=rf"^inner must be in \(0, 1\], received {inner}$"):
        SmallImageResNet(8, inner=inner)


def test_images_need_not_be_square() -> None:
    assert SmallImageResNet(8, width=4)(torch.randn(2, 3, 20, 33)).shape == (2, 10)


def test_convolutions_start_with_the_variance_of_the_paper() -> None:
    """He et al., Delving Deep into Rectifiers: 2 over the values that one output's gradient goes to."""
    for module in SmallImageResNet(20, width=32).modules():
        if isinstance(module, nn.Conv2d):
            values = module.weight.detach().double()
            expected = 2 / (module.out_channels * values[0, 0].numel())
            within = 6 * (2 / values.numel()) ** 0.5
            assert values.var().item() == pytest.approx(expected, rel=within)


@pytest.mark.parametrize("depth", SMALL)
def test_a_gated_network_for_small_images_is_the_ungated_one_with_a_gate_a_block(depth: int) -> None:
    torch.manual_seed(1)
    ungated = SmallImageResNet(depth, 5, 2)
    torch.manual_seed(1)
    gated = SMALL[depth](num_classes=5, in_channels=2, hidden=3)
    weights = gated.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in ungated.state_dict().items())
    n = (depth - 2) // 6
    gates = list(named_gates(gated).values())
    assert [g.to_logits[3].out_features for g in gates] == [16] * n + [32] * n + [64] * n
    assert [g.to_logits[0].in_features for g in gates] == (
        [16] * n + [16] + [32] * (n - 1) + [32] + [64] * (n - 1)
    )
    assert all(g.to_logits[0].out_features == 3 for g in gates)


@pytest.mark.parametrize("name", LARGE)
def test_a_gated_network_for_large_images_is_that_of_torchvision_with_gates(name: str) -> None:
    make_gated, make_ungated, channels = LARGE[name]
    with torch.device("meta"):
        gated, ungated = make_gated(num_classes=11, hidden=3), make_ungated(num_classes=11)
    gates: list[Gate] = list(named_gates(gated).values())
    assert [g.to_logits[3].out_features for g in gates] == channels
    assert all(g.to_logits[0].out_features == 3 for g in gates)
    shapes = {key: value.shape for key, value in gated.state_dict().items()}
    assert all(shapes[key] == value.shape for key, value in ungated.state_dict().items())
    assert parameters(gated) == parameters(ungated) + sum(map(parameters, gates))


@pytest.mark.parametrize("make", [*SMALL.values(), *(make for make, _, _ in LARGE.values())])
def test_networks_take_the_number_of_classes(make: Callable[..., nn.Module]) -> None:
    assert make(num_classes=4).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 4)
