r"""What each example costs: multiply-adds of the channels that its gates leave open.

A convolution with kernel K costs an example

.. math::
    |\text{output positions}| \cdot |K| \cdot \sum_{\text{groups}} c_\text{in} \, c_\text{out},

with the numbers of open channels of its input and output. A linear layer is a convolution at one position.
The gates' own layers count. Normalizations, activations, pooling and sums do not, as is usual.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
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

    @property
    def is_switched(self) -> bool:
        """Whether gates switch any of its channels."""
        return self.gate_of_input is not None or self.gate_of_output is not None

    def of(self, gates: Sequence[Tensor]) -> Tensor:
        """Multiply-adds of each example, of shape (N,), in a layer that is switched."""
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

    Raises:
        ValueError: if there is no example; if the model was traced or exported, since its layers are not
            called then; or if a gated block runs more than once, since a gate keeps its last decisions only.

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
        _refuse_traced(model)
        dense, passes = _run_once(model, x)
        gates = [module for module in model.modules() if isinstance(module, Gate)]
        switches = _switches(model, gates, passes)
        names = {module: name for name, module in model.named_modules()}
        self._layers = {
            names[module]: _Layer(macs, getattr(module, "groups", 1), *switches.get(module, (None, None)))
            for module, macs in dense.items()
        }
        self._switched = [layer for layer in self._layers.values() if layer.is_switched]
        self._gates = [gate.decisions.shape[1] for gate in gates]
        within_gates = {layer for gate in gates for layer in gate.modules()}
        self.dense = sum(macs for module, macs in dense.items() if module not in within_gates)
        self.gates = sum(macs for module, macs in dense.items() if module in within_gates)
        self.fixed = self.dense + self.gates - sum(layer.dense for layer in self._switched)

    def per_example(self, gates: Sequence[Tensor]) -> Tensor:
        """Multiply-adds of each example.

        Args:
            gates: what the gates are, of shape (N, gates) a gate module, in the order of ``model.modules()``:
                decisions as :func:`~batchshaping.gates.gate_decisions` gives them, for what was spent;
                :func:`~batchshaping.gates.straight_through_decisions`, for the same with a gradient; or
                probabilities, for the expectation over independent gates, differentiable.

        Returns:
            A tensor of shape (N,); of shape (1,) if the model has no gates.

        Raises:
            ValueError: if there are other gates than those of the model.
        """
        self._refuse_other_gates(gates)
        fixed = _constant(self.fixed, gates)
        return torch.stack([*(layer.of(gates) for layer in self._switched), fixed]).sum(dim=0)

    def per_layer(self, gates: Sequence[Tensor]) -> dict[str, Tensor]:
        """Multiply-adds of each example in each layer that has any, by the name of the layer.

        Args:
            gates: as for :meth:`per_example`.

        Returns:
            Tensors of shape (N,) in the order in which the layers run.

        Raises:
            ValueError: if there are other gates than those of the model.
        """
        self._refuse_other_gates(gates)
        return {
            name: layer.of(gates) if layer.is_switched else _constant(layer.dense, gates)
            for name, layer in self._layers.items()
        }

    def _refuse_other_gates(self, gates: Sequence[Tensor]) -> None:
        shapes = [tuple(layer.shape) for layer in gates]
        examples = shapes[0][:1] if shapes else ()
        if shapes != [(*examples, number) for number in self._gates]:
            expected = [f"(N, {number})" for number in self._gates]
            raise ValueError(f"gates must have shapes [{', '.join(expected)}], received {shapes}")


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
        ValueError: as :class:`MultiplyAdds` does.

    Example:
        >>> import batchshaping as bs
        >>> model, x = bs.gated_resnet20(), torch.randn(4, 3, 32, 32)
        >>> with bs.gates_forced(model, share=1.0):
        ...     count_macs(model, x)
        tensor([40823168., 40823168., 40823168., 40823168.])
    """
    cost = MultiplyAdds(model, x)
    gated = any(isinstance(module, Gate) for module in model.modules())
    return (
        cost.per_example(gate_decisions(model)) if gated else cost.per_example([]).to(x.device).expand(len(x))
    )


def _run_once(model: nn.Module, x: Tensor) -> tuple[dict[nn.Module, float], Counter[nn.Module]]:
    """Run a model in evaluation mode: multiply-adds of each layer that ran, and how often each module did."""
    dense: dict[nn.Module, float] = {}
    passes: Counter[nn.Module] = Counter()

    def count(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        passes[module] += 1
        if isinstance(module, _ConvNd | nn.Linear):
            # One value that is multiplied by weights meets those of one channel.
            values = [*args, *kwargs.values()][0] if isinstance(module, _ConvTransposeNd) else output
            macs = values.numel() / len(x) * module.weight[0].numel()
            dense[module] = dense.get(module, 0.0) + macs

    training = [module for module in model.modules() if module.training]
    handles = []
    try:
        for module in model.modules():
            if isinstance(module, _ConvNd | nn.Linear | Gate):
                handles.append(module.register_forward_hook(count, with_kwargs=True))
        model.eval()
        # A compiled model would not see that it is being counted.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(x)
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()
    return dense, passes


def _switches(
    model: nn.Module, gates: list[Gate], passes: Counter[nn.Module]
) -> dict[nn.Module, tuple[int | None, int | None]]:
    """For each convolution of a gated block the numbers of the gates of its input and of its output."""
    numbers: dict[nn.Module, int] = {gate: number for number, gate in enumerate(gates)}
    switches: dict[nn.Module, tuple[int | None, int | None]] = {}
    for name, block in model.named_modules():
        if isinstance(block, GatedBlock):
            for convolution, names in block.convolutions.items():
                layer = block.get_submodule(convolution)
                switching = [None if gate is None else block.get_submodule(gate) for gate in names]
                runs = max(passes[module] for module in (layer, *switching) if module is not None)
                if runs > 1:
                    raise ValueError(
                        f"the layers of a gated block must run once in a forward pass, received {name!r}, "
                        f"where {convolution} or its gate runs {runs} times"
                    )
                of_input, of_output = (None if gate is None else numbers[gate] for gate in switching)
                switches[layer] = of_input, of_output
    return switches


def _refuse_traced(model: nn.Module) -> None:
    """Layers of a traced model are not called, or have lost the block that knows their gates."""
    for module in model.modules():
        traced = isinstance(module, torch.jit.ScriptModule)
        if isinstance(module, fx.GraphModule):
            exported = any(isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes)
            traced = exported or any(isinstance(inner, Gate) for inner in module.modules())
        if traced:
            raise ValueError(
                "multiply-adds are counted in a model before it is traced or exported, "
                f"received a traced {type(module).__name__}"
            )


def _constant(macs: float, gates: Sequence[Tensor]) -> Tensor:
    """Multiply-adds that are the same for all examples, of shape (N,), with the gates' type and device."""
    if not gates:
        return torch.full((1,), macs, dtype=torch.float32, device="cpu")
    like = _at_least_float32(gates[0])
    return torch.full((len(like),), macs, dtype=like.dtype, device=like.device)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
