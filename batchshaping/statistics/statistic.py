"""What a statistic is: a distance between samples in order and a prior, with a closed form or by autograd."""

from __future__ import annotations

import functools
import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.cdfs.prepared import PreparedCDF
from batchshaping.priors.closed_form import ClosedFormPrior
from batchshaping.statistics.line import on_the_line
from batchshaping.statistics.order import FEW
from batchshaping.statistics.samples import Batch, Options, Samples

__all__ = ["ClosedForm", "ClosedFormStatistic", "Comparison", "Discrepancy", "Needs", "Statistic", "Terms"]


_Made = TypeVar("_Made", bound="ClosedForm")


class Discrepancy(ABC):
    """How far arrays of samples are from a prior: one number for each array."""

    @abstractmethod
    def loss(self, batch: Batch, prior: Distribution, options: Options) -> Tensor:
        """The discrepancy of each array, differentiable in the values and in the prior's parameters.

        Args:
            batch: arrays of samples, of shape (..., N).
            prior: a distribution whose ``batch_shape`` broadcasts with (...).
            options: how the values are meant.

        Returns:
            A tensor of shape (...).
        """


class Statistic(Discrepancy):
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

    def loss(self, batch: Batch, prior: Distribution, options: Options) -> Tensor:
        """The mean of the terms of each array.

        Logits are put in order, and share ranks, as they are given; their sigmoids are what is compared.
        """
        with torch.no_grad():
            samples = Samples(batch, options.ties)
        values = batch.values
        if samples.broken is not None:
            # A product, so that the gradients of an array with a NaN are NaN too.
            poison = torch.where(samples.broken, torch.nan, 1.0).to(values.dtype)
            values = values * poison.unsqueeze(-1)
        values = values.gather(-1, samples.order.indices)
        if samples.contributes is not None:
            values = torch.where(samples.contributes, values, samples.values)
        values = torch.sigmoid(values) if options.logits else values
        # Distributions broadcast from the right, so here the samples come first.
        positions = samples.positions().movedim(-1, 0)
        positions = positions.reshape(-1, *[1] * (values.ndim - 1)) if positions.ndim == 1 else positions
        terms = self.terms(values.movedim(-1, 0), positions, on_the_line(prior)).movedim(0, -1)
        if samples.contributes is not None:
            terms = torch.where(samples.contributes, terms, 0.0)
        return terms.sum(dim=-1) / samples.number


class Needs(NamedTuple):
    """Which gradients are asked for: in the values, and in the prior's parameters."""

    values: bool = False
    parameters: bool = False


class ClosedForm(Discrepancy):
    """A discrepancy that computes its gradients itself for a prior that has the derivatives of its CDF.

    A subclass that redefines ``terms`` or ``loss`` without ``closed_form`` or ``loss_and_gradients`` has no
    closed form any more; it is differentiated by autograd.

    Attributes:
        in_closed_form: whether there are closed forms of what ``terms`` and ``loss`` give.
        key: tells the object from all others of the process, copies of it too. By it, compiled programs look
            the object up, so that they use it with the state that it has when they run.
    """

    in_closed_form: ClassVar[bool] = True
    key: str
    _by_key: ClassVar[WeakValueDictionary[str, ClosedForm]] = WeakValueDictionary()
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
    def by_key(key: str) -> ClosedForm:
        """The object of this process with this key."""
        found = ClosedForm._by_key.get(key)
        if found is None:
            raise RuntimeError(f"the statistic {key} of a compiled program is gone: compile it again")
        return found

    @abstractmethod
    def loss_and_gradients(
        self,
        batch: Batch,
        prior: type[ClosedFormPrior],
        parameters: Sequence[Tensor],
        options: Options,
        needs: Needs,
    ) -> list[Any]:
        """The discrepancy of each array and its gradients, all without a graph.

        Args:
            batch: arrays of samples, of shape (..., N).
            prior: the family of the prior.
            parameters: its parameters, of shapes that broadcast with (...).
            options: how the values are meant.
            needs: which gradients are asked for.

        Returns:
            The discrepancies, of shape (...); the gradient in the values, of shape (..., N), or empty if not
            needed; the factor that all gradients of an array have yet to be multiplied by, of shape (...), or
            a number for all arrays; and, if needed, the gradient in each parameter, of shape (...).
        """


