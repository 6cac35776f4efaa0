"""The parts that figures are drawn of: curves, bars, axes, captions and keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, NullFormatter
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.figures.style import COLORS, DASHES, Array
from batchshaping.utils import to_numpy

__all__ = [
    "BINS",
    "GRID",
    "POINTS",
    "POINTS_OF_AN_ARRAY",
    "add_caption",
    "add_key",
    "bin_edges",
    "check_finite",
    "draw_bars",
    "draw_empirical",
    "draw_loss",
    "draw_points",
    "draw_target",
    "empirical_cdf",
    "histogram",
    "scattered",
    "set_cdf_axes",
    "set_density_limit",
    "set_loss_axes",
    "set_unit_axis",
    "shown_limits",
    "support_ends",
    "target_cdf",
    "target_density",
]
BINS = 20
"""Number of bins of a histogram."""

GRID = np.linspace(0.0, 1.0, 401)
"""Where curves on (0, 1) are evaluated."""

POINTS = 500
"""Largest number of points that are drawn for one array."""

POINTS_OF_AN_ARRAY = 150
"""The same where there are axes for several arrays."""


# Curves


def empirical_cdf(values: Array, low: float, high: float) -> tuple[Array, Array]:
    """The empirical CDF as a line drawn in steps from low to high: it rises by 1/N at each value."""
    n = len(values)
    return np.concatenate([[low], np.sort(values), [high]]), np.append(np.arange(n + 1) / n, 1.0)


def histogram(values: Array, low: float = 0.0, high: float = 1.0) -> Array:
    """The density of the values in each bin."""
    return np.histogram(values, bins=BINS, range=(low, high), density=True)[0]


def bin_edges(low: float = 0.0, high: float = 1.0) -> Array:
    """The edges of the bins."""
    return np.linspace(low, high, BINS + 1)


def support_ends(prior: Distribution) -> tuple[float, float]:
    """The ends of the prior's support, infinite where it has none."""
    low = getattr(prior.support, "lower_bound", -math.inf)
    high = getattr(prior.support, "upper_bound", math.inf)
    return float(low), float(high)


def target_cdf(prior: Distribution, x: Array) -> Array:
    """The prior's CDF: 0 left of its support and 1 right of it."""
    low, high = support_ends(prior)
    inside = (x > low) & (x < high)
    cdf = (x >= high).astype(float)
    with torch.no_grad():
        cdf[inside] = to_numpy(prior.cdf(torch.from_numpy(x[inside])))
    return cdf


def target_density(prior: Distribution, x: Array) -> Array:
    """The prior's density: 0 outside of its support, NaN at its ends, where it may be infinite."""
    low, high = support_ends(prior)
    inside = (x > low) & (x < high)
    density = np.where((x == low) | (x == high), math.nan, 0.0)
    with torch.no_grad():
        density[inside] = to_numpy(prior.log_prob(torch.from_numpy(x[inside])).exp())
    return density


def shown_limits(prior: Distribution, values: Array) -> tuple[float, float]:
    """What the horizontal axis shows: every value, and the prior's support or all but 1 % of its mass."""
    low, high = support_ends(prior)
    if math.isinf(low) or math.isinf(high):
        try:
            tails = to_numpy(prior.icdf(torch.tensor([0.005, 0.995])))
        except NotImplementedError:
            tails = np.array([values.min(), values.max()])
        low, high = (low if math.isfinite(low) else tails[0]), (high if math.isfinite(high) else tails[1])
    low, high = min(float(low), float(values.min())), max(float(high), float(values.max()))
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def scattered(values: Array, most: int) -> tuple[Array, Array]:
    """Every k-th value, and the heights at which they can be told apart: random, but always the same."""
    shown = values[:: math.ceil(len(values) / most)]
    return shown, np.random.default_rng(0).uniform(0.02, 0.98, len(shown))


# Parts of a figure


def draw_points(ax: Axes, size: float) -> Line2D:
    """Draw points, none at first."""
    (points,) = ax.plot([], [], ".", color=COLORS["values"], markersize=size, markeredgewidth=0, zorder=2)
    return points


def draw_empirical(ax: Axes, x: Any = (), y: Any = ()) -> Line2D:
    """Draw the empirical CDF."""
    (line,) = ax.plot(x, y, color=COLORS["empirical"], linewidth=2.6, drawstyle="steps-post", zorder=3)
    return line


def draw_target(ax: Axes, x: Any = (), y: Any = ()) -> Line2D:
    """Draw a curve of the prior."""
    (line,) = ax.plot(x, y, color=COLORS["target"], linewidth=1.4, linestyle=DASHES, zorder=4)
    return line


def draw_bars(ax: Axes, density: Array, edges: Array) -> StepPatch:
    """Draw a histogram."""
    return ax.stairs(
        density, edges, fill=True, facecolor=COLORS["values"], edgecolor=COLORS["empirical"], linewidth=1
    )


def draw_loss(ax: Axes) -> Line2D:
    """Draw a curve of losses, empty at first, with a point at its end."""
    (line,) = ax.plot([], [], ".-", color=COLORS["loss"], linewidth=1.8, markevery=[-1], clip_on=False)
    return line


def add_caption(ax: Axes) -> Text:
    """A title that changes from frame to frame."""
    return ax.text(0, 1.05, "", transform=ax.transAxes)


def set_unit_axis(ax: Axes) -> None:
    """Let the horizontal axis go from 0 to 1."""
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])


def set_cdf_axes(ax: Axes) -> None:
    """Set the axes for CDFs on (0, 1)."""
    set_unit_axis(ax)
    ax.set_ylim(-0.02, 1.02)
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])


def set_loss_axes(ax: Axes, name: str, losses: Array) -> None:
    """A logarithmic axis of the whole decades in which the losses lie."""
    positive = losses[losses > 0]
    low, high = (positive.min(), positive.max()) if len(positive) else (1e-9, 0.1)
    decades = (10.0 ** math.floor(math.log10(low)), 10.0 ** (math.floor(math.log10(high)) + 1))
    ax.set(xlabel="step", xlim=(0, len(losses)), yscale="log", ylim=decades, ylabel=name)
    ax.yaxis.set_minor_formatter(NullFormatter())


def set_density_limit(
    ax: Axes, prior: Distribution, values: Array, low: float = 0.0, high: float = 1.0
) -> None:
    """Room for the histogram, and for the target in the middle of each bin: its ends may be infinite."""
    edges = bin_edges(low, high)
    target = target_density(prior, (edges[1:] + edges[:-1]) / 2)
    ax.set_ylim(0, 1.15 * max(histogram(values, low, high).max(), target.max()))
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def add_key(figure: Figure, target: str) -> None:
    """One legend for all axes, above them."""
    handles = [
        Line2D([], [], color=COLORS["values"], marker=".", markersize=9, markeredgewidth=0, linestyle=""),
        Line2D([], [], color=COLORS["empirical"], linewidth=2.6),
        Line2D([], [], color=COLORS["target"], linewidth=1.4, linestyle=DASHES),
    ]
    labels = ["values, at random heights", "empirical", target]
    figure.legend(handles, labels, loc="upper center", ncols=3, borderaxespad=0.2)


def check_finite(values: Tensor) -> None:
    """Refuse values that cannot be drawn."""
    wrong = int((~values.isfinite()).any(dim=0).sum())
    if wrong:
        raise ValueError(f"fit must be finite to be drawn, received {wrong} values that are not")
