"""Native code gives what PyTorch's convolutions give, and is loaded from where nobody else can write."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from batchshaping.gates import native
from batchshaping.gates.native import Block, Gating
from batchshaping.gates.packed import PackedConvolution, channels_last

# Where there is no compiler, there is no native code, and these laws hold for nothing.
IS_THERE = native.library() is not None
USERS_CACHE = native._cache() if IS_THERE else None


@st.composite
def sizes_of_gates(draw: st.DrawFn, channels: int) -> tuple[int, ...]:
    """How many channels each gate switches: a block each, any numbers, or one each."""
    kind = draw(st.sampled_from(["blocks", "any", "one"]))
    if kind == "one":
        return (1,) * channels
    if kind == "blocks" and channels % 16 == 0:
        return (16,) * (channels // 16)
    first = draw(st.integers(1, channels))
    return (first, channels - first) if first < channels else (channels,)


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[PackedConvolution], list[Gating | None], PackedConvolution]:
    """Convolutions with gates between them, and one as shortcut."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    channels = draw(st.sampled_from([3, 16, 24, 32, 64]))
    stride = draw(st.sampled_from([1, 2]))
    kernels = draw(st.sampled_from([(3, 3), (1, 3, 1), (1, 1), (5, 1)]))
    strided = draw(st.integers(0, len(kernels) - 1))
    inputs, layers, gates = channels, [], []
    for k, kernel in enumerate(kernels):
        outputs = draw(st.sampled_from([16, 20, 32, 48]))
        dilation = draw(st.sampled_from([1, 2])) if kernel > 1 else 1
        layer = nn.Conv2d(
            inputs,
            outputs,
            kernel,
            stride if k == strided else 1,
            padding=dilation * (kernel // 2),
            dilation=dilation,
        )
        is_last = k == len(kernels) - 1
        layers.append(PackedConvolution(layer, None, relu=not is_last and draw(st.booleans())))
        if not is_last:
            gates.append(gating(channels, draw(sizes_of_gates(outputs))) if draw(st.booleans()) else None)
        inputs = outputs
    return layers, gates, PackedConvolution(nn.Conv2d(channels, inputs, 1, stride))


def gating(channels: int, sizes: tuple[int, ...]) -> Gating:
    hidden = torch.randn(channels, 16) / channels**0.5, torch.randn(16)
    return Gating(sizes, *hidden, torch.randn(16, len(sizes)), torch.randn(len(sizes)))


def expected(
    x: Tensor,
    layers: list[PackedConvolution],
    gates: list[Gating | None],
    positive: Sequence[Tensor],
    other: Tensor,
    relu: bool,
) -> Tensor:
    """By PyTorch: closed channels are set to zero."""
    h, values = x.double(), iter(positive)
    for layer, each in zip(layers, [*gates, None], strict=True):
        h = F.conv2d(h, layer.weight.double(), layer.bias.double(), *layer.settings)
        h = h.relu() if layer.relu else h
        if each is not None:
            is_open = (next(values) > 0).double()
            h = h * is_open.repeat_interleave(torch.tensor(each.sizes), dim=1)[:, :, None, None]
    y = h + other.double()
    return y.relu() if relu else y


@settings(max_examples=60, deadline=None)
@given(
    chain=chains(),
    n=st.integers(1, 5),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    relu=st.booleans(),
    share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    threads=st.sampled_from([1, 2]),
)
def test_open_channels_are_computed_as_pytorch_does(
    chain: tuple[list[PackedConvolution], list[Gating | None], PackedConvolution],
    n: int,
    height: int,
    width: int,
    relu: bool,
    share: float,
    threads: int,
) -> None:
    layers, gates, shortcut = chain
    x = channels_last(torch.randn(n, layers[0].weight.shape[1], height, width))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            block = Block.of(layers, gates, shortcut, relu, (height, width)) if IS_THERE else None
            if block is None:
                return
            gatings = [each for each in gates if each is not None]
            positive = [share - torch.rand(n, len(each.last_bias)) for each in gatings]
            other = channels_last(shortcut(x))
            joined, added = native.Chain([block]), None if block.has_shortcut else other
            y, logits = joined.compute(x, added, positive)
            decided, _ = joined.compute(x, added, [None] * len(gatings))
    finally:
        torch.set_num_threads(before)
    for each, found in zip(gatings, logits, strict=True):
        hidden = (x.mean(dim=(2, 3)) @ each.first_weight + each.first_bias).relu()
        torch.testing.assert_close(found, hidden @ each.last_weight + each.last_bias, rtol=1e-4, atol=1e-4)
    for found, values in ((y, positive), (decided, logits)):
        right = expected(x, layers, gates, values, other, relu)
        assert found.shape == right.shape
        assert (found - right).abs().max() <= 1e-5 * right.abs().max() + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    channels=st.sampled_from([16, 20, 48]),
    size=st.tuples(st.integers(4, 12), st.integers(4, 12)),
    value=st.sampled_from([0.0, float("nan"), float("inf"), -float("inf")]),
)
def test_pooling_is_that_of_pytorch(
    kernel: int, stride: int, padding: int, channels: int, size: tuple[int, int], value: float
) -> None:
    layer = nn.MaxPool2d(kernel, stride, min(padding, kernel // 2))
    x = torch.randn(2, channels, *size)
    x[1, 3, 2] = value
    assert torch.allclose(native.MaxPool(layer)(x), layer(x), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 7), together=st.integers(1, 4), channels=st.sampled_from([16, 20]))
def test_a_convolution_and_its_pooling_give_the_same_a_few_images_at_a_time(
    n: int, together: int, channels: int
) -> None:
    torch.manual_seed(n)
    layer, pool, x = nn.Conv2d(3, channels, 3, padding=1), nn.MaxPool2d(3, 2, 1), torch.randn(n, 3, 12, 12)
    pooled = native.PooledConvolution(PackedConvolution(layer, None, relu=True), pool)
    with torch.no_grad(), patch.object(native, "_REUSED", together * channels * 12 * 12):
        found = pooled(x), pooled(x)
        right = pool(layer(x).relu())
    for y in found:
        torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)


