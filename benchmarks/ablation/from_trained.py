"""The ablation again, from trained weights and with a teacher: what gates gain over a network as thin.

``python benchmarks/ablation/from_trained.py`` trains what is not yet in ``from_trained``, seed by seed, and
writes the tables and the figures of the guide. Every network of a series is taught by the same one. Networks
with gates start from its weights and are trained for as many epochs again; its rivals are thinner networks
without gates, which have all these epochs for themselves, as have networks with gates that start from random
weights. Finished runs are small files, so that it can be interrupted at any time. ``--times`` measures how
long an image takes in the networks that were trained here, with one thread, those of a seed in turn (all of
them would be in each other's way in the cache), and keeps that with their results. ``--summary`` trains
nothing.

Fashion-MNIST is the series that is trained without an argument. Those on CIFAR-10, where width counts for
more, need the binary version of the data, in ``--data-folder`` or by ``--download``. Those on Chinese
characters ask at which width, depth and number of classes gates begin to win; they need the fonts that
``characters.py`` lists, in ``--fonts``. That on clothes and characters, half of each, asks what gates gain
where images differ in kind; it needs both.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter
from torch import Tensor, nn

import batchshaping as bs
from batchshaping.figures.style import house_style
from batchshaping.gates.dense import dense_inference
from batchshaping.gates.gate import Gate
from batchshaping.training.config import RunConfig
from batchshaping.training.data import load_data
from batchshaping.training.latency import seconds_of_images
from batchshaping.training.run import load_run, read_result, resume, train
from batchshaping.training.sections import DataSettings
from batchshaping.training.threads import using_threads

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import ablation
import characters
from guide import table, write_table
from kept import by_arm, is_finished, keep

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PAGE = ROOT / "docs" / "channel_gating.md"
FIGURES = ROOT / "docs" / "figures"
RESULTS = HERE / "from_trained"
FOLDERS = ROOT / "outputs" / "ablation-from-trained"

TEACHER = "teacher"
FRESH = "fresh"
"""How the kinds of gates begin that do not start from the teacher's weights: they have all the epochs of
their rivals."""
KINDS: dict[str, dict[str, Any]] = {
    "bas": {},
    "l0": {"shaping": 0.0},
    "groups": {"gates_per_layer": 8},
    FRESH: {},
    f"{FRESH}_l0": {"shaping": 0.0},
}
"""The kinds of gates, and the settings in which each differs from the first."""
NAMES = {
    TEACHER: "the teacher",
    "ungated": "ungated, taught",
    "narrow": "ungated, narrow inside its blocks, taught",
    "l0": "gated, L0 only",
    "bas": "gated, batch-shaping",
    "groups": "gated, batch-shaping, eight gates a layer",
    FRESH: "gated, batch-shaping, from random weights",
    f"{FRESH}_l0": "gated, L0 only, from random weights",
}

CLOTHES = 10
"""Number of classes of clothes, which come first where there are also characters."""

QUARTER = 0.25
"""Share of multiply-adds in the series on characters, and of inner channels in what is narrow inside."""

_BY_WIDTH = (TEACHER, "ungated")
"""The kinds of networks whose setting is a width."""


@dataclass(frozen=True)
class Series:
    """Networks of one depth on one data set.

    Attributes:
        data: name of the data set.
        network: name of the network.
        epochs: epochs of the teacher, and again of a network with gates that starts from it; all others have
            twice as many.
        widths: widths of the rivals.
        budgets: shares of the teacher's multiply-adds.
        kinds: kinds of gates.
        seeds: seeds.
        width: width of the teacher and of the networks with gates.
        classes: number of Chinese characters, where these are the data.
        clothes: whether half of the images are those of Fashion-MNIST instead.
        inner: shares of inner channels of rivals as wide as the teacher, but narrow inside their blocks: of
            the form that gates give, without gates.
    """

    data: str
    network: str
    epochs: int
    widths: tuple[int, ...]
    budgets: tuple[float, ...]
    kinds: tuple[str, ...]
    seeds: tuple[int, ...]
    width: int = 16
    classes: int | None = None
    clothes: bool = False
    inner: tuple[float, ...] = ()

    @property
    def is_on_curve(self) -> bool:
        """Whether it is a point of the curve over width, depth and number of classes."""
        return self.classes is not None and not self.clothes

    def arms(self) -> dict[str, dict[str, Any]]:
        """The settings of each arm that differ from those that all runs share: what teaches first."""
        # The budget is asked for from the start: most epochs are then trained at the cost of the result.
        gated = {
            "width": self.width,
            "penalty": 5.0,
            "penalty_begin": 0.0,
            "penalty_end": 0.2,
        }
        return {
            TEACHER: {"gated": False, "width": self.width, "epochs": self.epochs},
            **{
                f"{kind}-{budget}": {
                    **gated,
                    **KINDS[kind],
                    "budget": budget,
                    "epochs": (2 if kind.startswith(FRESH) else 1) * self.epochs,
                }
                for budget in self.budgets
                for kind in self.kinds
            },
            **{
                f"ungated-{width}": {"gated": False, "width": width, "epochs": 2 * self.epochs}
                for width in self.widths
            },
            **{
                f"narrow-{share}": {
                    "gated": False,
                    "width": self.width,
                    "inner": share,
                    "epochs": 2 * self.epochs,
                }
                for share in self.inner
            },
        }

    def runs(self) -> Iterator[tuple[str, RunConfig]]:
        """Every run by its name, without the folder of its teacher; seed by seed."""
        shared = {**SHARED, "data": self.data, "network": self.network}
        for seed in self.seeds:
            for arm, settings in self.arms().items():
                yield f"{arm}-seed{seed}", RunConfig(**{**shared, **settings, "seed": seed})


SHARED = {
    "stem_stride": 2,
    "batch_size": 128,
    "schedule": "cosine",
    "evaluate_every": 4,
    "logger": "none",
    "channels_last": True,
}


def _on_characters(classes: int = 1000, network: str = "resnet8", width: int = 16) -> Series:
    """A point of the curve over width, depth and number of classes, at a quarter of the multiply-adds."""
    return Series(
        "idx",
        network,
        epochs=12,
        widths=(3 * width // 8, width // 2),
        budgets=(QUARTER,),
        kinds=("bas", "l0", FRESH),
        seeds=(0,),
        width=width,
        classes=classes,
        inner=(QUARTER,),
    )


SERIES = {
    "fashion-mnist": Series(
        "fashion-mnist",
        "resnet8",
        epochs=6,
        widths=(6, 8, 10, 13),
        budgets=(0.25, 0.15, 0.4, 0.6),
        kinds=("bas", "l0", "groups", FRESH),
        seeds=(0, 1, 2),
    ),
    "cifar10-resnet8": Series(
        "cifar10",
        "resnet8",
        epochs=12,
        widths=(6, 8),
        budgets=(QUARTER,),
        kinds=("bas", "l0", FRESH),
        seeds=(0,),
    ),
    "characters-10": _on_characters(classes=10),
    "characters-100": _on_characters(classes=100),
    "characters-1000": _on_characters(),
    "characters-1000-width8": _on_characters(width=8),
    "characters-1000-width32": _on_characters(width=32),
    "characters-1000-resnet14": _on_characters(network="resnet14"),
    "characters-1000-resnet20": _on_characters(network="resnet20"),
    "clothes-and-characters": Series(
        "idx",
        "resnet8",
        epochs=12,
        widths=(6, 8),
        budgets=(QUARTER, 0.15),
        kinds=(FRESH, f"{FRESH}_l0", "bas"),
        seeds=(0, 1, 2),
        classes=100,
        clothes=True,
        inner=(QUARTER, 0.15),
    ),
}


def taught_by(name: str) -> str | None:
    """The run that teaches a run, and whose weights one with gates starts from."""
    arm, _, seed = name.rpartition("-seed")
    return None if arm == TEACHER else f"{TEACHER}-seed{seed}"


# Where things lay, how the data came there, and with how many threads is no part of what was trained.
PLACES = {
    "start": None,
    "start_sha256": None,
    "teacher": "start",
    "teacher_sha256": None,
    "data_folder": None,
    "download": False,
    "threads": None,
}


def finished(path: Path, config: RunConfig) -> bool:
    """Whether there is a result of this very configuration, wherever its teacher lay."""
    return is_finished(path, config, PLACES)


def run(series: str, name: str, config: RunConfig, places: dict[str, Any]) -> str:
    """Train, or go on, and keep what the report shows."""
    folder, teacher = FOLDERS / series / name, taught_by(name)
    if teacher is not None:
        key = "start" if config.network.gated and not name.startswith(FRESH) else "teacher"
        places = {**places, key: str(FOLDERS / series / teacher)}
    config = config.model_copy(update=places)
    result = resume(folder) if (folder / "config.yaml").exists() else train(config, folder)
    result["config"] |= {key: PLACES[key] for key in places}
    result["least"] = result["most"] = []
    if SERIES[series].clothes:
        result["by_kind"] = by_kind(result["by_class"])
    if SERIES[series].classes is not None:  # a thousand of them, one by one, are a megabyte
        result["classes"] = result["by_class"] = []
    keep(result, path_of(series, name))
    return f"{series}, {name}: {result['accuracy']:.2%} at {result['multiply_adds'] / 1e6:.3f} M"


def by_kind(by_class: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures of all clothes and of all characters; those of each class are means over its images."""
    found = {}
    for kind, classes in {"clothes": by_class[:CLOTHES], "characters": by_class[CLOTHES:]}.items():
        mean = partial(np.average, axis=0, weights=[figures["examples"] for figures in classes])
        found[kind] = {
            **{name: float(mean([each[name] for each in classes])) for name in ("accuracy", "multiply_adds")},
            "open": [mean(layer).tolist() for layer in zip(*(each["open"] for each in classes), strict=True)],
        }
    return found


