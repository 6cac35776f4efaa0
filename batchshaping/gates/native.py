r"""Residual blocks for inference in C, which compute the open channels only.

Every call of an operation of PyTorch takes longer than a slice of a convolution with few channels, and each
slice is less efficient than the whole. So ``native.c`` computes residual blocks, one after the other, in one
call: the gates, the shortcut, the convolutions and the sum. Channels are in blocks of 16, and a block of
channels that is closed is simply not in the list of what is computed.

The file is compiled at its first use, in two seconds, by the C compiler of this machine (``CC``, else gcc,
clang or cc), for its processor. The library is kept in the user's cache (``$XDG_CACHE_HOME/batchshaping``,
else ``~/.cache/batchshaping``), which nobody else may write to, under a name that follows from the file, the
compiler and the processor. Where there is no compiler, or with ``BATCHSHAPING_NATIVE=0`` in the environment,
PyTorch computes instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from batchshaping.gates.gate import OneStep
from batchshaping.gates.packed import PackedConvolution, channels_last, is_plain

__all__ = ["Block", "Chain", "Gating", "MaxPool", "OfSizes", "PooledConvolution", "can_compute", "library"]

_BLOCK = 16
"""Channels in a block."""

_SEGMENT = 7
"""Pixels that are computed together."""

_MOST_HIDDEN = 256
"""Of the gates' hidden layer."""


# The library


@lru_cache(maxsize=1)
def library() -> Any:
    """The compiled functions, or None where there are none.

    The first call of a process loads them, or compiles them if no other process has done so before.
    """
    if os.environ.get("BATCHSHAPING_NATIVE") == "0" or os.name != "posix":
        return None
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CC", "gcc"), "clang", "cc"])), None)
    if compiler is None:
        return None
    try:
        found = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, RuntimeError) as error:
        warnings.warn(f"inference is slower than it could be, without native code: {error}", stacklevel=2)
        return None
    found.needed.argtypes, found.needed.restype = [_Pointer], _Number
    found.use_large_pages.argtypes, found.use_large_pages.restype = [_Pointer, _Number], None
    found.pool.argtypes = [_Pointer, _Number, _Pointer, _Pointer, _Pointer, _Number]
    found.pool.restype = None
    found.compute_blocks.argtypes = [
        *(_Pointer, _Number, _Number, _Number, _Pointer, _Pointer, _Pointer, _Pointer, _Number),
        *(_Pointer, _Pointer, _Pointer, _Pointer, _Number),
    ]
    return found


_Pointer, _Number = ctypes.c_void_p, ctypes.c_int64


def _compiled(compiler: str) -> Path:
    """The library in the user's cache."""
    source = Path(__file__).with_suffix(".c")
    made = os.stat(compiler)
    parts = (source.read_bytes(), compiler, made.st_size, made.st_mtime_ns, _FLAGS, _processor())
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    path = _cache() / f"{name}.so"
    if not path.exists():
        _compile(compiler, source, path)
    return _ours(path)


_FLAGS = ("-x", "c", "-std=gnu11", "-O2", "-fPIC", "-shared")


def _compile(compiler: str, source: Path, path: Path) -> None:
    """Under another name first, so that a file is complete as soon as it has its name."""
    said = ""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        # Not every compiler knows the processor.
        for native in (["-march=native"], ["-mcpu=native"], []):
            command = [compiler, *_FLAGS, *native, str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                made.chmod(0o700)
                made.replace(path)
                return
            said = said or done.stderr.strip()
    raise RuntimeError(f"{compiler} failed: {said.splitlines()[0] if said else 'without a word'}")


def _cache() -> Path:
    """The folder of this package in the user's cache; nobody else can write to it."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "batchshaping"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return _ours(folder)


def _ours(path: Path) -> Path:
    """A file or folder that belongs to this user, who alone can write to it."""
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RuntimeError(f"{path} must belong to this user alone, received one that others can write to")
    return path


def _processor() -> str:
    """What says which instructions there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU"))})
    )


