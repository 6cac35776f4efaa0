"""Priors whose CDF has closed forms of all its derivatives, and the ranges of their parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributions as td
from torch import Tensor
from torch.autograd.function import once_differentiable

from batchshaping.cdfs.beta_density import LARGEST_CONCENTRATION, SMALLEST_CONCENTRATION
from batchshaping.cdfs.elementwise import to_front
from batchshaping.cdfs.prepared import PreparedCDF, stretched
from batchshaping.priors.checks import extent, known_to_hold

__all__ = [
    "CONCENTRATION",
    "ClosedFormPrior",
    "POSITIVE",
    "REAL",
    "Range",
    "UNIT",
    "are_numbers",
    "check_parameters",
]


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


POSITIVE = Range("positive and finite", lower=0.0)
"""The range of a scale or a temperature."""

CONCENTRATION = Range("between 1e-300 and 1e300", SMALLEST_CONCENTRATION, LARGEST_CONCENTRATION)
"""The range of a concentration of a Beta distribution."""

UNIT = Range("between 0 and 1, both excluded", lower=0.0, upper=1.0)
"""The range of a mean on the unit interval."""

REAL = Range("finite")
"""The range of a location."""


class ClosedFormPrior(td.Distribution):
    """A distribution on the line whose CDF has derivatives in closed form.

    A subclass names its parameters and their ranges in ``ranges``, and defines ``prepare``, ``cdf`` and
    ``quantile``. If it redefines ``cdf`` without ``prepare``, it has no closed form any more, and is treated
    like any other distribution.

    Attributes:
        in_closed_form: whether ``prepare`` evaluates the same CDF as ``cdf``.
        key: an identifier of the class that is unique in the process, even among classes of the same name.
            Compiled programs look the class up by it in ``by_key``.
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
        """Check the parameters and keep them as they were given, and numbers also in double precision."""
        self._given = given
        self._checked = validate_args is not False
        self._tensors = {name: self._as_tensor(name, value) for name, value in given.items()}
        try:
            all_shapes = [t.shape for t in self._tensors.values()]
            batch_shape = max(all_shapes, key=len)
            if any(shape and shape != batch_shape for shape in all_shapes):
                # This takes torch longer than all the rest.
                batch_shape = torch.broadcast_shapes(*all_shapes)
        except RuntimeError:
            shapes = ", ".join(f"{k} {tuple(t.shape)}" for k, t in self._tensors.items())
            raise ValueError(f"{type(self).__name__}: parameters must broadcast, received {shapes}") from None
        self.check()
        # torch's own checks would print a tensor over many lines, and read it from any device.
        td.Distribution.__init__(self, batch_shape, validate_args=False)

    def _as_tensor(self, name: str, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            if value.is_complex():
                raise TypeError(f"{type(self).__name__}: {name} must be real, received {value.dtype}")
            whole = torch.promote_types(torch.get_default_dtype(), torch.float32)
            return value if value.is_floating_point() else value.to(whole)
        try:
            number = math.fsum([value])  # float would accept text
        except (TypeError, ValueError, OverflowError):
            raise TypeError(
                f"{type(self).__name__}: {name} must be a number or a tensor, received {_in_short(value)}"
            ) from None
        # Not on the default device, nor as an inference tensor, which autograd cannot save: the prior may be
        # used elsewhere than where it is made.
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
                continue  # a number is checked faster than its tensor
            wrong = self.ranges[name].outside(tensor)
            if wrong is not None:
                raise _out_of_range(self, name, self.ranges[name].description, wrong, tensor)

    @property
    def given(self) -> dict[str, Tensor | float]:
        """The arguments that the prior was made with, which are tensors and numbers."""
        return {n: self._tensors[n] if isinstance(v, Tensor) else v for n, v in self._given.items()}

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that ``prepare`` takes, in its order, differentiable in the given ones."""
        return tuple(self._tensors.values())

    def parameter(self, name: str) -> Tensor:
        """One parameter by its name, of shape ``batch_shape``; a number gets the default dtype."""
        value = self._tensors[name]
        if not isinstance(self._given[name], Tensor):
            value = value.to(torch.get_default_dtype())
        return value.expand(self.batch_shape)

    @staticmethod
    def prepare(
        parameters: tuple[Tensor, ...], dtype: torch.dtype, *, gradients: bool = False, tails: bool = False
    ) -> PreparedCDF:
        """The CDF of these parameters on values of this dtype, with their gradients or without.

        Everything that depends on the parameters alone is computed here, once for all values. With ``tails``,
        the CDF also gives logarithms.
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

    def same_as(self, other: ClosedFormPrior) -> bool:
        """Whether another prior is of the same family, made with the same numbers and the same tensors."""
        return type(self) is type(other) and all(
            one is two or (not (isinstance(one, Tensor) or isinstance(two, Tensor)) and one == two)
            for one, two in zip(self._given.values(), other._given.values(), strict=True)
        )

    @staticmethod
    def joined(priors: Sequence[ClosedFormPrior], shapes: Sequence[torch.Size]) -> ClosedFormPrior:
        """Priors of one family as one prior, with a parameter for each array of all the shapes in turn.

        Args:
            priors: priors of one family.
            shapes: the shape of the arrays of each, to which its ``batch_shape`` broadcasts.
        """
        parameters: dict[str, Tensor | float] = {}
        for name, first in priors[0]._given.items():
            given = [prior._given[name] for prior in priors]
            if not any(isinstance(value, Tensor) for value in given) and all(v == first for v in given):
                continue
            tensors = [prior._tensors[name] for prior in priors]
            device = next((t.device for t in tensors if not t.is_cpu), tensors[0].device)
            parameters[name] = torch.cat(
                [t.to(device).expand(shape).reshape(-1) for t, shape in zip(tensors, shapes, strict=True)]
            )
        return priors[0].replace(**parameters)

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


def are_numbers(parameters: Sequence[Tensor]) -> bool:
    """Whether parameters are one pair that can be read at once: tensors of one value on the CPU."""
    return all(p.ndim == 0 and p.device.type == "cpu" for p in parameters)


class _LogTails(torch.autograd.Function):
    """The logarithms of CDF and survival function, whose forward pass computes their derivatives too."""

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
        # Read once: a checkpoint computes what was saved anew, and gives it out a single time.
        half, saved = len(ctx.operands), ctx.saved_tensors
        cdf_by, sf_by, stretch = (saved[k : k + half] for k in (0, half, 2 * half))
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
        value, *rest = (to_front(t, d, rank) for t, d in mapped)
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
