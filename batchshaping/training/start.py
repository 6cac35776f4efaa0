"""Weights to start a training from: those of an earlier run, of a file, or of a library.

They are weights of the network without gates. Where they come from is one text:

=================================== ==================================================================
``outputs/run``                     a folder: the weights that a finished run without gates ended with
``weights.safetensors``             a file
``torchvision:resnet50``            torchvision's best weights of that network
``timm:vit_small_patch16_224``      timm's; a tag may follow the name, as in ``vit_small_patch16_224.dino``
=================================== ==================================================================

Files are read as tensors, and nothing in them is run. All names and shapes must be those of the network.
Weights of a library may be for other images and classes: their position embeddings are interpolated, for grey
images the weights of the three colours are added up, and otherwise a first or last layer of another shape
stays new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from batchshaping.training.checkpoints import checksum, read_weights
from batchshaping.training.config import RunConfig

__all__ = ["LIBRARIES", "Start", "from_anywhere"]


@dataclass(frozen=True, eq=False)
class Start:
    """Weights to start from; called with a network without gates, it puts them there.

    Attributes:
        source: where they come from.
        weights: tensors by their names.

    Example:
        >>> network = nn.Linear(3, 2)
        >>> Start("somewhere", {"weight": nn.init.eye_(network.weight).detach()})(network)
        Traceback (most recent call last):
        ...
        ValueError: start must have the weights of the network without gates, received somewhere without bias
    """

    source: str
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, config: RunConfig) -> Start | None:
        """The weights that a configuration starts from; None for random ones.

        Raises:
            ValueError: in one line, if they cannot be read or downloaded, or if their checksum is not that of
                the configuration.
        """
        source, expected = config.start_from, config.optimization.start_sha256
        if source is None:
            return None
        library, name = _library_and_name(source)
        start = cls(source, _of_file(Path(source)) if library is None else _of_library(library, name))
        if expected not in (None, start.sha256):
            raise ValueError(
                f"start must have weights of the checksum {expected}, received {source} with {start.sha256}"
            )
        return start

    @property
    def sha256(self) -> str:
        """Checksum of names, types, shapes and values, whatever file they are in."""
        return checksum(self.weights)

    def fits(self, network: nn.Module) -> bool:
        """Whether the weights are those of a network as they are: none is missing, adapted or left new."""
        shapes = {name: value.shape for name, value in network.state_dict().items()}
        return shapes == {name: value.shape for name, value in self.weights.items()}

    def __call__(self, network: nn.Module) -> None:
        """Put the weights into a network.

        Raises:
            ValueError: in one line, if a name or a shape is not that of the network.
        """
        library, _ = _library_and_name(self.source)
        weights = self.weights if library is None else _adapted(self.weights, network)
        expected = network.state_dict()
        missing = [name for name in expected if name not in weights]
        unknown = [name for name in weights if name not in expected]
        if missing or unknown:
            parts = {"without": missing, "with": unknown}
            received = [f"{word} {_few(names)}" for word, names in parts.items() if names]
            raise ValueError(
                "start must have the weights of the network without gates, "
                f"received {self.source} {' and '.join(received)}"
            )
        for name, own in expected.items():
            if weights[name].shape != own.shape:
                raise ValueError(
                    f"start must have {name} of shape {tuple(own.shape)}, "
                    f"received {tuple(weights[name].shape)} in {self.source}"
                )
        network.load_state_dict(weights)


def from_anywhere(source: str) -> str:
    """The same source of weights with an absolute path, if it is one.

    Example:
        >>> from_anywhere("timm:vit_small_patch16_224")
        'timm:vit_small_patch16_224'
    """
    library, _ = _library_and_name(source)
    return str(Path(source).resolve()) if library is None else source


def _library_and_name(source: str) -> tuple[str | None, str]:
    library, _, name = source.partition(":")
    return (library, name) if library in LIBRARIES else (None, source)


def _of_file(path: Path) -> dict[str, Tensor]:
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        return read_weights(file)
    except FileNotFoundError:
        libraries = " or ".join(f"{library}:NAME" for library in LIBRARIES)
        reason = "no such file; " + (
            "the run is not finished" if path.is_dir() else f"weights of a library are {libraries}"
        )
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ValueError(f"start: {file}: {reason}")


def _of_library(library: str, name: str) -> dict[str, Tensor]:
    try:
        return LIBRARIES[library](name)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
    raise ValueError(f"start: {library} gave no weights of {name!r}: {reason}")


def _torchvision(name: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights

    best: Any = get_model_weights(name).DEFAULT
    # Only tensors are read from the file, whose name has its checksum.
    weights: dict[str, Tensor] = best.get_state_dict(progress=False, check_hash=True, weights_only=True)
    return weights


def _timm(name: str) -> dict[str, Tensor]:
    import timm

    # It prefers safetensors, and reads only tensors from other files.
    weights: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    return weights


LIBRARIES: dict[str, Callable[[str], dict[str, Tensor]]] = {"torchvision": _torchvision, "timm": _timm}
"""How the weights of each library are had by the name of the network."""


def _adapted(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights for images of another size, other channels and other classes than a library's."""
    adapted, own = dict(weights), network.state_dict()

    def differs(name: str) -> bool:
        return name in adapted and name in own and adapted[name].shape != own[name].shape

    if differs("pos_embed"):
        from timm.layers.pos_embed import resample_abs_pos_embed

        vit: Any = network
        adapted["pos_embed"] = resample_abs_pos_embed(
            weights["pos_embed"], [*vit.patch_embed.grid_size], num_prefix_tokens=vit.num_prefix_tokens
        )
    layers = [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    first = f"{layers[0]}.weight"
    if differs(first) and own[first].shape[1] == 1:
        adapted[first] = adapted[first].sum(dim=1, keepdim=True)
    for layer in (layers[0], layers[-1]):
        changed = [name for name in (f"{layer}.weight", f"{layer}.bias") if differs(name)]
        if changed:
            adapted |= {name: own[name] for name in (f"{layer}.weight", f"{layer}.bias") if name in own}
    return adapted


def _few(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    first, *rest = names
    return f"{first} and {len(rest)} more" if rest else first
