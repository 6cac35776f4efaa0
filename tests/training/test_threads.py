"""A run computes with the threads that suit its network, in each of its processes, and leaves none behind."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchshaping.gates.cost import MultiplyAdds
from batchshaping.training import evaluation, threads
from batchshaping.training.config import RunConfig, write_config
from batchshaping.training.module import make_network
from batchshaping.training.run import evaluate_run, resume, train
from batchshaping.training.threads import suitable_threads, using_threads

ONCE = RunConfig(width=2, hidden=4, train_images=128, batch_size=32, epochs=1)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Each test leaves threads and environment as they were."""
    before = counted()
    yield
    assert counted() == before


def machine(monkeypatch: pytest.MonkeyPatch, cores: int, current: int | None = None) -> None:
    """Let there be so many cores, and a process with as many threads or fewer."""
    monkeypatch.setattr(threads, "_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: current or cores)


# The rule


@pytest.mark.parametrize(
    ("settings", "shape", "batch", "expected"),
    [
        ({}, (1, 8, 8), 64, 1),
        ({"stem_stride": 2}, (1, 8, 8), 64, 1),
        ({"network": "resnet56"}, (1, 8, 8), 64, 1),
        ({"stem_stride": 2}, (1, 28, 28), 64, 1),
        ({}, (1, 28, 28), 64, 2),
        ({"network": "resnet20"}, (3, 32, 32), 64, 4),
        ({"network": "resnet18"}, (3, 224, 224), 16, 16),
    ],
)
def test_small_networks_get_one_thread_and_large_ones_all_cores(
    settings: dict[str, Any],
    shape: tuple[int, ...],
    batch: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, cores=16)
    network = make_network(RunConfig(**settings), 10, shape[0])
    cost = MultiplyAdds.measure(network, torch.zeros(1, *shape))
    assert suitable_threads(network, cost.dense * batch) == expected


@given(
    multiply_adds=st.floats(0, 1e15),
    layers=st.integers(0, 5),
    cores=st.integers(1, 256),
    current=st.integers(1, 256),
    processes=st.integers(1, 300),
)
def test_every_thread_has_enough_to_do_and_a_core(
    multiply_adds: float, layers: int, cores: int, current: int, processes: int
) -> None:
    network = nn.Sequential(*(nn.Linear(1, 1) for _ in range(layers)))
    with pytest.MonkeyPatch.context() as patch:
        machine(patch, cores, current)
        count = suitable_threads(network, multiply_adds, processes=processes)
        assert count >= 1
        if count > 1:
            assert count * processes <= cores and count <= current
            assert multiply_adds / max(layers, 1) / count >= threads.MULTIPLY_ADDS_OF_A_THREAD
        # One more thread would have too little to do or no core.
        more = (count + 1) * max(layers, 1) * threads.MULTIPLY_ADDS_OF_A_THREAD
        assert more > multiply_adds or (count + 1) * processes > cores or count + 1 > current


def test_the_threads_beside_a_gpu_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cores=16, current=7)
    assert suitable_threads(nn.Linear(1, 1), 1.0, torch.device("cuda")) == 7


# Threads while something runs


def counted() -> tuple[int, str | None]:
    return torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")


@pytest.mark.parametrize("variable", [None, "5"])
def test_threads_and_environment_are_as_before_even_after_an_error(variable: str | None) -> None:
    def fail() -> None:
        with using_threads(3):
            assert counted() == (3, "3")
            with using_threads(2):
                assert counted() == (2, "2")
            assert counted() == (3, "3")
            raise KeyError

    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("OMP_NUM_THREADS", raising=False)
        if variable is not None:
            environment.setenv("OMP_NUM_THREADS", variable)
        before = torch.get_num_threads()
        with pytest.raises(KeyError):
            fail()
        assert counted() == (before, variable)


def logged(folder: Path) -> list[float]:
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        return [float(row["threads"]) for row in csv.DictReader(file) if row["threads"]]


def test_a_run_says_with_how_many_threads_it_was_trained(tmp_path: Path) -> None:
    result = train(ONCE, tmp_path / "suitable")
    assert result["threads"] == 1 and logged(tmp_path / "suitable") == [1]
    result = train(ONCE.model_copy(update={"threads": 3}), tmp_path / "given")
    assert result["threads"] == 3 and logged(tmp_path / "given") == [3]


def test_a_run_may_go_on_with_other_threads(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(ONCE, folder)
    (folder / "result.json").unlink()
    write_config(ONCE.model_copy(update={"threads": 2}), folder / "config.yaml")
    assert resume(folder)["threads"] == 2


def test_a_run_is_evaluated_with_its_threads_or_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(ONCE.model_copy(update={"threads": 3}), tmp_path / "run")
    used = []
    batches = evaluation.batches

    def recorded(*arguments: Any, **settings: Any) -> Any:
        used.append(torch.get_num_threads())
        return batches(*arguments, **settings)

    monkeypatch.setattr(evaluation, "batches", recorded)
    figures = evaluate_run(tmp_path / "run")
    assert evaluate_run(tmp_path / "run", threads=2)["accuracy"] == figures["accuracy"]
    assert used == [3, 2]


SCRIPT = """
import os, sys
from pathlib import Path
import torch
from batchshaping.training.config import RunConfig
from batchshaping.training.module import GatedClassifier
from batchshaping.training.run import train

def say(self):
    ranks = f"rank {self.global_rank} of {self.trainer.world_size}"
    print(ranks, "threads", torch.get_num_threads(), flush=True)

GatedClassifier.on_train_epoch_end = say
settings = {"threads": 3, "width": 2, "hidden": 4, "train_images": 64, "batch_size": 32, "epochs": 1}
config = RunConfig(devices=2, accelerator="cpu", **settings)
before = torch.get_num_threads()
result = train(config, Path("run"))
if result:
    print("result", result["threads"])
    print("afterwards", torch.get_num_threads() == before, os.environ.get("OMP_NUM_THREADS"))
"""


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_each_of_several_processes_has_the_threads_that_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    # More threads than cores would wait for each other by keeping the cores busy.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for rank in (0, 1):
        assert f"rank {rank} of 2 threads 3" in lines
    assert "result 3" in lines
    assert "afterwards True None" in lines
