"""One network at many budgets: networks of both families, and their inference copies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock

import batchshaping as bs
from batchshaping.channel_gating.resnets import SmallImageResNet
from batchshaping.gates.cost import MultiplyAdds
from batchshaping.gates.gate import gate_decisions, named_gates
from batchshaping.mixed_scale.rules import ChanceGate, EntropyGate


def resnet(**settings: int) -> nn.Module:
    return bs.gate_resnet(SmallImageResNet(8, 5, width=16), **settings)


def msvit(gate: bs.Gate | None = None) -> nn.Module:
    timm = pytest.importorskip("timm")
    vit = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )
    return bs.MSViT(vit, coarse=8, gate=gate)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "a gate a channel": resnet,
    "gates for groups": lambda: resnet(gates_per_layer=4),
    "tokens of two scales": msvit,
}


def trained_a_little(make: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    """Gates that differ from image to image, with statistics of the images."""
    torch.manual_seed(0)
    network = make().train()
    with torch.no_grad():
        for gate in named_gates(network).values():
            for name, parameter in gate.named_parameters():
                if name.endswith("weight") and parameter.ndim == 2:
                    parameter.mul_(3)
        for _ in range(20):
            network(x)
    return network.eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cost_of_each_budget_is_within_it_and_close_to_it(family: str, x: Tensor) -> None:
    network = trained_a_little(FAMILIES[family], x)
    cost = MultiplyAdds.measure(network, x[:1])
    least, most = cost.fixed / cost.dense, 1 + cost.gates / cost.dense
    budgets = [least + part * (most - least) for part in (0.0, 0.3, 0.7, 1.0)]
    calibration = bs.calibrate(network, x.split(32), budgets)
    assert [point.budget for point in calibration.points] == budgets
    assert calibration.points[-1].shift == -torch.inf and calibration.points[0].shift == torch.inf
    for point in calibration.points:
        with bs.gates_shifted(network, point.shift):
            spent = bs.count_macs(network, x).double().mean().item() / cost.dense
        assert spent == pytest.approx(point.multiply_adds)
        assert point.budget - 0.01 <= point.multiply_adds <= point.budget + 1e-12
        assert point.accuracy is None


@pytest.mark.parametrize("family", FAMILIES)
def test_an_inference_copy_decides_as_the_network_at_every_shift(family: str, x: Tensor) -> None:
    network = trained_a_little(FAMILIES[family], x)
    fast = bs.conditional_inference(network)
    opened = []
    with torch.no_grad():
        own, own_fast = network(x), fast(x)
        for shift in (-torch.inf, -1.5, -0.2, 0.0, 0.3, 2.0, torch.inf):
            with bs.gates_shifted(network, shift), bs.gates_shifted(fast, shift):
                torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(fast(x[:1]), network(x[:1]), rtol=1e-4, atol=1e-4)
                assert torch.equal(bs.count_macs(fast, x), bs.count_macs(network, x))
                network(x)
                fast(x)
            decisions = gate_decisions(network)
            assert all(map(torch.equal, gate_decisions(fast), decisions))
            opened.append(torch.cat(decisions, dim=1).mean().item())
        assert opened == sorted(opened, reverse=True) and opened[0] == 1 and opened[-1] == 0
        # Afterwards everything is as before, to the bit.
        assert torch.equal(network(x), own) and torch.equal(fast(x), own_fast)
    calibrated = [bs.calibrate(each, x.split(32), [0.9]) for each in (network, fast)]
    assert calibrated[0] == calibrated[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shift_of_zero_changes_nothing_and_training_knows_no_shift(family: str, x: Tensor) -> None:
    network = trained_a_little(FAMILIES[family], x)
    with torch.no_grad():
        own = network(x)
        with bs.gates_shifted(network, 0.0):
            assert torch.equal(network(x), own)
    network.train()
    torch.manual_seed(3)
    expected = network(x)
    torch.manual_seed(3)
    with bs.gates_shifted(network, 5.0):
        assert torch.equal(network(x), expected)


@pytest.mark.parametrize("gate", [ChanceGate(0.25), EntropyGate(0.25)])
def test_rules_have_budgets_too(gate: bs.Gate, x: Tensor) -> None:
    varied = x * torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    network = trained_a_little(lambda: msvit(gate), varied)
    network(varied)
    (own,) = gate_decisions(network)
    calibration = bs.calibrate(network, varied.split(32), [0.5, 0.7, 1.0, 1.1])
    assert [0 <= point.budget - point.multiply_adds < 0.02 for point in calibration.points[:3]] == [True] * 3
    with torch.no_grad(), bs.gates_shifted(network, 0.0):
        network(varied)
    assert torch.equal(gate_decisions(network)[0], own)


@pytest.mark.parametrize("gates", [None, 2], ids=["a gate a channel", "gates for groups"])
def test_an_exported_program_keeps_the_shift_that_it_was_made_with(gates: int | None, x: Tensor) -> None:
    """With a branch for each gate where these are few, and without branches where they are many."""

    def make() -> nn.Module:
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)]
        return bs.gate_resnet(
            nn.Sequential(nn.Conv2d(3, 32, 3), BasicBlock(32, 32), *head), gates_per_layer=gates
        )

    fast = bs.conditional_inference(trained_a_little(make, x))
    image = x[2:3]  # whose gates differ at both shifts from those without one
    with torch.no_grad():
        for shift in (-torch.inf, -0.3):
            with bs.gates_shifted(fast, shift):
                program = torch.export.export(fast, (image,), strict=False).module()
                expected = fast(image)
            torch.testing.assert_close(program(image), expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(expected, fast(image), rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_accuracy_and_promise_are_those_of_the_data(family: str, x: Tensor) -> None:
    network = trained_a_little(FAMILIES[family], x)
    with torch.no_grad(), bs.gates_shifted(network, -torch.inf):
        labels = network(x).argmax(dim=1)
    loader = DataLoader(TensorDataset(x, labels), batch_size=24, shuffle=True)
    calibration = bs.calibrate(network, loader, [0.8, 2.0])
    assert calibration[2.0].accuracy == 1
    promise = bs.guarantee(network, loader, accuracy_loss=0.3, shifts=[-1.0, 0.0, 1.0])
    for tested in promise.tested:
        with torch.no_grad(), bs.gates_shifted(network, tested.shift):
            right = (network(x).argmax(dim=1) == labels).double().mean().item()
        assert tested.accuracy == pytest.approx(right) and tested.gained == 0
        assert tested.lost == round(64 * (1 - right))
