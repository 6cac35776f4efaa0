"""The multiply-adds of a model, by the module path and the constructor that they had before they moved."""

from __future__ import annotations

from torch import Tensor, nn

from batchshaping.gates import cost
from batchshaping.gates.cost import count_macs

__all__ = ["MultiplyAdds", "count_macs"]


class MultiplyAdds(cost.MultiplyAdds):
    """The same as :meth:`MultiplyAdds.measure <batchshaping.gates.cost.MultiplyAdds.measure>`.

    Args:
        model: a module with or without gates.
        x: its input, of shape (N, ...).
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        measured = cost.MultiplyAdds.measure(model, x)
        super().__init__(measured.terms, measured.widths, measured.layers_of_gates)
