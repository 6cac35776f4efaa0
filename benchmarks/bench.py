"""This package beside its peers, all in one run: `make bench`.

Every comparison alternates between its candidates and takes medians, since machines are noisy; what counts
are the ratios. Peers that are not installed are left out and named. A benchmark is no test: nothing fails on
time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special
import scipy.stats
import torch
from torch import Tensor

import batchshaping as bs

SAMPLES, GATES = 256, 1024
PEERS = ("numpy", "scipy", "torch", "torch-betainc", "jax")


def medians(candidates: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each candidate, taken in turn."""
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


# What everybody writes: the CDF by SciPy, on the CPU and without its own derivatives


class _ByScipy(torch.autograd.Function):
    """A CDF through NumPy and back; the derivatives in the parameters are finite differences."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, distribution: Any, *parameters: Tensor) -> Tensor:
        values, arguments = x.detach().numpy(), [p.detach().numpy() for p in parameters]
        ctx.inputs = values, distribution, arguments
        return torch.from_numpy(distribution.cdf(values, *arguments)).to(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        values, distribution, arguments = ctx.inputs
        by_x = gradient * torch.from_numpy(distribution.pdf(values, *arguments)).to(gradient)
        by_parameter: list[Tensor | None] = []
        for k, needed in enumerate(ctx.needs_input_grad[2:]):
            if not needed:
                by_parameter.append(None)
                continue
            up, down = list(arguments), list(arguments)
            up[k], down[k] = up[k] + 1e-3, down[k] - 1e-3
            slope = (distribution.cdf(values, *up) - distribution.cdf(values, *down)) / 2e-3
            by_parameter.append(
                (gradient * torch.from_numpy(slope).to(gradient)).sum_to_size(arguments[k].shape)
            )
        return by_x, None, *by_parameter


def round_trip(x: Tensor, distribution: Any, *parameters: Tensor) -> Tensor:
    """The loss with SciPy's CDF."""
    values, _ = torch.sort(x, dim=0)
    positions = torch.arange(1, len(x) + 1, dtype=x.dtype).unsqueeze(-1) / (len(x) + 1)
    residual: Tensor = _ByScipy.apply(values, distribution, *parameters) - positions
    return residual.square().mean()


