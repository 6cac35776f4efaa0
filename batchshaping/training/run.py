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

Each file is written as a whole or not at all, and by one process at a time. Configuration, checkpoint,
weights and result have a checksum: a file that was cut off or changed is refused, and never gives another
result. Those of earlier versions have none, and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

import batchshaping
from batchshaping.files import created, only_writer, replaced
from batchshaping.training.checkpoints import SafeCheckpoints, read_checkpoint, read_tensors, write_tensors
from batchshaping.training.config import MAY_CHANGE, RunConfig, read_whole_config, write_config
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
        RunError: if the folder holds a run already, or another process is writing to it.
        DataError: if the data is not what it should be.
        ValueError: if the budget cannot be reached, or the machine has no such devices.
    """
    module, trainer = _module(config), _trainer(config, output, progress)
    with _held(output):
        _begin(config, output)
        return _fit(trainer, module, output, None)


def resume(output: Path, *, progress: bool = False, **settings: Any) -> dict[str, Any]:
    """Go on with a run that was interrupted, to the result it would have had.

    Args:
        output: the folder of the run.
        progress: whether to show how far the training is.
        settings: replace those of the run; those in :data:`~batchshaping.training.config.MAY_CHANGE` only.

    Returns:
        The result, as ``result.json`` holds it; at once if the run is finished.

    Raises:
        RunError: if the folder holds no run, or a file that was cut off or changed, or the state of another
            run; or if another process is writing to it; or if other settings are given.
        ValueError: if ``config.yaml`` was cut off or changed, or does not have every setting.
    """
    config = _config(output, **settings)
    _refuse_changes(config, _config(output).model_dump(mode="json"), output)
    # A link to nothing is something that cannot be read, and not a run that has only begun.
    if os.path.lexists(output / RESULT):
        result = read_result(output)
        _refuse_changes(config, result["config"], output)
        return result
    with _held(output):
        restored = _Restored(output / CHECKPOINT) if os.path.lexists(output / CHECKPOINT) else None
        if restored is not None:
            _refuse_changes(config, restored.config, output)
        return _fit(_trainer(config, output, progress), _module(config), output, restored)


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
        weights, _ = read_tensors(path)
        network.load_state_dict(weights)
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; the run is not finished") from None
    except (RuntimeError, OSError, ValueError):
        raise RunError(
            f"{path}: expected the weights of the network in {CONFIG}, whole and unchanged, received others"
        ) from None
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
        with path.open("rb") as file:
            text = file.read(_LARGEST_RESULT + 1)
        if len(text) > _LARGEST_RESULT:
            raise RunError(f"{path}: expected a result of at most {_LARGEST_RESULT} bytes, received more")
        # An integer that no float reaches is infinite, as other numbers of its size are.
        result: dict[str, Any] = json.loads(
            text.decode(), parse_int=lambda n: int(n) if len(n) < 100 else float(n)
        )
        whole = isinstance(result, dict) and {"accuracy", "config", "cost", "history"} <= result.keys()
        if not (whole and isinstance(result["config"], dict)):
            raise ValueError
        changed = result.pop(_CHECKSUM, None) not in (None, _checksum(result))
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise RunError(f"{path}: expected the result of a run, received something else") from None
    if changed:
        raise RunError(f"{path}: expected the result that the run wrote, received another: it was changed")
    return result


# More than that of a thousand classes and ten thousand gates.
_LARGEST_RESULT = 2**27

_CHECKSUM = "sha256"


def _checksum(result: dict[str, Any]) -> str:
    """Of all but how long it took, so that the same training gives the same."""
    facts = {name: value for name, value in result.items() if name != "seconds"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _from_anywhere(config: RunConfig) -> RunConfig:
    """With a data folder that is the same whatever the current folder is."""
    folder = config.data_folder
    return config if folder is None else config.model_copy(update={"data_folder": folder.resolve()})


def _refuse_changes(config: RunConfig, began_with: dict[str, Any], output: Path) -> None:
    settings = config.model_dump(mode="json")
    # What the run did not begin with is a setting that there was not when it did.
    changed = [n for n, v in settings.items() if n not in MAY_CHANGE and began_with.get(n, v) != v]
    if changed:
        raise RunError(
            f"{output / CONFIG}: {', '.join(changed)} must be what the run began with, received others"
        )


@contextmanager
def _held(output: Path) -> Iterator[None]:
    """Let no other run write to a folder, which is made if need be; the first process holds it for all."""
    with ExitStack() as stack:
        if _is_first_rank():
            try:
                output.mkdir(parents=True, exist_ok=True)
                stack.enter_context(only_writer(output))
            except BlockingIOError:
                raise RunError(
                    f"{output}: another process is writing to this run; wait for it, or choose another folder"
                ) from None
            except OSError as error:
                raise RunError(
                    f"{output}: {error.strerror or error}, expected a folder to write to"
                ) from None
        yield


def _begin(config: RunConfig, output: Path) -> None:
    """Make a folder that of a run; the first process does so for all."""
    if not _is_first_rank():
        return
    present = [n for n in (CONFIG, HISTORY, CHECKPOINT, MODEL, RESULT) if os.path.lexists(output / n)]
    if present and CONFIG not in present:
        raise RunError(f"{output} already holds {', '.join(present)}; choose another folder")
    try:
        # Whoever makes this file has the folder, and whoever sees it sees all of it.
        with created(output / CONFIG) as partial:
            write_config(_from_anywhere(config), partial)
    except FileExistsError:
        raise RunError(f"{output} already holds a run; resume it, or choose another folder") from None
    except OSError as error:
        raise RunError(f"{output}: {error.strerror or error}, expected a folder to write to") from None


def _is_first_rank() -> bool:
    """Whether this process is the first of all, which is told by Lightning before it has a trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _config(output: Path, **settings: Any) -> RunConfig:
    if not (output / CONFIG).exists():
        raise RunError(f"{output}: expected the folder of a run, with {CONFIG} in it")
    return read_whole_config(output / CONFIG, **settings)


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
    trainer: pl.Trainer, module: GatedClassifier, output: Path, restored: _Restored | None
) -> dict[str, Any]:
    started = time.monotonic()
    config = module.config
    threads = config.threads or suitable_threads(
        module.network,
        module.cost.dense * config.batch_of_a_device,
        trainer.strategy.root_device,
        config.devices,
    )
    going_on = restored.into(trainer) if restored else nullcontext()
    with _quiet(), _written_to(output), using_threads(threads), going_on:
        try:
            path = restored.path if restored else None
            trainer.fit(module, DataModule(config, module.data), ckpt_path=path)
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
        weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        write_tensors(weights, output / MODEL)
        _write_json({**result, _CHECKSUM: _checksum(result)}, output / RESULT)
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


