"""The report of trained runs: one HTML page that needs no network, with everything in ``result.json``.

What is text is written by the templates, which escape it. What is drawn goes into the page once as JSON, and
the page's scripts draw it with plotly.js; a text in it that plotly shows is escaped for plotly here.

What only one kind of network has, its :class:`~batchshaping.report.family.Family` adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from batchshaping.report.budgets import Budgets, Point
from batchshaping.report.channel_gating import KINDS, prior_masses
from batchshaping.report.headline import headline
from batchshaping.report.runs import Run, read_run
from batchshaping.report.settings import Comparison, Setting, Spread, comparisons, differing
from batchshaping.report.texts import (
    deviation_si,
    milliseconds,
    number,
    percent,
    plotly_text,
    points,
    setting_text,
    si,
)
from batchshaping.storage.files import replaced

# The first two could be imported from here before there was a file for each family.
__all__ = ["KINDS", "prior_masses", "report_html", "write_report"]


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
        ValueError: 'first': expected the result of a run, received one without 'cost'
    """
    if not results:
        raise ValueError("expected the results of at least one run, received none")
    runs = [read_run(name, result) for name, result in results.items()]
    compared = comparisons(runs)
    saving = [run for run in runs if not run.is_reference]
    chosen = (saving or runs)[0]
    families = [*dict.fromkeys(run.family for run in runs)]
    template = _environment().get_template("page.html")
    return template.render(
        headline=headline(compared),
        runs=runs,
        comparisons=compared,
        families=families,
        chosen=runs.index(chosen),
        alone=_setting_of(chosen, compared) if len(saving) == 1 or len(runs) == 1 else None,
        differing=_marked(runs),
        data={
            "comparisons": [_figure(comparison) for comparison in compared],
            "families": [family.name for family in families],
            "runs": [{"family": families.index(run.family), **_run_data(run)} for run in runs],
        },
        plotly=Markup(get_plotlyjs()),
    )


def _setting_of(run: Run, compared: Sequence[Comparison]) -> Setting:
    settings = (setting for comparison in compared for setting in comparison.settings)
    return next(setting for setting in settings if run in setting.runs)


def _marked(runs: Sequence[Run]) -> set[str]:
    """Settings that are not the same in all runs; one that a run does not have is null."""
    names = {name for run in runs for name in run.config}
    return differing([{name: run.config.get(name) for name in names} for run in runs])


# What the scripts draw


def _figure(comparison: Comparison) -> list[dict[str, Any]]:
    """The curves of the figure, each with a point for each of its settings."""
    return [
        {
            "name": plotly_text(curve.name),
            "color": curve.color,
            "symbol": curve.symbol,
            "connected": curve.reference,
            "points": [
                {
                    "accuracy": _spread_data(setting.accuracy),
                    "multiply_adds": _spread_data(setting.multiply_adds),
                    "hover": _hover(setting),
                }
                for setting in settings
            ],
        }
        for (_, curve), settings in comparison.curves.items()
    ] + [_budgets_curve(run, run.budgets) for run in comparison.runs if run.budgets]


def _budgets_curve(run: Run, budgets: Budgets) -> dict[str, Any]:
    """The curve of one network over its budgets, beside those that were trained for each."""
    name = plotly_text(run.name)
    return {
        "name": f"{name} at other budgets",
        "color": run.view.curve.color,
        "symbol": f"{run.view.curve.symbol}-open",
        "connected": True,
        "points": [
            {
                "accuracy": {"mean": point.accuracy, "deviation": None},
                "multiply_adds": {"mean": point.multiply_adds, "deviation": None},
                "hover": f"<b>{name}</b><br>{_point_hover(point, run)}",
            }
            for point in budgets.curve
        ],
    }


def _point_hover(point: Point, run: Run) -> str:
    """All that there is to tell of the network at one shift, one thing a line."""
    share = percent(point.multiply_adds / run.reference.multiply_adds)
    return (
        f"{point.name}, shift {point.shift}<br>accuracy {percent(point.accuracy)}<br>"
        f"multiply-adds {si(point.multiply_adds)}<br>{share} of the reference’s"
    )


def _spread_data(spread: Spread) -> dict[str, float | None]:
    return {"mean": spread.mean, "deviation": spread.deviation}


def _hover(setting: Setting) -> str:
    """All that there is to tell of a setting, one thing a line."""
    names = [plotly_text(run.name) for run in setting.runs]
    lines = [
        f"<b>{plotly_text(setting.name, 80)}</b>",
        *(", ".join(names[i : i + 3]) for i in range(0, len(names), 3)),
        f"accuracy {percent(setting.accuracy.mean)}{percent_deviation(setting.accuracy)}",
        f"multiply-adds {si(setting.multiply_adds.mean)}{si_deviation(setting.multiply_adds)}",
        f"{percent(setting.share.mean)} of the reference’s",
        *(f"{head.lower()} {percent(share.mean)}" for head, share in setting.shares.items()),
    ]
    return "<br>".join(lines)


def _run_data(run: Run) -> dict[str, Any]:
    return {
        "is_reference": run.is_reference,
        "reference": run.reference.multiply_adds,
        "epochs": run.epochs,
        "pictures": run.view.pictures,
        "latency": asdict(run.latency) if run.latency else None,
        "budgets": _budgets_data(run, run.budgets) if run.budgets else None,
    }


def _budgets_data(run: Run, budgets: Budgets) -> dict[str, Any]:
    """The traces of the figure of one network over its budgets."""
    trained = Point("as trained", "0", run.multiply_adds, run.accuracy)
    traces = {"at other budgets": budgets.curve, "as trained": [trained]}
    if budgets.promised:
        traces["with the promise"] = [budgets.promised]
    return {
        name: [
            {"x": point.multiply_adds, "y": point.accuracy, "hover": _point_hover(point, run)}
            for point in curve
        ]
        for name, curve in traces.items()
    }


# What the templates write


def percent_deviation(spread: Spread) -> str:
    """The standard deviation of a share, to stand after its mean; nothing for a single seed."""
    return "" if spread.deviation is None else f" ± {number(100 * spread.deviation, '.1f')}"


def si_deviation(spread: Spread) -> str:
    """The standard deviation of multiply-adds, to stand after their mean; nothing for a single seed."""
    return "" if spread.deviation is None else f" ± {deviation_si(spread.deviation, spread.mean)}"


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters |= {
        "milliseconds": milliseconds,
        "number": number,
        "percent": percent,
        "percent_deviation": percent_deviation,
        "points": points,
        "setting_text": setting_text,
        "si": si,
        "si_deviation": si_deviation,
    }
    return environment
