"""Every prior through the same laws."""

from __future__ import annotations

import copy

import mpmath
import numpy as np
import pytest
import torch
import torch.distributions as td
from hypothesis import given
from hypothesis import strategies as st
from oracles import FAMILIES, Family, log_tails, scipy
from scipy import special, stats
from sweeps import each_family, each_prior, inside, learned
from torch import Tensor
from torch.autograd import gradcheck

import batchshaping as bs
from batchshaping.cdfs.prepared import CDFDerivatives
from batchshaping.priors.closed_form import ClosedFormPrior

F64 = torch.float64
TORCH_CLASSES = {
    bs.Beta: td.Beta,
    bs.SymBeta: td.Beta,
    bs.RelaxedBernoulli: td.RelaxedBernoulli,
    bs.Normal: td.Normal,
}


def of_torch(prior: td.Distribution) -> td.Distribution:
    """torch's own distribution with the same parameters."""
    if isinstance(prior, td.Beta):
        return td.Beta(prior.concentration1, prior.concentration0)
    if isinstance(prior, td.RelaxedBernoulli):
        return td.RelaxedBernoulli(prior.temperature, probs=prior.probs)
    return td.Normal(prior.loc, prior.scale)


def double(family: Family, parameters: tuple[float, ...]) -> td.Distribution:
    return family.prior(*(torch.tensor(p, dtype=F64) for p in parameters))


def closed(prior: ClosedFormPrior, x: Tensor, gradients: bool) -> CDFDerivatives:
    """The CDF and its closed derivatives, as the loss takes them."""
    return prior.prepare(tuple(p.detach() for p in prior.parameters), x.dtype, gradients=gradients)(x)


# The functions


@each_prior
def test_the_cdf_increases_from_0_to_1(family: Family, parameters: tuple[float, ...]) -> None:
    ends = torch.tensor([-torch.inf, torch.inf], dtype=F64)
    prior = family.prior(*parameters)
    assert prior.cdf(ends).tolist() == [0.0, 1.0]
    cdf = prior.cdf(
        torch.cat([torch.linspace(-1, 2, 301, dtype=F64), torch.logspace(-300, 300, 601, dtype=F64)])
    )
    assert bool((cdf[:301].diff() >= -1e-14).all())
    assert bool((cdf[301:].diff() >= -1e-14).all())
    assert bool(((cdf >= 0) & (cdf <= 1)).all())


@each_prior
def test_the_cdf_is_that_of_scipy(family: Family, parameters: tuple[float, ...]) -> None:
    x = inside(family, parameters, (500,))
    expected = scipy(family.cdf, x, *parameters)
    torch.testing.assert_close(family.prior(*parameters).cdf(x), expected, rtol=0, atol=1e-13)
    single = family.prior(*parameters).cdf(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), scipy(family.cdf, x.float(), *parameters), rtol=0, atol=1e-6)


@each_prior
def test_the_quantiles_are_those_of_scipy(family: Family, parameters: tuple[float, ...]) -> None:
    p = torch.linspace(0.01, 0.99, 99, dtype=F64)
    torch.testing.assert_close(
        family.prior(*parameters).icdf(p), scipy(family.icdf, p, *parameters), rtol=1e-9, atol=1e-13
    )


@each_prior
def test_the_inverse_of_the_cdf_undoes_it(family: Family, parameters: tuple[float, ...]) -> None:
    prior = family.prior(*parameters)
    x = inside(family, parameters, (200,))
    torch.testing.assert_close(prior.icdf(prior.cdf(x)), x, rtol=1e-8, atol=1e-10)
    p = torch.linspace(0.05, 0.7, 66, dtype=F64)
    torch.testing.assert_close(prior.cdf(prior.icdf(p)), p, rtol=0, atol=1e-11)


@each_prior
def test_probability_0_and_1_are_the_ends_of_the_support(
    family: Family, parameters: tuple[float, ...]
) -> None:
    ends = family.prior(*parameters).icdf(torch.tensor([0.0, 1.0], dtype=F64))
    expected = [-torch.inf, torch.inf] if family is FAMILIES["Normal"] else [0.0, 1.0]
    assert ends.tolist() == expected
    outside = family.prior(*parameters).icdf(torch.tensor([-0.1, 1.1, torch.nan], dtype=F64))
    assert bool(outside.isnan().all())


