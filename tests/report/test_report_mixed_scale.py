"""The report of runs with tokens of two scales: masks over images, and maps over regions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_results import drawn, of_two_scales, result

from batchshaping.report.families import family_of
from batchshaping.report.page import report_html
from batchshaping.training.config import RunConfig
from batchshaping.training.run import train

LEARNED = {"shaping": 20.0, "shaping_end": None, "hyperprior": (2, 8), "penalty": 0.0}
RUNS: dict[str, dict[str, Any]] = {
    "all fine": {"gated": False},
    "chance": {"gate": "chance", "density": 0.2},
    "entropy of pixels": {"gate": "entropy", "density": 0.2},
    "token penalty": {"shaping": 0.0},
    "batch-shaping": {},
    "learned priors": LEARNED,
}


def pictures(made: dict[str, Any]) -> Any:
    return drawn(report_html({"a": made}))["runs"][0]["pictures"]


def test_each_way_to_choose_has_its_curve() -> None:
    page = report_html({name: of_two_scales(**settings) for name, settings in RUNS.items()})
    (curves,) = drawn(page)["comparisons"]
    assert {curve["name"] for curve in curves} == {*RUNS}
    assert [curve["name"] for curve in curves if curve["connected"]] == ["all fine"]


def test_maps_are_those_of_the_result() -> None:
    made = of_two_scales(**LEARNED)
    found = pictures(made)
    assert found["grid"] == [3, 4]
    assert [each["name"] for each in found["maps"]] == ["Fine", "Learned prior mean", "Has an object"]
    fine, mean, has_object = (np.array(each["rows"]) for each in found["maps"])
    # Each class has 30 images.
    np.testing.assert_allclose(
        fine.flatten(), np.mean([each["open"][0] for each in made["by_class"]], axis=0)
    )
    assert mean.flatten().tolist() == made["priors"]["mean"]
    assert has_object.flatten().tolist() == made["regions"]["objects"]["frequency"]
    r = np.corrcoef(mean.flatten(), has_object.flatten())[0, 1]
    assert f"by r = {r:.2f}" in report_html({"a": made})
    # Without objects or learned priors there is one map.
    plain = of_two_scales(objects=False)
    assert [each["name"] for each in pictures(plain)["maps"]] == ["Fine"]
    assert "by r =" not in report_html({"a": plain})
    assert pictures(of_two_scales(gated=False))["maps"] == []
    flat = of_two_scales(**LEARNED)
    flat["priors"]["mean"] = [0.5] * 12
    assert "by r =" not in report_html({"a": flat})


def test_coarse_regions_are_dimmed_over_each_image() -> None:
    made = of_two_scales()
    page = report_html({"a": made})
    masks = [*made["regions"]["masks"]["least"], *made["regions"]["masks"]["most"]]
    drawings = re.findall(r"<svg viewBox=\"0 0 4 3\".*?</svg>", page, re.DOTALL)
    assert len(drawings) == len(masks) == 8
    for drawing, mask in zip(drawings, masks, strict=True):
        squares = re.findall(r'<rect x="(\d)" y="(\d)"', drawing)
        coarse = {(region % 4, region // 4) for region, fine in enumerate(mask) if not fine}
        assert {(int(x), int(y)) for x, y in squares} == coarse and len(squares) == len(coarse)


def test_two_families_are_on_one_page() -> None:
    page = report_html({"resnet": result(), "vit": of_two_scales(), "other": of_two_scales(seed=1)})
    assert drawn(page)["families"] == ["channel_gating", "mixed_scale"]
    assert page.count("families.mixed_scale = ") == page.count("families.channel_gating = ") == 1


def test_seeds_that_start_from_their_own_weights_are_one_setting() -> None:
    starts = [{"start": f"fine-{seed}", "start_sha256": f"{seed}" * 64, "seed": seed} for seed in range(2)]
    (curves,) = drawn(report_html({s["start"]: of_two_scales(**s) for s in starts}))["comparisons"]
    assert [len(curve["points"]) for curve in curves] == [1]
    # From random weights is another setting.
    runs = {"start": of_two_scales(**starts[0]), "random": of_two_scales(seed=0)}
    (curves,) = drawn(report_html(runs))["comparisons"]
    assert [len(curve["points"]) for curve in curves] == [2]


@pytest.mark.parametrize(
    "settings", [{"gated": False}, {"gate": "chance", "density": 0.2}, {}, LEARNED, {"penalty": 0.0}], ids=str
)
def test_settings_without_effect_are_not_told(settings: dict[str, Any]) -> None:
    family, config = family_of("mixed-scale tokens"), RunConfig(network="msvit-mini", **settings)
    idle = set(family.idle(config.model_dump()))
    assert idle <= config.model_dump().keys()
    assert ("hyperprior_weight" in idle) == (not settings.get("hyperprior"))
    assert ("prior" in idle) == (settings not in ({}, {"penalty": 0.0}))
    assert ("density" in idle) == (settings.get("gated") is False)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("regions",), None),
        (("regions", "grid"), [3, 5]),
        (("regions", "grid"), [3]),
        (("regions", "grid"), [0, 12]),
        (("regions", "grid"), [2.5, 4]),
        (("regions", "grid"), [1e9, 1e9]),
        (("regions", "masks", "least"), []),
        (("regions", "masks", "least", 0), [1]),
        (("regions", "objects", "frequency"), [0.5]),
        (("regions", "objects", "auc"), float("nan")),
        (("priors", "mean"), ["high"] * 12),
        (("priors", "mean"), [0.5] * 11),
        (("config", "gate"), "variance"),
    ],
    ids=str,
)
def test_what_no_run_gives_is_refused_in_a_line(path: tuple[Any, ...], value: Any) -> None:
    broken = within = of_two_scales(**LEARNED)
    for key in path[:-1]:
        within = within[key]
    within[path[-1]] = value
    with pytest.raises(ValueError, match=r"^'a': expected the result of a run, received [^\n]*$"):
        report_html({"a": broken})


def test_what_training_writes_can_be_shown(tmp_path: Path) -> None:
    small = {"network": "msvit-mini", "patch": 2, "embedding": 8, "depth": 1, "heads": 2}
    short = {
        "budget": 0.0,
        "train_images": 64,
        "batch_size": 32,
        "epochs": 1,
        "logger": "none",
        "optimizer": "adamw",
    }
    results = {
        name: train(RunConfig(**small, **short, **settings), tmp_path / name)
        for name, settings in RUNS.items()
    }
    page = report_html(results)
    assert page.count('<svg viewBox="0 0 2 2"') == 5 * 24
