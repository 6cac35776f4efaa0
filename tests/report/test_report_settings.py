"""Runs are summarized over the seeds of a setting, and settings compared on the same data only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_results import DENSE, drawn, result

from batchshaping.report.page import report_html
from batchshaping.report.runs import read_run
from batchshaping.report.settings import Comparison, comparisons
from batchshaping.training.config import MAY_CHANGE

ABLATION = Path(__file__).parents[2] / "benchmarks" / "ablation" / "results"


def compared(results: Mapping[str, Mapping[str, Any]]) -> list[Comparison]:
    return comparisons([read_run(name, each) for name, each in results.items()])


def settings_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """The names of settings, each with the names of its runs, for runs on the same data."""
    (comparison,) = compared(results)
    names = {setting.name: [run.name for run in setting.runs] for setting in comparison.settings}
    assert len(names) == len(comparison.settings), "settings beside each other have different names"
    return names


# A result takes a moment to make, and nothing of it but these matters here.
BASE = result(epochs=1)


def run_of(seed: int, budget: float, accuracy: float = 0.98, share: float = 0.6) -> dict[str, Any]:
    config = BASE["config"] | {"seed": seed, "budget": budget}
    return BASE | {"config": config, "accuracy": accuracy, "multiply_adds": share * DENSE}


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([0.2, 0.3, 0.4]), st.floats(0.1, 1), st.floats(0.01, 2)),
        min_size=1,
        max_size=12,
    )
)
def test_a_setting_has_the_mean_and_the_deviation_over_its_seeds(
    drawn_runs: list[tuple[int, float, float, float]],
) -> None:
    (comparison,) = compared({str(i): run_of(*each) for i, each in enumerate(drawn_runs)})
    assert sorted(run.name for run in comparison.runs) == sorted(map(str, range(len(drawn_runs))))
    assert {setting.runs[0].config["budget"] for setting in comparison.settings} == {
        budget for _, budget, _, _ in drawn_runs
    }
    spent = [setting.multiply_adds.mean for setting in comparison.settings]
    assert spent == sorted(spent)
    for setting in comparison.settings:
        (budget,) = {run.config["budget"] for run in setting.runs}
        of_setting = [each for each in drawn_runs if each[1] == budget]
        assert len(setting.runs) == len(of_setting)
        seeds = sorted({seed for seed, *_ in of_setting})
        assert setting.seeds == len(seeds)
        assert [run.seed for run in setting.runs] == sorted(seed for seed, *_ in of_setting)
        for spread, column, scale in ((setting.accuracy, 2, 1), (setting.multiply_adds, 3, DENSE)):
            # Runs that repeat a seed say nothing of how seeds differ.
            values = [np.mean([each[column] for each in of_setting if each[0] == seed]) for seed in seeds]
            assert spread.mean == pytest.approx(scale * np.mean(values))
            if len(seeds) == 1:
                assert spread.deviation is None
            else:
                assert spread.deviation == pytest.approx(scale * np.std(values, ddof=1), abs=1e-9)


# Weights to start from may be moved, but to start from some is a setting.
@pytest.mark.parametrize("name", sorted(MAY_CHANGE - {"start"}))
def test_machine_and_log_make_no_setting(name: str) -> None:
    results = {str(seed): run_of(seed, 0.4) for seed in range(2)}
    results["1"]["config"] = results["1"]["config"] | {name: "another"}
    assert settings_of(results) == {"batch-shaping": ["0", "1"]}
    # Versions differ in the settings that they have of these.
    del results["1"]["config"][name]
    assert settings_of(results) == {"batch-shaping": ["0", "1"]}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ([{"budget": 0.2}, {"budget": 0.35}], ["budget 20%", "budget 35%"]),
        (
            [{"gated": False, "width": 4}, {"gated": False, "width": 8}, {"width": 8}],
            ["ungated, width 4", "ungated, width 8", "gates, width 8"],
        ),
        (
            [{"shaping": 0, "budget": 0.2}, {"shaping": 0.75, "budget": 0.4}, {"gated": False}],
            ["gates, no batch shaping, budget 20%", "gates, batch shaping 0.75, budget 40%", "ungated"],
        ),
        # The budget has no effect on a network without gates.
        ([{"gated": False}, {"budget": 0.2}], ["ungated", "gates"]),
        # A width has none on a network for large images.
        ([{"network": "resnet18"}, {"network": "resnet20"}], ["resnet18", "resnet20"]),
        ([{"augment": True}, {"augment": False}], ["augment", "no augment"]),
        ([{"prior": (0.6, 0.4)}, {"prior": (2, 6)}], ["prior Beta(0.6, 0.4)", "prior Beta(2, 6)"]),
        (
            [{"epochs": 1}, {"epochs": 2, "weight_decay": 0}],
            ["1 epoch, weight decay 0.0005", "2 epochs, weight decay 0.0"],
        ),
        ([{"noise_end": None}, {"noise_end": 0.5}], ["no noise end", "noise end 0.5"]),
        ([{}], ["batch-shaping"]),
    ],
    ids=str,
)
def test_a_setting_is_called_what_it_differs_in(settings: list[dict[str, Any]], names: list[str]) -> None:
    def with_settings(given: dict[str, Any]) -> dict[str, Any]:
        epochs = given.get("epochs", 40)
        made = result(**{name: value for name, value in given.items() if name != "epochs"})
        made["config"]["epochs"] = epochs
        return made

    results = {str(i): with_settings(each) for i, each in enumerate(settings)}
    by_run = {runs[0]: name for name, runs in settings_of(results).items()}
    assert [by_run[str(i)] for i in range(len(settings))] == names


def test_what_has_no_effect_makes_no_setting() -> None:
    runs = {"0": result(gated=False, budget=0.2), "1": result(gated=False, seed=1, budget=0.4, shaping=0)}
    assert settings_of(runs) == {"ungated": ["0", "1"]}


SETTINGS = {
    "gated": st.booleans(),
    "shaping": st.sampled_from([0, 0.5, 0.75]),
    "budget": st.sampled_from([0.2, 0.3, 0.30000001, 1 / 3]),
    "prior": st.sampled_from([[0.6, 0.4], [0.6, 0.4000001]]),
    "network": st.sampled_from(["resnet8", "resnet18"]),
    "width": st.sampled_from([8, 16]),
    "augment": st.booleans(),
    "noise_end": st.sampled_from([None, 0.5]),
    "seed": st.integers(0, 2),
}
UNGATED = result(gated=False, epochs=1)


@given(st.lists(st.fixed_dictionaries(SETTINGS), min_size=1, max_size=10))
def test_runs_have_the_same_name_if_and_only_if_they_are_of_the_same_setting(
    given: list[dict[str, Any]],
) -> None:
    def without_seed(settings: dict[str, Any]) -> str:
        idle = {"seed"}
        idle |= set() if settings["gated"] else {"shaping", "budget", "prior", "noise_end"}
        idle |= {"width"} if settings["network"] == "resnet18" else set()
        return json.dumps(
            {name: value for name, value in settings.items() if name not in idle}, sort_keys=True
        )

    bases = [BASE if each["gated"] else UNGATED for each in given]
    results = {
        str(i): base | {"config": base["config"] | each}
        for i, (base, each) in enumerate(zip(bases, given, strict=True))
    }
    expected: dict[str, set[str]] = {}
    for name, each in enumerate(given):
        expected.setdefault(without_seed(each), set()).add(str(name))
    found = settings_of(results).values()
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected.values()))


@pytest.mark.parametrize("value", ["x", None, [1], {}, True, -1, "<b>"], ids=repr)
@pytest.mark.parametrize("name", ["budget", "gated", "network", "width", "train_images", "milestones"])
def test_a_setting_with_any_value_has_a_name(name: str, value: Any) -> None:
    other = result()
    other["config"] = other["config"] | {name: value}
    for comparison in compared({"a": result(), "b": other}):
        assert all(setting.name for setting in comparison.settings)


def test_only_runs_on_the_same_data_are_compared() -> None:
    settings: dict[str, dict[str, Any]] = {
        "wide": {"width": 8},
        "narrow": {"width": 32, "epochs": 5},
        "fashion": {"data": "fashion-mnist"},
        "few": {"train_images": 100},
        "cats": {"data": "folder", "data_folder": "/data/cats"},
        "dogs": {"data": "folder", "data_folder": "/data/dogs"},
    }
    found = {
        comparison.title: {run.name for run in comparison.runs}
        for comparison in compared({name: result(gated=False, **each) for name, each in settings.items()})
    }
    assert found == {
        "digits, all training images": {"wide", "narrow"},
        "fashion-mnist, all training images": {"fashion"},
        "digits, 100 training images": {"few"},
        "folder, /data/cats, all training images": {"cats"},
        "folder, /data/dogs, all training images": {"dogs"},
    }


def test_the_folder_of_a_data_set_with_a_name_does_not_matter() -> None:
    runs = {
        folder: result(seed=i, data="cifar10", data_folder=folder) for i, folder in enumerate(("/a", "/b"))
    }
    assert settings_of(runs) == {"batch-shaping": ["/a", "/b"]}


def test_a_gain_is_taken_from_references_of_the_same_network_and_data() -> None:
    results = {
        "gated": result(accuracy=0.9),
        "same 0": result(gated=False, accuracy=0.8),
        "same 1": result(gated=False, seed=1, accuracy=0.7),
        "wider": result(gated=False, width=32, accuracy=0.1),
        "other data": result(gated=False, data="fashion-mnist", accuracy=0.2),
    }
    gains = {setting.runs[0].name: setting.gain for each in compared(results) for setting in each.settings}
    assert gains.pop("gated") == pytest.approx(0.15)
    assert gains == dict.fromkeys(("same 0", "wider", "other data"))


def test_each_run_is_of_its_curve() -> None:
    (curves,) = drawn(report_html({"s": result(), "0": result(shaping=0), "u": result(gated=False)}))[
        "comparisons"
    ]
    assert [(curve["name"], len(curve["points"])) for curve in curves] == [
        ("ungated", 1),
        ("L0 only", 1),
        ("batch-shaping", 1),
    ]
    assert [curve["connected"] for curve in curves] == [True, False, False]


def test_the_runs_of_the_ablation_are_twelve_settings_of_three_seeds() -> None:
    results = {path.stem: json.loads(path.read_text()) for path in sorted(ABLATION.glob("*.json"))}
    names = settings_of(results)
    budgets = ("20%", "30%", "40%", "60%")
    assert [*names] == [
        *(f"ungated, width {width}" for width in (3, 4, 6, 8)),
        *(f"gates, no batch shaping, budget {budget}, width 8" for budget in budgets),
        *(f"gates, batch shaping 0.75, budget {budget}, width 8" for budget in budgets),
    ]
    assert all(len(runs) == 3 for runs in names.values())
    assert names["gates, no batch shaping, budget 30%, width 8"] == [
        f"l0-0.3-seed{seed}" for seed in range(3)
    ]
    # The figure and the table of the guide say the same.
    (comparison,) = compared(results)
    (setting,) = (each for each in comparison.settings if each.name.endswith("0.75, budget 20%, width 8"))
    assert 100 * setting.accuracy.mean == pytest.approx(87.99, abs=0.005)
    assert 100 * (setting.accuracy.deviation or 0) == pytest.approx(0.28, abs=0.005)
