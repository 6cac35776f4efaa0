"""The ablation: what is wanted, what is finished, and that the guide shows what the kept results say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "ablation" / "ablation.py"


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    return load_script(SCRIPT)


def test_every_arm_has_every_seed_on_all_images(ablation: ModuleType) -> None:
    runs = list(ablation.runs(quick=False))
    assert len(dict(runs)) == len(runs) == len(ablation.ARMS) * 3
    assert {config.seed for _, config in runs} == {0, 1, 2}
    assert all(config.train_images is None and config.data.name == "fashion-mnist" for _, config in runs)


def test_the_two_kinds_of_gates_differ_by_the_loss_alone(ablation: ModuleType) -> None:
    wanted = dict(ablation.runs(quick=False))
    for budget in ablation.BUDGETS:
        shaped, l0 = (wanted[f"{kind}-{budget}-seed0"].model_dump() for kind in ("bas", "l0"))
        assert shaped.pop("shaping") > 0 and l0.pop("shaping") == 0
        assert shaped == l0


def test_a_result_counts_for_its_own_configuration_only(ablation: ModuleType, tmp_path: Path) -> None:
    (_, config), (_, other), *_ = ablation.runs(quick=True)
    path = tmp_path / "result.json"
    assert not ablation.is_finished(path, config)
    path.write_text(json.dumps({"config": config.model_dump(mode="json")}))
    assert ablation.is_finished(path, config)
    assert not ablation.is_finished(path, other)


def test_a_result_still_counts_when_there_is_a_new_setting(ablation: ModuleType, tmp_path: Path) -> None:
    (_, config), *_ = ablation.runs(quick=True)
    path = tmp_path / "result.json"
    settings = config.model_dump(mode="json")
    assert settings.pop("threads") is None
    path.write_text(json.dumps({"config": settings}))
    assert ablation.is_finished(path, config)
    assert not ablation.is_finished(path, config.model_copy(update={"threads": 2}))


def test_the_mean_and_the_deviation_of_a_point_are_those_over_the_seeds(ablation: ModuleType) -> None:
    results = [{"accuracy": a, "multiply_adds": m} for a, m in ((0.8, 1e6), (0.9, 3e6))]
    assert ablation.point(results) == pytest.approx((2.0, 85.0, 10 / math.sqrt(2)))
    assert ablation.spread([1.0, 2.0], 1) == "1.5 ± 0.7"


def test_a_point_on_the_line_between_two_ungated_networks_is_not_above_it(ablation: ModuleType) -> None:
    arms = {
        f"ungated-{width}": [{"accuracy": accuracy, "multiply_adds": macs}]
        for width, accuracy, macs in ((4, 0.8, 1e6), (8, 0.9, 4e6))
    }
    assert ablation.above_ungated([{"accuracy": 0.85, "multiply_adds": 2e6}], arms) == pytest.approx(0.0)
    assert ablation.above_ungated([{"accuracy": 0.86, "multiply_adds": 2e6}], arms) == pytest.approx(1.0)


def test_hard_classes_are_those_with_the_lowest_accuracy(ablation: ModuleType) -> None:
    classes = [
        {"accuracy": 0.1 * c, "multiply_adds": 30.0 if c in (1, 2, 3, 4, 5) else 20.0} for c in range(10)
    ]
    assert ablation.hard_over_easy({"by_class": classes}) == pytest.approx((20 + 4 * 30) / (30 + 4 * 20))


def test_the_guide_shows_what_the_kept_results_say(ablation: ModuleType) -> None:
    wanted = dict(ablation.runs(quick=False))
    kept = {path.stem: json.loads(path.read_text()) for path in (SCRIPT.parent / "results").glob("*.json")}
    assert kept.keys() == wanted.keys()
    assert all(
        ablation.is_finished(SCRIPT.parent / "results" / f"{name}.json", wanted[name]) for name in kept
    )
    guide = (ROOT / "docs" / "channel_gating.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- ablation: begin -->(.*?)<!-- ablation: end -->", guide, re.DOTALL)
    assert table is not None
    assert table[1].strip() == ablation.summarize(
        ablation.by_arm({n: kept[n] for n in wanted}, ablation.ARMS)
    )
