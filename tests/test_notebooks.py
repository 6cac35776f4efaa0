"""The notebooks are stored executed, and execute again to the same numbers."""

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from batchshaping.experiments.published import PUBLISHED_GENERALIZED_RUN, PUBLISHED_RUNS

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


@pytest.fixture(scope="module")
def execute(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], NotebookNode]]:
    """Executes a notebook, once."""

    @cache
    def executed(name: str) -> NotebookNode:
        fresh = read(name)
        for cell in fresh.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        resources = {"metadata": {"path": str(tmp_path_factory.mktemp("empty"))}}
        NotebookClient(fresh, timeout=300, kernel_name="python3", resources=resources).execute()
        return fresh

    with pytest.MonkeyPatch.context() as environment:
        # The kernel works in an empty folder and leaves its history in another.
        environment.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        environment.setenv("OMP_NUM_THREADS", "1")
        yield executed


def test_the_five_notebooks_are_there() -> None:
    assert {"batch_shaping.ipynb", "generalized_batch_shaping.ipynb", *LEARNED} <= set(NOTEBOOKS)


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


def after(label: str, text: str) -> list[float]:
    """The numbers that follow a label, to the end of its line."""
    found = re.search(rf"^{re.escape(label)}(?=[ :])(.*)$", text, re.MULTILINE)
    assert found, label
    return numbers(found[1])


def check_channel_gating(notebook: NotebookNode) -> None:
    """What the notebook on channel gating says of its networks, whatever seed they were trained with."""
    cells = [text for text in printed(notebook) if text]
    network, gate, gated, chance, budget, shaped, kinds, classes, digits, curves, folders = cells

    # By hand: a ResNet-8 of width 12 on 4 x 4, 2 x 2 and 1 x 1 pixels.
    stem, fc = 16 * 9 * 1 * 12, 48 * 10
    inner = [16 * 9 * 2 * 12 * 12, 4 * 9 * (12 + 24) * 24, 9 * (24 + 48) * 48]
    dense = stem + sum(inner) + 4 * 12 * 24 + 24 * 48 + fc
    gates = sum(16 * (before + after) for before, after in ((12, 12), (12, 24), (24, 48)))
    assert f"multiply-adds of an image: {dense:,}\n" in network
    assert f"the gates' own multiply-adds: {gates / dense:.1%} of" in gated
    assert f"with all gates closed: {(dense - sum(inner) + gates) / dense:.1%} are left" in gated
    assert "gates of each block: [12, 24, 48]\n" in gated
    assert "all decisions are 0 or 1: True" in gate
    assert "all open, the same outputs to the bit: True" in gated

    (plain,) = after("test accuracy", network)
    open_to_chance = {share: after(f"{share}% of the gates open", chance)[0] for share in (100, 90, 50)}
    assert plain == open_to_chance[100] == after("plain", budget)[0] > 90
    assert open_to_chance[100] > open_to_chance[90] > open_to_chance[50]

    # The pair of networks, and the difference that the loss makes.
    for name in ("L0 only", "batch-shaping"):
        accuracy, spent, is_open = after(name, budget)
        assert accuracy > 85
        assert spent < 45
        assert is_open < 50
        assert sum(after(name, kinds)) == pytest.approx(100, abs=0.2)
    (_, deviation, distance), (_, conditional, off) = after("L0 only", shaped), after("L0 only", kinds)
    assert after("batch-shaping", shaped)[1] > deviation
    assert after("batch-shaping", shaped)[2] < distance
    assert after("batch-shaping", kinds)[1] > conditional
    assert after("batch-shaping", kinds)[2] < off

    assert all(0 < after(f"layer{stage}.0", classes)[0] < 100 for stage in (1, 2, 3))
    cheaper, dearer = (after(f"the {half} half", digits) for half in ("cheaper", "more expensive"))
    assert cheaper[0] < dearer[0]
    for name in ("plain", "L0 only", "batch-shaping"):
        assert len(after(name, curves)) == (6 if name == "plain" else 4)
        assert after(name, curves)[1::2] == sorted(after(name, curves)[1::2])
    assert {"report.html", "config.yaml", "result.json"} <= set(folders.split())


