"""A run repeats to the bit, survives any interruption, and runs no code of the files that it reads."""

from __future__ import annotations

import csv
import json
import os
import pickle
import random
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from batchshaping.storage.files import only_writer
from batchshaping.training.checkpoints import read_checkpoint, write_checkpoint
from batchshaping.training.config import MAY_CHANGE, RunConfig
from batchshaping.training.data import DataError, load_data
from batchshaping.training.run import (
    RunError,
    evaluate_run,
    make_data_module,
    read_result,
    resume,
    train,
)

# Long enough to be interrupted in the middle, some seconds in all.
CONFIG = RunConfig(
    width=2,
    hidden=4,
    train_images=128,
    batch_size=32,
    epochs=20,
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


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short finished run."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    train(SHORT, folder)
    return folder


@pytest.fixture
def finished(short: Path, tmp_path: Path) -> Path:
    """A short finished run that a test may change."""
    return Path(shutil.copytree(short, tmp_path / "finished"))


def facts(result: dict[str, Any]) -> dict[str, Any]:
    """All of a result but how long it took."""
    return {name: value for name, value in result.items() if name != "seconds"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_leaves_its_files_and_its_result(undisturbed: Path) -> None:
    assert {path.name for path in undisturbed.iterdir()} == FILES
    result = json.loads((undisturbed / "result.json").read_text())
    assert RunConfig(**result["config"]) == CONFIG
    assert result.keys() == {*read_result(undisturbed), "sha256"}
    assert yaml.safe_load((undisturbed / "config.yaml").read_text()) == result["config"]
    assert json.loads((undisturbed / "history.json").read_text()) == result["history"]
    assert [epoch["epoch"] for epoch in result["history"]] == list(range(1, 21))
    assert {len(layer["histogram"]) for layer in result["layers"]} == {20}
    last = result["history"][-1]
    assert (last["shaping"], last["penalty"], last["noise"]) == (0.0, CONFIG.penalty, 0.0)


def test_what_the_last_epoch_saw_is_the_network_that_is_kept(short: Path, tmp_path: Path) -> None:
    result = train(SHORT.model_copy(update={"recalibrate": False}), tmp_path / "run")
    last = result["history"][-1]
    for name in ("examples", "accuracy", "gates"):
        assert last[name] == result[name], name
    assert last["loss"] == pytest.approx(result["loss"], rel=1e-5)
    # Recalibration comes after it, and changes the result alone.
    recalibrated = read_result(short)
    assert recalibrated["history"] == result["history"] and recalibrated["loss"] != result["loss"]


def test_channels_in_the_last_dimension_differ_by_rounding_alone(tmp_path: Path) -> None:
    short = {"train_images": 96, "batch_size": 32, "epochs": 2, "precision": "64", "logger": "none"}
    plain, last = (
        train(RunConfig(width=8, channels_last=last, **short), tmp_path / str(last)) for last in (False, True)
    )
    assert last["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert last["gates"] == plain["gates"]
    with pytest.raises(ValueError, match=r"channels_last needs other than 4 channels in .*downsample"):
        train(RunConfig(width=4, channels_last=True), tmp_path / "refused")


def test_a_result_says_its_kind_and_its_reference(undisturbed: Path, tmp_path: Path) -> None:
    result = read_result(undisturbed)
    assert result["kind"] == "channel gating"
    ungated = train(ONCE.model_copy(update={"gated": False}), tmp_path / "ungated")
    for each in (result, ungated):
        assert each["reference"] == {
            "name": "ResNet-8, width 2, ungated",
            "multiply_adds": ungated["multiply_adds"],
        }


@pytest.mark.parametrize("log_every", [1, 3])
def test_the_log_has_an_entry_every_so_many_steps(log_every: int, tmp_path: Path) -> None:
    train(SHORT.model_copy(update={"log_every": log_every}), tmp_path / "run")
    with (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["loss"]]
    assert steps == [*range(log_every - 1, 8, log_every)]


def test_more_images_in_a_batch_than_there_are_are_refused() -> None:
    config = RunConfig(train_images=100, batch_size=100)
    assert make_data_module(config, load_data(config.data)).batch_size == 100
    line = "batch_size must be at most the number of training images, 100, received 101"
    config = RunConfig(train_images=100, batch_size=101)
    with pytest.raises(DataError, match=rf"\A{line}\Z"):
        make_data_module(config, load_data(config.data))


def test_the_training_of_a_run_learns(undisturbed: Path) -> None:
    losses = [epoch["loss"] for epoch in read_result(undisturbed)["history"]]
    assert losses[-1] < losses[0]


def test_a_seed_decides_everything(short: Path, tmp_path: Path) -> None:
    first = facts(read_result(short))
    torch.manual_seed(17)
    assert facts(train(SHORT, tmp_path / "again")) == first
    assert first == facts(read_result(tmp_path / "again"))
    weights, again = (load_file(folder / "model.safetensors") for folder in (short, tmp_path / "again"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    other = train(SHORT.model_copy(update={"seed": 1}), tmp_path / "other")
    assert other["loss"] != first["loss"]


# Interruptions


def options(config: RunConfig, **settings: Any) -> list[str]:
    """A configuration on the command line."""
    given = {**config.model_dump(mode="json", exclude_defaults=True), **settings}
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def interrupt_with(which: signal.Signals, folder: Path) -> tuple[int, str]:
    """Send a signal to the command in the middle of its training: its exit code and the end of its stderr."""
    process = subprocess.Popen(
        [COMMAND, "train", *options(CONFIG), "--output", str(folder)],
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


@pytest.mark.signals
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


@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "adamw"}, {"optimizer": "adamw", "hyperprior": (3, 7)}]
)
def test_every_optimizer_goes_on_where_it_was(settings: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig(**{**SHORT.model_dump(), **settings})
    expected = train(config, tmp_path / "undisturbed")
    train_one_epoch(config, tmp_path / "begun")
    assert facts(resume(tmp_path / "begun")) == facts(expected)


def test_a_run_that_did_not_get_through_its_first_epoch_starts_again(short: Path, tmp_path: Path) -> None:
    expected = facts(read_result(short))
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_bytes((short / "config.yaml").read_bytes())
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("network: resnet9\n", r"network must be one of .* 'resnet9'$"),
        (
            "network: resnet8\n",
            r"expected every setting of the run, received none of width, stem_stride, .*$",
        ),
        ("", r"expected every setting of the run, received none of network, width, .*$"),
        ("# sha256 of the settings below: ", r"expected the settings as the run wrote them, .*$"),
        ("\0" * 900, r"expected a YAML file, received something else$"),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_configuration_that_was_harmed_is_refused_with_its_name(
    text: str, message: str, finished: Path
) -> None:
    (finished / "result.json").unlink()
    (finished / "config.yaml").write_text(text)
    before = content(finished)
    for action in (resume, evaluate_run):
        with pytest.raises(ValueError, match=rf"\A[^\n]*config\.yaml: {message}"):
            action(finished)
    assert content(finished) == before


# Changed bits


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "config.yaml", "model.safetensors"])
def test_a_bit_that_changes_never_gives_another_result(name: str, begun: Path, tmp_path: Path) -> None:
    bits = random.Random(name).sample(range(8 * (begun / name).stat().st_size), 12)
    for bit in bits:
        run = tmp_path / f"run{bit}"
        shutil.copytree(begun, run)
        changed = bytearray((run / name).read_bytes())
        changed[bit // 8] ^= 1 << bit % 8
        (run / name).write_bytes(changed)
        before = content(run)
        action = evaluate_run if name == "model.safetensors" else resume
        with pytest.raises((RunError, ValueError), match=r"\A[^\n]*\Z") as error:
            action(run)
        assert str(error.value).startswith(str(run / name))
        assert content(run) == before


def test_a_bit_that_changes_in_a_result_is_refused_or_changes_nothing(finished: Path) -> None:
    path, result = finished / "result.json", read_result(finished)
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 500):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            found = facts(read_result(path))
        except RunError:
            continue
        # A bit of the name of the checksum, or of how long it took.
        assert {**found, **facts(result)} == found


# The state of a checkpoint


def train_one_epoch(config: RunConfig, folder: Path) -> None:
    """Begin a run that is stopped after its first epoch."""

    def write_and_stop(*arguments: Any) -> NoReturn:
        write_checkpoint(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("batchshaping.training.checkpoints.write_checkpoint", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, folder)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after the first of its two epochs, with the weights that it had then."""
    folder = tmp_path_factory.mktemp("runs") / "begun"
    train_one_epoch(SHORT, folder)
    other = folder.with_name("other")
    train(ONCE, other)
    shutil.copy(other / "model.safetensors", folder)
    assert read_checkpoint(folder / "checkpoint.safetensors")["epoch"] == 0
    return folder


DELETED = [
    *[(part,) for part in ("state_dict", "loops", "optimizer_states", "lr_schedulers", "history", "config")],
    *[(part,) for part in ("epoch", "global_step", "callbacks")],
    ("state_dict", "network.conv1.weight"),
    ("loops", "fit_loop"),
    ("loops", "fit_loop", "epoch_progress"),
    ("loops", "fit_loop", "epoch_loop.automatic_optimization.optim_progress"),
    ("optimizer_states", 0),
    ("optimizer_states", 0, "state"),
    ("optimizer_states", 0, "state", 3),
    ("optimizer_states", 0, "state", 3, "momentum_buffer"),
    ("optimizer_states", 0, "param_groups"),
    ("optimizer_states", 0, "param_groups", 1),
    ("optimizer_states", 0, "param_groups", 0, "params"),
    ("optimizer_states", 0, "param_groups", 0, "params", 2),
    ("optimizer_states", 0, "param_groups", 0, "lr"),
    ("optimizer_states", 0, "param_groups", 0, "nesterov"),
    ("lr_schedulers", 0),
    ("lr_schedulers", 0, "last_epoch"),
    ("history", 0),
]
REPLACED: list[tuple[tuple[Any, ...], Any]] = [
    (("state_dict", "network.conv1.weight"), torch.zeros(1)),
    (("state_dict", "network.conv1.weight"), 3),
    (("optimizer_states", 0, "state", 0, "momentum_buffer"), torch.zeros(1)),
    (("optimizer_states", 0, "state", 0, "momentum_buffer"), None),
    (("optimizer_states", 0, "state"), {}),
    (("optimizer_states",), []),
    (("optimizer_states",), 3),
    (("lr_schedulers",), [3]),
    (("loops",), {}),
    (("history",), [3]),
    (("history",), {}),
    (("config",), []),
    (("epoch",), 5),
    (("epoch",), "0"),
    (("global_step",), 3),
]


@pytest.mark.parametrize(
    ("path", "value"),
    [*[(path, None) for path in DELETED], *REPLACED],
    ids=lambda each: ".".join(map(str, each)) if isinstance(each, tuple) else "",
)
def test_a_checkpoint_without_a_part_or_with_another_is_refused_in_a_line(
    path: tuple[Any, ...], value: Any, begun: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    checkpoint = within = read_checkpoint(run / "checkpoint.safetensors")
    for key in path[:-1]:
        within = within[key]
    if (path, value) in [*REPLACED]:
        within[path[-1]] = value
    else:
        del within[path[-1]]
    write_checkpoint(checkpoint, run / "checkpoint.safetensors")
    before = content(run)
    line = refused(resume, run)
    assert line.startswith(f"{run / 'checkpoint.safetensors'}: expected the state of this run, received ")
    assert content(run) == before


def test_files_without_checksums_are_read(begun: Path, short: Path, tmp_path: Path) -> None:
    expected = facts(read_result(short))
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    (run / "config.yaml").write_text("".join(lines[1:]))
    path = run / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = {"checkpoint": file.metadata()["sha256"].partition(" ")[2]}
    save_file(load_file(path), path, metadata=metadata)
    save_file(load_file(run / "model.safetensors"), run / "model.safetensors")
    figures = evaluate_run(run)
    assert facts(resume(run)) == expected != figures
    result = json.loads((run / "result.json").read_text())
    del result["sha256"]
    (run / "result.json").write_text(json.dumps(result))
    assert facts(read_result(run)) == expected


EARLIER = Path(__file__).parent / "earlier_runs"
"""Runs of the version before configurations had sections, one finished and one killed in its fifth epoch."""


def test_an_interrupted_run_of_an_earlier_version_goes_on_to_its_result(tmp_path: Path) -> None:
    expected = read_result(EARLIER / "finished")
    run = tmp_path / "run"
    shutil.copytree(EARLIER / "interrupted", run)
    known = json.loads((run / "history.json").read_text())
    result = resume(run, logger="none")
    assert result["kind"] == "channel gating" and result["reference"]["multiply_adds"] == 13008
    # Settings that there were not at that time have their defaults.
    assert result["config"] == {**result["config"], **expected["config"], "logger": "none"}
    assert result["history"][:4] == known == expected["history"][:4]
    # Sums are taken in another order on other machines, which changes losses here by a millionth.
    for one, other in zip([*result["history"], result], [*expected["history"], expected], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=0.01)
    assert expected.keys() <= result.keys()


def test_a_finished_run_of_an_earlier_version_is_read_and_evaluated(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(EARLIER / "finished", run)
    before = content(run)
    result = read_result(run)
    assert resume(run) == result
    metrics = evaluate_run(run)
    assert metrics["accuracy"] == pytest.approx(result["accuracy"], abs=0.01)
    assert metrics["loss"] == pytest.approx(result["loss"], rel=1e-3)
    assert metrics.keys() <= result.keys()
    assert content(run) == before


# Two at once


def test_of_two_that_train_in_one_folder_one_wins_and_the_other_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    commands = [
        subprocess.Popen(
            [COMMAND, "train", *options(ONCE, seed=seed), "--output", str(run)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for seed in (1, 2)
    ]
    said = [command.communicate(timeout=120) for command in commands]
    codes = [command.returncode for command in commands]
    assert sorted(codes) == [0, 2], said
    seed = 1 + codes.index(0)
    for code, (_, stderr) in zip(codes, said, strict=True):
        if code:
            assert stderr.count("\n") == 1
            assert "another process is writing to this run" in stderr or "already holds a run" in stderr
    assert facts(read_result(run)) == facts(train(ONCE.model_copy(update={"seed": seed}), tmp_path / "alone"))
    assert {path.name for path in run.iterdir()} == FILES


def test_a_run_that_another_process_writes_to_is_left_alone(begun: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    before = content(run)
    with only_writer(run):
        for action in (resume, lambda folder: train(SHORT, folder)):
            assert refused(action, run).startswith(f"{run}: another process is writing to this run; ")
    assert content(run) == before


@pytest.mark.parametrize(
    "name", ["result.json", "checkpoint.safetensors", "model.safetensors", "history.json"]
)
def test_a_folder_that_holds_what_a_run_would_write_is_not_trained_into(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(tmp_path / "nothing")
    assert refused(train, ONCE, tmp_path) == f"{tmp_path} already holds {name}; choose another folder"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "result.json"])
def test_a_link_to_nothing_is_no_file_that_is_not_there_yet(name: str, begun: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "disk that is not mounted")
    before = content(run)
    assert refused(resume, run).lower().startswith(f"{run / name}: no such file")
    assert content(run) == before


def test_a_run_that_was_killed_before_it_began_can_begin_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".0123456789abcdef.partial").write_text("half")
    assert refused(resume, run).startswith(f"{run}: expected the folder of a run")
    train(ONCE, run)
    assert {path.name for path in run.iterdir()} == FILES


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
    for settings in (kept, kept.partition("\n")[2]):  # with its checksum, and without it as it once was
        path.write_text(settings.replace("epochs: 1", "epochs: 2"))
        with pytest.raises(
            (RunError, ValueError), match=r"config\.yaml: (epochs must be|expected the settings)"
        ):
            resume(run)
        path.write_text(settings)
    for changes in ({"epochs": 2}, {"seed": 1, "workers": 1}):
        assert "config.yaml: " in refused(resume, run, **changes)
    (run / "result.json").unlink()
    path.write_text(kept.partition("\n")[2].replace("epochs: 1", "epochs: 2"))
    assert "config.yaml: epochs must be what the run began with" in refused(resume, run)
    path.write_text(kept)
    assert {"logger", "workers", "log_every"} <= MAY_CHANGE
    config = resume(run, logger="none", workers="1", log_every=2)["config"]
    assert config == {**ONCE.model_dump(mode="json"), "logger": "none", "workers": 1, "log_every": 2}
    assert path.read_text() == kept


def test_a_loss_that_is_not_finite_ends_the_run_with_a_line(tmp_path: Path) -> None:
    for gated in (True, False):
        with pytest.raises(ValueError, match=r"learning_rate: the loss became .* in epoch 1"):
            train(ONCE.model_copy(update={"learning_rate": 1e30, "gated": gated}), tmp_path / f"{gated}")


def test_a_disk_that_is_full_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"

    def full(*_: object) -> None:
        # A run has begun with its configuration.
        if (run / "config.yaml").exists() or whole:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    whole = True
    assert refused(train, ONCE, run) == f"{run}: No space left on device, expected a folder to write to"
    assert content(run) == {}
    whole = False
    assert refused(train, ONCE, run) == f"{run}: No space left on device; the run can be resumed"
    monkeypatch.undo()
    assert resume(run)["accuracy"] > 0
