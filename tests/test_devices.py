"""Nothing is read from a device that is not the CPU, and compiled statistics are those of eager mode.

Tensors on the meta device have no values: whatever would stop a GPU to read one raises there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import batchshaping as bs
from batchshaping.statistics import STATISTICS, EppsPulley, Statistic

CASES = [
    (statistic, prior)
    for statistic, prior in itertools.product(
        STATISTICS, ("Normal", "RelaxedBernoulli", "Beta", "learned Beta", "learned Normal")
    )
    if statistic != "epps_pulley" or prior.endswith("Normal")
]
PRIORS: dict[str, Callable[[Tensor], bs.Beta | bs.Normal | bs.RelaxedBernoulli]] = {
    "Normal": lambda _: bs.Normal(0.5, 0.1),
    "RelaxedBernoulli": lambda _: bs.RelaxedBernoulli(0.5, 0.3),
    "Beta": lambda _: bs.Beta(0.6, 0.4),
    "learned Beta": lambda p: bs.Beta(p, 0.4),
    "learned Normal": lambda p: bs.Normal(p, 0.1),
}


@pytest.mark.parametrize(("statistic", "prior"), CASES)
def test_no_value_is_read_from_another_device(statistic: str, prior: str) -> None:
    for logits, ties, masked in itertools.product((False, True), repeat=3):
        x = torch.empty(8, 5, device="meta", requires_grad=True)
        parameter = torch.empty(5, device="meta", requires_grad=True)
        mask = torch.empty(8, 5, device="meta", dtype=torch.bool) if masked else None
        loss = bs.batch_shaping(
            x, PRIORS[prior](parameter), 0, statistic=statistic, logits=logits, ties=ties, mask=mask
        )
        loss.backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert (parameter.grad is not None) == prior.startswith("learned")


def step_of(prior: str, statistic: str | Statistic) -> Callable[[Tensor, Tensor], Tensor]:
    def step(z: Tensor, parameter: Tensor) -> Tensor:
        return bs.batch_shaping(torch.sigmoid(z), PRIORS[prior](parameter), 0, statistic=statistic)

    return step


@pytest.mark.parametrize(
    ("statistic", "prior"),
    [
        ("cramer_von_mises", "Beta"),
        ("anderson_darling", "learned Beta"),
        ("wasserstein", "learned Beta"),
        ("epps_pulley", "learned Normal"),
        (EppsPulley(5.0, 33), "Normal"),
    ],
)
def test_compiled_statistics_are_those_of_eager_mode(statistic: str | Statistic, prior: str) -> None:
    torch._dynamo.reset()
    step = step_of(prior, statistic)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        z = torch.linspace(-2, 2, 60).reshape(20, 3).requires_grad_()
        parameter = torch.tensor([0.4, 0.6, 0.8], requires_grad=True)
        loss = function(z, parameter)
        loss.backward()
        results.append((loss.detach(), z.grad, parameter.grad))
    torch.testing.assert_close(results[1], results[0])
