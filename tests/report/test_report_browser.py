"""The report in a browser: what a reader sees and does."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_results import BINS, DENSE, HOSTILE, LAYERS, latency, of_two_scales, result, stated
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import Select

from batchshaping.report.page import prior_masses, write_report

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
    "hostile": {
        name: stated(RUNS["no name <b>here</b>"], kind=HOSTILE[0] if i == 1 else "channel gating")
        | {"reference": {"name": name, "multiply_adds": DENSE}}
        for i, name in enumerate((*HOSTILE, "x" * 200))
    },
    # No two of them differ by their seed only, and their accuracies are equal.
    "few": {"a": result(budget=0.2), "b": result(budget=0.3, share=0.3), "c": result(gated=False)},
    # Other data, and a kind that nobody knows.
    "mixed": {
        **{f"digits {seed}": result(seed=seed, share=0.5 + seed / 10) for seed in range(3)},
        "fashion": result(data="fashion-mnist", epochs=5),
        "fashion, wide": result(data="fashion-mnist", width=32, gated=False),
        "unknown": stated(result(data="fashion-mnist", share=0.2), "of the future"),
    },
    # Times were measured of one of them.
    "timed": {"a": RUNS["shaped 0"] | {"latency": latency()}, "b": RUNS["L0"]},
}
OF_GATES = {"layers": 4, "histogram": 2, "multiply-adds": 2, "open": 2, "weights": 3, "heatmap": 1}
OF_GATES["class-multiply-adds"] = 1
OF_ALL = {"accuracy": 1, "class-accuracy": 1}
# How many curves the figures have.
TRADEOFF = {
    "many": {"tradeoff-0": 3},
    "hostile": {"tradeoff-0": 2},
    "few": {"tradeoff-0": 2},
    "mixed": {"tradeoff-1": 3},
    "timed": {"tradeoff-0": 2, "latency": 2},
}


SCALES = {
    "fine": of_two_scales(gated=False),
    **{f"learned {s}": of_two_scales(seed=s, hyperprior=(2, 8), share=0.4) for s in range(2)},
    "gated": result(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    for name, results in PAGES.items():
        write_report(copy.deepcopy(results), folder / f"{name}.html")
    return folder


class Page:
    """A report that is open in a tab of the browser."""

    def __init__(self, browser: WebDriver, path: Path, scheme: str = "light") -> None:
        browser.switch_to.new_window("tab")
        self.browser = browser
        self.tab = browser.current_window_handle
        self.name = path.stem
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

    def show(self) -> None:
        self.browser.switch_to.window(self.tab)
        self.browser.execute_cdp_cmd("Page.bringToFront", {})

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
        return str(self.run("return document.querySelector('main').innerText"))

    def rows(self) -> list[list[str]]:
        """The rows of the tables of runs that are to be seen, of each cell its first line."""
        script = """
            return [...document.querySelectorAll(".runs tbody tr")]
                .filter((row) => row.checkVisibility())
                .map((row) => [...row.cells].map((cell) => (cell.querySelector("button") ?? cell).innerText));
        """
        return [[cell.splitlines()[0] for cell in row] for row in self.run(script)]

    def column(self, index: int) -> list[str]:
        return [row[index] for row in self.rows()]

    def open_all(self) -> None:
        self.browser.find_element(By.CLASS_NAME, "open-all").click()

    def reset(self) -> None:
        """Undo what a reader did, which is faster than to load the page again."""
        self.run("""
            const tables = [...document.querySelectorAll(".runs")];
            const select = document.getElementById("run");
            window.untouched ??= { run: select.value, bodies: tables.map((table) => [...table.tBodies]) };
            tables.forEach((table, i) => table.append(...window.untouched.bodies[i]));
            for (const head of document.querySelectorAll("[aria-sort]")) head.removeAttribute("aria-sort");
            const button = document.querySelector(".open-all");
            button.click();
            if (button.getAttribute("aria-expanded") === "true") button.click();
            for (const layer of document.querySelectorAll("select.layer")) layer.selectedIndex = 0;
            select.value = window.untouched.run;
            select.dispatchEvent(new Event("change"));
        """)


@pytest.fixture(scope="module")
def pages(browser: WebDriver, folder: Path) -> Callable[[str], Page]:
    """Shows the page of a name, which is loaded once."""

    @cache
    def load(name: str) -> Page:
        return Page(browser, folder / f"{name}.html")

    def show(name: str) -> Page:
        load(name).show()
        return load(name)

    return show


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest, pages: Callable[[str], Page]) -> Page:
    """Each page in turn; what is tested of it leaves it as it is."""
    return pages(request.param)


@pytest.fixture
def many(pages: Callable[[str], Page]) -> Page:
    """The page of many runs as it was when it was opened."""
    opened = pages("many")
    opened.reset()
    return opened


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
    ungated = "This run has no gates." in page.text()
    expected = OF_ALL | TRADEOFF.get(page.name, {}) | ({} if ungated else OF_GATES)
    assert page.figures() == expected


def test_every_control_has_a_name(page: Page) -> None:
    nameless = """
        return [...document.querySelectorAll("select, input, button, .chart, [tabindex]")]
            .filter((element) => !element.labels?.length && !element.getAttribute("aria-label"))
            .filter((element) => element.tagName !== "BUTTON" || !element.textContent.trim())
            .map((element) => element.outerHTML);
    """
    assert page.run(nameless) == []


def test_no_two_elements_have_the_same_id(page: Page) -> None:
    ids = page.run("return [...document.querySelectorAll('[id]')].map((element) => element.id)")
    # Plotly gives ids of its own to what it draws.
    ours = [each for each in ids if not re.search(r"[0-9a-f]{6}", each)]
    assert len(ours) == len(set(ours)) > 0
    pointed = """
        return ["aria-controls", "aria-labelledby", "for"].flatMap((name) =>
            [...document.querySelectorAll(`[${name}]`)].map((element) => element.getAttribute(name)));
    """
    assert set(page.run(pointed)) <= set(ours)


def test_the_figure_comes_before_the_table(page: Page) -> None:
    tops = """
        return [...document.querySelectorAll(".comparison")].map((part) =>
            [".tradeoff", ".runs"].map((each) => part.querySelector(each)?.getBoundingClientRect().top));
    """
    found = page.run(tops)
    assert len(found) == {"one": 0, "ungated": 0, "mixed": 2}.get(page.name, 1)
    assert all(figure is None or figure < table for figure, table in found)
    if page.name in ("many", "few"):
        assert found[0][0] < 300, "nothing but the headline is above it"


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
    assert many.figures() == TRADEOFF["many"] | OF_ALL
    assert "This run has no gates." in many.text()
    many.select("run").select_by_visible_text("L0")
    assert many.figures() == TRADEOFF["many"] | OF_GATES | OF_ALL
    assert "to which this run was not shaped" in many.text()


def test_a_run_can_be_chosen_in_the_table(many: Page) -> None:
    many.open_all()
    many.browser.find_element(By.XPATH, "//button[@data-choose and text()='L0']").send_keys(Keys.ENTER)
    assert many.select("run").first_selected_option.text == "L0"
    assert many.traces("layers")[0]["x"] == [layer["always_on"] for layer in RUNS["L0"]["layers"]]


NAMES = {
    "ungated": ["wide 0", "wide 1"],
    "gates, no batch shaping, budget 40%": ["L0"],
    "gates, batch shaping 0.75, budget 30%": ["no name <b>here</b>"],
    "gates, batch shaping 0.75, budget 40%": ["shaped 0", "shaped 1"],
}


def test_the_table_has_a_row_for_each_setting(many: Page) -> None:
    rows = dict(zip(NAMES, many.rows(), strict=True))
    assert [row[0] for row in rows.values()] == [*NAMES]
    assert rows["ungated"][1:] == ["98.0%", "800k", "100.0%", "–", "–", "–", "–"]
    assert rows["gates, no batch shaping, budget 40%"][1:5] == ["97.0%", "240k", "30.0%", "−1.0"]
    assert rows["gates, batch shaping 0.75, budget 40%"][1:5] == ["97.0%", "440k", "55.0%", "−1.0"]
    gates = [RUNS[f"shaped {seed}"]["gates"] for seed in range(2)]
    for column, share in ((5, "conditional"), (6, "always_on"), (7, "always_off")):
        mean = np.mean([of[share] for of in gates])
        assert rows["gates, batch shaping 0.75, budget 40%"][column] == f"{mean:.1%}"
    heads = "return [...document.querySelectorAll('.runs .setting')].map((row) => row.cells[0].innerText)"
    assert [head.splitlines()[1] for head in many.run(heads)] == [
        "ungated, 2 seeds",
        "L0 only, 1 seed",
        "batch-shaping, 1 seed",
        "batch-shaping, 2 seeds",
    ]
    cells = "return [...document.querySelectorAll('.runs .setting')].map((row) => row.cells[1].innerText)"
    deviations = [
        f"± {100 * np.std(accuracies, ddof=1):.1f}" for accuracies in ([0.985, 0.975], [0.98, 0.96])
    ]
    assert [cell.split("\n")[1:] for cell in many.run(cells)] == [deviations[:1], [], [], deviations[1:]]


def test_a_setting_opens_to_its_runs_by_keyboard(many: Page) -> None:
    for name, runs in NAMES.items():
        opener = many.browser.find_element(By.XPATH, f"//button[text()='{name}']")
        assert opener.get_attribute("aria-expanded") == "false"
        opener.send_keys(Keys.ENTER)
        assert opener.get_attribute("aria-expanded") == "true"
        assert [row[0] for row in many.rows() if row[0] in RUNS] == runs
        opener.send_keys(Keys.SPACE)
        assert many.column(0) == [*NAMES]
    many.open_all()
    assert many.column(0) == [*chain.from_iterable([name, *runs] for name, runs in NAMES.items())]
    shown = {row[0]: row for row in many.rows()}
    assert shown["shaped 1"][1:5] == ["96.0%", "400k", "50.0%", "−2.0"]
    for column, share in ((5, "conditional"), (6, "always_on"), (7, "always_off")):
        assert shown["shaped 1"][column] == f"{RUNS['shaped 1']['gates'][share]:.1%}"
    many.open_all()
    assert many.column(0) == [*NAMES]


def test_paper_shows_the_runs_of_every_setting(many: Page) -> None:
    listener = """
        addEventListener("beforeprint", () => {
            const rows = [...document.querySelectorAll(".runs tr.run")];
            const visible = rows.filter((row) => row.checkVisibility());
            const right = (selector) => document.querySelector(selector).getBoundingClientRect().right;
            window.printed = [visible.length, right(".runs") <= right("main")];
        }, { once: true });
    """
    many.run(listener)
    many.browser.execute_cdp_cmd("Page.printToPDF", {})
    assert many.run("return window.printed") == [len(RUNS), True]
    assert many.column(0) == [*NAMES]


def test_a_phone_shows_setting_accuracy_and_multiply_adds_at_once(many: Page) -> None:
    many.resize(360)
    right = "return document.querySelector('.runs .setting').cells[2].getBoundingClientRect().right"
    assert many.run(right) <= 360
    many.resize(1280)


def test_a_click_on_a_head_sorts_and_another_turns_the_order(many: Page) -> None:
    def numbers(column: int) -> list[Any]:
        cells = many.column(column)
        valued = [cell for cell in cells if cell != "–"]
        assert cells[: len(valued)] == valued, "what has no value comes last"
        if column == 0:
            return [cell.lower() for cell in valued]
        return [float(cell.translate(str.maketrans("−", "-", "%k"))) for cell in valued]

    heads = many.browser.find_elements(By.CSS_SELECTOR, ".runs thead th")
    assert len(heads) == 8
    for column, head in enumerate(heads):
        button = head.find_element(By.TAG_NAME, "button")
        button.click()
        assert head.get_attribute("aria-sort") == "ascending"
        assert numbers(column) == sorted(numbers(column))
        button.send_keys(Keys.ENTER)
        assert head.get_attribute("aria-sort") == "descending"
        assert numbers(column) == sorted(numbers(column), reverse=True)
        assert many.browser.find_elements(By.CSS_SELECTOR, ".runs [aria-sort]") == [head]
    # Runs stay with their settings.
    many.open_all()
    names = many.column(0)
    for name, runs in NAMES.items():
        start = names.index(name) + 1
        assert names[start : start + len(runs)] == runs


def test_the_tradeoff_shows_a_point_for_each_setting_with_its_deviations(many: Page) -> None:
    traces = {trace["name"]: trace for trace in many.traces("tradeoff-0")}
    assert [*traces] == ["ungated", "L0 only", "batch-shaping"]
    assert traces["ungated"]["mode"] == "lines+markers"
    assert traces["ungated"]["y"] == pytest.approx([0.98])
    shaped = traces["batch-shaping"]
    assert shaped["y"] == pytest.approx([0.93, 0.97])
    assert shaped["x"] == pytest.approx([0.2 * DENSE, 0.55 * DENSE])
    for bars, values in ((shaped["error_y"], [0.98, 0.96]), (shaped["error_x"], [0.6 * DENSE, 0.5 * DENSE])):
        none, deviation = bars["array"]
        assert bars["visible"] and none is None  # NaN, which JSON has not
        assert deviation == pytest.approx(np.std(values, ddof=1))
    assert not traces["L0 only"]["error_y"]["visible"]
    # Nothing is drawn where there is no deviation: of the two points of the curve, one has bars.
    drawn = "return document.querySelectorAll('#tradeoff-0 .errorbar path.yerror').length"
    assert many.run(drawn) == 2
    hover = shaped["hovertext"][1]
    for told in ("shaped 0, shaped 1", "accuracy 97.0% ± 1.4", "440k ± 57k", "conditional", "always off"):
        assert told in hover


def test_runs_with_one_seed_each_have_a_row_each_and_no_error_bars(pages: Callable[[str], Page]) -> None:
    page = pages("few")
    assert page.column(0) == ["c", "b", "a"]
    assert not any(trace["error_y"]["visible"] for trace in page.traces("tradeoff-0"))
    assert page.run("return document.querySelectorAll('#tradeoff-0 .errorbar path').length") == 0
    assert "Each point is a setting with a single seed, so there are no error bars." in page.text()
    assert "±" not in page.browser.find_element(By.CLASS_NAME, "runs").text
    # Equal accuracies do not stretch the axis beyond what an accuracy can be.
    low, high = page.run("return document.getElementById('tradeoff-0').layout.yaxis.range")
    assert 0.9 < low < 0.98 < high < 1.01


def test_runs_on_other_data_and_of_unknown_kinds_are_apart(pages: Callable[[str], Page]) -> None:
    page = pages("mixed")
    heads = page.run(
        "return [...document.querySelectorAll('.comparison h2')].map((head) => head.textContent)"
    )
    assert heads == ["Runs on digits", "Accuracy against multiply-adds on fashion-mnist"]
    assert page.column(0) == [
        "batch-shaping",
        *(f"digits {seed}" for seed in range(3)),
        "fashion, wide",
        "fashion",
        "unknown",
    ]
    assert page.column(1) == ["98.0%"] * 7
    page.select("run").select_by_visible_text("unknown")
    assert page.figures() == TRADEOFF["mixed"] | {"accuracy": 1, "multiply-adds": 2}
    assert "Pictures of runs of the kind “of the future” are not known" in page.text()
    page.select("run").select_by_visible_text("fashion")
    assert page.figures() == TRADEOFF["mixed"] | OF_GATES | OF_ALL
    assert "are not known" not in page.text()


def test_hostile_names_are_shown_as_text(pages: Callable[[str], Page]) -> None:
    page = pages("hostile")
    assert page.run("return document.scripts.length") == 3
    assert [option.text for option in page.select("run").options] == [*PAGES["hostile"]]
    page.open_all()
    first, *hostile = [row[0] for row in page.rows()]
    assert first == "batch-shaping"
    assert set(hostile) == {*PAGES["hostile"]}
    assert [trace["name"] for trace in page.traces("tradeoff-0")] == ["batch-shaping", "&lt;script&gt;"]
    ticks = "return [...document.querySelectorAll('#%s .ytick text')].map((tick) => tick.textContent)"
    for figure in ("heatmap", "class-accuracy", "class-multiply-adds"):
        assert page.run(ticks % figure) == [*HOSTILE]
    (image, *_) = RUNS["no name <b>here</b>"]["least"]
    shown = page.browser.find_element(By.CSS_SELECTOR, "div:not([hidden]) > .images .label")
    assert shown.text == image["label"]
    assert f"Pictures of runs of the kind “{HOSTILE[0]}”" in page.run("return document.body.textContent")
    assert page.browser.find_elements(By.CSS_SELECTOR, "main b, main script") == []


def test_images_have_alternative_texts_and_mistakes_are_marked(pages: Callable[[str], Page]) -> None:
    page = pages("one")
    run = PAGES["one"]["only"]
    items = page.browser.find_elements(By.CSS_SELECTOR, ".images li")
    expected = [*run["least"], *run["most"]]
    assert any(image["label"] != image["predicted"] for image in expected)
    for item, image in zip(items, expected, strict=True):
        wrong = image["label"] != image["predicted"]
        alt = item.find_element(By.TAG_NAME, "img").get_attribute("alt")
        how = "wrongly" if wrong else "rightly"
        assert alt == f"{image['label']}, {how} classified as {image['predicted']}, with 480k multiply-adds"
        assert (f"✗ as {image['predicted']}" in item.text) == wrong


def test_the_run_can_be_repeated_from_the_page(pages: Callable[[str], Page]) -> None:
    page = pages("one")
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


# Latency


def test_the_times_are_those_of_the_chosen_run(pages: Callable[[str], Page]) -> None:
    page = pages("timed")
    measured = latency()
    points, line = page.traces("latency")
    assert points["x"] == measured["multiply_adds"]
    assert points["y"] == pytest.approx([1e3 * time for time in measured["seconds"]["conditional"]])
    assert line["y"] == pytest.approx([1e3 * float(np.median(measured["seconds"]["dense"]))] * 2)
    assert "40 test images" in page.text() and "Not measured for this run" not in page.text()
    page.select("run").select_by_visible_text("b")
    assert "latency" not in page.figures()
    assert "40 test images" not in page.text() and "Not measured for this run" in page.text()


def test_runs_of_two_scales_have_maps_and_masks(browser: WebDriver, tmp_path: Path) -> None:
    write_report(copy.deepcopy(SCALES), tmp_path / "scales.html")
    page = Page(browser, tmp_path / "scales.html")
    assert page.errors == []
    of_scales = {"region-maps": 3, "fine": 1, "scale-weights": 3, "accuracy": 1, "multiply-adds": 2}
    assert page.figures() == {"tradeoff-0": 3} | of_scales
    shown = SCALES["learned 0"]
    assert [np.ravel(trace["z"]).tolist() for trace in page.traces("region-maps")[1:]] == [
        shown["priors"]["mean"],
        shown["regions"]["objects"]["frequency"],
    ]
    # A mask covers its image, and a square of it the part of the image that is the region.
    covered = """
        return [...document.querySelectorAll(".picture")].filter((picture) => picture.checkVisibility())
            .map((picture) => [...picture.children].map((part) => part.getBoundingClientRect()))
            .map(([image, mask]) => [image.x - mask.x, image.y - mask.y, image.width - mask.width,
                image.height - mask.height]);
    """
    assert np.abs(page.run(covered)).max() < 1 and len(page.run(covered)) == 8
    page.select("run").select_by_visible_text("fine")
    assert "All regions of this run are fine." in page.text()
    assert page.figures() == {"tradeoff-0": 3, "accuracy": 1}
    page.select("run").select_by_visible_text("gated")
    assert "layers" in page.figures() and "region-maps" not in page.figures()
    for width in (360, 1280):
        page.resize(width)
        assert page.run("return document.documentElement.scrollWidth") <= width
