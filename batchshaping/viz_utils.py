"""Figures and animations: a sample beside its prior, and a fit from its first step to its last.

What stands still in an animation is rendered once; a frame renders only the artists that move, on top of it.
Needs the extra ``viz``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import combinations
from os import PathLike
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.batch_shaping_loss import Prior
from batchshaping.fit import Fit, GeneralizedFit
from batchshaping.priors import Beta, ClosedFormPrior, Normal, RelaxedBernoulli, SymBeta
from batchshaping.utils import to_numpy

try:
    import matplotlib as mpl
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PathCollection
    from matplotlib.colors import to_rgba_array
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D
    from matplotlib.patches import StepPatch
    from matplotlib.rcsetup import cycler
    from matplotlib.text import Text
    from matplotlib.ticker import MaxNLocator, NullFormatter
    from PIL import Image
except ImportError as error:
    raise ImportError(
        f"batchshaping.viz_utils needs {error.name}: pip install 'batchshaping[viz]'", name=error.name
    ) from None

__all__ = [
    "COLORS",
    "animate_fit",
    "animate_generalized_fit",
    "house_style",
    "init_anim_plot",
    "init_gbas_anim_plot",
    "plot_cdf",
    "plot_density",
    "plot_fit",
    "plot_generalized_fit",
    "plot_gt_cdf",
    "plot_gt_pdf",
]

Array = np.ndarray[Any, np.dtype[Any]]

COLORS = {"values": "#56B4E9", "empirical": "#0072B2", "target": "#000000", "loss": "#D55E00"}
"""What a color stands for: values, their distribution, their prior, the loss (Okabe and Ito, 2008)."""

_GRID_COLOR = "#E5E5E5"
_DRAWN = ("axes", "figure", "font", "grid", "legend", "lines", "patch", "scatter", "text", "xtick", "ytick")
_STYLE: dict[Any, Any] = {
    # All that is not set below is as in matplotlib, whatever style is active.
    **{name: value for name, value in mpl.rcParamsDefault.items() if name.partition(".")[0] in _DRAWN},
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": cycler(color=["#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.dpi": 100,
    "font.size": 9,
    "grid.color": _GRID_COLOR,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 150,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
# Callers of the published interface write labels of 14 to 16 points into its figures.
_LARGE_STYLE: dict[Any, Any] = {
    **_STYLE,
    "axes.labelsize": 14,
    "font.size": 12,
    "legend.edgecolor": "none",
    "legend.fontsize": 12,
    "legend.frameon": True,  # they are put over bars and points
    "lines.linewidth": 2.2,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
}
_DASHES = (0, (3, 1.5))
_BINS = 20
_GRID = np.linspace(0.0, 1.0, 401)
_POINTS = 500
_POINTS_OF_AN_ARRAY = 150


def house_style() -> AbstractContextManager[None]:
    """The style of this project's figures, for a ``with`` block; outside of it nothing changes.

    It replaces any other style, such as that of ``matplotlib.style.use`` or ``seaborn.set_style``.

    Example:
        >>> from matplotlib.figure import Figure
        >>> with house_style():
        ...     ax = Figure().add_subplot()
        >>> ax.spines["top"].get_visible()
        False
    """
    return mpl.rc_context(_STYLE)


# Curves


def _empirical_cdf(values: Array, low: float, high: float) -> tuple[Array, Array]:
    """The empirical CDF as a line drawn in steps from low to high: it rises by 1/N at each value."""
    n = len(values)
    return np.concatenate([[low], np.sort(values), [high]]), np.append(np.arange(n + 1) / n, 1.0)


def _density(values: Array, low: float = 0.0, high: float = 1.0) -> Array:
    return np.histogram(values, bins=_BINS, range=(low, high), density=True)[0]


def _edges(low: float = 0.0, high: float = 1.0) -> Array:
    return np.linspace(low, high, _BINS + 1)


def _support(prior: Distribution) -> tuple[float, float]:
    """The ends of the prior's support, infinite where it has none."""
    low = getattr(prior.support, "lower_bound", -math.inf)
    high = getattr(prior.support, "upper_bound", math.inf)
    return float(low), float(high)


