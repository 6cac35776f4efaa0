"""The objective is its formula, each parameter is trained as it should be, and two ranks are one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import Ranks
from scipy import stats
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from batchshaping.gates.gate import Gate, gate_decisions, gate_probabilities
from batchshaping.training.config import RunConfig
from batchshaping.training.data import Data, load_data
from batchshaping.training.module import GatedClassifier, make_network
from batchshaping.training.run import make_classifier, make_data_module
from batchshaping.training.schedules import Ramp

CONFIG = RunConfig(
    width=2,
    hidden=4,
    train_images=64,
    batch_size=16,
    epochs=3,
    budget=0.0,
    penalized="open-gates",
    learning_rate=0.05,
    gate_learning_rate=0.2,
    logger="none",
)


def with_settings(**settings: Any) -> RunConfig:
    return RunConfig(**{**CONFIG.model_dump(), **settings})


def made(config: RunConfig) -> GatedClassifier:
    return make_classifier(config, load_data(config.data))


def fit(config: RunConfig, module: GatedClassifier, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    """Train as a run does, but leave no files."""
    trainer = pl.Trainer(
        accelerator="cpu",
        **{"devices": 1, **settings},
        precision=config.precision,
        max_epochs=config.epochs,
        accumulate_grad_batches=config.accumulate,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=config.log_every,
        reload_dataloaders_every_n_epochs=1,
        barebones=False,
    )
    trainer.fit(module, make_data_module(config, module.data))
    return trainer


# The objective


def multiply_adds(network: nn.Module, data: Data, gates: list[Tensor]) -> tuple[Tensor, float]:
    """Mean multiply-adds of an image as a share of the ungated network's, and that of closed gates."""
    macs: dict[str, float] = {}

    def count(module: nn.Module, inputs: Any, output: Tensor, name: str) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        macs[name] = output.numel() * module.weight[0].numel()

    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    handles = [layer.register_forward_hook(partial(count, name=name)) for name, layer in layers.items()]
    plain = make_network(RunConfig(width=2, gated=False), len(data.classes), data.shape[0]).eval()
    plain_layers = {name: m for name, m in plain.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    handles += [
        layer.register_forward_hook(partial(count, name=f"plain {name}"))
        for name, layer in plain_layers.items()
    ]
    modes = {module: module.training for module in network.modules()}
    made = [(gate, gate._runs) for gate in network.modules() if isinstance(gate, Gate)]
    with torch.no_grad():
        network.eval()(torch.zeros(1, *data.shape))
        plain(torch.zeros(1, *data.shape))
    for module, mode in modes.items():
        module.training = mode
    for gate, runs in made:
        gate._runs = runs
    for handle in handles:
        handle.remove()
    dense = sum(n for name, n in macs.items() if name.startswith("plain "))
    own = sum(n for name, n in macs.items() if not name.startswith("plain "))
    # A basic block's gates are those of conv1's outputs, which are conv2's inputs.
    convolutions = [
        [n for name, n in macs.items() if name in (f"layer{stage}.0.conv1", f"layer{stage}.0.conv2")]
        for stage in (1, 2, 3)
    ]
    fixed = own - sum(map(sum, convolutions))
    switched = [p.mean() * sum(pair) for p, pair in zip(gates, convolutions, strict=True)]
    return (torch.stack(switched).sum() + fixed) / dense, fixed / dense


def shaping(p: Tensor, a: float, b: float) -> tuple[float, Tensor]:
    """The batch-shaping loss of one layer by its formula, and its gradient."""
    values = p.detach().double().numpy()
    n, gates = values.shape
    ranks = stats.rankdata(values, method="ordinal", axis=0)
    prior = stats.beta(a, b)
    residual = prior.cdf(values) - ranks / (n + 1)
    gradient = 2 / n * residual * prior.pdf(values) / gates
    return float(np.square(residual).mean()), torch.from_numpy(gradient).to(p)


class Formula(pl.Callback):
    """Compares the loss of each step, and its gradient in every parameter, with the formula."""

    logits: Tensor

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.steps: list[tuple[float, float]] = []
        self.above: list[bool] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.labels = batch[1]
        self.handle = module.network.register_forward_hook(lambda *args: setattr(self, "logits", args[-1]))

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        self.handle.remove()
        config = self.config
        done = trainer.global_step / (config.epochs * 4)
        gamma = config.shaping * max(0.0, 1 - done / config.shaping_end)
        begin, end = config.penalty_begin, config.penalty_end
        lambda_ = config.penalty * min(max(0.0, (done - begin) / (end - begin)), 1.0)
        expected = F.cross_entropy(self.logits, self.labels)
        surrogate = expected  # has the gradient of what is expected
        if config.gated:
            gates = gate_probabilities(module.network)
            for p in gates:
                value, gradient = shaping(p, *config.prior)
                expected = expected + gamma * value
                surrogate = surrogate + gamma * (p * gradient).sum()
            costs = {
                "open-gates": lambda gates: torch.cat([p.flatten() for p in gates]).mean(),
                "multiply-adds": lambda gates: multiply_adds(module.network, module.data, gates)[0],
            }
            # The value is that of what was decided, whatever the noise; the gradient is that of p. Each layer
            # has gates on one side only, so that the cost is linear in them.
            spent = costs[config.penalized](gate_decisions(module.network))
            self.above.append(spent.item() > config.budget)
            expected = expected + lambda_ * F.relu(spent - config.budget)
            surrogate = surrogate + lambda_ * self.above[-1] * costs[config.penalized](gates)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        parameters = dict(module.network.named_parameters())
        found, by_formula = (
            torch.autograd.grad(x, list(parameters.values()), retain_graph=True) for x in (loss, surrogate)
        )
        for name, one, other in zip(parameters, found, by_formula, strict=True):
            torch.testing.assert_close(
                one, other, rtol=1e-3, atol=1e-5 * (1 + float(other.abs().max())), msg=name
            )
            assert (one != 0).any() or "gate" not in name, name
        self.steps.append((gamma, lambda_))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"penalized": "multiply-adds", "budget": 0.8},
        {"penalized": "open-gates", "budget": 0.5},
        {"shaping": 0.0, "prior": (2.0, 6.0)},
        {"prior": (2.0, 6.0), "gate_bias": 1.0},
        {"gated": False},
    ],
)
def test_the_objective_and_its_gradient_are_the_formula(settings: dict[str, Any]) -> None:
    config = with_settings(shaping_end=0.5, penalty_begin=0.25, penalty_end=0.75, **settings)
    formula = Formula(config)
    fit(config, made(config), formula)
    gammas, lambdas = zip(*formula.steps, strict=True)
    assert len(gammas) == 12
    assert lambdas[0] == 0 < lambdas[6] < lambdas[-1] == 3
    assert gammas[0] >= gammas[1] >= gammas[6] == 0


