"""The folder of a run: its configuration, its trained network and its result.

What is read has a checksum, so that a file that was cut off or changed is refused and never gives another
result. Files of earlier versions without a checksum are read as they are.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from batchshaping.storage.files import write_json
from batchshaping.training.checkpoints import read_tensors
from batchshaping.training.config import RunConfig, read_whole_config

__all__ = [
    "CONFIG",
    "MODEL",
    "RESULT",
    "RunError",
    "read_result",
    "read_run_config",
    "trained_network",
    "write_result",
]

CONFIG = "config.yaml"
"""Name of the file with every setting, from which the run can be repeated."""

MODEL = "model.safetensors"
"""Name of the file with the trained weights."""

RESULT = "result.json"
"""Name of the file with everything that the report shows."""


class RunError(Exception):
    """The folder of a run cannot be used; the message says in one line why."""


def read_run_config(output: Path, **settings: Any) -> RunConfig:
    """The configuration of a run.

    Args:
        output: the folder of the run.
        settings: replace those of the run.

    Raises:
        RunError: if the folder contains no run.
        ValueError: if the file was cut off or changed, or does not have every setting.
    """
    if not (output / CONFIG).exists():
        raise RunError(f"{output}: expected the folder of a run, with {CONFIG} in it")
    return read_whole_config(output / CONFIG, **settings)


def trained_network(output: Path, classes: int, shape: tuple[int, int, int], **settings: Any) -> nn.Module:
    """The trained network of a run, in evaluation mode.

    Args:
        output: the folder of the run.
        classes: number of outputs.
        shape: channels, height and width of the images.
        settings: replace those of the run.

    Raises:
        RunError: if the folder contains no trained network, or one for other images or classes.
    """
    network = read_run_config(output, **settings).network.build(classes, shape)
    path = output / MODEL
    try:
        weights, _ = read_tensors(path)
        network.load_state_dict(weights)
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; the run is not finished") from None
    except (RuntimeError, OSError, ValueError):
        raise RunError(
            f"{path}: expected the weights of the network in {CONFIG}, whole and unchanged, received others"
        ) from None
    return network.eval()


def read_result(output: Path) -> dict[str, Any]:
    """The result of a run.

    Args:
        output: the folder of the run, or a file such as the ``result.json`` in it.

    Raises:
        RunError: in one line, if it cannot be read.
    """
    path = output / RESULT if output.is_dir() else output
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_RESULT + 1)
        if len(text) > _LARGEST_RESULT:
            raise RunError(f"{path}: expected a result of at most {_LARGEST_RESULT} bytes, received more")
        # An integer too large for a float is read as infinity, as a float of this size would be.
        result: dict[str, Any] = json.loads(
            text.decode(), parse_int=lambda n: int(n) if len(n) < 100 else float(n)
        )
        whole = isinstance(result, dict) and {"accuracy", "config", "cost", "history"} <= result.keys()
        if not (whole and isinstance(result["config"], dict)):
            raise ValueError
        changed = result.pop(_CHECKSUM, None) not in (None, _checksum(result))
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise RunError(f"{path}: expected the result of a run, received something else") from None
    if changed:
        raise RunError(f"{path}: expected the result that the run wrote, received another: it was changed")
    return result


# In bytes; more than the result of a run with a thousand classes and ten thousand gates.
_LARGEST_RESULT = 2**27

_CHECKSUM = "sha256"


def _checksum(result: dict[str, Any]) -> str:
    """The checksum of everything but the duration, so that equal trainings have equal checksums."""
    facts = {name: value for name, value in result.items() if name != "seconds"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_result(result: dict[str, Any], output: Path) -> None:
    """Write the result of a run to its folder, with a checksum.

    Raises:
        OSError: if the file cannot be written; an earlier one is then as it was.
    """
    write_json({**result, _CHECKSUM: _checksum(result)}, output / RESULT)
