"""Checkpoints as safetensors: tensors, and everything else as JSON in the header. Nothing is unpickled.

A checkpoint, as Lightning makes it, consists of nested dictionaries and lists of tensors, numbers and text.
It is written to one file, which replaces an earlier one as a whole: an interruption leaves either the old
file or the new one. A checksum of the whole content is checked before any of it is used, so that a changed
bit is an error and never another result.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from batchshaping.storage.files import quoted, replaced

__all__ = [
    "SafeCheckpoints",
    "checksum",
    "read_checkpoint",
    "read_tensors",
    "read_weights",
    "write_checkpoint",
    "write_tensors",
    "write_weights",
]

_TENSOR, _PAIRS = "$tensor", "$pairs"
_CHECKSUM = "sha256"


def write_tensors(tensors: Mapping[str, Tensor], path: Path, text: str = "") -> None:
    """Write tensors and a text to a safetensors file with a checksum, as a whole or not at all.

    The checksum is the SHA-256 of the text and of the name, type, shape and bytes of each tensor. For other
    software, the file is an ordinary safetensors file. Equal tensors and texts give equal files.

    Args:
        tensors: the tensors by their names. They must be contiguous and must not share memory.
        path: the file; an earlier one is replaced.
        text: the text, which is stored in the header.

    Raises:
        OSError: if the file cannot be written; an earlier one is then as it was.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> write_tensors({"weight": torch.ones(2)}, path, "trained")
        >>> read_tensors(path)
        ({'weight': tensor([1., 1.])}, 'trained')
    """
    # Checksum and text are one entry, since safetensors writes several entries in a varying order.
    metadata = {_CHECKSUM: f"{checksum(tensors, text)} {text}"}
    with replaced(path) as partial:
        partial.write_bytes(save(dict(tensors), metadata=metadata))


def write_weights(network: nn.Module, path: Path, text: str = "") -> None:
    """Write all tensors of a network, and a text, as :func:`write_tensors` does.

    Raises:
        OSError: if the file cannot be written; an earlier one is then as it was.
    """
    write_tensors({name: value.contiguous() for name, value in network.state_dict().items()}, path, text)


def read_tensors(path: Path, earlier: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Read what :func:`write_tensors` wrote: the tensors, on the CPU, and the text.

    Args:
        path: the file.
        earlier: name of the text in the header of files of earlier versions, which had no checksum; None if
            they had no text. Such files are read as they are.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if the file is not a safetensors file, or was changed.
    """
    tensors, metadata = _read(path)
    # No other names are accepted, so that a file does not pass for one without a checksum if a bit of the
    # checksum's name has changed.
    if [*metadata] == ([] if earlier is None else [earlier]):
        return tensors, "".join(metadata.values())
    if [*metadata] != [_CHECKSUM]:
        raise ValueError(f"expected a checksum in the header, received {quoted([*metadata])}")
    return tensors, _checked(tensors, metadata[_CHECKSUM])


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of any safetensors file, on the CPU; of one with a checksum as here, it is checked.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if the file is not a safetensors file, or has a checksum and was changed.
    """
    tensors, metadata = _read(path)
    if _CHECKSUM in metadata:
        _checked(tensors, metadata[_CHECKSUM])
    return tensors


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a safetensors file: {error}") from None


def _checked(tensors: Mapping[str, Tensor], entry: str) -> str:
    """The text of an entry of checksum and text, if the tensors are those that it was made of."""
    expected, _, text = entry.partition(" ")
    received = checksum(tensors, text)
    if received != expected:
        raise ValueError(f"expected the checksum {quoted(expected)}, received {received}")
    return text


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """The SHA-256 of a text and of the name, type, shape and bytes of each tensor."""
    digest = hashlib.sha256(json.dumps(text).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), [*tensor.shape]]).encode())
        # A contiguous tensor of at most one value may have any strides, but a view as bytes needs those of 1.
        flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write nested dictionaries and lists of tensors, numbers, text and None, as a whole or not at all.

    Args:
        checkpoint: the checkpoint. Its tuples are read as lists later.
        path: the file; an earlier one is replaced.

    Raises:
        TypeError: if there is a value of another type in the checkpoint.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "checkpoint.safetensors"
        >>> write_checkpoint({"step": 3, "state": {0: torch.ones(2)}}, path)
        >>> read_checkpoint(path)
        {'step': 3, 'state': {0: tensor([1., 1.])}}
    """
    tensors: dict[str, Tensor] = {}
    tree = _without_tensors(checkpoint, "", tensors)
    write_tensors(tensors, path, json.dumps(tree))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`write_checkpoint` wrote, with its tensors on the CPU.

    Args:
        path: the file.

    Raises:
        ValueError: in one line that names the file, if it cannot be read or is not such a checkpoint.
    """
    try:
        tensors, text = read_tensors(path, earlier="checkpoint")
        checkpoint = _with_tensors(json.loads(text), tensors)
        assert isinstance(checkpoint, dict)
        return checkpoint
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError):
        raise ValueError(
            f"{path}: expected a checkpoint of batchshaping, whole and unchanged, received something else"
        ) from None


class SafeCheckpoints(CheckpointIO):
    """Saves and loads the checkpoints of Lightning."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        Path(path).unlink(missing_ok=True)


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The same value in types that JSON has; its tensors are added to ``tensors``, named by their paths."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.dtype == torch.complex128:
            raise TypeError(f"a checkpoint must hold dense tensors, received {value.dtype} at {name}")
        # Different paths can give the same name: "a.b" and "b" in "a". One name is reserved by the format.
        while name in tensors or name in ("", "__metadata__"):
            name += "'"
        # A copy, since tensors in this format must not share memory.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        pairs = [(key, _without_tensors(item, _path(name, key), tensors)) for key, item in value.items()]
        wrong = [key for key, _ in pairs if not isinstance(key, str | int | float | None)]
        if wrong:
            raise TypeError(f"a checkpoint must have numbers and text as keys, received {wrong[0]!r}")
        plain = all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs)
        return dict(pairs) if plain else {_PAIRS: [list(pair) for pair in pairs]}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, _path(name, index), tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    received = f"a {type(value).__name__} at {name}"
    raise TypeError(f"a checkpoint must hold tensors, numbers and text, received {received}")


def _path(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _with_tensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_with_tensors(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    pairs = tree[_PAIRS] if _PAIRS in tree else tree.items()
    return {key: _with_tensors(item, tensors) for key, item in pairs}
