"""Processes of one machine as the ranks of a process group, kept alive from one task to the next."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A server that has torch imported and forks makes a process in a tenth of a second, a new one takes seconds.
START = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
DIED = "died"


class Outcome(NamedTuple):
    """What a task returned on one rank, or the traceback of its error, or DIED."""

    result: Any = None
    error: str | None = None


class Ranks:
    """A process group over gloo whose ranks run one task after the other.

    After an error its ranks are gone, and the next task gets new ones.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stop()

    def run(self, task: Callable[..., Any], *operands: Any, timeout: float = 60) -> list[Any]:
        """What ``task(rank, world, *operands)`` returns on every rank; a failed assertion fails here."""
        outcomes = self.outcomes(task, *operands, timeout=timeout)
        errors = [f"rank {rank}: {o.error}" for rank, o in enumerate(outcomes) if o.error is not None]
        assert not errors, "\n".join(errors)
        return [o.result for o in outcomes]

    def outcomes(self, task: Callable[..., Any], *operands: Any, timeout: float = 60) -> list[Outcome]:
        """The same with the errors of the ranks instead of one here."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((task, operands))
        outcomes: dict[Connection, Outcome] = {}
        end = time.monotonic() + timeout
        while len(outcomes) < self.world and time.monotonic() < end:
            for pipe in wait([p for p in self._pipes if p not in outcomes], end - time.monotonic()):
                try:
                    outcomes[pipe] = pipe.recv()
                except EOFError:
                    outcomes[pipe] = Outcome(error=DIED)
        hangs = Outcome(error=f"hangs: no answer within {timeout} seconds")
        found = [outcomes.get(pipe, hangs) for pipe in self._pipes]
        if any(o.error is not None for o in found):
            self._stop()
        return found

    def _start(self) -> None:
        context = mp.get_context(START)
        if START == "forkserver":
            context.set_forkserver_preload(["torch._dynamo", "numpy", "pytest", "batchshaping"])
        folder = tempfile.TemporaryDirectory()
        store = Path(folder.name) / "store"
        for rank in range(self.world):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(pipe)
        self._folder = folder

    def _stop(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        if self._processes:
            self._folder.cleanup()
        self._processes, self._pipes = [], []


def _serve(rank: int, world: int, store: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    while (received := pipe.recv()) is not None:
        task, operands = received
        torch.manual_seed(0)
        try:
            pipe.send(Outcome(task(rank, world, *operands)))
        except Exception:
            # As in any program, an error ends the process, and that is how the others notice.
            pipe.send(Outcome(error=traceback.format_exc()))
            break
    dist.destroy_process_group()
