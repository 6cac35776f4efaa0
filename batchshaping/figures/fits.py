"""Figures and animations of values that are shaped to a prior."""

from __future__ import annotations

from os import PathLike

import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchshaping.experiments.fit import Fit, GeneralizedFit
from batchshaping.figures.animations import write_gif
from batchshaping.figures.parts import (
    GRID,
    POINTS,
    POINTS_OF_AN_ARRAY,
    add_caption,
    add_key,
    bin_edges,
    check_finite,
    draw_bars,
    draw_empirical,
    draw_loss,
    draw_points,
    draw_target,
    empirical_cdf,
    histogram,
    scattered,
    set_cdf_axes,
    set_density_limit,
    set_loss_axes,
    set_unit_axis,
    target_cdf,
    target_density,
)
from batchshaping.figures.style import house_style
from batchshaping.priors.families import RelaxedBernoulli
from batchshaping.utils import to_numpy

__all__ = ["animate_fit", "animate_generalized_fit", "plot_fit", "plot_generalized_fit"]


class _FitAnimation:
    """The three axes of a fit: values and CDFs, loss, density."""

    def __init__(self, fit: Fit) -> None:
        check_finite(fit.values)
        self.steps = fit.steps
        self.values, self.step_losses = to_numpy(fit.values.float()), to_numpy(fit.losses.float())
        self.figure = Figure(figsize=(8.0, 2.9))
        self.data, self.loss, self.density = self.figure.subplots(1, 3)
        self.figure.subplots_adjust(left=0.065, right=0.985, bottom=0.165, top=0.82, wspace=0.34)
        add_key(self.figure, f"target {fit.prior}")
        set_cdf_axes(self.data)
        self.data.set(xlabel="value x", ylabel="CDF")
        set_loss_axes(self.loss, "loss", self.step_losses)
        set_unit_axis(self.density)
        self.density.set(xlabel="value x", ylabel="density")
        set_density_limit(self.density, fit.prior, self.values[-1])
        self.points = draw_points(self.data, size=4)
        self.empirical = draw_empirical(self.data)
        self.losses = draw_loss(self.loss)
        self.captions = [add_caption(self.loss)]
        self.bars = draw_bars(self.density, histogram(self.values[-1]), bin_edges())
        self.moving: list[Artist] = [
            self.points,
            self.empirical,
            draw_target(self.data, GRID, target_cdf(fit.prior, GRID)),
            self.losses,
            self.bars,
            draw_target(self.density, GRID, target_density(fit.prior, GRID)),
        ]
        self.show(self.steps)

    def show(self, step: int) -> None:
        values, losses = self.values[step], self.step_losses[: step + 1]
        self.points.set_data(*scattered(values, POINTS))
        self.empirical.set_data(*empirical_cdf(values, 0.0, 1.0))
        self.losses.set_data(range(len(losses)), losses)
        self.captions[0].set_text(f"step {step}, loss {losses[-1]:.2e}")
        self.bars.set_data(histogram(values))


class _GeneralizedFitAnimation:
    """The nine axes of a generalized fit: six arrays, two losses, the means."""

    def __init__(self, fit: GeneralizedFit) -> None:
        check_finite(fit.values)
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
        add_key(self.figure, "target")
        for k, ax in enumerate(self.arrays):
            set_cdf_axes(ax)
            ax.set(xlabel="value x" if k >= 3 else "", ylabel="CDF" if k % 3 == 0 else "")
        for ax, name, losses in zip(
            loss_axes, ("prior loss", "hyperprior loss"), self.step_losses, strict=True
        ):
            set_loss_axes(ax, name, losses)
        set_unit_axis(self.density)
        self.density.set(xlabel="mean μ", ylabel="density")
        set_density_limit(self.density, fit.hyperprior, to_numpy(self.means[-1]))

        # From the lowest mean at the end to the highest.
        order = self.means[-1].argsort()
        self.shown = order[torch.linspace(0, len(order) - 1, len(self.arrays)).round().long()]
        self.values = to_numpy(fit.values[:, self.shown].float())
        self.parameters = (self.means[:, self.shown], fit.temperatures.detach().cpu().float()[:, self.shown])
        priors = RelaxedBernoulli(self.parameters[0].unsqueeze(-1), self.parameters[1].unsqueeze(-1))
        self.target_cdfs = to_numpy(priors.cdf(torch.from_numpy(GRID)))

        self.points = [draw_points(ax, size=3) for ax in self.arrays]
        self.empirical = [draw_empirical(ax) for ax in self.arrays]
        self.targets = [draw_target(ax) for ax in self.arrays]
        self.losses = [draw_loss(ax) for ax in loss_axes]
        self.captions = [add_caption(ax) for ax in (*self.arrays, loss_axes[0])]
        self.bars = draw_bars(self.density, histogram(to_numpy(self.means[-1])), bin_edges())
        self.moving: list[Artist] = [
            *self.points,
            *self.empirical,
            *self.targets,
            *self.losses,
            self.bars,
            draw_target(self.density, GRID, target_density(fit.hyperprior, GRID)),
        ]
        self.show(self.steps)

    def show(self, step: int) -> None:
        means, temperatures = (parameter[step].tolist() for parameter in self.parameters)
        for k, values in enumerate(self.values[step]):
            self.points[k].set_data(*scattered(values, POINTS_OF_AN_ARRAY))
            self.empirical[k].set_data(*empirical_cdf(values, 0.0, 1.0))
            self.targets[k].set_data(GRID, self.target_cdfs[step, k])
            self.captions[k].set_text(f"μ = {means[k]:.2f}, τ = {temperatures[k]:.2f}")
        for line, losses in zip(self.losses, self.step_losses, strict=True):
            line.set_data(range(len(losses[: step + 1])), losses[: step + 1])
        self.captions[-1].set_text(f"step {step}, total loss {self.totals[: step + 1][-1]:.2e}")
        self.bars.set_data(histogram(to_numpy(self.means[step])))


