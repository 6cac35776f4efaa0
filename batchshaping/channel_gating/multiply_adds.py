"""The multiply-adds of a model, by the module path and the constructor that they had before they moved."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from batchshaping.gates import cost
from batchshaping.gates.cost import Constant, ConvolutionTerm, GateRun, Term, count_macs

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickle, also one of before, which knew gates by number alone."""
        if "_layers" in state:
            widths = {str(number): width for number, width in enumerate(state["_gates"])}
            terms = [layer.term(name, widths) for name, layer in state["_layers"].items()]
            super().__init__(terms, widths)
            state = {name: state[name] for name in ("dense", "gates", "fixed")}
        self.__dict__.update(state)


class _Layer(NamedTuple):
    """A layer in pickles of before."""

    dense: float
    groups: int = 1
    gate_of_input: int | None = None
    gate_of_output: int | None = None

    def term(self, name: str, widths: dict[str, int]) -> Term:
        gates = [str(gate) for gate in (self.gate_of_input, self.gate_of_output) if gate is not None]
        if not gates:
            return Constant(name, self.dense)
        runs = tuple(GateRun(gate, 0, widths[gate]) for gate in gates)
        return ConvolutionTerm(name, self.dense, self.groups, runs)
