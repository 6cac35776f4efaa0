"""The priors: torch distributions that know their CDF, its inverse and every derivative of it.

Parameters are kept as they were given. A number is used in double precision, whatever the dtype of the
values. A tensor is read at each call, so that a prior can be made once and learned, as an optimizer updates
the tensor in place.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor

from batchshaping.cdfs.beta import BetaCDF, fixed_beta_cdf
from batchshaping.cdfs.beta_density import SMALLEST_CONCENTRATION, log_density
from batchshaping.cdfs.betainc import betainc
from batchshaping.cdfs.betaincinv import betaincinv
from batchshaping.cdfs.normal import NormalCDF, normal_cdf
from batchshaping.cdfs.prepared import PreparedCDF, nearest_inside
from batchshaping.cdfs.relaxed_bernoulli import RelaxedBernoulliCDF, sigmoid_with_tails
from batchshaping.priors.closed_form import (
    CONCENTRATION,
    POSITIVE,
    REAL,
    UNIT,
    ClosedFormPrior,
    are_numbers,
)

__all__ = ["Beta", "Normal", "RelaxedBernoulli", "SymBeta"]


def _rounded(dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Parameters in the dtype of the values, or in single precision where theirs is lower."""
    dtype = torch.promote_types(dtype, torch.float32)
    return tuple(p.to(dtype) for p in parameters)


@functools.lru_cache(maxsize=256)
def _of_numbers(
    cdf: type[NormalCDF | RelaxedBernoulliCDF], dtype: torch.dtype, *numbers: float
) -> PreparedCDF:
    """A CDF of numbers, made once for all calls, whatever the default device and the modes of the first."""
    with torch.inference_mode(False):
        return cdf(*(torch.tensor(number, dtype=dtype, device="cpu") for number in numbers))


def _prepared(
    cdf: type[NormalCDF | RelaxedBernoulliCDF],
    parameters: tuple[Tensor, ...],
    dtype: torch.dtype,
    gradients: bool,
) -> PreparedCDF:
    if not gradients and are_numbers(parameters):
        return _of_numbers(cdf, torch.promote_types(dtype, torch.float32), *map(float, parameters))
    first, second = _rounded(dtype, *parameters)
    return cdf(first, second, gradients=gradients)