TAILS = [
    -1e3,
    -40.0,
    -5.0,
    0.0,
    1e-300,
    1e-100,
    1e-20,
    1e-6,
    0.3,
    0.7,
    0.999,
    1 - 2**-53,
    1.0,
    5.0,
    40.0,
    1e3,
]


@each_family
def test_the_logarithms_of_both_tails_are_those_of_mpmath(family: Family) -> None:
    name = family.prior.__name__
    for parameters in family.examples:
        for dtype, rtol in ((F64, 1e-12), (torch.float32, 1e-5)):
            x = torch.tensor(TAILS, dtype=dtype)
            if family is FAMILIES["Normal"]:
                loc, scale = parameters
                x = torch.linspace(-40, 40, 81, dtype=dtype) * scale + loc
            else:
                x = x[(x > 0) & (x < 1)]
            # In single precision the standardized value of a Normal is rounded, too.
            rtol = 1e-4 if dtype == torch.float32 and family is FAMILIES["Normal"] else rtol
            prior = family.prior(*parameters)
            for value, lower, upper in zip(
                x.tolist(), prior.log_cdf(x).tolist(), prior.log_sf(x).tolist(), strict=True
            ):
                expected = log_tails(name, parameters, mpmath.mpf(value))
                assert lower == pytest.approx(float(expected[0]), rel=rtol, abs=1e-44)
                assert upper == pytest.approx(float(expected[1]), rel=rtol, abs=1e-44)


@each_prior
def test_outside_the_support_the_logarithms_are_those_of_the_nearest_value(
    family: Family, parameters: tuple[float, ...]
) -> None:
    if family is FAMILIES["Normal"]:
        return
    prior = family.prior(*parameters)
    for dtype in (F64, torch.float32):
        finfo = torch.finfo(dtype)
        first, last = finfo.smallest_normal * finfo.eps, 1 - finfo.eps / 2
        x = torch.tensor([-2.0, 0.0, first, last, 1.0, 3.0], dtype=dtype, requires_grad=True)
        for values in (prior.log_cdf(x), prior.log_sf(x)):
            assert bool(values.isfinite().all()) and bool((values <= 0).all())
            assert values[0] == values[1] and values[3] == values[4] == values[5]
            (slope,) = torch.autograd.grad(values.sum(), x)
            assert not slope[[0, 1, 4, 5]].any()
        assert prior.log_cdf(x)[1] <= prior.log_cdf(x)[2] and prior.log_sf(x)[1] >= prior.log_sf(x)[2]


@each_prior
@pytest.mark.parametrize("method", ["log_cdf", "log_sf"])
def test_gradcheck_of_the_logarithms_in_everything(
    family: Family, parameters: tuple[float, ...], method: str
) -> None:
    x = inside(family, parameters, (5, 4), upper=0.6)
    # In the logit no slope is too large for finite differences.
    start, back = (x, lambda z: z) if family is FAMILIES["Normal"] else (torch.logit(x), torch.sigmoid)
    assert gradcheck(
        lambda z, *p: getattr(family.prior(*p), method)(back(z)),
        (start.requires_grad_(), *learned(parameters, (4,), 0.1)),
    )


@each_family
def test_the_logarithms_broadcast_values_and_parameters(family: Family) -> None:
    example = family.examples[0]
    first = torch.linspace(0.9, 1.1, 3, dtype=F64) * example[0]
    prior = family.prior(first, *example[1:])
    x = torch.linspace(0.2, 0.8, 5, dtype=F64).unsqueeze(1)
    for method in ("log_cdf", "log_sf"):
        found = getattr(prior, method)(x)
        columns = [getattr(family.prior(p, *example[1:]), method)(x[:, 0]) for p in first]
        torch.testing.assert_close(found, torch.stack(columns, dim=1))
        mapped = torch.func.vmap(lambda p, m=method: getattr(family.prior(p, *example[1:]), m)(x[:, 0]))
        torch.testing.assert_close(mapped(first), found.T)


@each_family
def test_the_logarithms_of_nan_are_nan(family: Family) -> None:
    x = torch.tensor([0.2, torch.nan, 0.7])
    prior = family.prior(*family.examples[0])
    assert prior.log_cdf(x).isnan().tolist() == [False, True, False]
    assert prior.log_sf(x).isnan().tolist() == [False, True, False]


