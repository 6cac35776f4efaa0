r"""The scale gate: which regions of an image are looked at closely.

A gate is **open where its region is fine** and closed where it is coarse, since what is open costs more, as
everywhere in this package. So the target density of the gates is the share of fine regions. (The gate of
Havtorn et al. is the opposite: 1 for coarse.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from batchshaping.gates.gate import Gate, layer_of_logits, whole_number

__all__ = ["ScaleGate"]


class ScaleGate(Gate):
    r"""A gate for each region of an image, decided from the pixels of the region alone.

    An MLP with batch normalization, the same for all regions, gives the log-odds that a region is fine:

    .. math::
        \log \alpha = W_L h_{L-1}, \qquad h_l = \mathrm{ReLU}(\mathrm{BN}(W_l h_{l-1})), \qquad h_0 = x

    Args:
        features: how many values a region has: channels x height x width.
        hidden: width of the hidden layers.
        layers: number of linear layers, L.
        bias: added to the initial logits: the higher, the more regions are fine at first; half of them at 0.
        device: where its tensors are; as PyTorch chooses by default.
        dtype: their type; as PyTorch chooses by default.

    Shape:
        x is (N, regions, ...) with ``features`` values in the last dimensions. The gates are (N, regions).

    Raises:
        ValueError: if a width or the number of layers is no positive integer or the bias not finite; if the
            regions have another number of values, or are fewer than 2 in training, where batch normalization
            needs as many.

    References:
        Havtorn, Royer, Blankevoort and Bejnordi, MSViT: Dynamic Mixed-Scale Tokenization for Vision
        Transformers, ICCV Workshops 2023, https://arxiv.org/abs/2307.02321.

    Example:
        >>> gate = ScaleGate(features=3 * 8 * 8)
        >>> gate(torch.randn(4, 9, 3, 8, 8)).shape, gate.probabilities.shape
        (torch.Size([4, 9]), torch.Size([4, 9]))
    """

    def __init__(
        self,
        features: int,
        hidden: int = 32,
        layers: int = 4,
        bias: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device=device)
        self.features = whole_number("features", features, least=1)
        hidden = whole_number("hidden", hidden, least=1)
        layers = whole_number("layers", layers, least=1)
        self.to_logits = nn.Sequential()
        width = self.features
        for _ in range(layers - 1):
            self.to_logits.extend(
                [
                    nn.Linear(width, hidden, bias=False, device=device, dtype=dtype),
                    nn.BatchNorm1d(hidden, device=device, dtype=dtype),
                    nn.ReLU(),
                ]
            )
            width = hidden
        self.to_logits.append(layer_of_logits(width, 1, bias, device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Zeros and ones of shape (N, regions): 1 where a region is fine."""
        if x.ndim < 3 or math.prod(x.shape[2:]) != self.features:
            raise ValueError(
                f"x must have shape (N, regions, ...) with {self.features} values a region, "
                f"received {tuple(x.shape)}"
            )
        regions = x.flatten(2).flatten(0, 1)
        normalizes = any(isinstance(m, nn.BatchNorm1d) and m.training for m in self.to_logits)
        if normalizes and len(regions) < 2:
            raise ValueError(
                "a gate in training normalizes over the regions of the batch and needs at least 2, "
                f"received {len(regions)}"
            )
        return self.decide(self.to_logits(regions).reshape(x.shape[:2]))