def test_a_budget_below_what_no_gate_can_save_is_refused() -> None:
    module = made(CONFIG)
    least = module.cost.fixed / module.cost.dense
    gates = [torch.zeros(1, n) for n in (2, 4, 8)]
    assert least == pytest.approx(multiply_adds(module.network, module.data, gates)[1])
    made(with_settings(penalized="multiply-adds", budget=least))
    made(with_settings(penalized="multiply-adds", budget=0.0))
    made(with_settings(penalized="open-gates", budget=least / 2))
    with pytest.raises(ValueError, match=rf"^budget must be 0 or at least {least:.3g}, .* received 0\.01$"):
        made(with_settings(penalized="multiply-adds", budget=0.01))


# Optimization


class Steps(pl.Callback):
    """Notes what is in force in each step."""

    def __init__(self) -> None:
        self.noise: list[tuple[int, set[float]]] = []
        self.rates: list[tuple[int, list[float]]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        gates = [m for m in module.network.modules() if isinstance(m, Gate)]
        self.noise.append((trainer.global_step, {gate.noise.item() for gate in gates}))

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.rates.append((trainer.global_step, [group["lr"] for group in optimizer.param_groups]))
        self.gradients.append({n: p.grad.clone() for n, p in module.network.named_parameters()})


def test_every_parameter_is_in_one_group_and_those_of_gates_do_not_decay() -> None:
    config = with_settings(epochs=1, weight_decay=0.01)
    module = made(config)
    trainer = fit(config, module)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    decay: dict[str, float] = {}
    rate: dict[str, float] = {}
    names = {p: name for name, p in module.network.named_parameters()}
    for group in optimizer.param_groups:
        assert group["nesterov"] and group["momentum"] == 0.9
        for parameter in group["params"]:
            assert names[parameter] not in decay
            decay[names[parameter]], rate[names[parameter]] = group["weight_decay"], group["initial_lr"]
    assert set(decay) == set(names.values())
    for name in decay:
        expected = (0.0, 0.2) if ".gate1." in name else (0.01, 0.05)
        assert (decay[name], rate[name]) == expected, name


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("steps", lambda done: 0.1 ** sum(done >= m for m in (0.5, 0.75))),
        ("cosine", lambda done: (1 + np.cos(np.pi * done)) / 2),
    ],
)
@pytest.mark.parametrize(("accumulate", "images", "steps"), [(1, 64, 4), (2, 64, 4), (2, 56, 4)])
def test_rates_and_noise_follow_their_schedules_by_the_step(
    accumulate: int, images: int, steps: int, schedule: str, factor: Callable[[float], float]
) -> None:
    seen = Steps()
    config = with_settings(
        accumulate=accumulate, train_images=images, schedule=schedule, milestones=(0.5, 0.75), noise_end=0.5
    )
    trainer = fit(config, made(config), seen)
    total = steps * config.epochs
    assert trainer.global_step == total
    assert [step for step, _ in seen.rates] == list(range(total))
    for step, (rate, gate_rate) in seen.rates:
        assert rate == pytest.approx(0.05 * factor(step / total))
        assert gate_rate == pytest.approx(0.2 * factor(step / total))
    for step, noise in seen.noise:
        assert list(noise) == [pytest.approx(max(0.0, 1 - step / total / 0.5))]


