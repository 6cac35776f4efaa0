r"""Canvases: large images in which one small handwritten digit has to be found and read.

A canvas is a smooth background with fine noise, one digit of scikit-learn at a random place, and distractors.
The digit is woven into the texture: its ink a modulates a checkerboard of single pixels,

.. math::
    x = \text{background} + \text{noise} + 0.4 \, a \, (-1)^{\text{row} + \text{column}},

and is the same over squares of 2 x 2 pixels, so that the mean of each square does not depend on it. At half
the resolution the digit is gone. What distracts is of the same size and has more contrast than a digit: spots
of noise, and of stripes as fine as the checkerboard, which are gone at half the resolution too.

So all that is needed is in one small part of each image, and neither coarse pixels nor contrast tell where.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from batchshaping.training.data.dataset import Data, ImagesInMemory, data_in_memory
from batchshaping.training.sections import DataSettings

__all__ = ["CANVASES", "CENTRED_CANVASES", "CanvasImages", "Canvases", "Part"]

Part = Literal["train", "validation", "test"]

_INK = 0.4
"""Contrast of full ink."""
_NOISE = 0.08
"""Standard deviation of the noise of single pixels."""
_SMOOTH = 0.06
"""Standard deviation of the background."""
_DISTRACTION = 0.45
"""Contrast of what distracts: noise is uniform between its negative and itself, and has the most entropy."""
_NOISY = 2 / 3
"""Share of noise among what distracts; the others are stripes."""
_GREY = 0.5
"""Mean of all pixels."""
_CHUNK = 500
"""Number of canvases that are drawn at once."""


@dataclass(frozen=True)
class CanvasImages(ImagesInMemory):
    """Canvases, with what is where.

    Attributes:
        corners: row and column of the upper left pixel of each digit, of shape (N, 2).
        ink: where each digit has ink, booleans of shape (N, height, width) of the digit.
        sources: which digit of scikit-learn each is, of shape (N,).
    """

    corners: Tensor
    ink: Tensor
    sources: Tensor

    def objects(self) -> Tensor:
        """Where each digit is in its image, booleans of shape (N, H, W): for analysis only."""
        masks = torch.zeros(len(self), *self.images.shape[2:], dtype=torch.bool)
        rows, columns = (self.corners[:, i, None] + torch.arange(self.ink.shape[1 + i]) for i in range(2))
        example = torch.arange(len(self))[:, None, None]
        masks[example, rows[:, :, None], columns[:, None, :]] = self.ink
        return masks


@dataclass(frozen=True)
class Canvases:
    """How canvases are drawn; calling it gives the data set.

    Digits are split before canvases are drawn: no digit of the training images is in the validation or the
    test images. So settings can be chosen on the validation images.

    Attributes:
        spread: standard deviation, in pixels, of the digits' distance from the centre in each direction;
            infinite for places that are uniform.
        size: pixels along the side of a canvas.
        scale: pixels along the side of a pixel of scikit-learn's digits, which are 8 x 8; even.
        grid: places are multiples of so many pixels; even.
        distractors: their number.
        images: number of canvases to train on, to validate on and to test on.
        seed: seed of all that is random.

    Raises:
        ValueError: if a number is out of range, or if there is no room for so many distractors.

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

    def __post_init__(self) -> None:
        if not self.spread > 0:
            raise ValueError(f"spread must be positive, received {self.spread}")
        for name in ("scale", "grid"):
            value = getattr(self, name)
            if value < 2 or value % 2:
                raise ValueError(f"{name} must be even and positive, received {value}")
        if self.distractors < 0:
            raise ValueError(f"distractors must not be negative, received {self.distractors}")
        free, around = self._steps**2, (2 * -(-self.digit // self.grid) - 1) ** 2
        if self.size < self.digit or free <= self.distractors * around:
            raise ValueError(
                f"size must leave room for a digit of {self.digit} pixels and {self.distractors} "
                f"distractors, received {self.size}"
            )

    @property
    def digit(self) -> int:
        """Pixels along the side of a digit, and of a distractor."""
        return 8 * self.scale

    @property
    def _steps(self) -> int:
        """How many places there are in each direction."""
        return (self.size - self.digit) // self.grid + 1

    def __call__(self, settings: DataSettings) -> Data:
        parts: tuple[Part, ...] = ("train", "validation", "test")
        train, validation, test = (self.draw(part, n) for part, n in zip(parts, self.images, strict=True))
        names = [str(digit) for digit in range(10)]
        # A shift by an odd number of pixels, or a flip, would change the texture.
        return replace(data_in_memory(train, test, names, padding=0, flip=False), validation=validation)

    def draw(self, part: Part, count: int) -> CanvasImages:
        """Canvases with digits of one part, always the same; fewer of them are the first of more.

        Args:
            part: whose digits they have.
            count: number of canvases.
        """
        digits, labels, own = _digits()
        sources = own[part]
        seeds = np.random.SeedSequence([self.seed, sorted(own).index(part)])
        chunks = []
        for first, child in zip(range(0, count, _CHUNK), seeds.spawn(-(-count // _CHUNK)), strict=True):
            generator = np.random.default_rng(child)
            chosen = sources[generator.integers(len(sources), size=_CHUNK)]
            images, corners = self._draw(digits[chosen], generator)
            n = min(_CHUNK, count - first)
            chunks.append((images[:n], corners[:n], chosen[:n]))
        images, corners, chosen = (torch.cat(values) for values in zip(*chunks, strict=True))
        ink = self._enlarged(digits[chosen]) > 0
        return CanvasImages(images, labels[chosen], corners, ink, chosen)

    def place_probabilities(self) -> Tensor:
        """The probability of each place of the digit, of shape (rows, columns) of places."""
        centre = (self.size - self.digit) / 2
        distance = (torch.arange(self._steps, dtype=torch.float64) * self.grid - centre) / self.spread
        density = torch.exp(-distance.square() / 2)
        joint = density[:, None] * density
        return joint / joint.sum()

    def _enlarged(self, digits: Tensor) -> Tensor:
        return digits.repeat_interleave(self.scale, dim=1).repeat_interleave(self.scale, dim=2)

    def _draw(self, digits: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        n = len(digits)
        canvas = _GREY + self._background(n, generator)
        canvas += _NOISE * _normal(generator, n, self.size, self.size)
        places = self._places(n, generator)
        side = torch.arange(self.digit)
        checkerboard = 1.0 - 2 * ((side[:, None] + side) % 2)
        self._add(canvas, places[0], _INK * self._enlarged(digits) * checkerboard)
        radius = (side - (self.digit - 1) / 2) / (self.digit / 2)
        spot = (radius[:, None].square() + radius.square()).lt(1).float()
        stripes = (1.0 - 2 * (side % 2)).expand(self.digit, -1)
        for place in places[1:]:
            across = torch.from_numpy(generator.random((n, 1, 1)) < 0.5)
            is_noise = torch.from_numpy(generator.random((n, 1, 1)) < _NOISY)
            noise = 2 * torch.from_numpy(generator.random((n, self.digit, self.digit), np.float32)) - 1
            spots = torch.where(is_noise, noise, torch.where(across, stripes, stripes.T))
            self._add(canvas, place, _DISTRACTION * spot * spots)
        images = (canvas.clamp(0, 1) * 255).round().to(torch.uint8)
        return images.unsqueeze(1), places[0] * self.grid

    def _background(self, n: int, generator: np.random.Generator) -> Tensor:
        """Smooth: a few random values, and between them cubic interpolation, along rows and columns."""
        few = _SMOOTH * _normal(generator, n, 5, 5)
        units = torch.eye(5).reshape(1, 5, 5, 1)
        size = (self.size, 1)
        between = F.interpolate(units, size, mode="bicubic", align_corners=True)[0, :, :, 0]
        return between.T @ few @ between

    def _places(self, n: int, generator: np.random.Generator) -> list[Tensor]:
        """Places of the digit and of the distractors, (n, 2) each, in steps of the grid: none overlaps."""
        steps = torch.arange(self._steps)
        every = torch.cartesian_prod(steps, steps)
        chance = self.place_probabilities().flatten()
        free = torch.ones(n, len(every), dtype=torch.bool)
        places = []
        for chances in (chance, *[torch.ones_like(chance)] * self.distractors):
            # The first of these times is that of a free place with a probability proportional to its chance.
            times = torch.from_numpy(generator.exponential(size=free.shape)) / chances
            place = every[times.masked_fill(~free, torch.inf).argmin(dim=1)]
            distance = (every - place[:, None]).abs().amax(dim=2) * self.grid
            free &= distance >= self.digit
            places.append(place)
        return places

    def _add(self, canvas: Tensor, place: Tensor, patches: Tensor) -> None:
        side = torch.arange(self.digit)
        rows, columns = (place[:, i, None] * self.grid + side for i in range(2))
        canvas[torch.arange(len(canvas))[:, None, None], rows[:, :, None], columns[:, None, :]] += patches


CANVASES = Canvases()
"""Digits at places that are uniform."""

CENTRED_CANVASES = Canvases(spread=10.0)
"""Digits that are mostly near the centre."""


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
