"""Gates of regions that learn nothing: what a learned gate is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchshaping.gates.gate import Gate, binary_concrete, whole_number

__all__ = ["ChanceGate", "EntropyGate", "pixel_entropy"]


def pixel_entropy(regions: Tensor, bins: int = 256, limit: float = 4.0) -> Tensor:
    r"""The entropy of the pixels of each region, in bits.

    .. math::
        H = -\sum_b p_b \log_2 p_b

    with p the shares of the region's pixels in bins of equal width. A region of one colour has entropy 0.

    Args:
        regions: pixels of shape (N, regions, channels, height, width), such as normalized ones. Channels are
            averaged.
        bins: number of bins.
        limit: the bins reach from its negative to itself; what is beyond is in the outermost ones.

    Returns:
        Entropies of shape (N, regions), NaN where a pixel is.

    Example:
        >>> pixel_entropy(torch.tensor([0.0, 0.0, 1.0, -1.0]).reshape(1, 1, 1, 2, 2))
        tensor([[1.5000]])
    """
    pixels = regions.float().mean(dim=2).flatten(2)
    places = ((pixels + limit) * (bins / (2 * limit))).nan_to_num().long().clamp(0, bins - 1)
    counts = torch.zeros(*pixels.shape[:2], bins, device=pixels.device)
    counts.scatter_add_(2, places, torch.ones_like(pixels))
    entropy = torch.special.entr(counts / pixels.shape[2]).sum(dim=2) / math.log(2)
    return torch.where(pixels.isnan().any(dim=2), math.nan, entropy)


class EntropyGate(Gate):
    r"""A region is fine where the entropy of its pixels is above a threshold: a rule that learns nothing.

    The threshold is the one above which a share of all regions is. In training it follows the batches, as the
    statistics of batch normalization do: with q the quantile of a batch, the threshold becomes
    :math:`0.9 \, t + 0.1 \, q`, after a first batch that gives it. There is no noise.

    Args:
        density: the share of regions that are fine.

    Attributes:
        threshold: entropy above which a region is fine, in bits, NaN before the first batch: then no region
            has a decision.

    Shape:
        x is (N, regions, channels, height, width). The gates are (N, regions).

    References:
        Choudhury et al., Accelerating Vision Transformers with Adaptive Patch Sizes, 2025,
        https://arxiv.org/abs/2510.18091, whose rule it is.

    Example:
        >>> gate, regions = EntropyGate(density=0.25), torch.randn(64, 16, 1, 16, 16)
        >>> gate(regions * torch.rand(64, 16, 1, 1, 1)).mean().round(decimals=2)
        tensor(0.2500)
    """

    threshold: Tensor

    def __init__(self, density: float) -> None:
        super().__init__()
        self.density = _density(density)
        self.register_buffer("threshold", torch.tensor(math.nan))

    def forward(self, x: Tensor) -> Tensor:
        """Zeros and ones of shape (N, regions): 1 where a region is fine."""
        with torch.no_grad():
            entropy = pixel_entropy(x)
            if self.training:
                quantile = entropy.quantile(1 - self.density)
                followed = self.threshold.lerp(quantile, 0.1)
                self.threshold.copy_(torch.where(self.threshold.isnan(), quantile, followed))
            return self.decide((entropy - self.threshold).to(x.dtype))

    def _decided(self, logits: Tensor) -> Tensor:
        return binary_concrete(logits, self.temperature, training=False)

    def extra_repr(self) -> str:
        return f"density={self.density}"


class ChanceGate(Gate):
    """A region is fine by chance: whatever a gate that looks gives beyond this, it has seen.

    In training chance is that of PyTorch's own generator. In evaluation it is a hash of the region's pixels,
    so that an image has the same decisions in every batch.

    Args:
        density: the probability that a region is fine; with 0 all are coarse, with 1 all fine.
        seed: of the hash.

    Shape:
        x is (N, regions, channels, height, width). The gates are (N, regions).

    Example:
        >>> gate = ChanceGate(density=0.25).eval()
        >>> bool((gate(torch.randn(1000, 16, 1, 8, 8)).mean() - 0.25).abs() < 0.02)
        True
    """

    def __init__(self, density: float, seed: int = 0) -> None:
        super().__init__()
        self.density, self.seed = _density(density), whole_number("seed", seed, least=0)

    def forward(self, x: Tensor) -> Tensor:
        """Zeros and ones of shape (N, regions): 1 where a region is fine."""
        self._uniform = (
            torch.rand(x.shape[:2], device=x.device) if self.training else self._hash(x.flatten(2))
        )
        return self.decide(x.new_full(x.shape[:2], self._log_odds))

    @property
    def _log_odds(self) -> float:
        return math.log(self.density / (1 - self.density)) if 0 < self.density < 1 else 0.0

    def _decided(self, logits: Tensor) -> Tensor:
        # A shifted threshold divides the odds; without one, the share is the density to the bit.
        divisor = torch.exp((logits.new_full((), self._log_odds) - logits).double())
        share = self.density / (self.density + (1 - self.density) * divisor)
        return (self._uniform < share.to(self._uniform)).to(logits)

    def _hash(self, regions: Tensor) -> Tensor:
        """Numbers in [0, 1) that follow from the pixels: the upper bits of a sum with random factors."""
        generator = torch.Generator().manual_seed(self.seed)
        factors = torch.randint(2**62, regions.shape[2:], generator=generator) * 2 + 1
        # Integers, since their sum is the same in every order; they may overflow.
        sums = ((regions.float() * 1024).round().long() * factors.to(regions.device)).sum(dim=2)
        return ((sums >> 39) & (2**24 - 1)).double() / 2**24

    def extra_repr(self) -> str:
        return f"density={self.density}, seed={self.seed}"


def _density(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"density must be in [0, 1], received {value}")
    return value
