"""Laws of the memory of past batches, by brute force."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor

import batchshaping as bs
from batchshaping.losses.history import Memory

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
    with pytest.raises(ValueError, match=r"history holds arrays of shape \(3,\), received \(5,\)"):
        loss(torch.rand(4, 5))


def test_a_negative_history_is_refused() -> None:
    with pytest.raises(ValueError, match="history must be a number of batches, received -1"):
        module(history=-1)


@pytest.mark.parametrize("history", [True, 1.5, None, "2"])
def test_a_history_that_is_no_whole_number_is_refused(history: object) -> None:
    with pytest.raises(TypeError, match=f"history must be a whole number of batches, received {history!r}"):
        module(history=history)


def test_a_memory_keeps_as_many_batches_as_asked() -> None:
    memory = Memory(3)
    for k in range(5):
        memory.remember(torch.full((2, 1), float(k)), None)
    assert [v[0, 0].item() for v in memory.values] == [4.0, 3.0, 2.0]


# What is not remembered


@pytest.mark.parametrize("remembered", [0, 1])
def test_a_mask_that_empties_an_array_of_the_current_batch_is_refused(remembered: int) -> None:
    loss, batch = module(history=2), torch.rand(4, 3)
    for _ in range(remembered):
        loss(batch)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[:, 1] = False
    with pytest.raises(ValueError, match=r"mask leaves an array without samples along dim=0 .* \(4, 3\)"):
        loss(batch, mask)
    with pytest.raises(ValueError, match=r"no samples along dim=0 of x with shape \(0, 3\)"):
        loss(batch[:0])
    assert loss.memory is not None and len(loss.memory.values) == remembered


def test_a_batch_with_a_nan_is_not_remembered() -> None:
    loss = module(history=1)
    first, broken, third = batches(3)
    broken[2, 1] = torch.nan
    loss(first)
    assert loss(broken).isnan().tolist() == [False, True, False]
    torch.testing.assert_close(loss(third), among(third, [first]))


def test_a_masked_nan_is_remembered_as_what_is_masked() -> None:
    loss, plain = module(history=1), module(history=1)
    first, second = batches(2)
    broken = torch.cat([first, torch.full((1, 3), torch.nan, dtype=torch.float64)])
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[4] = False
    torch.testing.assert_close(loss(broken, mask), plain(first))
    torch.testing.assert_close(loss(second), plain(second))


def test_where_a_nan_cannot_be_read_its_array_counts_for_nothing() -> None:
    # As on another device than the CPU, in a compiled program.
    torch._dynamo.reset()
    loss = module(history=1)
    compiled = torch.compile(loss, backend="aot_eager")
    first, broken, third = batches(3)
    broken[2, 1] = torch.nan
    compiled(first)
    assert compiled(broken).isnan().tolist() == [False, True, False]
    found = compiled(third)
    torch.testing.assert_close(found[[0, 2]], among(third, [broken])[[0, 2]])
    torch.testing.assert_close(found[1], among(third, [])[1])


def test_a_batch_that_raised_an_error_is_not_remembered() -> None:
    loss = bs.BatchShapingLoss(bs.Beta(0.6, 0.4), dim=0, history=2, statistic="epps_pulley")
    with pytest.raises(ValueError, match="needs a Normal prior"):
        loss(torch.rand(4, 3))
    assert loss.memory is not None and not loss.memory.values


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: torch.func.vmap(f)], ids=["grad", "vmap"])
def test_torch_func_reads_the_memory_and_is_refused_where_it_would_write_it(transform) -> None:
    loss = bs.BatchShapingLoss(bs.Normal(MEAN, DEVIATION), dim=0, history=2)
    first, second = batches(2)
    loss(first)
    operand = second if transform is torch.func.grad else second.unsqueeze(0)
    with pytest.raises(RuntimeError, match=r"inside of torch\.func transforms, call eval\(\) on the loss"):
        transform(loss)(operand)
    loss.eval()
    found = transform(loss)(operand)
    expected = second.clone().requires_grad_()
    value = loss(expected)
    if transform is torch.func.grad:
        torch.testing.assert_close(found, torch.autograd.grad(value, expected)[0])
    else:
        torch.testing.assert_close(found, value.detach().unsqueeze(0))


# Its state


def filled(history: int = 3, masked: bool = True) -> tuple[bs.BatchShapingLoss, list[Tensor]]:
    loss = module(history=history)
    seen = [torch.rand(n, 3, dtype=torch.float64) for n in (4, 2, 5)]
    for batch in seen:
        mask = torch.ones_like(batch, dtype=torch.bool)
        mask[0, 1] = not masked
        loss(batch, mask if masked else None)
    return loss, seen


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_the_state_is_tensors_that_safetensors_takes(tmp_path: Path, masked: bool) -> None:
    loss, _ = filled(masked=masked)
    state = loss.state_dict()
    assert state.keys() == {"memory.values", "memory.sizes", "memory.counts"}
    save_file(state, tmp_path / "state.safetensors")
    resumed = module(history=3)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for batch in batches(3):
        torch.testing.assert_close(resumed(batch), loss(batch), rtol=0, atol=0)


def test_the_state_of_an_empty_memory_empties_another(tmp_path: Path) -> None:
    loss, _ = filled()
    save_file(module(history=3).state_dict(), tmp_path / "state.safetensors")
    loss.load_state_dict(load_file(tmp_path / "state.safetensors"))
    (batch,) = batches(1)
    torch.testing.assert_close(loss(batch), among(batch, []))


def test_a_shorter_memory_takes_the_newest_of_a_longer_one() -> None:
    loss, seen = filled(masked=False)
    shorter = module(history=2)
    shorter.load_state_dict(loss.state_dict())
    (batch,) = batches(1)
    torch.testing.assert_close(shorter(batch), among(batch, seen[1:]))


def test_states_of_before_hold_lists() -> None:
    first, second = batches(2)
    resumed = module(history=2)
    resumed.load_state_dict(
        {"memory._extra_state": {"values": [second.T, first.T], "counts": [None, torch.tensor([4, 4, 4])]}}
    )
    (batch,) = batches(1)
    torch.testing.assert_close(resumed(batch), among(batch, [second, first]))


def test_a_state_without_a_memory_is_refused_by_name_and_leaves_it_as_it_is() -> None:
    loss, seen = filled(masked=False)
    with pytest.raises(RuntimeError, match=r'Missing key.*"memory\.values"'):
        loss.load_state_dict({})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"memory\.more"'):
        loss.load_state_dict({**loss.state_dict(), "memory.more": torch.zeros(1)})
    loss.load_state_dict({}, strict=False)
    (batch,) = batches(1)
    torch.testing.assert_close(loss(batch), among(batch, seen[::-1]))


def test_the_memory_moves_with_the_module() -> None:
    loss, seen = filled(masked=False)
    loss.float()
    assert loss.memory is not None
    assert all(values.dtype == torch.float32 for values in loss.memory.values)
    (batch,) = batches(1)
    torch.testing.assert_close(loss(batch), among(batch, seen), rtol=1e-5, atol=1e-6)
    loss.to("meta")
    assert all(values.is_meta for values in loss.memory.values)


def test_the_memory_is_no_parameter_and_no_buffer() -> None:
    loss, _ = filled()
    assert not list(loss.parameters()) and not list(loss.buffers())
