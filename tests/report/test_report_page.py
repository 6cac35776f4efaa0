"""The report: what it says of runs, and which results it refuses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from commands import refused
from report_results import BINS, DENSE, budgets, drawn, latency, result, stated

from batchshaping.report.page import prior_masses, report_html, write_report
from batchshaping.training.config import RunConfig
from batchshaping.training.run import train


def heading(results: dict[str, dict[str, Any]]) -> str:
    found = re.search(r"<h1>(.*?)</h1>", report_html(results))
    assert found is not None
    return found[1]


# What is said of the runs


@pytest.mark.parametrize("prior", [(0.6, 0.4), (2.0, 6.0), (1.0, 1.0), (0.01, 30.0)])
def test_the_prior_has_the_masses_of_scipy(prior: tuple[float, float]) -> None:
    expected = np.diff(scipy.stats.beta(*prior).cdf(np.linspace(0, 1, BINS + 1)))
    np.testing.assert_allclose(prior_masses(prior, BINS), expected, rtol=1e-9, atol=1e-12)


def test_the_prior_drawn_is_that_of_the_run() -> None:
    run = drawn(report_html({"run": result(prior=(0.3, 0.9))}))["runs"][0]
    assert run["pictures"]["prior"] == prior_masses((0.3, 0.9), BINS)


def test_the_headline_says_what_was_saved_and_what_it_cost() -> None:
    gated = result(accuracy=0.98, share=0.6)
    worse, better = (result(gated=False, seed=seed, accuracy=0.98 + seed / 100) for seed in (0, 1))
    cheap = result(accuracy=0.97, share=0.25, budget=0.2)
    other = result(gated=False, width=8, accuracy=0.5)
    saving = "A gated run saving 40.0% of the multiply-adds"
    assert heading({"a": gated}) == f"{saving}, at 98.0% accuracy"
    assert heading({"a": gated, "b": other}) == f"{saving}, at 98.0% accuracy"
    assert heading({"a": gated, "b": worse}) == f"{saving}, at 0.0 points of accuracy"
    assert heading({"a": gated, "b": worse, "c": better, "d": other}) == (
        f"{saving}, at −0.5 points of accuracy"
    )
    assert heading({"a": gated, "b": cheap, "c": worse}) == (
        "2 gated runs saving 40.0 to 75.0% of the multiply-adds, at −1.0 to 0.0 points of accuracy"
    )
    assert heading({"a": worse}) == "An ungated run with 98.0% accuracy"
    assert heading({"a": worse, "b": better}) == "2 ungated runs with 98.5% accuracy"
    assert heading({"a": worse, "b": other}) == "2 ungated runs with 50.0 to 98.0% accuracy"


def test_the_headline_says_how_fast_a_network_is_beside_its_teacher() -> None:
    def measured(accuracy: float, dense: float) -> dict[str, Any]:
        seconds = {"conditional": [0.001, 0.002, 0.003], "dense": [dense] * 3}
        latency = {"machine": {"processor": "a CPU", "threads": 1}, "repeats": 5, "multiply_adds": [1.0] * 3}
        taught = {"teacher": {"accuracy": 0.985}, "latency": {**latency, "seconds": seconds}}
        return result(accuracy=accuracy, share=0.4) | taught

    saving = "a gated run saving 60.0% of the multiply-adds"
    assert heading({"a": measured(0.98, 0.004)}) == (
        f"Within 0.5 points of the accuracy of its teacher, and 2.0 times as fast: {saving}"
    )
    original = result(gated=False, accuracy=0.985)
    assert heading({"a": measured(0.99, 0.001), "b": original}) == (
        f"0.5 points more accurate than its teacher, and 2.0 times as slow: {saving}"
    )


def test_a_column_compares_with_references_if_there_are_any() -> None:
    head = '<th scope="col"><button type="button">Against reference</button></th>'
    runs = {"a": result(), "b": result(width=8)}
    assert head not in report_html(runs)
    assert head in report_html(runs | {"c": result(gated=False)})


def test_the_headline_says_it_if_nothing_is_saved() -> None:
    dear = {"a": result(share=1.25), "b": result(share=1.5, width=8)}
    assert heading(dear) == "2 gated runs spending 25.0 to 50.0% more multiply-adds, at 98.0% accuracy"
    assert heading(dear | {"c": result(width=9)}).startswith("3 gated runs saving −50.0 to 40.0% of")


def test_the_headline_has_the_means_of_settings() -> None:
    runs = {
        f"{width} {seed}": result(
            width=width, seed=seed, accuracy=0.9 + seed / 100, share=width / 10 + seed / 100
        )
        for width in (2, 4)
        for seed in (0, 2)
    }
    assert heading(runs) == "4 gated runs saving 59.0 to 79.0% of the multiply-adds, at 91.0% accuracy"


def test_gates_that_save_nothing_are_not_said_to_save() -> None:
    html = report_html({"a": result(share=1.25)})
    assert "<dt>Spent on top</dt>" in html
    assert "<dd>25.0%</dd>" in html


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7.00"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (9996, "10.0k"),
        (763_520, "764k"),
        (12_345_678, "12.3M"),
        (4.089e9, "4.09G"),
    ],
)
def test_multiply_adds_have_three_digits_and_a_prefix(value: float, text: str) -> None:
    html = report_html({"a": result(share=value / DENSE)})
    assert f">{text} multiply-adds on average for an image" in html


# Kinds of runs


def test_a_result_without_kind_and_reference_is_of_channel_gating() -> None:
    old = drawn(report_html({"a": result(), "b": result(gated=False)}))
    assert old == drawn(report_html({"a": stated(result()), "b": stated(result(gated=False))}))
    assert [run["reference"] for run in old["runs"]] == [DENSE, DENSE]
    assert "(ungated network)" in report_html({"a": result()})


def test_what_is_saved_refers_to_the_reference_that_the_result_states() -> None:
    run = stated(result(share=0.6)) | {
        "reference": {"name": "twice <b>the</b> size", "multiply_adds": 2 * DENSE}
    }
    html = report_html({"a": run})
    assert "<dd>70.0%</dd>" in html
    assert "its reference (twice &lt;b&gt;the&lt;/b&gt; size) takes 1.60M" in html
    assert "Reference: twice &lt;b&gt;the&lt;/b&gt; size." in report_html({"a": run, "b": run})


COMMON = ("config", "versions", "accuracy", "multiply_adds", "history")


def test_a_run_of_an_unknown_kind_is_shown_without_pictures() -> None:
    kind = "of <b>the</b> future"
    known = stated(result(), kind)
    bare = {name: known[name] for name in (*COMMON, "kind", "reference")}
    html = report_html({"new": bare, "old": result(gated=False)})
    assert "<dd>40.0%</dd>" in html
    assert "the kind “of &lt;b&gt;the&lt;/b&gt; future” are not known to this version" in html
    (curves,) = drawn(html)["comparisons"]
    assert [curve["name"] for curve in curves] == ["of &lt;b&gt;the&lt;/b&gt; future", "ungated"]
    assert heading({"new": bare}) == "A run saving 40.0% of the multiply-adds, at 98.0% accuracy"


@pytest.mark.parametrize("name", [*COMMON, "reference"])
def test_a_run_of_an_unknown_kind_needs_what_is_common_to_all(name: str) -> None:
    broken = stated(result(), "of the future")
    del broken[name]
    missing = "cost" if name == "reference" else name
    if name == "reference":
        del broken["cost"]
    with pytest.raises(
        ValueError, match=f"^'a': expected the result of a run, received one without '{missing}'$"
    ):
        report_html({"a": broken})


@pytest.mark.parametrize(
    "change",
    [
        {"kind": None},
        {"kind": 3},
        {"kind": ["channel gating"]},
        {"reference": None},
        {"reference": {"name": 3, "multiply_adds": 1.0}},
        {"reference": {"name": "a", "multiply_adds": 0}},
        {"reference": {"name": "a", "multiply_adds": "1"}},
    ],
    ids=str,
)
def test_a_kind_or_a_reference_that_no_run_states_is_refused_in_a_line(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^'a': expected the result of a run, received something else$"):
        report_html({"a": stated(result()) | change})


# What is refused


def paths(content: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """The way to every key that is not a setting, a version, or what the report has no use for."""
    if isinstance(content, list):
        yield from (
            () if not content or isinstance(content[0], str | float | int) else paths(content[0], *path, 0)
        )
    elif isinstance(content, dict):
        for key, value in content.items():
            if key not in {"loss", "seconds", "classes", "index", "examples", "config", "versions"}:
                yield (*path, key)
                yield from paths(value, *path, key)


# The layers of an epoch have their histograms only, and gates cost what they cost.
UNUSED = re.compile(r"^(cost (gates|fixed)|history 0 layers 0 (?!histogram))")
NEEDED = [path for path in paths(result()) if not UNUSED.match(" ".join(map(str, path)))]
STATED = [("reference", "name"), ("reference", "multiply_adds")]


@pytest.mark.parametrize(
    "path",
    [
        *NEEDED,
        *STATED,
        ("config",),
        ("versions",),
        ("config", "shaping"),
        ("config", "prior"),
        ("config", "seed"),
    ],
    ids=lambda path: ".".join(map(str, path)),
)
def test_a_result_that_lacks_a_key_is_refused_in_a_line_that_names_run_and_key(path: tuple[Any, ...]) -> None:
    broken = stated(result()) if path in STATED else result()
    within = broken
    for key in path[:-1]:
        within = within[key]
    del within[path[-1]]
    with pytest.raises(ValueError, match="expected the result of a run") as error:
        report_html({"good": result(), "bad\nrun": broken})
    message = str(error.value)
    assert message == f"'bad\\nrun': expected the result of a run, received one without {path[-1]!r}"


@pytest.mark.parametrize(
    "change",
    [
        {"config": 3},
        {"accuracy": "high"},
        {"layers": [1]},
        {"cost": {"dense": 0.0}},
        {"history": None},
        {"by_class": [None]},
        {"quantiles": []},
        {"versions": []},
        {"by_class": []},
        {"least": [None]},
        {"accuracy": True},
        {"accuracy": "0.9"},
        {
            "classes": 3,
            "by_class": [{"name": "a", "examples": 1, "accuracy": 1, "multiply_adds": 1, "open": 3}],
        },
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_result_of_another_shape_is_refused_in_a_line(change: dict[str, Any]) -> None:
    message = "^'bad': expected the result of a run, received something else$"
    with pytest.raises(ValueError, match=message):
        report_html({"bad": result() | change})


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A result with another value at a place."""
    broken = within = result()
    for key in path[:-1]:
        within = within[key]
    within[path[-1]] = value
    return broken


