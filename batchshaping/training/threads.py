"""How many threads a network is computed with on the CPU.

The threads of a process share out each layer and wait for each other at its end. In a small layer they gain
nothing, and where another process takes the core of one of them, all others wait for it, layer after layer.
A step of training took, with one thread and with two on a machine of two cores, idle and beside two busy
processes:

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

From about 35 million multiply-adds a layer on, a second thread makes a step one and a half times as fast or
faster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["MULTIPLY_ADDS_OF_A_THREAD", "suitable_threads", "using_threads"]

MULTIPLY_ADDS_OF_A_THREAD = 16e6
"""How many multiply-adds of an average layer, over a whole batch, are worth a thread."""


def suitable_threads(
    network: nn.Module, multiply_adds: float, device: torch.device | str = "cpu", processes: int = 1
) -> int:
    r"""As many threads as have enough to do in each layer, and no more than there are.

    .. math::
        \max\left(1, \min\left(\left\lfloor
        \frac{\text{multiply-adds}}{\text{layers} \cdot 16 \cdot 10^6} \right\rfloor,
        \left\lfloor \frac{\text{cores}}{\text{processes}} \right\rfloor,
        \text{threads of this process} \right)\right),

    where layers are convolutions and linear layers. The threads of this process are as many as cores, unless
    ``OMP_NUM_THREADS`` or :func:`torch.set_num_threads` say otherwise. On another device than the CPU there
    is nothing to choose, and the threads of this process stay as many as they are.

    Args:
        network: the network.
        multiply_adds: what a forward pass of a batch costs.
        device: where it is computed.
        processes: how many processes of this machine compute at the same time.

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
    """The cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Compute with so many threads, in this process and in those that it starts; afterwards as before.

    Args:
        count: how many threads.

    Example:
        >>> with using_threads(1):
        ...     torch.get_num_threads()
        1
    """
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(count)
    # Processes that are started read it; and where it is set, Lightning leaves the threads as they are.
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if variable is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = variable
