"""The ablation again, from trained weights and with a teacher: what gates gain over a network as thin.

``python benchmarks/ablation/from_trained.py`` trains what is not yet in ``from_trained``, seed by seed, and
writes the table and the figure of the guide. Every network is taught by the same one: a ResNet-8 of width 16.
Networks with gates start from its weights and are trained for as many epochs again; its rivals are thinner
networks without gates, which have all these epochs for themselves. Finished runs are small files, so that it
can be interrupted at any time. ``--summary`` trains nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchshaping.storage.files import replaced
from batchshaping.training.config import RunConfig, recorded_config
from batchshaping.training.run import resume, train
from batchshaping.training.threads import using_threads

sys.path.insert(0, str(Path(__file__).parent))

import ablation

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = HERE / "from_trained"
FOLDERS = ROOT / "outputs" / "ablation-from-trained"

SEEDS = (0, 1, 2)
WIDTHS = (6, 8, 10)
BUDGETS = (0.15, 0.25)
EPOCHS = 12
TEACHER = "teacher"

SHARED = {
    "data": "fashion-mnist",
    "network": "resnet8",
    "stem_stride": 2,
    "batch_size": 128,
    "schedule": "cosine",
    "evaluate_every": 4,
    "logger": "none",
    "channels_last": True,
}
GATED = {"width": 16, "epochs": EPOCHS, "penalty": 5.0, "penalty_begin": 0.1, "penalty_end": 0.5}

ARMS: dict[str, dict[str, Any]] = {
    TEACHER: {"gated": False, "width": 16, "epochs": EPOCHS},
    **{
        f"{kind}-{budget}": {**GATED, **settings, "budget": budget}
        for budget in reversed(BUDGETS)
        for kind, settings in {"bas": {}, "l0": {"shaping": 0.0}, "groups": {"gates_per_layer": 8}}.items()
    },
    **{f"ungated-{width}": {"gated": False, "width": width, "epochs": 2 * EPOCHS} for width in WIDTHS},
}
KINDS = {
    "ungated": "ungated, taught",
    "l0": "gated, L0 only",
    "bas": "gated, batch-shaping",
    "groups": "gated, batch-shaping, eight gates a layer",
}


def runs() -> Iterator[tuple[str, RunConfig]]:
    """Every run by its name, without the folder of its teacher; seed by seed."""
    for seed in SEEDS:
        for arm, settings in ARMS.items():
            yield f"{arm}-seed{seed}", RunConfig(**{**SHARED, **settings, "seed": seed})


def taught_by(name: str) -> str | None:
    """The run that teaches a run, and whose weights one with gates starts from."""
    arm, _, seed = name.rpartition("-seed")
    return None if arm == TEACHER else f"{TEACHER}-seed{seed}"


def finished(path: Path, config: RunConfig) -> bool:
    """Whether there is a result of this very configuration, wherever its teacher lay."""
    if not path.exists():
        return False
    places = {"start": None, "start_sha256": None, "teacher": "start", "teacher_sha256": None}
    return recorded_config({**json.loads(path.read_text())["config"], **places}) == config


def run(name: str, config: RunConfig) -> str:
    """Train, or go on, and keep what the report shows."""
    folder, teacher = FOLDERS / name, taught_by(name)
    if teacher is not None:
        place = str(FOLDERS / teacher)
        config = config.model_copy(update={"start": place} if config.network.gated else {"teacher": place})
    result = resume(folder) if (folder / "config.yaml").exists() else train(config, folder)
    result["config"] |= {place: None for place in ("start", "teacher") if result["config"][place] != "start"}
    result["least"] = result["most"] = []
    with replaced(RESULTS / f"{name}.json") as partial:
        partial.write_text(json.dumps(ablation.rounded(result), separators=(",", ":")) + "\n")
    return f"{name}: {result['accuracy']:.2%} at {result['multiply_adds'] / 1e6:.3f} M"


def main() -> None:
    """Run what is missing and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--summary", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    wanted = dict(runs())
    with using_threads(1):
        for name, config in wanted.items():
            if not arguments.summary and not finished(RESULTS / f"{name}.json", config):
                print(run(name, config), flush=True)


if __name__ == "__main__":
    main()
