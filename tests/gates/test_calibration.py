"""The shift for a budget, on networks whose cost is known for every shift."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from switched_networks import Switch
from torch import Tensor

from batchshaping.gates.calibration import Calibration, OperatingPoint, calibrate


def logits(n: int = 2000) -> Tensor:
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(0)) * 3 + 1


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("budget", [0.2, 0.201, 0.3, 0.55, 0.9, 0.999, 1.0, 7.0])
def test_the_shift_is_the_quantile_of_the_logits(scale: float, budget: float) -> None:
    x = scale * logits()
    point = calibrate(Switch(), x.split(300), [budget], tolerance=1e-3)[budget]
    spent = 0.2 + 0.8 * (x > point.shift).double().mean().item()
    assert point.multiply_adds == pytest.approx(spent)
    assert spent <= budget * (1 + 1e-7)
    assert min(budget, 1.0) - 1e-3 <= spent + 1e-9


def test_what_is_returned_was_measured_even_if_the_cost_does_not_fall() -> None:
    """The gate of this network reads how many others are open: the cost rises and falls with the shift."""

    class Wavy(Switch):
        def logits(self, x: Tensor) -> Tensor:
            return x + 3 * torch.sin(4 * self.shift()) if math.isfinite(self.shift()) else x

        def shift(self) -> Tensor:
            forced = self.gate._forced
            return torch.tensor(forced[-1].shift if forced else 0.0)

    x = logits()
    for budget in (0.3, 0.5, 0.7):
        point = calibrate(Wavy(), [x], [budget])[budget]
        assert point.multiply_adds <= budget
        moved = x + 3 * math.sin(4 * point.shift)
        assert point.multiply_adds == pytest.approx(0.2 + 0.8 * (moved > point.shift).double().mean().item())
        assert budget - point.multiply_adds < 0.01


def test_equal_logits_leave_no_budget_between() -> None:
    point = calibrate(Switch(), [torch.full((10, 1), 0.3)], [0.9])[0.9]
    assert point.shift >= 0.3 and point.multiply_adds == pytest.approx(0.2)


def test_accuracy_is_that_of_the_calibration_set() -> None:
    x = logits(100)
    labels = (x[:, 0] > 1).long()  # the network says 1 where its gate is open
    batches = [(x[:60], labels[:60]), [x[60:], labels[60:]]]
    calibration = calibrate(Switch(), batches, [0.4, 1.0])
    for point in calibration.points:
        right = ((x[:, 0] > point.shift).long() == labels).double().mean().item()
        assert point.accuracy == pytest.approx(right)
    assert calibration.examples == 100


def test_the_mode_of_the_network_stays() -> None:
    network = Switch().train()
    network.gate.eval()
    calibrate(network, [logits(10)], [1.0])
    assert network.training and not network.gate.training


def test_a_calibration_is_kept_as_json() -> None:
    calibration = calibrate(Switch(), [logits()], [0.2, 0.5, 1.5])
    text = json.dumps(calibration.to_dict(), allow_nan=False)
    assert Calibration.from_dict(json.loads(text)) == calibration
    assert [point.shift for point in calibration.points][::2] == [math.inf, -math.inf]


def test_a_budget_is_found_whatever_its_last_digits() -> None:
    calibration = Calibration(5, (OperatingPoint(0.3, 1.0, 0.3, None), OperatingPoint(0.5, 0.0, 0.5, None)))
    assert calibration[0.1 + 0.2].shift == 1.0
    with pytest.raises(
        LookupError, match=r"^budget must be one that was calibrated, 0.3, 0.5, received 0.4$"
    ):
        calibration[0.4]


def once() -> Iterator[Tensor]:
    yield logits()


@pytest.mark.parametrize(
    ("budgets", "loader", "message"),
    [
        ([0.1, 0.5], lambda: [logits()], r"at least 0\.2, .* all gates closed, received 0\.1$"),
        ([], lambda: [logits()], r"one number at least, received \[\]"),
        ([math.nan], lambda: [logits()], "received .nan"),
        ([0.5], lambda: [], "at least one image in every pass over it, received none"),
        ([0.5], once, "at least one image in every pass over it, received none"),
        ([0.5], lambda: [logits() * math.nan], "cost of the model must be a number"),
        ([0.5], lambda: [(logits(4), torch.zeros(4).long()), logits(4)], "received some without"),
        ([0.5], lambda: [(logits(4), torch.zeros(4, 4))], r"received \(4, 2\) for \(4, 4\)"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_a_line(
    budgets: list[float], loader: Callable[[], list[Tensor]], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        calibrate(Switch(), loader(), budgets)
    assert "\n" not in str(caught.value)
