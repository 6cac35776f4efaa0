"""The axes of the published notebooks under their published names, and the figures of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# First, since it says which extra is missing.
import batchshaping.figures  # noqa: F401

# isort: split
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

from batchshaping.batch_shaping_loss import Prior
from batchshaping.figures.distributions import plot_cdf, plot_density
from batchshaping.figures.fits import animate_fit, animate_generalized_fit, plot_fit, plot_generalized_fit
from batchshaping.figures.parts import draw_empirical, draw_loss, draw_target, target_cdf, target_density
from batchshaping.figures.style import COLORS, GRID_COLOR, LARGE_STYLE, Array, house_style
from batchshaping.priors.closed_form import ClosedFormPrior
from batchshaping.priors.families import Beta, Normal, RelaxedBernoulli, SymBeta

__all__ = [
    "Array",
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
    line = draw_target(ax, x, target_cdf(_named(prior, p1, p2), x))
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
    density = target_density(_named(prior, p1, p2), x)
    ax.set_ylim(-eps_ylim, np.nanmax(density) + eps_ylim)
    line = draw_target(ax, x, density)
    line.set_label("PDF (target)")
    return line


class _LastingAxes(Axes):
    """Axes whose style and labels outlast being cleared, which callers do at every step."""

    def __init__(self, *args: Any, xlabel: str, ylabel: str, **kwargs: Any) -> None:
        self._labels = {"xlabel": xlabel, "ylabel": ylabel}
        super().__init__(*args, **kwargs)

    def clear(self) -> None:
        with mpl.rc_context(LARGE_STYLE):
            super().clear()
            self.set(**self._labels)
            # Ticks are made when they are first drawn, and would then have the style of that moment.
            self.tick_params(
                color="black",
                labelcolor="black",
                labelsize=LARGE_STYLE["xtick.labelsize"],
                length=3.5,
                width=0.8,
                grid_color=GRID_COLOR,
                grid_linestyle="-",
                grid_linewidth=LARGE_STYLE["grid.linewidth"],
            )

    def legend(self, *args: Any, **kwargs: Any) -> Legend:
        with mpl.rc_context(LARGE_STYLE):
            return super().legend(*args, **kwargs)


def _lasting_axes(figure: Figure, place: SubplotSpec, xlabel: str, ylabel: str) -> Axes:
    return figure.add_subplot(place, axes_class=_LastingAxes, xlabel=xlabel, ylabel=ylabel)


def _around_unit_square(ax: Axes, eps: float) -> None:
    ax.set(xlim=(-eps, 1 + eps), ylim=(-eps, 1 + eps))


def _linear_loss(ax: Axes, steps: int) -> Line2D:
    # A Cramér-von Mises loss is less than a third.
    ax.set(xlim=(0, steps), ylim=(-0.01, 0.34))
    line = draw_loss(ax)
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

    with mpl.rc_context(LARGE_STYLE):
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
        empirical = draw_empirical(data)
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

    with mpl.rc_context(LARGE_STYLE):
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
