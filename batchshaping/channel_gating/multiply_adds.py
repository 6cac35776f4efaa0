r"""What each example costs: multiply-adds of the channels that its gates leave open.

A convolution with kernel K costs an example

.. math::
    |\text{output positions}| \cdot |K| \cdot \sum_{\text{groups}} c_\text{in} \, c_\text{out},

with the numbers of open channels of its input and output. A linear layer is a convolution at one position.
The gates' own layers count. Normalizations, activations, pooling and sums do not, as is usual.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from batchshaping.channel_gating.blocks import GatedBlock
from batchshaping.gates import Gate, gate_decisions

__all__ = ["MultiplyAdds", "count_macs"]


class _Layer(NamedTuple):
    """A layer's multiply-adds for one example with all channels open, and which gates switch its channels."""

    dense: float
    groups: int = 1
    gate_of_input: int | None = None
    gate_of_output: int | None = None

    def of(self, gates: Sequence[Tensor]) -> Tensor:
        """Multiply-adds of each example, of shape (N,)."""
        # Of each group, the share of pairs of an input and an output channel that are both open.
        shares: list[Tensor] = [
            _at_least_float32(gates[gate]).unflatten(1, (self.groups, -1)).mean(dim=2)
            for gate in (self.gate_of_input, self.gate_of_output)
            if gate is not None
        ]
        return self.dense * math.prod(shares[1:], start=shares[0]).mean(dim=1)


class MultiplyAdds:
    """The multiply-adds of a model by layer and by example, as a function of its gates.

    Making one runs the model once, in evaluation and without a gradient, on images of the shape to count for.

    Args:
        model: a module with :class:`~batchshaping.channel_gating.blocks.GatedBlock` s, or without any.
        x: its input, of shape (N, ...).

    Attributes:
        dense: multiply-adds of one example with all gates open, without those of the gates' own layers: what
            the model would cost if it were not gated.
        gates: multiply-adds of the gates' own layers.
        fixed: what an example costs with all gates closed, the gates' own layers included.

    Example:
        >>> import batchshaping as bs
        >>> model = bs.gated_resnet20().eval()
        >>> x = torch.randn(4, 3, 32, 32)
        >>> cost = MultiplyAdds(model, x)
        >>> cost.dense, cost.gates
        (40813184.0, 9984.0)
        >>> spent = cost.per_example(bs.gate_decisions(model))
        >>> spent.shape, bool((spent < cost.dense).all())
        (torch.Size([4]), True)
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        if len(x) == 0:
            raise ValueError(f"x must hold at least one example, received shape {tuple(x.shape)}")
        by_layer: dict[str, _Layer] = {}
        # A compiled model would not see that it is being counted.
        with _counted(model, len(x), by_layer), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(x)
        gates = [name for name, module in model.named_modules() if isinstance(module, Gate)]
        within_gates = {
            name for name in by_layer if any(name == gate or name.startswith(f"{gate}.") for gate in gates)
        }
        for block, module in model.named_modules():
            if isinstance(module, GatedBlock):
                for convolution, (of_input, of_output) in module.convolutions.items():
                    name = _join(block, convolution)
                    if name in by_layer:
                        by_layer[name] = by_layer[name]._replace(
                            gate_of_input=None if of_input is None else gates.index(_join(block, of_input)),
                            gate_of_output=None
                            if of_output is None
                            else gates.index(_join(block, of_output)),
                        )
        self._layers = by_layer
        self.dense = sum(layer.dense for name, layer in by_layer.items() if name not in within_gates)
        self.gates = sum(by_layer[name].dense for name in within_gates)
        self._switched = [layer for layer in by_layer.values() if layer[2:] != (None, None)]
        self.fixed = self.dense + self.gates - sum(layer.dense for layer in self._switched)

    def per_example(self, gates: Sequence[Tensor]) -> Tensor:
        """Multiply-adds of each example.

        Args:
            gates: what the gates are, of shape (N, gates) a gate module, in the order of ``model.modules()``:
                decisions as :func:`~batchshaping.gates.gate_decisions` gives them; or probabilities as
                :func:`~batchshaping.gates.gate_probabilities` does, for the expectation over independent
                gates, differentiable.

        Returns:
            A tensor of shape (N,); of shape (1,) if the model has no gates.
        """
        fixed = torch.full((len(gates[0]) if gates else 1,), float(self.fixed))
        switched = [layer.of(gates) for layer in self._switched]
        return torch.stack([*switched, fixed.to(switched[0]) if switched else fixed]).sum(dim=0)

    def per_layer(self, gates: Sequence[Tensor]) -> dict[str, Tensor]:
        """Multiply-adds of each example in each layer that has any, by the name of the layer.

        Args:
            gates: as for :meth:`per_example`.

        Returns:
            Tensors of shape (N,) in the order in which the layers run.
        """
        examples = len(gates[0]) if gates else 1
        return {
            name: layer.of(gates)
            if layer in self._switched and gates
            else torch.full((examples,), float(layer.dense))
            for name, layer in self._layers.items()
        }


def count_macs(model: nn.Module, x: Tensor) -> Tensor:
    """Multiply-adds that each example costs with the gates it gets, in convolutions and linear layers.

    What a model computes without calling such a layer is not counted: recurrent layers, for example, and
    torch's own multi-head attention. The model runs once, in evaluation and without a gradient; its mode and
    its weights stay as they are.

    Args:
        model: a module with or without gates.
        x: its input, of shape (N, ...).

    Returns:
        A tensor of shape (N,): multiply-adds, the gates' own included.

    Raises:
        ValueError: if there is no example.

    Example:
        >>> import batchshaping as bs
        >>> model, x = bs.gated_resnet20(), torch.randn(4, 3, 32, 32)
        >>> with bs.gates_forced(model, share=1.0):
        ...     count_macs(model, x)
        tensor([40823168., 40823168., 40823168., 40823168.])
    """
    cost = MultiplyAdds(model, x)
    gated = any(isinstance(module, Gate) for module in model.modules())
    return cost.per_example(gate_decisions(model) if gated else []).expand(len(x))


@contextmanager
def _counted(model: nn.Module, examples: int, by_layer: dict[str, _Layer]) -> Iterator[None]:
    """Collect the multiply-adds of every layer that runs, in evaluation mode."""
    handles = []
    training = [module for module in model.modules() if module.training]
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):

            def count(
                module: Any, args: Any, kwargs: dict[str, Any], output: Tensor, name: str = name
            ) -> None:
                # One value that is multiplied by weights meets those of one channel.
                values = [*args, *kwargs.values()][0] if isinstance(module, _ConvTransposeNd) else output
                macs = values.numel() / examples * module.weight[0].numel()
                earlier = by_layer[name].dense if name in by_layer else 0.0
                by_layer[name] = _Layer(earlier + macs, getattr(module, "groups", 1))

            handles.append(module.register_forward_hook(count, with_kwargs=True))
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
