"""Modules that own a prior: every distribution of torch and of ours through the same laws."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributions as td
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

import batchshaping as bs
from batchshaping.priors.module import kept_inside

F64 = torch.float64
Take = Callable[[Any], Tensor]

# Each prior, made of tensors that are taken as they are, or learned.
PRIORS: dict[str, Callable[[Take], td.Distribution]] = {
    "Beta": lambda p: bs.Beta(p(0.6), p(0.4)),
    "SymBeta": lambda p: bs.SymBeta(p(0.6)),
    "RelaxedBernoulli": lambda p: bs.RelaxedBernoulli(p(0.3), p(0.7)),
    "our Normal": lambda p: bs.Normal(p(0.3), p(0.7)),
    "one for each array": lambda p: bs.Beta(p([0.6, 0.5, 0.9]), p(0.4)),
    "Cauchy": lambda p: td.Cauchy(p(0.3), p(0.7)),
    "Chi2": lambda p: td.Chi2(p(2.0)),
    "ContinuousBernoulli": lambda p: td.ContinuousBernoulli(probs=p(0.3)),
    "ContinuousBernoulli of logits": lambda p: td.ContinuousBernoulli(logits=p(0.3)),
    "Exponential": lambda p: td.Exponential(p(0.3)),
    "Gamma": lambda p: td.Gamma(p(2.0), p(1.5)),
    "Gumbel": lambda p: td.Gumbel(p(0.1), p(0.5)),
    "HalfCauchy": lambda p: td.HalfCauchy(p(0.5)),
    "HalfNormal": lambda p: td.HalfNormal(p(0.5)),
    "InverseGamma": lambda p: td.InverseGamma(p(1.5), p(0.5)),
    "Kumaraswamy": lambda p: td.Kumaraswamy(p(1.5), p(0.5)),
    "Laplace": lambda p: td.Laplace(p(0.5), p(0.5)),
    "Laplace, one for each array": lambda p: td.Laplace(p([0.2, 0.5, 0.7]), p(0.5)),
    "LogNormal": lambda p: td.LogNormal(p(-0.5), p(0.5)),
    "MixtureSameFamily": lambda p: td.MixtureSameFamily(
        td.Categorical(probs=p([0.3, 0.7])), td.Normal(p([0.1, 0.8]), p([0.2, 0.3]))
    ),
    "MixtureSameFamily of ours": lambda p: td.MixtureSameFamily(
        td.Categorical(logits=p([0.3, 0.7])), bs.Normal(p([0.1, 0.8]), p([0.2, 0.3]))
    ),
    "Normal": lambda p: td.Normal(p(0.5), p(0.5)),
    "Pareto": lambda p: td.Pareto(p(0.1), p(1.5)),
    "Uniform": lambda p: td.Uniform(p(0.1), p(0.8)),
    "Weibull": lambda p: td.Weibull(p(0.5), p(1.5)),
    "TransformedDistribution": lambda p: td.TransformedDistribution(
        td.Normal(p(0.0), p(1.0)), [td.AffineTransform(p(0.2), p(0.7)), td.SigmoidTransform()]
    ),
    "TransformedDistribution by an inverse": lambda p: td.TransformedDistribution(
        td.Laplace(p(0.0), p(1.0)), [td.AffineTransform(p(0.2), p(-0.7)).inv]
    ),
    "TransformedDistribution by a power": lambda p: td.TransformedDistribution(
        td.Uniform(p(0.01), p(1.0)), td.PowerTransform(p(0.2))
    ),
    "TransformedDistribution with a cache": lambda p: td.TransformedDistribution(
        td.Normal(p(0.0), p(1.0)), [td.AffineTransform(0.1, p(2.0)), td.ExpTransform(cache_size=1)]
    ),
}
if hasattr(td, "GeneralizedPareto"):  # newer than the oldest torch that is supported
    PRIORS["GeneralizedPareto"] = lambda p: td.GeneralizedPareto(p(0.01), p(0.5), p(0.3))
# torch has no derivative of the incomplete gamma function in its first argument.
NO_GRADIENT = ("Chi2", "Gamma", "InverseGamma")
DIFFERENTIABLE = [name for name in PRIORS if name not in NO_GRADIENT]
each_prior = pytest.mark.parametrize("name", PRIORS)
each_differentiable = pytest.mark.parametrize("name", DIFFERENTIABLE)


def fixed(name: str, factor: float = 1.0) -> td.Distribution:
    return PRIORS[name](lambda value: torch.tensor(value) * factor)


def learned(name: str) -> tuple[td.Distribution, list[nn.Parameter]]:
    parameters: list[nn.Parameter] = []

    def take(value: Any) -> nn.Parameter:
        parameters.append(nn.Parameter(torch.tensor(value)))
        return parameters[-1]

    return PRIORS[name](take), parameters


def values() -> Tensor:
    return torch.rand(20, 3, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.05


def test_every_distribution_of_torch_with_a_cdf_is_among_them() -> None:
    with_cdf = {
        name
        for name in td.__all__
        if isinstance(family := getattr(td, name), type)
        and issubclass(family, td.Distribution)
        and family.cdf is not td.Distribution.cdf
    }
    # One has many dimensions, the others transform a distribution without a CDF.
    without = {"LogisticNormal", "RelaxedOneHotCategorical", "RelaxedBernoulli"}
    swept = {type(fixed(name)) for name in PRIORS}
    assert {name for name in with_cdf - without if getattr(td, name) not in swept} == set()


def test_a_transformed_distribution_without_a_cdf_of_its_base_is_refused_by_name() -> None:
    prior = td.RelaxedBernoulli(torch.tensor(0.5), probs=torch.tensor(0.4))
    with pytest.raises(ValueError, match="received RelaxedBernoulli, which has none"):
        bs.BatchShapingLoss(prior)


# What is fixed


@each_prior
def test_the_module_is_the_functional_for_fixed_tensors(name: str) -> None:
    prior, x = fixed(name), values()
    module = bs.BatchShapingLoss(prior, 0)
    assert torch.equal(module(x), bs.batch_shaping(x, prior, 0))
    assert not list(module.parameters())
    assert type(module.prior) is type(prior)


@each_prior
def test_fixed_tensors_change_dtype_and_device_with_the_module(name: str) -> None:
    module = bs.BatchShapingLoss(fixed(name), 0)
    held = dict(module.named_buffers())
    assert held and module.state_dict().keys() == held.keys()
    x, before = values(), module(values())
    module.double()
    assert all(buffer.dtype == F64 for buffer in module.buffers())
    if name != "GeneralizedPareto":  # torch's own compares with a number in single precision
        torch.testing.assert_close(module(x.double()), before.double(), rtol=1e-4, atol=1e-6)
    module.to("meta")
    assert all(buffer.is_meta for buffer in module.buffers())
    if name != "ContinuousBernoulli":  # torch reads its probabilities, checked or not
        assert "BatchShapingLoss" in repr(module)


@each_prior
@pytest.mark.parametrize("prior_of", [fixed, lambda name: learned(name)[0]], ids=["fixed", "learned"])
def test_a_state_brings_the_prior_back(name: str, prior_of: Callable[[str], td.Distribution]) -> None:
    one = bs.BatchShapingLoss(prior_of(name), 0)
    other = bs.BatchShapingLoss(PRIORS[name](lambda v: nn.Parameter(torch.tensor(v) * 0.9)), 0)
    if prior_of is fixed:
        other = bs.BatchShapingLoss(fixed(name, 0.9), 0)
    x = values()
    assert not torch.equal(other(x), one(x))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), one(x))


def test_the_tensors_of_the_module_are_its_own() -> None:
    given = torch.full((3,), 0.6)
    prior = bs.Beta(given, 0.4)
    one, other = bs.BatchShapingLoss(prior, 0), bs.BatchShapingLoss(prior, 0)
    x = values()
    before = other(x)
    one.load_state_dict({"a": torch.full((3,), 2.0)})
    given.fill_(5.0)
    assert torch.equal(other(x), before)
    assert torch.equal(one(x), bs.batch_shaping(x, bs.Beta(torch.full((3,), 2.0), 0.4), 0))


def test_expanded_tensors_can_be_loaded() -> None:
    module = bs.BatchShapingLoss(td.Normal(torch.zeros(3), torch.tensor(1.0)), 0)
    module.load_state_dict({"loc": torch.arange(3.0), "scale": torch.arange(1.0, 4.0)})
    expected = bs.batch_shaping(values(), td.Normal(torch.arange(3.0), torch.arange(1.0, 4.0)), 0)
    assert torch.equal(module(values()), expected)


def test_numbers_have_no_state_and_keep_double_precision() -> None:
    module = bs.BatchShapingLoss(bs.Beta(0.6, 0.4)).half()
    assert not module.state_dict()
    x = torch.rand(50, dtype=F64)
    assert torch.equal(module(x), bs.batch_shaping(x, bs.Beta(0.6, 0.4)))


def test_whole_numbers_in_a_tensor_move_like_others() -> None:
    module = bs.BatchShapingLoss(bs.Beta(torch.tensor([2, 3, 4]), 6), 0).double()
    assert module.a.dtype == F64
    assert torch.equal(module.a, torch.tensor([2.0, 3.0, 4.0], dtype=F64))


def test_fixed_tensors_out_of_range_are_refused_by_name_at_the_next_use() -> None:
    module = bs.BatchShapingLoss(bs.Beta(torch.tensor(0.6), 0.4))
    module.load_state_dict({"a": torch.tensor(-2.0)})
    with pytest.raises(ValueError, match=r"Beta: a must be between 1e-300 and 1e300, received -2$"):
        module(torch.rand(5))


# What is learned


@each_prior
def test_learned_parameters_are_those_of_the_user_and_start_where_they_are(name: str) -> None:
    prior, parameters = learned(name)
    start = [p.detach().clone() for p in parameters]
    module, x = bs.BatchShapingLoss(prior, 0), values()
    assert {id(p) for p in module.parameters()} == {id(p) for p in parameters}
    assert all(map(torch.equal, parameters, start))
    assert torch.equal(module(x), bs.batch_shaping(x, learned(name)[0], 0))


@each_differentiable
def test_the_gradient_is_that_of_the_functional(name: str) -> None:
    results = []
    for make in (
        lambda prior, x: bs.BatchShapingLoss(prior, 0)(x),
        lambda prior, x: bs.batch_shaping(x, prior, 0),
    ):
        prior, parameters = learned(name)
        x = values().requires_grad_()
        results.append(torch.autograd.grad(make(prior, x), [x, *parameters]))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", NO_GRADIENT)
def test_where_torch_has_no_derivative_it_says_so(name: str) -> None:
    with pytest.raises(NotImplementedError, match="derivative"):
        bs.BatchShapingLoss(learned(name)[0], 0)(values()).backward()


def in_range(prior: td.Distribution) -> bool:
    """Whether torch's own checks pass, or those of our priors."""
    if isinstance(prior, bs.Beta | bs.Normal | bs.RelaxedBernoulli):
        prior.check()
        return True
    for name, constraint in prior.arg_constraints.items():
        value = getattr(prior, name)
        if isinstance(value, Tensor) and not bool(constraint.check(value).all()):
            return False
    base = vars(prior).get("base_dist")
    return base is None or in_range(base)


