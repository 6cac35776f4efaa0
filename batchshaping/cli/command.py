"""The command ``batchshaping``, to which the other modules of this folder add commands."""

from __future__ import annotations

from typing import Annotated

import typer

import batchshaping as bs
from batchshaping.cli.errors import show_tracebacks

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
    show_tracebacks(debug)
