"""What Lightning trains: a network and its objective, with their optimizer, and the data in batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from batchshaping.gates.cost import MultiplyAdds
from batchshaping.gates.gate import Gate, gate_decisions, gate_probabilities, straight_through_decisions
from batchshaping.gates.summary import l0_penalty
from batchshaping.training.config import RunConfig
from batchshaping.training.data import Batch, Data, Images, batches
from batchshaping.training.evaluation import Evaluation
from batchshaping.training.objective import Objective
from batchshaping.training.schedules import Cosine, Schedule, Steps
from batchshaping.training.sections import DataSettings, OptimizationSettings
from batchshaping.training.teacher import TaughtImages, Teacher

__all__ = ["DataModule", "GatedClassifier", "make_network"]


def make_network(config: RunConfig, classes: int, channels: int) -> nn.Module:
    """The network of a configuration, for images of any size that it takes.

    Args:
        config: the configuration.
        classes: number of outputs.
        channels: number of channels of the images.

    Example:
        >>> network = make_network(RunConfig(network="resnet8", width=8), classes=10, channels=1)
        >>> network(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    size = config.data.image_size
    return config.network.build(classes, (channels, size, size))


class GatedClassifier(pl.LightningModule):
    """A network that is trained to classify images; its gates, if it has any, to meet an objective.

    Args:
        network: gives logits of images. It may have gates.
        cost: its multiply-adds.
        objective: maps the gates' probabilities, the costs and the progress of training to losses by their
            names, and gives the scale of the gates' noise. Its parameters are trained with the gates'.
        optimization: how the weights are trained.
        data: the data set.
        teacher: a network whose outputs are learned beside the labels, if any. It is no part of checkpoints.

    Attributes:
        history: metrics of each epoch, which can be written as JSON. They are part of every checkpoint.

    Raises:
        ValueError: in one line, if the budget of the objective is less than what the network costs with all
            gates closed.
    """

    def __init__(
        self,
        network: nn.Module,
        cost: MultiplyAdds,
        objective: Objective,
        optimization: OptimizationSettings,
        data: Data,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.cost = cost
        self.objective = objective
        self.optimization = optimization
        self.data = data
        self.teacher = teacher
        self._gates = [module for module in network.modules() if isinstance(module, Gate)]
        if self._gates:
            objective.check_budget(cost.fixed / cost.dense)
        self.history: list[dict[str, Any]] = []
        self._evaluation: Evaluation | None = None
        self._loss = torch.zeros(())

    @property
    def progress(self) -> float:
        """Share of training that is done, in [0, 1]."""
        return self.global_step / self.trainer.estimated_stepping_batches

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)  # type: ignore[no-any-return]

    def on_train_epoch_start(self) -> None:
        # All random numbers of an epoch follow from this, so that a run can go on from the end of any epoch.
        torch.manual_seed(_seed(self.optimization.seed, self.current_epoch, self.global_rank))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        noise = self.objective.noise(self.progress)
        for gate in self._gates:
            gate.noise.fill_(noise)

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.network.to(self.device, next(self.network.parameters()).dtype)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels, *taught = batch  # the outputs of a teacher, where they are known before
        logits = self.network(images)
        if self.teacher is None:
            losses = {"cross_entropy": F.cross_entropy(logits, labels)}
        else:
            losses = self.teacher.losses(logits, labels, *taught or [self.teacher.logits(images)])
        if self._gates:
            losses |= self.objective(gate_probabilities(self.network), self._cost, self.progress)
        loss = torch.stack([*losses.values()]).sum()
        self._loss = loss.detach()
        # Not at every step, since for a small network the log takes as long as the step itself.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            self.log_dict(
                {"loss": loss.detach(), **{n: p.detach() for n, p in losses.items()}}, sync_dist=True
            )
            accuracy = (logits.argmax(dim=1) == labels).float().mean()
            shown = {"accuracy": accuracy, "open": self._open(), "MMACs": self._spent() / 1e6}
            self.log_dict(shown, prog_bar=True, sync_dist=True)
        return loss

    def _cost(self, name: str) -> Tensor:
        """A cost of the last batch, as a share of the cost with all gates open."""
        return _COSTS[name](self.cost, straight_through_decisions(self.network))

    @torch.no_grad()
    def _spent(self) -> Tensor:
        """Mean multiply-adds of an image of the last batch."""
        return self.cost.per_example(gate_decisions(self.network) if self._gates else []).mean()

    @torch.no_grad()
    def _open(self) -> Tensor:
        """Share of gates that were open for the last batch."""
        return l0_penalty(gate_decisions(self.network)) if self._gates else torch.ones(())

    def on_train_epoch_end(self) -> None:
        self._refuse_divergence()
        self.log("threads", float(torch.get_num_threads()), rank_zero_only=True)

    def _refuse_divergence(self) -> None:
        # Once in an epoch, since to read a number is to wait for the device.
        if not self._loss.isfinite():
            raise ValueError(
                f"learning_rate: the loss became {self._loss.item()} in epoch {self.current_epoch + 1}; "
                f"a lower one than {self.optimization.learning_rate} may keep it finite"
            )

    def on_validation_epoch_start(self) -> None:
        self._refuse_divergence()
        self._evaluation = Evaluation(self.network, self.cost, self.data.classes)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        assert self._evaluation is not None
        self._evaluation.update(self.network, self.network(images), labels)

    def on_validation_epoch_end(self) -> None:
        assert self._evaluation is not None
        self._evaluation.reduce(self._sum_over_ranks)
        summary = self._evaluation.summary()
        self.log("test_accuracy", summary["accuracy"], prog_bar=True, rank_zero_only=True)
        self.log("test_MMACs", summary["multiply_adds"] / 1e6, prog_bar=True, rank_zero_only=True)
        weights = self.objective.weights(self.progress)
        self.history.append({"epoch": self.current_epoch + 1, **weights, **summary})

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        total = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        return total.to(sums)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = checkpoint["history"]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        settings = self.optimization
        gates = [parameter for gate in self._gates for parameter in gate.parameters()]
        in_gates = set(gates)
        groups = [
            {
                "params": [p for p in self.network.parameters() if p not in in_gates],
                "lr": settings.learning_rate,
                "weight_decay": settings.weight_decay,
            },
            {"params": gates, "lr": settings.gate_learning_rate, "weight_decay": 0.0},
        ]
        learned = [*self.objective.parameters()]
        if learned:  # without an empty group, optimizers of earlier versions can be restored
            rate = settings.prior_learning_rate or settings.gate_learning_rate
            groups.append({"params": learned, "lr": rate, "weight_decay": 0.0})
        optimizer = _OPTIMIZERS[settings.optimizer](groups, settings)
        schedules: dict[str, Schedule] = {"steps": Steps(settings.milestones), "cosine": Cosine()}
        schedule = schedules[settings.schedule]
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


_OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimizationSettings], torch.optim.Optimizer]] = {
    "sgd": lambda groups, settings: torch.optim.SGD(
        groups, momentum=settings.momentum, nesterov=settings.momentum > 0
    ),
    "adamw": lambda groups, settings: torch.optim.AdamW(groups),
}
_COSTS: dict[str, Callable[[MultiplyAdds, list[Tensor]], Tensor]] = {
    "multiply-adds": lambda cost, gates: cost.per_example(gates).mean() / cost.dense,
    "open-gates": lambda cost, gates: l0_penalty(gates),
}


class DataModule(pl.LightningDataModule):
    """Gives each rank its part of every batch.

    Args:
        data: the data set.
        settings: whether training images are augmented, and how many processes load them.
        batch_size: number of images in a batch of one rank; in evaluation, which keeps nothing for a
            gradient, there are four times as many.
        seed: seed of the order of the training images.
        teacher: a network whose outputs are learned, if any. They are computed once for each image where
            training images are not augmented.
        memory_format: order of the dimensions of a batch in memory.
    """

    def __init__(
        self,
        data: Data,
        settings: DataSettings,
        batch_size: int,
        seed: int,
        teacher: Teacher | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        self.data = data
        self.teacher = teacher
        self._train: Images | TaughtImages = data.train
        self.settings = settings
        self.batch_size = batch_size
        self.seed = seed
        self.memory_format = memory_format

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = _trainer(self)
        if self.teacher is not None and not self.settings.augment and self._train is self.data.train:
            precision = trainer.precision_plugin.forward_context()
            self._train = self.teacher.images(self.data.train, self.data, self.batch_size, precision)
        sampler: DistributedSampler[Batch] = DistributedSampler(
            self.data.train,  # type: ignore[arg-type]
            trainer.world_size,
            trainer.global_rank,
            seed=self.seed,
            drop_last=True,
        )
        sampler.set_epoch(trainer.current_epoch)
        return self._loader(self._train, self.batch_size, sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        trainer = _trainer(self)
        own = range(trainer.global_rank, len(self.data.test), trainer.world_size)
        return self._loader(self.data.test, 4 * self.batch_size, own, drop_last=False)

    def _loader(
        self, images: Images | TaughtImages, size: int, sampler: Any, drop_last: bool
    ) -> DataLoader[Any]:
        trainer = _trainer(self)
        return batches(
            images,
            size,
            # The epoch is in the seed, so that images are augmented differently in each.
            seed=_seed(self.seed, trainer.current_epoch, trainer.global_rank),
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.settings.workers,
            pin_memory=torch.cuda.is_available(),
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, ...]:
        images, *rest = batch
        trainer = _trainer(self)
        if trainer.training and self.settings.augment:
            images = self.data.augment(images)
        normalized = self.data.normalize(images).to(trainer.lightning_module.dtype)
        return normalized.contiguous(memory_format=self.memory_format), *rest


def _trainer(module: DataModule) -> pl.Trainer:
    assert module.trainer is not None
    return module.trainer


def _seed(*numbers: int) -> int:
    """One seed made of several numbers, unrelated to the seeds made of similar numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