NUMBERS = [
    *[("accuracy",), ("multiply_adds",), ("cost", "dense"), ("quantiles", 0), ("quantiles", -1)],
    *[
        ("gates", "always_on"),
        ("layers", 0, "gates"),
        ("layers", 1, "mean_open"),
        ("layers", 0, "histogram", 3),
    ],
    *[("history", 0, name) for name in ("epoch", "accuracy", "multiply_adds", "shaping", "penalty", "noise")],
    *[("history", 1, "gates", "conditional"), ("history", 1, "layers", 0, "histogram", 19)],
    *[("by_class", 0, name) for name in ("examples", "accuracy", "multiply_adds")],
    *[("by_class", 0, "open", 0, 1), ("least", 0, "multiply_adds")],
]


@pytest.mark.parametrize(
    "number",
    [10**400, -(10**5000), 1e300, math.inf, math.nan],
    ids=lambda n: repr(n)[:9] if isinstance(n, float) else "int",
)
@pytest.mark.parametrize("path", NUMBERS, ids=lambda path: ".".join(map(str, path)))
def test_a_number_that_no_run_gives_is_refused_in_a_line(path: tuple[Any, ...], number: float) -> None:
    with pytest.raises(ValueError, match=r"\A'bad': expected the result of a run, received .*\Z") as error:
        report_html({"bad": changed(path, number)})
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "prior",
    [
        (1e18, 1e18),
        (0.6, 1e300),
        (10**400, 1),
        (-1, 1),
        (math.nan, 1),
        (True, 1),
        (1,),
        (1, 2, 3),
        "0.6",
        3,
        None,
        [1] * 10**5,
    ],
    ids=lambda prior: repr(prior)[:12] if not isinstance(prior, tuple) or max(prior) < 1e100 else "int",
)
def test_a_prior_that_no_run_has_is_refused_in_a_line(prior: Any) -> None:
    message = r"\A'bad': expected the result of a run, received one with prior[ .:].*\Z"
    with pytest.raises(ValueError, match=message) as error:
        report_html({"bad": changed(("config", "prior"), prior)})
    assert len(str(error.value)) < 250


