"""What a gated network does with a data set when the threshold of its gates is shifted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from batchshaping.gates.cost import MultiplyAdds
from batchshaping.gates.gate import gate_decisions, named_gates
from batchshaping.gates.shifted import gates_shifted

__all__ = ["Outcome", "outcomes"]


@dataclass(frozen=True)
class Outcome:
    """What a network did with each example at one shift.

    Attributes:
        shares: multiply-adds as shares of those of the same network without gates, of shape (N,).
        correct: 1 where the prediction is right and 0 elsewhere, of shape (N,), or the share that is right
            where an example has several labels; None if there were no labels.
    """

    shares: Tensor
    correct: Tensor | None

    @property
    def multiply_adds(self) -> float:
        """The mean share."""
        return self.shares.mean().item()

    @property
    def accuracy(self) -> float | None:
        """The mean of what is right."""
        return None if self.correct is None else self.correct.mean().item()


def outcomes(model: nn.Module, loader: Iterable[Any], shifts: Sequence[float]) -> list[Outcome]:
    """Run a model over a data set once, each batch at all of some shifts, so that these can be paired.

    The model runs in evaluation and without a gradient; its mode stays as it is.

    Args:
        model: a network with gates, or its inference copy.
        loader: batches of images, or tuples and lists of images and labels, as a ``DataLoader`` gives them.
            They are moved to the device of the model.
        shifts: of the threshold, see :func:`~batchshaping.gates.shifted.gates_shifted`.

    Returns:
        An outcome for each shift, on the CPU, in double precision.

    Raises:
        ValueError: if the model has no gates, there is no example, only some batches have labels, or they do
            not fit what the model gives.
    """
    named_gates(model)
    device = next(chain(model.parameters(), model.buffers())).device
    costs: dict[tuple[int, ...], MultiplyAdds] = {}
    shares: list[list[Tensor]] = [[] for _ in shifts]
    correct: list[list[Tensor]] = [[] for _ in shifts]
    with _in_evaluation(model), torch.no_grad():
        for batch in loader:
            x, labels = _images_and_labels(batch)
            if len(x) == 0:
                continue
            x = x.to(device)
            size = tuple(x.shape[1:])
            if size not in costs:
                costs[size] = MultiplyAdds.measure(model, x[:1])
            cost = costs[size]
            for k, shift in enumerate(shifts):
                with gates_shifted(model, shift):
                    output = model(x)
                spent = cost.per_example(gate_decisions(model))
                shares[k].append(spent.to("cpu", torch.double) / cost.dense)
                if labels is not None:
                    correct[k].append(_correct(output, labels.to(device)))
    if not costs:
        raise ValueError("loader must hold at least one image in every pass over it, received none")
    labelled = [len(each) == len(spent) for each, spent in zip(correct, shares, strict=True)]
    if any(correct) and not all(labelled):
        raise ValueError("loader must give labels with all batches or with none, received some without")
    return [
        Outcome(torch.cat(spent), torch.cat(right) if right else None)
        for spent, right in zip(shares, correct, strict=True)
    ]


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Tensor):
        return batch, None
    images, *more = batch
    return images, more[0] if more else None


def _correct(output: Any, labels: Tensor) -> Tensor:
    """The share of right predictions of each example."""
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if not isinstance(output, Tensor) or output.shape[:1] + output.shape[2:] != labels.shape:
        raise ValueError(
            "the model must give scores of shape (N, classes, ...) for labels of shape (N, ...), "
            f"received {shape} for {tuple(labels.shape)}"
        )
    right = output.argmax(dim=1) == labels
    return right.reshape(len(labels), -1).to("cpu", torch.double).mean(dim=1)
