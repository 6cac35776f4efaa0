"""All statistics on the eight published runs, as tables in Markdown and one figure a run.

``python benchmarks/statistics_on_published_runs.py [--docs docs]`` prints the tables and, with ``--docs``,
writes them and the figures into the guide.

Every run starts where its published one does, and takes as many steps of Adam with the same learning rate;
only the loss that is descended differs. Whatever that is, two things are measured, in double precision and on
logits, where nothing saturates: the plain loss, which compares all of them, and the statistic that was
descended.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from guide import scientific, table, write_table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Distribution

import batchshaping as bs
from batchshaping.batch_shaping_loss import gbas_loss
from batchshaping.experiments.fit import published_start
from batchshaping.experiments.published import (
    PUBLISHED_GENERALIZED_RUN,
    PUBLISHED_RUNS,
    PublishedGeneralizedLoss,
    PublishedRun,
)
from batchshaping.figures.style import house_style
from batchshaping.utils import warmup_factory

Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """One way to descend, and how its line looks, in colour and in grey."""

    label: str
    statistic: str = "cramer_von_mises"
    logits: bool = False
    published: bool = False
    color: str = "#000000"
    dashes: tuple[float, ...] = ()

    def objective(self, prior: Distribution) -> Objective:
        """The loss of logits."""
        if self.logits:
            return partial(bs.batch_shaping, prior=prior, statistic=self.statistic, logits=True)
        return lambda z: bs.batch_shaping(torch.sigmoid(z), prior, statistic=self.statistic)


METHODS = (
    Method("published", published=True, color="#999999"),
    Method("Cramér-von Mises", color="#0072B2", dashes=(5, 1.5)),
    Method("Anderson-Darling", "anderson_darling", color="#D55E00", dashes=(1, 1)),
    Method("Wasserstein", "wasserstein", color="#009E73", dashes=(6, 1, 1, 1)),
    Method("Cramér-von Mises, logits", logits=True, color="#56B4E9", dashes=(3, 3)),
    Method("Anderson-Darling, logits", "anderson_darling", True, color="#E69F00", dashes=(1, 3)),
    Method("Epps-Pulley", "epps_pulley", color="#CC79A7", dashes=(8, 2, 1, 2, 1, 2)),
)


@dataclass(frozen=True, eq=False)
class Result:
    """What one way of descending came to: the values at the end, and the losses of every step."""

    logits: Tensor
    plain: Tensor
    own: float
    descended: float


def descend(
    parameters: Iterable[Tensor],
    objective: Callable[[], Tensor],
    measure: Callable[[], Tensor],
    steps: int,
    schedule: Callable[[int], float],
) -> tuple[Tensor, float]:
    """Adam. Returned are the measure at every step and after the last, and the last loss descended."""
    optimizer = torch.optim.Adam(parameters, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    measured = torch.empty(steps + 1, dtype=torch.float64)
    for step in range(steps):
        with torch.no_grad():
            measured[step] = measure()
        loss = objective()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        measured[steps] = measure()
    return measured, loss.item()


@dataclass(frozen=True)
class Case:
    """A published run, or one like it, and what its figure shows."""

    title: str
    name: str
    run: PublishedRun
    learning_rate: float = 0.1
    steps: int = 0
    logit_axis: float = 0.0
    name_in_figure: str = ""

    def descend(self, method: Method) -> Result | None:
        prior = self.run.prior
        if method.statistic == "epps_pulley" and not isinstance(prior, bs.Normal):
            return None
        z = published_start(self.run.init, draw=self.run.draw).requires_grad_()
        objective = method.objective(prior)
        if method.published:
            objective = lambda z: gbas_loss(torch.sigmoid(z), *self.run.arguments)  # noqa: E731
        measure = partial(bs.batch_shaping, prior=prior, logits=True)
        plain, descended = descend(
            [z],
            lambda: objective(z),
            lambda: measure(z.double()),
            self.steps or self.run.steps,
            warmup_factory(0, self.learning_rate),
        )
        end = z.detach().double()
        return Result(end, plain, measure(end, statistic=method.statistic).item(), descended)


_RUNS = {run.name: run for run in PUBLISHED_RUNS}
_COLD = _RUNS["test_low_temperature"]
CASES = (
    Case(
        "RelaxedBernoulli(0.2, 0.25)",
        "relaxed_bernoulli",
        _RUNS["batch_shaping_relaxed_bernoulli_p1=0.2_p2=0.25"],
        logit_axis=20,
    ),
    Case("SymBeta(0.9)", "symbeta", _RUNS["batch_shaping_symbeta_p1=0.9"], logit_axis=20),
    Case("Beta(2, 6)", "beta", _RUNS["batch_shaping_beta_p1=2_p2=6"]),
    Case("Normal(0.6, 0.1), from outside", "outside_support", _RUNS["test_outside_support"]),
    Case("Normal(0.6, 0.1), from inside", "inside_support", _RUNS["test_inside_support"]),
    Case("RelaxedBernoulli(0.8, 0.4)", "high_temperature", _RUNS["test_high_temperature"], logit_axis=15),
    Case("RelaxedBernoulli(0.8, 0.01)", "low_temperature", _COLD, logit_axis=40),
    Case(
        "the same, learning rate 10, 300 steps",
        "low_temperature_large_steps",
        _COLD,
        learning_rate=10.0,
        steps=300,
        logit_axis=800,
        name_in_figure="learning rate 10, 300 steps",
    ),
)


@dataclass(frozen=True, eq=False)
class GeneralizedResult(Result):
    """The same of the generalized run, and its learned priors."""

    total: float
    means: Tensor
    temperatures: Tensor


def descend_generalized(method: Method) -> GeneralizedResult | None:
    """The published run of the generalized loss, its arrays shaped by another statistic."""
    if method.statistic == "epps_pulley":
        return None
    run = PUBLISHED_GENERALIZED_RUN
    arrays = run.shape[0]
    torch.manual_seed(42)
    module = (
        PublishedGeneralizedLoss(arrays)
        if method.published
        else bs.GeneralizedBatchShapingLoss(arrays, dim=1, statistic=method.statistic, logits=method.logits)
    )
    z = published_start(n=run.shape).requires_grad_()

    def measure(statistic: str = "cramer_von_mises") -> Tensor:
        prior = bs.RelaxedBernoulli(module.mean.double(), module.temperature.double(), validate_args=False)
        return bs.batch_shaping(z.double(), prior, 1, statistic=statistic, logits=True)

    plain, descended = descend(
        [z, *module.parameters()],
        lambda: module(z if method.logits else torch.sigmoid(z)),
        measure,
        run.steps,
        warmup_factory(20, 0.3),
    )
    with torch.no_grad():
        total = measure() + bs.batch_shaping(module.mean, module.hyperprior) + 0.1 * module.temperature.mean()
        return GeneralizedResult(
            z.detach().double(),
            plain,
            measure(method.statistic).item(),
            descended,
            total.item(),
            module.mean.detach(),
            module.temperature.detach(),
        )


# Figures


def _loss_axes(ax: Axes, results: dict[Method, Result]) -> None:
    for method, result in results.items():
        ax.plot(result.plain.clamp_min(1e-12), color=method.color, dashes=method.dashes, label=method.label)
    steps = max(len(result.plain) for result in results.values()) - 1
    ax.set(xlabel="step", ylabel="plain loss", yscale="log", xlim=(0, steps))


def _cdf_axes(ax: Axes, results: dict[Method, Result], prior: Distribution, limit: float) -> None:
    """The empirical CDFs at the end over the target's, on values or, where they crowd at the ends, logits."""
    for method, result in results.items():
        ordered = np.sort((result.logits if limit else torch.sigmoid(result.logits)).numpy())
        heights = np.arange(1, len(ordered) + 1) / len(ordered)
        low, high = (-limit, limit) if limit else (0.0, 1.0)
        ax.plot(
            np.concatenate([[low], ordered, [high]]),
            np.concatenate([[0.0], heights, [1.0]]),
            color=method.color,
            dashes=method.dashes,
            drawstyle="steps-post",
        )
    grid = torch.linspace(-limit, limit, 801, dtype=torch.float64)
    values = torch.sigmoid(grid) if limit else torch.linspace(0, 1, 801, dtype=torch.float64)
    if limit and isinstance(prior, bs.RelaxedBernoulli):
        # Beyond the logit of what rounds to 1 the CDF goes on in the logit.
        mean, temperature = (prior.parameter(name).double() for name in ("mean", "temperature"))
        target = torch.sigmoid(temperature * grid - torch.logit(mean))
    else:
        target = prior.cdf(values)
    ax.plot(grid if limit else values, target, color="#000000", linewidth=1.0, zorder=5, label="target")
    ax.set(xlabel="logit of x" if limit else "value x", ylabel="CDF", ylim=(-0.02, 1.02))
    ax.set_xlim((-limit, limit) if limit else (0, 1))


