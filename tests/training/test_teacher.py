"""A teacher: its losses by their formula, which network it is, and that it changes nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from batchshaping.cli import app
from batchshaping.training.checkpoints import checksum, read_tensors
from batchshaping.training.config import RunConfig
from batchshaping.training.data import load_data
from batchshaping.training.module import DataModule, GatedClassifier
from batchshaping.training.networks import network_settings
from batchshaping.training.run import RunError, make_classifier, resume, train
from batchshaping.training.sections import DataSettings, TeacherSettings
from batchshaping.training.start import Start
from batchshaping.training.teacher import Teacher

SHORT: dict[str, Any] = {"train_images": 64, "batch_size": 16, "epochs": 2, "logger": "none"}
SMALL = {"network": "resnet8", "width": 2, "hidden": 4}
VIT: dict[str, Any] = {
    **{"network": "msvit-mini", "patch": 2, "embedding": 8, "depth": 1, "heads": 2, "scale_hidden": 4},
    "optimizer": "adamw",
}


@pytest.fixture(scope="module", params=[SMALL, VIT], ids=["channel gating", "mixed scale"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**SHORT, **request.param}


@pytest.fixture(scope="module")
def ungated(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without gates."""
    run = tmp_path_factory.mktemp("ungated") / "run"
    train(RunConfig(**settings, gated=False), run)
    return run


def teacher(**settings: Any) -> Teacher:
    torch.manual_seed(0)
    section = network_settings(**SMALL, gated=False)
    return Teacher(section.build(10, (1, 8, 8)), section, TeacherSettings(**settings))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_losses_are_those_of_hinton(temperature: float) -> None:
    weight = 0.3
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 10, generator=generator, dtype=torch.double).requires_grad_()
    taught = torch.randn(6, 10, generator=generator, dtype=torch.double)
    labels = torch.arange(6)
    losses = teacher(teacher_weight=weight, teacher_temperature=temperature).losses(logits, labels, taught)
    expected = (
        weight * temperature**2 * F.cross_entropy(logits / temperature, (taught / temperature).softmax(1))
    )
    # The entropy of the teacher, which does not depend on what learns, is not a part of the loss.
    softened = torch.distributions.Categorical(logits=taught / temperature)
    entropy = weight * temperature**2 * softened.entropy().mean()
    torch.testing.assert_close(losses["distillation"].double(), expected - entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["cross_entropy"], (1 - weight) * F.cross_entropy(logits, labels))
    [gradient] = torch.autograd.grad(losses["distillation"], logits)
    [wanted] = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_a_gated_run_is_taught_by_what_it_starts_from(
    settings: dict[str, Any], ungated: Path, tmp_path: Path
) -> None:
    result = train(RunConfig(**settings, start=str(ungated)), tmp_path / "taught")
    weights, _ = read_tensors(ungated / "model.safetensors")
    assert result["config"]["teacher_sha256"] == checksum(weights)
    assert checksum(read_tensors(tmp_path / "taught" / "teacher.safetensors")[0]) == checksum(weights)
    assert 0 <= result["teacher"]["accuracy"] <= 1
    assert result["teacher"]["multiply_adds"] == result["reference"]["multiply_adds"]
    named = train(RunConfig(**settings, start=str(ungated), teacher=str(ungated)), tmp_path / "named")
    assert named["history"] == result["history"]
    alone = train(RunConfig(**settings, start=str(ungated), teacher=None), tmp_path / "alone")
    assert alone["teacher"] is alone["config"]["teacher_sha256"] is None
    assert not (tmp_path / "alone" / "teacher.safetensors").exists()
    assert alone["history"] != result["history"]


def test_without_a_start_or_without_gates_nothing_is_taught(settings: dict[str, Any], ungated: Path) -> None:
    data = load_data(RunConfig(**settings).data)
    start = Start.of(RunConfig(**settings, start=str(ungated)))
    assert start is not None
    assert Teacher.of(RunConfig(**settings), data, None) is None
    assert Teacher.of(RunConfig(**settings, gated=False, start=str(ungated)), data, start) is None
    # A layer that stays new can teach nothing.
    _, *others = start.weights
    part = Start(start.source, {name: start.weights[name] for name in others})
    assert Teacher.of(RunConfig(**settings, start=str(ungated)), data, part) is None