@each_prior
def test_the_derivative_of_the_cdf_is_the_density(family: Family, parameters: tuple[float, ...]) -> None:
    prior = double(family, parameters)
    x = inside(family, parameters, (200,)).requires_grad_()
    (slope,) = torch.autograd.grad(prior.cdf(x).sum(), x)
    torch.testing.assert_close(slope, prior.log_prob(x).exp().detach(), rtol=1e-8, atol=1e-12)


@each_prior
def test_the_closed_derivatives_are_those_of_the_cdf(family: Family, parameters: tuple[float, ...]) -> None:
    given = learned(parameters)
    prior = family.prior(*given)
    x = inside(family, parameters, (100,)).requires_grad_()
    at = closed(prior, x.detach(), gradients=True)
    cdf = prior.cdf(x)
    torch.testing.assert_close(at.cdf, cdf.detach(), rtol=1e-12, atol=1e-14)
    assert len(at.parameters) == len(prior.parameters)
    # SymBeta's second parameter is a function of the first, so derivatives are taken of a fresh prior.
    fresh = [p.detach().requires_grad_() for p in prior.parameters]
    cdf = (bs.Beta if isinstance(prior, bs.Beta) else family.prior)(*fresh, validate_args=False).cdf(x)
    for derivative, operand in zip((at.pdf, *at.parameters), (x, *fresh), strict=True):
        (expected,) = torch.autograd.grad(cdf.sum(), operand, retain_graph=True)
        torch.testing.assert_close(derivative.sum_to_size(operand.shape), expected, rtol=1e-8, atol=1e-10)


@each_prior
def test_the_closed_derivatives_equal_finite_differences(
    family: Family, parameters: tuple[float, ...]
) -> None:
    x = inside(family, parameters, (50,))
    given = learned(parameters)
    by_autograd = torch.autograd.grad(family.prior(*given).cdf(x).sum(), given)
    for k, p in enumerate(parameters):
        h = 1e-5 * max(abs(p), 0.1)
        moved = [[q + s * h * (j == k) for j, q in enumerate(parameters)] for s in (1, -1)]
        high, low = (scipy(family.cdf, x, *each) for each in moved)
        expected = ((high - low) / (2 * h)).sum()
        torch.testing.assert_close(by_autograd[k], expected, rtol=1e-5, atol=1e-6)


@each_prior
def test_derivatives_in_the_parameters_come_only_where_asked_for(
    family: Family, parameters: tuple[float, ...]
) -> None:
    prior = family.prior(*parameters)
    assert closed(prior, torch.rand(3), gradients=False).parameters == ()


@each_prior
def test_nan_in_nan_out(family: Family, parameters: tuple[float, ...]) -> None:
    prior = family.prior(*parameters)
    x = torch.tensor([torch.nan, 0.3], dtype=F64)
    at = closed(prior, x, gradients=True)
    for values in (prior.cdf(x), at.cdf, at.pdf, *at.parameters):
        assert values.isnan().tolist() == [True, False]


@given(
    name=st.sampled_from(sorted(FAMILIES)),
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(), (3,), (2, 1), (2, 3)]),
)
def test_parameters_broadcast_as_scipy_has_them(name: str, seed: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    family = FAMILIES[name]
    parameters = [0.1 + 0.8 * rng.uniform(size=shape if k == 0 else ()) for k in range(len(family.names))]
    prior = family.prior(*(torch.as_tensor(p) for p in parameters))
    assert prior.batch_shape == shape
    x = rng.uniform(0.05, 0.95, size=(4, 2, 3))
    expected = torch.as_tensor(family.cdf(x, *parameters))
    torch.testing.assert_close(prior.cdf(torch.as_tensor(x)), expected, rtol=0, atol=1e-12)


# Distributions of torch


@each_prior
def test_it_is_the_distribution_of_torch(family: Family, parameters: tuple[float, ...]) -> None:
    prior = double(family, parameters)
    assert isinstance(prior, td.Distribution)
    assert isinstance(prior, TORCH_CLASSES[type(prior)])
    assert str(prior.support) == str(of_torch(prior).support)
    x = inside(family, parameters, (50,))
    torch.testing.assert_close(prior.log_prob(x), of_torch(prior).log_prob(x), rtol=1e-12, atol=1e-12)


@each_prior
def test_samples_follow_the_cdf(family: Family, parameters: tuple[float, ...]) -> None:
    n = 5000
    samples = double(family, parameters).sample((n,))
    assert samples.shape == (n,)
    result = stats.kstest(samples.numpy(), lambda x: family.cdf(x, *parameters))
    assert result.statistic < 1.95 / n**0.5


@each_family
def test_rsample_carries_a_gradient_to_the_parameters(family: Family) -> None:
    given = learned(family.examples[0])
    family.prior(*given).rsample((10,)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite()) for p in given)


