"""The objective is a module: what it learns is optimized, moved and checkpointed; its losses have names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

import batchshaping as bs
from batchshaping.gates.cost import MultiplyAdds
from batchshaping.training.checkpoints import SafeCheckpoints, read_checkpoint
from batchshaping.training.config import RunConfig
from batchshaping.training.data import load_data
from batchshaping.training.module import GatedClassifier
from batchshaping.training.objective import Objective
from batchshaping.training.run import make_data_module
from batchshaping.training.sections import ObjectiveSettings


def inputs() -> tuple[list[Tensor], Callable[[str], Tensor]]:
    """Probabilities of three layers, and two costs, with gradients."""
    layers = [torch.rand(16, gates, requires_grad=True) for gates in (1, 5, 8)]
    decisions = [p + ((p > 0.5).float() - p).detach() for p in layers]
    mean = torch.cat(decisions, dim=1).mean()
    return layers, {"multiply-adds": (1 + 3 * mean) / 4, "open-gates": mean}.__getitem__


@pytest.mark.parametrize(
    ("progress", "names"),
    [(0.0, {"batch_shaping"}), (0.15, {"batch_shaping", "penalty"}), (0.5, {"penalty"}), (1.0, {"penalty"})],
)
def test_losses_have_names_and_those_without_a_weight_are_left_out(progress: float, names: set[str]) -> None:
    objective = Objective(ObjectiveSettings(penalty_begin=0.1))
    layers, cost = inputs()
    losses = objective(layers, cost, progress)
    assert losses.keys() == names
    assert all(loss.requires_grad and loss.shape == () for loss in losses.values())
    assert objective.weights(progress).keys() == {"shaping", "penalty", "noise"}


def test_the_batch_shaping_loss_is_the_sum_over_the_layers() -> None:
    layers, cost = inputs()
    objective = Objective(ObjectiveSettings(prior=(2.0, 6.0), shaping=0.5))
    alone = [bs.batch_shaping(layer, bs.Beta(2.0, 6.0), dim=0) for layer in layers]
    expected = 0.5 * torch.stack(alone).sum()
    found = objective(layers, cost, progress=0.0)["batch_shaping"]
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, layers), torch.autograd.grad(expected, layers), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("penalized", ["multiply-adds", "open-gates"])
@pytest.mark.parametrize("over", [True, False])
def test_only_cost_above_the_budget_is_penalized(penalized: str, over: bool) -> None:
    layers, cost = inputs()
    spent = cost(penalized)
    budget = spent.item() + (-0.1 if over else 0.1)
    objective = Objective(ObjectiveSettings(penalized=penalized, budget=budget, penalty=2.0))
    loss = objective(layers, cost, progress=1.0)["penalty"]
    assert loss.item() == pytest.approx(0.2 if over else 0.0, abs=1e-6)
    for found, gradient in zip(
        torch.autograd.grad(loss, layers, retain_graph=True), torch.autograd.grad(spent, layers), strict=True
    ):
        torch.testing.assert_close(found, 2.0 * over * gradient)


def test_the_prior_of_the_settings_has_no_state() -> None:
    objective = Objective(ObjectiveSettings())
    assert objective.state_dict() == {} and list(objective.parameters()) == []


def test_a_learned_prior_is_optimized_moved_and_checkpointed(tmp_path: Path) -> None:
    config = RunConfig(
        width=2, hidden=4, train_images=64, batch_size=16, epochs=2, shaping_end=1.0, gate_learning_rate=0.2
    )
    data = load_data(config.data)

    def made() -> GatedClassifier:
        torch.manual_seed(0)
        network = config.network.build(len(data.classes), data.shape)
        cost = MultiplyAdds.measure(network, torch.zeros(1, *data.shape))
        learned = bs.Beta(nn.Parameter(torch.tensor(0.6)), 0.4)
        return GatedClassifier(network, cost, Objective(config.objective, learned), config.optimization, data)

    def trainer(**settings: Any) -> pl.Trainer:
        return pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            plugins=[SafeCheckpoints()],
            **settings,
        )

    module = made()
    assert module.double().objective.batch_shaping.a.dtype == torch.float64
    module = made()
    first = trainer(max_epochs=1)
    first.fit(module, make_data_module(config, data))
    (optimizer,) = first.optimizers
    *_, learned = optimizer.param_groups
    assert [name for name, _ in module.objective.named_parameters()] == ["batch_shaping.a"]
    assert learned["params"] == [module.objective.batch_shaping.a]
    assert (learned["initial_lr"], learned["weight_decay"]) == (0.2, 0.0)
    value = module.objective.batch_shaping.a.item()
    assert value != pytest.approx(0.6, abs=1e-4)

    path = tmp_path / "checkpoint.safetensors"
    first.save_checkpoint(path)
    assert read_checkpoint(path)["state_dict"]["objective.batch_shaping.a"].item() == value
    again = made()
    second = trainer(max_epochs=2)
    second.fit(again, make_data_module(config, data), ckpt_path=path)
    assert second.global_step == 8
    assert again.objective.batch_shaping.a.item() != value
