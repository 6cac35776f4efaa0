"""The priors: torch distributions that know their CDF, its inverse and every derivative of it.

Parameters are kept as they were given. A number is used in double precision whatever the dtype of the
values; a tensor that an optimizer updates in place is read anew at each call, so a prior can be made once and
learned.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributions as td
from torch import Tensor
from torch.autograd.function import once_differentiable

from batchshaping import cdf_beta, cdf_normal, cdf_relaxedbernoulli
from batchshaping.beta_density import LARGEST_CONCENTRATION, SMALLEST_CONCENTRATION, log_density
from batchshaping.checks import extent, known_to_hold
from batchshaping.derivatives import PreparedCDF, nearest_inside, stretched

__all__ = ["Beta", "ClosedFormPrior", "Normal", "Range", "RelaxedBernoulli", "SymBeta", "check_parameters"]


class Range(NamedTuple):
    """The values that a parameter can take: an open interval."""

    description: str
    lower: float = -math.inf
    upper: float = math.inf

    def outside(self, values: Tensor) -> Tensor | None:
        """The values that are not in the range; None where there are none, or they cannot be read."""
        found = extent(values)
        # A comparison with NaN is False.
        if found is None or (self.lower < found[0] and found[1] < self.upper):
            return None
        values = values.detach()
        return values[~((values > self.lower) & (values < self.upper))]


_POSITIVE = Range("positive and finite", lower=0.0)
_CONCENTRATION = Range("between 1e-300 and 1e300", SMALLEST_CONCENTRATION, LARGEST_CONCENTRATION)
_UNIT = Range("between 0 and 1, both excluded", lower=0.0, upper=1.0)
_REAL = Range("finite")


class ClosedFormPrior(td.Distribution):
    """A distribution on the line whose CDF has derivatives in closed form.

    A subclass names its parameters and their ranges in ``ranges``, and defines ``prepare``, ``cdf`` and
    ``quantile``. One that redefines ``cdf`` without ``prepare`` has no closed form any more; it is treated as
    a distribution of anyone else's.

    Attributes:
        in_closed_form: whether ``prepare`` tells what ``cdf`` does.
        key: tells the class from all others of the process, of the same name too. By it, compiled programs
            look the class up in ``by_key``.
    """

    ranges: ClassVar[dict[str, Range]]
    in_closed_form: ClassVar[bool] = True
    key: ClassVar[str]
    by_key: ClassVar[dict[str, type[ClosedFormPrior]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if {"cdf", "prepare"} & vars(cls).keys():
            cls.in_closed_form = "prepare" in vars(cls)
        cls.key = next(
            key
            for n in itertools.count()
            if (key := f"{cls.__module__}.{cls.__qualname__}#{n}") not in ClosedFormPrior.by_key
        )
        ClosedFormPrior.by_key[cls.key] = cls

    def _set_parameters(self, validate_args: bool | None, **given: Tensor | float) -> None:
        """Keep the parameters as given, checked; numbers in double precision."""
        self._given = given
        self._checked = validate_args is not False
        self._tensors = {name: self._as_tensor(name, value) for name, value in given.items()}
        try:
            all_shapes = [t.shape for t in self._tensors.values()]
            batch_shape = max(all_shapes, key=len)
            if any(shape and shape != batch_shape for shape in all_shapes):
                # torch takes longer for this than for all the rest.
                batch_shape = torch.broadcast_shapes(*all_shapes)
        except RuntimeError:
            shapes = ", ".join(f"{k} {tuple(t.shape)}" for k, t in self._tensors.items())
            raise ValueError(f"{type(self).__name__}: parameters must broadcast, received {shapes}") from None
        self.check()
        # torch's own checks would print a tensor over many lines, and read it on every device.
        td.Distribution.__init__(self, batch_shape, validate_args=False)

    def _as_tensor(self, name: str, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            if value.is_complex():
                raise TypeError(f"{type(self).__name__}: {name} must be real, received {value.dtype}")
            whole = torch.promote_types(torch.get_default_dtype(), torch.float32)
            return value if value.is_floating_point() else value.to(whole)
        try:
            number = math.fsum([value])  # unlike float, it takes no text
        except (TypeError, ValueError, OverflowError):
            raise TypeError(
                f"{type(self).__name__}: {name} must be a number or a tensor, received {_in_short(value)}"
            ) from None
        # The same wherever the prior is made: other tensors of the process may be made on another device, or
        # in inference mode, where autograd cannot save them.
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return torch.tensor(number, dtype=torch.float64, device="cpu")
        return torch.tensor(number, dtype=torch.float64, device="cpu")

    def check(self) -> None:
        """Refuse parameters out of range, as far as they can be read; not if made with validate_args=False.

        Raises:
            ValueError: naming the parameter and its value.
        """
        if not self._checked:
            return
        for name, tensor in self._tensors.items():
            number = self._given[name]
            if not isinstance(number, Tensor) and self.ranges[name].lower < number < self.ranges[name].upper:
                continue  # sooner than by its tensor
            wrong = self.ranges[name].outside(tensor)
            if wrong is not None:
                raise _out_of_range(self, name, self.ranges[name].description, wrong, tensor)

    @property
    def given(self) -> dict[str, Tensor | float]:
        """The arguments that the prior was made with, as tensors and numbers."""
        return {n: self._tensors[n] if isinstance(v, Tensor) else v for n, v in self._given.items()}

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that ``prepare`` takes, in its order, with the graph to what was given."""
        return tuple(self._tensors.values())

    def parameter(self, name: str) -> Tensor:
        """One parameter by its name, in ``batch_shape`` and, if given as a number, the default dtype."""
        value = self._tensors[name]
        if not isinstance(self._given[name], Tensor):
            value = value.to(torch.get_default_dtype())
        return value.expand(self.batch_shape)

    @staticmethod
    def prepare(
        parameters: tuple[Tensor, ...], dtype: torch.dtype, *, gradients: bool = False, tails: bool = False
    ) -> PreparedCDF:
        """The CDF of these parameters on values of this dtype, with their gradients or without.

        What depends on the parameters only is computed here, once for all values. Logarithms may be asked for
        if ``tails`` is set.
        """
        raise NotImplementedError

    @staticmethod
    def quantile(parameters: tuple[Tensor, ...], p: Tensor) -> Tensor:
        """The inverse of the CDF of these parameters at p, differentiable in everything."""
        raise NotImplementedError

    def icdf(self, value: Tensor) -> Tensor:
        return self.quantile(self.parameters, value)

    def log_cdf(self, value: Tensor) -> Tensor:
        """The logarithm of the CDF, with relative precision as far into the tails as the values go."""
        return self._log_tails(value)[0]

    def log_sf(self, value: Tensor) -> Tensor:
        """The logarithm of the survival function, 1 less the CDF, likewise."""
        return self._log_tails(value)[1]

    def _log_tails(self, value: Tensor) -> tuple[Tensor, Tensor]:
        tails: tuple[Tensor, Tensor] = _LogTails.apply(value, type(self), *self.parameters)[:2]
        return tails

    def replace(self, **parameters: Tensor | float) -> ClosedFormPrior:
        """The same prior with some parameters replaced, not checked before :meth:`check`."""
        merged: dict[str, Any] = {**self._given, **parameters}
        replaced = type(self)(**merged, validate_args=False)
        replaced._checked = self._checked
        return replaced

    def of_arrays(self, shape: torch.Size, arrays: slice) -> ClosedFormPrior:
        """The priors of some of the arrays of a shape, counted in row-major order."""
        tensors = {n: v for n, v in self._given.items() if isinstance(v, Tensor) and v.ndim}
        return self.replace(**{n: v.expand(shape).reshape(-1)[arrays] for n, v in tensors.items()})

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return self.replace(**{name: self.parameter(name).expand(batch_shape) for name in self._given})

    def __repr__(self) -> str:
        shown = (
            f"{name}=tensor{tuple(value.shape)}"
            if isinstance(value, Tensor) and (value.ndim or value.is_meta)
            else f"{name}={float(torch.as_tensor(value).detach()):.6g}"
            for name, value in self._given.items()
        )
        return f"{type(self).__name__}({', '.join(shown)})"


