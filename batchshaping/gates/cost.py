r"""What each example costs: multiply-adds, as a function of the gates.

The cost of a model is a sum of terms. A term belongs to a layer, and gives the multiply-adds of each example
in it as a function of the gates' values. Most terms are constants. A module whose gates change what has to be
computed, such as a gated residual block, is :class:`Switched`: it lists the terms of the layers within it. So
nothing here knows what kinds of networks there are.

What a layer costs with all gates open is measured while the model runs once: every matrix product,
convolution and attention counts for the module that computes it, however it does so. A convolution with
kernel K costs

.. math::
    |\text{output positions}| \cdot |K| \cdot \sum_{\text{groups}} c_\text{in} \, c_\text{out},

and an attention of :math:`n_q` queries and :math:`n_k` keys of width d, and values of width :math:`d_v`,

.. math::
    n_q \, n_k \, (d + d_v)

a head, whatever is masked. What is computed once for a whole batch is shared by its examples. Normalizations,
activations, pooling and sums do not count, as is usual.

Totals are those of ``torch.utils.flop_counter.FlopCounterMode``, halved, where that sees everything. It
does not see what some kernels compute: attention on the CPU, and the inference kernels of torch's transformer
layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from batchshaping.gates.channel import to_channels
from batchshaping.gates.gate import ForwardPasses, Gate, gate_decisions, named_gates

__all__ = [
    "Constant",
    "ConvolutionTerm",
    "GateRun",
    "MultiplyAdds",
    "Run",
    "Switched",
    "Term",
    "convolution_terms",
    "count_macs",
    "is_measuring",
]


# What the cost is made of


class Term(Protocol):
    """The multiply-adds of a layer, as a function of the gates."""

    @property
    def layer(self) -> str:
        """Name of the layer in the model."""

    @property
    def gates(self) -> Sequence[GateRun]:
        """The runs of gates that it depends on; none for a constant."""

    def per_example(self, gates: Mapping[str, Tensor]) -> Tensor:
        """Multiply-adds of each example.

        Args:
            gates: values of shape (N, runs x gates) by the names of the gate modules. The result for
                probabilities is the expectation over independent gates. It is differentiable.

        Returns:
            A tensor of shape (N,); a constant may return a single number.
        """


@runtime_checkable
class Switched(Protocol):
    """A module whose gates change what has to be computed within it.

    It is the one that knows what takes the place of its layers when only the open part is computed: see
    :class:`~batchshaping.gates.inference.Conditional`.
    """

    def cost_terms(self, run: Run) -> Iterable[Term]:
        """The terms of the layers within the module whose cost depends on gates.

        A layer that runs several times has a term for each of its runs, in their order, or one for all.

        Args:
            run: what was measured in one run of this module. Other layers within it are constants.
        """


class GateRun(NamedTuple):
    """One run of a gate in a forward pass: which of the values that the gate gives are those of this run.

    Attributes:
        name: name of the gate's module in the model.
        first: index of the first value of this run.
        end: index after its last value.
        sizes: how many channels each value switches, and how many no gate does, as in
            :class:`~batchshaping.gates.channel.ChannelGate`; None if it is one each.
    """

    name: str
    first: int
    end: int
    sizes: tuple[int, ...] | None = None

    def of(self, gates: Mapping[str, Tensor]) -> Tensor:
        """The values in this run, of shape (N, gates)."""
        values = gates[self.name]
        return values if values.shape[1] == self.end - self.first else values[:, self.first : self.end]

    def of_channels(self, gates: Mapping[str, Tensor]) -> Tensor:
        """The values in this run, that of its gate for each channel, of shape (N, channels)."""
        return to_channels(self.of(gates), self.sizes)


@dataclass(frozen=True)
class Constant:
    """A layer that costs the same whatever the gates do."""

    layer: str
    macs: float
    gates: tuple[GateRun, ...] = ()

    def per_example(self, gates: Mapping[str, Tensor]) -> Tensor:
        """A single number."""
        return torch.tensor(self.macs, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class ConvolutionTerm:
    """A convolution whose input channels, output channels or both are switched by gates.

    Attributes:
        layer: its name.
        macs: multiply-adds of an example with all channels open.
        groups: groups of the convolution.
        gates: one or two runs of gates: those of the input, of the output, or both.
    """

    layer: str
    macs: float
    groups: int
    gates: tuple[GateRun, ...]

    def per_example(self, gates: Mapping[str, Tensor]) -> Tensor:
        """In each group, the share of pairs of an input and an output channel that are both open."""
        shares: list[Tensor] = [
            _at_least_float32(run.of_channels(gates)).unflatten(1, (self.groups, -1)).mean(dim=2)
            for run in self.gates
        ]
        return self.macs * math.prod(shares[1:], start=shares[0]).mean(dim=1)


def convolution_terms(
    run: Run, convolutions: Mapping[str, tuple[str | None, str | None]]
) -> Iterator[ConvolutionTerm]:
    """The terms of the convolutions in a module whose channels are switched.

    Args:
        run: the run of the module.
        convolutions: their names in the module, each with the names of the gates of its input and of its
            output, or None where all channels are computed.
    """
    for convolution, gates in convolutions.items():
        layer = run.of(convolution)
        switching = tuple(run.gate(gate) for gate in gates if gate is not None)
        if switching:
            yield ConvolutionTerm(layer.name, layer.macs, getattr(layer.module, "groups", 1), switching)


# What is measured


@dataclass(eq=False)
class Run:
    """One run of a module while the model was measured.

    Attributes:
        name: name of the module in the model.
        module: the module.
        macs: multiply-adds of an example in what it computes itself, without the modules within it.
        within: the runs of modules that it called, in their order.
        gates: for a gate, which of its values are those of this run.
    """

    name: str
    module: nn.Module
    macs: float = 0.0
    within: list[Run] = field(default_factory=list)
    gates: GateRun | None = None

    def __iter__(self) -> Iterator[Run]:
        """This run and all within it."""
        yield self
        for run in self.within:
            yield from run

    def of(self, name: str) -> Run:
        """The run of the submodule of this name, which must have run once.

        Raises:
            ValueError: if it ran another number of times, or at other times than the module.
        """
        module = self.module.get_submodule(name)
        runs = [run for run in self if run.module is module]
        if len(runs) != 1:
            raise ValueError(
                f"the layers of a gated module must run once each time that it does, received {self.name!r}, "
                f"in which {name} ran {len(runs)} times"
            )
        return runs[0]

    def gate(self, name: str) -> GateRun:
        """The run of the gate of this name within the module."""
        gates = self.of(name).gates
        if gates is None:
            raise TypeError(f"{name} must be a Gate, received a {type(self.of(name).module).__name__}")
        return gates


class MultiplyAdds:
    """The multiply-adds of a model by layer and by example, as a function of its gates: a sum of terms.

    :meth:`measure` makes one for a model.

    Args:
        terms: the terms of all layers, in the order in which they run.
        widths: how many values each gate gives for an example, by the name of its module, in the order of
            ``model.modules()``.
        layers_of_gates: names of the layers that belong to gates, whose cost is that of gating.

    Attributes:
        terms: the terms.
        widths: the numbers of values of the gates.
        layers_of_gates: the names of the layers of gates.
        dense: multiply-adds of one example with all gates open, without those of the gates' own layers: what
            the model would cost if it were not gated.
        gates: multiply-adds of the gates' own layers.
        fixed: what an example costs with all gates closed, the gates' own layers included.

    Example:
        >>> import batchshaping as bs
        >>> model = bs.gated_resnet20().eval()
        >>> x = torch.randn(4, 3, 32, 32)
        >>> cost = MultiplyAdds.measure(model, x)
        >>> cost.dense, cost.gates
        (40813184.0, 9984.0)
        >>> spent = cost.per_example(bs.gate_decisions(model))
        >>> spent.shape, bool((spent < cost.dense).all())
        (torch.Size([4]), True)
    """

    def __init__(
        self, terms: Iterable[Term], widths: Mapping[str, int], layers_of_gates: Iterable[str] = ()
    ) -> None:
        self.terms = tuple(terms)
        self.widths = dict(widths)
        self.layers_of_gates = frozenset(layers_of_gates)
        self._switched = [term for term in self.terms if term.gates]
        constants = [term for term in self.terms if not term.gates]
        self._constant = _sum(constants)
        self.gates = _sum(term for term in constants if term.layer in self.layers_of_gates)
        self.dense = self._with_all(1.0) - self.gates
        self.fixed = self._with_all(0.0)

    @staticmethod
    def measure(model: nn.Module, x: Tensor) -> MultiplyAdds:
        """Run a model once, in evaluation and without a gradient, and count.

        Args:
            model: a module with or without gates.
            x: its input, of shape (N, ...): the cost is that of examples of this shape.

        Raises:
            ValueError: if there is no example; if the model was traced or exported, since its modules are not
                called then; if the layers of a gated module do not run once each time that it does; or if its
                gates do not decide once for each example.
        """
        if len(x) == 0:
            raise ValueError(f"x must hold at least one example, received shape {tuple(x.shape)}")
        _refuse_traced(model)
        measured = _Recorder(model, x).run()
        terms: dict[int, Term] = {}
        for run in measured:
            if isinstance(run.module, Switched):
                by_layer: dict[str, list[Term]] = {}
                for term in run.module.cost_terms(run):
                    by_layer.setdefault(term.layer, []).append(term)
                for inner in run:
                    own = by_layer.get(inner.name)
                    if own:
                        terms[id(inner)] = own.pop(0) if len(own) > 1 else own[0]
        in_order = [terms.get(id(run), Constant(run.name, run.macs)) for run in measured]
        decisions = _readings(model)
        for gate in {gate.name: None for term in in_order for gate in term.gates}:
            if len(decisions[gate]) != len(x):
                raise ValueError(
                    f"gates must decide once for each of the {len(x)} examples, received {gate!r}, which "
                    f"decided {len(decisions[gate])} times"
                )
        widths = {name: layer.shape[1] for name, layer in decisions.items()}
        names = {module: name for name, module in model.named_modules()}
        of_gates = [names[inner] for gate in names if isinstance(gate, Gate) for inner in gate.modules()]
        costly = [term for term in in_order if term.gates or _sum([term]) > 0]
        return MultiplyAdds(costly, widths, of_gates)

    def per_example(self, gates: Sequence[Tensor] | Mapping[str, Tensor]) -> Tensor:
        """Multiply-adds of each example.

        Args:
            gates: values of shape (N, gates) for each gate module, by the names of the modules or in the
                order of ``model.modules()``: decisions, as
                :func:`~batchshaping.gates.gate.gate_decisions` gives them, for what was spent;
                :func:`~batchshaping.gates.gate.straight_through_decisions` for the same with a gradient; or
                probabilities for the expectation over independent gates, differentiable.

        Returns:
            A tensor of shape (N,), added up in double precision and rounded once to the type of the gates, at
            least single precision; of shape (1,) if the model has no gates.

        Raises:
            ValueError: if there are other gates than those of the model.
        """
        by_name = self._by_name(gates)
        constant = _constant(self._constant, by_name)
        layers = [term.per_example(by_name) for term in self._switched]
        return torch.stack([*layers, constant]).sum(dim=0, dtype=torch.float64).to(constant.dtype)

    def per_layer(self, gates: Sequence[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply-adds of each example in each layer that has any, by the name of the layer.

        Args:
            gates: as for :meth:`per_example`.

        Returns:
            Tensors of shape (N,) in the order in which the layers run first. A layer that runs several times
            has the sum.

        Raises:
            ValueError: if there are other gates than those of the model.
        """
        by_name = self._by_name(gates)
        layers: dict[str, Tensor] = {}
        for term in self.terms:
            macs = term.per_example(by_name) if term.gates else _constant(_sum([term]), by_name)
            layers[term.layer] = layers[term.layer] + macs if term.layer in layers else macs
        return layers

    def _with_all(self, value: float) -> float:
        """What an example costs with all gates of one value."""
        gates = {
            name: torch.full((1, width), value, dtype=torch.float64, device="cpu")
            for name, width in self.widths.items()
        }
        return self.per_example(gates).double().item() if gates else self._constant

    def _by_name(self, gates: Sequence[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = [*self.widths]
        if isinstance(gates, Mapping):
            if gates.keys() != self.widths.keys():
                raise ValueError(f"gates must be those of {names}, received those of {[*gates]}")
            gates = [gates[name] for name in names]
        shapes = [tuple(layer.shape) for layer in gates]
        examples = shapes[0][:1] if shapes else ()
        if shapes != [(*examples, width) for width in self.widths.values()]:
            expected = [f"(N, {width})" for width in self.widths.values()]
            message = f"gates must have shapes [{', '.join(expected)}], received {shapes}"
            for width, shape in zip(self.widths.values(), shapes, strict=False):
                if len(shape) == 2 and shape[1] and width > shape[1] and width % shape[1] == 0:
                    message += (
                        "; a gate that runs several times in a forward pass keeps the last run only, unless "
                        "keep_every_run was asked of the model that is called"
                    )
                    break
            raise ValueError(message)
        return dict(zip(names, gates, strict=True))


def count_macs(model: nn.Module, x: Tensor) -> Tensor:
    """Multiply-adds that each example costs with the gates it gets.

    They are counted as :class:`~batchshaping.gates.cost.MultiplyAdds` does.
    The model runs once, in evaluation and without a gradient; its mode and its weights stay as they are. What
    a single kernel of another kind computes is not counted: recurrent layers where cuDNN or oneDNN computes
    them, bilinear layers, deformable convolutions and quantized layers.

    Args:
        model: a module with or without gates.
        x: its input, of shape (N, ...).

    Returns:
        A tensor of shape (N,): multiply-adds, the gates' own included.

    Raises:
        ValueError: as :meth:`~batchshaping.gates.cost.MultiplyAdds.measure` does.

    Example:
        >>> import batchshaping as bs
        >>> model, x = bs.gated_resnet20(), torch.randn(4, 3, 32, 32)
        >>> with bs.gates_forced(model, share=1.0):
        ...     count_macs(model, x)
        tensor([40823168., 40823168., 40823168., 40823168.])
    """
    cost = MultiplyAdds.measure(model, x)
    decisions = _readings(model)
    return cost.per_example(decisions) if decisions else cost.per_example([]).to(x.device).expand(len(x))


_measuring: ContextVar[bool] = ContextVar("_measuring", default=False)


def is_measuring() -> bool:
    """Whether multiply-adds are being counted: then all channels must be computed, whatever the gates do."""
    return _measuring.get()


class _Recorder(TorchDispatchMode):
    """Runs a model once and records what each run of each module multiplies and adds."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.x = x
        self.names = {module: name for name, module in model.named_modules()}
        self.runs = [Run("", model)]

    def run(self) -> Run:
        """The runs of all modules, within that of the model."""
        training = [module for module in self.model.modules() if module.training]
        passes = ForwardPasses(self.model)
        handles = []
        measuring = _measuring.set(True)
        try:
            for module in self.model.modules():
                handles.append(module.register_forward_pre_hook(self._begin, prepend=True))
                handles.append(module.register_forward_hook(self._end, always_call=True))
            self.model.eval()
            passes.begin()
            # A compiled model would not see that it is being counted, nor would the fused kernels of torch's
            # transformer layers.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), _unfused(), self:
                self.model(self.x)
        finally:
            _measuring.reset(measuring)
            passes.end()
            for module in training:
                module.training = True
            for handle in handles:
                handle.remove()
        return self.runs[0].within[0]

    def _begin(self, module: nn.Module, args: Any) -> None:
        run = Run(self.names[module], module)
        if isinstance(module, Gate):
            run.gates = GateRun(run.name, _number_of_values(module), 0, getattr(module, "sizes", None))
        self.runs[-1].within.append(run)
        self.runs.append(run)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        run = self.runs.pop()
        if run.gates is not None and isinstance(module, Gate):
            run.gates = run.gates._replace(end=_number_of_values(module))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = _formula(func)
        if formula is None and isinstance(func, torch._ops.OpOverload):
            # An operation that is made of others, such as a matrix product of more than two dimensions.
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if formula is not None:
            self.runs[-1].macs += formula(output, *args) / len(self.x)
        return output


@contextmanager
def _unfused() -> Iterator[None]:
    """Let torch's transformer layers compute by the operations that they are made of."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _of_product(output: Tensor, first: Tensor, *_: Any) -> float:
    """A product of matrices, of batches of them, or of a matrix and a vector."""
    return output.numel() * first.shape[-1]


def _of_sum_and_product(output: Tensor, _: Tensor, first: Tensor, *__: Any) -> float:
    return output.numel() * first.shape[-1]


def _of_convolution(output: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> float:
    """One value that is multiplied by weights meets those of one channel."""
    transposed = settings[4]
    return (x if transposed else output).numel() * weight[0].numel()


def _of_attention(output: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> float:
    """Each query meets each key, and its weights each value; there may be more heads of queries."""
    queries = math.prod(query.shape[:-1])
    return queries * key.shape[-2] * (query.shape[-1] + value.shape[-1])


_aten = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., float]] = {
    **dict.fromkeys([_aten.mm, _aten.bmm, _aten.mv, _aten.dot], _of_product),
    **dict.fromkeys([_aten.addmm, _aten.baddbmm, _aten.addmv], _of_sum_and_product),
    _aten.convolution: _of_convolution,
    torch.ops.higher_order.flex_attention: _of_attention,
}
"""Multiply-adds of operations that are made of no others, from the output and the arguments."""


def _formula(func: Any) -> Callable[..., float] | None:
    packet = getattr(func, "overloadpacket", func)
    name = getattr(packet, "__name__", "")
    # Every device has its own kernels of this one.
    if name.startswith("_scaled_dot_product_") and name != "_scaled_dot_product_attention_math":
        return _of_attention
    return _FORMULAS.get(packet)


def _readings(model: nn.Module) -> dict[str, Tensor]:
    """What the gates decided, by the names of their modules; empty for a model without gates."""
    if not any(isinstance(module, Gate) for module in model.modules()):
        return {}
    return dict(zip(named_gates(model), gate_decisions(model), strict=True))


def _number_of_values(gate: Gate) -> int:
    """How many values the gate gives for an example after its runs so far."""
    return gate.decisions.shape[1] if hasattr(gate, "decisions") else 0


def _sum(constants: Iterable[Term]) -> float:
    return math.fsum(term.per_example({}).item() for term in constants)


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


def _constant(macs: float, gates: Mapping[str, Tensor]) -> Tensor:
    """Multiply-adds that are the same for all examples, of shape (N,), with the gates' type and device."""
    if not gates:
        return torch.full((1,), macs, dtype=torch.float32, device="cpu")
    like = _at_least_float32(next(iter(gates.values())))
    return torch.full((len(like),), macs, dtype=like.dtype, device=like.device)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
