"""A checkpoint comes back as it was, replaces the old one as a whole, and is data, never code."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from batchshaping.training.checkpoints import (
    SafeCheckpoints,
    read_checkpoint,
    read_tensors,
    write_checkpoint,
    write_tensors,
)

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of any dtype and of up to three dimensions, perhaps empty, perhaps strided."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    bits = torch.randint(
        0, 2, (*shape, 16), generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
    )
    tensor = (bits @ 2 ** torch.arange(16)).to(draw(st.sampled_from(DTYPES)))
    return draw(
        st.sampled_from(
            [tensor, tensor.T if tensor.ndim == 2 else tensor, tensor[..., ::2] if shape else tensor]
        )
    )


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
awkward = st.sampled_from(["a", "b", "a.b", "a'", "0", "$tensor", "$pairs", "$", "", ".", "__metadata__"])
keys = text | awkward | st.integers(-3, 10**20)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | text | tensors()
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=8,
)


def same(found: Any, expected: Any) -> bool:
    """Equal in types, bits and the order of keys; a tuple is a list."""
    if isinstance(expected, Tensor):
        return (
            type(found) is Tensor
            and (found.dtype, found.shape) == (expected.dtype, expected.shape)
            and not found.requires_grad
            and found.tolist() == expected.tolist()
        )
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return type(found) is list and len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float) and math.isnan(expected):
        return math.isnan(found)
    return type(found) is type(expected) and found == expected


@given(tree=st.dictionaries(keys, trees, max_size=4))
def test_a_checkpoint_comes_back_as_it_was(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "checkpoint.safetensors"
    write_checkpoint(tree, path)
    assert same(read_checkpoint(path), tree)
    assert not [*path.parent.glob(".*.partial")]


def test_memory_that_is_shared_is_not_lost(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    tree = {
        "a": {"b": whole, "c": whole},
        "a.b": whole[2:],
        "a.c": [whole.view(2, 3), whole.view(2, 3).T, whole.expand(2, 6)],
        "parameter": torch.nn.Parameter(whole),
    }
    write_checkpoint(tree, tmp_path / "x")
    found = read_checkpoint(tmp_path / "x")
    tree["parameter"] = whole
    assert same(found, tree)
    found["a"]["b"].zero_()
    assert found["a"]["c"][1] == 1


def test_the_state_of_an_optimizer_and_a_generator_comes_back(tmp_path: Path) -> None:
    first = torch.nn.Linear(3, 2)
    model = torch.nn.Sequential(first, torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "generator": torch.get_rng_state(),
    }
    write_checkpoint(state, tmp_path / "x")
    found = read_checkpoint(tmp_path / "x")
    assert same(found, state)
    optimizer.load_state_dict(found["optimizer"])
    assert optimizer.state[first.weight]["momentum_buffer"].shape == (2, 3)


def test_lightning_saves_loads_and_removes_by_it(tmp_path: Path) -> None:
    path, io = tmp_path / "x", SafeCheckpoints()
    io.save_checkpoint({"step": 3}, str(path))
    assert io.load_checkpoint(str(path), map_location=lambda storage, _: storage) == {"step": 3}
    io.remove_checkpoint(path)
    io.remove_checkpoint(path)
    assert not path.exists()


# What is refused


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (b"bytes", "bytes"),
        ({1, 2}, "set"),
        (object(), "object"),
        (1j, "complex"),
        (Path("x"), "Path"),
        (date(2020, 1, 1), "date"),
        (np.float32(1), "float32"),
        (np.int64(1), "int64"),
        (np.zeros(2), "ndarray"),
        (torch.float32, "dtype"),
        (torch.device("cpu"), "device"),
        (len, "builtin_function_or_method"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_data_is_refused_with_its_type_and_place(value: object, name: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_checkpoint({"old": 1}, path)
    with pytest.raises(TypeError, match=rf"received a \w*{name} at a\.0\.b$"):
        write_checkpoint({"a": [{"b": value}]}, path)
    assert read_checkpoint(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("key", [(1, 2), b"a", np.int64(1), frozenset([1])], ids=repr)
def test_keys_that_would_not_come_back_are_refused(key: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_checkpoint({"a": {key: 1}}, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse()], ids=["complex128", "sparse"]
)
def test_tensors_that_the_format_does_not_have_are_refused(tensor: Tensor, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"at a$"):
        write_checkpoint({"a": tensor}, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["__metadata__", "", "'", "$tensor", "a.b"])
def test_no_name_is_taken(name: str, tmp_path: Path) -> None:
    tree = {name: torch.ones(2), "a": {"b": torch.zeros(1)}}
    write_checkpoint(tree, tmp_path / "x")
    assert same(read_checkpoint(tmp_path / "x"), tree)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("save", [lambda x, p: p.write_bytes(pickle.dumps(x)), torch.save])
def test_a_pickle_is_refused_and_not_run(save: Any, tmp_path: Path) -> None:
    save(Touch(tmp_path / "made"), tmp_path / "x")
    refused(tmp_path / "x")
    assert not (tmp_path / "made").exists()


@given(data=st.data())
def test_a_part_of_a_checkpoint_is_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "whole"
    write_checkpoint({"a": torch.arange(5), "b": [1, {"c": torch.ones(2)}]}, path)
    whole = path.read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1))
    part = path.with_name("part")
    part.write_bytes(whole[:length])
    refused(part)
    part.write_bytes(whole + b"\0")
    refused(part)


@given(content=st.binary(max_size=64))
def test_bytes_are_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"format": "pt"},
        {"checkpoint": ""},
        {"checkpoint": "{"},
        {"checkpoint": "[1]"},
        {"checkpoint": "3"},
        {"checkpoint": json.dumps({"a": {"$tensor": "missing"}})},
        {"checkpoint": json.dumps({"a": {"$tensor": ["weight"]}})},
        {"checkpoint": json.dumps({"$tensor": "weight"})},
        {"checkpoint": json.dumps({"$pairs": 3})},
        {"checkpoint": json.dumps({"$pairs": [["a"]]})},
        {"checkpoint": json.dumps({"$pairs": [[["a"], 1]]})},
        {"checkpoint": "[" * 10**5},
        {"checkpoint": '{"a":' * 10**5},
    ],
    ids=lambda metadata: repr(metadata)[:50],
)
def test_other_files_of_safetensors_are_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "x", metadata=metadata)
    refused(tmp_path / "x")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "missing")
    refused(tmp_path)
    refused(tmp_path / "missing" / "x")


# What has changed


def changed_bits(path: Path) -> Iterator[None]:
    """The file with one bit changed, and then with another."""
    whole = path.read_bytes()
    # All bits in turn would take long; this step comes to each place in a byte.
    for position in range(0, 8 * len(whole), 5):
        changed = bytearray(whole)
        changed[position // 8] ^= 1 << position % 8
        path.write_bytes(changed)
        yield


def test_a_bit_that_changes_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    tree = {"epoch": 3, "é": [0.5, None], "state": {0: torch.arange(5), 1: torch.ones(2, 2)}}
    write_checkpoint(tree, path)
    for _ in changed_bits(path):
        refused(path)


def test_a_bit_that_changes_in_the_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensors({"a": torch.arange(5), "b": torch.zeros(3, dtype=torch.bfloat16)}, path)
    for _ in changed_bits(path):
        with pytest.raises(ValueError, match="expected"):
            read_tensors(path)


named = st.dictionaries(text.filter(lambda name: name not in ("", "__metadata__")), tensors())


@given(tensors=named, note=text)
def test_weights_come_back_and_are_plain_for_others(
    tensors: dict[str, Tensor], note: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "weights"
    tensors = {name: tensor.contiguous().clone() for name, tensor in sorted(tensors.items())}
    write_tensors(tensors, path, note)
    found, received = read_tensors(path)
    assert received == note
    for each in (found, load_file(path)):
        assert same({name: each[name] for name in tensors}, tensors) and each.keys() == tensors.keys()
    before = path.read_bytes()
    write_tensors(tensors, path, note)
    assert path.read_bytes() == before


def test_each_thing_that_changes_is_noticed(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x", {"a": torch.ones(2, 3), "b": torch.zeros(3)}
    write_tensors(tensors, path, "text")
    with safe_open(path, framework="pt") as file:
        marked = file.metadata()
    save_file(tensors, path, metadata=marked)
    read_tensors(path)
    other: list[dict[str, Tensor]] = [
        {"a": tensors["a"]},
        {**tensors, "c": torch.zeros(1)},
        {"a": tensors["a"], "c": tensors["b"]},
        {**tensors, "a": torch.ones(3, 2)},
        {**tensors, "b": torch.zeros(3, dtype=torch.int32)},
        {**tensors, "b": -torch.zeros(3)},
    ]
    for each in other:
        save_file(each, path, metadata=marked)
        with pytest.raises(ValueError, match="expected the checksum"):
            read_tensors(path)
    for wrong in ("texts", "", "other"):
        save_file(tensors, path, metadata={"sha256": marked["sha256"].replace("text", wrong)})
        with pytest.raises(ValueError, match="expected the checksum"):
            read_tensors(path)


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    path, weight = tmp_path / "x", torch.ones(2)
    save_file({"weight": weight}, path, metadata={"checkpoint": '{"a": {"$tensor": "weight"}}'})
    assert same(read_checkpoint(path), {"a": weight})
    save_file({"weight": weight}, path)
    assert same(read_tensors(path)[0], {"weight": weight})


@pytest.mark.parametrize(
    "metadata",
    [
        *({"checkpoint": "{}", "sha256": "0" * 64}, {"checkpoint": "{}", "format": "pt"}, {"sha257": "{}"}),
        *({"sha256": "{}"}, {"sha256": ""}, {"sha256": "0" * 64 + " {}"}, {"Checkpoint": "{}"}),
    ],
)
def test_a_checksum_that_is_wrong_does_not_pass_for_none(metadata: dict[str, str], tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "x", metadata=metadata)
    refused(tmp_path / "x")


# Interruptions


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"]
)
@pytest.mark.parametrize(
    "where", ["os.fsync", "pathlib.Path.replace", "batchshaping.training.checkpoints.save"]
)
def test_a_write_that_is_interrupted_leaves_the_old_file(
    where: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    write_checkpoint({"old": torch.ones(2)}, path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(where, fail)
    with pytest.raises(type(error)):
        write_checkpoint({"new": torch.zeros(3)}, path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.with_name(".x.partial").write_bytes(b"half")
    write_checkpoint({"a": 1}, path)
    assert read_checkpoint(path) == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.partial", "x"]
