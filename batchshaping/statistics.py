r"""The statistics: how far samples in order are from a prior.

With order statistics :math:`x_{(1)} \le \dots \le x_{(N)}` and plotting positions
:math:`p_i = i / (N + 1)`, each is the mean over i of its terms:

- Cramér-von Mises, :math:`(F(x_{(i)}) - p_i)^2`, weighs all parts of the prior alike. Its gradient vanishes
  where the density does;
- Anderson-Darling, twice the relative entropy of :math:`p_i` to :math:`F(x_{(i)})`, is near the fit that over
  :math:`p_i (1 - p_i)`. Its gradient grows with the distance from the prior's mass;
- Wasserstein, :math:`(x_{(i)} - F^{-1}(p_i))^2`, has a gradient that is the distance itself.

Epps-Pulley compares characteristic functions instead, for a Normal prior.

A statistic of one's own is a subclass of :class:`Statistic` with one method.
"""

from __future__ import annotations

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.derivatives import stretched
from batchshaping.priors import ClosedFormPrior, Normal
from batchshaping.ranking import order_statistics, ranks
from batchshaping.tails import log_tails

__all__ = [
    "AndersonDarling",
    "ClosedFormStatistic",
    "CramerVonMises",
    "EppsPulley",
    "STATISTICS",
    "Samples",
    "Statistic",
    "Terms",
    "Wasserstein",
    "on_the_line",
]

# Values evaluated at a time: few enough that the intermediate results stay in a core's cache, and that memory
# is bounded however many there are. Other devices take all at once.
_TILE = 2**18

# glibc keeps freed memory for the next request up to the size of the largest block it has seen freed, at most
# 32 MiB. Below, it returns the intermediate results to the system after each step, and the page faults of
# getting them back take a third of the time. So let it see one such block freed, which nobody wrote to.
torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


_Made = TypeVar("_Made", bound="ClosedFormStatistic")


