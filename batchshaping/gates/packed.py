r"""Layers for inference: batch normalization folded into convolutions, weights packed once for the CPU.

In evaluation a batch normalization is a scale and a shift of each channel, and can be a part of the
convolution before it:

.. math::
    \mathrm{BN}(W * x) = s \, W * x + \beta - s \, m, \qquad s = \frac{\gamma}{\sqrt{v + \epsilon}}

On the CPU oneDNN computes convolutions with weights in an order of its own. PyTorch brings them into this
order at every call, which takes as long as the convolution itself where there are many channels and few
pixels. Here this is done once. Where PyTorch has no oneDNN, where it is switched off
(``torch.backends.mkldnn``), and on other devices, the same convolutions are computed by
:func:`torch.nn.functional.conv2d`.

MKL, which computes linear layers, packs their weights at every call too. With weights packed once, they take
0.8 to 0.9 of the time for the tokens of one image. One packing serves any number of rows.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchshaping.gates.cost import is_measuring
from batchshaping.gates.gate import OneStep

__all__ = [
    "PackedConvolution",
    "PackedLinear",
    "Settings",
    "by_mkl",
    "by_onednn",
    "can_be_folded",
    "can_be_packed",
    "channels_last",
    "convolve",
    "convolve_add",
    "folded",
    "is_plain",
    "is_plain_linear",
    "only_plain",
]

_Made = TypeVar("_Made")


class Settings(NamedTuple):
    """Stride, padding, dilation and groups of a convolution of images."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def _operation(library: str, name: str, overload: str) -> Callable[..., Tensor] | None:
    """An operation of a library, without the search for its overload at every call; None if there is none."""
    try:
        found = getattr(getattr(getattr(torch.ops, library), name), overload)
    except (AttributeError, RuntimeError):
        return None
    operation: Callable[..., Tensor] = getattr(found, "_op", found)
    return operation


_reorder: Any = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None)
_convolution = _operation("mkldnn", "_convolution_pointwise", "default")
_convolution_plus = _operation("mkldnn", "_convolution_pointwise", "binary")
_convolution_plus_ = _operation("mkldnn", "_convolution_pointwise_", "binary")
_has_bfloat16 = _operation("mkldnn", "_is_mkldnn_bf16_supported", "default")
_IS_COMPLETE = None not in (_reorder, _convolution, _convolution_plus, _convolution_plus_, _has_bfloat16)
_reorder_linear = _operation("mkl", "_mkl_reorder_linear_weight", "default")
_linear = _operation("mkl", "_mkl_linear", "default")
_HAS_LINEAR = torch.backends.mkl.is_available() and None not in (_reorder_linear, _linear)


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution of x is computed by oneDNN's own operations."""
    if not _IS_COMPLETE or not x.is_cpu or x.dtype is not weight.dtype or not torch._C._get_mkldnn_enabled():
        return False
    return x.dtype is torch.float32 or (x.dtype is torch.bfloat16 and bool(_has_bfloat16()))  # type: ignore[misc]


def by_mkl(x: Tensor, weight: Tensor) -> bool:
    """Whether a linear layer of x is computed by MKL, with no gradient and in no other precision."""
    return (
        _HAS_LINEAR
        and x.is_cpu
        and weight.is_cpu
        and x.dtype is weight.dtype is torch.float32
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
    )


def channels_last(x: Tensor) -> Tensor:
    """The same images, with the channels of a pixel side by side in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, relu: bool) -> Tensor:
    """A convolution, followed by a ReLU or not.

    Args:
        x: images in the order of :func:`channels_last`.
        weight: the weights, plain or packed for images like these.
        bias: of each output channel, or None.
        settings: of the convolution.
        relu: whether a ReLU follows.
    """
    stride, padding, dilation, groups = settings
    if weight.is_mkldnn or by_onednn(x, weight):
        return _convolution(  # type: ignore[misc]
            x, weight, bias, padding, stride, dilation, groups, "relu" if relu else "none", [], ""
        )
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y.relu_() if relu else y


def convolve_add(
    other: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: Settings,
    relu: bool,
    inplace: bool = False,
) -> Tensor:
    """A convolution that is added to other images, followed by a ReLU or not.

    Args:
        other: images of the shape of the result.
        x: images in the order of :func:`channels_last`.
        weight: the weights, plain or packed for images like these.
        bias: of each output channel, or None.
        settings: of the convolution.
        relu: whether a ReLU follows.
        inplace: whether the result takes the place of the other images.
    """
    stride, padding, dilation, groups = settings
    if weight.is_mkldnn or by_onednn(x, weight):
        after = "relu" if relu else None
        if inplace:
            return _convolution_plus_(  # type: ignore[misc]
                other, x, weight, bias, padding, stride, dilation, groups, "add", None, after, [], None
            )
        return _convolution_plus(  # type: ignore[misc]
            x, other, weight, bias, padding, stride, dilation, groups, "add", None, after, [], None
        )
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    y = other.add_(y) if inplace else y.add_(other)
    return y.relu_() if relu else y


def folded(layer: nn.Conv2d | nn.Linear, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer and of the batch normalization that follows it, in evaluation.

    Args:
        layer: a convolution or a linear layer.
        norm: the normalization, one for which :func:`can_be_folded` is true, or None.

    Example:
        >>> layer, norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3).eval()
        >>> x = torch.randn(4, 2, 5, 5)
        >>> torch.allclose(F.conv2d(x, *folded(layer, norm)), norm(layer(x)), atol=1e-6)
        True
    """
    weight = layer.weight.detach()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
    if norm is None:
        return weight.clone(), bias.clone()
    # In double precision, so that folding adds one rounding alone.
    of_norm: Any = norm
    scale = (of_norm.running_var.double() + of_norm.eps).rsqrt()
    if of_norm.weight is not None:
        scale = scale * of_norm.weight.detach().double()
    shift = (bias.double() - of_norm.running_mean.double()) * scale
    if of_norm.bias is not None:
        shift = shift + of_norm.bias.detach().double()
    return (weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))).to(weight), shift.to(bias)


