"""Figures of conditional inference: groups of channels as experts, and time against multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from batchshaping.experiments.inference import Comparison
from batchshaping.figures.style import COLORS, DASHES, STYLE, house_style

__all__ = ["plot_groups", "plot_inference"]

_MARKERS = ("o", "s", "^", "D", "v", "P")


def plot_inference(comparisons: Sequence[Comparison]) -> Figure:
    """Time and multiply-adds of inference copies, as shares of those of the fastest dense way.

    There are axes for each number of images, and in them a line for each network and size of images, with a
    point for each share of open gates. On the diagonal time falls as multiply-adds do.

    Args:
        comparisons: what :func:`batchshaping.experiments.inference.compare` returned.

    Returns:
        A figure, to be saved with ``savefig``.

    Raises:
        ValueError: if there is nothing to show.

    Example:
        >>> from batchshaping.experiments.inference import compare
        >>> from batchshaping.training.networks import network_settings
        >>> network = network_settings(network="resnet8", gates_per_layer=8)
        >>> len(plot_inference([compare(network, size=8, batch=1, turns=2, compiled=False)]).axes)
        1
    """
    if not comparisons:
        raise ValueError("expected at least one comparison to draw, received none")
    batches = sorted({comparison.batch for comparison in comparisons})
    with house_style():
        figure = Figure(figsize=(0.8 + 3.6 * len(batches), 3.9), layout="constrained")
        axes = figure.subplots(1, len(batches), sharex=True, sharey=True, squeeze=False)[0]
        names = [*dict.fromkeys(map(_name, comparisons))]
        markers = {name: _MARKERS[k % len(_MARKERS)] for k, name in enumerate(names)}
        cycle = STYLE["axes.prop_cycle"].by_key()["color"]
        colors = {name: cycle[k % len(cycle)] for k, name in enumerate(names)}
        for ax, batch in zip(axes, batches, strict=True):
            of_batch = [comparison for comparison in comparisons if comparison.batch == batch]
            for comparison in of_batch:
                name = _name(comparison)
                _draw(ax, comparison, colors[name], markers[name])
            _finish(ax, "one image" if batch == 1 else f"{batch} images")
        axes[0].set_ylabel("time, of the fastest dense way’s")
        handles = {
            label: handle
            for ax in axes
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside upper center",
            ncols=min(len(handles), 2 * len(batches)),
        )
    return figure


def _name(comparison: Comparison) -> str:
    return f"{comparison.network}, {comparison.size} pixels"


def _draw(ax: Axes, comparison: Comparison, color: str, marker: str) -> None:
    points = sorted(
        (1 / comparison.ideal(way), 1 / comparison.faster(way))
        for way in comparison.ways
        if way.name == "conditional"
    )
    ax.plot(
        *zip(*points, strict=True),
        color=color,
        marker=marker,
        markersize=5,
        label=_name(comparison),
        zorder=3,
    )


def _finish(ax: Axes, title: str) -> None:
    ax.axline(
        (0, 0), slope=1, color=COLORS["target"], linestyle=DASHES, linewidth=1.2, label="as multiply-adds"
    )
    ax.axhline(1, color=COLORS["target"], linewidth=0.8)
    ax.set(title=title, xlabel="multiply-adds, of the dense network’s", xlim=(0, 1.05))
    ax.set_ylim(0, max(1.1, ax.get_ylim()[1]))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1))


def plot_groups(decisions: Sequence[bool] = (True, False, True, False)) -> Figure:
    """A gated residual block as a sum over groups of channels, of which the closed ones are not computed.

    Args:
        decisions: whether each group is open.

    Returns:
        A figure, to be saved with ``savefig``.

    Example:
        >>> len(plot_groups((True, False)).axes)
        1
    """
    with house_style():
        figure = Figure(figsize=(7.2, 0.9 + 0.62 * len(decisions)))
        ax = figure.add_axes((0, 0, 1, 1))
        heights = [0.85 * (len(decisions) - k) for k in range(len(decisions))]
        middle, top = sum(heights) / len(heights), heights[0] + 1.0
        ax.set(xlim=(0, 10), ylim=(-0.35, top + 0.45))
        ax.axis("off")
        _box(ax, 0.55, middle, "x", width=0.7)
        _box(ax, 3.1, top, "mean over pixels, gate", width=2.6)
        _arrow(ax, (0.55, middle + 0.26), (0.55, top), (1.8, top))
        ax.text(4.55, top, "decides for each image which groups are open", va="center", fontsize=8)
        for k, (y, is_open) in enumerate(zip(heights, decisions, strict=True), start=1):
            _box(ax, 3.1, y, f"$W_1^{{({k})}}$, ReLU", width=1.5, is_open=is_open)
            _box(ax, 5.5, y, f"$W_2^{{({k})}}$", width=1.1, is_open=is_open)
            if is_open:
                _arrow(ax, (0.9, middle), (1.45, middle), (1.45, y), (2.35, y))
                _arrow(ax, (3.85, y), (4.95, y))
                _arrow(ax, (6.05, y), (7.3, y), (7.3, middle), (7.8, middle))
            word = "open" if is_open else "not computed"
            ax.text(6.15, y + 0.08, word, color=_COLOR[is_open], fontsize=8)
        _arrow(ax, (0.55, middle - 0.26), (0.55, -0.1), (8.05, -0.1), (8.05, middle - 0.26))
        ax.text(4.3, -0.02, "shortcut", ha="center", va="bottom", fontsize=8)
        _box(ax, 8.05, middle, "+", width=0.5)
        _arrow(ax, (8.3, middle), (9.0, middle))
        ax.text(9.1, middle, "ReLU, y", va="center")
    return figure


_COLOR = {True: COLORS["target"], False: "#767676"}
"""Of what is open and of what is closed."""


def _box(ax: Axes, x: float, y: float, text: str, width: float, is_open: bool = True) -> None:
    """A box around a text; a dashed one if it is closed."""
    ax.add_patch(
        Rectangle(
            (x - width / 2, y - 0.26),
            width,
            0.52,
            facecolor="#D6EBF8" if is_open else "white",
            edgecolor=_COLOR[is_open],
            linestyle="solid" if is_open else DASHES,
        )
    )
    ax.text(x, y, text, ha="center", va="center", color=_COLOR[is_open])


def _arrow(ax: Axes, *points: tuple[float, float]) -> None:
    """A line along some points with a head at its end."""
    ax.plot(*zip(*points, strict=True), color=COLORS["target"], linewidth=1, zorder=0)
    arrow = {"arrowstyle": "-|>", "color": COLORS["target"], "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", points[-1], points[-2], arrowprops=arrow)
