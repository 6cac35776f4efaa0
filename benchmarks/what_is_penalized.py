"""What a penalty on multiply-adds should read of the gates, once their noise is less than the full one.

Trains the network of `batchshaping train` on the digits with penalties on three readings of the gates, with
everything else the same, and prints the table of docs/channel_gating.md:

    python benchmarks/what_is_penalized.py
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from batchshaping.gates.gate import gate_probabilities, named_gates, straight_through_decisions
from batchshaping.training import module, run
from batchshaping.training.config import RunConfig

READINGS: dict[str, Callable[[nn.Module], list[Tensor]]] = {
    "straight-through decisions": straight_through_decisions,
    "probabilities": gate_probabilities,
    "open probabilities": lambda model: [gate.open_probabilities for gate in named_gates(model).values()],
}


def train(reading: str, budget: float, seed: int) -> tuple[float, float, float]:
    """Test accuracy, and multiply-adds spent in the last twentieth of training and in the test, all in %."""
    spent: list[float] = []

    class Spent(module.GatedClassifier):
        def on_train_batch_end(self, *_: object) -> None:
            if self.progress > 0.95:
                spent.append(self._spent().item() / self.cost.dense)

    torch.manual_seed(seed)
    module_of_run, penalized = run.GatedClassifier, module.straight_through_decisions
    run.GatedClassifier, module.straight_through_decisions = Spent, READINGS[reading]
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = RunConfig(budget=budget, seed=seed, evaluate_every=40, logger="none", accelerator="cpu")
            result = run.train(config, Path(folder))
    finally:
        run.GatedClassifier, module.straight_through_decisions = module_of_run, penalized
    tested = result["multiply_adds"] / result["cost"]["dense"]
    return 100 * result["accuracy"], 100 * sum(spent) / len(spent), 100 * tested


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| penalized | budget | test accuracy, % | spent in training | spent in the test |")
    print("|---|---|---|---|---|")
    for budget in (0.4, 0.2):
        for reading in READINGS:
            runs = torch.tensor([train(reading, budget, seed) for seed in range(seeds)])
            accuracy, *spent = runs.mean(dim=0).tolist()
            cells = [reading, f"{budget:.0%}", f"{accuracy:.1f}", *(f"{share:.1f} %" for share in spent)]
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