class Samples:
    """The sorted samples of each array, of shape (..., N), and the plotting positions that belong to them.

    Args:
        x: values of shape (..., N).
        count: number of samples of each array, of shape (...), if not N; the other values of x are infinite.
        ties: whether equal values share the largest of their ranks.
        current: which of the N places hold samples whose terms count, if not all; the others only help to
            rank them.

    Attributes:
        values: the samples in order, behind them the first one again in place of what is no sample.
        counts: which of the values in order contribute a term; None if all do.
        number: how many terms there are to an array.
        poison: NaN for an array with a NaN and 0 otherwise, of shape (...).
    """

    def __init__(self, x: Tensor, count: Tensor | None, ties: bool, current: Tensor | None = None) -> None:
        self.order = order_statistics(x)
        self.values = values = self.order.values
        n = values.shape[-1]
        # A NaN is sorted last, behind what is no sample.
        self.poison = torch.where(values[..., -1].isnan(), torch.nan, 0.0).to(x.dtype)
        self.counts: Tensor | None = None
        self.number: Tensor | int = n
        self._column: Tensor | int = n
        if count is not None:
            self.number, self._column = count.to(x.dtype), count.unsqueeze(-1)
        self._shared = ranks(values, self._column, ties=True) if ties else None
        if count is not None:
            self.counts = is_sample = torch.arange(n, device=x.device) < self._column
            self.values = torch.where(is_sample, values, values[..., :1])
        if current is not None:
            is_current = current[self.order.indices]
            self.counts = is_current if self.counts is None else self.counts & is_current
            self.number = self.counts.sum(dim=-1).to(x.dtype)

    def positions(self, tile: slice = slice(None)) -> Tensor:
        """The plotting positions of a tile, of shape (n,), or (..., n) with a count or ties.

        Behind the samples they are valid ones, since what is computed there is left out.
        """
        if self._shared is not None:
            order = self._shared[..., tile]
        else:
            start, stop, _ = tile.indices(self.values.shape[-1])
            order = torch.arange(start + 1, stop + 1, dtype=self.values.dtype, device=self.values.device)
        return order.clamp_max(self._column) / (self._column + 1)

    def tiles(self) -> Iterator[slice]:
        """Parts of the last dimension, one after the other."""
        n = self.values.shape[-1]
        on_cpu = self.values.device.type == "cpu"
        width = max(1, _TILE * n // max(self.values.numel(), 1)) if on_cpu else max(n, 1)
        return (slice(start, min(start + width, n)) for start in range(0, n, width))


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
        """The statistic of each array: x of shape (..., N) to (...); see :class:`Samples`.

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


class CramerVonMises(ClosedFormStatistic):
    r"""The squared distance of the CDF to the plotting positions, :math:`(F(x_{(i)}) - p_i)^2`."""

    def terms(self, values: Tensor, positions: Tensor, prior: Distribution) -> Tensor:
        return (prior.cdf(values) - positions).square()

    def closed_form(
        self,
        prior: type[ClosedFormPrior],
        parameters: tuple[Tensor, ...],
        samples: Samples,
        logits: bool,
        gradients: bool,
    ) -> Callable[[slice], Terms]:
        prepared = prior.prepare(parameters, samples.values.dtype, gradients=gradients)
        evaluate = prepared.at_logits if logits else prepared

        def terms(tile: slice) -> Terms:
            at = evaluate(samples.values[..., tile])
            residual = at.cdf.sub_(samples.positions(tile))
            by_parameter = tuple(residual * derivative for derivative in at.parameters)
            by_x = at.pdf.mul_(residual)
            return Terms(residual.square_(), by_x, by_parameter)

        return terms


class AndersonDarling(ClosedFormStatistic):
    r"""Twice the relative entropy of the plotting positions to the CDF.

    .. math::
        2 p_i \log \frac{p_i}{F(x_{(i)})} + 2 (1 - p_i) \log \frac{1 - p_i}{1 - F(x_{(i)})}

    With positions (2 i - 1) / (2 N) its sum is the classical statistic less its least value. Near the fit it
    is the Cramér-von Mises term over :math:`p_i (1 - p_i)`.
    """

    def terms(self, values: Tensor, positions: Tensor, prior: Distribution) -> Tensor:
        log_cdf, log_sf = prior.log_cdf(values), prior.log_sf(values)  # type: ignore[attr-defined]
        lower = positions * (positions.log() - log_cdf)
        upper = (1 - positions) * (torch.log1p(-positions) - log_sf)
        total: Tensor = 2 * (lower + upper)
        return total

    def closed_form(
        self,
        prior: type[ClosedFormPrior],
        parameters: tuple[Tensor, ...],
        samples: Samples,
        logits: bool,
        gradients: bool,
    ) -> Callable[[slice], Terms]:
        prepared = prior.prepare(parameters, samples.values.dtype, gradients=gradients, tails=True)

        def terms(tile: slice) -> Terms:
            values = samples.values[..., tile]
            # An infinite logit has an infinite logarithm, and a huge one stands for it.
            at = prepared.logs_at_logits(values.clamp(-1e30, 1e30)) if logits else prepared.logs(values)
            p = samples.positions(tile)
            entropy = torch.special.entr(p) + torch.special.entr(1 - p)

            def mean(lower: Tensor, upper: Tensor) -> Tensor:
                return torch.lerp(upper, lower, p.expand(upper.shape)).neg_()

            # No term is negative but by rounding.
            value = mean(at.log_cdf, at.log_sf).sub_(entropy).clamp_min_(0.0).mul_(2)
            by_parameter = tuple(mean(*pair) for pair in at.parameters)
            return Terms(value, stretched(mean(at.cdf_by_x, at.sf_by_x), at.stretch), by_parameter)

        return terms


class Wasserstein(ClosedFormStatistic):
    r"""The squared distance of the samples to the prior's quantiles, :math:`(x_{(i)} - F^{-1}(p_i))^2`."""

    def terms(self, values: Tensor, positions: Tensor, prior: Distribution) -> Tensor:
        return (values - prior.icdf(positions)).square()

    def closed_form(
        self,
        prior: type[ClosedFormPrior],
        parameters: tuple[Tensor, ...],
        samples: Samples,
        logits: bool,
        gradients: bool,
    ) -> Callable[[slice], Terms]:
        prepared = prior.prepare(parameters, samples.values.dtype, gradients=gradients)
        quantiles = prior.quantile(parameters, samples.positions()).to(samples.values.dtype)

        def terms(tile: slice) -> Terms:
            values, quantile = samples.values[..., tile], quantiles[..., tile]
            x = torch.sigmoid(values) if logits else values
            distance = x - quantile
            by_x = distance * (torch.sigmoid(-values) * x) if logits else distance
            by_parameter: tuple[Tensor, ...] = ()
            if gradients:
                # Where F(q) = p stays as it is, dq = -dF / f.
                # A quantile that has rounded to the end of the support moves with nothing.
                at = prepared(quantile)
                moves = (at.pdf > 0) & at.pdf.isfinite()
                scaled = torch.where(moves, distance / at.pdf, 0.0)
                by_parameter = tuple(scaled * derivative for derivative in at.parameters)
            return Terms(distance * distance, by_x, by_parameter)

        return terms


class EppsPulley(ClosedFormStatistic):
    r"""The squared distance of the empirical characteristic function to that of a Normal prior.

    .. math::
        \int_{-T}^{T} \left| \frac{1}{N} \sum_j e^{i t z_j} - e^{-t^2 / 2} \right|^2 e^{-t^2 / 2} \, dt,
        \qquad z_j = \frac{x_j - \mu}{\sigma}

    by the trapezoidal rule on [0, T], both halves being alike. It needs no order, so ``ties`` changes
    nothing, and what joins the samples from a memory counts as they do. Times N it is the statistic of SIGReg
    in LeJEPA.

    Args:
        limit: T.
        points: number of points in [0, T].

    References:
        Epps and Pulley, A test for normality based on the empirical characteristic function, 1983.
        Balestriero and LeCun, LeJEPA, 2025, https://arxiv.org/abs/2511.08544.
    """

    def __init__(self, limit: float = 3.0, points: int = 17) -> None:
        self.t = torch.linspace(0.0, limit, int(points), dtype=torch.float64, device="cpu")
        self.target = torch.exp(-self.t.square() / 2)
        step = limit / (points - 1)
        self.weights = self.target * 2 * step
        self.weights[[0, -1]] /= 2

    def terms(self, values: Tensor, positions: Tensor, prior: Distribution) -> Tensor:
        raise NotImplementedError("the characteristic function is not a mean of terms of single samples")

    def closed_form(self, *_: Any) -> Callable[[slice], Terms]:
        raise NotImplementedError("the characteristic function is not a mean of terms of single samples")

    def loss(
        self,
        x: Tensor,
        count: Tensor | None,
        current: Tensor | None,
        ties: bool,
        prior: Distribution,
        logits: bool,
    ) -> Tensor:
        if not isinstance(prior, torch.distributions.Normal):
            raise ValueError(f"epps_pulley needs a Normal prior, received {prior}")
        left_out = (
            torch.zeros((), dtype=torch.bool, device=x.device) if count is None else _left_out(x, count)
        )
        x = x.masked_fill(left_out, 0.0)
        values = torch.sigmoid(x) if logits else x
        z = (values - prior.loc.unsqueeze(-1)) / prior.scale.unsqueeze(-1)
        n = x.shape[-1] if count is None else count
        total = torch.zeros_like(z[..., 0])
        for t, target, weight in zip(
            self.t.tolist(), self.target.tolist(), self.weights.tolist(), strict=True
        ):
            cosine, sine = (
                f(t * z).masked_fill(left_out, 0.0).sum(dim=-1) / n for f in (torch.cos, torch.sin)
            )
            total = total + weight * ((cosine - target).square() + sine.square())
        return total

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
        if not issubclass(prior, Normal):
            raise ValueError(f"epps_pulley needs a Normal prior, received {prior.__name__}")
        x = x.contiguous()
        loc, scale = (p.unsqueeze(-1).to(x.dtype) if p.ndim else p.to(x.dtype) for p in parameters)
        values = torch.sigmoid(x) if logits else x
        z = (values - loc) / scale
        n: Tensor | int = x.shape[-1]
        left_out: Tensor | None = None
        if count is not None:
            # At 0 each of those that are left out adds 1 to every sum.
            n, left_out = count.unsqueeze(-1), _left_out(x, count)
            z.masked_fill_(left_out, 0.0)
        # Powers of one rotation: a sine and a cosine of each value, whatever the number of points.
        rotation = torch.polar(torch.ones_like(z), z * float(self.t[1]))
        power = torch.ones_like(rotation)
        means = [torch.ones_like(rotation[..., :1])]
        for _ in self.t[1:]:
            power.mul_(rotation)
            means.append((power.sum(dim=-1, keepdim=True) - (x.shape[-1] - n)) / n)
        difference = torch.cat(means, dim=-1) - self.target.to(x)
        weights = self.weights.to(x)
        loss = (difference.abs().square() * weights).sum(dim=-1)
        # The derivative in z is 2 / N Re sum_k w_k conj(d_k) i t_k e^(i t_k z): a polynomial in the rotation.
        # Conjugated at once: a lazy conjugate is not resolved inside of a compiled operation.
        coefficients = torch.conj_physical(difference) * (weights * self.t.to(x) * 1j)
        polynomial = power.copy_(coefficients[..., -1:].expand_as(power))
        for k in range(len(self.t) - 2, -1, -1):
            polynomial.mul_(rotation).add_(coefficients[..., k : k + 1])
        by_z = polynomial.real / scale
        if left_out is not None:
            by_z.masked_fill_(left_out, 0.0)
        by_parameter = [-by_z.sum(dim=-1), -(by_z * z).sum(dim=-1)]
        by_x = by_z.mul_(torch.sigmoid(-x)).mul_(values) if logits else by_z
        factor = (
            2 / torch.as_tensor(n, dtype=x.dtype, device=x.device).squeeze(-1).expand(loss.shape).contiguous()
        )
        return [
            loss,
            by_x if needs_x else x.new_empty(0),
            factor,
            *(by if needs_parameters else x.new_empty(0) for by in by_parameter),
        ]


def _left_out(x: Tensor, count: Tensor) -> Tensor:
    """Where x is no sample but infinite in place of one; of the infinite values, the last ones."""
    is_infinite = x == torch.inf
    seen = is_infinite.cumsum(dim=-1)
    samples = seen[..., -1:] - (x.shape[-1] - count.unsqueeze(-1))
    return is_infinite & (seen > samples)


class _OnTheLine(Distribution):
    """Any distribution with a ``cdf``, taken on the whole line: 0 left of its support and 1 right of it."""

    def __init__(self, prior: Distribution) -> None:
        self.prior = _unvalidated(prior)
        super().__init__(prior.batch_shape, validate_args=False)
        self.lower = getattr(prior.support, "lower_bound", -torch.inf)
        self.upper = getattr(prior.support, "upper_bound", torch.inf)

    def cdf(self, value: Tensor) -> Tensor:
        inside, above, x = self._within(value)
        return torch.where(inside, self.prior.cdf(x), above.to(value.dtype))

    def icdf(self, value: Tensor) -> Tensor:
        try:
            return self.prior.icdf(value)
        except NotImplementedError:
            name = type(self.prior).__name__
            raise ValueError(f"this statistic needs a prior with an icdf, received {name}") from None

    def log_cdf(self, value: Tensor) -> Tensor:
        """The logarithm of the CDF; outside of the support 0, or that of the smallest normal number."""
        inside, above, x = self._within(value)
        return torch.where(inside, log_tails(self.prior, x)[0], self._log_smallest(~above, value.dtype))

    def log_sf(self, value: Tensor) -> Tensor:
        """The logarithm of 1 less the CDF, likewise."""
        inside, above, x = self._within(value)
        return torch.where(inside, log_tails(self.prior, x)[1], self._log_smallest(above, value.dtype))

    def _within(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which values are inside of the support, which are above, and values that are all inside."""
        lower, upper = (
            torch.as_tensor(v, dtype=value.dtype, device=value.device) for v in (self.lower, self.upper)
        )
        middle = torch.where(upper.isfinite(), (lower + upper) / 2, lower + 1).nan_to_num(0.0, 0.0, 0.0)
        inside = (value > lower) & (value < upper) | value.isnan()
        return inside, value >= upper, torch.where(inside, value, middle)

    @staticmethod
    def _log_smallest(is_empty: Tensor, dtype: torch.dtype) -> Tensor:
        return is_empty.to(dtype) * math.log(torch.finfo(dtype).smallest_normal)


def _unvalidated(prior: Distribution) -> Distribution:
    """A copy that takes values outside of its support."""
    prior = copy.copy(prior)
    prior._validate_args = False
    base = vars(prior).get("base_dist")
    if base is not None:
        vars(prior)["base_dist"] = _unvalidated(base)
    return prior


def on_the_line(prior: Distribution) -> Distribution:
    """The prior with everything that a statistic asks of one."""
    return prior if isinstance(prior, ClosedFormPrior) and prior.in_closed_form else _OnTheLine(prior)


STATISTICS: dict[str, Statistic] = {
    "cramer_von_mises": CramerVonMises(),
    "anderson_darling": AndersonDarling(),
    "wasserstein": Wasserstein(),
    "epps_pulley": EppsPulley(),
}
"""The statistics by the names under which the loss takes them."""
