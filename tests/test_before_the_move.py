"""What could be imported, and what was pickled, before the modules moved into folders."""

from __future__ import annotations

import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import batchshaping
from batchshaping._moved import MOVED

HERE = Path(__file__).parent / "before_the_move"
# Every module of that time, with all that it defined under a public name.
NAMES: dict[str, list[str]] = json.loads((HERE / "names.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", NAMES)
def test_every_former_name_can_be_imported(module: str) -> None:
    pytest.importorskip("torchvision")
    found = importlib.import_module(module)
    assert [name for name in NAMES[module] if not hasattr(found, name)] == []


@pytest.mark.parametrize(("former", "present"), MOVED.items())
def test_a_former_module_is_the_present_one(former: str, present: str) -> None:
    assert importlib.import_module(f"batchshaping.{former}") is importlib.import_module(
        f"batchshaping.{present}"
    )


@pytest.mark.parametrize("statement", ["from batchshaping import ranking", "import batchshaping.ranking"])
def test_a_former_module_is_found_in_a_fresh_process(statement: str) -> None:
    code = f"import sys; {statement}; assert 'batchshaping.statistics.order' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_former_module_can_be_run() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "batchshaping.ranking"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_a_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"batchshaping\.rankings"):
        importlib.import_module("batchshaping.rankings")


def test_pickles_of_that_time_give_the_numbers_of_that_time() -> None:
    pytest.importorskip("torchvision")
    # Priors, losses with their history, statistics, gates, a gated network, schedules: and what they gave.
    objects = pickle.loads((HERE / "objects.pickle").read_bytes())
    seen = objects["seen"]
    for loss, value in zip(objects["losses"], seen["losses"], strict=False):
        torch.testing.assert_close(loss.eval()(seen["x"]).detach(), value)
    with torch.no_grad():
        torch.testing.assert_close(objects["network"](seen["images"]), seen["logits"])
    assert [type(prior) for prior in objects["priors"]] == [
        batchshaping.Beta,
        batchshaping.SymBeta,
        batchshaping.RelaxedBernoulli,
        batchshaping.Normal,
    ]
    assert len(batchshaping.gate_decisions(objects["network"])) == 3
    assert objects["gate"](torch.randn(2, 4)).shape == (2, 3)