@pytest.mark.parametrize("name", ["Beta", "SymBeta", "Normal"])
def test_mean_and_variance_are_those_of_scipy(name: str) -> None:
    family = FAMILIES[name]
    for parameters in family.examples:
        prior = double(family, parameters)
        mean, variance = (torch.tensor(float(m), dtype=F64) for m in family.moments(*parameters))
        torch.testing.assert_close(prior.mean, mean)
        torch.testing.assert_close(prior.variance, variance)
        torch.testing.assert_close(prior.stddev, variance.sqrt())


@pytest.mark.parametrize("method", ["entropy", "mode"])
@pytest.mark.parametrize("prior", [bs.Beta(2.0, 6.0), bs.Normal(0.6, 0.1)], ids=repr)
def test_entropy_and_mode_are_those_of_torch(prior: td.Distribution, method: str) -> None:
    value = lambda p: p.entropy() if method == "entropy" else p.mode  # noqa: E731
    torch.testing.assert_close(value(prior), value(of_torch(prior)))


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (bs.Beta(2.0, 6.0), bs.Beta(0.6, 0.4)),
        (bs.SymBeta(0.6), bs.Beta(2.0, 6.0)),
        (bs.Normal(0.6, 0.1), bs.Normal(0.0, 1.0)),
    ],
    ids=repr,
)
def test_kl_divergence_is_that_of_torch(p: td.Distribution, q: td.Distribution) -> None:
    expected = td.kl_divergence(of_torch(p), of_torch(q))
    torch.testing.assert_close(td.kl_divergence(p, q), expected)
    torch.testing.assert_close(td.kl_divergence(p, of_torch(q)), expected)


@each_family
def test_expand_repeats_the_prior_and_keeps_the_graph(family: Family) -> None:
    given = learned(family.examples[0])
    expanded = family.prior(*given).expand((4, 3))
    assert type(expanded) is family.prior
    assert expanded.batch_shape == (4, 3)
    assert expanded.sample((2,)).shape == (2, 4, 3)
    assert expanded.log_prob(torch.rand(4, 3, dtype=F64)).shape == (4, 3)
    expanded.cdf(torch.full((4, 3), 0.4, dtype=F64)).sum().backward()
    fresh = learned(family.examples[0])
    expected = torch.autograd.grad(12 * family.prior(*fresh).cdf(torch.tensor(0.4, dtype=F64)), fresh)
    for p, gradient in zip(given, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


@each_family
def test_batch_shape_is_what_the_parameters_broadcast_to(family: Family) -> None:
    example = family.examples[0]
    assert family.prior(*example).batch_shape == ()
    assert family.prior(*example).event_shape == ()
    first = torch.full((3, 1), example[0])
    assert family.prior(first, *example[1:]).batch_shape == (3, 1)
    if len(example) == 2:
        assert family.prior(first, torch.full((4,), example[1])).batch_shape == (3, 4)


@each_family
def test_it_can_be_copied(family: Family) -> None:
    prior = double(family, family.examples[0])
    x = inside(family, family.examples[0], (5,))
    torch.testing.assert_close(copy.deepcopy(prior).cdf(x), prior.cdf(x))


def test_repr_names_the_parameters() -> None:
    assert repr(bs.Beta(0.6, 0.4)) == "Beta(a=0.6, b=0.4)"
    assert repr(bs.SymBeta(torch.tensor(0.25))) == "SymBeta(a=0.25)"
    assert repr(bs.RelaxedBernoulli(0.2, temperature=0.25)) == "RelaxedBernoulli(mean=0.2, temperature=0.25)"
    assert repr(bs.Normal(torch.zeros(3, 2), 1)) == "Normal(loc=tensor(3, 2), scale=1)"


# Numbers and learned parameters


def test_numbers_are_exact_in_double_precision() -> None:
    x = torch.linspace(0.001, 0.999, 99, dtype=F64)
    for name, parameters in [("Beta", (0.6, 0.4)), ("RelaxedBernoulli", (0.2, 0.25)), ("Normal", (0.6, 0.1))]:
        family = FAMILIES[name]
        expected = scipy(family.cdf, x, *parameters)
        torch.testing.assert_close(family.prior(*parameters).cdf(x), expected, rtol=1e-14, atol=1e-14)


@each_prior
def test_numbers_do_not_widen_single_precision(family: Family, parameters: tuple[float, ...]) -> None:
    prior = family.prior(*parameters)
    scalar = torch.tensor(0.3)
    for method in (prior.cdf, prior.icdf, prior.log_prob, prior.log_cdf, prior.log_sf):
        assert method(scalar).dtype == torch.float32
    x = torch.rand(5)
    assert prior.cdf(x).dtype == torch.float32
    assert prior.icdf(x).dtype == torch.float32
    assert prior.log_prob(x.clamp(0.1, 0.9)).dtype == torch.float32
    assert prior.sample().dtype == torch.float32


@each_prior
@pytest.mark.parametrize("dtype", [torch.bfloat16, F64])
def test_the_default_dtype_changes_no_function_of_numbers(
    family: Family, parameters: tuple[float, ...], dtype: torch.dtype
) -> None:
    prior, x = family.prior(*parameters), torch.linspace(0.1, 0.9, 9)
    methods = ("cdf", "icdf", "log_prob", "log_cdf", "log_sf")
    expected = [getattr(prior, method)(x) for method in methods]
    torch.set_default_dtype(dtype)
    try:
        found = [getattr(family.prior(*parameters), method)(x) for method in methods]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("value", ["0.6", None, [0.6, 0.4], np.array([0.6, 0.4])], ids=repr)
def test_what_is_no_parameter_is_refused_by_name_in_one_line(value: object) -> None:
    with pytest.raises(TypeError, match=r"^Beta: b must be a number or a tensor, received .+$") as caught:
        bs.Beta(0.6, value)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match=r"^Normal: loc must be real, received torch\.complex64$"):
        bs.Normal(torch.tensor(1j), 1.0)