def _target_cdf(prior: Distribution, x: Array) -> Array:
    """The prior's CDF: 0 left of its support and 1 right of it."""
    low, high = _support(prior)
    inside = (x > low) & (x < high)
    cdf = (x >= high).astype(float)
    with torch.no_grad():
        cdf[inside] = to_numpy(prior.cdf(torch.from_numpy(x[inside])))
    return cdf


def _target_density(prior: Distribution, x: Array) -> Array:
    """The prior's density: 0 outside of its support, NaN at its ends, where it may be infinite."""
    low, high = _support(prior)
    inside = (x > low) & (x < high)
    density = np.where((x == low) | (x == high), math.nan, 0.0)
    with torch.no_grad():
        density[inside] = to_numpy(prior.log_prob(torch.from_numpy(x[inside])).exp())
    return density


def _limits(prior: Distribution, values: Array) -> tuple[float, float]:
    """What the horizontal axis shows: every value, and the prior's support or all but 1 % of its mass."""
    low, high = _support(prior)
    if math.isinf(low) or math.isinf(high):
        try:
            tails = to_numpy(prior.icdf(torch.tensor([0.005, 0.995])))
        except NotImplementedError:
            tails = np.array([values.min(), values.max()])
        low, high = (low if math.isfinite(low) else tails[0]), (high if math.isfinite(high) else tails[1])
    low, high = min(float(low), float(values.min())), max(float(high), float(values.max()))
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _scattered(values: Array, most: int) -> tuple[Array, Array]:
    """Every k-th value, and the heights at which they can be told apart: random, but always the same."""
    shown = values[:: math.ceil(len(values) / most)]
    return shown, np.random.default_rng(0).uniform(0.02, 0.98, len(shown))


# Parts of a figure


def _points(ax: Axes, size: float) -> Line2D:
    (points,) = ax.plot([], [], ".", color=COLORS["values"], markersize=size, markeredgewidth=0, zorder=2)
    return points


def _empirical_line(ax: Axes, x: Any = (), y: Any = ()) -> Line2D:
    (line,) = ax.plot(x, y, color=COLORS["empirical"], linewidth=2.6, drawstyle="steps-post", zorder=3)
    return line


def _target_line(ax: Axes, x: Any = (), y: Any = ()) -> Line2D:
    (line,) = ax.plot(x, y, color=COLORS["target"], linewidth=1.4, linestyle=_DASHES, zorder=4)
    return line


def _bars(ax: Axes, density: Array, edges: Array) -> StepPatch:
    return ax.stairs(
        density, edges, fill=True, facecolor=COLORS["values"], edgecolor=COLORS["empirical"], linewidth=1
    )


def _loss_line(ax: Axes) -> Line2D:
    (line,) = ax.plot([], [], ".-", color=COLORS["loss"], linewidth=1.8, markevery=[-1], clip_on=False)
    return line


def _caption(ax: Axes) -> Text:
    """A title that changes from frame to frame."""
    return ax.text(0, 1.05, "", transform=ax.transAxes)


def _unit_axis(ax: Axes) -> None:
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])


def _cdf_axes(ax: Axes) -> None:
    _unit_axis(ax)
    ax.set_ylim(-0.02, 1.02)
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])


def _loss_axes(ax: Axes, name: str, losses: Array) -> None:
    """A logarithmic axis of the whole decades in which the losses lie."""
    positive = losses[losses > 0]
    low, high = (positive.min(), positive.max()) if len(positive) else (1e-9, 0.1)
    decades = (10.0 ** math.floor(math.log10(low)), 10.0 ** (math.floor(math.log10(high)) + 1))
    ax.set(xlabel="step", xlim=(0, len(losses)), yscale="log", ylim=decades, ylabel=name)
    ax.yaxis.set_minor_formatter(NullFormatter())


