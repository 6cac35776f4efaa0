"""The families of networks: finding them, and choosing the one that knows a network."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from batchshaping.training.networks.network import Network
from batchshaping.training.sections import one_of

__all__ = ["FAMILIES", "NETWORKS", "network_settings"]


def _families() -> tuple[type[Network], ...]:
    """All families, first the one that has the default network."""
    here = __name__.rpartition(".")[2]
    names = [module.name for module in iter_modules([str(Path(__file__).parent)]) if module.name != here]
    modules = [import_module(f"{__package__}.{name}") for name in names]
    found = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Network) and value.__module__ == module.__name__
    ]
    return tuple(
        sorted((f for f in found if f is not Network), key=lambda f: f.settings()["network"].is_required())
    )


FAMILIES = _families()
"""The families, first the one that has the default network."""

NETWORKS = tuple(name for family in FAMILIES for name in family.names)
"""Names of all networks, family by family."""


def network_settings(**settings: Any) -> Network:
    """The network section of the family that knows the network.

    Args:
        settings: ``network``, the name of the network, and other settings of its family.

    Raises:
        ValueError: in one line, if no family knows the network, or if a setting is out of range or not one of
            its family.

    Example:
        >>> network_settings(network="resnet20", width=8).reference
        'ResNet-20, width 8, ungated'
    """
    name = settings.get("network", FAMILIES[0].settings()["network"].default)
    try:
        name = one_of(NETWORKS, name)
    except ValueError as error:
        raise ValueError(f"network {error}") from None
    family = next(family for family in FAMILIES if name in family.names)
    known = family.settings()
    for setting in settings:
        if setting not in known:
            raise ValueError(f"{setting} is not a setting of {name}")
    return family(**settings)
