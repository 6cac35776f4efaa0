"""What the experiments share: results of finished runs, each a small file that the repository keeps."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from batchshaping.storage.files import replaced
from batchshaping.training.config import RunConfig, recorded_config

__all__ = ["by_arm", "is_finished", "keep", "rounded"]

_NOTHING: Mapping[str, Any] = MappingProxyType({})


def by_arm(results: Mapping[str, Any], arms: Iterable[str]) -> dict[str, list[Any]]:
    """The results of each arm over its seeds, in the order of the arms; those of ``ARM-seed0`` and so on."""
    found = defaultdict(list)
    for name, result in results.items():
        found[name.rpartition("-seed")[0]].append(result)
    return {arm: found[arm] for arm in arms if arm in found}


def is_finished(path: Path, config: RunConfig, places: Mapping[str, Any] = _NOTHING) -> bool:
    """Whether a file has the result of this very configuration, whatever its settings of places are.

    Args:
        path: the file, which need not be there.
        config: the configuration.
        places: the values that count in place of those that the file has.
    """
    return path.exists() and recorded_config({**json.loads(path.read_text())["config"], **places}) == config


def keep(result: Mapping[str, Any], path: Path) -> None:
    """Write a result, rounded, at once or not at all."""
    with replaced(path) as partial:
        partial.write_text(json.dumps(rounded(result), separators=(",", ":")) + "\n")


def rounded(value: Any) -> Any:
    """With five digits, which is what a figure shows."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value
