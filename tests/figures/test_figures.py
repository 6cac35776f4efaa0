"""Figures show exactly the sample and the prior; animations update what they show and draw nothing anew."""

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from PIL import Image
from scipy import stats

import batchshaping as bs
from batchshaping import viz_utils
from batchshaping.batch_shaping_loss import Prior
from batchshaping.experiments.fit import Fit, GeneralizedFit, fit, fit_generalized, published_start
from batchshaping.figures import animations, fits

SAMPLES = [
    (bs.Beta(2, 6), stats.beta(2, 6)),
    (bs.SymBeta(0.6), stats.beta(0.6, 0.4)),
    (bs.Normal(-1.0, 3.0), stats.norm(-1, 3)),
    (torch.distributions.Normal(2.0, 0.5), stats.norm(2, 0.5)),
    (torch.distributions.Uniform(-1.0, 4.0), stats.uniform(-1, 5)),
    (torch.distributions.HalfNormal(2.0), stats.halfnorm(scale=2)),
]
SEED_PRIORS = [
    (Prior.SYMBETA, 0.6, None, stats.beta(0.6, 0.4)),
    (Prior.BETA, 2, 6, stats.beta(2, 6)),
    (Prior.NORMAL, 0.6, 0.1, stats.norm(0.6, 0.1)),
]


@pytest.fixture(scope="module")
def shaped() -> Fit:
    return fit(published_start(), bs.Beta(2, 6), steps=30)


@pytest.fixture(scope="module")
def shaped_generalized() -> GeneralizedFit:
    torch.manual_seed(0)
    return fit_generalized(published_start(n=(10, 100)), steps=12)


@pytest.fixture(autouse=True)
def _no_figure_is_left() -> None:
    pyplot.close("all")


# Static figures


def empirical_cdf_of_line(ax: Axes, at: np.ndarray) -> np.ndarray:
    """The height, at some points, of the line that is drawn in steps."""
    (line,) = [line for line in ax.lines if line.get_drawstyle() == "steps-post"]
    x, y = line.get_data()
    assert (np.diff(x) >= 0).all()
    return np.asarray(y)[np.searchsorted(x, at, side="right") - 1]


@pytest.mark.parametrize(("prior", "oracle"), SAMPLES, ids=[str(prior) for prior, _ in SAMPLES])
def test_the_cdf_figure_holds_the_exact_empirical_and_target_cdf(prior, oracle) -> None:
    x = prior.sample((50,)).double()
    ax = viz_utils.plot_cdf(x, prior)
    at = np.concatenate([x, x + 1e-9, x - 1e-9])
    at = at[(at >= ax.get_xlim()[0]) & (at <= ax.get_xlim()[1])]
    np.testing.assert_array_equal(empirical_cdf_of_line(ax, at), stats.ecdf(x.numpy()).cdf.evaluate(at))
    (target,) = [line for line in ax.lines if line.get_drawstyle() == "default"]
    grid, cdf = target.get_data()
    np.testing.assert_allclose(cdf, oracle.cdf(grid), atol=1e-6)
    assert grid[0] <= x.min()
    assert grid[-1] >= x.max()


@pytest.mark.parametrize(("prior", "oracle"), SAMPLES, ids=[str(prior) for prior, _ in SAMPLES])
def test_the_density_figure_holds_a_histogram_of_area_one_and_the_density(prior, oracle) -> None:
    x = prior.sample((50,)).double()
    ax = viz_utils.plot_density(x, prior)
    (bars,) = [patch for patch in ax.patches if isinstance(patch, StepPatch)]
    density, edges, _ = bars.get_data()
    assert len(density) == 20
    assert (density * np.diff(edges)).sum() == pytest.approx(1)
    counts = density * np.diff(edges) * 50
    assert counts == pytest.approx(
        [int(((x >= a) & (x < b)).sum()) for a, b in itertools.pairwise(edges)], abs=1.001
    )
    (target,) = ax.lines
    grid, values = target.get_data()
    inside = ~np.isnan(values)
    assert inside.sum() >= len(grid) - 2
    np.testing.assert_allclose(values[inside], oracle.pdf(grid[inside]), rtol=1e-5, atol=1e-9)
    assert np.isfinite(ax.get_ylim()).all()