def step(loss: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Callable[[], None]:
    """Forward and backward of a loss of leaves."""

    def run() -> None:
        for leaf in (x, *parameters):
            leaf.grad = None
        loss(x, *parameters).backward()

    return run


def losses(repeats: int) -> list[dict[str, Any]]:
    """The loss, forward and backward, beside a bare sort of the same values and the SciPy round trip."""
    x = torch.rand(SAMPLES, GATES, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = x.detach()
    a, b = (torch.full((GATES,), v).requires_grad_() for v in (0.6, 0.4))
    fixed = {
        "Normal(0.6, 0.1)": (bs.Normal(0.6, 0.1), scipy.stats.norm, (0.6, 0.1)),
        "RelaxedBernoulli(0.2, 0.25)": (bs.RelaxedBernoulli(0.2, 0.25), None, ()),
        "SymBeta(0.6)": (bs.SymBeta(0.6), scipy.stats.beta, (0.6, 0.4)),
        "Beta(2, 6)": (bs.Beta(2, 6), scipy.stats.beta, (2.0, 6.0)),
        "Beta(30, 70)": (bs.Beta(30, 70), scipy.stats.beta, (30.0, 70.0)),
    }
    ours = {
        name: step(lambda x, prior=prior: bs.batch_shaping(x, prior, dim=0), x)
        for name, (prior, _, _) in fixed.items()
    }
    learned = f"{GATES} learned Beta"
    ours[learned] = step(lambda x, a, b: bs.batch_shaping(x, bs.Beta(a, b), dim=0), x, a, b)
    times = medians({"sort": lambda: torch.sort(values, dim=-1), **ours}, repeats)
    peers = {}
    for name, (_, distribution, parameters) in fixed.items():
        if distribution is not None:
            numbers = [torch.tensor(p) for p in parameters]
            peers[name] = step(lambda x, d=distribution, n=numbers: round_trip(x, d, *n), x)
    peers[learned] = step(lambda x, a, b: round_trip(x, scipy.stats.beta, a, b), x, a, b)
    peer_times = medians(peers, max(repeats // 5, 2))
    return [
        {
            "prior": name,
            "ms": 1e3 * times[name],
            "sorts": times[name] / times["sort"],
            "round trip": peer_times[name] / times[name] if name in peer_times else None,
            "sort ms": 1e3 * times["sort"],
        }
        for name in ours
    ]


def cdfs(repeats: int) -> list[dict[str, Any]]:
    """The incomplete beta function on as many values, with and without its gradients."""
    x = torch.rand(SAMPLES * GATES, generator=torch.Generator().manual_seed(0))
    values = x.numpy()
    rows = []
    for a, b in ((0.6, 0.4), (2.0, 6.0), (30.0, 70.0)):
        numbers = np.float32(a), np.float32(b)
        parameters = [torch.tensor(v) for v in (a, b)]
        leaves = [t.clone().requires_grad_() for t in (*parameters, x)]
        forward: dict[str, Callable[[], Any]] = {
            "batchshaping": lambda p=parameters: bs.betainc(*p, x),
            "scipy": lambda p=numbers: scipy.special.betainc(*p, values),
        }
        gradients: dict[str, Callable[[], Any]] = {
            "batchshaping": step(lambda a, b, x: bs.betainc(a, b, x).sum(), *leaves)
        }
        if importlib.util.find_spec("torch_betainc"):
            import torch_betainc

            forward["torch-betainc"] = lambda p=parameters: torch_betainc.betainc(*p, x)
            gradients["torch-betainc"] = step(lambda a, b, x: torch_betainc.betainc(a, b, x).sum(), *leaves)
        if importlib.util.find_spec("jax"):
            import jax

            on_jax = [jax.numpy.asarray(t.numpy()) for t in (*parameters, x)]
            compiled = jax.jit(jax.scipy.special.betainc)
            forward["jax"] = lambda c=compiled, o=on_jax: c(*o).block_until_ready()
        quick = {name: run for name, run in forward.items() if name in ("batchshaping", "scipy")}
        times = medians(quick, repeats)
        slow = {"batchshaping": forward["batchshaping"]} | {
            n: r for n, r in forward.items() if n not in quick
        }
        slow_times = medians(slow, max(repeats // 5, 2))
        gradient_times = medians(gradients, max(repeats // 5, 2))
        row: dict[str, Any] = {"a, b": f"{a:g}, {b:g}", "ms": 1e3 * times["batchshaping"]}
        row["scipy"] = times["scipy"] / times["batchshaping"]
        for peer in ("torch-betainc", "jax"):
            row[peer] = slow_times[peer] / slow_times["batchshaping"] if peer in slow_times else None
        row["gradients ms"] = 1e3 * gradient_times["batchshaping"]
        peer_time = gradient_times.get("torch-betainc")
        row["gradients torch-betainc"] = peer_time / gradient_times["batchshaping"] if peer_time else None
        rows.append(row)
    return rows


def sines_and_cosines(embedding: Tensor) -> Tensor:
    """The sliced Epps-Pulley statistic as it is usually written, all angles at once and autograd."""
    directions = torch.randn(embedding.shape[1], GATES)
    z = embedding @ (directions / directions.norm(dim=0))
    t = torch.linspace(0, 3, 17)
    target = torch.exp(-t.square() / 2)
    angles = z.unsqueeze(-1) * t
    distance = (angles.cos().mean(0) - target).square() + angles.sin().mean(0).square()
    return torch.trapezoid(2 * distance * target, t).mean()


def sliced(repeats: int) -> list[dict[str, Any]]:
    """An embedding of 256 x 128 on 1,024 slices, forward and backward."""
    embedding = torch.randn(SAMPLES, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    names = ("cramer_von_mises", "anderson_darling", "wasserstein", "epps_pulley")
    runs: dict[str, Callable[[], Any]] = {
        name: step(bs.SlicedBatchShapingLoss(GATES, statistic=name), embedding) for name in names
    }
    runs["Epps-Pulley by sines and cosines"] = step(sines_and_cosines, embedding)
    times = medians(runs, repeats)
    return [{"statistic": name, "ms": 1e3 * value} for name, value in times.items()]


def curve(shapes: list[tuple[int, int]], repeats: int) -> list[dict[str, Any]]:
    """The time of the loss as the number of samples or of gates grows, and the memory that it takes."""
    rows = []
    for samples, gates in shapes:
        command = [sys.executable, __file__, "--one", str(samples), str(gates), "--repeats", str(repeats)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(found.stdout))
    return rows


def one(samples: int, gates: int, repeats: int) -> dict[str, Any]:
    """One shape in a process of its own, so that its peak memory is its own."""
    x = torch.rand(samples, gates, generator=torch.Generator().manual_seed(0)).requires_grad_()
    prior = bs.Beta(0.6, 0.4)
    bs.batch_shaping(torch.rand(8, requires_grad=True), prior).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss = bs.batch_shaping(x, prior, dim=0)
    loss.backward()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    x.grad = None
    repeats = 1 if samples * gates > 1e7 else repeats
    values = x.detach().T.contiguous()
    times = medians(
        {
            "loss": step(lambda x: bs.batch_shaping(x, prior, dim=0), x),
            "sort": lambda: torch.sort(values, dim=-1),
        },
        repeats,
    )
    # The peak is that of the whole process: what importing took hides a small one.
    extra = peak / (samples * gates * 4) if peak > 2**27 else None
    return {"samples": samples, "gates": gates, **times, "memory in tensors of x": extra}


def versions() -> dict[str, str]:
    """The machine and the versions of what was measured."""
    found = {"python": platform.python_version(), "batchshaping": bs.__version__}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    with open("/proc/cpuinfo") as lines:
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    found["machine"] = f"{platform.machine()} {model}, {torch.get_num_threads()} threads"
    return found


def cell(value: Any) -> str:
    """A number as it is printed."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}" if value < 10 else f"{value:.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(rows: list[dict[str, Any]], headings: dict[str, str]) -> str:
    """Rows as a Markdown table with these columns."""
    lines = ["| " + " | ".join(headings.values()) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(cell(row[key]) for key in headings) + " |" for row in rows]
    return "\n".join(lines)


def report(found: dict[str, Any]) -> str:
    """All tables as Markdown."""
    header = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    growth = [{**row, "ms": 1e3 * row["loss"], "sorts": row["loss"] / row["sort"]} for row in found["growth"]]
    parts = [
        f"Measured on {header}.",
        f"**The loss, forward and backward, {SAMPLES} samples x {GATES:,} gates, float32**",
        table(
            found["losses"],
            {
                "prior": "prior",
                "ms": "ms",
                "sorts": "in bare `torch.sort`s",
                "round trip": "times faster than the SciPy round trip",
            },
        ),
        f"**`betainc` on {SAMPLES * GATES:,} values, float32; times faster than**",
        table(
            found["cdfs"],
            {
                "a, b": "a, b",
                "ms": "ms",
                "scipy": "SciPy",
                "torch-betainc": "torch-betainc",
                "jax": "JAX",
                "gradients ms": "ms with gradients",
                "gradients torch-betainc": "torch-betainc with gradients",
            },
        ),
        f"**The sliced loss, {SAMPLES} x 128 on {GATES:,} slices, forward and backward**",
        table(found["sliced"], {"statistic": "statistic", "ms": "ms"}),
        "**As samples and gates grow, Beta(0.6, 0.4)**",
        table(
            growth,
            {
                "samples": "samples",
                "gates": "gates",
                "ms": "ms",
                "sorts": "in bare `torch.sort`s",
                "memory in tensors of x": "extra memory, tensors of x",
            },
        ),
    ]
    return "\n\n".join(parts) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """The losses in sorts, and the growth with the number of samples."""
    from matplotlib.figure import Figure

    from batchshaping.figures.style import COLORS, house_style

    colors = [COLORS["empirical"], COLORS["loss"]]
    with house_style():
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        rows = found["losses"][::-1]
        left.barh([row["prior"] for row in rows], [row["sorts"] for row in rows], color=colors[0])
        left.axvline(1, color="0.2", linestyle="--", linewidth=1)
        left.set_xlabel("time of loss and gradient, in bare sorts of its input")
        one_gate = [row for row in found["growth"] if row["gates"] == 1]
        samples = [row["samples"] for row in one_gate]
        for name, color, marker in (("loss", colors[0], "o"), ("sort", colors[1], "s")):
            label = "loss and gradient" if name == "loss" else "torch.sort"
            right.loglog(samples, [row[name] for row in one_gate], marker=marker, color=color, label=label)
        right.set_xlabel("samples")
        right.set_ylabel("seconds")
        right.legend()
        figure.savefig(path, dpi=150)


def main() -> None:
    """Run everything, print the tables and write them, the figures behind them and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--largest", type=float, default=1e7, help="most samples of the curve, up to 1e8")
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(*arguments.one, arguments.repeats)))
        return
    single = [(int(10**k), 1) for k in range(3, 9) if 10**k <= arguments.largest]
    shapes = [*single, (256, 64), (256, 1024), (256, 16384), (32, 65536)]
    found = {
        "versions": versions(),
        "losses": losses(arguments.repeats),
        "cdfs": cdfs(arguments.repeats),
        "sliced": sliced(arguments.repeats),
        "growth": curve(shapes, max(arguments.repeats // 5, 3)),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = report(found)
    (arguments.output / "bench.json").write_text(json.dumps(found, indent=1))
    (arguments.output / "bench.md").write_text(text)
    plot(found, arguments.output / "bench.png")
    print(text)


if __name__ == "__main__":
    main()
