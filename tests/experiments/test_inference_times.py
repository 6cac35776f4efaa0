"""Comparisons of ways to compute: what is timed, with which gates, and what it is said to cost."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchshaping as bs
from batchshaping.experiments.inference import HEADS, Comparison, as_markdown, compare, rows
from batchshaping.gates.cost import MultiplyAdds
from batchshaping.training.latency import machine
from batchshaping.training.networks import network_settings
from batchshaping.training.networks.gated_resnet import GatedResNet

QUICK: dict[str, Any] = {"turns": 3, "compiled": False}


def small(**settings: Any) -> Any:
    return network_settings(network="resnet8", gates_per_layer=2, **settings)


def test_the_multiply_adds_are_those_of_the_open_gates() -> None:
    network = small()
    comparison = compare(network, 8, 2, shares=(1, 0), **QUICK)
    cost = MultiplyAdds.measure(network.build(1000, (3, 8, 8)), torch.randn(1, 3, 8, 8))
    spent = {(way.name, way.share): way.multiply_adds for way in comparison.ways}
    assert spent == {
        ("eager", None): cost.dense,
        ("packed", None): cost.dense,
        ("conditional", 1): cost.dense + cost.gates,
        ("conditional", 0): cost.fixed,
    }


def test_every_turn_has_a_new_pattern_of_gates() -> None:
    patterns: list[tuple[float, ...]] = []

    class Watched(GatedResNet):
        def facts(self, copy: nn.Module, images: Tensor) -> dict[str, float]:
            patterns.append(tuple(torch.cat(bs.gate_decisions(copy), dim=1).flatten().tolist()))
            return {}

    compare(Watched(network="resnet20"), 8, 1, shares=(0.5,), turns=10, compiled=False)
    assert len(patterns) == len({*patterns}) >= 10


def test_the_same_seed_gives_the_same_patterns() -> None:
    network = network_settings(network="resnet8")  # with many gates
    same, again, other = (compare(network, 8, 1, shares=(0.5,), seed=seed, **QUICK) for seed in (1, 1, 2))
    assert same.ways[-1].multiply_adds == again.ways[-1].multiply_adds
    assert same.ways[-1].multiply_adds != other.ways[-1].multiply_adds


def test_what_is_derived_follows_from_the_times() -> None:
    comparison = compare(small(), 8, 1, **QUICK)
    fastest = min(way.median for way in comparison.ways if way.is_dense)
    for way, told in zip(comparison.ways, comparison.as_json()["ways"], strict=True):
        assert told["faster"] == fastest / way.median
        assert told["share_of_ideal"] == pytest.approx(told["faster"] / told["ideal"])
        assert 0 < way.median <= way.p95
    told = json.loads(json.dumps(comparison.as_json()))
    assert told["fastest"] == comparison.fastest.name
    assert json.loads(json.dumps(Comparison.of_json(told).as_json())) == told


def test_a_vision_transformer_has_its_tokens_and_its_packings() -> None:
    comparison = compare(network_settings(network="msvit-mini"), 64, 2, shares=(1, 0, 0.5), **QUICK)
    tokens = {way.share: way.facts for way in comparison.ways if way.name == "conditional"}
    assert tokens[1]["tokens"] == tokens[1]["tokens of the ViT"] == 65
    assert tokens[0]["tokens"] == tokens[0]["padded tokens"] == 17
    assert 17 < tokens[0.5]["tokens"] <= tokens[0.5]["padded tokens"] < 65
    assert [way.name for way in comparison.ways if way.share == 0] == ["conditional", "buckets", "padded"]
    timed = {way.name for way in comparison.ways if way.until_gated is not None}
    assert timed == {"eager", "conditional", "buckets", "padded"}


def test_a_compiler_that_fails_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: object, **__: object) -> nn.Module:
        class Failing(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                raise RuntimeError("no\ncompiler")

        return Failing()

    monkeypatch.setattr(torch, "compile", compiled)
    comparison = compare(small(), 8, 1, turns=2)
    assert comparison.left_out == {"compiled": "no compiler"}
    assert "compiled" not in {way.name for way in comparison.ways}


def test_tables_have_a_row_for_each_way() -> None:
    comparison = compare(small(), 8, 1, **QUICK)
    text = as_markdown([comparison], machine())
    # The summary has one.
    assert text.count("\n|") == 3 + 2 + len(comparison.ways)
    assert {len(row) for row in rows(comparison)} == {len(HEADS)}
    assert "**resnet8, gates per layer 2: one image of 8 x 8 pixels**" in text


@pytest.mark.parametrize("planned", [False, True])
def test_a_copy_is_planned_on_the_images_if_asked_to(planned: bool) -> None:
    examples: list[Tensor | None] = []

    class Watched(GatedResNet):
        def inference_copies(self, network: nn.Module, example: Tensor | None = None) -> dict[str, nn.Module]:
            examples.append(example)
            return super().inference_copies(network)

    compare(Watched(), 8, 2, shares=(1,), planned=planned, **QUICK)
    (example,) = examples
    assert (example is not None) is planned
    assert example is None or example.shape == (2, 3, 8, 8)
