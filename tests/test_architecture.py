"""Imports go down, never up and never in a circle; what is public is exported and documented."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import batchshaping

PACKAGE = Path(batchshaping.__file__).parent

# From the ground up: a folder with all that is in it, or a module of the root.
FLOORS = [
    {"cdfs"},
    {"priors"},
    {"statistics"},
    {"losses"},
    {"gates"},
    {"channel_gating", "mixed_scale"},
    # The root: the public names, and the published interface.
    {
        "batchshaping",
        "_moved",
        "batch_shaping_loss",
        "cdf_beta",
        "cdf_normal",
        "cdf_relaxedbernoulli",
        "utils",
    },
    {"utils", "viz_utils", "storage", "experiments", "figures", "training", "report", "cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}

# What importing the package must not bring with it: each belongs to an extra or to the tests.
EXTRAS = (
    *("jax", "jinja2", "lightning", "matplotlib", "PIL", "plotly", "pydantic", "rich", "safetensors"),
    *("scipy", "sklearn", "timm", "torchvision", "typer", "yaml"),
)

# Exactly what the package exports.
PUBLIC = {
    *("betainc", "betaincinv"),
    *("Beta", "Normal", "RelaxedBernoulli", "SymBeta"),
    *("batch_shaping", "BatchShapingLoss", "GeneralizedBatchShapingLoss", "SlicedBatchShapingLoss"),
    *("binary_concrete", "ChannelGate", "Gate", "gate_decisions", "gate_probabilities", "gate_statistics"),
    *("gates_forced", "l0_penalty", "straight_through_decisions", "count_macs"),
    *("gates_shifted", "calibrate", "guarantee"),
    *("conditional_inference", "prune_static_gates", "export_onnx"),
    *("gate_resnet", "gated_resnet18", "gated_resnet20", "gated_resnet32", "gated_resnet34"),
    *("gated_resnet50", "gated_resnet56"),
    "MSViT",
}


def modules() -> dict[str, Path]:
    """Every module by its name within the package; the package itself under its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(parts) or "batchshaping"] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports, at its top or within a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relative to itself"
            if node.module is not None and node.module.partition(".")[0] == "batchshaping":
                for alias in node.names:
                    within = f"{node.module}.{alias.name}".removeprefix("batchshaping.")
                    module = node.module.removeprefix("batchshaping.")
                    yield within if within in MODULES else module
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "batchshaping":
                    yield alias.name.removeprefix("batchshaping.")


IMPORTS = {name: set(imports(path)) for name, path in MODULES.items()}


def subject(module: str) -> str:
    """The folder that a module is in, or the module itself in the root."""
    return module.partition(".")[0]


def test_every_folder_and_every_module_of_the_root_has_a_floor() -> None:
    assert {subject(module) for module in MODULES} == LEVEL.keys()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_floor_or_from_below(module: str) -> None:
    level = LEVEL[subject(module)]
    assert {other for other in IMPORTS[module] if LEVEL[subject(other)] > level} == set()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_others_under_their_present_names(module: str) -> None:
    assert IMPORTS[module] <= MODULES.keys()


def test_imports_make_no_circle() -> None:
    TopologicalSorter(IMPORTS).prepare()


@pytest.mark.parametrize("module", [module for module in MODULES if subject(module) in FLOORS[0]])
def test_the_numbers_need_torch_alone(module: str) -> None:
    named = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            named.add((node.module or "").partition(".")[0])
    assert named - set(sys.stdlib_module_names) <= {"torch", "batchshaping"}


def test_importing_the_package_loads_no_extra_and_no_compiler() -> None:
    compiler = "torch._dynamo"  # which takes as long to load as the rest of torch
    code = f"import sys, batchshaping; print([m for m in {(*EXTRAS, compiler)} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_it_is_and_what_is_public(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    if MODULES[module].name == "__init__.py" and module != "batchshaping":
        return
    assigned = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert "__all__" in assigned


def test_the_public_names_are_those_of_the_design() -> None:
    assert set(batchshaping.__all__) == PUBLIC
    assert len(batchshaping.__all__) == len(PUBLIC)


@pytest.mark.parametrize("name", batchshaping.__all__)
def test_an_exported_name_is_documented_with_an_example(name: str) -> None:
    documentation = inspect.getdoc(getattr(batchshaping, name)) or ""
    summary = documentation.partition("\n")[0]
    assert summary.endswith((".", ":")), summary
    # An abstract class has its example where it is derived from.
    assert ">>> " in documentation or name == "Gate"


def test_the_map_in_the_documentation_names_every_module() -> None:
    document = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = {name for name, path in MODULES.items() if path.name != "__init__.py"}
    assert {name for name in named if f"{name.rpartition('.')[2]}.py" not in document} == set()


def test_every_module_can_be_imported() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("typer")
    for module in pkgutil.walk_packages([str(PACKAGE)], "batchshaping."):
        importlib.import_module(module.name)
