r"""Conditional inference beside dense inference, on networks whose gates chance opens.

A comparison times the ways to compute one network on one batch, all in turn, in one process:

- *eager*: the network without gates, as it is;
- *packed*: the same with normalizations and sums folded into the convolutions, and weights packed once
  (:func:`~batchshaping.gates.dense.dense_inference`);
- *compiled*: the same by torch's compiler, with frozen weights, where there is one;
- *conditional*: the inference copy of the network with gates, a share of them open
  (:func:`~batchshaping.gates.forced.gates_forced`), with a different pattern in each turn; and other copies
  that its family of networks has.

What can be gained at most is the ratio of multiply-adds; what was gained of it is the

.. math::
    \text{share of the ideal} =
    \frac{\text{time of the fastest dense way} \,/\, \text{time}}
         {\text{its multiply-adds} \,/\, \text{multiply-adds}}.

With all gates open this is the price of gating.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from batchshaping.gates.cost import MultiplyAdds
from batchshaping.gates.dense import dense_inference
from batchshaping.gates.forced import gates_forced
from batchshaping.gates.gate import gate_decisions
from batchshaping.training.latency import take_turns
from batchshaping.training.networks import Network

__all__ = [
    "HEADS",
    "Comparison",
    "Way",
    "as_markdown",
    "compare",
    "machine_line",
    "notes",
    "rows",
    "section",
    "summary",
    "title",
]


@dataclass(frozen=True)
class Way:
    """A way to compute a batch, as it was measured.

    Attributes:
        name: see above.
        share: with which probability each gate was open; None for a dense way.
        multiply_adds: of an image, the mean over the turns.
        median: seconds of a batch.
        p95: 95th percentile of these seconds.
        until_gated: seconds until all that gates cost was computed, median; None where that is no one moment.
        facts: what the family of networks tells of it, means over the turns.
    """

    name: str
    share: float | None
    multiply_adds: float
    median: float
    p95: float
    until_gated: float | None = None
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        """Whether it computes everything."""
        return self.share is None


@dataclass(frozen=True)
class Comparison:
    """The ways to compute one network on one batch.

    Attributes:
        network: name of the network.
        settings: other settings of the network that are not the default.
        batch: number of images.
        size: pixels along the side of an image.
        turns: how often each way was timed.
        ways: the ways, dense ones first.
        first_calls: seconds of the first and of the second call of each kind of way, by its name.
        left_out: why a way is missing, by its name.
        memory: resident memory of the process before the turns and after them, in bytes, if it is known.
    """

    network: str
    settings: Mapping[str, Any]
    batch: int
    size: int
    turns: int
    ways: Sequence[Way]
    first_calls: Mapping[str, tuple[float, float]]
    left_out: Mapping[str, str]
    memory: tuple[int, int] | None

    @property
    def fastest(self) -> Way:
        """The fastest dense way."""
        return min((way for way in self.ways if way.is_dense), key=lambda way: way.median)

    def faster(self, way: Way) -> float:
        """How many times faster a way is than the fastest dense one."""
        return self.fastest.median / way.median

    def ideal(self, way: Way) -> float:
        """How many times fewer multiply-adds it has."""
        return self.fastest.multiply_adds / way.multiply_adds

    @staticmethod
    def of_json(told: Mapping[str, Any]) -> Comparison:
        """The comparison that :meth:`as_json` told."""
        ways = [Way(**{each.name: way[each.name] for each in fields(Way)}) for way in told["ways"]]
        return Comparison(**{**{each.name: told[each.name] for each in fields(Comparison)}, "ways": ways})

    def as_json(self) -> dict[str, Any]:
        """All of it, and what is derived, as JSON has it."""
        ways = [
            {**asdict(way), "faster": self.faster(way), "ideal": self.ideal(way)}
            | {"share_of_ideal": self.faster(way) / self.ideal(way)}
            for way in self.ways
        ]
        return {**asdict(self), "ways": ways, "fastest": self.fastest.name}


def compare(
    network: Network,
    size: int,
    batch: int,
    shares: Sequence[float] = (1.0, 0.5, 0.3),
    *,
    turns: int = 100,
    seed: int = 0,
    compiled: bool = True,
    planned: bool = False,
) -> Comparison:
    """Time the ways to compute a network on a batch of random images.

    Args:
        network: the network, with gates.
        size: pixels along the side of an image.
        batch: number of images.
        shares: of gates that are open.
        turns: how often each way is timed, with as many patterns of gates.
        seed: of weights, images and patterns.
        compiled: whether the dense network is also compiled, which may take minutes.
        planned: whether the inference copy measures beforehand which of its ways is the fastest.

    Raises:
        ValueError: if the network cannot be built for images of this size, or a share is not in [0, 1].

    Example:
        >>> from batchshaping.training.networks import network_settings
        >>> network = network_settings(network="resnet8", gates_per_layer=8)
        >>> comparison = compare(network, size=8, batch=1, turns=2, compiled=False)
        >>> [way.name for way in comparison.ways]
        ['eager', 'packed', 'conditional', 'conditional', 'conditional']
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images = torch.randn(batch, 3, size, size)
        ungated = network.ungated(1000, (3, size, size)).eval()
        gated = network.build(1000, (3, size, size)).eval()
    with torch.no_grad():
        cost = MultiplyAdds.measure(gated, images[:1])
        copies = network.inference_copies(gated, images if planned else None)
        if batch == 1:  # The others differ in how they compute images that have different gates.
            copies = dict([*copies.items()][:1])
        dense = {"eager": ungated, "packed": dense_inference(ungated)}
    if compiled:
        dense["compiled"] = torch.compile(ungated, dynamic=False)  # type: ignore[assignment]
    subject = _Subject(network, images, cost)
    timed = [_Timed(subject, name, module, None, seed) for name, module in dense.items()]
    timed += [
        _Timed(subject, name, module, share, seed)
        for share in dict.fromkeys(shares)
        for name, module in copies.items()
    ]
    with torch.inference_mode(), _freezing() if compiled else nullcontext():
        return _measured(subject, timed, turns)


