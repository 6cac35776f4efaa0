"""A run as the report shows it: checked, whatever its kind, before anything of it is written to a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from batchshaping.report.budgets import Budgets, read_budgets
from batchshaping.report.checked import OutOfRangeError, number
from batchshaping.report.families import family_of
from batchshaping.report.family import Family, View
from batchshaping.report.latency import Latency, read_latency
from batchshaping.report.texts import setting_text, shortened
from batchshaping.storage.files import quoted
from batchshaping.training.config import MAY_CHANGE, SETTINGS

__all__ = ["Reference", "Run", "read_run"]


@dataclass(frozen=True)
class Reference:
    """The network that a run is compared with.

    Attributes:
        name: what it is, for a reader.
        multiply_adds: what one image costs.
    """

    name: str
    multiply_adds: float


@dataclass(frozen=True, eq=False)
class Run:
    """What the page shows of a run.

    Attributes:
        name: of the run.
        family: of its network.
        view: what its family shows of it.
        config: every setting.
        versions: of the software that trained it.
        accuracy: on the test images.
        multiply_adds: mean over the test images.
        reference: what it is compared with.
        epochs: number, accuracy and multiply-adds of each epoch that was evaluated.
        latency: how long its images take, if that was measured.
        budgets: what its network does at other budgets, if that was measured.
        teacher: accuracy of its teacher on the test images, if it had one.
    """

    name: str
    family: Family
    view: View
    config: dict[str, Any]
    versions: dict[str, str]
    accuracy: float
    multiply_adds: float
    reference: Reference
    epochs: list[dict[str, float]]
    latency: Latency | None
    budgets: Budgets | None
    teacher: float | None

    @property
    def share(self) -> float:
        """Its multiply-adds as a share of those of its reference."""
        return self.multiply_adds / self.reference.multiply_adds

    @property
    def is_reference(self) -> bool:
        """Whether others are compared with it."""
        return self.view.curve.reference

    @cached_property
    def data(self) -> dict[str, Any]:
        """The settings of the data; accuracies of runs that are equal in them can be compared."""
        settings = [*_DATA, *(["data_folder"] if self.config.get("data") == "folder" else [])]
        # Earlier runs have no settings that came later.
        return {name: self.config.get(name, SETTINGS[name].default) for name in settings}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration without the seed, machine and log, and without what has no effect on the run."""
        ignored = {*MAY_CHANGE, *_OWN, *self.family.idle(self.config)}
        if self.teacher is None:
            ignored |= {"teacher_weight", "teacher_temperature"}
        settings = {name: value for name, value in self.config.items() if name not in ignored}
        # Each seed may start from weights of its own, and have a teacher of its own.
        given = {"start": self.config.get("start"), "teacher": self.teacher}
        return settings | {name: True for name, value in given.items() if value is not None}

    @cached_property
    def recipe(self) -> str:
        """Equal for runs of the same setting."""
        parts = [self.family.name, self.view.curve.name, self.data, self.settings]
        return json.dumps(parts, sort_keys=True)

    @property
    def seed(self) -> Any:
        """The seed of the run, a number in what training writes."""
        return self.config["seed"]

    @cached_property
    def words(self) -> dict[str, str]:
        """Its settings in a reader's words."""
        return _words(self.family, self.settings)

    @cached_property
    def data_words(self) -> dict[str, str]:
        """The settings of its data in a reader's words."""
        return _words(self.family, self.data)


_OWN = ("seed", "start_sha256", "teacher", "teacher_sha256")
"""Settings in which runs of the same setting differ."""

_DATA = ("data", "image_size", "train_images", "evaluate_on")

_COMMON_WORDS: dict[str, Callable[[Any], str]] = {
    "network": str,
    "data": str,
    "data_folder": str,
    "train_images": lambda count: "all training images" if count is None else f"{count:,} training images",
    "image_size": lambda side: f"{side} x {side} pixels",
    "start": lambda _: "started from weights",
    "teacher": lambda _: "taught",
    "evaluate_on": lambda images: f"{images} images",
    "epochs": lambda count: f"{count} epoch{'' if count == 1 else 's'}",
}
"""How settings that every family may have are told to a reader."""


def _words(family: Family, config: Mapping[str, Any]) -> dict[str, str]:
    """Settings in a reader's words, the most important one first."""
    words = {**family.words, **_COMMON_WORDS}
    order = [*(name for name in words if name in config), *(name for name in config if name not in words)]
    return {name: shortened(_word(words.get(name), name, config[name])) for name in order}


def _word(words: Callable[[Any], str] | None, name: str, value: Any) -> str:
    """A setting in its own words; by its name if it has none, or if they do not fit its value."""
    if words is not None:
        try:
            return words(value)
        except (LookupError, TypeError, ValueError, AttributeError):
            pass
    plain = name.replace("_", " ")
    if value is None or isinstance(value, bool):
        return plain if value else f"no {plain}"
    return f"{plain} {setting_text(value)}"


def read_run(name: str, result: Mapping[str, Any]) -> Run:
    """A run from its result.

    Args:
        name: of the run.
        result: what its ``result.json`` holds.

    Raises:
        ValueError: in one line that names the run, if something is missing or out of range.
    """
    try:
        run = _run(name, _completed(result))
        # Everything else is derived from these, and a page can have no number that JSON has not.
        derived = [number(run.share), run.recipe, run.seed, [*run.words.values()]]
        shown = [run.view.shares, run.view.pictures, run.view.texts]
        json.dumps([derived, shown, run.accuracy, run.epochs], allow_nan=False)
    except KeyError as error:
        received = f"one without {error}"
    except OutOfRangeError as error:
        received = f"one with {error}"
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError):
        received = "something else"
    else:
        return run
    raise ValueError(f"{quoted(name)}: expected the result of a run, received {received}")


def _completed(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """A result with kind and reference, which version 0.1, with channel gating alone, did not write."""
    complete = {"kind": "channel gating", **result}
    if "reference" not in complete:
        complete["reference"] = {"name": "ungated network", "multiply_adds": result["cost"]["dense"]}
    return complete


def _run(name: str, result: Mapping[str, Any]) -> Run:
    family = family_of(_text(result["kind"]))
    return Run(
        name=name,
        family=family,
        view=family.view(result),
        config=dict(result["config"].items()),
        versions={name: str(version) for name, version in result["versions"].items()},
        accuracy=number(result["accuracy"]),
        multiply_adds=number(result["multiply_adds"]),
        reference=Reference(
            shortened(_text(result["reference"]["name"])), number(result["reference"]["multiply_adds"])
        ),
        epochs=[
            {metric: number(epoch[metric]) for metric in ("epoch", "accuracy", "multiply_adds")}
            for epoch in result["history"]
        ],
        latency=read_latency(result),
        teacher=number(result["teacher"]["accuracy"]) if result.get("teacher") else None,
        budgets=read_budgets(result),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
