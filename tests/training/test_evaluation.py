"""Every figure is what a plain count over the images gives, however the images are split."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from batchshaping.gates.channel import ChannelGate
from batchshaping.gates.cost import MultiplyAdds, count_macs
from batchshaping.training.config import RunConfig
from batchshaping.training.data import Data, ImagesInMemory, batches
from batchshaping.training.evaluation import BINS, Evaluation, evaluate
from batchshaping.training.module import make_network

CLASSES = ("ant", "bee", "cat", "dog")  # no image is of a dog
IMAGES = 41


@pytest.fixture(scope="module")
def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 12, 12), dtype=torch.uint8, generator=generator)
    images = (images * torch.rand(IMAGES, 1, 1, 1, generator=generator)).to(torch.uint8)
    labels = torch.randint(0, 3, (IMAGES,), generator=generator)
    test = ImagesInMemory(images, labels)
    return Data(test, test, CLASSES, (3, 12, 12), (0.3, 0.4, 0.5), (0.2, 0.2, 0.2), padding=0, flip=False)


def made(data: Data, gated: bool) -> nn.Module:
    """A network whose gates differ from image to image."""
    torch.manual_seed(1)
    network = make_network(RunConfig(width=4, hidden=4, gate_bias=0.0, gated=gated), len(CLASSES), 3)
    with torch.no_grad():
        network(data.normalize(data.test.__getitems__(range(IMAGES))[0]))
        for module in network.modules():
            if isinstance(module, ChannelGate):
                last: Any = module.to_logits[3]
                last.weight.mul_(8)
                last.bias[0] = 100.0  # always on
                last.bias[1] = -100.0  # always off
    return network.eval()


@pytest.fixture(scope="module", params=[True, False], ids=["gated", "ungated"])
def network(request: pytest.FixtureRequest, data: Data) -> nn.Module:
    return made(data, request.param)


def counted(network: nn.Module, data: Data) -> dict[str, Any]:
    """The figures, from the outputs for one image after the other."""
    gates = {name: module for name, module in network.named_modules() if isinstance(module, ChannelGate)}
    logits: dict[str, Tensor] = {}
    handles = [
        gate.to_logits.register_forward_hook(lambda *args, name=name: logits.update({name: args[-1]}))
        for name, gate in gates.items()
    ]
    rows = []
    for index in range(IMAGES):
        image, label = data.test.__getitems__([index])
        x = (image / 255 - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
        with torch.no_grad():
            out = network(x)
        opened = {name: (z[0] > 0).tolist() for name, z in logits.items()}
        chances = {name: torch.sigmoid(z[0]).tolist() for name, z in logits.items()}
        rows.append(
            {
                "label": label.item(),
                "predicted": out.argmax().item(),
                "loss": F.cross_entropy(out, label).item(),
                "macs": count_macs(network, x).item(),
                "open": opened,
                "p": chances,
            }
        )
    for handle in handles:
        handle.remove()
    return {"rows": rows, "gates": list(gates)}


def shares(gates: list[list[bool]]) -> dict[str, float]:
    """Of decisions of shape (images, gates)."""
    array = np.array(gates)
    always_on, always_off = array.all(axis=0), ~array.any(axis=0)
    return {
        "always_on": always_on.mean(),
        "always_off": always_off.mean(),
        "conditional": (~always_on & ~always_off).mean(),
        "mean_open": array.mean(),
    }


def test_the_figures_are_what_a_count_gives(network: nn.Module, data: Data) -> None:
    found = evaluate(network, data, batch=16, extremes=5)
    assert json.loads(json.dumps(found)) == found
    plain = counted(network, data)
    rows, gates = plain["rows"], plain["gates"]

    def mean(rows: list[dict[str, Any]], what: str) -> float:
        return float(np.mean([row[what] for row in rows]))

    assert found["examples"] == IMAGES
    assert found["loss"] == pytest.approx(mean(rows, "loss"), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean([row["label"] == row["predicted"] for row in rows]))
    assert found["multiply_adds"] == pytest.approx(mean(rows, "macs"))
    spent = [row["macs"] for row in rows]
    assert found["quantiles"] == pytest.approx(np.quantile(spent, np.linspace(0, 1, 21)))

    assert [figures["name"] for figures in found["by_class"]] == list(CLASSES[:3])
    for index, figures in enumerate(found["by_class"]):
        of_class = [row for row in rows if row["label"] == index]
        assert figures["examples"] == len(of_class)
        assert figures["accuracy"] == pytest.approx(np.mean([row["predicted"] == index for row in of_class]))
        assert figures["multiply_adds"] == pytest.approx(mean(of_class, "macs"))
        expected = [
            np.mean([row["open"][name] for row in of_class], axis=0).round(4).tolist() for name in gates
        ]
        assert [pytest.approx(e, abs=1e-4) for e in expected] == figures["open"]

    assert [layer["name"] for layer in found["layers"]] == gates
    for layer in found["layers"]:
        name = layer["name"]
        assert layer["gates"] == len(rows[0]["open"][name])
        counts = shares([row["open"][name] for row in rows])
        assert {key: layer[key] for key in counts} == pytest.approx(counts)
        chances = np.array([row["p"][name] for row in rows])
        assert layer["histogram"] == np.histogram(chances, BINS, (0, 1))[0].tolist()
    if gates:
        every = shares([[is_open for name in gates for is_open in row["open"][name]] for row in rows])
        assert found["gates"] == pytest.approx(every)
        assert min(every.values()) > 0  # the test has gates of all kinds
    else:
        assert found["gates"] is None and found["cost"]["dense"] == found["multiply_adds"]


def test_the_cost_is_what_there_is_to_spend(data: Data) -> None:
    gated, ungated = made(data, True), made(data, False)
    cost = evaluate(gated, data)["cost"]
    assert cost["dense"] == evaluate(ungated, data)["cost"]["dense"]
    spent = evaluate(gated, data)["quantiles"]
    assert cost["fixed"] <= spent[0] < spent[-1] <= cost["dense"] + cost["gates"]


def test_the_images_that_spend_least_and_most_are_shown(data: Data) -> None:
    network = made(data, True)
    found = evaluate(network, data, extremes=5)
    rows = counted(network, data)["rows"]
    spent = sorted(row["macs"] for row in rows)
    for which, expected in (("least", spent[:5]), ("most", spent[::-1][:5])):
        assert [image["multiply_adds"] for image in found[which]] == pytest.approx(expected)
        for image in found[which]:
            row = rows[image["index"]]
            assert (image["label"], image["predicted"]) == (CLASSES[row["label"]], CLASSES[row["predicted"]])
            assert image["multiply_adds"] == pytest.approx(row["macs"])
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["png"]))))
            original = data.test.__getitems__([image["index"]])[0][0]
            np.testing.assert_array_equal(pixels, original.movedim(0, 2).numpy())
        assert len({image["index"] for image in found[which]}) == 5
    ungated = evaluate(made(data, False), data)
    assert ungated["least"] == ungated["most"] == []
    assert len(evaluate(network, data, extremes=100)["least"]) == IMAGES


def close(found: Any, expected: Any) -> None:
    """The same figures, but for how sums are rounded."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            close(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("batch", [1, 7, IMAGES, 1000])
