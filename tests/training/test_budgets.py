"""The trained network of a run at other budgets: which images decide, and a file of its result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import refused, run

import batchshaping as bs
from batchshaping.gates.calibration import Calibration
from batchshaping.gates.cost import MultiplyAdds
from batchshaping.gates.guarantee import Guarantee
from batchshaping.training import budgets
from batchshaping.training.budgets import BUDGETS, measure_budgets, read_budgets
from batchshaping.training.config import RunConfig
from batchshaping.training.data.dataset import fewer
from batchshaping.training.run import RunError, load_run, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    train(RunConfig(epochs=2, width=4, logger="none", accelerator="cpu"), output)
    return output


def test_a_run_has_other_budgets_on_its_test_images_found_on_its_training_images(finished: Path) -> None:
    assert read_budgets(finished) is None
    measured = measure_budgets(finished, [0.4, 0.7])
    assert measured == read_budgets(finished) == read_budgets(finished / "result.json")
    calibration = Calibration.from_dict(measured["calibration"])
    network, data = load_run(finished)
    assert measured["calibrated_on"] == "training images" and calibration.examples == len(data.train)
    images, labels = data.test.__getitems__(range(len(data.test)))
    x = data.normalize(images)
    dense = MultiplyAdds.measure(network, x[:1]).dense
    for budget, tested in zip([0.4, 0.7], measured["test"]["points"], strict=True):
        assert budget - 0.01 < calibration[budget].multiply_adds <= budget
        with torch.no_grad(), bs.gates_shifted(network, calibration[budget].shift):
            accuracy = (network(x).argmax(dim=1) == labels).double().mean().item()
            spent = bs.count_macs(network, x).double().mean().item() / dense
        assert tested == {
            "examples": len(labels),
            "multiply_adds": pytest.approx(spent),
            "accuracy": pytest.approx(accuracy),
        }
    assert measured["guarantee"] is None and measured["test"]["all_open"]["multiply_adds"] > 1


def test_a_promise_is_made_and_checked_on_images_apart(finished: Path) -> None:
    measured = measure_budgets(finished, accuracy_loss=0.2, confidence=0.8)
    promise = Guarantee.from_dict(measured["guarantee"])
    assert promise.examples == 225 and measured["promised_on"]["images"] == "every second of the test images"
    test = measured["promised_on"]["test"]
    assert test["images"] == "the other test images" and test["at_shift"]["examples"] == 225
    assert measured["calibration"] is None and measured["test"]["points"] == []


def test_where_there_are_validation_images_they_decide(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, data = load_run(finished)
    kept_apart = replace(data, validation=fewer(data, 200).train)
    monkeypatch.setattr(budgets, "load_run", lambda output: (network, kept_apart))
    measured = measure_budgets(finished, [0.8], accuracy_loss=0.3)
    assert measured["calibrated_on"] == measured["promised_on"]["images"] == "validation images"
    assert measured["calibration"]["examples"] == measured["guarantee"]["examples"] == 200
    assert measured["promised_on"]["test"]["images"] == "test images"


def test_the_command_prints_and_keeps_budgets_and_the_report_shows_them(
    finished: Path, tmp_path: Path
) -> None:
    given = [finished, "--budgets", "0.4,0.7", "--guarantee", "0.1"]
    printed = run("evaluate", *given).stdout
    assert "all open" in printed and "70.0%" in printed and f"wrote {finished / BUDGETS}" in printed
    assert "at most 0.1" in printed.replace("\n", " ")
    as_json = json.loads(run("evaluate", *given, "--json").stdout)
    assert as_json["budgets"] == read_budgets(finished)
    run("report", finished, "--output", tmp_path / "report.html")
    assert "One network at other budgets" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_is_no_budget_is_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match="budgets must be at least"):
        measure_budgets(finished, [0.001])
    line = refused("evaluate", finished, "--budgets", "0.4,much")
    assert line == "--budgets must be numbers such as 0.2,0.3,0.4, received 0.4,much"


def test_a_run_without_gates_has_no_budgets(tmp_path: Path) -> None:
    train(RunConfig(epochs=1, width=4, gated=False, logger="none", accelerator="cpu"), tmp_path / "run")
    with pytest.raises(RunError, match="expected a network with gates"):
        measure_budgets(tmp_path / "run", [0.4])


def test_a_file_of_another_result_is_refused_in_a_line(finished: Path) -> None:
    measured = measure_budgets(finished, [0.7])
    (finished / BUDGETS).write_text(json.dumps(measured | {"result": "0"}))
    with pytest.raises(RunError, match=r"another's; batchshaping evaluate --budgets measures it anew"):
        read_budgets(finished)
