"""MSViTs: the ViT where all is fine, one function in two computations, gradients that can be trusted."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from small_vits import SIZE, VITS, decide, made, of_timm, of_torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import batchshaping as bs
from batchshaping.gates.cost import MultiplyAdds
from batchshaping.mixed_scale import attention, packed
from batchshaping.mixed_scale.msvit import PackedMSViT
from batchshaping.mixed_scale.packed import PACKINGS

SIDES = [2, 4]


def random_decisions(msvit: bs.MSViT, images: Tensor, share: float = 0.5, seed: int = 0) -> Tensor:
    uniform = torch.rand(
        len(images), msvit.cut(images).regions, generator=torch.Generator().manual_seed(seed)
    )
    return (uniform < share).float()


# All fine


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", VITS)
def test_where_all_regions_are_fine_the_outputs_are_those_of_the_vit(name: str, side: int) -> None:
    vit, msvit, images = made(name, side)
    with torch.no_grad(), bs.gates_forced(msvit, share=1.0):
        expected = vit(images)
        torch.testing.assert_close(msvit(images), expected, atol=1e-5, rtol=1e-5)
        for packing in PACKINGS:
            assert torch.equal(msvit.inference_twin(packing)(images), expected)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_medium_patch16_gap_240"]
)
def test_named_models_of_timm_can_be_wrapped(name: str) -> None:
    vit = timm.create_model(name, depth=1, img_size=96, num_classes=3).eval()
    msvit, images = bs.MSViT(vit).eval(), torch.randn(2, 3, 96, 96)
    with torch.no_grad(), bs.gates_forced(msvit, share=1.0):
        assert torch.equal(msvit.inference_twin()(images), vit(images))


def test_the_vit_is_used_and_not_copied() -> None:
    vit, msvit, images = made("timm")
    expected = vit(images)
    assert msvit.vit is vit
    assert {name for name in msvit.state_dict() if not name.startswith("gate.")} == {
        f"vit.{name}" for name in vit.state_dict()
    }
    msvit(images)
    assert torch.equal(vit(images), expected)


# Two computations


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", VITS)
def test_masked_and_packed_tokens_give_the_same(name: str, side: int, packing: str) -> None:
    _, msvit, images = made(name, side)
    twin = msvit.inference_twin(packing)
    for share in (0.0, 0.3, 0.7):
        decide(msvit, random_decisions(msvit, images, share))
        with torch.no_grad():
            expected = msvit(images)
            torch.testing.assert_close(twin(images), expected, atol=1e-5, rtol=1e-5)
            grids = [module.grid_features(images) for module in (msvit, twin)]
        torch.testing.assert_close(*grids, atol=2e-5, rtol=1e-5)
        # Gates with a gradient, whose attention is another one.
        decide(msvit, random_decisions(msvit, images, share).requires_grad_())
        torch.testing.assert_close(msvit(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["timm", "average", "torchvision"])
def test_a_token_that_is_off_is_attended_by_none(name: str) -> None:
    _, msvit, images = made(name)
    decisions = random_decisions(msvit, images)
    for requires_grad in (False, True):
        decide(msvit, decisions.clone().requires_grad_(requires_grad))
        images = images.clone().requires_grad_()
        tokens: dict[str, Tensor] = {}

        def keep(_: Any, inputs: tuple[Tensor, ...], tokens: dict[str, Tensor] = tokens) -> None:
            tokens.setdefault("first", inputs[0]).retain_grad()

        block = next(iter(msvit.tokenizer.vit.blocks))
        with block.register_forward_pre_hook(keep):
            msvit(images).square().sum().backward()
        reached = tokens["first"].grad.abs().sum(dim=2) > 0  # type: ignore[union-attr]
        prefix = len(msvit.tokenizer.vit.prefix())
        on = packed_scale(msvit, images, decisions, prefix)
        assert torch.equal(reached, on)


def packed_scale(msvit: bs.MSViT, images: Tensor, decisions: Tensor, prefix: int) -> Tensor:
    from batchshaping.mixed_scale.tokens import scale_of_tokens

    return scale_of_tokens(decisions, msvit.cut(images), prefix) != 0


@pytest.mark.parametrize("name", ["timm", "average", "torchvision"])
def test_an_inference_copy_is_packed_and_stands_alone(name: str) -> None:
    _, msvit, images = made(name)
    copied = bs.conditional_inference(msvit)
    within = bs.conditional_inference(nn.Sequential(msvit, nn.Softmax(dim=1)).train())
    assert isinstance(copied, PackedMSViT) and isinstance(within[0], PackedMSViT)
    msvit.eval()
    with torch.no_grad():
        for seed in range(3):
            with bs.gates_forced(msvit, share=0.5, seed=seed), bs.gates_forced(copied, share=0.5, seed=seed):
                expected = msvit(images)
                torch.testing.assert_close(copied(images), expected, atol=1e-5, rtol=1e-5)
                assert torch.equal(bs.gate_decisions(copied)[0], bs.gate_decisions(msvit)[0])
                assert torch.equal(bs.count_macs(copied, images), bs.count_macs(msvit, images))
        torch.testing.assert_close(within(images), msvit(images).softmax(dim=1), atol=1e-5, rtol=1e-5)
        before = copied(images)
        for parameter in msvit.parameters():
            parameter.zero_()
        assert torch.equal(copied(images), before)


def test_training_works_after_inference_mode() -> None:
    for name in ("timm", "average", "torchvision"):
        _, msvit, images = made(name)
        with torch.inference_mode():
            msvit(images), msvit.inference_twin()(images)
        msvit.train()(images).square().sum().backward()
        assert msvit.gate.to_logits[0].weight.grad is not None


def test_each_example_is_computed_alone_whatever_the_batch() -> None:
    _, msvit, images = made("timm")
    decisions = random_decisions(msvit, images)
    decisions[3] = 1
    decide(msvit, decisions)
    with torch.no_grad():
        for packing in PACKINGS:
            twin = msvit.inference_twin(packing)
            together = twin(images)
            for n in range(len(images)):
                decide(msvit, decisions[n : n + 1])
                torch.testing.assert_close(twin(images[n : n + 1])[0], together[n], atol=1e-5, rtol=1e-5)
            decide(msvit, decisions)


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_empty_batch_has_no_outputs(packing: str) -> None:
    _, msvit, images = made("timm")
    with torch.no_grad():
        assert msvit.inference_twin(packing)(images[:0]).shape == msvit(images[:0]).shape == (0, 5)


def test_packed_sequences_on_cuda_go_to_the_attention_of_variable_lengths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a stand-in for the kernel, which takes sequences one by one by their bounds."""
    calls = []

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, *longest: int, scale: Any
    ) -> Tensor:
        assert starts.dtype == torch.int32 and torch.equal(starts, ends) and starts[-1] == len(q)
        assert longest == (starts.diff().max(),) * 2 and all(x.is_contiguous() for x in (q, k, v))
        bounds = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        calls.append(scale)
        parts = []
        for first, end in bounds:
            heads = (x[first:end].transpose(0, 1) for x in (q, k, v))
            parts.append(F.scaled_dot_product_attention(*heads, scale=scale).transpose(0, 1))
        return torch.cat(parts)

    _, msvit, images = made("timm")
    decide(msvit, random_decisions(msvit, images))
    msvit = msvit.bfloat16()
    twin = msvit.inference_twin()
    with torch.no_grad():
        expected = twin(images.bfloat16())
        monkeypatch.setattr(packed, "_variable_length_attention", lambda device: varlen)
        torch.testing.assert_close(twin(images.bfloat16()), expected, atol=0.02, rtol=0.02)
        assert len(calls) == 2
        # In single precision there is no such kernel.
        twin.float()(images)
        assert len(calls) == 2


