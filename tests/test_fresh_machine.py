"""On a machine that has Python and make only, the two commands of the README do all the set-up."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytest_plugins = "pytester"


# The browser


@pytest.fixture
def without_a_browser(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """The set-up of this folder for two tests, of which one opens a browser; no program can be found."""
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile("def test_a_page(browser): ...", test_other="def test_a_number(): ...")
    monkeypatch.setenv("PATH", str(pytester.path))
    monkeypatch.delenv("CI", raising=False)
    return pytester


@pytest.mark.parametrize("workers", ["0", "1"])
def test_without_a_browser_the_last_line_says_what_was_not_checked(
    workers: str, without_a_browser: pytest.Pytester
) -> None:
    result = without_a_browser.runpytest("-q", "--strict-markers", "-n", workers)
    assert result.parseoutcomes() == {"passed": 1, "skipped": 1}
    assert result.ret == 0
    assert result.outlines[-1] == (
        "Not checked: the report in a browser (1 tests). To check it, install chromium and chromedriver "
        "(apt-get install chromium chromium-driver), then make test"
    )


def test_what_needs_no_browser_ends_as_usual(without_a_browser: pytest.Pytester) -> None:
    result = without_a_browser.runpytest("-m", "not browser")
    assert result.parseoutcomes() == {"passed": 1, "deselected": 1}
    assert "Not checked" not in result.stdout.str()


def test_in_ci_a_browser_must_be_there(
    without_a_browser: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    result = without_a_browser.runpytest()
    assert result.parseoutcomes() == {"passed": 1, "errors": 1}
    assert "Not checked" not in result.stdout.str()


def program(folder: Path, name: str, body: str = "") -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def make(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run make on a machine that has the programs of a folder only."""
    command = shutil.which("make")
    if command is None:
        pytest.skip("needs make")
    return subprocess.run(
        [command, *arguments], env={"PATH": str(path)}, cwd=ROOT, capture_output=True, text=True, check=False
    )


def calls(folder: Path) -> list[str]:
    log = folder / "log"
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


@pytest.mark.parametrize("exit_code", [0, 100])
def test_root_gets_the_browser_from_apt_where_there_is_none(exit_code: int, tmp_path: Path) -> None:
    program(tmp_path, "apt-get", f'echo "$@" >> {tmp_path}/log; exit {exit_code}')
    program(tmp_path, "id", "echo 0")
    # What cannot be installed is left to the tests, which say so.
    assert make("browser", path=tmp_path).returncode == 0
    assert calls(tmp_path) == ["update -qq", "install -qq chromium chromium-driver"]


@pytest.mark.parametrize(("user", "browser"), [("1000", ()), ("0", ("chromium", "chromedriver"))])
def test_nothing_is_installed_by_an_ordinary_user_or_twice(
    user: str, browser: tuple[str, ...], tmp_path: Path
) -> None:
    program(tmp_path, "apt-get", f'echo "$@" >> {tmp_path}/log')
    program(tmp_path, "id", f"echo {user}")
    for name in browser:
        program(tmp_path, name)
    done = make("browser", path=tmp_path)
    assert (done.returncode, done.stdout, done.stderr, calls(tmp_path)) == (0, "", "", [])


def test_a_machine_without_apt_is_left_alone(tmp_path: Path) -> None:
    program(tmp_path, "id", "echo 0")
    done = make("browser", path=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_make_test_ends_with_the_tests_whose_last_line_says_what_was_not_checked() -> None:
    done = make("--dry-run", "test", path=Path(os.environ["PATH"]))
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stdout.splitlines() if " -m " in line]
    checks = ("ruff check", "ruff format", "mypy", "sphinx", "pytest -n")
    assert [check for check in checks if not any(check in step for step in steps)] == []
    assert "pytest -n" in steps[-1]
    assert sum("pytest -n" in step for step in steps) == 1
    assert "--ignore" not in steps[-1], "the notebooks are among the tests"


# The notebooks


def imports_of(code: str) -> set[str]:
    """The modules that Python code imports, at its top or within a function."""
    modules = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def needed(modules: set[str]) -> set[str]:
    """What these modules need from elsewhere, those of this package with all that they import in turn."""
    found: set[str] = set()
    seen: set[str] = set()
    while modules:
        module = modules.pop()
        top = module.partition(".")[0]
        if top != "batchshaping":
            found.add(top)
            continue
        path = ROOT / f"{module.replace('.', '/')}.py"
        path = path if path.is_file() else path.with_suffix("") / "__init__.py"
        if module not in seen and path.is_file():
            seen.add(module)
            modules |= imports_of(path.read_text(encoding="utf-8"))
    return found - set(sys.stdlib_module_names) - {"__future__"}


def name_of(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement)[0].lower()


def dependencies(distribution: str, extras: Collection[str] = ()) -> set[str]:
    """The names of what an installed distribution asks for by itself, and with some of its extras."""
    names = set()
    for requirement in requires(distribution) or []:
        of_extra = re.search(r"extra == .([\w-]+)", requirement)
        if of_extra is None or of_extra[1] in extras:
            names.add(name_of(requirement))
    return names


def required() -> set[str]:
    """What requirements.txt asks for, and what comes with this package and its extras."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (package,) = (line for line in lines if line.startswith("--editable ."))
    direct = dependencies("batchshaping", package.partition("[")[2].rstrip("]").split(","))
    return {name_of(line) for line in lines if line[:1].isalpha()}.union(direct, *map(dependencies, direct))


def test_the_requirements_hold_what_the_published_notebooks_import() -> None:
    assert {"jupyterlab", "matplotlib", "numpy", "seaborn", "torch"} <= required()


@pytest.mark.parametrize("notebook", sorted(ROOT.glob("*.ipynb")), ids=lambda path: path.name)
def test_the_requirements_hold_what_our_notebooks_import(notebook: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "code" for line in cell["source"]]
    code = "\n".join(line.rstrip("\n") for line in lines if not line.startswith("%"))
    names, distributions = required(), packages_distributions()
    found = {module: {name.lower() for name in distributions[module]} for module in needed(imports_of(code))}
    assert {"torch", "matplotlib"} <= found.keys()
    # Exporting asks for its extra itself, and no notebook exports.
    assert "export" not in code
    names |= dependencies("batchshaping", ["onnx"])
    assert {module for module, of_module in found.items() if not of_module & names} == set()
