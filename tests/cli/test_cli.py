"""Every command as a user runs it, and every way to get it wrong."""

from __future__ import annotations

import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refused, run
from PIL import Image
from typer.testing import CliRunner

import batchshaping as bs
from batchshaping.cli import app, main
from batchshaping.experiments.fit import fit, published_start
from batchshaping.priors.closed_form import ClosedFormPrior

BETA = ("--prior", "beta", "--a", "2", "--b", "6")
QUICK = ("--steps", "3", "--no-animation")


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def shaped(
    start: torch.Tensor,
    prior: ClosedFormPrior,
    steps: int = 3,
    rate: float = 0.1,
    by: str = "anderson_darling",
) -> torch.Tensor:
    """What a fit of the start should give."""
    loss = partial(bs.batch_shaping, prior=prior, statistic=by)
    return fit(start, prior, steps=steps, learning_rate=rate, loss=loss).values[-1]


def files() -> list[str]:
    return sorted(path.as_posix() for path in Path().rglob("*") if path.is_file())


# Help


def test_the_version_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["batchshaping", "--version"])
    as_a_module = partial(runpy.run_module, "batchshaping", run_name="__main__")
    for command in (main, as_a_module):
        with pytest.raises(SystemExit) as end:
            command()
        assert end.value.code == 0
        assert capsys.readouterr().out == f"batchshaping {bs.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["fit", "demo", "--version"]),
        (["fit", "-h"], ["beta", "symbeta", "relaxed-bernoulli", "normal", ".npy", ".csv", ".pt", "--force"]),
        (["demo", "--help"], ["--epochs", "--seed", "--output"]),
    ],
)
def test_help_names_what_there_is_within_80_columns(arguments: list[str], words: list[str]) -> None:
    help_text = run(*arguments).stdout
    for word in words:
        assert word in help_text
    assert max(map(len, help_text.splitlines())) <= 80


# Fit


def test_a_fit_writes_its_values_its_figure_and_its_animation() -> None:
    result = run("fit", *BETA, "--steps", "20")
    expected = shaped(published_start(), bs.Beta(2, 6), steps=20)
    np.testing.assert_array_equal(np.load("outputs/fit/values.npy"), expected.numpy())
    with Image.open("outputs/fit/fit.png") as figure, Image.open("outputs/fit/fit.gif") as animation:
        assert figure.format == "PNG"
        assert animation.format == "GIF" and getattr(animation, "n_frames", 1) > 1
    assert files() == ["outputs/fit/fit.gif", "outputs/fit/fit.png", "outputs/fit/values.npy"]
    for name in files():
        assert f"wrote {name}" in result.stdout
    before = bs.batch_shaping(torch.sigmoid(published_start()), bs.Beta(2, 6))
    assert f"{before:.2e} before" in result.stdout
    assert f"{bs.batch_shaping(expected, bs.Beta(2, 6)):.2e} after" in result.stdout


def test_the_fit_of_the_example_ends_at_its_prior() -> None:
    run("fit", *BETA, "--no-animation")
    assert bs.batch_shaping(torch.from_numpy(np.load("outputs/fit/values.npy")), bs.Beta(2, 6)) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "prior"),
    [
        (["--prior", "BETA", "--a", "0.6", "--b", "0.4"], bs.Beta(0.6, 0.4)),
        (["--prior", "SymBeta", "--a", "0.9"], bs.SymBeta(0.9)),
        (["--prior", "sym-beta", "--a", "0.9"], bs.SymBeta(0.9)),
        *(
            (["--prior", name, "--mean", "0.2", "--temperature", "0.25"], bs.RelaxedBernoulli(0.2, 0.25))
            for name in ("relaxed_bernoulli", "relaxed-bernoulli", "RelaxedBernoulli", "RELAXED_BERNOULLI")
        ),
        (["--prior", "normal", "--loc", "-0.6", "--scale", "1e-1"], bs.Normal(-0.6, 0.1)),
    ],
)
def test_each_prior_takes_its_parameters(arguments: list[str], prior: ClosedFormPrior) -> None:
    assert str(prior) in run("fit", *arguments, *QUICK).stdout
    expected = shaped(published_start(), prior)
    np.testing.assert_array_equal(np.load("outputs/fit/values.npy"), expected.numpy())