def test_values_outside_of_the_support_are_shown_and_the_cdf_there_is_0_or_1() -> None:
    ax = viz_utils.plot_cdf(torch.tensor([-0.5, 0.2, 1.5]), bs.Beta(2, 6))
    assert ax.get_xlim() == (-0.5, 1.5)
    grid, cdf = ax.lines[1].get_data()
    assert (cdf[grid <= 0] == 0).all()
    assert (cdf[grid >= 1] == 1).all()
    viz_utils.plot_density(torch.tensor([-0.5, 0.2, 1.5]), bs.Beta(2, 6))


def test_equal_values_far_from_a_prior_without_quantiles_are_shown() -> None:
    class NoQuantiles(torch.distributions.Normal):
        def icdf(self, value: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    for plot in (viz_utils.plot_cdf, viz_utils.plot_density):
        low, high = plot(torch.full((5,), 7.0), NoQuantiles(0.0, 1.0)).get_xlim()
        assert low < 7 < high


@pytest.mark.parametrize("plot", [viz_utils.plot_cdf, viz_utils.plot_density])
def test_a_figure_is_drawn_into_given_axes_or_makes_its_own_outside_of_pyplot(plot) -> None:
    given = Figure().add_subplot()
    assert plot(torch.rand(20), bs.Beta(2, 6), given) is given
    own = plot(torch.rand(20), bs.Beta(2, 6))
    assert own.figure is not given.figure
    assert own.get_xlabel()
    assert own.get_ylabel()
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("plot", [viz_utils.plot_cdf, viz_utils.plot_density])
def test_what_is_no_sample_is_refused(plot) -> None:
    with pytest.raises(ValueError, match=r"shape \(N,\), received shape \(2, 3\)"):
        plot(torch.rand(2, 3), bs.Beta(2, 6))
    with pytest.raises(ValueError, match=r"shape \(N,\), received shape \(0,\)"):
        plot(torch.rand(0), bs.Beta(2, 6))
    with pytest.raises(ValueError, match="x must be finite, received 2 values that are not"):
        plot(torch.tensor([0.1, torch.nan, torch.inf]), bs.Beta(2, 6))
    with pytest.raises(ValueError, match=r"single one, received batch_shape \(3,\)"):
        plot(torch.rand(5), bs.Beta(torch.ones(3), 6))


@pytest.mark.parametrize("style", ["ggplot", "dark_background"])
def test_a_figure_looks_the_same_whatever_style_is_active(style: str, shaped: Fit) -> None:
    plain = pixels(viz_utils.plot_fit(shaped))
    with mpl.style.context(style):
        assert (pixels(viz_utils.plot_fit(shaped)) == plain).all()


def test_the_house_style_ends_with_its_block() -> None:
    before = dict(mpl.rcParams)
    with viz_utils.house_style():
        assert mpl.rcParams["axes.spines.top"] is False
    assert dict(mpl.rcParams) == before
    viz_utils.plot_cdf(torch.rand(20), bs.Beta(2, 6))
    assert dict(mpl.rcParams) == before


def test_the_colors_can_be_told_apart_in_grey() -> None:
    def luminance(color: str) -> float:
        channels = np.array([int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)])
        return float(channels @ [0.2126, 0.7152, 0.0722])

    # The loss has axes of its own.
    grey = sorted(luminance(viz_utils.COLORS[name]) for name in ("values", "empirical", "target"))
    assert np.diff([*grey, 1.0]).min() > 0.2


# Animations


def pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


@pytest.fixture(params=["fit", "generalized"])
def animation(request, shaped, shaped_generalized):
    with viz_utils.house_style():
        if request.param == "fit":
            yield fits._FitAnimation(shaped)
        else:
            yield fits._GeneralizedFitAnimation(shaped_generalized)


