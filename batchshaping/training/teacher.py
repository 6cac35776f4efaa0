r"""A trained network that teaches another one: its outputs are learned beside the labels.

Its outputs say more than a label: which other classes an image resembles, and how sure one can be. A network
with gates learns from the one that it starts from to give the same outputs with less work.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchshaping.training.checkpoints import checksum, read_tensors, write_weights
from batchshaping.training.config import RunConfig
from batchshaping.training.data import Data, Images, batches
from batchshaping.training.folder import read_run_config, trained_network
from batchshaping.training.networks import Network, network_settings
from batchshaping.training.sections import TeacherSettings
from batchshaping.training.start import Start

__all__ = ["TaughtImages", "Teacher"]


class Teacher:
    r"""A frozen network, and what another network loses where its outputs differ from those of this one.

    With the logits z of a network that learns, those y of its teacher, the temperature t and the weight w of
    the teacher, the losses are

    .. math::
        (1 - w) \, \mathrm{CE}(z, \mathrm{label})
        \quad\text{and}\quad
        w \, t^2 \, \mathrm{KL}(\mathrm{softmax}(y / t) \,\|\, \mathrm{softmax}(z / t)),

    means over the batch. The gradient of the second is that of the cross-entropy on the softened outputs, and
    it is 0 where both networks agree. The factor :math:`t^2` keeps its size about the same for all
    temperatures (Hinton, Vinyals and Dean, 2015, https://arxiv.org/abs/1503.02531).

    Args:
        network: the network that teaches. Its parameters no longer require a gradient.
        section: the settings it was built from.
        settings: weight and temperature.

    Attributes:
        network: the network, in evaluation mode.

    Example:
        >>> from batchshaping.training.networks import network_settings
        >>> section = network_settings(network="resnet8", width=4, gated=False)
        >>> teacher = Teacher(section.build(10, (1, 8, 8)), section, TeacherSettings())
        >>> logits = teacher.logits(torch.randn(4, 1, 8, 8))
        >>> losses = teacher.losses(logits, torch.zeros(4, dtype=torch.long), logits)
        >>> list(losses), losses["distillation"].item() < 1e-6
        (['cross_entropy', 'distillation'], True)
    """

    def __init__(self, network: nn.Module, section: Network, settings: TeacherSettings) -> None:
        self.network = network.eval().requires_grad_(False)
        self._section = section
        self._weight, self._temperature = settings.teacher_weight, settings.teacher_temperature

    @classmethod
    def of(cls, config: RunConfig, data: Data, start: Start | None) -> Teacher | None:
        """The teacher that a configuration asks for, None if there is none.

        Args:
            config: the configuration.
            data: the data set.
            start: the weights that training starts from, if any.

        Raises:
            RunError: if the folder of the teacher contains no trained network for such images and classes.
            ValueError: in one line, if its checksum is not that of the configuration.
        """
        source = config.teaching.teacher
        if source is None:
            return None
        if source == "start":
            if start is None or not config.network.gated:
                return None
            section = config.network.model_copy(update={"gated": False})
            network = section.build(len(data.classes), data.shape)
            if not start.fits(network):
                return None
            start(network)
        else:
            section = read_run_config(Path(source)).network
            network = trained_network(Path(source), len(data.classes), data.shape)
        teacher, expected = cls(network, section, config.teaching), config.teaching.teacher_sha256
        if expected not in (None, teacher.sha256):
            raise ValueError(
                f"teacher must have weights of the checksum {expected}, received {source} with "
                f"{teacher.sha256}"
            )
        return teacher

    @cached_property
    def sha256(self) -> str:
        """Checksum of names, types, shapes and values of its weights."""
        return checksum(self.network.state_dict())

    def write(self, path: Path) -> None:
        """Write weights and settings, from which :meth:`read` makes it again.

        Raises:
            OSError: if the file cannot be written.
        """
        write_weights(self.network, path, json.dumps(self._section.model_dump(mode="json")))

    @classmethod
    def read(cls, path: Path, config: RunConfig, data: Data) -> Teacher:
        """What :meth:`write` wrote, if it is the teacher of a configuration.

        Args:
            path: the file.
            config: the configuration of the run, with the checksum of the teacher.
            data: the data set.

        Raises:
            OSError: if the file cannot be opened.
            ValueError: in one line, if it is not that teacher, or was changed.
        """
        try:
            weights, text = read_tensors(path)
            section = network_settings(**json.loads(text))
            network = section.build(len(data.classes), data.shape)
            network.load_state_dict(weights)
        except (LookupError, RuntimeError, TypeError, ValueError):
            weights = {}
        if checksum(weights) != config.teaching.teacher_sha256:
            raise ValueError(
                "expected the teacher that the run began with, whole and unchanged, received another"
            )
        return cls(network, section, config.teaching)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Its outputs, without a gradient."""
        logits: Tensor = self.network(images)
        return logits

    def losses(self, logits: Tensor, labels: Tensor, taught: Tensor) -> dict[str, Tensor]:
        """The weighted losses by their names.

        Args:
            logits: outputs of the network that learns, of shape (N, classes).
            labels: the classes of the images, of shape (N,).
            taught: outputs of the teacher for the same images.
        """
        t = self._temperature
        learned, softened = (F.log_softmax(z / t, dim=1, dtype=torch.float32) for z in (logits, taught))
        divergence = F.kl_div(learned, softened, reduction="batchmean", log_target=True)
        return {
            "cross_entropy": (1 - self._weight) * F.cross_entropy(logits, labels),
            "distillation": self._weight * t**2 * divergence,
        }

    def images(
        self, images: Images, data: Data, batch: int, precision: AbstractContextManager[Any]
    ) -> TaughtImages:
        """Images together with its outputs for them, which are computed once.

        Args:
            images: the images, which must be the same each time that they are asked for.
            data: the data set, which normalizes them.
            batch: number of images in a forward pass.
            precision: the context in which training computes.
        """
        first = next(self.network.parameters())
        with precision:
            logits = [
                self.logits(data.normalize(some, like=first)).cpu() for some, _ in batches(images, batch)
            ]
        return TaughtImages(images, torch.cat(logits))


@dataclass(frozen=True)
class TaughtImages:
    """Images with the outputs of a teacher: a batch is images, labels and these.

    Attributes:
        images: the images.
        logits: outputs of the teacher for each, of shape (N, classes).
    """

    images: Images
    logits: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        return *self.images.__getitems__(indices), self.logits[torch.as_tensor(indices)]
