"""The trained network of a run at other budgets, without training, and what can be promised of it.

The file ``budgets.json`` in the folder of a run has

================== ==================================================================================
``version``        of this format
``result``         SHA-256 of the ``result.json`` that it belongs to
``calibrated_on``  which images the shifts were found on
``calibration``    of :func:`~batchshaping.gates.calibration.calibrate`; null where no budget was given
``test``           for each budget, and for all gates open (``all_open``), what the network does with the
                   test images
``guarantee``      of :func:`~batchshaping.gates.guarantee.guarantee`; null where none was asked for
``promised_on``    which images the promise was made by, and what the network does at its shift, and at the
                   reference, with other ones (``test``)
================== ==================================================================================

Multiply-adds are shares of those of the network without gates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from batchshaping.gates.calibration import calibrate
from batchshaping.gates.cost import MultiplyAdds
from batchshaping.gates.gate import Gate
from batchshaping.gates.guarantee import guarantee
from batchshaping.gates.outcomes import Outcome, outcomes
from batchshaping.training.data import Data, batches
from batchshaping.training.folder import RunError, read_run_config
from batchshaping.training.measurements import Measurement
from batchshaping.training.run import load_run
from batchshaping.training.threads import suitable_threads, using_threads

__all__ = ["BUDGETS", "measure_budgets", "read_budgets"]

BUDGETS = "budgets.json"
"""Name of the file in the folder of a run."""

_BUDGETS = Measurement(BUDGETS, version=1, noun="budgets", option="--budgets")

_BATCH = 256

_MOST_IMAGES = 10_000
"""How many training images are calibrated on at most: their mean cost is known to less than the tolerance."""


@dataclass(frozen=True)
class _Part:
    """Some images of a data set as the network takes them, batch by batch, as often as asked for.

    Attributes:
        name: which they are, for a reader.
        data: the data set.
        part: the name of the attribute of the data set that holds them.
        first: index of the first that is taken.
        step: from one that is taken to the next.
    """

    name: str
    data: Data
    part: str
    first: int = 0
    step: int = 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images = getattr(self.data, self.part)
        taken = range(self.first, len(images), self.step)
        for batch in batches(images, _BATCH, sampler=taken):
            yield self.data.normalize(batch[0]), batch[1]


def measure_budgets(
    output: Path,
    budgets: Sequence[float] = (),
    *,
    accuracy_loss: float | None = None,
    confidence: float = 0.95,
    against: float = -math.inf,
    **settings: Any,
) -> dict[str, Any]:
    """Run the trained network of a run at other budgets, and keep what came of it in the folder.

    Shifts are found on the validation images where there are any beside the test images, and on at most
    10,000 of the training images otherwise. A promise needs images that the network was not trained on: the
    validation images, or every second test image, and then it is the others that it is checked on.

    Args:
        output: the folder of the run.
        budgets: shares of the multiply-adds of the network without gates.
        accuracy_loss: what the accuracy on new images may be lower than at the reference; with none, nothing
            is promised.
        confidence: of the promise.
        against: the shift of the reference: by default all gates open; 0 for the network as trained.
        settings: replace those of the run, such as ``data_folder``.

    Returns:
        What the file holds, see above.

    Raises:
        RunError: if the folder contains no trained network, or one without gates.
        DataError: if the data cannot be used.
        ValueError: if a budget cannot be met, or a number is out of its range.
    """
    network, data = load_run(output, **settings)
    if not any(isinstance(module, Gate) for module in network.modules()):
        raise RunError(
            f"{output}: expected a network with gates, whose budget can be chosen, received another"
        )
    config = read_run_config(output, **settings)
    kept_apart = data.validation is not None and config.data.evaluate_on == "test"
    test = _Part("test images", data, "test")
    train = _Part("training images", data, "train", step=math.ceil(len(data.train) / _MOST_IMAGES))
    validation = _Part("validation images", data, "validation")
    of_calibration = validation if kept_apart else train
    cost = MultiplyAdds.measure(network, next(iter(test))[0][:1])
    with using_threads(config.machine.threads or suitable_threads(network, cost.dense * _BATCH)):
        calibration = calibrate(network, of_calibration, budgets) if budgets else None
        points = calibration.points if calibration else ()
        all_open, *at_budgets = outcomes(network, test, [-math.inf, *(point.shift for point in points)])
        promise, promised_on = None, None
        if accuracy_loss is not None:
            by, others = validation, test
            if not kept_apart:
                by = _Part("every second of the test images", data, "test", step=2)
                others = _Part("the other test images", data, "test", first=1, step=2)
            promise = guarantee(network, by, accuracy_loss, confidence, against=against)
            names = ("reference", "at_shift")
            checked = zip(names, outcomes(network, others, [against, promise.shift]), strict=True)
            promised_on = {
                "images": by.name,
                "test": {"images": others.name, **{name: _summary(each) for name, each in checked}},
            }
    measured = _BUDGETS.of(
        output,
        calibrated_on=of_calibration.name,
        calibration=calibration.to_dict() if calibration else None,
        test={"all_open": _summary(all_open), "points": [_summary(each) for each in at_budgets]},
        guarantee=promise.to_dict() if promise else None,
        promised_on=promised_on,
    )
    _BUDGETS.write(measured, output)
    return measured


def _summary(outcome: Outcome) -> dict[str, Any]:
    return {
        "examples": len(outcome.shares),
        "multiply_adds": outcome.multiply_adds,
        "accuracy": outcome.accuracy,
    }


def read_budgets(output: Path) -> dict[str, Any] | None:
    """What was measured of a run at other budgets, None where nothing was.

    Args:
        output: the folder of the run, or its ``result.json``.

    Raises:
        RunError: in one line, if the file cannot be read, or belongs to another result.
    """
    return _BUDGETS.read(output)
