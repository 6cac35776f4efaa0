"""How long a network takes for each image: several networks in turn, one image at a time.

The file ``latency.json`` in the folder of a run has

================== ==================================================================================
``version``        of this format
``result``         SHA-256 of the ``result.json`` that it belongs to
``machine``        processor, versions, number of threads, and whether there is native code, which needs a
                   C compiler
``repeats``        how often each image was computed; the seconds are medians over these
``images``         indices of the test images
``multiply_adds``  of each image in the trained network
``seconds``        of each image, by network: ``conditional`` is the trained network's inference copy, and
                   ``dense`` the same network without gates, as fast as it gets without a compiler
================== ==================================================================================
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchshaping.gates import native
from batchshaping.gates.cost import MultiplyAdds
from batchshaping.gates.dense import dense_inference
from batchshaping.gates.gate import gate_decisions
from batchshaping.gates.inference import conditional_inference
from batchshaping.training.folder import read_run_config
from batchshaping.training.measurements import Measurement
from batchshaping.training.run import load_run
from batchshaping.training.threads import suitable_threads, using_threads

__all__ = [
    "LATENCY",
    "Candidate",
    "machine",
    "measure_run",
    "read_latency",
    "seconds_of_images",
    "take_turns",
]

LATENCY = "latency.json"
"""Name of the file in the folder of a run."""

_LATENCY = Measurement(LATENCY, version=1, noun="latency", option="--latency")

Candidate = Callable[[int], AbstractContextManager[Callable[[], object]]]
"""What is timed in a turn, by the number of the turn; entering and leaving the context is not timed."""


def take_turns(candidates: Mapping[str, Candidate], turns: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each turn; in a turn all are timed, one after the other.

    So what disturbs the machine for a while disturbs all of them.

    Args:
        candidates: what is timed, by name.
        turns: how many turns there are.

    Example:
        >>> seconds = take_turns({"sum": lambda turn: nullcontext(lambda: sum(range(turn)))}, turns=3)
        >>> len(seconds["sum"])
        3
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(turns):
        for name, candidate in candidates.items():
            with candidate(turn) as run:
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    return seconds


@torch.inference_mode()
def seconds_of_images(
    networks: Mapping[str, nn.Module], images: Tensor, repeats: int = 5
) -> dict[str, Tensor]:
    """Seconds that each network takes for each image, one image at a time.

    All images are gone through as often as there are repeats, so that the repeats of an image are far apart.

    Args:
        networks: the networks in evaluation, on the CPU, by name.
        images: what they take, of shape (N, ...).
        repeats: how often each image is computed.

    Returns:
        For each network the median over the repeats, of shape (N,).

    Example:
        >>> networks = {"small": nn.Linear(8, 8), "large": nn.Linear(8, 4096)}
        >>> seconds_of_images(networks, torch.randn(20, 8))["small"].shape
        torch.Size([20])
    """

    def on_image(network: nn.Module) -> Candidate:
        return lambda turn: nullcontext(lambda: network(images[turn, None]))

    candidates = {name: on_image(network) for name, network in networks.items()}
    # Weights are packed for the size of an image when it comes for the second time.
    take_turns(candidates, min(3, len(images)))
    passes = [take_turns(candidates, len(images)) for _ in range(repeats)]
    return {
        name: torch.tensor([one[name] for one in passes], dtype=torch.double).median(dim=0).values
        for name in networks
    }


def machine() -> dict[str, Any]:
    """What was measured on: processor, cores, threads, versions, and whether there is native code.

    Example:
        >>> sorted(machine())
        ['cores', 'instructions', 'native', 'processor', 'python', 'threads', 'torch']
    """
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native": native.library() is not None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on every system
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def measure_run(
    output: Path, *, images: int = 200, repeats: int = 5, threads: int | None = None, **settings: Any
) -> dict[str, Any]:
    """Measure how long the trained network of a run takes for its test images, and keep it in the folder.

    Args:
        output: the folder of the run.
        images: how many test images are taken, at equal distances; all if there are fewer.
        repeats: how often each is computed.
        threads: number of threads; None takes as many as suit a single image.
        settings: replace those of the run, such as ``data_folder``.

    Returns:
        What the file holds, see above. A network without gates is timed as ``dense`` alone.

    Raises:
        RunError: if the folder contains no trained network.
        DataError: if the data cannot be used.
    """
    network, data = load_run(output, **settings)
    config = read_run_config(output, **settings)
    dense = config.network.ungated(len(data.classes), data.shape)
    networks = {"dense": dense_inference(dense)}
    chosen = torch.linspace(0, len(data.test) - 1, min(images, len(data.test))).long().tolist()
    inputs = data.normalize(data.test.__getitems__(chosen)[0])
    with torch.no_grad():
        cost = MultiplyAdds.measure(network, inputs[:1])
        if cost.widths:
            networks = {"conditional": conditional_inference(network), **networks}
            network(inputs)
        spent = cost.per_example(gate_decisions(network) if cost.widths else []).expand(len(chosen))
    with using_threads(threads or suitable_threads(network, cost.dense)):
        seconds = seconds_of_images(networks, inputs, repeats)
        measured = _LATENCY.of(
            output,
            machine=machine(),
            repeats=repeats,
            images=chosen,
            multiply_adds=spent.tolist(),
            seconds={name: values.tolist() for name, values in seconds.items()},
        )
    _LATENCY.write(measured, output)
    return measured


def read_latency(output: Path) -> dict[str, Any] | None:
    """What was measured of a run, None where nothing was.

    Args:
        output: the folder of the run, or its ``result.json``.

    Raises:
        RunError: in one line, if the file cannot be read, or belongs to another result.
    """
    return _LATENCY.read(output)
