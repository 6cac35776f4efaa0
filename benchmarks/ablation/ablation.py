"""Accuracy against multiply-adds on Fashion-MNIST: ungated networks, L0-only gates, and gates with the loss.

``python benchmarks/ablation/ablation.py`` trains what is not yet in ``results``, one run a core, and then
writes the table, the figure and the report. Finished runs are small files there, so that it can be
interrupted at any time. ``--quick`` trains a tenth of the images with one seed, in about ten minutes, and
leaves ``results`` alone. ``--summary`` trains nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter

from batchshaping.figures.style import house_style
from batchshaping.report.page import report_html
from batchshaping.training.config import RunConfig
from batchshaping.training.run import read_result, train
from batchshaping.training.threads import using_threads

sys.path.insert(0, str(Path(__file__).parent.parent))

from guide import table, write_table
from kept import by_arm, is_finished, keep

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

SEEDS = (0, 1, 2)
WIDTHS = (3, 4, 6, 8)
BUDGETS = (0.2, 0.3, 0.4, 0.6)

# What all runs share; the rest are the defaults.
SHARED = {
    "data": "fashion-mnist",
    "network": "resnet8",
    "stem_stride": 2,
    "epochs": 16,
    "batch_size": 128,
    "schedule": "cosine",
    "evaluate_every": 4,
    "teacher": None,
    "recalibrate": False,
    "logger": "none",
}
GATED = {"width": 8, "penalty": 5.0}

ARMS: dict[str, dict[str, Any]] = {
    **{f"ungated-{width}": {"gated": False, "width": width} for width in WIDTHS},
    **{f"l0-{budget}": {**GATED, "budget": budget, "shaping": 0.0} for budget in BUDGETS},
    **{f"bas-{budget}": {**GATED, "budget": budget} for budget in BUDGETS},
}
KINDS = {"ungated": "ungated", "l0": "gated, L0 only", "bas": "gated, batch-shaping"}
TICKS = (0.1, 0.2, 0.3, 0.4, 0.6)


def runs(quick: bool) -> Iterator[tuple[str, RunConfig]]:
    """Every run by its name, seed by seed, so that each finished seed is a whole curve."""
    for seed in SEEDS[:1] if quick else SEEDS:
        for arm, settings in ARMS.items():
            fewer = {"train_images": 6000, "batch_size": 64} if quick else {}
            yield f"{arm}-seed{seed}", RunConfig(**{**SHARED, **settings, **fewer, "seed": seed})


def run(name: str, config: RunConfig, folder: Path) -> str:
    """Train, and keep what the report shows; the images only once."""
    with tempfile.TemporaryDirectory() as scratch:
        result = train(config, Path(scratch) / "run")
    if config.seed != SEEDS[0]:
        result["least"] = result["most"] = []
    keep(result, folder / f"{name}.json")
    return f"{name}: {result['accuracy']:.2%} at {result['multiply_adds'] / 1e6:.3f} M"


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def summarize(arms: dict[str, list[dict[str, Any]]]) -> str:
    """The table, one row an arm."""
    rows = []
    for arm, results in arms.items():
        kind, _, setting = arm.partition("-")
        gates = [result["gates"] for result in results if result["gates"]]
        rows.append(
            [
                KINDS[kind],
                f"width {setting}" if kind == "ungated" else f"{float(setting):.0%}",
                spread([result["multiply_adds"] / 1e6 for result in results], 3),
                spread([100 * result["accuracy"] for result in results], 2),
                f"{above_ungated(results, arms):+.1f}" if gates else "",
                *(
                    spread([100 * gate[share] for gate in gates], 0) if gates else ""
                    for share in ("conditional", "always_on", "always_off")
                ),
                spread([hard_over_easy(result) for result in results], 2) if gates else "",
            ]
        )
    header = ["network", "width or budget", "million multiply-adds", "test accuracy, %"]
    shares = ["conditional, %", "always on, %", "always off, %"]
    return table([*header, "above ungated", *shares, "hard over easy classes"], rows)


def above_ungated(results: list[dict[str, Any]], arms: dict[str, list[dict[str, Any]]]) -> float:
    """Points of accuracy above the ungated curve, which is linear in the logarithm of multiply-adds."""
    curve = sorted(point(ungated) for arm, ungated in arms.items() if arm.startswith("ungated-"))
    macs, accuracies, _ = zip(*curve, strict=True)
    spent, accuracy, _ = point(results)
    return float(accuracy - np.interp(np.log(spent), np.log(macs), accuracies))


def hard_over_easy(result: dict[str, Any]) -> float:
    """Mean multiply-adds of the five classes with the lowest accuracy over those of the other five."""
    spent = [figures["multiply_adds"] for figures in sorted(result["by_class"], key=lambda f: f["accuracy"])]
    return statistics.fmean(spent[:5]) / statistics.fmean(spent[5:])


def point(results: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Mean multiply-adds in millions, mean accuracy in percent and its standard deviation over seeds."""
    accuracies = [100 * result["accuracy"] for result in results]
    macs = statistics.fmean(result["multiply_adds"] / 1e6 for result in results)
    return macs, statistics.fmean(accuracies), statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0