def _density_limit(ax: Axes, prior: Distribution, values: Array, low: float = 0.0, high: float = 1.0) -> None:
    """Room for the histogram, and for the target in the middle of each bin: its ends may be infinite."""
    edges = _edges(low, high)
    target = _target_density(prior, (edges[1:] + edges[:-1]) / 2)
    ax.set_ylim(0, 1.15 * max(_density(values, low, high).max(), target.max()))
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _key(figure: Figure, target: str) -> None:
    """One legend for all axes, above them."""
    handles = [
        Line2D([], [], color=COLORS["values"], marker=".", markersize=9, markeredgewidth=0, linestyle=""),
        Line2D([], [], color=COLORS["empirical"], linewidth=2.6),
        Line2D([], [], color=COLORS["target"], linewidth=1.4, linestyle=_DASHES),
    ]
    labels = ["values, at random heights", "empirical", target]
    figure.legend(handles, labels, loc="upper center", ncols=3, borderaxespad=0.2)


# Animations


class _Animation(Protocol):
    """A figure that shows any step by giving new data to artists that stay the same."""

    figure: Figure
    steps: int
    moving: list[Artist]
    captions: list[Text]

    def show(self, step: int) -> None:
        """Bring what moves to a step, from 0 to ``steps``."""


class _FitAnimation:
    """The three axes of a fit: values and CDFs, loss, density."""

    def __init__(self, fit: Fit) -> None:
        _check_finite(fit.values)
        self.steps = fit.steps
        self.values, self.step_losses = to_numpy(fit.values.float()), to_numpy(fit.losses.float())
        self.figure = Figure(figsize=(8.0, 2.9))
        self.data, self.loss, self.density = self.figure.subplots(1, 3)
        self.figure.subplots_adjust(left=0.065, right=0.985, bottom=0.165, top=0.82, wspace=0.34)
        _key(self.figure, f"target {fit.prior}")
        _cdf_axes(self.data)
        self.data.set(xlabel="value x", ylabel="CDF")
        _loss_axes(self.loss, "loss", self.step_losses)
        _unit_axis(self.density)
        self.density.set(xlabel="value x", ylabel="density")
        _density_limit(self.density, fit.prior, self.values[-1])
        self.points = _points(self.data, size=4)
        self.empirical = _empirical_line(self.data)
        self.losses = _loss_line(self.loss)
        self.captions = [_caption(self.loss)]
        self.bars = _bars(self.density, _density(self.values[-1]), _edges())
        self.moving: list[Artist] = [
            self.points,
            self.empirical,
            _target_line(self.data, _GRID, _target_cdf(fit.prior, _GRID)),
            self.losses,
            self.bars,
            _target_line(self.density, _GRID, _target_density(fit.prior, _GRID)),
        ]
        self.show(self.steps)

    def show(self, step: int) -> None:
        values, losses = self.values[step], self.step_losses[: step + 1]
        self.points.set_data(*_scattered(values, _POINTS))
        self.empirical.set_data(*_empirical_cdf(values, 0.0, 1.0))
        self.losses.set_data(range(len(losses)), losses)
        self.captions[0].set_text(f"step {step}, loss {losses[-1]:.2e}")
        self.bars.set_data(_density(values))


