"""An exported program gives what the network gives, and has a branch for each gate."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from gated_resnets import make, with_statistics
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import batchshaping as bs
from batchshaping.channel_gating import branches
from batchshaping.gates.gate import named_gates
from batchshaping.gates.static import StaticGates

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module", autouse=True)
def _operators_are_read_once() -> Iterator[None]:
    """Torch reads the sources of all of its operators at each export, which takes longer than a block."""
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(ImportError, AttributeError):  # not every version has it under this name
            from torch.onnx._internal.exporter._registration import ONNXRegistry as registry

            patch.setattr(registry, "from_torchlib", staticmethod(functools.cache(registry.from_torchlib)))
        yield


def one_block(name: str, gates: object) -> nn.Module:
    """The first of the two blocks, without a head, since each branch takes a second to export."""
    network: Any = make(name, gates)
    return nn.Sequential(*[*network][:4])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: one_block("basic", 2),
    "basic, a gate a channel": lambda: one_block("basic", None),
    "two blocks, each with a gate": lambda: make("basic", 1),
    "bottleneck": lambda: one_block("bottleneck", (2, 2)),
    "ResNeXt": lambda: one_block("ResNeXt", 4),
}
BRANCHES = {"basic": 2 + 1, "two blocks, each with a gate": 2 * (1 + 1), "bottleneck": 4 + 1}
"""One for each gate, and one for each block."""


def decide(network: nn.Module, x: Tensor) -> None:
    """Let gates, which all read what the stem gives, be closed for the first of some images."""
    with torch.no_grad():
        network(x)
        for gate in named_gates(network).values():
            logits = gate.probabilities.logit()
            gate.to_logits[-1].bias -= logits[0] + 0.1 * logits.std(dim=0)


def ifs(graph: Any) -> int:
    """How many If nodes there are, also within others."""
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return sum(node.op_type == "If" for node in graph.node) + sum(map(ifs, inner))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def run_onnx(path: Path, x: Tensor) -> Tensor:
    return torch.from_numpy(session(path).run(None, {"images": x.numpy()})[0])


@functools.lru_cache(maxsize=1)
def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_program_for_one_image_gives_the_same_with_its_own_gates(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]()
    fast = bs.conditional_inference(network)
    with torch.no_grad():
        program = torch.export.export(fast, (torch.randn(1, 3, 32, 32),), strict=False)
        bs.export_onnx(fast, tmp_path / "one.onnx", torch.randn(1, 3, 32, 32))
        for x in torch.randn(6, 3, 32, 32).split(1):
            assert_close(program.module()(x), network(x))
            assert_close(run_onnx(tmp_path / "one.onnx", x), network(x))
            assert_close(fast(x), network(x))  # which stays as it is
    assert [d.shape for d in bs.gate_decisions(fast)] == [d.shape for d in bs.gate_decisions(network)]
    assert ifs(onnx.load(tmp_path / "one.onnx").graph) == BRANCHES.get(name, 0)
    assert ("torch.ops.higher_order.cond" in program.graph_module.code) == (name in BRANCHES)


@pytest.mark.parametrize("above", [-1.0, 1.0])
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_any_gates_give_the_same_by_branches_and_by_all_channels(
    name: str, above: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = NETWORKS[name]()
    x = torch.randn(16, 3, 32, 32) + 3 * torch.randn(16, 3, 1, 1)
    decide(network, x)
    monkeypatch.setattr(branches, "DENSE_ABOVE", above)
    bs.export_onnx(bs.conditional_inference(network), tmp_path / "one.onnx", x[:1])
    patterns = set()
    for image in x.split(1):
        with torch.no_grad():
            assert_close(run_onnx(tmp_path / "one.onnx", image), network(image))
        patterns.add((*torch.cat(bs.gate_decisions(network), dim=1).flatten().tolist(),))
    assert len(patterns) >= 3 and any(not any(pattern) for pattern in patterns)


def test_a_file_for_batches_takes_any_number_of_images(tmp_path: Path) -> None:
    network = make("basic", 2)
    del network[4]  # the second block
    bs.export_onnx(bs.conditional_inference(network), tmp_path / "many.onnx", torch.randn(2, 3, 32, 32))
    for n in (1, 2, 5):
        x = torch.randn(n, 3, 32, 32)
        with torch.no_grad():
            assert_close(run_onnx(tmp_path / "many.onnx", x), network(x))
    assert ifs(onnx.load(tmp_path / "many.onnx").graph) == 0


def test_a_pruned_network_has_branches_for_the_gates_that_are_left(tmp_path: Path) -> None:
    network, x = one_block("basic", 4), torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        for gate in named_gates(network).values():
            gate.to_logits[-1].bias[:2] = torch.tensor([1e3, -1e3])
    static = StaticGates(5, dict.fromkeys(named_gates(network), (True, False, None, None)))
    pruned = static.remove_from(network)
    bs.export_onnx(bs.conditional_inference(pruned), tmp_path / "pruned.onnx", x[:1])
    with torch.no_grad():
        for image in x.split(1):
            assert_close(run_onnx(tmp_path / "pruned.onnx", image), network(image))
    assert ifs(onnx.load(tmp_path / "pruned.onnx").graph) == 2 + 1


def test_each_large_weight_is_in_the_file_once_and_constant_within_its_branch(tmp_path: Path) -> None:
    network = bs.gate_resnet(with_statistics(BasicBlock(256, 256)), gates_per_layer=2).eval()
    file = tmp_path / "one.onnx"
    bs.export_onnx(bs.conditional_inference(network), file, torch.randn(1, 256, 8, 8))
    weights = sum(p.numel() for p in network.parameters())
    assert file.stat().st_size < 4 * weights + 100_000
    outer = {tensor.name for tensor in onnx.load(file).graph.initializer}

    def check(graph: Any) -> None:
        for node in graph.node:
            for inner in (a.g for a in node.attribute if a.HasField("g")):
                assert not any({*n.input[1:]} & outer for n in inner.node if n.op_type == "Conv")
                check(inner)

    check(onnx.load(file).graph)


def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path: Path) -> None:
    fast = bs.conditional_inference(make("basic", 2))
    with pytest.raises(ValueError, match=r"^example must hold at least one image, received shape \(0, 3, 32"):
        bs.export_onnx(fast, tmp_path / "none.onnx", torch.randn(0, 3, 32, 32))
    vit = bs.MSViT(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2)).eval()
    with pytest.raises(ValueError, match=r"^model must be one that torch.export can follow, [^\n]*$"):
        bs.export_onnx(bs.conditional_inference(vit), tmp_path / "vit.onnx", torch.randn(1, 3, 224, 224))
    assert [*tmp_path.iterdir()] == []
