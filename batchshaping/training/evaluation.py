"""Evaluation of a network on a data set: accuracy, multiply-adds and gates, summed over batches and ranks."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from batchshaping.gates.cost import MultiplyAdds
from batchshaping.gates.gate import Gate, gate_decisions, gate_probabilities
from batchshaping.gates.summary import GateCounts
from batchshaping.training.data import Data, batches
from batchshaping.training.threads import suitable_threads, using_threads

__all__ = ["BINS", "Evaluation", "evaluate"]

BINS = 20
"""Number of bins of the histograms of gate probabilities; the bins have equal width over [0, 1]."""


class Evaluation:
    """Sums over the examples seen so far, from which all metrics are computed.

    Args:
        network: the network that is evaluated, with gates or without.
        cost: the multiply-adds of the network.
        classes: names of the classes.
    """

    def __init__(self, network: nn.Module, cost: MultiplyAdds, classes: tuple[str, ...]) -> None:
        self.cost = cost
        self.classes = classes
        self.names = [name for name, module in network.named_modules() if isinstance(module, Gate)]
        self.counts = GateCounts(len(classes))
        if self.names:
            # The gates have decisions, since the network ran when its cost was measured. The counts start as
            # zeros, so that a rank without examples can take part in the sums.
            gates = (decisions.shape[1] for decisions in gate_decisions(network))
            self.counts.open = [torch.zeros(len(classes), n, dtype=torch.long) for n in gates]
        self.histograms = torch.zeros(len(self.names), BINS, dtype=torch.long)
        # Loss, number of correct predictions and multiply-adds of each class.
        self.sums = torch.zeros(3, len(classes), dtype=torch.double)

    def update(self, network: nn.Module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Add the batch of the last forward pass.

        Args:
            network: the network.
            logits: the outputs of the network, of shape (N, classes).
            labels: the classes of the images, of shape (N,).

        Returns:
            The predicted classes, and the multiply-adds that each image took, both of shape (N,).
        """
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

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Add the sums of the other ranks.

        Args:
            sum_over_ranks: the sum of a tensor over all ranks.
        """
        self.sums = sum_over_ranks(self.sums)
        self.histograms = sum_over_ranks(self.histograms)
        self.counts.examples = sum_over_ranks(self.counts.examples)
        self.counts.open = [sum_over_ranks(counts) for counts in self.counts.open]

    def summary(self) -> dict[str, Any]:
        """The metrics of all examples, which can be written as JSON."""
        examples = self.counts.examples
        total = examples.sum().item()
        loss, accuracy, multiply_adds = (self.sums.sum(dim=1) / total).tolist()
        return {
            "examples": total,
            "loss": loss,
            "accuracy": accuracy,
            "multiply_adds": multiply_adds,
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
        """Accuracy, multiply-adds and share of open decisions of each gate, for each class with examples."""
        metrics = []
        for index, name in enumerate(self.classes):
            examples = self.counts.examples[index].item()
            if examples:
                _, accuracy, multiply_adds = (self.sums[:, index] / examples).tolist()
                metrics.append(
                    {
                        "name": name,
                        "examples": examples,
                        "accuracy": accuracy,
                        "multiply_adds": multiply_adds,
                        "open": [
                            [round(share, 4) for share in (layer[index].double() / examples).tolist()]
                            for layer in self.counts.open
                        ],
                    }
                )
        return metrics


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
        network: gives logits of images that are normalized by
            :meth:`~batchshaping.training.data.dataset.Data.normalize`.
        data: the data set.
        batch: number of images in a forward pass.
        workers: number of processes that load images.
        extremes: number of images in each of the lists of images with the fewest and the most multiply-adds.
        device: device of the network.
        threads: number of threads on the CPU; None takes as many as suit the network.

    Returns:
        Metrics, which can be written as JSON: those of :meth:`Evaluation.summary`; ``by_class``; ``cost``,
        the multiply-adds of the network without gates, of the gates, and with all gates closed; ``quantiles``
        of the multiply-adds over the images; and the images with the fewest (``least``) and the ``most``.
    """
    network.eval()
    dtype = next(network.parameters()).dtype
    zeros = torch.zeros(1, *data.shape, device=device, dtype=dtype)
    cost = MultiplyAdds.measure(network, zeros)
    evaluation = Evaluation(network, cost, data.classes)
    predicted, spent = [], []
    with using_threads(threads or suitable_threads(network, cost.dense * batch, device)):
        for images, labels in batches(data.test, batch, num_workers=workers):
            logits = network(data.normalize(images, like=zeros))
            classes, multiply_adds = evaluation.update(network, logits, labels.to(device))
            predicted.append(classes.cpu())
            spent.append(multiply_adds.double().cpu())
    classes, multiply_adds = torch.cat(predicted), torch.cat(spent)
    order = multiply_adds.argsort(stable=True)
    gated = bool(evaluation.names)

    def shown(indices: Tensor) -> list[dict[str, Any]]:
        if not gated:
            return []
        images, labels = data.test.__getitems__(indices.tolist())
        return [
            {
                "index": index,
                "label": data.classes[label],
                "predicted": data.classes[classes[index]],
                "multiply_adds": multiply_adds[index].item(),
                "png": _png(image),
            }
            for index, label, image in zip(indices.tolist(), labels.tolist(), images, strict=True)
        ]

    return {
        **evaluation.summary(),
        "cost": {"dense": cost.dense, "gates": cost.gates, "fixed": cost.fixed},
        "quantiles": multiply_adds.quantile(torch.linspace(0, 1, 21, dtype=torch.double)).tolist(),
        "by_class": evaluation.by_class(),
        "least": shown(order[:extremes]),
        "most": shown(order[-extremes:].flip(0)),
    }


def _png(image: Tensor) -> str:
    """An image of shape (C, H, W) as a PNG in base64, at most 64 pixels wide and high."""
    from torchvision.transforms.functional import to_pil_image

    picture = to_pil_image(image)
    picture.thumbnail((64, 64))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
