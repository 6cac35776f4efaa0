"""Results of runs, as training writes them, and what a page draws of them."""

from __future__ import annotations

import base64
import io
import json
import re
from typing import Any

import numpy as np
from PIL import Image

from batchshaping.training.config import RunConfig

BINS = 20
LAYERS = {"layer1.0.gate1": 4, "layer2.0.gate1": 8}
DENSE = 800_000.0
HOSTILE = ("<script>", '"quotes\'"', "</script><b>b</b>", "a &amp; b", "{{ 7 * 7 }}", "<!--<script>")


def png(rng: np.random.Generator) -> str:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(256, size=(8, 8), dtype=np.uint8)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def result(
    *,
    accuracy: float = 0.98,
    share: float = 0.6,
    classes: tuple[str, ...] = ("cat", "dog", "ship"),
    epochs: int = 3,
    **settings: Any,
) -> dict[str, Any]:
    """What training gives, with random gates that are the same for the same seed."""
    config = RunConfig(**settings).model_dump(mode="json")
    gated = config["gated"]
    rng = np.random.default_rng(config["seed"])
    spent = share * DENSE if gated else DENSE

    def shares() -> dict[str, float]:
        on, conditional, off = rng.dirichlet([1, 3, 1])
        return {"always_on": on, "always_off": off, "conditional": conditional, "mean_open": rng.random()}

    def summary() -> dict[str, Any]:
        return {
            "examples": 90,
            "loss": 0.1,
            "accuracy": accuracy,
            "multiply_adds": spent,
            "gates": shares() if gated else None,
            "layers": [
                {"name": name, "gates": gates, **shares(), "histogram": rng.integers(1, 50, BINS).tolist()}
                for name, gates in LAYERS.items()
                if gated
            ],
        }

    history = [
        {"epoch": 1 + i, "shaping": 0.5, "penalty": 0.1, "noise": 1.0, **summary()} for i in range(epochs)
    ]
    last = {name: value for name, value in history[-1].items() if name in summary()}

    def images() -> list[dict[str, Any]]:
        labels = rng.integers(len(classes), size=(4, 2)).tolist() if gated else []
        return [
            {
                "index": i,
                "label": classes[label],
                "predicted": classes[predicted],
                "multiply_adds": spent,
                "png": png(rng),
            }
            for i, (label, predicted) in enumerate(labels)
        ]

    return {
        "config": config,
        "versions": {"batchshaping": "0.1.0", "torch": "2.6.0", "python": "3.11.7"},
        "classes": list(classes),
        "seconds": 1.0,
        **last,
        "cost": {"dense": DENSE, "gates": 1000.0 * gated, "fixed": 9000.0},
        "quantiles": np.linspace(0.9 * spent, 1.1 * spent, 21).tolist(),
        "by_class": [
            {
                "name": name,
                "examples": 30,
                "accuracy": rng.random(),
                "multiply_adds": spent,
                "open": [rng.random(gates).round(4).tolist() for gates in LAYERS.values() if gated],
            }
            for name in classes
        ],
        "least": images(),
        "most": images(),
        "history": history,
    }


def latency(*networks: str, images: int = 40) -> dict[str, Any]:
    """What measuring the latency of a run gives: milliseconds that grow with multiply-adds."""
    spent = np.linspace(0.2, 0.6, images) * DENSE
    noise = np.random.default_rng(0).normal(0, 1e-5, images)
    return {
        "version": 1,
        "result": "0",
        "machine": {"processor": "a processor", "threads": 2},
        "repeats": 5,
        "images": [*range(images)],
        "multiply_adds": spent.tolist(),
        "seconds": {
            name: (1e-3 + (spent if name == "conditional" else DENSE) * 1e-9 + noise).tolist()
            for name in networks or ("conditional", "dense")
        },
    }


def budgets(certified: bool = True) -> dict[str, Any]:
    """What running the network of a run at other budgets gives."""
    point = {"budget": 0.3, "shift": 1.25, "multiply_adds": 0.298, "accuracy": 0.91}
    tested = {"multiply_adds": 0.5, "accuracy": 0.9, "lost": 10, "gained": 5}
    opened = {
        "shift": "-inf",
        "multiply_adds": 1.01,
        "accuracy": 0.905,
        "lost": 0,
        "gained": 0,
        "p_value": 0.0,
    }
    at = {
        "at_shift": {"examples": 500, "multiply_adds": 0.29, "accuracy": 0.88},
        "reference": {"examples": 500, "multiply_adds": 1.01, "accuracy": 0.9},
    }
    return {
        "version": 1,
        "result": "0",
        "calibrated_on": "training images",
        "calibration": {"examples": 1000, "points": [point, {**point, "budget": 2.0, "shift": "-inf"}]},
        "test": {"all_open": at["reference"], "points": [at["at_shift"], at["reference"]]},
        "guarantee": {
            "accuracy_loss": 0.01,
            "confidence": 0.95,
            "examples": 500,
            "reference": opened,
            "tested": [{"shift": -0.5, "p_value": 0.01 if certified else 0.3, **tested}],
        },
        "promised_on": {"images": "every second of the test images", "test": {"images": "the others", **at}},
    }


def drawn(html: str) -> Any:
    """What the script of a page is given to draw."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def stated(result: dict[str, Any], kind: str = "channel gating") -> dict[str, Any]:
    """The same result with its kind and its reference, which version 0.1 did not write."""
    return {"kind": kind, "reference": {"name": "ResNet-8, ungated", "multiply_adds": DENSE}, **result}


def of_two_scales(*, grid: tuple[int, int] = (3, 4), objects: bool = True, **settings: Any) -> dict[str, Any]:
    """What training gives of a vision transformer with tokens of two scales, with random gates."""
    settings = {"network": "msvit-mini", **settings}
    made = stated(result(**settings), "mixed-scale tokens")
    made["reference"]["name"] = "ViT/8, all fine"
    if not made["config"]["gated"]:
        return made | {"priors": None}
    rng = np.random.default_rng([made["config"]["seed"], 1])
    regions = grid[0] * grid[1]
    for each in made["by_class"]:
        each["open"] = [rng.random(regions).round(4).tolist()]
    for metrics in (made, *made["history"]):
        metrics["layers"] = [{**metrics["layers"][0], "name": "gate", "gates": regions}]
    found = {"frequency": rng.random(regions).tolist(), "auc": rng.random()} if objects else None
    learned = made["config"]["hyperprior"] is not None
    return made | {
        "priors": {"mean": rng.random(regions).tolist(), "temperature": rng.random(regions).tolist()}
        if learned
        else None,
        "regions": {
            "grid": [*grid],
            "masks": {
                which: rng.integers(2, size=(len(made[which]), regions)).tolist()
                for which in ("least", "most")
            },
            "objects": found,
        },
    }
