"""Gates for the channels of a layer, one each or one for several, decided from the means of feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchshaping.gates.gate import Gate, layer_of_logits, whole_number

__all__ = ["ChannelGate", "even_sizes", "keep_channels", "to_channels"]


class ChannelGate(Gate):
    r"""Gates for the channels of a layer, decided example by example from the mean of each feature map.

    .. math::
        \log \alpha = W_b \, \mathrm{ReLU}(\mathrm{BN}(W_a \, \mathrm{pool}(x)))

    Args:
        in_channels: channels of the features x that the gate reads.
        out_channels: channels that it switches.
        hidden: width of the MLP.
        bias: added to the initial logits: the higher, the more channels are open at first; half of them at 0.
        gates: how many gates there are. Each switches neighbouring channels, as many as the others or one
            more. A gate for each channel by default.
        device: where its tensors are; as PyTorch chooses by default.
        dtype: their type; as PyTorch chooses by default.

    Attributes:
        sizes: how many channels each gate switches, in their order; None if it is one each. One number more
            than there are gates is that of channels at the end that no gate switches, see :meth:`keep`.

    Shape:
        x is (N, in_channels, ...) with any number of dimensions to pool over, or none. What the module
        returns is (N, out_channels, 1, ...) with as many, so that it multiplies the channels as it is. What
        the gates decided is (N, gates).

    Raises:
        ValueError: if a width is no positive integer, if there are more gates than channels, or if the bias
            is not finite; if x has another number of channels, or too few examples for batch normalization in
            training.

    References:
        Bejnordi, Blankevoort and Welling, Batch-Shaping for Learning Conditional Channel Gated Networks, ICLR
        2020, https://arxiv.org/abs/1907.06627.

    Example:
        >>> gate = ChannelGate(in_channels=8, out_channels=32)
        >>> x, inner = torch.randn(4, 8, 7, 7), torch.randn(4, 32, 7, 7)
        >>> (gate(x) * inner).shape, gate.probabilities.shape
        (torch.Size([4, 32, 7, 7]), torch.Size([4, 32]))
        >>> gate = ChannelGate(in_channels=8, out_channels=32, gates=3)
        >>> (gate(x) * inner).shape, gate.probabilities.shape, gate.sizes
        (torch.Size([4, 32, 7, 7]), torch.Size([4, 3]), (11, 11, 10))
    """

    sizes: tuple[int, ...] | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int = 16,
        bias: float = 0.0,
        gates: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device=device)
        self.in_channels = whole_number("in_channels", in_channels, least=1)
        out_channels = whole_number("out_channels", out_channels, least=1)
        hidden = whole_number("hidden", hidden, least=1)
        gates = out_channels if gates is None else whole_number("gates", gates, least=1)
        if gates > out_channels:
            raise ValueError(
                f"gates must be at most one for each of the {out_channels} channels, received {gates}"
            )
        if gates < out_channels:
            self.sizes = even_sizes(out_channels, gates)
        last = layer_of_logits(hidden, gates, bias, device, dtype)
        self.to_logits = nn.Sequential(
            nn.Linear(self.in_channels, hidden, bias=False, device=device, dtype=dtype),
            nn.BatchNorm1d(hidden, device=device, dtype=dtype),
            nn.ReLU(),
            last,
        )

    @property
    def gates(self) -> int:
        """How many gates there are."""
        last: Any = self.to_logits[-1]
        return int(last.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Zeros and ones of shape (N, out_channels, 1, ...), of x's number of dimensions."""
        # torch.jit.trace warns of every question about a shape.
        if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            self._refuse_unreadable(x)
        pooled = x.flatten(2).mean(dim=2) if x.ndim > 2 else x
        gates = to_channels(self.decide(self.to_logits(pooled)), self.sizes)
        return gates.reshape(*gates.shape, *[1] * (x.ndim - 2))

    def keep(self, gates: Sequence[int], sizes: Sequence[int]) -> None:
        """Drop all gates but some, in place. The logits of those stay as they are.

        Args:
            gates: indices of those that stay, at least one, in the order of what they switch.
            sizes: how many channels each of them switches, and, as one number more, how many channels after
                those no gate switches.

        Example:
            >>> gate = ChannelGate(in_channels=8, out_channels=32, gates=4).eval()
            >>> gate.keep([3, 1], sizes=(8, 8, 5))
            >>> x = torch.randn(2, 8)
            >>> gate(x).shape, gate.decisions.shape, bool(gate(x)[:, 16:].all())
            (torch.Size([2, 21]), torch.Size([2, 2]), True)
        """
        last: Any = self.to_logits[-1]
        keep_channels(last, last.out_features, gates)
        self.sizes = tuple(sizes) if len(sizes) > len(gates) or {*sizes} != {1} else None
        self._runs = ()

    def _refuse_unreadable(self, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must have shape (N, {self.in_channels}, ...), received {tuple(x.shape)}")
        if x.shape[0] < 2:
            norm = self.to_logits[1]
            # Synchronized batch normalization, of another class, has the examples of other ranks too.
            if norm.training and isinstance(norm, nn.BatchNorm1d):
                raise ValueError(
                    "a gate in training normalizes over the batch and needs at least 2 examples, "
                    f"received {x.shape[0]} (drop_last=True leaves out a last batch of one)"
                )


def even_sizes(channels: int, gates: int) -> tuple[int, ...]:
    """How many channels each gate switches: the same number, or one more for the first gates.

    Example:
        >>> even_sizes(channels=10, gates=4)
        (3, 3, 2, 2)
    """
    size, rest = divmod(channels, gates)
    return (size + 1,) * rest + (size,) * (gates - rest)


def to_channels(values: Tensor, sizes: Sequence[int] | None) -> Tensor:
    """Give each channel the value of its gate.

    Args:
        values: of shape (N, gates).
        sizes: how many channels each gate switches; None if it is one each. One number more is that of
            channels at the end that no gate switches: their value is 1.

    Returns:
        A tensor of shape (N, channels).

    Example:
        >>> to_channels(torch.tensor([[0.1, 0.7]]), sizes=(3, 2))
        tensor([[0.1000, 0.1000, 0.1000, 0.7000, 0.7000]])
        >>> to_channels(torch.tensor([[0.1, 0.7]]), sizes=(1, 2, 3))
        tensor([[0.1000, 0.7000, 0.7000, 1.0000, 1.0000, 1.0000]])
    """
    if sizes is None:
        return values
    if len(sizes) > values.shape[1]:
        values = F.pad(values, (0, 1), value=1.0)
    parts, end = [], 0
    for size, gates in groupby(sizes):
        first, end = end, end + len([*gates])
        parts.append(values[:, first:end].unsqueeze(2).expand(-1, -1, size).flatten(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def keep_channels(layer: nn.Module, before: int, channels: Sequence[int]) -> None:
    """Drop all outputs of a layer but some, in place: of a convolution, a linear layer or a normalization.

    Args:
        layer: the layer. One that has nothing for each output, such as an activation, stays as it is.
        before: how many outputs it has.
        channels: indices of those that stay, in their new order.

    Example:
        >>> layer = nn.Linear(4, 8)
        >>> keep_channels(layer, 8, [6, 1])
        >>> layer, layer.bias.shape
        (Linear(in_features=4, out_features=2, bias=True), torch.Size([2]))
    """
    for module in layer.modules():
        kinds: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in kinds:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.ndim and len(tensor) == before:
                    kept = tensor.detach()[list(channels)]
                    if isinstance(tensor, nn.Parameter):
                        kept = nn.Parameter(kept, tensor.requires_grad)
                    tensors[name] = kept
        for name in ("out_features", "out_channels", "num_features", "channels"):
            if getattr(module, name, None) == before:
                setattr(module, name, len(channels))
