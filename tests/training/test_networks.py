"""A family of networks is one file, whose networks are trained and evaluated like all others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import batchshaping
from batchshaping.training.networks import FAMILIES, NETWORKS, Network, network_settings
from batchshaping.training.networks.gated_resnet import GatedResNet

PERCEPTRON = '''
"""Networks with one hidden layer."""

from typing import Annotated

from pydantic import Field
from torch import nn

from batchshaping.training.networks.network import Network


class Perceptron(Network):
    kind = "perceptron"
    names = ("perceptron",)

    neurons: Annotated[int, Field(ge=1)] = 8
    """Number of hidden neurons."""
    gated: bool = True
    """Whether gates would be there."""

    def ungated(self, classes, shape):
        channels, height, width = shape
        hidden = nn.Linear(channels * height * width, self.neurons)
        return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(self.neurons, classes))

    def with_gates(self, network):
        return network

    @property
    def reference(self):
        return f"perceptron of {self.neurons} neurons"
'''


COMMANDS = """
import json, sys
from typer.testing import CliRunner
from batchshaping.cli import app

done = [CliRunner().invoke(app, arguments) for arguments in json.loads(sys.argv[1])]
print(json.dumps([(each.exit_code, each.stdout, each.stderr) for each in done]))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and one more family in it."""
    folder = tmp_path_factory.mktemp("package")
    root = Path(batchshaping.__file__).parent
    shutil.copytree(root, folder / "batchshaping", ignore=shutil.ignore_patterns("__pycache__"))
    # First in the alphabet, but no family of the default network.
    (folder / "batchshaping/training/networks/a_family.py").write_text(PERCEPTRON, encoding="utf-8")
    (folder / "commands.py").write_text(COMMANDS, encoding="utf-8")
    return folder


class Done(NamedTuple):
    """What came of a command."""

    code: int
    stdout: str
    stderr: str


def commands(package: Path, *each: list[str]) -> list[Done]:
    """What comes of commands, one after the other in one process."""
    process = subprocess.run(
        [sys.executable, "commands.py", json.dumps(each)],
        cwd=package,
        env={**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return [Done(*fields) for fields in json.loads(process.stdout)]


def test_a_family_is_one_file(package: Path) -> None:
    run = package / "outputs/train"
    settings = ["--network", "perceptron", "--neurons", "5", "--epochs", "2", "--logger", "none"]
    trained, resumed, evaluated = commands(
        package, ["train", *settings], ["train", "--resume", str(run)], ["evaluate", str(run), "--json"]
    )
    assert trained.code == 0, trained.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["kind"] == "perceptron"
    assert result["reference"] == {"name": "perceptron of 5 neurons", "multiply_adds": 64 * 5 + 5 * 10}
    assert result["config"].items() >= {"network": "perceptron", "neurons": 5}.items()
    assert "width" not in result["config"]
    assert "was finished before" in resumed.stdout
    assert json.loads(evaluated.stdout)["accuracy"] == result["accuracy"]


def test_settings_of_a_family_are_options_and_belong_to_its_networks_only(package: Path) -> None:
    lines = {
        ("--network", "perceptron", "--width", "8"): "width is not a setting of perceptron",
        ("--neurons", "8"): "neurons is not a setting of resnet8",
        ("--network", "perceptron", "--neurons", "0"): "neurons: input should be greater than or equal to 1",
        ("--network", "resnet9"): "network must be one of resnet8, ",
    }
    each = [["train", *settings] for settings in (("--help",), *lines)]
    (_, help, _), *refused = commands(package, *each)
    assert "Number of hidden neurons. [default: 8]" in help
    # The default network is still the same, and a setting of two families has both descriptions.
    text = " ".join(help.replace("│", " ").split())
    assert "[default: resnet8]" in text
    assert "Whether the network has gates. Whether gates would be there. " in text
    for done, line in zip(refused, lines.values(), strict=True):
        assert done.code == 2 and done.stdout == ""
        assert done.stderr.startswith(f"batchshaping: {line}") and done.stderr.count("\n") == 1


def test_families_have_networks_of_their_own_and_one_has_the_default() -> None:
    names = [name for family in FAMILIES for name in family.names]
    assert len(set(names)) == len(names) and tuple(names) == NETWORKS
    assert [not family.settings()["network"].is_required() for family in FAMILIES].count(True) == 1
    assert network_settings() == GatedResNet(network="resnet8")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_of_a_family_gives_logits_of_images(family: type[Network]) -> None:
    settings = family(network=family.names[0])
    network = settings.build(classes=7, shape=(3, 32, 32))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert family.kind and settings.reference
    assert network_settings(**settings.model_dump()) == settings


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({"network": "resnet8"}, "ResNet-8, width 16, ungated"),
        ({"network": "resnet20", "width": 4, "stem_stride": 2}, "ResNet-20, width 4, stem stride 2, ungated"),
        ({"inner": 0.25}, "ResNet-8, width 16, 25% of the inner channels, ungated"),
        ({"network": "resnet50", "gated": False}, "ResNet-50, ungated"),
    ],
)
def test_the_reference_of_a_resnet_tells_what_its_size_depends_on(
    settings: dict[str, object], reference: str
) -> None:
    assert network_settings(**settings).reference == reference
