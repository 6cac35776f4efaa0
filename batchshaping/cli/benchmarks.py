"""``batchshaping bench inference``: conditional inference beside dense inference, on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import rich.box
import torch
import typer
from rich.console import Console
from rich.table import Table

from batchshaping.cli.command import app
from batchshaping.cli.errors import extras, fail
from batchshaping.cli.output import FILES, LARGEST_SEED, OutputFolder, prepare, progress_bar, write
from batchshaping.cli.runs import refused
from batchshaping.storage.files import quoted
from batchshaping.training.networks import Network, network_settings

if TYPE_CHECKING:
    from batchshaping.experiments.inference import Comparison

__all__ = ["bench", "inference"]

bench = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
"""The command ``batchshaping bench``, with a command for each benchmark."""

app.add_typer(bench, name="bench")

_WHAT, _HOW = "What is computed", "How it is measured"

_WHOLE = {"networks": "resnet18,resnet34,resnet50", "sizes": "224", "batches": "1,16", "turns": 100}
_QUICK = {"networks": "resnet18", "sizes": "64", "batches": "1", "turns": 10, "compiled": False}


@bench.callback()
def _bench() -> None:
    """Measure what this package gains on this machine."""


@bench.command()
def inference(
    networks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Networks, as batchshaping train --network has them. [default: resnet18,resnet34,resnet50]",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    gates_per_layer: Annotated[
        str,
        typer.Option(
            metavar="COUNT",
            help="Gates in a layer of a ResNet, each for as many channels, at least 16; none is a gate for "
            "each channel.",
            rich_help_panel=_WHAT,
        ),
    ] = "8",
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS", help="Sides of the square images. [default: 224]", rich_help_panel=_WHAT
        ),
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(
            metavar="COUNTS",
            help="Numbers of images that are computed together. [default: 1,16]",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    shares: Annotated[
        str, typer.Option(metavar="SHARES", help="Shares of gates that are open.", rich_help_panel=_WHAT)
    ] = "1,0.5,0.3",
    turns: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            min=1,
            help="How often each way to compute is timed, each time with other gates open. [default: 100]",
            rich_help_panel=_HOW,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT", min=1, help="Threads, if not as many as PyTorch takes.", rich_help_panel=_HOW
        ),
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compiled/--no-compiled",
            help="Whether torch's compiler computes the dense network too, which takes about a minute and "
            "needs a C++ compiler. [default: on]",
            show_default=False,
            rich_help_panel=_HOW,
        ),
    ] = None,
    planned: Annotated[
        bool,
        typer.Option(
            "--planned",
            help="Let the inference copy measure beforehand which of its ways are the fastest.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of weights, images and gates.",
            metavar="SEED",
            min=0,
            max=LARGEST_SEED,
            rich_help_panel=_HOW,
        ),
    ] = 0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="One small case, in some seconds, where no other is given: to see that it works.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    output: OutputFolder = Path("outputs/bench"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON.", rich_help_panel=FILES)
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files of an earlier measurement.", rich_help_panel=FILES)
    ] = False,
) -> None:
    """Time networks that compute what is open beside the same networks without gates.

    Chance decides which gates are open, anew in each turn. The network without gates is computed as it is
    (eager), with normalizations folded in and weights packed (packed), and by torch's compiler (compiled);
    all take turns. Times are those of a batch, medians over the turns. Written are the results
    (**inference.json**), their tables (**inference.md**) and a figure (**inference.png**).

    Example: **batchshaping bench inference --networks msvit-small16 --batches 1,32 --shares 0.3,0.5,0.7**
    """
    given = {"networks": networks, "sizes": sizes, "batches": batches, "turns": turns, "compiled": compiled}
    chosen: dict[str, Any] = {"compiled": True, **(_QUICK if quick else _WHOLE)}
    chosen |= {name: value for name, value in given.items() if value is not None}
    sides = _numbers("--sizes", chosen["sizes"], _count, "whole numbers from 1")
    counts = _numbers("--batches", chosen["batches"], _count, "whole numbers from 1")
    opened = _numbers("--shares", shares, _share, "numbers from 0 to 1")
    with extras(), refused():
        subjects = [_network(name.strip(), gates_per_layer, sides) for name in chosen["networks"].split(",")]
    with extras():
        from batchshaping.experiments.inference import as_markdown, compare
        from batchshaping.figures.inference import plot_inference
        from batchshaping.training.latency import machine
        from batchshaping.training.threads import using_threads
    prepare(output, ["inference.json", "inference.md", "inference.png"], force)

    compared = []
    with using_threads(threads) if threads else nullcontext(), progress_bar() as bar, extras(), refused():
        measured_on = machine()
        for network, size, batch in bar.track([*product(subjects, sides, counts)]):
            compared.append(
                compare(
                    network,
                    size,
                    batch,
                    opened,
                    turns=chosen["turns"],
                    seed=seed,
                    compiled=chosen["compiled"],
                    planned=planned,
                )
            )
    results = {"version": 1, "machine": measured_on, "comparisons": [each.as_json() for each in compared]}
    if as_json:
        print(json.dumps(results))
    else:
        _show(compared)
    # Beside JSON nothing else is printed.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        text, figure = as_markdown(compared, measured_on), plot_inference(compared)
        write(output / "inference.json", lambda path: path.write_text(json.dumps(results)), force)
        write(output / "inference.md", lambda path: path.write_text(text, encoding="utf-8"), force)
        write(output / "inference.png", lambda path: figure.savefig(path, format="png"), force)


def _network(name: str, gates_per_layer: str, sides: Sequence[int]) -> Network:
    """The network of a name, with as many gates in a layer if its family has this setting.

    Raises:
        ValueError: if there is none, or it cannot be built for images of one of the sizes.
    """
    network = network_settings(network=name)
    if "gates_per_layer" in network.settings():
        network = network_settings(network=name, gates_per_layer=gates_per_layer)
    with torch.device("meta"):  # where nothing is computed
        for side in sides:
            network.ungated(1000, (3, side, side))
    return network


_Number = TypeVar("_Number", int, float)


def _numbers(option: str, text: str, read: Callable[[str], _Number], expected: str) -> list[_Number]:
    """The numbers of an option that takes several."""
    try:
        return [read(part) for part in text.split(",")]
    except ValueError:
        fail(f"{option} must be {expected}, separated by commas, received {quoted(text)}")


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _share(text: str) -> float:
    if not 0 <= (number := float(text)) <= 1:
        raise ValueError
    return number


def _show(compared: Sequence[Comparison]) -> None:
    from batchshaping.experiments.inference import HEADS, notes, rows, title

    console = Console()
    for comparison in compared:
        table = Table(box=rich.box.SIMPLE_HEAD, title=title(comparison), title_justify="left")
        for k, head in enumerate(HEADS):
            table.add_column(head, justify="right" if k else "left", no_wrap=not k)
        for row in rows(comparison):
            table.add_row(*row)
        console.print(table)
        for note in notes(comparison):
            console.print(note, highlight=False)
