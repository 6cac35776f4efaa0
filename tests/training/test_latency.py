"""Latency: turns, one image at a time, and a file that belongs to its result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchshaping as bs
from batchshaping.training import latency
from batchshaping.training.config import RunConfig
from batchshaping.training.latency import LATENCY, measure_run, read_latency, seconds_of_images, take_turns
from batchshaping.training.run import RunError, load_run, train


class Clock:
    """A clock that moves only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


def test_all_take_turns_and_only_what_runs_is_timed(clock: Clock) -> None:
    order = []

    def taking(name: str, seconds: float) -> latency.Candidate:
        @contextmanager
        def candidate(turn: int) -> Iterator[Callable[[], object]]:
            def run() -> None:
                order.append(f"{name}{turn}")
                clock.now += seconds * (turn + 1)

            clock.now += 100
            yield run
            clock.now += 100

        return candidate

    seconds = take_turns({"a": taking("a", 1), "b": taking("b", 10)}, turns=3)
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert seconds == {"a": [1, 2, 3], "b": [10, 20, 30]}


def test_seconds_are_medians_over_passes_one_image_at_a_time(clock: Clock) -> None:
    class Taking(nn.Module):
        """Takes as many seconds as the image says; the first pass is disturbed."""

        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape == (1, 2) and torch.is_inference_mode_enabled()
            self.passes += 1
            clock.now += x[0, 0].item() + (1000 if self.passes <= 3 + 4 else 0)
            return x

    images = torch.tensor([[1.0, 0], [5, 0], [2, 0], [4, 0]])
    seconds = seconds_of_images({"one": Taking(), "two": Taking()}, images, repeats=3)
    assert seconds["one"].tolist() == seconds["two"].tolist() == [1, 5, 2, 4]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    train(RunConfig(epochs=1, width=4, logger="none", accelerator="cpu"), output)
    return output


def test_a_run_has_the_time_and_the_multiply_adds_of_each_image(finished: Path) -> None:
    assert read_latency(finished) is None
    measured = measure_run(finished, images=7, repeats=2)
    assert measured == read_latency(finished) == read_latency(finished / "result.json")
    assert len(measured["images"]) == 7 and measured["images"][-1] == 449
    assert {name: len(values) for name, values in measured["seconds"].items()} == {
        "conditional": 7,
        "dense": 7,
    }
    network, data = load_run(finished)
    images, _ = data.test.__getitems__(measured["images"])
    with torch.no_grad():
        assert measured["multiply_adds"] == bs.count_macs(network, data.normalize(images)).tolist()


def test_a_run_without_gates_is_dense(tmp_path: Path) -> None:
    train(RunConfig(epochs=1, width=4, gated=False, logger="none", accelerator="cpu"), tmp_path / "run")
    measured = measure_run(tmp_path / "run", images=2, repeats=1)
    assert measured["seconds"].keys() == {"dense"} and len({*measured["multiply_adds"]}) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "expected version 1, received 2"),
        ({"result": "0"}, "received another's"),
        (None, "received something else"),
    ],
)
def test_a_file_of_something_else_is_refused_in_a_line(
    finished: Path, change: dict[str, Any] | None, words: str
) -> None:
    measured = measure_run(finished, images=1, repeats=1)
    text = "[1, 2" if change is None else json.dumps(measured | change)
    (finished / LATENCY).write_text(text)
    with pytest.raises(RunError, match=words):
        read_latency(finished)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected the folder of a run"):
        measure_run(tmp_path)
