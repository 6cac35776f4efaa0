"""The configuration of a run: its sections, from and to flat settings, and from and to a YAML file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from batchshaping.storage.files import quoted, replaced
from batchshaping.training import plain_yaml
from batchshaping.training.networks import FAMILIES, Network, network_settings

# Names that earlier versions had in this module.
from batchshaping.training.networks import NETWORKS as NETWORKS
from batchshaping.training.networks.gated_resnet import IMAGENET_NETWORKS as IMAGENET_NETWORKS
from batchshaping.training.networks.gated_resnet import SMALL_IMAGE_NETWORKS as SMALL_IMAGE_NETWORKS
from batchshaping.training.sections import DATASETS as DATASETS
from batchshaping.training.sections import (
    DataSettings,
    MachineSettings,
    ObjectiveSettings,
    OptimizationSettings,
    Section,
    TeacherSettings,
    one_line,
)

__all__ = [
    "MAY_CHANGE",
    "SECTIONS",
    "SETTINGS",
    "RunConfig",
    "Setting",
    "read_config",
    "read_whole_config",
    "recorded_config",
    "write_config",
]

MAY_CHANGE = {
    *("accelerator", "data_folder", "devices", "download", "log_every", "logger", "nodes", "start"),
    *("threads", "workers"),
}
"""Settings of the machine and the log, and where files are, which may change when a run goes on.

