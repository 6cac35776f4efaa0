"""How weights change through training."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Ramp"]


@dataclass(frozen=True)
class Ramp:
    """A weight that goes linearly from one value to another, and is constant before and after.

    Progress is the share of training that is done, in [0, 1], so that a schedule suits any length of it.

    Attributes:
        first: the weight until ``begin``.
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
        """The weight when this share of training is done."""
        share = min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.first + (self.last - self.first) * share
