"""``batchshaping train``, ``evaluate`` and ``report``: runs and what came of them."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from batchshaping.cli.command import app
from batchshaping.cli.errors import extras, fail
from batchshaping.cli.output import FILES, prepare, show_budgets, show_latency, show_metrics, write
from batchshaping.training.config import MAY_CHANGE, SECTIONS, SETTINGS, RunConfig, read_config

__all__ = ["evaluate", "refused", "report"]


def _train(config: Path | None, resume: Path | None, output: Path | None, **given: str | bool | None) -> None:
    """Train a network with gates, evaluate it, and keep all that a report needs.

    Without options, a gated ResNet-8 is trained on scikit-learn's digits, which takes about a minute. The
    folder of the run contains its complete configuration (**config.yaml**), from which it can be repeated;
    its result (**result.json**); the trained weights; and a checkpoint, from which an interrupted run goes on
    to the result that it would have had.

    Examples: **batchshaping train --budget 0.3**; **batchshaping train --config run.yaml --seed 1 --output
    outputs/second**; **batchshaping train --resume outputs/train**
    """
    settings = {name: value for name, value in given.items() if value is not None}
    if resume is not None:
        received = [f"--{name.replace('_', '-')}" for name in settings if name not in MAY_CHANGE]
        received += ["--config"] * (config is not None) + ["--output"] * (output is not None)
        if received:
            fail(f"--resume takes its settings from the run, received {', '.join(received)} too")
    try:
        run = None if resume else read_config(config, **settings) if config else RunConfig(**settings)
    except ValueError as error:
        fail(error)
    with extras():
        from batchshaping.training.run import resume as resume_run
        from batchshaping.training.run import train
    folder = resume or output or Path("outputs/train")
    finished = resume is not None and (resume / "result.json").exists()
    with extras(), refused():
        try:
            progress = sys.stderr.isatty()
            result = (
                train(run, folder, progress=progress)
                if run
                else resume_run(folder, progress=progress, **settings)
            )
        except KeyboardInterrupt:
            print(f"interrupted; to go on: batchshaping train --resume {folder}", file=sys.stderr)
            sys.exit(130)
    if result:  # that of the first process, of several
        show_metrics(result)
        print(f"{folder} was finished before" if finished else f"wrote {folder}")


def _option(name: str) -> inspect.Parameter:
    """A setting of a run as an option of the command line."""
    section, description, default, is_flag = SETTINGS[name]
    flag = f"--{name.replace('_', '-')}"
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    help = f"{description} " + ("" if is_flag or default is None else f"[default: {shown}]")
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if is_flag else flag,
        help=f"{help}[default: {'on' if default else 'off'}]" if is_flag else help,
        metavar=None if is_flag else "VALUE",
        show_default=False,
        rich_help_panel=SECTIONS[section],
    )
    kind = bool | None if is_flag else str | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )


def _options() -> list[inspect.Parameter]:
    """The options of the training command: the files of the run, and every setting, section by section."""
    files = {
        "config": ("YAML file of settings as name: value. Options replace its settings.", "FILE"),
        "resume": (
            "Go on with the interrupted run in this folder, with its settings. Only options for the "
            "machine and the log may be given.",
            "FOLDER",
        ),
        "output": ("Folder of the run, made if it does not exist. [default: outputs/train]", "FOLDER"),
    }
    parameters = []
    for name, (help, metavar) in files.items():
        option = typer.Option(f"--{name}", help=help, metavar=metavar, readable=False, rich_help_panel=FILES)
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[Path | None, option],
            )
        )
    return [*parameters, *map(_option, SETTINGS)]


# One place for every setting: its name, default, range and description are those of the configuration.
_train.__signature__ = inspect.Signature(_options())  # type: ignore[attr-defined]
_train.__annotations__ = {parameter.name: parameter.annotation for parameter in _options()}
app.command("train")(_train)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", readable=False)],
    data_folder: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", readable=False, help="Where the data is, if not where it was."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="COUNT", min=1, help="Threads, if not as many as in training.")
    ] = None,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency",
            help="Also measure how long single test images take on the CPU, and keep it in the folder of the "
            "run (latency.json) for the report.",
        ),
    ] = False,
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="SHARES",
            help="Also run the network at other budgets, such as 0.2,0.3,0.4 of the ungated network's "
            "multiply-adds, without training: the threshold of its gates is shifted. Kept in the folder of "
            "the run (budgets.json) for the report.",
        ),
    ] = None,
    guarantee: Annotated[
        float | None,
        typer.Option(
            metavar="LOSS",
            help="Also find the cheapest shift that loses at most so much accuracy on new images, such as "
            "0.01. Kept in budgets.json too.",
        ),
    ] = None,
    confidence: Annotated[
        float, typer.Option(metavar="SHARE", help="Confidence of that promise, in (0, 1).")
    ] = 0.95,
    against: Annotated[
        Literal["all-open", "trained"],
        typer.Option(help="What that loss is measured against: all gates open, or the network as trained."),
    ] = "all-open",
    as_json: Annotated[bool, typer.Option("--json", help="Print all metrics as JSON.")] = False,
) -> None:
    """Evaluate the trained network of a run on its test images.

    Examples: **batchshaping evaluate outputs/train --latency**; **batchshaping evaluate outputs/train
    --budgets 0.2,0.3,0.4 --guarantee 0.01**
    """
    shares = _shares(budgets)
    with extras():
        from batchshaping.training.budgets import measure_budgets
        from batchshaping.training.latency import measure_run
        from batchshaping.training.run import evaluate_run
    with extras(), refused():
        given = {"data_folder": data_folder, "threads": threads}
        settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        metrics = evaluate_run(run, **settings)
        measured = measure_run(run, **settings) if latency else None
        at_budgets = (
            measure_budgets(
                run,
                shares,
                accuracy_loss=guarantee,
                confidence=confidence,
                against={"all-open": -math.inf, "trained": 0.0}[against],
                **settings,
            )
            if shares or guarantee is not None
            else None
        )
    if as_json:
        print(json.dumps(metrics | _present(latency=measured, budgets=at_budgets)))
        return
    show_metrics(metrics)
    if measured:
        show_latency(measured)
        print(f"wrote {run / 'latency.json'}")
    if at_budgets:
        show_budgets(at_budgets)
        print(f"wrote {run / 'budgets.json'}")


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of finished runs, or results.", readable=False),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", readable=False, help="The page.")] = Path(
        "report.html"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier page.")] = False,
) -> None:
    """Show one run or many as a page: what was saved, what it cost, and what the gates do.

    The page is one file that needs no connection.

    Example: **batchshaping report outputs/train**
    """
    with extras():
        from batchshaping.report.page import report_html
        from batchshaping.training.budgets import read_budgets
        from batchshaping.training.latency import read_latency
        from batchshaping.training.run import read_result
    with extras(), refused():
        results = {
            _short_name(run, runs): read_result(run)
            | _present(latency=read_latency(run), budgets=read_budgets(run))
            for run in runs
        }
        page = report_html(results)
    prepare(output.parent, [output.name], force)
    write(output, lambda path: path.write_text(page, encoding="utf-8", errors="replace"), force)


def _present(**measured: dict[str, Any] | None) -> dict[str, Any]:
    """Measurements as parts of a result, as far as there are any."""
    return {name: each for name, each in measured.items() if each is not None}


def _shares(text: str | None) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(share) for share in text.split(",")] if text is not None else []
    except ValueError:
        fail(f"--budgets must be numbers such as 0.2,0.3,0.4, received {text}")


def _short_name(run: Path, runs: list[Path]) -> str:
    """The last part of a path, if no other run has the same."""
    names = [other.resolve().stem if other.is_file() else other.resolve().name for other in runs]
    name = names[runs.index(run)]
    return name if names.count(name) == 1 else str(run)


@contextmanager
def refused() -> Iterator[None]:
    """Say in one line what is wrong with a configuration, data or a run."""
    from batchshaping.training.data import DataError
    from batchshaping.training.run import RunError

    try:
        yield
    except (DataError, RunError, ValueError) as error:
        # What a process that loads images raises comes with a traceback before it.
        fail(
            str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")
        )
