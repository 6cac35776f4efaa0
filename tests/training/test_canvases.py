"""Canvases: a digit to be read, woven into a texture that coarse pixels do not show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from batchshaping.training.data import load_data
from batchshaping.training.data.canvases import CANVASES, CENTRED_CANVASES, Canvases, CanvasImages, Part
from batchshaping.training.sections import DATASETS, DataSettings

PARTS: tuple[Part, ...] = ("train", "validation", "test")


@pytest.fixture(scope="module")
def drawn() -> CanvasImages:
    return CANVASES.draw("train", 1500)


def test_no_digit_is_in_two_parts_and_each_is_labelled_as_itself() -> None:
    target, sources = load_digits().target, []
    for part in PARTS:
        images = CANVASES.draw(part, 2500)
        assert images.labels.tolist() == target[images.sources].tolist()
        assert images.labels.bincount().min() > 150
        sources.append({*images.sources.tolist()})
    assert not sources[0] & sources[1] and not sources[0] & sources[2] and not sources[1] & sources[2]
    assert len(set.union(*sources)) > 0.9 * len(target)


def test_canvases_are_those_of_the_seed_and_fewer_are_the_first_of_more() -> None:
    state = torch.get_rng_state()
    for part in PARTS:
        many, few, other = (
            c.draw(part, n) for c, n in ((CANVASES, 600), (Canvases(), 530), (Canvases(seed=1), 5))
        )
        for name in ("images", "labels", "corners", "ink", "sources"):
            assert torch.equal(getattr(many, name)[:530], getattr(few, name))
        assert not torch.equal(many.images[:5], other.images)
        # No canvas is drawn twice.
        assert len(many.images.flatten(1).unique(dim=0)) == 600
    assert torch.equal(torch.get_rng_state(), state)


def test_the_digit_is_where_the_mask_says_and_can_be_read_there(drawn: CanvasImages) -> None:
    digits = torch.from_numpy(load_digits().images / 16).float()[drawn.sources]
    masks = drawn.objects()
    assert masks.shape == (1500, 64, 64) and masks.dtype == torch.bool
    checkerboard = 1.0 - 2 * (torch.arange(64)[:, None] + torch.arange(64)).remainder(2)
    # The difference of neighbours in a square of 2 x 2 pixels is the ink, and noise.
    found = F.avg_pool2d(drawn.images.float() / 255 * checkerboard, 2).squeeze(1)
    for n in range(300):
        row, column = (drawn.corners[n] // 2).tolist()
        read = found[n, row : row + 8, column : column + 8]
        assert torch.corrcoef(torch.stack([read.flatten(), digits[n].flatten()]))[0, 1] > 0.7
        mask = masks[n, 2 * row : 2 * row + 16, 2 * column : 2 * column + 16]
        assert torch.equal(mask[::2, ::2], digits[n] > 0) and mask.sum() == masks[n].sum()


def coarse(images: Tensor) -> Tensor:
    return F.avg_pool2d(images.float() / 255, 2).squeeze(1)


def test_the_digit_is_gone_at_half_the_resolution(drawn: CanvasImages) -> None:
    digits = torch.from_numpy(load_digits().images / 16).float()[drawn.sources]
    half = coarse(drawn.images)
    squares, level = [], []
    for n in range(1500):
        row, column = (drawn.corners[n] // 2).tolist()
        square = half[n, row : row + 8, column : column + 8]
        squares.append(square - square.mean())
        level.append(square.mean())
    # Neither its shape, nor its mean, nor its contrast: within the error of 1500 images of 64 pixels.
    shape = torch.corrcoef(torch.stack([torch.stack(squares).flatten(), digits.flatten()]))[0, 1]
    assert shape.abs() < 0.02
    ink = digits.mean(dim=(1, 2))
    assert torch.corrcoef(torch.stack([torch.stack(level), ink]))[0, 1].abs() < 0.1
    assert torch.corrcoef(torch.stack([torch.stack(squares).std(dim=(1, 2)), ink]))[0, 1].abs() < 0.1


def test_contrast_does_not_tell_where_the_digit_is(drawn: CanvasImages) -> None:
    regions = drawn.images.float().unfold(2, 16, 16).unfold(3, 16, 16).squeeze(1).flatten(3)
    contrast = regions.std(dim=3).flatten()
    has_digit = F.max_pool2d(drawn.objects().float().unsqueeze(1), 16).flatten() > 0
    assert 0.1 < has_digit.float().mean() < 0.15
    # Of the fifth of the regions with the most contrast, hardly more have a digit than of all.
    most = contrast >= contrast.quantile(0.8)
    assert has_digit[most].float().mean() < 1.3 * has_digit.float().mean()


@pytest.mark.parametrize(
    "canvases", [CANVASES, CENTRED_CANVASES, Canvases(size=128, scale=4, grid=6, distractors=2)]
)
def test_places_are_drawn_with_their_probabilities(canvases: Canvases) -> None:
    expected = canvases.place_probabilities()
    assert expected.sum().item() == pytest.approx(1)
    images = canvases.draw("train", 4000)
    places = images.corners // canvases.grid
    assert torch.equal(places * canvases.grid, images.corners)
    assert (images.corners >= 0).all() and (images.corners + canvases.digit <= canvases.size).all()
    counts = torch.zeros_like(expected).index_put_(
        tuple(places.T), torch.ones(4000).double(), accumulate=True
    )
    assert ((counts - 4000 * expected).abs() < 5 * (4000 * expected).sqrt() + 5).all()
    if canvases.spread < torch.inf:
        assert torch.equal(expected, expected.flip(0)) and torch.equal(expected, expected.T)
        middle = expected.shape[0] // 2
        assert expected[middle, middle] == expected.max() > 20 * expected[0, 0]


@pytest.mark.parametrize("name", ["canvases", "canvases-centred"])
def test_a_run_can_train_on_them(name: str) -> None:
    assert name in DATASETS
    data: Any = load_data(DataSettings(data=name, train_images=10))
    assert data.shape == (1, 64, 64) and len(data.classes) == 10 and len(data.train) == 10
    assert len(data.validation) == len(data.test) == 2000
    # The texture is another one if it is shifted or flipped.
    assert data.padding == 0 and not data.flip
    images, labels = data.test.__getitems__([0, 7])
    assert images.shape == (2, 1, 64, 64) and labels.shape == (2,)
    expected = (CANVASES if name == "canvases" else CENTRED_CANVASES).draw("test", 8)
    assert torch.equal(images, expected.images[[0, 7]])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"spread": 0.0}, "spread must be positive, received 0.0"),
        ({"spread": float("nan")}, "spread must be positive, received nan"),
        ({"scale": 3}, "scale must be even and positive, received 3"),
        ({"grid": 0}, "grid must be even and positive, received 0"),
        ({"distractors": -1}, "distractors must not be negative, received -1"),
        ({"size": 32}, "size must leave room for a digit of 16 pixels and 3 distractors, received 32"),
        ({"size": 8, "distractors": 0}, "size must leave room for a digit of 16 pixels"),
    ],
)
def test_canvases_that_cannot_be_drawn_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}"):
        Canvases(**settings)


def test_as_many_distractors_as_there_is_room_for_do_not_touch_the_digit() -> None:
    full, empty = Canvases(distractors=5), Canvases(distractors=0)
    masks = full.draw("test", 200).objects()
    # The same digits on the same backgrounds: what differs is what distracts.
    images = [c.draw("test", 200).images.int().squeeze(1) for c in (full, empty)]
    assert torch.equal(masks, empty.draw("test", 200).objects())
    assert (images[0] == images[1])[masks].all() and not torch.equal(*images)
