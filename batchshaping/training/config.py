"""What a run is made of: every setting, its default and its range, from and to a YAML file."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from batchshaping.files import quoted, replaced

__all__ = [
    "DATASETS",
    "IMAGENET_NETWORKS",
    "MAY_CHANGE",
    "NETWORKS",
    "SECTIONS",
    "SMALL_IMAGE_NETWORKS",
    "RunConfig",
    "read_config",
    "read_whole_config",
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

MAY_CHANGE = {
    *("accelerator", "data_folder", "devices", "download", "log_every", "logger", "nodes", "threads"),
    "workers",
}
"""Settings of the machine and the log, which may change when a run goes on.

With other devices or threads, sums are taken in another order and may be rounded differently.
"""

_Share = Annotated[float, Field(ge=0, le=1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1, le=10**9)]
# Far beyond what shapes a gate: at 1e5 and 1e5 the standard deviation is 0.001.
_Concentration = Annotated[float, Field(gt=0, le=100_000)]


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
    workers: Annotated[int, Field(ge=0, le=10**4)] = 0
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
    prior: tuple[_Concentration, _Concentration] = (0.6, 0.4)
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
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads of each process on the CPU; by default one for small layers, and more for large ones."""
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

    @field_validator("noise_end", "train_images", "data_folder", "threads", mode="before")
    @classmethod
    def _or_none(cls, value: object) -> object:
        """From a command line: none for what a file has and should not be."""
        return None if value in ("none", "null") else value

    @field_validator("precision", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        """From YAML, where 32 is a number."""
        return str(value) if isinstance(value, int) else value

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: object, info: ValidationInfo) -> object:
        """Where a number or a name belongs, for Python would take True for 1.

        Stands last of those that come before, and so is asked first.
        """
        assert info.field_name is not None
        wrong = [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, bool)]
        if wrong and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"must not be true or false, received {wrong[0]!r}")
        return value

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

    Numbers are what YAML 1.2 and YAML 1.1 agree on: 010, 0x1F, 1_000 and 1:30 are refused, and 5e-4 is a
    number. Anchors and tags are refused, and so is a setting that is given twice.

    Args:
        path: the file; settings that it does not have get their defaults.
        settings: replace those of the file.

    Raises:
        ValueError: in one line that names the file, if it cannot be read or holds what is no setting.
    """
    return _config(path, _settings(path, _text(path)), settings)


def read_whole_config(path: Path, **settings: Any) -> RunConfig:
    """A configuration from a file that is whole, and as :func:`write_config` wrote it.

    Args:
        path: the file.
        settings: replace those of the file.

    Raises:
        ValueError: in one line that names the file, if it cannot be read, was cut off or changed, or does not
            have every setting.
    """
    text = _text(path)
    mark = _MARK.match(text)
    # Earlier versions wrote no mark, and what they wrote begins with a setting.
    if text.startswith("#") and (mark is None or mark[1] != _checksum(text[mark.end() :])):
        raise ValueError(
            f"{path}: expected the settings as the run wrote them, but the file was cut off or changed; "
            "what may change when a run goes on is given to --resume as an option"
        )
    content = _settings(path, text)
    config = _config(path, content, settings)
    # With a mark, what is not there is a setting that there was not when the file was written.
    missing = [] if mark else [n for n in RunConfig.model_fields if n not in content and n not in _MARKED]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{path}: expected every setting of the run, received none of {', '.join(missing[:3])}{more}"
        )
    return config


def write_config(config: RunConfig, path: Path) -> None:
    """Write every setting to a YAML file, from which :func:`read_config` makes the same configuration.

    Its first line is a comment with a checksum of the others, from which :func:`read_whole_config` sees that
    they are all there.

    Raises:
        OSError: if the file cannot be written; an earlier one is then as it was.
    """
    text = yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)
    with replaced(path) as partial:
        partial.write_bytes(f"# sha256 of the settings below: {_checksum(text)}\n{text}".encode())


_MARK = re.compile(r"# sha256 of the settings below: ([0-9a-f]{64})\n")

_MARKED = {"threads"}
"""Settings that are in files with a mark only, since they came with it or later."""

_LARGEST_FILE = 2**16


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise ValueError(f"{path}: expected settings in at most {_LARGEST_FILE} bytes, received more")
        return content.decode()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected a YAML file, received something else") from None


def _settings(path: Path, text: str) -> dict[str, Any]:
    try:
        content = yaml.load(text, _Loader)
    except _RefusedError as error:
        raise ValueError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ValueError(f"{path}: expected a YAML file, received something else") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path}: expected settings as name: value, received {quoted(content)}")
    return content


def _config(path: Path, content: dict[str, Any], settings: dict[str, Any]) -> RunConfig:
    try:
        RunConfig(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return RunConfig(**{**content, **settings})


class _RefusedError(yaml.YAMLError):  # type: ignore[misc]
    """Says in one line what there is in a file that settings have no use for."""


class _Ambiguous:
    """A number that the versions of YAML read differently; the setting that gets it refuses it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"{self.text}, which is no plain decimal number"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML's core schema, of version 1.2, without what makes a short file large or ambiguous."""

    yaml_implicit_resolvers: dict[str | None, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if getattr(event, "anchor", None) is not None:
            raise _RefusedError(f"expected settings without anchors, received one in line {line}")
        if getattr(event, "tag", None) is not None:
            raise _RefusedError(f"expected settings without tags, received one in line {line}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names: set[str] = set()
        for key, _ in node.value:
            if key.value in names:
                line = key.start_mark.line + 1
                raise _RefusedError(
                    f"expected each setting once, received {quoted(key.value)} again in line {line}"
                )
            if isinstance(key, yaml.ScalarNode):
                names.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes each text that the loader would take for something else."""

    yaml_implicit_resolvers: dict[str | None, Any] = {}


# The first that matches decides. A text that YAML 1.1 would read as a time or a date stays a text.
_PLAIN = {
    "tag:yaml.org,2002:null": "~|null|Null|NULL|",
    "tag:yaml.org,2002:bool": "true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": "[-+]?(0|[1-9][0-9]{0,17})",
    "!ambiguous": "[-+]?(0[0-9]+|[0-9]{19,}|0[box][0-9a-fA-F_]+|[0-9][0-9._]*_[0-9._]*([eE][-+]?[0-9]+)?)",
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}
for _tag, _pattern in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None)
_Loader.add_constructor("!ambiguous", lambda loader, node: _Ambiguous(node.value))


def _known(name: str, names: tuple[str, ...]) -> str:
    if name not in names:
        raise ValueError(f"must be one of {', '.join(names)}, received {quoted(name)}")
    return name


def _one_line(error: ValidationError) -> str:
    """The first complaint, with the setting and what was received."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"there is no setting {quoted(name)}; there are {', '.join(RunConfig.model_fields)}"
    if first["type"] == "value_error":
        return f"{name} {first['ctx']['error']}".strip()
    message = first["msg"]
    return f"{name}: {message[0].lower()}{message[1:]}, received {quoted(first['input'])}"
