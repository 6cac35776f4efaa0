"""Gates that learn nothing: the entropy of pixels, and chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from small_vits import made
from torch import Tensor

import batchshaping as bs
from batchshaping.mixed_scale.rules import ChanceGate, EntropyGate, pixel_entropy


def regions(n: int = 64, count: int = 9, channels: int = 1, seed: int = 0) -> Tensor:
    """Noise of different contrast in each region."""
    generator = torch.Generator().manual_seed(seed)
    contrast = torch.rand(n, count, 1, 1, 1, generator=generator)
    return contrast * torch.randn(n, count, channels, 12, 12, generator=generator)


def test_the_entropy_is_that_of_the_histogram() -> None:
    x = regions(n=5, channels=3) * 2
    found = pixel_entropy(x, bins=50)
    for image, row in zip(x.mean(dim=2).numpy(), found, strict=True):
        for region, value in zip(image, row, strict=True):
            counts, _ = np.histogram(np.clip(region, -4, 3.999), bins=50, range=(-4, 4))
            assert value.item() == pytest.approx(entropy(counts, base=2), abs=1e-4)
    assert (pixel_entropy(torch.full((1, 2, 1, 4, 4), 0.3)) == 0).all()
    x[0, 1, 0, 0, 0] = torch.nan
    assert pixel_entropy(x).isnan().nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
def test_the_threshold_of_entropy_gives_the_density(density: float) -> None:
    gate = EntropyGate(density)
    for seed in range(30):
        gate(regions(seed=seed))
    assert gate(regions(seed=30)).mean().item() == pytest.approx(density, abs=0.02)
    before = gate.threshold.clone()
    decided = gate.eval()(regions(n=300, seed=40))
    assert decided.mean().item() == pytest.approx(density, abs=0.02)
    assert torch.equal(gate.threshold, before)
    # Fine regions have more entropy than coarse ones, and each is decided by itself.
    assert torch.equal(decided, (pixel_entropy(regions(n=300, seed=40)) > before).float())
    again = EntropyGate(density)
    again.load_state_dict(gate.state_dict())
    assert torch.equal(again.eval()(regions(n=300, seed=40)), decided)


def test_chance_knows_nothing_and_an_image_has_its_decisions_in_every_batch() -> None:
    x, gate = regions(n=2000), ChanceGate(0.3)
    torch.manual_seed(1)
    first, second = gate(x), gate(x)
    for decided in (first, second):
        assert decided.mean().item() == pytest.approx(0.3, abs=0.02)
        assert torch.corrcoef(torch.stack([decided.flatten(), pixel_entropy(x).flatten()]))[0, 1].abs() < 0.03
    assert not torch.equal(first, second)
    decided = gate.eval()(x)
    assert decided.mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.corrcoef(torch.stack([decided.flatten(), pixel_entropy(x).flatten()]))[0, 1].abs() < 0.03
    assert torch.equal(gate(x[37:40]), decided[37:40])
    assert not torch.equal(ChanceGate(0.3, seed=1).eval()(x), decided)
    assert ChanceGate(0)(x).sum() == 0 and ChanceGate(1).eval()(x).mean() == 1


@pytest.mark.parametrize("gate", [EntropyGate(0.25), ChanceGate(0.25)])
def test_a_rule_takes_the_place_of_a_learned_gate(gate: Any) -> None:
    vit, msvit, images = made("timm")
    ruled = bs.MSViT(vit, coarse=msvit.coarse, gate=gate)
    ruled.train()(images)
    ruled.eval()
    with torch.no_grad():
        masked = ruled(images)
        torch.testing.assert_close(bs.conditional_inference(ruled)(images), masked)
    assert [*gate.parameters()] == [] and set(gate.decisions.unique().tolist()) <= {0.0, 1.0}
    spent = bs.count_macs(ruled, images)
    bias = 100.0 * (2 * gate.decisions - 1)
    msvit.gate._forced = (lambda logits: (bias > 0).to(logits),)
    learned = bs.count_macs(msvit, images)
    # The gate itself costs nothing here; everything else is the same.
    mlp = sum(p.numel() for n, p in msvit.gate.named_parameters() if n.endswith("weight") and p.ndim == 2)
    assert (learned - spent).tolist() == [mlp * bias.shape[1]] * len(images)


@pytest.mark.parametrize("density", [-0.1, 1.5, float("nan")])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    for rule in (EntropyGate, ChanceGate):
        with pytest.raises(ValueError, match=rf"density must be in \[0, 1\], received {density}"):
            rule(density)
