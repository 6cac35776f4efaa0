"""What is measured of a finished run later: files in its folder that belong to its result."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchshaping.storage.files import write_json
from batchshaping.training.folder import RESULT, RunError

__all__ = ["Measurement"]


@dataclass(frozen=True)
class Measurement:
    """A kind of measurement, and its file in the folder of a run.

    Attributes:
        file: name of the file.
        version: of its format.
        noun: what is in it, for a reader.
        option: of ``batchshaping evaluate``, which measures it.
    """

    file: str
    version: int
    noun: str
    option: str

    def of(self, output: Path, **measured: Any) -> dict[str, Any]:
        """What the file is to hold, with the version and the result that it belongs to.

        Raises:
            RunError: if the folder has no result.
        """
        return {"version": self.version, "result": _digest(output), **measured}

    def write(self, measured: dict[str, Any], output: Path) -> None:
        """Keep a measurement in the folder of its run.

        Raises:
            RunError: if it cannot be written.
        """
        try:
            write_json(measured, output / self.file)
        except OSError as error:
            raise RunError(f"{output}: {error.strerror or error}, expected a folder to write to") from None

    def read(self, output: Path) -> dict[str, Any] | None:
        """What was measured of a run, None where nothing was.

        Args:
            output: the folder of the run, or its ``result.json``.

        Raises:
            RunError: in one line, if the file cannot be read, or belongs to another result.
        """
        folder = output if output.is_dir() else output.parent
        path = folder / self.file
        if not os.path.lexists(path) or (output != folder and output.name != RESULT):
            return None
        try:
            measured = json.loads(path.read_text(encoding="utf-8"))
            version = measured["version"]
        except OSError as error:
            raise RunError(f"{path}: {error.strerror or error}") from None
        except (LookupError, TypeError, ValueError, RecursionError):
            raise RunError(f"{path}: expected the {self.noun} of a run, received something else") from None
        if version != self.version:
            raise RunError(f"{path}: expected version {self.version}, received {version!r}"[:200])
        if measured.get("result") != _digest(folder):
            raise RunError(
                f"{path}: expected the {self.noun} of the result beside it, received another's; "
                f"batchshaping evaluate {self.option} measures it anew"
            )
        return dict(measured)


def _digest(output: Path) -> str:
    try:
        return hashlib.sha256((output / RESULT).read_bytes()).hexdigest()
    except OSError as error:
        raise RunError(f"{output / RESULT}: {error.strerror or error}") from None
