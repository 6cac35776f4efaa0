r"""Gates that switch parts of a network on and off, example by example, and what shapes and measures them.

A gate reads features and gives a logit, the log-odds of being open. In training it samples its decision from
the binary concrete distribution; in evaluation it is open iff the logit is positive. After a forward pass,
:func:`gate_probabilities` reads the probabilities of all gates of a model with their gradient attached, for
the losses that shape them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

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
]


def binary_concrete(
    logits: Tensor, temperature: float = 2 / 3, training: bool = True, noise: float | Tensor = 1.0
) -> Tensor:
    r"""Decide 0 or 1 at random by the logits, with the gradient of a relaxed decision.

    .. math::
        s = \mathrm{sigmoid}\left( \frac{\log \alpha + \sigma (\log u - \log(1 - u))}{t} \right), \qquad
        u \sim \mathrm{Uniform}(0, 1)

    Forward gives 1 where s > 1/2, which happens with probability sigmoid(log α) if σ = 1, and 0 elsewhere;
    backward uses the derivative of s (straight-through). Without training there is no noise: 1 iff log α > 0.

    Args:
        logits: log α, of any shape and floating dtype.
        temperature: t, positive; the higher, the smoother the gradient. Decisions do not depend on it.
        training: whether there is noise.
        noise: its scale σ, not negative: 1 for the binary concrete distribution, 0 for none. A network that
            ends its training at 0 meets in evaluation the decisions that it was trained on.

    Returns:
        Exact zeros and ones in the shape and dtype of the logits; NaN where the logit is.

    Raises:
        TypeError: if the logits are not floating point.
        ValueError: if the temperature is not positive.

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
    # Half precision cannot tell a uniform number from 0 often enough.
    noisy = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if training:
        noisy = noisy + noise * torch.logit(torch.rand_like(noisy), eps=torch.finfo(noisy.dtype).eps)
    relaxed = torch.sigmoid(noisy / temperature)
    # The difference is exactly 0, and NaN where it should be.
    return ((noisy > 0) + (relaxed - relaxed.detach())).to(logits.dtype)


class Gate(nn.Module):
    """A module that decides 0 or 1 for each example and keeps its logits for the losses that shape it.

    A subclass computes logits of shape (N, ...) in its forward pass and gives them to :meth:`decide`.

    Args:
        temperature: temperature of the :func:`binary_concrete` decision.

    Attributes:
        noise: the scale of the decision's noise in training, a scalar tensor that a schedule may fill.
    """

    noise: Tensor
    _logits: Tensor | None
    _decisions: Tensor | None
    _forced: Callable[[Tensor], Tensor] | None

    def __init__(self, temperature: float = 2 / 3) -> None:
        super().__init__()
        self.temperature = temperature
        # A tensor, so that a schedule that changes it does not compile the network anew.
        self.register_buffer("noise", torch.ones(()), persistent=False)
        self._logits = self._decisions = self._forced = None

    def decide(self, logits: Tensor) -> Tensor:
        """Zeros and ones of the logits' shape: sampled in training, open iff the logit > 0 in evaluation."""
        self._logits = logits
        if self._forced is None:
            decisions = binary_concrete(logits, self.temperature, self.training, self.noise)
        else:
            decisions = self._forced(logits)
        self._decisions = decisions
        return decisions

    @property
    def probabilities(self) -> Tensor:
        """Probability of being open in the last forward pass, of shape (N, gates), with its gradient.

        Raises:
            RuntimeError: if there was no forward pass, or if a gate in training made it without a gradient,
                so that a loss could not reach the gate.
        """
        if self._logits is None:
            raise RuntimeError("the gate has no probabilities before a forward pass")
        learns = self.training and any(p.requires_grad for p in self.parameters())
        if learns and torch.is_grad_enabled() and not self._logits.requires_grad:
            raise RuntimeError(
                "the gate's last forward pass kept no gradient (torch.no_grad or a re-entrant checkpoint), "
                "so that no loss can reach it; read its probabilities under torch.no_grad if none should"
            )
        return torch.sigmoid(self._logits.flatten(1))

    @property
    def decisions(self) -> Tensor:
        """What was decided in the last forward pass, zeros and ones of shape (N, gates), without a gradient.

        Raises:
            RuntimeError: if there was no forward pass.
        """
        if self._decisions is None:
            raise RuntimeError("the gate has decided nothing before a forward pass")
        return self._decisions.detach().flatten(1)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles get: all but the last forward pass, since a graph cannot be copied."""
        return {**self.__dict__, "_logits": None, "_decisions": None, "_forced": None}


class _Forced:
    """Decides at random, whatever the logits are.

    Chance follows from the seed, the gate and the number of the model's forward pass, so that what
    runs again in the backward pass, to save memory, meets the same decisions.
    """

    def __init__(self, share: float, seed: int) -> None:
        self.share = share
        self.seed = seed
        self.passes = 0

    def count(self, *_: object) -> None:
        """Another forward pass begins, unless it is one within a backward pass."""
        self.passes += torch._C._current_graph_task_id() == -1

    def __call__(self, logits: Tensor, gate: int) -> Tensor:
        uniform = np.random.default_rng([self.seed, gate, self.passes]).random(logits.shape)
        return torch.from_numpy(uniform < self.share).to(logits)


@contextmanager
def gates_forced(model: nn.Module, share: float, seed: int = 0) -> Iterator[None]:
    """Let chance decide for the gates of a model, whatever they compute: for tests, benchmarks and what-if.

    Args:
        model: a module that holds :class:`Gate` s.
        share: each gate is open for each example with this probability: 1 opens all, 0 closes all.
        seed: of the decisions, not negative; the same seed and batches give the same decisions, on every
            device. A backward pass that computes layers again belongs within the context too.

    Raises:
        ValueError: if the share is not in [0, 1] or the model has no gates.

    Example:
        >>> gate = ChannelGate(8, 4).eval()
        >>> with gates_forced(gate, share=1.0):
        ...     gate(torch.randn(2, 8))
        tensor([[1., 1., 1., 1.],
                [1., 1., 1., 1.]])
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], received {share}")
    gates = named_gates(model).values()
    before = [gate._forced for gate in gates]
    forced = _Forced(share, seed)
    counting = model.register_forward_pre_hook(forced.count)
    try:
        for index, gate in enumerate(gates):
            gate._forced = partial(forced, gate=index)
        yield
    finally:
        counting.remove()
        for gate, earlier in zip(gates, before, strict=True):
            gate._forced = earlier


