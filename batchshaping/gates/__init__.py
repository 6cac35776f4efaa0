"""Gates that switch parts of a network on and off, example by example, and what shapes and measures them."""

from batchshaping.gates.channel import ChannelGate
from batchshaping.gates.forced import gates_forced
from batchshaping.gates.gate import (
    Gate,
    binary_concrete,
    gate_decisions,
    gate_probabilities,
    named_gates,
    straight_through_decisions,
)
from batchshaping.gates.summary import GateCounts, GateStatistics, gate_statistics, l0_penalty

__all__ = [
    "ChannelGate",
    "Gate",
    "GateCounts",
    "GateStatistics",
    "binary_concrete",
    "gate_decisions",
    "gate_probabilities",
    "gate_statistics",
    "gates_forced",
    "l0_penalty",
    "named_gates",
    "straight_through_decisions",
]
