"""An inference copy of a gated network, which computes only what is open.

The modules of the network that switch parts of themselves know what takes their place (:class:`Conditional`).
Here they are found, wherever they are, and replaced. So nothing here knows what kinds of networks there are.
All other convolutions get the batch normalization and the ReLU after them folded in, and packed weights.
Linear layers get packed weights too, but for those of gates, which are small.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, fx, nn

from batchshaping.gates import native
from batchshaping.gates.gate import Gate, follow_gates
from batchshaping.gates.packed import (
    PackedConvolution,
    PackedLinear,
    by_onednn,
    can_be_folded,
    can_be_packed,
    is_plain,
    is_plain_linear,
    only_plain,
)

__all__ = ["Conditional", "Joinable", "Planned", "conditional_inference", "fold_and_pack"]

_Network = TypeVar("_Network", bound=nn.Module)


@runtime_checkable
class Conditional(Protocol):
    """A module with gates that can be replaced by one that computes only what is open."""

    def inference_twin(self) -> nn.Module:
        """The module that takes its place, for inference alone.

        It gives what this one gives in evaluation, to the precision of the type. It has the same gates, under
        the same names; other tensors are copies. It is the module itself where there is nothing to gain.
        """


@runtime_checkable
class Planned(Protocol):
    """An inference twin that can compute in several ways, and measure which is the fastest."""

    def measure_plan(self, x: Tensor) -> None:
        """Measure the ways for inputs of this shape, and keep which is the fastest for which gates."""


@runtime_checkable
class Joinable(Protocol):
    """An inference twin that is computed together with others of its kind that come after it."""

    def joined(self, modules: nn.Sequential) -> nn.Sequential:
        """What takes the place of modules that are all of this kind; they keep their names."""


def conditional_inference(model: _Network, example: Tensor | None = None) -> _Network:
    """A copy of a gated network that computes only what is open, for each example: closed gates save time.

    The copy gives what the network gives in evaluation, up to rounding. Its gates are named as those of the
    network and compute the same, so that :func:`~batchshaping.gates.forced.gates_forced`,
    :func:`~batchshaping.gates.gate.gate_decisions` and :func:`~batchshaping.gates.cost.count_macs` work
    on it. Batch normalization is folded into the convolutions, whose weights are packed for the CPU's kernels
    when images of a new size come; weights of linear layers are packed once, at the first call. It is a
    module that can be saved, copied, moved and used by several threads; it cannot be trained.

    Gates for groups of channels save most, see ``gates_per_layer`` of
    :func:`~batchshaping.channel_gating.blocks.gate_resnet`. A
    block whose layers cannot be cut, such as one with anti-aliasing between its convolutions, is computed as
    before.

    Args:
        model: a network with gates, in any mode; it stays as it is.
        example: a batch of inputs as they will come, of shape (N, ...). If it is given, the ways to compute
            are measured on it, which takes some seconds, and the copy keeps a plan of the fastest; copies of
            it have this plan too. Without one, and for inputs of other sizes, rules of thumb decide.

    Returns:
        A module of the class of the network, in evaluation.

    Raises:
        ValueError: if no module of the model, such as a gated block, knows how to compute only what is open;
            or if a weight is not finite.

    Example:
        >>> import batchshaping as bs
        >>> network = bs.gated_resnet18(num_classes=10, gates_per_layer=8).eval()
        >>> fast, x = conditional_inference(network), torch.randn(1, 3, 64, 64)
        >>> with torch.no_grad():
        ...     torch.allclose(fast(x), network(x), rtol=1e-4, atol=1e-4)
        True
    """
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise ValueError(f"weights must be finite, received {name} with a value that is not")
    if not any(isinstance(module, Conditional) for module in model.modules()):
        raise ValueError(
            "model must hold a module that knows how to compute only what is open, as the blocks of "
            f"gate_resnet do, received a {type(model).__name__} without any"
        )
    made: Any = copy.deepcopy(model).requires_grad_(False).eval()
    twins: dict[nn.Module, nn.Module] = {
        module: module.inference_twin()  # type: ignore[misc]
        for module in made.modules()
        if isinstance(module, Conditional)
    }
    made = fold_and_pack(made, twins)
    made = _replaced(made, dict(_joined(made)))
    made = _replaced(made, {pool: native.MaxPool(pool) for pool in made.modules() if _is_plain_pool(pool)})
    native.library()  # So that no call waits for the compiler.
    follow_gates(made)
    made.register_forward_pre_hook(_begin)
    made.register_forward_hook(_end, always_call=True)
    made.eval()
    if example is not None:
        _measure_plans(made, example)
    return made  # type: ignore[no-any-return]


def _replaced(model: nn.Module, others: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """The model with some of its modules replaced, everywhere they are used."""
    for module in [*model.modules()]:
        for name, child in module._modules.items():
            if child is not None and child in others:
                module._modules[name] = others[child]
    return others.get(model, model)


def _is_plain_pool(module: nn.Module) -> bool:
    return type(module) is nn.MaxPool2d and not (module._forward_hooks or module._forward_pre_hooks)


def _joined(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Sequences of twins that are computed together, each with what takes its place."""
    for module in model.modules():
        if (
            type(module) is nn.Sequential
            and len(module) > 1
            and not (module._forward_hooks or module._forward_pre_hooks)
        ):
            first = module[0]
            if isinstance(first, Joinable) and all(type(other) is type(first) for other in module):
                yield module, first.joined(module)