class _LogTails(torch.autograd.Function):
    """log CDF and log survival function, with their derivatives computed beside them in the forward pass."""

    @staticmethod
    def forward(value: Tensor, prior: type[ClosedFormPrior], *parameters: Tensor) -> tuple[Tensor, ...]:
        # A prepared CDF writes over what has the shape of its values.
        value = value.expand(torch.broadcast_shapes(value.shape, *(p.shape for p in parameters)))
        at = prior.prepare(parameters, value.dtype, gradients=True, tails=True).logs(value)
        cdf_by, sf_by = zip(*at.parameters, strict=True)
        stretch = () if at.stretch is None else (at.stretch,)
        return at.log_cdf, at.log_sf, at.cdf_by_x, *cdf_by, at.sf_by_x, *sf_by, *stretch

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*output[2:])
        ctx.operands = [(inputs[0].shape, inputs[0].dtype), *((p.shape, p.dtype) for p in inputs[2:])]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cdf_gradient: Tensor, sf_gradient: Tensor, *_: Any) -> Any:
        half = len(ctx.operands)
        cdf_by, sf_by, stretch = (ctx.saved_tensors[k : k + half] for k in (0, half, 2 * half))
        by, *by_parameters = (
            cdf_gradient * cdf + sf_gradient * sf for cdf, sf in zip(cdf_by, sf_by, strict=True)
        )
        by_value, *by_parameter = (
            total.sum_to_size(shape).to(dtype)
            for total, (shape, dtype) in zip(
                (stretched(by, *(stretch or (None,))), *by_parameters), ctx.operands, strict=True
            )
        )
        return by_value, None, *by_parameter

    @staticmethod
    def vmap(info: Any, in_dims: Any, value: Tensor, prior: Any, *parameters: Tensor) -> Any:
        mapped = list(zip((value, *parameters), (in_dims[0], *in_dims[2:]), strict=True))
        rank = max(t.ndim - (d is not None) for t, d in mapped)
        value, *rest = (cdf_beta.to_front(t, d, rank) for t, d in mapped)
        outputs = _LogTails.apply(value, prior, *rest)
        return outputs, (0,) * len(outputs)


