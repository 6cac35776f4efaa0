"""What a network does on a data set: accuracy, multiply-adds and gates, as sums over batches and ranks."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from batchshaping.channel_gating.multiply_adds import MultiplyAdds
from batchshaping.gates import Gate, GateCounts, gate_decisions, gate_probabilities
from batchshaping.training.data import Data, batches
from batchshaping.training.threads import suitable_threads, using_threads

__all__ = ["BINS", "Evaluation", "evaluate"]

BINS = 20
"""Bins of the histograms of gate probabilities (sigmoid of the logits), of equal width over [0, 1]."""


class Evaluation:
    """Sums over the examples seen so far, from which every figure of a report comes.

    Args:
        network: the network that is evaluated, gated or not.
        cost: its multiply-adds.
        classes: names of the classes.
    """

    def __init__(self, network: nn.Module, cost: MultiplyAdds, classes: tuple[str, ...]) -> None:
        self.cost = cost
        self.classes = classes
        self.names = [name for name, module in network.named_modules() if isinstance(module, Gate)]
        self.counts = GateCounts(len(classes))
        if self.names:
            # The network ran when its cost was measured. A rank without an example adds up zeros.
            gates = (decisions.shape[1] for decisions in gate_decisions(network))
            self.counts.open = [torch.zeros(len(classes), n, dtype=torch.long) for n in gates]
        self.histograms = torch.zeros(len(self.names), BINS, dtype=torch.long)
        self.sums = torch.zeros(3, len(classes), dtype=torch.double)  # by class: loss, correct, multiply-adds

    def update(self, network: nn.Module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Add a batch that has just gone through the network, and tell its predictions and multiply-adds."""
        predicted = logits.argmax(dim=1)
        decisions = gate_decisions(network) if self.names else []
        spent = self.cost.per_example(decisions).to(logits.device).expand(len(labels))
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        by_example = torch.stack([loss, predicted == labels, spent]).to("cpu", torch.double)
        self.sums.index_add_(1, labels.cpu(), by_example)
        self.counts.update(decisions, labels)
        if self.names:
            for histogram, layer in zip(self.histograms, gate_probabilities(network), strict=True):
                histogram += layer.float().cpu().histc(BINS, 0, 1).long()
        return predicted, spent

    def reduce(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Add up with the evaluations of other ranks."""
        self.sums = add_up(self.sums)
        self.histograms = add_up(self.histograms)
        self.counts.examples = add_up(self.counts.examples)
        self.counts.open = [add_up(counts) for counts in self.counts.open]

    def summary(self) -> dict[str, Any]:
        """The figures, in what JSON has."""
        examples = self.counts.examples
        total = examples.sum().item()
        loss, correct, macs = (self.sums.sum(dim=1) / total).tolist()
        return {
            "examples": total,
            "loss": loss,
            "accuracy": correct,
            "multiply_adds": macs,
            "gates": self.counts.statistics()._asdict() if self.names else None,
            "layers": [
                {
                    "name": name,
                    "gates": self.counts.open[layer].shape[1],
                    **self.counts.statistics(layer)._asdict(),
                    "histogram": self.histograms[layer].tolist(),
                }
                for layer, name in enumerate(self.names)
            ],
        }

    def by_class(self) -> list[dict[str, Any]]:
        """Accuracy and multiply-adds of each class that there is, and how often each gate is open for it."""
        figures = []
        for index, name in enumerate(self.classes):
            examples = self.counts.examples[index].item()
            if examples:
                _, correct, macs = (self.sums[:, index] / examples).tolist()
                figures.append(
                    {
                        "name": name,
                        "examples": examples,
                        "accuracy": correct,
                        "multiply_adds": macs,
                        "open": [
                            [round(share, 4) for share in (layer[index].double() / examples).tolist()]
                            for layer in self.counts.open
                        ],
                    }
                )
        return figures


@torch.no_grad()
def evaluate(
    network: nn.Module,
    data: Data,
    *,
    batch: int = 256,
    workers: int = 0,
    extremes: int = 12,
    device: torch.device | str = "cpu",
    threads: int | None = None,
) -> dict[str, Any]:
    """Evaluate a network on the test images.

    Args:
        network: gives logits of images as :meth:`~batchshaping.training.data.Data.normalize` makes them.
        data: the data set.
        batch: images in a forward pass.
        workers: processes that load images.
        extremes: how many of the images with the least and with the most multiply-adds to show.
        device: where the network is.
        threads: how many threads compute on the CPU; None takes as many as suit the network.

    Returns:
        The figures, in what JSON has: those of :meth:`Evaluation.summary`, and ``by_class``, ``cost`` (what
        there is to spend), ``quantiles`` of the multiply-adds over the images, and the images that spend
        ``least`` and ``most``.
    """
    network.eval()
    dtype = next(network.parameters()).dtype
    zeros = torch.zeros(1, *data.shape, device=device, dtype=dtype)
    cost = MultiplyAdds(network, zeros)
    evaluation = Evaluation(network, cost, data.classes)
    predicted, spent = [], []
    with using_threads(threads or suitable_threads(network, cost.dense * batch, device)):
        for images, labels in batches(data.test, batch, num_workers=workers):
            logits = network(data.normalize(images.to(device)).to(dtype))
            guesses, macs = evaluation.update(network, logits, labels.to(device))
            predicted.append(guesses.cpu())
            spent.append(macs.double().cpu())
    guesses, macs = torch.cat(predicted), torch.cat(spent)
    order = macs.argsort(stable=True)
    gated = bool(evaluation.names)

    def shown(indices: Tensor) -> list[dict[str, Any]]:
        if not gated:
            return []
        images, labels = data.test.__getitems__(indices.tolist())
        return [
            {
                "index": index,
                "label": data.classes[label],
                "predicted": data.classes[guesses[index]],
                "multiply_adds": macs[index].item(),
                "png": _png(image),
            }
            for index, label, image in zip(indices.tolist(), labels.tolist(), images, strict=True)
        ]

    return {
        **evaluation.summary(),
        "cost": {"dense": cost.dense, "gates": cost.gates, "fixed": cost.fixed},
        "quantiles": macs.quantile(torch.linspace(0, 1, 21, dtype=torch.double)).tolist(),
        "by_class": evaluation.by_class(),
        "least": shown(order[:extremes]),
        "most": shown(order[-extremes:].flip(0)),
    }


def _png(image: Tensor) -> str:
    """An image of shape (C, H, W) as a PNG in base64, at most 64 pixels large."""
    from torchvision.transforms.functional import to_pil_image

    picture = to_pil_image(image)
    picture.thumbnail((64, 64))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
