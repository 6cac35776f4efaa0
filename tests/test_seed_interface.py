"""The published interface: names, signatures, what they compute, and the losses that were published."""

from __future__ import annotations

import importlib
import inspect
import os
import random
import re
from collections.abc import Callable
from enum import Enum

import numpy as np
import pytest
import torch
from oracles import FAMILIES, Family, brute_force, scipy
from scipy import special, stats
from sweeps import inside
from torch import Tensor
from torch.autograd import gradcheck

from batchshaping.batch_shaping_loss import Prior, gbas_loss
from batchshaping.cdf_beta import get_beta_cdf_factory
from batchshaping.utils import set_seed, to_numpy, validate_prior_param, warmup_factory

F64 = torch.float64

EXAMPLES = {
    Prior.SYMBETA: ("SymBeta", (0.6,)),
    Prior.BETA: ("Beta", (2.0, 6.0)),
    Prior.RELAXED_BERNOULLI: ("RelaxedBernoulli", (0.2, 0.25)),
    Prior.NORMAL: ("Normal", (0.6, 0.1)),
}
each_prior = pytest.mark.parametrize("prior", EXAMPLES, ids=lambda p: p.name)


def oracle(prior: Prior) -> tuple[Family, tuple[float, ...]]:
    """The family, with the clip of x that was published for the Relaxed Bernoulli, and example parameters."""
    name, parameters = EXAMPLES[prior]
    family = FAMILIES[name]
    if prior is Prior.RELAXED_BERNOULLI:
        exact = family.cdf
        family = family._replace(cdf=lambda x, *p: exact(np.clip(x, 1e-3, 1 - 1e-3), *p))
    return family, parameters


# Names


def test_the_four_priors_are_an_enum() -> None:
    assert issubclass(Prior, Enum)
    assert {p.name for p in Prior} == {"SYMBETA", "BETA", "RELAXED_BERNOULLI", "NORMAL"}


@pytest.mark.parametrize(
    ("module", "name", "signature"),
    [
        (
            "batch_shaping_loss",
            "gbas_loss",
            "x_in, prior, prior_param1, prior_param2=None, trainable_prior_params=False, dim=None, "
            "handle_ties=False",
        ),
        ("cdf_normal", "get_normal_cdf", "x_in, mean, std"),
        ("cdf_relaxedbernoulli", "get_relaxed_bernoulli_cdf", "x_in, mean, temperature, eps=0.001"),
        ("cdf_relaxedbernoulli", "get_relaxed_bernoulli_pdf", "x_in, mean, temperature, eps=0.001"),
        (
            "cdf_beta",
            "get_beta_cdf_factory",
            "trainable_params, symmetric, beta_a, beta_b=None, pdf_clip_min=0.001, pdf_clip_max=100",
        ),
        ("utils", "set_seed", "seed"),
        ("utils", "to_numpy", "tensor"),
        ("utils", "validate_prior_param", "prior_param, dim0, device=cpu"),
        ("utils", "warmup_factory", "num_warmup_steps, learning_rate, min_learning_rate=0.0001"),
        ("viz_utils", "plot_gt_cdf", "ax, prior, p1, p2, num_pts=100"),
        ("viz_utils", "plot_gt_pdf", "ax, prior, p1, p2, num_pts=100, eps_clip_x=0.005, eps_ylim=0.25"),
        ("viz_utils", "init_anim_plot", "num_epochs, eps=0.08"),
        ("viz_utils", "init_gbas_anim_plot", "num_epochs, eps=0.08"),
    ],
)
def test_functions_have_their_published_names_and_signatures(module: str, name: str, signature: str) -> None:
    function = getattr(importlib.import_module(f"batchshaping.{module}"), name)
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    shown = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
    assert shown == signature


# gbas_loss


@each_prior
@pytest.mark.parametrize("handle_ties", [False, True])
@pytest.mark.parametrize("shape", [(30,), (5, 6), (3, 4, 5)], ids=str)
def test_without_dim_all_values_are_one_array(
    prior: Prior, handle_ties: bool, shape: tuple[int, ...]
) -> None:
    family, parameters = oracle(prior)
    x = torch.rand(shape, dtype=F64).mul(10).round().div(10)
    loss = gbas_loss(x, prior, *parameters, handle_ties=handle_ties)
    assert loss.shape == ()
    expected = brute_force(x, family.cdf, parameters, ties=handle_ties)
    torch.testing.assert_close(loss, torch.as_tensor(expected))


def shared(p: float, n: int) -> float:
    return p


def scalar(p: float, n: int) -> Tensor:
    return torch.tensor(p, dtype=F64)