@lru_cache(maxsize=1)
def _parallel() -> Any:
    """What starts threads in the OpenMP runtime that PyTorch has loaded, or None where that is unknown.

    A second runtime would have threads of its own, and those of the two would wait for each other's cores.
    """
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    loaded = dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if line.count("/"))
    names = ("libgomp", "libiomp5", "libomp")
    found = [path for path in loaded if Path(path).name.startswith(names)]
    # Its own before those that something else has loaded.
    for path in sorted(found, key=lambda path: "torch" not in path):
        function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p)
    return None


def can_compute(x: Tensor) -> bool:
    """Whether native code can compute with a tensor, here and now."""
    return (
        type(x) is Tensor
        and x.dtype is torch.float32
        and x.is_cpu
        and x.numel() > 0
        and torch._C._len_torch_dispatch_stack() == 0  # Those who count or trace operations would miss these.
        and library() is not None
        and (_parallel() is not None or torch.get_num_threads() == 1)
    )


# What it reads


class _Images(ctypes.Structure):
    _fields_ = [
        (name, _Number)
        for name in (
            *("buffer", "start", "image", "block", "row", "pixel", "channels"),
            *("padded_rows", "padded_columns"),
        )
    ]


class _Convolution(ctypes.Structure):
    _fields_ = [
        *((name, _Pointer) for name in ("weight", "bias", "places")),
        ("number_of_places", _Number),
        ("x", _Images),
        ("y", _Images),
        *(
            (name, _Number)
            for name in (
                *("in_blocks", "out_blocks", "rows", "columns", "in_gates", "out_gates", "other", "relu"),
            )
        ),
    ]


class _Gating(ctypes.Structure):
    _fields_ = [
        ("hidden", _Number),
        ("number", _Number),
        *((name, _Pointer) for name in ("first_weight", "first_bias", "last_weight", "last_bias")),
        ("blocks", _Number),
        ("of_channel", _Pointer),
        ("whole_blocks", _Number),
    ]


_MOST_LAYERS = 8

_X, _COPY, _Y, _OTHER, _INNER = 0, 1, 2, 3, 4
"""Buffers: the input, its copy in blocks, the output, what is added, and what is between convolutions."""


class _Residual(ctypes.Structure):
    _fields_ = [
        *(
            (name, _Number)
            for name in ("rows", "columns", "channels", "output", "number_of_layers", "number_of_gatings")
        ),
        ("layers", _Convolution * _MOST_LAYERS),
        ("gatings", _Gating * _MOST_LAYERS),
        ("copy", _Images),
        ("sizes", _Number * (_INNER + _MOST_LAYERS)),
    ]


class Gating(NamedTuple):
    """The gates of a layer: two linear layers of the sums of the channels, with a ReLU between them.

    Attributes:
        sizes: how many channels each gate switches; one number more is that of channels without a gate.
        first_weight: of shape (channels, hidden).
        first_bias: of shape (hidden,).
        last_weight: of shape (hidden, gates).
        last_bias: of shape (gates,).
    """

    sizes: tuple[int, ...]
    first_weight: Tensor
    first_bias: Tensor
    last_weight: Tensor
    last_bias: Tensor


# A block


class _Layout(NamedTuple):
    """How images lie in a buffer, with a border of zeros around them; strides in numbers of floats."""

    channels: int
    height: int
    width: int
    padding: tuple[int, int] = (0, 0)
    in_blocks: bool = False  # of channels; else in the order of channels_last

    @property
    def plane(self) -> int:
        """Floats of an image, or of a block of channels."""
        return self.row * (self.height + 2 * self.padding[0])

    @property
    def size(self) -> int:
        """Floats of an image."""
        return self.plane * (_blocks(self.channels) if self.in_blocks else 1)

    @property
    def pixel(self) -> int:
        """Floats from a pixel to the next."""
        return _BLOCK if self.in_blocks else self.channels

    @property
    def row(self) -> int:
        """Floats from a row to the next."""
        return self.pixel * (self.width + 2 * self.padding[1])

    def images(self, buffer: int, *, inside: bool, steps: tuple[int, int] = (1, 1)) -> _Images:
        """As the library reads it: from the first pixel inside the border, or from that of the border."""
        top, left = self.padding
        return _Images(
            buffer,
            top * self.row + left * self.pixel if inside else 0,
            self.size,
            self.plane if self.in_blocks else _BLOCK,
            self.row * steps[0],
            self.pixel * steps[1],
            # All of the last block: what is left in memory may be no number, also times zero.
            _blocks(self.channels) * _BLOCK if self.in_blocks else self.channels,
            top,
            left,
        )


