"""Weights as functions of the progress of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Cosine", "Ramp", "Schedule", "Steps"]

Schedule = Callable[[float], float]
"""A weight as a function of progress, the share of training that is done, in [0, 1]."""


@dataclass(frozen=True)
class Ramp:
    """A weight that changes linearly from one value to another, and is constant before and after.

    Since progress is a share of training, the same schedule serves trainings of any length.

    Attributes:
        first: the weight up to ``begin``.
        last: the weight from ``end`` on.
        begin: progress at which the ramp begins.
        end: progress at which it ends.

    Raises:
        ValueError: if not 0 <= begin < end <= 1.

    Example:
        >>> gamma = Ramp(0.75, 0.0, begin=0.0, end=0.2)
        >>> [round(gamma(progress), 3) for progress in (0.0, 0.1, 0.2, 1.0)]
        [0.75, 0.375, 0.0, 0.0]
    """

    first: float
    last: float
    begin: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(
                f"begin and end must satisfy 0 <= begin < end <= 1, received {self.begin} and {self.end}"
            )

    def __call__(self, progress: float) -> float:
        """The weight at this progress."""
        share = min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.first + (self.last - self.first) * share


@dataclass(frozen=True)
class Steps:
    """A factor that starts at 1 and is divided by 10 at each milestone.

    Attributes:
        milestones: values of progress.

    Example:
        >>> learning_rate = Steps((0.6, 0.75))
        >>> [round(learning_rate(progress), 3) for progress in (0.0, 0.6, 0.8)]
        [1.0, 0.1, 0.01]
    """

    milestones: tuple[float, ...]

    def __call__(self, progress: float) -> float:
        """The factor at this progress."""
        return float(0.1 ** sum(progress >= milestone for milestone in self.milestones))


class Cosine:
    """A factor that falls from 1 to 0 along half a period of the cosine.

    Example:
        >>> learning_rate = Cosine()
        >>> [round(learning_rate(progress), 3) for progress in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0]
    """

    def __call__(self, progress: float) -> float:
        """The factor at this progress."""
        return (1 + math.cos(math.pi * min(progress, 1.0))) / 2
