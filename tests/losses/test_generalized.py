"""The generalized loss: priors that are learned and shaped themselves."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from oracles import FAMILIES, brute_force
from scipy import special
from sweeps import each_statistic, each_way, formula, inside, mask_of
from torch import Tensor, nn
from torch.autograd import gradcheck

import batchshaping as bs

F64 = torch.float64
BETA = FAMILIES["Beta"]


def sigmoid(logits: Tensor) -> np.ndarray:
    return special.expit(logits.detach().double().numpy())


@pytest.mark.parametrize(
    ("shape", "x_shape", "dim"),
    [
        (4, (20, 4), 0),
        ((4,), (20, 4), 0),
        ((2, 3), (20, 2, 3), 0),
        ((2, 3), (2, 20, 3), 1),
        (3, (5, 3, 4), (0, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_the_generalized_loss_is_the_sum_of_its_parts_by_hand(shape, x_shape, dim, masked: bool) -> None:
    module = bs.GeneralizedBatchShapingLoss(
        shape, bs.Beta(2.0, 5.0), dim, hyperprior_weight=0.7, temperature_weight=0.3
    ).double()
    x = torch.rand(x_shape, dtype=F64)
    mask = mask_of(x_shape, dim) if masked else None
    total = module(x, mask)
    mean, temperature = sigmoid(module.mean_logits), sigmoid(module.temperature_logits)
    given = (torch.as_tensor(mean), torch.as_tensor(temperature))
    prior_loss = brute_force(x, FAMILIES["RelaxedBernoulli"].cdf, given, dim, mask).mean()
    hyperprior_loss = 0.7 * brute_force(given[0], BETA.cdf, (2.0, 5.0))
    penalty = 0.3 * temperature.mean()
    assert module.prior_loss.item() == pytest.approx(prior_loss)
    assert module.hyperprior_loss.item() == pytest.approx(float(hyperprior_loss))
    assert module.temperature_penalty.item() == pytest.approx(penalty)
    assert total.item() == pytest.approx(prior_loss + float(hyperprior_loss) + penalty)
    assert not any(
        p.requires_grad for p in (module.prior_loss, module.hyperprior_loss, module.temperature_penalty)
    )


@each_way
@each_statistic
def test_the_generalized_loss_has_every_statistic(statistic: Any, logits: bool) -> None:
    if statistic == "epps_pulley":
        return  # its priors are Relaxed Bernoullis
    module = bs.GeneralizedBatchShapingLoss(4, statistic=statistic, logits=logits).double()
    z = torch.randn(60, 4, dtype=F64)
    total = module(z if logits else torch.sigmoid(z))
    total.backward()
    given = [t.detach() for t in (module.mean, module.temperature)]
    arrays = formula(statistic, FAMILIES["RelaxedBernoulli"], torch.sigmoid(z), given, 0)
    hyper = formula("cramer_von_mises", FAMILIES["Beta"], given[0], (3.0, 7.0))
    torch.testing.assert_close(module.prior_loss, arrays.mean(), rtol=1e-9, atol=1e-12)
    expected = arrays.mean() + hyper + 0.1 * given[1].mean()
    torch.testing.assert_close(total.detach(), expected, rtol=1e-9, atol=1e-12)
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in module.parameters())


def test_the_generalized_loss_starts_near_one_half_with_the_published_hyperprior() -> None:
    module = bs.GeneralizedBatchShapingLoss(1000)
    assert module.hyperprior.concentration1 == 3
    assert module.hyperprior.concentration0 == 7
    assert module.temperature_weight == 0.1
    for values in (module.mean, module.temperature):
        assert values.shape == (1000,)
        assert bool(((values > 0.3) & (values < 0.7)).all())
        assert len(values.unique()) > 900


def test_gradcheck_of_the_generalized_loss() -> None:
    module = bs.GeneralizedBatchShapingLoss(3).double()
    x = inside(FAMILIES["RelaxedBernoulli"], (0.5, 0.5), (6, 3))

    def total(x: Tensor, mean_logits: Tensor, temperature_logits: Tensor) -> Tensor:
        logits = {"mean_logits": mean_logits, "temperature_logits": temperature_logits}
        return torch.func.functional_call(module, logits, (x,))

    logits = [torch.tensor([-0.3, 0.1, 0.4], dtype=F64), torch.tensor([0.2, -0.1, 0.0], dtype=F64)]
    assert gradcheck(total, [t.requires_grad_() for t in (x, *logits)], eps=1e-7, atol=1e-5)


def test_the_parameters_of_the_generalized_loss_are_those_of_a_module() -> None:
    model = nn.Sequential(nn.Linear(2, 2), bs.GeneralizedBatchShapingLoss((2, 3)))
    names = dict(model.named_parameters())
    assert names["1.mean_logits"].shape == (2, 3)
    assert names["1.temperature_logits"].shape == (2, 3)
    fresh = bs.GeneralizedBatchShapingLoss((2, 3))
    fresh.load_state_dict(model[1].state_dict())
    x = torch.rand(10, 2, 3)
    assert torch.equal(fresh(x), model[1](x))
    assert torch.equal(fresh.prior.cdf(x), model[1].prior.cdf(x))


def test_training_reduces_the_generalized_loss() -> None:
    module = bs.GeneralizedBatchShapingLoss(12)
    logits = torch.empty(100, 12).uniform_(-4, 4).requires_grad_()
    optimizer = torch.optim.Adam([logits, *module.parameters()], lr=0.1)
    history = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = module(torch.sigmoid(logits))
        loss.backward()
        optimizer.step()
        history.append([loss.item(), module.hyperprior_loss.item(), module.temperature_penalty.item()])
    assert all(last < 0.8 * first for first, last in zip(history[0], history[-1], strict=True))
    assert module.mean.mean().item() == pytest.approx(0.3, abs=0.05)


def test_logits_far_out_give_a_finite_loss_and_gradient() -> None:
    module = bs.GeneralizedBatchShapingLoss(3)
    with torch.no_grad():
        module.mean_logits.copy_(torch.tensor([-200.0, 0.0, 200.0]))
        module.temperature_logits.copy_(torch.tensor([200.0, -200.0, 0.0]))
    x = torch.rand(10, 3, requires_grad=True)
    loss = module(x)
    loss.backward()
    assert bool(loss.isfinite())
    for t in (x, *module.parameters()):
        assert bool(t.grad.isfinite().all())


@pytest.mark.parametrize(("x_shape", "left"), [((20, 5), "(5,)"), ((20,), "()"), ((20, 4, 2), "(4, 2)")])
def test_another_shape_than_that_of_the_learned_priors_is_refused_with_both(x_shape, left: str) -> None:
    module = bs.GeneralizedBatchShapingLoss(4)
    with pytest.raises(ValueError, match=f"leaves {re.escape(left)}.*learned priors have shape \\(4,\\)"):
        module(torch.rand(x_shape))


def test_the_generalized_loss_refuses_what_is_no_hyperprior() -> None:
    with pytest.raises(ValueError, match="prior must be Beta, SymBeta"):
        bs.GeneralizedBatchShapingLoss(4, "beta")


def test_the_generalized_loss_prints_what_it_was_made_with() -> None:
    shown = repr(bs.GeneralizedBatchShapingLoss((2, 3), bs.Normal(0.3, 0.1), 1))
    for part in ("shape=(2, 3)", "Normal(loc=0.3, scale=0.1)", "dim=1", "hyperprior_weight=1.0"):
        assert part in shown
