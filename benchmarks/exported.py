"""Conditional inference in ONNX Runtime beside dense inference: `python benchmarks/exported.py`.

A gated ResNet, one image on the CPU, as `export_onnx` writes it; with random gates that are constants, a
share of them open. The peer is the same network without gates, exported by torch.onnx too. Candidates run one
after the other, twice, since the waiting threads of a session would disturb others. Shown are medians over
several patterns of gates, in milliseconds, and

    share of the ratio = (time dense / time conditional) / (multiply-adds dense / multiply-adds conditional)
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torchvision
from onnx import numpy_helper

import batchshaping as bs
from batchshaping.gates.gate import named_gates


def with_gates(model: Any, decisions: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The model with gates that decide the same for each image."""
    made = copy.deepcopy(model)
    for tensor in made.graph.initializer:
        gate, _, name = tensor.name.rpartition(".")
        if gate in decisions and name in ("last_weight", "last_bias"):
            values = np.zeros(tensor.dims, np.float32)
            if name == "last_bias":
                values += np.where(decisions[gate], 1, -1)
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    return made


def session(model: Any, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def files(folder: Path, name: str, size: int, gates: int) -> tuple[Path, Path]:
    """The network without gates and its gated form, exported unless they are there."""
    torch.manual_seed(0)
    resnet = torchvision.models.get_model(name).eval()
    gated = bs.gate_resnet(copy.deepcopy(resnet), gates_per_layer=gates).eval()
    x = torch.randn(1, 3, size, size)
    paths = folder / f"{name}-{size}.onnx", folder / f"{name}-{size}-{gates}.onnx"
    for path, network in zip(paths, (resnet, bs.conditional_inference(gated)), strict=True):
        if not path.exists():
            start = time.perf_counter()
            bs.export_onnx(network, path, x)
            print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1e6:.1f} MB")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--gates", type=int, default=8, help="gates a layer")
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.5, 0.3])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--patterns", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="where files are kept for the next time")
    parser.add_argument("--only-export", action="store_true")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    dense_path, gated_path = files(folder, options.network, options.size, options.gates)
    if options.only_export:
        return
    x = torch.randn(1, 3, options.size, options.size)
    resnet = torchvision.models.get_model(options.network).eval()
    gated = bs.gate_resnet(copy.deepcopy(resnet), gates_per_layer=options.gates).eval()
    dense_macs = bs.count_macs(resnet, x).item()
    dense, conditional = onnx.load(dense_path), onnx.load(gated_path)
    models = {("dense", 0): dense}
    macs: dict[str, list[float]] = {"dense": [dense_macs]}
    for share in options.shares:
        for seed in range(options.patterns):
            with bs.gates_forced(gated, share, seed), torch.no_grad():
                macs.setdefault(f"{share:.0%} open", []).append(bs.count_macs(gated, x).item())
                decided = [d[0].bool().numpy() for d in bs.gate_decisions(gated)]
            made = with_gates(conditional, dict(zip(named_gates(gated), decided, strict=True)))
            models[f"{share:.0%} open", seed] = made
    seconds: dict[str, list[float]] = {}
    for (name, _), model in [*models.items()] * 2:
        run = session(model, options.threads)
        for turn in range(-3, options.repeats):
            start = time.perf_counter()
            run.run(None, {"images": x.numpy()})
            if turn >= 0:
                seconds.setdefault(name, []).append(time.perf_counter() - start)
        del run
    print(
        f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, {options.threads} threads on "
        f"{os.cpu_count()} {platform.machine()} cores, {options.network}, {options.size} pixels, "
        f"{options.gates} gates a layer"
    )
    print(f"{'':12} {'ms':>8} {'faster':>8} {'ideal':>8} {'share':>8}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        faster, ideal = medians["dense"] / value, dense_macs / statistics.mean(macs[name])
        print(f"{name:12} {1e3 * value:8.1f} {faster:8.2f} {ideal:8.2f} {faster / ideal:8.2f}")


if __name__ == "__main__":
    main()
