"""The style of all figures: colors, fonts and sizes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.rcsetup import cycler

__all__ = ["Array", "COLORS", "DASHES", "GRID_COLOR", "LARGE_STYLE", "STYLE", "house_style"]

Array = np.ndarray[Any, np.dtype[Any]]
"""An array of numbers."""

COLORS = {"values": "#56B4E9", "empirical": "#0072B2", "target": "#000000", "loss": "#D55E00"}
"""What a color stands for: values, their distribution, their prior, the loss (Okabe and Ito, 2008)."""

GRID_COLOR = "#E5E5E5"
"""Color of grid lines."""

_DRAWN = ("axes", "figure", "font", "grid", "legend", "lines", "patch", "scatter", "text", "xtick", "ytick")
STYLE: dict[Any, Any] = {
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
    "grid.color": GRID_COLOR,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 150,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
"""Settings of matplotlib for the figures of this project."""

LARGE_STYLE: dict[Any, Any] = {
    **STYLE,
    "axes.labelsize": 14,
    "font.size": 12,
    "legend.edgecolor": "none",
    "legend.fontsize": 12,
    "legend.frameon": True,  # they are put over bars and points
    "lines.linewidth": 2.2,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
}
"""The same for the published axes, into which callers write labels of 14 to 16 points."""

DASHES = (0, (3, 1.5))
"""Line style of a prior."""


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
    return mpl.rc_context(STYLE)
