"""Draw the masks of the experiment: through a training as a GIF, and beside those of the rule and of chance.

``python benchmarks/mixed_scale/pictures.py`` needs the runs of seed 0 in ``outputs/mixed_scale``, where
``mixed_scale.py`` leaves them. It repeats one of them and looks at its masks on the way, in a minute.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from torch import Tensor

from batchshaping.figures.animations import write_gif
from batchshaping.figures.masks import MaskAnimation, draw_masks
from batchshaping.mixed_scale.msvit import MSViT
from batchshaping.training.data import load_data
from batchshaping.training.run import load_run, make_classifier, make_data_module
from batchshaping.training.start import Start
from batchshaping.training.threads import using_threads
from batchshaping.training.trainer import make_trainer, silenced

sys.path.insert(0, str(Path(__file__).parent))

from mixed_scale import ON_FORMS, ROOT, runs

RUNS, FIGURES = ROOT / "outputs" / "mixed_scale", ROOT / "docs" / "figures"
SHOWN = range(6)
EVERY = 10
"""Steps between two looks."""
FRAMES = 38
MASKS = {
    "mixed_scale_masks": {"chance": "chance-0.2", "entropy": "entropy-0.2", "learned": "gbas-0.2"},
    "mixed_scale_forms_masks": {
        "entropy": f"entropy_forms-{ON_FORMS}",
        "penalty": f"tokens_forms-{ON_FORMS}",
        "one prior": f"bas_forms-{ON_FORMS}",
        "learned": f"gbas_forms-{ON_FORMS}",
    },
}
"""Figures of masks: the arms of each by their titles."""


def masks_of(msvit: MSViT, images: Tensor) -> np.ndarray:
    """The masks of normalized images, of shape (N, rows, columns)."""
    training = msvit.training
    with torch.no_grad():
        msvit.eval()(images)
    msvit.train(training)
    grid = msvit.cut(images).grid_of_regions
    return msvit.gate.decisions.unflatten(1, grid).numpy()


class Watch(Callback):
    """Keeps the masks of some images every few steps."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.steps: list[int] = []
        self.masks: list[np.ndarray] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step == 1 or trainer.global_step % EVERY == 0:
            self.steps.append(trainer.global_step)
            self.masks.append(masks_of(module.network, self.images))


def main() -> None:
    """Draw all."""
    name = "gbas-0.2-seed0"
    start = str(RUNS / "fine-seed0")
    config = dict(runs())[name].model_copy(update={"start": start, "evaluate_every": 10})
    data = load_data(config.data)
    pictures, _ = data.test.__getitems__(SHOWN)
    images = data.normalize(pictures)
    watch = Watch(images)
    with tempfile.TemporaryDirectory() as scratch, silenced(), using_threads(1):
        trainer = make_trainer(config, Path(scratch), progress=False)
        trainer.callbacks.append(watch)
        trainer.fit(make_classifier(config, data, Start.of(config)), make_data_module(config, data))
    seen = (pictures[:, 0] / 255).numpy()
    captions = [
        f"step {step}: {mask.mean():.0%} of the regions fine"
        for step, mask in zip(watch.steps, watch.masks, strict=True)
    ]
    animation = MaskAnimation(seen, np.array(watch.masks), captions)
    write_gif(animation, ROOT / "outputs" / "mixed_scale_tokens.gif", FRAMES, duration=160)
    for figure, arms in MASKS.items():
        draw_runs(arms).savefig(FIGURES / f"{figure}.png")


def draw_runs(arms: dict[str, str]) -> Figure:
    """The masks of test images, a row for each of these arms under its title."""
    rows = {}
    for title, arm in arms.items():
        network, data = load_run(RUNS / f"{arm}-seed0")
        pictures, _ = data.test.__getitems__(SHOWN)
        rows[title] = masks_of(network, data.normalize(pictures))
    return draw_masks((pictures[:, 0] / 255).numpy(), np.array([*rows.values()]), [*rows])


if __name__ == "__main__":
    main()