class Terms(NamedTuple):
    """What each sample contributes, and *half* its derivative in the sample and in each parameter."""

    value: Tensor
    derivative: Tensor
    parameter_derivatives: tuple[Tensor, ...]


class Comparison(NamedTuple):
    """Samples in order, the prior that they are compared with, and what is asked of it.

    Attributes:
        prior: the family of the prior.
        parameters: its parameters, of shapes that broadcast with (..., 1).
        samples: the samples in order.
        logits: whether they are logits, of which the prior's values are the sigmoid.
        gradients: whether the derivatives in the parameters are needed.
    """

    prior: type[ClosedFormPrior]
    parameters: tuple[Tensor, ...]
    samples: Samples
    logits: bool = False
    gradients: bool = False

    def prepared(self, *, tails: bool = False) -> PreparedCDF:
        """The CDF of the prior on values of the samples' dtype, with the derivatives that are needed."""
        dtype = self.samples.values.dtype
        return self.prior.prepare(self.parameters, dtype, gradients=self.gradients, tails=tails)


class ClosedFormStatistic(ClosedForm, Statistic):
    """A statistic whose terms have closed forms of their derivatives, of the kind of :class:`ClosedForm`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        defined = vars(cls).get("closed_form")
        if inspect.isfunction(defined):
            cls.closed_form = _of_a_comparison(defined)  # type: ignore[method-assign]

    @abstractmethod
    def closed_form(self, comparison: Comparison) -> Callable[[slice], Terms]:
        """The terms of a tile of the samples, which may be written over.

        A subclass may also take the five fields of the comparison one by one.
        """

    def loss_and_gradients(
        self,
        batch: Batch,
        prior: type[ClosedFormPrior],
        parameters: Sequence[Tensor],
        options: Options,
        needs: Needs,
    ) -> list[Any]:
        x, samples = batch.values, Samples(batch, options.ties)
        by_array = tuple(p.unsqueeze(-1) if p.ndim else p for p in parameters)
        terms_of = self.closed_form(Comparison(prior, by_array, samples, options.logits, needs.parameters))
        # Laid out as x it needs no copy later; of many values, that would take longer to write.
        like = x if x.numel() <= FEW else samples.values
        gradient = torch.empty_like(like) if needs.values else x.new_empty(0)
        sums: list[Tensor] = []
        for tile in samples.tiles():
            terms = terms_of(tile)
            if samples.contributes is not None:
                terms = _masked(samples.contributes[..., tile], terms)
            found = [t.sum(dim=-1) for t in (terms.value, *terms.parameter_derivatives)]
            sums = [total.add_(part) for total, part in zip(sums, found, strict=True)] if sums else found
            if needs.values:
                gradient.scatter_(-1, samples.order.indices[..., tile], terms.derivative)
        loss, *in_parameters = sums
        loss.div_(samples.number)
        number = samples.number
        factor = 2 / number if isinstance(number, int) else 2 / number.expand_as(loss)
        if samples.broken is not None:
            loss.masked_fill_(samples.broken, torch.nan)
            factor = (torch.zeros_like(loss) + factor).masked_fill_(samples.broken, torch.nan)
        return [loss, gradient, factor, *in_parameters]


def _of_a_comparison(closed_form: Callable[..., Any]) -> Callable[..., Any]:
    """A method that takes a comparison or its fields, of one that takes either."""
    _, *operands = inspect.signature(closed_form).parameters.values()
    takes_fields = len(operands) != 1 or operands[0].kind is inspect.Parameter.VAR_POSITIONAL

    @functools.wraps(closed_form)
    def method(self: ClosedFormStatistic, *given: Any, **named: Any) -> Any:
        comparison = given[0] if len(given) == 1 and not named else Comparison(*given, **named)
        return closed_form(self, *comparison) if takes_fields else closed_form(self, comparison)

    return method


def _masked(contributes: Tensor, terms: Terms) -> Terms:
    value, derivative, parameter_derivatives = terms
    return Terms(
        value * contributes, derivative * contributes, tuple(d * contributes for d in parameter_derivatives)
    )
