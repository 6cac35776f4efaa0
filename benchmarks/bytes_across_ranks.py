"""Bytes that a rank sends for one forward and backward pass, as its TCP connections count them.

Gloo processes on this machine. The columns dealt out by all-to-all, as the loss does it, against the batch
gathered on every rank. Linux only. Run as ``python benchmarks/bytes_across_ranks.py``.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import tempfile
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import batchshaping as bs

PRIOR = bs.Beta(0.6, 0.4)
# Where Linux has tcpi_bytes_sent in struct tcp_info, and tcpi_bytes_retrans behind it.
BYTES_SENT = 200


def bytes_sent() -> int:
    """What this process has sent through the connections it has now, each byte counted once."""
    total = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(descriptor).startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(descriptor.name)))
        except OSError:  # closed in the meantime
            continue
        with connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent, again = struct.unpack_from("QQ", info, BYTES_SENT)
                total += sent - again
    return total


def dealt_out(x: Tensor) -> Tensor:
    """The loss of the global batch as this package computes it; times the gradient's scale of one process."""
    return bs.batch_shaping(x, PRIOR, 0, group="world") / dist.get_world_size()


class Gather(torch.autograd.Function):
    """The batch of all ranks on every rank; each has the gradient of its own part at hand."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gathered(x: Tensor) -> Tensor:
    return bs.batch_shaping(Gather.apply(x), PRIOR, 0)


def measure(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, int, Tensor]:
    """Bytes that the forward and the backward pass send, and the gradient."""
    x = x.clone().requires_grad_()
    dist.barrier()
    start = bytes_sent()
    value = loss(x)
    middle = bytes_sent()
    value.backward()
    return middle - start, bytes_sent() - middle, x.grad


def rank_main(rank: int, world: int, store: str, samples: int, gates: int, results: SimpleQueue) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(rank)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.rand(samples, gates).to(dtype)
        *dealt, gradient = measure(dealt_out, x)
        *all_of_it, expected = measure(gathered, x)
        torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
        found.append((x.numel() * x.element_size(), *dealt, sum(all_of_it)))
    results.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


def run(world: int, samples: int, gates: int) -> list[list[tuple[int, ...]]]:
    """For every rank and dtype: its own values, bytes sent forward and backward, and by gathering."""
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        operands = (world, str(Path(folder) / "store"), samples, gates, results)
        context = mp.spawn(rank_main, operands, nprocs=world, join=False)
        found = [results.get() for _ in range(world)]
        context.join()
    return [by_dtype for _, by_dtype in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--samples", type=int, default=8, help="samples a rank")
    parser.add_argument("--gates", type=int, default=65536)
    arguments = parser.parse_args()
    shape = f"{arguments.samples} samples x {arguments.gates} gates a rank"
    print(f"{shape}, gloo, torch {torch.__version__}: KiB sent by the rank that sends most")
    print(
        f"{'dtype':>9}{'ranks':>7}{'own values':>12}{'forward':>10}{'backward':>10}{'both':>10}{'ratio':>8}"
        f"{'gathered':>12}{'ratio':>8}"
    )
    for world in arguments.worlds:
        by_rank = run(world, arguments.samples, arguments.gates)
        for index, dtype in enumerate(("float32", "bfloat16")):
            rows = [by_dtype[index] for by_dtype in by_rank]
            own, forward, backward, gathered = max(rows, key=lambda row: row[1] + row[2])
            gathered = max(row[3] for row in rows)
            both = forward + backward
            kib = (f"{n / 1024:.1f}" for n in (own, forward, backward, both, gathered))
            own_, forward_, backward_, both_, gathered_ = kib
            print(
                f"{dtype:>9}{world:>7}{own_:>12}{forward_:>10}{backward_:>10}{both_:>10}{both / own:>8.2f}"
                f"{gathered_:>12}{gathered / own:>8.2f}"
            )


if __name__ == "__main__":
    main()