With other devices or threads, sums are taken in another order and may be rounded differently.
"""


class Setting(NamedTuple):
    """One setting of a run.

    Attributes:
        section: name of its section.
        description: one sentence; where several families of networks have the setting, one of each.
        default: its default value.
        is_flag: whether it is either true or false.
    """

    section: str
    description: str
    default: Any
    is_flag: bool


_CLASSES: dict[str, tuple[type[Section], ...]] = {
    "network": FAMILIES,
    "data": (DataSettings,),
    "objective": (ObjectiveSettings,),
    "teaching": (TeacherSettings,),
    "optimization": (OptimizationSettings,),
    "machine": (MachineSettings,),
}
_MAKE: dict[str, Callable[..., Section]] = {
    "network": network_settings,
    **{section: classes[0] for section, classes in _CLASSES.items() if section != "network"},
}


def _all_settings() -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for section, classes in _CLASSES.items():
        for of_class in classes:
            for name, field in of_class.settings().items():
                description, is_flag = field.description or "", field.annotation is bool
                earlier = settings.setdefault(name, Setting(section, description, field.default, is_flag))
                if (earlier.section, earlier.is_flag) != (section, is_flag):
                    raise TypeError(f"the setting {name} of {of_class.__name__} is another one's name")
                if description not in earlier.description:
                    settings[name] = earlier._replace(description=f"{earlier.description} {description}")
    return settings


SECTIONS = {section: classes[0].heading for section, classes in _CLASSES.items()}
"""Headings of the sections, by their names."""

SETTINGS = _all_settings()
"""Every setting by its name, section by section, those of all families of networks included."""


class RunConfig(BaseModel):
    r"""The configuration of a run; the defaults train a gated ResNet-8 on scikit-learn's digits.

    It is made of settings, given by their names, or of whole sections. Settings can be read by their names
    too, except ``network`` and ``data``, since these are sections: the network and the data set are called
    ``config.network.name`` and ``config.data.name``.

    Attributes:
        network: the network, a section of one of the families.
        data: which images are loaded, and how.
        objective: what is asked of the gates.
        teaching: the teacher, if there is one.
        optimization: how the weights are trained.
        machine: where the run is computed, and what it logs.

    Raises:
        ValueError: in one line, if a setting is unknown or out of range, or settings contradict each other.

    Example:
        >>> config = RunConfig(network="resnet20", budget=0.3)
        >>> config.network.name, config.objective.budget, config.epochs
        ('resnet20', 0.3, 40)
        >>> RunConfig(budget=-1)
        Traceback (most recent call last):
        ...
        ValueError: budget: input should be greater than or equal to 0, received -1
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    network: SerializeAsAny[Network]
    data: DataSettings
    objective: ObjectiveSettings
    teaching: TeacherSettings
    optimization: OptimizationSettings
    machine: MachineSettings

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**_by_section(settings))
        except ValidationError as error:
            raise ValueError(one_line(error)) from None

    def __getattr__(self, name: str) -> Any:
        """The value of a setting, whichever section it is in."""
        # In __dict__, since sections are missing while a copy or an unpickled object is being made.
        section = self.__dict__.get(SETTINGS[name].section) if name in SETTINGS else None
        return super().__getattr__(name) if section is None else getattr(section, name)  # type: ignore[misc]

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        parts, batch_size = self._parts_of_a_batch, self.optimization.batch_size
        if batch_size % parts or batch_size == parts:
            raise ValueError(
                f"batch_size must be a multiple of devices x nodes x accumulate = {parts}, and larger, "
                f"received {batch_size}"
            )
        given, library = self.optimization.start, self.network.library_weights
        if given is not None and library is not None:
            raise ValueError(f"start must be none where pretrained is true, received {given}")
        if self.optimization.start_sha256 is not None and self.start_from is None:
            raise ValueError("start_sha256 needs weights to start from, received none")
        if self.teaching.teacher_sha256 is not None and self.teaching.teacher is None:
            raise ValueError("teacher_sha256 needs a teacher, received none")
        return self

    @property
    def start_from(self) -> str | None:
        """The weights to start from, also where they are the pretrained ones of the network."""
        return self.optimization.start or self.network.library_weights

    @property
    def _parts_of_a_batch(self) -> int:
        return self.machine.processes * self.optimization.accumulate

    @property
    def batch_of_a_device(self) -> int:
        """Number of images in a forward pass of one device."""
        return self.optimization.batch_size // self._parts_of_a_batch

    @model_serializer(mode="wrap")
    def _flat(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for section in serialize(self).values() for name, value in section.items()}

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """Every setting by its name, without sections; ``include`` and ``exclude`` take names of settings."""
        include, exclude = options.pop("include", None), options.pop("exclude", None) or ()
        return {
            name: value
            for name, value in super().model_dump(**options).items()
            if (include is None or name in include) and name not in exclude
        }

    def differing(self, began_with: Mapping[str, Any]) -> list[str]:
        """Names of the settings in which a run that began with others differs, but for :data:`MAY_CHANGE`.

        Args:
            began_with: its settings, as JSON has them. One that it does not have did not exist then.
        """
        settings = self.model_dump(mode="json")
        return [n for n, v in settings.items() if n not in MAY_CHANGE and began_with.get(n, v) != v]

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> RunConfig:
        """The same configuration with other values for some settings, which are checked."""
        update = dict(update or {})
        replaced = {name for name, value in update.items() if isinstance(value, Section)}
        kept = {n: v for n, v in self.model_dump().items() if SETTINGS[n].section not in replaced}
        return type(self)(**{**kept, **update})


def _by_section(settings: Mapping[str, Any]) -> dict[str, Section]:
    """All sections, those that are given and those made of the settings that are given."""
    given = {name: value for name, value in settings.items() if isinstance(value, Section) and name in _MAKE}
    flat: dict[str, dict[str, Any]] = {section: {} for section in _MAKE}
    for name, value in settings.items():
        if name in given:
            continue
        if name not in SETTINGS:
            raise ValueError(f"there is no setting {quoted(name)}; there are {', '.join(SETTINGS)}")
        if SETTINGS[name].section in given:
            raise ValueError(f"{name} is a setting of the section {SETTINGS[name].section}, received both")
        flat[SETTINGS[name].section][name] = value
    return {section: given.get(section) or make(**flat[section]) for section, make in _MAKE.items()}