# Training


def trained(steps: int) -> tuple[bs.MSViT, Tensor, Tensor]:
    """A small MSViT that has learned to find a small pattern, whose gates chance decides for."""
    torch.manual_seed(0)
    checkerboard = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)
    stripes = torch.tensor([1.0, -1.0, 1.0, -1.0]).expand(4, 4)
    patterns = 2 * torch.stack([checkerboard, -checkerboard, stripes, stripes.T])

    def batch(n: int) -> tuple[Tensor, Tensor]:
        labels, images = torch.randint(0, 4, (n,)), 0.3 * torch.randn(n, 1, 24, 24)
        for image, label in zip(images, labels, strict=True):
            top, left = (4 * torch.randint(0, 6, (2,))).tolist()
            image[0, top : top + 4, left : left + 4] += patterns[label]
        return images, labels

    vit = of_timm(img_size=24, in_chans=1, num_heads=4, depth=3, num_classes=4)
    msvit = bs.MSViT(vit, coarse=8)
    optimizer = torch.optim.AdamW(msvit.vit.parameters(), 4e-3)
    for step in range(steps):
        images, labels = batch(48)
        with bs.gates_forced(msvit, share=0.5, seed=step):
            loss = F.cross_entropy(msvit(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return msvit.eval().requires_grad_(False), *batch(24)


def effects(msvit: bs.MSViT, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each gate in each example: whether it is open, its gradient, and what flipping it changes."""
    decisions = random_decisions(msvit, images, 0.3).requires_grad_()

    def losses(decisions: Tensor) -> Tensor:
        decide(msvit, decisions)
        return F.cross_entropy(msvit(images), labels, reduction="none")

    (gradient,) = torch.autograd.grad(losses(decisions).sum(), decisions)
    decisions.requires_grad_(False)
    change = torch.zeros_like(decisions)
    for gate in range(decisions.shape[1]):
        flipped = decisions.clone()
        flipped[:, gate] = 1 - flipped[:, gate]
        sign = flipped[:, gate] - decisions[:, gate]
        change[:, gate] = sign * (losses(flipped) - losses(decisions))
    return decisions, gradient, change


def percentile(values: Tensor) -> float:
    return values.abs().quantile(0.99).item()


@pytest.mark.parametrize("steps", [0, 60])
def test_the_gradient_of_a_gate_is_about_what_flipping_it_changes(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = trained(steps)
    decisions, gradient, change = effects(*examples)
    assert percentile(change) / 5 < percentile(gradient) < 5 * percentile(change)
    off = decisions == 0
    assert percentile(change[off]) / 5 < percentile(gradient[off]) < 5 * percentile(change[off])
    assert torch.corrcoef(torch.stack([gradient[off], change[off]]))[0, 1] > 0.8
    if steps:
        # With the derivative itself, as it is without the bound, this does not hold.
        monkeypatch.setattr(attention, "gated_softmax", derivative)
        _, gradient, _ = effects(*examples)
        assert percentile(gradient[off]) > 10 * percentile(change[off])


def derivative(scores: Tensor, gates: Tensor) -> Tensor:
    e = (scores - scores.masked_fill(gates == 0, -torch.inf).amax(dim=-1, keepdim=True)).exp() * gates
    return e / e.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("name", VITS)
def test_every_weight_gets_a_gradient(name: str) -> None:
    vit, msvit, images = made(name)
    vit(images).square().sum().backward()
    learned = {name for name, p in vit.named_parameters() if p.grad is not None}
    msvit.zero_grad()
    for parameter in msvit.parameters():
        parameter.grad = None
    msvit.train()
    (msvit(images).square().mean() + sum(p.mean() for p in bs.gate_probabilities(msvit))).backward()
    # No weight is unused, as DistributedDataParallel asks for.
    assert {name for name, p in vit.named_parameters() if p.grad is not None} == learned
    assert all(p.grad is not None and p.grad.isfinite().all() for p in msvit.gate.parameters())
    assert sum(p.grad.abs().sum() for p in msvit.gate.parameters() if p.grad is not None) > 0


def test_a_loss_on_the_outputs_alone_moves_the_gates() -> None:
    for name in ("timm", "average", "torchvision"):
        _, msvit, images = made(name)
        msvit.train()(images).square().sum().backward()
        grads = [p.grad.abs().sum().item() for p in msvit.gate.parameters() if p.grad is not None]
        assert len(grads) == len([*msvit.gate.parameters()]) and max(grads) > 0


def test_gates_are_shaped_with_a_prior_for_each_region() -> None:
    _, msvit, images = made("timm")
    msvit.train()
    shape = bs.GeneralizedBatchShapingLoss(4, hyperprior=bs.Beta(3, 7))
    optimizer = torch.optim.Adam([*msvit.gate.parameters(), *shape.parameters()], 0.02)
    images = torch.randn(64, 2, SIZE, SIZE)
    losses = []
    for _ in range(30):
        msvit(images)
        (probabilities,) = bs.gate_probabilities(msvit)
        loss = shape(probabilities)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_mixed_precision_trains_and_infers(name: str, dtype: torch.dtype) -> None:
    _, msvit, images = made(name)
    decide(msvit, random_decisions(msvit, images))
    with torch.no_grad():
        expected = msvit(images)
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(msvit(images).float(), expected, atol=0.1, rtol=0.1)
            for packing in PACKINGS:
                twin = msvit.inference_twin(packing)
                torch.testing.assert_close(twin(images).float(), expected, atol=0.1, rtol=0.1)
    msvit.gate._forced = ()
    msvit.train()
    with torch.autocast("cpu", dtype):
        loss = msvit(images).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in msvit.gate.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_precision_computes(dtype: torch.dtype) -> None:
    for name in ("timm", "any size", "torchvision"):
        _, msvit, images = made(name)
        decide(msvit, random_decisions(msvit, images))
        with torch.no_grad():
            expected = msvit(images)
            msvit, images = msvit.to(dtype), images.to(dtype)
            tolerance = (
                {"atol": 0.1, "rtol": 0.1} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
            )
            for module in (msvit, msvit.inference_twin()):
                assert module(images).dtype == dtype
                torch.testing.assert_close(module(images).float(), expected, **tolerance)


def test_blocks_computed_again_in_the_backward_pass_give_the_same_gradient() -> None:
    gradients = []
    for recomputes in (False, True):
        vit, msvit, images = made("timm")
        vit.set_grad_checkpointing(recomputes)
        msvit.train()
        torch.manual_seed(1)
        msvit(images).square().sum().backward()
        gradients.append([p.grad for p in msvit.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


# Reading gates, copies, cost


def test_gates_are_read_as_those_of_any_network() -> None:
    _, msvit, images = made("timm")
    msvit.train()(images)
    assert [p.shape for p in bs.gate_probabilities(msvit)] == [(6, 4)]
    (decisions,) = bs.gate_decisions(msvit)
    assert bs.l0_penalty(bs.straight_through_decisions(msvit)).item() == pytest.approx(
        decisions.mean().item()
    )
    assert bs.gate_statistics(decisions).mean_open == pytest.approx(decisions.mean().item())
    with bs.gates_forced(msvit, share=0.0):
        msvit(images)
    assert bs.gate_decisions(msvit)[0].sum() == 0


def test_copies_and_pickles_work_alone() -> None:
    for name in ("timm", "torchvision"):
        _, msvit, images = made(name)
        with torch.no_grad():
            expected = msvit(images)
            file = io.BytesIO()
            torch.save(msvit, file)
            file.seek(0)
            for other in (
                copy.deepcopy(msvit),
                pickle.loads(pickle.dumps(msvit)),
                torch.load(file, weights_only=False),
                copy.deepcopy(msvit.inference_twin()),
            ):
                torch.testing.assert_close(other(images), expected, atol=1e-5, rtol=1e-5)
                other.vit.get_parameter("class_token" if name == "torchvision" else "cls_token").zero_()
                assert not torch.equal(other(images), expected)
            assert torch.equal(msvit(images), expected)


def truly_spent(module: nn.Module, image: Tensor) -> float:
    """Multiply-adds of an example by PyTorch's own count, without the kernels that it does not see."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(image)
    torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", VITS)
def test_what_an_example_costs_is_what_packed_tokens_cost(name: str, side: int) -> None:
    vit, msvit, images = made(name, side)
    twin, images = msvit.requires_grad_(False).inference_twin(), images[:4]
    cost = MultiplyAdds.measure(msvit, images)
    assert cost.dense == truly_spent(vit, images[:1])
    decisions = random_decisions(msvit, images, share=0.4)
    decisions[0], decisions[1] = 0, 1
    spent = []
    for n in range(len(images)):
        decide(msvit, decisions[n : n + 1])
        spent.append(truly_spent(twin, images[n : n + 1]))
    torch.testing.assert_close(cost.per_example([decisions]).double(), torch.tensor(spent).double())
    decide(msvit, decisions)
    for module in (msvit, twin):
        torch.testing.assert_close(bs.count_macs(module, images).double(), torch.tensor(spent).double())


def test_the_cost_of_probabilities_is_the_expectation_and_its_gradient_what_a_flip_costs() -> None:
    _, msvit, images = made("any size")
    cost = MultiplyAdds.measure(msvit, images)
    regions = msvit.cut(images).regions
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(1, regions, generator=generator, dtype=torch.float64)
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * regions)
    chance = torch.where(every == 1, probabilities, 1 - probabilities).prod(dim=1)
    expected = chance @ cost.per_example([every])
    torch.testing.assert_close(cost.per_example([probabilities])[0], expected)
    decisions = random_decisions(msvit, images).double().requires_grad_()
    cost.per_example([decisions]).sum().backward()
    for gate in range(regions):
        on, off = decisions.detach().clone(), decisions.detach().clone()
        on[:, gate], off[:, gate] = 1, 0
        change = cost.per_example([on]) - cost.per_example([off])
        torch.testing.assert_close(decisions.grad[:, gate], change)  # type: ignore[index]


# What is refused


def refused(make: Any, *parts: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"\A[^\n]+\Z") as error:
        make()
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("deit_tiny_distilled_patch16_224", "timm.models.deit.VisionTransformerDistilled"),
        ("eva02_tiny_patch14_224", "timm.models.eva.Eva"),
        ("vit_small_patch16_rope_224", "timm.models.eva.Eva"),
        ("naflexvit_base_patch16_gap", "timm.models.naflexvit.NaFlexVit"),
        ("beit_base_patch16_224", "timm.models.beit.Beit"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
        ("resnet18", "timm.models.resnet.ResNet"),
    ],
)
def test_models_with_another_forward_pass_are_refused_by_name(name: str, class_name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    refused(lambda: bs.MSViT(model), "VisionTransformer of timm or torchvision", class_name)


def test_parts_that_have_no_place_are_refused() -> None:
    own = of_timm()
    own.forward = lambda x: x  # type: ignore[method-assign]
    refused(lambda: bs.MSViT(own, 8), "with a forward pass of its own")
    refused(lambda: bs.MSViT(of_timm(patch_drop_rate=0.1), 8), "patch dropout")
    unfused = of_timm()
    unfused.blocks[1].attn.fused_attn = False
    refused(lambda: bs.MSViT(unfused, 8), "not fused")
    replaced = of_timm()
    replaced.blocks[1] = nn.Identity()
    refused(lambda: bs.MSViT(replaced, 8), "torch.nn.modules.linear.Identity")
    stem = of_torchvision()
    stem.conv_proj = nn.Sequential(nn.Conv2d(2, 24, 4, 4))
    refused(lambda: bs.MSViT(stem, 8), "a patch embedding that is a Sequential")
    refused(lambda: bs.MSViT(of_timm(), 12), "2 or 4 patches, 8 or 16 pixels, received 12")
    refused(lambda: bs.MSViT(of_timm()), "received 32")
    refused(lambda: bs.MSViT(of_timm(), 8).inference_twin("spam"), "flat, buckets, padded", "'spam'")
    refused(lambda: bs.MSViT(of_timm(), 8, bias=float("inf")), "bias must be finite")


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        ("timm", (2, 2, 16, 20), "16 x 16 pixels, as the ViT takes them, received 16 x 20"),
        ("any size", (2, 2, 16, 18), "multiples of 4 x 4 pixels, as the ViT takes them, received 16 x 18"),
        ("torchvision", (2, 2, 20, 20), "16 x 16 pixels, as the ViT takes them, received 20 x 20"),
        ("timm", (2, 3, 16, 16), "(N, 2, H, W), received (2, 3, 16, 16)"),
        ("timm", (2, 16, 16), "received (2, 16, 16)"),
    ],
)
def test_images_that_the_vit_does_not_take_are_refused(name: str, shape: tuple[int, ...], part: str) -> None:
    _, msvit, _ = made(name)
    for module in (msvit, msvit.inference_twin()):
        refused(lambda module=module: module(torch.randn(shape)), part)


def test_inference_is_for_evaluation() -> None:
    _, msvit, images = made("timm")
    twin = msvit.inference_twin()
    assert twin.inference_twin() is twin and twin.inference_twin("padded").packing == "padded"
    twin.train()
    refused(lambda: twin(images), "call eval()")


def test_what_is_not_a_number_stays_so() -> None:
    _, msvit, images = made("timm")
    images[1] = torch.nan
    with torch.no_grad():
        for module in (msvit, msvit.inference_twin()):
            found = module(images).isnan()
            assert found[1].all() and not found[[0, 2, 3, 4, 5]].any()


def test_no_library_is_loaded_before_a_vit_is_there() -> None:
    code = (
        "import sys, batchshaping as bs, torch\n"
        "try:\n    bs.MSViT(torch.nn.Linear(1, 1))\n"
        "except ValueError as error:\n    assert 'torch.nn.modules.linear.Linear' in str(error)\n"
        "print([m for m in ('timm', 'torchvision') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
