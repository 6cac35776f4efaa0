"""How values are distributed beside a prior: CDF and density."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.figures.parts import (
    GRID,
    bin_edges,
    draw_bars,
    draw_empirical,
    draw_target,
    empirical_cdf,
    histogram,
    set_density_limit,
    shown_limits,
    target_cdf,
    target_density,
)
from batchshaping.figures.style import Array, house_style
from batchshaping.utils import to_numpy

__all__ = ["plot_cdf", "plot_density"]


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
        >>> import torch, batchshaping as bs
        >>> ax = plot_cdf(torch.rand(100), bs.Beta(2, 6))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('value x', 'CDF')
    """
    values = _sample(x, prior)
    low, high = shown_limits(prior, values)
    grid = np.linspace(low, high, len(GRID))
    with house_style():
        ax = _axes(ax)
        draw_empirical(ax, *empirical_cdf(values, low, high)).set_label(f"{len(values)} values")
        draw_target(ax, grid, target_cdf(prior, grid)).set_label(f"{prior}")
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
        >>> import torch, batchshaping as bs
        >>> ax = plot_density(torch.rand(100), bs.Beta(2, 6))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('value x', 'density')
    """
    values = _sample(x, prior)
    low, high = shown_limits(prior, values)
    grid = np.linspace(low, high, len(GRID))
    with house_style():
        ax = _axes(ax)
        draw_bars(ax, histogram(values, low, high), bin_edges(low, high)).set_label(f"{len(values)} values")
        draw_target(ax, grid, target_density(prior, grid)).set_label(f"{prior}")
        ax.set(xlabel="value x", ylabel="density", xlim=(low, high))
        set_density_limit(ax, prior, values, low, high)
        ax.legend()
    return ax