def test_start_and_training_are_as_asked() -> None:
    options = ("--init", "1", "--seed", "7", "--learning-rate", "0.3", "--output", "elsewhere")
    run("fit", *BETA, *QUICK, *options, "--statistic", "CramerVonMises")
    expected = shaped(published_start(1.0, seed=7), bs.Beta(2, 6), rate=0.3, by="cramer_von_mises")
    np.testing.assert_array_equal(np.load("elsewhere/values.npy"), expected.numpy())


@pytest.mark.parametrize("kind", ["npy", "csv", "pt"])
def test_values_from_a_file_keep_their_shape_and_precision(kind: str) -> None:
    values = torch.rand(20, 3, dtype=torch.float64)
    if kind == "npy":
        np.save("x.npy", values.numpy())
    elif kind == "csv":
        np.savetxt("x.csv", values.numpy(), delimiter=",", header="a,b,c", comments="")
    else:
        torch.save(values, "x.pt")
    run("fit", *BETA, "--values", f"x.{kind}", *QUICK)
    expected = shaped(torch.logit(values.flatten()), bs.Beta(2, 6))
    written = np.load("outputs/fit/values.npy")
    assert written.dtype == np.float64
    np.testing.assert_allclose(written, expected.reshape(20, 3).numpy(), rtol=0, atol=1e-14)


def test_exact_zeros_and_ones_move_too() -> None:
    np.save("x.npy", np.array([0.0] * 50 + [1.0] * 50))
    run("fit", *BETA, "--values", "x.npy", "--steps", "200", "--no-animation")
    written = torch.from_numpy(np.load("outputs/fit/values.npy"))
    assert bs.batch_shaping(written, bs.Beta(2, 6)) < 0.05


def test_an_earlier_fit_is_kept_unless_forced() -> None:
    run("fit", *BETA, *QUICK)
    before = {name: Path(name).read_bytes() for name in files()}
    line = refused("fit", *BETA, "--steps", "4", "--no-animation")
    assert line == (
        "outputs/fit already holds values.npy, fit.png; --force replaces them, --output writes elsewhere"
    )
    assert {name: Path(name).read_bytes() for name in files()} == before
    run("fit", *BETA, "--steps", "4", "--no-animation", "--force")
    assert files() == list(before)
    assert Path("outputs/fit/values.npy").read_bytes() != before["outputs/fit/values.npy"]


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--prior", "gamma", "--a", "2"],
            "--prior must be one of beta, symbeta, relaxed-bernoulli, normal, received 'gamma'",
        ),
        (
            [*BETA, "--statistic", "kuiper"],
            "--statistic must be one of cramer-von-mises, anderson-darling, wasserstein, epps-pulley, "
            "received 'kuiper'",
        ),
        (["--prior", "beta", "--a", "2"], "--prior beta takes --a and --b, received --a 2"),
        (["--prior", "beta"], "--prior beta takes --a and --b, received no parameters"),
        (
            ["--prior", "SYMBETA", "--a", "0.5", "--b", "0.5"],
            "--prior symbeta takes --a, received --a 0.5, --b 0.5",
        ),
        (
            ["--prior", "normal", "--mean", "0.6", "--scale", "0.1"],
            "--prior normal takes --loc and --scale, received --mean 0.6, --scale 0.1",
        ),
        (
            ["--prior", "beta", "--a", "-1", "--b", "6"],
            "Beta: a must be between 1e-300 and 1e300, received -1",
        ),
        (
            ["--prior", "relaxed-bernoulli", "--mean", "1.5", "--temperature", "1"],
            "RelaxedBernoulli: mean must be between 0 and 1, both excluded, received 1.5",
        ),
        (["--prior", "normal", "--loc", "nan", "--scale", "1"], "Normal: loc must be finite, received nan"),
        ([*BETA, "--learning-rate", "0"], "--learning-rate must be positive and finite, received 0"),
        ([*BETA, "--learning-rate", "nan"], "--learning-rate must be positive and finite, received nan"),
        ([*BETA, "--init", "-4"], "--init must be positive and finite, received -4"),
        ([*BETA, "--values", "no.npy"], "no.npy: No such file or directory"),
        ([*BETA, "--values", "folder.npy"], "folder.npy: Is a directory"),
        ([*BETA, "--values", "x.txt"], "x.txt: expected a name that ends with .npy or .csv or .pt"),
        ([*BETA, "--output", "x.txt"], "x.txt: File exists, expected a folder to write to"),
        ([*BETA, "--output", "x.txt/y"], "x.txt/y: Not a directory, expected a folder to write to"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments: list[str], message: str) -> None:
    Path("x.txt").write_text("0.1")
    Path("folder.npy").mkdir()
    assert refused("fit", *arguments) == message
    assert files() == ["x.txt"]


