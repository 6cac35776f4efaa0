"""Gated ResNets of timm: the given network with open gates, and the cost of the network of open channels."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import BlurPool2d
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import batchshaping as bs
from batchshaping.channel_gating.blocks import GatedTimmBasicBlock, GatedTimmBottleneck
from batchshaping.gates.cost import MultiplyAdds
from batchshaping.gates.forced import gates_forced
from batchshaping.gates.gate import gate_decisions, named_gates

NETWORKS: dict[str, dict[str, Any]] = {
    "basic": {"block": BasicBlock},
    "bottleneck": {"block": Bottleneck},
    "deep stem, average pooling in shortcuts": {
        "block": Bottleneck,
        "stem_type": "deep",
        "stem_width": 4,
        "avg_down": True,
    },
    "drop paths": {"block": Bottleneck, "drop_path_rate": 0.5},
    "drop blocks": {"block": BasicBlock, "drop_block_rate": 0.3},
    "blurred": {"block": Bottleneck, "aa_layer": BlurPool2d},
    "blurred, basic": {"block": BasicBlock, "aa_layer": BlurPool2d},
    "averaged": {"block": BasicBlock, "aa_layer": nn.AvgPool2d},
    "squeeze and excitation": {"block": Bottleneck, "block_args": {"attn_layer": "se"}},
    "efficient channel attention": {"block": BasicBlock, "block_args": {"attn_layer": "eca"}},
    "another activation": {"block": BasicBlock, "act_layer": nn.SiLU},
    "groups": {"block": Bottleneck, "cardinality": 2, "base_width": 32},
    "dilated": {"block": Bottleneck, "output_stride": 8},
    "reduced first": {"block": BasicBlock, "block_reduce_first": 2},
    "everything": {
        "block": Bottleneck,
        "stem_type": "deep",
        "stem_width": 4,
        "avg_down": True,
        "aa_layer": BlurPool2d,
        "drop_path_rate": 0.3,
        "drop_block_rate": 0.2,
        "block_args": {"attn_layer": "se"},
    },
}


def make(name: str) -> ResNet:
    """A small network of timm whose every layer has a part in the output."""
    torch.manual_seed(2)
    settings = {**NETWORKS[name]}
    channels = (8, 16, 16, 16) if settings["block"] is BasicBlock else (4, 8, 8, 8)
    network = ResNet(layers=(2, 1, 1, 1), channels=channels, num_classes=5, **settings)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_open_network_is_the_given_one_to_the_bit(name: str, training: bool) -> None:
    network = make(name).train(training)
    gated = bs.gate_resnet(copy.deepcopy(network))
    state = network.state_dict()
    assert all(torch.equal(gated.state_dict()[key], value) for key, value in state.items())
    x = torch.randn(4, 3, 32, 32)
    outputs = []
    with gates_forced(gated, 1.0):
        for model in (network, gated):
            torch.manual_seed(1)
            outputs.append(model(x))
    assert torch.equal(*outputs)
    with gates_forced(gated, 0.0):
        torch.manual_seed(1)
        assert not torch.equal(gated(x), outputs[0])
    blocks = [module for module in network.modules() if isinstance(module, BasicBlock | Bottleneck)]
    assert len(named_gates(gated)) == sum(1 if isinstance(block, BasicBlock) else 2 for block in blocks)
    for key, value in network.state_dict().items():
        if training and "running" not in key and "tracked" not in key:
            assert torch.equal(gated.state_dict()[key], value)


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "resnet26d", "resnetblur50", "seresnet50", "resnetrs50"]
)
def test_the_networks_of_timm_can_be_gated(name: str) -> None:
    with torch.device("meta"):
        network, x = timm.create_model(name, pretrained=False), torch.randn(2, 3, 64, 64)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network.eval()(x[:1])
    gated = bs.gate_resnet(network)
    assert gated is network and len(named_gates(gated)) > 0
    assert MultiplyAdds.measure(gated, x).dense == counter.get_total_flops() / 2


# What gates do


@pytest.mark.parametrize("aa_layer", [None, "blur"])
def test_a_basic_block_computes_its_formula(aa_layer: str | None) -> None:
    """Channels are switched after the activation, by gates that read the input of the block."""
    block = make("blurred, basic" if aa_layer else "basic").layer2[0].eval()
    gated = GatedTimmBasicBlock(block).eval()
    x = 2 * torch.randn(6, 8, 8, 8)
    y = gated(x)
    first = torch.sigmoid(gated.gate1.to_logits(x.mean(dim=(2, 3)))) > 0.5
    inner = first[..., None, None] * block.bn1(block.conv1(x)).relu()
    outer = block.bn2(block.conv2(block.aa(inner)))
    assert torch.equal(y, (outer + block.downsample(x)).relu())
    assert 0 < gated.gate1.decisions.mean() < 1


def test_a_bottleneck_computes_its_formula() -> None:
    block = make("squeeze and excitation").layer2[0].eval()
    gated = GatedTimmBottleneck(block).eval()
    x = 2 * torch.randn(6, 16, 8, 8)
    y = gated(x)
    first, second = (
        (torch.sigmoid(gate.to_logits(x.mean(dim=(2, 3)))) > 0.5)[..., None, None]
        for gate in (gated.gate1, gated.gate2)
    )
    reduced = first * block.bn1(block.conv1(x)).relu()
    inner = second * block.bn2(block.conv2(reduced)).relu()
    outer = block.se(block.bn3(block.conv3(inner)))
    assert torch.equal(y, (outer + block.downsample(x)).relu())


@pytest.mark.parametrize("name", ["drop paths", "everything", "blurred, basic"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    gated = bs.gate_resnet(make(name))
    for module in gated.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    torch.manual_seed(3)
    gated(torch.randn(16, 3, 64, 64)).square().mean().backward()
    for key, parameter in gated.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), key
        if not key.endswith("num_batches_tracked"):
            assert bool((parameter.grad != 0).any()), key


def test_timms_own_ways_of_running_a_network_work() -> None:
    network = make("bottleneck")
    gated = bs.gate_resnet(network).eval()
    x = torch.randn(4, 3, 64, 64)
    expected = gated(x)
    decisions = gate_decisions(gated)
    assert torch.equal(gated.forward_head(gated.forward_features(x)), expected)
    gated.set_grad_checkpointing()
    gated.train()
    gated(x).sum().backward()
    gated.eval().set_grad_checkpointing(False)
    assert torch.equal(copy.deepcopy(gated)(x), gated(x))
    assert [d.shape for d in decisions] == [d.shape for d in gate_decisions(gated)]
    assert gated.reset_classifier(3) is None and gated(x).shape == (4, 3)
    assert torch.equal(torch.fx.symbolic_trace(gated)(x), gated(x))
    gated.init_weights()
    assert bool((gated.layer1[0].bn3.weight == 0).all()), "the block starts as its shortcut"


# What is spent


def slim_convolution(layer: nn.Conv2d, inputs: Tensor | None, outputs: Tensor | None) -> nn.Conv2d:
    weight = layer.weight.detach()
    weight = weight if outputs is None else weight[outputs]
    weight = weight if inputs is None else weight[:, inputs]
    settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    slim = nn.Conv2d(weight.shape[1], weight.shape[0], *settings, bias=False)
    slim.weight.data = weight
    return slim.eval()


def slim_normalization(layer: nn.BatchNorm2d, channels: Tensor) -> nn.BatchNorm2d:
    slim = nn.BatchNorm2d(len(channels), layer.eps)
    slim.load_state_dict(
        {key: value[channels] if value.ndim else value for key, value in layer.state_dict().items()}
    )
    return slim.eval()


def slim_network(network: nn.Module, decisions: list[Tensor]) -> nn.Module:
    """A network with only the channels that are open for one example."""
    slim = copy.deepcopy(network)
    kept = iter([layer.nonzero().flatten() for layer in decisions])
    for block in slim.modules():
        if not isinstance(block, BasicBlock | Bottleneck):
            continue
        last = next(kept)
        block.conv1 = slim_convolution(block.conv1, None, last)
        block.bn1 = slim_normalization(block.bn1, last)
        if isinstance(block, BasicBlock):
            block.conv2 = slim_convolution(block.conv2, last, None)
        else:
            first, last = last, next(kept)
            block.conv2 = slim_convolution(block.conv2, first, last)
            block.bn2 = slim_normalization(block.bn2, last)
            block.conv3 = slim_convolution(block.conv3, last, None)
        if hasattr(block.aa, "filt"):
            block.aa.channels, block.aa.filt = len(last), block.aa.filt[last]
    assert next(kept, None) is None
    return slim.eval()


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "groups"])
def test_an_example_costs_what_the_network_of_its_open_channels_does(name: str) -> None:
    network = make(name).eval()
    gated = bs.gate_resnet(copy.deepcopy(network), hidden=3).eval()
    x = torch.randn(2, 3, 32, 32)
    with gates_forced(gated, 0.6, seed=1):
        found = bs.count_macs(gated, x)
    decisions = gate_decisions(gated)
    with gates_forced(gated, 0.6, seed=1), torch.no_grad():
        outputs = gated(x)
    of_gates = MultiplyAdds.measure(gated, x).gates
    for n in range(2):
        slim = slim_network(network, [layer[n] for layer in decisions])
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            output = slim(x[n : n + 1])
        assert found[n].item() == counter.get_total_flops() / 2 + of_gates
        torch.testing.assert_close(output[0], outputs[n], rtol=1e-4, atol=1e-4)


# What is refused


class Subclass(BasicBlock):
    """Which has timm's forward pass, as far as one can see."""