def test_noise_without_an_end_stays() -> None:
    seen = Steps()
    config = with_settings(noise_end=None, epochs=1)
    fit(config, made(config), seen)
    assert {value for _, noise in seen.noise for value in noise} == {1.0}


class FixedStatistics(pl.Callback):
    """Batch normalization that couples no images."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        for layer in module.network.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()


def quiet(module: GatedClassifier) -> GatedClassifier:
    """The same without the gates' noise, and with a penalty from the first step on."""
    module.objective.noise = Ramp(0.0, 0.0, 0.0, 1.0)
    module.objective.penalty = Ramp(3.0, 3.0, 0.0, 1.0)
    return module


def test_accumulated_batches_have_the_gradient_of_one() -> None:
    # But for batch-shaping, which sees one of the accumulated batches at a time.
    gradients = []
    for accumulate in (1, 2, 4):
        seen = Steps()
        config = with_settings(shaping=0.0, accumulate=accumulate, augment=False, epochs=1)
        fit(config, quiet(made(config)), FixedStatistics(), seen)
        gradients.append(seen.gradients[0])
    for accumulated in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(accumulated[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
            assert (gradient != 0).any(), name


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own() -> None:
    class Order(pl.Callback):
        def __init__(self) -> None:
            self.epochs: list[list[Tensor]] = []

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            self.epochs.append([])

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            self.epochs[-1].append(batch[0].flatten(1))

    order = Order()
    config = with_settings(augment=False)
    module = made(config)
    fit(config, module, order)
    images, _ = module.data.train.__getitems__(range(64))
    expected = module.data.normalize(images).flatten(1)
    epochs = [torch.cat(batches) for batches in order.epochs]
    for seen in epochs:
        assert torch.equal(seen.unique(dim=0), expected.unique(dim=0)) and len(seen) == 64
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


# Two ranks


class GlobalBatchNorm(nn.Module):
    """Batch normalization over the batch of all ranks, differentiable on the CPU, which PyTorch's is not."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("running_mean", layer.running_mean)
        self.register_buffer("running_var", layer.running_var)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.ndim - 2))
        mean, var = self.running_mean, self.running_var
        if self.training:
            dims = [0, *range(2, x.ndim)]
            count = x.new_full((x.shape[1],), x.numel() / x.shape[1])
            sums = torch.stack([x.sum(dims), x.square().sum(dims), count])
            total, squares, count = all_reduce(sums) if dist.is_initialized() else sums
            mean = total / count
            var = squares / count - mean.square()
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(var * count / (count - 1), 0.1)
        normal = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        return normal * self.weight.view(shape) + self.bias.view(shape)


def synchronized(network: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, GlobalBatchNorm(child))


class Curve(pl.Callback):
    """The loss and its terms as logged, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        names = ("loss", "cross_entropy", "batch_shaping", "penalty")
        logged = trainer.callback_metrics
        self.steps.append(
            {
                name: float(logged[f"{name}_step" if f"{name}_step" in logged else name])
                for name in names
                if name in logged
            }
        )


def curve(
    config: RunConfig, **settings: Any
) -> tuple[list[dict[str, float]], list[dict[str, Any]], list[Tensor]]:
    """Loss curve, history and final weights of a training without noise, its normalization synchronized."""
    module = made(config).double()
    module.objective.noise = Ramp(0.0, 0.0, 0.0, 1.0)
    synchronized(module.network)
    seen = Curve()
    fit(config, module, seen, **settings)
    return seen.steps, module.history, [p.detach().clone() for p in module.network.parameters()]


def curve_of_a_rank(rank: int, world: int, config: RunConfig) -> Any:
    os.environ.update(
        LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
    )
    return curve(config, strategy="ddp", devices=world)


def numbers(value: Any) -> list[float]:
    """All numbers in nested lists and dictionaries."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for item in value for number in numbers(item)]
    return [] if isinstance(value, str) or value is None else [float(value)]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_two_ranks_follow_the_loss_curve_of_one_process() -> None:
    config = with_settings(
        precision="64",
        augment=False,
        epochs=5,
        penalized="multiply-adds",
        budget=0.6,
        learning_rate=0.02,
        log_every=1,
    )
    expected, history, weights = curve(config)
    assert len(expected) == 20
    with Ranks(2) as ranks:
        outcomes = ranks.run(
            curve_of_a_rank, with_settings(**{**config.model_dump(), "devices": 2}), timeout=120
        )
    for steps, of_rank, of_rank_weights in outcomes:
        np.testing.assert_allclose(numbers(steps), numbers(expected), rtol=0, atol=1e-8)
        np.testing.assert_allclose(numbers(of_rank), numbers(history), rtol=1e-8, atol=1e-8)
        for one, other in zip(of_rank_weights, weights, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
    # All three terms took part.
    assert {"batch_shaping", "penalty"} <= set().union(*expected)


class Penalties(pl.Callback):
    """What each step spent, as a share of the ungated network's multiply-adds, and its penalty as logged."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        logged = trainer.callback_metrics
        if "penalty" in logged:
            spent = module._spent().item() / module.cost.dense
            self.steps.append((spent, logged["penalty"].item()))


def test_without_noise_a_step_is_penalized_for_what_it_spent_above_the_budget() -> None:
    """Of gates without noise, the probabilities say less, or more, than what is spent."""
    config = with_settings(penalized="multiply-adds", budget=0.6, shaping=0.0, gate_bias=0.0, log_every=1)
    seen = Penalties()
    fit(config, quiet(made(config)), seen)
    assert len({spent > 0.6 for spent, _ in seen.steps}) == 2, "both sides of the budget are seen"
    for spent, penalty in seen.steps:
        assert penalty == pytest.approx(3 * max(0.0, spent - 0.6), abs=1e-5)
