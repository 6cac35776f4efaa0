"""One network, many budgets: the shift of the gates' threshold for each, found on a calibration set."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from batchshaping.gates.outcomes import Outcome, outcomes

__all__ = ["Calibration", "OperatingPoint", "calibrate", "shift_as_json"]


@dataclass(frozen=True)
class OperatingPoint:
    """A network at one shift of its gates' threshold.

    Attributes:
        budget: the share of the ungated network's multiply-adds that it was found for.
        shift: of the threshold, for :func:`~batchshaping.gates.shifted.gates_shifted`.
        multiply_adds: the share that was spent on the calibration set, on average.
        accuracy: on the calibration set; None without labels.
    """

    budget: float
    shift: float
    multiply_adds: float
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """The shifts of one network for some budgets.

    Attributes:
        examples: how many examples the calibration set had.
        points: one for each budget, in ascending order.

    Example:
        >>> calibration = Calibration(1000, (OperatingPoint(0.3, 1.25, 0.298, 0.91),))
        >>> calibration[0.3].shift
        1.25
        >>> calibration[0.5]
        Traceback (most recent call last):
        ...
        LookupError: budget must be one that was calibrated, 0.3, received 0.5
        >>> import json
        >>> Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration
        True
    """

    examples: int
    points: tuple[OperatingPoint, ...]

    def __getitem__(self, budget: float) -> OperatingPoint:
        """The point of a budget.

        Raises:
            LookupError: in one line, if it was not calibrated.
        """
        for point in self.points:
            if math.isclose(point.budget, budget):
                return point
        known = ", ".join(f"{point.budget:.6g}" for point in self.points)
        raise LookupError(f"budget must be one that was calibrated, {known}, received {budget}")

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON has it, in which infinite shifts are texts."""
        points = [{**asdict(point), "shift": shift_as_json(point.shift)} for point in self.points]
        return {"examples": self.examples, "points": points}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Calibration:
        """What :meth:`to_dict` was asked of."""
        points = [OperatingPoint(**{**each, "shift": float(each["shift"])}) for each in values["points"]]
        return Calibration(values["examples"], tuple(points))


def shift_as_json(shift: float) -> float | str:
    """A number, or the text of an infinite one, which JSON does not have; ``float`` reads both.

    Example:
        >>> shift_as_json(0.5), shift_as_json(-math.inf)
        (0.5, '-inf')
    """
    return shift if math.isfinite(shift) else str(shift)