def read_config(path: Path, **settings: Any) -> RunConfig:
    """A configuration from a YAML file of settings by their names.

    Numbers are those that YAML 1.2 and YAML 1.1 read alike: 010, 0x1F, 1_000 and 1:30 are refused, and 5e-4
    is a number. Anchors and tags are refused, and so is a setting that is given twice.

    Args:
        path: the file. Settings that are not in it have their defaults.
        settings: replace those of the file.

    Raises:
        ValueError: in one line that names the file, if it cannot be read or contains anything but settings.
    """
    return _config(path, _settings(path, _text(path)), settings)


def read_whole_config(path: Path, **settings: Any) -> RunConfig:
    """A configuration from a file that is complete and unchanged since :func:`write_config` wrote it.

    Args:
        path: the file.
        settings: replace those of the file.

    Raises:
        ValueError: in one line that names the file, if it cannot be read, was cut off or changed, or does not
            have every setting.
    """
    text = _text(path)
    checksum = _CHECKSUM_LINE.match(text)
    # Earlier versions wrote no checksum; their files begin with a setting.
    if text.startswith("#") and (checksum is None or checksum[1] != _checksum(text[checksum.end() :])):
        raise ValueError(
            f"{path}: expected the settings as the run wrote them, but the file was cut off or changed; "
            "what may change when a run goes on is given to --resume as an option"
        )
    content = _settings(path, text)
    config = _config(path, {**_EARLIER, **content}, settings)
    # In a file with a checksum, a setting is missing only if it did not exist when the file was written.
    missing = [] if checksum else [name for name in _BEFORE_CHECKSUMS if name not in content]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{path}: expected every setting of the run, received none of {', '.join(missing[:3])}{more}"
        )
    return config


def recorded_config(settings: Mapping[str, Any]) -> RunConfig:
    """The configuration of a run from the settings in its result.

    What a run did when there was no setting for it yet may not be the default of today.

    Example:
        >>> recorded_config({"network": "resnet20"}).teacher is None, RunConfig().teacher
        (True, 'start')
    """
    return RunConfig(**{**_EARLIER, **settings})


_EARLIER = {"teacher": None, "recalibrate": False}
"""What runs did before there was a setting for it."""


def write_config(config: RunConfig, path: Path) -> None:
    """Write every setting to a YAML file, from which :func:`read_config` makes the same configuration.

    Its first line is a comment with a checksum of the others, by which :func:`read_whole_config` notices that
    a file was cut off or changed.

    Raises:
        OSError: if the file cannot be written; an earlier one is then as it was.
    """
    text = plain_yaml.dump(config.model_dump(mode="json"))
    with replaced(path) as partial:
        partial.write_bytes(f"# sha256 of the settings below: {_checksum(text)}\n{text}".encode())


_CHECKSUM_LINE = re.compile(r"# sha256 of the settings below: ([0-9a-f]{64})\n")

_BEFORE_CHECKSUMS = (
    *("network", "width", "stem_stride", "pretrained", "gated", "hidden", "gate_bias"),
    *("data", "data_folder", "download", "image_size", "train_images", "augment", "workers"),
    *("budget", "penalty", "penalty_begin", "penalty_end", "penalized"),
    *("shaping", "shaping_end", "prior", "noise_end"),
    *("epochs", "batch_size", "accumulate", "learning_rate", "gate_learning_rate"),
    *("schedule", "milestones", "momentum", "weight_decay"),
    *("accelerator", "devices", "nodes", "precision", "sync_batch_norm", "seed"),
    *("evaluate_every", "logger", "log_every"),
)
"""All settings that there were when files had no checksum yet, so that such a file has each of them."""

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
        return plain_yaml.load(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _config(path: Path, content: dict[str, Any], settings: dict[str, Any]) -> RunConfig:
    try:
        RunConfig(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return RunConfig(**{**content, **settings})
