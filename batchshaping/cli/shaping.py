"""``batchshaping fit``: shape values to a prior."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import batchshaping as bs
from batchshaping.cli.command import app
from batchshaping.cli.errors import extras, fail
from batchshaping.cli.output import (
    FILES,
    LARGEST_SEED,
    PARAMETERS,
    START,
    TRAINING,
    OutputFolder,
    prepare,
    progress_bar,
    write,
)
from batchshaping.priors.closed_form import ClosedFormPrior
from batchshaping.statistics import STATISTICS
from batchshaping.storage.files import quoted
from batchshaping.storage.values import read_values, write_values

__all__ = ["fit", "known_name"]

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
            rich_help_panel=PARAMETERS,
        ),
    ] = None,
    b: Annotated[
        float | None,
        typer.Option(help="Second concentration of beta, positive.", rich_help_panel=PARAMETERS),
    ] = None,
    mean: Annotated[
        float | None,
        typer.Option(help="Mean of relaxed-bernoulli, in (0, 1).", rich_help_panel=PARAMETERS),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Temperature of relaxed-bernoulli, positive.", rich_help_panel=PARAMETERS),
    ] = None,
    loc: Annotated[float | None, typer.Option(help="Mean of normal.", rich_help_panel=PARAMETERS)] = None,
    scale: Annotated[
        float | None,
        typer.Option(help="Standard deviation of normal, positive.", rich_help_panel=PARAMETERS),
    ] = None,
    values: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            readable=False,  # what cannot be read is said below
            help="Values in [0, 1] to shape, of any shape: .npy, .csv (a first row of names is skipped) or "
            f".pt (one tensor; no code in it is run). Those closer than {_MARGIN:g} to 0 or 1 start at that "
            "distance. Default: 500 values from random logits.",
            rich_help_panel=START,
        ),
    ] = None,
    init: Annotated[
        float,
        typer.Option(
            help="The random logits are uniform in (-INIT, INIT).", metavar="INIT", rich_help_panel=START
        ),
    ] = 4.0,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the random logits.",
            metavar="SEED",
            min=0,
            max=LARGEST_SEED,
            rich_help_panel=START,
        ),
    ] = 42,
    statistic: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What is minimized: anderson-darling; cramer-von-mises, which is the loss as published and "
            "stalls where values lie outside of the prior's mass; wasserstein; or, for normal, epps-pulley.",
            rich_help_panel=TRAINING,
        ),
    ] = "anderson-darling",
    steps: Annotated[
        int,
        typer.Option(
            help="How often the values are moved.", metavar="COUNT", min=1, rich_help_panel=TRAINING
        ),
    ] = 200,
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate of Adam on the logits.", rich_help_panel=TRAINING)
    ] = 0.1,
    output: OutputFolder = Path("outputs/fit"),
    animation: Annotated[
        bool,
        typer.Option("--animation/--no-animation", help="Whether to draw fit.gif.", rich_help_panel=FILES),
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files of an earlier fit.", rich_help_panel=FILES)
    ] = False,
) -> None:
    """Shape values between 0 and 1 to a prior.

    The values are the sigmoids of logits, which Adam moves until the values have the distribution of the
    prior. The batch-shaping loss, before and after, tells how far from it they are. Written are the shaped
    values (**values.npy**, in the shape and order they came in), a figure (**fit.png**) and an animation
    (**fit.gif**).

    Example: **batchshaping fit --prior normal --loc 0.6 --scale 0.1**
    """
    chosen = known_name("--statistic", statistic, STATISTICS)
    target = _prior(prior, a=a, b=b, mean=mean, temperature=temperature, loc=loc, scale=scale)
    for name, number in (("--learning-rate", learning_rate), ("--init", init)):
        if not (number > 0 and math.isfinite(number)):
            fail(f"{name} must be positive and finite, received {number:g}")
    with extras():
        from batchshaping.experiments.fit import fit as shape_values
        from batchshaping.experiments.fit import published_start
        from batchshaping.figures.fits import animate_fit, plot_fit
    start = published_start(init, seed=seed) if values is None else _start(values)
    loss = partial(bs.batch_shaping, prior=target, statistic=chosen)
    try:
        loss(torch.sigmoid(start))
    except ValueError as error:
        fail(error)
    prepare(output, ["values.npy", "fit.png", *["fit.gif"] * animation], force)

    with progress_bar() as bar:
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
    write(output / "values.npy", lambda path: write_values(path, last), force)
    write(output / "fit.png", lambda path: plot_fit(shaped).savefig(path, format="png"), force)
    if animation:
        write(output / "fit.gif", lambda path: animate_fit(shaped, path), force)


_PRIORS: dict[str, type[ClosedFormPrior]] = {
    "beta": bs.Beta,
    "symbeta": bs.SymBeta,
    "relaxed-bernoulli": bs.RelaxedBernoulli,
    "normal": bs.Normal,
}


def known_name(option: str, name: str, names: Iterable[str]) -> str:
    """The name that is meant, whatever its case and with or without what joins its words."""
    plain = {re.sub("[-_ ]", "", known).lower(): known for known in names}
    known = plain.get(re.sub("[-_ ]", "", name).lower())
    if known is None:
        shown = ", ".join(plain.values()).replace("_", "-")
        fail(f"{option} must be one of {shown}, received {quoted(name)}")
    return known


def _prior(name: str, **given: float | None) -> ClosedFormPrior:
    known = known_name("--prior", name, _PRIORS)
    family = _PRIORS[known]
    received = {parameter: value for parameter, value in given.items() if value is not None}
    if received.keys() != family.ranges.keys():
        expected = " and ".join(f"--{parameter}" for parameter in family.ranges)
        shown = ", ".join(f"--{parameter} {value:g}" for parameter, value in received.items())
        fail(f"--prior {known} takes {expected}, received {shown or 'no parameters'}")
    try:
        return family(**received)  # type: ignore[arg-type]
    except ValueError as error:
        fail(error)


def _start(path: Path) -> Tensor:
    """The logits of the values in a file, in its shape."""
    try:
        values = read_values(path)
    except OSError as error:
        fail(f"{path}: {error.strerror or error}")
    except ValueError as error:
        fail(error)
    outside = values[~((values >= 0) & (values <= 1))]
    if len(outside):
        fail(
            f"{path}: expected values between 0 and 1, received {outside[0].item()!r} "
            f"({len(outside)} of {values.numel()} values are outside)"
        )
    return torch.logit(values, eps=_MARGIN)