class _Restored(Callback):
    """A checkpoint to go on from, whose state is seen to be whole before the first step.

    Lightning takes parts that are missing for new ones, and an optimizer takes state of any shape.

    Args:
        path: the checkpoint.

    Attributes:
        config: the settings that the run began with.

    Raises:
        RunError: if it cannot be read, or a part is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started = False
        try:
            checkpoint = read_checkpoint(path)
        except ValueError as error:
            raise RunError(error) from None
        missing = [part for part in self._PARTS if not isinstance(checkpoint.get(part), self._PARTS[part])]
        if missing:
            raise self._error(f"one without {', '.join(missing)}")
        self.config: dict[str, Any] = checkpoint["config"]
        self._epochs: int = checkpoint["epoch"] + 1
        self._steps: int = checkpoint["global_step"]
        self._history: list[Any] = checkpoint["history"]
        self._names: list[str] = list(checkpoint)

    _PARTS = {
        "callbacks": dict,
        "config": dict,
        "epoch": int,
        "global_step": int,
        "history": list,
        "loops": dict,
        "lr_schedulers": list,
        "optimizer_states": list,
        "state_dict": dict,
    }

    def _error(self, received: str) -> RunError:
        return RunError(f"{self.path}: expected the state of this run, received {received}")

    @contextmanager
    def into(self, trainer: pl.Trainer) -> Iterator[None]:
        """Say in one line what keeps Lightning from going on from the checkpoint."""
        trainer.callbacks.append(self)  # type: ignore[attr-defined]
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (
            *(AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
            MisconfigurationException,
        ):
            if self._started:
                raise
            raise self._error("another") from None

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        plugin = trainer.precision_plugin
        if plugin.state_dict() and type(plugin).__qualname__ not in self._names:
            raise self._error(f"one without {type(plugin).__qualname__}")
        every = trainer.check_val_every_n_epoch
        assert every is not None
        if [epoch["epoch"] for epoch in self._history] != [*range(every, self._epochs + 1, every)]:
            raise self._error("the history of other epochs")

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Lightning has made the optimizers and not restored them yet.
        self._settings = _constants(trainer)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        steps = [trainer.global_step, *(each.scheduler.last_epoch for each in trainer.lr_scheduler_configs)]
        if trainer.current_epoch != self._epochs or set(steps) != {self._steps}:
            raise self._error("that of another step")
        if _constants(trainer) != self._settings:
            raise self._error("other settings of the optimizer")
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                # A step is skipped where gradients overflow in half precision.
                if group["momentum"] and trainer.precision != "16-mixed":
                    shapes = [_shape(optimizer.state[p].get("momentum_buffer")) for p in group["params"]]
                    if shapes != [p.shape for p in group["params"]]:
                        raise self._error("momenta of other shapes")
        self._started = True


def _constants(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Of each group of parameters, what training does not change."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [{**group, "params": len(group["params"]), "lr": "lr" in group} for group in groups]


def _shape(value: object) -> torch.Size | None:
    return value.shape if isinstance(value, torch.Tensor) else None


def _write_json(content: Any, path: Path) -> None:
    with replaced(path) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")


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