def path_of(series: str, name: str) -> Path:
    """Where the result of a run is kept."""
    return RESULTS / series / f"{name}.json"


def results_of(series: str) -> dict[str, list[dict[str, Any]]]:
    """The results of each arm of a series, over the seeds that are finished."""
    kept = {
        name: read_result(path_of(series, name))
        for name, config in SERIES[series].runs()
        if finished(path_of(series, name), config)
    }
    return by_arm(kept, sorted(SERIES[series].arms(), key=_place))


def _place(arm: str) -> tuple[int, float]:
    """A key to sort by: kind, then width or budget."""
    kind, _, setting = arm.partition("-")
    return [*NAMES].index(kind), float(setting or 0)


def measure_times(series: str, names: Iterable[str]) -> None:
    """Keep the median milliseconds of an image in each network, by the fastest way to compute it."""
    networks: dict[str, nn.Module] = {}
    images = torch.empty(0)
    for name in names:
        if (FOLDERS / series / name / "result.json").exists():
            network, data = load_run(FOLDERS / series / name)
            images = data.normalize(data.test.__getitems__([*range(0, len(data.test), 100)])[0])
            networks |= {f"{name}/{way}": made for way, made in _ways(network.eval(), images).items()}
    with using_threads(1):
        seconds = seconds_of_images(networks, images)
    least: dict[str, float] = {}
    for name, values in seconds.items():
        of = name.partition("/")[0]
        least[of] = min(least.get(of, math.inf), 1e3 * values.median().item())
    for name, milliseconds in least.items():
        path = path_of(series, name)
        keep(json.loads(path.read_text()) | {"milliseconds": round(milliseconds, 3)}, path)