def test_a_step_updates_artists_and_creates_none(animation) -> None:
    axes = list(animation.figure.axes)
    artists = [ax.get_children() for ax in axes]
    before = pixels(animation.figure)
    for step in (0, 3, animation.steps):
        animation.show(step)
        assert animation.figure.axes == axes
        assert [ax.get_children() for ax in axes] == artists
    assert (pixels(animation.figure) == before).all()
    animation.show(0)
    assert (pixels(animation.figure) != before).any()


def test_a_frame_equals_the_figure_redrawn_in_full(animation) -> None:
    steps = [0, 5, 5, animation.steps, 1]
    frames = [np.asarray(frame).astype(int) for frame in animations.frames_of(animation, steps)]
    for artist in (*animation.moving, *animation.captions):
        artist.set_animated(False)
    for step, frame in zip(steps, frames, strict=True):
        animation.show(step)
        full = pixels(animation.figure)
        # What moves is drawn after all axes, so that spines may lie under a line instead of over it.
        assert (abs(frame - full).max(axis=-1) > 64).mean() < 0.005
        for caption in animation.captions:
            assert caption.get_text()
            (left, bottom), (right, top) = caption.get_window_extent().get_points().round().astype(int)
            rows, columns = slice(len(full) - top, len(full) - bottom), slice(left, right)
            assert (frame[rows, columns] == full[rows, columns]).all()
            assert (full[rows, columns] < 128).any()
    assert (frames[1] == frames[2]).all()


def test_the_axes_of_an_animation_are_labelled_and_hold_all_losses(shaped: Fit) -> None:
    figure = viz_utils.plot_fit(shaped)
    assert [ax.get_xlabel() for ax in figure.axes] == ["value x", "step", "value x"]
    assert [ax.get_ylabel() for ax in figure.axes] == ["CDF", "loss", "density"]
    (line,) = figure.axes[1].lines
    np.testing.assert_array_equal(line.get_xdata(), np.arange(30))
    np.testing.assert_array_equal(line.get_ydata(), shaped.losses.numpy())
    low, high = figure.axes[1].get_ylim()
    assert low <= shaped.losses.min()
    assert high >= shaped.losses.max()
    assert figure.axes[1].get_xlim() == (0, 30)
    assert pyplot.get_fignums() == []


def test_an_animation_shows_the_values_of_its_step(shaped: Fit) -> None:
    animation = fits._FitAnimation(shaped)
    for step in (0, 7, 30):
        animation.show(step)
        np.testing.assert_array_equal(animation.points.get_xdata(), shaped.values[step].numpy())
        at = np.linspace(0.01, 0.99, 50)
        expected = stats.ecdf(shaped.values[step].double().numpy()).cdf.evaluate(at)
        np.testing.assert_array_equal(empirical_cdf_of_line(animation.data, at), expected)
        assert len(animation.losses.get_xdata()) == min(step + 1, 30)
        assert f"step {step}," in animation.captions[0].get_text()


def test_the_six_arrays_run_from_the_lowest_to_the_highest_mean(shaped_generalized: GeneralizedFit) -> None:
    figure = viz_utils.plot_generalized_fit(shaped_generalized)
    captions = [ax.texts[0].get_text() for ax in figure.axes[:6]]
    means = shaped_generalized.means[-1]
    assert captions[0].startswith(f"μ = {means.min():.2f}")
    assert captions[-1].startswith(f"μ = {means.max():.2f}")
    for ax in figure.axes:
        assert ax.get_xlim()[0] < ax.get_xlim()[1]
    assert len(figure.axes) == 9


def test_fewer_than_six_arrays_are_shown_again() -> None:
    assert len(viz_utils.plot_generalized_fit(fit_generalized(published_start(n=(2, 30)), steps=2)).axes) == 9


