r"""Canvases: large images in which one small handwritten digit has to be found and read.

A canvas is a smooth background with fine noise, one digit of scikit-learn at a random place, and distractors.
The digit is woven into the texture: its ink a modulates a checkerboard of single pixels,

.. math::
    x = \text{background} + \text{noise} + 0.4 \, a \, (-1)^{\text{row} + \text{column}},

and is the same over squares of 2 x 2 pixels, so that the mean of each square does not depend on it. At half
the resolution the digit is gone. What distracts is of the same size and has more contrast than a digit: spots
of noise, and of stripes as fine as the checkerboard, which are gone at half the resolution too.

So all that is needed is in one small part of each image, and neither coarse pixels nor contrast tell where.

A canvas with fields is a form. A field is a place where a digit may be, on a share of the forms that is its
own, and the last field that is filled in tells the class, as a correction does. Decoys are digits outside of
the fields, which mean nothing; only the printed background, the same on all forms, tells one place from
another. So some regions have a digit that may count on every form, some on part of the forms, and most on
none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from batchshaping.training.data.dataset import Data, ImagesInMemory, data_in_memory
from batchshaping.training.sections import DataSettings

__all__ = ["CANVASES", "CENTRED_CANVASES", "FORMS", "CanvasImages", "Canvases", "Field", "Part"]

Part = Literal["train", "validation", "test"]
"""What canvases are for; no two parts share a digit."""

_INK = 0.4
"""Contrast of full ink."""
_NOISE = 0.08
"""Standard deviation of the noise of single pixels."""
_DISTRACTION = 0.45
"""Contrast of what distracts: noise is uniform between its negative and itself, and has the most entropy."""
_NOISY = 2 / 3
"""Share of noise among what distracts; the others are stripes."""
_GREY = 0.5
"""Mean of all pixels."""
_CHUNK = 500
"""Number of canvases that are drawn at once."""


class Field(NamedTuple):
    """A place on forms where a digit may be.

    Attributes:
        row: of its upper left pixel, a multiple of the grid.
        column: of its upper left pixel, a multiple of the grid.
        filled: share of the forms on which a digit is there, above 0.
    """

    row: int
    column: int
    filled: float


@dataclass(frozen=True)
class CanvasImages(ImagesInMemory):
    """Canvases, with what is where, for D digits that may count: one for each field, or one.

    Attributes:
        corners: row and column of the upper left pixel of each digit, of shape (N, D, 2).
        ink: where each digit has ink, booleans of shape (N, D, height, width) of the digit; empty fields have
            none.
        sources: which digit of scikit-learn each is, of shape (N, D), and -1 in an empty field.
    """

    corners: Tensor
    ink: Tensor
    sources: Tensor

    def objects(self) -> Tensor:
        """Where digits that may count are in each image, booleans of shape (N, H, W): for analysis only."""
        masks = torch.zeros(len(self), *self.images.shape[2:], dtype=torch.bool)
        example = torch.arange(len(self))[:, None, None]
        for corner, ink in zip(self.corners.unbind(1), self.ink.unbind(1), strict=True):
            rows, columns = (corner[:, i, None] + torch.arange(ink.shape[1 + i]) for i in range(2))
            masks[example, rows[:, :, None], columns[:, None, :]] = ink
        return masks


@dataclass(frozen=True)
class Canvases:
    """How canvases are drawn; calling it gives the data set.

    Digits are split before canvases are drawn: no digit of the training images is in the validation or the
    test images. So settings can be chosen on the validation images.

    Attributes:
        spread: standard deviation, in pixels, of the digits' distance from the centre in each direction;
            infinite for places that are uniform. Digits in fields have no such distance.
        size: pixels along the side of a canvas.
        scale: pixels along the side of a pixel of scikit-learn's digits, which are 8 x 8; even.
        grid: places are multiples of so many pixels; even.
        distractors: their number.
        images: number of canvases to train on, to validate on and to test on.
        seed: seed of all that is random.
        fields: where digits are, later ones counting before earlier ones; with none, one digit is somewhere.
        decoys: number of digits that do not count, at places that are uniform.
        background: standard deviation of the smooth background that each canvas has for itself.
        printed: standard deviation of the smooth background that is the same on all canvases.

    Raises:
        ValueError: if a number is out of range; if a field is not on the grid or overlaps another, or if none
            is always filled in; if there is no room for so many decoys and distractors.

    Example:
        >>> drawn = Canvases().draw("validation", count=3)
        >>> drawn.images.shape, drawn.objects().shape, drawn.images.dtype
        (torch.Size([3, 1, 64, 64]), torch.Size([3, 64, 64]), torch.uint8)
    """

    spread: float = float("inf")
    size: int = 64
    scale: int = 2
    grid: int = 8
    distractors: int = 3
    images: tuple[int, int, int] = (12_000, 2_000, 2_000)
    seed: int = 0
    fields: tuple[Field, ...] = ()
    decoys: int = 0
    background: float = 0.06
    printed: float = 0.0

    def __post_init__(self) -> None:
        if not self.spread > 0:
            raise ValueError(f"spread must be positive, received {self.spread}")
        for name in ("scale", "grid"):
            value = getattr(self, name)
            if value < 2 or value % 2:
                raise ValueError(f"{name} must be even and positive, received {value}")
        for name in ("distractors", "decoys", "background", "printed"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, received {value}")
        if self.size < self.digit or self._room() < self.distractors + self.decoys:
            others = f"{self.decoys} decoys and " * (self.decoys > 0)
            raise ValueError(
                f"size must leave room for a digit of {self.digit} pixels and {others}{self.distractors} "
                f"distractors, received {self.size}"
            )
        for field in self.fields:
            self._check(field)
        if self.fields and max(field.filled for field in self.fields) < 1:
            raise ValueError(f"fields must have one that is always filled, received {self.fields}")

    def _check(self, field: Field) -> None:
        corner = torch.tensor(field[:2])
        if (corner % self.grid).any() or (corner < 0).any() or (corner > self.size - self.digit).any():
            raise ValueError(
                f"fields must be at multiples of {self.grid} within {self.size} pixels, received {field}"
            )
        if not 0 < field.filled <= 1:
            raise ValueError(f"filled must be above 0 and at most 1, received {field}")
        near = [other for other in self.fields if self._overlap(corner, torch.tensor(other[:2]))]
        if len(near) > 1:
            raise ValueError(f"fields must not overlap, received {near[0]} and {near[1]}")

    @property
    def digit(self) -> int:
        """Pixels along the side of a digit, and of a distractor."""
        return 8 * self.scale

    @property
    def _steps(self) -> int:
        """How many places there are in each direction."""
        return (self.size - self.digit) // self.grid + 1

    def _every_place(self) -> Tensor:
        """The upper left pixels of all places, of shape (places, 2), by rows."""
        steps = torch.arange(self._steps) * self.grid
        return torch.cartesian_prod(steps, steps)

    def _overlap(self, corners: Tensor, others: Tensor) -> Tensor:
        """Whether digits with these upper left pixels overlap."""
        return (corners - others).abs().amax(dim=-1) < self.digit

    def _room(self) -> int:
        """How many decoys and distractors have room, wherever the digits and the first of them are."""
        around = (2 * -(-self.digit // self.grid) - 1) ** 2
        if not self.fields:
            return (self._steps**2 - 1) // around
        taken = [self._overlap(self._every_place(), torch.tensor(field[:2])) for field in self.fields]
        free = len(taken[0]) - int(torch.stack(taken).any(dim=0).sum())
        return -(-free // around)

    def __call__(self, settings: DataSettings) -> Data:
        return _drawn(self)

    def draw(self, part: Part, count: int) -> CanvasImages:
        """Canvases with digits of one part, always the same; fewer of them are the first of more.

        Args:
            part: whose digits they have.
            count: number of canvases.
        """
        digits, labels, own = _digits()
        sources = own[part]
        seeds = np.random.SeedSequence([self.seed, sorted(own).index(part)])
        # The same for all parts, so none of their seeds.
        printed = self._smooth(self.printed, 1, np.random.default_rng([self.seed, len(own)]))
        chunks = []
        for first, child in zip(range(0, count, _CHUNK), seeds.spawn(-(-count // _CHUNK)), strict=True):
            # A stream of its own, so that canvases without fields do not draw from it.
            filled = self._filled(np.random.default_rng(child.spawn(1)[0]))
            generator = np.random.default_rng(child)
            chosen = sources[generator.integers(len(sources), size=(_CHUNK, filled.shape[1] + self.decoys))]
            images, corners = self._draw(digits[chosen], filled, printed, generator)
            n = min(_CHUNK, count - first)
            counting = chosen[:, : filled.shape[1]].masked_fill(~filled, -1)
            chunks.append((images[:n], corners[:n], counting[:n]))
        images, corners, chosen = (torch.cat(values) for values in zip(*chunks, strict=True))
        filled = chosen >= 0
        ink = (self._enlarged(digits[chosen]) > 0) & filled[:, :, None, None]
        last = (filled * torch.arange(1, filled.shape[1] + 1)).argmax(dim=1, keepdim=True)
        return CanvasImages(images, labels[chosen].gather(1, last).squeeze(1), corners, ink, chosen)

    def place_probabilities(self) -> Tensor:
        """The probability of each place of a digit without fields, of shape (rows, columns) of places."""
        centre = (self.size - self.digit) / 2
        distance = (torch.arange(self._steps, dtype=torch.float64) * self.grid - centre) / self.spread
        density = torch.exp(-distance.square() / 2)
        joint = density[:, None] * density
        return joint / joint.sum()

    def _enlarged(self, digits: Tensor) -> Tensor:
        return digits.repeat_interleave(self.scale, dim=-2).repeat_interleave(self.scale, dim=-1)

    def _filled(self, generator: np.random.Generator) -> Tensor:
        """Whether there is each of the digits that may count, booleans of shape (N, D)."""
        shares = [field.filled for field in self.fields] or [1.0]
        return torch.from_numpy(generator.random((_CHUNK, len(shares))) < shares)

    def _draw(
        self, digits: Tensor, filled: Tensor, printed: Tensor, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Canvases, and the corners of the digits that may count, which come first among the digits."""
        n = len(digits)
        canvas = _GREY + printed + self._smooth(self.background, n, generator)
        canvas += _NOISE * _normal(generator, n, self.size, self.size)
        corners = self._corners(n, generator)
        side = torch.arange(self.digit)
        checkerboard = 1.0 - 2 * ((side[:, None] + side) % 2)
        there = F.pad(filled, (0, self.decoys), value=True)
        for k in range(digits.shape[1]):
            ink = self._enlarged(digits[:, k]) * there[:, k, None, None]
            self._add(canvas, corners[k], _INK * ink * checkerboard)
        radius = (side - (self.digit - 1) / 2) / (self.digit / 2)
        spot = (radius[:, None].square() + radius.square()).lt(1).float()
        stripes = (1.0 - 2 * (side % 2)).expand(self.digit, -1)
        for corner in corners[digits.shape[1] :]:
            across = torch.from_numpy(generator.random((n, 1, 1)) < 0.5)
            is_noise = torch.from_numpy(generator.random((n, 1, 1)) < _NOISY)
            noise = 2 * torch.from_numpy(generator.random((n, self.digit, self.digit), np.float32)) - 1
            spots = torch.where(is_noise, noise, torch.where(across, stripes, stripes.T))
            self._add(canvas, corner, _DISTRACTION * spot * spots)
        images = (canvas.clamp(0, 1) * 255).round().to(torch.uint8)
        return images.unsqueeze(1), torch.stack(corners[: filled.shape[1]], dim=1)

    def _smooth(self, deviation: float, n: int, generator: np.random.Generator) -> Tensor:
        """A few random values, and between them cubic interpolation, along rows and columns."""
        few = deviation * _normal(generator, n, 5, 5)
        units = torch.eye(5).reshape(1, 5, 5, 1)
        size = (self.size, 1)
        between = F.interpolate(units, size, mode="bicubic", align_corners=True)[0, :, :, 0]
        return between.T @ few @ between

    def _corners(self, n: int, generator: np.random.Generator) -> list[Tensor]:
        """Upper left pixels, (n, 2) each, of digits, decoys and distractors: none overlaps another."""
        every = self._every_place()
        free = torch.ones(n, len(every), dtype=torch.bool)
        corners = []

        def take(corner: Tensor) -> None:
            free.logical_and_(~self._overlap(every, corner[:, None]))
            corners.append(corner)

        for field in self.fields:
            take(torch.tensor(field[:2]).expand(n, -1))
        uniform = torch.ones(len(every), dtype=torch.float64)
        others = [uniform] * (self.decoys + self.distractors)
        for chances in others if self.fields else [self.place_probabilities().flatten(), *others]:
            # The first of these times is that of a free place with a probability proportional to its chance.
            times = torch.from_numpy(generator.exponential(size=free.shape)) / chances
            take(every[times.masked_fill(~free, torch.inf).argmin(dim=1)])
        return corners

    def _add(self, canvas: Tensor, corner: Tensor, patches: Tensor) -> None:
        side = torch.arange(self.digit)
        rows, columns = (corner[:, i, None] + side for i in range(2))
        canvas[torch.arange(len(canvas))[:, None, None], rows[:, :, None], columns[:, None, :]] += patches


