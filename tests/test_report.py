"""The report: what it says of runs, and what a reader sees and does in a browser."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import re
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from commands import refused
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import Select

from batchshaping.report.page import prior_masses, report_html, write_report
from batchshaping.training.config import RunConfig
from batchshaping.training.run import train

BINS = 20
LAYERS = {"layer1.0.gate1": 4, "layer2.0.gate1": 8}
DENSE = 800_000.0
HOSTILE = ("<script>", '"quotes\'"', "</script><b>b</b>", "a &amp; b", "{{ 7 * 7 }}", "<!--<script>")


def png(rng: np.random.Generator) -> str:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(256, size=(8, 8), dtype=np.uint8)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def result(
    *,
    accuracy: float = 0.98,
    share: float = 0.6,
    classes: tuple[str, ...] = ("cat", "dog", "ship"),
    epochs: int = 3,
    **settings: Any,
) -> dict[str, Any]:
    """What training gives, with random gates that are the same for the same seed."""
    config = RunConfig(**settings).model_dump(mode="json")
    gated = config["gated"]
    rng = np.random.default_rng(config["seed"])
    spent = share * DENSE if gated else DENSE

    def shares() -> dict[str, float]:
        on, conditional, off = rng.dirichlet([1, 3, 1])
        return {"always_on": on, "always_off": off, "conditional": conditional, "mean_open": rng.random()}

    def summary() -> dict[str, Any]:
        return {
            "examples": 90,
            "loss": 0.1,
            "accuracy": accuracy,
            "multiply_adds": spent,
            "gates": shares() if gated else None,
            "layers": [
                {"name": name, "gates": gates, **shares(), "histogram": rng.integers(1, 50, BINS).tolist()}
                for name, gates in LAYERS.items()
                if gated
            ],
        }

    history = [
        {"epoch": 1 + i, "shaping": 0.5, "penalty": 0.1, "noise": 1.0, **summary()} for i in range(epochs)
    ]
    last = {name: value for name, value in history[-1].items() if name in summary()}

    def images() -> list[dict[str, Any]]:
        labels = rng.integers(len(classes), size=(4, 2)).tolist() if gated else []
        return [
            {
                "index": i,
                "label": classes[label],
                "predicted": classes[predicted],
                "multiply_adds": spent,
                "png": png(rng),
            }
            for i, (label, predicted) in enumerate(labels)
        ]

    return {
        "config": config,
        "versions": {"batchshaping": "0.1.0", "torch": "2.6.0", "python": "3.11.7"},
        "classes": list(classes),
        "seconds": 1.0,
        **last,
        "cost": {"dense": DENSE, "gates": 1000.0 * gated, "fixed": 9000.0},
        "quantiles": np.linspace(0.9 * spent, 1.1 * spent, 21).tolist(),
        "by_class": [
            {
                "name": name,
                "examples": 30,
                "accuracy": rng.random(),
                "multiply_adds": spent,
                "open": [rng.random(gates).round(4).tolist() for gates in LAYERS.values() if gated],
            }
            for name in classes
        ],
        "least": images(),
        "most": images(),
        "history": history,
    }


def drawn(html: str) -> Any:
    """What the script of a page is given to draw."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


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
    assert run["prior"] == prior_masses((0.3, 0.9), BINS)


def test_runs_that_differ_by_their_seed_only_are_one_group() -> None:
    accuracies, shares = [0.97, 0.99, 0.95], [0.5, 0.7, 0.4]
    runs = {
        f"seed {seed}": result(seed=seed, accuracy=accuracy, share=share, budget=0.4)
        for seed, (accuracy, share) in enumerate(zip(accuracies, shares, strict=True))
    }
    # In between, and not of the group: each differs by one setting.
    others = {"budget": result(budget=0.5), "epochs": result(budget=0.4, batch_size=32)}
    names = [*runs][:1], [*others], [*runs][1:]
    data = drawn(report_html({name: (runs | others)[name] for part in names for name in part}))
    assert sorted(len(group["runs"]) for group in data["groups"]) == [1, 1, 3]
    (group,) = (group for group in data["groups"] if len(group["runs"]) == 3)
    assert [run["accuracy"] for run in group["runs"]] == accuracies
    for figure, values in (("accuracy", accuracies), ("multiply_adds", np.multiply(shares, DENSE))):
        assert group[figure]["mean"] == pytest.approx(np.mean(values))
        assert group[figure]["deviation"] == pytest.approx(np.std(values, ddof=1))
    (alone, _) = (group for group in data["groups"] if len(group["runs"]) == 1)
    assert alone["accuracy"] == {"mean": 0.98, "deviation": 0.0}
    for name in runs:
        assert name in group["hover"]


