"""Shape the distribution of activations, gates or parameters to a prior.

Example:
    >>> import torch, batchshaping as bs
    >>> gates = torch.rand(256, 64, requires_grad=True)
    >>> loss = 0.75 * bs.batch_shaping(gates, bs.Beta(0.6, 0.4), dim=0)
    >>> loss.backward()
"""

from batchshaping.batch_shaping_loss import BatchShapingLoss, GeneralizedBatchShapingLoss, batch_shaping
from batchshaping.cdf_beta import betainc, betaincinv
from batchshaping.gates import (
    ChannelGate,
    Gate,
    binary_concrete,
    gate_probabilities,
    gate_statistics,
    l0_penalty,
)
from batchshaping.priors import Beta, Normal, RelaxedBernoulli, SymBeta
from batchshaping.sliced import SlicedBatchShapingLoss

__version__ = "0.1.0"

__all__ = [
    "BatchShapingLoss",
    "Beta",
    "ChannelGate",
    "Gate",
    "GeneralizedBatchShapingLoss",
    "Normal",
    "RelaxedBernoulli",
    "SlicedBatchShapingLoss",
    "SymBeta",
    "batch_shaping",
    "betainc",
    "betaincinv",
    "binary_concrete",
    "gate_probabilities",
    "gate_statistics",
    "l0_penalty",
]
