"""The ablation from trained weights: what is wanted, who teaches whom, and what counts as finished."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import load_script

from batchshaping import gate_resnet
from batchshaping.channel_gating.resnets import SmallImageResNet

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "ablation" / "from_trained.py"


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_script(SCRIPT)


def test_every_network_has_the_same_teacher_and_as_many_epochs_as_its_rivals(experiment: ModuleType) -> None:
    for series in experiment.SERIES.values():
        runs = dict(series.runs())
        assert len(runs) == len(series.seeds) * len(series.arms())
        for name, config in runs.items():
            teacher = experiment.taught_by(name)
            assert (teacher is None) == name.startswith("teacher")
            starts = teacher is not None and config.network.gated and not name.startswith("fresh")
            before = runs[teacher].epochs if starts else 0
            assert before + config.epochs == (1 if teacher is None else 2) * series.epochs
            assert teacher is None or runs[teacher].seed == config.seed
            assert config.train_images is None


@pytest.mark.parametrize(
    ("name", "first", "others"),
    [
        ("fashion-mnist", "bas", {"l0": "shaping", "groups": "gates_per_layer", "fresh": "epochs"}),
        ("clothes-and-characters", "fresh", {"fresh_l0": "shaping"}),
    ],
)
def test_the_kinds_of_gates_differ_by_one_setting(
    experiment: ModuleType, name: str, first: str, others: dict[str, str]
) -> None:
    series = experiment.SERIES[name]
    runs = dict(series.runs())
    for budget in series.budgets:
        shaped = runs[f"{first}-{budget}-seed0"].model_dump()
        for kind, setting in others.items():
            other = runs[f"{kind}-{budget}-seed0"].model_dump()
            assert {name for name in shaped if shaped[name] != other[name]} == {setting}


def test_the_rivals_are_thinner_and_wider_than_every_budget(experiment: ModuleType) -> None:
    series = experiment.SERIES["fashion-mnist"]
    least, most = min(series.widths) / series.width, max(series.widths) / series.width
    assert least**2 < min(series.budgets)
    assert max(series.budgets) < most**2


def test_a_result_counts_wherever_its_teacher_and_its_data_lay(
    experiment: ModuleType, tmp_path: Path
) -> None:
    runs = dict(experiment.SERIES["cifar10-resnet8"].runs())
    for name in ("bas-0.25-seed0", "ungated-8-seed0"):
        path = tmp_path / f"{name}.json"
        assert not experiment.finished(path, runs[name])
        settings: dict[str, Any] = runs[name].model_dump(mode="json")
        place = {"start": "/there"} if settings["gated"] else {"teacher": "/there"}
        place |= {"teacher_sha256": "0" * 64, "data_folder": "/data"}
        path.write_text(json.dumps({"config": settings | place}))
        assert experiment.finished(path, runs[name])
        assert not experiment.finished(path, runs[name].model_copy(update={"epochs": 3}))


def test_every_way_to_compute_a_network_gives_the_same(experiment: ModuleType) -> None:
    network = SmallImageResNet(8, in_channels=1, width=4, stem_stride=2).eval()
    images = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        expected = network(images)
        for way in experiment._ways(network, images).values():
            torch.testing.assert_close(way(images), expected, rtol=1e-4, atol=1e-5)
        gated = gate_resnet(network).eval()
        (way,) = experiment._ways(gated, images).values()
        torch.testing.assert_close(way(images), gated(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("series", ["fashion-mnist", "cifar10-resnet8", "clothes-and-characters"])
def test_the_guide_shows_the_kept_results(experiment: ModuleType, series: str) -> None:
    kept = experiment.results_of(series)
    assert kept
    assert experiment.summarize(series, kept) in (ROOT / "docs" / "channel_gating.md").read_text()


def test_the_figures_of_a_kind_are_those_of_its_images(experiment: ModuleType) -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(13, (500,), generator=random)
    right, spent = torch.rand(500, generator=random) < 0.8, torch.rand(500, generator=random)
    decided = torch.rand(500, 5, generator=random) < 0.3
    by_class = [
        {
            "examples": int((labels == k).sum()),
            "accuracy": right[labels == k].double().mean().item(),
            "multiply_adds": spent[labels == k].double().mean().item(),
            "open": [part.tolist() for part in decided[labels == k].double().mean(dim=0).split([2, 3])],
        }
        for k in range(13)
    ]
    found = experiment.by_kind(by_class)
    for kind, of_kind in {"clothes": labels < 10, "characters": labels >= 10}.items():
        assert found[kind]["accuracy"] == pytest.approx(right[of_kind].double().mean().item())
        assert found[kind]["multiply_adds"] == pytest.approx(spent[of_kind].double().mean().item())
        expected = decided[of_kind].double().mean(dim=0).tolist()
        assert [len(layer) for layer in found[kind]["open"]] == [2, 3]
        assert [share for layer in found[kind]["open"] for share in layer] == pytest.approx(expected)


def test_the_guide_shows_what_came_of_width_depth_and_classes(experiment: ModuleType) -> None:
    found = experiment.curve()
    assert {(10, 16, 8), (100, 16, 8), (1000, 16, 8), (1000, 32, 8)} <= {*found}
    text = experiment.summarize_curve(found)
    assert text in (ROOT / "docs" / "channel_gating.md").read_text()
    arms = found[10, 16, 8]
    # By hand: cheaper than half as wide, so on the line from there to three eighths.
    (gated,), (thin,), (half,) = arms["bas-0.25"], arms["ungated-6"], arms["ungated-8"]
    spent, low, high = (math.log(r["multiply_adds"]) for r in (gated, thin, half))
    expected = thin["accuracy"] + (spent - low) / (high - low) * (half["accuracy"] - thin["accuracy"])
    assert f"{100 * (gated['accuracy'] - expected):+.1f}" in text.splitlines()[2].split(" | ")[6]
