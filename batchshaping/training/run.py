"""A run and its folder: train, go on after an interruption, evaluate.

A folder contains

========================== ==========================================================================
``config.yaml``            every setting, from which the run can be repeated
``history.json``           metrics of each epoch
``teacher.safetensors``    the teacher, if there is one
``checkpoint.safetensors`` the state at the end of the last epoch, from which the run goes on
``model.safetensors``      the trained weights
``result.json``            everything that the report shows
``logs``                   losses and accuracies step by step
========================== ==========================================================================

Each file is written as a whole or not at all, and by one process at a time. Configuration, checkpoint,
weights and result have a checksum, so that a file that was cut off or changed is refused and never gives
another result. Files of earlier versions without a checksum are read as they are.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

import batchshaping
from batchshaping.gates.cost import MultiplyAdds
from batchshaping.storage.files import created, only_writer
from batchshaping.training.checkpoints import read_checkpoint, write_weights
from batchshaping.training.config import RunConfig, write_config
from batchshaping.training.data import Data, DataError, load_data
from batchshaping.training.evaluation import evaluate
from batchshaping.training.folder import (
    CONFIG,
    MODEL,
    RESULT,
    RunError,
    read_result,
    read_run_config,
    trained_network,
    write_result,
)
from batchshaping.training.module import DataModule, GatedClassifier
from batchshaping.training.objective import Objective
from batchshaping.training.recalibration import recalibrate
from batchshaping.training.start import Start, from_anywhere
from batchshaping.training.teacher import Teacher
from batchshaping.training.threads import suitable_threads, using_threads
from batchshaping.training.trainer import CHECKPOINT, HISTORY, make_trainer, silenced

__all__ = [
    "RunError",
    "evaluate_run",
    "load_run",
    "make_classifier",
    "make_data_module",
    "read_result",
    "resume",
    "train",
]

TEACHER = "teacher.safetensors"
"""Name of the file with the teacher."""


def train(config: RunConfig, output: Path, *, progress: bool = False) -> dict[str, Any]:
    """Train a network and evaluate it.

    Args:
        config: the configuration.
        output: the folder of the run, made if it does not exist; see above for the files in it.
        progress: whether to show a progress bar.

    Returns:
        The result, as in ``result.json``. Ranks other than the first get an empty one.

    Raises:
        RunError: if the folder contains a run already, or another process is writing to it.
        DataError: if the data cannot be used.
        ValueError: if the budget cannot be met, if the weights to start from cannot be had or do not fit, or
            if the machine has no such devices.
    """
    start = Start.of(config)
    data = load_data(config.data)
    teacher = Teacher.of(config, data, start)
    sums = {"start_sha256": start and start.sha256, "teacher_sha256": teacher and teacher.sha256}
    config = config.model_copy(update=sums)
    training = _Training.of(config, data, output, progress, start, teacher)
    with _held(output):
        _begin(config, output)
        return training.fit()


def resume(output: Path, *, progress: bool = False, **settings: Any) -> dict[str, Any]:
    """Go on with an interrupted run, to the result that it would have had without the interruption.

    Args:
        output: the folder of the run.
        progress: whether to show a progress bar.
        settings: replace those of the run; only those in :data:`~batchshaping.training.config.MAY_CHANGE`.

    Returns:
        The result, as in ``result.json``; if the run is finished, without training.

    Raises:
        RunError: if the folder contains no run, a file that was cut off or changed, or the state of another
            run; if another process is writing to it; or if other settings are given.
        ValueError: if ``config.yaml`` was cut off or changed, or does not have every setting.
    """
    config = read_run_config(output, **settings)
    _refuse_changes(config, read_run_config(output).model_dump(mode="json"), output)
    # A broken link counts as a file that cannot be read, not as one that is not there yet.
    if os.path.lexists(output / RESULT):
        result = read_result(output)
        _refuse_changes(config, result["config"], output)
        return result
    with _held(output):
        restored = _Restored(output / CHECKPOINT) if os.path.lexists(output / CHECKPOINT) else None
        if restored is not None:
            _refuse_changes(config, restored.config, output)
        start = Start.of(config) if restored is None else None
        data = load_data(config.data)
        teacher = _kept_teacher(config, data, output, start)
        return _Training.of(config, data, output, progress, start, teacher).fit(restored)


def evaluate_run(output: Path, **settings: Any) -> dict[str, Any]:
    """Evaluate the trained network of a run on its test images.

    Args:
        output: the folder of the run.
        settings: replace those of the run, such as ``data_folder`` or ``threads``.

    Returns:
        The metrics of :func:`~batchshaping.training.evaluation.evaluate`.

    Raises:
        RunError: if the folder contains no trained network.
        DataError: if the data cannot be used.
    """
    return evaluate(*load_run(output, **settings), threads=read_run_config(output, **settings).threads)


def load_run(output: Path, **settings: Any) -> tuple[nn.Module, Data]:
    """The trained network of a run, in evaluation mode, and its data.

    Args:
        output: the folder of the run.
        settings: replace those of the run, such as ``data_folder``.

    Raises:
        RunError: if the folder contains no trained network.
        DataError: if the data cannot be used.
    """
    data = load_data(read_run_config(output, **settings).data)
    return trained_network(output, len(data.classes), data.shape, **settings), data


def _kept_teacher(config: RunConfig, data: Data, output: Path, start: Start | None) -> Teacher | None:
    """The teacher with which a run began."""
    if config.teaching.teacher_sha256 is None:
        return None
    if os.path.lexists(output / TEACHER):
        try:
            return Teacher.read(output / TEACHER, config, data)
        except (OSError, ValueError) as error:
            raise RunError(f"{output / TEACHER}: {error}") from None
    return Teacher.of(config, data, start)


def _from_anywhere(config: RunConfig) -> RunConfig:
    """The same configuration with absolute paths."""
    folder, start, teacher = config.data.data_folder, config.optimization.start, config.teaching.teacher
    update: dict[str, Any] = {} if folder is None else {"data_folder": folder.resolve()}
    if start is not None:
        update["start"] = from_anywhere(start)
    if teacher not in (None, "start"):
        update["teacher"] = str(Path(teacher).resolve())
    return config.model_copy(update=update)


def _refuse_changes(config: RunConfig, began_with: dict[str, Any], output: Path) -> None:
    changed = config.differing(began_with)
    if changed:
        raise RunError(
            f"{output / CONFIG}: {', '.join(changed)} must be what the run began with, received others"
        )


@contextmanager
def _held(output: Path) -> Iterator[None]:
    """Make a folder if it does not exist, and keep other runs from writing to it.

    The first rank does so for all.
    """
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
    """Write the configuration, with which a folder becomes that of a run; the first rank does so for all."""
    if not _is_first_rank():
        return
    present = [n for n in (CONFIG, HISTORY, CHECKPOINT, MODEL, RESULT) if os.path.lexists(output / n)]
    if present and CONFIG not in present:
        raise RunError(f"{output} already holds {', '.join(present)}; choose another folder")
    try:
        # The process that creates this file has the folder, and the file appears as a whole.
        with created(output / CONFIG) as partial:
            write_config(_from_anywhere(config), partial)
    except FileExistsError:
        raise RunError(f"{output} already holds a run; resume it, or choose another folder") from None
    except OSError as error:
        raise RunError(f"{output}: {error.strerror or error}, expected a folder to write to") from None


def _is_first_rank() -> bool:
    """Whether this process is the first rank, which Lightning knows before there is a trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0