def can_be_folded(norm: nn.Module) -> bool:
    """Whether a layer is a batch normalization with fixed statistics in evaluation."""
    if type(norm).__name__ == "FrozenBatchNorm2d":
        return hasattr(norm, "running_mean")
    return type(norm) in _NORMALIZATIONS and norm.running_mean is not None and norm.running_var is not None


_NORMALIZATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def can_be_packed(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of images that a :class:`PackedConvolution` can replace."""
    return (
        type(layer) is nn.Conv2d
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and not _has_hooks(layer)
    )


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer is a linear one that a :class:`PackedLinear` can replace."""
    return type(layer) is nn.Linear and not _has_hooks(layer)


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


class _Packed(OneStep):
    """A layer that makes packed weights of its plain ones; they are no part of copies or state dicts."""

    _MADE: ClassVar[tuple[str, ...]]
    """Names of the attributes that hold what was made."""

    def _forget(self) -> None:
        """Drop all that was made of the weights."""
        raise NotImplementedError

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> _Packed:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._MADE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()


class PackedConvolution(_Packed):
    """A convolution for inference, with the batch normalization and the ReLU that follow it.

    Weight and bias are buffers: there is nothing to learn in it. Packed weights are made when images of a new
    size come, and are no part of copies or state dicts.

    Args:
        layer: the convolution, one for which :func:`can_be_packed` is true; its weights are copied.
        norm: the batch normalization after it, or None.
        relu: whether a ReLU follows.

    Example:
        >>> layer, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8).eval()
        >>> x = torch.randn(2, 3, 9, 9)
        >>> torch.allclose(PackedConvolution(layer, norm, relu=True)(x), norm(layer(x)).relu(), atol=1e-5)
        True
    """

    weight: Tensor
    bias: Tensor

    generation: object
    """Another one whenever the weights may have changed."""

    _MADE = ("_by_size", "_made", "_lock", "generation")

    SIZES = 4
    """For how many sizes of batches, the latest new ones, packed weights are kept."""

    def __init__(self, layer: nn.Conv2d, norm: nn.Module | None = None, relu: bool = False) -> None:
        super().__init__()
        weight, bias = folded(layer, norm)
        # The order in which slices of output channels are contiguous, and packing is fast.
        self.register_buffer("weight", channels_last(weight))
        self.register_buffer("bias", bias)
        self.settings = Settings(
            (layer.stride[0], layer.stride[1]),
            _two(layer.padding),
            (layer.dilation[0], layer.dilation[1]),
            layer.groups,
        )
        self.relu = relu
        self._forget()
        self.eval()

    @property
    def groups(self) -> int:
        """Groups of the convolution."""
        return self.settings.groups

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        if is_plain():
            y = F.conv2d(x, self.weight, self.bias, *self.settings)
            return y.relu_() if self.relu else y
        return convolve(x, *self.whole(x), self.settings, self.relu)

    def size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for those of the input."""
        (down, right), (top, left), (low, wide), _ = self.settings
        height, width = self.weight.shape[2:]
        return (
            (size[0] + 2 * top - low * (height - 1) - 1) // down + 1,
            (size[1] + 2 * left - wide * (width - 1) - 1) // right + 1,
        )

    def whole(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias, for these images."""
        packed = self.packed(x, x.shape[2:], "whole", lambda: [((), self.weight, self.bias)])
        return (self.weight, self.bias) if packed is None else packed[()]

    def packed(
        self,
        x: Tensor,
        size: Sequence[int],
        name: str,
        cut: Callable[[], Iterable[tuple[Hashable, Tensor, Tensor]]],
    ) -> Mapping[Hashable, tuple[Tensor, Tensor]] | None:
        """Parts of the layer with weights packed for its images, or None where plain ones are better.

        Args:
            x: images of the number, the type and the device of those that the layer gets.
            size: height and width of those that it gets.
            name: of this way to cut the layer.
            cut: gives the name of each part, its plain weight and its bias.

        Returns:
            Weight and bias of each part, by its name.
        """
        images = (x.shape[0], *size)
        return self.kept_for(
            x, size, name, lambda: {part: (self._pack(images, weight), bias) for part, weight, bias in cut()}
        )

    def kept_for(self, x: Tensor, size: Sequence[int], name: str, make: Callable[[], _Made]) -> _Made | None:
        """What is made once for images of a size and kept as long as weights are packed for them.

        The order of packed weights depends on how many images there are, on their size and on the number of
        threads. In another order they are slower than plain ones. So they are packed when this comes for the
        second time, and only where oneDNN computes with them: otherwise nothing is made, and this is None.
        """
        if not by_onednn(x, self.weight):
            return None
        by_name = self._for_size((x.shape[0], *size, torch.get_num_threads()))
        if by_name is None:
            return None
        found: _Made | None = by_name.get(name)
        if found is None:
            found = by_name[name] = make()
        return found

    def kept(self, name: str, make: Callable[[], Iterable[_Made]]) -> list[_Made]:
        """What is made of the plain weights, once."""
        found = self._made.get(name)
        if found is None:
            found = self._made[name] = [*make()]
        return found

    def _pack(self, images: tuple[int, ...], weight: Tensor) -> Tensor:
        """Weights for so many images of this height and width."""
        stride, padding, dilation, groups = self.settings
        shape = (images[0], weight.shape[1] * groups, *images[1:])
        packed: Tensor = _reorder(weight.contiguous().to_mkldnn(), padding, stride, dilation, groups, shape)
        return packed

    def _for_size(self, size: Hashable) -> dict[str, Any] | None:
        """What was made for a size so far; None when it comes for the first time."""
        found = self._by_size.get(size)
        if found is None:
            with self._lock:
                self._by_size[size] = {}
                while len(self._by_size) > self.SIZES:
                    self._by_size.popitem(last=False)
        return found

    def _forget(self) -> None:
        self.generation = object()
        self._by_size: OrderedDict[Hashable, dict[str, Any]] = OrderedDict()
        self._made: dict[str, list[Any]] = {}
        self._lock = threading.Lock()

    def extra_repr(self) -> str:
        channels = f"{self.weight.shape[1] * self.groups}, {self.weight.shape[0]}"
        size = tuple(self.weight.shape[2:])
        settings = ", ".join(f"{name}={value}" for name, value in self.settings._asdict().items())
        return f"{channels}, kernel_size={size}, {settings}, relu={self.relu}"


class PackedLinear(_Packed):
    """A linear layer for inference.

    Its weight is packed when the layer computes for the first time, and anew after it was loaded or moved;
    changing it in place has no effect after that. Packed weights are no part of copies or state dicts.

    Args:
        layer: the linear layer, one for which :func:`is_plain_linear` is true; it shares its weight and bias.

    Shape:
        x is (..., features), with any number of rows.

    Example:
        >>> layer, x = nn.Linear(64, 256), torch.randn(2, 50, 64)
        >>> with torch.no_grad():
        ...     torch.allclose(PackedLinear(layer)(x), layer(x), atol=1e-5)
        True
    """

    weight: Tensor
    bias: Tensor | None

    _packed: tuple[Tensor | None, ...]  # empty until it was packed
    _MADE = ("_packed",)

    PACKED_FOR = 256
    """For how many rows weights are packed. They serve other numbers as well as weights packed for those."""

    ROWS = range(4, 2049)
    """For how many rows packed weights are faster. Fewer take as long as reading the weight does; among more,
    the time of packing does not count."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._forget()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        # While a program is exported, the number of rows may be any.
        if not is_plain() and by_mkl(x, weight) and (rows := math.prod(x.shape[:-1])) in self.ROWS:
            packed = self.packed
            if packed is not None:
                return _linear(x, packed, weight, bias, rows)  # type: ignore[misc]
        return F.linear(x, weight, bias)

    @property
    def packed(self) -> Tensor | None:
        """The packed weight; None where a product with it is not that with the plain one."""
        if not self._packed:
            self._packed = (self._checked(),)
        return self._packed[0]

    def _checked(self) -> Tensor | None:
        # The operations are PyTorch's own and may change, and other numbers of rows are not meant for them.
        try:
            packed: Tensor = _reorder_linear(self.weight, self.PACKED_FOR)  # type: ignore[misc]
            for rows in (self.ROWS[0], self.PACKED_FOR // 2 - 1):
                x = torch.linspace(-1, 1, rows * self.in_features).reshape(rows, self.in_features)
                expected = F.linear(x, self.weight, self.bias)
                given = _linear(x, packed, self.weight, self.bias, rows)  # type: ignore[misc]
                if not (given - expected).abs().max() <= 1e-5 * expected.abs().max():
                    return None
        except (RuntimeError, TypeError):
            return None
        return packed

    def _forget(self) -> None:
        self._packed = ()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


only_plain: ContextVar[bool] = ContextVar("only_plain", default=False)
"""Whether only operations of PyTorch's own may run in this thread."""


def is_plain() -> bool:
    """Whether only operations of PyTorch's own may run, as while they are counted, compiled or exported."""
    return only_plain.get() or is_measuring() or torch.compiler.is_compiling()


def _two(padding: Any) -> tuple[int, int]:
    return padding[0], padding[1]