def check_mixed_scale(notebook: NotebookNode) -> None:
    """What the notebook on tokens of two scales says of its networks, whatever seed they had."""
    cells = [text for text in printed(notebook) if text]
    images, all_fine, scales, gated, masks, priors, packed, dense, folders = cells

    assert "test images: 2000 of (1, 64, 64)" in images
    (fine,) = re.findall(r"test accuracy: ([\d.]+)%", all_fine)
    assert float(fine) > 85
    assert "all fine, the same outputs to the bit: True" in scales
    by_share = {
        share: after(f"{share}% of the regions fine, by chance", scales) for share in (100, 50, 20, 0)
    }
    spent = [each[0] for each in by_share.values()]
    assert spent == sorted(spent, reverse=True) and spent[0] >= 100 and spent[-1] < 30
    assert by_share[100][1] > by_share[50][1] > by_share[0][1]

    assert after("all fine", gated)[0] == float(fine)
    accuracy, share = after("gated", gated)
    assert accuracy > float(fine) - 4 and share < 50
    assert after("fine regions", gated)[0] == pytest.approx(20, abs=6)
    learned, entropy = after("learned", masks), after("entropy", masks)
    assert learned[0] > 75 and learned[0] - learned[1] > 60
    assert learned[0] > entropy[0] and learned[1] < entropy[1]
    assert after("correlation of the two maps", priors)[0] > 0.8
    assert "the same outputs: True" in packed
    least, most, _, mean = after("tokens of an image", packed)
    assert 16 <= least <= mean <= most <= 64 and mean < 32
    assert "features on the grid of patches: (2, 64, 8, 8)" in dense
    different, coarse = after("different features in the coarse regions", dense)
    assert coarse == 4 * different
    assert {"report.html", "fine", "gated"} <= set(folders.split())


def check_faster(notebook: NotebookNode) -> None:
    """What the notebook on making a network faster says of its networks, whatever seed they had."""
    cells = [text for text in printed(notebook) if text]
    plain, made, taught, budgets, shifted, promised, folder = cells

    # By hand: a ResNet-8 of width 32 on 8 x 8, 4 x 4 and 2 x 2 pixels.
    inner = [64 * 9 * 2 * 32 * 32, 16 * 9 * (32 + 64) * 64, 4 * 9 * (64 + 128) * 128]
    dense = 64 * 9 * 32 + sum(inner) + 16 * 32 * 64 + 4 * 64 * 128 + 128 * 10
    assert f"multiply-adds of an image: {dense:,}\n" in plain
    assert after("accuracy on 450 test digits", plain)[0] > 95
    assert made.splitlines()[:2] == ["training the gates", "trying other budgets"]
    assert 25 < after("multiply-adds", made)[0] < 45
    assert "within three points of the plain network: True" in made
    assert after("with the teacher", taught)[0] > 93 and after("without", taught)[0] > 90
    assert "closer to its outputs with the teacher: True" in taught
    assert re.findall(r"^budget (\d+)%: .* True$", budgets, re.MULTILINE) == ["20", "30", "40", "50"]
    assert "within the budget on the images it was found on: True" in shifted
    assert after("and on the test digits", shifted)[0] <= 37
    assert promised.index("No shift could be certified") < promised.index("five points")
    assert promised.index("five points") < promised.index("At shift")
    assert after("points lost on the other 225 images", promised)[0] < 8
    assert {"result.json", "budgets.json", "latency.json", "report.html"} <= set(folder.split())


LEARNED = {
    "channel_gating.ipynb": check_channel_gating,
    "mixed_scale_tokens.ipynb": check_mixed_scale,
    "from_trained_to_faster.ipynb": check_faster,
}
"""Train networks: a machine that rounds differently gets numbers as if from another seed."""


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_said_of_trained_networks_holds(name: str, execute: Callable[[str], NotebookNode]) -> None:
    LEARNED[name](read(name))
    LEARNED[name](execute(name))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_executes_and_prints_what_is_stored(name: str, execute: Callable[[str], NotebookNode]) -> None:
    stored, fresh = read(name), execute(name)
    for was, now in zip(printed(stored), printed(fresh), strict=True):
        assert words(now) == words(was)
        if name in LEARNED:
            continue
        for a, b, tolerance in zip(numbers(was), numbers(now), tolerances(was), strict=True):
            assert b == pytest.approx(a, rel=0, abs=tolerance), (was, now)
    assert [sorted(output.get("data", {})) for output in outputs(fresh) if "data" in output] == [
        sorted(output.get("data", {})) for output in outputs(stored) if "data" in output
    ]
