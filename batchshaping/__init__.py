"""Shape the distribution of activations, gates or parameters to a prior.

Example:
    >>> import torch, batchshaping as bs
    >>> gates = torch.rand(256, 64, requires_grad=True)
    >>> loss = 0.75 * bs.batch_shaping(gates, bs.Beta(0.6, 0.4), dim=0)
    >>> loss.backward()
"""

from batchshaping import _moved as _moved
from batchshaping.cdfs.betainc import betainc
from batchshaping.cdfs.betaincinv import betaincinv
from batchshaping.channel_gating.blocks import gate_resnet
from batchshaping.channel_gating.resnets import (
    gated_resnet18,
    gated_resnet20,
    gated_resnet32,
    gated_resnet34,
    gated_resnet50,
    gated_resnet56,
)
from batchshaping.gates.calibration import calibrate
from batchshaping.gates.channel import ChannelGate
from batchshaping.gates.cost import count_macs
from batchshaping.gates.export import export_onnx
from batchshaping.gates.forced import gates_forced
from batchshaping.gates.gate import (
    Gate,
    binary_concrete,
    gate_decisions,
    gate_probabilities,
    straight_through_decisions,
)
from batchshaping.gates.guarantee import guarantee
from batchshaping.gates.inference import conditional_inference
from batchshaping.gates.shifted import gates_shifted
from batchshaping.gates.static import prune_static_gates
from batchshaping.gates.summary import gate_statistics, l0_penalty
from batchshaping.losses.functional import batch_shaping
from batchshaping.losses.generalized import GeneralizedBatchShapingLoss
from batchshaping.losses.modules import BatchShapingLoss
from batchshaping.losses.sliced import SlicedBatchShapingLoss
from batchshaping.mixed_scale.msvit import MSViT
from batchshaping.priors.families import Beta, Normal, RelaxedBernoulli, SymBeta

__version__ = "0.1.0"

__all__ = [
    "BatchShapingLoss",
    "Beta",
    "ChannelGate",
    "Gate",
    "GeneralizedBatchShapingLoss",
    "MSViT",
    "Normal",
    "RelaxedBernoulli",
    "SlicedBatchShapingLoss",
    "SymBeta",
    "batch_shaping",
    "betainc",
    "betaincinv",
    "binary_concrete",
    "calibrate",
    "conditional_inference",
    "count_macs",
    "export_onnx",
    "gate_decisions",
    "gate_probabilities",
    "gate_resnet",
    "gate_statistics",
    "gated_resnet18",
    "gated_resnet20",
    "gated_resnet32",
    "gated_resnet34",
    "gated_resnet50",
    "gated_resnet56",
    "gates_forced",
    "gates_shifted",
    "guarantee",
    "l0_penalty",
    "prune_static_gates",
    "straight_through_decisions",
]