# torch chains exponentials there, whose gradient overflows far from where the CDF is neither 0 nor 1.
OVERFLOWING = ("Gumbel", "Weibull")


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name not in OVERFLOWING])
@pytest.mark.parametrize("seed", range(3))
def test_steps_of_size_10_never_leave_the_range_and_never_give_nan(name: str, seed: int) -> None:
    prior, parameters = learned(name)
    module, x = bs.BatchShapingLoss(prior, 0), values()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(30):
        for p in parameters:
            p.grad = None
        loss = module(x)
        loss.backward()
        assert in_range(module.prior)
        assert bool(loss.isfinite())
        with torch.no_grad():
            for p in parameters:
                if p.grad is not None:
                    assert bool(p.grad.isfinite().all())
                signs = torch.randint(-1, 2, p.shape, generator=generator)
                p += 10 * signs


@each_prior
def test_a_parameter_that_became_nan_is_refused_by_name(name: str) -> None:
    module = bs.BatchShapingLoss(learned(name)[0], 0)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.fill_(math.nan)
    if name.startswith(("MixtureSameFamily", "TransformedDistribution")):
        assert bool(module(values()).isnan())  # torch does not tell the range of what is within
    else:
        with pytest.raises(ValueError, match=r"received nan|probs has invalid values"):
            module(values())


