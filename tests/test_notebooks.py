"""The notebooks are stored executed, and execute again to the same numbers."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from batchshaping.published import PUBLISHED_GENERALIZED_RUN, PUBLISHED_RUNS

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path.name for path in ROOT.glob("*.ipynb"))
NUMBER = re.compile(r"-?\d+(?:\.(\d+))?(?:e([-+]\d+))?")


def read(name: str) -> NotebookNode:
    return nbformat.read(ROOT / name, as_version=4)


def printed(notebook: NotebookNode) -> list[str]:
    """What each code cell prints."""
    return [
        "".join(output.text for output in cell.outputs if output.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def numbers(text: str) -> list[float]:
    return [float(found[0]) for found in NUMBER.finditer(text)]


def tolerances(text: str) -> list[float]:
    """One unit of each number's last printed digit; none for integers, more where rounding decides."""
    allowed = []
    for found in NUMBER.finditer(text):
        digits, exponent = found[1], int(found[2] or 0)
        unit = 0.0 if digits is None else 1.01 * 10.0 ** (exponent - len(digits))
        size = abs(float(found[0]))
        allowed.append(max(unit, 0.15 * size, 1e-9) if found[2] and size < 1e-4 else unit)
    return allowed


def words(text: str) -> list[str]:
    return NUMBER.sub("0", text).split()


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_both_notebooks_are_there() -> None:
    assert {"batch_shaping.ipynb", "generalized_batch_shaping.ipynb"} <= set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_stored_executed_from_top_to_bottom(name: str) -> None:
    notebook = read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    found = outputs(notebook)
    assert any("image/png" in output.get("data", {}) for output in found)
    assert any(output.output_type == "stream" for output in found)
    assert [output for output in found if output.output_type == "error"] == []
    assert [output for output in found if output.get("name") == "stderr"] == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_small_and_tells_nothing_of_the_machine_that_ran_it(name: str) -> None:
    assert (ROOT / name).stat().st_size < 1_000_000
    notebook = read(name)
    assert notebook.metadata.kernelspec == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    assert notebook.metadata.language_info == {"name": "python"}
    assert all(not cell.metadata for cell in notebook.cells)
    for text in printed(notebook):
        assert not re.search(r"/(home|root|tmp|usr|work|Users)/| at 0x[0-9a-f]", text)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_it_shows_and_links_to_is_in_the_repository(name: str) -> None:
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).is_file()] == []


def test_they_print_the_published_losses() -> None:
    text = "\n".join(printed(read("batch_shaping.ipynb")))
    for run in PUBLISHED_RUNS:
        assert f"published {run.loss}" in text
        if run.loss != "3.1e-06":  # rounding decides its last digit
            assert f"final loss {run.loss}, published {run.loss}" in text
    text = "\n".join(printed(read("generalized_batch_shaping.ipynb")))
    assert re.search(rf"as published +{PUBLISHED_GENERALIZED_RUN.loss}", text)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_executes_and_prints_what_is_stored(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel works in an empty folder and leaves its history there.
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stored, fresh = read(name), read(name)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    for was, now in zip(printed(stored), printed(fresh), strict=True):
        assert words(now) == words(was)
        for a, b, tolerance in zip(numbers(was), numbers(now), tolerances(was), strict=True):
            assert b == pytest.approx(a, rel=0, abs=tolerance), (was, now)
    assert [sorted(output.get("data", {})) for output in outputs(fresh) if "data" in output] == [
        sorted(output.get("data", {})) for output in outputs(stored) if "data" in output
    ]