def deep(depth: int) -> Any:
    inner: Any = []
    for _ in range(depth):
        inner = [inner]
    return inner


@pytest.mark.parametrize(
    "path",
    [("config", "width"), ("accuracy",), ("history",), ("least", 0, "png"), ("versions", "torch")],
    ids=str,
)
def test_what_is_nested_without_end_is_refused_in_a_line(path: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"^'bad': expected the result of a run, received something else$"):
        report_html({"bad": changed(path, deep(10**5))})


def test_histograms_of_many_bins_are_refused_in_a_line() -> None:
    with pytest.raises(
        ValueError, match=r"^'bad': expected .*, received one with 100000 bins in a histogram$"
    ):
        report_html({"bad": changed(("layers", 0, "histogram"), [1] * 10**5)})


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5 + "]" * 10**5,
        '{"accuracy":' * 10**5,
        '{"a": ' + "9" * 5000 + "}",
        '{"accuracy": 1, "config": [], "cost": {}, "history": []}',
        '[["accuracy", 1], ["config", {}], ["cost", {}], ["history", []]]',
        '{"accuracy": 1, "config": {}, "cost": {}, "history": [NaN]}',
        "\xff",
        "",
    ],
    ids=lambda text: text[:12],
)
def test_a_file_that_is_no_result_is_one_line_and_no_page(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text(text, encoding="latin-1")
    line = refused("report", "bad.json")
    assert "bad" in line and "expected the result of a run" in line and len(line) < 200
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 5000, "1e400", "NaN", "Infinity"])
def test_a_number_in_a_file_that_no_run_gives_is_one_line_and_no_page(
    number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in NUMBERS:
        text = json.dumps(changed(path, "HERE")).replace('"HERE"', number)
        Path("bad.json").write_text(text)
        line = refused("report", "bad.json")
        assert line.startswith("'bad': expected the result of a run, received ") and len(line) < 200
        assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    write_report({"a": result()}, path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_report({"b": result()}, path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["report.html"]


def test_a_report_of_no_run_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one run, received none"):
        report_html({})


def test_what_training_writes_can_be_reported(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 1, "train_images": 64, "logger": "none"}
    runs = {
        name: train(RunConfig(gated=name == "gated", **settings), tmp_path / name, progress=False)
        for name in ("gated", "ungated")
    }
    write_report(runs, tmp_path / "report.html")
    data = drawn((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [len(run["pictures"]["layers"]) for run in data["runs"]] == [3, 0]
    (curves,) = data["comparisons"]
    shown = {curve["name"]: point["multiply_adds"]["mean"] for curve in curves for point in curve["points"]}
    assert shown == {
        "batch-shaping": runs["gated"]["multiply_adds"],
        "ungated": runs["ungated"]["multiply_adds"],
    }


# Budgets


def test_the_curve_of_one_network_is_drawn_alone_and_beside_those_trained_for_each() -> None:
    runs = {"a<b": result() | {"budgets": budgets()}, "b": result(budget=0.2), "c": result(seed=1)}
    page = report_html(runs)
    first, *others = drawn(page)["runs"]
    curve = first["budgets"]["at other budgets"]
    assert [point["x"] for point in curve] == pytest.approx([0.29 * DENSE, 1.01 * DENSE, 1.01 * DENSE])
    assert [point["y"] for point in curve] == [0.88, 0.9, 0.9]
    assert [run["budgets"] for run in others] == [None, None]
    assert first["budgets"]["as trained"][0]["y"] == result()["accuracy"]
    assert first["budgets"]["with the promise"][0]["y"] == 0.88
    *_, added = drawn(page)["comparisons"][0]
    assert added["name"] == "a&lt;b at other budgets" and added["symbol"] == "square-open"
    assert [point["multiply_adds"]["mean"] for point in added["points"]] == [p["x"] for p in curve]
    assert "found on the training images." in page and "budget 30.0%" in page


def test_the_page_says_what_is_promised_and_how_it_was_kept() -> None:
    text = " ".join(report_html({"a": result() | {"budgets": budgets()}}).split())
    assert (
        "With confidence 95%, the accuracy on new images is at most 1 point lower at shift −0.5 than with "
        "all gates open: certified by 500 images (every second of the test images). On 500 others (the "
        "others) the difference is −2.0 points, at 29.0% of the multiply-adds."
    ) in text
    html = report_html({"a": result() | {"budgets": budgets(certified=False)}})
    assert "No shift could be certified to lose at most 1 point of accuracy" in html
    assert "with the promise" not in drawn(html)["runs"][0]["budgets"]
    assert 'id="budgets-title"' not in report_html({"a": result()})


@pytest.mark.parametrize(
    ("change", "received"),
    [
        (
            {"test": {"all_open": {"multiply_adds": 1, "accuracy": 1}, "points": []}},
            "budgets of other points",
        ),
        ({"calibration": {"points": []}}, "one without 'examples'"),
        ({"guarantee": {}}, "one without 'tested'"),
        ({"guarantee": 3}, "something else"),
    ],
)
def test_budgets_that_nobody_measured_are_refused_in_a_line(change: dict[str, Any], received: str) -> None:
    with pytest.raises(ValueError, match=f"^'bad': expected the result of a run, received .*{received}$"):
        report_html({"bad": stated(result()) | {"budgets": budgets() | change}})


# Latency


def test_the_page_says_how_time_follows_multiply_adds() -> None:
    measured = latency()
    html = report_html({"a": result() | {"latency": measured}, "b": result(seed=1)})
    expected = scipy.stats.pearsonr(measured["multiply_adds"], measured["seconds"]["conditional"])
    assert f"The correlation of time with multiply-adds is {expected.statistic:.2f}." in html
    assert "40 test images, one at a time, medians of 5 passes on a processor, 2 threads." in html
    assert "no more than 1.32 ms; the network without gates takes 1.8 ms" in html
    seconds = measured["seconds"]
    assert [run["latency"] and run["latency"]["seconds"] for run in drawn(html)["runs"]] == [
        seconds["conditional"],
        None,
    ]


@pytest.mark.parametrize("native", [True, False])
def test_the_page_says_when_there_was_no_native_code(native: bool) -> None:
    measured = latency()
    measured["machine"]["native"] = native
    html = report_html({"a": result() | {"latency": measured}})
    assert ("a processor, 2 threads, without native code." in html) != native


def test_a_run_without_gates_has_one_time_and_no_correlation() -> None:
    measured = latency("dense") | {"multiply_adds": [DENSE] * 40}
    html = report_html({"a": result(gated=False) | {"latency": measured}})
    assert "40 test images" in html and "correlation" not in html


def test_a_report_without_latency_has_no_such_section() -> None:
    assert 'id="time-title"' not in report_html({"a": result()})


@pytest.mark.parametrize(
    ("change", "received"),
    [
        ({"seconds": {"conditional": [0.1]}}, "one without 'dense'"),
        ({"seconds": {"dense": [0.1]}}, "one with a latency of other images"),
        ({"multiply_adds": []}, "one with a latency of other images"),
        ({"repeats": float("nan")}, "one with the number nan"),
        ({"machine": None}, "something else"),
        ({"seconds": 3}, "something else"),
    ],
)
def test_a_latency_that_nobody_measured_is_refused_in_a_line(change: dict[str, Any], received: str) -> None:
    broken = result() | {"latency": latency() | change}
    with pytest.raises(ValueError, match=f"^'bad': expected the result of a run, received {received}$"):
        report_html({"bad": broken})
