"""A run and its folder: train, be interrupted, go on, evaluate.

A folder holds

========================== ==========================================================================
``config.yaml``            every setting, from which the run can be repeated
``history.json``           what there is to tell of each epoch
``checkpoint.safetensors`` the state at the end of the last epoch, from which the run goes on
``model.safetensors``      the trained weights
``result.json``            everything that the report shows
``logs``                   losses and accuracies step by step
========================== ==========================================================================
"""

from __future__ import annotations

import json
import logging
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

import batchshaping
from batchshaping.files import replaced
from batchshaping.training.checkpoints import SafeCheckpoints, read_checkpoint
from batchshaping.training.config import RunConfig, read_config, write_config
from batchshaping.training.data import Data, load_data
from batchshaping.training.evaluation import evaluate
from batchshaping.training.module import DataModule, GatedClassifier, make_network
from batchshaping.training.threads import suitable_threads, using_threads

__all__ = ["RunError", "evaluate_run", "load_run", "read_result", "resume", "train"]

CONFIG = "config.yaml"
HISTORY = "history.json"
CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"
RESULT = "result.json"


class RunError(Exception):
    """Says in one line what is wrong with a folder of a run."""


def train(config: RunConfig, output: Path, *, progress: bool = False) -> dict[str, Any]:
    """Train a network and evaluate it.

    Args:
        config: every setting.
        output: the folder of the run, made if need be; see above for what it will hold.
        progress: whether to show how far the training is.

    Returns:
        The result, as ``result.json`` holds it. Ranks other than the first get an empty one.

    Raises:
        RunError: if the folder holds a run already.
        DataError: if the data is not what it should be.
        ValueError: if the budget cannot be reached, or the machine has no such devices.
    """
    module, trainer = _module(config), _trainer(config, output, progress)
    if _is_first_rank():
        if (output / CONFIG).exists():
            raise RunError(f"{output} already holds a run; resume it, or choose another folder")
        try:
            output.mkdir(parents=True, exist_ok=True)
            write_config(_from_anywhere(config), output / CONFIG)
        except OSError as error:
            raise RunError(f"{output}: {error.strerror or error}, expected a folder to write to") from None
    return _fit(trainer, module, output, None)


def resume(output: Path, *, progress: bool = False) -> dict[str, Any]:
    """Go on with a run that was interrupted, to the result it would have had.

    Args:
        output: the folder of the run.
        progress: whether to show how far the training is.

    Returns:
        The result, as ``result.json`` holds it; at once if the run is finished.

    Raises:
        RunError: if the folder holds no run, or a checkpoint that cannot be read, or settings that are not
            those that the run began with. Those of the machine and the log may change.
    """
    config = _config(output)
    if (output / RESULT).exists():
        result = read_result(output)
        _refuse_changes(config, result["config"], output)
        return result
    checkpoint = output / CHECKPOINT
    if checkpoint.exists():
        try:
            _refuse_changes(config, read_checkpoint(checkpoint).get("config", {}), output)
        except ValueError as error:
            raise RunError(error) from None
    last = checkpoint if checkpoint.exists() else None
    return _fit(_trainer(config, output, progress), _module(config), output, last)


def evaluate_run(output: Path, **settings: Any) -> dict[str, Any]:
    """Evaluate the trained network of a run on its test images.

    Args:
        output: the folder of the run.
        settings: replace those of the run, such as ``data_folder`` or ``threads``.

    Returns:
        The figures of :func:`~batchshaping.training.evaluation.evaluate`.

    Raises:
        RunError: if the folder holds no trained network.
        DataError: if the data is not what it should be.
    """
    return evaluate(*load_run(output, **settings), threads=_config(output, **settings).threads)


def load_run(output: Path, **settings: Any) -> tuple[nn.Module, Data]:
    """The trained network of a run, in evaluation mode, and its data.

    Args:
        output: the folder of the run.
        settings: replace those of the run, such as ``data_folder``.

    Raises:
        RunError: if the folder holds no trained network.
        DataError: if the data is not what it should be.
    """
    config = _config(output, **settings)
    data = load_data(config)
    network = make_network(config, len(data.classes), data.shape[0])
    path = output / MODEL
    try:
        network.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; the run is not finished") from None
    except (SafetensorError, RuntimeError, OSError):
        raise RunError(f"{path}: expected weights of the network in {CONFIG}, received others") from None
    return network.eval(), data


def read_result(output: Path) -> dict[str, Any]:
    """The result of a run.

    Args:
        output: the folder of the run, or a file like the ``result.json`` in it.

    Raises:
        RunError: in one line, if it cannot be read.
    """
    path = output / RESULT if output.is_dir() else output
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from None
    except ValueError:
        result = None
    if not isinstance(result, dict) or not {"accuracy", "config", "cost", "history"} <= result.keys():
        raise RunError(f"{path}: expected the result of a run, received something else")
    return result


def _from_anywhere(config: RunConfig) -> RunConfig:
    """With a data folder that is the same whatever the current folder is."""
    folder = config.data_folder
    return config if folder is None else config.model_copy(update={"data_folder": folder.resolve()})


