"""What a statistic is: a distance between samples in order and a prior, with a closed form or by autograd."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.priors.closed_form import ClosedFormPrior
from batchshaping.statistics.line import on_the_line
from batchshaping.statistics.samples import Samples

__all__ = ["ClosedFormStatistic", "Statistic", "Terms"]


_Made = TypeVar("_Made", bound="ClosedFormStatistic")


class Statistic(ABC):
    """A distance between samples in order and a prior, the mean of what each sample contributes.

    A subclass defines :meth:`terms`; autograd differentiates it.

    Example:
        >>> class AbsoluteDistance(Statistic):
        ...     def terms(self, values, positions, prior):
        ...         return (prior.cdf(values) - positions).abs()
        >>> from batchshaping import Beta, batch_shaping
        >>> batch_shaping(torch.tensor([0.2, 0.4, 0.9]), Beta(2, 2), statistic=AbsoluteDistance())
        tensor(0.1720)
    """

    @abstractmethod
    def terms(self, values: Tensor, positions: Tensor, prior: Distribution) -> Tensor:
        """What each sample contributes, differentiable in the values and in the prior's parameters.

        Args:
            values: the samples in ascending order, of shape (N, arrays...).
            positions: their plotting positions i / (N + 1), of a shape that broadcasts with the values'.
            prior: a distribution whose ``batch_shape`` broadcasts with (arrays...). Its ``cdf``, ``log_cdf``,
                ``log_sf`` and ``icdf`` take any values, outside of its support too.

        Returns:
            A tensor of the values' shape.
        """

    def loss(
        self,
        x: Tensor,
        count: Tensor | None,
        current: Tensor | None,
        ties: bool,
        prior: Distribution,
        logits: bool,
    ) -> Tensor:
        """The statistic of each array: x of shape (..., N) to (...); see :class:`~batchshaping.statistics.samples.Samples`.

        Logits are put in order, and share ranks, as they are given; their sigmoids are what is compared.
        """
        with torch.no_grad():
            samples = Samples(x, count, ties, current)
        # A product, so that the gradients of an array with a NaN are NaN too.
        x = x * (1 + samples.poison.unsqueeze(-1))
        values = x.gather(-1, samples.order.indices)
        if samples.counts is not None:
            values = torch.where(samples.counts, values, samples.values)
        values = torch.sigmoid(values) if logits else values
        # Distributions broadcast from the right, so here the samples come first.
        positions = samples.positions().movedim(-1, 0)
        positions = positions.reshape(-1, *[1] * (values.ndim - 1)) if positions.ndim == 1 else positions
        terms = self.terms(values.movedim(-1, 0), positions, on_the_line(prior)).movedim(0, -1)
        if samples.counts is not None:
            terms = torch.where(samples.counts, terms, 0.0)
        return terms.sum(dim=-1) / samples.number


class Terms(NamedTuple):
    """What each sample contributes, and *half* its derivative in the sample and in each parameter."""

    value: Tensor
    by_x: Tensor
    by_parameter: tuple[Tensor, ...]


class ClosedFormStatistic(Statistic):
    """A statistic with closed forms of its derivatives for a prior that has those of its CDF.

    A subclass that redefines ``terms`` or ``loss`` without ``closed_form`` or ``loss_and_gradients`` has no
    closed form any more; it is differentiated by autograd.

    Attributes:
        in_closed_form: whether there are closed forms of what ``terms`` and ``loss`` give.
        key: tells the object from all others of the process, copies of it too. By it, compiled programs look
            the object up, so that they use it with the state that it has when they run.
    """

    in_closed_form: ClassVar[bool] = True
    key: str
    _by_key: ClassVar[WeakValueDictionary[str, ClosedFormStatistic]] = WeakValueDictionary()
    _number: ClassVar[Iterator[int]] = itertools.count()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        closed = {"closed_form", "loss_and_gradients"} & vars(cls).keys()
        if closed or {"terms", "loss"} & vars(cls).keys():
            cls.in_closed_form = bool(closed)

    def __new__(cls: type[_Made], *_: Any, **__: Any) -> _Made:
        made = super().__new__(cls)
        object.__setattr__(made, "key", f"{cls.__module__}.{cls.__qualname__}#{next(cls._number)}")
        cls._by_key[made.key] = made
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "key"}

    @staticmethod
    def by_key(key: str) -> ClosedFormStatistic:
        """The statistic of this process with this key."""
        found = ClosedFormStatistic._by_key.get(key)
        if found is None:
            raise RuntimeError(f"the statistic {key} of a compiled program is gone: compile it again")
        return found

    @abstractmethod
    def closed_form(
        self,
        prior: type[ClosedFormPrior],
        parameters: tuple[Tensor, ...],
        samples: Samples,
        logits: bool,
        gradients: bool,
    ) -> Callable[[slice], Terms]:
        """The terms of a tile of the samples, which may be written over; parameters broadcast with (..., 1).

        Args:
            prior: the family of the prior.
            parameters: its parameters.
            samples: the samples in order.
            logits: whether they are logits, of which the prior's values are the sigmoid.
            gradients: whether to return the derivatives in the parameters.
        """

    def loss_and_gradients(
        self,
        x: Tensor,
        count: Tensor | None,
        current: Tensor | None,
        parameters: Sequence[Tensor],
        prior: type[ClosedFormPrior],
        ties: bool,
        logits: bool,
        needs_x: bool,
        needs_parameters: bool,
    ) -> list[Tensor]:
        """The statistic of each array and its gradients, all without a graph.

        Returned are the losses of shape (...); the gradient in x of shape (..., N), empty where not needed;
        the factor that all gradients of an array have yet to be multiplied by, of shape (...); and the
        gradients in the parameters, of shape (...) each or empty where not needed.
        """
        samples = Samples(x, count, ties, current)
        by_array = tuple(p.unsqueeze(-1) if p.ndim else p for p in parameters)
        terms_of = self.closed_form(prior, by_array, samples, logits, needs_parameters)
        total = x.new_zeros(x.shape[:-1])
        by_parameter = [x.new_zeros(x.shape[:-1] if needs_parameters else 0) for _ in parameters]
        by_x = x.new_empty(x.shape if needs_x else 0)
        for tile in samples.tiles():
            terms = terms_of(tile)
            if samples.counts is not None:
                terms = Terms(*_only(samples.counts[..., tile], terms))
            total += terms.value.sum(dim=-1)
            for accumulated, derivative in zip(by_parameter, terms.by_parameter, strict=False):
                accumulated += derivative.sum(dim=-1)
            if needs_x:
                by_x.scatter_(-1, samples.order.indices[..., tile], terms.by_x)
        loss = total / samples.number + samples.poison
        factor = samples.poison + 2 / samples.number
        return [loss, by_x, factor, *by_parameter]


def _only(counts: Tensor, terms: Terms) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    value, by_x, by_parameter = terms
    return value * counts, by_x * counts, tuple(by * counts for by in by_parameter)
