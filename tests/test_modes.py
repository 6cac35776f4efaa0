"""What users made, and modules, run compiled as they do eagerly; modes of the process change no number."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn

import batchshaping as bs
from batchshaping.statistics.anderson_darling import AndersonDarling
from batchshaping.statistics.cramer_von_mises import CramerVonMises
from batchshaping.statistics.statistic import ClosedFormStatistic, Statistic, Terms


def step_of(statistic: str | Statistic) -> Callable[[Tensor, Tensor], Tensor]:
    def step(z: Tensor, loc: Tensor) -> Tensor:
        return bs.batch_shaping(torch.sigmoid(z), bs.Normal(loc, 0.1), 0, statistic=statistic)

    return step


# Statistics and priors of users


class WeighedByGradients(CramerVonMises):
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss_and_gradients(self, *operands: Any) -> list[Tensor]:
        loss, by_x, factor, *by_parameter = super().loss_and_gradients(*operands)
        return [self.weight * loss, by_x, self.weight * factor, *by_parameter]


class WeighedByClosedForm(AndersonDarling):
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def closed_form(self, *operands: Any) -> Callable[[slice], Terms]:
        terms_of = super().closed_form(*operands)

        def weighed(tile: slice) -> Terms:
            value, by_x, by_parameter = terms_of(tile)
            return Terms(
                value * self.weight, by_x * self.weight, tuple(by * self.weight for by in by_parameter)
            )

        return weighed


class WeighedByTerms(CramerVonMises):
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def terms(self, values: Tensor, positions: Tensor, prior: td.Distribution) -> Tensor:
        return self.weight * super().terms(values, positions, prior)


class WeighedByLoss(CramerVonMises):
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss(self, *operands: Any) -> Tensor:
        return self.weight * super().loss(*operands)


WEIGHED = {
    WeighedByGradients: "cramer_von_mises",
    WeighedByClosedForm: "anderson_darling",
    WeighedByTerms: "cramer_von_mises",
    WeighedByLoss: "cramer_von_mises",
}
each_weighed = pytest.mark.parametrize("family", WEIGHED, ids=lambda family: family.__name__)


def gradients_of(function: Callable[..., Tensor], z: Tensor, parameter: Tensor) -> list[Tensor]:
    z, parameter = (t.detach().requires_grad_() for t in (z, parameter))
    loss = function(z, parameter)
    return [loss.detach(), *torch.autograd.grad(loss, (z, parameter))]


@each_weighed
def test_a_statistic_of_ones_own_is_used_with_its_state_eager_and_compiled(family: Any) -> None:
    torch._dynamo.reset()
    statistic = family(10.0)
    ten, plain = step_of(statistic), step_of(WEIGHED[family])
    compiled = torch.compile(ten, fullgraph=True, backend="aot_eager")
    z, parameter = torch.randn(20, 3), torch.tensor([0.4, 0.6, 0.8])
    for weight in (10.0, 3.0):
        statistic.weight = weight  # a compiled program uses it as it is when it runs
        expected = [weight * t for t in gradients_of(plain, z, parameter)]
        for function in (ten, compiled):
            torch.testing.assert_close(gradients_of(function, z, parameter), expected)


@pytest.mark.parametrize("family", [WeighedByGradients, WeighedByTerms])
def test_objects_of_one_class_are_not_mixed_up_when_compiled(family: Any) -> None:
    torch._dynamo.reset()
    one = family(2.0)
    other = copy.deepcopy(one)
    third = pickle.loads(pickle.dumps(one))
    other.weight, third.weight = 5.0, 7.0
    assert len({statistic.key for statistic in (one, other, third, copy.copy(one))}) == 4
    x = torch.rand(20, 3)

    @torch.compile(backend="aot_eager")
    def loss(x: Tensor, statistic: Statistic) -> Tensor:
        return bs.batch_shaping(x, bs.Normal(0.5, 0.2), 0, statistic=statistic)

    expected = bs.batch_shaping(x, bs.Normal(0.5, 0.2), 0, statistic=WEIGHED[family])
    for statistic in (one, other, third, one):
        torch.testing.assert_close(loss(x, statistic), statistic.weight * expected)


def test_a_statistic_made_while_compiling_is_the_one_that_is_used() -> None:
    torch._dynamo.reset()
    x, prior = torch.rand(20, 3), bs.Normal(0.5, 0.2)
    loss = torch.compile(
        lambda x: bs.batch_shaping(x, prior, 0, statistic=WeighedByGradients(10.0)), backend="aot_eager"
    )
    torch.testing.assert_close(loss(x), 10 * bs.batch_shaping(x, prior, 0))


def test_a_program_whose_statistic_is_gone_says_so() -> None:
    with pytest.raises(RuntimeError, match="statistic nothing#0 of a compiled program is gone"):
        ClosedFormStatistic.by_key("nothing#0")


def shifted_normal(shift: float) -> type[bs.Normal]:
    class Shifted(bs.Normal):
        @staticmethod
        def prepare(parameters: Any, dtype: torch.dtype, **options: bool) -> Any:
            loc, scale = parameters
            return bs.Normal.prepare((loc + shift, scale), dtype, **options)

    return Shifted


def test_priors_of_the_same_name_are_not_mixed_up_when_compiled() -> None:
    torch._dynamo.reset()
    x = torch.rand(20, 3)
    families = [shifted_normal(shift) for shift in (0.5, 2.0)]
    for family, shift in zip(families, (0.5, 2.0), strict=True):
        loss = torch.compile(lambda x, f=family: bs.batch_shaping(x, f(0.1, 1.0), 0), backend="aot_eager")
        torch.testing.assert_close(loss(x), bs.batch_shaping(x, bs.Normal(0.1 + shift, 1.0), 0))


def test_a_prior_that_redefines_its_cdf_only_is_used_by_it() -> None:
    class Moved(bs.Normal):
        def cdf(self, value: Tensor) -> Tensor:
            return super().cdf(value - 1)

    x = torch.randn(20, 3)
    for statistic in ("cramer_von_mises", "anderson_darling"):
        found = bs.batch_shaping(x, Moved(0.0, 1.0), 0, statistic=statistic)
        expected = bs.batch_shaping(x, bs.Normal(1.0, 1.0), 0, statistic=statistic)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# Modules when compiled

OWNED: dict[str, Callable[[], td.Distribution]] = {
    "numbers": lambda: bs.Normal(0.3, 1.0),
    "learned Beta": lambda: bs.Beta(nn.Parameter(torch.tensor(0.6)), torch.tensor(0.4)),
    "Laplace": lambda: td.Laplace(nn.Parameter(torch.tensor(0.6)), torch.tensor(0.4)),
    "Kumaraswamy": lambda: td.Kumaraswamy(nn.Parameter(torch.tensor(0.6)), torch.tensor(0.4)),
    "transformed": lambda: td.TransformedDistribution(
        td.Normal(nn.Parameter(torch.tensor(0.0)), torch.tensor(1.0)),
        [td.AffineTransform(0.2, nn.Parameter(torch.tensor(0.7))), td.SigmoidTransform()],
    ),
}


@pytest.mark.parametrize(("name", "history"), [*((name, 0) for name in OWNED), ("learned Beta", 2)])
def test_a_compiled_step_with_the_module_is_the_eager_one(name: str, history: int) -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = bs.BatchShapingLoss(OWNED[name](), 0, history=history)
        step = lambda z, module=module: module(torch.sigmoid(z))  # noqa: E731
        step = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        parameters = list(module.parameters())
        # Evaluation is another program, which without a closed form is the same but for its gradients.
        for training in [True] * 4 + [False] * (name in ("numbers", "learned Beta")):
            z = torch.randn(20, 3, requires_grad=True)
            with torch.set_grad_enabled(training):
                loss = step(z)
            results.append([loss.detach()])
            if training:
                found = torch.autograd.grad(loss, [z, *parameters])
                results[-1] += found
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, found[1:], strict=True):
                        parameter -= 5 * gradient.sign()  # far out of the range, now and then
    half = len(results) // 2
    torch.testing.assert_close(results[half:], results[:half])


# What else a process may have set

MODES = {
    "the meta device and half precision": "torch.device('meta'), default_dtype(torch.bfloat16)",
    "inference mode and double precision": "torch.inference_mode(), default_dtype(torch.float64)",
}
# Everything on the floors of numbers and of the loss, as one list of tensors.
EVERYTHING = """
import contextlib, sys
import torch, torch.distributions as td
from torch import nn

