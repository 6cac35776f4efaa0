"""What some runs came to, in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from batchshaping.report.runs import Run
from batchshaping.report.settings import Comparison
from batchshaping.report.texts import number

__all__ = ["headline"]


def headline(compared: Sequence[Comparison]) -> str:
    """What was saved at which accuracy, from the least to the most of the means of all settings."""
    settings = [setting for comparison in compared for setting in comparison.settings]
    saving = [setting for setting in settings if not setting.curve.reference]
    shown = saving or settings
    runs = _count([run for setting in shown for run in setting.runs])
    accuracy = f"{_range([100 * setting.accuracy.mean for setting in shown], '.1f')}% accuracy"
    if not saving:
        return f"{runs} with {accuracy}"
    of_teacher = _beside_teacher(shown[0].runs) if len(shown) == 1 else None
    if of_teacher:
        return f"{of_teacher}: {runs[0].lower()}{runs[1:]} {_saved([1 - shown[0].share.mean])}"
    gains = [setting.gain for setting in saving if setting.gain is not None]
    if len(gains) == len(saving):
        accuracy = f"{_range([100 * gain for gain in gains], '+.1f')} points of accuracy"
    return f"{runs} {_saved([1 - setting.share.mean for setting in saving])}, at {accuracy}"


def _beside_teacher(runs: Sequence[Run]) -> str | None:
    """How accurate and how fast a single run is beside its teacher, if both were measured."""
    if len(runs) > 1 or runs[0].teacher is None or runs[0].latency is None:
        return None
    gain, latency = 100 * (runs[0].accuracy - runs[0].teacher), runs[0].latency
    points = f"{number(abs(gain), '.1f')} points"
    accurate = f"{points} more accurate than" if gain > 0 else f"Within {points} of the accuracy of"
    times = latency.times_faster
    ratio, word = (times, "fast") if times >= 1 else (1 / times, "slow")
    return f"{accurate} its teacher, and {number(ratio, '.1f')} times as {word}"


def _count(runs: Sequence[Run]) -> str:
    nouns = {run.family.nouns[0 if run.is_reference else 1] for run in runs}
    noun = nouns.pop() if len(nouns) == 1 else "run"
    return f"A{'n' * noun.startswith('u')} {noun}" if len(runs) == 1 else f"{len(runs)} {noun}s"


def _saved(shares: Sequence[float]) -> str:
    if max(shares) < 0:
        return f"spending {_range([-100 * share for share in shares], '.1f')}% more multiply-adds"
    return f"saving {_range([100 * share for share in shares], '.1f')}% of the multiply-adds"


def _range(values: Sequence[float], form: str) -> str:
    ends = dict.fromkeys(number(end, form) for end in (min(values), max(values)))
    return " to ".join(ends)