@pytest.mark.parametrize(
    "prior", [bs.Beta(2, 6), bs.Normal(0, 1), bs.Beta(torch.tensor([2, 3]), 6)], ids=repr
)
def test_whole_numbers_are_parameters_too(prior: td.Distribution) -> None:
    assert prior.cdf(torch.full((2,), 0.5)).dtype == torch.float32


def observations(prior: td.Distribution, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return [
        prior.cdf(x).detach(),
        prior.icdf(prior.cdf(x).detach()).detach(),
        prior.log_prob(x).detach(),
        prior.sample((3,)),
    ]


@each_family
def test_a_parameter_updated_in_place_is_seen_by_the_same_prior(family: Family) -> None:
    first, second = family.examples[:2]
    parameters = [torch.nn.Parameter(torch.tensor(p, dtype=F64)) for p in first]
    prior = family.prior(*parameters)
    x = torch.linspace(0.2, 0.8, 7, dtype=F64)
    observations(prior, x)
    with torch.no_grad():
        for p, value in zip(parameters, second, strict=True):
            p.fill_(value)
    for seen, expected in zip(observations(prior, x), observations(double(family, second), x), strict=True):
        torch.testing.assert_close(seen, expected)


@each_family
def test_a_parameter_updated_out_of_its_range_is_refused_by_check(family: Family) -> None:
    parameters = [torch.nn.Parameter(torch.tensor(p)) for p in family.examples[0]]
    prior, unchecked = family.prior(*parameters), family.prior(*parameters, validate_args=False)
    prior.check()
    with torch.no_grad():
        parameters[-1].fill_(-7.5)
    name = family.names[-1]
    for made in (prior, prior.expand((2, 3)), prior.replace()):
        with pytest.raises(ValueError, match=rf"{type(prior).__name__}: {name} must be .* received -7\.5"):
            made.check()
    unchecked.check()


@each_family
def test_the_likelihood_reaches_learned_parameters(family: Family) -> None:
    given = learned(family.examples[0])
    x = inside(family, family.examples[0], (20,))
    gradients = torch.autograd.grad(family.prior(*given).log_prob(x).sum(), given)
    fresh = learned(family.examples[0])
    expected = torch.autograd.grad(of_torch(family.prior(*fresh)).log_prob(x).sum(), fresh)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)


@each_family
def test_gradcheck_of_the_quantiles_in_everything(family: Family) -> None:
    given = [torch.tensor(p, dtype=F64, requires_grad=True) for p in family.examples[0]]
    p = torch.linspace(0.2, 0.8, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, *given: family.prior(*given).icdf(p), (p, *given))