class ChannelGate(Gate):
    r"""A gate for each channel of a layer, decided example by example from the mean of each feature map.

    .. math::
        \log \alpha = W_b \, \mathrm{ReLU}(\mathrm{BN}(W_a \, \mathrm{pool}(x)))

    Args:
        in_channels: channels of the features x that the gate reads.
        out_channels: channels that it switches.
        hidden: width of the MLP.
        bias: added to the initial logits: the higher, the more channels are open at first; half of them at 0.

    Shape:
        x is (N, in_channels, ...) with any number of dimensions to pool over, or none. The gates are
        (N, out_channels, 1, ...) with as many, so that they multiply the channels as they are.

    Raises:
        ValueError: if x has another number of channels, or is a single example in training.

    References:
        Bejnordi, Blankevoort and Welling, Batch-Shaping for Learning Conditional Channel Gated Networks, ICLR
        2020, https://arxiv.org/abs/1907.06627.

    Example:
        >>> gate = ChannelGate(in_channels=8, out_channels=32)
        >>> x, inner = torch.randn(4, 8, 7, 7), torch.randn(4, 32, 7, 7)
        >>> (gate(x) * inner).shape, gate.probabilities.shape
        (torch.Size([4, 32, 7, 7]), torch.Size([4, 32]))
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int = 16, bias: float = 0.0) -> None:
        super().__init__()
        self.in_channels = in_channels
        last = nn.Linear(hidden, out_channels)
        with torch.no_grad():
            last.bias.add_(bias)
        self.to_logits = nn.Sequential(
            nn.Linear(in_channels, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), last
        )

    def forward(self, x: Tensor) -> Tensor:
        """Zeros and ones of shape (N, out_channels, 1, ...), of x's number of dimensions."""
        if x.ndim < 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must have shape (N, {self.in_channels}, ...), received {tuple(x.shape)}")
        if self.training and len(x) == 1:
            raise ValueError(
                "a gate in training normalizes over the batch and needs at least 2 examples, received 1 "
                "(drop_last=True leaves out a last batch of one)"
            )
        pooled = x.flatten(2).mean(dim=2) if x.ndim > 2 else x
        gates = self.decide(self.to_logits(pooled))
        return gates.reshape(*gates.shape, *[1] * (x.ndim - 2))


def gate_probabilities(model: nn.Module) -> list[Tensor]:
    """The probabilities of all gates of a model in its last forward pass, with their gradient attached.

    Args:
        model: a module that holds :class:`Gate` s, in any depth.

    Returns:
        One tensor of shape (N, gates) a gate module, in the order of ``model.modules()``.

    Raises:
        ValueError: if the model has no gates.
        RuntimeError: if a gate has not run yet, or runs in training but kept no gradient.

    Example:
        >>> import batchshaping as bs
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), ChannelGate(8, 32))
        >>> gates = model(torch.randn(64, 1, 9, 9))
        >>> loss = sum(bs.batch_shaping(p, bs.Beta(0.6, 0.4), dim=0) for p in gate_probabilities(model))
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
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), ChannelGate(8, 32)).eval()
        >>> gates = model(torch.randn(64, 1, 9, 9))
        >>> bool((gate_decisions(model)[0] == gates.flatten(1)).all())
        True
    """
    return _read_gates(model, lambda gate: gate.decisions)


