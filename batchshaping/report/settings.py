"""Runs beside each other: summarized over the seeds of each setting, and compared on the same data."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from batchshaping.report.family import Curve, Family
from batchshaping.report.runs import Run

__all__ = ["Comparison", "Setting", "Spread", "comparisons", "differing"]


@dataclass(frozen=True)
class Spread:
    """A metric over the seeds of a setting.

    Attributes:
        mean: over the seeds.
        deviation: their standard deviation, with N - 1 in its denominator; None for a single seed.
    """

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Setting:
    """Runs with the same settings: they differ in seed, machine, log and in what has no effect, if at all.

    Attributes:
        runs: by seed.
        name: the settings in which it differs from others that are shown beside it, in a reader's words.
        reference_accuracy: mean accuracy of the reference, if there is a run of it.
    """

    runs: tuple[Run, ...]
    name: str
    reference_accuracy: float | None

    @property
    def family(self) -> Family:
        """The family of its runs."""
        return self.runs[0].family

    @property
    def curve(self) -> Curve:
        """The curve that its runs belong to."""
        return self.runs[0].view.curve

    @property
    def seeds(self) -> int:
        """How many different seeds there are."""
        return len(_by_seed(self.runs))

    @property
    def accuracy(self) -> Spread:
        """On the test images."""
        return self.spread(lambda run: run.accuracy)

    @property
    def multiply_adds(self) -> Spread:
        """Mean over the test images."""
        return self.spread(lambda run: run.multiply_adds)

    @property
    def share(self) -> Spread:
        """Multiply-adds as a share of the reference's."""
        return self.spread(lambda run: run.share)

    @property
    def shares(self) -> dict[str, Spread]:
        """The further columns of the family, by their heads."""
        heads = self.runs[0].view.shares
        return {head: self.spread(_share(head)) for head in heads}

    @property
    def gain(self) -> float | None:
        """Mean accuracy, less that of the reference."""
        return None if self.reference_accuracy is None else self.accuracy.mean - self.reference_accuracy

    @property
    def by_run(self) -> list[Setting]:
        """Each run on its own, under its own name."""
        return [replace(self, runs=(run,), name=run.name) for run in self.runs]

    def spread(self, metric: Callable[[Run], float]) -> Spread:
        """Mean and standard deviation of a metric; runs that repeat a seed count once, as their mean."""
        values = [fmean(map(metric, runs)) for runs in _by_seed(self.runs)]
        return Spread(fmean(values), stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Comparison:
    """Settings whose accuracies can be compared: those with the same data.

    Attributes:
        title: the data, in a reader's words.
        settings: by curve, in the order of the legend, then by multiply-adds.
    """

    title: str
    settings: tuple[Setting, ...]

    @property
    def runs(self) -> list[Run]:
        """The runs of all settings."""
        return [run for setting in self.settings for run in setting.runs]

    @property
    def one_run_each(self) -> bool:
        """Whether no setting has a second run."""
        return all(len(setting.runs) == 1 for setting in self.settings)

    @property
    def has_deviations(self) -> bool:
        """Whether a setting has a second seed."""
        return any(setting.seeds > 1 for setting in self.settings)

    @property
    def all_have_deviations(self) -> bool:
        """Whether every setting has a second seed."""
        return all(setting.seeds > 1 for setting in self.settings)

    @property
    def has_gains(self) -> bool:
        """Whether the accuracy of a setting can be compared with that of its reference."""
        return any(setting.gain is not None for setting in self.settings)

    @property
    def columns(self) -> list[str]:
        """Heads of the families' columns."""
        return [*dict.fromkeys(head for run in self.runs for head in run.view.shares)]

    @property
    def explanations(self) -> list[str]:
        """What the references are, and what the families' columns mean."""
        names = [*dict.fromkeys(run.reference.name for run in self.runs if not run.is_reference)]
        more = f"; and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        references = f"Reference{'s' * (len(names) > 1)}: {'; '.join(names[:_MOST_NAMES])}{more}."
        meanings = dict.fromkeys(run.family.explanation for run in self.runs if run.view.shares)
        return [*([references] if names else []), *meanings]

    @property
    def curves(self) -> dict[tuple[Family, Curve], list[Setting]]:
        """Settings by their curve, in the order of the legend."""
        curves: dict[tuple[Family, Curve], list[Setting]] = {}
        for setting in self.settings:
            curves.setdefault((setting.family, setting.curve), []).append(setting)
        return curves


_MOST_NAMES = 5


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """Runs by the data that they were tested on, in the order in which they are given."""
    by_data = _grouped(runs, lambda run: json.dumps(run.data))
    shown = differing([group[0].data for group in by_data]) | {"data"}
    return [
        Comparison(
            title=_joined(group[0].data_words, shown),
            settings=tuple(sorted(_settings(group), key=_Order(group))),
        )
        for group in by_data
    ]


def differing(configs: Sequence[Mapping[str, Any]]) -> set[str]:
    """Settings with more than one value among the configurations that have them."""
    values: dict[str, set[str]] = {}
    for config in configs:
        for name, value in config.items():
            values.setdefault(name, set()).add(json.dumps(value, sort_keys=True))
    return {name for name, several in values.items() if len(several) > 1}


def _settings(runs: Sequence[Run]) -> list[Setting]:
    groups = _grouped(sorted(runs, key=_seed), lambda run: run.recipe)
    shown = differing([group[0].settings for group in groups])
    return [
        Setting(
            runs=tuple(group),
            name=_joined(group[0].words, shown) or group[0].view.curve.name,
            reference_accuracy=_reference_accuracy(group[0], runs),
        )
        for group in groups
    ]


def _grouped(runs: Iterable[Run], key: Callable[[Run], str]) -> list[list[Run]]:
    """Runs with the same key, in the order of the first of each."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return [*groups.values()]


def _share(head: str) -> Callable[[Run], float]:
    return lambda run: run.view.shares[head]


def _by_seed(runs: Iterable[Run]) -> list[list[Run]]:
    return _grouped(runs, lambda run: json.dumps(run.seed))


def _seed(run: Run) -> tuple[bool, float | str]:
    """A key to sort by: numbers in their order, then whatever else stands where a seed belongs."""
    number = isinstance(run.seed, int | float)
    return not number, run.seed if number else json.dumps(run.seed)


def _joined(words: Mapping[str, str], names: Collection[str]) -> str:
    return ", ".join(word for name, word in words.items() if name in names)


def _reference_accuracy(run: Run, runs: Iterable[Run]) -> float | None:
    """Mean accuracy of the references of a run, if there are any."""

    def compared(of: Run) -> list[Any]:
        return [of.family.name, *(of.config.get(name) for name in run.family.compared)]

    accuracies = [
        other.accuracy
        for other in runs
        if other.is_reference and not run.is_reference and compared(other) == compared(run)
    ]
    return fmean(accuracies) if accuracies else None


class _Order:
    """A key to sort settings by: family, curve, multiply-adds."""

    def __init__(self, runs: Iterable[Run]) -> None:
        families = dict.fromkeys(run.family for run in runs)
        curves = [(family, curve) for family in families for curve in family.curves]
        self._places = {curve: place for place, curve in enumerate(curves)}

    def __call__(self, setting: Setting) -> tuple[int, float]:
        return self._places[setting.family, setting.curve], setting.multiply_adds.mean