def each_its_own(p: float, n: int) -> Tensor:
    return p * torch.linspace(0.8, 1.2, n, dtype=F64)


@each_prior
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("make", [shared, scalar, each_its_own])
@pytest.mark.parametrize("handle_ties", [False, True])
def test_dim_indexes_the_arrays_and_parameter_k_belongs_to_array_k(
    prior: Prior, dim: int, make: Callable[[float, int], float | Tensor], handle_ties: bool
) -> None:
    family, example = oracle(prior)
    x = torch.rand(4, 5, 6, dtype=F64).mul(20).round().div(20)
    parameters = tuple(make(p, x.shape[dim]) for p in example)
    others = tuple(d for d in range(3) if d != dim % 3)
    expected = brute_force(x, family.cdf, parameters, others, ties=handle_ties).mean()
    loss = gbas_loss(x, prior, *parameters, dim=dim, handle_ties=handle_ties)
    assert loss.shape == ()
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=F64))


@each_prior
def test_one_parameter_may_be_a_number_and_the_other_one_an_array(prior: Prior) -> None:
    family, example = oracle(prior)
    x = torch.rand(50, 4, dtype=F64)
    parameters = (each_its_own(example[0], 4), *example[1:])
    expected = brute_force(x, family.cdf, parameters, 0).mean()
    torch.testing.assert_close(gbas_loss(x, prior, *parameters, dim=1), torch.tensor(expected, dtype=F64))


@each_prior
@pytest.mark.parametrize("trainable", [False, True])
def test_the_flag_decides_whether_a_beta_is_learned_and_the_others_are_learned_anyway(
    prior: Prior, trainable: bool
) -> None:
    _, example = oracle(prior)
    x = torch.rand(50, 4, requires_grad=True)
    parameters = [torch.full((4,), p, requires_grad=True) for p in example]
    gbas_loss(x, prior, *parameters, trainable_prior_params=trainable, dim=1).backward()
    learned = trainable or prior in (Prior.RELAXED_BERNOULLI, Prior.NORMAL)
    for p in parameters:
        assert (p.grad is not None) == learned
        assert not learned or bool((p.grad != 0).all())
    assert x.grad is not None


@each_prior
@pytest.mark.parametrize("dim", [None, 1])
def test_gradcheck_in_x_and_trainable_parameters_where_nothing_is_clipped(
    prior: Prior, dim: int | None
) -> None:
    family, example = oracle(prior)
    x = inside(family, example, (8, 3), upper=0.7).clamp(0.02, 0.98)
    # The clamp joins values; a little apart they are distinct again.
    x = (x + torch.linspace(0, 1e-3, x.numel(), dtype=F64).reshape(x.shape)).requires_grad_()
    parameters = [torch.full(() if dim is None else (3,), p, dtype=F64, requires_grad=True) for p in example]
    loss = lambda x, *p: gbas_loss(x, prior, *p, trainable_prior_params=True, dim=dim)  # noqa: E731
    assert gradcheck(loss, (x, *parameters), eps=1e-6, atol=1e-5)


def published_gradient(x: Tensor, cdf: np.ndarray, slope: np.ndarray) -> Tensor:
    rank = stats.rankdata(x.detach().numpy(), method="ordinal")
    return torch.as_tensor(2 / len(x) * (cdf - rank / (len(x) + 1)) * slope)


@pytest.mark.parametrize(
    ("prior", "a", "b"), [(Prior.BETA, 300.0, 700.0), (Prior.BETA, 0.1, 0.1), (Prior.SYMBETA, 0.9, 0.1)]
)
def test_a_beta_density_is_clipped_in_the_backward_pass(prior: Prior, a: float, b: float) -> None:
    x = torch.tensor([1e-9, 1e-4, 0.1, 0.3, 0.31, 0.6, 0.9999, 1 - 1e-9], dtype=F64, requires_grad=True)
    density = stats.beta.pdf(x.detach().numpy(), a, b)
    assert density.min() < 1e-3 or density.max() > 100
    (gradient,) = torch.autograd.grad(gbas_loss(x, prior, a, b if prior is Prior.BETA else None), x)
    expected = published_gradient(x, special.betainc(a, b, x.detach().numpy()), density.clip(1e-3, 100))
    torch.testing.assert_close(gradient, expected)


