"""Scripts written for the published code, from the first import to the saved animation, run on this package.

These are of our own, but call what the published notebooks call, in the same way and in the same order. Every
step of every run is made; to save time, only the last ones are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from batchshaping.batch_shaping_loss import Prior, gbas_loss
from batchshaping.utils import set_seed, to_numpy, warmup_factory
from batchshaping.viz_utils import init_anim_plot, init_gbas_anim_plot, plot_gt_cdf, plot_gt_pdf

pytestmark = pytest.mark.filterwarnings("error")

DRAWN = 3
"""How many steps are drawn, at the end of a run."""


@pytest.fixture(autouse=True)
def _style_of_the_script() -> Iterator[None]:
    """Scripts set a style of their own before they draw."""
    with mpl.style.context("ggplot"):
        yield
    plt.close("all")


def legend(ax: Axes) -> list[str]:
    found = ax.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


def animate(fig: Figure, step: object, steps: int, init_func: object, path: Path, **options: int) -> None:
    """Save the last steps; the figure is closed first, as notebooks do so that it is not shown twice."""
    assert plt.gcf() is fig
    animation = FuncAnimation(fig, step, frames=range(steps - DRAWN, steps), init_func=init_func)
    plt.close()
    assert plt.get_fignums() == []
    animation.save(path, writer="pillow", fps=10, **options)
    with Image.open(path) as gif:
        assert gif.n_frames == DRAWN
        assert gif.size == tuple((fig.get_size_inches() * options.get("dpi", fig.dpi)).round().astype(int))


RUNS = [
    (Prior.RELAXED_BERNOULLI, 0.2, 0.25, 4, 100, "2.38e-02"),
    (Prior.SYMBETA, 0.9, None, 4, 120, "1.86e-02"),
    (Prior.BETA, 2.0, 6.0, 4, 100, "3.1e-06"),
    (Prior.NORMAL, 0.6, 0.1, 4, 200, "1.29e-03"),
    (Prior.NORMAL, 0.6, 0.1, 1, 200, "1.79e-08"),
    (Prior.RELAXED_BERNOULLI, 0.8, 0.4, 4, 200, "2.70e-03"),
    (Prior.RELAXED_BERNOULLI, 0.8, 0.01, 4, 200, "1.65e-01"),
]


def shape_values(
    prior: Prior, p1: float, p2: float | None, init: float, steps: int, path: Path | None
) -> float:
    """One run as a script makes it: its last loss, and its animation if there is a path."""
    fig, data_ax, loss_ax, pdf_ax, data_plot, cdf_pred_plot, loss_plot = init_anim_plot(steps)
    assert fig.axes == [data_ax, loss_ax, pdf_ax]
    assert isinstance(data_plot, PathCollection) and data_plot.axes is data_ax
    assert isinstance(cdf_pred_plot, Line2D) and cdf_pred_plot.axes is data_ax
    assert isinstance(loss_plot, Line2D) and loss_plot.axes is loss_ax
    assert data_ax.get_xlim() == data_ax.get_ylim() == (-0.08, 1.08)
    assert loss_ax.get_xlim() == (0, steps) and loss_ax.get_yscale() == "linear"

    logits = torch.nn.Parameter((torch.rand(500, requires_grad=True) * 2 - 1) * init)
    heights = np.linspace(0.0, 1.0, len(logits))
    adam = torch.optim.Adam([logits], lr=0.1)
    loss_of = partial(gbas_loss, prior=prior, prior_param1=p1, prior_param2=p2, dim=None)
    losses: list[float] = []

    def start() -> None:
        plot_gt_cdf(data_ax, prior, p1, p2)
        data_ax.legend(loc="upper center", ncol=3, bbox_to_anchor=(0.5, 1.09))
        loss_ax.set_ylim([-0.005, loss_of(torch.sigmoid(logits)[None, :]).item() + 0.05])

    def move() -> torch.Tensor:
        adam.zero_grad()
        values = torch.sigmoid(logits)
        loss = loss_of(values)
        losses.append(loss.item())
        loss.backward()
        adam.step()
        return values

    def step(_: int) -> None:
        values = to_numpy(move())
        loss_plot.set_data(np.arange(len(losses)), losses)
        data_plot.set_offsets(np.vstack((values, heights)).T)
        cdf_pred_plot.set_data(np.sort(values), np.arange(len(values)) / len(values))
        pdf_ax.cla()
        plot_gt_pdf(pdf_ax, prior, p1, p2)
        pdf_ax.hist(values, bins=20, density=True, stacked=True, rwidth=0.9, label="PDF (data)")
        pdf_ax.legend(loc="upper center")

    for _ in range(steps - DRAWN):
        move()
    if path is None:
        start()
        for i in range(steps - DRAWN, steps):
            step(i)
        fig.canvas.draw()
    else:
        animate(fig, step, steps, start, path)

    assert len(losses) == steps
    assert loss_ax.get_ylim()[0] == -0.005
    assert legend(data_ax) == ["data", "CDF (data)", "CDF (target)"]
    assert legend(pdf_ax) == ["PDF (target)", "PDF (data)"]
    target = pdf_ax.lines[0].get_ydata()
    assert pdf_ax.get_ylim() == pytest.approx((-0.25, max(target) + 0.25))
    # Where the values are now, and that each has been at its height.
    np.testing.assert_array_equal(data_plot.get_offsets()[:, 1], heights)
    assert sorted(data_plot.get_offsets()[:, 0]) == pytest.approx(cdf_pred_plot.get_xdata())
    # Clearing takes away neither labels nor the look that all axes of the figure share.
    for ax in fig.axes:
        assert ax.get_xlabel() and ax.get_ylabel()
        assert not ax.spines["top"].get_visible()
        assert len({str(axes.get_facecolor()) for axes in fig.axes}) == 1
        assert {line.get_color() for line in ax.get_xgridlines()} == {"#E5E5E5"}
    return losses[-1]


def test_the_seven_runs_reprint_their_losses(tmp_path: Path) -> None:
    set_seed(42)
    for i, (prior, p1, p2, init, steps, published) in enumerate(RUNS):
        path = tmp_path / f"batch_shaping_{prior.name.lower()}_p1={p1}_p2={p2}.gif" if i == 0 else None
        loss = shape_values(prior, p1, p2, init, steps, path)
        if published == "3.1e-06":  # rounding decides its last digits
            assert loss == pytest.approx(3.1e-6, abs=0.3e-6)
        else:
            assert f"{loss:.2e}" == published


def test_the_generalized_run_reprints_its_loss(tmp_path: Path) -> None:
    steps, arrays, n = 350, 30, 500
    fig, data_axes, priors_loss_ax, hyperprior_loss_ax, hyperprior_pdf_ax, priors_plot, hyperprior_plot = (
        init_gbas_anim_plot(steps)
    )
    assert isinstance(data_axes, list) and len(data_axes) == 6
    assert fig.axes == [*data_axes, priors_loss_ax, hyperprior_loss_ax, hyperprior_pdf_ax]
    for ax in data_axes:
        assert ax.get_xlim() == ax.get_ylim() == (-0.08, 1.08)
    for line, ax in ((priors_plot, priors_loss_ax), (hyperprior_plot, hyperprior_loss_ax)):
        assert isinstance(line, Line2D) and line.axes is ax
        assert ax.get_xlim() == (0, steps) and ax.get_yscale() == "linear"

    set_seed(42)
    centres = []
    for _ in range(arrays):
        centre = np.random.rand()  # noqa: NPY002 (NumPy's global generator is what set_seed seeds)
        centres.append((np.clip(np.random.normal(centre, 0.05, size=n), 0.0, 1.0) * 2 - 1) * 4)  # noqa: NPY002
    logits = torch.nn.Parameter(torch.Tensor(np.stack(centres, axis=1)))
    heights = np.linspace(0.0, 1.0, n)
    mean_logits = torch.nn.Parameter(torch.normal(torch.zeros(arrays), 0.01))
    temperature_logits = torch.nn.Parameter(torch.zeros(arrays))
    adam = torch.optim.Adam([logits, mean_logits, temperature_logits], lr=0.3)
    warm_up = torch.optim.lr_scheduler.LambdaLR(adam, lr_lambda=warmup_factory(20, 0.3))
    # The parameters of the priors are learned, though nothing says that they are trainable.
    prior_loss_of = partial(gbas_loss, prior=Prior.RELAXED_BERNOULLI, dim=1)
    hyperprior_loss_of = partial(gbas_loss, prior=Prior.BETA, prior_param1=3, prior_param2=7, dim=None)
    losses: list[tuple[float, float, float]] = []

    def start() -> None:
        means, temperatures = torch.sigmoid(mean_logits), torch.sigmoid(temperature_logits)
        loss = prior_loss_of(torch.sigmoid(logits), prior_param1=means, prior_param2=temperatures)
        priors_loss_ax.set_ylim([-0.005, loss.item() + 0.05])
        hyperprior_loss_ax.set_ylim([-0.005, hyperprior_loss_of(means).item() + 0.05])

    def move() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        adam.zero_grad()
        values, means = torch.sigmoid(logits), torch.sigmoid(mean_logits)
        temperatures = torch.sigmoid(temperature_logits)
        prior_loss = prior_loss_of(values, prior_param1=means, prior_param2=temperatures)
        hyperprior_loss = hyperprior_loss_of(means)
        loss = prior_loss + hyperprior_loss + 0.1 * torch.mean(torch.abs(temperatures))
        losses.append((prior_loss.item(), hyperprior_loss.item(), loss.item()))
        loss.backward()
        adam.step()
        warm_up.step()
        return values, means, temperatures

    def step(_: int) -> None:
        values, means, temperatures = move()
        priors_plot.set_data(np.arange(len(losses)), [loss[0] for loss in losses])
        hyperprior_plot.set_data(np.arange(len(losses)), [loss[1] for loss in losses])
        shown = to_numpy(values)
        for k, ax in enumerate(data_axes):
            ax.cla()
            mean, temperature = means[k].item(), temperatures[k].item()
            ax.scatter(shown[:, k], heights, alpha=0.15, label="data")
            ax.plot(np.sort(shown[:, k]), np.arange(n) / n, label="CDF (data)")
            plot_gt_cdf(ax, Prior.RELAXED_BERNOULLI, mean, temperature)
            ax.set_xlabel(f"array {k + 1}, $\\mu$ = {mean:.2f}", fontsize=14)
            if k == 0:
                ax.legend(loc="upper center", ncol=3, bbox_to_anchor=(1.2, 1.28))
        hyperprior_pdf_ax.cla()
        plot_gt_pdf(hyperprior_pdf_ax, Prior.BETA, 3, 7)
        hyperprior_pdf_ax.hist(to_numpy(means), bins=20, density=True, stacked=True, label="PDF (data)")
        hyperprior_pdf_ax.legend(loc="upper right")
        hyperprior_pdf_ax.set_ylabel("density of the\nlearned means", fontsize=16)

    for _ in range(steps - DRAWN):
        move()
    animate(fig, step, steps, start, tmp_path / "generalized_batch_shaping_hyperprior=beta.gif", dpi=60)

    assert f"{losses[-1][2]:.2e}" == "3.52e-02"
    assert legend(data_axes[0]) == ["data", "CDF (data)", "CDF (target)"]
    assert legend(hyperprior_pdf_ax) == ["PDF (target)", "PDF (data)"]
    assert [ax.get_xlabel()[:7] for ax in data_axes] == [f"array {k}" for k in range(1, 7)]
    assert {ax.get_ylabel() for ax in data_axes} == {"CDF"}
