"""Mixed-scale tokens on canvases and forms: learned gates and priors against chance, a rule and a penalty.

``python benchmarks/mixed_scale/mixed_scale.py`` trains what is not yet in ``results``, one run after the
other: first, for each seed, the ViT with all regions fine; then, from its weights, every way to choose. A run
that was interrupted goes on from its last epoch, and one that is finished is a small file in ``results``, so
that it can be stopped at any time. Then it writes the table, the figures and the report. ``--validate``
evaluates on the validation images instead, with one seed, to choose settings; its results go to ``outputs``.
``--only`` takes names of arms, and ``--summary`` trains nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from batchshaping.figures.masks import draw_region_map
from batchshaping.figures.style import house_style
from batchshaping.report.page import report_html
from batchshaping.training.config import RunConfig
from batchshaping.training.run import read_result, resume, train
from batchshaping.training.threads import using_threads

sys.path.insert(0, str(Path(__file__).parent.parent))

from guide import table, write_table
from kept import by_arm, is_finished, keep

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

SEEDS = (0, 1, 2)
DENSITIES = (0.15, 0.2, 0.3)
ON_FORMS = 0.17
"""Density that is asked for on forms, whose fields have a digit in 1.5 of 9 regions."""

# What all runs share; the rest are the defaults.
SHARED = {
    "network": "msvit-mini",
    "data": "canvases",
    "augment": False,
    "optimizer": "adamw",
    "schedule": "cosine",
    "weight_decay": 0.05,
    "batch_size": 64,
    "scale_layers": 3,
    "penalty": 0.0,
    "shaping": 0.0,
    "logger": "none",
    "teacher": None,
    "recalibrate": False,
}
FROM_NOTHING = {"learning_rate": 2e-3, "epochs": 4}
FROM_FINE = {
    "learning_rate": 1e-3,
    "gate_learning_rate": 4e-3,
    "prior_learning_rate": 0.05,
    "noise_end": 0.8,
    "epochs": 1,
}
REGIONS = {"canvases": 16, "canvases-centred": 16, "forms": 9}
PENALIZED = {"penalized": "open-gates", "budget": 0.0, "penalty_begin": 0.0, "penalty_end": 0.01}
# For 0.15 and 0.2 chosen on the validation images with one seed, so that the share of fine regions is the
# target; for 0.3 a guess, since with so small a weight the gate stays where it starts.
PENALTIES = {0.15: 0.35, 0.2: 0.085, 0.3: 0.02}


def odds(target: float) -> float:
    """The bias with which about this share of the regions is fine at first."""
    return round(math.log(target / (1 - target)), 4)


def learned(target: float, **settings: Any) -> dict[str, Any]:
    """A gate that is learned, from the weights of the ViT with all regions fine."""
    return {**FROM_FINE, "gate_bias": odds(target), **settings}


def shaped(target: float, **settings: Any) -> dict[str, Any]:
    """The same with a batch-shaping loss."""
    return learned(target, shaping=20.0, shaping_end=None, **settings)


def generalized(target: float) -> dict[str, Any]:
    """The same with learned priors, whose hyperprior has the target as its mean."""
    return shaped(target, hyperprior=(round(10 * target, 2), round(10 * (1 - target), 2)))


def arms() -> dict[str, dict[str, Any]]:
    """The settings of each arm by its name."""
    made: dict[str, dict[str, Any]] = {
        "fine": {**FROM_NOTHING, "gated": False},
        "coarse": {**FROM_NOTHING, "gate": "chance", "density": 0.0},
    }
    for target in DENSITIES:
        made |= {
            f"chance-{target}": {**FROM_FINE, "gate": "chance", "density": target},
            f"entropy-{target}": {**FROM_FINE, "gate": "entropy", "density": target},
            f"tokens-{target}": learned(target, **PENALIZED, penalty=PENALTIES[target]),
            f"bas-{target}": shaped(target, prior=(target, round(1 - target, 2))),
            f"gbas-{target}": generalized(target),
        }
    centred = {"data": "canvases-centred"}
    made["fine_centred"] = {**made["fine"], **centred}
    # An epoch more, in which the means of the priors find their order.
    made["gbas_centred-0.2"] = {**made["gbas-0.2"], **centred, "epochs": 2}
    return made | {arm: {**settings, "data": "forms"} for arm, settings in arms_on_forms().items()}


def arms_on_forms() -> dict[str, dict[str, Any]]:
    """Those on forms, with settings of each way to choose that were chosen on the validation images."""
    target = ON_FORMS
    # Two epochs, since a gate has to learn the places too.
    longer = {**FROM_FINE, "epochs": 2, "gate_learning_rate": 1e-2, "prior_learning_rate": 0.1}
    one_prior = {**shaped(target, prior=(target, round(1 - target, 2))), **longer}
    # With its mean at the target, and most of its mass at 0 and at 1.
    hyperprior = one_prior["prior"]
    return {
        "fine_forms": {**FROM_NOTHING, "epochs": 6, "gated": False},
        "coarse_forms": {**FROM_NOTHING, "epochs": 2, "gate": "chance", "density": 0.0},
        f"chance_forms-{target}": {**longer, "gate": "chance", "density": target},
        f"entropy_forms-{target}": {**longer, "gate": "entropy", "density": target},
        f"tokens_forms-{target}": {**learned(target, **PENALIZED, penalty=0.5), **longer},
        f"bas_forms-{target}": one_prior,
        f"weak_forms-{target}": {**one_prior, "shaping": 5.0},
        f"gbas_forms-{target}": {
            **shaped(target, hyperprior=hyperprior, hyperprior_weight=1.0),
            **longer,
        },
    }


SHORT = ("fine", "coarse", *(f"{kind}-0.2" for kind in ("chance", "entropy", "tokens", "bas", "gbas")))
"""The arms in the table of the README."""

CHOICES = {
    "fine": "all fine",
    "coarse": "all coarse",
    "chance": "chance",
    "entropy": "entropy of pixels",
    "tokens": "token penalty, tuned",
    "bas": "batch shaping, one prior",
    "weak": "the same, a quarter of the weight",
    "gbas": "generalized batch shaping",
}
DATA = {"": "", "centred": ", centred objects", "forms": ""}


def parts(arm: str) -> tuple[str, str, str]:
    """How an arm chooses scales, on which data other than canvases, and the target."""
    kind, _, target = arm.partition("-")
    choice, _, data = kind.partition("_")
    return choice, data, target


def on(data: str, found: dict[str, Any]) -> dict[str, Any]:
    """What belongs to the arms on this data."""
    return {arm: value for arm, value in found.items() if parts(arm)[1] == data}


def runs(seeds: tuple[int, ...] = SEEDS, evaluate_on: str = "test") -> Iterator[tuple[str, RunConfig]]:
    """Every run by its name, seed by seed, so that each finished seed is a whole table."""
    for seed in seeds:
        for arm, settings in arms().items():
            config = RunConfig(**{**SHARED, **settings, "seed": seed, "evaluate_on": evaluate_on})
            yield f"{arm}-seed{seed}", config


def starts_from(name: str) -> str | None:
    """The run from whose weights a run starts."""
    arm, _, seed = name.rpartition("-seed")
    choice, data, _ = parts(arm)
    if choice in ("fine", "coarse"):
        return None
    return f"fine{'_' * bool(data)}{data}-seed{seed}"


def finished(path: Path, config: RunConfig) -> bool:
    """Whether there is a result of this very configuration, wherever its start lay."""
    return is_finished(path, config, {"start": None, "start_sha256": None, "teacher_sha256": None})


def run(name: str, config: RunConfig, folders: Path, results: Path) -> str:
    """Train, or go on, and keep what the report shows."""
    folder, first = folders / name, starts_from(name)
    if first is not None:
        config = config.model_copy(update={"start": os.path.relpath(folders / first)})
    going_on = (folder / "config.yaml").exists()
    result = resume(folder) if going_on else train(config, folder)
    result["config"]["start"] = first
    if not name.endswith(f"seed{SEEDS[0]}"):  # pictures once
        result["least"] = result["most"] = []
        if "regions" in result:
            result["regions"]["masks"] = {"least": [], "most": []}
    keep(result, results / f"{name}.json")
    return f"{name}: {told(result)}"


def told(result: dict[str, Any]) -> str:
    """A result in a line."""
    parts = [f"{result['accuracy']:.2%} at {share(result):.1%} of the multiply-adds"]
    if result["gates"]:
        parts.append(f"density {density(result):.3f}")
        parts.append(f"AUC {result['regions']['objects']['auc']:.3f}")
    if result["priors"]:
        parts.append(f"means r = {correlation(result):.3f}")
    return ", ".join(parts)


def correlation(result: dict[str, Any]) -> float:
    """Of the learned means with the share of images that have an object in the region."""
    means, frequency = result["priors"]["mean"], result["regions"]["objects"]["frequency"]
    return float(np.corrcoef(means, frequency)[0, 1])


def share(result: dict[str, Any]) -> float:
    """Multiply-adds, as a share of those of the ViT with all regions fine."""
    return float(result["multiply_adds"] / result["reference"]["multiply_adds"])


def density(result: dict[str, Any]) -> float:
    """Share of regions that are fine."""
    return float(result["gates"]["mean_open"]) if result["gates"] else 1.0


def tokens(result: dict[str, Any]) -> float:
    """Tokens of an image beside the class token: one for a coarse region, four for a fine one."""
    return REGIONS[result["config"]["data"]] * (1 + 3 * density(result))


def spread(
    results: list[dict[str, Any]], metric: Callable[[dict[str, Any]], float], digits: int, scale: float = 1.0
) -> str:
    """Mean and standard deviation of a metric over the seeds."""
    values = [scale * metric(result) for result in results]
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def summarize(found: dict[str, list[dict[str, Any]]]) -> str:
    """The table, one row an arm."""
    rows = []
    for arm, results in found.items():
        choice, data, target = parts(arm)
        gated = choice not in ("fine", "coarse")
        rows.append(
            [
                CHOICES[choice] + DATA[data],
                target,
                str(len(results)),
                spread(results, density, 3) if gated else "",
                spread(results, tokens, 1),
                spread(results, share, 1, 100),
                spread(results, lambda result: result["accuracy"], 1, 100),
                spread(results, lambda result: result["regions"]["objects"]["auc"], 3) if gated else "",
                spread(results, correlation, 2) if choice == "gbas" else "",
            ]
        )
    (regions,) = {REGIONS[result["config"]["data"]] for results in found.values() for result in results}
    header = ["scales chosen by", "target", "seeds", "density", f"tokens of {4 * regions}"]
    return table([*header, "multiply-adds, %", "test accuracy, %", "AUC", "r"], rows)


def draw(found: dict[str, list[dict[str, Any]]]) -> Figure:
    """Accuracy against multiply-adds, with the standard deviation over seeds."""
    with house_style():
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for choice, marker in zip(CHOICES, "sXv^DoPd", strict=True):
            points = sorted(point(results) for arm, results in found.items() if parts(arm)[0] == choice)
            if points:
                spent, accuracies, deviations = zip(*points, strict=True)
                axes.errorbar(
                    spent,
                    accuracies,
                    deviations,
                    label=CHOICES[choice],
                    marker=marker,
                    capsize=3,
                    markersize=5,
                )
        axes.set(
            xlabel="multiply-adds of the ViT with all regions fine, %",
            ylabel="test accuracy, %",
            xlim=(0, 103),
            ylim=(0, 100),
        )
        axes.legend(loc="lower right")
    return figure


def point(results: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Mean share of multiply-adds and mean accuracy in percent, and the accuracy's standard deviation."""
    accuracies = [100 * result["accuracy"] for result in results]
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return 100 * statistics.fmean(map(share, results)), statistics.fmean(accuracies), deviation


