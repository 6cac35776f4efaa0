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
from oracles import FAMILIES, FOREIGN, Family
from sweeps import (
    CASES_OF_ALL,
    ONES_OWN,
    as_logits,
    each_case,
    each_case_of_all,
    each_case_of_all_and_way,
    inside,
    learned,
    loss_of,
    mask_of,
    tied,
    with_gradients,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import batchshaping as bs
from batchshaping.cdfs import betaincinv
from batchshaping.statistics.epps_pulley import EppsPulley

F64 = torch.float64
ARRAYS = 5
BETA = FAMILIES["Beta"]
KINDS = ["fixed", "shared", "one an array"]
each_kind = pytest.mark.parametrize("kind", KINDS)
# Families of torch have parameters of one kind: shared.
each_case_of_all_and_kind = pytest.mark.parametrize(
    ("statistic", "family", "kind"),
    [
        pytest.param(*each.values, kind, id=f"{each.id}-{kind}")
        for each in CASES_OF_ALL
        for kind in (KINDS if each.values[1] in FAMILIES.values() else ["shared"])
    ],
)


def values(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return 0.02 + 0.96 * torch.rand(shape, dtype=dtype)


def parameters_of(family: Family, kind: str, dtype: torch.dtype = F64) -> list[Tensor]:
    """Learned parameters, one for all arrays or one for each; none if the prior is fixed."""
    if kind == "fixed":
        return []
    shape = () if kind == "shared" else (ARRAYS,)
    return [p.detach().to(dtype).requires_grad_() for p in learned(family.examples[0], shape, 0.1)]


def loss_of_kind(statistic: Any, family: Family, **settings: Any) -> Callable[..., Tensor]:
    """The loss as a function of the values and of the prior's parameters, if they are learned."""

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        return loss_of(statistic, family, **settings)(x, *(parameters or family.examples[0]))

    return loss


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
@each_case
def test_a_compiled_step_equals_an_eager_one(statistic: Any, family: Family) -> None:
    """With all that a call can have: layers before it, a mask, ties, logits and a prior for each array."""
    if statistic is ONES_OWN and issubclass(family.prior, bs.Beta):
        return  # outside of the loss, the logarithm of a tail of a Beta reads its parameters
    weight, mask = torch.randn(6, ARRAYS, dtype=F64), mask_of((20, ARRAYS))
    x = torch.randn(10, 6, dtype=F64).repeat(2, 1)  # each value is tied to another
    shaping = loss_of(statistic, family, mask=mask, ties=True, logits=True)

    def step(x: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        return (x @ weight).sigmoid().square().mean() + 0.75 * shaping(x @ weight, *parameters)

    assert_compiled_equals_eager(
        step, x, weight, *parameters_of(family, "one an array"), rtol=1e-12, atol=1e-14
    )


@compiled
@pytest.mark.parametrize(
    ("family", "kind", "dtype", "settings"),
    [
        (BETA, "fixed", F64, {}),
        (FAMILIES["SymBeta"], "fixed", torch.float32, {}),
        (FAMILIES["RelaxedBernoulli"], "fixed", torch.bfloat16, {}),
        (FAMILIES["Normal"], "fixed", F64, {"dim": None, "reduction": "sum"}),
        (BETA, "shared", F64, {"dim": (0, 2), "reduction": "none"}),
        (FAMILIES["Normal"], "fixed", F64, {"statistic": "epps_pulley"}),
        (FAMILIES["Normal"], "shared", F64, {"statistic": EppsPulley(5.0, 41)}),
        (FOREIGN["Laplace"], "shared", F64, {}),
    ],
    ids=itertools.count(),
)
def test_each_option_is_compiled_as_it_is_computed(
    family: Family, kind: str, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    loss = loss_of_kind(**{"statistic": "cramer_von_mises", "family": family, **settings})
    x = values(8, ARRAYS, 3) if "dim" in settings else values(20, ARRAYS)
    operands = (x.to(dtype), *parameters_of(family, kind, dtype))
    assert_compiled_equals_eager(lambda *operands: loss(*operands).sum(), *operands)
    # Evaluation needs no gradient, and another program.
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(*(t.detach() for t in operands))
    torch.testing.assert_close(found, loss(*operands).detach())


@compiled
def test_a_compiled_step_follows_parameters_and_batch_sizes_as_they_change() -> None:
    loss = loss_of("cramer_von_mises", BETA)
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


@each_case_of_all_and_way
def test_vmap_grad_and_jacrev_equal_loops(statistic: Any, family: Family, logits: bool, ties: bool) -> None:
    size, samples = 2, 10
    x = inside(family, family.examples[0], (size, samples, 3), upper=0.8)
    x = as_logits(x) if logits else x
    given = [p.detach() for p in learned(family.examples[0], (size, 3), 0.05)]
    mask = mask_of(x.shape, 1)

    def loss(x: Tensor, mask: Tensor, *given: Tensor) -> Tensor:
        # With ties there is a mask too.
        return loss_of(statistic, family, mask=mask if ties else None, ties=ties, logits=logits)(x, *given)

    wanted = (0, *range(2, 2 + len(given)))
    each = [
        with_gradients(lambda x, *given, k=k: loss(x, mask[k], *given), x[k], *(p[k] for p in given))
        for k in range(size)
    ]
    expected = torch.stack([value for value, _ in each])
    gradients = tuple(torch.stack(by) for by in zip(*(by for _, by in each), strict=True))
    found = torch.func.vmap(torch.func.grad_and_value(loss, argnums=wanted))(x, mask, *given)
    torch.testing.assert_close(found, (gradients, expected), rtol=1e-9, atol=1e-12)
    one = (x[1], mask[1], *(p[1] for p in given))
    by_jacobian = torch.func.jacrev(loss, argnums=wanted)(*one)
    torch.testing.assert_close(by_jacobian, tuple(g[1] for g in gradients), rtol=1e-9, atol=1e-12)
    total = torch.func.grad(lambda *t: torch.func.vmap(loss)(*t).sum(), argnums=wanted)
    torch.testing.assert_close(total(x, mask, *given), gradients, rtol=1e-9, atol=1e-12)
    # Operands that all share, or that are mapped along another dimension.
    for dims in [(None, 0, 0), (0, None, None), (None, None, 0), (2, 1, 1)]:
        in_dims = (*dims, *dims[2:] * (len(given) - 1))
        operands = [
            t[0] if d is None else t.movedim(0, d) for t, d in zip((x, mask, *given), in_dims, strict=True)
        ]
        rows = [
            [t if d is None else t.select(d, k) for t, d in zip(operands, in_dims, strict=True)]
            for k in range(size)
        ]
        expected = torch.stack([loss(*row) for row in rows])
        torch.testing.assert_close(torch.func.vmap(loss, in_dims)(*operands), expected)


@each_case_of_all
def test_nested_vmap_equals_one_call(statistic: Any, family: Family) -> None:
    x = inside(family, family.examples[0], (3, 4, 12))
    given = [p.detach() for p in learned(family.examples[0], (3, 4), 0.05)]
    nested = torch.func.vmap(torch.func.vmap(loss_of(statistic, family, None)))(x, *given)
    torch.testing.assert_close(nested, loss_of(statistic, family, -1, reduction="none")(x, *given))


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


@each_kind
@each_case
def test_under_autocast_gates_in_bf16_are_shaped_in_single_precision(
    statistic: Any, family: Family, kind: str
) -> None:
    gate, x = nn.Linear(6, ARRAYS), torch.randn(64, 6)
    parameters = parameters_of(family, kind, torch.float32)
    shaping = loss_of_kind(statistic, family, ties=True)
    with torch.autocast("cpu", torch.bfloat16):
        gates = gate(x).sigmoid()
        loss = shaping(gates, *parameters)
        # What is in single precision stays so.
        unchanged = shaping(gates.detach().float(), *parameters)
    assert gates.dtype == loss.dtype == torch.bfloat16
    # The same from the rounded values outside of autocast: only the result is rounded again.
    single = gates.detach().float().requires_grad_()
    expected = shaping(single, *parameters)
    torch.testing.assert_close(unchanged, expected)
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


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensor hooks", "reentrant"])
@each_case_of_all_and_kind
def test_a_checkpoint_changes_nothing(statistic: Any, family: Family, kind: str, reentrant: bool) -> None:
    weight, x = torch.randn(6, ARRAYS, dtype=F64), torch.randn(20, 6, dtype=F64)
    parameters = learned(family.examples[0]) if family in FOREIGN.values() else parameters_of(family, kind)
    shaping = loss_of_kind(statistic, family)

    def step(x: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        return shaping((x @ weight).sigmoid(), *parameters)

    operands = [t.requires_grad_() for t in (x, weight, *parameters)]
    expected = with_gradients(step, *operands)
    loss = checkpoint(step, *operands, use_reentrant=reentrant)
    loss.backward()
    torch.testing.assert_close((loss.detach(), [t.grad for t in operands]), expected)


def test_saved_tensors_can_be_kept_elsewhere() -> None:
    x, loss = values(20, ARRAYS), loss_of_kind("cramer_von_mises", BETA)
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


# Kinds of parameters with masks, ties and logits or without.
WAYS = [
    ("fixed", False, False, False),
    ("one an array", True, True, True),
    ("shared", True, False, False),
    ("one an array", False, False, True),
]


def steps_on(
    device: str, statistic: Any, family: Family, guard: Callable[[], Any], ways: int = len(WAYS)
) -> list[list[Tensor]]:
    """The losses and their gradients on a device in some ways, forward and backward inside the guard."""
    found = []
    # The quantiles of Wasserstein take thousands of steps where no value can be read.
    for kind, masked, ties, logits in WAYS[: 2 if statistic == "wasserstein" else ways]:
        x = tied(values(16, ARRAYS, dtype=torch.float32)).to(device).requires_grad_()
        mask = mask_of((16, ARRAYS)).to(device) if masked else None
        parameters = [
            p.detach().to(device).requires_grad_() for p in parameters_of(family, kind, torch.float32)
        ]
        shaping = loss_of_kind(statistic, family, mask=mask, ties=ties, logits=logits)
        with guard():
            loss = shaping(x, *parameters)
            loss.backward()
        found.append([loss.detach(), *(t.grad for t in (x, *parameters))])
    return found


@each_case
def test_no_value_is_read_and_none_copied(
    statistic: Any, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device there are no values: whatever reads one fails."""
    # Quantiles and the points of Epps-Pulley are copied.
    guard = nullcontext if statistic in ("wasserstein", "epps_pulley") else NoTransfers
    # Each step of the search for a quantile is as the one before.
    monkeypatch.setattr(betaincinv, "_UNSEEN_INVERSE_STEPS", 2)
    # A SymBeta differs from a Beta in its parameters alone.
    for found in steps_on("meta", statistic, family, guard, 2 if family is FAMILIES["SymBeta"] else 3):
        assert all(t.device.type == "meta" for t in found)


@contextmanager
def never_synchronizing() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@each_case
def test_cuda_gives_the_same_and_is_never_waited_for(statistic: Any, family: Family) -> None:
    results = []
    for device, guard in [("cpu", nullcontext), ("cuda", never_synchronizing)]:
        torch.manual_seed(0)
        found = steps_on(device, statistic, family, guard)
        results.append([[t.cpu() for t in each] for each in found])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_in_a_cuda_graph_equals_one_outside() -> None:
    x = values(64, ARRAYS, dtype=torch.float32).cuda().requires_grad_()
    loss = loss_of_kind("cramer_von_mises", BETA)
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
