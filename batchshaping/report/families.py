"""The families whose runs the report can show, by the kind that a result says."""

from __future__ import annotations

from batchshaping.report.channel_gating import ChannelGating
from batchshaping.report.family import Family, UnknownFamily
from batchshaping.report.mixed_scale import MixedScale

__all__ = ["FAMILIES", "family_of"]

FAMILIES: dict[str, Family] = {"channel gating": ChannelGating(), "mixed-scale tokens": MixedScale()}
"""A new family is a file like :mod:`~batchshaping.report.channel_gating` and a line here."""


def family_of(kind: str) -> Family:
    """The family of a kind of run.

    Example:
        >>> family_of("channel gating").name, family_of("of the future").name
        ('channel_gating', 'unknown')
    """
    return FAMILIES.get(kind) or UnknownFamily(kind)