class _GeneralizedFitAnimation:
    """The nine axes of a generalized fit: six arrays, two losses, the means."""

    def __init__(self, fit: GeneralizedFit) -> None:
        _check_finite(fit.values)
        self.steps = fit.steps
        self.means = fit.means.detach().cpu().float()
        self.totals = to_numpy(fit.losses.float())
        self.step_losses = (to_numpy(fit.prior_losses.float()), to_numpy(fit.hyperprior_losses.float()))
        self.figure = Figure(figsize=(8.0, 6.0))
        margins = {"left": 0.075, "right": 0.985, "wspace": 0.34}
        above = self.figure.add_gridspec(2, 3, bottom=0.42, top=0.9, hspace=0.45, **margins)
        below = self.figure.add_gridspec(1, 3, bottom=0.085, top=0.285, **margins)
        self.arrays: list[Axes] = [self.figure.add_subplot(above[i, j]) for i in range(2) for j in range(3)]
        loss_axes = [self.figure.add_subplot(below[j]) for j in range(2)]
        self.density = self.figure.add_subplot(below[2])
        _key(self.figure, "target")
        for k, ax in enumerate(self.arrays):
            _cdf_axes(ax)
            ax.set(xlabel="value x" if k >= 3 else "", ylabel="CDF" if k % 3 == 0 else "")
        for ax, name, losses in zip(
            loss_axes, ("prior loss", "hyperprior loss"), self.step_losses, strict=True
        ):
            _loss_axes(ax, name, losses)
        _unit_axis(self.density)
        self.density.set(xlabel="mean μ", ylabel="density")
        _density_limit(self.density, fit.hyperprior, to_numpy(self.means[-1]))

        # From the lowest mean at the end to the highest.
        order = self.means[-1].argsort()
        self.shown = order[torch.linspace(0, len(order) - 1, len(self.arrays)).round().long()]
        self.values = to_numpy(fit.values[:, self.shown].float())
        self.parameters = (self.means[:, self.shown], fit.temperatures.detach().cpu().float()[:, self.shown])
        priors = RelaxedBernoulli(self.parameters[0].unsqueeze(-1), self.parameters[1].unsqueeze(-1))
        self.target_cdfs = to_numpy(priors.cdf(torch.from_numpy(_GRID)))

        self.points = [_points(ax, size=3) for ax in self.arrays]
        self.empirical = [_empirical_line(ax) for ax in self.arrays]
        self.targets = [_target_line(ax) for ax in self.arrays]
        self.losses = [_loss_line(ax) for ax in loss_axes]
        self.captions = [_caption(ax) for ax in (*self.arrays, loss_axes[0])]
        self.bars = _bars(self.density, _density(to_numpy(self.means[-1])), _edges())
        self.moving: list[Artist] = [
            *self.points,
            *self.empirical,
            *self.targets,
            *self.losses,
            self.bars,
            _target_line(self.density, _GRID, _target_density(fit.hyperprior, _GRID)),
        ]
        self.show(self.steps)

    def show(self, step: int) -> None:
        means, temperatures = (parameter[step].tolist() for parameter in self.parameters)
        for k, values in enumerate(self.values[step]):
            self.points[k].set_data(*_scattered(values, _POINTS_OF_AN_ARRAY))
            self.empirical[k].set_data(*_empirical_cdf(values, 0.0, 1.0))
            self.targets[k].set_data(_GRID, self.target_cdfs[step, k])
            self.captions[k].set_text(f"μ = {means[k]:.2f}, τ = {temperatures[k]:.2f}")
        for line, losses in zip(self.losses, self.step_losses, strict=True):
            line.set_data(range(len(losses[: step + 1])), losses[: step + 1])
        self.captions[-1].set_text(f"step {step}, total loss {self.totals[: step + 1][-1]:.2e}")
        self.bars.set_data(_density(to_numpy(self.means[step])))


def _check_finite(values: Tensor) -> None:
    wrong = int((~values.isfinite()).any(dim=0).sum())
    if wrong:
        raise ValueError(f"fit must be finite to be drawn, received {wrong} values that are not")


def _frames(animation: _Animation, steps: Iterable[int]) -> Iterator[Image.Image]:
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