class Beta(ClosedFormPrior, td.Beta):
    r"""The Beta distribution on (0, 1).

    .. math::
        F(x) = I_x(a, b)

    a and b both below 1 give a U shape: values near 0 or near 1, few between, as a gate should have them.

    Args:
        a: first concentration, between 1e-300 and 1e300; its ratio to a + b is the mean.
        b: second concentration, likewise, of a shape that broadcasts with a's.

    Raises:
        ValueError: if a parameter is out of range, or their shapes do not broadcast.

    Example:
        >>> Beta(0.6, 0.4).cdf(torch.tensor([0.1, 0.5, 0.9]))
        tensor([0.1297, 0.3841, 0.6951])
    """

    ranges = {"a": CONCENTRATION, "b": CONCENTRATION}

    def __init__(self, a: Tensor | float, b: Tensor | float, validate_args: bool | None = None) -> None:
        self._set_parameters(validate_args, a=a, b=b)

    @property
    def _dirichlet(self) -> td.Dirichlet:  # type: ignore[override]
        """What torch's Beta samples and scores with; made at each use, as learned parameters change."""
        both = torch.stack([self.concentration1, self.concentration0], dim=-1)
        return td.Dirichlet(both, validate_args=False)

    @property
    def concentration1(self) -> Tensor:
        """The parameter a, of shape ``batch_shape``."""
        return self.parameter("a")

    @property
    def concentration0(self) -> Tensor:
        """The parameter b, of shape ``batch_shape``."""
        return self.parameter("b")

    @staticmethod
    def prepare(
        parameters: tuple[Tensor, ...], dtype: torch.dtype, *, gradients: bool = False, tails: bool = False
    ) -> PreparedCDF:
        a, b = parameters
        if not gradients and are_numbers(parameters):
            return fixed_beta_cdf(float(a), float(b), dtype, tails=tails)
        return BetaCDF(a, b, dtype, gradients=gradients, tails=tails)

    def cdf(self, value: Tensor) -> Tensor:
        a, b = self.parameters
        return betainc(a, b, value).to(value.dtype)

    @staticmethod
    def quantile(parameters: tuple[Tensor, ...], p: Tensor) -> Tensor:
        a, b = parameters
        return betaincinv(a, b, p).to(p.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        a, b, x = (t.double() for t in (*self.parameters, value))
        return log_density(a, b, x).to(value.dtype)


class SymBeta(Beta):
    r"""The Beta distribution whose concentrations add up to one, U-shaped with mean a.

    .. math::
        F(x) = I_x(a, 1 - a)

    Args:
        a: mean of the distribution, in (0, 1).

    Raises:
        ValueError: if a is not in (0, 1).

    Example:
        >>> SymBeta(0.6).icdf(torch.tensor([0.1, 0.5, 0.9]))
        tensor([0.0657, 0.6802, 0.9937])
    """

    ranges = {"a": UNIT._replace(lower=SMALLEST_CONCENTRATION)}

    def __init__(self, a: Tensor | float, validate_args: bool | None = None) -> None:
        self._set_parameters(validate_args, a=a)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        (a,) = self._tensors.values()
        return a, 1 - a

    @property
    def concentration0(self) -> Tensor:
        """1 - a, of shape ``batch_shape``."""
        return 1 - self.parameter("a")


class RelaxedBernoulli(ClosedFormPrior, td.RelaxedBernoulli):
    r"""The Relaxed Bernoulli (binary concrete) distribution on (0, 1).

    .. math::
        F(x) = \mathrm{sigmoid}( \tau \, \mathrm{logit}(x) - \mathrm{logit}(\mu) )

    The probability of x > 1/2 is the mean of the Bernoulli that is relaxed; the lower the temperature, the
    closer the values to 0 and 1.

    Args:
        mean: :math:`\mu`, the mean of the Bernoulli, in (0, 1); torch calls it ``probs``.
        temperature: :math:`\tau`, positive, of a shape that broadcasts with the mean's.

    Raises:
        ValueError: if the mean is not in (0, 1), the temperature not positive, or their shapes do not
            broadcast.

    References:
        Maddison, Mnih and Teh, The Concrete Distribution, 2017, https://arxiv.org/abs/1611.00712.

    Example:
        >>> RelaxedBernoulli(mean=0.2, temperature=0.25).cdf(torch.tensor([0.1, 0.5, 0.9]))
        tensor([0.6978, 0.8000, 0.8739])
    """

    ranges = {"mean": UNIT, "temperature": POSITIVE}

    def __init__(
        self,
        mean: Tensor | float,
        temperature: Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        self.transforms = [td.SigmoidTransform()]
        self._set_parameters(validate_args, mean=mean, temperature=temperature)

    @property
    def base_dist(self) -> Any:  # type: ignore[override]
        """The logistic distribution of logit(x); made at each use, as learned parameters change."""
        return td.relaxed_bernoulli.LogitRelaxedBernoulli(
            self.temperature, probs=self.parameter("mean"), validate_args=False
        )

    @property
    def mean(self) -> Tensor:
        """Not available, since it has no closed form. The mean of the Bernoulli is ``probs``."""
        raise NotImplementedError(
            "the mean of a RelaxedBernoulli has no closed form; its argument is `probs`"
        )

    @property
    def temperature(self) -> Tensor:
        """The temperature, of shape ``batch_shape``."""
        return self.parameter("temperature")

    @staticmethod
    def prepare(
        parameters: tuple[Tensor, ...], dtype: torch.dtype, *, gradients: bool = False, tails: bool = False
    ) -> PreparedCDF:
        return _prepared(RelaxedBernoulliCDF, parameters, dtype, gradients)

    def cdf(self, value: Tensor) -> Tensor:
        mean, temperature = _rounded(value.dtype, *self.parameters)
        inside = (value > 0) & (value < 1) | value.isnan()
        logit = torch.logit(torch.where(inside, value, 0.5))
        cdf = sigmoid_with_tails(temperature * logit - torch.logit(mean))
        return torch.where(inside, cdf, (value > 0.5).to(value.dtype))

    @staticmethod
    def quantile(parameters: tuple[Tensor, ...], p: Tensor) -> Tensor:
        mean, temperature = _rounded(p.dtype, *parameters)
        return torch.sigmoid((torch.logit(p) + torch.logit(mean)) / temperature)

    def log_prob(self, value: Tensor) -> Tensor:
        mean, temperature = _rounded(value.dtype, *self.parameters)
        x, _ = nearest_inside(value)
        # The density of a logistic variable u, and the slope of u.
        u = temperature * torch.logit(x) - torch.logit(mean)
        logistic = torch.nn.functional.logsigmoid(u) + torch.nn.functional.logsigmoid(-u)
        density: Tensor = logistic + temperature.log() - x.log() - torch.log1p(-x)
        return density.to(value.dtype)


class Normal(ClosedFormPrior, td.Normal):
    r"""The Normal distribution.

    .. math::
        F(x) = \Phi\left( \frac{x - \mu}{\sigma} \right)

    Args:
        loc: mean :math:`\mu`.
        scale: standard deviation :math:`\sigma`, positive, of a shape that broadcasts with the mean's.

    Raises:
        ValueError: if the scale is not positive, or the shapes do not broadcast.

    Example:
        >>> Normal(0.6, 0.1).cdf(torch.tensor([0.5, 0.6, 0.7]))
        tensor([0.1587, 0.5000, 0.8413])
    """

    ranges = {"loc": REAL, "scale": POSITIVE}

    def __init__(self, loc: Tensor | float, scale: Tensor | float, validate_args: bool | None = None) -> None:
        self._set_parameters(validate_args, loc=loc, scale=scale)

    @property
    def loc(self) -> Tensor:  # type: ignore[override]
        """The mean, of shape ``batch_shape``."""
        return self.parameter("loc")

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The standard deviation, of shape ``batch_shape``."""
        return self.parameter("scale")

    @staticmethod
    def prepare(
        parameters: tuple[Tensor, ...], dtype: torch.dtype, *, gradients: bool = False, tails: bool = False
    ) -> PreparedCDF:
        return _prepared(NormalCDF, parameters, dtype, gradients)

    def cdf(self, value: Tensor) -> Tensor:
        loc, scale = _rounded(value.dtype, *self.parameters)
        return normal_cdf(value, loc, scale)

    @staticmethod
    def quantile(parameters: tuple[Tensor, ...], p: Tensor) -> Tensor:
        loc, scale = _rounded(p.dtype, *parameters)
        standard: Tensor = torch.special.ndtri(p)
        return loc + scale * standard

    def log_prob(self, value: Tensor) -> Tensor:
        loc, scale = _rounded(value.dtype, *self.parameters)
        standard = (value - loc) / scale
        density: Tensor = -0.5 * standard.square() - scale.log() - 0.5 * math.log(2 * math.pi)
        return density.to(value.dtype)