def test_a_statistic_that_does_not_suit_the_prior_is_refused() -> None:
    line = refused("fit", *BETA, "--statistic", "epps-pulley")
    assert line.startswith("epps_pulley needs a Normal prior, received Beta")
    assert files() == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, 1.5, -2.0], "received 1.5 (2 of 3 values are outside)"),
        ([0.5, float("nan")], "received nan (1 of 2 values are outside)"),
        ([float("inf")], "received inf (1 of 1 values are outside)"),
        ([1.0 + 2**-23], "received 1.0000001192092896 (1 of 1 values are outside)"),
        ([], "expected at least one value, received shape (0,)"),
    ],
)
def test_values_that_are_no_probabilities_are_refused(values: list[float], message: str) -> None:
    np.save("x.npy", np.array(values))
    line = refused("fit", *BETA, "--values", "x.npy")
    assert line.startswith("x.npy: expected ") and line.endswith(message)
    assert files() == ["x.npy"]


@pytest.mark.parametrize("name", ["x.npy", "x.csv", "x.pt"])
def test_foreign_files_are_refused(name: str) -> None:
    Path(name).write_bytes(b"\x80\x04spam, spam\n")
    assert refused("fit", *BETA, "--values", name).startswith(f"{name}: expected ")
    assert files() == [name]


def test_a_pickle_is_refused_and_not_run() -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (Path("made"),)

    torch.save(Touch(), "x.pt")
    assert refused("fit", *BETA, "--values", "x.pt").startswith("x.pt: expected one tensor ")
    assert files() == ["x.pt"]