def make_classifier(
    config: RunConfig, data: Data, start: Start | None = None, teacher: Teacher | None = None
) -> GatedClassifier:
    """What a configuration trains: network, cost and objective; PyTorch's generator is seeded for it.

    Args:
        config: the configuration.
        data: the data set.
        start: the weights to start from; with none, they are random.
        teacher: the network whose outputs are learned, if any.

    Raises:
        ValueError: if the budget cannot be met, or the weights to start from do not fit.
    """
    torch.manual_seed(config.optimization.seed)
    network = config.network.build(len(data.classes), data.shape, start)
    if config.machine.channels_last:
        _refuse_channels_last(network)
        network = network.to(memory_format=torch.channels_last)
    cost = MultiplyAdds.measure(network, torch.zeros(1, *data.shape))
    gates = sum(cost.widths.values())
    objective = Objective(config.objective, across_ranks=config.machine.processes > 1, gates=gates)
    return GatedClassifier(network, cost, objective, config.optimization, data, teacher)


def _refuse_channels_last(network: nn.Module) -> None:
    # For such layers, torch 2.14 on the CPU writes out of bounds.
    for name, layer in network.named_modules():
        pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride != (1, 1)
        if pointwise and layer.in_channels == 4:
            raise ValueError(f"channels_last needs other than 4 channels in {name}, received {layer}")


def make_data_module(config: RunConfig, data: Data, teacher: Teacher | None = None) -> DataModule:
    """The batches in which a configuration trains.

    Args:
        config: the configuration.
        data: the data set.
        teacher: the network whose outputs are learned, if any.

    Raises:
        DataError: if there are fewer training images than in a batch.
    """
    batch_size, images = config.optimization.batch_size, len(data.train)
    if images < batch_size:
        raise DataError(
            f"batch_size must be at most the number of training images, {images}, received {batch_size}"
        )
    size, seed = config.batch_of_a_device, config.optimization.seed
    return DataModule(data, config.data, size, seed, teacher, config.machine.memory_format)


