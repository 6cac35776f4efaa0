"""Gates for the channels of a layer, one each or one for several, decided from the means of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from batchshaping.gates.gate import Gate, layer_of_logits, whole_number

__all__ = ["ChannelGate", "even_sizes", "to_channels"]


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
        sizes: how many channels each gate switches, in their order; None if it is one each.

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

    def forward(self, x: Tensor) -> Tensor:
        """Zeros and ones of shape (N, out_channels, 1, ...), of x's number of dimensions."""
        # torch.jit.trace warns of every question about a shape.
        if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            self._refuse_unreadable(x)
        pooled = x.flatten(2).mean(dim=2) if x.ndim > 2 else x
        gates = to_channels(self.decide(self.to_logits(pooled)), self.sizes)
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
        sizes: how many channels each gate switches, as :func:`even_sizes` gives them; None if it is one each.

    Returns:
        A tensor of shape (N, channels).

    Example:
        >>> to_channels(torch.tensor([[0.1, 0.7]]), sizes=(3, 2))
        tensor([[0.1000, 0.1000, 0.1000, 0.7000, 0.7000]])
    """
    if sizes is None:
        return values
    larger, smaller = sizes[0], sizes[-1]
    number = sizes.count(larger)
    if number == len(sizes):
        return values.unsqueeze(2).expand(-1, -1, larger).flatten(1)
    parts = [(values[:, :number], larger), (values[:, number:], smaller)]
    return torch.cat([part.unsqueeze(2).expand(-1, -1, size).flatten(1) for part, size in parts], dim=1)
