"""Small computations side by side, each on one thread of the CPU.

PyTorch shares out each operation over all threads, which wait for each other at its end. Where operations are
small and there are many independent ones, it is faster to give each thread its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["side_by_side"]

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def side_by_side(tasks: Sequence[Callable[[], object]], threads: int) -> None:
    """Run tasks at the same time, without a gradient; each computes with one thread.

    Args:
        tasks: what is to be done, in any order.
        threads: how many at the same time.

    Example:
        >>> x = torch.zeros(3)
        >>> side_by_side([lambda k=k: x[k : k + 1].add_(k) for k in range(3)], threads=2)
        >>> x
        tensor([0., 1., 2.])
    """
    inference, autocast = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu")
    todo = iter(tasks)
    lock = threading.Lock()

    def work() -> None:
        # These are settings of a thread.
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", dtype, autocast):
            while True:
                with lock:
                    task = next(todo, None)
                if task is None:
                    return
                task()

    for running in [_pool(threads).submit(work) for _ in range(threads)]:
        running.result()


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            ready = threading.Barrier(threads + 1)

            def begin() -> None:
                torch.set_num_threads(1)
                ready.wait()

            pool = ThreadPoolExecutor(threads, "batchshaping", initializer=begin)
            before = torch.get_num_threads()
            for _ in range(threads):
                pool.submit(int)
            ready.wait()
            # What a thread sets becomes the default of threads that start later.
            torch.set_num_threads(before)
            _pools[threads] = pool
        return _pools[threads]


if hasattr(os, "register_at_fork"):
    # The threads are not there in a process that was forked.
    os.register_at_fork(after_in_child=_pools.clear)
