"""The scale gate decides each region from its own pixels."""

from __future__ import annotations

import pytest
import torch

from batchshaping.mixed_scale.gate import ScaleGate


def test_a_region_is_decided_from_its_own_pixels_alone() -> None:
    torch.manual_seed(0)
    gate = ScaleGate(features=2 * 3 * 3).eval()
    regions = torch.randn(4, 5, 2, 3, 3)
    gate(regions)
    before = gate.probabilities
    changed = regions.clone()
    changed[1, 2] += 3
    gate(changed)
    differs = before != gate.probabilities
    assert differs[1, 2] and differs.sum() == 1
    # The same function for every region.
    gate(regions.flip(1))
    torch.testing.assert_close(gate.probabilities.flip(1), before)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_layers_are_those_asked_for_and_all_learn(layers: int) -> None:
    gate = ScaleGate(features=12, hidden=7, layers=layers, bias=1.5)
    linear = [layer for layer in gate.to_logits if isinstance(layer, torch.nn.Linear)]
    assert [layer.in_features for layer in linear] == [12, *[7] * (layers - 1)]
    assert linear[-1].bias.item() == pytest.approx(1.5, abs=1.01 * linear[-1].in_features ** -0.5)
    gate(torch.randn(8, 3, 12))
    (gate.probabilities - 0.3).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gate.parameters())


def test_bad_input_is_refused_in_one_line() -> None:
    gate = ScaleGate(features=18)
    for x in (torch.randn(4, 18), torch.randn(4, 5, 17), torch.randn(4, 5, 2, 3, 4)):
        with pytest.raises(ValueError, match=rf"18 values a region, received \({x.shape[0]}, "):
            gate(x)
    with pytest.raises(ValueError, match="needs at least 2, received 1"):
        gate(torch.randn(1, 1, 18))
    assert gate.eval()(torch.randn(1, 1, 18)).shape == (1, 1)
    for settings, line in (
        ({"features": 0}, "features must be an integer, at least 1, received 0"),
        ({"features": 2, "hidden": 1.5}, "hidden must be"),
        ({"features": 2, "layers": 0}, "layers must be"),
        ({"features": 2, "bias": float("nan")}, "bias must be finite, received nan"),
    ):
        with pytest.raises(ValueError, match=line):
            ScaleGate(**settings)  # type: ignore[arg-type]