@dataclass(frozen=True)
class _Training:
    """A training that is about to start."""

    config: RunConfig
    module: GatedClassifier
    batches: DataModule
    trainer: pl.Trainer
    output: Path

    @classmethod
    def of(
        cls,
        config: RunConfig,
        data: Data,
        output: Path,
        progress: bool,
        start: Start | None,
        teacher: Teacher | None,
    ) -> _Training:
        batches = make_data_module(config, data, teacher)
        module = make_classifier(config, data, start, teacher)
        return cls(config, module, batches, make_trainer(config, output, progress), output)

    def fit(self, restored: _Restored | None = None) -> dict[str, Any]:
        """Train to the end, from the start or from a checkpoint, and write weights and result.

        Returns:
            The result. Ranks other than the first get an empty one.
        """
        started = time.monotonic()
        threads = self._threads()
        going_on = restored.into(self.trainer) if restored else nullcontext()
        with silenced(), _written_to(self.output), using_threads(threads), going_on:
            try:
                self._keep_teacher()
                path = restored.path if restored else None
                self.trainer.fit(self.module, self.batches, ckpt_path=path)
            except SystemExit:  # raised by Lightning when the training was interrupted
                if not self.trainer.interrupted:
                    raise
        if self.trainer.interrupted:
            raise KeyboardInterrupt
        if self.trainer.global_rank > 0:
            return {}
        result = self._result(threads, started)
        with _written_to(self.output):
            write_weights(self.module.network, self.output / MODEL)
            write_result(result, self.output)
        return result

    def _keep_teacher(self) -> None:
        """Write the teacher to the folder, so that the run can go on without the one it came from."""
        teacher = self.module.teacher
        if teacher is not None and self.trainer.is_global_zero and not (self.output / TEACHER).exists():
            teacher.write(self.output / TEACHER)

    def _threads(self) -> int:
        return self.config.machine.threads or suitable_threads(
            self.module.network,
            self.module.cost.dense * self.config.batch_of_a_device,
            self.trainer.strategy.root_device,
            self.config.machine.devices,
        )

    def _result(self, threads: int, started: float) -> dict[str, Any]:
        config, data = self.config, self.module.data
        # Lightning moves the network to the CPU after training; it is evaluated where it was trained.
        device = self.trainer.strategy.root_device
        dtype = torch.float64 if config.machine.precision == "64" else torch.float32
        network = self.module.network.to(device, dtype).to(memory_format=torch.contiguous_format)
        if config.optimization.recalibrate and self.module.cost.widths:
            torch.manual_seed(config.optimization.seed)  # for the augmentation
            settings = config.data
            recalibrate(network, data, config.batch_of_a_device, settings.augment, settings.workers)
        metrics = evaluate(
            network, data, workers=config.data.workers, device=device, threads=config.machine.threads
        )
        return {
            "kind": config.network.kind,
            "reference": {"name": config.network.reference, "multiply_adds": self.module.cost.dense},
            "config": config.model_dump(mode="json"),
            "versions": {
                "batchshaping": batchshaping.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "threads": threads,
            "classes": list(data.classes),
            "seconds": round(time.monotonic() - started, 1),
            **metrics,
            **config.network.findings(network, data, metrics),
            "priors": self.module.objective.learned_priors(),
            "teacher": None if self.module.teacher is None else self._taught_by(self.module.teacher, device),
            "history": self.module.history,
        }

    def _taught_by(self, teacher: Teacher, device: torch.device) -> dict[str, Any]:
        """What a report tells of the teacher."""
        network, machine = teacher.network.to(device, torch.float32), self.config.machine
        workers = self.config.data.workers
        metrics = evaluate(network, self.module.data, workers=workers, device=device, threads=machine.threads)
        return {name: metrics[name] for name in ("accuracy", "multiply_adds", "loss")}


class _Restored(Callback):
    """A checkpoint to go on from, checked to be complete before the first step.

    Lightning itself replaces missing parts by new ones, and an optimizer accepts state of any shape.

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
        """Turn the errors of Lightning at restoring the checkpoint into one line."""
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
        # Lightning has made the optimizers, and has not restored them yet.
        self._settings = _constants(trainer)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        steps = [trainer.global_step, *(each.scheduler.last_epoch for each in trainer.lr_scheduler_configs)]
        if trainer.current_epoch != self._epochs or set(steps) != {self._steps}:
            raise self._error("that of another step")
        if _constants(trainer) != self._settings:
            raise self._error("other settings of the optimizer")
        # In half precision, steps whose gradients overflow are skipped.
        if trainer.precision != "16-mixed":
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    for name in _momenta(group):
                        shapes = [_shape(optimizer.state[p].get(name)) for p in group["params"]]
                        if shapes != [p.shape for p in group["params"]]:
                            raise self._error("momenta of other shapes")
        self._started = True


def _constants(trainer: pl.Trainer) -> str:
    """What training does not change, of each group of parameters, as the JSON of a file has it."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    constants = [{**group, "params": len(group["params"]), "lr": "lr" in group} for group in groups]
    return json.dumps(constants, sort_keys=True)


def _momenta(group: dict[str, Any]) -> tuple[str, ...]:
    """The names of what the optimizer of a group keeps for each parameter, in its shape."""
    if "betas" in group:
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if group["momentum"] else ()


def _shape(value: object) -> torch.Size | None:
    return value.shape if isinstance(value, torch.Tensor) else None


@contextmanager
def _written_to(output: Path) -> Iterator[None]:
    """Turn the errors of writing to the folder into one line."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{output}: {error.strerror or error}; the run can be resumed") from None
