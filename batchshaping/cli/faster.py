"""``batchshaping faster``: from the trained network of a run to a faster one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from batchshaping.cli.command import app
from batchshaping.cli.errors import extras, fail
from batchshaping.cli.output import FILES, TRAINING, show_budgets, show_latency, show_metrics
from batchshaping.cli.runs import refused

__all__ = ["faster"]


@app.command()
def faster(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a finished run without gates.", readable=False)
    ],
    budget: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Share of the multiply-adds an image may cost.",
            rich_help_panel=TRAINING,
        ),
    ] = 0.4,
    epochs: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT", min=1, help="Epochs, if not as many as in the run.", rich_help_panel=TRAINING
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Another setting of batchshaping train, such as gates_per_layer=4. May be repeated.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    accuracy_loss: Annotated[
        float,
        typer.Option(
            metavar="LOSS",
            help="Accuracy that the cheapest threshold with a promise may lose on new images.",
        ),
    ] = 0.01,
    confidence: Annotated[
        float, typer.Option(metavar="SHARE", help="Confidence of that promise, in (0, 1).")
    ] = 0.95,
    output: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            readable=False,
            help="Folder of the faster network, made if need be. If it holds a part of it, the rest is made.",
            rich_help_panel=FILES,
        ),
    ] = Path("outputs/faster"),
) -> None:
    """Add gates to a trained network, train them, and say how much faster it is.

    The network of RUN is its own teacher. Then it is tried at other budgets, timed on this machine beside the
    network without gates, exported (**model.onnx**) and shown as a page (**report.html**). The folder is that
    of a run, which the other commands take. The same command goes on after an interruption.

    Example: **batchshaping train --no-gated --width 64 --epochs 10 --output outputs/digits**; **batchshaping
    faster outputs/digits --budget 0.3 --epochs 12**
    """
    given: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals:
            fail(f"--set must be NAME=VALUE, received {setting}")
        given[name.replace("-", "_")] = value
    if epochs is not None:
        given["epochs"] = epochs
    with extras():
        from batchshaping.training.faster import EXPORT, REPORT, make_faster
    steps = iter(range(1, 6))
    with extras(), refused():
        try:
            made = make_faster(
                run,
                output,
                budget,
                accuracy_loss=accuracy_loss,
                confidence=confidence,
                progress=sys.stderr.isatty(),
                told=lambda step: print(f"{next(steps)} of 5: {step}", flush=True),
                **given,
            )
        except KeyboardInterrupt:
            print("interrupted; the same command goes on", file=sys.stderr)
            sys.exit(130)
    show_metrics(made.result)
    show_budgets(made.budgets)
    show_latency(made.latency)
    lost = made.accuracy_lost
    print(
        f"{abs(100 * lost):.1f} points of accuracy {'less' if lost > 0 else 'more'} than without gates, "
        f"and {made.times_faster:.2f} times as fast"
    )
    if made.not_exported:
        print(f"no {EXPORT}: {made.not_exported}")
    present = [REPORT] if made.not_exported else [EXPORT, REPORT]
    print(f"wrote {output}, with {' and '.join(present)}")
