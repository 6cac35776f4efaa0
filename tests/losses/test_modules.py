"""The loss as a module: what it computes, what it learns, and what it keeps."""

from __future__ import annotations

import copy
import itertools

import torch
import torch.distributions as td
from oracles import Family
from sweeps import each_family, inside, mask_of
from torch import nn

import batchshaping as bs

F64 = torch.float64
SHAPE = (5, 4, 6)


def test_the_module_is_the_functional() -> None:
    x, mask = torch.rand(SHAPE), mask_of(SHAPE, 0)
    prior = bs.RelaxedBernoulli(0.2, 0.25)
    for dim, ties, reduction in itertools.product((None, 0, (0, 2)), (False, True), ("mean", "sum", "none")):
        module = bs.BatchShapingLoss(prior, dim, ties=ties, reduction=reduction)
        for keep in (None, mask):
            expected = bs.batch_shaping(x, prior, dim, mask=keep, ties=ties, reduction=reduction)
            torch.testing.assert_close(module(x, keep), expected)
            torch.testing.assert_close(module(x, mask=keep), expected)


@each_family
def test_the_module_registers_learned_parameters_under_their_names(family: Family) -> None:
    parameters = [nn.Parameter(torch.tensor(p)) for p in family.examples[0]]
    module = bs.BatchShapingLoss(family.prior(*parameters), 0)
    assert dict(module.named_parameters()).keys() == set(family.names)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert not list(bs.BatchShapingLoss(family.prior(*family.examples[0])).parameters())
    first_only = bs.BatchShapingLoss(family.prior(parameters[0], *family.examples[0][1:]))
    assert [name for name, _ in first_only.named_parameters()] == [family.names[0]]


@each_family
def test_training_the_module_fits_the_prior_to_the_data(family: Family) -> None:
    x = inside(family, family.examples[1], (200,))
    module = bs.BatchShapingLoss(family.prior(*(nn.Parameter(torch.tensor(p)) for p in family.examples[0])))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    first = module(x).item()
    for _ in range(10):
        optimizer.zero_grad()
        loss = module(x)
        loss.backward()
        optimizer.step()
    assert loss.item() < first


@each_family
def test_the_state_of_the_module_survives_a_round_trip(family: Family) -> None:
    def module(parameters: tuple[float, ...]) -> bs.BatchShapingLoss:
        return bs.BatchShapingLoss(family.prior(*(nn.Parameter(torch.tensor(p)) for p in parameters)))

    one, other = module(family.examples[0]), module(family.examples[1])
    x = torch.rand(20)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


@each_family
def test_parameters_put_in_place_of_those_of_the_module_are_the_ones_used(family: Family) -> None:
    def module(parameters: tuple[float, ...]) -> bs.BatchShapingLoss:
        return bs.BatchShapingLoss(family.prior(*(nn.Parameter(torch.tensor(p)) for p in parameters)))

    x = torch.rand(20)
    one, other = module(family.examples[0]), module(family.examples[1])
    # Without a gradient in the parameters sums are taken in another order.
    torch.testing.assert_close(torch.func.functional_call(other, one.state_dict(), (x,)), one(x).detach())
    other.load_state_dict(one.state_dict(), assign=True)
    assert torch.equal(other(x), one(x))


@each_family
def test_a_copy_of_the_module_learns_by_itself(family: Family) -> None:
    parameters = [nn.Parameter(torch.tensor(p)) for p in family.examples[0]]
    module = bs.BatchShapingLoss(family.prior(*parameters))
    x = torch.rand(20)
    before = module(x)
    duplicate = copy.deepcopy(module)
    with torch.no_grad():
        for p, value in zip(duplicate.parameters(), family.examples[1], strict=True):
            p.fill_(value)
    assert torch.equal(module(x), before)
    assert not torch.equal(duplicate(x), before)


@each_family
def test_the_module_changes_dtype_with_its_parameters(family: Family) -> None:
    parameters = [nn.Parameter(torch.tensor(p)) for p in family.examples[0]]
    module = bs.BatchShapingLoss(family.prior(*parameters)).double()
    x = torch.rand(20, dtype=F64)
    module(x).backward()
    assert all(p.dtype == F64 and p.grad is not None for p in module.parameters())


def test_the_module_prints_what_it_was_made_with() -> None:
    module = bs.BatchShapingLoss(bs.Beta(0.6, 0.4), (0, 2), ties=True, reduction="none")
    shown = repr(module)
    assert shown.startswith("BatchShapingLoss(")
    for part in ("Beta(a=0.6, b=0.4)", "dim=(0, 2)", "ties=True", "reduction='none'"):
        assert part in shown


def test_a_foreign_prior_is_learned_in_the_module_too() -> None:
    loc = nn.Parameter(torch.tensor(0.2))
    module = bs.BatchShapingLoss(td.Laplace(loc, 0.7))
    module(torch.rand(10)).backward()
    assert loc.grad is not None