def test_only_runs_on_the_same_data_are_compared() -> None:
    settings: list[dict[str, Any]] = [
        {"width": 8},
        {"width": 32, "epochs": 5},
        {"data": "fashion-mnist"},
        {"train_images": 100},
    ]
    data = drawn(report_html({str(each): result(gated=False, **each) for each in settings}))
    wide, narrow, fashion, few = (group["data"] for group in data["groups"])
    assert wide == narrow
    assert len({wide, fashion, few}) == 3


def test_each_run_is_of_its_kind() -> None:
    runs = {
        "plain": result(gated=False),
        "L0": result(shaping=0),
        "shaped": result(),
    }
    data = drawn(report_html(runs))
    kinds = [data["kinds"][group["kind"]] for group in data["groups"]]
    assert kinds == ["ungated", "L0 only", "batch-shaping"]


def test_the_headline_says_what_was_saved_and_what_it_cost() -> None:
    gated = result(accuracy=0.98, share=0.6)
    worse, better = (result(gated=False, seed=seed, accuracy=0.98 + seed / 100) for seed in (0, 1))
    cheap = result(accuracy=0.97, share=0.25)
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
    assert heading({"a": worse, "b": better}) == "2 ungated runs with 98.0 to 99.0% accuracy"


def test_a_column_compares_with_ungated_runs_if_there_are_any() -> None:
    head = '<th scope="col"><button type="button">Against ungated</button></th>'
    runs = {"a": result(), "b": result(width=8)}
    assert head not in report_html(runs)
    assert head in report_html(runs | {"c": result(gated=False)})


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
    assert f"network: {text} on average" in html


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


@pytest.mark.parametrize(
    "path",
    [*NEEDED, ("config",), ("versions",), ("config", "shaping"), ("config", "prior"), ("config", "seed")],
    ids=lambda path: ".".join(map(str, path)),
)
def test_a_result_that_lacks_a_key_is_refused_in_a_line_that_names_run_and_key(path: tuple[Any, ...]) -> None:
    broken = result()
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
    assert [len(run["layers"]) for run in data["runs"]] == [3, 0]
    assert [run["multiply_adds"] for group in data["groups"] for run in group["runs"]] == [
        runs[name]["multiply_adds"] for name in runs
    ]


# What a reader sees and does

