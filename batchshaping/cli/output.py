"""What commands print and write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import rich.box
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from batchshaping.cli.errors import fail
from batchshaping.gates.guarantee import Guarantee
from batchshaping.storage.files import created, replaced

__all__ = [
    "FILES",
    "LARGEST_SEED",
    "OutputFolder",
    "PARAMETERS",
    "START",
    "TRAINING",
    "prepare",
    "progress_bar",
    "show_budgets",
    "show_latency",
    "show_metrics",
    "write",
]


PARAMETERS = "Parameters of the prior"
"""Heading of the options for the parameters of a prior."""

START = "Values to start from"
"""Heading of the options for the values that a fit starts from."""

TRAINING = "Training"
"""Heading of the options for the steps of a fit or a training."""

FILES = "Files"
"""Heading of the options for files and folders."""

OutputFolder = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER",
        readable=False,
        help="Where the files go; made if need be.",
        rich_help_panel=FILES,
    ),
]
"""The option for the folder of what a command writes."""

LARGEST_SEED = 2**32 - 1
"""The largest seed that a command takes."""


def show_metrics(metrics: dict[str, Any]) -> None:
    """Print what a run came to."""
    spent, cost, gates = metrics["multiply_adds"], metrics["cost"]["dense"], metrics["gates"]
    table = Table(box=rich.box.SIMPLE_HEAD, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("test accuracy", f"{metrics['accuracy']:.2%} of {metrics['examples']:,}")
    table.add_row("multiply-adds an image", f"{spent / 1e6:,.3f} M")
    table.add_row("of those of the ungated network", f"{spent / cost:.1%} of {cost / 1e6:,.3f} M")
    if gates:
        table.add_row("mean share of open gates", f"{gates['mean_open']:.1%}")
        table.add_row("gates always on", f"{gates['always_on']:.1%}")
        table.add_row("gates always off", f"{gates['always_off']:.1%}")
        table.add_row("conditional gates", f"{gates['conditional']:.1%}")
    Console().print(table)


def show_latency(measured: dict[str, Any]) -> None:
    """Print how long images take."""
    threads = measured["machine"]["threads"]
    table = Table(box=rich.box.SIMPLE_HEAD)
    table.add_column(f"ms an image, {threads} thread{'s' * (threads != 1)}")
    for head in ("median", "5 %", "95 %"):
        table.add_column(head, justify="right")
    for name, seconds in measured["seconds"].items():
        ends = torch.tensor(seconds, dtype=torch.double).quantile(torch.tensor([0.5, 0.05, 0.95]).double())
        table.add_row(name, *(f"{1e3 * second:.3g}" for second in ends.tolist()))
    Console().print(table)
    if not measured["machine"].get("native", True):
        print("measured without native code, which needs a C compiler, such as gcc")


def show_budgets(measured: dict[str, Any]) -> None:
    """Print what the network of a run does at other budgets, and what is promised."""
    test = measured["test"]
    table = Table(box=rich.box.SIMPLE_HEAD)
    for head in ("budget", "shift", "multiply-adds", "test accuracy"):
        table.add_column(head, justify="right")
    points = measured["calibration"]["points"] if measured["calibration"] else []
    for point, tested in zip(points, test["points"], strict=True):
        row = (f"{point['budget']:.1%}", f"{float(point['shift']):.3g}")
        table.add_row(*row, f"{tested['multiply_adds']:.1%}", f"{tested['accuracy']:.2%}")
    opened = test["all_open"]
    table.add_row("all open", "-inf", f"{opened['multiply_adds']:.1%}", f"{opened['accuracy']:.2%}")
    Console().print(table)
    if measured["guarantee"] is not None:
        print(Guarantee.from_dict(measured["guarantee"]))


def prepare(folder: Path, names: list[str], force: bool) -> None:
    """Make the folder, and see before any work is done that nothing in it would be lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{folder}: {error.strerror}, expected a folder to write to")
    if not os.access(folder, os.W_OK):
        fail(f"{folder}: expected a folder that can be written to")
    # A symbolic link is something too, wherever it points to.
    present = [name for name in names if os.path.lexists(folder / name)]
    if present and not force:
        fail(f"{folder} already holds {', '.join(present)}; --force replaces them, --output writes elsewhere")
    for name in names:
        if (folder / name).exists() and not (folder / name).is_file():
            fail(f"{folder / name}: expected a file to replace, received a folder or a device")


def write(path: Path, write: Callable[[Path], object], force: bool) -> None:
    """Write a file as a whole or not at all, and over an earlier one only if forced."""
    try:
        with replaced(path) if force else created(path) as partial:
            write(partial)
    except FileExistsError:
        fail(f"{path} was written by another process; --force replaces it, --output writes elsewhere")
    except OSError as error:
        fail(f"{path}: {error.strerror or error}")
    print(f"wrote {path}")


def progress_bar() -> Progress:
    """A bar on stderr that shows how much is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