def test_a_gif_can_be_read_and_is_small(animation, tmp_path: Path, shaped, shaped_generalized) -> None:
    path = tmp_path / "animation"
    if isinstance(animation, fits._FitAnimation):
        viz_utils.animate_fit(shaped, path, frames=11)
        size, expected = (800, 290), 11
    else:
        viz_utils.animate_generalized_fit(shaped_generalized, path, frames=11)
        size, expected = (800, 600), 7
    assert path.stat().st_size < 1_000_000
    with Image.open(path) as gif:
        assert gif.format == "GIF"
        assert gif.size == size
        assert gif.info["loop"] == 0
        assert gif.n_frames == expected
        durations, pictures = [], []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            durations.append(gif.info["duration"])
            pictures.append(np.asarray(gif.convert("RGB")).astype(int))
    assert durations == [60] * (expected - 1) + [2000]
    animation.show(animation.steps)
    assert (abs(pictures[-1] - pixels(animation.figure)).max(axis=-1) > 64).mean() < 0.005
    assert (pictures[0] != pictures[-1]).any()


@pytest.mark.parametrize(
    ("steps", "frames", "expected"), [(1, 2, 2), (3, 70, 4), (30, 2, 2), (10, 5, 5), (10, 4, 4)]
)
def test_frames_are_equally_spaced_steps_with_both_ends(
    steps: int, frames: int, expected: int, tmp_path: Path
) -> None:
    path = tmp_path / "fit.gif"
    viz_utils.animate_fit(fit(published_start(), bs.Beta(2, 6), steps=steps), path, frames=frames)
    with Image.open(path) as gif:
        assert gif.n_frames == expected


def test_a_stalled_fit_can_be_shown() -> None:
    still = Fit(torch.full((4, 20), 0.5), torch.zeros(3), bs.Normal(0.5, 0.1))
    viz_utils.plot_fit(still).savefig(io.BytesIO())


def test_a_fit_with_nan_is_refused_and_nothing_written(tmp_path: Path) -> None:
    values = torch.full((4, 20), 0.5)
    values[2:, 3] = torch.nan
    broken = Fit(values, torch.ones(3), bs.Normal(0.5, 0.1))
    with pytest.raises(ValueError, match="fit must be finite to be drawn, received 1 values that are not"):
        viz_utils.animate_fit(broken, tmp_path / "fit.gif")
    assert list(tmp_path.iterdir()) == []


