"""What a memory of past batches gains on a batch of 8, as a table in Markdown and a figure.

``python benchmarks/history_on_small_batches.py [--docs docs]`` prints the table and, with ``--docs``, writes
it and the figure into the guide.

64 gates are the sigmoids of a small network of 32 features, and Adam shapes them to Beta(0.6, 0.4), in
batches out of 8,192 examples. What is measured is the loss over all examples, which no batch of 8 shows, and
how far each gate's values spread: their standard deviation over that of the prior.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from guide import scientific, table, write_table
from matplotlib.figure import Figure
from torch import nn

import batchshaping as bs
from batchshaping.figures.style import COLORS, house_style

EXAMPLES, FEATURES, HIDDEN, GATES = 8192, 32, 16, 64
STEPS, LEARNING_RATE = 2000, 3e-3
SEEDS = (0, 1, 2)
PRIOR = bs.Beta(0.6, 0.4)


@dataclass(frozen=True)
class Setting:
    """How many samples a step has, and how many past batches it remembers."""

    batch: int
    history: int = 0


REMEMBERING = tuple(Setting(8, history) for history in (0, 1, 3, 7, 15, 31, 63))
LARGER = tuple(Setting(batch) for batch in (16, 32, 64, 256))


def train(setting: Setting, seed: int) -> tuple[float, float]:
    """The loss over all examples after training, and the spread of the gates over that of the prior."""
    torch.manual_seed(seed)
    data = torch.randn(EXAMPLES, FEATURES)
    network = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, GATES), nn.Sigmoid())
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    loss = bs.BatchShapingLoss(PRIOR, dim=0, history=setting.history)
    for _ in range(STEPS):
        batch = data[torch.randint(EXAMPLES, (setting.batch,))]
        optimizer.zero_grad()
        loss(network(batch)).backward()
        optimizer.step()
    with torch.no_grad():
        gates = network(data)
    spread = gates.std(dim=0).mean() / PRIOR.variance.sqrt()
    return bs.batch_shaping(gates, PRIOR, dim=0).item(), spread.item()


def draw(losses: dict[Setting, list[float]], path: Path) -> None:
    """The loss over all examples against the number of samples that the empirical CDF is made of."""
    with house_style():
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        ax = figure.add_subplot()
        groups = (
            (REMEMBERING, "batch of 8 with a memory", "empirical", "o", "-"),
            ((Setting(8), *LARGER), "larger batches, no memory", "loss", "s", "--"),
        )
        for settings, label, color, marker, line in groups:
            sizes = [s.batch * (1 + s.history) for s in settings]
            medians = [statistics.median(losses[s]) for s in settings]
            low = [min(losses[s]) for s in settings]
            high = [max(losses[s]) for s in settings]
            ax.fill_between(sizes, low, high, color=COLORS[color], alpha=0.15, linewidth=0)
            ax.plot(
                sizes, medians, color=COLORS[color], marker=marker, markersize=4, linestyle=line, label=label
            )
        ax.set(
            xlabel="samples in the empirical CDF",
            ylabel="loss over all examples",
            xscale="log",
            yscale="log",
        )
        ax.set_xticks([8, 16, 32, 64, 128, 256, 512], ["8", "16", "32", "64", "128", "256", "512"])
        ax.minorticks_off()
        ax.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, help="folder of the guide, to write the table and figure into")
    docs: Path | None = parser.parse_args().docs
    began = time.perf_counter()
    losses: dict[Setting, list[float]] = {}
    rows = []
    for setting in (*REMEMBERING, *LARGER):
        found = [train(setting, seed) for seed in SEEDS]
        losses[setting] = [loss for loss, _ in found]
        rows.append(
            [
                str(setting.batch),
                str(setting.history),
                str(setting.batch * (1 + setting.history)),
                scientific(statistics.median(losses[setting])),
                f"{scientific(min(losses[setting]))} to {scientific(max(losses[setting]))}",
                f"{100 * statistics.median(spread for _, spread in found):.0f} %",
            ]
        )
    text = table(
        [
            "batch",
            "`history`",
            "samples in the CDF",
            "loss over all examples",
            f"of {len(SEEDS)} seeds",
            "spread of a gate",
        ],
        rows,
    )
    print(text)
    if docs is not None:
        write_table(docs / "which_statistic.md", "small batches", text)
        draw(losses, docs / "figures" / "history_on_small_batches.png")
    print(
        f"\n{time.perf_counter() - began:.0f} s, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