@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)

{imported}
x = torch.rand(64, 3, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
tied = (x * 10).round() / 10
mask = x > 0.2
learned = nn.Parameter(torch.tensor([0.6, 0.5, 0.7]))
foreign = td.Laplace(torch.tensor(0.2), torch.tensor(0.7))
modules = []

def results():
    from batchshaping.statistics.order import order_statistics, ranks
    from batchshaping.statistics import STATISTICS
    from batchshaping.statistics.epps_pulley import EppsPulley
    from batchshaping.batch_shaping_loss import Prior, gbas_loss
    from batchshaping.cdf_beta import get_beta_cdf_factory
    from batchshaping.cdf_normal import get_normal_cdf
    from batchshaping.cdf_relaxedbernoulli import get_relaxed_bernoulli_cdf, get_relaxed_bernoulli_pdf
    found = [bs.betainc(2.0, 3.0, x), bs.betaincinv(2.0, 3.0, x)]
    found += [*order_statistics(x), *order_statistics(x.double())]
    found += [ranks(order_statistics(tied.T).values, 64, ties=True)]
    found += [get_beta_cdf_factory(False, False, 2.0, 6.0).apply(x), get_normal_cdf(x, 0.2, 0.7)]
    found += [get_relaxed_bernoulli_cdf(x, 0.2, 0.7), get_relaxed_bernoulli_pdf(x, 0.2, 0.7)]
    found += [gbas_loss(x, Prior.SYMBETA, 0.6, dim=1)]
    found += [gbas_loss(x, prior, 0.6, 0.4, dim=1) for prior in Prior if prior != Prior.SYMBETA]
    priors = [bs.Beta(0.6, 0.4), bs.SymBeta(0.3), bs.RelaxedBernoulli(0.3, 0.7), bs.Normal(0.123, 0.4)]
    priors += [bs.Beta(learned, 0.4)]
    for prior in priors:
        found += [prior.cdf(x), prior.icdf(x), prior.log_prob(x), prior.log_cdf(x), prior.log_sf(x)]
    for prior in [*priors, foreign]:
        for name in STATISTICS:
            if name == "epps_pulley" and not isinstance(prior, td.Normal):
                continue
            for options in ({{}}, {{"mask": mask}}, {{"ties": True}}, {{"logits": True}}):
                found.append(bs.batch_shaping(tied, prior, 0, statistic=name, **options))
    found.append(bs.batch_shaping(x, bs.Normal(0.2, 0.7), 0, statistic=EppsPulley(2.0, 9)))
    if not modules:
        modules.extend([
            bs.BatchShapingLoss(bs.Beta(learned, 0.4), 0, history=2),
            bs.BatchShapingLoss(bs.Beta(torch.full((3,), 0.6, device="cpu"), 0.4), 0),
            bs.BatchShapingLoss(foreign, 0),
        ])
    found += [module(x) for module in modules]
    return found

def gradients():
    y = x.clone().requires_grad_()
    losses = [bs.betainc(2.0, 3.0, y).sum(), *(module(y) for module in modules)]
    for prior in (bs.Beta(0.6, 0.4), bs.Beta(learned, 0.4), bs.Normal(0.1, 0.4)):
        losses += [bs.batch_shaping(y, prior, 0), prior.log_cdf(y).sum(), prior.log_prob(y).sum()]
    return torch.autograd.grad(sum(losses), (y, learned))
"""


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_of_the_process_changes_no_number_and_poisons_no_cache(mode: str) -> None:
    # The first call of a fresh process is the one within the mode; the package is imported within it too.
    within = textwrap.indent("import batchshaping as bs", "    ")
    code = EVERYTHING.format(imported=f"with {MODES[mode]}:\n{within}")
    code += f"""
with {MODES[mode]}:
    first = results()
after = results()
assert len(first) == len(after) > 100
for k, (one, other) in enumerate(zip(first[:-3] + first[-2:], after[:-3] + after[-2:])):
    assert one.device.type == other.device.type == "cpu", k
    assert one.dtype == other.dtype and torch.equal(one, other), (k, one, other)
gradients()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