@each_differentiable
@pytest.mark.parametrize("value", [-1e30, -1e6, -1.0, -1e-30, 0.0, 1e-30])
def test_no_value_of_a_parameter_takes_the_prior_out_of_its_range(name: str, value: float) -> None:
    module = bs.BatchShapingLoss(learned(name)[0], 0)
    held = dict(module.named_parameters())
    with torch.no_grad():
        for key, p in held.items():
            if hasattr(module, f"{key}_start"):
                p.fill_(value)
    assert in_range(module.prior)


def test_a_step_too_far_is_made_good_again() -> None:
    torch.manual_seed(0)
    x = torch.distributions.Normal(0.0, 0.05).sample((400,))
    scale = nn.Parameter(torch.tensor(1.0))
    module = bs.BatchShapingLoss(bs.Normal(0.0, scale), statistic="anderson_darling")
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        module(x).backward()
        optimizer.step()
    assert module.prior.stddev.item() == pytest.approx(0.05, rel=0.2)


def test_an_optimizer_that_holds_the_users_parameter_learns_it() -> None:
    a = nn.Parameter(torch.tensor(0.6))
    optimizer = torch.optim.SGD([a], lr=1.0)
    module, x = bs.BatchShapingLoss(bs.Beta(a, 0.4)), torch.rand(50)
    module(x).backward()
    optimizer.step()
    assert a.item() != 0.6
    assert torch.equal(module(x), bs.batch_shaping(x, bs.Beta(a, 0.4)))