class MixingPool(nn.Conv2d):
    def __init__(self, channels: int, stride: int, **_: object) -> None:
        super().__init__(channels, channels, 1, stride)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "group normalization": (
        lambda: timm.create_model("resnet50_gn"),
        r"^the block's bn1 must treat each channel alone, .* received a timm\.layers\.norm\.GroupNorm$",
    ),
    "another pool": (
        lambda: ResNet(BasicBlock, (1, 1, 1, 1), aa_layer=MixingPool),
        r"^the block's aa must treat each channel alone, .* received a test_timm_blocks\.MixingPool$",
    ),
    "subclass": (
        lambda: nn.Sequential(Subclass(8, 8)),
        r"^resnet must hold blocks with timm's own forward pass, received '0', a test_timm_blocks\.Subclass",
    ),
    "other blocks": (
        lambda: timm.create_model("resnest14d"),
        r"of torchvision or timm .* received a ResNet without any, but with a timm\..*ResNestBottleneck$",
    ),
    "no blocks": (
        lambda: timm.create_model("vit_tiny_patch16_224"),
        r"received a VisionTransformer without any$",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_gated_is_refused_in_one_line_and_stays_as_it_is(name: str) -> None:
    make_refused, message = REFUSED[name]
    with torch.device("meta"):
        network = make_refused()
    keys = list(network.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        bs.gate_resnet(network)
    assert "\n" not in str(error.value) and list(network.state_dict()) == keys


def test_a_gated_block_is_made_of_the_blocks_of_its_library() -> None:
    assert GatedTimmBasicBlock(Subclass(8, 8))(torch.randn(4, 8, 5, 5)).shape == (4, 8, 5, 5)
    with pytest.raises(
        ValueError, match=r"^block must be a Bottleneck of timm, received a timm\..*BasicBlock$"
    ):
        GatedTimmBottleneck(BasicBlock(8, 8))


def test_timm_is_loaded_by_those_who_use_it() -> None:
    code = (
        "import sys, torchvision, batchshaping as bs\n"
        "bs.gate_resnet(torchvision.models.resnet18())\n"
        "assert 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
