"""The ablation from trained weights: what is wanted, who teaches whom, and what counts as finished."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import load_script

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "ablation" / "from_trained.py"


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_script(SCRIPT)


def test_every_network_has_the_same_teacher_and_as_many_epochs_as_its_rivals(experiment: ModuleType) -> None:
    runs = dict(experiment.runs())
    assert len(runs) == 3 * len(experiment.ARMS)
    for name, config in runs.items():
        teacher = experiment.taught_by(name)
        assert (teacher is None) == name.startswith("teacher")
        before = runs[teacher].epochs if teacher and config.network.gated else 0
        assert before + config.epochs == (12 if teacher is None else 24)
        assert teacher is None or runs[teacher].seed == config.seed
        assert config.train_images is None


def test_the_kinds_of_gates_differ_by_one_setting(experiment: ModuleType) -> None:
    runs = dict(experiment.runs())
    for budget in experiment.BUDGETS:
        shaped = runs[f"bas-{budget}-seed0"].model_dump()
        for kind, setting in {"l0": "shaping", "groups": "gates_per_layer"}.items():
            other = runs[f"{kind}-{budget}-seed0"].model_dump()
            assert {name for name in shaped if shaped[name] != other[name]} == {setting}


def test_a_result_counts_wherever_its_teacher_lay(experiment: ModuleType, tmp_path: Path) -> None:
    runs = dict(experiment.runs())
    for name in ("bas-0.25-seed0", "ungated-8-seed0"):
        path = tmp_path / f"{name}.json"
        assert not experiment.finished(path, runs[name])
        settings: dict[str, Any] = runs[name].model_dump(mode="json")
        place = {"start": "/there"} if settings["gated"] else {"teacher": "/there"}
        path.write_text(json.dumps({"config": settings | place | {"teacher_sha256": "0" * 64}}))
        assert experiment.finished(path, runs[name])
        assert not experiment.finished(path, runs[name].model_copy(update={"epochs": 3}))


def test_the_guide_shows_the_kept_results(experiment: ModuleType) -> None:
    runs = dict(experiment.runs())
    paths = {name: experiment.RESULTS / f"{name}.json" for name in runs}
    kept = {n: json.loads(p.read_text()) for n, p in paths.items() if experiment.finished(p, runs[n])}
    assert kept
    assert experiment.summarize(kept) in (ROOT / "docs" / "channel_gating.md").read_text()