def test_an_infinite_beta_density_is_clipped_too() -> None:
    x = torch.tensor([0.0, 0.5, 1.0], dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(gbas_loss(x, Prior.BETA, 0.6, 0.4), x)
    cdf = special.betainc(0.6, 0.4, x.detach().numpy())
    expected = published_gradient(x, cdf, stats.beta.pdf([0.0, 0.5, 1.0], 0.6, 0.4).clip(1e-3, 100))
    torch.testing.assert_close(gradient, expected)


def test_the_relaxed_bernoulli_clips_values_and_gives_clipped_ones_no_gradient() -> None:
    x = torch.tensor([-1.0, 0.0, 1e-4, 0.002, 0.5, 0.9, 0.9999, 2.0], dtype=F64, requires_grad=True)
    family, parameters = oracle(Prior.RELAXED_BERNOULLI)
    loss = gbas_loss(x, Prior.RELAXED_BERNOULLI, *parameters)
    torch.testing.assert_close(loss.detach(), torch.as_tensor(brute_force(x, family.cdf, parameters)))
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient[[0, 1, 2, 6, 7]].abs().tolist() == [0.0] * 5
    assert bool((gradient[3:6] != 0).all())


@each_prior
def test_values_in_double_precision_stay_in_it(prior: Prior) -> None:
    _, example = oracle(prior)
    assert gbas_loss(torch.rand(10, dtype=F64), prior, *example).dtype == F64
    assert gbas_loss(torch.rand(10), prior, *example).dtype == torch.float32


@pytest.mark.parametrize("prior", [None, "BETA", 1])
def test_an_unknown_prior_is_refused_with_the_known_ones(prior: object) -> None:
    with pytest.raises(ValueError, match=r"Prior.SYMBETA, Prior.BETA, Prior.RELAXED_BERNOULLI, Prior.NORMAL"):
        gbas_loss(torch.rand(3), prior, 0.5, 0.5)


@pytest.mark.parametrize("prior", [Prior.BETA, Prior.RELAXED_BERNOULLI, Prior.NORMAL], ids=lambda p: p.name)
def test_a_missing_second_parameter_is_refused_by_name(prior: Prior) -> None:
    with pytest.raises(ValueError, match=f"prior_param2 .* {prior}"):
        gbas_loss(torch.rand(3), prior, 0.5)


def test_a_second_parameter_of_a_symmetric_beta_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prior_param2 must be None for Prior.SYMBETA, received 0.5"):
        gbas_loss(torch.rand(3), Prior.SYMBETA, 0.6, 0.5)


@pytest.mark.parametrize("a", [-0.5, 0.0, 1.0, 1.5])
def test_a_symmetric_beta_out_of_range_is_refused_with_the_value_given(a: float) -> None:
    with pytest.raises(ValueError, match=rf"between 0 and 1.*received {a:g}"):
        gbas_loss(torch.rand(3), Prior.SYMBETA, a)


@each_prior
def test_as_many_parameters_as_arrays_are_asked_for(prior: Prior) -> None:
    _, example = oracle(prior)
    parameters = [torch.full((3,), p) for p in example]
    with pytest.raises(ValueError, match=r"\(3,\)"):
        gbas_loss(torch.rand(5, 4), prior, *parameters, dim=1)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="int64"):
        gbas_loss(torch.ones(3, dtype=torch.int64), Prior.BETA, 2, 6)


# The Beta CDF by its factory


def test_the_factory_makes_the_cdf_with_fixed_parameters() -> None:
    x = torch.linspace(0, 1, 101, dtype=F64)
    torch.testing.assert_close(
        get_beta_cdf_factory(False, False, 2.0, 6.0).apply(x), scipy(special.betainc, 2.0, 6.0, x)
    )
    torch.testing.assert_close(
        get_beta_cdf_factory(False, True, 0.6).apply(x), scipy(special.betainc, 0.6, 0.4, x)
    )
    a = torch.tensor(0.6, dtype=F64, requires_grad=True)
    assert not get_beta_cdf_factory(False, True, a).apply(x).requires_grad


def test_the_factory_makes_the_cdf_with_trainable_parameters() -> None:
    a, b = torch.tensor(2.0, dtype=F64, requires_grad=True), torch.tensor(6.0, dtype=F64, requires_grad=True)
    x = torch.linspace(0.1, 0.7, 7, dtype=F64, requires_grad=True)
    cdf = get_beta_cdf_factory(True, False, a, b).apply
    torch.testing.assert_close(cdf(x, a, b).detach(), scipy(special.betainc, 2.0, 6.0, x))
    assert gradcheck(cdf, (x, a, b))
    a = torch.tensor(0.6, dtype=F64, requires_grad=True)
    symmetric = get_beta_cdf_factory(True, True, a).apply
    torch.testing.assert_close(symmetric(x, a).detach(), scipy(special.betainc, 0.6, 0.4, x))
    assert gradcheck(symmetric, (x, a))