CANVASES = Canvases()
"""Digits at places that are uniform."""

CENTRED_CANVASES = Canvases(spread=10.0)
"""Digits that are mostly near the centre."""

FORMS = Canvases(
    size=48,
    grid=16,
    fields=(Field(16, 16, filled=1.0), Field(16, 32, filled=0.5)),
    decoys=3,
    distractors=2,
    background=0.02,
    printed=0.1,
)
"""Forms of 3 x 3 places: one always has a digit, one on every second form, and three others have decoys."""


@lru_cache(maxsize=1)
def _drawn(canvases: Canvases) -> Data:
    """The data set, drawn once: a process that trains, evaluates and measures loads it each time."""
    parts: tuple[Part, ...] = ("train", "validation", "test")
    train, validation, test = (canvases.draw(part, n) for part, n in zip(parts, canvases.images, strict=True))
    names = [str(digit) for digit in range(10)]
    # A shift by an odd number of pixels, or a flip, would change the texture.
    return replace(data_in_memory(train, test, names, padding=0, flip=False), validation=validation)


def _digits() -> tuple[Tensor, Tensor, dict[Part, Tensor]]:
    """The digits of scikit-learn in [0, 1], their labels, and which belong to each part."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    loaded = load_digits()
    every = np.arange(len(loaded.target))
    train, others = train_test_split(every, test_size=0.3, stratify=loaded.target, random_state=0)
    validation, test = train_test_split(others, test_size=0.5, stratify=loaded.target[others], random_state=0)
    parts: dict[Part, Tensor] = {
        "train": torch.from_numpy(train),
        "validation": torch.from_numpy(validation),
        "test": torch.from_numpy(test),
    }
    return torch.from_numpy(loaded.images / 16).float(), torch.from_numpy(loaded.target).long(), parts


def _normal(generator: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
