"""Frames of an animation, written as a small GIF."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import combinations
from os import PathLike
from typing import Any, Protocol

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from batchshaping.figures.style import COLORS, GRID_COLOR

__all__ = ["Animation", "frames_of", "write_gif"]


class Animation(Protocol):
    """A figure that shows any step by giving new data to artists that stay the same."""

    figure: Figure
    steps: int
    moving: list[Artist]
    captions: list[Text]

    def show(self, step: int) -> None:
        """Bring what moves to a step, from 0 to ``steps``."""


def frames_of(animation: Animation, steps: Iterable[int]) -> Iterator[Image.Image]:
    """Pictures of some steps: what stands still is rendered once, what moves is drawn on a copy of it.

    Letters are the slowest thing to render, so a caption that says the same as before is copied too.
    """
    figure = animation.figure
    canvas: Any = FigureCanvasAgg(figure)
    for artist in (*animation.moving, *animation.captions):
        artist.set_animated(True)
    canvas.draw()
    still = canvas.copy_from_bbox(figure.bbox)
    rendered: dict[Text, tuple[str, Any]] = {}
    for step in steps:
        animation.show(step)
        canvas.restore_region(still)
        for artist in animation.moving:
            figure.draw_artist(artist)
        for caption in animation.captions:
            said, region = rendered.get(caption, ("", None))
            if said == caption.get_text():
                canvas.restore_region(region)
                continue
            figure.draw_artist(caption)
            box = caption.get_window_extent().padded(1)
            rendered[caption] = caption.get_text(), canvas.copy_from_bbox(box)
        size = canvas.get_width_height(physical=True)
        yield Image.frombytes("RGBA", size, bytes(canvas.buffer_rgba())).convert("RGB")


def write_gif(animation: Animation, path: str | PathLike[str], frames: int, duration: int) -> None:
    """Write equally spaced steps, first and last included, in one small palette."""
    if frames < 2:
        raise ValueError(f"frames must be at least 2, received {frames}")
    stride = math.ceil(animation.steps / (frames - 1))
    steps = [*range(0, animation.steps, stride), animation.steps]
    palette = _palette()
    first, *rest = (
        picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in frames_of(animation, steps)
    )
    # The end stays for a while before it starts again.
    durations = [duration] * len(rest) + [2000]
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def _palette() -> Image.Image:
    """The colors of the figures, and those between any two of them, which smooth edges have."""
    grid, *colors = to_rgba_array([GRID_COLOR, "white", *COLORS.values()])[:, :3]
    share = np.linspace(0, 1, 8)[:, None]
    mixed = np.concatenate([grid[None], *(share * a + (1 - share) * b for a, b in combinations(colors, 2))])
    palette = Image.new("P", (1, 1))
    palette.putpalette((255 * np.unique(mixed, axis=0)).round().astype(np.uint8).tobytes())
    return palette
