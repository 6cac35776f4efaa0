"""``batchshaping bench inference`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import refused, run
from PIL import Image

SMALL = (
    "--networks",
    "resnet8,msvit-mini",
    "--sizes",
    "32",
    "--batches",
    "1,2",
    "--turns",
    2,
    "--no-compiled",
)


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def test_it_writes_results_tables_and_a_figure() -> None:
    result = run("bench", "inference", *SMALL, "--shares", "1,0.5", "--output", "here")
    results = json.loads(Path("here/inference.json").read_text())
    assert [(c["network"], c["batch"]) for c in results["comparisons"]] == [
        (name, batch) for name in ("resnet8", "msvit-mini") for batch in (1, 2)
    ]
    assert results["comparisons"][0]["settings"] == {"gates_per_layer": 8}
    assert results["machine"]["threads"] > 0
    assert Path("here/inference.md").read_text().count("**msvit-mini") == 2
    with Image.open("here/inference.png") as figure:
        assert figure.format == "PNG"
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "msvit-mini: 2 images" in result.stdout and "wrote here/inference.png" in result.stdout


def test_as_json_it_prints_what_it_writes_and_nothing_else() -> None:
    result = run("bench", "inference", "--quick", "--turns", 2, "--json")
    assert json.loads(result.stdout) == json.loads(Path("outputs/bench/inference.json").read_text())
    assert [c["size"] for c in json.loads(result.stdout)["comparisons"]] == [64]


def test_help_is_within_80_columns() -> None:
    for arguments in (["bench", "--help"], ["bench", "inference", "-h"]):
        lines = run(*arguments).stdout.splitlines()
        assert max(map(len, lines)) <= 80
    assert any("--shares" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--networks", "resnet8,nothing"], ["network must be one of", "'nothing'"]),
        (["--networks", "msvit-small16", "--sizes", "50"], ["16", "50 x 50 pixels"]),
        (["--gates-per-layer", "0"], ["gates_per_layer", "0"]),
        (["--sizes", "0"], ["--sizes must be whole numbers from 1", "'0'"]),
        (["--batches", "1,,2"], ["--batches must be whole numbers from 1", "'1,,2'"]),
        (["--shares", "0.5,2"], ["--shares must be numbers from 0 to 1", "'0.5,2'"]),
        (["--shares", "nan"], ["--shares must be numbers from 0 to 1", "'nan'"]),
    ],
)
def test_bad_input_is_one_line_and_no_file(arguments: list[str], words: list[str]) -> None:
    line = refused("bench", "inference", *arguments)
    assert all(word in line for word in words)
    assert list(Path().iterdir()) == []


def test_files_of_an_earlier_measurement_stay() -> None:
    Path("inference.md").write_text("earlier")
    assert "--force" in refused("bench", "inference", "--quick", "--output", ".")
    assert Path("inference.md").read_text() == "earlier"
