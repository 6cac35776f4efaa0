"""Modules that own a prior: its tensors are the module's, and the prior is made from them at each use.

A distribution is taken apart once, into a recipe (its class, and the arguments that it was made with) and its
tensors, which become parameters and buffers of the module. So they are moved, saved, trained and replaced
with the module like any others. This works for all distributions, which need no code for it.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, Uniform, constraints
from torch.distributions.transforms import AffineTransform, PowerTransform, _InverseTransform
from torch.distributions.utils import lazy_property

from batchshaping.priors.checks import extent, known_to_hold
from batchshaping.priors.closed_form import ClosedFormPrior

__all__ = ["PriorModule", "kept_inside"]

# A learned parameter is held back where it is nearer to an end of its range than this share of the distance
# that its start has from it.
_HELD_BACK = 1 / 8


class PriorModule(nn.Module):
    """A module that owns a prior; a subclass gives it one with :meth:`own`.

    - A fixed tensor of the prior is copied into a buffer.
    - A ``nn.Parameter`` is registered as it is, the same object. Far enough from the ends of its range, the
      prior's parameter has its value; nearer to an end than an eighth of the distance of its start, the value
      that :func:`kept_inside` gives. So no step of an optimizer takes the prior's parameter out of its range.
      :attr:`prior` shows the value that is used.
    - Another tensor that requires a gradient, such as the output of a network, is not owned: it gets its
      gradient, but the module neither moves nor saves it.
    - A number stays a number in double precision. It has no state, like any other setting.

    The names are those of the prior's arguments, and in a list of priors each starts with the position of the
    prior in the list. The start of a learned parameter is a buffer whose name is that of the parameter with
    ``_start`` appended. If the parameter is parametrized (``torch.nn.utils.parametrize``), the prior has the
    value of the parametrization.
    """

    _recipe: Any
    _ranges: dict[str, _Bounds]
    _borrowed: dict[str, _Borrowed]
    _names: list[str]
    _started: list[str]

    def own(self, prior: Distribution | Sequence[Distribution]) -> None:
        """Take a prior, or a list of priors, whose tensors become those of this module."""
        inventory = _Inventory(lambda name: hasattr(type(self), name) or hasattr(self, name))
        recipe = _recipe_of(prior, (), inventory)
        self._recipe = recipe if inventory.tensors or inventory.modules else prior
        self._ranges, self._borrowed, self._names = {}, {}, []
        for name, module in inventory.modules.items():
            self.add_module(name, module)
        for name, tensor in inventory.tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            elif tensor.requires_grad:
                self._borrowed[name] = _Borrowed(tensor, name)
                continue
            else:
                self.register_buffer(name, _copy_of(tensor))
            self._names.append(name)
        learned = [name for name in self._names if name in self._parameters]
        for name in learned:
            bounds = inventory.bounds[name].without(learned[learned.index(name) :])
            if bounds.some:
                self._ranges[name] = bounds
        needed = {n for name, bounds in self._ranges.items() for n in (name, *bounds.names)}
        self._started = [name for name in learned if name in needed]
        for name in self._started:
            self.register_buffer(f"{name}_start", _copy_of(inventory.tensors[name]))

    @property
    def prior(self) -> Any:
        """The prior, or the list of priors, with the tensors that this module has now."""
        if not isinstance(self._recipe, _Recipe):
            return self._recipe
        values: dict[str, Tensor] = {name: getattr(self, name) for name in self._names}
        for name, borrowed in self._borrowed.items():
            values[name] = borrowed.current()
        if self._ranges:
            starts = {**values, **{name: getattr(self, f"{name}_start") for name in self._started}}
            for name, bounds in self._ranges.items():
                if name in self._parameters:
                    ends, first_ends = bounds.at(values), bounds.at(starts)
                    values[name] = kept_inside(values[name], starts[name], ends, first_ends)
        return self._recipe.make(values)

    def _shown(self) -> str:
        prior = self.prior
        try:
            return repr(prior)
        except RuntimeError:  # tensors without values, whose numbers torch would show
            return f"{type(prior).__name__}()"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The state of an earlier version has no starts, and its parameters are those of the prior.
        for name in self._ranges:
            value, key = state_dict.get(f"{prefix}{name}"), f"{prefix}{name}_start"
            if value is not None and key not in state_dict:
                own = self._buffers[f"{name}_start"]
                ends = self._ranges[name].at(
                    {n: state_dict.get(f"{prefix}{n}", getattr(self, n)) for n in self._names}
                )
                inside = known_to_hold((value > ends[0]) & (value < ends[1]))
                state_dict[key] = value.detach().clone() if inside else own
        super()._load_from_state_dict(state_dict, prefix, *args)


def _copy_of(tensor: Tensor) -> Tensor:
    """A copy that autograd can save, even if the module is made in inference mode."""
    with torch.inference_mode(False):
        return tensor.detach().clone(memory_format=torch.contiguous_format)


_Ends = tuple[Any, Any]
"""The two ends of a range, each a tensor or a number."""


def kept_inside(value: Tensor, start: Tensor, ends: _Ends, first_ends: _Ends | None = None) -> Tensor:
    r"""A value that an optimizer may move anywhere, mapped into a range; well inside of it, it is unchanged.

    With d the distance of the value from an end of the range and k an eighth of that of the start, the
    distance becomes

    .. math::
        d' = \begin{cases} d & d \ge k \\ k / (2 - d / k) & d < k \end{cases}

    whose branches meet with the same slope. So the start is unchanged, and a step that is too large comes
    close to the end and never reaches it. The slope vanishes more slowly than that of an exponential, so that
    an optimizer finds the way back.

    Args:
        value: the value that the optimizer updates.
        start: its first value, within the range.
        ends: the ends of the range, infinite where there is none.
        first_ends: the ends at the start, if they move.

    Example:
        >>> value = torch.tensor([0.8, 0.1, 0.0, -0.8])
        >>> kept_inside(value, torch.tensor(0.8), (0.0, torch.inf))
        tensor([0.8000, 0.1000, 0.0500, 0.0100])
    """
    first_ends = first_ends or ends
    if _known_to_be_far(value, start, ends, first_ends):
        return value
    finfo = torch.finfo(value.dtype)
    kept = value
    for sign, end, first_end in zip((1, -1), ends, first_ends, strict=True):
        if not isinstance(end, Tensor) and abs(end) > finfo.max:
            continue  # no end on this side
        knee = ((start - first_end) * (sign * _HELD_BACK)).clamp_min(finfo.smallest_normal)
        distance = (value - end) * sign
        near = distance < knee
        ratio = torch.where(near, distance / knee, 1.0).clamp_min(-1 / finfo.eps)
        last = end + sign * finfo.eps * abs(end)  # next to the end, which rounding could reach
        held = end + sign * knee / (2 - ratio)
        held = held.clamp_min(last) if sign > 0 else held.clamp_max(last)
        kept = torch.where(near, held, kept)
    return kept


def _known_to_be_far(value: Tensor, start: Tensor, ends: _Ends, first_ends: _Ends) -> bool:
    """Whether the extremes show that :func:`kept_inside` changes nothing; False if they cannot be read."""
    found = []
    for values in (value, start, *ends, *first_ends):
        extremes = extent(values) if isinstance(values, Tensor) else (values, values)
        if extremes is None:
            return False
        found.append(extremes)
    now, first, lower, upper, first_lower, first_upper = found
    return (
        now[0] - lower[1] >= (first[1] - first_lower[0]) * _HELD_BACK
        and upper[0] - now[1] >= (first_upper[1] - first[0]) * _HELD_BACK
    )


@dataclass(frozen=True)
class _Bounds:
    """The range of a parameter; an end is a number or the name of another tensor of the prior."""

    lower: str | float = -math.inf
    upper: str | float = math.inf

    @property
    def names(self) -> list[str]:
        return [end for end in (self.lower, self.upper) if isinstance(end, str)]

    @property
    def some(self) -> bool:
        return any(isinstance(end, str) or math.isfinite(end) for end in (self.lower, self.upper))

    def without(self, names: list[str]) -> _Bounds:
        """The same without the ends of these names: of two parameters that bound each other, one yields."""
        return _Bounds(
            -math.inf if self.lower in names else self.lower, math.inf if self.upper in names else self.upper
        )

    def at(self, values: Mapping[str, Tensor]) -> _Ends:
        lower, upper = (values[end] if isinstance(end, str) else end for end in (self.lower, self.upper))
        return lower, upper


class _Borrowed:
    """A tensor that requires a gradient and is not owned by the module."""

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.tensor, self.name = tensor, name
        self.versions = [(leaf, leaf._version) for leaf in _leaves(tensor) if leaf is not tensor]

    def current(self) -> Tensor:
        if any(leaf._version != version for leaf, version in self.versions):
            raise RuntimeError(
                f"the prior's {self.name} was computed from a parameter that has changed since: make the "
                "prior anew in each step, or make it with the parameter itself"
            )
        return self.tensor


# Taking a distribution apart


class _Recipe:
    """How to make something again from tensors by their names."""

    def make(self, tensors: Mapping[str, Tensor]) -> Any:
        raise NotImplementedError


def _make(part: Any, tensors: Mapping[str, Tensor]) -> Any:
    return part.make(tensors) if isinstance(part, _Recipe) else part


@dataclass
class _Held(_Recipe):
    """A tensor, expanded if it was."""

    name: str
    shape: torch.Size

    def make(self, tensors: Mapping[str, Tensor]) -> Tensor:
        tensor = tensors[self.name]
        return tensor if tensor.shape == self.shape else tensor.expand(self.shape)


@dataclass
class _Constructed(_Recipe):
    """An object made by the constructor of its class, and attributes that are set afterwards."""

    kind: type
    arguments: dict[str, Any]
    attributes: dict[str, Any]

    def make(self, tensors: Mapping[str, Tensor]) -> Any:
        made = self.kind(**{name: _make(part, tensors) for name, part in self.arguments.items()})
        for name, value in self.attributes.items():
            setattr(made, name, value)
        return made


@dataclass
class _Copied(_Recipe):
    """A copy of an object whose attributes with tensors are made anew."""

    template: Any
    attributes: dict[str, Any]

    def make(self, tensors: Mapping[str, Tensor]) -> Any:
        made = copy.copy(self.template)
        for name, part in self.attributes.items():
            vars(made)[name] = _make(part, tensors)
        return made


@dataclass
class _Inverse(_Recipe):
    """The inverse of a transform, which torch cannot copy."""

    transform: Any

    def make(self, tensors: Mapping[str, Tensor]) -> Any:
        return _make(self.transform, tensors).inv


@dataclass
class _Collected(_Recipe):
    """A list or tuple."""

    kind: type
    parts: list[Any]

    def make(self, tensors: Mapping[str, Tensor]) -> Any:
        return self.kind([_make(part, tensors) for part in self.parts])


_Path = tuple[str, ...]


@dataclass
class _Inventory:
    """The tensors and modules of a prior, by the names that they get in the module."""

    taken: Callable[[str], bool]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    bounds: dict[str, _Bounds] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    _once: dict[int, _Held] = field(default_factory=dict)

    def name(self, path: _Path) -> str:
        name = "_".join(path) or "prior"
        while self.taken(name) or name in self.tensors or name in self.modules:
            name = f"prior_{name}"
        return name

    def hold(self, tensor: Tensor, path: _Path, bounds: _Bounds) -> _Held:
        """Note a tensor under a name of its own."""
        shape = tensor.shape
        base = tensor._base
        if isinstance(base, nn.Parameter) and base.expand(shape).stride() == tensor.stride():
            tensor = base
        name = self.name(path)
        self.tensors[name], self.bounds[name] = tensor, bounds
        return _Held(name, shape)

    def hold_once(self, tensor: Tensor, path: _Path) -> _Held:
        """The same, but a tensor that is found again keeps its first name."""
        if id(tensor) not in self._once:
            self._once[id(tensor)] = self.hold(tensor, path, _Bounds())
        return self._once[id(tensor)]


def _recipe_of(value: Any, path: _Path, inventory: _Inventory) -> Any:
    """The recipe of what holds tensors, noting them in the inventory; anything else is its own recipe."""
    if isinstance(value, nn.Module):
        inventory.modules[inventory.name(path)] = value
        return value
    return _dispatched(value, path, inventory)


@singledispatch
def _dispatched(value: Any, path: _Path, inventory: _Inventory) -> Any:
    return value


@_dispatched.register
def _(value: Tensor, path: _Path, inventory: _Inventory) -> Any:
    return inventory.hold_once(value, path)


@_dispatched.register(list)
@_dispatched.register(tuple)
def _(value: Any, path: _Path, inventory: _Inventory) -> Any:
    parts = [_recipe_of(part, (*path, str(k)), inventory) for k, part in enumerate(value)]
    return _Collected(type(value), parts) if any(isinstance(p, _Recipe) for p in parts) else value


@_dispatched.register
def _(value: Transform, path: _Path, inventory: _Inventory) -> Any:
    return _copied(value, path, inventory)


@_dispatched.register
def _(value: _InverseTransform, path: _Path, inventory: _Inventory) -> Any:
    return _Inverse(_recipe_of(value.inv, path, inventory))


@_dispatched.register
def _(value: ClosedFormPrior, path: _Path, inventory: _Inventory) -> Any:
    arguments: dict[str, Any] = {"validate_args": False}
    for name, given in value.given.items():
        bounds = _Bounds(value.ranges[name].lower, value.ranges[name].upper)
        arguments[name] = given
        if isinstance(given, Tensor):
            arguments[name] = inventory.hold(given, (*path, name), bounds)
    return _Constructed(type(value), arguments, {"_checked": value._checked})


@_dispatched.register
def _(value: Distribution, path: _Path, inventory: _Inventory) -> Any:
    arguments = _constructor_arguments(value)
    if arguments is None:
        return _copied(value, path, inventory)
    parts = {
        name: inventory.hold(part, (*path, name), _Bounds())
        if isinstance(part, Tensor)
        else _recipe_of(part, (*path, name), inventory)
        for name, part in arguments.items()
    }
    names = {id(vars(value).get(n)): part.name for n, part in parts.items() if isinstance(part, _Held)}
    for name, part in parts.items():
        if isinstance(part, _Held):
            inventory.bounds[part.name] = _bounds_of(value, name, names)
    return _Constructed(type(value), parts, {"_validate_args": vars(value).get("_validate_args", True)})


# Factors and exponents, which must not be 0, as the transform would have no inverse.
_NOT_ZERO = {(AffineTransform, "scale"), (PowerTransform, "exponent")}


def _copied(value: Any, path: _Path, inventory: _Inventory) -> Any:
    """The recipe that copies an object, or the object itself if no tensor is in it or to come."""
    template, attributes = copy.copy(value), {}
    for name, attribute in list(vars(value).items()):
        if _is_derived(value, name):
            _forget(template, name)
            continue
        part = _recipe_of(attribute, (*path, name.strip("_")), inventory)
        if isinstance(part, _Recipe):
            attributes[name] = part
            vars(template)[name] = None
        if isinstance(part, _Held) and (type(value), name) in _NOT_ZERO:
            positive = bool((attribute > 0).all())
            inventory.bounds[part.name] = _Bounds(lower=0.0) if positive else _Bounds(upper=0.0)
    # A transform that caches values is copied for each use, so that the cache does not outlive the use.
    remembers = "_cached_x_y" in vars(value)
    return _Copied(template, attributes) if attributes or remembers else value


def _forget(template: Any, name: str) -> None:
    """Remove an attribute that torch then computes again from others."""
    if name == "_inv":
        template._inv = None
    elif name == "_cached_x_y":
        template._cached_x_y = None, None
    else:
        del vars(template)[name]


def _is_derived(value: Any, name: str) -> bool:
    """Whether torch computes an attribute from others: logits from probabilities, or an inverse."""
    if name == "_cached_x_y" or (name == "_inv" and not isinstance(value, _InverseTransform)):
        return True
    lazy = isinstance(inspect.getattr_static(type(value), name, None), lazy_property)
    return lazy and vars(value).get("_param") is not vars(value).get(name)


def _constructor_arguments(value: Distribution) -> dict[str, Any] | None:
    """The arguments that a distribution was made with, if its attributes have them, and None if not.

    An argument that the class changes, such as probabilities that torch clamps, is looked up at the start of
    the graph of the attribute. The arguments are right if the constructor makes the same distribution again.
    """
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(value)).parameters.items():
        if name == "validate_args":
            found[name] = False  # the loss checks the parameters where that costs nothing
        elif _is_derived(value, name):
            continue
        elif hasattr(value, name):
            found[name] = getattr(value, name)
        elif parameter.default is parameter.empty:
            return None
    origins = {name: _origin(v) if isinstance(v, Tensor) else v for name, v in found.items()}
    for arguments in (origins, found):
        try:
            again = type(value)(**arguments)
        except Exception:
            continue
        if _alike(again, value):
            return arguments
    return None


def _bounds_of(value: Distribution, name: str, names: Mapping[int, str]) -> _Bounds:
    """The range of an argument, where an end may be one of the tensors whose names are given by their id."""
    if isinstance(value, Uniform):  # not every version of torch says that its ends bound each other
        lower, upper = (names.get(id(end)) for end in (value.low, value.high))
        return _Bounds(lower=lower or -math.inf) if name == "high" else _Bounds(upper=upper or math.inf)
    try:
        constraint = value.arg_constraints.get(name)
    except NotImplementedError:
        return _Bounds()
    if constraint is constraints.simplex:
        return _Bounds(lower=0.0)  # torch divides by the sum
    ends: list[str | float] = []
    for attribute, none in (("lower_bound", -math.inf), ("upper_bound", math.inf)):
        end = getattr(constraint, attribute, none)
        ends.append(names.get(id(end), none) if isinstance(end, Tensor) else float(end))
    return _Bounds(*ends)


# Where a tensor comes from


def _graph(tensor: Tensor) -> Iterator[Any]:
    """The nodes of a tensor's graph, in a fixed order, each once."""
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(following for following, _ in node.next_functions)


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The tensors that a gradient of this one reaches."""
    if tensor.is_leaf:
        return [tensor] if tensor.requires_grad else []
    return [node.variable for node in _graph(tensor) if hasattr(node, "variable")]


def _origin(tensor: Tensor) -> Tensor:
    """The parameter that a tensor is computed from, if there is just one; else the tensor."""
    if isinstance(tensor._base, nn.Parameter):
        return tensor._base if tensor._base.shape == tensor.shape else tensor
    leaves = _leaves(tensor)
    return leaves[0] if len(leaves) == 1 and isinstance(leaves[0], nn.Parameter) else tensor


def _alike(one: Any, other: Any) -> bool:
    """Whether two objects hold the same values, computed from the same tensors in the same way."""
    if type(one) is not type(other) and not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    if isinstance(one, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        nodes = [[getattr(n, "variable", n.name()) for n in _graph(t)] for t in (one, other)]
        same_graph = len(nodes[0]) == len(nodes[1]) and all(
            a is b or (isinstance(a, str) and a == b) for a, b in zip(*nodes, strict=True)
        )
        same_values = one.is_meta or bool(((one == other) | (one != one) & (other != other)).all())
        return same_values and (same_graph or not other.requires_grad)
    if isinstance(one, Distribution | Transform):
        parts = [
            {n: v for n, v in vars(d).items() if n != "_validate_args" and not _is_derived(d, n)}
            for d in (one, other)
        ]
        return parts[0].keys() == parts[1].keys() and all(_alike(v, parts[1][n]) for n, v in parts[0].items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    try:
        return one is other or bool(one == other)
    except Exception:
        return False
