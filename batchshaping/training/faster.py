"""From a trained network to a faster one: gates, training, budgets, latency, export and a page, step by step.

Each step leaves its file in one folder, which is that of an ordinary run:

========================== =========================================================================
``result.json``            gates are added to the network and trained, with the network as its teacher
``budgets.json``           the same network at other budgets, and what can be promised of its accuracy
``latency.json``           the time of single images, beside the network without gates
``model.onnx``             the network for other software, where it can be written
``report.html``            all of it as a page, whose first sentence says what came of it
========================== =========================================================================

A step whose file is there is not repeated, so that an interrupted command goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from batchshaping.gates.export import export_onnx
from batchshaping.gates.inference import conditional_inference
from batchshaping.report.latency import read_latency as latency_of
from batchshaping.report.page import report_html
from batchshaping.storage.files import replaced
from batchshaping.training.budgets import measure_budgets, read_budgets
from batchshaping.training.config import RunConfig
from batchshaping.training.folder import CONFIG, RunError, read_result, read_run_config
from batchshaping.training.latency import measure_run, read_latency
from batchshaping.training.run import load_run, resume, train

__all__ = ["EXPORT", "REPORT", "Faster", "faster_config", "make_faster"]

EXPORT = "model.onnx"
"""Name of the file with the network for other software."""

REPORT = "report.html"
"""Name of the page."""

_OTHER_BUDGETS = (0.5, 0.75, 1.25)
"""Budgets at which the network is tried too, as shares of its own."""


@dataclass(frozen=True)
class Faster:
    """What came of making a network faster.

    Attributes:
        result: of the network with gates, as in ``result.json``.
        budgets: as in ``budgets.json``.
        latency: as in ``latency.json``.
        not_exported: why there is no ``model.onnx``; None if there is one.
    """

    result: dict[str, Any]
    budgets: dict[str, Any]
    latency: dict[str, Any]
    not_exported: str | None

    @property
    def accuracy_lost(self) -> float:
        """Test accuracy of the network without gates, less that with gates."""
        return float(self.result["teacher"]["accuracy"] - self.result["accuracy"])

    @property
    def times_faster(self) -> float:
        """Median time of an image without gates, over that with gates."""
        shown = latency_of({"latency": self.latency})
        assert shown is not None
        return shown.times_faster


def faster_config(original: Path, budget: float, **settings: Any) -> RunConfig:
    """The configuration with which gates are added to a trained network.

    Args:
        original: the folder of a finished run without gates.
        budget: share of its multiply-adds that an image may cost, on average.
        settings: replace those of the run and those that its family of networks takes for this.

    Raises:
        RunError: if the folder contains no finished run.
        ValueError: in one line, if the network has gates already, or a setting is out of range.
    """
    config = read_run_config(original)
    if config.network.gated:
        raise ValueError(f"{original}: expected a network without gates, received one with gates")
    read_result(original)
    recipe = {"start": str(original.resolve()), "budget": budget, **config.network.recipe(budget)}
    kept = config.model_dump(exclude={"start", "start_sha256", "teacher", "teacher_sha256", "recalibrate"})
    return RunConfig(**{**kept, **recipe, **settings})


def make_faster(
    original: Path,
    output: Path,
    budget: float = 0.4,
    *,
    accuracy_loss: float = 0.01,
    confidence: float = 0.95,
    progress: bool = False,
    told: Callable[[str], object] = lambda step: None,
    **settings: Any,
) -> Faster:
    """Make a trained network faster, and say by how much.

    Args:
        original: the folder of a finished run without gates.
        output: the folder of what is made; if it holds a part of it, the rest is made.
        budget: share of the multiply-adds that an image may cost, on average.
        accuracy_loss: what the accuracy on new images may be lower than with all gates open, for the promise.
        confidence: of the promise.
        progress: whether to show a progress bar for the training.
        told: is called with what is done, at the beginning of each step.
        settings: replace those of the original run and of the recipe, such as ``epochs``.

    Raises:
        RunError: if one of the folders cannot be used, or ``output`` holds something else.
        DataError: if the data cannot be used.
        ValueError: in one line, if a setting is out of range, or the budget cannot be met.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> short = {"epochs": 1, "train_images": 128, "logger": "none"}
        >>> _ = train(RunConfig(width=4, gated=False, **short), folder / "original")
        >>> made = make_faster(folder / "original", folder / "faster", budget=0.9)
        >>> sorted(path.name for path in (folder / "faster").iterdir())[-3:]
        ['report.html', 'result.json', 'teacher.safetensors']
    """
    config = faster_config(original, budget, **settings)
    told("training the gates")
    result = _trained(config, output, progress)
    told("trying other budgets")
    budgets = read_budgets(output)
    if budgets is None or _promised(budgets) != (accuracy_loss, confidence):
        shares = _budgets(budget, result["cost"])
        budgets = measure_budgets(output, shares, accuracy_loss=accuracy_loss, confidence=confidence)
    told("measuring the time of images")
    latency = read_latency(output) or measure_run(output)
    told("exporting")
    not_exported = _export(output)
    told("writing the page")
    runs = {
        original.resolve().name: read_result(original),
        output.resolve().name: result | {"latency": latency, "budgets": budgets},
    }
    with replaced(output / REPORT) as page:
        page.write_text(report_html(runs), encoding="utf-8", errors="replace")
    return Faster(result, budgets, latency, not_exported)


def _trained(config: RunConfig, output: Path, progress: bool) -> dict[str, Any]:
    """Train, or go on with the training, if it is the one that is asked for."""
    if not os.path.lexists(output / CONFIG):
        return train(config, output, progress=progress)
    there = read_run_config(output).model_dump(mode="json")
    # A run finds its checksums when it begins. It may go on with a start elsewhere; here it would be another.
    differing = [name for name in config.differing(there) if name not in ("start_sha256", "teacher_sha256")]
    if differing or there["start"] != config.start:
        changed = ", ".join(f"{name} {json.dumps(there[name])}" for name in differing or ["start"])
        raise RunError(f"{output}: holds another run, with {changed}; choose another folder")
    return resume(output, progress=progress)


def _budgets(budget: float, cost: dict[str, Any]) -> list[float]:
    """Budgets that gates can meet, the one that is asked for among them."""
    least = 1.05 * cost["fixed"] / cost["dense"]
    return [share for share in sorted([budget, *(s * budget for s in _OTHER_BUDGETS)]) if least < share < 1]


def _promised(budgets: dict[str, Any]) -> tuple[float, float] | None:
    """Loss of accuracy and confidence of the promise that was measured."""
    promise = budgets["guarantee"]
    return None if promise is None else (promise["accuracy_loss"], promise["confidence"])


def _export(output: Path) -> str | None:
    """Write the network for other software; why it cannot be written, if so."""
    path = output / EXPORT
    if os.path.lexists(path):
        return None
    if not (find_spec("onnx") and find_spec("onnxscript")):
        return "it needs pip install 'batchshaping[onnx]'"
    network, data = load_run(output)
    try:
        with replaced(path) as partial:
            export_onnx(conditional_inference(network), partial, torch.zeros(1, *data.shape))
    except ValueError as error:  # a family whose computation cannot be written
        return str(error)
    return None
