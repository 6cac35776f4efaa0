"""The loss in torch.compile, torch.func, autocast and checkpoints, and on devices that must not be read."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import batchshaping as bs

F64 = torch.float64
FAMILIES: dict[str, tuple[Callable[..., td.Distribution], tuple[float, ...]]] = {
    "Beta": (bs.Beta, (0.6, 0.4)),
    "SymBeta": (bs.SymBeta, (0.6,)),
    "RelaxedBernoulli": (bs.RelaxedBernoulli, (0.2, 0.25)),
    "Normal": (bs.Normal, (0.6, 0.2)),
}
ARRAYS = 5
each_family = pytest.mark.parametrize("family", FAMILIES)
each_kind = pytest.mark.parametrize("kind", ["fixed", "shared", "one an array"])


def values(*shape: int, dtype: torch.dtype = F64, device: str = "cpu") -> Tensor:
    return (0.02 + 0.96 * torch.rand(shape, dtype=dtype)).to(device)


def parameters_of(family: str, kind: str, dtype: torch.dtype = F64, device: str = "cpu") -> list[Tensor]:
    """Learned parameters, one for all arrays or one for each; none if the prior is fixed."""
    if kind == "fixed":
        return []
    shape = () if kind == "shared" else (ARRAYS,)
    return [
        (p * (1 + 0.2 * torch.rand(shape, dtype=dtype))).to(device).requires_grad_()
        for p in FAMILIES[family][1]
    ]


def prior_of(family: str, parameters: list[Tensor] | tuple[Tensor, ...]) -> td.Distribution:
    make, example = FAMILIES[family]
    return make(*parameters) if parameters else make(*example)


def loss_of(family: str, dim: int | tuple[int, ...] | None = 0, **settings: Any) -> Callable[..., Tensor]:
    """The loss as a function of the values and of the prior's parameters, if they are learned."""

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        return bs.batch_shaping(x, prior_of(family, parameters), dim, **settings).sum()

    return loss


