"""Masks over images: fine regions as they are, coarse ones as their means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from batchshaping.figures.animations import write_gif
from batchshaping.figures.masks import MaskAnimation, draw_masks, draw_region_map, masked

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(8, 12), (8, 12, 3)])
def test_what_is_fine_stays_and_what_is_coarse_has_one_color_a_square(shape: tuple[int, ...]) -> None:
    image, mask = RNG.random(shape), np.array([[1, 0, 1], [0, 0, 1]])
    colors = masked(image, mask)
    assert colors.shape == (8, 12, 3) and colors.min() >= 0 and colors.max() <= 1
    for row in range(2):
        for column in range(3):
            part = (slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
            before = image[part] if image.ndim == 3 else image[part][..., None].repeat(3, axis=2)
            if mask[row, column]:
                np.testing.assert_array_equal(colors[part], before)
                continue
            squares = colors[part].reshape(2, 2, 2, 2, 3).transpose(0, 2, 1, 3, 4).reshape(4, 4, 3)
            np.testing.assert_allclose(squares, squares[:, :1].repeat(4, axis=1))
            # The tint is the same everywhere, so that differences of means are left.
            means = before.reshape(2, 2, 2, 2, 3).mean(axis=(1, 3)).reshape(4, 3)
            np.testing.assert_allclose(
                squares[1:, 0] - squares[0, 0], 0.55 * (means[1:] - means[0]), atol=1e-12
            )


def test_regions_that_do_not_divide_the_image_are_refused() -> None:
    with pytest.raises(ValueError, match="received 3 x 2 regions in 8 x 8 pixels"):
        masked(np.zeros((8, 8)), np.ones((3, 2)))


def test_a_figure_has_a_row_for_each_way_and_a_picture_for_each_image() -> None:
    images, masks = RNG.random((3, 8, 8)), RNG.integers(2, size=(2, 3, 2, 2))
    figure = draw_masks(images, masks, ["one", "other"])
    assert len(figure.axes) == 6
    for ax, mask, image in zip(figure.axes, masks.reshape(6, 2, 2), [*images, *images], strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), masked(image, mask))
    assert [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()] == ["one", "other"]


def test_a_map_shows_each_number_where_it_is() -> None:
    ax = Figure().add_subplot()
    values = RNG.random((2, 3))
    draw_region_map(ax, values, "means", highest=1.0)
    assert {(text.get_position(), text.get_text()) for text in ax.texts} == {
        ((column, row), f"{value:.2f}") for (row, column), value in np.ndenumerate(values)
    }


def test_an_animation_shows_the_masks_of_each_step(tmp_path: Path) -> None:
    images, masks = RNG.random((4, 8, 8)), RNG.integers(2, size=(5, 4, 2, 2))
    animation = MaskAnimation(images, masks, [f"step {n}" for n in range(5)], columns=3)
    animation.show(3)
    for picture, image, mask in zip(animation.moving, images, masks[3], strict=True):
        np.testing.assert_array_equal(picture.get_array(), masked(image, mask))  # type: ignore[attr-defined]
    assert animation.captions[0].get_text() == "step 3"
    write_gif(animation, tmp_path / "masks.gif", frames=5, duration=100)
    with Image.open(tmp_path / "masks.gif") as written:
        assert written.n_frames == 5  # type: ignore[attr-defined]