def named_gates(model: nn.Module) -> dict[str, Gate]:
    """The gates of a model by the names of their modules.

    Raises:
        ValueError: if it has none.

    Example:
        >>> list(named_gates(nn.Sequential(nn.Conv2d(1, 8, 3), ChannelGate(8, 32))))
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


def l0_penalty(probabilities: Tensor | Sequence[Tensor]) -> Tensor:
    r"""The mean probability of being open, over all examples and gates.

    .. math::
        \frac{1}{N G} \sum_{n=1}^N \sum_{g=1}^G p_{n g}

    Args:
        probabilities: a tensor (N, gates), or one for each layer as :func:`gate_probabilities` gives them;
            every gate counts the same, whatever its layer.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: if there are no gates.

    References:
        Louizos, Welling and Kingma, Learning Sparse Neural Networks through L0 Regularization, ICLR 2018,
        https://arxiv.org/abs/1712.01312.

    Example:
        >>> l0_penalty([torch.full((2, 3), 0.5), torch.full((2, 1), 0.9)])
        tensor(0.6000)
    """
    return _all_gates(probabilities).mean()


class GateStatistics(NamedTuple):
    """What gates did over a data set, as shares in [0, 1].

    The first three are shares of the gates and add up to 1.
    """

    always_on: float
    always_off: float
    conditional: float
    mean_open: float


def gate_statistics(decisions: Tensor | Sequence[Tensor]) -> GateStatistics:
    """How many gates are open for every example, for none, or for some, and how many are open on average.

    Args:
        decisions: open or closed over a data set, of shape (N, gates), as booleans or as zeros and ones; or
            one such tensor for each layer, together then.

    Returns:
        The shares of gates always on, always off and conditional, and the mean share of open gates.

    Raises:
        ValueError: if there are no examples or no gates, or a decision is neither 0 nor 1.

    Example:
        >>> gate_statistics(torch.tensor([[1, 0, 1, 0], [1, 0, 0, 1]]))
        GateStatistics(always_on=0.25, always_off=0.25, conditional=0.5, mean_open=0.5)
    """
    counts = GateCounts(classes=1)
    decisions = _all_gates(decisions)
    counts.update([decisions], torch.zeros(len(decisions), dtype=torch.long))
    return counts.statistics()


class GateCounts:
    """Counts over a data set, batch by batch, how often each gate is open for each class.

    Args:
        classes: how many there are.

    Attributes:
        open: for each layer, in how many examples of each class each gate was open: integers of shape
            (classes, gates).
        examples: how many examples of each class there were, of shape (classes,).

    Example:
        >>> counts = GateCounts(classes=2)
        >>> counts.update([torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])], torch.tensor([0, 1]))
        >>> counts.open
        [tensor([[1, 0, 1],
                [1, 0, 0]])]
        >>> counts.statistics().always_on
        0.3333333333333333
    """

    open: list[Tensor]
    examples: Tensor

    def __init__(self, classes: int) -> None:
        self.open = []
        self.examples = torch.zeros(classes, dtype=torch.long)

    def update(self, decisions: Sequence[Tensor], labels: Tensor) -> None:
        """Count a batch.

        Args:
            decisions: zeros and ones of shape (N, gates) a layer, as :func:`gate_decisions` gives them.
            labels: the examples' classes 0, 1, ..., of shape (N,).

        Raises:
            ValueError: if a decision is neither 0 nor 1.
        """
        labels = labels.to("cpu", torch.long)
        batch = []
        for layer in decisions:
            is_open = layer.bool()
            wrong = layer[layer != is_open]
            if len(wrong):
                raise ValueError(f"decisions must be 0 or 1, received {wrong[0].item():.6g}")
            empty = torch.zeros(len(self.examples), layer.shape[1], dtype=torch.long)
            batch.append(empty.index_add(0, labels, is_open.to("cpu", torch.long)))
        self.open = [old + new for old, new in zip(self.open, batch, strict=True)] if self.open else batch
        self.examples = self.examples + labels.bincount(minlength=len(self.examples))

    def statistics(self, layer: int | None = None) -> GateStatistics:
        """What the gates did over all examples so far.

        Args:
            layer: the index of one layer; all together by default.

        Raises:
            ValueError: if nothing was counted.
        """
        examples = self.examples.sum()
        if examples == 0:
            raise ValueError("there must be at least one example and one gate, received none")
        layers = self.open if layer is None else [self.open[layer]]
        total = torch.cat([counts.sum(dim=0) for counts in layers])
        always_on, always_off = total == examples, total == 0
        shares = (always_on, always_off, ~(always_on | always_off), total / examples)
        return GateStatistics(*(share.double().mean().item() for share in shares))


def _all_gates(layers: Tensor | Sequence[Tensor]) -> Tensor:
    """Side by side, (N, gates of all layers)."""
    together = layers if isinstance(layers, Tensor) else torch.cat([*layers], dim=1) if layers else None
    if together is None or together.numel() == 0:
        shape = None if together is None else tuple(together.shape)
        raise ValueError(f"there must be at least one example and one gate, received shape {shape}")
    return together
