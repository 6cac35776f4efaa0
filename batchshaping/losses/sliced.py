"""The batch-shaping loss in many dimensions: random projections, each shaped to a prior on the line."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from batchshaping.losses.distributed import Group
from batchshaping.losses.modules import BatchShapingLoss
from batchshaping.priors.checks import check_values, is_index
from batchshaping.priors.families import Normal
from batchshaping.statistics.statistic import Discrepancy

__all__ = ["SlicedBatchShapingLoss"]


class SlicedBatchShapingLoss(nn.Module):
    r"""The mean batch-shaping loss of random projections of an embedding.

    .. math::
        L = \frac{1}{M} \sum_{m=1}^M L(X u_m; F), \qquad u_m \sim \mathrm{Uniform}(S^{D-1})

    By the theorem of Cramér and Wold a distribution is given by its projections: with a standard Normal prior
    the loss is least for an isotropic Gaussian embedding, which cannot collapse. With
    ``statistic="epps_pulley"`` it is SIGReg up to a factor N.

    Half precision is projected in float32, under autocast too.

    Each forward pass in training draws new directions from a generator that the seed and the number of passes
    determine, so that all ranks project alike, and a resumed run goes on as if undisturbed. In evaluation the
    directions of the next pass are used and not counted.

    Args:
        slices: number M of directions.
        prior: prior of every projection.
        statistic: name of the statistic, or one's own.
        seed: seed of the directions.
        group: process group over which the batch extends, or "world".

    References:
        Balestriero and LeCun, LeJEPA, 2025, https://arxiv.org/abs/2511.08544.

    Example:
        >>> loss = SlicedBatchShapingLoss(slices=64)
        >>> round_cloud = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
        >>> bool(loss(round_cloud) < loss(0.5 * round_cloud))
        True
    """

    step: Tensor

    def __init__(
        self,
        slices: int = 1024,
        prior: Distribution | None = None,
        *,
        statistic: str | Discrepancy = "cramer_von_mises",
        seed: int = 0,
        group: Group = None,
    ) -> None:
        super().__init__()
        if not is_index(slices):
            raise TypeError(f"slices must be a whole number, received {slices!r}")
        if slices < 1:
            raise ValueError(f"slices must be at least 1, received {slices}")
        self.slices, self.seed = slices, seed
        prior = Normal(0.0, 1.0) if prior is None else prior
        self.loss = BatchShapingLoss(prior, dim=0, statistic=statistic, group=group)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def directions(self, dimensions: int) -> Tensor:
        """The unit vectors of the next pass, of shape (dimensions, slices), on the CPU in float32."""
        # Mixed well, since torch's generator on the CPU reads 32 bits of its seed.
        (state,) = np.random.SeedSequence((self.seed, int(self.step))).generate_state(1)
        generator = torch.Generator("cpu").manual_seed(int(state))
        directions = torch.randn(dimensions, self.slices, generator=generator, device="cpu")
        norms: Tensor = torch.linalg.vector_norm(directions, dim=0)
        return directions / norms

    def forward(self, x: Tensor) -> Tensor:
        """The loss of an embedding of shape (..., D), of which all dimensions but the last hold samples."""
        check_values(x)
        if x.ndim < 2:
            raise ValueError(
                f"x must have shape (..., D) with samples before the last, received {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, received {x.dtype}")
        directions = self.directions(x.shape[-1]).to(x.device)
        if self.training:
            self.step += 1
        working = torch.promote_types(x.dtype, torch.float32)
        with _full_precision(x.device.type):
            projections = x.flatten(0, -2).to(working) @ directions.to(working)
        loss: Tensor = self.loss(projections)
        return loss.to(x.dtype)

    def extra_repr(self) -> str:
        return f"slices={self.slices}, seed={self.seed}"


def _full_precision(device: str) -> AbstractContextManager[object]:
    """Autocast would project in half precision."""
    is_available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if is_available else nullcontext()