def _blocks(channels: int) -> int:
    return -(-channels // _BLOCK)


class _End(NamedTuple):
    """Where a convolution reads or writes.

    Attributes:
        layout: of the images.
        buffer: in which they are.
        gates: number of the layer of gates that switches their channels, or -1.
    """

    layout: _Layout
    buffer: int
    gates: int = -1


class Block:
    """A residual block for images of a size: its convolutions, and the gates between them.

    Args:
        layers: the convolutions in their order, whose ReLU is folded in; without groups.
        gates: of the output of each but the last; None for a layer all of whose channels are computed.
        shortcut: a convolution of the input that the branch is added to; None if something else is.
        relu: whether a ReLU comes after the sum.
        size: height and width of the input.

    Attributes:
        channels: of the input.
        outputs: channels of the output.
        height: of the output.
        width: of the output.
        gates: how many gates each layer of gates has.
        has_shortcut: whether the shortcut is computed too, and not left to others.
    """

    def __init__(
        self,
        layers: Sequence[PackedConvolution],
        gates: Sequence[Gating | None],
        shortcut: PackedConvolution | None,
        relu: bool,
        size: tuple[int, int],
    ) -> None:
        self._kept: list[Tensor] = []
        *inner, last = layers
        sizes = [*itertools.accumulate(layers, lambda size, layer: layer.size_of(size), initial=size)]
        self.channels, self.outputs = layers[0].weight.shape[1], last.weight.shape[0]
        self.height, self.width = sizes[-1]
        self.size = self.outputs * self.height * self.width
        given, wanted = _End(_Layout(self.channels, *size), _X), _End(_Layout(self.outputs, *sizes[-1]), _Y)
        made = _Residual(*size, self.channels, self.size)
        convolutions: list[_Convolution] = []
        self.has_shortcut = shortcut is not None and _is_read_in_place(shortcut, size)
        if shortcut is not None and self.has_shortcut:
            convolutions.append(self._convolution(shortcut, given, wanted, -1, shortcut.relu))
        # The input is read where it is, if that needs no zeros around it.
        copied = _Layout(self.channels, *size, layers[0].settings.padding, in_blocks=True)
        made.copy = copied.images(_COPY, inside=True)
        before = given
        if not _is_read_in_place(layers[0], size):
            before = _End(copied, _COPY)
            made.sizes[_COPY] = copied.size
        gatings = [gating for gating in gates if gating is not None]
        numbers = itertools.count()
        for k, layer in enumerate(inner):
            padding = layers[k + 1].settings.padding
            layout = _Layout(layer.weight.shape[0], *sizes[k + 1], padding, in_blocks=True)
            after = _End(layout, _INNER + k, -1 if gates[k] is None else next(numbers))
            convolutions.append(self._convolution(layer, before, after, -1, layer.relu))
            made.sizes[after.buffer] = layout.size
            before = after
        convolutions.append(
            self._convolution(last, before, wanted, _Y if self.has_shortcut else _OTHER, relu)
        )
        made.number_of_layers, made.number_of_gatings = len(convolutions), len(gatings)
        made.layers[: len(convolutions)] = convolutions
        made.gatings[: len(gatings)] = [*map(self._gating, gatings)]
        self.gates = [gating.last_bias.shape[0] for gating in gatings]
        self._made = made
        self.address = ctypes.addressof(made)
        self.floats = library().needed(self.address)

    @staticmethod
    def of(
        layers: Sequence[PackedConvolution],
        gates: Sequence[Gating | None],
        shortcut: PackedConvolution | None,
        relu: bool,
        size: tuple[int, int],
    ) -> Block | None:
        """The block of these arguments, or None if native code does not know such convolutions or sizes."""
        every = [*layers, *([] if shortcut is None else [shortcut])]
        sizes = itertools.accumulate(layers, lambda size, layer: layer.size_of(size), initial=size)
        gatings = [gating for gating in gates if gating is not None]
        weights = [layer.weight for layer in every]
        weights += [weight for gating in gatings for weight in gating[1:]]
        is_known = (
            all(layer.groups == 1 for layer in every)
            and all(weight.is_cpu and weight.dtype is torch.float32 for weight in weights)
            and all(gating.last_weight.shape[0] <= _MOST_HIDDEN for gating in gatings)
            and min(map(min, sizes)) > 0
            and len(every) <= _MOST_LAYERS
        )
        return Block(layers, gates, shortcut, relu, size) if is_known else None

    # What the library reads

    def _convolution(
        self, layer: PackedConvolution, source: _End, target: _End, other: int, relu: bool
    ) -> _Convolution:
        x, y = source.layout, target.layout
        stride, _, dilation, _ = layer.settings
        outputs, inputs, high, wide = layer.weight.shape
        height, width = y.height, y.width
        if (high, wide) == stride == (1, 1) and not any(x.padding + y.padding):
            # Rows follow each other in memory.
            height, width = 1, height * width
        places = [
            row * dilation[0] * x.row + column * dilation[1] * x.pixel
            for row in range(high)
            for column in range(wide)
        ]
        weight, bias = layer.kept("blocks", lambda: _in_blocks(layer.weight, layer.bias))
        return _Convolution(
            self._address(weight),
            self._address(bias),
            self._address(torch.tensor(places)),
            len(places),
            x.images(source.buffer, inside=False, steps=stride),
            y.images(target.buffer, inside=True),
            _blocks(inputs),
            _blocks(outputs),
            height,
            width,
            source.gates,
            target.gates,
            other,
            relu,
        )

    def _gating(self, gating: Gating) -> _Gating:
        hidden, gates = gating.last_weight.shape
        of_channel = [
            gate if gate < gates else -1 for gate, size in enumerate(gating.sizes) for _ in range(size)
        ]
        of_channel += of_channel[-1:] * (-len(of_channel) % _BLOCK)
        blocks = [{*of_channel[at : at + _BLOCK]} for at in range(0, len(of_channel), _BLOCK)]
        return _Gating(
            hidden,
            gates,
            *map(self._address, gating[1:]),
            len(blocks),
            self._address(torch.tensor(of_channel, dtype=torch.int32)),
            all(len(block) == 1 for block in blocks),
        )

    def _address(self, tensor: Tensor) -> int:
        """Where a tensor is, which is kept."""
        self._kept.append(tensor)
        return tensor.data_ptr()


class Chain:
    """Blocks one after the other, which one call computes.

    What does not depend on the images is made here, once: between two calls the interpreter's own data leave
    the caches, so that each step costs several times what it seems to.

    Args:
        blocks: each for the size of what the one before gives.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = (*blocks,)
        self._addresses = (_Pointer * len(blocks))(*[block.address for block in blocks])
        self._gates = [gates for block in blocks for gates in block.gates]
        self._between = max([block.size for block in blocks[:-1]], default=0)
        self._floats = max([block.floats for block in blocks]) + 2 * self._between

    def compute(
        self, x: Tensor, other: Tensor | None, forced: Sequence[Tensor | float | None]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The output of the last block, and the logits of each layer of gates.

        Args:
            x: images in the order of channels_last.
            other: what the first block's branch is added to, in the same order; None if that is x, or if the
                block has a shortcut, as it is for all others.
            forced: for each layer of gates what is positive where a gate is open, of shape (N, gates); or a
                number that the logits exceed where a gate is open; None for 0.
        """
        n, last = x.shape[0], self._blocks[-1]
        y = _images(n, last.outputs, last.height, last.width)
        logits = _memory(n, sum(self._gates))
        together = min(n, max(1, _CACHED // self._floats))
        memory = _take(together * self._floats + _BEYOND)
        done = library().compute_blocks(
            self._addresses,
            len(self._blocks),
            n,
            together,
            x.data_ptr(),
            None if other is None else other.data_ptr(),
            y.data_ptr(),
            memory.data_ptr(),
            self._between,
            logits.data_ptr(),
            (_Pointer * (len(forced) or 1))(
                *[each.data_ptr() if isinstance(each, Tensor) else None for each in forced]
            ),
            (ctypes.c_float * (len(forced) or 1))(
                *[each if isinstance(each, float) else 0 for each in forced]
            ),
            _parallel(),
            torch.get_num_threads(),
        )
        _give_back(memory)
        if not done:
            raise MemoryError("native code found no memory")
        return y, logits.split_with_sizes(self._gates, 1) if self._gates else ()


def _is_read_in_place(layer: PackedConvolution, size: tuple[int, int]) -> bool:
    """Whether a convolution can read images in the order of channels_last."""
    height, width = layer.size_of(size)
    if layer.weight.shape[2:] == (1, 1) and layer.settings.stride == (1, 1):
        width *= height
    return layer.settings.padding == (0, 0) and layer.weight.shape[1] % _BLOCK == 0 and width >= _SEGMENT


def _in_blocks(weight: Tensor, bias: Tensor) -> Iterator[Tensor]:
    """Weight and bias in blocks, with zeros for channels that are none."""
    outputs, inputs, high, wide = weight.shape
    whole = weight.new_zeros(_blocks(outputs) * _BLOCK, _blocks(inputs) * _BLOCK, high * wide)
    whole[:outputs, :inputs] = weight.flatten(2)
    parts = whole.view(_blocks(outputs), _BLOCK, _blocks(inputs), _BLOCK, high * wide)
    yield _in_large_pages(parts.permute(0, 2, 4, 3, 1))
    of_blocks = bias.new_zeros(len(whole))
    of_blocks[:outputs] = bias
    yield of_blocks


def _in_large_pages(values: Tensor) -> Tensor:
    """A copy in memory of large pages, where the system has them: finding a page takes time, too."""
    page = 2**21 // 4
    if values.numel() < page // 2:
        return values.contiguous()
    memory = _memory(values.numel() + 2 * page)
    start = -memory.data_ptr() // 4 % page
    library().use_large_pages(memory.data_ptr() + 4 * start, 4 * values.numel())
    return memory[start : start + values.numel()].view(values.shape).copy_(values)


_Made = TypeVar("_Made")


class OfSizes(dict[Sequence[int], tuple[Sequence[object], _Made]]):
    """What is made for the latest sizes of an input; what is copied or pickled of it is empty."""

    def of(self, size: Sequence[int], made_of: Sequence[object], make: Callable[[], _Made]) -> _Made:
        """What is made for a size, anew if it was made of something else."""
        found = self.get(size)
        if found is None or found[0] != made_of:
            while len(self) >= PackedConvolution.SIZES:
                self.pop(next(iter(self)), None)
            found = self[size] = made_of, make()
        return found[1]

    def __deepcopy__(self, memo: object) -> OfSizes[_Made]:
        return OfSizes()

    def __reduce__(self) -> tuple[Any, ...]:
        return OfSizes, ()


class _Pooling(ctypes.Structure):
    _fields_ = [
        *((name, _Number) for name in ("rows", "columns", "channels", "out_rows", "out_columns")),
        *((name, _Number * 2) for name in ("kernel", "stride", "padding")),
    ]


class MaxPool(OneStep, nn.MaxPool2d):
    """Maximum pooling for inference, by native code where it can.

    Args:
        layer: the pooling.

    Example:
        >>> layer, x = nn.MaxPool2d(3, 2, padding=1), torch.randn(2, 16, 9, 9)
        >>> torch.equal(MaxPool(layer)(x), layer(x))
        True
    """

    def __init__(self, layer: nn.MaxPool2d) -> None:
        super().__init__(
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.return_indices,
            layer.ceil_mode,
        )
        self._is_simple = _pair(layer.dilation) == (1, 1) and not (layer.return_indices or layer.ceil_mode)
        self._made: OfSizes[_Pooling | None] = OfSizes()

    def forward(self, x: Tensor) -> Tensor:
        made = None
        if not is_plain() and can_compute(x):
            made = self._made.of(x.shape[1:], (), lambda: self._pooling(x.shape[1:]))
        if made is None:
            return super().forward(x)  # type: ignore[no-any-return]
        x, n = channels_last(x), x.shape[0]
        y = _images(n, made.channels, made.out_rows, made.out_columns)
        library().pool(
            ctypes.addressof(made), n, x.data_ptr(), y.data_ptr(), _parallel(), torch.get_num_threads()
        )
        return y

    def _pooling(self, shape: Sequence[int]) -> _Pooling | None:
        """As the library reads it, for images of a shape; None where it does not know such."""
        if not self._is_simple or len(shape) != 3 or shape[0] % _BLOCK:
            return None
        kernel, stride, padding = map(_pair, (self.kernel_size, self.stride, self.padding))
        channels, *size = shape
        height, width = ((size[k] + 2 * padding[k] - kernel[k]) // stride[k] + 1 for k in (0, 1))
        if min(height, width) < 1 or any(2 * padding[k] > kernel[k] for k in (0, 1)):
            return None
        pairs = ((_Number * 2)(*pair) for pair in (kernel, stride, padding))
        return _Pooling(*size, channels, height, width, *pairs)


class PooledConvolution(OneStep):
    """A convolution for inference and the maximum pooling after it, a few images at a time.

    So what is between them has little memory, which is used again.

    Args:
        layer: the convolution.
        pool: the pooling.

    Example:
        >>> layer, pool = nn.Conv2d(3, 16, 3), nn.MaxPool2d(2)
        >>> x = torch.randn(3, 3, 200, 200)
        >>> with torch.no_grad():
        ...     y = PooledConvolution(PackedConvolution(layer), pool)(x)
        ...     torch.allclose(y, pool(layer(x)), atol=1e-5)
        True
    """

    def __init__(self, layer: PackedConvolution, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.layer, self.pool = layer, MaxPool(pool)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        if n == 1 or x.ndim != 4 or is_plain() or not can_compute(x):
            return self.pool(self.layer(x))  # type: ignore[no-any-return]
        height, width = self.layer.size_of((x.shape[2], x.shape[3]))
        parts = -(-n * len(self.layer.bias) * height * width // _REUSED)
        together = -(-n // max(1, parts))  # About as many in each, since weights are packed for a number.
        if together >= n:
            return self.pool(self.layer(x))  # type: ignore[no-any-return]
        y: Tensor | None = None
        for first in range(0, n, together):
            pooled = self.pool(self.layer(x[first : first + together]))
            y = _images(n, *pooled.shape[1:]) if y is None else y
            y[first : first + together] = pooled
        assert y is not None
        return y


# Memory that is used again and again: new memory is slow, since the system fills it with zeros.

_spare: list[Tensor] = []

_MOST_SPARE = 16

_CACHED = 2**20
"""Floats that stay in a cache while a few images are computed."""

_REUSED = 2**22
"""Floats in so little memory that the C library keeps it when it is freed, and does not ask for it anew."""

_BEYOND = 4096
"""Floats that may be read beyond the end, by segments that are longer than a row."""


def _memory(*size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device="cpu")


def _images(n: int, channels: int, height: int, width: int) -> Tensor:
    """Images in the order of channels_last."""
    return torch.empty_strided(
        (n, channels, height, width),
        (channels * height * width, 1, width * channels, channels),
        dtype=torch.float32,
        device="cpu",
    )


def _take(floats: int) -> Tensor:
    try:
        memory = _spare.pop()
    except IndexError:  # All is in use by other threads.
        return _memory(floats)
    return memory if memory.numel() >= floats else _memory(floats)


def _give_back(memory: Tensor) -> None:
    if len(_spare) < _MOST_SPARE:
        _spare.append(memory)