@pytest.mark.parametrize("family", [bs.Normal, td.Normal, td.Laplace])
def test_one_parameter_in_two_places_is_in_the_range_of_each(family: Callable[..., td.Distribution]) -> None:
    p = nn.Parameter(torch.tensor(0.6))
    module, x = bs.BatchShapingLoss(family(p, p)), values()
    assert [id(each) for each in module.parameters()] == [id(p)]
    assert torch.equal(module(x), bs.batch_shaping(x, family(p, p)))
    with torch.no_grad():
        p.fill_(-3.0)
    assert module.prior.loc == -3.0 and module.prior.scale > 0
    assert bool(module(x).isfinite())


def test_losses_that_share_a_parameter_learn_it_together() -> None:
    a = nn.Parameter(torch.tensor(0.6))
    prior = bs.Beta(a, 0.4)
    one, other = bs.BatchShapingLoss(prior), bs.BatchShapingLoss(prior, statistic="wasserstein")
    x = torch.rand(30)
    (one(x) + other(x)).backward()
    expected = bs.batch_shaping(x, prior) + bs.batch_shaping(x, prior, statistic="wasserstein")
    assert torch.equal(a.grad, torch.autograd.grad(expected, a)[0])
    with torch.no_grad():
        a.fill_(-3.0)
    assert torch.equal(one.prior.concentration1, other.prior.concentration1)


