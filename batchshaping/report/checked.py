"""Values of a result, checked before they are shown: a page can contain only what JSON and plotly can."""

from __future__ import annotations

from typing import Any

from batchshaping.storage.files import quoted

__all__ = ["OutOfRangeError", "number", "numbers"]

# More multiply-adds than any network has, and small enough for everything derived from it to be finite.
_LARGEST_NUMBER = 1e30


class OutOfRangeError(ValueError):
    """Names what in a result is outside the range of what a run can give."""

    def __init__(self, received: object) -> None:
        super().__init__(str(received))


def number(value: Any) -> float:
    """A finite number.

    Raises:
        TypeError: if it is anything else than an int or a float.
        OutOfRangeError: if it is NaN, infinite, or larger than any number that a run can give.

    Example:
        >>> number(0.9)
        0.9
        >>> number(float("nan"))
        Traceback (most recent call last):
        ...
        batchshaping.report.checked.OutOfRangeError: the number nan
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    if not abs(value) <= _LARGEST_NUMBER:
        raise OutOfRangeError(f"the number {quoted(value)}")
    return value


def numbers(values: Any) -> list[float]:
    """A list of finite numbers.

    Raises:
        TypeError: if it is no list, or one of them is no number.
        OutOfRangeError: as for :func:`number`.

    Example:
        >>> numbers([1, 0.5])
        [1, 0.5]
    """
    if not isinstance(values, list | tuple):
        raise TypeError
    return [number(value) for value in values]