def tied(x: Tensor) -> Tensor:
    """Every value twice."""
    return x[: len(x) // 2].repeat(2, *[1] * (x.ndim - 1))


def with_gradients(function: Callable[..., Tensor], *operands: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The value of a function and its gradients in the operands, which are left as they were."""
    leaves = [t.detach().clone().requires_grad_() for t in operands]
    value = function(*leaves)
    return value.detach(), list(torch.autograd.grad(value, leaves))


# torch.compile


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


compiled = pytest.mark.usefixtures("_fresh_compiler")


def assert_compiled_equals_eager(
    function: Callable[..., Tensor], *operands: Tensor, backend: str = "aot_eager", **tolerance: float
) -> None:
    expected = with_gradients(function, *operands)
    found = with_gradients(torch.compile(function, backend=backend, fullgraph=True), *operands)
    torch.testing.assert_close(found, expected, **tolerance)


@compiled
@each_family
@each_kind
@pytest.mark.parametrize("variant", ["plain", "masked and tied"])
def test_a_compiled_step_equals_an_eager_one(family: str, kind: str, variant: str) -> None:
    weight, x = torch.randn(6, ARRAYS, dtype=F64), torch.randn(20, 6, dtype=F64)
    mask = None
    if variant != "plain":
        x, mask = tied(x), torch.rand(20, ARRAYS) < 0.7
        mask[0] = True

    def step(x: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        gates = (x @ weight).sigmoid()
        prior = prior_of(family, parameters)
        shaping = bs.batch_shaping(gates, prior, 0, mask=mask, ties=variant != "plain")
        return (gates - 0.5).square().mean() + 0.75 * shaping

    assert_compiled_equals_eager(step, x, weight, *parameters_of(family, kind), rtol=1e-12, atol=1e-14)


@compiled
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("dim", [None, (0, 2)], ids=str)
def test_compiled_reductions_and_dims_equal_eager_ones(reduction: str, dim: tuple[int, ...] | None) -> None:
    assert_compiled_equals_eager(loss_of("Beta", dim, reduction=reduction), values(8, ARRAYS, 3))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_single_and_half_precision_equal_eager_ones(dtype: torch.dtype) -> None:
    assert_compiled_equals_eager(loss_of("Beta"), values(20, ARRAYS).to(dtype))


@compiled
@pytest.mark.parametrize("statistic", ["anderson_darling", "wasserstein", "epps_pulley"])
@pytest.mark.parametrize("logits", [False, True], ids=["values", "logits"])
def test_compiled_statistics_equal_eager_ones(statistic: str, logits: bool) -> None:
    family = "Normal" if statistic == "epps_pulley" else "Beta"
    x = values(20, ARRAYS)
    loss = loss_of(family, statistic=statistic, logits=logits)
    operands = (x.logit() if logits else x, *parameters_of(family, "one an array"))
    assert_compiled_equals_eager(loss, *operands, rtol=1e-12, atol=1e-14)


@compiled
def test_a_compiled_foreign_prior_equals_an_eager_one() -> None:
    two = [torch.tensor(0.4, dtype=F64), torch.tensor(0.3, dtype=F64)]

    def loss(x: Tensor, *given: Tensor) -> Tensor:
        return bs.batch_shaping(x, td.Laplace(*given, validate_args=False), 0)

    assert_compiled_equals_eager(loss, values(20, ARRAYS), *two)


@compiled
def test_a_compiled_step_follows_parameters_and_batch_sizes_as_they_change() -> None:
    loss = loss_of("Beta")
    step = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for samples, a in [(20, 2.0), (7, 3.0), (33, 0.5)]:
        operands = values(samples, ARRAYS), torch.tensor(a, dtype=F64), torch.tensor(6.0, dtype=F64)
        torch.testing.assert_close(with_gradients(step, *operands), with_gradients(loss, *operands))


@compiled
@pytest.mark.parametrize("kind", ["learned", "generalized"])
def test_training_a_compiled_module_equals_training_an_eager_one(kind: str) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(6, ARRAYS)
            self.loss: nn.Module = bs.GeneralizedBatchShapingLoss(ARRAYS)
            if kind == "learned":
                prior = bs.Beta(nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.full((ARRAYS,), 6.0)))
                self.loss = bs.BatchShapingLoss(prior, 0)

        def forward(self, x: Tensor) -> Tensor:
            return self.loss(self.gate(x).sigmoid())

    eager = Gated().double()
    twin = copy.deepcopy(eager)
    for model, run in [(eager, eager), (twin, torch.compile(twin, backend="aot_eager", fullgraph=True))]:
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            run(torch.randn(20, 6, dtype=F64)).backward()
            optimizer.step()
    torch.testing.assert_close(twin.state_dict(), eager.state_dict())


@compiled
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_step_compiled_by_inductor_equals_an_eager_one() -> None:
    weight, x = torch.randn(6, ARRAYS), torch.randn(20, 6)

    def step(x: Tensor, weight: Tensor, a: Tensor) -> Tensor:
        return bs.batch_shaping((x @ weight).sigmoid(), bs.Beta(a, 0.4), 0)

    a = torch.full((ARRAYS,), 0.6)
    assert_compiled_equals_eager(step, x, weight, a, backend="inductor", rtol=1e-5, atol=1e-7)


# torch.func


@each_family
@pytest.mark.parametrize("mapped", ["x", "parameters", "both", "both, arrays in x"])
def test_vmap_and_vmap_of_grad_equal_loops(family: str, mapped: str) -> None:
    size, samples = 4, 12
    kept = (ARRAYS,) if "arrays" in mapped else ()
    x = values(size, samples, *kept) if mapped != "parameters" else values(samples, *kept)
    given = [
        torch.as_tensor(p) * (1 + 0.2 * torch.rand(() if mapped == "x" else (size,), dtype=F64))
        for p in FAMILIES[family][1]
    ]
    in_dims = (None if mapped == "parameters" else 0, *[None if mapped == "x" else 0] * len(given))
    loss = loss_of(family)
    both = torch.func.grad_and_value(loss, argnums=tuple(range(1 + len(given))))
    gradients, found = torch.func.vmap(both, in_dims)(x, *given)
    torch.testing.assert_close(torch.func.vmap(loss, in_dims)(x, *given), found)
    for k in range(size):
        operands = [t if d is None else t[k] for t, d in zip((x, *given), in_dims, strict=True)]
        expected, by_operand = with_gradients(loss, *operands)
        torch.testing.assert_close(found[k], expected)
        torch.testing.assert_close([g[k] for g in gradients], by_operand)


@each_family
def test_nested_vmap_equals_one_call(family: str) -> None:
    x = values(3, 4, 12)
    given = [torch.as_tensor(p) * (1 + 0.2 * torch.rand(3, 4, dtype=F64)) for p in FAMILIES[family][1]]
    nested = torch.func.vmap(torch.func.vmap(loss_of(family, None)))(x, *given)
    torch.testing.assert_close(nested, bs.batch_shaping(x, prior_of(family, given), -1, reduction="none"))


@pytest.mark.parametrize("ties", [False, True], ids=["consecutive", "ties"])
def test_gradients_by_sample_with_a_mask_equal_a_loop(ties: bool) -> None:
    x, mask = tied(values(12, ARRAYS)).expand(4, 12, ARRAYS).clone(), torch.rand(4, 12, ARRAYS) < 0.7
    mask[:, 0] = True

    def loss(x: Tensor, mask: Tensor) -> Tensor:
        return bs.batch_shaping(x, bs.Beta(0.6, 0.4), 0, mask=mask, ties=ties)

    found = torch.func.vmap(torch.func.grad(loss))(x, mask)
    expected = [with_gradients(lambda x, k=k: loss(x, mask[k]), x[k])[1][0] for k in range(4)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_an_ensemble_by_functional_call_equals_a_loop() -> None:
    models = [nn.Linear(6, ARRAYS).double() for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(models)
    x = torch.randn(20, 6, dtype=F64)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        gates = torch.func.functional_call(models[0], parameters, (x,)).sigmoid()
        return bs.batch_shaping(gates, bs.Beta(0.6, 0.4), 0)

    gradients = torch.func.vmap(torch.func.grad(loss))(stacked)
    for k, model in enumerate(models):
        bs.batch_shaping(model(x).sigmoid(), bs.Beta(0.6, 0.4), 0).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name][k], parameter.grad)


# Autocast


@each_family
@each_kind
def test_under_autocast_gates_in_bf16_are_shaped_in_single_precision(family: str, kind: str) -> None:
    gate, x = nn.Linear(6, ARRAYS), torch.randn(64, 6)
    parameters = parameters_of(family, kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        gates = gate(x).sigmoid()
        loss = bs.batch_shaping(gates, prior_of(family, parameters), 0, ties=True)
    assert gates.dtype == loss.dtype == torch.bfloat16
    # The same from the rounded values outside of autocast: only the result is rounded again.
    single = gates.detach().float().requires_grad_()
    expected = bs.batch_shaping(single, prior_of(family, parameters), 0, ties=True)
    assert torch.equal(loss.detach(), expected.detach().bfloat16())
    by_gates, *found = torch.autograd.grad(loss, [gates, *parameters], retain_graph=True)
    by_single, *by_parameters = torch.autograd.grad(expected, [single, *parameters])
    assert torch.equal(by_gates, by_single.bfloat16())
    torch.testing.assert_close(found, by_parameters, rtol=2**-8, atol=0)
    loss.backward()
    assert gate.weight.grad is not None
    assert bool(gate.weight.grad.isfinite().all())
    assert bool(gate.weight.grad.any())


# Checkpoints


@each_family
@each_kind
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensor hooks", "reentrant"])
def test_a_checkpoint_changes_nothing(family: str, kind: str, reentrant: bool) -> None:
    weight, x = torch.randn(6, ARRAYS, dtype=F64), torch.randn(20, 6, dtype=F64)

    def step(x: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        return bs.batch_shaping((x @ weight).sigmoid(), prior_of(family, parameters), 0)

    operands = [t.requires_grad_() for t in (x, weight, *parameters_of(family, kind))]
    expected = with_gradients(step, *operands)
    loss = checkpoint(step, *operands, use_reentrant=reentrant)
    loss.backward()
    torch.testing.assert_close((loss.detach(), [t.grad for t in operands]), expected)


def test_saved_tensors_can_be_kept_elsewhere() -> None:
    x, loss = values(20, ARRAYS), loss_of("Beta")
    with torch.autograd.graph.save_on_cpu():
        found = with_gradients(loss, x)
    torch.testing.assert_close(found, with_gradients(loss, x))


# Devices whose values cannot be read without stopping them


class NoTransfers(TorchFunctionMode):
    """Refuse what copies from the host to a device and waits for it."""

    COPIES = (torch.tensor, torch.as_tensor, torch.scalar_tensor, Tensor.new_tensor, Tensor.to, Tensor.copy_)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        waits = function in self.COPIES and not (kwargs or {}).get("non_blocking")
        if waits and isinstance(result, Tensor) and result.device.type != "cpu":
            source = args[1] if function is Tensor.copy_ else args[0]
            on_device = isinstance(source, Tensor) and source.device == result.device
            assert on_device and function is not Tensor.new_tensor, (
                f"{function.__name__} copies to the device"
            )
        return result


each_variant = pytest.mark.parametrize(
    ("masked", "ties", "statistic"),
    [
        *((m, t, "cramer_von_mises") for m, t in itertools.product((False, True), repeat=2)),
        (True, True, "anderson_darling"),
    ],
)


def step_on(
    device: str, family: str, kind: str, masked: bool, ties: bool, statistic: str, guard: Any
) -> list[Tensor]:
    """The loss and its gradients on a device, forward and backward inside the guard."""
    x = tied(values(16, ARRAYS, dtype=torch.float32)).to(device).requires_grad_()
    mask = None
    if masked:
        mask = torch.rand(16, ARRAYS) < 0.7
        mask[0] = True
        mask = mask.to(device)
    parameters = parameters_of(family, kind, torch.float32, device)
    with guard:
        prior = prior_of(family, parameters)
        loss = bs.batch_shaping(x, prior, 0, statistic=statistic, mask=mask, ties=ties)
        loss.backward()
    leaves = (x, *parameters)
    return [loss.detach(), *(t.grad for t in leaves if t.grad is not None)]


@each_family
@each_kind
@each_variant
def test_no_value_is_read_and_none_copied(
    family: str, kind: str, masked: bool, ties: bool, statistic: str
) -> None:
    """On the meta device there are no values: whatever reads one fails."""
    found = step_on("meta", family, kind, masked, ties, statistic, NoTransfers())
    assert all(t.device.type == "meta" for t in found)


@pytest.mark.parametrize(("family", "kind"), [("Beta", "fixed"), ("Beta", "shared"), ("Normal", "fixed")])
def test_no_value_is_read_for_quantiles(family: str, kind: str) -> None:
    step_on("meta", family, kind, False, False, "wasserstein", nullcontext())


@contextmanager
def never_synchronizing() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@each_family
@each_kind
@each_variant
def test_cuda_gives_the_same_and_is_never_waited_for(
    family: str, kind: str, masked: bool, ties: bool, statistic: str
) -> None:
    results = []
    for device, guard in [("cpu", nullcontext()), ("cuda", never_synchronizing())]:
        torch.manual_seed(0)
        results.append([t.cpu() for t in step_on(device, family, kind, masked, ties, statistic, guard)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_in_a_cuda_graph_equals_one_outside() -> None:
    x = values(64, ARRAYS, dtype=torch.float32, device="cuda").requires_grad_()
    loss = loss_of("Beta")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        (expected,) = torch.autograd.grad(loss(x), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (found,) = torch.autograd.grad(loss(x), x)
    graph.replay()
    torch.testing.assert_close(found, expected)
