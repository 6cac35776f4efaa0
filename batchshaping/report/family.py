"""What a family of networks adds to the report of its runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Curve", "Family", "UnknownFamily", "View"]


@dataclass(frozen=True)
class Curve:
    """Points of the figure that belong together, and their entry in its legend.

    Attributes:
        name: in the legend and in the table.
        color: a custom property of the stylesheet, without its two dashes.
        symbol: a marker of plotly: circle, diamond, square or triangle-up.
        reference: whether these are the runs that the others are compared with.
    """

    name: str
    color: str
    symbol: str
    reference: bool = False


@dataclass(frozen=True)
class View:
    """What a family shows of one run.

    Attributes:
        curve: where the run belongs in the figure.
        shares: further columns of the table by their heads, in [0, 1].
        pictures: for the family's script, as JSON has it.
        texts: for the family's template.
    """

    curve: Curve
    shares: Mapping[str, float] = field(default_factory=dict)
    pictures: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, Any] = field(default_factory=dict)


class Family(Protocol):
    """How runs of one kind are read, named and shown.

    Beside its Python file a family has a template ``NAME.html``, and if need be a script ``NAME.js`` and a
    stylesheet ``NAME.css``. The template defines two macros: ``card(run)``, beside the accuracy of a run that
    is shown alone, and ``sections(runs)``, below the table, with ids that no other family uses. The script
    sets ``families.NAME`` to an object with two functions: ``choose(run)`` when the reader has chosen a run,
    and ``draw(run)`` whenever its figures must be drawn.
    """

    @property
    def name(self) -> str:
        """Of its files, and of its entry in the script."""

    @property
    def curves(self) -> Sequence[Curve]:
        """All curves that a run can belong to, in the order of the legend."""

    @property
    def nouns(self) -> tuple[str, str]:
        """What a run of a reference is called, and any other run."""

    @property
    def explanation(self) -> str:
        """A sentence below the table that explains the columns of the family."""

    @property
    def compared(self) -> Collection[str]:
        """Settings that are equal for a run and for its reference."""

    @property
    def words(self) -> Mapping[str, Callable[[Any], str]]:
        """How the family's settings are told to a reader, the most important one first."""

    def idle(self, config: Mapping[str, Any]) -> Collection[str]:
        """Settings without an effect on the run, so that its name need not tell them."""

    def view(self, result: Mapping[str, Any]) -> View:
        """What is shown of a run.

        Raises:
            LookupError, TypeError, ValueError: if something is missing in the result, or is not what a run
                gives.
        """


@dataclass(frozen=True)
class UnknownFamily:
    """The family of a kind that this version does not know: its runs are shown without pictures.

    Attributes:
        kind: as the result says it.
    """

    kind: str
    name: str = "unknown"
    nouns: tuple[str, str] = ("run", "run")
    explanation: str = ""
    compared: Collection[str] = ()
    words: Mapping[str, Callable[[Any], str]] = field(default_factory=dict, compare=False)

    @property
    def curves(self) -> Sequence[Curve]:
        return (Curve(self.kind, "green", "triangle-up"),)

    def idle(self, config: Mapping[str, Any]) -> Collection[str]:
        return ()

    def view(self, result: Mapping[str, Any]) -> View:
        return View(self.curves[0])