@contextmanager
def _freezing() -> Iterator[None]:
    """Let the compiler take weights for constants, and compile anew what it has compiled before."""
    import torch._inductor.config

    torch._dynamo.reset()
    # As an option of torch.compile, freezing comes too late to have an effect.
    with torch._inductor.config.patch(freezing=True, fx_graph_cache=False):
        yield


@dataclass(frozen=True)
class _Subject:
    """What is computed: images by a network, whose cost is known."""

    network: Network
    images: Tensor
    cost: MultiplyAdds


class _Timed:
    """A way that is being measured."""

    def __init__(
        self, subject: _Subject, name: str, module: nn.Module, share: float | None, seed: int
    ) -> None:
        self.subject = subject
        self.name = name
        self.module = module
        self.share = share
        # Of its own millions, so that no other seed has the same patterns.
        self.pattern = seed * 10**6
        self.multiply_adds: list[float] = []
        self.facts: list[dict[str, float]] = []

    @property
    def key(self) -> str:
        """Of this way among all."""
        return f"{self.name} {self.share}"

    def _with_a_new_pattern(self) -> AbstractContextManager[None]:
        self.pattern += 1
        return nullcontext() if self.share is None else gates_forced(self.module, self.share, self.pattern)

    @contextmanager
    def turn(self, _: int) -> Iterator[Callable[[], object]]:
        """All of it."""
        images, cost = self.subject.images, self.subject.cost
        with self._with_a_new_pattern():
            yield lambda: self.module(images)
            if self.share is None:
                self.multiply_adds.append(cost.dense)
            else:
                spent = cost.per_example(gate_decisions(self.module))
                self.multiply_adds.append(spent.mean().item())
                self.facts.append(self.subject.network.facts(self.module, images))

    @property
    def after_gates(self) -> nn.Module | None:
        """The module that runs when all that gates cost has been computed, and its like in the dense one."""
        known = self.share is not None or self.name == "eager"
        return self.subject.network.after_gates(self.module) if known else None

    @contextmanager
    def turn_until_gated(self, _: int) -> Iterator[Callable[[], object]]:
        """As far as that module."""
        assert self.after_gates is not None
        reached = self.after_gates.register_forward_pre_hook(_stop)
        try:
            with self._with_a_new_pattern():
                yield self._run_until_stopped
        finally:
            reached.remove()

    def _run_until_stopped(self) -> None:
        with suppress(_Stopped):
            self.module(self.subject.images)

    def forget(self) -> None:
        """Forget what there was to tell of the turns so far."""
        self.multiply_adds.clear()
        self.facts.clear()

    def result(self, seconds: Sequence[float], until_gated: Sequence[float] | None) -> Way:
        """The way, from the seconds of its turns."""
        return Way(
            name=self.name,
            share=self.share,
            multiply_adds=fmean(self.multiply_adds),
            median=median(seconds),
            p95=torch.tensor(seconds, dtype=torch.double).quantile(0.95).item(),
            until_gated=median(until_gated) if until_gated else None,
            facts={name: fmean(each[name] for each in self.facts) for name in (self.facts or [{}])[0]},
        )


class _Stopped(Exception):
    """The module was reached that a forward pass was to go to."""


def _stop(module: nn.Module, inputs: object) -> None:
    raise _Stopped


