r"""A gate: the binary concrete decision, the module that keeps it, and reading all gates of a model.

A gate reads features and gives a logit, the log-odds of being open. In training it samples its decision from
the binary concrete distribution; in evaluation it is open iff the logit is positive. After a forward pass,
three functions read all gates of a model: :func:`gate_probabilities` for the losses that shape them,
:func:`gate_decisions` for what they did, and :func:`straight_through_decisions` for what that costs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = [
    "ForwardPasses",
    "Gate",
    "OneStep",
    "binary_concrete",
    "follow_gates",
    "gate_decisions",
    "gate_probabilities",
    "is_exporting",
    "is_recomputing",
    "keep_every_run",
    "layer_of_logits",
    "named_gates",
    "straight_through_decisions",
    "whole_number",
]

is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.7
"""Whether torch.export makes a program."""


def binary_concrete(
    logits: Tensor, temperature: float = 2 / 3, training: bool = True, noise: float | Tensor = 1.0
) -> Tensor:
    r"""Decide 0 or 1 at random by the logits, with the gradient of a relaxed decision.

    .. math::
        s = \mathrm{sigmoid}\left( \frac{\log \alpha + \sigma (\log u - \log(1 - u))}{t} \right), \qquad
        u \sim \mathrm{Uniform}(0, 1)

    Forward gives 1 where s > 1/2, which happens with probability sigmoid(log α / σ), and 0 elsewhere;
    backward uses the derivative of s (straight-through). Without training, or with σ = 0, there is no noise:
    1 iff log α > 0.

    Args:
        logits: log α, of any shape and floating dtype.
        temperature: t, positive; the higher, the smoother the gradient. Decisions do not depend on it.
        training: whether there is noise.
        noise: its scale σ, a number or a scalar tensor, not negative: 1 for the binary concrete distribution,
            0 for none. A network that ends its training at 0 meets in evaluation the decisions that it was
            trained on.

    Returns:
        Exact zeros and ones in the shape and dtype of the logits; NaN where the logit is.

    Raises:
        TypeError: if the logits are not floating point.
        ValueError: if the temperature is not positive, or the noise a number that is negative or not finite.

    References:
        Maddison, Mnih and Teh, The Concrete Distribution, 2017, https://arxiv.org/abs/1611.00712.

    Example:
        >>> logits = torch.tensor([-2.0, -0.1, 0.1, 2.0], requires_grad=True)
        >>> gates = binary_concrete(logits, training=False)
        >>> gates
        tensor([0., 0., 1., 1.], grad_fn=<AddBackward0>)
        >>> gates.sum().backward()
        >>> logits.grad
        tensor([0.0678, 0.3729, 0.3729, 0.0678])
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, received {logits.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, received {temperature}")
    if not isinstance(noise, Tensor) and not 0 <= noise < math.inf:
        raise ValueError(f"noise must be finite and not negative, received {noise}")
    # Half precision cannot tell a uniform number from 0 often enough.
    noisy = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if training:
        noisy = noisy + noise * torch.logit(torch.rand_like(noisy), eps=torch.finfo(noisy.dtype).eps)
    relaxed = torch.sigmoid(noisy / temperature)
    # The difference is exactly 0, and NaN where it should be.
    return ((noisy > 0) + (relaxed - relaxed.detach())).to(logits.dtype)


class _NoForwardPass(AttributeError, RuntimeError):
    """Raised where a gate is read that has not run. As an AttributeError it makes ``hasattr`` False."""


class OneStep(nn.Module):
    """A module whose call torch.fx records as one step, whatever the tracer takes for a step."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, fx.Proxy):
                return self._recorded(value.tracer, args, kwargs)
        return super().__call__(*args, **kwargs)

    def _recorded(self, tracer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

        return tracer.call_module(self, forward, args, kwargs)


class Gate(OneStep):
    r"""A module that decides 0 or 1 for each example and keeps its logits for the losses that shape it.

    A subclass computes logits of shape (N, ...) in its forward pass and gives them to :meth:`decide`.

    The last forward pass can be read in four ways, each of shape (N, gates):

    ============================== ======================== ========================= =======================
    reading                        value                    gradient                  for
    ============================== ======================== ========================= =======================
    ``decisions``                  0 or 1                   none                      what was done and spent
    ``straight_through_decisions`` 0 or 1                   that of ``probabilities`` penalties
    ``probabilities``              sigmoid(log α)           its derivative            batch-shaping
    ``open_probabilities``         sigmoid(log α / σ)       its derivative            the true probability
    ============================== ======================== ========================= =======================

    Under noise of scale σ a gate is open with the probability sigmoid(log α / σ). So ``probabilities`` are
    those of being open under the full noise, σ = 1. With less noise, gates are surer than that.

    A gate that runs several times in one forward pass of its model, such as that of a block that is used
    twice, keeps all of these runs if the model was made by ``gate_resnet``, or if :func:`keep_every_run` was
    asked of it. Then each reading has shape (N, runs x gates), with the runs side by side in their order.
    Otherwise, and where a gate is called on its own, it keeps the last run. What a backward pass runs again
    (activation checkpointing) does not count as a run.

    torch.fx and what builds on it, such as torchvision's feature extractors, record a gate as one call of its
    module. So the gates of a traced network are those of the network, and are read as usual. A program from
    torch.jit.trace or torch.export decides as the network does, but has no gates that could be read.

    Args:
        temperature: temperature of the :func:`binary_concrete` decision.
        device: where the noise's scale is; as PyTorch chooses by default.

    Attributes:
        noise: the scale of the decision's noise in training, a scalar tensor that a schedule may fill. It is
            no part of the state dict, and keeps its value whatever becomes of the weights (``to_empty``).
    """

    noise: Tensor
    _runs: tuple[tuple[Tensor, Tensor | None], ...]  # logits and decisions of each run; None: by the logits
    _pass: ForwardPasses | None  # whose forward pass is under way
    _forced: tuple[Callable[[Tensor], Tensor], ...]

    def __init__(self, temperature: float = 2 / 3, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.temperature = temperature
        # A tensor, so that a schedule that changes it does not compile the network anew.
        noise = torch.ones((), device=device, dtype=torch.float32)
        if noise.is_meta:
            noise = torch.ones((), device="cpu", dtype=torch.float32)
        self.register_buffer("noise", noise, persistent=False)
        self._runs = ()
        self._pass = None
        self._forced = ()

    def decide(self, logits: Tensor) -> Tensor:
        """Zeros and ones of the logits' shape: sampled in training, open iff the logit > 0 in evaluation.

        Raises:
            ValueError: if the logits are a single number.
        """
        if logits.ndim == 0:
            raise ValueError("logits must have shape (N, ...), received a single number")
        decisions = self._forced[-1](logits) if self._forced else self._decided(logits)
        self._keep(logits, decisions)
        return decisions

    def _keep(self, logits: Tensor, decisions: Tensor | None) -> None:
        """Keep a run, to be read; without decisions where they follow from the logits in evaluation."""
        # An exported program has no state, and the tensors that it is made with have no values.
        if not is_exporting() and not is_recomputing():
            earlier = () if self._pass is None else self._runs
            # Without the search for parameters and modules, as below: there are many gates.
            self.__dict__["_runs"] = (*earlier, (logits, decisions))

    def _decided(self, logits: Tensor) -> Tensor:
        """What the logits decide."""
        return binary_concrete(logits, self.temperature, self.training, self.noise)

    @property
    def probabilities(self) -> Tensor:
        """Probability of being open under the full noise, sigmoid(log α), with its gradient.

        This is what the batch-shaping loss shapes, whatever the present noise is.

        Raises:
            RuntimeError: if there was no forward pass, or if a gate in training made it without a gradient,
                so that a loss could not reach the gate. It is an AttributeError too.
        """
        return torch.sigmoid(self._read_logits())

    @property
    def open_probabilities(self) -> Tensor:
        """Probability of being open under the present noise and mode, with its gradient.

        It is sigmoid(log α / σ), and without noise or in evaluation 1 where log α > 0 and 0 elsewhere. As the
        noise falls its gradient vanishes, except near 0: penalize :attr:`straight_through_decisions` instead.

        Raises:
            RuntimeError: as :attr:`probabilities` does.
        """
        read = self._read_logits()
        logits = read.to(torch.promote_types(read.dtype, torch.float32))
        noise = (self.noise if self.training else torch.zeros_like(self.noise)).to(logits.dtype)
        # Infinite without noise, where the probability is a step and its gradient 0.
        scaled = logits / noise.clamp(min=torch.finfo(noise.dtype).tiny)
        return torch.sigmoid(scaled.masked_fill((noise == 0) & (logits == 0), -math.inf)).to(read.dtype)

    @property
    def decisions(self) -> Tensor:
        """What was decided, zeros and ones, without a gradient.

        Raises:
            RuntimeError: if there was no forward pass. It is an AttributeError too.
        """
        return self._side_by_side(
            [
                (self._decided(logits) if decisions is None else decisions).detach()
                for logits, decisions in self._runs
            ]
        )

    @property
    def straight_through_decisions(self) -> Tensor:
        """What was decided, zeros and ones, with the gradient of :attr:`probabilities`.

        Raises:
            RuntimeError: as :attr:`probabilities` does.
        """
        probabilities = self.probabilities
        # The difference is exactly 0.
        return self.decisions + (probabilities - probabilities.detach())

    def _read_logits(self) -> Tensor:
        """Of shape (N, gates), with the gradient that a loss needs to reach a gate that learns."""
        logits = self._side_by_side([logits for logits, _ in self._runs])
        learns = self.training and any(p.requires_grad for p in self.parameters())
        if learns and torch.is_grad_enabled() and not all(run.requires_grad for run, _ in self._runs):
            raise _NoForwardPass(
                "the gate's last forward pass kept no gradient (torch.no_grad or a re-entrant checkpoint), "
                "so that no loss can reach it; read its probabilities under torch.no_grad if none should"
            )
        return logits

    def _side_by_side(self, runs: list[Tensor]) -> Tensor:
        """The values of all runs, of shape (N, runs x gates)."""
        if not runs:
            raise _NoForwardPass(
                "the gate has decided nothing before a forward pass (one in a replica of DataParallel, or "
                "in a copy, is not its own), or did not run in the last one"
            )
        runs = [run.reshape(run.shape[0], math.prod(run.shape[1:])) for run in runs]
        if len(runs) == 1:
            return runs[0]
        sizes = [run.shape[0] for run in runs]
        if len(set(sizes)) > 1:
            raise RuntimeError(
                "a gate that runs several times in a forward pass must have the same number of examples each "
                f"time, received {sizes}"
            )
        return torch.cat(runs, dim=1)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Python asks here also where a property raised an AttributeError, which says more than this one.
            attribute = getattr(type(self), name, None)
            if isinstance(attribute, property) and attribute.fget is not None:
                return attribute.fget(self)
            raise

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Gate:
        # No state dict has the noise. So its value outlives what drops values: to_empty, the meta device.
        noise = self.noise
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.noise.is_meta:
            self.noise = noise
        elif self.noise is not noise:
            self.noise.copy_(noise)
        return self

    def _replicate_for_data_parallel(self) -> Gate:
        # What replicas decide is lost with them, and what was decided before is no longer the last.
        self._runs = ()
        return super()._replicate_for_data_parallel()  # type: ignore[no-any-return, no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles get: all but the last forward pass, since a graph cannot be copied."""
        return {**self.__dict__, "_runs": (), "_pass": None, "_forced": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of before have these under other names.
        former = ("_logits", "_decisions")
        kept = {name: value for name, value in state.items() if name not in former}
        super().__setstate__(
            {  # type: ignore[no-untyped-call]
                "_runs": (),
                "_pass": None,
                **kept,
            }
        )


def is_recomputing() -> bool:
    """Whether a backward pass is under way, which runs checkpointed layers again."""
    # Asked in a graph that is being compiled, this would break it; compiled layers run again without Python.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class ForwardPasses:
    """Tells the gates of a model when a forward pass of it begins and ends, so that they keep all runs in it.

    Args:
        model: a module that holds :class:`Gate` s.
    """

    gates: list[Gate]

    def __init__(self, model: nn.Module) -> None:
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Tell the gates that a model has now."""
        self.gates = [module for module in model.modules() if isinstance(module, Gate)]

    def begin(self, *inputs: Any) -> None:
        """Forget the runs of the last forward pass, and keep those from now on."""
        if not self._matters(inputs):
            return
        for gate in self.gates:
            # A forward pass within that of a larger model is a part of it.
            if gate._pass is None or gate._pass is self:
                gate.__dict__.update(_pass=self, _runs=())

    def end(self, *inputs: Any) -> None:
        """The forward pass is over, or has failed."""
        if self._matters(inputs):
            for gate in self.gates:
                if gate._pass is self:
                    gate.__dict__["_pass"] = None

    def _matters(self, inputs: tuple[Any, ...]) -> bool:
        """Whether layers run for the first time: not in a backward pass, and not for a tracer."""
        if is_exporting() or is_recomputing():
            return False
        args = inputs[1] if len(inputs) > 1 else ()
        return not any(isinstance(value, fx.Proxy) for value in args)


def keep_every_run(model: nn.Module) -> None:
    """Let the gates of a model keep all their runs in a forward pass of it, instead of the last run alone.

    Needed only where a gate runs several times in one forward pass, as in a block that is used twice. It must
    be asked of one module: the outermost, whose call is the forward pass.

    Args:
        model: a module that holds :class:`Gate` s.

    Example:
        >>> import batchshaping as bs
        >>> class Twice(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate = bs.ChannelGate(4, 4)
        ...
        ...     def forward(self, x):
        ...         x = x * self.gate(x)
        ...         return x * self.gate(x)
        >>> model = Twice()
        >>> keep_every_run(model)
        >>> y = model(torch.randn(3, 4))
        >>> model.gate.decisions.shape
        torch.Size([3, 8])
    """
    passes = ForwardPasses(model)
    model.register_forward_pre_hook(passes.begin, prepend=True)
    model.register_forward_hook(passes.end, always_call=True)


def follow_gates(model: nn.Module) -> None:
    """Tell what :func:`keep_every_run` asked of a model, and of modules in it, which gates they have now.

    Args:
        model: a module some of whose gates were removed or replaced.
    """
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            passes = getattr(hook, "__self__", None)
            if isinstance(passes, ForwardPasses):
                passes.follow(module)


def gate_probabilities(model: nn.Module) -> list[Tensor]:
    """The probabilities of all gates of a model in its last forward pass, with their gradient attached.

    They are sigmoid(log α), the probabilities of being open under the full noise, whatever the noise of the
    gates is. With less noise gates are surer than that: what they cost is what they decide, see
    :func:`straight_through_decisions`.

    Args:
        model: a module that holds :class:`Gate` s, in any depth.

    Returns:
        One tensor of shape (N, gates) a gate module, in the order of ``model.modules()``.

    Raises:
        ValueError: if the model has no gates.
        RuntimeError: if a gate has not run yet, or runs in training but kept no gradient.

    Example:
        >>> import batchshaping as bs
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), bs.ChannelGate(8, 32))
        >>> gates = model(torch.randn(64, 1, 9, 9))
        >>> loss = bs.batch_shaping(gate_probabilities(model), bs.Beta(0.6, 0.4), dim=0)
        >>> loss.backward()
    """
    return _read_gates(model, lambda gate: gate.probabilities)


def gate_decisions(model: nn.Module) -> list[Tensor]:
    """What all gates of a model decided in its last forward pass.

    Args:
        model: a module that holds :class:`Gate` s, in any depth.

    Returns:
        One tensor of zeros and ones, of shape (N, gates), a gate module, in the order of ``model.modules()``.

    Raises:
        ValueError: if the model has no gates.
        RuntimeError: if a gate has not run yet.

    Example:
        >>> import batchshaping as bs
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), bs.ChannelGate(8, 32)).eval()
        >>> gates = model(torch.randn(64, 1, 9, 9))
        >>> bool((gate_decisions(model)[0] == gates.flatten(1)).all())
        True
    """
    return _read_gates(model, lambda gate: gate.decisions)


def straight_through_decisions(model: nn.Module) -> list[Tensor]:
    r"""What all gates of a model decided in its last forward pass, with the gradient of their probabilities.

    The value of each is exactly 0 or 1; the gradient is that of p = sigmoid(log α), for which a decision d
    stands in (straight-through):

    .. math::
        d + p - \mathrm{stopgrad}(p)

    A penalty on them, such as their mean or the multiply-adds that they cost, has the value of what was
    spent, under any noise, and its gradient does not vanish with the noise.

    Args:
        model: a module that holds :class:`Gate` s, in any depth.

    Returns:
        One tensor of zeros and ones, of shape (N, gates), a gate module, in the order of ``model.modules()``.

    Raises:
        ValueError: if the model has no gates.
        RuntimeError: if a gate has not run yet, or runs in training but kept no gradient.

    References:
        Bengio, Léonard and Courville, Estimating or Propagating Gradients Through Stochastic Neurons for
        Conditional Computation, 2013, https://arxiv.org/abs/1308.3432.

    Example:
        >>> import batchshaping as bs
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), bs.ChannelGate(8, 32))
        >>> gates = model(torch.randn(64, 1, 9, 9))
        >>> penalty = bs.l0_penalty(straight_through_decisions(model))
        >>> torch.equal(penalty, gates.mean())
        True
        >>> penalty.backward()
    """
    return _read_gates(model, lambda gate: gate.straight_through_decisions)


def named_gates(model: nn.Module) -> dict[str, Gate]:
    """The gates of a model by the names of their modules.

    Raises:
        ValueError: if it has none.

    Example:
        >>> import batchshaping as bs
        >>> list(named_gates(nn.Sequential(nn.Conv2d(1, 8, 3), bs.ChannelGate(8, 32))))
        ['1']
    """
    gates = {name: module for name, module in model.named_modules() if isinstance(module, Gate)}
    if not gates:
        raise ValueError(f"model must hold at least one Gate, received a {type(model).__name__} without any")
    return gates


def _read_gates(model: nn.Module, read: Callable[[Gate], Tensor]) -> list[Tensor]:
    values = []
    for name, gate in named_gates(model).items():
        try:
            values.append(read(gate))
        except RuntimeError as error:
            raise RuntimeError(f"gate {name or type(gate).__name__!r}: {error}") from None
    return values


def whole_number(name: str, value: int, least: int) -> int:
    """A setting that counts something."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, at least {least}, received {value!r}")
    return number


def layer_of_logits(
    features: int, gates: int, bias: float, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Linear:
    """The last layer of the MLP in a gate, with a bias that is added to its initial logits."""
    if not math.isfinite(bias):
        raise ValueError(f"bias must be finite, received {bias}")
    layer = nn.Linear(features, gates, device=device, dtype=dtype)
    with torch.no_grad():
        layer.bias.add_(bias)
    return layer
