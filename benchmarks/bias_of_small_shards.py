"""What the loss of each rank's own samples does, against that of all ranks' samples together.

Ranks are simulated: their shards are rows of one batch. Run as ``python benchmarks/bias_of_small_shards.py``.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import batchshaping as bs

PRIOR = bs.Beta(0.6, 0.4)
SAMPLES = 8
RANKS = (1, 4, 32, 128)
# Values in each row of a table, whatever the number of ranks.
VALUES = 2**18


def per_rank(x: Tensor, reduction: str = "mean") -> Tensor:
    """The loss of each rank's samples by themselves: x of shape (ranks, samples, gates)."""
    return bs.batch_shaping(x, PRIOR, 1, reduction=reduction)


def together(x: Tensor, reduction: str = "mean") -> Tensor:
    """The loss of the samples of all ranks as one batch."""
    return bs.batch_shaping(x, PRIOR, (0, 1), reduction=reduction)


def beta(a: float, b: float) -> bs.Beta:
    """A source of samples in double precision, in which those near 1 stay apart from it."""
    return bs.Beta(*torch.tensor([a, b], dtype=torch.float64))


def row(name: str, ranks: int, *numbers: str) -> None:
    print(f"{name:38}{ranks:>5}{ranks * SAMPLES:>9}" + "".join(f"{n:>12}" for n in numbers))


def losses() -> None:
    print(f"\nLoss, the mean over {VALUES} values in gates with {SAMPLES} samples a rank")
    print(f"{'samples of':38}ranks  samples   each rank    together  infinitely many")
    for name, source in [
        ("the prior", beta(0.6, 0.4)),
        ("Beta(0.4, 0.6): too rarely open", beta(0.4, 0.6)),
        ("Beta(2, 2): undecided", beta(2, 2)),
    ]:
        p = (torch.arange(2**14, dtype=torch.float64) + 0.5) / 2**14
        limit = (PRIOR.cdf(source.icdf(p)) - p).square().mean()
        for ranks in RANKS:
            x = source.sample((ranks, SAMPLES, VALUES // (ranks * SAMPLES)))
            row(name, ranks, f"{per_rank(x):.5f}", f"{together(x):.5f}", f"{limit:.5f}")
            name = ""


def by_class(x: Tensor, ranks: int) -> Tensor:
    """Samples dealt out so that each rank has neighbours in size: gates that follow the class of an image."""
    shards = x.sort(0).values.reshape(ranks, SAMPLES, -1)
    order = torch.rand(ranks, shards.shape[-1]).argsort(0).unsqueeze(1)
    return shards.gather(0, order.expand(shards.shape)).flatten(0, 1)


def gradients() -> None:
    print(
        f"\nGradient in the logits with {SAMPLES} samples a rank: its average over the ranks, against that of"
    )
    print("all samples together (cosine of the angle between them, and ratio of their lengths)")
    print(f"{'samples of':38}ranks  samples      cosine      length")
    for name, source, dealt in [
        ("the prior", beta(0.6, 0.4), None),
        ("the prior, another class on each rank", beta(0.6, 0.4), by_class),
        ("Beta(2, 2)", beta(2, 2), None),
        ("Beta(2, 2), another class on each rank", beta(2, 2), by_class),
    ]:
        for ranks in RANKS[1:]:
            x = source.sample((ranks * SAMPLES, VALUES // (ranks * SAMPLES)))
            x = x if dealt is None else dealt(x, ranks)
            logits = x.logit(1e-12).reshape(ranks, SAMPLES, -1).requires_grad_()
            own, whole = (
                torch.autograd.grad(loss(logits.sigmoid(), "none").sum(), logits)[0].flatten(0, 1)
                for loss in (per_rank, together)
            )
            own = own / ranks
            cosine = torch.nn.functional.cosine_similarity(own, whole, dim=0).mean()
            row(name, ranks, f"{cosine:.3f}", f"{own.norm() / whole.norm():.2f}")
            name = ""


def training(steps: int = 1500) -> None:
    ranks, gates = 128, 4
    low, high = PRIOR.icdf(torch.tensor([1 / (SAMPLES + 1), SAMPLES / (SAMPLES + 1)], dtype=torch.float64))
    print(f"\n{ranks * SAMPLES} values a gate, {gates} gates, after {steps} steps of Adam; in each step the")
    print(f"values are dealt out anew to {ranks} ranks. Under the prior 1 in {SAMPLES + 1} is on either side")
    print(f"{'':24}{'loss together':>14}{f'below {low:.3f}':>14}{f'above {high:.3f}':>14}")
    start = 2 * torch.rand(ranks * SAMPLES, gates, dtype=torch.float64) - 1
    rows = {"samples of the prior": beta(0.6, 0.4).sample(start.shape), "start": start.sigmoid()}
    for name, loss in [("loss of each rank", per_rank), ("loss together", together)]:
        logits = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            dealt = torch.randperm(len(logits))
            loss(logits.sigmoid()[dealt].reshape(ranks, SAMPLES, gates)).backward()
            optimizer.step()
            schedule.step()
        rows[name] = logits.detach().sigmoid()
    for name, x in rows.items():
        left, right = (x < low).double().mean(), (x > high).double().mean()
        print(f"{name:24}{together(x.unsqueeze(0)):>14.6f}{left:>14.1%}{right:>14.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    print(f"{PRIOR}, seed {arguments.seed}, torch {torch.__version__}")
    print("N samples of the prior have the mean loss 1 / (6 (N + 1)): ", end="")
    print(", ".join(f"{1 / (6 * (SAMPLES * ranks + 1)):.5f}" for ranks in RANKS))
    losses()
    gradients()
    training()


if __name__ == "__main__":
    main()
