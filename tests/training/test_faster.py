"""From a trained network to a faster one: every step leaves its file, and an interrupted command goes on."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from batchshaping.cli import app
from batchshaping.training import faster
from batchshaping.training.config import RunConfig
from batchshaping.training.faster import Faster, faster_config, make_faster
from batchshaping.training.run import RunError, train

SHORT: dict[str, Any] = {"train_images": 64, "batch_size": 16, "epochs": 1, "logger": "none"}
FAMILIES: dict[str, dict[str, Any]] = {
    "channel gating": {"network": "resnet8", "width": 4},
    "mixed scale": {
        **{"network": "msvit-mini", "patch": 2, "embedding": 8, "depth": 1, "heads": 2},
        "optimizer": "adamw",
    },
}
BUDGET = 0.9
FILES = ["result.json", "budgets.json", "latency.json", "model.onnx", "report.html"]


@pytest.fixture(scope="module", params=FAMILIES)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without gates."""
    run = tmp_path_factory.mktemp("original") / "original"
    train(RunConfig(**SHORT, **FAMILIES[request.param], gated=False), run)
    return run


@pytest.fixture(scope="module")
def made(original: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Faster]:
    output = tmp_path_factory.mktemp("made") / "faster"
    return output, make_faster(original, output, BUDGET)


def original_network(original: Path) -> str:
    return faster_config(original, BUDGET).network.name


def numbers(folder: Path) -> dict[str, Any]:
    """All that does not depend on time."""
    result = json.loads((folder / "result.json").read_text())
    budgets = json.loads((folder / "budgets.json").read_text())
    return {"result": {**result, "seconds": 0}, "budgets": {**budgets, "result": ""}}


def test_every_step_leaves_its_file(original: Path, made: tuple[Path, Faster]) -> None:
    output, outcome = made
    # The computation of tokens of two scales cannot be exported.
    exported = original_network(original) == "resnet8"
    assert (outcome.not_exported is None) == exported
    assert all((output / name).stat().st_size for name in FILES if exported or name != "model.onnx")
    assert outcome.result["config"]["start"] == str(original)
    assert outcome.result["teacher"] is not None and outcome.result["gates"] is not None
    assert outcome.budgets["guarantee"] is not None
    budgets = [point["budget"] for point in outcome.budgets["calibration"]["points"]]
    assert BUDGET in budgets
    page = (output / "report.html").read_text()
    assert "its teacher, and" in page[page.index("<h1>") : page.index("</h1>")]
    assert outcome.times_faster > 0 and -1 <= outcome.accuracy_lost <= 1


def test_another_promise_is_measured_anew(original: Path, made: tuple[Path, Faster], tmp_path: Path) -> None:
    shutil.copytree(made[0], tmp_path / "faster")
    again = make_faster(original, tmp_path / "faster", BUDGET, accuracy_loss=0.5)
    assert again.budgets["guarantee"]["accuracy_loss"] == 0.5
    assert again.budgets["calibration"] == made[1].budgets["calibration"]
    assert again.latency == made[1].latency


def test_a_command_interrupted_at_every_step_goes_on(
    original: Path, made: tuple[Path, Faster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one folder, interrupted at one step after the other: only the step that was left out is done."""
    steps = ["train", "measure_budgets", "measure_run", "export_onnx", "report_html"]
    done: list[str] = []
    for name in steps:
        monkeypatch.setattr(faster, name, _noted(name, getattr(faster, name), done))
    for before, step in itertools.pairwise(steps):
        with monkeypatch.context() as patch:
            patch.setattr(faster, step, _interrupt)
            with pytest.raises(KeyboardInterrupt):
                make_faster(original, tmp_path / "faster", BUDGET)
        assert done == [before]
        done.clear()
    make_faster(original, tmp_path / "faster", BUDGET)
    # What cannot be exported is tried again.
    assert done == (steps[3:] if made[1].not_exported else steps[4:])
    assert numbers(tmp_path / "faster") == numbers(made[0])


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def _noted(name: str, function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def noting(*args: Any, **settings: Any) -> Any:
        calls.append(name)
        return function(*args, **settings)

    return noting


def test_another_run_is_not_gone_on_with(original: Path, made: tuple[Path, Faster], tmp_path: Path) -> None:
    output, _ = made
    with pytest.raises(RunError, match=r"holds another run, with .*budget 0\.9.*; choose another folder"):
        make_faster(original, output, 0.8)
    with pytest.raises(RunError, match=r"holds another run, with seed 0; choose another folder"):
        make_faster(original, output, BUDGET, seed=1)
    with pytest.raises(ValueError, match="expected a network without gates, received one with gates"):
        make_faster(output, tmp_path / "again")
    with pytest.raises(RunError, match="missing: expected the folder of a run"):
        make_faster(tmp_path / "missing", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_is_not_asked_for_is_that_of_the_run(original: Path) -> None:
    config = faster_config(original, 0.5, seed=3)
    assert config.network.gated and config.budget == 0.5 and config.seed == 3
    assert config.train_images == SHORT["train_images"] and config.teacher == "start"
    assert config.start == str(original)


@pytest.mark.parametrize(("budget", "density"), [(0.25, 0.02), (0.4, 0.2), (0.7, 0.6), (1.0, 0.98)])
def test_the_density_of_fine_regions_spends_the_budget(budget: float, density: float) -> None:
    recipe = RunConfig(network="msvit-mini").network.recipe(budget)
    a, b = recipe["hyperprior"]
    assert a / (a + b) == pytest.approx(density)
    assert recipe["gate_bias"] == pytest.approx(math.log(density / (1 - density)), abs=1e-3)


def test_the_command_says_what_came_of_it(original: Path, made: tuple[Path, Faster]) -> None:
    output, outcome = made
    command = ["faster", str(original), "--budget", str(BUDGET), "--output", str(output)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "1 of 5: training the gates" in result.stdout
    assert f"{outcome.times_faster:.2f} times as fast" in result.stdout
    files = "report.html" if outcome.not_exported else "model.onnx and report.html"
    assert f"wrote {output}, with {files}" in result.stdout
    for options, line in [
        (["--set", "seed"], "--set must be NAME=VALUE, received seed"),
        (["--set", "sed=1"], "there is no setting 'sed'"),
        (["--budget", "2"], "budget: input should be less than or equal to 1, received 2"),
    ]:
        refused = CliRunner().invoke(app, [*command, *options])
        assert refused.exit_code == 2 and line in refused.stderr and refused.stderr.count("\n") == 1
