"""The reference leaves nothing out: what is public is documented, and the site shows it."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import batchshaping

ROOT = Path(__file__).parent.parent
REFERENCE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(batchshaping.__path__, "batchshaping.")
    if not info.ispkg and not info.name.rpartition(".")[2].startswith("_")
)


def imported(name: str) -> ModuleType:
    """The module, or a skipped test where an extra that it needs is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name is None or error.name.startswith("batchshaping"):
            raise
        pytest.skip(f"needs {error.name}")


def described_data(module: ModuleType) -> set[str]:
    """The names that are assigned in a module and have a string below, which is their documentation."""
    body = ast.parse(inspect.getsource(module)).body
    described = set()
    for statement, below in itertools.pairwise(body):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if is_text and isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            described |= {target.id for target in targets if isinstance(target, ast.Name)}
    return described


def handed_on(module: ModuleType) -> set[str]:
    """The names that a module has from another one of this package, which documents them."""
    return {
        alias.name
        for statement in ast.parse(inspect.getsource(module)).body
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("batchshaping.")
        for alias in statement.names
    }


def has_docstring(value: object) -> bool:
    """Whether a function or a class has one of its own; what else there is has that of its type only."""
    if inspect.isclass(value):
        return bool(vars(value).get("__doc__"))
    return inspect.isroutine(value) and bool(value.__doc__)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_documented(name: str) -> None:
    module = imported(name)
    assert module.__doc__ and module.__doc__.strip()
    public = getattr(module, "__all__", None)
    assert public is not None, f"{name} does not say what is public"
    described = described_data(module) | handed_on(module)
    assert [n for n in public if n not in described and not has_docstring(getattr(module, n))] == []


@pytest.mark.parametrize("name", MODULES)
def test_every_module_is_in_the_reference(name: str) -> None:
    assert re.search(rf"^   {re.escape(name)}$", REFERENCE, re.MULTILINE)


def test_the_reference_has_no_module_that_is_none() -> None:
    listed = re.findall(r"^   (batchshaping\.[\w.]+)$", REFERENCE, re.MULTILINE)
    # A folder is listed too where it defines something itself.
    folders = {name for name in listed if described_data(imported(name)) and name not in MODULES}
    assert sorted({*listed} - folders) == MODULES


@pytest.mark.parametrize("name", batchshaping.__all__)
def test_every_name_of_the_package_is_in_the_reference_under_its_module(name: str) -> None:
    value = getattr(batchshaping, name)
    assert f"bs.{name} <{value.__module__}.{name}>" in REFERENCE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_every_figure_is_shown() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for figure in (ROOT / "docs" / "figures").iterdir():
        assert f"figures/{figure.name})" in text
        assert figure.stat().st_size < 100_000


def test_measured_tables_are_filled() -> None:
    guide = (ROOT / "docs" / "which_statistic.md").read_text(encoding="utf-8")
    tables = re.findall(r"<!-- ([\w ]+): begin -->(.*?)<!-- \1: end -->", guide, re.DOTALL)
    assert len(tables) == 4
    for name, body in tables:
        assert body.count("\n|") > 5, name
        assert "nan" not in body, name


def test_the_guide_to_gated_networks_runs() -> None:
    guide = (ROOT / "docs" / "channel_gating.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", guide, re.DOTALL | re.MULTILINE):
        exec(block, names)
    gates = [p for n, p in names["resnet"].named_parameters() if "gate" in n]
    assert gates and all(gate.grad is not None for gate in gates)


def test_the_guide_to_tokens_of_two_scales_runs_and_shows_what_was_measured() -> None:
    guide = (ROOT / "docs" / "mixed_scale.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", guide, re.DOTALL | re.MULTILINE):
        exec(block, names)
    assert all(
        p.grad is not None for p in [*names["msvit"].gate.parameters(), *names["shaping"].parameters()]
    )
    by_patch = names["by_patch"]
    assert torch.equal(names["by_pixel"][:, ::16, ::16], by_patch)
    # Patches of a coarse region have the same features.
    features = names["msvit"].eval().grid_features(names["images"])
    decisions = names["msvit"].gate.decisions.unflatten(1, names["cut"].grid_of_regions)
    same = (features[..., ::2, ::2] == features[..., 1::2, 1::2]).all(dim=1)
    assert torch.equal(same, decisions == 0)
    for page in ("docs/mixed_scale.md", "README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        (table,) = re.findall(r"<!-- mixed scale: begin -->(.*?)<!-- mixed scale: end -->", text, re.DOTALL)
        assert table.count("\n|") > 6 and "nan" not in table


def test_the_guide_to_conditional_inference_runs() -> None:
    guide = (ROOT / "docs" / "conditional_inference.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", guide, re.DOTALL | re.MULTILINE):
        # Exporting a ResNet-18 takes a minute; tests/channel_gating/test_export.py exports smaller networks.
        if "export" not in block:
            exec(block, names)
    assert names["logits"].shape == (1, 1000) and names["pruned"] is not names["resnet"]


def test_the_guide_to_budgets_runs() -> None:
    guide = (ROOT / "docs" / "budgets.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", guide, re.DOTALL | re.MULTILINE):
        exec(block, names)
    assert names["calibration"][0.3].multiply_adds <= 0.3 and names["promise"].shift == -torch.inf


def test_the_examples_of_the_guide_run() -> None:
    guide = (ROOT / "docs" / "which_statistic.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    logits = torch.randn(8, 4, requires_grad=True)
    names = {"logits": logits, "gates": torch.sigmoid(logits)}
    for block in blocks:
        exec(block, names)
        assert names.pop("loss").isfinite()
