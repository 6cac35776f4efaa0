"""Write what `batchshaping bench inference` measured into guide and README: `make inference`.

The results are read from benchmarks/results/inference; each folder in it was the output of one measurement.
"""

from __future__ import annotations

import json
from pathlib import Path

from guide import write_table

from batchshaping.experiments.inference import Comparison, machine_line, section, summary
from batchshaping.figures.inference import plot_groups, plot_inference

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "inference"
GUIDE = ROOT / "docs" / "conditional_inference.md"


def main() -> None:
    found = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*/inference.json"))]
    machines = dict.fromkeys(machine_line(each["machine"]) for each in found)
    compared = [Comparison.of_json(each) for measured in found for each in measured["comparisons"]]
    compared.sort(key=lambda each: (each.network.startswith("msvit"), each.network, each.batch))
    resnets, msvits = (
        [each for each in compared if each.network.startswith(name)] for name in ("resnet", "msvit")
    )
    for page in (GUIDE, ROOT / "README.md"):
        write_table(page, "inference of resnets", "\n\n".join([summary(resnets), *machines]))
    write_table(GUIDE, "inference of msvits", "\n\n".join([*map(section, msvits), *machines]))
    figures = {"groups": plot_groups(), "inference": plot_inference(compared)}
    for name, figure in figures.items():
        figure.savefig(ROOT / "docs" / "figures" / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