def _write_gif(animation: _Animation, path: str | PathLike[str], frames: int, duration: int) -> None:
    """Write equally spaced steps, first and last included, in one small palette."""
    if frames < 2:
        raise ValueError(f"frames must be at least 2, received {frames}")
    stride = math.ceil(animation.steps / (frames - 1))
    steps = [*range(0, animation.steps, stride), animation.steps]
    palette = _palette()
    first, *rest = (
        picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in _frames(animation, steps)
    )
    # The end stays for a while before it starts again.
    durations = [duration] * len(rest) + [2000]
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def _palette() -> Image.Image:
    """The colors of the figures, and those between any two of them, which smooth edges have."""
    grid, *colors = to_rgba_array([_GRID_COLOR, "white", *COLORS.values()])[:, :3]
    share = np.linspace(0, 1, 8)[:, None]
    mixed = np.concatenate([grid[None], *(share * a + (1 - share) * b for a, b in combinations(colors, 2))])
    palette = Image.new("P", (1, 1))
    palette.putpalette((255 * np.unique(mixed, axis=0)).round().astype(np.uint8).tobytes())
    return palette


def animate_fit(fit: Fit, path: str | PathLike[str], *, frames: int = 70, duration: int = 60) -> None:
    """Write a fit as an animated GIF: empirical against target CDF, loss so far, density.

    The values, 500 of them at most, stand in the first axes as points, each at a random height that it keeps.

    Args:
        fit: what :func:`batchshaping.fit.fit` returned.
        path: the file to write, of any name; its folder must exist.
        frames: at most how many steps are shown, equally spaced, the first and the last among them.
        duration: how long each is shown, in milliseconds; the last stays for two seconds.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if there are fewer than two frames, or values that are not finite.

    Example:
        >>> import tempfile, pathlib
        >>> from batchshaping.fit import fit, published_start
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "beta.gif")
        ...     animate_fit(fit(published_start(), Beta(2, 6), steps=20), path, frames=5)
        ...     path.stat().st_size < 1e6
        True
    """
    with house_style():
        _write_gif(_FitAnimation(fit), path, frames, duration)


def animate_generalized_fit(
    fit: GeneralizedFit, path: str | PathLike[str], *, frames: int = 70, duration: int = 60
) -> None:
    """Write a generalized fit as an animated GIF: six arrays with their learned priors, losses, the means.

    The arrays are spread from the one with the lowest mean at the end to the one with the highest. Of each,
    150 values at most are shown as points, and all in its empirical CDF.

    Args:
        fit: what :func:`batchshaping.fit.fit_generalized` returned.
        path: the file to write, of any name; its folder must exist.
        frames: at most how many steps are shown, equally spaced, the first and the last among them.
        duration: how long each is shown, in milliseconds; the last stays for two seconds.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if there are fewer than two frames, or values that are not finite.

    Example:
        >>> import tempfile, pathlib
        >>> from batchshaping.fit import fit_generalized, published_start
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "generalized.gif")
        ...     animate_generalized_fit(fit_generalized(published_start(n=(30, 500)), steps=4), path)
        ...     path.stat().st_size < 1e6
        True
    """
    with house_style():
        _write_gif(_GeneralizedFitAnimation(fit), path, frames, duration)


# Figures


def plot_fit(fit: Fit) -> Figure:
    """The last frame of :func:`animate_fit` as a figure, to be saved with ``savefig``.

    Raises:
        ValueError: if there are values that are not finite.

    Example:
        >>> from batchshaping.fit import fit, published_start
        >>> len(plot_fit(fit(published_start(), Beta(2, 6), steps=20)).axes)
        3
    """
    with house_style():
        return _FitAnimation(fit).figure


def plot_generalized_fit(fit: GeneralizedFit) -> Figure:
    """The last frame of :func:`animate_generalized_fit` as a figure, to be saved with ``savefig``.

    Raises:
        ValueError: if there are values that are not finite.

    Example:
        >>> from batchshaping.fit import fit_generalized, published_start
        >>> len(plot_generalized_fit(fit_generalized(published_start(n=(30, 500)), steps=2)).axes)
        9
    """
    with house_style():
        return _GeneralizedFitAnimation(fit).figure