RUNS = {
    "wide 0": result(gated=False, accuracy=0.985),
    "wide 1": result(gated=False, seed=1, accuracy=0.975),
    "shaped 0": result(accuracy=0.98, share=0.6),
    "shaped 1": result(seed=1, accuracy=0.96, share=0.5),
    "L0": result(seed=2, shaping=0, accuracy=0.97, share=0.3),
    "no name <b>here</b>": result(seed=3, budget=0.3, epochs=5, accuracy=0.93, share=0.2, classes=HOSTILE),
}
PAGES = {
    "many": RUNS,
    "one": {"only": RUNS["shaped 0"]},
    "ungated": {"only": RUNS["wide 0"]},
    "hostile": dict.fromkeys((*HOSTILE, "x" * 200), RUNS["no name <b>here</b>"]),
}
OF_GATES = {"layers": 4, "histogram": 2, "multiply-adds": 2, "open": 2, "weights": 3, "heatmap": 1}
OF_GATES["class-multiply-adds"] = 1
OF_ALL = {"accuracy": 1, "class-accuracy": 1}
# By how many runs there are: three kinds, two of them with the faint points of their seeds; or one kind.
TRADEOFF = {1: {}, 6: {"tradeoff": 5}, 7: {"tradeoff": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    for name, results in PAGES.items():
        write_report(copy.deepcopy(results), folder / f"{name}.html")
    return folder


class Page:
    """A report that is open in the browser."""

    def __init__(self, browser: WebDriver, path: Path, scheme: str = "light") -> None:
        self.browser = browser
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.resize(1280)
        for log in ("browser", "performance"):
            browser.get_log(log)  # that of the page before
        browser.get(path.as_uri())
        self.errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        self.requests = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def resize(self, width: int) -> None:
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        # The page has heard of it by the next frame.
        frames = "const [done] = arguments; requestAnimationFrame(() => requestAnimationFrame(done))"
        self.browser.execute_async_script(frames)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def traces(self, figure: str) -> Any:
        return self.run("return document.getElementById(arguments[0]).data", figure)

    def select(self, control: str) -> Select:
        return Select(self.browser.find_element(By.ID, control))

    def figures(self) -> dict[str, int]:
        """Every figure that is to be seen and drawn, with the number of its traces."""
        script = """
            return [...document.querySelectorAll(".chart")]
                .filter((chart) => chart.querySelector("svg.main-svg")?.getBoundingClientRect().height > 100)
                .map((chart) => [chart.id, chart.data.length]);
        """
        return dict(self.run(script))

    def text(self) -> str:
        return self.browser.find_element(By.TAG_NAME, "main").text

    def column(self, index: int) -> list[str]:
        script = "return [...arguments[0].tBodies[0].rows].map((row) => row.cells[arguments[1]].innerText)"
        return [
            cell.splitlines()[0] for cell in self.run(script, self.browser.find_element(By.ID, "runs"), index)
        ]


@pytest.fixture
def many(browser: WebDriver, folder: Path) -> Page:
    return Page(browser, folder / "many.html")


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest, browser: WebDriver, folder: Path) -> Page:
    """Each page in turn; what is tested of it leaves it as it is."""
    return Page(browser, folder / f"{request.param}.html")


def test_a_page_loads_without_an_error(page: Page) -> None:
    assert page.errors == []
    loaded = """
        return [...document.images].every((image) => !image.checkVisibility() || image.naturalWidth === 8);
    """
    assert page.run(loaded)


def test_a_page_asks_for_nothing_but_itself(page: Page) -> None:
    url = page.browser.current_url
    assert [asked for asked in page.requests if not asked.startswith("data:")] == [url]
    linked = """
        return [...document.querySelectorAll("*")].flatMap((element) =>
            ["src", "href", "xlink:href"].map((name) => element.getAttribute(name)).filter(Boolean));
    """
    assert [link for link in page.run(linked) if not link.startswith(("data:image/png;base64,", "#"))] == []


def test_every_figure_is_there(page: Page) -> None:
    runs = page.select("run").options
    ungated = "This run has no gates." in page.text()
    expected = OF_ALL | TRADEOFF[len(runs)] | ({} if ungated else OF_GATES)
    assert page.figures() == expected


def test_every_control_has_a_name(page: Page) -> None:
    nameless = """
        return [...document.querySelectorAll("select, input, button, .chart, [tabindex]")]
            .filter((element) => !element.labels?.length && !element.getAttribute("aria-label"))
            .filter((element) => element.tagName !== "BUTTON" || !element.textContent.trim())
            .map((element) => element.outerHTML);
    """
    assert page.run(nameless) == []


def test_headings_go_down_step_by_step(page: Page) -> None:
    levels = page.run("return [...document.querySelectorAll('h1, h2, h3')].map((head) => +head.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_screen(page: Page, width: int) -> None:
    page.resize(width)
    assert page.run("return document.documentElement.scrollWidth") <= width
    ends = """
        return [...document.querySelectorAll(".main-svg")]
            .filter((svg) => svg.checkVisibility())
            .map((svg) => svg.getBoundingClientRect().right);
    """
    # The widest figure goes from one margin to the other.
    assert min(width, 1080) - 100 < max(page.run(ends)) <= width


def counts(run: dict[str, Any], layer: int | None = None, epoch: int = -1) -> Any:
    layers = run["history"][epoch]["layers"]
    return np.sum(
        [layers[i]["histogram"] for i in (range(len(layers)) if layer is None else [layer])], axis=0
    )


def test_the_first_gated_run_is_shown_first(many: Page) -> None:
    run = RUNS["shaped 0"]
    assert many.select("run").first_selected_option.text == "shaped 0"
    bars, line = many.traces("histogram")
    np.testing.assert_allclose(bars["y"], counts(run) / counts(run).sum())
    np.testing.assert_allclose(line["y"][1:-1], prior_masses(run["config"]["prior"], BINS))
    for trace, share in zip(
        many.traces("layers"), ("always_on", "conditional", "always_off", "mean_open"), strict=True
    ):
        assert trace["x"] == [layer[share] for layer in run["layers"]]
    assert [trace["y"] for trace in many.traces("open")] == [
        [epoch["gates"][share] for epoch in run["history"]] for share in ("mean_open", "conditional")
    ]


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_picking_a_layer_changes_the_histogram_and_the_heatmap(many: Page, layer: int) -> None:
    run = RUNS["shaped 0"]
    assert many.traces("heatmap")[0]["z"] == [[*chain(*each["open"])] for each in run["by_class"]]
    name = [*LAYERS][layer]
    many.select("histogram-layer").select_by_visible_text(name)
    many.select("heatmap-layer").select_by_visible_text(name)
    np.testing.assert_allclose(
        many.traces("histogram")[0]["y"], counts(run, layer) / counts(run, layer).sum()
    )
    assert many.traces("heatmap")[0]["z"] == [each["open"][layer] for each in run["by_class"]]


def test_the_slider_goes_through_the_epochs_by_keyboard(many: Page) -> None:
    run = RUNS["shaped 0"]
    slider = many.browser.find_element(By.ID, "epoch")
    shown = many.browser.find_element(By.ID, "epoch-shown")
    assert shown.text == "3 of 3"
    slider.send_keys(Keys.HOME)
    assert shown.text == "1 of 3"
    np.testing.assert_allclose(
        many.traces("histogram")[0]["y"], counts(run, epoch=0) / counts(run, epoch=0).sum()
    )
    slider.send_keys(Keys.ARROW_RIGHT)
    assert shown.text == "2 of 3"


def test_choosing_another_run_changes_every_section(many: Page) -> None:
    many.select("histogram-layer").select_by_index(2)
    name = "no name <b>here</b>"
    run = RUNS[name]
    many.select("run").select_by_visible_text(name)
    assert len(many.traces("accuracy")[0]["x"]) == 5
    # The layer stays, as the runs have it both.
    np.testing.assert_allclose(many.traces("histogram")[0]["y"], counts(run, 1) / counts(run, 1).sum())
    assert len(many.traces("heatmap")[0]["z"]) == len(HOSTILE)
    assert many.run(
        "return [...document.images].filter((image) => image.checkVisibility()).map((i) => i.src)"
    ) == [f"data:image/png;base64,{image['png']}" for image in (*run["least"], *run["most"])]
    assert "budget\t0.3" in many.run(
        "return document.querySelector('.configuration:not([hidden] *)').innerText"
    )
    many.select("run").select_by_visible_text("wide 0")
    assert many.figures() == TRADEOFF[6] | OF_ALL
    assert "This run has no gates." in many.text()
    many.select("run").select_by_visible_text("L0")
    assert many.figures() == TRADEOFF[6] | OF_GATES | OF_ALL
    assert "to which this run was not shaped" in many.text()


def test_a_run_can_be_chosen_in_the_table(many: Page) -> None:
    many.browser.find_element(By.XPATH, "//table[@id='runs']//button[text()='L0']").send_keys(Keys.ENTER)
    assert many.select("run").first_selected_option.text == "L0"
    assert many.traces("layers")[0]["x"] == [layer["always_on"] for layer in RUNS["L0"]["layers"]]


def test_the_table_has_a_row_for_each_run(many: Page) -> None:
    assert many.column(0) == [*RUNS]
    assert many.column(1) == ["98.5%", "97.5%", "98.0%", "96.0%", "97.0%", "93.0%"]
    assert many.column(2) == ["–", "–", "0.0", "−2.0", "−1.0", "−5.0"]
    assert many.column(3) == ["800k", "800k", "480k", "400k", "240k", "160k"]
    assert many.column(4) == ["100.0%", "100.0%", "60.0%", "50.0%", "30.0%", "20.0%"]
    for column, share in ((5, "conditional"), (6, "always_on"), (7, "always_off")):
        gates = [run["gates"] for run in RUNS.values()]
        assert many.column(column) == [f"{of[share]:.1%}" if of else "–" for of in gates]


def test_a_click_on_a_head_sorts_and_another_turns_the_order(many: Page) -> None:
    def numbers(column: int) -> list[Any]:
        cells = many.column(column)
        valued = [cell for cell in cells if cell != "–"]
        assert cells[: len(valued)] == valued, "what has no value comes last"
        if column == 0:
            return [cell.lower() for cell in valued]
        return [float(cell.translate(str.maketrans("−", "-", "%k"))) for cell in valued]

    heads = many.browser.find_elements(By.CSS_SELECTOR, "#runs thead th")
    assert len(heads) == 8
    for column, head in enumerate(heads):
        button = head.find_element(By.TAG_NAME, "button")
        button.click()
        assert head.get_attribute("aria-sort") == "ascending"
        assert numbers(column) == sorted(numbers(column))
        button.send_keys(Keys.ENTER)
        assert head.get_attribute("aria-sort") == "descending"
        assert numbers(column) == sorted(numbers(column), reverse=True)
        assert many.browser.find_elements(By.CSS_SELECTOR, "#runs [aria-sort]") == [head]


def test_the_tradeoff_shows_means_deviations_and_each_run(many: Page) -> None:
    traces = {trace["name"]: trace for trace in many.traces("tradeoff") if "name" in trace}
    assert [*traces] == ["ungated", "L0 only", "batch-shaping"]
    assert traces["ungated"]["mode"] == "lines+markers"
    assert traces["ungated"]["y"] == pytest.approx([0.98])
    assert traces["batch-shaping"]["y"] == pytest.approx([0.97, 0.93])
    assert traces["batch-shaping"]["x"] == pytest.approx([0.55 * DENSE, 0.2 * DENSE])
    bars = traces["batch-shaping"]["error_y"]
    assert bars["visible"] and not traces["L0 only"]["error_y"]["visible"]
    assert bars["array"] == pytest.approx([np.std([0.98, 0.96], ddof=1), 0])
    faint = [trace for trace in many.traces("tradeoff") if "name" not in trace]
    assert [trace["y"] for trace in faint] == [[0.985, 0.975], [0.98, 0.96]]
    assert all(trace["marker"]["opacity"] < 0.5 for trace in faint)
    hover = traces["batch-shaping"]["hovertext"][0]
    for told in ("shaped 0, shaped 1", "accuracy 97.0% ± 1.4%", "440k ± 56.6k", "conditional", "always off"):
        assert told in hover


def test_hostile_names_are_shown_as_text(browser: WebDriver, folder: Path) -> None:
    page = Page(browser, folder / "hostile.html")
    assert page.run("return document.scripts.length") == 3
    assert [option.text for option in page.select("run").options] == [*PAGES["hostile"]]
    assert page.column(0) == [*PAGES["hostile"]]
    ticks = "return [...document.querySelectorAll('#%s .ytick text')].map((tick) => tick.textContent)"
    for figure in ("heatmap", "class-accuracy", "class-multiply-adds"):
        assert page.run(ticks % figure) == [*HOSTILE]
    (first, *_) = RUNS["no name <b>here</b>"]["least"]
    shown = browser.find_element(By.CSS_SELECTOR, "div:not([hidden]) > .images .label")
    assert shown.text == first["label"]
    assert browser.find_elements(By.CSS_SELECTOR, "main b, main script") == []


def test_images_have_alternative_texts_and_mistakes_are_marked(browser: WebDriver, folder: Path) -> None:
    Page(browser, folder / "one.html")
    run = PAGES["one"]["only"]
    items = browser.find_elements(By.CSS_SELECTOR, ".images li")
    expected = [*run["least"], *run["most"]]
    assert any(image["label"] != image["predicted"] for image in expected)
    for item, image in zip(items, expected, strict=True):
        wrong = image["label"] != image["predicted"]
        alt = item.find_element(By.TAG_NAME, "img").get_attribute("alt")
        how = "wrongly" if wrong else "rightly"
        assert alt == f"{image['label']}, {how} classified as {image['predicted']}, with 480k multiply-adds"
        assert (f"✗ as {image['predicted']}" in item.text) == wrong


def test_the_run_can_be_repeated_from_the_page(browser: WebDriver, folder: Path) -> None:
    page = Page(browser, folder / "one.html")
    assert "batchshaping train --config config.yaml" in page.text()
    rows = (
        "return [...document.querySelectorAll('.configuration tr')].map((row) => row.innerText.split('\\t'))"
    )
    shown = dict(page.run(rows))
    run = PAGES["one"]["only"]
    expected = {name: v if isinstance(v, str) else json.dumps(v) for name, v in run["config"].items()}
    assert shown == run["versions"] | expected


def luminance(color: str) -> float:
    return float(np.dot([int(part) for part in re.findall(r"\d+", color)[:3]], [0.2126, 0.7152, 0.0722]))


def test_the_dark_is_dark_and_paper_is_light_and_narrow(browser: WebDriver, folder: Path) -> None:
    page = Page(browser, folder / "one.html", scheme="dark")
    look = """
        return [getComputedStyle(document.body).backgroundColor,
            getComputedStyle(document.querySelector("#histogram .xtick text")).fill,
            document.querySelector("#histogram svg").getBoundingClientRect().width];
    """
    background, text, width = page.run(look)
    assert luminance(background) < 64 and luminance(text) > 192
    page.run(f"addEventListener('beforeprint', () => {{ window.printed = (() => {{{look}}})(); }})")
    browser.execute_cdp_cmd("Page.printToPDF", {})
    background, text, printed = page.run("return window.printed")
    assert luminance(background) > 192 and luminance(text) < 64
    assert printed <= 700 < width
    assert page.run(look)[2] == width
