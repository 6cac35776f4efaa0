"""Images as a network with tokens of two scales reads them, and an animation of that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from batchshaping.figures.style import COLORS, Array, house_style

__all__ = ["MaskAnimation", "draw_masks", "draw_region_map", "masked"]


def masked(image: Array, mask: Array, side: int = 2) -> Array:
    """An image as it is read where fine, and where coarse at a lower resolution, and tinted.

    Args:
        image: in [0, 1], of shape (height, width) or (height, width, 3).
        mask: zeros and ones of shape (rows, columns), 1 for a region that is fine; they divide the image.
        side: pixels along the side of the squares that a coarse region has the means of.

    Returns:
        Colors in [0, 1] of shape (height, width, 3).

    Raises:
        ValueError: if the regions, or the squares in them, do not divide the image.

    Example:
        >>> masked(np.eye(4), np.array([[1, 0], [0, 0]]))[:2, :2, 0]
        array([[1., 0.],
               [0., 1.]])
    """
    height, width = image.shape[:2]
    rows, columns = mask.shape
    if height % (rows * side) or width % (columns * side):
        raise ValueError(
            f"regions of squares of {side} pixels must divide the image, received {rows} x {columns} regions "
            f"in {height} x {width} pixels"
        )
    colored = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image
    squares = colored.reshape(height // side, side, width // side, side, 3).mean(axis=(1, 3))
    coarse = squares.repeat(side, axis=0).repeat(side, axis=1)
    tinted = (1 - _TINT) * coarse + _TINT * np.array(to_rgb(COLORS["empirical"]))
    is_fine = mask.astype(bool).repeat(height // rows, axis=0).repeat(width // columns, axis=1)
    return np.where(is_fine[..., None], colored, tinted)


_TINT = 0.45


def draw_masks(images: Array, masks: Array, titles: Sequence[str], side: int = 2) -> Figure:
    """Images in rows, with the masks of one way to choose in each.

    Args:
        images: of shape (N, height, width), in [0, 1].
        masks: of shape (ways, N, rows, columns).
        titles: a name for each way.
        side: see :func:`masked`.
    """
    with house_style():
        figure = Figure(figsize=(0.95 * len(images) + 0.3, 1.05 * len(masks) + 0.1), layout="constrained")
        every = figure.subplots(len(masks), len(images), squeeze=False)
        for row, of_way, title in zip(every, masks, titles, strict=True):
            for ax, image, mask in zip(row, images, of_way, strict=True):
                ax.imshow(masked(image, mask, side), interpolation="nearest")
                _only_the_picture(ax)
            row[0].set_ylabel(title)
    return figure


def draw_region_map(ax: Axes, values: Array, title: str, highest: float) -> None:
    """A number for each region, where it is.

    Args:
        ax: where to draw.
        values: of shape (rows, columns), from 0.
        title: what they are.
        highest: the value of the darkest color.
    """
    ax.imshow(values, cmap="Blues", vmin=0, vmax=highest)
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > 0.6 * highest else "black"
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    _only_the_picture(ax)
    ax.set_title(title)


def _only_the_picture(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)


class MaskAnimation:
    """Images with the masks of each step of a training, to be written as a GIF.

    Args:
        images: of shape (N, height, width), in [0, 1].
        masks: of shape (steps, N, rows, columns).
        captions: a text for each step.
        columns: number of images beside each other.
        side: see :func:`masked`.
    """

    def __init__(
        self, images: Array, masks: Array, captions: Sequence[str], columns: int = 6, side: int = 2
    ) -> None:
        self.images, self.masks, self.side = images, masks, side
        self.texts = captions
        self.steps = len(masks) - 1
        rows = -(-len(images) // columns)
        with house_style():
            self.figure = Figure(figsize=(0.95 * columns, 0.95 * rows + 0.25))
            every = self.figure.subplots(rows, columns, squeeze=False).flatten()
            top = 1 - 0.25 / self.figure.get_figheight()
            self.figure.subplots_adjust(0.005, 0.01, 0.995, top, 0.04, 0.04)
            for ax in every:
                ax.set_axis_off()
            pictures = [
                ax.imshow(masked(image, masks[0, 0], side), interpolation="nearest")
                for ax, image in zip(every, images, strict=False)
            ]
            caption = self.figure.text(0.01, 1 - 0.07 / self.figure.get_figheight(), "", va="top")
        self._pictures = pictures
        self.moving: list[Artist] = [*pictures]
        self.captions: list[Text] = [caption]

    def show(self, step: int) -> None:
        """Show the masks of a step."""
        for picture, image, mask in zip(self._pictures, self.images, self.masks[step], strict=True):
            picture.set_data(masked(image, mask, self.side))
        self.captions[0].set_text(self.texts[step])
