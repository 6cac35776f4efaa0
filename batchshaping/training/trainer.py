"""Lightning's trainer as a run uses it: its devices, checkpoints, logs and progress bar."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from batchshaping.storage.files import write_json
from batchshaping.training.checkpoints import SafeCheckpoints
from batchshaping.training.config import RunConfig
from batchshaping.training.module import GatedClassifier

__all__ = ["CHECKPOINT", "HISTORY", "make_trainer", "silenced"]

CHECKPOINT = "checkpoint.safetensors"
"""Name of the file with the state at the end of the last epoch."""

HISTORY = "history.json"
"""Name of the file with the metrics of each epoch."""


def make_trainer(config: RunConfig, output: Path, progress: bool) -> pl.Trainer:
    """A trainer that leaves checkpoint, history and log in a folder.

    Args:
        config: the configuration of the run.
        output: the folder.
        progress: whether to show a progress bar.

    Raises:
        ValueError: in one line, if the machine does not have such devices.
    """
    machine, optimization = config.machine, config.optimization
    try:
        with silenced():
            trainer = pl.Trainer(
                accelerator=machine.accelerator,
                devices=machine.devices,
                num_nodes=machine.nodes,
                strategy="ddp" if machine.processes > 1 else "auto",
                precision=machine.precision,
                max_epochs=optimization.epochs,
                accumulate_grad_batches=optimization.accumulate,
                sync_batchnorm=machine.sync_batch_norm,
                check_val_every_n_epoch=machine.evaluate_every,
                log_every_n_steps=machine.log_every,
                logger=_LOGGERS[machine.logger](output),
                callbacks=[*_callbacks(config, output), *[_OneBar(leave=False)] * progress],
                plugins=[SafeCheckpoints()],
                enable_progress_bar=progress,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
                # A loader is made for each epoch, since its seed is that of the epoch.
                reload_dataloaders_every_n_epochs=1,
            )
    except (MisconfigurationException, ModuleNotFoundError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    if machine.sync_batch_norm and trainer.strategy.root_device.type == "cpu":
        raise ValueError("sync_batch_norm needs GPUs, received the CPU")
    return trainer


@contextmanager
def silenced() -> Iterator[None]:
    """Silence Lightning's logs, and all warnings."""
    loggers = [
        logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _no_logger(output: Path) -> bool:
    return False


_LOGGERS: dict[str, Any] = {
    "csv": lambda output: CSVLogger(output, name="logs"),
    "tensorboard": lambda output: TensorBoardLogger(output, name="logs"),
    "none": _no_logger,
}


def _callbacks(config: RunConfig, output: Path) -> list[Callback]:
    checkpoints = ModelCheckpoint(
        output, Path(CHECKPOINT).stem, enable_version_counter=False, save_on_train_epoch_end=True
    )
    checkpoints.FILE_EXTENSION = Path(CHECKPOINT).suffix
    return [checkpoints, _SaveConfig(config), _WriteHistory(output / HISTORY)]


class _OneBar(TQDMProgressBar):
    """One progress bar for each epoch of training, and none for evaluations."""

    def init_validation_tqdm(self) -> Tqdm:
        bar = super().init_validation_tqdm()
        bar.disable = True
        return bar

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        return metrics


class _SaveConfig(Callback):
    """Adds the settings of the run to every checkpoint."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config.model_dump(mode="json")


class _WriteHistory(Callback):
    """Writes the metrics of each epoch to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, GatedClassifier)
        write_json(module.history, self.path)
