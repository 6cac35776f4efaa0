"""The penalty of open gates, their shares and their counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from gated_networks import (
    Network,
    images,
    seeds,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batchshaping.gates.gate import gate_decisions
from batchshaping.gates.summary import GateCounts, gate_statistics, l0_penalty

# The L0 penalty


@given(n=st.integers(1, 5), widths=st.lists(st.integers(1, 4), min_size=1, max_size=3), seed=seeds)
def test_the_penalty_is_the_mean_over_all_gates_and_its_gradient_the_same_for_each(
    n: int, widths: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    layers = [torch.rand(n, width, dtype=torch.float64, requires_grad=True) for width in widths]
    penalty = l0_penalty(layers)
    penalty.backward()
    everything = np.concatenate([p.detach().numpy().ravel() for p in layers])
    assert penalty.item() == pytest.approx(everything.mean(), rel=1e-12)
    for p in layers:
        assert p.grad is not None
        np.testing.assert_allclose(p.grad.numpy(), 1 / len(everything))
    assert torch.equal(l0_penalty(torch.cat(layers, dim=1)), penalty)


@pytest.mark.parametrize("empty", [[], torch.empty(0, 3), torch.empty(3, 0)])
def test_there_is_no_mean_of_no_gates(empty: Tensor | list[Tensor]) -> None:
    for function in (l0_penalty, gate_statistics):
        with pytest.raises(ValueError, match="at least one example and one gate"):
            function(empty)


@pytest.mark.parametrize("shapes", [[(2, 3), (3, 3)], [(3,), (3,)], [(2, 3), (2, 3, 1)]])
def test_layers_of_other_examples_are_refused_with_all_shapes(shapes: list[tuple[int, ...]]) -> None:
    layers = [torch.ones(shape) for shape in shapes]
    for function in (l0_penalty, gate_statistics):
        with pytest.raises(ValueError, match=r"^layers must have shapes \(N, gates\)[^\n]*$") as error:
            function(layers)
        assert str(error.value).endswith(f"received {shapes}")


# The statistics


@given(
    n=st.integers(1, 6),
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from([torch.bool, torch.int64, torch.float32]),
    seed=seeds,
)
def test_statistics_equal_a_count_of_every_gate(
    n: int, widths: list[int], p: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    layers = [(torch.rand(n, width) < p).to(dtype) for width in widths]
    columns = [column.tolist() for layer in layers for column in layer.T]
    on = sum(all(column) for column in columns)
    off = sum(not any(column) for column in columns)
    total = len(columns)
    statistics = gate_statistics(layers)
    assert statistics == pytest.approx(
        (on / total, off / total, (total - on - off) / total, sum(map(sum, columns)) / (n * total))
    )
    assert gate_statistics(torch.cat(layers, dim=1)) == statistics


@pytest.mark.parametrize("wrong", [0.3, -1.0, 2.0, float("nan")])
def test_a_probability_is_no_decision(wrong: float) -> None:
    with pytest.raises(ValueError, match=f"decisions must be 0 or 1, received {wrong:g}"):
        gate_statistics(torch.tensor([[1.0, wrong]]))


# The counts by class


def random_decisions(n: int, widths: Sequence[int], p: float) -> list[Tensor]:
    return [(torch.rand(n, width) < p).float() for width in widths]


@given(
    n=st.integers(1, 12),
    classes=st.integers(1, 4),
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    batch=st.integers(1, 12),
    seed=seeds,
)
def test_counts_equal_a_count_of_every_decision_however_the_data_is_split(
    n: int, classes: int, widths: list[int], p: float, batch: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layers, labels = random_decisions(n, widths, p), torch.randint(classes, (n,))
    counts = GateCounts(classes)
    for part in torch.arange(n).split(batch):
        counts.update([layer[part] for layer in layers], labels[part])
    for found, layer in zip(counts.open, layers, strict=True):
        expected = [
            [sum(int(row[gate]) for row, c in zip(layer, labels, strict=True) if c == k) for gate in range(w)]
            for k, w in [(k, layer.shape[1]) for k in range(classes)]
        ]
        assert found.tolist() == expected
    assert counts.examples.tolist() == [sum(c == k for c in labels.tolist()) for k in range(classes)]
    assert counts.statistics() == gate_statistics(layers)
    for index, layer in enumerate(layers):
        assert counts.statistics(index) == gate_statistics(layer)


def test_a_network_is_counted_after_each_of_its_batches() -> None:
    network, counts = Network().eval(), GateCounts(classes=3)
    seen = []
    for _ in range(3):
        network(images())
        counts.update(gate_decisions(network), torch.arange(32) % 3)
        seen.append(gate_decisions(network))
    everything = [torch.cat(layer) for layer in zip(*seen, strict=True)]
    assert counts.statistics() == gate_statistics(everything)
    assert [layer.sum().item() for layer in counts.open] == [d.sum().item() for d in everything]


@pytest.mark.parametrize("wrong", [0.3, -1.0, 2.0, float("nan")])
def test_a_batch_with_a_probability_is_refused_and_not_counted(wrong: float) -> None:
    counts = GateCounts(classes=2)
    good = [torch.ones(2, 3), torch.zeros(2, 4)]
    counts.update(good, torch.tensor([0, 1]))
    before = counts.statistics()
    with pytest.raises(ValueError, match=f"decisions must be 0 or 1, received {wrong:g}"):
        counts.update([good[0], torch.full((2, 4), wrong)], torch.tensor([0, 1]))
    assert counts.statistics() == before
    assert counts.examples.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("shapes", "labels", "message"),
    [
        ([(2, 3)], [0], r"decisions must have shapes \(N, gates\) = \[\(1, 3\)\], received \[\(2, 3\)\]"),
        ([(2, 4)], [0, 1], r"= \[\(2, 3\)\], received \[\(2, 4\)\]"),
        ([(2, 3), (2, 3)], [0, 1], r"= \[\(2, 3\)\], received \[\(2, 3\), \(2, 3\)\]"),
        ([(2,)], [0, 1], r"received \[\(2,\)\]"),
        ([(2, 3, 1)], [0, 1], r"received \[\(2, 3, 1\)\]"),
        ([(2, 3)], [0, 2], r"labels must be in 0, \.\.\., 1, received 2"),
        ([(2, 3)], [-1, 0], r"labels must be in 0, \.\.\., 1, received -1"),
        ([(2, 3)], [0.0, 1.0], r"labels must be integers of shape \(N,\), received torch.float32"),
        (
            [(2, 3)],
            [[0, 1]],
            r"labels must be integers of shape \(N,\), received torch.int64 of shape \(1, 2",
        ),
    ],
)
def test_a_batch_of_another_shape_or_class_is_refused_and_not_counted(
    shapes: list[tuple[int, ...]], labels: list[int], message: str
) -> None:
    counts = GateCounts(classes=2)
    counts.update([torch.ones(2, 3)], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=message):
        counts.update([torch.ones(shape) for shape in shapes], torch.tensor(labels))
    assert counts.examples.tolist() == [1, 1]
    assert [layer.tolist() for layer in counts.open] == [[[1] * 3] * 2]


@pytest.mark.parametrize("shape", [(3, 4), (2,), (2, 3, 1), ()])
def test_a_first_batch_that_is_not_of_the_labels_examples_is_refused(shape: tuple[int, ...]) -> None:
    counts = GateCounts(classes=2)
    with pytest.raises(ValueError, match=r"decisions must have shapes \(N, gates\) = \[\(2, "):
        counts.update([torch.ones(2, 3), torch.ones(shape)], torch.tensor([0, 1]))
    assert not counts.open and counts.examples.tolist() == [0, 0]


@pytest.mark.parametrize("classes", [0, -1, 1.5])
def test_there_must_be_a_class(classes: int) -> None:
    with pytest.raises(ValueError, match=f"classes must be an integer, at least 1, received {classes}"):
        GateCounts(classes)


def test_there_are_no_statistics_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one example and one gate"):
        GateCounts(classes=2).statistics()
