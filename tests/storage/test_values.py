"""Values come back from a file as they were written; what is no file of values says so in one line."""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from batchshaping.storage.values import read_values, write_values


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


arrays = npst.arrays(
    st.sampled_from(["<f2", "<f4", "<f8", ">f4", ">f8", "u1", "<i8", "?"]),
    npst.array_shapes(min_dims=0, max_dims=3, max_side=4),
    elements={"min_value": 0, "max_value": 1},
)


@given(values=arrays)
def test_numpy_arrays_come_back_in_their_shape(values: np.ndarray, tmp_path_factory: Callable) -> None:
    path = tmp_path_factory.mktemp("values") / "x.npy"
    np.save(path, values)
    read = read_values(path)
    assert read.dtype == (torch.float64 if values.dtype in ("<f8", ">f8") else torch.float32)
    np.testing.assert_array_equal(read.numpy(), values.astype(read.numpy().dtype))


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_in_fortran_order_and_of_the_old_and_new_format(order: str, tmp_path: Path) -> None:
    values = np.asarray(np.random.default_rng(0).random((3, 4)), order=order)
    for version in ((1, 0), (2, 0), (3, 0)):
        with (tmp_path / "x.npy").open("wb") as file:
            np.lib.format.write_array(file, values, version=version)
        np.testing.assert_array_equal(read_values(tmp_path / "x.npy").numpy(), values)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int64,
        torch.bool,
    ],
)
def test_tensors_come_back_in_their_shape(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.rand(3, 1, 4).to(dtype)
    torch.save(values, tmp_path / "x.pt")
    read = read_values(tmp_path / "x.pt")
    assert read.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(read, values.to(read.dtype))


@pytest.mark.parametrize(
    "values",
    [
        torch.nn.Parameter(torch.rand(3)),
        torch.rand(4, 6)[::2].T,
        torch.rand(3, requires_grad=True),
        torch.eye(3).to_sparse(),
    ],
)
def test_parameters_views_and_sparse_tensors_are_values_too(values: torch.Tensor, tmp_path: Path) -> None:
    torch.save(values, tmp_path / "x.PT")
    read = read_values(tmp_path / "x.PT")
    assert not read.requires_grad
    assert torch.equal(read, values.detach().to_dense())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.1,0.2\n0.3,0.4\n", [[0.1, 0.2], [0.3, 0.4]]),
        ("left,right\r\n0.1,0.2\r\n", [[0.1, 0.2]]),
        ('"left, open",right\n0.1, 2e-1\n', [[0.1, 0.2]]),
        ("0.1\n\n0.2\n0.3", [0.1, 0.2, 0.3]),
        ("\ufeffgate\n0.1\n", [0.1]),
        ("0.25", [0.25]),
        ("_a,é,# b\n.5,5.\n", [[0.5, 5.0]]),
        ("info,e5\n+1e-2,-0\n", [[0.01, 0.0]]),
        ("0.5,inf\n-Infinity,1E3\n", [[0.5, math.inf], [-math.inf, 1000.0]]),
    ],
)
def test_text_comes_back_as_columns(text: str, expected: list[float], tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    read = read_values(tmp_path / "x.csv")
    assert read.dtype == torch.float64
    assert read.tolist() == expected


def test_nan_is_a_number_in_every_line(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("nan,NaN\n0.5,nan\n")
    read = read_values(tmp_path / "x.csv")
    assert read.shape == (2, 2) and read.isnan().tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize(
    "line",
    [
        *("0x1A,0x2B", "1_000,2_000", "0b1,0b0", "0o7,0o1", "1d5,2d5", "1e,2e", "1.#INF,1.#IND"),
        *("50%,60%", "1'000,2'000", "12:30,13:30", "1/2,1/3", "1st,2nd", "-,-", "--1,--2", "$1,$2"),
        *("na,NA", "null,None", "true,FALSE", "n/a,N/A", ",", "left,0.5", "left,nan", "left,0x1A", "١٢,٣"),
    ],
)
@pytest.mark.parametrize("where", [1, 2])
def test_what_could_be_a_number_in_another_notation_is_no_name(line: str, where: int, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    lines = ["0.1,0.2", "0.3,0.4", "0.5,0.6"]
    lines.insert(where - 1, line)
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"\A[^\n]*: expected numbers, received .* in line {where}\Z"):
        read_values(path)


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"nothing")
    return buffer.getvalue()


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def pt(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def compressed(content: object) -> bytes:
    """What torch.save writes, but compressed, to a thousandth of its size."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(pt(content))) as stored,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for part in stored.infolist():
            archive.writestr(part.filename, stored.read(part))
    return buffer.getvalue()


ONE_TENSOR = "expected one tensor as torch.save writes it"
TOO_MANY = "expected at most 67108864 values, received 1000000000000"
TRILLION = (10**6, 10**6)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of parts of PyTorch that are new or old
    SPARSE = torch.sparse_csr_tensor(
        torch.zeros(10**6 + 1, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.ones(0), TRILLION
    )
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    JAGGED = torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)
    QUANTIZED = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)

HUGE = npy(np.zeros(3)).replace(b"(3,), }" + b" " * 16, b"(3000000000000000,), }", 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"0.1", "expected a name that ends with .npy or .csv or .pt"),
        ("x", b"0.1", "expected a name that ends with .npy or .csv or .pt"),
        ("x.npy", b"", "expected an array of numbers as numpy.save writes it"),
        ("x.npy", b"0.1,0.2", "expected an array of numbers"),
        ("x.npy", zipped("x.npy"), "expected an array of numbers"),
        ("x.npy", npy(np.ones(9))[:-1], "expected an array of numbers"),
        ("x.npy", HUGE, "expected an array of numbers"),
        (
            "x.npy",
            npy(np.array([1, "a", None], dtype=object), allow_pickle=True),
            "expected an array of numbers",
        ),
        ("x.npy", npy(np.array(["a", "b"])), "expected real numbers, received an array of <U1"),
        ("x.npy", npy(np.ones(2, dtype=complex)), "expected real numbers, received an array of complex128"),
        ("x.npy", npy(np.ones((0, 3))), "expected at least one value, received shape (0, 3)"),
        ("x.csv", b"", "expected at least one value, received shape (0,)"),
        ("x.csv", b"gate\n", "expected at least one value, received shape (0,)"),
        ("x.csv", b"0.1,0.2\n0.3,open\n", "expected numbers, received 'open' in line 2"),
        ("x.csv", b"0.1,left\n0.3,0.4\n", "expected numbers, received 'left' in line 1"),
        ("x.csv", b"0.1,\n", "expected numbers, received '' in line 1"),
        ("x.csv", b"0.1;0.2\n0.3;0.4\n", "expected numbers, received '0.1;0.2' in line 1"),
        ("x.csv", b"0.1,0.2\n0.3\n", "expected 2 numbers a line, received 1 in line 2"),
        ("x.csv", b"\xff\xfe\x00", "expected numbers with commas between them"),
        ("x.csv", npy(np.ones(3)), "expected numbers with commas between them"),
        ("x.pt", b"", "expected one tensor as torch.save writes it"),
        ("x.pt", b"not a tensor", "expected one tensor as torch.save writes it"),
        ("x.pt", zipped("data.pkl"), "expected one tensor as torch.save writes it"),
        ("x.pt", pt(torch.ones(9))[:-50], "expected one tensor as torch.save writes it"),
        ("x.pt", pt({"weight": torch.ones(2)}), "expected one tensor of real numbers, received a dict"),
        ("x.pt", pt(torch.ones(2, dtype=torch.complex64)), "received torch.complex64"),
        ("x.pt", pt(torch.ones(2, device="meta")), "expected one tensor as torch.save writes it"),
        ("x.pt", pt(torch.ones(0)), "expected at least one value, received shape (0,)"),
        ("x.pt", pt(torch.ones(1).expand(TRILLION)), TOO_MANY),
        ("x.pt", pt(torch.ones(9).as_strided(TRILLION, (0, 0))), TOO_MANY),
        ("x.pt", pt(torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), TRILLION)), TOO_MANY),
        ("x.pt", pt(SPARSE), TOO_MANY),
        ("x.pt", pt(NESTED), ONE_TENSOR),
        ("x.pt", pt(JAGGED), ONE_TENSOR),
        ("x.pt", pt(QUANTIZED), ONE_TENSOR),
        ("x.pt", compressed(torch.zeros(10**6)), ONE_TENSOR),
        ("x.csv", b"0.1\n" + b"x" * 10**4, "expected numbers, received 'xxx"),
    ],
)
def test_what_is_no_file_of_values_says_so_in_one_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected") as error:
        read_values(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 200


@pytest.mark.parametrize("kind", ["torch.save", "pickle", "numpy.save"])
def test_no_code_in_a_file_is_run(kind: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    path = tmp_path / ("x.npy" if kind == "numpy.save" else "x.pt")
    if kind == "torch.save":
        torch.save(Touch(made), path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Touch(made)))
    else:
        np.save(path, np.array([Touch(made)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="received something else"):
        read_values(path)
    assert not made.exists()


@pytest.mark.parametrize("name", ["x.npy", "x.csv", "x.pt"])
def test_a_file_that_is_not_there_or_a_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_values(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError):
        read_values(tmp_path / name)


def test_tensors_in_the_old_format_of_torch_are_read(tmp_path: Path) -> None:
    torch.save(torch.rand(3), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert read_values(tmp_path / "x.pt").shape == (3,)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npy"
    write_values(path, torch.ones(2))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_values(path, torch.zeros(3))
    assert torch.equal(read_values(path), torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["x.npy"]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    values = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    write_values(tmp_path / "x.npy", values)
    assert torch.equal(read_values(tmp_path / "x.npy"), values.detach())
    assert [file.name for file in tmp_path.iterdir()] == ["x.npy"]
