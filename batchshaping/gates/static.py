"""Gates that are static on the images of a task, always open or always closed, compiled away.

A gate that does the same for every image decides nothing. The modules of a network that switch parts of
themselves know what is left of them without it (:class:`Prunable`). Here those gates are found, by running
the network on the images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from batchshaping.gates.channel import ChannelGate
from batchshaping.gates.gate import follow_gates

__all__ = ["Prunable", "StaticGates", "find_static_gates", "prune_static_gates"]

_Network = TypeVar("_Network", bound=nn.Module)


@runtime_checkable
class Prunable(Protocol):
    """A module with gates that knows what is left of it without those that always do the same."""

    def remove_static_gates(self, always: Mapping[str, Sequence[bool | None]]) -> None:
        """Remove gates that are always open or always closed, and what the latter switch, in place.

        Args:
            always: for each gate, by the name of its module in this one, whether it is always open (True),
                always closed (False) or neither (None).
        """


@dataclass(frozen=True)
class StaticGates:
    """Which gates of a network do the same for every image.

    Its fields are numbers, truth values and names, which can be written as JSON.

    Attributes:
        images: how many images there were.
        always: for each gate, by the name of its module, whether it is always open (True), always closed
            (False) or neither (None).
    """

    images: int
    always: Mapping[str, Sequence[bool | None]]

    def remove_from(self, model: _Network) -> _Network:
        """A copy of the network without these gates, as :func:`prune_static_gates` makes it.

        It is how a network is built whose weights were saved: the ungated one, gated, and then this.

        Args:
            model: the network whose gates these are, or one like it; it stays as it is.

        Raises:
            ValueError: if the gates are not those of the model.
        """
        expected = {name: len(always) for name, always in self.always.items()}
        received = {name: gate.gates for name, gate in _gates_in_prunable(model).items()}
        for name in {**expected, **received}:
            if expected.get(name) != received.get(name):
                raise ValueError(
                    f"model must have the gates that were found to be static, {expected.get(name, 0)} in "
                    f"{name!r}, received {received.get(name, 0)}"
                )
        pruned = copy.deepcopy(model)
        for prefix, module in _prunable(pruned).items():
            module.remove_static_gates(
                {
                    name.removeprefix(prefix): always
                    for name, always in self.always.items()
                    if name.startswith(prefix)
                }
            )
        follow_gates(pruned)
        return pruned

    def __str__(self) -> str:
        """A table: how many gates of each layer are always open, always closed, or neither."""
        head = [f"{self.images:,} images", "gates", "always open", "always closed", "conditional"]
        counts = {
            name: [len(always), *([*always].count(kind) for kind in (True, False, None))]
            for name, always in self.always.items()
        }
        counts["all"] = [sum(column) for column in zip([0] * 4, *counts.values(), strict=True)]
        rows = [head, *([name, *(f"{count:,}" for count in row)] for name, row in counts.items())]
        first = max(len(row[0]) for row in rows)
        return "\n".join(
            "  ".join(
                [row[0].ljust(first), *(c.rjust(len(h)) for c, h in zip(row[1:], head[1:], strict=True))]
            )
            for row in rows
        )


def find_static_gates(model: nn.Module, images: Iterable[Any]) -> StaticGates:
    """Find the gates that do the same for every image.

    The model runs in evaluation and without a gradient; its mode stays as it is.

    Args:
        model: a network with gates in modules that can do without them (:class:`Prunable`).
        images: batches of images, such as a ``DataLoader`` gives them: tensors, or tuples and lists that
            begin with one. They are moved to the device of the model.

    Raises:
        ValueError: if the model has no such gates, or there are no images.
    """
    gates = _gates_in_prunable(model)
    if not _prunable(model):
        raise ValueError(
            "model must hold a module that knows what is left of it without some of its gates, as the blocks "
            f"of gate_resnet do, received a {type(model).__name__} without any"
        )
    device = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    opened = {name: torch.zeros(gate.gates, dtype=torch.long, device="cpu") for name, gate in gates.items()}
    number, examples = 0, dict.fromkeys(gates, 0)
    model.eval()
    try:
        with torch.no_grad():
            for batch in images:
                x: Tensor = batch if isinstance(batch, Tensor) else batch[0]
                model(x.to(device))
                number += len(x)
                for name, gate in gates.items():
                    # Side by side if the gate runs several times.
                    decisions = gate.decisions.unflatten(1, (-1, gate.gates)).flatten(0, 1)
                    opened[name] += (decisions != 0).sum(dim=0).cpu()
                    examples[name] += len(decisions)
    finally:
        for module in training:
            module.training = True
    if number == 0:
        raise ValueError("images must hold at least one, received none")
    return StaticGates(
        number,
        {
            name: tuple({0: False, examples[name]: True}.get(count) for count in counts.tolist())
            for name, counts in opened.items()
        },
    )


def prune_static_gates(model: _Network, images: Iterable[Any]) -> tuple[_Network, StaticGates]:
    """A copy of a gated network without the gates that do the same for every image of a task.

    What gates switch that are closed for all images is left out: channels, with their normalization and the
    weights that read them. A gate that is open for all images is left out too, and what it switches is always
    computed. On those images the outputs stay the same up to rounding, and so do the gates that are left.

    The copy is a gated network as any other: it can be trained, counted, saved and copied, and
    :func:`~batchshaping.gates.inference.conditional_inference` makes it fast. A block without a channel
    between its convolutions becomes its shortcut and a bias. Some channels stay although they are never on:
    those of a convolution with groups (ResNeXt) where others of the same group stay; those that a layer
    between mixes, such as a group normalization; and one gate of a first layer of a bottleneck whose second
    layer stays.

    A state dict of the copy fits a network without the same gates: build the network anew, gate it, and take
    them away by :meth:`StaticGates.remove_from`.

    Args:
        model: a network made by :func:`~batchshaping.channel_gating.blocks.gate_resnet`, or one that holds
            such; it stays as it is.
        images: batches of images that the gates are judged by, as a ``DataLoader`` of the training images
            gives them: tensors, or tuples and lists that begin with one.

    Returns:
        The copy, in the mode of the model, and which gates are static. Printed, it is a table.

    Raises:
        ValueError: if the model has no gates that can be left out, as a vision transformer or an inference
            copy; or if there are no images.

    Example:
        >>> import batchshaping as bs
        >>> network = bs.gated_resnet20().eval()
        >>> images = torch.randn(8, 3, 32, 32)
        >>> pruned, static = prune_static_gates(network, images.split(4))
        >>> with torch.no_grad():
        ...     torch.allclose(pruned(images), network(images), rtol=1e-4, atol=1e-4)
        True
        >>> again = static.remove_from(bs.gated_resnet20())
        >>> again.load_state_dict(pruned.state_dict())
        <All keys matched successfully>
    """
    static = find_static_gates(model, images)
    return static.remove_from(model), static


def _prunable(model: nn.Module) -> dict[str, Prunable]:
    """The modules that can do without some of their gates, by what the names of those begin with."""
    return {
        f"{name}." if name else "": module
        for name, module in model.named_modules()
        if isinstance(module, Prunable)
    }


def _gates_in_prunable(model: nn.Module) -> dict[str, ChannelGate]:
    prefixes = (*_prunable(model),)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ChannelGate) and name.startswith(prefixes)
    }
