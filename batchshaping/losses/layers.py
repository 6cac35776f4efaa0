"""Tensors whose arrays share their samples, as the layers of a network, side by side in one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.losses.dims import canonical_dims, samples_last
from batchshaping.priors.closed_form import ClosedFormPrior

__all__ = ["Layers", "Part"]


class Part(NamedTuple):
    """Arrays that are evaluated together, because they have one prior.

    Attributes:
        prior: a prior whose ``batch_shape`` broadcasts to the shape.
        shape: shape of the arrays.
        place: where they are among all arrays, counted in row-major order.
    """

    prior: Distribution
    shape: torch.Size
    place: slice

    def within(self, own: slice) -> Part:
        """Those of the arrays that are also in another range, with their place within that range."""
        start = max(self.place.start, own.start)
        stop = max(start, min(self.place.stop, own.stop))
        of_prior = slice(start - self.place.start, stop - self.place.start)
        return Part(
            _of_arrays(self.prior, self.shape, of_prior),
            torch.Size([stop - start]),
            slice(start - own.start, stop - own.start),
        )


class Layers:
    """Where the arrays of each tensor are among the arrays of all.

    Args:
        tensors: a tensor, or a list of tensors of the same number of samples.
        dim: the dimension or dimensions that hold the samples; None for all.

    Attributes:
        single: whether there is one tensor, which is no list. Its arrays keep their shape.
        samples: the number of samples of each tensor.
        shapes: the shape of the arrays of each tensor, which is that of the tensor without its samples.
        shape: shape of all arrays together.
    """

    def __init__(self, tensors: Tensor | Sequence[Tensor], dim: int | Sequence[int] | None) -> None:
        self.single = isinstance(tensors, Tensor)
        self.dims, self.samples, self.shapes, self.sizes = [], [], [], []
        dims_of: dict[int, tuple[int, ...]] = {}
        for tensor in (tensors,) if isinstance(tensors, Tensor) else tensors:
            shape = tensor.shape
            ndim = len(shape)
            dims = dims_of[ndim] if ndim in dims_of else dims_of.setdefault(ndim, canonical_dims(dim, ndim))
            arrays = torch.Size([size for d, size in enumerate(shape) if d not in dims])
            self.dims.append(dims)
            self.samples.append(torch.Size([shape[d] for d in dims]).numel())
            self.shapes.append(arrays)
            self.sizes.append(arrays.numel())
        self.shape = self.shapes[0] if self.single else torch.Size([sum(self.sizes)])

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """All arrays, of shape (arrays..., N)."""
        if self.single:
            return samples_last(tensors[0], self.dims[0])
        # As the samples usually come first, most tensors can be joined as they are.
        columns = [_samples_first(tensor, dims) for tensor, dims in zip(tensors, self.dims, strict=True)]
        return torch.cat(columns, dim=1).T

    def split(self, values: Tensor) -> Tensor | list[Tensor]:
        """One value of each array, in the shapes of the arrays: a list, unless there is a single tensor."""
        if self.single:
            return values
        return [
            part.reshape(shape) for part, shape in zip(values.split(self.sizes), self.shapes, strict=True)
        ]

    def weights_of_means(self) -> float | Tensor:
        """The weights of the arrays in the sum of the means over the arrays of each tensor.

        One number if they are equal, and else a number for each array.
        """
        sizes = [size for size in self.sizes if size]
        if not sizes:
            return 1.0
        if all(size == sizes[0] for size in sizes):
            return 1 / sizes[0]
        weights = torch.tensor([1 / size for size in sizes], dtype=torch.float64, device="cpu")
        repeats = torch.tensor(sizes, device="cpu")
        return weights.repeat_interleave(repeats, output_size=sum(sizes))

    def parts(self, priors: Sequence[Distribution]) -> list[Part]:
        """The arrays by the priors that they have, as few parts as priors can be joined to.

        Args:
            priors: a prior for each tensor, whose ``batch_shape`` broadcasts to the shape of its arrays.
        """
        if self.single:
            return [Part(priors[0], self.shape, slice(0, self.sizes[0]))]
        runs: list[list[Part]] = []
        for prior, shape, place in zip(priors, self.shapes, self._places(), strict=True):
            part = Part(prior, shape, place)
            if runs and _can_join(runs[-1][-1].prior, prior):
                runs[-1].append(part)
            else:
                runs.append([part])
        return [_joined(run) for run in runs]

    def _places(self) -> Iterator[slice]:
        ends = [0]
        for size in self.sizes:
            ends.append(ends[-1] + size)
        return (slice(start, stop) for start, stop in pairwise(ends))


def _samples_first(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Move the sample dimensions to the front, and join them and the others: (N, arrays)."""
    if x.ndim == 2 and dims == (0,):
        return x
    kept = [d for d in range(x.ndim) if d not in dims]
    moved = x.permute((*dims, *kept))
    return moved.reshape(moved.shape[: len(dims)].numel(), moved.shape[len(dims) :].numel())


def _can_join(one: Distribution, other: Distribution) -> bool:
    """Whether the arrays of both can be evaluated together.

    That takes one prior for all of them, or a family with a prior for each array. To give each array the same
    prior would take longer than two evaluations.
    """
    if not isinstance(one, ClosedFormPrior) or not isinstance(other, ClosedFormPrior):
        return one is other and not one.batch_shape
    if one.batch_shape and other.batch_shape:
        return type(one) is type(other)
    return not one.batch_shape and one.same_as(other)


def _joined(run: Sequence[Part]) -> Part:
    prior, _, place = run[0]
    if len(run) == 1:
        return run[0]
    place = slice(place.start, run[-1].place.stop)
    if prior.batch_shape:
        priors = [part.prior for part in run if isinstance(part.prior, ClosedFormPrior)]
        prior = ClosedFormPrior.joined(priors, [part.shape for part in run])
    return Part(prior, torch.Size([place.stop - place.start]), place)


def _of_arrays(prior: Distribution, shape: torch.Size, arrays: slice) -> Distribution:
    """The prior of some of the arrays of a shape."""
    if isinstance(prior, ClosedFormPrior):
        return prior.of_arrays(shape, arrays)
    if prior.batch_shape not in (torch.Size(), torch.Size([1])):
        raise ValueError(
            f"across ranks, {type(prior).__name__} must be one prior for all arrays, "
            f"received batch_shape {tuple(prior.batch_shape)}"
        )
    return prior
