"""A training starts from weights of the network without gates, wherever they are, and from no others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import batchshaping as bs
from batchshaping.cli import app
from batchshaping.gates import named_gates
from batchshaping.training.checkpoints import checksum, read_tensors, write_tensors
from batchshaping.training.config import RunConfig, read_config
from batchshaping.training.networks import network_settings
from batchshaping.training.run import RunError, load_run, resume, train
from batchshaping.training.start import LIBRARIES, Start

SHORT: dict[str, Any] = {"train_images": 64, "batch_size": 16, "epochs": 1, "logger": "none"}
FAMILIES: dict[str, dict[str, Any]] = {
    "channel gating": {"network": "resnet8", "width": 2, "hidden": 4},
    "mixed scale": {
        "network": "msvit-mini",
        **{"patch": 2, "embedding": 8, "depth": 1, "heads": 2, "scale_hidden": 4, "optimizer": "adamw"},
    },
}
# So small that all weights stay what they were, but for those that are 0.
STILL = {"learning_rate": 1e-30, "gate_learning_rate": 1e-30, "weight_decay": 0.0}


@pytest.fixture(scope="module", params=FAMILIES)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**SHORT, **FAMILIES[request.param]}


@pytest.fixture(scope="module")
def ungated(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without gates."""
    run = tmp_path_factory.mktemp("ungated") / "run"
    train(RunConfig(**settings, gated=False), run)
    return run


def weights_of(run: Path) -> dict[str, Tensor]:
    return read_tensors(run / "model.safetensors")[0]


def refused(*args: str) -> str:
    """The line with which a command ends."""
    result = CliRunner().invoke(app, ["train", *args])
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_a_gated_run_starts_from_an_ungated_one(
    settings: dict[str, Any], ungated: Path, tmp_path: Path
) -> None:
    result = train(RunConfig(**settings, **STILL, start=str(ungated)), tmp_path / "gated")
    network, data = load_run(tmp_path / "gated")
    reference, _ = load_run(ungated)
    assert named_gates(network) and result["gates"] is not None
    trained = network.vit if isinstance(network, bs.MSViT) else network
    for name, value in dict(reference.named_parameters()).items():
        torch.testing.assert_close(trained.get_parameter(name), value, rtol=0, atol=1e-20)
    # The gates are those that they would be without a start.
    random = train(RunConfig(**settings, **STILL), tmp_path / "random")
    fresh, _ = load_run(tmp_path / "random")
    for gate, other in zip(named_gates(network).values(), named_gates(fresh).values(), strict=True):
        for one, two in zip(gate.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-20)
    assert random["config"]["start"] is random["config"]["start_sha256"] is None
    assert result["config"]["start"] == str(ungated)
    assert result["config"]["start_sha256"] == checksum(weights_of(ungated))
    assert data.classes == tuple("0123456789")


def test_a_file_of_any_software_is_a_start(settings: dict[str, Any], ungated: Path, tmp_path: Path) -> None:
    save_file(weights_of(ungated), tmp_path / "weights.safetensors", metadata={"format": "pt"})
    config = RunConfig(**settings, start=str(tmp_path / "weights.safetensors"))
    of_file = train(config, tmp_path / "file")
    of_run = train(config.model_copy(update={"start": str(ungated)}), tmp_path / "run")
    assert of_file["config"]["start_sha256"] == of_run["config"]["start_sha256"]
    assert (of_file["loss"], of_file["history"]) == (of_run["loss"], of_run["history"])