def test_the_size_of_the_batches_does_not_matter(batch: int, network: nn.Module, data: Data) -> None:
    close(evaluate(network, data, batch=batch), evaluate(network, data, batch=16))


@pytest.mark.parametrize("ranks", [2, 3])
def test_evaluations_of_parts_add_up_to_that_of_all(ranks: int, network: nn.Module, data: Data) -> None:
    cost = MultiplyAdds.measure(network, torch.zeros(1, *data.shape))
    parts = []
    for rank in range(ranks):
        evaluation = Evaluation(network, cost, data.classes)
        for index in range(rank, IMAGES, ranks):
            images, labels = data.test.__getitems__([index])
            with torch.no_grad():
                evaluation.update(network, network(data.normalize(images)), labels)
        parts.append(evaluation)
    given: list[list[Tensor]] = []
    for part in parts:
        sums: list[Tensor] = []
        part.reduce(lambda tensor, sums=sums: sums.append(tensor) or tensor)  # type: ignore[misc]
        given.append(sums)
    assert len({len(sums) for sums in given}) == 1
    first = parts[0]
    totals = iter([sum(tensors[1:], tensors[0]) for tensors in zip(*given, strict=True)])
    first.reduce(lambda _: next(totals))
    expected = evaluate(network, data)
    close(first.summary(), {name: expected[name] for name in first.summary()})
    close(first.by_class(), expected["by_class"])


def test_batches_are_the_images_in_their_order(data: Data) -> None:
    for size in (1, 10, IMAGES, 50):
        parts = list(batches(data.test, size))
        images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        assert torch.equal(images, data.test.__getitems__(range(IMAGES))[0]) and len(labels) == IMAGES
        assert all(len(part[1]) == size for part in parts[:-1])


def test_an_evaluation_leaves_the_weights_as_they_are(network: nn.Module, data: Data) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluate(network, data)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