@pytest.mark.parametrize(
    "arguments", [["fit"], ["fit", *BETA, "--steps", "0"], ["demo", "--epochs", "x"], ["train", "--nothing"]]
)
def test_usage_errors_leave_nothing_behind(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert files() == []


def test_a_folder_that_cannot_be_written_to_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    for command in (["fit", *BETA], ["demo"]):
        line = refused(*command, "--output", "here")
        assert line == "here: expected a folder that can be written to"


def test_a_file_that_fails_while_it_is_written_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    run("fit", *BETA, *QUICK)
    before = Path("outputs/fit/values.npy").read_bytes()

    def fail(path: Path, _: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("batchshaping.cli.shaping.write_values", fail)
    result = CliRunner().invoke(app, ["fit", *BETA, *QUICK, "--force"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == ("batchshaping: outputs/fit/values.npy: No space left on device")
    assert Path("outputs/fit/values.npy").read_bytes() == before
    assert files() == ["outputs/fit/fit.png", "outputs/fit/values.npy"]


def test_a_file_that_another_process_wrote_meanwhile_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_after_another(path: Path, _: object) -> None:
        path.write_bytes(b"mine")
        Path("outputs/fit/values.npy").write_bytes(b"theirs")

    monkeypatch.setattr("batchshaping.cli.shaping.write_values", write_after_another)
    result = CliRunner().invoke(app, ["fit", *BETA, *QUICK])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "batchshaping: outputs/fit/values.npy was written by another process; "
        "--force replaces it, --output writes elsewhere"
    )
    assert files() == ["outputs/fit/values.npy"]
    assert Path("outputs/fit/values.npy").read_bytes() == b"theirs"


def test_a_symbolic_link_is_something_that_is_there_already() -> None:
    Path("outputs/fit").mkdir(parents=True)
    Path("outputs/fit/fit.png").symlink_to(Path("kept.png").resolve())
    for target_is_there in (False, True):
        if target_is_there:
            Path("kept.png").write_bytes(b"kept")
        assert refused("fit", *BETA, *QUICK).startswith("outputs/fit already holds fit.png; ")
    run("fit", *BETA, *QUICK, "--force")
    assert Path("kept.png").read_bytes() == b"kept"
    assert not Path("outputs/fit/fit.png").is_symlink()


@pytest.mark.parametrize("name", ["values.npy", "fit.png"])
def test_what_is_no_file_is_not_replaced_and_said_before_any_work(name: str) -> None:
    Path("outputs/fit", name).mkdir(parents=True)
    line = refused("fit", *BETA, *QUICK, "--force")
    assert line == f"outputs/fit/{name}: expected a file to replace, received a folder or a device"
    assert files() == []


def test_what_an_error_quotes_is_cut_to_a_line() -> None:
    Path("x.csv").write_text("0.1\n" + "x" * 10_000)
    for arguments in (
        ["--prior", "x" * 10_000],
        [*BETA, "--statistic", "x" * 10_000],
        [*BETA, "--values", "x.csv"],
    ):
        line = refused("fit", *arguments)
        assert "'xxx" in line and len(line) < 200


# The traceback that a line stands for


@pytest.mark.parametrize(
    ("arguments", "cause", "shown"),
    [
        (["train", "--epochs", "many"], "pydantic_core._pydantic_core.ValidationError", "__init__"),
        (["train", "--config", "bad.yaml"], "UnicodeDecodeError", "_text"),
        (["train", "--resume", "missing"], "batchshaping.training.folder.RunError", "resume"),
        (["evaluate", "missing"], "batchshaping.training.folder.RunError", "evaluate_run"),
        (["report", "bad.yaml"], "UnicodeDecodeError", "read_result"),
        (["fit", "--prior", "beta", "--a", "-1", "--b", "6"], "ValueError", "_prior"),
        (["fit", *BETA, "--values", "bad.npy"], "ValueError", "_read_npy"),
        (["fit", *BETA, "--init", "-1"], "", "in fit"),
    ],
)
def test_debug_shows_the_traceback_before_the_line(arguments: list[str], cause: str, shown: str) -> None:
    Path("bad.yaml").write_bytes(b"\xff\xfe\x00")
    Path("bad.npy").write_bytes(b"spam")
    line = refused(*arguments)
    result = CliRunner().invoke(app, ["--debug", *arguments])
    assert result.exit_code == 2 and result.stdout == ""
    *before, last = result.stderr.splitlines()
    assert last == f"batchshaping: {line}"
    text = "\n".join(before)
    assert ("Traceback (most recent call last):" in text) == bool(cause)
    assert cause in text and shown in text and 'File "' in text
    # It holds for one command.
    assert refused(*arguments) == line


def test_debug_changes_nothing_where_nothing_is_wrong() -> None:
    result = run("--debug", "fit", *BETA, *QUICK)
    assert result.stdout == run("fit", *BETA, *QUICK, "--force").stdout
    assert "--debug" in run("--help").stdout


@pytest.mark.parametrize(
    ("missing", "importer", "command", "extra"),
    [
        ("matplotlib", "batchshaping.figures", ["fit", *BETA], "viz"),
        ("sklearn.datasets", "batchshaping.experiments.demo", ["demo"], "vision"),
    ],
)
def test_a_missing_extra_is_named_with_its_remedy(
    missing: str, importer: str, command: list[str], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{importer}.")]:
        monkeypatch.delitem(sys.modules, name)
    line = refused(*command)
    assert line.startswith(f"this needs {missing.partition('.')[0]}, ")
    assert line.endswith(f"pip install 'batchshaping[{extra}]'")
    assert files() == []


def test_without_the_extra_of_the_command_line_its_remedy_is_named() -> None:
    code = "import sys; sys.modules['typer'] = None; import batchshaping.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == ("batchshaping: this needs typer, please run: pip install 'batchshaping[cli]'\n")


# Demo


def test_the_demo_prints_its_table_and_draws_its_gates_the_same_each_time() -> None:
    first = run("demo", "--epochs", "1")
    for row in (
        "test accuracy",
        "mean share of open gates",
        "gates always on",
        "gates always off",
        "conditional gates",
    ):
        assert row in first.stdout
    assert max(map(len, first.stdout.splitlines())) <= 80
    with Image.open("outputs/demo/gates.png") as figure:
        assert figure.format == "PNG"
    assert files() == ["outputs/demo/gates.png"]
    drawn = Path("outputs/demo/gates.png").read_bytes()
    assert run("demo", "--epochs", "1").stdout == first.stdout
    assert Path("outputs/demo/gates.png").read_bytes() == drawn
    other = run("demo", "--epochs", "1", "--seed", "1", "--output", "other").stdout
    assert other != first.stdout.replace("seed 0", "seed 1").replace("outputs/demo", "other")
