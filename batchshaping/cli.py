"""The command line: ``batchshaping fit`` shapes values to a prior; the other commands train gated networks.

What cannot be done is said in one line on stderr, with exit code 2, and leaves every file as it was.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
from torch import Tensor

import batchshaping as bs
from batchshaping.priors.closed_form import ClosedFormPrior
from batchshaping.statistics import STATISTICS
from batchshaping.storage.files import created, quoted, replaced
from batchshaping.storage.values import read_values, write_values

_EXTRA_OF = {
    "jinja2": "vision",
    "lightning": "vision",
    "matplotlib": "viz",
    "PIL": "viz",
    "plotly": "vision",
    "pydantic": "cli",
    "rich": "cli",
    "safetensors": "vision",
    "sklearn": "vision",
    "torchvision": "vision",
    "typer": "cli",
    "yaml": "cli",
}


_debugging = False


def _fail(message: object) -> NoReturn:
    if _debugging:
        _print_traceback()
    print(f"batchshaping: {message}", file=sys.stderr)
    sys.exit(2)


def _print_traceback() -> None:
    """Print what a line stands for: the error, and those before it that were not to be seen."""
    error = sys.exc_info()[1]
    if error is None:
        traceback.print_stack(sys._getframe(2))
        return
    before: BaseException | None = error
    while before is not None:
        before.__suppress_context__ = False
        before = before.__context__
    traceback.print_exception(error)


@contextmanager
def _extras() -> Iterator[None]:
    """Say what to install where an import of an extra fails."""
    try:
        yield
    except ImportError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRA_OF:
            raise
        _fail(f"this needs {module}, please run: pip install 'batchshaping[{_EXTRA_OF[module]}]'")


with _extras():
    import rich.box
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from batchshaping.training.config import MAY_CHANGE, SECTIONS, SETTINGS, RunConfig, read_config

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
"""The command, as typer runs it."""


def main() -> None:
    """Run the command line, as the command ``batchshaping`` does."""
    app(prog_name="batchshaping")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"batchshaping {bs.__version__}")
        raise typer.Exit


@app.callback()
def _batchshaping(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback before the line that says what is wrong.")
    ] = False,
) -> None:
    """Shape the distribution of values, such as the gates of a network, to a prior.

    Start with **batchshaping demo** or **batchshaping train**, or see how values take a shape with
    **batchshaping fit --prior beta --a 2 --b 6**.
    """
    global _debugging
    _debugging = debug


_PARAMETERS = "Parameters of the prior"
_START = "Values to start from"
_TRAINING = "Training"
_FILES = "Files"

_LARGEST_SEED = 2**32 - 1

# The ends of (0, 1) have no finite logit, and near them a sigmoid hardly moves.
_MARGIN = 1e-4


@app.command()
def fit(
    prior: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="beta, symbeta, relaxed-bernoulli or normal, each with its parameters below."
        ),
    ],
    a: Annotated[
        float | None,
        typer.Option(
            help="First concentration of beta, positive; mean of symbeta, in (0, 1).",
            rich_help_panel=_PARAMETERS,
        ),
    ] = None,
    b: Annotated[
        float | None,
        typer.Option(help="Second concentration of beta, positive.", rich_help_panel=_PARAMETERS),
    ] = None,
    mean: Annotated[
        float | None,
        typer.Option(help="Mean of relaxed-bernoulli, in (0, 1).", rich_help_panel=_PARAMETERS),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Temperature of relaxed-bernoulli, positive.", rich_help_panel=_PARAMETERS),
    ] = None,
    loc: Annotated[float | None, typer.Option(help="Mean of normal.", rich_help_panel=_PARAMETERS)] = None,
    scale: Annotated[
        float | None,
        typer.Option(help="Standard deviation of normal, positive.", rich_help_panel=_PARAMETERS),
    ] = None,
    values: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            readable=False,  # what cannot be read is said below
            help="Values in [0, 1] to shape, of any shape: .npy, .csv (a first row of names is skipped) or "
            f".pt (one tensor; no code in it is run). Those closer than {_MARGIN:g} to 0 or 1 start at that "
            "distance. Default: 500 values from random logits.",
            rich_help_panel=_START,
        ),
    ] = None,
    init: Annotated[
        float,
        typer.Option(
            help="The random logits are uniform in (-INIT, INIT).", metavar="INIT", rich_help_panel=_START
        ),
    ] = 4.0,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the random logits.",
            metavar="SEED",
            min=0,
            max=_LARGEST_SEED,
            rich_help_panel=_START,
        ),
    ] = 42,
    statistic: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What is minimized: anderson-darling; cramer-von-mises, which is the loss as published and "
            "stalls where values lie outside of the prior's mass; wasserstein; or, for normal, epps-pulley.",
            rich_help_panel=_TRAINING,
        ),
    ] = "anderson-darling",
    steps: Annotated[
        int,
        typer.Option(
            help="How often the values are moved.", metavar="COUNT", min=1, rich_help_panel=_TRAINING
        ),
    ] = 200,
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate of Adam on the logits.", rich_help_panel=_TRAINING)
    ] = 0.1,
    output: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            readable=False,
            help="Where the files go; made if need be.",
            rich_help_panel=_FILES,
        ),
    ] = Path("outputs/fit"),
    animation: Annotated[
        bool,
        typer.Option("--animation/--no-animation", help="Whether to draw fit.gif.", rich_help_panel=_FILES),
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files of an earlier fit.", rich_help_panel=_FILES)
    ] = False,
) -> None:
    """Shape values between 0 and 1 to a prior.

    The values are the sigmoids of logits, which Adam moves until the values have the distribution of the
    prior. The batch-shaping loss, before and after, tells how far from it they are. Written are the shaped
    values (**values.npy**, in the shape and order they came in), a figure (**fit.png**) and an animation
    (**fit.gif**).

    Example: **batchshaping fit --prior normal --loc 0.6 --scale 0.1**
    """
    chosen = _known("--statistic", statistic, STATISTICS)
    target = _prior(prior, a=a, b=b, mean=mean, temperature=temperature, loc=loc, scale=scale)
    for name, number in (("--learning-rate", learning_rate), ("--init", init)):
        if not (number > 0 and math.isfinite(number)):
            _fail(f"{name} must be positive and finite, received {number:g}")
    with _extras():
        from batchshaping.experiments.fit import fit as shape_values
        from batchshaping.experiments.fit import published_start
        from batchshaping.figures.fits import animate_fit, plot_fit
    start = published_start(init, seed=seed) if values is None else _start(values)
    loss = partial(bs.batch_shaping, prior=target, statistic=chosen)
    try:
        loss(torch.sigmoid(start))
    except ValueError as error:
        _fail(error)
    _prepare(output, ["values.npy", "fit.png", *["fit.gif"] * animation], force)

    with _progress() as bar:
        task = bar.add_task("shaping")

        def show(step: int, total: int, _: float) -> None:
            bar.update(task, completed=step, total=total)

        shaped = shape_values(
            start.flatten(),
            target,
            steps=steps,
            learning_rate=learning_rate,
            loss=loss,
            progress=show,
        )
    # One measure of all statistics, in print and in the figure.
    distances = bs.batch_shaping(shaped.values, target, dim=1, reduction="none")
    shaped = replace(shaped, losses=distances[:-1])
    last = shaped.values[-1].reshape(start.shape)
    print(f"{start.numel()} values, {target}")
    print(f"batch-shaping loss {distances[0]:.2e} before, {distances[-1]:.2e} after {steps} steps")
    _write(output / "values.npy", lambda path: write_values(path, last), force)
    _write(output / "fit.png", lambda path: plot_fit(shaped).savefig(path, format="png"), force)
    if animation:
        _write(output / "fit.gif", lambda path: animate_fit(shaped, path), force)


@app.command()
def demo(
    epochs: Annotated[
        int,
        typer.Option(
            help="How often each run sees every digit.", metavar="COUNT", min=1, rich_help_panel=_TRAINING
        ),
    ] = 40,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of both runs.", metavar="SEED", min=0, max=_LARGEST_SEED, rich_help_panel=_TRAINING
        ),
    ] = 0,
    output: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            readable=False,
            help="Where gates.png goes; that of an earlier demo is replaced.",
            rich_help_panel=_FILES,
        ),
    ] = Path("outputs/demo"),
) -> None:
    """Train a small gated network on digits, with and without the loss.

    For each of scikit-learn's 8 x 8 pixel digits, gates switch channels of the network on or off. Both runs
    press gates to be closed. Only one has the batch-shaping loss, which makes them conditional: open for some
    images, closed for others. Prints what came of it, and draws the gates before and after (**gates.png**).
    Takes about a minute, and no connection to a network.
    """
    with _extras():
        from batchshaping.experiments.demo import draw, train
    _prepare(output, ["gates.png"], force=True)

    with _extras():
        outcomes = [
            train(shaped=shaped, epochs=epochs, seed=seed, progress=sys.stderr.isatty())
            for shaped in (False, True)
        ]
    images, gates = outcomes[0].after.shape
    table = Table(
        box=rich.box.SIMPLE_HEAD,
        title=f"{gates} gates on {images} test digits, after {epochs} epochs with seed {seed}",
    )
    table.add_column()
    table.add_column("without the loss", justify="right")
    table.add_column("with the loss", justify="right")
    table.add_row("test accuracy", *(f"{o.accuracy:.1%}" for o in outcomes))
    table.add_row("multiply-adds of the ungated network", *(f"{o.multiply_adds:.1%}" for o in outcomes))
    table.add_row("mean share of open gates", *(f"{o.gates.mean_open:.1%}" for o in outcomes))
    table.add_row("gates always on", *(f"{o.gates.always_on:.1%}" for o in outcomes))
    table.add_row("gates always off", *(f"{o.gates.always_off:.1%}" for o in outcomes))
    table.add_row("conditional gates", *(f"{o.gates.conditional:.1%}" for o in outcomes))
    Console().print(table)
    figure = draw(*outcomes)
    _write(output / "gates.png", lambda path: figure.savefig(path, format="png"), force=True)


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
            _fail(f"--resume takes its settings from the run, received {', '.join(received)} too")
    try:
        run = None if resume else read_config(config, **settings) if config else RunConfig(**settings)
    except ValueError as error:
        _fail(error)
    with _extras():
        from batchshaping.training.run import resume as resume_run
        from batchshaping.training.run import train
    folder = resume or output or Path("outputs/train")
    finished = resume is not None and (resume / "result.json").exists()
    with _extras(), _refused():
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
        _show(result)
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
        option = typer.Option(f"--{name}", help=help, metavar=metavar, readable=False, rich_help_panel=_FILES)
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
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Evaluate the trained network of a run on its test images.

    Example: **batchshaping evaluate outputs/train**
    """
    with _extras():
        from batchshaping.training.run import evaluate_run
    with _extras(), _refused():
        given = {"data_folder": data_folder, "threads": threads}
        figures = evaluate_run(run, **{name: value for name, value in given.items() if value is not None})
    if as_json:
        print(json.dumps(figures))
    else:
        _show(figures)


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
    with _extras():
        from batchshaping.report.page import report_html
        from batchshaping.training.run import read_result
    with _extras(), _refused():
        results = {_short_name(run, runs): read_result(run) for run in runs}
        page = report_html(results)
    _prepare(output.parent, [output.name], force)
    _write(output, lambda path: path.write_text(page, encoding="utf-8", errors="replace"), force)


