"""Vision transformers with tokens of two scales are trained as all networks, with learned priors too."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

import batchshaping as bs
from batchshaping.training.config import RunConfig
from batchshaping.training.data import Data, ImagesInMemory
from batchshaping.training.data.canvases import CANVASES
from batchshaping.training.data.dataset import data_in_memory
from batchshaping.training.evaluation import evaluate
from batchshaping.training.module import GatedClassifier
from batchshaping.training.networks import network_settings
from batchshaping.training.objective import LearnedPriors, Objective
from batchshaping.training.regions import objects_in_regions
from batchshaping.training.run import load_run, make_classifier, resume, train
from batchshaping.training.sections import ObjectiveSettings

SETTINGS: dict[str, Any] = {
    "network": "msvit-mini",
    "embedding": 16,
    "depth": 1,
    "heads": 2,
    "patch": 2,
    "scale_hidden": 8,
    "optimizer": "adamw",
    "learning_rate": 2e-3,
    "gate_learning_rate": 4e-3,
    "prior_learning_rate": 0.05,
    "hyperprior": (3.0, 7.0),
    "shaping": 20.0,
    "shaping_end": None,
    "penalty": 0.0,
    "train_images": 128,
    "batch_size": 32,
    "epochs": 2,
    "logger": "none",
}


def test_a_run_trains_evaluates_and_is_loaded(tmp_path: Path) -> None:
    result = train(RunConfig(**SETTINGS), tmp_path / "run")
    assert result["kind"] == "mixed-scale tokens"
    assert result["reference"]["name"] == "ViT/2, width 16, depth 1, 2 heads, all fine"
    # 8 x 8 pixels: 4 regions of 2 x 2 patches of 2 x 2 pixels.
    assert [(layer["name"], layer["gates"]) for layer in result["layers"]] == [("gate", 4)]
    assert len(result["priors"]["mean"]) == len(result["priors"]["temperature"]) == 4
    assert result["config"]["hyperprior"] == [3.0, 7.0] and result["history"][-1]["shaping"] == 20.0
    written = json.loads((tmp_path / "run/result.json").read_text())
    assert written["accuracy"] == result["accuracy"]
    network, data = load_run(tmp_path / "run")
    assert isinstance(network, bs.MSViT)
    with torch.no_grad(), bs.gates_forced(network.eval(), share=1.0):
        images = data.normalize(data.test.__getitems__(range(8))[0])
        assert torch.equal(network.inference_twin()(images), network.vit(images))


@pytest.mark.parametrize("gate", ["entropy", "chance"])
def test_rules_are_trained_with_and_go_on_after_an_interruption(gate: str, tmp_path: Path) -> None:
    settings = {**SETTINGS, "hyperprior": None, "shaping": 0.0, "gate": gate, "density": 0.25}
    whole = train(RunConfig(**settings), tmp_path / "whole")
    assert whole["gates"]["mean_open"] == pytest.approx(0.25, abs=0.1)
    assert whole["priors"] is None
    network, _ = load_run(tmp_path / "whole")
    assert isinstance(network, bs.MSViT) and [*network.gate.parameters()] == []
    train(RunConfig(**settings), tmp_path / "again")
    for name in ("result.json", "model.safetensors"):
        (tmp_path / "again" / name).unlink()
    assert resume(tmp_path / "again")["loss"] == whole["loss"]


def test_findings_are_those_of_the_network(tmp_path: Path) -> None:
    module, data = classifier(), few(40)
    drawn = CANVASES.draw("test", 40)
    data = replace(data, test=drawn)
    network = module.network.eval()
    metrics = evaluate(network, data, extremes=3)
    found = network_settings(network="msvit-mini").findings(network, data, metrics)["regions"]
    assert found["grid"] == [4, 4]
    with torch.no_grad():
        network(data.normalize(drawn.images))
    for which in ("least", "most"):
        indices = [image["index"] for image in metrics[which]]
        assert found["masks"][which] == network.gate.decisions[indices].int().tolist()
    has_object = objects_in_regions(drawn.objects(), side=16)
    for index in range(40):
        (row, column), (down, across) = drawn.corners[index, 0].tolist(), drawn.ink[index, 0].nonzero().T
        touched = {*((row + down) // 16 * 4 + (column + across) // 16).tolist()}
        assert touched == {*has_object[index].nonzero().flatten().tolist()}
    expected = roc_auc_score(has_object.flatten(), network.gate.probabilities.double().flatten())
    assert found["objects"]["auc"] == pytest.approx(expected)
    assert found["objects"]["frequency"] == has_object.double().mean(dim=0).tolist()
    # Digits know no objects, and a network without gates finds nothing.
    plain = few(40)
    found = network_settings(network="msvit-mini").findings(network, plain, evaluate(network, plain))
    assert found["regions"]["objects"] is None
    assert network_settings(network="msvit-mini").findings(nn.Identity(), plain, {}) == {}


def few(data_of: int = 64) -> Data:
    drawn = CANVASES.draw("train", data_of)
    images = ImagesInMemory(drawn.images, drawn.labels)
    return data_in_memory(images, images, [str(n) for n in range(10)], padding=0, flip=False)


def classifier(**settings: Any) -> GatedClassifier:
    torch.manual_seed(0)
    return make_classifier(RunConfig(**{**SETTINGS, "patch": 8, **settings}), few())


def test_priors_are_learned_one_for_each_region_and_start_at_the_hyperprior() -> None:
    module = classifier(hyperprior=(2.0, 8.0))
    shaping = module.objective.batch_shaping
    assert isinstance(shaping, LearnedPriors)
    assert shaping.loss.mean.shape == (16,)
    # The means start with a standard deviation of 0.1 in their logits.
    logit = torch.logit(shaping.loss.mean.detach()).mean().item()
    assert logit == pytest.approx(math.log(2 / 8), abs=0.1)
    images = torch.randn(32, 1, 64, 64)
    module.network.train()(images)
    losses = module.objective(bs.gate_probabilities(module.network), module._cost, 1.0)
    assert losses.keys() == {"batch_shaping"}
    expected = 20 * shaping.loss(module.network.gate.probabilities)
    torch.testing.assert_close(losses["batch_shaping"], expected)
    losses["batch_shaping"].backward()
    assert all(p.grad is not None for p in module.objective.parameters())
    # Without a hyperprior nothing is learned.
    assert [*classifier(hyperprior=None).objective.parameters()] == []


def test_all_layers_of_a_network_share_a_hyperprior() -> None:
    objective = Objective(ObjectiveSettings(hyperprior=(3, 7), shaping=1.0), gates=5)
    layers = [torch.rand(16, 2), torch.rand(16, 3)]
    found = objective(layers, lambda name: torch.zeros(()), 0.0)["batch_shaping"]
    torch.testing.assert_close(found, objective.batch_shaping.loss(torch.cat(layers, dim=1)))
    with pytest.raises(ValueError, match="hyperprior needs a network with gates, received 0 gates"):
        Objective(ObjectiveSettings(hyperprior=(3, 7)))


@pytest.mark.parametrize(("optimizer", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_optimizer_and_its_learning_rates_are_those_asked_for(optimizer: str, kind: type) -> None:
    module = classifier(optimizer=optimizer, weight_decay=0.01)
    module._trainer = type("Trainer", (), {"estimated_stepping_batches": 10})()  # type: ignore[assignment]
    made: Any = module.configure_optimizers()
    assert type(made["optimizer"]) is kind
    groups = made["optimizer"].param_groups
    assert [group["lr"] for group in groups] == [2e-3, 4e-3, 0.05]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0, 0.0]
    every = [*module.network.parameters(), *module.objective.parameters()]
    assert {p for group in groups for p in group["params"]} == {*every}


def test_networks_are_those_of_their_settings() -> None:
    shape = (3, 64, 64)
    small = network_settings(network="msvit-mini", embedding=12, depth=2, heads=3, patch=4, coarse_side=4)
    network = small.build(5, shape)
    assert isinstance(network, bs.MSViT) and network.coarse == 16 and len(network.vit.blocks) == 2
    assert network(torch.randn(2, *shape)).shape == (2, 5)
    ungated = network_settings(network="msvit-mini", gated=False).build(5, shape)
    assert isinstance(ungated, timm.models.VisionTransformer)
    tiny = network_settings(network="msvit-tiny16")
    assert tiny.reference == "ViT-Tiny/16, all fine"
    vit: nn.Module = tiny.build(5, shape).vit  # type: ignore[assignment]
    assert vit.embed_dim == 192 and vit.patch_embed.grid_size == (4, 4)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"network": "msvit-mini", "pretrained": True}, "pretrained is not a setting of msvit-mini"),
        ({"network": "msvit-tiny16", "depth": 2}, "depth is not a setting of msvit-tiny16"),
        ({"network": "msvit-mini", "coarse_side": 3}, "coarse_side: "),
        ({"network": "msvit-mini", "width": 3}, "width is not a setting of msvit-mini"),
        ({"network": "msvit-mini", "gate": "chance"}, "density must be given for gate chance, received None"),
        ({"network": "msvit-mini", "density": 0.2}, "density must be none for a learned gate, received 0.2"),
        ({"network": "msvit-mini", "gate": "variance"}, "gate: input should be 'learned', 'entropy' or"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        network_settings(**settings)


def test_images_and_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="divide the sides of images of 28 x 28 pixels, received 8"):
        network_settings(network="msvit-mini").build(10, (1, 28, 28))
    with pytest.raises(ValueError, match="a multiple of 5 heads, received 64"):
        network_settings(network="msvit-mini", heads=5).build(10, (1, 64, 64))