def draw(
    arms: dict[str, list[dict[str, Any]]], kinds: dict[str, str] = KINDS, ticks: Sequence[float] = TICKS
) -> Figure:
    """Accuracy against multiply-adds, with the standard deviation over seeds, one curve a kind."""
    with house_style():
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        for (kind, label), marker in zip(kinds.items(), "svodPX^"[: len(kinds)], strict=True):
            points = sorted(point(results) for arm, results in arms.items() if arm.startswith(f"{kind}-"))
            if not points:
                continue
            macs, accuracies, deviations = zip(*points, strict=True)
            axes.errorbar(macs, accuracies, deviations, label=label, marker=marker, capsize=3, markersize=5)
        axes.set(
            xscale="log",
            xlabel="million multiply-adds an image, mean over the test set",
            ylabel="test accuracy, %",
        )
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def main() -> None:
    """Run what is missing and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the images, one seed")
    parser.add_argument("--summary", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, help="folder of the results")
    arguments = parser.parse_args()
    kept = ROOT / "outputs" / "ablation-quick" if arguments.quick else HERE / "results"
    folder = arguments.output or kept
    # The pictures of all runs go to where they are shown, those of a trial beside its results.
    pages = ROOT / "outputs" / "ablation" if folder == HERE / "results" else folder
    for made in (folder, pages):
        made.mkdir(parents=True, exist_ok=True)
    wanted = dict(runs(arguments.quick))
    if not arguments.summary:
        train_missing(wanted, folder)
    results = {
        name: read_result(folder / f"{name}.json")
        for name, config in wanted.items()
        if is_finished(folder / f"{name}.json", config)
    }
    print(f"{len(results)} of {len(wanted)} runs are finished")
    arms = by_arm(results, ARMS)
    print(summarize(arms))
    figure = draw(arms)
    if pages == folder:
        figure.savefig(folder / "ablation.svg")
    else:
        figure.savefig(ROOT / "docs" / "figures" / "ablation.svg")
        write_table(ROOT / "docs" / "channel_gating.md", "ablation", summarize(arms))
    page = pages / "ablation.html"
    page.write_text(report_html(results), encoding="utf-8")
    print(f"wrote {page}")


def train_missing(wanted: dict[str, RunConfig], folder: Path) -> None:
    """Two runs at a time, each on its own core."""
    missing = {n: c for n, c in wanted.items() if not is_finished(folder / f"{n}.json", c)}
    if not missing:
        return
    workers = min(len(missing), os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with using_threads(1), ProcessPoolExecutor(workers, mp_context=spawn, max_tasks_per_child=1) as pool:
        waiting = [pool.submit(run, name, config, folder) for name, config in missing.items()]
        for done, future in enumerate(as_completed(waiting), start=1):
            print(f"{done}/{len(missing)} {future.result()}", flush=True)


if __name__ == "__main__":
    main()