def test_what_is_closed_is_not_read() -> None:
    """Weights of closed channels that are no numbers change nothing."""
    layers = [PackedConvolution(nn.Conv2d(64, 64, 3, padding=1), relu=relu) for relu in (True, False)]
    positive = torch.tensor([[1.0, -1.0, 1.0, 0.0], [-1.0, -1.0, 1.0, -1.0]])
    layers[0].weight.view(4, 16, 64, 3, 3)[1::2] = float("nan")
    layers[1].weight.view(64, 4, 16, 3, 3)[:, 1::2] = float("nan")
    block = Block.of(layers, [gating(64, (16,) * 4)], None, True, (8, 8)) if IS_THERE else None
    if block is not None:
        y, _ = native.Chain([block]).compute(channels_last(torch.randn(2, 64, 8, 8)), None, [positive])
        assert bool(y.isfinite().all())


def test_what_is_left_in_memory_changes_nothing() -> None:
    """The last block of 20 channels has room for 12 more."""
    layers = [PackedConvolution(nn.Conv2d(*channels, 1)) for channels in ((16, 20), (20, 16))]
    block = Block.of(layers, [None], None, True, (8, 8)) if IS_THERE else None
    if block is not None:
        x, memory = channels_last(torch.randn(1, 16, 8, 8)), torch.full((2**16,), float("nan"))
        with patch.object(native, "_spare", [memory]):
            y, _ = native.Chain([block]).compute(x, None, [])
        assert bool(y.isfinite().all())


def test_what_is_no_number_stays_none() -> None:
    layers = [PackedConvolution(nn.Conv2d(16, 16, 1), relu=relu) for relu in (True, False)]
    block = Block.of(layers, [None], None, True, (8, 8)) if IS_THERE else None
    if block is not None:
        x = channels_last(torch.randn(1, 16, 8, 8))
        x[0, 3, 2, 5] = float("nan")
        y, _ = native.Chain([block]).compute(x, None, [])
        assert bool(y[0, :, 2, 5].isnan().all()) and int(y.isnan().sum()) == 16


def test_grouped_and_other_precisions_are_left_to_pytorch() -> None:
    for layer in (nn.Conv2d(16, 16, 1, groups=2), nn.Conv2d(16, 16, 1).double(), nn.Conv2d(16, 16, 9)):
        assert Block.of([PackedConvolution(layer)] * 2, [None], None, True, (8, 8)) is None
    assert not native.can_compute(torch.randn(1, 3, 2, 2).double())
    assert not native.can_compute(torch.randn(0, 3, 2, 2))


# The library


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, in which libraries are looked for anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "batchshaping"
    native.library.cache_clear()


def test_it_is_compiled_once_into_a_folder_that_nobody_else_can_write_to(cache: Path) -> None:
    if not IS_THERE:
        return
    assert native.library() is not None
    (made,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    written = made.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [written]


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_others_can_write_to_is_not_loaded(cache: Path, what: str) -> None:
    if USERS_CACHE is None:
        return
    shutil.copytree(USERS_CACHE, cache)  # which is faster than to compile again
    assert native.library() is not None
    for path in [cache] if what == "folder" else [*cache.iterdir()]:
        path.chmod(0o777)
    native.library.cache_clear()
    with pytest.warns(UserWarning, match=r"must belong to this user alone, received one that others"):
        assert native.library() is None


def test_a_compiler_that_fails_is_told_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.warns(UserWarning, match=r"cc failed: no such flag$"):
        assert native.library() is None
    assert not [*cache.iterdir()]


def test_it_can_be_switched_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHSHAPING_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library() is None
    assert not cache.exists()


def test_processes_may_compile_at_the_same_time(cache: Path) -> None:
    if not IS_THERE:
        return
    # Forked, since to import torch takes longer than to compile.
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=lambda: sys.exit(native.library() is None)) for _ in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0]
    assert len([*cache.iterdir()]) == 1