@pytest.mark.parametrize("limits", [(1e-3, 100.0), (0.5, 2.0)])
@pytest.mark.parametrize("trainable", [False, True])
def test_the_factory_clips_the_density_in_the_backward_pass(
    limits: tuple[float, float], trainable: bool
) -> None:
    x = torch.tensor([0.0, 1e-9, 0.1, 0.25, 0.8, 0.999, 1.0], dtype=F64, requires_grad=True)
    for a, b in [(2.0, 6.0), (0.4, 0.6)]:
        parameters = (torch.tensor(a, dtype=F64), torch.tensor(b, dtype=F64)) if trainable else ()
        cdf = get_beta_cdf_factory(trainable, False, a, b, *limits).apply(x, *parameters)
        torch.testing.assert_close(cdf.detach(), scipy(special.betainc, a, b, x))
        (gradient,) = torch.autograd.grad(cdf.sum(), x)
        expected = stats.beta.pdf(x.detach().numpy(), a, b).clip(*limits)
        torch.testing.assert_close(gradient, torch.as_tensor(expected))


def test_the_factory_asks_for_b() -> None:
    with pytest.raises(ValueError, match="beta_b must be given"):
        get_beta_cdf_factory(False, False, 2.0)


# Helpers


def test_a_seed_repeats_the_numbers_of_python_numpy_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "random")

    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    set_seed(7)
    first = draw()
    assert draw() != first
    set_seed(7)
    assert draw() == first
    assert os.environ["PYTHONHASHSEED"] == "7"


def test_tensors_lists_and_arrays_become_numpy_arrays() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    leaf = x.clone().requires_grad_()
    for values in (x, leaf, leaf * 1, x.T.T, x.numpy()):
        array = to_numpy(values)
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, np.arange(6).reshape(2, 3))
    assert leaf.requires_grad
    np.testing.assert_array_equal(to_numpy([[0, 1], [2, 3]]), np.arange(4).reshape(2, 2))
    assert to_numpy(0.5).shape == ()


@pytest.mark.parametrize("values", [torch.zeros(3), np.zeros(3)], ids=["tensor", "array"])
def test_a_numpy_array_keeps_its_values_when_an_optimizer_moves_those_it_came_from(
    values: Tensor | np.ndarray,
) -> None:
    array = to_numpy(values)
    values += 1
    assert array.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("given", "arrays", "expected"),
    [
        (0.25, 3, [[0.25]]),
        (2, 3, [[2.0]]),
        (np.float64(0.25), 1, [[0.25]]),
        (torch.tensor(0.25), 3, [[0.25]]),
        (torch.tensor([0.25]), 3, [[0.25]]),
        (torch.tensor([0.25, 0.5, 0.75]), 3, [[0.25], [0.5], [0.75]]),
    ],
    ids=str,
)
def test_a_parameter_gets_the_shape_that_broadcasts_over_arrays(
    given: Tensor | float, arrays: int, expected: list[list[float]]
) -> None:
    parameter = validate_prior_param(given, arrays)
    assert parameter.dtype == torch.float32
    assert parameter.tolist() == expected
    assert validate_prior_param(0.25, arrays, device=torch.device("meta")).device.type == "meta"


def test_a_parameter_stays_in_its_graph_and_its_precision() -> None:
    parameter = torch.tensor([0.25, 0.5], dtype=F64, requires_grad=True)
    shaped = validate_prior_param(parameter, 2)
    assert shaped.dtype == F64
    shaped.sum().backward()
    assert parameter.grad is not None and parameter.grad.tolist() == [1, 1]


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), (1, 3), (0,)])
def test_a_parameter_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\), received shape " + re.escape(str(shape))):
        validate_prior_param(torch.zeros(shape), 3)


@pytest.mark.parametrize("steps", [1, 20])
def test_the_warm_up_is_linear_then_constant(steps: int) -> None:
    schedule = warmup_factory(steps, learning_rate=0.3, min_learning_rate=0.1)
    rates = [schedule(step) for step in range(steps + 50)]
    np.testing.assert_allclose(rates[: steps + 1], np.linspace(0.1, 0.3, steps + 1))
    assert set(rates[steps:]) == {0.3}
    assert warmup_factory(steps, 0.3)(0) == pytest.approx(1e-4)


def test_no_warm_up_is_constant() -> None:
    assert warmup_factory(0, 0.3)(0) == 0.3


def test_the_warm_up_drives_a_scheduler() -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_factory(20, 0.3))
    for step in range(25):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(min(1e-4 + (0.3 - 1e-4) * step / 20, 0.3))
        optimizer.step()
        scheduler.step()
