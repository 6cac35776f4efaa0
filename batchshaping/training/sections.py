"""The sections of a configuration, each a value of its own.

They are data, objective, teacher, optimization and machine; the network has one for each family, in
``batchshaping.training.networks``. The name of a setting is unique over all sections, and is the same in
files and on the command line.
"""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from batchshaping.storage.files import quoted

__all__ = [
    "DATASETS",
    "Count",
    "DataSettings",
    "MachineSettings",
    "NotNegative",
    "ObjectiveSettings",
    "OptimizationSettings",
    "Positive",
    "Section",
    "Share",
    "TeacherSettings",
    "one_line",
    "one_of",
]

Share = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number greater than 0."""

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A finite number that is at least 0."""

Count = Annotated[int, Field(ge=1, le=10**9)]
"""A whole number that is at least 1."""

# At concentrations of 1e5 the standard deviation is 0.001, far narrower than any useful prior of a gate.
_Concentration = Annotated[float, Field(gt=0, le=100_000)]

DATASETS = (
    "digits",
    "fashion-mnist",
    "cifar10",
    "cifar100",
    "canvases",
    "canvases-centred",
    "forms",
    "idx",
    "folder",
)
"""Names of the data sets."""


class Section(BaseModel):
    """Settings that belong together: immutable, checked when they are made, with a description of each.

    Values may also be text, as a command line gives it: ``0.6,0.4`` for two numbers, ``none`` for no value.

    Attributes:
        heading: title of the section on the help page.

    Raises:
        ValueError: in one line, if a setting is unknown or out of range.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )

    heading: ClassVar[str]

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ValueError(one_line(error)) from None

    @classmethod
    def settings(cls) -> dict[str, FieldInfo]:
        """The fields by the names that the settings have in files and on the command line."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}

    @model_serializer(mode="wrap")
    def _by_setting(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        names = {field: name for name, field in zip(self.settings(), type(self).model_fields, strict=True)}
        return {names.get(field, field): value for field, value in serialize(self).items()}

    @field_validator("*", mode="before")
    @classmethod
    def _from_text(cls, value: object, info: ValidationInfo) -> object:
        assert info.field_name is not None
        expected = cls.model_fields[info.field_name].annotation
        items = value if isinstance(value, list | tuple) else [value]
        wrong = [item for item in items if isinstance(item, bool)]
        if wrong and expected is not bool:  # pydantic would read True as 1
            raise ValueError(f"must not be true or false, received {wrong[0]!r}")
        if value in ("none", "null") and NoneType in get_args(expected):
            return None
        kinds = [get_origin(kind) for kind in (expected, *get_args(expected))]
        if isinstance(value, str) and tuple in kinds:
            return tuple(value.split(","))
        return value


class DataSettings(Section):
    """Which images are loaded, and how.

    Example:
        >>> DataSettings(data="cifar10").name
        'cifar10'
    """

    heading = "Data"

    name: str = Field("digits", alias="data")
    """Data set: digits, fashion-mnist, cifar10, cifar100, canvases, canvases-centred, forms, or the files in
    the data folder: idx (the format of MNIST) or folder (a folder of images for each class)."""
    data_folder: Path | None = None
    """Folder of the data. By default, the folder of its package or download."""
    download: bool = False
    """Whether to download the data if it is missing."""
    image_size: Count = 224
    """Side in pixels to which the images of a folder are cropped."""
    train_images: Count | None = None
    """Number of training images to use. By default, all of them."""
    evaluate_on: Literal["test", "validation"] = "test"
    """Images on which the network is evaluated; validation images are for choosing settings."""
    augment: bool = True
    """Whether to shift training images at random, and to flip them where that keeps their class."""
    workers: Annotated[int, Field(ge=0, le=10**4)] = 0
    """Number of processes that load images. Data sets that fit in memory need none."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return one_of(DATASETS, name)


class ObjectiveSettings(Section):
    """The settings of the :class:`~batchshaping.training.objective.Objective` of the gates."""

    heading = "Gates: what the objective asks of them"

    budget: Share = 0.4
    """Share of the ungated network's multiply-adds (or of open gates) above which cost is penalized."""
    penalty: NotNegative = 3.0
    """Weight of the cost above the budget, at the end of its schedule."""
    penalty_begin: Share = 0.2
    """Share of training at which the weight of the penalty begins to rise from 0."""
    penalty_end: Share = 0.6
    """Share of training at which the weight of the penalty has risen to its value."""
    penalized: Literal["multiply-adds", "open-gates"] = "multiply-adds"
    """Cost that is penalized: the multiply-adds spent, or the share of open gates (L0)."""
    shaping: NotNegative = 0.75
    """Weight of the batch-shaping loss at the start of training. With 0, the loss is not used."""
    shaping_end: Annotated[float, Field(gt=0, le=1)] | None = 0.2
    """Share of training at which the weight of batch-shaping has fallen to 0; with none, it stays."""
    prior: tuple[_Concentration, _Concentration] = (0.6, 0.4)
    """The two concentrations of the Beta prior of each gate, where priors are not learned."""
    hyperprior: tuple[_Concentration, _Concentration] | None = None
    """The two concentrations of the Beta hyperprior of learned priors, one prior for each gate; its mean is
    the share of gates to be open. With none, priors are not learned."""
    hyperprior_weight: NotNegative = 0.2
    """Weight of the hyperprior in the batch-shaping loss with learned priors."""
    temperature_weight: NotNegative = 0.02
    """Weight of the temperatures in the batch-shaping loss with learned priors."""
    noise_end: Annotated[float, Field(gt=0, le=1)] | None = 0.7
    """Share of training at which the noise of the gates has fallen to 0. With none, the noise stays."""

    @model_validator(mode="after")
    def _in_order(self) -> ObjectiveSettings:
        if not self.penalty_begin < self.penalty_end:
            raise ValueError(
                "penalty_begin must be less than penalty_end, "
                f"received {self.penalty_begin} and {self.penalty_end}"
            )
        return self


class TeacherSettings(Section):
    """The settings of the :class:`~batchshaping.training.teacher.Teacher`."""

    heading = "Teacher: a trained network whose outputs the network learns"

    teacher: str | None = "start"
    """Trained network that teaches: the folder of a run; or start, with which a network with gates is taught
    by the one without gates that it starts from, if all its weights fit. With none, there is no teacher."""
    teacher_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Checksum that the weights of the teacher must have. A run writes it to its configuration."""
    teacher_weight: Share = 0.7
    """Weight of the outputs of the teacher; the labels have the rest."""
    teacher_temperature: Positive = 2.0
    """Temperature by which the outputs of both networks are divided, so that unlikely classes count more."""


class OptimizationSettings(Section):
    """How the weights are trained."""

    heading = "Optimization"

    start: str | None = None
    """Weights of the network without gates to start from: the folder of a run, a safetensors file, or
    torchvision:NAME or timm:NAME for those of a library. By default, training starts from random weights."""
    start_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Checksum that these weights must have. A run writes it to its configuration."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimizer: stochastic gradient descent with Nesterov momentum, or AdamW."""
    epochs: Count = 40
    """Number of passes over the training images."""
    batch_size: Count = 64
    """Number of images in a step, over all devices and accumulated batches."""
    accumulate: Count = 1
    """Number of batches whose gradients are added up in a step."""
    learning_rate: Positive = 0.1
    """Initial learning rate of everything but the gates."""
    gate_learning_rate: Positive = 0.1
    """Initial learning rate of the gates."""
    prior_learning_rate: Positive | None = None
    """Initial learning rate of learned priors. By default, that of the gates."""
    schedule: Literal["steps", "cosine"] = "steps"
    """How the learning rates fall: by a factor of 10 at each milestone, or as a half cosine to 0."""
    milestones: tuple[Share, ...] = (0.6, 0.75, 0.9)
    """Shares of training at which the learning rates fall by a factor of 10."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Nesterov momentum of stochastic gradient descent."""
    weight_decay: NotNegative = 5e-4
    """Weight decay of everything but the gates."""
    recalibrate: bool = True
    """Whether a network with gates takes the statistics of its batch normalization anew at the end of
    training, with its gates as in evaluation."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the initial weights, the order of the images, their augmentation and the noise of the gates."""


class MachineSettings(Section):
    """Where a run is computed, and what it logs."""

    heading = "Machine and log"

    accelerator: str = "auto"
    """Accelerator: cpu, gpu, auto or another one that Lightning knows."""
    devices: Count = 1
    """Number of devices of each node; on the CPU, number of processes."""
    nodes: Count = 1
    """Number of nodes."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Number of threads of each process on the CPU. By default, one for small layers, more for large ones."""
    precision: Literal["32", "16-mixed", "bf16-mixed", "64"] = "32"
    """Floating-point precision of the computation."""
    channels_last: bool = False
    """Whether images and layers have their channels in the last dimension in memory, which is faster for
    convolutions of many channels. Results differ by rounding."""
    sync_batch_norm: bool = False
    """Whether batch normalization uses the statistics of the batch of all devices."""
    evaluate_every: Count = 1
    """Number of epochs between two evaluations on the test images."""
    logger: Literal["csv", "tensorboard", "none"] = "csv"
    """Format of the log of the training steps."""
    log_every: Count = 10
    """Number of steps between two entries of the log."""

    @property
    def memory_format(self) -> torch.memory_format:
        """Order of the dimensions of images in memory."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def processes(self) -> int:
        """Number of processes that train together."""
        return self.devices * self.nodes

    @field_validator("precision", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        """The precision as text, since YAML reads 32 as a number."""
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def one_of(names: tuple[str, ...], name: object) -> str:
    """The name, if it is one of those.

    Raises:
        ValueError: in one line that lists the names, if it is not.
    """
    if isinstance(name, str) and name in names:
        return name
    raise ValueError(f"must be one of {', '.join(names)}, received {quoted(name)}")


def one_line(error: ValidationError) -> str:
    """The first complaint of pydantic in one line, with the setting and the value that was received."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"there is no setting {quoted(name)}"
    if first["type"] == "value_error":
        return f"{name} {first['ctx']['error']}".strip()
    message = first["msg"]
    return f"{name}: {message[0].lower()}{message[1:]}, received {quoted(first['input'])}"