def _sample(x: Tensor, prior: Distribution) -> Array:
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"x must be a sample of shape (N,), received shape {tuple(x.shape)}")
    if prior.batch_shape or prior.event_shape:
        raise ValueError(f"prior must be a single one, received batch_shape {tuple(prior.batch_shape)}")
    values = to_numpy(x.double())
    if not np.isfinite(values).all():
        raise ValueError(f"x must be finite, received {(~np.isfinite(values)).sum()} values that are not")
    return values


def _axes(ax: Axes | None) -> Axes:
    return Figure(figsize=(4.8, 3.2), layout="constrained").add_subplot() if ax is None else ax


def plot_cdf(x: Tensor, prior: Distribution, ax: Axes | None = None) -> Axes:
    """The empirical CDF of a sample against the CDF of a prior.

    Args:
        x: the sample, of shape (N,).
        prior: a single distribution with a ``cdf``.
        ax: the axes to draw into; None makes a figure of its own, ``ax.figure``, in the house style.

    Returns:
        The axes.

    Raises:
        ValueError: if x is not a finite sample of shape (N,), or the prior holds several distributions.

    Example:
        >>> ax = plot_cdf(torch.rand(100), Beta(2, 6))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('value x', 'CDF')
    """
    values = _sample(x, prior)
    low, high = _limits(prior, values)
    grid = np.linspace(low, high, len(_GRID))
    with house_style():
        ax = _axes(ax)
        _empirical_line(ax, *_empirical_cdf(values, low, high)).set_label(f"{len(values)} values")
        _target_line(ax, grid, _target_cdf(prior, grid)).set_label(f"{prior}")
        ax.set(xlabel="value x", ylabel="CDF", xlim=(low, high), ylim=(-0.02, 1.02))
        ax.legend()
    return ax


def plot_density(x: Tensor, prior: Distribution, ax: Axes | None = None) -> Axes:
    """The histogram of a sample, of 20 bins and area 1, against the density of a prior.

    Args:
        x: the sample, of shape (N,).
        prior: a single distribution with a ``log_prob``.
        ax: the axes to draw into; None makes a figure of its own, ``ax.figure``, in the house style.

    Returns:
        The axes.

    Raises:
        ValueError: if x is not a finite sample of shape (N,), or the prior holds several distributions.

    Example:
        >>> ax = plot_density(torch.rand(100), Beta(2, 6))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('value x', 'density')
    """
    values = _sample(x, prior)
    low, high = _limits(prior, values)
    grid = np.linspace(low, high, len(_GRID))
    with house_style():
        ax = _axes(ax)
        _bars(ax, _density(values, low, high), _edges(low, high)).set_label(f"{len(values)} values")
        _target_line(ax, grid, _target_density(prior, grid)).set_label(f"{prior}")
        ax.set(xlabel="value x", ylabel="density", xlim=(low, high))
        _density_limit(ax, prior, values, low, high)
        ax.legend()
    return ax


# The published interface

_FAMILIES: dict[Prior, Callable[[float, float], ClosedFormPrior]] = {
    Prior.SYMBETA: lambda a, _: SymBeta(a),
    Prior.BETA: Beta,
    Prior.RELAXED_BERNOULLI: RelaxedBernoulli,
    Prior.NORMAL: Normal,
}


def _named(prior: Prior, p1: float, p2: float | None) -> ClosedFormPrior:
    if not isinstance(prior, Prior):
        raise ValueError(f"prior must be one of {', '.join(map(str, Prior))}, received {prior!r}")
    if p2 is None and prior is not Prior.SYMBETA:
        raise ValueError(f"p2 must be given for {prior}, received None")
    return _FAMILIES[prior](p1, p2)  # type: ignore[arg-type]


