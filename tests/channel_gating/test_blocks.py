"""A gated network is the given one with open gates, its shortcuts with closed ones, and learns as one."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import batchshaping as bs
from batchshaping.channel_gating.blocks import GatedBasicBlock, GatedBlock, GatedBottleneck, gate_resnet
from batchshaping.channel_gating.resnets import SmallImageResNet
from batchshaping.gates.forced import gates_forced
from batchshaping.gates.gate import gate_decisions, gate_probabilities, named_gates

CLASSIFIERS = ["resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2"]
SEGMENTERS = ["fcn_resnet50", "deeplabv3_resnet50"]


def make(name: str) -> nn.Module:
    if name in CLASSIFIERS:
        return torchvision.models.get_model(name, weights=None, num_classes=5)
    return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5)


def output(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y["out"] if isinstance(y, dict) else y


def tiny(training: bool = True, dtype: torch.dtype = torch.float32) -> SmallImageResNet:
    """A gated network whose parameters all get a gradient."""
    torch.manual_seed(2)
    return gate_resnet(SmallImageResNet(8, 4, width=4), hidden=4).train(training).to(dtype)


def bottlenecks() -> nn.Sequential:
    torch.manual_seed(2)
    downsample = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16))
    blocks = [Bottleneck(3, 4, downsample=downsample), Bottleneck(16, 4)]
    return gate_resnet(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)), 4)


def objective(logits: Tensor, model: nn.Module, target: Tensor, group: str | None = None) -> Tensor:
    """Cross-entropy, batch-shaping of every gate, and the penalty of open ones."""
    shaping = [bs.batch_shaping(p, bs.Beta(0.6, 0.4), dim=0, group=group) for p in gate_probabilities(model)]
    penalty = bs.l0_penalty(gate_probabilities(model))
    return nn.functional.cross_entropy(logits, target) + 0.75 * torch.stack(shaping).sum() + 0.1 * penalty


def batch(n: int = 24, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 8, 8, dtype=dtype), torch.arange(n) % 4


def gradients(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    x, target = batch()
    objective(forward(x), model, target).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# What gating keeps


@pytest.mark.parametrize("name", [*CLASSIFIERS, *SEGMENTERS])
def test_an_open_network_is_the_given_one_to_the_bit(name: str) -> None:
    resnet = make(name)
    x = torch.randn(2, 3, 32, 32)
    weights = {key: value.clone() for key, value in resnet.state_dict().items()}
    with torch.no_grad():
        expected = {}
        for training in (True, False):
            torch.manual_seed(1)
            expected[training] = output(resnet.train(training), x)
        statistics = {key: value.clone() for key, value in resnet.state_dict().items()}
        resnet.load_state_dict(weights)
        tensors = {key: value.data_ptr() for key, value in resnet.state_dict().items()}

        gated = gate_resnet(resnet)
        assert gated is resnet
        found = gated.state_dict()
        added = set(found) - set(weights)
        assert set(found) >= set(weights)
        assert all(torch.equal(found[key], value) for key, value in weights.items())
        assert all(found[key].data_ptr() == where for key, where in tensors.items())
        assert added and all({"gate1", "gate2"} & set(key.split(".")) for key in added)
        result = gated.load_state_dict(weights, strict=False)
        # PyTorch counts the batches of a normalization from 0 where a checkpoint says nothing of it.
        needed = {key for key in added if not key.endswith("num_batches_tracked")}
        assert needed <= set(result.missing_keys) <= added and not result.unexpected_keys

        with gates_forced(gated, 1.0):
            for training in (True, False):
                torch.manual_seed(1)
                assert torch.equal(output(gated.train(training), x), expected[training])
        found = gated.state_dict()
        assert all(torch.equal(found[key], value) for key, value in statistics.items())
    inner = sum(1 if isinstance(b, GatedBasicBlock) else 2 for b in gated_blocks(gated))
    assert len(named_gates(gated)) == inner


def gated_blocks(model: nn.Module) -> Iterator[GatedBlock]:
    return (module for module in model.modules() if isinstance(module, GatedBlock))


def test_no_block_of_torchvision_is_left_and_the_order_of_layers_stays() -> None:
    resnet = make("resnet50")
    names = [name for name, _ in resnet.named_modules()]
    gated = gate_resnet(resnet)
    assert not any(isinstance(m, BasicBlock | Bottleneck) for m in gated.modules())
    assert [name for name, _ in gated.named_modules() if "gate" not in name] == names


def test_a_block_stays_the_object_it_is_with_all_that_it_has() -> None:
    resnet = torchvision.models.resnet18(num_classes=5).eval()
    block, x = resnet.layer2[0], torch.randn(2, 3, 64, 64)
    seen: list[str] = []
    block.register_forward_pre_hook(lambda *_: seen.append("forward pre"))
    block.register_forward_hook(lambda module, inputs, output: (seen.append("forward"), output + 1)[1])
    block.register_full_backward_hook(lambda *_: seen.append("backward"))
    block.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    block.register_state_dict_pre_hook(lambda *_: seen.append("state_dict pre"))
    block.register_state_dict_post_hook(lambda *_: seen.append("state_dict"))
    block.register_load_state_dict_pre_hook(lambda *_: seen.append("load pre"))
    block.register_load_state_dict_post_hook(lambda *_: seen.append("load"))
    removed = block.register_forward_hook(lambda *_: seen.append("removed"))
    block.note = {"drop": 0.25}
    block.extra = nn.Linear(2, 2)
    block.scale = nn.Parameter(torch.tensor(2.0))
    block.register_buffer("steps", torch.tensor(7), persistent=False)
    expected = resnet(x)
    gated = gate_resnet(resnet)
    removed.remove()
    assert gated.layer2[0] is block and type(block) is GatedBasicBlock
    assert block.note == {"drop": 0.25} and block.scale.item() == 2 and block.steps.item() == 7
    assert block.extra.in_features == 2 and "layer2.0.scale" in gated.state_dict()
    assert "layer2.0.steps" not in gated.state_dict()
    seen.clear()
    with gates_forced(gated, 1.0):
        y = gated(x)
    assert torch.equal(y, expected), "the hook's 1 is still added"
    y.sum().backward()
    gated.load_state_dict(gated.state_dict())
    steps = ["forward pre", "forward", "backward pre", "backward"]
    assert seen == [*steps, "state_dict pre", "state_dict", "load pre", "load"]
    plain = gate_resnet(SmallImageResNet(8, width=4))
    for other in (copy.deepcopy(gated), pickle.loads(pickle.dumps(plain))):
        assert all(type(module) is GatedBasicBlock for module in gated_blocks(other))


def test_a_compiled_network_that_is_gated_runs_its_gates() -> None:
    torch.compiler.reset()
    network, (x, _) = SmallImageResNet(8, 4, width=4).eval(), batch()
    run = torch.compile(network, backend="eager")
    with torch.no_grad():
        run(x)
        gate_resnet(network, hidden=4).eval()
        torch.testing.assert_close(run(x), network(x))
        with gates_forced(run, 0.0):
            closed = run(x)
            assert all(bool((d == 0).all()) for d in gate_decisions(run))
        assert not torch.equal(closed, run(x))


@pytest.mark.parametrize("ambient", ["meta", "float64", "bfloat16"])
def test_gates_start_alike_whatever_the_default_device_or_type_is(ambient: str) -> None:
    networks = [SmallImageResNet(8, width=4) for _ in range(2)]
    torch.manual_seed(3)
    expected = gate_resnet(networks[0]).state_dict()
    torch.manual_seed(3)
    if ambient == "meta":
        with torch.device("meta"):
            gate_resnet(networks[1])
    else:
        torch.set_default_dtype(getattr(torch, ambient))
        try:
            gate_resnet(networks[1])
        finally:
            torch.set_default_dtype(torch.float32)
    gates = {key: value for key, value in networks[1].state_dict().items() if ".gate1." in key}
    assert gates
    for key, value in gates.items():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gates_take_mode_type_and_device_of_their_block(dtype: torch.dtype, training: bool) -> None:
    gated = gate_resnet(SmallImageResNet(8, width=4).to("meta", dtype).train(training))
    assert all(module.training == training for module in gated.modules())
    assert all(p.dtype == dtype and p.device.type == "meta" for p in gated.parameters())


@pytest.mark.parametrize("block", [BasicBlock(16, 16), Bottleneck(16, 4)], ids=["basic", "bottleneck"])
def test_hidden_width_and_bias_are_those_of_the_gates(block: nn.Module) -> None:
    network = gate_resnet(nn.Sequential(block), hidden=5, bias=40.0)
    network(torch.randn(8, 16, 4, 4))
    for gate in named_gates(network).values():
        assert gate.to_logits[0].out_features == 5
    assert all((d == 1).all() for d in gate_decisions(network))


# A gate for several channels


@pytest.mark.parametrize("gates_per_layer", [1, 3, 8, 100])
def test_a_gate_switches_its_share_of_a_layer_and_at_least_16_channels(gates_per_layer: int) -> None:
    network = gate_resnet(SmallImageResNet(8, width=20), gates_per_layer=gates_per_layer).eval()
    network(torch.randn(2, 3, 8, 8))
    for decisions, block in zip(gate_decisions(network), gated_blocks(network), strict=True):
        sizes = block.gate1.sizes or (1,) * block.conv1.out_channels
        assert decisions.shape == (2, len(sizes))
        assert sum(sizes) == block.conv1.out_channels and max(sizes) - min(sizes) <= 1
        if len(sizes) != gates_per_layer:
            assert len(sizes) < gates_per_layer
            assert min(sizes) >= 16 > sum(sizes) / (len(sizes) + 1), "one gate more would switch too few"


@pytest.mark.parametrize(("asked", "numbers"), [(2, (2, 2)), ((4, 2), (4, 2)), ((None, 2), (64, 2))])
def test_layers_of_a_bottleneck_can_have_other_numbers_of_gates(asked: Any, numbers: tuple[int, int]) -> None:
    network = gate_resnet(Bottleneck(32, 64, downsample=nn.Conv2d(32, 256, 1)), gates_per_layer=asked).eval()
    network(torch.randn(2, 32, 6, 6))
    assert [d.shape[1] for d in gate_decisions(network)] == [*numbers]
    with gates_forced(network, 1.0):
        assert network(torch.randn(2, 32, 6, 6)).shape == (2, 256, 6, 6)


@pytest.mark.parametrize("asked", [0, 1.5, (8, 4), (8,), "8"])
def test_numbers_of_gates_that_are_none_are_refused_and_nothing_is_gated(asked: Any) -> None:
    network = SmallImageResNet(8, width=4)
    if asked == (8,):
        network = nn.Sequential(Bottleneck(16, 4))
    with pytest.raises(ValueError, match=r"^gates_per_layer must be [^\n]*$"):
        gate_resnet(network, gates_per_layer=asked)
    assert not any(gated_blocks(network))


@pytest.mark.parametrize("make", [SmallImageResNet, torchvision.models.resnet50])
def test_without_a_number_there_is_a_gate_a_channel_as_before(make: Callable[..., nn.Module]) -> None:
    networks = []
    for settings in ({}, {"gates_per_layer": None}):
        torch.manual_seed(0)
        networks.append(gate_resnet(make(20) if make is SmallImageResNet else make(), **settings))
    assert all(gate.sizes is None for gate in named_gates(networks[0]).values())
    one, other = (network.state_dict() for network in networks)
    assert list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


# What gates do


def random_statistics(block: nn.Module) -> nn.Module:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return block


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_a_closed_block_is_its_shortcut_and_a_constant(name: str) -> None:
    block = random_statistics({"basic": BasicBlock(16, 16), "bottleneck": Bottleneck(16, 4)}[name]).eval()
    last = block.bn2 if name == "basic" else block.bn3
    scale = last.weight / (last.running_var + last.eps).sqrt()
    constant = (last.bias - scale * last.running_mean).reshape(16, 1, 1)
    network, x = gate_resnet(nn.Sequential(block)), torch.randn(3, 16, 5, 5)
    with gates_forced(network, 0.0):
        torch.testing.assert_close(network(x), (x + constant).relu())


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_a_block_computes_its_formula(name: str) -> None:
    """Channels are switched after the activation, by gates that read the input of the block."""
    block = random_statistics({"basic": BasicBlock(16, 16), "bottleneck": Bottleneck(16, 4)}[name]).eval()
    gated = {"basic": GatedBasicBlock, "bottleneck": GatedBottleneck}[name](block).eval()
    x = torch.randn(6, 16, 5, 5)
    y = gated(x)
    first = torch.sigmoid(gated.gate1.to_logits(x.mean(dim=(2, 3)))) > 0.5
    inner = first[..., None, None] * block.bn1(block.conv1(x)).relu()
    outer = block.bn2(block.conv2(inner))
    if name == "bottleneck":
        second = torch.sigmoid(gated.gate2.to_logits(x.mean(dim=(2, 3)))) > 0.5
        outer = block.bn3(block.conv3(second[..., None, None] * outer.relu()))
    assert torch.equal(y, (outer + x).relu())
    assert 0 < gated.gate1.decisions.mean() < 1


def test_an_example_is_decided_by_its_own_features_alone() -> None:
    network, (x, _) = random_statistics(tiny(training=False)), batch()
    x = x + 3 * torch.randn(len(x), 3, 1, 1)
    together = network(x)
    assert any(len(decisions.unique(dim=0)) > 1 for decisions in gate_decisions(network))
    torch.testing.assert_close(torch.cat([network(example[None]) for example in x]), together)


# What is refused


@pytest.mark.parametrize("model", [nn.Linear(2, 3), nn.Sequential(nn.Conv2d(3, 3, 1))])
def test_a_model_without_residual_blocks_is_refused_in_one_line(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"received a {type(model).__name__} without any$") as error:
        gate_resnet(model)
    assert "\n" not in str(error.value)


class Subclass(BasicBlock):
    """Which has torchvision's forward pass, as far as one can see."""


