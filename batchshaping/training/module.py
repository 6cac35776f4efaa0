"""What Lightning trains: the network, its objective, its optimizer, and what is remembered of each epoch."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from batchshaping.batch_shaping_loss import batch_shaping
from batchshaping.channel_gating.blocks import gate_resnet
from batchshaping.channel_gating.multiply_adds import MultiplyAdds
from batchshaping.channel_gating.resnets import SmallImageResNet
from batchshaping.gates import (
    Gate,
    gate_decisions,
    gate_probabilities,
    l0_penalty,
    straight_through_decisions,
)
from batchshaping.priors import Beta
from batchshaping.training.config import SMALL_IMAGE_NETWORKS, RunConfig
from batchshaping.training.data import Batch, Data, Images, batches, shift_and_flip
from batchshaping.training.evaluation import Evaluation
from batchshaping.training.schedules import Cosine, Ramp, Schedule, Steps

__all__ = ["DataModule", "GatedClassifier", "make_network"]


def make_network(config: RunConfig, classes: int, channels: int) -> nn.Module:
    """The network that a configuration names, gated if it says so.

    Args:
        config: the configuration.
        classes: number of outputs.
        channels: channels of the images.

    Example:
        >>> network = make_network(RunConfig(network="resnet8", width=8), classes=10, channels=1)
        >>> network(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    network: nn.Module
    if config.network in SMALL_IMAGE_NETWORKS:
        depth = SMALL_IMAGE_NETWORKS[config.network]
        network = SmallImageResNet(depth, classes, channels, config.width, config.stem_stride)
    else:
        from torchvision.models import get_model

        try:
            resnet = get_model(config.network, weights="DEFAULT" if config.pretrained else None)
        except OSError as error:
            raise ValueError(f"pretrained: the download of the weights failed: {error}") from None
        if channels != resnet.conv1.in_channels:
            first = resnet.conv1
            resnet.conv1 = nn.Conv2d(
                channels, first.out_channels, first.kernel_size, first.stride, first.padding, bias=False
            )
        if resnet.fc.out_features != classes:
            resnet.fc = nn.Linear(resnet.fc.in_features, classes)
        network = resnet
    return gate_resnet(network, config.hidden, config.gate_bias) if config.gated else network


class GatedClassifier(pl.LightningModule):
    """A network that is trained to classify, and its gates to be conditional and few.

    Args:
        config: every setting.
        data: the data set.

    Attributes:
        history: what there is to tell of each epoch, in what JSON has; part of every checkpoint.
    """

    def __init__(self, config: RunConfig, data: Data) -> None:
        super().__init__()
        self.config = config
        self.data = data
        self.network = make_network(config, len(data.classes), data.shape[0])
        self._gates = [module for module in self.network.modules() if isinstance(module, Gate)]
        self.cost = MultiplyAdds(self.network, torch.zeros(1, *data.shape))
        least = self.cost.fixed / self.cost.dense
        if config.gated and config.penalized == "multiply-adds" and 0 < config.budget < least:
            raise ValueError(
                f"budget must be 0 or at least {least:.3g}, the share of the multiply-adds that no gate can "
                f"save, received {config.budget}"
            )
        self.prior = Beta(*config.prior)
        self.gamma = Ramp(config.shaping, 0.0, 0.0, config.shaping_end)
        self.lambda_ = Ramp(0.0, config.penalty, config.penalty_begin, config.penalty_end)
        self.noise = Ramp(1.0, 1.0 if config.noise_end is None else 0.0, 0.0, config.noise_end or 1.0)
        self.history: list[dict[str, Any]] = []
        self._evaluation: Evaluation | None = None
        self._loss = torch.zeros(())

    @property
    def progress(self) -> float:
        """The share of training that is done."""
        return self.global_step / self.trainer.estimated_stepping_batches

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)  # type: ignore[no-any-return]

    def on_train_epoch_start(self) -> None:
        # All chance in an epoch follows from this, so that a run can go on from the end of any epoch.
        torch.manual_seed(_seed(self.config.seed, self.current_epoch, self.global_rank))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        noise = self.noise(self.progress)
        for gate in self._gates:
            gate.noise.fill_(noise)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.network(images)
        parts = {"cross_entropy": F.cross_entropy(logits, labels)}
        if self.config.gated:
            parts |= self._gate_terms()
        loss = torch.stack([*parts.values()]).sum()
        self._loss = loss.detach()
        # Not at every step: for a small network, telling costs as much as computing.
        if (self.global_step + 1) % self.config.log_every == 0:
            self.log_dict(
                {"loss": loss.detach(), **{n: p.detach() for n, p in parts.items()}}, sync_dist=True
            )
            accuracy = (logits.argmax(dim=1) == labels).float().mean()
            shown = {"accuracy": accuracy, "open": self._open(), "MMACs": self._spent() / 1e6}
            self.log_dict(shown, prog_bar=True, sync_dist=True)
        return loss

    def _gate_terms(self) -> dict[str, Tensor]:
        """What the objective adds to the cross-entropy."""
        gamma, lambda_ = self.gamma(self.progress), self.lambda_(self.progress)
        terms = {}
        if gamma > 0:
            shape = partial(batch_shaping, prior=self.prior, dim=0)
            if self.trainer.world_size > 1:
                shape = partial(shape, group="world")
            shaping = [shape(p) for p in gate_probabilities(self.network)]
            terms["batch_shaping"] = gamma * torch.stack(shaping).sum()
        if lambda_ > 0:
            # What was spent, not what would be expected under the full noise: that would let the network end
            # above its budget once the noise is gone.
            cost = _COSTS[self.config.penalized](self, straight_through_decisions(self.network))
            # All ranks together are above the budget or not, as one process would be.
            above = self.trainer.strategy.reduce(cost.detach(), reduce_op="mean") - self.config.budget
            terms["penalty"] = lambda_ * (above > 0) * (cost - self.config.budget)
        return terms

    def _multiply_adds(self, gates: list[Tensor]) -> Tensor:
        return self.cost.per_example(gates).mean() / self.cost.dense

    def _open_gates(self, gates: list[Tensor]) -> Tensor:
        return l0_penalty(gates)

    @torch.no_grad()
    def _spent(self) -> Tensor:
        return self.cost.per_example(gate_decisions(self.network) if self.config.gated else []).mean()

    @torch.no_grad()
    def _open(self) -> Tensor:
        return l0_penalty(gate_decisions(self.network)) if self.config.gated else torch.ones(())

    def on_train_epoch_end(self) -> None:
        self._refuse_divergence()
        self.log("threads", float(torch.get_num_threads()), rank_zero_only=True)

    def _refuse_divergence(self) -> None:
        # Once an epoch, since reading a number makes a device wait.
        if not self._loss.isfinite():
            raise ValueError(
                f"learning_rate: the loss became {self._loss.item()} in epoch {self.current_epoch + 1}; "
                f"a lower one than {self.config.learning_rate} may keep it finite"
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
        self._evaluation.reduce(self._add_up)
        summary = self._evaluation.summary()
        self.log("test_accuracy", summary["accuracy"], prog_bar=True, rank_zero_only=True)
        self.log("test_MMACs", summary["multiply_adds"] / 1e6, prog_bar=True, rank_zero_only=True)
        self.history.append(
            {
                "epoch": self.current_epoch + 1,
                "shaping": self.gamma(self.progress),
                "penalty": self.lambda_(self.progress),
                "noise": self.noise(self.progress),
                **summary,
            }
        )

    def _add_up(self, sums: Tensor) -> Tensor:
        added = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        return added.to(sums)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = self.history
        checkpoint["config"] = self.config.model_dump(mode="json")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = checkpoint["history"]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        config = self.config
        gates = [parameter for gate in self._gates for parameter in gate.parameters()]
        in_gates = set(gates)
        groups = [
            {
                "params": [p for p in self.network.parameters() if p not in in_gates],
                "lr": config.learning_rate,
                "weight_decay": config.weight_decay,
            },
            {"params": gates, "lr": config.gate_learning_rate, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0)
        schedules: dict[str, Schedule] = {"steps": Steps(config.milestones), "cosine": Cosine()}
        schedule = schedules[config.schedule]
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


_COSTS = {
    "multiply-adds": GatedClassifier._multiply_adds,
    "open-gates": GatedClassifier._open_gates,
}


class DataModule(pl.LightningDataModule):
    """Gives each rank its part of every batch.

    Args:
        config: every setting.
        data: the data set.
    """

    def __init__(self, config: RunConfig, data: Data) -> None:
        super().__init__()
        self.config = config
        self.data = data

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer = _trainer(self)
        sampler: DistributedSampler[Batch] = DistributedSampler(
            self.data.train,  # type: ignore[arg-type]
            trainer.world_size,
            trainer.global_rank,
            seed=self.config.seed,
            drop_last=True,
        )
        sampler.set_epoch(trainer.current_epoch)
        return self._loader(self.data.train, sampler)

    def val_dataloader(self) -> DataLoader[Batch]:
        trainer = _trainer(self)
        own = range(trainer.global_rank, len(self.data.test), trainer.world_size)
        return self._loader(self.data.test, own)

    def _loader(self, images: Images, sampler: Any) -> DataLoader[Batch]:
        trainer = _trainer(self)
        seed = _seed(self.config.seed, trainer.current_epoch, trainer.global_rank)
        training = isinstance(sampler, DistributedSampler)
        return batches(
            images,
            self.config.batch_of_a_device,
            seed=seed,  # what workers draw follows from the epoch too
            sampler=sampler,
            drop_last=training,
            num_workers=self.config.workers,
            pin_memory=torch.cuda.is_available(),
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        images, labels = batch
        trainer = _trainer(self)
        if trainer.training and self.config.augment and (self.data.padding or self.data.flip):
            images = shift_and_flip(images, self.data.padding, self.data.flip)
        return self.data.normalize(images).to(trainer.lightning_module.dtype), labels


def _trainer(module: DataModule) -> pl.Trainer:
    assert module.trainer is not None
    return module.trainer


def _seed(*numbers: int) -> int:
    """One seed from several numbers, such that close ones have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
