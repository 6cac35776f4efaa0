"""How long the images of a run take, as the report shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import StatisticsError, correlation, median
from typing import Any

from batchshaping.report.checked import OutOfRangeError, number, numbers
from batchshaping.report.texts import shortened

__all__ = ["Latency", "read_latency"]


@dataclass(frozen=True)
class Latency:
    """What was measured of a run, one image at a time.

    Attributes:
        multiply_adds: of each image.
        seconds: of each image in the trained network.
        dense: seconds of an image in the network without gates, the median.
        machine: what it was measured on, in a reader's words.
        repeats: over how many passes the seconds are medians.
    """

    multiply_adds: list[float]
    seconds: list[float]
    dense: float
    machine: str
    repeats: float

    @property
    def median(self) -> float:
        """Seconds of an image in the trained network."""
        return median(self.seconds)

    @property
    def times_faster(self) -> float:
        """Seconds of an image in the network without gates, over those in the trained one."""
        return self.dense / self.median

    @property
    def correlation(self) -> float | None:
        """Pearson's correlation of seconds with multiply-adds; None where one of them does not vary."""
        try:
            return correlation(self.multiply_adds, self.seconds)
        except StatisticsError:
            return None


def read_latency(result: Mapping[str, Any]) -> Latency | None:
    """The latency in a result, if there is one.

    Raises:
        LookupError, TypeError, ValueError: if something is missing, or is not what a measurement gives.

    Example:
        >>> machine = {"processor": "a CPU", "threads": 1}
        >>> seconds = {"conditional": [0.001, 0.002], "dense": [0.003, 0.003]}
        >>> measured = {"machine": machine, "repeats": 5, "multiply_adds": [1e6, 2e6], "seconds": seconds}
        >>> read_latency({"latency": measured}).correlation
        1.0
    """
    if "latency" not in result:
        return None
    measured = result["latency"]
    multiply_adds, of_networks = numbers(measured["multiply_adds"]), measured["seconds"]
    dense = numbers(of_networks["dense"])
    seconds = numbers(of_networks["conditional"]) if "conditional" in of_networks else dense
    if not 0 < len(multiply_adds) == len(seconds) == len(dense):
        raise OutOfRangeError("a latency of other images")
    machine = measured["machine"]
    threads = number(machine["threads"])
    without = "" if machine.get("native", True) else ", without native code"
    return Latency(
        multiply_adds=multiply_adds,
        seconds=seconds,
        dense=median(dense),
        machine=f"{shortened(machine['processor'])}, {threads} thread{'s' * (threads != 1)}{without}",
        repeats=number(measured["repeats"]),
    )