def test_a_tensor_that_is_no_parameter_gets_its_gradient_and_stays_its_owners() -> None:
    leaf = torch.tensor(0.6, requires_grad=True)
    network = nn.Linear(2, 1)
    for tensor in (leaf, network(torch.ones(2)).exp().squeeze()):
        for prior in (bs.Beta(tensor, 0.4), td.Laplace(tensor, 0.7), td.Weibull(tensor, tensor)):
            module = bs.BatchShapingLoss(prior)
            assert not module.state_dict() or "a" not in module.state_dict()
            assert not list(module.parameters())
            x = torch.rand(20)
            sources = [leaf] if tensor is leaf else list(network.parameters())
            found = torch.autograd.grad(module(x), sources, retain_graph=True)
            expected = torch.autograd.grad(bs.batch_shaping(x, prior), sources, retain_graph=True)
            assert all(map(torch.equal, found, expected))


def test_a_tensor_computed_of_parameters_that_have_changed_is_refused() -> None:
    log_scale = nn.Parameter(torch.tensor(0.1))
    module, x = bs.BatchShapingLoss(td.Normal(0.0, log_scale.exp())), torch.rand(20)
    module(x).backward()
    with torch.no_grad():
        log_scale.add_(0.1)
    with pytest.raises(
        RuntimeError, match="the prior's scale was computed from a parameter that has changed"
    ):
        module(x)


def test_out_of_range_in_the_functional_is_an_error_that_names_the_parameter() -> None:
    p = nn.Parameter(torch.tensor(0.5))
    priors = {
        "Beta: a must be between 1e-300 and 1e300": bs.Beta(p, 0.4),
        "SymBeta: a must be between 0 and 1": bs.SymBeta(p),
        "Laplace: scale must be GreaterThan": td.Laplace(torch.tensor(0.0), p),
        "LogNormal: scale must be GreaterThan": td.LogNormal(torch.tensor(0.0), p),
    }
    with torch.no_grad():
        p.fill_(-0.25)
    for message, prior in priors.items():
        with pytest.raises(ValueError, match=rf"{message}.*, received -0\.25$"):
            bs.batch_shaping(torch.rand(5), prior)
    with torch.no_grad():
        p.fill_(math.nan)
    with pytest.raises(ValueError, match="received nan"):
        bs.batch_shaping(torch.rand(5), priors["Beta: a must be between 1e-300 and 1e300"])


# The map that keeps a parameter in its range


@given(
    start=st.floats(1e-4, 1e4),
    steps=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8),
    lower=st.sampled_from([0.0, -3.0, 0.7]),
    width=st.sampled_from([math.inf, 2.0, 1e5]),
)
def test_it_increases_within_the_range_and_changes_nothing_far_from_its_ends(
    start: float, steps: list[float], lower: float, width: float
) -> None:
    begin = torch.tensor(lower + (start if math.isinf(width) else width * start / (1e4 + 1)), dtype=F64)
    upper = lower + width
    value = torch.tensor(sorted(steps), dtype=F64)
    kept = kept_inside(value, begin, (lower, upper))
    assert bool(((kept > lower) & (kept < upper)).all())
    assert bool((kept.diff() >= 0).all())
    far = (value - lower >= (begin - lower) / 8) & (upper - value >= (upper - begin) / 8)
    assert torch.equal(kept[far], value[far])
    assert torch.equal(kept_inside(begin, begin, (lower, upper)), begin)