def animate_fit(fit: Fit, path: str | PathLike[str], *, frames: int = 70, duration: int = 60) -> None:
    """Write a fit as an animated GIF: empirical against target CDF, loss so far, density.

    The values, 500 of them at most, stand in the first axes as points, each at a random height that it keeps.

    Args:
        fit: what :func:`batchshaping.experiments.fit.fit` returned.
        path: the file to write, of any name; its folder must exist.
        frames: at most how many steps are shown, equally spaced, the first and the last among them.
        duration: how long each is shown, in milliseconds; the last stays for two seconds.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if there are fewer than two frames, or values that are not finite.

    Example:
        >>> import tempfile, pathlib, batchshaping as bs
        >>> from batchshaping.experiments.fit import fit, published_start
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "beta.gif")
        ...     animate_fit(fit(published_start(), bs.Beta(2, 6), steps=20), path, frames=5)
        ...     path.stat().st_size < 1e6
        True
    """
    with house_style():
        write_gif(_FitAnimation(fit), path, frames, duration)


def animate_generalized_fit(
    fit: GeneralizedFit, path: str | PathLike[str], *, frames: int = 70, duration: int = 60
) -> None:
    """Write a generalized fit as an animated GIF: six arrays with their learned priors, losses, the means.

    The arrays are spread from the one with the lowest mean at the end to the one with the highest. Of each,
    150 values at most are shown as points, and all in its empirical CDF.

    Args:
        fit: what :func:`batchshaping.experiments.fit.fit_generalized` returned.
        path: the file to write, of any name; its folder must exist.
        frames: at most how many steps are shown, equally spaced, the first and the last among them.
        duration: how long each is shown, in milliseconds; the last stays for two seconds.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if there are fewer than two frames, or values that are not finite.

    Example:
        >>> import tempfile, pathlib
        >>> from batchshaping.experiments.fit import fit_generalized, published_start
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "generalized.gif")
        ...     animate_generalized_fit(fit_generalized(published_start(n=(30, 500)), steps=4), path)
        ...     path.stat().st_size < 1e6
        True
    """
    with house_style():
        write_gif(_GeneralizedFitAnimation(fit), path, frames, duration)


# Figures


def plot_fit(fit: Fit) -> Figure:
    """The last frame of :func:`animate_fit` as a figure, to be saved with ``savefig``.

    Raises:
        ValueError: if there are values that are not finite.

    Example:
        >>> import batchshaping as bs
        >>> from batchshaping.experiments.fit import fit, published_start
        >>> len(plot_fit(fit(published_start(), bs.Beta(2, 6), steps=20)).axes)
        3
    """
    with house_style():
        return _FitAnimation(fit).figure


def plot_generalized_fit(fit: GeneralizedFit) -> Figure:
    """The last frame of :func:`animate_generalized_fit` as a figure, to be saved with ``savefig``.

    Raises:
        ValueError: if there are values that are not finite.

    Example:
        >>> from batchshaping.experiments.fit import fit_generalized, published_start
        >>> len(plot_generalized_fit(fit_generalized(published_start(n=(30, 500)), steps=2)).axes)
        9
    """
    with house_style():
        return _GeneralizedFitAnimation(fit).figure
