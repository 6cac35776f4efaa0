"""What a family of networks is: settings from which a network is built."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import Tensor, nn

from batchshaping.gates.inference import conditional_inference
from batchshaping.training.data.dataset import Data
from batchshaping.training.sections import Section

__all__ = ["Network"]


class Network(Section):
    """The network section of a configuration: a subclass for each family of networks.

    One family, that of the default network, gives ``name`` a default.

    Attributes:
        kind: what its runs are called in ``result.json``, by which a report knows how to show them.
        names: names of its networks, which no other family has.
    """

    heading = "Network"
    kind: ClassVar[str]
    names: ClassVar[tuple[str, ...]]

    name: str = Field(alias="network")
    """Name of the network."""
    gated: bool = True
    """Whether the network has gates."""

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Settings that other networks of the family have and this one does not; they keep their defaults."""
        return ()

    @model_validator(mode="after")
    def _of_this_network(self) -> Network:
        for name in self.without_effect:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is not a setting of {self.name}")
        return self

    @property
    def library_weights(self) -> str | None:
        """Weights of a library that the settings ask for, as the setting ``start`` names them, if any."""
        return None

    def build(
        self,
        classes: int,
        shape: tuple[int, int, int],
        initialize: Callable[[nn.Module], object] | None = None,
    ) -> nn.Module:
        """The network, with weights drawn from PyTorch's own generator.

        Args:
            classes: number of outputs.
            shape: channels, height and width of the images.
            initialize: is given the network before it has gates, to put other weights into it.

        Raises:
            ValueError: in one line, if images of this shape or the settings do not fit each other.
        """
        network = self.ungated(classes, shape)
        if initialize is not None:
            initialize(network)
        return self.with_gates(network)

    @abstractmethod
    def ungated(self, classes: int, shape: tuple[int, int, int]) -> nn.Module:
        """The network without gates, whose weights it can start from."""

    @abstractmethod
    def with_gates(self, network: nn.Module) -> nn.Module:
        """The same with new gates, or as it is if the settings ask for none."""

    @property
    @abstractmethod
    def reference(self) -> str:
        """Name of the network of whose multiply-adds shares are taken, the same without gates."""

    def recipe(self, budget: float) -> dict[str, Any]:
        """Settings with which gates are added to a trained network of this family.

        Args:
            budget: share of the multiply-adds that an image may cost, on average.
        """
        return {"gated": True}

    # What measurements of inference need to know

    def inference_copies(self, network: nn.Module, example: Tensor | None = None) -> dict[str, nn.Module]:
        """The ways to compute only what is open, by name; the first is that of ``conditional_inference``.

        Others differ from it in how they compute several images that have different gates.

        Args:
            network: what was built.
            example: images to plan the computation on, or None.
        """
        return {"conditional": conditional_inference(network, example)}

    def after_gates(self, network: nn.Module) -> nn.Module | None:
        """The module that runs when all that gates cost has been computed; None if there is no such one.

        Args:
            network: what was built, with gates or without, or an inference copy of it.
        """
        return None

    def facts(self, copy: nn.Module, images: Tensor) -> dict[str, float]:
        """What else there is to tell of an inference copy and the images that it has just computed."""
        return {}

    # What a result tells

    def findings(self, network: nn.Module, data: Data, metrics: dict[str, Any]) -> dict[str, Any]:
        """What a result has of the networks of this family alone, as JSON has it.

        Args:
            network: the trained network, in evaluation.
            data: the data set.
            metrics: what :func:`~batchshaping.training.evaluation.evaluate` found.
        """
        return {}