def test_a_single_frame_is_refused_and_nothing_written(shaped: Fit, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frames must be at least 2, received 1"):
        viz_utils.animate_fit(shaped, tmp_path / "fit.gif", frames=1)
    assert list(tmp_path.iterdir()) == []


# The published interface


@pytest.mark.parametrize(("prior", "p1", "p2", "oracle"), SEED_PRIORS, ids=[str(p) for p, *_ in SEED_PRIORS])
def test_the_lines_of_a_prior(prior: Prior, p1: float, p2: float | None, oracle) -> None:
    ax = Figure().add_subplot()
    x, cdf = viz_utils.plot_gt_cdf(ax, prior, p1, p2).get_data()
    np.testing.assert_allclose(cdf, oracle.cdf(x), atol=1e-6)
    assert (len(x), x[0], x[-1]) == (100, 0.0, 1.0)
    x, pdf = viz_utils.plot_gt_pdf(ax, prior, p1, p2, num_pts=7, eps_clip_x=0.01, eps_ylim=0.5).get_data()
    np.testing.assert_allclose(pdf, oracle.pdf(x), rtol=1e-5)
    np.testing.assert_allclose(x, np.linspace(0.01, 0.99, 7))
    assert ax.get_ylim() == pytest.approx((-0.5, pdf.max() + 0.5))
    assert [line.get_label() for line in ax.lines] == ["CDF (target)", "PDF (target)"]


def test_the_lines_of_a_relaxed_bernoulli() -> None:
    ax = Figure().add_subplot()
    x, cdf = viz_utils.plot_gt_cdf(ax, Prior.RELAXED_BERNOULLI, 0.2, 0.25, num_pts=51).get_data()
    inner = x[1:-1]
    odds = (inner / (1 - inner)) ** 0.25 / (0.2 / 0.8)
    np.testing.assert_allclose(cdf[1:-1], odds / (1 + odds), rtol=1e-6)
    x, pdf = viz_utils.plot_gt_pdf(ax, Prior.RELAXED_BERNOULLI, 0.2, 0.25, num_pts=501).get_data()
    area = ((pdf[1:] + pdf[:-1]) / 2 * np.diff(x)).sum()
    odds = (x[[0, -1]] / (1 - x[[0, -1]])) ** 0.25 / (0.2 / 0.8)
    assert area == pytest.approx(np.diff(odds / (1 + odds)).item(), rel=1e-2)


@pytest.mark.parametrize("plot", [viz_utils.plot_gt_cdf, viz_utils.plot_gt_pdf])
def test_an_unknown_prior_or_a_missing_parameter_is_refused(plot) -> None:
    ax = Figure().add_subplot()
    with pytest.raises(ValueError, match=r"prior must be one of Prior\.SYMBETA, .*, received 'beta'"):
        plot(ax, "beta", 2, 6)
    with pytest.raises(ValueError, match=r"p2 must be given for Prior\.BETA, received None"):
        plot(ax, Prior.BETA, 2, None)
    assert not ax.lines


def test_a_density_that_is_infinite_at_an_end_is_drawn_up_to_where_it_is_finite() -> None:
    ax = Figure().add_subplot()
    viz_utils.plot_gt_pdf(ax, Prior.SYMBETA, 0.9, None, num_pts=11, eps_clip_x=0.0)
    assert ax.get_ylim() == pytest.approx((-0.25, stats.beta(0.9, 0.1).pdf(0.9) + 0.25))


def test_a_loss_can_be_seen_before_its_axis_is_set() -> None:
    *_, loss_ax, _, _, _, loss_plot = viz_utils.init_anim_plot(20)
    x = torch.zeros(500)
    worst = bs.batch_shaping(x, bs.Beta(2, 6)), bs.batch_shaping(1 - x, bs.Beta(2, 6))
    low, high = loss_ax.get_ylim()
    assert low < 0 and max(worst) < high
    assert loss_plot.get_clip_on()
    loss_ax.set_ylim(-0.005, 0.1)
    assert loss_ax.get_ylim() == (-0.005, 0.1)


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_the_room_around_the_values_can_be_chosen(eps: float) -> None:
    _, data_ax, *_ = viz_utils.init_anim_plot(20, eps=eps)
    _, data_axes, *_ = viz_utils.init_gbas_anim_plot(20, eps=eps)
    for ax in (data_ax, *data_axes):
        assert ax.get_xlim() == ax.get_ylim() == (-eps, 1 + eps)


# What importing needs


@pytest.fixture(scope="module")
def imports() -> dict[str, str]:
    """What a fresh interpreter has after an import without figures, and what it says of a missing module."""
    code = """if True:
        import json, sys, traceback
        import batchshaping, batchshaping.fit, batchshaping.published
        told = {"matplotlib is there": str("matplotlib" in sys.modules)}
        before = {*sys.modules}
        for missing in ("matplotlib", "PIL"):
            sys.modules[missing] = None
            try:
                import batchshaping.viz_utils
            except ImportError:
                told[missing] = traceback.format_exc()
            for name in {*sys.modules} - before:
                del sys.modules[name]
        print(json.dumps(told))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_package_does_not_import_matplotlib(imports: dict[str, str]) -> None:
    assert imports["matplotlib is there"] == "False"


@pytest.mark.parametrize("missing", ["matplotlib", "PIL"])
def test_without_its_extra_one_line_says_what_to_install(missing: str, imports: dict[str, str]) -> None:
    last = imports[missing].strip().splitlines()[-1]
    assert last.startswith("ImportError: batchshaping.figures needs ")
    assert last.endswith("pip install 'batchshaping[viz]'")
    assert "During handling" not in imports[missing]
