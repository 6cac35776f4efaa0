"""The number of threads with which a network is computed on the CPU.

The threads of a process divide the work of each layer and wait for each other at its end. In a small layer
this gains nothing; and where another process occupies the core of one thread, all others wait for it in every
layer. A training step took the following times with one thread and with two threads, on a machine of two
cores that was idle or had two other busy processes:

=========================================  =============================  =============  ==================
network, images in a step                  million multiply-adds a layer  idle machine   two busy processes
=========================================  =============================  =============  ==================
ResNet-8 of width 16, 64 of 8 x 8 pixels   3                              17, 18 ms      36, 2084 ms
ResNet-20 of width 16, 64 of 8 x 8         4                              43, 39 ms
ResNet-8, 64 of 28 x 28, stem of stride 2  10                             34, 25 ms
ResNet-8, 64 of 28 x 28                    37                             102, 64 ms
ResNet-20, 64 of 32 x 32                   65                             343, 228 ms    670, 1057 ms
ResNet-8, 256 of 28 x 28                   150                            454, 277 ms    877, 2424 ms
ResNet-18, 16 of 224 x 224                 784                            3317, 1821 ms
=========================================  =============================  =============  ==================

From about 35 million multiply-adds a layer on, a second thread makes a step at least 1.5 times as fast.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["MULTIPLY_ADDS_OF_A_THREAD", "suitable_threads", "using_threads"]

MULTIPLY_ADDS_OF_A_THREAD = 16e6
"""Number of multiply-adds of an average layer, over a whole batch, for which one more thread pays off."""


def suitable_threads(
    network: nn.Module, multiply_adds: float, device: torch.device | str = "cpu", processes: int = 1
) -> int:
    r"""The number of threads that have enough work in each layer, at most as many as are available.

    .. math::
        \max\left(1, \min\left(\left\lfloor
        \frac{\text{multiply-adds}}{\text{layers} \cdot 16 \cdot 10^6} \right\rfloor,
        \left\lfloor \frac{\text{cores}}{\text{processes}} \right\rfloor,
        \text{threads of this process} \right)\right),

    where layers are convolutions and linear layers. A process has as many threads as there are cores, unless
    ``OMP_NUM_THREADS`` or :func:`torch.set_num_threads` set another number. For other devices than the CPU,
    the current number of threads is returned.

    Args:
        network: the network.
        multiply_adds: multiply-adds of a forward pass of a batch.
        device: device of the network.
        processes: number of processes that compute on this machine at the same time.

    Example:
        >>> from batchshaping.training.config import RunConfig
        >>> from batchshaping.training.module import make_network
        >>> suitable_threads(make_network(RunConfig(), classes=10, channels=1), multiply_adds=49e6)
        1
    """
    current = torch.get_num_threads()
    if torch.device(device).type != "cpu":
        return current
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules())
    busy = int(multiply_adds / max(layers, 1) / MULTIPLY_ADDS_OF_A_THREAD)
    return max(1, min(busy, _cores() // processes, current))


def _cores() -> int:
    """Number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Compute with a number of threads, in this process and in processes that it starts.

    Afterwards, the number is as before.

    Args:
        count: number of threads.

    Example:
        >>> with using_threads(1):
        ...     torch.get_num_threads()
        1
    """
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(count)
    # Processes that are started read this variable, and Lightning does not change the threads if it is set.
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if variable is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = variable
