"""A network without gates for inference: what an inference copy of a gated network is compared with.

Closed gates save time only against a dense network that is computed as well. So here convolutions have the
batch normalization, the sum and the ReLU after them folded in, and packed weights, as far as that is possible
without a compiler.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from batchshaping.gates.gate import OneStep
from batchshaping.gates.inference import fold_and_pack
from batchshaping.gates.packed import PackedConvolution, channels_last, convolve_add, is_plain

__all__ = ["PackedSum", "dense_inference"]


def dense_inference(model: nn.Module) -> nn.Module:
    """A copy of a network without gates for inference: normalizations and sums folded in, weights packed.

    What torch.fx cannot trace keeps its sums as they are.

    Args:
        model: the network, in any mode; it stays as it is.

    Returns:
        A module that gives what the network gives in evaluation, up to rounding.

    Example:
        >>> import torchvision
        >>> network, x = torchvision.models.resnet18().eval(), torch.randn(1, 3, 64, 64)
        >>> with torch.no_grad():
        ...     torch.allclose(dense_inference(network)(x), network(x), rtol=1e-4, atol=1e-4)
        True
    """
    packed = fold_and_pack(copy.deepcopy(model).requires_grad_(False).eval())
    try:
        traced = fx.symbolic_trace(packed)
    except Exception:  # Tracing runs code of the model, which may fail in any way on what is no tensor.
        return packed
    modules = dict(traced.named_modules())
    for node in [*traced.graph.nodes]:
        if node.op == "call_module" and type(modules[node.target]) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    order = {node: place for place, node in enumerate(traced.graph.nodes)}
    for node in order:
        if _is_sum(node):
            # A term without a place is a sum that was folded before.
            _fold_sum(traced, modules, node, sorted(node.args, key=lambda term: -order.get(term, -1)))
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval()


class PackedSum(OneStep):
    """A packed convolution whose output is added to other images of the same shape, then a ReLU or not.

    Args:
        layer: the convolution.
        relu: whether a ReLU follows the sum.
        inplace: whether the result takes the place of the other images.
    """

    def __init__(self, layer: PackedConvolution, relu: bool, inplace: bool) -> None:
        super().__init__()
        self.layer = layer
        self.relu = relu
        self.inplace = inplace

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        if is_plain():
            y: Tensor = other + self.layer(x)
            return y.relu() if self.relu else y
        x, other = channels_last(x), channels_last(other)
        weights = self.layer.whole(x)
        return convolve_add(other, x, *weights, self.layer.settings, self.relu, self.inplace)


def _is_sum(node: fx.Node) -> bool:
    """Whether a step adds what two others gave."""
    adds = node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
    adds = adds or (node.op == "call_method" and node.target in ("add", "add_"))
    return (
        adds
        and not node.kwargs
        and len(node.args) == 2
        and all(isinstance(term, fx.Node) for term in node.args)
    )


def _fold_sum(traced: fx.GraphModule, modules: dict[str, Any], node: fx.Node, terms: list[Any]) -> None:
    """Let a convolution do the sum, the later one if both terms are one, and the ReLU that may follow."""

    def convolution(term: fx.Node) -> PackedConvolution | None:
        module = modules.get(str(term.target)) if term.op == "call_module" else None
        alone = isinstance(module, PackedConvolution) and not module.relu and [*term.users] == [node]
        return module if alone else None

    for term, other in (terms, terms[::-1]):
        layer = convolution(term)
        if layer is None:
            continue
        [user, *others] = node.users
        is_relu = not others and type(modules.get(str(user.target))) is nn.ReLU
        name = f"{str(term.target).replace('.', '_')}_sum"
        traced.add_submodule(name, PackedSum(layer, is_relu, inplace=convolution(other) is not None))
        last = user if is_relu else node
        with traced.graph.inserting_before(node):
            made = traced.graph.call_module(name, (term.args[0], other))
        last.replace_all_uses_with(made)
        for done in dict.fromkeys((last, node, term)):
            traced.graph.erase_node(done)
        return