def check_parameters(prior: td.Distribution) -> None:
    """Refuse a prior whose parameters have left their range since it was made, as far as they can be read.

    Raises:
        ValueError: naming the parameter and its value.
    """
    if isinstance(prior, ClosedFormPrior):
        prior.check()
    # Not by the default of torch, which a compiler turns off for the whole process.
    elif not torch.compiler.is_compiling() and vars(prior).get("_validate_args", True):
        for name, constraint in prior.arg_constraints.items():
            tensor = vars(prior).get(name)
            if tensor is None and type(getattr(type(prior), name, None)) is property:
                tensor = getattr(prior, name)
            # What is fixed was checked when the prior was made.
            if not isinstance(tensor, Tensor) or not tensor.requires_grad:
                continue
            if not td.constraints.is_dependent(constraint):
                holds = constraint.check(tensor.detach())
                if not known_to_hold(holds):
                    raise _out_of_range(prior, name, str(constraint), tensor.detach()[~holds], tensor)


def _out_of_range(
    prior: td.Distribution, name: str, description: str, wrong: Tensor, of: Tensor
) -> ValueError:
    """The error that names a parameter, the range that it has left, and one of the wrong values."""
    count = "" if of.ndim == 0 else f" ({len(wrong)} of {of.numel()} values)"
    value = wrong.reshape(-1)[0].item()
    return ValueError(f"{type(prior).__name__}: {name} must be {description}, received {value:.6g}{count}")


def _in_short(value: object) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def _rounded(dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Parameters in the dtype of the values, or in single precision where theirs is lower."""
    dtype = torch.promote_types(dtype, torch.float32)
    return tuple(p.to(dtype) for p in parameters)


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

    ranges = {"a": _CONCENTRATION, "b": _CONCENTRATION}

    def __init__(self, a: Tensor | float, b: Tensor | float, validate_args: bool | None = None) -> None:
        self._set_parameters(validate_args, a=a, b=b)

    @property
    def _dirichlet(self) -> td.Dirichlet:  # type: ignore[override]
        """What torch's Beta samples and scores with, made anew so that learned parameters are current."""
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
        if not gradients and all(p.ndim == 0 and p.device.type == "cpu" for p in parameters):
            return cdf_beta.fixed_beta_cdf(float(a), float(b), dtype, tails=tails)
        return cdf_beta.BetaCDF(a, b, dtype, gradients=gradients, tails=tails)

    def cdf(self, value: Tensor) -> Tensor:
        a, b = self.parameters
        return cdf_beta.betainc(a, b, value).to(value.dtype)

    @staticmethod
    def quantile(parameters: tuple[Tensor, ...], p: Tensor) -> Tensor:
        a, b = parameters
        return cdf_beta.betaincinv(a, b, p).to(p.dtype)

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

    ranges = {"a": _UNIT._replace(lower=SMALLEST_CONCENTRATION)}

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

    ranges = {"mean": _UNIT, "temperature": _POSITIVE}

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
        """The logistic distribution of logit(x), made anew so that learned parameters are current."""
        return td.relaxed_bernoulli.LogitRelaxedBernoulli(
            self.temperature, probs=self.parameter("mean"), validate_args=False
        )

    @property
    def mean(self) -> Tensor:
        """Not in closed form; that of the Bernoulli which is relaxed, the argument, is ``probs``."""
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
        mean, temperature = _rounded(dtype, *parameters)
        return cdf_relaxedbernoulli.RelaxedBernoulliCDF(mean, temperature, gradients=gradients)

    def cdf(self, value: Tensor) -> Tensor:
        mean, temperature = _rounded(value.dtype, *self.parameters)
        inside = (value > 0) & (value < 1) | value.isnan()
        logit = torch.logit(torch.where(inside, value, 0.5))
        cdf = cdf_relaxedbernoulli.sigmoid_with_tails(temperature * logit - torch.logit(mean))
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

    ranges = {"loc": _REAL, "scale": _POSITIVE}

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
        loc, scale = _rounded(dtype, *parameters)
        return cdf_normal.NormalCDF(loc, scale, gradients=gradients)

    def cdf(self, value: Tensor) -> Tensor:
        loc, scale = _rounded(value.dtype, *self.parameters)
        return cdf_normal.get_normal_cdf(value, loc, scale)

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
