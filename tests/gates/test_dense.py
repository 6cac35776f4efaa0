"""A dense inference copy gives what the network gives, with sums done by convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import batchshaping as bs
from batchshaping.channel_gating.resnets import SmallImageResNet
from batchshaping.gates.dense import PackedSum, dense_inference


class NotTraceable(SmallImageResNet):
    """A network with a branch on a value, which torch.fx cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else x + 0)  # type: ignore[no-any-return]


class SumsOfAllKinds(nn.Module):
    """Sums whose terms are convolutions, neither, both, one twice, or used elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(5))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0](x) + self.layers[1](x)
        second = self.relu(self.layers[2](first) + x)
        used_twice = self.layers[3](second)
        third = used_twice + second
        fourth = torch.add(self.layers[4](third), x, alpha=2)
        return fourth + used_twice + first + x + 1


def some_statistics(model: nn.Module) -> nn.Module:
    """The model in evaluation, with normalizations that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias):
                nn.init.normal_(values, std=0.2)  # type: ignore[arg-type]
            for values in (module.running_var, module.weight):
                nn.init.uniform_(values, 0.5, 2)  # type: ignore[arg-type]
    return model.eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "basic": (lambda: torchvision.models.resnet18(num_classes=10), 64, 8),
    "bottleneck": (lambda: torchvision.models.resnet50(num_classes=10), 64, 16),
    "small images": (lambda: SmallImageResNet(20), 32, 9),
    "timm": (lambda: timm.create_model("resnet26d", num_classes=10), 64, 8),
    "not traceable": (lambda: NotTraceable(8), 32, 0),
    "no convolution between": (lambda: timm.create_model("vit_tiny_patch16_224", depth=1), 224, 0),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_it_gives_what_the_network_gives(name: str) -> None:
    make, size, sums = NETWORKS[name]
    torch.manual_seed(0)
    network, x = some_statistics(make()), torch.randn(2, 3, size, size)
    expected = network(x)
    before = copy.deepcopy(network.state_dict())
    dense = dense_inference(network)
    for _ in range(3):  # weights are packed at the second call
        assert (dense(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert sum(isinstance(module, PackedSum) for module in dense.modules()) == sums
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


@torch.no_grad()
def test_sums_that_a_convolution_cannot_do_stay() -> None:
    torch.manual_seed(0)
    network, x = SumsOfAllKinds().eval(), torch.randn(2, 4, 9, 9)
    kept = x.clone()
    dense = dense_inference(network)
    for _ in range(3):
        torch.testing.assert_close(dense(x), network(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, kept)


@torch.no_grad()
def test_its_multiply_adds_are_those_of_the_network() -> None:
    network, x = torchvision.models.resnet18().eval(), torch.randn(1, 3, 64, 64)
    dense = dense_inference(network)
    assert torch.equal(bs.count_macs(dense, x), bs.count_macs(network, x))
