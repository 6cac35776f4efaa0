"""Packed linear layers give what plain ones give, for any number of rows, and whatever MKL can do."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchshaping as bs
from batchshaping.gates import packed
from batchshaping.gates.inference import fold_and_pack
from batchshaping.gates.packed import PackedLinear


def make(bias: bool = True, features: int = 48, outputs: int = 80) -> tuple[nn.Linear, PackedLinear]:
    torch.manual_seed(0)
    layer = nn.Linear(features, outputs, bias=bias).requires_grad_(False)
    return layer, PackedLinear(layer)


def assert_equal(given: Tensor, layer: nn.Linear, x: Tensor) -> None:
    exact = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    torch.testing.assert_close(given.double(), exact, rtol=1e-5, atol=1e-5)


class Counted:
    """An operation, and how often it was called."""

    def __init__(self, operation: Callable[..., Tensor]) -> None:
        self.operation = operation
        self.calls = 0

    def __call__(self, *args: Any) -> Tensor:
        self.calls += 1
        return self.operation(*args)


@pytest.fixture
def mkl(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counted]:
    """MKL's two operations, counted; where there is no MKL, others that give what they give."""
    if packed._HAS_LINEAR:
        reorder, linear = packed._reorder_linear, packed._linear
    else:

        def reorder(weight: Tensor, rows: int) -> Tensor:
            return weight.clone()

        def linear(x: Tensor, made: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
            return F.linear(x, made, bias)

    counted = {"_reorder_linear": Counted(reorder), "_linear": Counted(linear)}  # type: ignore[arg-type]
    for name, operation in counted.items():
        monkeypatch.setattr(packed, name, operation)
    monkeypatch.setattr(packed, "_HAS_LINEAR", True)
    return counted


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("features", "outputs"), [(48, 80), (1, 1), (3, 1000), (1024, 7)])
def test_one_packing_serves_every_number_of_rows(
    mkl: dict[str, Counted], features: int, outputs: int, bias: bool
) -> None:
    layer, fast = make(bias, features, outputs)
    for rows in (0, 1, 2, 3, 4, 5, 16, 95, 128, 197, 255, 256, 257, 1000, 2048, 2049):
        before = mkl["_linear"].calls
        for shape in ((rows, features), (1, rows, features)):
            x = torch.randn(shape)
            assert_equal(fast(x), layer, x)
        assert (mkl["_linear"].calls > before) == (rows in PackedLinear.ROWS)
    x = torch.randn(features, 6).T  # not contiguous
    assert_equal(fast(x), layer, x)
    assert mkl["_reorder_linear"].calls == 1


def test_without_mkl_it_is_the_plain_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_HAS_LINEAR", False)
    layer, fast = make()
    for rows in (1, 95):
        x = torch.randn(rows, 48)
        assert torch.equal(fast(x), layer(x))
    assert not fast._packed


def off_by_one(x: Tensor, made: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    return F.linear(x, weight, bias) + 1


def right_for_the_packed_number_alone(
    x: Tensor, made: Tensor, weight: Tensor, bias: Tensor | None, rows: int
) -> Tensor:
    y = F.linear(x, weight, bias)
    return y if rows == PackedLinear.PACKED_FOR else y.fill_(torch.nan)


def with_other_arguments(x: Tensor, made: Tensor) -> Tensor:
    raise AssertionError("is never called with five arguments")


def that_fails(x: Tensor, made: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    raise RuntimeError("not packed for so many rows")


@pytest.mark.parametrize(
    "linear", [off_by_one, right_for_the_packed_number_alone, with_other_arguments, that_fails]
)
def test_an_operation_that_is_not_as_expected_is_not_used(
    monkeypatch: pytest.MonkeyPatch, mkl: dict[str, Counted], linear: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(packed, "_linear", linear)
    layer, fast = make()
    for rows in (5, 95, PackedLinear.PACKED_FOR):
        x = torch.randn(rows, 48)
        assert torch.equal(fast(x), layer(x))
    assert fast.packed is None
    assert mkl["_reorder_linear"].calls == 1


def test_other_precisions_and_gradients_are_those_of_the_plain_layer(mkl: dict[str, Counted]) -> None:
    layer, fast = make()
    x = torch.randn(95, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype is torch.bfloat16
        assert torch.equal(fast(x), layer(x))
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(fast.to(dtype)(x.to(dtype)), layer.to(dtype)(x.to(dtype)))
    layer, fast = make()
    one, other = (x.clone().requires_grad_() for _ in range(2))
    gradients = [torch.autograd.grad(module(of).sum(), of)[0] for module, of in ((layer, one), (fast, other))]
    assert torch.equal(gradients[0], gradients[1])
    assert mkl["_linear"].calls == 0


def test_programs_are_exported_for_any_number_of_rows() -> None:
    layer, fast = make()
    rows = {0: torch.export.Dim("rows")}
    exported = torch.export.export(fast, (torch.randn(95, 48),), dynamic_shapes=(rows,)).module()
    for number in (2, 95, 3000):
        x = torch.randn(number, 48)
        torch.testing.assert_close(exported(x), layer(x))


def test_what_is_not_finite_stays_so() -> None:
    _, fast = make()
    for value in (torch.nan, torch.inf):
        x = torch.randn(95, 48)
        x[3, 5] = value
        assert not fast(x)[3].isfinite().any()
        assert fast(x)[4:].isfinite().all()
    with torch.no_grad():
        weight = fast.state_dict()["weight"].clone().index_fill_(0, torch.tensor(7), torch.nan)
    fast.load_state_dict({"weight": weight}, strict=False)
    assert fast(torch.randn(95, 48))[:, 7].isnan().all()


def through_torch_save(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": through_torch_save,
    "to": lambda module: module.double().float(),
}


@pytest.mark.parametrize("how", COPIES)
@torch.inference_mode()
def test_copies_give_the_same_and_hold_nothing_packed(mkl: dict[str, Counted], how: str) -> None:
    layer, fast = make()
    x = torch.randn(95, 48)
    expected = fast(x)
    assert fast.packed is not None
    other = COPIES[how](fast)
    assert not other._packed
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    assert other.state_dict().keys() == layer.state_dict().keys()
    assert str(other).startswith("PackedLinear(48, 80, bias=True")


def test_weights_that_are_loaded_are_used(mkl: dict[str, Counted]) -> None:
    _, fast = make()
    x = torch.randn(95, 48)
    fast(x)
    other = nn.Linear(48, 80)
    for assign in (False, True):
        fast.load_state_dict(other.state_dict(), assign=assign)
        with torch.no_grad():
            assert_equal(fast(x), other, x)
        other = nn.Linear(48, 80)


def test_linear_layers_are_packed_where_they_are_called_as_such() -> None:
    def hook(module: nn.Module, inputs: Any) -> None:
        pass

    hooked = nn.Linear(4, 4)
    hooked.register_forward_pre_hook(hook)
    normalized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    twice = nn.Linear(4, 4)
    model = nn.Sequential(twice, hooked, normalized, bs.ChannelGate(4, 4), twice, nn.Dropout()).eval()
    before = {type(layer) for layer in model[3].modules()}
    made: Any = fold_and_pack(copy.deepcopy(model).requires_grad_(False))
    assert isinstance(made[0], PackedLinear) and made[4] is made[0]
    assert type(made[1]) is nn.Linear and type(made[5]) is nn.Identity
    assert not isinstance(made[2], PackedLinear)
    assert {type(layer) for layer in made[3].modules()} == before
    assert made.state_dict().keys() == model.state_dict().keys()
