"""A gate for each channel of a layer, decided from the mean of each feature map."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from batchshaping.gates.gate import Gate, whole_number

__all__ = ["ChannelGate"]


class ChannelGate(Gate):
    r"""A gate for each channel of a layer, decided example by example from the mean of each feature map.

    .. math::
        \log \alpha = W_b \, \mathrm{ReLU}(\mathrm{BN}(W_a \, \mathrm{pool}(x)))

    Args:
        in_channels: channels of the features x that the gate reads.
        out_channels: channels that it switches.
        hidden: width of the MLP.
        bias: added to the initial logits: the higher, the more channels are open at first; half of them at 0.
        device: where its tensors are; as PyTorch chooses by default.
        dtype: their type; as PyTorch chooses by default.

    Shape:
        x is (N, in_channels, ...) with any number of dimensions to pool over, or none. The gates are
        (N, out_channels, 1, ...) with as many, so that they multiply the channels as they are.

    Raises:
        ValueError: if a width is no positive integer or the bias not finite; if x has another number of
            channels, or too few examples for batch normalization in training.

    References:
        Bejnordi, Blankevoort and Welling, Batch-Shaping for Learning Conditional Channel Gated Networks, ICLR
        2020, https://arxiv.org/abs/1907.06627.

    Example:
        >>> gate = ChannelGate(in_channels=8, out_channels=32)
        >>> x, inner = torch.randn(4, 8, 7, 7), torch.randn(4, 32, 7, 7)
        >>> (gate(x) * inner).shape, gate.probabilities.shape
        (torch.Size([4, 32, 7, 7]), torch.Size([4, 32]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int = 16,
        bias: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device=device)
        self.in_channels = whole_number("in_channels", in_channels, least=1)
        out_channels = whole_number("out_channels", out_channels, least=1)
        hidden = whole_number("hidden", hidden, least=1)
        if not math.isfinite(bias):
            raise ValueError(f"bias must be finite, received {bias}")
        last = nn.Linear(hidden, out_channels, device=device, dtype=dtype)
        with torch.no_grad():
            last.bias.add_(bias)
        self.to_logits = nn.Sequential(
            nn.Linear(self.in_channels, hidden, bias=False, device=device, dtype=dtype),
            nn.BatchNorm1d(hidden, device=device, dtype=dtype),
            nn.ReLU(),
            last,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Zeros and ones of shape (N, out_channels, 1, ...), of x's number of dimensions."""
        # torch.jit.trace warns of every question about a shape.
        if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            self._refuse_unreadable(x)
        pooled = x.flatten(2).mean(dim=2) if x.ndim > 2 else x
        gates = self.decide(self.to_logits(pooled))
        return gates.reshape(*gates.shape, *[1] * (x.ndim - 2))

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