def calibrate(
    model: nn.Module, loader: Iterable[Any], budgets: Sequence[float], *, tolerance: float = 0.002
) -> Calibration:
    r"""Find the shift of the gates' threshold for each budget, without training.

    A budget b is a share of the multiply-adds of the same network without gates. What is looked for is

    .. math::
        \min s \quad \text{such that} \quad
        \frac{1}{N} \sum_n \frac{\text{multiply-adds of } x_n \text{ at shift } s}
        {\text{those without gates}} \le b.

    The cost falls with the shift in practice, but need not: a gate reads what other gates left open. So each
    budget is bracketed, and the bracket narrowed by passes over the calibration set, at most 24 for a budget.
    Of all shifts that were tried, the one with the largest cost within the budget is taken: what is returned
    was measured, whatever the cost does in between. It holds on the calibration set; on other images of the
    same kind the cost varies around it.

    A budget says nothing of accuracy. For the cheapest shift that loses no more than some of it, with a
    promise for new images, see :func:`~batchshaping.gates.guarantee.guarantee`.

    Args:
        model: a network with gates or its inference copy, in any mode; it stays as it is.
        loader: what is calibrated on, gone through several times: batches of images, or of images and labels,
            as a ``DataLoader`` gives them, without random augmentation.
        budgets: shares of the ungated network's multiply-adds. One that is not exceeded with all
            gates open gets the shift ``-math.inf``.
        tolerance: how far below a budget the cost may be for the search to end.

    Returns:
        For each budget the shift, and what was spent with it; with labels the accuracy too.

    Raises:
        ValueError: if a budget is below the cost with all gates closed, or no number; if there are no budgets
            or no images; or if the cost is not a number.

    References:
        Jazbec et al., Fast yet Safe: Early-Exiting with Risk Control, 2024, https://arxiv.org/abs/2405.20915,
        on thresholds as budgets of early exits.

    Example:
        >>> import torch, batchshaping as bs
        >>> network = bs.gated_resnet20().eval()
        >>> images = torch.randn(16, 3, 32, 32)
        >>> calibration = calibrate(network, images.split(8), budgets=[0.3, 0.6])
        >>> with bs.gates_shifted(network, calibration[0.3].shift):
        ...     logits = network(images)
        >>> calibration[0.3].multiply_adds <= 0.3 < calibration[0.6].multiply_adds <= 0.6
        True
    """
    budgets = sorted({float(budget) for budget in budgets})
    if not budgets or any(math.isnan(budget) for budget in budgets):
        raise ValueError(f"budgets must be one number at least, received {budgets}")
    ends = (-math.inf, 0.0, math.inf)
    tried = dict(zip(ends, outcomes(model, loader, ends), strict=True))
    spent = {shift: outcome.multiply_adds for shift, outcome in tried.items()}
    least = spent[math.inf]
    if budgets[0] < least * (1 - _ROUNDING):
        raise ValueError(
            f"budgets must be at least {least:.3g}, the share of the multiply-adds with all gates closed, "
            f"received {budgets[0]:.6g}"
        )
    points = []
    for budget in budgets:
        for turn in range(_PASSES):
            _refuse_nan(spent)
            chosen = _largest_within(budget, spent)
            if budget - spent[chosen] <= tolerance or chosen == -math.inf:
                break
            shift = _next_shift(budget - tolerance / 2, spent, halve=turn % 2 == 1)
            if shift in tried:  # There is no number in between.
                break
            (tried[shift],) = outcomes(model, loader, [shift])
            spent[shift] = tried[shift].multiply_adds
        points.append(_point(budget, _largest_within(budget, spent), tried))
    return Calibration(len(tried[0.0].shares), tuple(points))


_PASSES = 24
"""Passes over the calibration set for a budget; five to ten are usual."""

_ROUNDING = 1e-7
"""What the multiply-adds of an example are off by, relative to them, in single precision."""


def _point(budget: float, shift: float, tried: Mapping[float, Outcome]) -> OperatingPoint:
    return OperatingPoint(budget, shift, tried[shift].multiply_adds, tried[shift].accuracy)


def _largest_within(budget: float, spent: Mapping[float, float]) -> float:
    """The shift with the largest cost within the budget; of several the lowest."""
    within = [shift for shift, cost in spent.items() if cost * (1 - _ROUNDING) <= budget]
    return max(within, key=lambda shift: (spent[shift], -shift))


def _next_shift(target: float, spent: Mapping[float, float], halve: bool) -> float:
    """A shift within the first bracket of the target: neighbours that cost more, and no more."""
    shifts = sorted(spent)
    low, high = next(
        (low, high)
        for low, high in itertools.pairwise(shifts)
        if spent[low] > target >= spent[high] or high == math.inf
    )
    if math.isinf(low):
        return 2 * high - 1
    if math.isinf(high):
        return 2 * low + 1
    # The cost is interpolated; every other time the bracket is halved, which no shape of the cost can slow.
    part = 0.5 if halve else (spent[low] - target) / (spent[low] - spent[high])
    return low + min(max(part, 0.1), 0.9) * (high - low)


def _refuse_nan(spent: Mapping[float, float]) -> None:
    for shift, cost in spent.items():
        if math.isnan(cost):
            raise ValueError(f"the cost of the model must be a number, received {cost} at shift {shift}")
