"""Laws of the memory of past batches, by brute force."""

from __future__ import annotations

import io

import pytest
import torch
from scipy import stats
from torch import Tensor

import batchshaping as bs
from batchshaping.memory import Memory

MEAN, DEVIATION = 0.5, 0.2


def among(current: Tensor, past: list[Tensor]) -> Tensor:
    """The mean over the current samples of (F - rank / (N + 1))^2, ranked among all, a loss each column."""
    together = torch.cat([current, *past])
    ranks = torch.as_tensor(stats.rankdata(together.detach().numpy(), axis=0))
    cdf = torch.as_tensor(stats.norm.cdf(together.detach().numpy(), MEAN, DEVIATION))
    return ((cdf - ranks / (len(together) + 1)) ** 2)[: len(current)].mean(0)


def module(**options: object) -> bs.BatchShapingLoss:
    return bs.BatchShapingLoss(bs.Normal(MEAN, DEVIATION), dim=0, reduction="none", **options)  # type: ignore[arg-type]


def batches(count: int, samples: int = 4, arrays: int = 3) -> list[Tensor]:
    return [torch.rand(samples, arrays, dtype=torch.float64) for _ in range(count)]


def test_samples_are_ranked_among_the_last_batches_and_only_those() -> None:
    loss, seen = module(history=2), batches(5)
    for k, batch in enumerate(seen):
        torch.testing.assert_close(loss(batch), among(batch, seen[max(k - 2, 0) : k]))


def test_batches_may_differ_in_size() -> None:
    loss = module(history=3)
    seen = [torch.rand(n, 3, dtype=torch.float64) for n in (2, 7, 1)]
    for k, batch in enumerate(seen):
        torch.testing.assert_close(loss(batch), among(batch, seen[:k]))


def test_the_gradient_is_that_of_the_current_samples_with_the_past_held() -> None:
    past, current = batches(2)
    loss = module(history=1)
    loss(past)
    loss.eval()
    assert torch.autograd.gradcheck(loss, current.requires_grad_())
    assert past.grad is None


@pytest.mark.parametrize("statistic", ["cramer_von_mises", "anderson_darling", "wasserstein", "epps_pulley"])
def test_every_statistic_takes_a_memory_and_masks(statistic: str) -> None:
    loss = module(history=2, statistic=statistic)
    masked = module(history=2, statistic=statistic)
    for batch in batches(4, samples=6):
        mask = torch.ones_like(batch, dtype=torch.bool)
        mask[4:] = False
        torch.testing.assert_close(masked(batch, mask), loss(batch[:4]))


def test_evaluation_reads_the_memory_and_does_not_write_it() -> None:
    first, second, third = batches(3)
    loss = module(history=1)
    loss(first)
    loss.eval()
    for batch in (second, third):
        torch.testing.assert_close(loss(batch), among(batch, [first]))


def test_the_state_brings_the_memory_back() -> None:
    seen = batches(4)
    loss, resumed = module(history=2), module(history=2)
    for batch in seen[:3]:
        loss(batch)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(resumed(seen[3]), loss(seen[3]))


def test_remembered_values_hold_no_graph_and_follow_no_later_change() -> None:
    loss = module(history=1)
    batch = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    held = batch.detach().clone()
    loss(batch * 1.0)
    with torch.no_grad():
        batch.zero_()
    assert loss.memory is not None
    (remembered,) = loss.memory.values
    assert not remembered.requires_grad
    torch.testing.assert_close(remembered, held.T)


def test_without_history_there_is_no_memory_and_no_state_of_it() -> None:
    assert module().memory is None
    assert list(module().state_dict()) == []


def test_arrays_that_change_are_refused_with_both_shapes() -> None:
    loss = module(history=1)
    loss(torch.rand(4, 3))
    with pytest.raises(ValueError, match=r"memory holds arrays of shape \(3,\), received \(5,\)"):
        loss(torch.rand(4, 5))


def test_a_negative_history_is_refused() -> None:
    with pytest.raises(ValueError, match="history must be a number of batches, received -1"):
        module(history=-1)


def test_a_memory_keeps_as_many_batches_as_asked() -> None:
    memory = Memory(3)
    for k in range(5):
        memory.remember(torch.full((2, 1), float(k)), None)
    assert [v[0, 0].item() for v in memory.values] == [4.0, 3.0, 2.0]