def _ways(network: nn.Module, images: Tensor) -> dict[str, nn.Module]:
    """The ways to compute a network: rivals have all, so that gates win by what they close only."""
    if any(isinstance(module, Gate) for module in network.modules()):
        return {"conditional": bs.conditional_inference(network)}
    # As networks with gates are computed, without their gates.
    without_gates, _ = bs.prune_static_gates(bs.gate_resnet(copy.deepcopy(network), bias=1e4), [images])
    return {
        "as it is": network,
        "packed": dense_inference(network),
        "as with gates": bs.conditional_inference(without_gates),
    }


def summarize(series: str, arms: dict[str, list[dict[str, Any]]]) -> str:
    """The table of a series, one row an arm."""
    rivals = [arm for arm in arms if arm.startswith("ungated-")]
    rows = []
    for arm, results in arms.items():
        kind, _, setting = arm.partition("-")
        gates = [result["gates"] for result in results if result["gates"]]
        compared = kind not in _BY_WIDTH
        times = [result["milliseconds"] for result in results if "milliseconds" in result]
        rows.append(
            [
                NAMES[kind],
                f"width {setting or SERIES[series].width}" if kind in _BY_WIDTH else f"{float(setting):.0%}",
                str(len(results)),
                ablation.spread([result["multiply_adds"] / 1e6 for result in results], 3),
                ablation.spread([100 * result["accuracy"] for result in results], 2),
                f"{ablation.above_ungated(results, arms):+.1f}" if compared and len(rivals) > 1 else "",
                ablation.spread([100 * gate["conditional"] for gate in gates], 0) if gates else "",
                ablation.spread([100 * gate["always_off"] for gate in gates], 0) if gates else "",
                ablation.spread(times, 2) if times else "",
            ]
        )
    header = ["network", "width or budget", "seeds", "million multiply-adds", "test accuracy, %"]
    return table([*header, "above ungated", "conditional, %", "always off, %", "ms an image"], rows)