def draw(title: str, results: dict[Method, Result], prior: Distribution, limit: float, path: Path) -> None:
    """The plain loss at every step of all ways, and where each leaves the values."""
    with house_style():
        figure = Figure(figsize=(7.4, 2.7), layout="constrained")
        loss, cdf = figure.subplots(1, 2)
        _loss_axes(loss, results)
        _cdf_axes(cdf, results, prior, limit)
        loss.set_title(title)
        cdf.set_title("at the end")
        handles, labels = loss.get_legend_handles_labels()
        target = cdf.get_legend_handles_labels()
        figure.legend(
            handles + target[0], labels + target[1], loc="outside right center", fontsize=8, handlelength=3
        )
        _save(figure, path)


def draw_generalized(results: dict[Method, GeneralizedResult], path: Path) -> None:
    """The plain loss of the arrays at every step, and the learned means against their hyperprior."""
    with house_style():
        figure = Figure(figsize=(7.4, 2.7), layout="constrained")
        loss, cdf = figure.subplots(1, 2)
        _loss_axes(loss, dict(results))
        for method, result in results.items():
            means = np.sort(result.means.numpy())
            cdf.plot(
                np.concatenate([[0.0], means, [1.0]]),
                np.concatenate([np.arange(len(means) + 1), [len(means)]]) / len(means),
                color=method.color,
                dashes=method.dashes,
                drawstyle="steps-post",
            )
        grid = torch.linspace(0, 1, 401)
        cdf.plot(grid, bs.Beta(3, 7).cdf(grid), color="#000000", linewidth=1.0, zorder=5, label="hyperprior")
        cdf.set(xlabel="mean μ of an array", ylabel="CDF", xlim=(0, 1), ylim=(-0.02, 1.02))
        loss.set_title("generalized, 30 arrays")
        cdf.set_title("learned means at the end")
        handles, labels = loss.get_legend_handles_labels()
        target = cdf.get_legend_handles_labels()
        figure.legend(
            handles + target[0], labels + target[1], loc="outside right center", fontsize=8, handlelength=3
        )
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


