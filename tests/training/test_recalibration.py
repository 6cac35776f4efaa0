"""Batch normalization after recalibration: its statistics are those of training images with hard gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from batchshaping.training.config import RunConfig
from batchshaping.training.data import load_data
from batchshaping.training.module import make_network
from batchshaping.training.recalibration import recalibrate
from batchshaping.training.run import load_run, train
from batchshaping.training.sections import DataSettings

DATA = load_data(DataSettings(data="digits", train_images=96))
GATED: dict[str, Any] = {"network": "resnet8", "width": 4, "gate_bias": 0.0}


def statistics_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in network.state_dict().items() if "running" in name}


def test_statistics_are_the_means_over_batches() -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(1)
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(64, 10))
    network(torch.randn(8, 1, 8, 8))  # left behind by training
    recalibrate(network, DATA, batch=32)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    images = DATA.normalize(DATA.train.__getitems__(order.tolist())[0]).reshape(3, -1)
    torch.testing.assert_close(layer.running_mean, images.mean(dim=1).mean().reshape(1))
    torch.testing.assert_close(layer.running_var, images.var(dim=1).mean().reshape(1))
    assert layer.momentum == 0.1 and not network.training and not layer.training


@pytest.mark.parametrize("shared", [False, True])
def test_a_pass_ends_with_the_last_normalization_that_runs(shared: bool) -> None:
    ran: list[str] = []
    layer = nn.BatchNorm2d(1)
    second = layer if shared else nn.BatchNorm2d(1)
    rest = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    rest.register_forward_hook(lambda *_: ran.append("the rest"))
    second.register_forward_hook(lambda *_: ran.append("a normalization"))
    recalibrate(nn.Sequential(layer, nn.ReLU(), second, rest), DATA, batch=32)
    of_a_pass = ["a normalization"] * (2 if shared else 1)
    # The first pass goes on, since it tells how many there are.
    assert ran == [*of_a_pass, "the rest", *of_a_pass, *of_a_pass]
    assert layer.num_batches_tracked == 3 * (2 if shared else 1)


def test_gates_decide_without_noise_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    network = make_network(RunConfig(**GATED), classes=10, channels=1)
    network.train()
    network(torch.randn(16, 1, 8, 8))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    recalibrate(network, DATA, batch=32)
    first = statistics_of(network)
    torch.manual_seed(1)  # noise would be other noise now
    again = {name: value.clone() for name, value in first.items()}
    recalibrate(network, DATA, batch=32)
    assert all(torch.equal(again[name], value) for name, value in statistics_of(network).items())
    after = network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "running" in name or "num_batches" in name}
    # As with the last batches of a training with hard gates and the whole set as one batch.
    recalibrate(network, DATA, batch=96)
    images = DATA.normalize(DATA.train.__getitems__([*range(96)])[0])
    network.eval()
    normalized = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    seen: list[torch.Tensor] = []
    hook = normalized[0].register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    network(images)
    hook.remove()
    mean, variance = seen[0].mean(dim=(0, 2, 3)), seen[0].var(dim=(0, 2, 3))
    scale, shift = normalized[0].weight.detach(), normalized[0].bias.detach()
    torch.testing.assert_close(mean, shift, atol=1e-5, rtol=0)
    torch.testing.assert_close(variance, scale**2, atol=1e-3, rtol=1e-3)


def test_images_are_augmented_as_in_training() -> None:
    # Digits are shifted: of a column at the border another mean is kept, and without a shift its own.
    def kept(augment: bool) -> torch.Tensor:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
        recalibrate(network, DATA, batch=96, augment=augment)
        return statistics_of(network)["1.running_mean"]

    images = DATA.normalize(DATA.train.__getitems__([*range(96)])[0]).flatten(1)
    torch.testing.assert_close(kept(augment=False), images.mean(dim=0))
    assert (kept(augment=True) - images.mean(dim=0)).abs().max() > 0.1


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(1, track_running_stats=False), nn.Identity()])
def test_layers_without_statistics_stay_as_they_are(layer: nn.Module) -> None:
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(64, 10)).train()
    recalibrate(network, DATA, batch=32)
    assert not network.training


def test_a_gated_run_ends_with_it_and_an_ungated_one_does_not(tmp_path: Path) -> None:
    short: dict[str, Any] = {"train_images": 96, "batch_size": 32, "epochs": 1, "logger": "none", "width": 4}

    def statistics(name: str, **settings: Any) -> dict[str, torch.Tensor]:
        train(RunConfig(**short, **settings), tmp_path / name)
        return statistics_of(load_run(tmp_path / name)[0])

    anew, kept = statistics("anew"), statistics("kept", recalibrate=False)
    assert not all(torch.equal(anew[name], kept[name]) for name in kept)
    anew, kept = statistics("u", gated=False), statistics("v", gated=False, recalibrate=False)
    assert all(torch.equal(anew[name], kept[name]) for name in kept)