def draw_maps(results: dict[str, dict[str, Any]]) -> Figure:
    """Where objects are, what the last of the results learned of it, and where regions are fine in each.

    Args:
        results: a result, under the title of the map of its fine regions.
    """
    *_, learned_one = results.values()
    maps = {
        "has an object": learned_one["regions"]["objects"]["frequency"],
        "learned mean of the prior": learned_one["priors"]["mean"],
        **{title: share_fine(result) for title, result in results.items()},
    }
    highest = max(float(np.max(values)) for values in maps.values())
    with house_style():
        figure = Figure(figsize=(2.4 * len(maps), 2.6), layout="constrained")
        for ax, (title, values) in zip(figure.subplots(1, len(maps)), maps.items(), strict=True):
            grid = np.reshape(values, learned_one["regions"]["grid"])
            draw_region_map(ax, grid, title, highest)
    return figure


def share_fine(result: dict[str, Any]) -> Any:
    """Share of the images in which each region is fine."""
    by_class = result["by_class"]
    weights = [each["examples"] for each in by_class]
    return np.average([each["open"][0] for each in by_class], axis=0, weights=weights)


def main() -> None:
    """Run what is missing and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--validate", action="store_true", help="on validation images, with one seed")
    parser.add_argument("--only", nargs="+", default=[*arms()], choices=[*arms()], help="arms to train")
    parser.add_argument("--summary", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    folders = ROOT / "outputs" / ("mixed_scale-validation" if arguments.validate else "mixed_scale")
    results = folders / "results" if arguments.validate else HERE / "results"
    for folder in (folders, results):
        folder.mkdir(parents=True, exist_ok=True)
    wanted = dict(runs((0,), "validation") if arguments.validate else runs())
    if not arguments.summary:
        missing = [
            (name, config)
            for name, config in wanted.items()
            if name.rpartition("-seed")[0] in arguments.only
            and not finished(results / f"{name}.json", config)
        ]
        with using_threads(1):
            for done, (name, config) in enumerate(missing, start=1):
                print(f"{done}/{len(missing)} {run(name, config, folders, results)}", flush=True)
    kept = {
        name: read_result(results / f"{name}.json")
        for name, config in wanted.items()
        if finished(results / f"{name}.json", config)
    }
    print(f"{len(kept)} of {len(wanted)} runs are finished")
    if not kept:
        return
    found = by_arm(kept, arms())
    tables = {"mixed scale": {**on("", found), **on("centred", found)}, "forms": on("forms", found)}
    summaries = {name: summarize(results) for name, results in tables.items() if results}
    print(*summaries.values(), sep="\n\n")
    pictures = folders if arguments.validate else ROOT / "docs" / "figures"
    draw(on("", found)).savefig(pictures / "mixed_scale.svg")
    maps = {
        "mixed_scale_priors": {"is fine": "gbas_centred-0.2"},
        "mixed_scale_forms": {
            "is fine, one prior": f"bas_forms-{ON_FORMS}",
            "is fine, learned priors": f"gbas_forms-{ON_FORMS}",
        },
    }
    for name, shown in maps.items():
        if found.keys() >= {*shown.values()}:
            # Of the first seed.
            draw_maps({title: found[arm][0] for title, arm in shown.items()}).savefig(
                pictures / f"{name}.svg"
            )
    if not arguments.validate:
        for name, summary in summaries.items():
            write_table(ROOT / "docs" / "mixed_scale.md", name, summary)
        short = {arm: results for arm, results in found.items() if arm in SHORT}
        write_table(ROOT / "README.md", "mixed scale", summarize(short))
    page = folders / "mixed_scale.html"
    page.write_text(report_html(kept), encoding="utf-8")
    print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