def changed(block: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(block, name, value)
    return block


def parametrized(block: nn.Module) -> nn.Module:
    block.scale = nn.Parameter(torch.ones(2))
    nn.utils.parametrize.register_parametrization(block, "scale", nn.Identity())
    return block


TORCHVISION = r"torchvision\.models\.resnet"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: nn.Sequential(Subclass(4, 4)), r"received '0', a test_blocks\.Subclass"),
    "subclass alone": (lambda: Subclass(4, 4), r"received a test_blocks\.Subclass"),
    "forward pass of the object": (
        lambda: nn.Sequential(changed(Bottleneck(4, 1), forward=lambda x: x)),
        rf"received '0', a {TORCHVISION}\.Bottleneck",
    ),
    "quantizable": (
        lambda: torchvision.models.quantization.resnet18(),
        r"received 'layer1\.0', a torchvision\.models\.quantization\.resnet\.QuantizableBasicBlock",
    ),
    "parametrized": (
        lambda: parametrized(BasicBlock(4, 4)),
        r"received a torch\.nn\.utils\.parametrize\.ParametrizedBasicBlock",
    ),
    "another layer": (
        lambda: nn.Sequential(changed(BasicBlock(4, 4), conv2=nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)))),
        r"the block's conv2 must be a Conv2d, received a torch\.nn\.modules\.container\.Sequential",
    ),
    "the name of a gate": (
        lambda: nn.Sequential(changed(Bottleneck(4, 1), gate2=nn.Identity())),
        rf"must not have a gate2 yet, received a {TORCHVISION}\.Bottleneck",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_block_that_cannot_be_gated_is_refused_by_name_and_nothing_is_gated(name: str) -> None:
    make, message = REFUSED[name]
    refused = make()
    with pytest.raises(ValueError, match=message) as error:
        gate_resnet(refused)
    assert "\n" not in str(error.value)
    mixed = nn.Sequential(BasicBlock(4, 4), refused, BasicBlock(4, 4))
    classes, keys = [type(module) for module in mixed.modules()], list(mixed.state_dict())
    with pytest.raises(ValueError, match="block"):
        gate_resnet(mixed)
    assert [type(module) for module in mixed.modules()] == classes and list(mixed.state_dict()) == keys


def test_a_gated_block_of_the_layers_of_a_subclass_can_be_made_by_hand() -> None:
    block, x = Subclass(4, 4).eval(), torch.randn(3, 4, 5, 5)
    expected = block(x)
    gated = GatedBasicBlock(block)
    with gates_forced(gated, 1.0):
        assert torch.equal(gated(x), expected)
    assert type(block) is Subclass and not hasattr(block, "gate1")
    with pytest.raises(ValueError, match=r"must be a BasicBlock of torchvision, received a .*Bottleneck"):
        GatedBasicBlock(Bottleneck(4, 1))


@pytest.mark.parametrize("settings", [{"hidden": 0}, {"hidden": 1.5}, {"bias": float("nan")}])
def test_settings_of_no_gate_are_refused_and_nothing_is_gated(settings: dict[str, Any]) -> None:
    network = SmallImageResNet(8, width=4)
    (name,) = settings
    with pytest.raises(ValueError, match=rf"^{name} must be [^\n]*$"):
        gate_resnet(network, **settings)
    assert not any(gated_blocks(network))


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_a_network_that_is_wrapped_for_many_processes_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(SmallImageResNet(8, width=4))
        with pytest.raises(ValueError, match="before it is wrapped, received a DistributedDataParallel"):
            gate_resnet(parallel)
    finally:
        dist.destroy_process_group()
    assert not any(gated_blocks(parallel))


@pytest.mark.parametrize("depth", [0, 1])
def test_a_block_that_is_used_twice_is_gated_once(depth: int) -> None:
    """Or its two uses would share the convolutions but not the gates, or one would have none."""
    block = BasicBlock(4, 4)
    uses = [block, block] if depth == 0 else [nn.Sequential(block), nn.Sequential(block)]
    network = gate_resnet(nn.Sequential(*uses))
    first, second = network if depth == 0 else (network[0][0], network[1][0])
    assert isinstance(first, GatedBasicBlock) and second is first


def test_a_gated_model_is_refused_in_one_line_and_stays_as_it_is() -> None:
    network = tiny()
    names = list(network.state_dict())
    for model in (network, nn.ModuleList([BasicBlock(4, 4), network])):
        with pytest.raises(ValueError, match=f"received a gated {type(model).__name__}$") as error:
            gate_resnet(model)
        assert "\n" not in str(error.value)
    assert list(network.state_dict()) == names


# How gated networks learn


@pytest.mark.parametrize("network", [tiny, bottlenecks])
def test_every_parameter_gets_a_gradient(network: Callable[[], nn.Module]) -> None:
    model = network()
    found = gradients(model, model)
    for name, _ in model.named_parameters():
        assert bool(found[name].isfinite().all()) and bool((found[name] != 0).any()), name


def test_the_task_alone_reaches_the_gates() -> None:
    model, (x, target) = tiny(), batch()
    nn.functional.cross_entropy(model(x), target).backward()
    for gate in named_gates(model).values():
        assert all(p.grad is not None and bool((p.grad != 0).any()) for p in gate.parameters())


def whole(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(model, x, use_reentrant=False)


def layer_by_layer(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        for layer in model.children():
            gated = any(gated_blocks(layer))
            x = checkpoint(layer, x, use_reentrant=False) if gated else layer(x)
        return x

    return forward


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    torch.compiler.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize(
    ("run", "network"),
    [
        (whole, tiny),
        (whole, bottlenecks),
        (layer_by_layer, tiny),
        (layer_by_layer, bottlenecks),
        (compiled, bottlenecks),
    ],
)
def test_checkpointing_and_compiling_change_no_gradient(
    run: Callable[[nn.Module], Callable[[Tensor], Tensor]], network: Callable[[], nn.Module]
) -> None:
    model = network()
    other = copy.deepcopy(model)
    expected, found = gradients(model, model), gradients(other, run(other))
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=f"{name}: {{}}".format)


def test_probabilities_of_a_compiled_network_can_be_read_with_their_gradient() -> None:
    torch.compiler.reset()
    model, (x, _) = tiny(), batch()
    run = torch.compile(model, backend="eager", fullgraph=True)
    for step in range(2):
        x = x + step
        model.zero_grad()
        run(x)
        found = gate_probabilities(model)
        assert all(torch.equal(a, b) for a, b in zip(gate_probabilities(run), found, strict=True))
        assert all(p.requires_grad for p in found)
        bs.l0_penalty(found).backward()
        grads = [p.grad.clone() for gate in named_gates(model).values() for p in gate.parameters()]
        assert all(bool((grad != 0).any()) for grad in grads)


def test_a_training_step_is_compiled_with_its_losses() -> None:
    torch.compiler.reset()
    model = gate_resnet(
        nn.Sequential(BasicBlock(3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    )
    other = copy.deepcopy(model)

    def step(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return objective(network(x), network, target)

    run = torch.compile(step, backend="aot_eager", fullgraph=True)
    x, target = batch()
    for function, network in ((step, model), (run, other)):
        torch.manual_seed(3)
        function(network, x, target).backward()
    for expected, found in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_a_network_can_be_copied_after_a_forward_pass() -> None:
    model, (x, _) = tiny(), batch()
    model(x)
    other = copy.deepcopy(model)
    assert torch.equal(other.eval()(x), model.eval()(x))
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert not torch.equal(other(x), model(x))


def test_bfloat16_autocast_trains_every_parameter() -> None:
    model, (x, target) = tiny(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(model(x), model, target)
    loss.backward()
    assert all(bool(((d == 0) | (d == 1)).all()) for d in gate_decisions(model))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name


def two_ranks_get_the_gradients_of_one_process(rank: int, world: int) -> None:
    """With the statistics of normalization held fixed, since those are of a rank's own batch."""
    alone = random_statistics(tiny(dtype=torch.float64))
    for module in alone.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eval()
    for gate in named_gates(alone).values():
        gate.noise.fill_(0.0)
    together = copy.deepcopy(alone)
    parallel = DistributedDataParallel(together)
    x, target = batch(10 * world, torch.float64)
    objective(alone(x), alone, target).backward()
    own, label = x.split(10)[rank], target.split(10)[rank]
    objective(parallel(own), parallel, label, group="world").backward()
    for (name, one), several in zip(alone.named_parameters(), together.parameters(), strict=True):
        assert one.grad is not None and bool((one.grad != 0).any()), name
        torch.testing.assert_close(several.grad, one.grad, rtol=1e-9, atol=1e-12, msg=f"{name}: {{}}".format)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_two_ranks_get_the_gradients_of_one_process() -> None:
    with Ranks(2) as processes:
        processes.run(two_ranks_get_the_gradients_of_one_process)


def test_a_block_alone_is_gated() -> None:
    block = BasicBlock(4, 4)
    assert gate_resnet(block) is block and type(block) is GatedBasicBlock
    assert block(torch.randn(3, 4, 5, 5)).shape == (3, 4, 5, 5)
    assert block.gate1.decisions.shape == (3, 4)


# Under torch's tracers


@pytest.mark.filterwarnings("ignore:.*jit.*:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("network", "training", "ran"),
    [
        *itertools.product([tiny], (True, False), (True, False)),
        *((bottlenecks, ran, not ran) for ran in (True, False)),
        (lambda: gate_resnet(ResNet(BasicBlock, [2, 1, 1, 1], num_classes=5)), False, True),
    ],
)
def test_tracers_follow_a_gated_network(network: Callable[[], nn.Module], training: bool, ran: bool) -> None:
    model, x = network().train(training), torch.randn(4, 3, 32, 32)
    if ran:
        model(x)
    last = [name for name, _ in model.named_children()][-1]
    features = create_feature_extractor(model, [last])
    made = {
        "fx": torch.fx.symbolic_trace(model),
        "torchvision": lambda x: features.train(training)(x)[last],
        "jit": torch.jit.trace(model, x, check_trace=False),
        "export": torch.export.export(model, (x,), strict=False).module(),
    }
    outputs = {}
    for name, forward in {**made, "itself": model.train(training)}.items():
        torch.manual_seed(1)
        outputs[name] = forward(x)
    for name, y in outputs.items():
        torch.testing.assert_close(y, outputs["itself"], msg=f"{name}: {{}}".format)
    for traced in (made["fx"], features):
        assert [*named_gates(traced).values()] == [*named_gates(model).values()]


def test_features_within_a_gated_block_can_be_extracted() -> None:
    model, (x, _) = tiny(training=False), batch()
    extract = create_feature_extractor(model, ["layer1.0.gate1", "layer1.0.conv2", "layer3.0.relu_1"])
    found = extract.eval()(x)
    block = model.layer1[0]
    stem = model.relu(model.bn1(model.conv1(x)))
    gates = block.gate1(stem)
    assert torch.equal(found["layer1.0.gate1"], gates)
    inner = gates * block.bn1(block.conv1(stem)).relu()
    torch.testing.assert_close(found["layer1.0.conv2"], block.conv2(inner))
    assert found["layer3.0.relu_1"].shape == (24, 16, 2, 2)