# With other devices or threads, sums are taken in another order and may be rounded differently.
_MAY_CHANGE = {
    *("accelerator", "data_folder", "devices", "download", "log_every", "logger", "nodes", "threads"),
    "workers",
}


def _refuse_changes(config: RunConfig, began_with: dict[str, Any], output: Path) -> None:
    settings = config.model_dump(mode="json")
    changed = [n for n, v in settings.items() if n not in _MAY_CHANGE and began_with.get(n) != v]
    if changed:
        raise RunError(
            f"{output / CONFIG}: {', '.join(changed)} must be what the run began with, received others"
        )


def _is_first_rank() -> bool:
    """Whether this process is the first of all, which is told by Lightning before it has a trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _config(output: Path, **settings: Any) -> RunConfig:
    if not (output / CONFIG).exists():
        raise RunError(f"{output}: expected the folder of a run, with {CONFIG} in it")
    return read_config(output / CONFIG, **settings)


def _module(config: RunConfig) -> GatedClassifier:
    data = load_data(config)
    torch.manual_seed(config.seed)
    return GatedClassifier(config, data)


def _trainer(config: RunConfig, output: Path, progress: bool) -> pl.Trainer:
    try:
        with _quiet():
            trainer = pl.Trainer(
                accelerator=config.accelerator,
                devices=config.devices,
                num_nodes=config.nodes,
                strategy="ddp" if config.devices * config.nodes > 1 else "auto",
                precision=config.precision,
                max_epochs=config.epochs,
                accumulate_grad_batches=config.accumulate,
                sync_batchnorm=config.sync_batch_norm,
                check_val_every_n_epoch=config.evaluate_every,
                log_every_n_steps=1,  # when to log is up to the module
                logger=_LOGGERS[config.logger](output),
                callbacks=[*_callbacks(output), *[_OneBar(leave=False)] * progress],
                plugins=[SafeCheckpoints()],
                enable_progress_bar=progress,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
                # Each epoch's own seed is given to what loads the images.
                reload_dataloaders_every_n_epochs=1,
            )
    except (MisconfigurationException, ModuleNotFoundError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    if config.sync_batch_norm and trainer.strategy.root_device.type == "cpu":
        raise ValueError("sync_batch_norm needs GPUs, received the CPU")
    return trainer


def _fit(
    trainer: pl.Trainer, module: GatedClassifier, output: Path, checkpoint: Path | None
) -> dict[str, Any]:
    started = time.monotonic()
    config = module.config
    threads = config.threads or suitable_threads(
        module.network,
        module.cost.dense * config.batch_of_a_device,
        trainer.strategy.root_device,
        config.devices,
    )
    with _quiet(), _written_to(output), using_threads(threads):
        try:
            trainer.fit(module, DataModule(config, module.data), ckpt_path=checkpoint)
        except SystemExit:  # how Lightning ends a training that was interrupted
            if not trainer.interrupted:
                raise
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.global_rank > 0:
        return {}
    # Where it was trained; Lightning gives it back on the CPU.
    device = trainer.strategy.root_device
    network = module.network.to(device, torch.float64 if config.precision == "64" else torch.float32)
    result = {
        "config": config.model_dump(mode="json"),
        "versions": {
            "batchshaping": batchshaping.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": threads,
        "classes": list(module.data.classes),
        "seconds": round(time.monotonic() - started, 1),
        **evaluate(network, module.data, workers=config.workers, device=device, threads=config.threads),
        "history": module.history,
    }
    with _written_to(output):
        _write_weights(network, output / MODEL)
        _write_json(result, output / RESULT)
    return result


def _no_logger(output: Path) -> bool:
    return False


_LOGGERS: dict[str, Any] = {
    "csv": lambda output: CSVLogger(output, name="logs"),
    "tensorboard": lambda output: TensorBoardLogger(output, name="logs"),
    "none": _no_logger,
}


def _callbacks(output: Path) -> list[Callback]:
    checkpoints = ModelCheckpoint(
        output, Path(CHECKPOINT).stem, enable_version_counter=False, save_on_train_epoch_end=True
    )
    checkpoints.FILE_EXTENSION = Path(CHECKPOINT).suffix
    return [checkpoints, _WriteHistory(output / HISTORY)]


class _OneBar(TQDMProgressBar):
    """A bar for each epoch of training, with what the network can do and what it spends."""

    def init_validation_tqdm(self) -> Tqdm:
        bar = super().init_validation_tqdm()
        bar.disable = True
        return bar

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        return metrics


class _WriteHistory(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, GatedClassifier)
        _write_json(module.history, self.path)


def _write_json(content: Any, path: Path) -> None:
    with replaced(path) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")


def _write_weights(network: nn.Module, path: Path) -> None:
    with replaced(path) as partial:
        partial.write_bytes(
            save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})
        )


@contextmanager
def _written_to(output: Path) -> Iterator[None]:
    """Say in one line what keeps the folder from being written to."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{output}: {error.strerror or error}; the run can be resumed") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning says of its own business."""
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
