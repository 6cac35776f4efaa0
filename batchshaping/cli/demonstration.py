"""``batchshaping demo``: a gated network on handwritten digits, with the loss and without."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import rich.box
import typer
from rich.console import Console
from rich.table import Table

from batchshaping.cli.command import app
from batchshaping.cli.errors import extras
from batchshaping.cli.output import FILES, LARGEST_SEED, TRAINING, prepare, write

__all__ = ["demo"]


@app.command()
def demo(
    epochs: Annotated[
        int,
        typer.Option(
            help="How often each run sees every digit.", metavar="COUNT", min=1, rich_help_panel=TRAINING
        ),
    ] = 40,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of both runs.", metavar="SEED", min=0, max=LARGEST_SEED, rich_help_panel=TRAINING
        ),
    ] = 0,
    output: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            readable=False,
            help="Where gates.png goes; that of an earlier demo is replaced.",
            rich_help_panel=FILES,
        ),
    ] = Path("outputs/demo"),
) -> None:
    """Train a small gated network on digits, with and without the loss.

    For each of scikit-learn's 8 x 8 pixel digits, gates switch channels of the network on or off. Both runs
    press gates to be closed. Only one has the batch-shaping loss, which makes them conditional: open for some
    images, closed for others. Prints what came of it, and draws the gates before and after (**gates.png**).
    Takes about a minute, and no connection to a network.
    """
    with extras():
        from batchshaping.experiments.demo import draw, train
    prepare(output, ["gates.png"], force=True)

    with extras():
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
    write(output / "gates.png", lambda path: figure.savefig(path, format="png"), force=True)