def plot_gt_cdf(ax: Axes, prior: Prior, p1: float, p2: float | None, num_pts: int = 100) -> Line2D:
    """Draw the CDF of a prior over [0, 1] into axes as "CDF (target)", and return the line.

    Args:
        ax: the axes.
        prior: family of the prior.
        p1: its first parameter.
        p2: its second parameter; not read for SYMBETA.
        num_pts: at how many points the line is evaluated.

    Raises:
        ValueError: if the prior is unknown, or a parameter is missing or out of range.

    Example:
        >>> line = plot_gt_cdf(Figure().add_subplot(), Prior.BETA, 2, 6, num_pts=3)
        >>> line.get_ydata().round(4).tolist()
        [0.0, 0.9375, 1.0]
    """
    x = np.linspace(0.0, 1.0, num_pts)
    line = _target_line(ax, x, _target_cdf(_named(prior, p1, p2), x))
    line.set_label("CDF (target)")
    return line


def plot_gt_pdf(
    ax: Axes,
    prior: Prior,
    p1: float,
    p2: float | None,
    num_pts: int = 100,
    eps_clip_x: float = 0.005,
    eps_ylim: float = 0.25,
) -> Line2D:
    """Draw the density of a prior over (0, 1) into axes as "PDF (target)", and return the line.

    Args:
        ax: the axes; the vertical one is set to all of the line and a margin.
        prior: family of the prior.
        p1: its first parameter.
        p2: its second parameter; not read for SYMBETA.
        num_pts: at how many points the line is evaluated.
        eps_clip_x: how far the line stays from 0 and 1, where a density may be infinite.
        eps_ylim: how far the vertical axis goes below 0 and above the line.

    Raises:
        ValueError: if the prior is unknown, or a parameter is missing or out of range.

    Example:
        >>> ax = Figure().add_subplot()
        >>> plot_gt_pdf(ax, Prior.BETA, 2, 6, num_pts=3).get_ydata().round(3).tolist()
        [0.205, 0.656, 0.0]
        >>> print("from {:.3f} to {:.3f}".format(*ax.get_ylim()))
        from -0.250 to 0.906
    """
    x = np.linspace(eps_clip_x, 1.0 - eps_clip_x, num_pts)
    density = _target_density(_named(prior, p1, p2), x)
    ax.set_ylim(-eps_ylim, np.nanmax(density) + eps_ylim)
    line = _target_line(ax, x, density)
    line.set_label("PDF (target)")
    return line


class _LastingAxes(Axes):
    """Axes whose style and labels outlast being cleared, which callers do at every step."""

    def __init__(self, *args: Any, xlabel: str, ylabel: str, **kwargs: Any) -> None:
        self._labels = {"xlabel": xlabel, "ylabel": ylabel}
        super().__init__(*args, **kwargs)

    def clear(self) -> None:
        with mpl.rc_context(_LARGE_STYLE):
            super().clear()
            self.set(**self._labels)
            # Ticks are made when they are first drawn, and would then have the style of that moment.
            self.tick_params(
                color="black",
                labelcolor="black",
                labelsize=_LARGE_STYLE["xtick.labelsize"],
                length=3.5,
                width=0.8,
                grid_color=_GRID_COLOR,
                grid_linestyle="-",
                grid_linewidth=_LARGE_STYLE["grid.linewidth"],
            )

    def legend(self, *args: Any, **kwargs: Any) -> Legend:
        with mpl.rc_context(_LARGE_STYLE):
            return super().legend(*args, **kwargs)


def _lasting_axes(figure: Figure, place: SubplotSpec, xlabel: str, ylabel: str) -> Axes:
    return figure.add_subplot(place, axes_class=_LastingAxes, xlabel=xlabel, ylabel=ylabel)


def _around_unit_square(ax: Axes, eps: float) -> None:
    ax.set(xlim=(-eps, 1 + eps), ylim=(-eps, 1 + eps))


def _linear_loss(ax: Axes, steps: int) -> Line2D:
    # A Cramér-von Mises loss is less than a third.
    ax.set(xlim=(0, steps), ylim=(-0.01, 0.34))
    line = _loss_line(ax)
    line.set_clip_on(True)
    return line


