"""What a run is made of: every setting, its default and its range, from and to a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

__all__ = [
    "DATASETS",
    "IMAGENET_NETWORKS",
    "NETWORKS",
    "SECTIONS",
    "SMALL_IMAGE_NETWORKS",
    "RunConfig",
    "read_config",
    "write_config",
]

SMALL_IMAGE_NETWORKS = {f"resnet{depth}": depth for depth in (8, 14, 20, 32, 44, 56, 110)}
"""Networks for small images, with their depth."""

IMAGENET_NETWORKS = ("resnet18", "resnet34", "resnet50")
"""Networks for large images, torchvision's."""

NETWORKS = (*SMALL_IMAGE_NETWORKS, *IMAGENET_NETWORKS)
"""The known networks."""

DATASETS = ("digits", "fashion-mnist", "cifar10", "cifar100", "folder")
"""The known data sets."""

SECTIONS = {
    "network": "Network",
    "data": "Data",
    "budget": "Gates: what the objective asks of them",
    "epochs": "Optimization",
    "accelerator": "Machine and log",
}
"""Headings of the settings, each by the first one that it stands above."""

_Share = Annotated[float, Field(ge=0, le=1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1)]


class RunConfig(BaseModel):
    r"""Every setting of a run; the defaults train a gated ResNet-8 on scikit-learn's digits.

    The objective, at a share e of training that is done, is

    .. math::
        \mathrm{CE} + \gamma(e) \sum_\text{layers} L(p; \mathrm{prior})
        + \lambda(e) \max(0, c - \mathrm{budget}),

    with the cost c one of the two that ``penalized`` can be. Budget 0 and ``open-gates`` are the objective of
    Bejnordi, Blankevoort and Welling (ICLR 2020, https://arxiv.org/abs/1907.06627).

    Raises:
        ValueError: in one line, if a setting is unknown or out of range.

    Example:
        >>> config = RunConfig(network="resnet20", budget=0.3)
        >>> config.epochs, config.shaping
        (40, 0.75)
        >>> RunConfig(budget=-1)
        Traceback (most recent call last):
        ...
        ValueError: budget: input should be greater than or equal to 0, received -1
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    network: str = "resnet8"
    """resnet8, 14, 20, 32, 44, 56 or 110 for small images; resnet18, 34 or 50 for large ones."""
    width: _Count = 16
    """Channels of the first stage of a network for small images."""
    stem_stride: Annotated[int, Field(ge=1, le=2)] = 1
    """Stride of the first convolution of a network for small images."""
    pretrained: bool = False
    """Whether a network for large images starts from torchvision's weights."""
    gated: bool = True
    """Whether the network has gates."""
    hidden: _Count = 16
    """Width of the MLP in each gate."""
    gate_bias: Annotated[float, Field(allow_inf_nan=False)] = 3.0
    """Added to the gates' initial logits: 0 starts with half of the channels open, 3 with nearly all."""

    data: str = "digits"
    """digits, fashion-mnist, cifar10, cifar100, or folder: of images, in train/CLASS and test/CLASS."""
    data_folder: Path | None = None
    """Where the data is; by default where its package or download puts it."""
    download: bool = False
    """Whether to download the data if it is not there."""
    image_size: _Count = 224
    """Side in pixels to which the images of a folder are cropped."""
    train_images: _Count | None = None
    """How many training images to use; all by default."""
    augment: bool = True
    """Whether to shift training images at random, and to flip them where that keeps their class."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that load images; data sets that fit in memory need none."""

    budget: _Share = 0.4
    """Share of the ungated network's multiply-adds (or of open gates) above which cost is penalized."""
    penalty: _NotNegative = 3.0
    """Weight of the cost above the budget, once it is fully there."""
    penalty_begin: _Share = 0.2
    """Share of training after which the penalty begins to rise."""
    penalty_end: _Share = 0.6
    """Share of training after which the penalty has its weight."""
    penalized: Literal["multiply-adds", "open-gates"] = "multiply-adds"
    """What is penalized: the multiply-adds that were spent, or the share of gates that were open (L0)."""
    shaping: _NotNegative = 0.75
    """Weight of the batch-shaping loss at the start; 0 trains without it."""
    shaping_end: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of training after which the batch-shaping loss has faded out."""
    prior: tuple[_Positive, _Positive] = (0.6, 0.4)
    """The two concentrations of the Beta prior of each gate."""
    noise_end: Annotated[float, Field(gt=0, le=1)] | None = 0.7
    """Share of training after which the gates' noise has faded out; none keeps it."""

    epochs: _Count = 40
    """How often every training image is seen."""
    batch_size: _Count = 64
    """Images in a step, of all devices and accumulated batches together."""
    accumulate: _Count = 1
    """Batches whose gradients are added up in a step."""
    learning_rate: _Positive = 0.1
    """Learning rate of SGD at the start."""
    gate_learning_rate: _Positive = 0.1
    """That of the gates."""
    schedule: Literal["steps", "cosine"] = "steps"
    """How the learning rates fall: by 10 at each milestone, or as a half cosine to 0."""
    milestones: tuple[_Share, ...] = (0.6, 0.75, 0.9)
    """Shares of training after which the learning rates fall by 10."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Nesterov momentum."""
    weight_decay: _NotNegative = 5e-4
    """Weight decay of everything but the gates."""

    accelerator: str = "auto"
    """cpu, gpu or whatever else Lightning knows."""
    devices: _Count = 1
    """Devices, or processes on the CPU, of each node."""
    nodes: _Count = 1
    """Machines."""
    precision: Literal["32", "16-mixed", "bf16-mixed", "64"] = "32"
    """Precision of the computation."""
    sync_batch_norm: bool = False
    """Whether batch normalization sees the batch of all devices."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the start, the order of the images, their shifts and the gates' noise."""
    evaluate_every: _Count = 1
    """Epochs between two evaluations on the test images."""
    logger: Literal["csv", "tensorboard", "none"] = "csv"
    """How the training steps are logged."""
    log_every: _Count = 10
    """Steps between two lines of that log."""

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ValueError(_one_line(error)) from None

    @field_validator("prior", "milestones", mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        """From a command line: several numbers as 0.6,0.4."""
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("noise_end", "train_images", "data_folder", mode="before")
    @classmethod
    def _or_none(cls, value: object) -> object:
        """From a command line: none for what a file has and should not be."""
        return None if value in ("none", "null") else value

    @field_validator("precision", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        """From YAML, where 32 is a number."""
        return str(value) if isinstance(value, int) else value

    @field_validator("network")
    @classmethod
    def _known_network(cls, name: str) -> str:
        return _known(name, NETWORKS)

    @field_validator("data")
    @classmethod
    def _known_data(cls, name: str) -> str:
        return _known(name, DATASETS)

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if not self.penalty_begin < self.penalty_end:
            raise ValueError(
                "penalty_begin must be less than penalty_end, "
                f"received {self.penalty_begin} and {self.penalty_end}"
            )
        small = self.network in SMALL_IMAGE_NETWORKS
        ignored = ("pretrained",) if small else ("width", "stem_stride")
        for name in ignored:
            if getattr(self, name) != RunConfig.model_fields[name].default:
                raise ValueError(f"{name} is not a setting of {self.network}")
        parts = self.devices * self.nodes * self.accumulate
        if self.batch_size % parts or self.batch_size == parts:
            raise ValueError(
                f"batch_size must be a multiple of devices x nodes x accumulate = {parts}, and larger, "
                f"received {self.batch_size}"
            )
        return self

    @property
    def batch_of_a_device(self) -> int:
        """Images in a forward pass of one device."""
        return self.batch_size // (self.devices * self.nodes * self.accumulate)


def read_config(path: Path, **settings: Any) -> RunConfig:
    """A configuration from a YAML file.

    Args:
        path: the file; settings that it does not have get their defaults.
        settings: replace those of the file.

    Raises:
        ValueError: in one line that names the file, if it cannot be read or holds what is no setting.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ValueError(f"{path}: expected a YAML file, received something else") from None
    if content is None:
        content = {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path}: expected settings as name: value, received a {type(content).__name__}")
    try:
        RunConfig(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return RunConfig(**{**content, **settings})


def write_config(config: RunConfig, path: Path) -> None:
    """Write every setting to a YAML file, from which :func:`read_config` makes the same configuration."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def _known(name: str, names: tuple[str, ...]) -> str:
    if name not in names:
        raise ValueError(f"must be one of {', '.join(names)}, received {name!r}")
    return name


def _one_line(error: ValidationError) -> str:
    """The first complaint, with the setting and what was received."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"there is no setting {name!r}; there are {', '.join(RunConfig.model_fields)}"
    if first["type"] == "value_error":
        return f"{name} {first['ctx']['error']}".strip()
    message = first["msg"]
    return f"{name}: {message[0].lower()}{message[1:]}, received {first['input']!r}"