def test_a_network_of_another_width_is_taught(
    ungated: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    other = {"width": 3} if settings["network"] == "resnet8" else {"embedding": 4}
    config = RunConfig(**{**settings, **other}, gated=False, teacher=str(ungated))
    result = train(config, tmp_path / "student")
    assert result["teacher"] is not None and result["gates"] is None


def test_a_run_goes_on_with_the_teacher_that_it_began_with(
    ungated: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(ungated, source)
    config = RunConfig(**settings, start=str(source))
    whole = train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("batchshaping.training.run.recalibrate", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "interrupted")
    shutil.rmtree(source)
    resumed = resume(tmp_path / "interrupted")
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}

    with monkeypatch.context() as patch:
        patch.setattr("batchshaping.training.run.recalibrate", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config.model_copy(update={"start": str(ungated)}), tmp_path / "changed")
    kept = tmp_path / "changed" / "teacher.safetensors"
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    with pytest.raises(RunError, match=r"teacher.safetensors: expected the teacher that the run began with"):
        resume(tmp_path / "changed")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("augment", [True, False])
def test_outputs_are_computed_once_for_images_that_stay_the_same(
    augment: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(RunConfig(**SHORT, **SMALL, gated=False), run)
    counted: list[int] = []
    logits = Teacher.logits

    def counting(self: Teacher, images: Tensor) -> Tensor:
        counted.append(len(images))
        return logits(self, images)

    monkeypatch.setattr(Teacher, "logits", counting)
    train(RunConfig(**SHORT, **SMALL, start=str(run), augment=augment), tmp_path / "taught")
    epochs, images = SHORT["epochs"], SHORT["train_images"]
    assert sum(counted) == (epochs if augment else 1) * images


def test_outputs_that_were_computed_before_give_the_same_losses() -> None:
    settings = DataSettings(data="digits", train_images=64, augment=False)
    data = load_data(settings)
    taught = teacher()
    precision = torch.autocast("cpu", enabled=False)
    images = taught.images(data.train, data, 16, precision)
    chosen = [5, 2, 60]
    pictures, labels, logits = images.__getitems__(chosen)
    torch.testing.assert_close(logits, taught.logits(data.normalize(pictures)))
    assert labels.tolist() == data.train.__getitems__(chosen)[1].tolist()


def test_the_teacher_is_frozen_and_no_part_of_a_checkpoint(ungated: Path, settings: dict[str, Any]) -> None:
    config = RunConfig(**settings, start=str(ungated))
    data = load_data(config.data)
    start = Start.of(config)
    module: GatedClassifier = make_classifier(config, data, start, Teacher.of(config, data, start))
    assert module.teacher is not None
    assert not any(parameter.requires_grad for parameter in module.teacher.network.parameters())
    assert not any("teacher" in name for name in module.state_dict())
    module.train()
    assert not module.teacher.network.training
    assert DataModule(data, config.data, 16, 0).teacher is None


def test_what_is_no_teacher_is_refused_in_a_line(tmp_path: Path, ungated: Path) -> None:
    def refused(*options: str) -> str:
        result = CliRunner().invoke(app, ["train", "--output", str(tmp_path / "run"), *options])
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
        return result.stderr

    assert "missing: expected the folder of a run" in refused("--teacher", "missing")
    shutil.copytree(ungated, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut off")
    assert "model.safetensors: expected the weights" in refused("--teacher", str(tmp_path / "cut"))
    wrong = refused("--teacher", str(ungated), "--teacher-sha256", "0" * 64)
    assert f"teacher must have weights of the checksum {'0' * 64}, received {ungated}" in wrong
    assert "teacher_sha256 needs a teacher, received none" in refused(
        "--teacher", "none", "--teacher-sha256", "0" * 64
    )
    assert not (tmp_path / "run").exists()