@pytest.mark.parametrize("ends", [(0.0, math.inf), (-math.inf, 2.0), (0.0, 1.0), (-5.0, 3.0)], ids=str)
def test_its_slope_is_continuous_and_positive(ends: tuple[float, float]) -> None:
    start = torch.tensor(0.6, dtype=F64)
    value = torch.linspace(-6, 6, 4801, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(kept_inside(value, start, ends).sum(), value)
    assert bool((slope > 0).all()) and bool((slope <= 1).all())
    assert slope.diff().abs().max() < 0.15
    assert torch.autograd.gradcheck(
        lambda v: kept_inside(v, start, ends),
        torch.tensor([-4.3, -0.7, 0.02, 0.5, 0.98, 2.6], dtype=F64, requires_grad=True),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_it_holds_in_every_dtype(dtype: torch.dtype) -> None:
    finfo = torch.finfo(dtype)
    value = torch.tensor([finfo.min, -1e4, -1.0, 0.0, 0.5, 1.0, 2.0, 1e4, finfo.max]).to(dtype)
    for ends in ((0.0, 1.0), (-2.0, 3.0), (0.0, 1e4)):
        kept = kept_inside(value, torch.tensor(0.6, dtype=dtype), ends)
        assert kept.dtype == dtype
        assert bool(((kept > ends[0]) & (kept < ends[1])).all())
    starts = torch.tensor([16 * finfo.smallest_normal, 1e-3, 0.25, 1 - 2 * finfo.eps], dtype=F64).to(dtype)
    assert torch.equal(kept_inside(starts, starts, (0.0, 1.0)), starts)


def test_the_ends_of_a_uniform_prior_do_not_cross() -> None:
    low, high = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(0.8))
    module = bs.BatchShapingLoss(td.Uniform(low, high))
    with torch.no_grad():
        low.fill_(5.0)
        high.fill_(-5.0)
    assert module.prior.low == 5.0 and module.prior.high > 5.0
    (gradient,) = torch.autograd.grad(module.prior.high, low)
    assert gradient > 0  # the one end takes the other along
    fixed_end = bs.BatchShapingLoss(td.Uniform(low, torch.tensor(7.0)))
    with torch.no_grad():
        low.fill_(9.0)
    assert fixed_end.prior.low < 7.0


# What modules do


@each_prior
def test_a_copy_is_independent_and_a_pickled_one_the_same(name: str) -> None:
    prior, _ = learned(name)
    bs.batch_shaping(values(), prior, 0)  # transforms remember their inverse from here on
    module, x = bs.BatchShapingLoss(prior, 0), values()
    before = module(x)
    copied, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for other in (copied, pickled):
        assert torch.equal(other(x), before)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(0.9)
        assert not torch.equal(other(x), before)
    assert torch.equal(module(x), before)


@pytest.mark.parametrize("statistic", ["cramer_von_mises", "wasserstein"])
def test_a_transform_that_remembers_values_keeps_none_of_them(statistic: str) -> None:
    prior, _ = learned("TransformedDistribution with a cache")
    module, x = bs.BatchShapingLoss(prior, 0, statistic=statistic), values()
    before = module(x)
    assert torch.equal(copy.deepcopy(module)(x), before)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), before)


@each_prior
def test_functional_call_puts_other_tensors_in_place(name: str) -> None:
    module, x = bs.BatchShapingLoss(learned(name)[0], 0), values()
    other = bs.BatchShapingLoss(PRIORS[name](lambda v: nn.Parameter(torch.tensor(v) * 0.9)), 0)
    assert torch.equal(torch.func.functional_call(module, other.state_dict(), (x,)), other(x))