def draw(arms: dict[str, list[dict[str, Any]]]) -> Figure:
    """Accuracy against multiply-adds, with the standard deviation over seeds."""
    kinds = {kind: NAMES[kind] for kind in ("ungated", "narrow", *KINDS)}
    return ablation.draw(arms, kinds, [0.4, 0.6, 0.8, 1, 1.5])


def draw_kinds(result: dict[str, Any]) -> Figure:
    """For how many images of each kind each gate is open, layer by layer, in the order of the difference.

    Args:
        result: of one network with gates, on clothes and characters.
    """
    kinds = result["by_kind"]
    layers = [*zip(*(figures["open"] for figures in kinds.values()), strict=True)]
    with house_style():
        figure = Figure(figsize=(7.6, 1.8), layout="constrained")
        panels = figure.subplots(1, len(layers), width_ratios=[len(layer[0]) for layer in layers])
        for k, (axes, layer) in enumerate(zip(panels, layers, strict=True)):
            order = sorted(zip(*layer, strict=True), key=lambda gate: gate[1] - gate[0])
            image = axes.imshow([*zip(*order, strict=True)], cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axes.set(title=f"layer {k + 1}", xlabel=f"{len(order)} gates", xticks=[], yticks=[])
            axes.grid(visible=False)
        panels[0].set_yticks(range(len(kinds)), [*kinds])
        bar = figure.colorbar(image, ax=[*panels], ticks=[0, 0.5, 1])
        bar.set_label("open for a share\nof the images")
    return figure


def curve() -> dict[tuple[int, int, int], dict[str, Any]]:
    """The arms of each finished series on characters alone, by the number of classes, width and depth."""
    found = {}
    for name, series in SERIES.items():
        if not series.is_on_curve:
            continue
        arms = results_of(name)
        if TEACHER in arms and all(f"ungated-{width}" in arms for width in series.widths):
            found[series.classes, series.width, int(series.network.removeprefix("resnet"))] = arms
    return found


def _above(arms: dict[str, Any], kind: str) -> float | None:
    """Points of accuracy above ungated networks of the same cost, at a quarter of the teacher's."""
    results = arms.get(f"{kind}-{QUARTER}")
    return None if results is None else ablation.above_ungated(results, arms)


def summarize_curve(found: dict[tuple[int, int, int], dict[str, Any]]) -> str:
    """One row for each number of classes, width and depth."""
    kinds = {
        "narrow": "narrow inside",
        "bas": "gates, from its weights",
        "l0": "the same, L0 only",
        FRESH: "gates, from random weights",
    }
    rows = []
    for (classes, width, depth), arms in found.items():
        accuracies = [ablation.point(arms[arm])[1] for arm in (TEACHER, f"ungated-{width // 2}")]
        above = [_above(arms, kind) for kind in kinds]
        rows.append(
            [
                *(str(classes), f"ResNet-{depth}", str(width)),
                *(f"{accuracy:.1f}" for accuracy in accuracies),
                *("" if value is None else f"{value:+.1f}" for value in above),
            ]
        )
    header = ["classes", "network", "width", "the teacher, %", "half as wide, %", *kinds.values()]
    return table(header, rows)


def draw_curve(found: dict[tuple[int, int, int], dict[str, Any]]) -> Figure:
    """Points above ungated networks of the same cost, along each axis through the middle of them."""
    middle, names = (1000, 16, 8), ("classes", "width", "layers")
    with house_style():
        figure = Figure(figsize=(7.6, 2.8), layout="constrained")
        for k, (axes, name) in enumerate(zip(figure.subplots(1, 3, sharey=True), names, strict=True)):
            along = sorted(at for at in found if all(at[o] == middle[o] for o in range(3) if o != k))
            for kind, marker in (("bas", "o"), ("l0", "v"), (FRESH, "d"), ("narrow", "s")):
                above = {at[k]: _above(found[at], kind) for at in along}
                shown = {at: value for at, value in above.items() if value is not None}
                axes.plot([*shown], [*shown.values()], marker=marker, label=NAMES[kind])
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set(xscale="log", xlabel=name)
            axes.xaxis.set_major_locator(FixedLocator([at[k] for at in along]))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        figure.axes[0].set_ylabel("points above ungated")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def make_data(series: Series, fonts: Path, clothes: dict[str, Any]) -> Path:
    """The folder of the images of a series on characters, which are drawn if they are missing.

    Args:
        series: the series.
        fonts: the folder of the fonts.
        clothes: where Fashion-MNIST is, or whether to download it, where the series has clothes.
    """
    assert series.classes is not None
    folder = ROOT / "outputs" / f"characters-{series.classes}"
    characters.write(folder, series.classes, characters.fonts_in(fonts))
    if not series.clothes:
        return folder
    mixed = folder.with_name(f"clothes-and-characters-{series.classes}")
    characters.write_with_clothes(mixed, folder, load_data(DataSettings(data="fashion-mnist", **clothes)))
    return mixed


def main() -> None:
    """Run what is missing and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("series", nargs="*", default=["fashion-mnist"], help=f"of {', '.join(SERIES)}")
    parser.add_argument("--data-folder", help="folder of the data")
    parser.add_argument("--download", action="store_true", help="download the data if they are missing")
    parser.add_argument("--fonts", type=Path, default="/usr/share", help="folder of the fonts of characters")
    parser.add_argument("--summary", action="store_true", help="train nothing")
    parser.add_argument("--times", action="store_true", help="measure how long an image takes")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.series if name not in SERIES]:
        parser.error(f"series must be of {', '.join(SERIES)}, received {unknown[0]}")
    for name in arguments.series:
        series, places = SERIES[name], {"data_folder": arguments.data_folder, "download": arguments.download}
        (RESULTS / name).mkdir(parents=True, exist_ok=True)
        if series.classes is not None and not arguments.summary:
            places = {"data_folder": str(make_data(series, arguments.fonts, places))}
        with using_threads(1):
            for of_run, config in series.runs():
                if not arguments.summary and not finished(path_of(name, of_run), config):
                    print(run(name, of_run, config, places), flush=True)
        if arguments.times:
            done = [of_run for of_run, config in series.runs() if finished(path_of(name, of_run), config)]
            for seed in series.seeds:
                measure_times(name, [of_run for of_run in done if of_run.endswith(f"-seed{seed}")])
        text = summarize(name, results_of(name))
        print(f"{name}\n{text}")
        if not series.is_on_curve:
            write_table(PAGE, f"ablation from trained weights, {name}", text)
    found = curve()
    write_table(PAGE, "ablation from trained weights, characters", summarize_curve(found))
    draw_curve(found).savefig(FIGURES / "ablation_over_sizes.svg")
    draw(results_of("fashion-mnist")).savefig(FIGURES / "ablation_from_trained.svg")
    two_kinds = results_of("clothes-and-characters")
    draw(two_kinds).savefig(FIGURES / "ablation_two_kinds.svg")
    draw_kinds(two_kinds[f"{FRESH}-{QUARTER}"][0]).savefig(FIGURES / "ablation_two_kinds_gates.svg")


if __name__ == "__main__":
    main()