# Tables


def cells(losses: list[float | None]) -> list[str]:
    """The losses, the least of them in bold, with all that are as good as it in print."""
    shown = ["" if loss is None else scientific(loss) for loss in losses]
    best = scientific(min(loss for loss in losses if loss is not None and not math.isnan(loss)))
    return [f"**{text}**" if text == best else text for text in shown]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, help="folder of the guide, to write the tables and figures into")
    docs: Path | None = parser.parse_args().docs
    began = time.perf_counter()

    header = ["run", "published figure", *(method.label for method in METHODS)]
    plain_rows, own_rows = [], []
    for case in CASES:
        found = {method: case.descend(method) for method in METHODS}
        printed = case.run.loss if not case.steps else ""
        if printed:
            published = found[METHODS[0]]
            assert published is not None
            print(f"{case.title}: descended to {published.descended:.2e}, published {printed}", flush=True)
        plain_rows.append(
            [case.title, printed, *cells([None if r is None else r.plain[-1].item() for r in found.values()])]
        )
        own_rows.append(
            [case.title, *("" if r is None else scientific(r.own) for r in list(found.values())[1:])]
        )
        if docs is not None:
            results = {method: result for method, result in found.items() if result is not None}
            path = docs / "figures" / f"statistics_{case.name}.png"
            draw(case.name_in_figure or case.title, results, case.run.prior, case.logit_axis, path)

    generalized = {method: descend_generalized(method) for method in METHODS}
    found_plain = [None if r is None else r.plain[-1].item() for r in generalized.values()]
    plain_rows.append(["generalized, its 30 arrays", "", *cells(found_plain)])
    own_rows.append(
        [
            "generalized, its 30 arrays",
            *("" if r is None else scientific(r.own) for r in list(generalized.values())[1:]),
        ]
    )
    kept = {method: result for method, result in generalized.items() if result is not None}
    published = kept[METHODS[0]]
    print(
        f"generalized: descended to {published.descended:.2e}, published {PUBLISHED_GENERALIZED_RUN.loss}",
        flush=True,
    )
    generalized_table = table(
        ["generalized run, trained on", "plain total", "mean of the means", "mean temperature"],
        [
            [m.label, f"{r.total:.2e}", f"{r.means.mean():.3f}", f"{r.temperatures.mean():.3f}"]
            for m, r in kept.items()
        ],
    )
    if docs is not None:
        draw_generalized(kept, docs / "figures" / "statistics_generalized.png")

    tables = {
        "plain losses": table(header, plain_rows),
        "own statistics": table(["run", *(method.label for method in METHODS[1:])], own_rows),
        "generalized run": generalized_table,
    }
    for name, text in tables.items():
        print(f"\n{name}\n\n{text}")
        if docs is not None:
            write_table(docs / "which_statistic.md", name, text)
    print(
        f"\n{time.perf_counter() - began:.0f} s, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
