"""The loss of a batch in shards equals that of one process with the whole batch, gradients included.

A law is a function that every rank of a group runs; what it asserts, it asserts on each of them.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributions as td
from ranks import DIED, Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchshaping as bs
from batchshaping import distributed
from batchshaping.losses.history import Memory
from batchshaping.losses.sliced import SlicedBatchShapingLoss
from batchshaping.statistics import STATISTICS
from batchshaping.statistics.statistic import Statistic

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"
)

F64 = torch.float64
# Largest difference from one process, as a share of the largest value.
TOLERANCE = {torch.float32: 1e-6, F64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}


class Family(NamedTuple):
    """A family of priors and parameters to start from."""

    prior: Callable[..., td.Distribution]
    parameters: tuple[float, ...]


FAMILIES = {
    "Beta": Family(bs.Beta, (2.0, 6.0)),
    "U-shaped Beta": Family(bs.Beta, (0.6, 0.4)),
    "SymBeta": Family(bs.SymBeta, (0.6,)),
    "RelaxedBernoulli": Family(bs.RelaxedBernoulli, (0.2, 0.25)),
    "Normal": Family(bs.Normal, (0.6, 0.2)),
}
BETA = FAMILIES["Beta"]
# A U-shaped Beta is exchanged as any other.
OF_EACH_KIND = [family for name, family in FAMILIES.items() if name != "U-shaped Beta"]


def even(world: int) -> list[int]:
    return [6] * world


def uneven(world: int) -> list[int]:
    """Different numbers of samples, none at all on the second rank, or the last."""
    return [4 + 3 * rank if rank != min(1, world - 1) or world == 1 else 0 for rank in range(world)]


def values(samples: int, *rest: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values in (0.02, 0.98), the same on every rank."""
    shape = (samples, *rest)
    n = int(torch.Size(shape).numel())
    return (0.02 + 0.96 * torch.rand(n, dtype=F64)).reshape(shape).to(dtype)


def close(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> None:
    """Equal up to a share of the largest expected value, or of the largest of ``scale``."""
    size = expected if scale is None else scale
    largest = float(size.detach().abs().max()) if size.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[expected.dtype] * largest)


