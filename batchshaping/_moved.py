"""Modules under their former names, so that older imports and pickles work.

A name of a module that is gone is found here when it is imported, and stands for the module that has its
contents now: both names give the same object.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType

__all__ = ["MOVED"]

MOVED = {
    "beta_density": "cdfs.beta_density",
    "checks": "priors.checks",
    "derivatives": "cdfs.prepared",
    "distributed": "losses.distributed",
    "files": "storage.files",
    "fit": "experiments.fit",
    "memory": "losses.history",
    "prior_module": "priors.module",
    "published": "experiments.published",
    "ranking": "statistics.order",
    "sliced": "losses.sliced",
    "tails": "priors.tails",
    "training.demo": "experiments.demo",
    "values": "storage.values",
}
"""The former names of modules within this package, and the present ones."""

_PACKAGE = __name__.rpartition(".")[0]
_PRESENT = {f"{_PACKAGE}.{former}": f"{_PACKAGE}.{present}" for former, present in MOVED.items()}


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds a module under its former name, and loads the present one in its place."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _PRESENT:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        # What is in sys.modules after this is what the import statement gives.
        sys.modules[module.__name__] = importlib.import_module(_PRESENT[module.__name__])

    def get_code(self, fullname: str) -> CodeType | None:
        """What ``python -m`` runs."""
        spec = importlib.util.find_spec(_PRESENT[fullname])
        assert spec is not None and isinstance(spec.loader, importlib.abc.InspectLoader)
        return spec.loader.get_code(spec.name)

    def get_source(self, fullname: str) -> str | None:
        spec = importlib.util.find_spec(_PRESENT[fullname])
        assert spec is not None and isinstance(spec.loader, importlib.abc.InspectLoader)
        return spec.loader.get_source(spec.name)


sys.meta_path.append(_MovedModules())