def _short_name(run: Path, runs: list[Path]) -> str:
    """The last part of a path, if no other run has the same."""
    names = [other.resolve().stem if other.is_file() else other.resolve().name for other in runs]
    name = names[runs.index(run)]
    return name if names.count(name) == 1 else str(run)


@contextmanager
def _refused() -> Iterator[None]:
    """Say in one line what is wrong with a configuration, data or a run."""
    from batchshaping.training.data import DataError
    from batchshaping.training.run import RunError

    try:
        yield
    except (DataError, RunError, ValueError) as error:
        # What a process that loads images raises comes with a traceback before it.
        _fail(
            str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")
        )


def _show(figures: dict[str, Any]) -> None:
    """Print what a run came to."""
    spent, cost, gates = figures["multiply_adds"], figures["cost"]["dense"], figures["gates"]
    table = Table(box=rich.box.SIMPLE_HEAD, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("test accuracy", f"{figures['accuracy']:.2%} of {figures['examples']:,}")
    table.add_row("multiply-adds an image", f"{spent / 1e6:,.3f} M")
    table.add_row("of those of the ungated network", f"{spent / cost:.1%} of {cost / 1e6:,.3f} M")
    if gates:
        table.add_row("mean share of open gates", f"{gates['mean_open']:.1%}")
        table.add_row("gates always on", f"{gates['always_on']:.1%}")
        table.add_row("gates always off", f"{gates['always_off']:.1%}")
        table.add_row("conditional gates", f"{gates['conditional']:.1%}")
    Console().print(table)


# What was asked for

_PRIORS: dict[str, type[ClosedFormPrior]] = {
    "beta": bs.Beta,
    "symbeta": bs.SymBeta,
    "relaxed-bernoulli": bs.RelaxedBernoulli,
    "normal": bs.Normal,
}


def _known(option: str, name: str, names: Iterable[str]) -> str:
    """The name that is meant, whatever its case and with or without what joins its words."""
    plain = {re.sub("[-_ ]", "", known).lower(): known for known in names}
    known = plain.get(re.sub("[-_ ]", "", name).lower())
    if known is None:
        shown = ", ".join(plain.values()).replace("_", "-")
        _fail(f"{option} must be one of {shown}, received {quoted(name)}")
    return known


def _prior(name: str, **given: float | None) -> ClosedFormPrior:
    known = _known("--prior", name, _PRIORS)
    family = _PRIORS[known]
    received = {parameter: value for parameter, value in given.items() if value is not None}
    if received.keys() != family.ranges.keys():
        expected = " and ".join(f"--{parameter}" for parameter in family.ranges)
        shown = ", ".join(f"--{parameter} {value:g}" for parameter, value in received.items())
        _fail(f"--prior {known} takes {expected}, received {shown or 'no parameters'}")
    try:
        return family(**received)  # type: ignore[arg-type]
    except ValueError as error:
        _fail(error)


def _start(path: Path) -> Tensor:
    """The logits of the values in a file, in its shape."""
    try:
        values = read_values(path)
    except OSError as error:
        _fail(f"{path}: {error.strerror or error}")
    except ValueError as error:
        _fail(error)
    outside = values[~((values >= 0) & (values <= 1))]
    if len(outside):
        _fail(
            f"{path}: expected values between 0 and 1, received {outside[0].item()!r} "
            f"({len(outside)} of {values.numel()} values are outside)"
        )
    return torch.logit(values, eps=_MARGIN)


# What comes of it


def _prepare(folder: Path, names: list[str], force: bool) -> None:
    """Make the folder, and see before any work is done that nothing in it would be lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _fail(f"{folder}: {error.strerror}, expected a folder to write to")
    if not os.access(folder, os.W_OK):
        _fail(f"{folder}: expected a folder that can be written to")
    # A symbolic link is something too, wherever it points to.
    present = [name for name in names if os.path.lexists(folder / name)]
    if present and not force:
        _fail(
            f"{folder} already holds {', '.join(present)}; --force replaces them, --output writes elsewhere"
        )
    for name in names:
        if (folder / name).exists() and not (folder / name).is_file():
            _fail(f"{folder / name}: expected a file to replace, received a folder or a device")


def _write(path: Path, write: Callable[[Path], object], force: bool) -> None:
    """Write a file as a whole or not at all, and over an earlier one only if forced."""
    try:
        with replaced(path) if force else created(path) as partial:
            write(partial)
    except FileExistsError:
        _fail(f"{path} was written by another process; --force replaces it, --output writes elsewhere")
    except OSError as error:
        _fail(f"{path}: {error.strerror or error}")
    print(f"wrote {path}")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
