"""The report of trained runs: one HTML page that needs no network, with everything in ``result.json``.

What is text is written by the template, which escapes it. What is drawn goes into the page once as JSON, and
the page's own script draws it with plotly.js; a text in it that plotly shows is escaped for plotly here.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from batchshaping.files import quoted, replaced
from batchshaping.priors import Beta
from batchshaping.training.config import RunConfig

__all__ = ["prior_masses", "report_html", "write_report"]

KINDS = ("ungated", "L0 only", "batch-shaping")
"""What a run can be, in the order of the legend."""

_DATA = ("data", "data_folder", "image_size", "train_images")
"""Settings that are equal for runs whose accuracies can be compared."""

_NETWORK = ("network", "width", "stem_stride")
"""Settings that are equal, too, for a gated run and its ungated reference."""


def write_report(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write the report of some runs to a file.

    Args:
        results: for the name of each run, what its ``result.json`` holds.
        path: the file, replaced if it is there.

    Raises:
        ValueError: in one line that names the run, if something is missing in its result or out of range.
        OSError: if the file cannot be written; an earlier one is then as it was.
    """
    page = report_html(results)
    with replaced(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")


def report_html(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The report of some runs, as one HTML page.

    Args:
        results: for the name of each run, what its ``result.json`` holds.

    Raises:
        ValueError: in one line that names the run, if something is missing in its result or out of range.

    Example:
        >>> report_html({"first": {"accuracy": 0.9}})
        Traceback (most recent call last):
        ...
        ValueError: 'first': expected the result of a run, received one without 'config'
    """
    if not results:
        raise ValueError("expected the results of at least one run, received none")
    runs = [_run(name, result) for name, result in results.items()]
    gated = [run for run in runs if run.gates]
    template = _environment().get_template("page.html")
    return template.render(
        headline=_headline(runs),
        runs=runs,
        gated=gated,
        chosen=runs.index((gated or runs)[0]),
        references=[_reference(run, runs) for run in runs],
        differing=_differing(runs),
        data={"kinds": KINDS, "groups": _groups(runs), "runs": [run.figures for run in runs]},
        plotly=Markup(get_plotlyjs()),
    )


def prior_masses(prior: Sequence[float], bins: int) -> list[float]:
    """The mass of a Beta prior in each of some bins of equal width over [0, 1].

    Args:
        prior: the two concentrations.
        bins: how many there are.

    Example:
        >>> [round(mass, 3) for mass in prior_masses((0.6, 0.4), bins=4)]
        [0.234, 0.15, 0.167, 0.449]
    """
    # The density may be infinite at the ends; the mass of a bin is not.
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.double)
    a, b = prior
    masses: list[float] = Beta(a, b).cdf(edges).diff().tolist()
    return masses


@dataclass(frozen=True)
class _Run:
    """What the page shows of a run.

    Attributes:
        name: of the run.
        config: every setting.
        versions: of the software that trained it.
        accuracy: on the test images.
        spent: mean multiply-adds of a test image.
        dense: multiply-adds of the same network without gates.
        gates: shares of gates always on, conditional and always off, and of open ones; empty without gates.
        spread: least, median and most multiply-adds of a test image.
        extremes: images with the least and with the most multiply-adds.
        figures: what is drawn, in what JSON has.
    """

    name: str
    config: dict[str, Any]
    versions: dict[str, str]
    accuracy: float
    spent: float
    dense: float
    gates: dict[str, float]
    spread: tuple[float, float, float]
    extremes: dict[str, list[dict[str, Any]]]
    figures: dict[str, Any]

    @property
    def share(self) -> float:
        """Of the multiply-adds of the ungated network."""
        return self.spent / self.dense

    @property
    def kind(self) -> int:
        """The index among the kinds."""
        if not self.gates:
            return 0
        return 2 if self.config["shaping"] else 1

    @cached_property
    def recipe(self) -> str:
        """Equal for runs that differ by their seed only."""
        return json.dumps({**self.config, "seed": None}, sort_keys=True)

    def settings(self, names: Iterable[str]) -> str:
        """Equal for runs that are equal in some of their settings."""
        return json.dumps([self.config.get(name) for name in names])


def _run(name: str, result: Mapping[str, Any]) -> _Run:
    try:
        run = _Run(
            name=name,
            config=dict(result["config"].items()),
            versions={name: str(version) for name, version in result["versions"].items()},
            accuracy=_figure(result["accuracy"]),
            spent=_figure(result["multiply_adds"]),
            dense=_figure(result["cost"]["dense"]),
            gates=_gates(result["gates"]),
            spread=_least_median_most(result["quantiles"]),
            extremes={which: [_image(image) for image in result[which]] for which in ("least", "most")},
            figures=_figures(result),
        )
        # Everything else is derived from these, and the page can have no number that JSON has not.
        derived = [run.share, run.spread, run.kind, run.recipe, run.config["seed"], run.figures["classes"][0]]
        json.dumps([derived, run.accuracy, run.gates, run.extremes, run.figures], allow_nan=False)
    except KeyError as error:
        received = f"one without {error}"
    except _RangeError as error:
        received = f"one with {error}"
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError):
        received = "something else"
    else:
        return run
    raise ValueError(f"{quoted(name)}: expected the result of a run, received {received}")


class _RangeError(ValueError):
    """Says what in a result is out of the range that a run gives."""


# More multiply-adds than any network has; what is derived from numbers below is finite.
_LARGEST_FIGURE = 1e30

# The histograms of a run have 20.
_MOST_BINS = 1000


def _figure(value: Any) -> float:
    """A number that a page can show."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    if not abs(value) <= _LARGEST_FIGURE:
        raise _RangeError(f"the number {quoted(value)}")
    return value


def _list(values: Any) -> list[float]:
    if not isinstance(values, list | tuple):
        raise TypeError
    return [_figure(value) for value in values]


_SHARES = ("always_on", "conditional", "always_off", "mean_open")


def _gates(gates: Mapping[str, float] | None) -> dict[str, float]:
    return {share: _figure(gates[share]) for share in _SHARES} if gates else {}


def _least_median_most(quantiles: Sequence[float]) -> tuple[float, float, float]:
    return _figure(quantiles[0]), _figure(quantiles[len(quantiles) // 2]), _figure(quantiles[-1])


def _image(image: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: str(image[name]) for name in ("label", "predicted", "png")}
    return {**shown, "multiply_adds": _figure(image["multiply_adds"])}


def _figures(result: Mapping[str, Any]) -> dict[str, Any]:
    layers = [_layer(layer) for layer in result["layers"]]
    bins = len(layers[0]["histogram"]) if layers else 0
    if bins > _MOST_BINS:
        raise _RangeError(f"{bins} bins in a histogram")
    return {
        "dense": _figure(result["cost"]["dense"]),
        "layers": layers,
        "prior": prior_masses(_prior(result["config"]), bins) if layers else [],
        "epochs": [
            {
                **{
                    name: _figure(epoch[name])
                    for name in ("epoch", "accuracy", "multiply_adds", "shaping", "penalty", "noise")
                },
                "gates": _gates(epoch["gates"]),
                "histograms": [_list(layer["histogram"]) for layer in epoch["layers"]],
            }
            for epoch in result["history"]
        ],
        "classes": [
            {
                **_name(figures["name"]),
                **{name: _figure(figures[name]) for name in ("examples", "accuracy", "multiply_adds")},
                "open": [_list(layer) for layer in figures["open"]],
            }
            for figures in result["by_class"]
        ],
    }


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: _figure(layer[name]) for name in ("gates", *_SHARES)}
    return {
        "name": str(layer["name"]),
        **shown,
        "histogram": _list(layer["histogram"]),
        **_name(layer["name"]),
    }


def _prior(config: Mapping[str, Any]) -> tuple[float, float]:
    """The prior of a run, in the range that a run may have."""
    try:
        return RunConfig(prior=config["prior"]).objective.prior
    except ValueError as error:
        raise _RangeError(error) from None


def _name(name: str) -> dict[str, str]:
    """A name beside an axis, and as it is told of a point."""
    return {"label": _for_plotly(name, 18), "hover": _for_plotly(name, 60)}


# Runs beside each other


def _reference(run: _Run, runs: Iterable[_Run]) -> float | None:
    """The accuracy of a gated run's network without gates on the same data, if there is a run of it."""
    same = (*_NETWORK, *_DATA)
    accuracies = [
        other.accuracy
        for other in runs
        if run.gates and not other.gates and other.settings(same) == run.settings(same)
    ]
    return fmean(accuracies) if accuracies else None


def _headline(runs: Sequence[_Run]) -> str:
    """What was saved at which accuracy, in a sentence."""
    gated = [run for run in runs if run.gates]
    shown = gated or list(runs)
    references = [(run, _reference(run, runs)) for run in shown]
    points = [100 * (run.accuracy - accuracy) for run, accuracy in references if accuracy is not None]
    accuracy = f"{_between([100 * run.accuracy for run in shown], '.1f')}% accuracy"
    if not gated:
        return f"{_count(runs, 'ungated run')} with {accuracy}"
    saved = f"{_between([100 * (1 - run.share) for run in gated], '.1f')}% of the multiply-adds"
    if len(points) == len(gated):
        accuracy = f"{_between(points, '+.1f')} points of accuracy"
    return f"{_count(gated, 'gated run')} saving {saved}, at {accuracy}"


def _count(runs: Sequence[_Run], what: str) -> str:
    return f"A{'n' * what.startswith('u')} {what}" if len(runs) == 1 else f"{len(runs)} {what}s"


def _between(values: Sequence[float], form: str) -> str:
    ends = dict.fromkeys(_number(end, form) for end in (min(values), max(values)))
    return " to ".join(ends)


def _groups(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """Runs that differ by their seed only, with their means and standard deviations."""
    positions = {recipe: i for i, recipe in enumerate(dict.fromkeys(run.recipe for run in runs))}
    members = [
        [*group]
        for _, group in groupby(
            sorted(runs, key=lambda run: positions[run.recipe]), key=lambda run: run.recipe
        )
    ]
    return [
        {
            "kind": group[0].kind,
            "data": group[0].settings(_DATA),
            "accuracy": _spread([run.accuracy for run in group]),
            "multiply_adds": _spread([run.spent for run in group]),
            "hover": _group_hover(group),
            "runs": [
                {"accuracy": run.accuracy, "multiply_adds": run.spent, "hover": _group_hover([run])}
                for run in group
            ],
        }
        for group in members
    ]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": fmean(values), "deviation": stdev(values) if len(values) > 1 else 0.0}


def _group_hover(group: Sequence[_Run]) -> str:
    """All that there is to tell of a group, one thing a line."""
    first = group[0]
    config = first.config
    names = [_for_plotly(run.name) for run in group]
    title = names[0] if len(group) == 1 else f"mean of {len(group)} seeds"
    network = [config.get("network"), f"width {config.get('width')}", config.get("data")]
    lines = [
        f"<b>{title}</b>",
        *(", ".join(names[i : i + 3]) for i in range(0, len(names), 3) if len(group) > 1),
        ", ".join(_for_plotly(part) for part in network),
        *[f"gates with {KINDS[first.kind]}" if first.gates else KINDS[0]],
        f"accuracy {_mean(group, 'accuracy', _percent)}",
        f"multiply-adds {_mean(group, 'spent', _si)}",
        f"{_mean(group, 'share', _percent)} of the ungated network's",
    ]
    if first.gates:
        lines += [
            f"{share.replace('_', ' ')} {_percent(fmean(run.gates[share] for run in group))}"
            for share in ("conditional", "always_on", "always_off")
        ]
    return "<br>".join(lines)


def _mean(group: Sequence[_Run], figure: str, form: Any) -> str:
    spread = _spread([getattr(run, figure) for run in group])
    return f"{form(spread['mean'])} ± {form(spread['deviation'])}" if len(group) > 1 else form(spread["mean"])


def _differing(runs: Sequence[_Run]) -> set[str]:
    """Settings that are not the same in all runs."""
    names = {name for run in runs for name in run.config}
    return {name for name in names if len({json.dumps(run.config.get(name)) for run in runs}) > 1}


# Texts


def _number(value: float, form: str) -> str:
    """With a minus sign where it is one, and none on what rounds to zero."""
    text = f"{value:{form}}"
    if not float(text):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def _percent(share: float) -> str:
    return f"{_number(100 * share, '.1f')}%"


def _points(difference: float) -> str:
    """A difference of accuracies, in points."""
    return _number(100 * difference, "+.1f")


def _si(value: float) -> str:
    """With three digits and an SI prefix, as plotly writes it beside an axis."""
    value = float(f"{value:.3g}")
    power = min(len(f"{abs(value):.0f}") - 1, 12) // 3
    shown = value / 1000**power
    decimals = max(0, 3 - len(f"{abs(shown):.0f}"))
    return f"{shown:.{decimals}f}{' kMGT'[power].strip()}"


def _setting(value: Any) -> str:
    """A setting as it is written in YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _for_plotly(text: object, limit: int = 40) -> str:
    """A text that plotly shows as it is, where it would read tags; shortened where it has no end."""
    text = " ".join(str(text).split())
    return html.escape(text if len(text) <= limit else f"{text[: limit - 1]}…", quote=False)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters |= {"percent": _percent, "points": _points, "setting": _setting, "si": _si}
    return environment
