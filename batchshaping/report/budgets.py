"""What the network of a run does at other budgets, as the report shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchshaping.gates.calibration import Calibration
from batchshaping.gates.guarantee import Guarantee, described_shift
from batchshaping.report.checked import OutOfRangeError, number
from batchshaping.report.texts import percent, points, shortened

__all__ = ["Budgets", "Point", "read_budgets"]


@dataclass(frozen=True)
class Point:
    """The network at one shift of the threshold of its gates, on test images.

    Attributes:
        name: the budget, or how else the shift was found, for a reader.
        shift: of the threshold, for a reader.
        multiply_adds: mean of an image.
        accuracy: on the test images.
    """

    name: str
    shift: str
    multiply_adds: float
    accuracy: float


@dataclass(frozen=True)
class Budgets:
    """One network at many budgets.

    Attributes:
        curve: the budgets that were calibrated and all gates open, by multiply-adds.
        calibrated_on: which images the shifts were found on; None if there are no budgets.
        promised: the point of the promise, if there is one.
        promise: what it says, in a sentence.
    """

    curve: list[Point]
    calibrated_on: str | None
    promised: Point | None
    promise: str | None


def read_budgets(result: Mapping[str, Any]) -> Budgets | None:
    """The budgets in a result, if there are any.

    Raises:
        LookupError, TypeError, ValueError: if something is missing, or is not what a measurement gives.

    Example:
        >>> test = {"all_open": {"multiply_adds": 1.0, "accuracy": 0.9}, "points": []}
        >>> measured = {"calibration": None, "calibrated_on": "", "test": test, "guarantee": None}
        >>> reference = {"name": "ungated", "multiply_adds": 2e6}
        >>> read_budgets({"budgets": measured, "reference": reference}).curve
        [Point(name='all gates open', shift='−∞', multiply_adds=2000000.0, accuracy=0.9)]
    """
    if "budgets" not in result:
        return None
    measured, dense = result["budgets"], number(result["reference"]["multiply_adds"])
    calibration, test = measured["calibration"], measured["test"]
    calibrated = Calibration.from_dict(calibration).points if calibration else ()
    if len(calibrated) != len(test["points"]):
        raise OutOfRangeError("budgets of other points")
    curve = [_point("all gates open", -math.inf, test["all_open"], dense)]
    for point, tested in zip(calibrated, test["points"], strict=True):
        curve.append(_point(f"budget {percent(number(point.budget))}", point.shift, tested, dense))
    promised, promise = _promise(measured, dense)
    return Budgets(
        curve=sorted(curve, key=lambda point: point.multiply_adds),
        calibrated_on=shortened(measured["calibrated_on"]) if calibration else None,
        promised=promised,
        promise=promise,
    )


def _point(name: str, shift: float, tested: Mapping[str, Any], dense: float) -> Point:
    """A point, from what the network did with the test images."""
    shown = {-math.inf: "−∞", math.inf: "∞"}.get(shift) or f"{number(shift):.3g}".replace("-", "−")
    return Point(name, shown, number(tested["multiply_adds"]) * dense, number(tested["accuracy"]))


def _promise(measured: Mapping[str, Any], dense: float) -> tuple[Point | None, str | None]:
    """The point of the promise, and what it says."""
    if measured["guarantee"] is None:
        return None, None
    promise, on = Guarantee.from_dict(measured["guarantee"]), measured["promised_on"]
    percents = [f"{100 * number(share):.3g}" for share in (promise.accuracy_loss, promise.confidence)]
    lost, confidence = f"{percents[0]} point{'s' * (percents[0] != '1')}", percents[1]
    reference = described_shift(promise.reference.shift)
    images = f"{number(promise.examples):,} images ({shortened(on['images'])})"
    if not promise.certified:
        return None, (
            f"No shift could be certified to lose at most {lost} of accuracy against the network "
            f"{reference}, with confidence {confidence}%, by {images}."
        )
    test, before = on["test"]["at_shift"], on["test"]["reference"]
    point = _point("with the promise", promise.shift, test, dense)
    difference = points(number(test["accuracy"]) - number(before["accuracy"]))
    return point, (
        f"With confidence {confidence}%, the accuracy on new images is at most {lost} lower at shift "
        f"{point.shift} than {reference}: certified by {images}. On {number(test['examples']):,} "
        f"others ({shortened(on['test']['images'])}) the difference is {difference} points, at "
        f"{percent(number(test['multiply_adds']))} of the multiply-adds."
    )
