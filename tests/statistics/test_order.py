"""Order statistics and ranks against NumPy and SciPy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torch import Tensor

from batchshaping.statistics.order import order_statistics, ranks

DTYPES = [torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Values of every kind: distinct, tied, subnormal, infinite, NaN, zeros of both signs."""
    width = draw(st.sampled_from([32, 64]))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=12))
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-40, 0.5])
    elements = draw(st.sampled_from([st.floats(width=width), few]))
    dtype = {32: np.float32, 64: np.float64}[width]
    return torch.from_numpy(draw(hnp.arrays(dtype, shape, elements=elements.map(dtype))))


@given(tensors())
def test_order_statistics_are_sorted_with_nan_last(x: Tensor) -> None:
    before = x.clone()
    order = order_statistics(x)
    assert order.values.dtype == x.dtype
    np.testing.assert_array_equal(order.values, np.sort(x.numpy(), axis=-1))
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


@given(tensors())
def test_indices_are_a_permutation_that_leads_to_the_values(x: Tensor) -> None:
    order = order_statistics(x)
    everything = torch.arange(x.shape[-1]).expand(x.shape)
    assert torch.equal(order.indices.sort(dim=-1).values, everything)
    np.testing.assert_array_equal(x.gather(-1, order.indices), order.values)


@contextmanager
def subnormal_numbers_are_zero() -> Iterator[None]:
    assert torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@given(tensors())
def test_where_subnormal_numbers_are_flushed_to_zero_they_are_sorted_as_zeros(x: Tensor) -> None:
    with subnormal_numbers_are_zero():
        order = order_statistics(x)
    flushed = torch.where(x.abs() < torch.finfo(x.dtype).smallest_normal, 0.0, x)
    np.testing.assert_array_equal(order.indices, np.argsort(flushed.numpy(), axis=-1, kind="stable"))


@each_dtype
@pytest.mark.parametrize("n", [3, 1000, 70_001])
def test_where_subnormal_numbers_are_flushed_to_zero_zeros_keep_their_order(
    n: int, dtype: torch.dtype
) -> None:
    for x in (torch.zeros(n, dtype=dtype), torch.relu(torch.randn(4, n, dtype=dtype))):
        with subnormal_numbers_are_zero():
            order = order_statistics(x)
        expected = torch.sort(x, stable=True)
        assert torch.equal(order.values, expected.values)
        assert torch.equal(order.indices, expected.indices)


@given(tensors())
def test_equal_values_keep_their_order(x: Tensor) -> None:
    expected = np.argsort(x.numpy(), axis=-1, kind="stable")
    np.testing.assert_array_equal(order_statistics(x).indices, expected)


@given(tensors())
def test_unsort_brings_every_value_back(x: Tensor) -> None:
    order = order_statistics(x)
    np.testing.assert_array_equal(order.unsort(order.values), x)
    position = torch.arange(x.shape[-1], dtype=x.dtype).expand(x.shape).contiguous()
    assert torch.equal(order.unsort(position).gather(-1, order.indices), position)


@pytest.mark.parametrize("method", ["ordinal", "max"])
@given(tensors())
def test_ranks_are_those_of_scipy(method: str, x: Tensor) -> None:
    x = x.nan_to_num(nan=2.0)
    order = order_statistics(x)
    rank = ranks(order.values, x.shape[-1], ties=method == "max")
    assert rank.dtype == x.dtype
    by_position = order.unsort(rank.expand(x.shape).contiguous())
    np.testing.assert_array_equal(by_position, stats.rankdata(x.numpy(), method=method, axis=-1))


@given(tensors(), st.integers(0, 10**6))
def test_with_a_count_ranks_are_those_of_that_many_samples(x: Tensor, seed: int) -> None:
    x = x.nan_to_num(nan=2.0)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[..., 0] = True
    # What is no sample is infinite, as some samples are.
    order = order_statistics(x.masked_fill(~mask, torch.inf))
    count = mask.sum(dim=-1, keepdim=True)
    shared = ranks(order.values, count, ties=True).expand(x.shape)
    rows = (t.reshape(-1, x.shape[-1]) for t in (x, mask, shared))
    for row, keep, rank in zip(*rows, strict=True):
        expected = np.sort(stats.rankdata(row[keep].numpy(), method="max"))
        np.testing.assert_array_equal(rank[: len(expected)], expected)


@each_dtype
def test_zeros_of_both_signs_are_tied(dtype: torch.dtype) -> None:
    order = order_statistics(torch.tensor([0.0, -0.0, -1.0, -0.0, 0.0], dtype=dtype))
    assert order.indices.tolist() == [2, 0, 1, 3, 4]
    assert ranks(order.values, 5, ties=True).tolist() == [1.0, 5.0, 5.0, 5.0, 5.0]


@each_dtype
def test_a_nan_of_either_sign_and_payload_comes_last(dtype: torch.dtype) -> None:
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    nan = torch.full((3,), torch.nan, dtype=dtype)
    signed = (-nan).view(integer) ^ torch.tensor([0, 1, 5], dtype=integer)
    x = torch.cat([signed.view(dtype), torch.tensor([1.0, -torch.inf, torch.inf], dtype=dtype), nan])
    order = order_statistics(x)
    assert order.values[:3].tolist() == [-torch.inf, 1.0, torch.inf]
    assert bool(order.values[3:].isnan().all())
    assert sorted(order.indices[3:].tolist()) == [0, 1, 2, 6, 7, 8]


@each_dtype
@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 1000, 70_001])
def test_every_length_sorts(n: int, dtype: torch.dtype) -> None:
    for x in (torch.randn(n, dtype=dtype), torch.randint(0, 9, (n,)).to(dtype), torch.zeros(n, dtype=dtype)):
        order = order_statistics(x)
        expected = torch.sort(x, stable=True)
        assert torch.equal(order.values, expected.values)
        assert torch.equal(order.indices, expected.indices)


@each_dtype
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    x = torch.randn(8, 9, 10, dtype=dtype)
    views = [
        x.transpose(0, 2),
        x[::2, :, 1::3],
        x.flip(-1),
        x[0, 0].expand(3, 10),
        x[:, :, :1].expand(8, 9, 4),
    ]
    for view in views:
        order, dense = order_statistics(view), order_statistics(view.contiguous())
        assert torch.equal(order.values, dense.values)
        assert torch.equal(order.indices, dense.indices)


@each_dtype
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)], ids=str)
def test_nothing_sorts_to_nothing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    order = order_statistics(torch.empty(shape, dtype=dtype))
    assert order.values.shape == shape
    assert order.indices.shape == shape
    assert ranks(order.values, shape[-1], ties=True).shape == shape