def init_anim_plot(
    num_epochs: int, eps: float = 0.08
) -> tuple[Figure, Axes, Axes, Axes, PathCollection, Line2D, Line2D]:
    """A pyplot figure for a run of the batch-shaping loss, to be given data step by step.

    Args:
        num_epochs: how many steps the axis of the loss has.
        eps: how far the axes of the values go on around [0, 1].

    Returns:
        The figure; its axes: values and CDFs, loss, density; and what is still without data: the values as
        what ``scatter`` returns, labelled "data", the line of their empirical CDF, labelled "CDF (data)", and
        the line of the loss.

    Example:
        >>> fig, data_ax, loss_ax, pdf_ax, data_plot, cdf_pred_plot, loss_plot = init_anim_plot(100)
        >>> data_plot.set_offsets([[0.2, 0.1], [0.7, 0.9]])
        >>> loss_plot.set_data([0, 1], [0.1, 0.05])
        >>> data_ax.get_legend_handles_labels()[1]
        ['data', 'CDF (data)']
    """
    from matplotlib import pyplot

    with mpl.rc_context(_LARGE_STYLE):
        figure = pyplot.figure(figsize=(7.0, 7.8))
        margins = {"left": 0.11, "right": 0.97}
        above = figure.add_gridspec(1, 1, bottom=0.4, top=0.93, **margins)
        below = figure.add_gridspec(1, 2, bottom=0.08, top=0.31, wspace=0.3, **margins)
        data = _lasting_axes(figure, above[0], "value x", "CDF")
        loss = _lasting_axes(figure, below[0], "step", "loss")
        density = _lasting_axes(figure, below[1], "value x", "density")
        _around_unit_square(data, eps)
        density.set_xlim(0, 1)
        points = data.scatter(
            [], [], s=22, color=COLORS["values"], alpha=0.6, linewidths=0, label="data", zorder=2
        )
        empirical = _empirical_line(data)
        empirical.set_label("CDF (data)")
        return figure, data, loss, density, points, empirical, _linear_loss(loss, num_epochs)


def init_gbas_anim_plot(
    num_epochs: int, eps: float = 0.08
) -> tuple[Figure, list[Axes], Axes, Axes, Axes, Line2D, Line2D]:
    """A pyplot figure for a run of the generalized loss, to be given data step by step.

    Args:
        num_epochs: how many steps the axes of the losses have.
        eps: how far the axes of the arrays go on around [0, 1].

    Returns:
        The figure; a list of six axes for arrays; the axes of both losses and of the means; and two lines
        without data: the prior loss and the hyperprior loss.

    Example:
        >>> fig, data_axes, *_, priors_loss_plot, hyperprior_loss_plot = init_gbas_anim_plot(350)
        >>> len(data_axes)
        6
        >>> priors_loss_plot.set_data([0, 1], [0.1, 0.05])
    """
    from matplotlib import pyplot

    with mpl.rc_context(_LARGE_STYLE):
        figure = pyplot.figure(figsize=(13.0, 8.0))
        rows = {"bottom": 0.08, "top": 0.92, "hspace": 0.5}
        left = figure.add_gridspec(3, 2, left=0.065, right=0.55, wspace=0.4, **rows)
        right = figure.add_gridspec(3, 1, left=0.64, right=0.985, **rows)
        arrays = [_lasting_axes(figure, left[k // 2, k % 2], "value x", "CDF") for k in range(6)]
        for ax in arrays:
            _around_unit_square(ax, eps)
        prior_loss = _lasting_axes(figure, right[0], "step", "prior loss")
        hyperprior_loss = _lasting_axes(figure, right[1], "step", "hyperprior loss")
        density = _lasting_axes(figure, right[2], "mean μ", "density")
        density.set_xlim(0, 1)
        prior_line, hyperprior_line = (_linear_loss(ax, num_epochs) for ax in (prior_loss, hyperprior_loss))
        return figure, arrays, prior_loss, hyperprior_loss, density, prior_line, hyperprior_line