def test_a_run_that_goes_on_does_not_read_the_start_again(
    settings: dict[str, Any], ungated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / "start"
    shutil.copytree(ungated, start)
    monkeypatch.chdir(tmp_path)
    config = RunConfig(**{**settings, "epochs": 2}, start="start")
    whole = train(config, Path("whole"))
    # The configuration of a run has an absolute path, and is that of the same run.
    repeated = read_config(Path("whole/config.yaml"))
    assert repeated.start == str(start) and repeated.start_sha256
    assert train(repeated, Path("repeated"))["history"] == whole["history"]

    interrupted = Path("interrupted")
    with monkeypatch.context() as patch:
        patch.setattr("batchshaping.training.trainer._WriteHistory.on_train_epoch_end", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config, interrupted)
    # Nothing was saved yet: the start is needed, and must be the same.
    assert not (interrupted / "checkpoint.safetensors").exists()
    other = {name: value + 1 for name, value in weights_of(start).items()}
    write_tensors(other, start / "model.safetensors")
    with pytest.raises(ValueError, match=r"^start must have weights of the checksum [0-9a-f]{64}, received"):
        resume(interrupted)
    with pytest.raises(ValueError, match="checksum"):
        train(repeated, Path("again"))
    assert not Path("again").exists()
    # It may be somewhere else now.
    assert resume(interrupted, start=str(ungated))["history"] == whole["history"]

    shutil.rmtree(start)
    shutil.copytree("whole", "saved")
    for name in ("result.json", "model.safetensors"):
        (Path("saved") / name).unlink()
    assert resume(Path("saved"))["history"] == whole["history"]
    with pytest.raises(RunError, match="start_sha256 must be what the run began with"):
        resume(Path("whole"), start_sha256="0" * 64)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_weights_that_do_not_fit_are_refused_with_both_sides(
    settings: dict[str, Any], ungated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    weights = weights_of(ungated)
    first, *rest = weights
    renamed = {f"module.{name}": value for name, value in weights.items()}
    wider = {**weights, first: torch.zeros(*weights[first].shape, 2)}
    for given, line in [
        ({name: weights[name] for name in rest}, f"received FILE without {first}\n"),
        ({**weights, "more": torch.zeros(1)}, "received FILE with more\n"),
        (renamed, f" and {len(rest)} more and with module."),
        (
            wider,
            f"start must have {first} of shape {tuple(weights[first].shape)}, "
            f"received {tuple(wider[first].shape)} in FILE\n",
        ),
    ]:
        save_file(given, "weights.safetensors")
        error = refused(*options, "--start", "weights.safetensors")
        assert line.replace("FILE", "weights.safetensors") in error, error
        assert not Path("outputs").exists()


def test_what_has_no_weights_is_refused(
    ungated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pickled.pth").write_bytes(b"\x80\x04N.")
    Path("empty").mkdir()
    changed = bytearray((ungated / "model.safetensors").read_bytes())
    changed[-1] ^= 1
    Path("changed.safetensors").write_bytes(changed)
    for start, line in [
        ("missing", "start: missing: no such file; weights of a library are torchvision:NAME or timm:NAME"),
        ("empty", "start: empty/model.safetensors: no such file; the run is not finished"),
        ("pickled.pth", "start: pickled.pth: expected a safetensors file"),
        ("changed.safetensors", "start: changed.safetensors: expected the checksum"),
        ("timm:resnet8", "start: timm gave no weights of 'resnet8': Unknown model (resnet8)"),
        ("torchvision:resnet8", "start: torchvision gave no weights of 'resnet8': Unknown model resnet8"),
    ]:
        assert line in refused("--start", start)
    assert not Path("outputs").exists()


# Weights of libraries, without a connection


def downloaded(network: nn.Module, monkeypatch: pytest.MonkeyPatch, library: str) -> dict[str, Tensor]:
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    asked = []

    def load(name: str) -> dict[str, Tensor]:
        asked.append(name)
        return weights

    monkeypatch.setitem(LIBRARIES, library, load)
    return weights


def started(classes: int, shape: tuple[int, int, int], **settings: Any) -> nn.Module:
    config = RunConfig(**settings)
    torch.manual_seed(1)
    return config.network.build(classes, shape, Start.of(config))


@pytest.mark.parametrize("asked", [{"start": "torchvision:resnet18"}, {"pretrained": True}])
def test_a_resnet_starts_from_torchvision(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    library = torchvision.models.resnet18().eval()
    weights = downloaded(library, monkeypatch, "torchvision")
    images = torch.randn(2, 3, 64, 64)
    network = started(1000, (3, 64, 64), network="resnet18", **asked).eval()
    with torch.no_grad(), bs.gates_forced(network, share=1.0):
        assert torch.equal(network(images), library(images))
    # Other classes have a new last layer; all others are the library's.
    network = started(10, (3, 64, 64), network="resnet18", **asked)
    found = network.state_dict()
    assert found["fc.weight"].shape == (10, 512)
    assert all(torch.equal(found[n], w) for n, w in weights.items() if not n.startswith("fc."))
    grey = started(1000, (1, 64, 64), network="resnet18", gated=False, **asked).eval()
    with torch.no_grad():
        torch.testing.assert_close(grey(images[:, :1]), library(images[:, :1].expand(-1, 3, -1, -1)))
    five = started(1000, (5, 64, 64), network="resnet18", **asked).state_dict()
    assert five["conv1.weight"].shape == (64, 5, 7, 7)
    assert torch.equal(five["layer1.0.conv1.weight"], weights["layer1.0.conv1.weight"])


@pytest.mark.parametrize("asked", [{"start": "timm:vit_tiny_patch16_224"}, {"pretrained": True}])
def test_a_vit_starts_from_timm(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    library = timm.create_model("vit_tiny_patch16_224").eval()
    weights = downloaded(library, monkeypatch, "timm")
    network = started(1000, (3, 224, 224), network="msvit-tiny16", **asked).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad(), bs.gates_forced(network, share=1.0):
        assert torch.equal(bs.conditional_inference(network)(images), library(images))
    # Images of another size and other classes.
    network = started(10, (3, 96, 64), network="msvit-tiny16", **asked)
    found = network.vit.state_dict()
    assert found["pos_embed"].shape == (1, 1 + 6 * 4, 192) and found["head.weight"].shape == (10, 192)
    assert torch.equal(found["pos_embed"][:, :1], weights["pos_embed"][:, :1])
    assert torch.equal(found["blocks.3.mlp.fc1.weight"], weights["blocks.3.mlp.fc1.weight"])


def test_the_network_of_a_library_must_be_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    downloaded(torchvision.models.vit_b_16(num_classes=10), monkeypatch, "torchvision")
    with pytest.raises(ValueError, match="received torchvision:vit_b_16 without cls_token and "):
        started(1000, (3, 224, 224), network="msvit-tiny16", start="torchvision:vit_b_16")
    # timm's ResNets have torchvision's names.
    downloaded(timm.create_model("resnet34"), monkeypatch, "timm")
    started(1000, (3, 64, 64), network="resnet34", start="timm:resnet34")
    with pytest.raises(ValueError, match=r"layer1.2.conv1.weight and \d+ more"):
        started(1000, (3, 64, 64), network="resnet18", start="timm:resnet34")


def test_what_the_libraries_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tensors are read, from what is downloaded; no pickled objects."""
    network = torchvision.models.resnet18()

    def load(url: str, **options: Any) -> dict[str, Tensor]:
        assert "resnet18" in url and options["weights_only"] and options["check_hash"]
        return network.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    assert LIBRARIES["torchvision"]("resnet18").keys() == network.state_dict().keys()
    vit = timm.create_model("vit_tiny_patch16_224")

    def create(name: str, pretrained: bool) -> nn.Module:
        assert name == "vit_tiny_patch16_224" and pretrained
        return vit

    monkeypatch.setattr(timm, "create_model", create)
    assert LIBRARIES["timm"]("vit_tiny_patch16_224").keys() == vit.state_dict().keys()


def test_a_network_has_no_weights_of_a_library_unless_asked() -> None:
    assert network_settings(network="resnet18").library_weights is None
    assert network_settings(network="msvit-tiny16", pretrained=True).library_weights == (
        "timm:vit_tiny_patch16_224"
    )
