"""Settings as name: value in YAML, of which only what all its versions read alike is accepted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from batchshaping.storage.files import quoted

__all__ = ["dump", "load"]


def load(text: str) -> dict[str, Any]:
    r"""Settings from YAML.

    Numbers are those that YAML 1.2 and YAML 1.1 read alike: 5e-4 is a number, and 010, 0x1F, 1_000 and 1:30
    are not. Anchors, tags and names that occur twice are refused.

    Raises:
        ValueError: in one line, if the text is anything else than names with values.

    Example:
        >>> load("network: resnet20\nlearning_rate: 5e-4")
        {'network': 'resnet20', 'learning_rate': 0.0005}
    """
    try:
        content = yaml.load(text, _Loader)
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ValueError("expected a YAML file, received something else") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"expected settings as name: value, received {quoted(content)}")
    return content


def dump(settings: Mapping[str, Any]) -> str:
    """Settings as YAML, from which :func:`load` makes them again."""
    text: str = yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False)
    return text


class _RefusedError(yaml.YAMLError):  # type: ignore[misc]
    """Valid YAML that is not accepted here, with the reason in one line."""


class _Ambiguous:
    """A number that versions of YAML read differently. No setting accepts it, and the error shows it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"{self.text}, which is no plain decimal number"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """The core schema of YAML 1.2, without anchors, tags and ambiguous numbers."""

    yaml_implicit_resolvers: dict[str | None, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if getattr(event, "anchor", None) is not None:
            raise _RefusedError(f"expected settings without anchors, received one in line {line}")
        if getattr(event, "tag", None) is not None:
            raise _RefusedError(f"expected settings without tags, received one in line {line}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names: set[str] = set()
        for key, _ in node.value:
            if key.value in names:
                line = key.start_mark.line + 1
                raise _RefusedError(
                    f"expected each setting once, received {quoted(key.value)} again in line {line}"
                )
            if isinstance(key, yaml.ScalarNode):
                names.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes each text that the loader would read as something else."""

    yaml_implicit_resolvers: dict[str | None, Any] = {}


# The first pattern that matches decides. Text that YAML 1.1 would read as a time or a date stays text.
_PLAIN = {
    "tag:yaml.org,2002:null": "~|null|Null|NULL|",
    "tag:yaml.org,2002:bool": "true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": "[-+]?(0|[1-9][0-9]{0,17})",
    "!ambiguous": "[-+]?(0[0-9]+|[0-9]{19,}|0[box][0-9a-fA-F_]+|[0-9][0-9._]*_[0-9._]*([eE][-+]?[0-9]+)?)",
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}
for _tag, _pattern in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None)
_Loader.add_constructor("!ambiguous", lambda loader, node: _Ambiguous(node.value))
