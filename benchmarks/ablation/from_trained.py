"""The ablation again, from trained weights and with a teacher: what gates gain over a network as thin.

``python benchmarks/ablation/from_trained.py`` trains what is not yet in ``from_trained``, seed by seed, and
writes the table and the figure of the guide. Every network is taught by the same one: a ResNet-8 of width 16.
Networks with gates start from its weights and are trained for as many epochs again; its rivals are thinner
networks without gates, which have all these epochs for themselves. Finished runs are small files, so that it
can be interrupted at any time. ``--times`` measures how long an image takes in the networks that were trained
here, with one thread, all in turn, and keeps that with their results. ``--summary`` trains nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from batchshaping.gates.dense import dense_inference
from batchshaping.gates.inference import conditional_inference
from batchshaping.storage.files import replaced
from batchshaping.training.config import RunConfig, recorded_config
from batchshaping.training.folder import read_run_config
from batchshaping.training.latency import seconds_of_images
from batchshaping.training.run import load_run, read_result, resume, train
from batchshaping.training.threads import using_threads

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import ablation
from guide import rounded, table, write_table

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
    TEACHER: "the teacher",
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
        partial.write_text(json.dumps(rounded(result), separators=(",", ":")) + "\n")
    return f"{name}: {result['accuracy']:.2%} at {result['multiply_adds'] / 1e6:.3f} M"


def measure_times(names: Iterable[str]) -> None:
    """Keep the median milliseconds of an image in each network, computed as inference computes it."""
    networks, images = {}, torch.empty(0)
    for name in names:
        if (FOLDERS / name / "result.json").exists():
            network, data = load_run(FOLDERS / name)
            gated = read_run_config(FOLDERS / name).network.gated
            networks[name] = (conditional_inference if gated else dense_inference)(network)
            images = data.normalize(data.test.__getitems__([*range(0, len(data.test), 100)])[0])
    with using_threads(1):
        seconds = seconds_of_images(networks, images)
    for name, values in seconds.items():
        path = RESULTS / f"{name}.json"
        result = json.loads(path.read_text()) | {"milliseconds": round(1e3 * values.median().item(), 3)}
        with replaced(path) as partial:
            partial.write_text(json.dumps(result, separators=(",", ":")) + "\n")


def summarize(results: dict[str, dict[str, Any]]) -> str:
    """The table, one row an arm."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for name, result in results.items():
        arms.setdefault(name.rpartition("-seed")[0], []).append(result)
    rivals = [arm for arm in arms if arm.startswith("ungated-")]
    rows = []
    for arm in sorted(arms, key=_place):
        kind, _, setting = arm.partition("-")
        of_arm = arms[arm]
        gates = [result["gates"] for result in of_arm if result["gates"]]
        times = [result["milliseconds"] for result in of_arm if "milliseconds" in result]
        rows.append(
            [
                KINDS[kind],
                f"{float(setting):.0%}" if gates else f"width {setting or 16}",
                str(len(of_arm)),
                ablation.spread([result["multiply_adds"] / 1e6 for result in of_arm], 3),
                ablation.spread([100 * result["accuracy"] for result in of_arm], 2),
                f"{ablation.above_ungated(of_arm, arms):+.1f}" if gates and len(rivals) > 1 else "",
                ablation.spread([100 * gate["conditional"] for gate in gates], 0) if gates else "",
                ablation.spread([100 * gate["always_off"] for gate in gates], 0) if gates else "",
                ablation.spread(times, 2) if times else "",
            ]
        )
    header = ["network", "width or budget", "seeds", "million multiply-adds", "test accuracy, %"]
    return table([*header, "above ungated", "conditional, %", "always off, %", "ms an image"], rows)


def _place(arm: str) -> tuple[int, float]:
    """A key to sort by: kind, then width or budget."""
    kind, _, setting = arm.partition("-")
    return [*KINDS].index(kind), float(setting or 0)


def main() -> None:
    """Run what is missing and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--summary", action="store_true", help="train nothing")
    parser.add_argument("--times", action="store_true", help="measure how long an image takes")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    wanted = dict(runs())
    with using_threads(1):
        for name, config in wanted.items():
            if not arguments.summary and not finished(RESULTS / f"{name}.json", config):
                print(run(name, config), flush=True)
    done = [name for name, config in wanted.items() if finished(RESULTS / f"{name}.json", config)]
    if arguments.times:
        measure_times(done)
    text = summarize({name: read_result(RESULTS / f"{name}.json") for name in done})
    print(text)
    write_table(ROOT / "docs" / "channel_gating.md", "ablation from trained weights", text)


if __name__ == "__main__":
    main()