def loss_and_gradients(
    x: Tensor,
    prior: Callable[..., td.Distribution],
    parameters: tuple[Tensor, ...],
    *args: Any,
    **settings: Any,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The loss, the gradient in x and those in the parameters."""
    x, *given = (t.detach().clone().requires_grad_() for t in (x, *parameters))
    loss = bs.batch_shaping(x, prior(*given), *args, **settings)
    # The losses of several arrays count differently, so that none can stand for another.
    total = (loss * torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)).sum()
    by_x, *by_parameter = torch.autograd.grad(total, [x, *given])
    return loss.detach(), by_x, tuple(by_parameter)


def equals_one_process(
    rank: int,
    world: int,
    sizes: list[int],
    x: Tensor,
    prior: Callable[..., td.Distribution],
    parameters: tuple[Tensor, ...] = (),
    dim: int | tuple[int, ...] | None = 0,
    mask: Tensor | None = None,
    along: int = 0,
    masked_ranks: tuple[int, ...] | None = None,
    **settings: Any,
) -> None:
    """The law: this rank's shard, cut ``along`` a dimension, against the whole batch in one process."""
    own = x.split(sizes, along)[rank]
    own_mask = mask.expand(x.shape).split(sizes, along)[rank] if mask is not None else None
    if masked_ranks is not None and rank not in masked_ranks:
        assert own_mask is None or bool(own_mask.all())
        own_mask = None
    expected, whole, by_whole = loss_and_gradients(x, prior, parameters, dim, mask=mask, **settings)
    loss, by_x, by_parameter = loss_and_gradients(
        own, prior, parameters, dim, mask=own_mask, group="world", **settings
    )
    close(loss, expected)
    close(by_x / world, whole.split(sizes, along)[rank], whole)
    for mine, one_process in zip(by_parameter, by_whole, strict=True):
        dist.all_reduce(mine)
        close(mine / world, one_process)


# The laws


def every_prior(rank: int, world: int) -> None:
    for sizes, dtype in ((even(world), torch.float32), (uneven(world), F64)):
        for family in FAMILIES.values():
            x = values(sum(sizes), 5, dtype=dtype)
            fixed = partial(family.prior, *family.parameters)
            shared = tuple(torch.tensor(p, dtype=dtype) for p in family.parameters)
            spread = 1 + 0.2 * torch.rand(5, dtype=dtype)
            by_array = tuple(p * spread for p in shared)
            mixed = (by_array[0], *shared[1:])
            for prior, parameters in [
                (fixed, ()),
                (family.prior, shared),
                (family.prior, by_array),
                (family.prior, mixed),
            ]:
                equals_one_process(rank, world, sizes, x, prior, parameters)
            equals_one_process(rank, world, sizes, x, partial(family.prior, *by_array))


def one_rank_has_it_all(rank: int, world: int) -> None:
    for owner in sorted({0, world - 1}):
        sizes = [7 * (r == owner) for r in range(world)]
        parameters = (torch.tensor(2.0), torch.tensor([1.0, 2.0, 6.0]))
        equals_one_process(rank, world, sizes, values(7, 3), bs.Beta, parameters)
        equals_one_process(rank, world, sizes, values(7, 3), partial(bs.Normal, 0.5, 0.2), ties=True)


def one_sample(rank: int, world: int) -> None:
    sizes = [int(r == world - 1) for r in range(world)]
    equals_one_process(rank, world, sizes, values(1, 4), bs.Normal, (torch.tensor(0.5), torch.tensor(0.2)))


def ties(rank: int, world: int) -> None:
    for sizes in (even(world), uneven(world)):
        x = values(sum(sizes), 5, dtype=F64)
        x = torch.where(torch.rand(x.shape) < 0.6, x[:1], x)
        mask = torch.rand(x.shape) < 0.7
        mask[-1] = True
        for family in OF_EACH_KIND:
            shared = tuple(torch.tensor(p, dtype=F64) for p in family.parameters)
            ways = [*itertools.product((None, mask), (False, True))]
            for some, shared_ranks in ways if family is BETA else ways[::3]:
                equals_one_process(rank, world, sizes, x, family.prior, shared, mask=some, ties=shared_ranks)
        infinite = torch.where(torch.rand(x.shape) < 0.3, torch.inf, x)
        equals_one_process(rank, world, sizes, infinite, partial(bs.Normal, 0.5, 0.2), mask=mask, ties=True)


def masks(rank: int, world: int) -> None:
    for sizes in (even(world), uneven(world)):
        x = values(sum(sizes), 5, dtype=F64)
        mask = torch.rand(x.shape) < 0.6
        mask[-1] = True
        rows = torch.rand(len(x), 1) < 0.6
        rows[-1] = True
        # Some arrays have samples on the first rank only.
        first_only = mask.clone()
        first_only[0] = True
        first_only[sizes[0] :, :3] = False
        on_first = torch.ones_like(mask)
        on_first[: sizes[0]] = mask[: sizes[0]]
        on_first[0, 0] = True
        for family in OF_EACH_KIND:
            shared = tuple(torch.tensor(p, dtype=F64) for p in family.parameters)
            # Masks are of every kind for one prior: they are exchanged before it is looked at.
            more = (rows, torch.ones_like(mask)) if family is BETA else ()
            for some in (mask, first_only, *more):
                equals_one_process(rank, world, sizes, x, family.prior, shared, mask=some)
        two = (torch.tensor(2.0, dtype=F64), torch.tensor(6.0, dtype=F64))
        equals_one_process(rank, world, sizes, x, bs.Beta, two, mask=on_first, masked_ranks=(0,))


def dims(rank: int, world: int) -> None:
    for sizes, reduction in ((even(world), "mean"), (uneven(world), "none")):
        n = sum(sizes)
        given = (torch.tensor(2.0, dtype=F64), torch.tensor(6.0, dtype=F64))
        for dim, first, second in [
            (0, (3, 4), (3, 4)),
            (0, (3, 1), (4,)),
            (-3, (), (4,)),
            ((0, 1), (4,), ()),
            ((2, 0), (3,), (3,)),
            ((0, -1), (1,), (3,)),
            ((0, 1, 2), (), ()),
            (None, (), ()),
        ]:
            x = values(n, 3, 4, dtype=F64)
            parameters = tuple(
                p * (1 + 0.2 * torch.rand(s, dtype=F64)) for p, s in zip(given, (first, second), strict=True)
            )
            equals_one_process(rank, world, sizes, x, bs.Beta, parameters, dim, reduction=reduction)
        x = values(3, n, 4, dtype=F64)
        for dim in (1, -2, (0, 1), (1, 2)):
            equals_one_process(rank, world, sizes, x, bs.Beta, given, dim, along=1)
        strided = values(4, n, dtype=F64).T
        equals_one_process(rank, world, sizes, strided, bs.Beta, given)
        equals_one_process(rank, world, sizes, values(n, dtype=F64), bs.Beta, given)


def reductions(rank: int, world: int) -> None:
    sizes = uneven(world)
    for reduction in ("mean", "sum", "none"):
        parameters = (torch.rand(4, 2), torch.rand(2) + 0.2)
        x = values(sum(sizes), 4, 2)
        equals_one_process(rank, world, sizes, x, bs.Normal, parameters, reduction=reduction)


def fewer_arrays_than_ranks(rank: int, world: int) -> None:
    sizes = uneven(world)
    for arrays in sorted({0, 1, max(1, world - 1), world, world + 1}):
        x = values(sum(sizes), arrays, dtype=F64)
        mask = torch.rand(x.shape) < 0.6
        mask[-1] = True
        for family in OF_EACH_KIND:
            shared = tuple(torch.tensor(p, dtype=F64) for p in family.parameters)
            by_array = tuple(p * (1 + 0.2 * torch.rand(arrays, dtype=F64)) for p in shared)
            for parameters, settings in ((by_array, {}), (shared, {"mask": mask, "ties": True})):
                equals_one_process(
                    rank, world, sizes, x, family.prior, parameters, reduction="none", **settings
                )


def many_samples(rank: int, world: int) -> None:
    sizes = [3000 + 1000 * r for r in range(world)]
    x = values(sum(sizes), 3)
    for parameters in ((), (torch.tensor([0.6, 2.0, 30.0]), torch.tensor([0.4, 6.0, 70.0]))):
        prior = bs.Beta if parameters else partial(bs.Beta, 0.6, 0.4)
        equals_one_process(rank, world, sizes, x, prior, parameters)


def half_precision(rank: int, world: int) -> None:
    for dtype, sizes in ((torch.bfloat16, even(world)), (torch.float16, uneven(world))):
        x = values(sum(sizes), 5, dtype=dtype)
        for family in FAMILIES.values():
            shared = tuple(torch.tensor(p) for p in family.parameters)
            equals_one_process(rank, world, sizes, x, family.prior, shared, ties=True)
            halves = tuple(p.to(dtype).expand(5) for p in shared)
            equals_one_process(rank, world, sizes, x, family.prior, halves, ties=True)


def foreign_priors(rank: int, world: int) -> None:
    for sizes in (even(world), uneven(world)):
        x = values(sum(sizes), 5, dtype=F64)
        mask = torch.rand(x.shape) < 0.7
        mask[-1] = True
        two = (torch.tensor(0.4, dtype=F64), torch.tensor(0.3, dtype=F64))
        for prior, parameters in [
            (td.Normal, two),
            (td.Laplace, two),
            (td.Laplace, tuple(p.reshape(1) for p in two)),
            (partial(td.Uniform, 0.1, 0.8), ()),
            (td.Exponential, two[:1]),
        ]:
            equals_one_process(rank, world, sizes, x, prior, parameters)
            equals_one_process(rank, world, sizes, x, prior, parameters, mask=mask, ties=True)
        with pytest.raises(ValueError, match=r"one prior for all arrays, received batch_shape \(5,\)"):
            bs.batch_shaping(x.split(sizes)[rank], td.Laplace(two[0].expand(5), two[1]), 0, group="world")


def nan_stays_in_its_array(rank: int, world: int) -> None:
    for prior in (bs.Beta(0.6, 0.4), bs.Normal(0.5, 0.2), td.Laplace(0.5, 0.2)):
        x = values(6, 5)
        if rank == world - 1:
            x[2, 3] = torch.nan
        loss = bs.batch_shaping(x.requires_grad_(), prior, 0, reduction="none", group="world")
        assert loss.isnan().tolist() == [False, False, False, True, False]
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert gradient[:, [0, 1, 2, 4]].isfinite().all()
        assert gradient[:, 3].isnan().all()


def every_rank_gets_the_same_loss(rank: int, world: int) -> None:
    x = values(sum(uneven(world)), 5).split(uneven(world))[rank]
    loss = bs.batch_shaping(x, bs.SymBeta(0.6), 0, reduction="none", group="world")
    losses = [torch.empty_like(loss) for _ in range(world)]
    dist.all_gather(losses, loss)
    assert all(torch.equal(each, loss) for each in losses)


def a_group_of_some_ranks(rank: int, world: int) -> None:
    members = sorted({0, world - 1})
    group = dist.new_group(members)
    x = values(6 * world, 5, dtype=F64)
    parameters = (torch.tensor(2.0, dtype=F64), torch.rand(5, dtype=F64) + 1)
    own = x.split(6)[rank]
    if rank not in members:
        with pytest.raises(ValueError, match="process group that this rank belongs to"):
            bs.batch_shaping(own, bs.Beta(2, 6), 0, group=group)
        return
    together = torch.cat([x.split(6)[m] for m in members])
    expected, whole, by_whole = loss_and_gradients(together, bs.Beta, parameters, 0)
    loss, by_x, by_parameter = loss_and_gradients(own, bs.Beta, parameters, 0, group=group)
    close(loss, expected)
    close(by_x / len(members), whole.split(6)[members.index(rank)], whole)
    for mine, one_process in zip(by_parameter, by_whole, strict=True):
        dist.all_reduce(mine, group=group)
        close(mine / len(members), one_process)


class Absolute(Statistic):
    """A statistic of one's own."""

    def terms(self, values: Tensor, positions: Tensor, prior: td.Distribution) -> Tensor:
        return (prior.cdf(values) - positions).abs()


def every_statistic(rank: int, world: int) -> None:
    for sizes in (even(world), uneven(world)):
        x = values(sum(sizes), 5, dtype=F64)
        mask = torch.rand(x.shape) < 0.7
        mask[-1] = True
        two = (torch.tensor(0.6, dtype=F64), 1 + torch.rand(5, dtype=F64))
        for statistic in (*STATISTICS, Absolute()):
            prior = bs.Normal if statistic == "epps_pulley" else bs.Beta
            # The mask is for the values of even shards and for the logits of uneven ones.
            of_values, of_logits = (mask, None) if sizes == even(world) else (None, mask)
            equals_one_process(rank, world, sizes, x, prior, two, mask=of_values, statistic=statistic)
            equals_one_process(
                *(rank, world, sizes, x.logit(), prior, two), mask=of_logits, statistic=statistic, logits=True
            )


def memories(rank: int, world: int) -> None:
    """Each rank remembers its own past samples, and together they remember those of all."""
    for sizes in (even(world), uneven(world)):
        alone, together = (bs.BatchShapingLoss(bs.Beta(2, 6), 0, history=2, group=g) for g in (None, "world"))
        for masked in (False, True, False):
            x = values(sum(sizes), 5, dtype=F64)
            mask = torch.rand(x.shape) < 0.7 if masked else torch.ones_like(x, dtype=torch.bool)
            mask[-1] = True
            whole, own = x.clone().requires_grad_(), x.split(sizes)[rank].clone().requires_grad_()
            expected = alone(whole, mask if masked else None)
            loss = together(own, mask.split(sizes)[rank] if masked else None)
            expected.backward()
            loss.backward()
            close(loss.detach(), expected.detach())
            close(own.grad / world, whole.grad.split(sizes)[rank], whole.grad)


def memories_of_equal_values(rank: int, world: int) -> None:
    """Among equal values, current and remembered, each takes the rank that it has in one process."""
    for ties in (False, True):
        settings = {"history": 2, "reduction": "none", "ties": ties}
        alone, together = (
            bs.BatchShapingLoss(bs.Beta(2, 6), 0, group=group, **settings) for group in (None, "world")
        )
        for _ in range(4):
            sizes = uneven(world)
            x = values(sum(sizes), 5, dtype=F64).mul(4).round().div(4)
            whole, own = x.clone().requires_grad_(), x.split(sizes)[rank].clone().requires_grad_()
            expected, loss = alone(whole), together(own)
            expected.sum().backward()
            loss.sum().backward()
            close(loss.detach(), expected.detach())
            close(own.grad / world, whole.grad.split(sizes)[rank], whole.grad)


def memories_are_for_the_current_batch(rank: int, world: int) -> None:
    """What is remembered does not stand in for samples of the batch, of no rank at all."""
    loss = bs.BatchShapingLoss(bs.Beta(2, 6), 0, history=2, group="world")
    x = values(6, 5)
    loss(x)
    empty = torch.ones(6, 5, dtype=torch.bool)
    empty[:, 2] = False
    # On one rank an array may be empty.
    assert bool(loss(x, empty if rank == 0 and world > 1 else None).isfinite())
    assert loss.memory is not None
    before = len(loss.memory.values)
    with pytest.raises(ValueError, match="mask leaves an array without samples on all ranks"):
        loss(x, empty)
    with pytest.raises(ValueError, match=r"no samples along dim=0 of x with shape \(0, 5\)"):
        loss(x[:0])
    assert len(loss.memory.values) == before


def layers(rank: int, world: int) -> None:
    """The tensors of a list are one exchange, and get what each gets in a call of its own."""
    a, b = (torch.rand(n, dtype=F64).add(0.3).requires_grad_() for n in (5, 2))
    for sizes, masked, history in ((even(world), False, 0), (uneven(world), True, 2)):
        for priors in (
            bs.Beta(2, 6),
            [bs.Beta(2, 6), bs.Beta(2, 6), bs.Normal(0.4, 0.2)],
            [bs.Beta(a, 6), bs.Beta(b, 6), td.Laplace(torch.tensor(0.4), torch.tensor(0.2))],
        ):
            each = priors if isinstance(priors, list) else [priors] * 3
            leaves = [t for t in (a, b) if isinstance(priors, list) and priors[0].parameters[0] is a]
            settings = {"history": history, "reduction": "none"}
            alone = [bs.BatchShapingLoss(prior, 0, **settings) for prior in each]
            together = bs.BatchShapingLoss(priors, 0, group="world", **settings)
            for _ in range(2):
                wholes = [values(sum(sizes), n, dtype=F64).requires_grad_() for n in (5, 2, 1)]
                masks = [torch.rand(x.shape) < 0.7 for x in wholes] if masked else [None] * 3
                for mask in masks:
                    if mask is not None:
                        mask[-1] = True
                owns = [x.detach().split(sizes)[rank].clone().requires_grad_() for x in wholes]
                own_masks = [m if m is None else m.split(sizes)[rank] for m in masks]
                expected = [loss(x, m) for loss, x, m in zip(alone, wholes, masks, strict=True)]
                exchange = dist.all_to_all_single
                with mock.patch.object(dist, "all_to_all_single", side_effect=exchange) as exchanges:
                    found = together(owns, own_masks if masked else None)
                assert exchanges.call_count == 1
                by_whole = torch.autograd.grad(sum(t.sum() for t in expected), [*wholes, *leaves])
                by_own = torch.autograd.grad(sum(t.sum() for t in found), [*owns, *leaves])
                for x, y in zip(found, expected, strict=True):
                    close(x.detach(), y.detach())
                for x, y in zip(by_own[:3], by_whole[:3], strict=True):
                    close(x / world, y.split(sizes)[rank], y)
                for x, y in zip(by_own[3:], by_whole[3:], strict=True):
                    total = x.clone()
                    dist.all_reduce(total)
                    close(total / world, y)


def no_arrays(rank: int, world: int) -> None:
    for prior in (bs.Beta(0.6, 0.4), bs.Normal(torch.zeros(0), 1.0), td.Laplace(0.0, 1.0)):
        x = torch.empty(4, 0, requires_grad=True)
        losses = bs.batch_shaping(x, prior, 0, reduction="none", group="world")
        losses.sum().backward()
        assert losses.shape == (0,) and x.grad is not None and x.grad.shape == (4, 0)
        assert bool(bs.batch_shaping(x, prior, 0, group="world").isnan())


def slices(rank: int, world: int) -> None:
    sizes = uneven(world)
    x = torch.randn(sum(sizes), 6)
    alone, together = (SlicedBatchShapingLoss(slices=16, group=group) for group in (None, "world"))
    for _ in range(2):
        whole, own = x.clone().requires_grad_(), x.split(sizes)[rank].clone().requires_grad_()
        expected, loss = alone(whole), together(own)
        expected.backward()
        loss.backward()
        close(loss.detach(), expected.detach())
        close(own.grad / world, whole.grad.split(sizes)[rank], whole.grad)


def without_gradients(rank: int, world: int) -> None:
    sizes = uneven(world)
    x = values(sum(sizes), 5)
    expected = bs.batch_shaping(x, bs.Beta(0.6, 0.4), 0)
    with torch.no_grad():
        close(bs.batch_shaping(x.split(sizes)[rank], bs.Beta(0.6, 0.4), 0, group="world"), expected)
    with torch.inference_mode():
        close(bs.batch_shaping(x.split(sizes)[rank], bs.Beta(0.6, 0.4), 0, group="world"), expected)
    # Parameters alone learn from values that are given.
    a = torch.tensor(2.0, requires_grad=True)
    (one_process,) = torch.autograd.grad(bs.batch_shaping(x, bs.Beta(a, 6.0), 0), a)
    loss = bs.batch_shaping(x.split(sizes)[rank], bs.Beta(a, 6.0), 0, group="world")
    (mine,) = torch.autograd.grad(loss, a)
    dist.all_reduce(mine)
    close(mine / world, one_process)


def twice_differentiated_is_an_error(rank: int, world: int) -> None:
    for prior in (bs.Beta(2, 6), td.Laplace(0.5, 0.2)):
        x = values(6, 5).requires_grad_()
        loss = bs.batch_shaping(x, prior, 0, group="world")
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentia|does not require grad"):
            torch.autograd.grad(gradient.sum(), x)


def a_rank_whose_values_need_no_gradient(rank: int, world: int) -> None:
    """It takes part in the backward pass of the others, which would wait for it otherwise."""
    sizes = even(world)
    x = values(sum(sizes), 5, dtype=F64)
    given = torch.tensor(2.0, dtype=F64)
    for learned in (False, True):
        a = given.clone().requires_grad_(learned)
        whole = x.clone().requires_grad_()
        bs.batch_shaping(whole, bs.Beta(a, 6.0), 0).backward()
        one_process, a.grad = a.grad, None
        own = x.split(sizes)[rank].clone().requires_grad_(rank == 0)
        bs.batch_shaping(own, bs.Beta(a, 6.0), 0, group="world").backward()
        if rank == 0:
            close(own.grad / world, whole.grad.split(sizes)[rank], whole.grad)
        else:
            assert own.grad is None
        if learned:
            dist.all_reduce(a.grad)
            close(a.grad / world, one_process)


def bad_input_is_refused_on_every_rank(rank: int, world: int) -> None:
    """And the group goes on afterwards."""
    good = values(6, 5)
    if world > 1:
        with pytest.raises(ValueError, match=r"same number of arrays, received \[4, 5"):
            bs.batch_shaping(values(6, 4 + (rank > 0)), bs.Beta(2, 6), 0, group="world")
        with pytest.raises(ValueError, match=r"same dtype, received torch.float32, torch.bfloat16"):
            bs.batch_shaping(good if rank == 0 else good.bfloat16(), bs.Beta(2, 6), 0, group="world")
    with pytest.raises(ValueError, match=r"no samples along dim=0 of x with shape \(0, 5\)"):
        bs.batch_shaping(good[:0], bs.Beta(2, 6), 0, group="world")
    for masked in (0, 4):
        mask = torch.rand(good.shape) < 0.5
        mask[0] = True
        mask[:, masked] = False
        with pytest.raises(ValueError, match="mask leaves an array without samples"):
            bs.batch_shaping(good, bs.Beta(2, 6), 0, mask=mask, group="world")
    with pytest.raises(ValueError, match="'world' or None, received 'all'"):
        bs.batch_shaping(good, bs.Beta(2, 6), 0, group="all")
    expected = bs.batch_shaping(good.repeat(world, 1), bs.Beta(2, 6), 0, ties=True)
    close(bs.batch_shaping(good, bs.Beta(2, 6), 0, ties=True, group="world"), expected)


class Gated(nn.Module):
    """A network, its gates and their loss: what a training step calls."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.first, self.gate, self.loss = nn.Linear(6, 8), nn.Linear(8, 5), loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.gate(torch.tanh(self.first(x))).sigmoid())


def learned_beta(group: str | None) -> nn.Module:
    a, b = nn.Parameter(torch.tensor(2.0, dtype=F64)), nn.Parameter(torch.linspace(1, 3, 5, dtype=F64))
    return bs.BatchShapingLoss(bs.Beta(a, b), 0, group=group)


def generalized(group: str | None) -> nn.Module:
    torch.manual_seed(1)
    return bs.GeneralizedBatchShapingLoss(5, bs.Normal(0.3, 0.1), group=group).double()


def fixed_beta(group: str | None) -> nn.Module:
    return bs.BatchShapingLoss(bs.Beta(0.6, 0.4), 0, group=group)


def fixed_tensors(group: str | None) -> nn.Module:
    return bs.BatchShapingLoss(bs.Beta(torch.linspace(0.5, 2, 5), 0.4), 0, group=group)


def learned_log_normal(group: str | None) -> nn.Module:
    loc, scale = (nn.Parameter(torch.tensor(value, dtype=F64)) for value in (-0.7, 0.5))
    return bs.BatchShapingLoss(td.LogNormal(loc, scale), 0, group=group)


def learned_hyperprior(group: str | None) -> nn.Module:
    torch.manual_seed(1)
    hyperprior = bs.Normal(torch.tensor(0.3), nn.Parameter(torch.tensor(0.1)))
    return bs.GeneralizedBatchShapingLoss(5, hyperprior, group=group).double()


def ddp_takes_the_steps_of_one_process(rank: int, world: int) -> None:
    of_all = (fixed_beta, fixed_tensors, learned_beta, learned_log_normal, generalized, learned_hyperprior)
    for sizes, makes in ((even(world), (learned_beta,)), (uneven(world), of_all)):
        for make in makes:
            alone = Gated(make(None)).double()
            together = Gated(make("world")).double()
            together.load_state_dict(alone.state_dict())
            parallel = DistributedDataParallel(together)
            optimizers = [
                torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9) for model in (alone, together)
            ]
            start = copy.deepcopy(alone.state_dict())
            for _ in range(3):
                x = torch.randn(sum(sizes), 6, dtype=F64)
                for model, own, optimizer in zip(
                    (alone, parallel), (x, x.split(sizes)[rank]), optimizers, strict=True
                ):
                    optimizer.zero_grad()
                    model(own).backward()
                    optimizer.step()
                for mine, one_process in zip(together.parameters(), alone.parameters(), strict=True):
                    close(mine.detach(), one_process.detach())
            assert all(not torch.equal(p, start[name]) for name, p in alone.named_parameters())


def ddp_with_a_task_loss_takes_the_steps_of_one_process(rank: int, world: int) -> None:
    """Single precision, two gated layers with a loss each, and activation checkpointing."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8)])
            self.gates = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8)])
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor, group: str | None, kept: bool) -> tuple[Tensor, Tensor]:
            total = x.new_zeros(())
            for layer, gate in zip(self.layers, self.gates, strict=True):
                p = gate(x).sigmoid()
                shape = bs.BatchShapingLoss(bs.Beta(0.6, 0.4), 0, group=group)
                total = total + (shape(p) if kept else checkpoint(shape, p, use_reentrant=False))
                x = torch.tanh(layer(x)) * p
            return self.head(x), total

    for kept in (True, False):
        alone = Network()
        together = copy.deepcopy(alone)
        parallel = DistributedDataParallel(together)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.3) for model in (alone, together)]
        for _ in range(3):
            x, target = torch.randn(6 * world, 6), torch.randint(3, (6 * world,))
            shards = (x, target), (x.split(6)[rank], target.split(6)[rank])
            models = (alone, None), (parallel, "world")
            for (model, group), (own, label), optimizer in zip(models, shards, optimizers, strict=True):
                optimizer.zero_grad()
                logits, shaping = model(own, group, kept)
                (nn.functional.cross_entropy(logits, label) + 0.75 * shaping).backward()
                optimizer.step()
        for mine, one_process in zip(together.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(mine, one_process, rtol=0, atol=1e-6)


def ddp_leaves_each_rank_its_memory(rank: int, world: int) -> None:
    network = Gated(bs.BatchShapingLoss(bs.Beta(0.6, 0.4), 0, group="world", history=2))
    parallel = DistributedDataParallel(network)
    memory = network.loss.memory
    assert isinstance(memory, Memory)
    for _ in range(3):
        x = torch.randn(6 * world, 6).split(6)[rank]
        own = network.gate(torch.tanh(network.first(x))).sigmoid().detach()
        parallel(x).backward()
        torch.testing.assert_close(memory.values[0], own.T)
    everyone = [torch.empty_like(memory.values[0]) for _ in range(world)]
    dist.all_gather(everyone, memory.values[0].contiguous())
    assert world == 1 or not torch.equal(everyone[0], everyone[1])


class Traffic:
    """Bytes that this rank hands to ``torch.distributed`` for other ranks, by collective."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.bytes = {"all_to_all_single": 0, "all_gather": 0, "all_reduce": 0}

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in self.bytes:
                original = getattr(dist, name)
                replacement = getattr(self, f"_{name}")(original)
                stack.enter_context(mock.patch.object(dist, name, replacement))
            # Whatever else is called is not counted, and so must not be.
            for name in set(COLLECTIVES) - set(self.bytes):
                stack.enter_context(mock.patch.object(dist, name, side_effect=AssertionError(name)))
            yield

    def _all_to_all_single(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(output: Tensor, sent: Tensor, output_sizes: list[int], sizes: list[int], **rest: Any):
            to_others = sum(size for rank, size in enumerate(sizes) if rank != self.rank)
            self.bytes["all_to_all_single"] += to_others * sent.element_size()
            return original(output, sent, output_sizes, sizes, **rest)

        return counted

    def _all_gather(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(outputs: list[Tensor], sent: Tensor, **rest: Any):
            self.bytes["all_gather"] += sent.numel() * sent.element_size() * (self.world - 1)
            return original(outputs, sent, **rest)

        return counted

    def _all_reduce(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(sent: Tensor, **rest: Any):
            # The least that a rank can send: its values to be summed, and sums for the others.
            share = 2 * (self.world - 1) / self.world
            self.bytes["all_reduce"] += int(sent.numel() * sent.element_size() * share)
            return original(sent, **rest)

        return counted


COLLECTIVES = [
    *("all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "all_to_all_single", "broadcast"),
    *("gather", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send", "isend"),
    *("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"),
]


def traffic(rank: int, world: int, x: Tensor, prior: td.Distribution, mask: Tensor | None) -> dict[str, int]:
    """Bytes from this rank to others in a forward and a backward pass, by collective."""
    counter = Traffic(rank, world)
    with counter.counted():
        bs.batch_shaping(x.requires_grad_(), prior, 0, mask=mask, group="world").backward()
    return counter.bytes


def traffic_is_at_most_twice_the_own_values(rank: int, world: int) -> None:
    """However many ranks there are: the batch gathered on each would take ``world - 1`` times the values."""
    samples = 64
    for arrays, dtype, masked, learned in [
        (48, torch.float32, False, False),
        (48, torch.bfloat16, False, True),
        (53, F64, True, False),
        (53, torch.float32, True, True),
    ]:
        x = torch.rand(samples, arrays).to(dtype)
        mask = torch.rand(x.shape) < 0.9 if masked else None
        prior = bs.Beta(torch.full((arrays,), 2.0, requires_grad=True), 6.0) if learned else bs.Beta(0.6, 0.4)
        sent = traffic(rank, world, x, prior, mask)
        own = x.numel() * x.element_size()
        # If the arrays cannot be dealt out evenly, some ranks own one more.
        one_more = 0 if arrays % world == 0 else world * samples * x.element_size()
        assert sent["all_to_all_single"] <= 2 * own + one_more
        # Beside them a few numbers and the losses of the own arrays, and with masks a count for each array.
        share = -(-arrays // world) * max(4, x.element_size())
        assert sent["all_gather"] <= (world - 1) * (8 * 8 + share)
        assert sent["all_reduce"] <= (2 * 8 * arrays if masked else 0)
        if world >= 4:
            assert sum(sent.values()) < (world - 1) * own


def traffic_of_all_is_at_most_twice_the_batch(rank: int, world: int) -> None:
    for sizes in (even(world), uneven(world)):
        for arrays in (1, 3, 48):
            x = torch.rand(sizes[rank], arrays)
            sent = torch.tensor(traffic(rank, world, x, bs.Beta(0.6, 0.4), None)["all_to_all_single"])
            dist.all_reduce(sent)
            assert int(sent) <= 2 * sum(sizes) * arrays * x.element_size()


LAWS = [
    every_prior,
    one_rank_has_it_all,
    one_sample,
    ties,
    masks,
    dims,
    reductions,
    fewer_arrays_than_ranks,
    many_samples,
    half_precision,
    foreign_priors,
    every_statistic,
    memories,
    memories_of_equal_values,
    memories_are_for_the_current_batch,
    layers,
    no_arrays,
    slices,
    nan_stays_in_its_array,
    every_rank_gets_the_same_loss,
    a_group_of_some_ranks,
    without_gradients,
    a_rank_whose_values_need_no_gradient,
    twice_differentiated_is_an_error,
    bad_input_is_refused_on_every_rank,
    ddp_leaves_each_rank_its_memory,
    ddp_takes_the_steps_of_one_process,
    ddp_with_a_task_loss_takes_the_steps_of_one_process,
    traffic_is_at_most_twice_the_own_values,
    traffic_of_all_is_at_most_twice_the_batch,
]
OF_EIGHT = [
    one_rank_has_it_all,
    reductions,
    traffic_is_at_most_twice_the_own_values,
    traffic_of_all_is_at_most_twice_the_batch,
]


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with Ranks(request.param) as processes:
        yield processes


@pytest.mark.parametrize("ranks", [1, 2, 4], ids="{} ranks".format, indirect=True)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(ranks: Ranks, law: Callable[[int, int], None]) -> None:
    ranks.run(law)


@pytest.mark.parametrize("ranks", [8], ids="{} ranks".format, indirect=True)
@pytest.mark.parametrize("law", OF_EIGHT, ids=lambda law: law.__name__)
def test_law_of_eight(ranks: Ranks, law: Callable[[int, int], None]) -> None:
    ranks.run(law)


def a_compiled_step(rank: int, world: int) -> None:
    """The graph breaks where the ranks exchange the batch; what comes before and after is compiled.

    On the last rank: that the others are not compiled is nothing to it.
    """
    sizes = [6, 4]
    x, weight = torch.randn(10, 6, dtype=F64), torch.randn(6, 5, dtype=F64)

    def step(x: Tensor, weight: Tensor, a: Tensor, group: str | None) -> Tensor:
        return 2 * bs.batch_shaping((x @ weight).sigmoid(), bs.Beta(a, 6.0), 0, group=group)

    results = []
    compiled = torch.compile(step, backend="aot_eager") if rank == world - 1 else step
    for function, own, group in [(step, x, None), (compiled, x.split(sizes)[rank], "world")]:
        learned = [weight.clone().requires_grad_(), torch.tensor(2.0, dtype=F64, requires_grad=True)]
        loss = function(own, *learned, group)
        loss.backward()
        if group is not None:
            for t in learned:
                dist.all_reduce(t.grad)
                t.grad /= world
        results.append([loss.detach(), *(t.grad for t in learned)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_a_compiled_step_across_ranks_equals_that_of_one_process() -> None:
    with Ranks(2) as processes:
        processes.run(a_compiled_step)


# Ranks that go away


def a_rank_dies(rank: int, world: int, moment: str, masked: bool) -> None:
    dying = rank == 1
    x = values(6, 5).requires_grad_()
    mask = torch.rand(x.shape) < 2 if masked else None
    if dying and moment == "before":
        os._exit(1)
    method = {"among the counts": "total", "in the forward pass": "scatter", "with the losses": "collect"}
    if dying and moment in method:
        setattr(distributed.Columns, method[moment], lambda *_: os._exit(1))
    loss = bs.batch_shaping(x, bs.Beta(0.6, 0.4), 0, mask=mask, group="world")
    if dying and moment == "before the backward pass":
        os._exit(1)
    loss.backward()


@pytest.mark.parametrize(
    ("moment", "masked"),
    [
        ("before", False),
        ("among the counts", True),
        ("in the forward pass", False),
        ("with the losses", True),
        ("before the backward pass", False),
    ],
)
def test_a_rank_that_dies_is_an_error_on_the_others(moment: str, masked: bool) -> None:
    with Ranks(3) as processes:
        outcomes = processes.outcomes(a_rank_dies, moment, masked, timeout=25)
    assert outcomes[1].error == DIED
    for rank in (0, 2):
        error = outcomes[rank].error or "none"
        assert f"RuntimeError: rank {rank} of 3 lost another rank while exchanging the batch: " in error


def a_rank_stalls(rank: int, world: int) -> None:
    group = dist.new_group(list(range(world)), timeout=timedelta(seconds=1))
    over = threading.Event()
    if rank == 1:
        over.wait(2)
        return
    with pytest.raises(RuntimeError, match=rf"rank {rank} of {world} lost another rank"):
        bs.batch_shaping(values(6, 5), bs.Beta(0.6, 0.4), 0, group=group)


def test_a_rank_that_stalls_is_an_error_on_the_others_when_the_group_times_out() -> None:
    with Ranks(2) as processes:
        processes.run(a_rank_stalls, timeout=25)


# One process


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_world_of_a_process_without_group_is_its_own_batch(reduction: str) -> None:
    assert not dist.is_initialized()
    x, mask = values(20, 5), torch.rand(20, 5) < 0.9
    mask[0] = True
    a = torch.tensor(2.0)
    settings = {"mask": mask, "reduction": reduction}
    plain = loss_and_gradients(x, bs.Beta, (a, a), 0, **settings)
    world = loss_and_gradients(x, bs.Beta, (a, a), 0, group="world", **settings)
    torch.testing.assert_close(world, plain, rtol=0, atol=0)
    module = bs.BatchShapingLoss(bs.Beta(2, 2), 0, reduction=reduction, group="world")
    torch.testing.assert_close(module(x, mask), plain[0])
    bs.GeneralizedBatchShapingLoss(5, group="world")(x).backward()


@pytest.mark.parametrize("group", ["World", "all", ""])
def test_an_unknown_group_is_refused_by_what_was_received(group: str) -> None:
    with pytest.raises(ValueError, match=f"process group .*, 'world' or None, received '{group}'"):
        bs.batch_shaping(values(6, 5), bs.Beta(2, 6), 0, group=group)  # type: ignore[arg-type]


def test_the_ranks_of_these_tests_run_in_other_processes() -> None:
    """If they did not, every law above would be about one process."""
    with Ranks(2) as processes:
        found = processes.run(who_am_i)
    assert len({os.getpid(), *(pid for pid, _ in found)}) == 3
    assert [rank for _, rank in found] == [0, 1]


def who_am_i(rank: int, world: int) -> tuple[int, int]:
    assert dist.get_world_size() == world
    assert "pytest" in sys.modules
    return os.getpid(), dist.get_rank()
