"""Training and evaluating from the command line, in one process and in two, and every way to get it wrong."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import URLError

import pytest
import torch
import torch.distributed as dist
import yaml
from commands import refused, run
from PIL import Image
from typer.testing import CliRunner

from batchshaping.cli import app
from batchshaping.cli.output import show_latency
from batchshaping.training.config import SETTINGS, RunConfig, read_config
from batchshaping.training.data.batching import batches
from batchshaping.training.run import load_run

TINY = {"width": 2, "hidden": 4, "train_images": 128, "batch_size": 32, "epochs": 2, "budget": 0.0}
COMMAND = shutil.which("batchshaping", path=sysconfig.get_path("scripts")) or "batchshaping"


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch, with a gate a layer: each takes a second to export."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    run("train", *options(**{**TINY, "epochs": 1, "gates_per_layer": 1}), "--output", folder)
    return folder


@pytest.fixture
def _trained_here(trained: Path) -> None:
    """The same run in its usual place in the current folder."""
    shutil.copytree(trained, "outputs/train")


def options(**settings: object) -> list[str]:
    """Settings as options of the command line."""
    given = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        given += (
            [f"--{flag}" if value else f"--no-{flag}"]
            if isinstance(value, bool)
            else [f"--{flag}", str(value)]
        )
    return given


def files() -> dict[str, bytes]:
    return {path.as_posix(): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def result_of(folder: str) -> dict[str, Any]:
    """A result but for how long it took."""
    result: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
    result.pop("seconds")
    return result


# Settings


def test_options_replace_settings_of_the_file_and_the_rest_is_default() -> None:
    settings = {**TINY, "prior": [2, 6], "noise_end": None, "penalized": "open-gates", "augment": False}
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    given = {"epochs": 1, "prior": "0.6,0.4", "augment": True, "precision": "bf16-mixed", "noise_end": "0.5"}
    output = run("train", "--config", "run.yaml", *options(**given), "--output", "first").stdout
    expected = {**settings, **given, "prior": (0.6, 0.4), "noise_end": 0.5}
    config = read_config(Path("first/config.yaml"))
    assert config == RunConfig(**expected)
    assert yaml.safe_load(Path("first/config.yaml").read_text()).keys() == config.model_dump().keys()
    assert f"{result_of('first')['accuracy']:.2%} of 450" in output and "wrote first" in output


def test_the_configuration_that_was_written_repeats_the_run() -> None:
    run("train", *options(**TINY), "--output", "first")
    run("train", "--config", "first/config.yaml", "--output", "second")
    assert result_of("second") == result_of("first")
    assert Path("second/config.yaml").read_bytes() == Path("first/config.yaml").read_bytes()
    assert Path("second/model.safetensors").read_bytes() == Path("first/model.safetensors").read_bytes()
    # The complete file also takes options.
    run("train", "--config", "first/config.yaml", "--seed", "1", "--output", "third")
    assert result_of("third")["config"] == {**result_of("first")["config"], "seed": 1}
    assert result_of("third")["loss"] != result_of("first")["loss"]


def test_a_run_goes_to_its_usual_place_and_can_be_evaluated_and_resumed() -> None:
    run("train", *options(**TINY, gated=False))
    before = files()
    figures = json.loads(run("evaluate", "outputs/train", "--json").stdout)
    assert figures == {name: result_of("outputs/train")[name] for name in figures}
    assert f"{figures['accuracy']:.2%} of 450" in run("evaluate", "outputs/train").stdout
    assert "outputs/train was finished before" in run("train", "--resume", "outputs/train").stdout
    assert files() == before


@pytest.mark.parametrize("flags", [[], ["--prune"], ["--batches"]])
def test_a_run_is_exported_as_onnx(trained: Path, flags: list[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert "wrote digits.onnx" in run("export", trained, "--output", "digits.onnx", *flags).stdout
    network, data = load_run(trained)
    images = data.normalize(next(iter(batches(data.train, 3)))[0])
    session = onnxruntime.InferenceSession("digits.onnx")
    for x in [images] if flags == ["--batches"] else images.split(1):
        (found,) = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), network(x).detach(), rtol=1e-4, atol=1e-4)
    assert "already holds digits.onnx" in refused("export", trained, "--output", "digits.onnx")


def test_the_latency_of_a_run_is_kept_for_the_report() -> None:
    run("train", *options(**TINY))
    told = run("evaluate", "outputs/train", "--latency", "--threads", 1)
    assert "conditional" in told.stdout and "wrote outputs/train/latency.json" in told.stdout
    as_json = json.loads(run("evaluate", "outputs/train", "--json", "--latency").stdout)
    kept = json.loads(Path("outputs/train/latency.json").read_text())
    assert as_json["latency"] == kept and len(kept["images"]) == 200
    run("report", "outputs/train")
    assert "200 test images, one at a time" in Path("report.html").read_text()
    Path("outputs/train/latency.json").write_text(json.dumps(kept | {"result": "0"}))
    assert "received another's" in refused("report", "outputs/train", "--output", "other.html")


@pytest.mark.parametrize("native", [True, False])
def test_a_latency_says_when_there_is_no_compiler(native: bool, capsys: pytest.CaptureFixture[str]) -> None:
    machine = {"threads": 1, "native": native}
    show_latency({"machine": machine, "seconds": {"conditional": [0.001], "dense": [0.002]}})
    assert ("needs a C compiler" in capsys.readouterr().out) != native


def test_help_names_every_setting_with_its_default_within_80_columns() -> None:
    text = run("train", "--help").stdout
    for name in SETTINGS:
        assert f"--{name.replace('_', '-')}"[:20] in text, name
    assert max(map(len, text.splitlines())) <= 80
    assert "--json" in run("evaluate", "--help").stdout


# What is refused, before anything is written


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--network", "resnet9"], "network must be one of resnet8, "),
        (["--config", "octal.yaml"], "octal.yaml: epochs: "),
        (
            ["--config", "twice.yaml"],
            "twice.yaml: expected each setting once, received 'seed' again in line 2",
        ),
        (["--network", ""], "network must be one of resnet8, "),
        (["--data", "mnist"], "data must be one of digits, "),
        (["--budget", "-0.1"], "budget: "),
        (["--budget", "0.01"], "budget must be 0 or at least "),
        (["--precision", "8"], "precision: "),
        (["--penalized", "flops"], "penalized: "),
        (["--epochs", "0"], "epochs: "),
        (["--epochs", "many"], "epochs: "),
        (["--prior", "0.6"], "prior.1: "),
        (["--batch-size", "1348"], "batch_size must be at most the number of training images, 1347, "),
        (["--train-images", "9999"], "train_images must be at most 1347, received 9999"),
        (["--data", "folder"], "folder: data_folder must be "),
        (["--data", "folder", "--data-folder", "empty"], "empty/train: expected "),
        (["--data", "cifar10", "--data-folder", "empty"], "cifar10: expected data_batch_1.bin "),
        (["--config", "missing.yaml"], "missing.yaml: No such file or directory"),
        (["--config", "empty"], "empty: Is a directory"),
        (["--config", "bad.yaml"], "bad.yaml: there is no setting 'spam'; "),
        (["--output", "bad.yaml"], "bad.yaml: File exists, expected a folder to write to"),
        (["--output", "bad.yaml/x"], "bad.yaml/x: Not a directory, expected a folder to write to"),
        (["--resume", "empty"], "empty: expected the folder of a run"),
        (["--resume", "missing"], "missing: expected the folder of a run"),
        (["--accelerator", "abacus"], ""),
        (["--accelerator", "tpu"], ""),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(arguments: list[str], line: str) -> None:
    texts = {"bad.yaml": "spam: 1\n", "octal.yaml": "epochs: 010\n", "twice.yaml": "seed: 1\nseed: 2\n"}
    for name, text in texts.items():
        Path(name).write_text(text)
    Path("empty").mkdir()
    assert refused("train", *arguments).startswith(line)
    assert sorted(files()) == [*texts] and sorted(os.listdir()) == sorted([*texts, "empty"])


@pytest.mark.parametrize(
    "arguments",
    [["train", "--spam"], ["train", "--width"], ["train", "more"], ["evaluate"], ["evaluate", "a", "b"]],
)
def test_usage_errors_leave_nothing_behind(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert files() == {}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--seed", "1"], "--seed"),
        (["--no-gated"], "--gated"),
        (["--train-images", "5", "--penalty-begin", "0.1"], "--train-images, --penalty-begin"),
        (["--config", "run.yaml"], "--config"),
        (["--output", "other"], "--output"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(given: list[str], named: str) -> None:
    line = refused("train", "--resume", "outputs/train", *given)
    assert line == f"--resume takes its settings from the run, received {named} too"
    assert files() == {}


@pytest.mark.usefixtures("_trained_here")
def test_a_run_is_resumed_with_another_machine_and_log() -> None:
    kept = Path("outputs/train/config.yaml").read_bytes()
    Path("outputs/train/result.json").unlink()
    line = refused("train", "--resume", "outputs/train", "--logger", "none", "--seed", "1")
    assert line == "--resume takes its settings from the run, received --seed too"
    line = refused("train", "--resume", "outputs/train", "--workers", "-1")
    assert line.startswith("workers: ")
    run("train", "--resume", "outputs/train", "--logger", "none", "--log-every", "5")
    assert {**TINY, "epochs": 1, "logger": "none", "log_every": 5}.items() <= result_of("outputs/train")[
        "config"
    ].items()
    assert Path("outputs/train/config.yaml").read_bytes() == kept


@pytest.mark.usefixtures("_trained_here")
@pytest.mark.parametrize("text", ["", "network: resnet8\n"])
def test_a_configuration_that_was_cut_off_does_not_train_the_default_run(text: str) -> None:
    for name in ("result.json", "checkpoint.safetensors"):
        Path("outputs/train", name).unlink()
    Path("outputs/train/config.yaml").write_text(text)
    before = files()
    for command in (["train", "--resume"], ["evaluate"]):
        line = refused(*command, "outputs/train")
        assert line.startswith(
            "outputs/train/config.yaml: expected every setting of the run, received none of "
        )
    assert files() == before


@pytest.mark.usefixtures("_trained_here")
def test_a_folder_with_a_run_is_left_as_it_is() -> None:
    before = files()
    assert refused("train", *options(**TINY)).startswith("outputs/train already holds a run; resume it")
    assert files() == before


@pytest.mark.usefixtures("_trained_here")
@pytest.mark.parametrize("name", ["checkpoint.safetensors", "model.safetensors", "config.yaml"])
def test_a_harmed_run_is_refused_and_left_as_it_is(name: str) -> None:
    Path("outputs/train/result.json").unlink()
    Path("outputs/train", name).write_bytes(b"spam")
    before = files()
    command = ["evaluate"] if name == "model.safetensors" else ["train", "--resume"]
    assert refused(*command, "outputs/train").startswith(f"outputs/train/{name}: expected ")
    assert files() == before


@pytest.mark.parametrize("folder", ["missing", "."])
def test_what_cannot_be_evaluated_is_said_in_one_line(folder: str) -> None:
    assert "expected the folder of a run" in refused("evaluate", folder)
    assert "expected the folder of a run" in refused("evaluate", folder, "--json")


def test_weights_that_cannot_be_downloaded_are_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise URLError("no connection")

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    monkeypatch.setenv("TORCH_HOME", "hub")
    result = CliRunner().invoke(app, ["train", "--network", "resnet18", "--pretrained"])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and "no connection" in result.stderr
    assert files() == {}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_ends_the_training_with_its_name(workers: int) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            Path("images", part, name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (8, 8), (9, 9, 9)).save(Path("images", part, name, f"{number}.png"))
    broken = Path("images/train/dog/1.png")
    broken.write_bytes(broken.read_bytes()[:50])
    settings = {
        "data": "folder",
        "data_folder": "images",
        "image_size": 8,
        "batch_size": 4,
        "workers": workers,
    }
    line = refused("train", *options(**settings, width=2, epochs=1, budget=0))
    assert line == f"{broken}: expected an image, received something else"


# Two processes


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_two_processes_learn_as_one_does() -> None:
    settings: dict[str, Any] = {
        "width": 8,
        "hidden": 8,
        "gate_bias": 1,
        "train_images": 1024,
        "epochs": 4,
        "budget": 0,
        "penalty": 0.5,
    }
    settings |= {"log_every": 1, "accelerator": "cpu"}

    # What the last epoch's evaluation saw is compared with the result.
    given = [*options(**settings), "--no-recalibrate"]
    run("train", *given, "--output", "one")
    command = [COMMAND, "train", *given, *options(devices=2), "--output", "two"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
    )
    assert done.returncode == 0, done.stderr
    # Processes that are given no number of threads have one each.
    assert result_of("two")["threads"] == 1
    # The first process alone writes and speaks.
    assert done.stdout.count("test accuracy") == done.stdout.count("wrote two") == 1
    assert sorted(os.listdir("two")) == sorted(os.listdir("one")) and os.listdir("two/logs") == ["version_0"]
    one, two = losses("one"), losses("two")
    assert len(one) == len(two) == 64
    # Normalization sees half of the batch and the noise is another, so that single steps differ. Averages
    # over a quarter of the training differ by up to 0.1, and from the first quarter to the last by 1.
    averages = [[sum(steps[start : start + 16]) / 16 for start in range(0, 64, 16)] for steps in (one, two)]
    assert averages[0] == pytest.approx(averages[1], abs=0.2)
    assert averages[1][3] < averages[1][0] - 0.5
    assert result_of("two")["examples"] == result_of("one")["examples"] == 450
    for name in ("classes", "cost", "versions"):
        assert result_of("two")[name] == result_of("one")[name]
    history = result_of("two")["history"]
    assert [epoch["examples"] for epoch in history] == [450] * 4
    assert history[-1]["accuracy"] == result_of("two")["accuracy"]


def losses(folder: str) -> list[float]:
    with Path(folder, "logs/version_0/metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
