"""Conditional inference beside dense inference: `python benchmarks/inference.py`.

Gated ResNets with random gates (`gates_forced`), a share of them open, on the CPU. Milliseconds of a batch,
and how much of the saved multiply-adds became saved time:

    share of the ratio = (time dense / time conditional) / (multiply-adds dense / multiply-adds conditional)

The peer is the same network without gates, with batch normalization folded in, weights packed once, and
activation and sum fused into the convolutions. Eager PyTorch is shown beside it. All candidates alternate in
one process, and each meets many different patterns of gates. Shown are medians and 95th percentiles.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import batchshaping as bs
from batchshaping.gates.inference import fold_and_pack
from batchshaping.gates.packed import PackedConvolution, channels_last, convolve_add


class DenseBlock(nn.Module):
    """A residual block of torchvision, folded and packed."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        pairs += [(block.conv3, block.bn3)] if isinstance(block, Bottleneck) else []
        self.convolutions = nn.Sequential(*(PackedConvolution(*pair, relu=True) for pair in pairs))
        down = block.downsample
        self.downsample = None if down is None else PackedConvolution(down[0], down[1])

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.convolutions
        h = x = channels_last(x)
        for layer in inner:
            h = layer(h)
        other = x if self.downsample is None else self.downsample(x)
        fresh = self.downsample is not None
        return convolve_add(other, h, *last.whole(h), last.settings, True, fresh)


def dense(resnet: nn.Module) -> nn.Module:
    """The ungated network, folded and packed."""
    made = copy.deepcopy(resnet).eval()
    blocks = {
        block: DenseBlock(block) for block in made.modules() if isinstance(block, BasicBlock | Bottleneck)
    }
    return fold_and_pack(made, blocks)


def times(candidates: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each candidate, taken in turn; each is told the number of the turn."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-3, repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run(turn % 1000)
            if turn >= 0:
                found[name].append(1e3 * (time.perf_counter() - start))
    return found


def compare(
    name: str, batch: int, size: int, gates: int | None, shares: list[float], repeats: int, plan: bool
) -> None:
    torch.manual_seed(0)
    resnet = torchvision.models.get_model(name).eval()
    x = torch.randn(batch, 3, size, size)
    gated = bs.gate_resnet(copy.deepcopy(resnet), gates_per_layer=gates).eval()
    fast = bs.conditional_inference(gated, x if plan else None)
    packed = dense(resnet)
    dense_macs = bs.count_macs(resnet, x)[0].item()

    def forced(share: float) -> Callable[[int], Any]:
        def run(turn: int) -> Any:
            with bs.gates_forced(fast, share, seed=turn % 100):
                return fast(x)

        return run

    candidates: dict[str, Callable[[int], Any]] = {
        "dense, eager": lambda _: resnet(x),
        "dense, packed": lambda _: packed(x),
        **{f"{share:.0%} open": forced(share) for share in shares},
    }
    found = times(candidates, repeats)
    medians = {key: statistics.median(values) for key, values in found.items()}
    macs = {"dense, eager": dense_macs, "dense, packed": dense_macs}
    for share in shares:
        counts = []
        for seed in range(10):
            with bs.gates_forced(gated, share, seed=seed):
                counts.append(bs.count_macs(gated, x).mean().item())
        macs[f"{share:.0%} open"] = statistics.mean(counts)
    for key, values in found.items():
        p95 = sorted(values)[int(0.95 * len(values))]
        faster, ideal = medians["dense, packed"] / medians[key], dense_macs / macs[key]
        print(
            f"{name:10} {batch:3} {size:4} {key:14} {medians[key]:8.1f} {p95:8.1f} {faster:8.2f} "
            f"{ideal:8.2f} {faster / ideal:8.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet34", "resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224])
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.5, 0.3])
    parser.add_argument("--gates", type=int, default=8, help="gates a layer; 0 for a gate a channel")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--plan", action="store_true", help="measure the ways first")
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} "
        f"threads on {os.cpu_count()} {platform.machine()} cores, load {os.getloadavg()[0]:.1f}, "
        f"{options.gates} gates a layer"
    )
    heads = ("ms", "95 %", "faster", "ideal", "share")
    print(f"{'network':10} {'N':>3} {'size':>4} {'':14} " + " ".join(f"{head:>8}" for head in heads))
    with torch.inference_mode():
        for name, size, batch in itertools.product(options.networks, options.sizes, options.batches):
            compare(name, batch, size, options.gates or None, options.shares, options.repeats, options.plan)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
