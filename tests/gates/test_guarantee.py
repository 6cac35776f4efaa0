"""A promise about accuracy: its p-value against SciPy and mpmath, and the promise over random splits."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from switched_networks import Switch
from torch import Tensor

from batchshaping.gates.guarantee import (
    SHIFTS,
    Guarantee,
    _left_tail,
    guarantee,
    p_value_of_loss,
)

# The p-value


@pytest.mark.parametrize(
    ("n", "q", "difference", "k"),
    [(100, 0.2, 0.05, 0), (2000, 0.03, 0.01, 5), (10_000, 0.0188, 0.01, 50), (50_000, 0.1, 0.02, 700)],
)
def test_the_tail_is_that_of_scipy(n: int, q: float, difference: float, k: int) -> None:
    m = np.arange(n + 1)
    share = (1 + difference / q) / 2
    expected = (stats.binom.pmf(m, n, q) * stats.binom.cdf(np.floor((k + m) / 2), m, share)).sum()
    assert _left_tail(k, n, q, difference) == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_the_tail_is_that_of_all_outcomes_added_up() -> None:
    """By the definition: the probability of every number of lost and gained examples, with mpmath."""
    n, q, difference = 40, mpmath.mpf("0.3"), mpmath.mpf("0.1")
    lost, gained = (q + difference) / 2, (q - difference) / 2
    for k in (-5, 0, 2):
        expected = mpmath.fsum(
            mpmath.binomial(n, a)
            * mpmath.binomial(n - a, b)
            * lost**a
            * gained**b
            * (1 - lost - gained) ** (n - a - b)
            for a in range(n + 1)
            for b in range(n + 1 - a)
            if a - b <= k
        )
        assert _left_tail(k, n, 0.3, 0.1) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("n", [50, 400, 3000])
@pytest.mark.parametrize("difference", [0.01, 0.05, 0.2])
def test_the_tail_rises_with_the_share_of_disagreements_below_the_mode(n: int, difference: float) -> None:
    """The lemma that makes the bound of that share the worst case."""
    lowest_mode = math.floor((n - 1) * difference)
    for k in {lowest_mode - 1, lowest_mode // 2, 0, -3}:
        if k < lowest_mode:
            tails = [_left_tail(k, n, q, difference) for q in np.linspace(difference, 0.5, 9)]
            assert all(low <= high + 1e-11 for low, high in itertools.pairwise(tails))


def test_more_lost_is_less_certain_and_more_gained_more() -> None:
    of_lost = [p_value_of_loss(lost, 30, 5000, 0.01) for lost in range(0, 90, 5)]
    of_gained = [p_value_of_loss(60, gained, 5000, 0.01) for gained in range(30, 90, 5)]
    assert of_lost == sorted(of_lost) and of_gained == sorted(of_gained, reverse=True)
    assert of_lost[-1] == 1


@pytest.mark.parametrize(
    ("n", "lost", "gained", "alpha", "level"),
    [
        (2000, 0.0101, 0.0001, 0.01, 0.05),
        (2000, 0.03, 0.02, 0.01, 0.2),
        (300, 0.25, 0.15, 0.1, 0.2),
        (60, 0.3, 0.1, 0.2, 0.05),
    ],
)
def test_a_p_value_at_the_boundary_is_at_most_u_with_probability_u(
    n: int, lost: float, gained: float, alpha: float, level: float
) -> None:
    """The exact distribution: every number of lost and gained examples that has any probability."""
    assert lost - gained == pytest.approx(alpha)
    m = np.arange(n + 1)
    of_total = stats.binom.pmf(m, n, lost + gained)
    likely = of_total > 1e-5
    certified = 1 - of_total[likely].sum()
    most = -1
    for total in map(int, m[likely]):

        def fine(count: int, total: int = total) -> bool:
            return p_value_of_loss(count, total - count, n, alpha, level) <= level

        # The p-value rises with the number of lost examples. The largest number that is certified is found
        # from that of the total before, since it is not far.
        while most < total and fine(most + 1):
            most += 1
        while most >= 0 and not fine(most):
            most -= 1
        certified += of_total[total] * stats.binom.cdf(most, total, lost / (lost + gained))
    assert certified <= level
    assert certified >= level / 4 or n < 300, "it is not needlessly cautious"


def test_a_loss_of_half_a_percent_is_certified_to_be_below_one_by_ten_thousand_images() -> None:
    random = np.random.default_rng(0)
    drawn = random.multinomial(10_000, [0.01, 0.005, 0.985], 200)
    certified = [p_value_of_loss(int(a), int(b), 10_000, 0.01) <= 0.05 for a, b, _ in drawn]
    assert np.mean(certified) > 0.9
    # The one-sided loss, whose exact test is binomial, counts no image that is gained.
    assert np.mean(stats.binom.cdf(drawn[:, 0], 10_000, 0.01) <= 0.05) < 0.2


# The promise

POPULATION = 40_000
SPLITS = 150
ALPHA = 0.02


def population(losses: list[float], gains: list[float]) -> tuple[Tensor, Tensor]:
    """Images, right or wrong with the gate open and closed, with logits between the shifts 0, 1, 2, ...

    At shift k the gates of all images below it are closed: of those between two shifts, known numbers are
    lost and gained. All labels are 1.
    """
    each = POPULATION // (len(losses) + 1)
    rows = []
    for k, (lost, gained) in enumerate(zip(losses, gains, strict=True)):
        counts = [round(lost * POPULATION), round(gained * POPULATION)]
        opened = torch.ones(each)
        closed = torch.ones(each)
        closed[: counts[0]] = 0
        opened[counts[0] : sum(counts)] = 0
        rows.append(torch.stack([torch.full((each,), k - 0.5), closed, opened], dim=1))
    rows.append(torch.tensor([[1e3, 1.0, 1.0]]).expand(POPULATION - each * len(losses), -1))
    x = torch.cat(rows)
    return x, torch.ones(len(x), dtype=torch.long)


def risks(x: Tensor, shifts: list[float]) -> dict[float, float]:
    """What each shift loses in the population, exactly."""
    opened, closed = x[:, 2], x[:, 1]
    return {
        shift: (opened - torch.where(x[:, 0] > shift, opened, closed)).double().mean().item()
        for shift in shifts
    }


Promise = Callable[[Tensor, Tensor, list[float]], float]


def promised(x: Tensor, labels: Tensor, shifts: list[float]) -> float:
    return guarantee(Switch(), [(x, labels)], ALPHA, 0.9, shifts).shift


def of_means(x: Tensor, labels: Tensor, shifts: list[float]) -> float:
    """What looks right and promises nothing: the last shift whose mean loss is within the bound."""
    means = risks(x, shifts)
    return next((s for s in reversed(shifts) if means[s] <= ALPHA), -math.inf)


def broken(promise: Promise, losses: list[float], gains: list[float]) -> tuple[int, int]:
    """How often a promise was broken over random splits, and how often something was promised at all."""
    x, labels = population(losses, gains)
    shifts = [float(k) for k in range(len(losses))]
    true = risks(x, shifts) | {-math.inf: 0.0}
    random = torch.Generator().manual_seed(0)
    failures = certified = 0
    for _ in range(SPLITS):
        drawn = torch.randint(len(x), (1500,), generator=random)
        shift = promise(x[drawn], labels[drawn], shifts)
        failures += true[shift] > ALPHA
        certified += shift > -math.inf
    return failures, certified


# Just above the bound from the first shift on; after some that are fine; and far above, by losses alone.
POPULATIONS = {
    "at the boundary": ([0.0301] + [0.0] * 3, [0.01] + [0.0] * 3),
    "disagreements in plenty": ([0.0901] + [0.0] * 3, [0.07] + [0.0] * 3),
    "after some that are fine": ([0.002, 0.003, 0.0171, 0.0, 0.0], [0.001, 0.001, 0.0, 0.0, 0.0]),
    "losses alone": ([0.0] * 3 + [0.0201, 0.0, 0.1], [0.0] * 6),
}


@pytest.mark.parametrize("name", POPULATIONS)
def test_the_promise_is_broken_in_at_most_the_stated_share_of_random_splits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many splits ask for the p-value of the same numbers.
    cached = functools.cache(p_value_of_loss)
    monkeypatch.setattr("batchshaping.gates.guarantee.p_value_of_loss", cached)
    failures, certified = broken(promised, *POPULATIONS[name])
    # With the stated share exactly, more failures would come once in a thousand times.
    assert failures <= stats.binom.ppf(0.999, SPLITS, 0.1)
    assert certified == SPLITS or not ("fine" in name or "alone" in name)


@pytest.mark.parametrize("name", POPULATIONS)
def test_a_comparison_of_means_breaks_it(name: str) -> None:
    failures, _ = broken(of_means, *POPULATIONS[name])
    assert failures > stats.binom.ppf(0.999, SPLITS, 0.1)


# What comes back


def test_the_sequence_ends_at_the_first_failure_and_the_cheapest_certified_shift_is_chosen() -> None:
    x, labels = population([0.002, 0.002, 0.06, 0.001], [0.0, 0.0, 0.0, 0.05])
    found = guarantee(Switch(), [(x, labels)], ALPHA, 0.95, [0.0, 1.0, 2.0, 3.0])
    assert [each.shift for each in found.tested] == [0.0, 1.0, 2.0]
    assert found.certified == found.tested[:2] and found.shift == 1.0 and found.p_value < 0.05
    assert found.multiply_adds == pytest.approx(1 - 0.8 * 0.4) == found.tested[1].multiply_adds
    assert (found.tested[1].lost, found.tested[1].gained) == (160, 0)
    assert found.reference.accuracy - found.tested[1].accuracy == pytest.approx(0.004)
    assert "at most 0.02 lower than with all gates open, with confidence 0.95" in str(found)
    assert "at 68.0% of the multiply-adds" in str(found)


def test_many_shifts_are_tested_in_several_passes_with_the_same_result() -> None:
    x, labels = population([0.001] * 8, [0.0] * 8)
    shifts = [k / 4 for k in range(30)]
    passes = []

    class Loader:
        def __iter__(self):  # type: ignore[no-untyped-def]
            passes.append(1)
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(len(passes)))
            return iter([(x[part], labels[part]) for part in order.split(10_000)])

    found = guarantee(Switch(), Loader(), ALPHA, 0.95, shifts)
    assert len(passes) == 4 and found.shift == 6.5
    at_once = guarantee(Switch(), [(x, labels)], ALPHA, 0.95, shifts)
    counts = [(each.shift, each.lost, each.gained, each.p_value) for each in found.tested]
    assert counts == [(each.shift, each.lost, each.gained, each.p_value) for each in at_once.tested]


def test_without_a_certified_shift_all_gates_are_open_and_it_says_so() -> None:
    x, labels = population([0.0, 0.0], [0.0, 0.0])
    found = guarantee(Switch(), [(x[:50], labels[:50])], 0.01)
    assert found.shift == -math.inf and found.multiply_adds == 1 and not found.certified
    assert [each.shift for each in found.tested] == [SHIFTS[0]]
    assert str(found).startswith("No shift could be certified to lose at most 0.01")


def test_the_loss_may_be_measured_against_the_network_as_trained() -> None:
    """With all gates open it is less accurate here, so that against those nothing is lost."""
    x, labels = population([0.0, 0.002, 0.06], [0.1, 0.0, 0.0])
    shifts = [-1.0, 0.0, 1.0, 2.0]
    against_all_open = guarantee(Switch(), [(x, labels)], ALPHA, 0.95, shifts)
    assert against_all_open.shift == 2.0
    found = guarantee(Switch(), [(x, labels)], ALPHA, 0.95, shifts, against=0.0)
    assert [each.shift for each in found.tested] == [1.0, 2.0] and found.shift == 1.0
    assert (found.reference.shift, found.tested[0].lost, found.tested[0].gained) == (0.0, 80, 0)
    assert "at most 0.02 lower than as trained" in str(found)


def test_a_guarantee_is_kept_as_json() -> None:
    x, labels = population([0.002, 0.1], [0.0, 0.0])
    for bound in (0.02, 0.0001):
        found = guarantee(Switch(), [(x, labels)], bound, shifts=[0.0, math.inf])
        assert Guarantee.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accuracy_loss": 0.0}, r"accuracy_loss must be in \(0, 1\), received 0.0"),
        ({"confidence": 1.0}, r"confidence must be in \(0, 1\), received 1.0"),
        ({"shifts": [1.0, 0.0]}, "ascending numbers, one at least, received"),
        ({"shifts": [0.0, math.nan]}, "ascending numbers"),
        ({"shifts": []}, "ascending numbers"),
        ({"loader": [torch.zeros(4, 3)]}, "images with their labels, received images alone"),
        ({"loader": []}, "at least one image"),
        ({"against": math.nan}, "against must be a shift, received nan"),
        ({"against": 6.0}, "one above that of the reference, 6.0, received none"),
    ],
)
def test_what_cannot_be_promised_is_refused(arguments: dict[str, object], message: str) -> None:
    given = {"loader": [(torch.zeros(4, 3), torch.zeros(4).long())]} | arguments
    with pytest.raises(ValueError, match=message):
        guarantee(Switch(), **given)
