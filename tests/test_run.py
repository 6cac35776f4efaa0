"""A run repeats to the bit, survives any interruption, and runs no code of the files that it reads."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from batchshaping.training.checkpoints import read_checkpoint
from batchshaping.training.config import RunConfig
from batchshaping.training.run import RunError, evaluate_run, read_result, resume, train

# Long enough to be interrupted in the middle: about a sixth of a second an epoch.
CONFIG = RunConfig(
    width=2,
    hidden=4,
    train_images=128,
    batch_size=32,
    epochs=16,
    budget=0.0,
    penalized="open-gates",
    log_every=1,
)
SHORT = CONFIG.model_copy(update={"epochs": 2})
ONCE = CONFIG.model_copy(update={"epochs": 1})
FILES = {"config.yaml", "history.json", "checkpoint.safetensors", "model.safetensors", "result.json", "logs"}
COMMAND = shutil.which("batchshaping", path=sysconfig.get_path("scripts")) or "batchshaping"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    """Sums in one order, here and in the processes that are started."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(CONFIG, folder)
    return folder


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A short one that a test may harm."""
    train(SHORT, tmp_path / "finished")
    return tmp_path / "finished"


def facts(result: dict[str, Any]) -> dict[str, Any]:
    """All of a result but how long it took."""
    return {name: value for name, value in result.items() if name != "seconds"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_leaves_its_files_and_its_result(undisturbed: Path) -> None:
    assert {path.name for path in undisturbed.iterdir()} == FILES
    result = json.loads((undisturbed / "result.json").read_text())
    assert RunConfig(**result["config"]) == CONFIG
    assert yaml.safe_load((undisturbed / "config.yaml").read_text()) == result["config"]
    assert json.loads((undisturbed / "history.json").read_text()) == result["history"]
    assert [epoch["epoch"] for epoch in result["history"]] == list(range(1, 17))
    assert {len(layer["histogram"]) for layer in result["layers"]} == {20}
    last = result["history"][-1]
    assert (last["shaping"], last["penalty"], last["noise"]) == (0.0, CONFIG.penalty, 0.0)
    # What the last epoch's evaluation saw is the network that was kept.
    for name in ("examples", "accuracy", "gates"):
        assert last[name] == result[name], name
    assert last["loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_the_training_of_a_run_learns(undisturbed: Path) -> None:
    losses = [epoch["loss"] for epoch in read_result(undisturbed)["history"]]
    assert losses[-1] < losses[0]


def test_a_seed_decides_everything(tmp_path: Path) -> None:
    first = facts(train(SHORT, tmp_path / "first"))
    torch.manual_seed(17)
    assert facts(train(SHORT, tmp_path / "again")) == first
    assert first == facts(read_result(tmp_path / "first")) == facts(read_result(tmp_path / "again"))
    weights, again = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    other = train(SHORT.model_copy(update={"seed": 1}), tmp_path / "other")
    assert other["loss"] != first["loss"]


# Interruptions


def interrupt_with(which: signal.Signals, folder: Path) -> tuple[int, str]:
    """Send a signal to the command in the middle of its training: its exit code and the end of its stderr."""
    settings = [
        text
        for name, value in CONFIG.model_dump(mode="json", exclude_defaults=True).items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    process = subprocess.Popen(
        [COMMAND, "train", *settings, "--output", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell without job control lets what it starts in the background ignore this signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    history = folder / "history.json"
    try:
        while process.poll() is None and not (history.exists() and len(json.loads(history.read_text())) > 1):
            time.sleep(0.01)
        time.sleep(0.05)
        process.send_signal(which)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, stderr


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_goes_on_to_the_result_it_would_have_had(
    which: signal.Signals, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "interrupted"
    code, stderr = interrupt_with(which, folder)
    assert not (folder / "result.json").exists()
    assert 2 <= len(json.loads((folder / "history.json").read_text())) < CONFIG.epochs
    expected = facts(read_result(undisturbed))
    assert facts(resume(folder)) == expected
    assert facts(read_result(folder)) == expected
    assert {path.name for path in folder.iterdir()} == FILES
    if which == signal.SIGINT:
        assert code == 130
        assert stderr.splitlines()[-1] == f"interrupted; to go on: batchshaping train --resume {folder}"


def test_a_run_that_did_not_get_through_its_first_epoch_starts_again(tmp_path: Path) -> None:
    expected = facts(train(SHORT, tmp_path / "whole"))
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_bytes((tmp_path / "whole" / "config.yaml").read_bytes())
    assert facts(resume(begun)) == expected


def test_a_run_that_was_trained_but_not_evaluated_gets_its_result(finished: Path) -> None:
    expected = facts(read_result(finished))
    (finished / "result.json").unlink()
    assert facts(resume(finished)) == expected


def test_to_resume_a_finished_run_changes_nothing(finished: Path) -> None:
    before, result = content(finished), read_result(finished)
    assert resume(finished) == result
    assert content(finished) == before


# What is refused


def refused(action: Any, *arguments: Any, **settings: Any) -> str:
    """The one line with which something is refused."""
    with pytest.raises(RunError) as error:
        action(*arguments, **settings)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_folder_that_holds_a_run_is_not_trained_into(finished: Path) -> None:
    before = content(finished)
    assert f"{finished} already holds a run" in refused(train, SHORT, finished)
    assert content(finished) == before


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        assert refused(train, SHORT, folder).startswith(f"{folder}: ")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for action in (resume, evaluate_run):
        assert refused(action, tmp_path).startswith(f"{tmp_path}: expected the folder of a run")
    assert "result.json: No such file" in refused(read_result, tmp_path)


@pytest.mark.parametrize("harm", ["truncated", "foreign", "pickle", "empty"])
@pytest.mark.parametrize(
    ("name", "action"), [("checkpoint.safetensors", resume), ("model.safetensors", evaluate_run)]
)
def test_harmed_files_are_refused_and_no_code_in_them_is_run(
    name: str, action: Any, harm: str, finished: Path
) -> None:
    path = finished / name
    (finished / "result.json").unlink()
    made = finished / "made"
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "foreign":
        save_file({"fc.weight": torch.zeros(3)}, path)
    elif harm == "pickle":
        path.write_bytes(pickle.dumps(Touch(made)))
    else:
        path.write_bytes(b"")
    before = content(finished)
    assert refused(action, finished).startswith(f"{path}: expected ")
    assert content(finished) == before and not made.exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"accuracy": 1}', "spam", "\0"])
def test_what_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    assert refused(read_result, tmp_path).startswith(f"{tmp_path}/result.json: expected the result of a run")


def test_a_configuration_that_was_harmed_is_refused_with_its_name(finished: Path) -> None:
    (finished / "config.yaml").write_text("network: resnet9\n")
    with pytest.raises(ValueError, match=r"config\.yaml: network must be one of .* 'resnet9'$"):
        resume(finished)


# Files are read, not run


def test_nothing_is_unpickled(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finished / "result.json").unlink()
    history = read_checkpoint(finished / "checkpoint.safetensors")["history"]

    def unpickle(*_: object, **__: object) -> NoReturn:
        raise AssertionError("unpickled")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, unpickle)
    assert resume(finished)["history"] == history
    evaluate_run(finished)


def test_the_weights_give_the_figures_of_the_result(finished: Path) -> None:
    result = read_result(finished)
    before = content(finished)
    figures = evaluate_run(finished)
    assert figures == {name: result[name] for name in figures}
    assert content(finished) == before


def test_an_ungated_run_has_no_figures_of_gates(tmp_path: Path) -> None:
    config = SHORT.model_copy(update={"gated": False, "epochs": 1})
    result = train(config, tmp_path / "ungated")
    assert result["gates"] is None and result["layers"] == result["least"] == result["most"] == []
    assert result["multiply_adds"] == result["cost"]["dense"] == result["cost"]["fixed"]
    assert evaluate_run(tmp_path / "ungated") == {
        name: result[name] for name in evaluate_run(tmp_path / "ungated")
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "64"},
        {"precision": "bf16-mixed"},
        {"accumulate": 2},
        {"schedule": "cosine", "penalized": "multiply-adds"},
        {"network": "resnet14", "logger": "none", "augment": False, "evaluate_every": 2},
    ],
)
def test_every_kind_of_run_repeats_and_can_be_evaluated(settings: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig(**{**CONFIG.model_dump(), "epochs": 2, **settings})
    result = train(config, tmp_path / "run")
    assert all(torch.isfinite(torch.tensor(epoch["loss"])) for epoch in result["history"])
    figures = evaluate_run(tmp_path / "run")
    assert figures["accuracy"] == result["accuracy"] and figures["gates"] == result["gates"]
    assert figures["loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_a_run_goes_on_with_its_own_settings_only(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(ONCE, run)
    path = run / "config.yaml"
    kept = path.read_text()
    path.write_text(kept.replace("epochs: 1", "epochs: 2"))
    with pytest.raises(RunError, match=r"config\.yaml: epochs must be what the run began with"):
        resume(run)
    (run / "result.json").unlink()
    with pytest.raises(RunError, match=r"config\.yaml: epochs must be what the run began with"):
        resume(run)
    path.write_text(kept.replace("logger: csv", "logger: none"))
    assert resume(run)["config"]["logger"] == "none"


def test_a_loss_that_is_not_finite_ends_the_run_with_a_line(tmp_path: Path) -> None:
    for gated in (True, False):
        with pytest.raises(ValueError, match=r"learning_rate: the loss became .* in epoch 1"):
            train(ONCE.model_copy(update={"learning_rate": 1e30, "gated": gated}), tmp_path / f"{gated}")


def test_a_disk_that_is_full_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="run: No space left on device; the run can be resumed"):
        train(ONCE, tmp_path / "run")
    monkeypatch.undo()
    assert resume(tmp_path / "run")["accuracy"] > 0