# Errors

OUT_OF_RANGE = [
    (bs.Beta, (0.0, 0.4), "Beta: a must be between 1e-300 and 1e300, received 0"),
    (bs.Beta, (0.6, -0.4), "Beta: b must be between 1e-300 and 1e300, received -0.4"),
    (bs.Beta, (torch.inf, 0.4), "Beta: a must be between 1e-300 and 1e300, received inf"),
    (bs.Beta, (torch.nan, 0.4), "Beta: a must be between 1e-300 and 1e300, received nan"),
    (bs.SymBeta, (1.0,), "SymBeta: a must be between 0 and 1.*received 1"),
    (bs.SymBeta, (-0.5,), "SymBeta: a must be between 0 and 1.*received -0.5"),
    (bs.RelaxedBernoulli, (0.0, 0.25), "RelaxedBernoulli: mean must be between 0 and 1.*received 0"),
    (bs.RelaxedBernoulli, (1.5, 0.25), "RelaxedBernoulli: mean must be between 0 and 1.*received 1.5"),
    (bs.RelaxedBernoulli, (0.2, 0.0), "RelaxedBernoulli: temperature must be positive.*received 0"),
    (bs.Normal, (0.6, 0.0), "Normal: scale must be positive and finite, received 0"),
    (bs.Normal, (0.6, -1.0), "Normal: scale must be positive and finite, received -1"),
    (bs.Normal, (torch.nan, 1.0), "Normal: loc must be finite, received nan"),
]


@pytest.mark.parametrize(("prior", "parameters", "message"), OUT_OF_RANGE, ids=[m for *_, m in OUT_OF_RANGE])
def test_out_of_range_is_refused_in_one_line_with_name_and_value(prior, parameters, message) -> None:
    for each in (parameters, [torch.tensor(p) for p in parameters]):
        with pytest.raises(ValueError, match=message) as caught:
            prior(*each)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [2e300, 1e-301])
def test_concentrations_beyond_what_is_exact_are_refused(value: float) -> None:
    for concentration in (value, torch.tensor(value, dtype=F64)):
        for make in (lambda v: bs.Beta(v, 2.0), lambda v: bs.Beta(2.0, v)):
            with pytest.raises(ValueError, match=r"between 1e-300 and 1e300, received (2e\+300|1e-301)$"):
                make(concentration)
    # A learned one that an optimizer has taken there, too.
    learned = torch.tensor(1.0, dtype=F64, requires_grad=True)
    prior = bs.Beta(learned, 2.0)
    with torch.no_grad():
        learned.fill_(value)
    with pytest.raises(ValueError, match="between 1e-300 and 1e300"):
        bs.batch_shaping(torch.rand(5), prior)


@pytest.mark.parametrize(("prior", "parameters", "message"), OUT_OF_RANGE, ids=[m for *_, m in OUT_OF_RANGE])
def test_nothing_is_checked_when_validation_is_off(prior, parameters, message) -> None:
    prior(*parameters, validate_args=False)


def test_out_of_range_in_a_large_tensor_is_one_short_line() -> None:
    a = torch.ones(1000)
    a[[3, 5]] = torch.tensor([-2.0, -3.0])
    with pytest.raises(ValueError, match=r"Beta: a must be .* received -2 \(2 of 1000 values\)$"):
        bs.Beta(a, 0.4)


@pytest.mark.parametrize("name", ["Beta", "RelaxedBernoulli", "Normal"])
def test_shapes_that_do_not_broadcast_are_both_named(name: str) -> None:
    family = FAMILIES[name]
    first, second = (torch.full((n,), p) for n, p in zip((2, 3), family.examples[0], strict=True))
    names = rf"{family.names[0]} \(2,\), {family.names[1]} \(3,\)"
    with pytest.raises(ValueError, match=f"{family.prior.__name__}.*broadcast.*{names}"):
        family.prior(first, second)


def test_a_beta_density_is_known_in_closed_form() -> None:
    x = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    expected = x.pow(-0.4) * (1 - x).pow(-0.6) / special.beta(0.6, 0.4)
    a, b = torch.tensor(0.6, dtype=F64), torch.tensor(0.4, dtype=F64)
    torch.testing.assert_close(bs.Beta(a, b).log_prob(x).exp(), expected)