def _measured(subject: _Subject, timed: list[_Timed], turns: int) -> Comparison:
    first_calls: dict[str, tuple[float, float]] = {}
    left_out: dict[str, str] = {}
    for way in timed:
        if way.name not in first_calls and way.name not in left_out:
            try:
                first, second = take_turns({way.name: way.turn}, 2)[way.name]
            except Exception as error:  # The compiler may fail in any way; nothing else may.
                if way.name != "compiled":
                    raise
                left_out[way.name] = " ".join(str(error).split())[:200]
            else:
                first_calls[way.name] = first, second
    timed = [way for way in timed if way.name not in left_out]
    take_turns({way.key: way.turn for way in timed}, 3)
    for way in timed:
        way.forget()
    before = _resident_memory()
    seconds = take_turns({way.key: way.turn for way in timed}, turns)
    after = _resident_memory()
    gating = {way.key: way.turn_until_gated for way in timed if way.after_gates is not None}
    until_gated = take_turns(gating, turns)
    network, images = subject.network, subject.images
    return Comparison(
        network=network.name,
        settings={
            name: value
            for name, value in network.model_dump(mode="json", exclude_defaults=True).items()
            if name != "network"
        },
        batch=len(images),
        size=images.shape[-1],
        turns=turns,
        ways=[way.result(seconds[way.key], until_gated.get(way.key)) for way in timed],
        first_calls=first_calls,
        left_out=left_out,
        memory=None if before is None or after is None else (before, after),
    )


def _resident_memory() -> int | None:
    """Bytes of this process in memory, where Linux tells them."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


# Tables


def title(comparison: Comparison) -> str:
    """What is compared, in a line."""
    settings = "".join(f", {name.replace('_', ' ')} {value}" for name, value in comparison.settings.items())
    images = "one image" if comparison.batch == 1 else f"{comparison.batch} images"
    return f"{comparison.network}{settings}: {images} of {comparison.size} x {comparison.size} pixels"


HEADS = ("way", "open", "ms", "95 %", "times faster", "than eager", "ideal", "of the ideal")
"""Heads of the columns of the table; times are those of the whole batch."""


def rows(comparison: Comparison) -> list[list[str]]:
    """The rows of the table, one for each way. *Times faster* is against the fastest dense way."""
    eager = next(way for way in comparison.ways if way.name == "eager")
    return [
        [
            way.name,
            "" if way.share is None else f"{way.share:.0%}",
            _ms(way.median),
            _ms(way.p95),
            f"{comparison.faster(way):.2f}",
            f"{eager.median / way.median:.2f}",
            f"{comparison.ideal(way):.2f}",
            f"{comparison.faster(way) / comparison.ideal(way):.0%}",
        ]
        for way in comparison.ways
    ]


def _ms(seconds: float | None) -> str:
    """Milliseconds, with three digits."""
    return "" if seconds is None else f"{float(f'{1e3 * seconds:.3g}'):g}"


def notes(comparison: Comparison) -> list[str]:
    """What else there is to tell: facts, the first calls, memory, and what was left out."""
    told = []
    for way in comparison.ways:
        facts = [f"{value:.0f} {name}" for name, value in way.facts.items()]
        if way.until_gated is not None:
            facts.append(f"gated after {_ms(way.until_gated)} ms")
        if facts:
            share = "" if way.share is None else f", {way.share:.0%} open"
            told.append(f"{way.name}{share}: {', '.join(facts)}")
    calls = (
        f"{name} {_ms(first)}, {_ms(second)}" for name, (first, second) in comparison.first_calls.items()
    )
    told.append(f"first and second call, ms: {'; '.join(calls)}")
    if comparison.memory:
        before, after = (f"{size / 1e6:.0f}" for size in comparison.memory)
        told.append(
            f"memory of the process before and after the {comparison.turns} turns, MB: {before}, {after}"
        )
    return told + [f"left out: {name}, {why}" for name, why in comparison.left_out.items()]


def summary(comparisons: Sequence[Comparison]) -> str:
    """A row for each comparison, in Markdown: dense times; for each share times faster, and the ideal."""
    dense = [*dict.fromkeys(way.name for each in comparisons for way in each.ways if way.is_dense)]
    shares = [*dict.fromkeys(way.share for each in comparisons for way in each.ways if way.share is not None)]
    lines = [
        ["network", "images", *(f"{name}, ms" for name in dense), *(f"{share:.0%} open" for share in shares)]
    ]
    for each in comparisons:
        times = {way.name: _ms(way.median) for way in each.ways if way.is_dense}
        gains = {
            way.share: f"{each.faster(way):.2f} ({each.ideal(way):.2f})"
            for way in each.ways
            if way.name == "conditional"
        }
        lines.append(
            [each.network, f"{each.batch} x {each.size}²"]
            + [times.get(name, "") for name in dense]
            + [gains.get(share, "") for share in shares]
        )
    return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], rule, *lines[1:]))


def machine_line(machine: Mapping[str, Any]) -> str:
    """What was measured on, in a line."""
    return (
        f"Measured on {machine['processor']} ({machine['instructions']}), {machine['threads']} of "
        f"{machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}."
    )


def as_markdown(comparisons: Sequence[Comparison], machine: Mapping[str, Any]) -> str:
    """The comparisons as tables in Markdown: the summary, then each."""
    sections = (section(comparison) for comparison in comparisons)
    return "\n\n".join([machine_line(machine), summary(comparisons), *sections]) + "\n"


def section(comparison: Comparison) -> str:
    """All that there is to tell of a comparison, in Markdown."""
    told = "\n".join(f"- {note}" for note in notes(comparison))
    return "\n\n".join([f"**{title(comparison)}**", _table([HEADS, *rows(comparison)]), told])
