"""What the README shows works: its code runs, its commands run, its links lead somewhere."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchshaping as bs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    return [command for line in block.splitlines() if (command := line.partition("#")[0].strip())]


def run_code() -> dict[str, Any]:
    """Run all Python blocks, one after the other, on what a reader of the README has."""
    model = nn.Linear(10, 32)
    logits = model(torch.randn(64, 10))
    names: dict[str, Any] = {
        "model": model,
        "logits": logits,
        "gates": torch.sigmoid(logits),
        "task_loss": logits.square().mean(),
        "features": torch.randn(64, 64, 8, 8),
        "channels": torch.randn(64, 128, 8, 8),
        "images": torch.randn(2, 3, 64, 64),
    }
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_python_code_runs_and_means_what_it_says() -> None:
    names = run_code()
    assert names["losses"].shape == (32,)
    assert names["means"].shape == (32,)
    assert names["switched"].shape == names["channels"].shape
    assert names["spent"].shape == (2,)
    torch.testing.assert_close(names["old"], names["new"])
    total: Tensor = names["loss"] + names["old"] + names["shaping"](names["gates"])
    total.backward()
    assert names["model"].weight.grad.abs().sum() > 0


def test_the_statistics_and_the_priors_in_its_tables_are_those_there_are() -> None:
    from batchshaping.statistics import STATISTICS

    assert set(re.findall(r'^\| `"(\w+)"` \|', README, flags=re.MULTILINE)) == set(STATISTICS)
    priors = re.findall(r"^\| `bs\.(\w+)\(", README, flags=re.MULTILINE)
    assert set(priors) == {"Beta", "SymBeta", "RelaxedBernoulli", "Normal"}
    assert all(issubclass(getattr(bs, prior), torch.distributions.Distribution) for prior in priors)


def test_the_figures_in_its_table_of_statistics_are_those_of_the_notebook() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "batch_shaping.ipynb", as_version=4)
    printed = "".join(
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    )
    rows = re.findall(r"^\| `\"\w+\"` .* \| (\S+) \| (\S+) \|$", README, flags=re.MULTILINE)
    assert len(rows) == 3
    for prior, column in (
        ("Normal(loc=0.6, scale=0.1)", 0),
        ("RelaxedBernoulli(mean=0.8, temperature=0.4)", 1),
    ):
        figures = " +".join(re.escape(row[column]) for row in rows)
        assert re.search(rf"^{re.escape(prior)} +±4 +{figures}$", printed, flags=re.MULTILINE), prior


def programs(block: str) -> list[list[str]]:
    """The arguments of each ``batchshaping`` in a block of commands."""
    return [shlex.split(command)[1:] for command in commands(block) if command.startswith("batchshaping")]


PROGRAMS = {
    ", ".join(arguments[0] for arguments in block): block for block in map(programs, blocks("sh")) if block
}
LEFT = {
    "train, report": ["report.html", "outputs/train/result.json"],
    "train, faster": [
        "outputs/faster/report.html",
        "outputs/faster/model.onnx",
        "outputs/faster/result.json",
    ],
    "fit": ["outputs/fit/fit.gif"],
}
"""What the commands of each block leave; of a gated network, its result."""


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_commands_of_a_block_run_one_after_the_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block in a folder of its own, for a reader who skips the others."""
    pytest.importorskip("typer")
    from commands import run

    monkeypatch.chdir(tmp_path)
    for arguments in PROGRAMS[name]:
        run(*arguments)
    assert [file for file in LEFT[name] if not (tmp_path / file).is_file()] == []
    for file in LEFT[name]:
        if file.endswith("result.json"):
            result = json.loads((tmp_path / file).read_text(encoding="utf-8"))
            assert result["accuracy"] >= 0.97
            assert result["multiply_adds"] < 0.5 * result["cost"]["dense"]


def test_every_make_target_exists() -> None:
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    named = set(
        re.findall(
            r"\bmake ([a-z-]+)\b",
            "\n".join([*commands("\n".join(blocks("sh"))), *re.findall(r"`[^`\n]+`", README)]),
        )
    )
    assert {"demo", "test", "figures"} <= named <= targets


def test_its_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert [target for target in targets if not (ROOT / target.partition("#")[0]).is_file()] == []