def _begin(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuse training, and keep what is not finite visible."""
    if model.training:
        raise RuntimeError(
            "an inference copy cannot be trained: call eval() on it, and train the network itself"
        )
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError("an inference copy gives no gradient, received an input that requires one")
    # oneDNN's ReLU makes zeros of NaN.
    tracing = is_plain() or any(isinstance(x, fx.Proxy) for x in inputs)
    if not tracing and any(by_onednn(x, x) and not math.isfinite(x.sum().item()) for x in tensors):
        only_plain.set(True)


def _end(model: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    if only_plain.get():
        only_plain.set(False)


def _measure_plans(model: nn.Module, example: Tensor) -> None:
    """Let each twin measure its ways on what reaches it."""
    received: dict[nn.Module, Tensor] = {}

    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        received.setdefault(module, inputs[0])

    with torch.no_grad(), ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Planned):
                stack.callback(module.register_forward_pre_hook(see).remove)
        model(example)
        for module, x in received.items():
            module.measure_plan(x)  # type: ignore[operator]


# Convolutions elsewhere


class _Tracer(fx.Tracer):
    """Follows a network down to its layers, but not into modules that were replaced, nor into gates."""

    def __init__(self, leaves: set[nn.Module]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return module in self.leaves or isinstance(module, Gate) or super().is_leaf_module(module, name)


def fold_and_pack(
    model: nn.Module,
    others: Mapping[nn.Module, nn.Module] = MappingProxyType({}),
) -> nn.Module:
    """Replace modules of a model, in place, and convolutions and linear layers by packed ones.

    The batch normalization, the ReLU and the pooling that follow a convolution are computed with it where
    that is certain. The linear layers of gates stay as they are. Dropout, which does nothing in evaluation,
    is left out: a ViT has several in each block.

    Args:
        model: a module in evaluation.
        others: modules in it, each with the module that takes its place. Convolutions within those stay.

    Returns:
        The model, or what takes its place.
    """
    model = _replaced(model, others)
    within = {module for other in others.values() for module in other.modules()}
    packed: dict[nn.Module, nn.Module] = {}
    for convolution, norm, relu, pool in _chains(model, leaves=set(others.values())):
        made = PackedConvolution(convolution, norm, relu is not None)
        packed[convolution] = made if pool is None else native.PooledConvolution(made, pool)
        packed.update({layer: nn.Identity() for layer in (norm, relu, pool) if layer is not None})
    for module in model.modules():
        if (
            isinstance(module, nn.Conv2d)
            and can_be_packed(module)
            and not {module} & (within | packed.keys())
        ):
            packed[module] = PackedConvolution(module)
    of_gates = {layer for gate in model.modules() if isinstance(gate, Gate) for layer in gate.modules()}
    for module in model.modules():
        if isinstance(module, nn.Linear) and is_plain_linear(module) and module not in of_gates:
            packed[module] = PackedLinear(module)
        elif type(module) is nn.Dropout and not (module._forward_hooks or module._forward_pre_hooks):
            packed[module] = nn.Identity()
    return _replaced(model, packed)


def _chains(
    model: nn.Module, leaves: set[nn.Module]
) -> Iterator[tuple[nn.Conv2d, nn.Module | None, nn.Module | None, nn.MaxPool2d | None]]:
    """Convolutions with the batch normalization, the ReLU and the pooling that alone take its output."""
    modules = dict(model.named_modules())
    try:
        nodes = [*_Tracer(leaves).trace(model).nodes]
    except Exception:  # Tracing runs code of the model, which may fail in any way on what is no tensor.
        return
    calls: dict[nn.Module, int] = {}
    for node in nodes:
        if node.op == "call_module":
            module = modules[node.target]
            calls[module] = calls.get(module, 0) + 1

    def following(node: fx.Node) -> tuple[fx.Node, nn.Module] | None:
        """The layer that alone takes what a layer gives, if it is used there only."""
        users = [*node.users]
        if len(users) != 1 or users[0].op != "call_module" or users[0].args != (node,) or users[0].kwargs:
            return None
        module = modules[users[0].target]
        hooks = module._forward_hooks or module._forward_pre_hooks
        return (users[0], module) if calls[module] == 1 and not hooks else None

    for node in nodes:
        module = modules[node.target] if node.op == "call_module" else None
        if not isinstance(module, nn.Conv2d) or not can_be_packed(module) or calls[module] > 1:
            continue
        norm = relu = pool = None
        after = following(node)
        if after is not None and can_be_folded(after[1]):
            norm = after[1]
            after = following(after[0])
        if after is not None and type(after[1]) is nn.ReLU:
            relu = after[1]
            after = following(after[0])
        if after is not None and type(after[1]) is nn.MaxPool2d and not after[1].return_indices:
            pool = after[1]
        yield module, norm, relu, pool
