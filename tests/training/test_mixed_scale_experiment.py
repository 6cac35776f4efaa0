"""The experiment on mixed-scale tokens: what is wanted, what is finished, and what the guide shows of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import load_script

from batchshaping.training.config import RunConfig
from batchshaping.training.run import resume

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "mixed_scale"


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_script(FOLDER / "mixed_scale.py")


def test_every_arm_has_every_seed_and_is_judged_on_the_test_images(experiment: ModuleType) -> None:
    runs = list(experiment.runs())
    assert len(dict(runs)) == len(runs) == len(experiment.arms()) * 3
    assert {config.seed for _, config in runs} == {0, 1, 2}
    assert all(config.evaluate_on == "test" and config.train_images is None for _, config in runs)
    # Settings are chosen on other images, with one seed.
    chosen = dict(experiment.runs((0,), "validation"))
    assert {config.evaluate_on for config in chosen.values()} == {"validation"}
    assert len(chosen) == len(experiment.arms())


def test_arms_differ_only_in_how_scales_are_chosen(experiment: ModuleType) -> None:
    wanted = dict(experiment.runs())
    of_the_choice = {
        *("gate", "density", "gate_bias", "prior", "hyperprior", "hyperprior_weight"),
        *("shaping", "shaping_end", "penalized", "penalty", "penalty_begin", "penalty_end", "budget"),
    }
    targets = [*(("", target) for target in experiment.DENSITIES), ("_forms", experiment.ON_FORMS)]
    for data, target in targets:
        arms = [f"{kind}{data}-{target}-seed1" for kind in ("chance", "entropy", "tokens", "bas", "gbas")]
        first, *others = [
            {n: v for n, v in wanted[arm].model_dump().items() if n not in of_the_choice} for arm in arms
        ]
        assert all(other == first for other in others)
        assert [experiment.starts_from(arm) for arm in arms] == [f"fine{data}-seed1"] * 5
    assert experiment.starts_from("gbas_centred-0.2-seed2") == "fine_centred-seed2"
    assert experiment.starts_from("fine-seed0") is experiment.starts_from("coarse_forms-seed0") is None


def test_a_run_is_kept_goes_on_and_counts_for_its_own_configuration_only(
    experiment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "told", lambda result: f"{result['accuracy']:.2f}")
    small: dict[str, Any] = {
        **{"network": "msvit-mini", "patch": 2, "embedding": 8, "depth": 1, "heads": 2, "epochs": 2},
        **{"train_images": 64, "batch_size": 32, "optimizer": "adamw", "logger": "none", "shaping": 0.0},
    }
    results = tmp_path / "results"
    results.mkdir()
    experiment.run("fine-seed1", RunConfig(**small, gated=False), tmp_path, results)
    config = RunConfig(**small, gate="chance", density=0.5, evaluate_every=1)
    path = results / "chance-0.5-seed1.json"
    assert not experiment.finished(path, config)
    experiment.run("chance-0.5-seed1", config, tmp_path, results)
    kept = json.loads(path.read_text())
    assert kept["config"]["start"] == "fine-seed1" and kept["most"] == kept["regions"]["masks"]["most"] == []
    assert experiment.finished(path, config)
    assert not experiment.finished(path, config.model_copy(update={"density": 0.4}))
    # Interrupted after the first epoch, or when nothing was left to do but to keep the result.
    folder = tmp_path / "chance-0.5-seed1"
    whole = path.read_text()
    path.unlink()
    (folder / "result.json").unlink()
    experiment.run("chance-0.5-seed1", config, tmp_path, results)
    again = json.loads(path.read_text())
    assert {**again, "seconds": 0} == {**json.loads(whole), "seconds": 0}
    assert resume(folder)["accuracy"] == pytest.approx(again["accuracy"], rel=1e-4)


def test_kept_results_are_of_the_wanted_runs_and_name_no_folder(experiment: ModuleType) -> None:
    wanted = dict(experiment.runs())
    for path in sorted((FOLDER / "results").glob("*.json")):
        assert experiment.finished(path, wanted[path.stem]), path.stem
        assert json.loads(path.read_text())["config"]["start"] == experiment.starts_from(path.stem)