class Exponential(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value.exp()


class Softplus(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return nn.functional.softplus(value)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value + torch.log(-torch.expm1(-value))


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_parametrization_tells_the_value(name: str) -> None:
    module, x = (
        bs.BatchShapingLoss(bs.Beta(nn.Parameter(torch.tensor(0.6)), torch.tensor(0.4))),
        torch.rand(30),
    )
    parametrize.register_parametrization(module, name, Exponential())
    given = {"a": torch.tensor(0.6), "b": torch.tensor(0.4)}
    given[name] = given[name].exp()
    assert torch.equal(module(x), bs.batch_shaping(x, bs.Beta(given["a"], given["b"])))


def test_a_parametrization_is_learned_and_its_start_is_that_of_the_user() -> None:
    module, x = bs.BatchShapingLoss(bs.Beta(nn.Parameter(torch.tensor(0.6)), 0.4)), torch.rand(30)
    parametrize.register_parametrization(module, "a", Softplus())
    torch.testing.assert_close(module(x), bs.batch_shaping(x, bs.Beta(0.6, 0.4)))
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module(x).backward()
    optimizer.step()
    expected = bs.batch_shaping(x, bs.Beta(module.a, 0.4))
    assert torch.equal(module(x), expected)
    assert module.a != 0.6
    module.a = torch.tensor(0.01)
    torch.testing.assert_close(module.prior.concentration1, torch.tensor(0.01))


@pytest.mark.parametrize("history", [0, 2])
def test_safetensors_saves_and_loads_it(tmp_path: Path, history: int) -> None:
    def made(a: float) -> nn.Module:
        prior = bs.Beta(nn.Parameter(torch.full((3,), a)), torch.full((3,), a))
        return nn.ModuleList(
            [
                bs.BatchShapingLoss(prior, 0, history=history),
                bs.BatchShapingLoss(prior, 0, history=history),
                bs.GeneralizedBatchShapingLoss(
                    3, td.LogNormal(torch.tensor(a), nn.Parameter(torch.tensor(a)))
                ),
                bs.SlicedBatchShapingLoss(4, bs.Normal(0.0, torch.tensor(a))),
            ]
        )

    one, other, x = made(0.6), made(0.9), values()
    for _ in range(3):
        for module in one:
            module(x)
    save_model(one, str(tmp_path / "losses.safetensors"))
    missing, unexpected = load_model(other, str(tmp_path / "losses.safetensors"))
    assert not missing and not unexpected
    for module, loaded in zip(one.eval(), other.eval(), strict=True):
        assert torch.equal(module(x), loaded(x))


def test_states_of_before_hold_the_values_themselves() -> None:
    x = torch.rand(30)
    for a in (0.01, 5.0):
        module = bs.BatchShapingLoss(bs.Beta(nn.Parameter(torch.tensor(0.6)), 0.4))
        module.load_state_dict({"a": torch.tensor(a)})
        assert torch.equal(module(x), bs.batch_shaping(x, bs.Beta(torch.tensor(a), 0.4)))
    module.load_state_dict({"a": torch.tensor(-0.5)})  # walked out of its range then
    assert module.prior.concentration1 > 0


def test_a_state_that_lacks_a_parameter_is_refused_by_name() -> None:
    module = bs.BatchShapingLoss(bs.Beta(nn.Parameter(torch.tensor(0.6)), torch.tensor(0.4)))
    with pytest.raises(RuntimeError, match=r'Missing key.*"a"'):
        module.load_state_dict({"b": torch.tensor(0.4)})


def test_the_hyperprior_is_learned_and_saved_with_the_generalized_loss() -> None:
    scale = nn.Parameter(torch.tensor(0.2))
    module = bs.GeneralizedBatchShapingLoss(4, bs.Normal(torch.tensor(0.3), scale))
    module(torch.rand(20, 4)).backward()
    assert scale.grad is not None and scale.grad != 0
    assert {"mean_shaping.loc", "mean_shaping.scale"} <= module.state_dict().keys()
    assert module.double().hyperprior.loc.dtype == F64


def test_the_prior_of_a_sliced_loss_moves_with_it() -> None:
    module = bs.SlicedBatchShapingLoss(4, bs.Normal(0.0, torch.tensor(2.0))).double()
    assert module.loss.prior.scale.dtype == F64
    assert "loss.scale" in module.state_dict()


# Distributions of others


class Triangle(td.Distribution):
    """F(x) = x^2 / c^2 on [0, c], which names its tensor as it likes."""

    arg_constraints: dict[str, td.constraints.Constraint] = {}
    support = td.constraints.unit_interval

    def __init__(self, end: Tensor) -> None:
        super().__init__(validate_args=False)
        self._end, self.parts = end, [end, {"unused": 1}]

    def cdf(self, value: Tensor) -> Tensor:
        return (value / self._end).square().clamp(0, 1)


class Wide(td.Normal):
    """One whose attribute is not what it was made with."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__(torch.zeros_like(scale), 2 * scale)


class Between(td.Uniform):
    """One whose attributes do not tell what it was made with."""

    def __init__(self, centre: Tensor, width: Tensor) -> None:
        super().__init__(centre - width / 2, centre + width / 2)


def test_a_distribution_by_any_other_attributes_is_owned_as_well() -> None:
    x = values()
    module = bs.BatchShapingLoss(Triangle(torch.tensor(1.0)))
    assert module.state_dict().keys() == {"end"}
    module.load_state_dict({"end": torch.tensor(2.0)})
    assert torch.equal(module(x), bs.batch_shaping(x, Triangle(torch.tensor(2.0))))
    module.double()
    assert module(x.double()).dtype == F64
    end = nn.Parameter(torch.tensor(1.0))
    bs.BatchShapingLoss(Triangle(end))(x).backward()
    assert end.grad is not None


def test_a_constructor_that_changes_its_arguments_is_not_called_again() -> None:
    x, prior = values(), Wide(torch.tensor(1.5))
    module = bs.BatchShapingLoss(prior)
    assert module.prior.scale == 3.0
    assert torch.equal(module(x), bs.batch_shaping(x, prior))


def test_a_parameter_that_a_constructor_changes_is_learned() -> None:
    scale = nn.Parameter(torch.tensor(1.5))
    module = bs.BatchShapingLoss(Wide(scale))
    assert dict(module.named_parameters())["scale"] is scale
    with torch.no_grad():
        scale.add_(1.0)
    assert module.prior.scale == 5.0


def test_a_parameter_that_a_constructor_hides_is_not_silently_left_behind() -> None:
    centre = nn.Parameter(torch.tensor(0.5))
    module = bs.BatchShapingLoss(Between(centre, torch.tensor(0.8)))
    module(values()).backward()
    assert centre.grad is not None
    with torch.no_grad():
        centre.add_(0.1)
    with pytest.raises(RuntimeError, match="has changed since"):
        module(values())


class Stretch(nn.Module, td.Transform):
    """A transform that is a module itself, as in libraries of flows."""

    domain = td.constraints.real
    codomain = td.constraints.real
    bijective = True
    sign = 1

    def __init__(self) -> None:
        nn.Module.__init__(self)
        td.Transform.__init__(self)
        self.log_factor = nn.Parameter(torch.tensor(0.3))

    def __hash__(self) -> int:
        return id(self)

    def _call(self, x: Tensor) -> Tensor:
        return x * self.log_factor.exp()

    def _inverse(self, y: Tensor) -> Tensor:
        return y * (-self.log_factor).exp()


def test_a_module_in_a_prior_is_a_part_of_the_loss() -> None:
    stretch = Stretch()
    module = bs.BatchShapingLoss(td.TransformedDistribution(td.Normal(0.0, 1.0), [stretch]))
    assert any(p is stretch.log_factor for p in module.parameters())
    module(values()).backward()
    assert stretch.log_factor.grad is not None
    module.double()
    assert module(values().double()).dtype == F64


def test_a_name_that_the_module_has_already_is_told_from_it() -> None:
    module = bs.BatchShapingLoss(td.ContinuousBernoulli(logits=torch.tensor(0.3)), logits=True)
    assert module.logits is True
    assert module.state_dict().keys() == {"prior_logits"}


def test_the_representation_has_the_values_of_now() -> None:
    a = nn.Parameter(torch.tensor(0.5))
    module = bs.BatchShapingLoss(bs.Beta(a, 0.4))
    assert "Beta(a=0.5, b=0.4)" in repr(module)
    with torch.no_grad():
        a.fill_(2.0)
    assert "Beta(a=2, b=0.4)" in repr(module)
