"""Canvases: a digit to be read, woven into a texture that coarse pixels do not show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from batchshaping.training.data import load_data
from batchshaping.training.data.canvases import (
    CANVASES,
    CENTRED_CANVASES,
    FORMS,
    Canvases,
    CanvasImages,
    Field,
    Part,
)
from batchshaping.training.regions import objects_in_regions
from batchshaping.training.sections import DATASETS, DataSettings

PARTS: tuple[Part, ...] = ("train", "validation", "test")


@pytest.fixture(scope="module")
def drawn() -> CanvasImages:
    return CANVASES.draw("train", 1500)


@pytest.fixture(scope="module")
def forms() -> CanvasImages:
    return FORMS.draw("train", 1500)


def test_no_digit_is_in_two_parts_and_each_is_labelled_as_itself() -> None:
    target, sources = load_digits().target, []
    for part in PARTS:
        images = CANVASES.draw(part, 2500)
        assert images.labels.tolist() == target[images.sources[:, 0]].tolist()
        assert images.labels.bincount().min() > 150
        sources.append({*images.sources.flatten().tolist()})
    assert not sources[0] & sources[1] and not sources[0] & sources[2] and not sources[1] & sources[2]
    assert len(set.union(*sources)) > 0.9 * len(target)


@pytest.mark.parametrize("canvases", [CANVASES, FORMS])
def test_canvases_are_those_of_the_seed_and_fewer_are_the_first_of_more(canvases: Canvases) -> None:
    state = torch.get_rng_state()
    for part in PARTS:
        draws = ((canvases, 600), (replace(canvases), 530), (replace(canvases, seed=1), 5))
        many, few, other = (c.draw(part, n) for c, n in draws)
        for name in ("images", "labels", "corners", "ink", "sources"):
            assert torch.equal(getattr(many, name)[:530], getattr(few, name))
        assert not torch.equal(many.images[:5], other.images)
        # No canvas is drawn twice.
        assert len(many.images.flatten(1).unique(dim=0)) == 600
    assert torch.equal(torch.get_rng_state(), state)


def test_the_digit_is_where_the_mask_says_and_can_be_read_there(drawn: CanvasImages) -> None:
    digits = torch.from_numpy(load_digits().images / 16).float()[drawn.sources[:, 0]]
    masks = drawn.objects()
    assert masks.shape == (1500, 64, 64) and masks.dtype == torch.bool
    checkerboard = 1.0 - 2 * (torch.arange(64)[:, None] + torch.arange(64)).remainder(2)
    # The difference of neighbours in a square of 2 x 2 pixels is the ink, and noise.
    found = F.avg_pool2d(drawn.images.float() / 255 * checkerboard, 2).squeeze(1)
    for n in range(300):
        row, column = (drawn.corners[n, 0] // 2).tolist()
        read = found[n, row : row + 8, column : column + 8]
        assert torch.corrcoef(torch.stack([read.flatten(), digits[n].flatten()]))[0, 1] > 0.7
        mask = masks[n, 2 * row : 2 * row + 16, 2 * column : 2 * column + 16]
        assert torch.equal(mask[::2, ::2], digits[n] > 0) and mask.sum() == masks[n].sum()


def coarse(images: Tensor) -> Tensor:
    return F.avg_pool2d(images.float() / 255, 2).squeeze(1)


def test_the_digit_is_gone_at_half_the_resolution(drawn: CanvasImages) -> None:
    digits = torch.from_numpy(load_digits().images / 16).float()[drawn.sources[:, 0]]
    half = coarse(drawn.images)
    squares, level = [], []
    for n in range(1500):
        row, column = (drawn.corners[n, 0] // 2).tolist()
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
    corners = images.corners.squeeze(1)
    places = corners // canvases.grid
    assert torch.equal(places * canvases.grid, corners)
    assert (corners >= 0).all() and (corners + canvases.digit <= canvases.size).all()
    counts = torch.zeros_like(expected).index_put_(
        tuple(places.T), torch.ones(4000).double(), accumulate=True
    )
    assert ((counts - 4000 * expected).abs() < 5 * (4000 * expected).sqrt() + 5).all()
    if canvases.spread < torch.inf:
        assert torch.equal(expected, expected.flip(0)) and torch.equal(expected, expected.T)
        middle = expected.shape[0] // 2
        assert expected[middle, middle] == expected.max() > 20 * expected[0, 0]


def test_fields_are_filled_in_as_often_as_they_say_and_the_last_one_counts(forms: CanvasImages) -> None:
    target, filled = torch.from_numpy(load_digits().target), forms.sources >= 0
    for k, field in enumerate(FORMS.fields):
        assert (forms.corners[:, k] == torch.tensor(field[:2])).all()
        share = filled[:, k].double().mean().item()
        assert share == pytest.approx(field.filled, abs=5 * (0.25 / 1500) ** 0.5)
        assert share < 1 or field.filled == 1
    for n in range(300):
        last = forms.sources[n][filled[n]][-1]
        assert forms.labels[n] == target[last]
    assert forms.labels.bincount().min() > 100
    frequency = objects_in_regions(forms.objects(), 16).double().mean(dim=0)
    assert frequency.nonzero().flatten().tolist() == [4, 5]
    torch.testing.assert_close(frequency[[4, 5]], filled.double().mean(dim=0))


def weave(images: Tensor, corner: tuple[int, int]) -> Tensor:
    """The ink in a place, and noise: the difference of neighbours in each square of 2 x 2 pixels."""
    checkerboard = 1.0 - 2 * (torch.arange(16)[:, None] + torch.arange(16)).remainder(2)
    row, column = corner
    patch = images[:, 0, row : row + 16, column : column + 16].float() / 255
    return F.avg_pool2d((patch * checkerboard).unsqueeze(1), 2).squeeze(1)


def test_decoys_are_woven_as_digits_are_and_never_in_a_field(forms: CanvasImages) -> None:
    digits = torch.from_numpy(load_digits().images / 16).float()
    quiet = replace(FORMS, distractors=0).draw("train", 1500)
    places = [(row, column) for row in range(0, 48, 16) for column in range(0, 48, 16)]
    woven = torch.stack([weave(quiet.images, place).mean(dim=(1, 2)) for place in places], dim=1) > 0.05
    fields = [places.index(tuple(field[:2])) for field in FORMS.fields]
    others = [k for k in range(len(places)) if k not in fields]
    assert torch.equal(woven[:, fields], quiet.sources >= 0)
    # Three of the other places, each as often, and what is there reads as a digit of some class.
    assert (woven[:, others].sum(dim=1) == 3).all()
    share = woven[:, others].double().mean(dim=0)
    assert ((share - 3 / 7).abs() < 5 * (0.25 / 1500) ** 0.5).all()
    for k in others[:3]:
        found = weave(quiet.images, places[k])[woven[:, k]][:50].flatten(1)
        correlation = torch.corrcoef(torch.cat([found, digits.flatten(1)]))[: len(found), len(found) :]
        assert (correlation.amax(dim=1) > 0.8).all()
    # The same fields, whatever is around them.
    assert torch.equal(quiet.sources, forms.sources) and torch.equal(quiet.labels, forms.labels)


def test_what_is_printed_is_the_same_on_all_forms_and_tells_places_apart(forms: CanvasImages) -> None:
    def blocks(images: CanvasImages) -> Tensor:
        return F.avg_pool2d(images.images.float() / 255, 8)

    assert (blocks(forms).mean(dim=0) - blocks(FORMS.draw("test", 1500)).mean(dim=0)).abs().max() < 0.01
    # From form to form the same place differs less than the places of a form do; not so on canvases.
    for images, is_printed in ((forms, True), (CANVASES.draw("train", 200), False)):
        among_places = blocks(images).mean(dim=0).std()
        assert bool(among_places > 2 * blocks(images).std(dim=0).mean()) is is_printed


@pytest.mark.parametrize("name", ["canvases", "canvases-centred", "forms"])
def test_a_run_can_train_on_them(name: str) -> None:
    assert name in DATASETS
    data: Any = load_data(DataSettings(data=name, train_images=10))
    side = 48 if name == "forms" else 64
    assert data.shape == (1, side, side) and len(data.classes) == 10 and len(data.train) == 10
    assert len(data.validation) == len(data.test) == 2000
    # The texture is another one if it is shifted or flipped.
    assert data.padding == 0 and not data.flip
    images, labels = data.test.__getitems__([0, 7])
    assert images.shape == (2, 1, side, side) and labels.shape == (2,)
    drawings = {"canvases": CANVASES, "canvases-centred": CENTRED_CANVASES, "forms": FORMS}
    expected = drawings[name].draw("test", 8)
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
        ({"decoys": -1}, "decoys must not be negative, received -1"),
        ({"printed": float("nan")}, "printed must not be negative, received nan"),
        ({"decoys": 3}, "size must leave room for a digit of 16 pixels and 3 decoys and 3 distractors"),
        (
            {"fields": (Field(0, 4, 1.0),)},
            "fields must be at multiples of 8 within 64 pixels, received",
        ),
        ({"fields": (Field(0, 56, 1.0),)}, "fields must be at multiples of 8 within 64 pixels, received"),
        ({"fields": (Field(0, 0, 1.5),)}, "filled must be above 0 and at most 1, received Field"),
        ({"fields": (Field(0, 0, 1.0), Field(8, 8, 0.5))}, "fields must not overlap, received Field"),
        ({"fields": (Field(0, 0, 0.9),)}, "fields must have one that is always filled, received"),
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
