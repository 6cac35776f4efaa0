r"""The cheapest threshold of the gates that keeps a promise about accuracy: Learn then Test.

What a shift of the threshold loses against a reference, such as all gates open, is, for an image,

.. math::
    D = 1[\text{right at the reference}] - 1[\text{right at the shift}] \in \{-1, 0, 1\},

and the promise is :math:`E[D] \le \alpha` on new images. It is kept by testing the hypothesis
:math:`E[D] > \alpha` for one shift after the other, in an order that was fixed before the calibration images
were seen, from the most expensive to the cheapest, and by stopping at the first that is not rejected (fixed
sequence testing). A shift that breaks the promise is returned only if the first of those in the sequence
was rejected wrongly, which a valid p-value allows with probability :math:`\delta` at most.

**The p-value** is that of an exact test for three outcomes. Let A images be lost and B gained of n, and
:math:`S = A - B`. Under the hypothesis the probabilities :math:`p_A - p_B = \alpha` leave one unknown, how
often the two networks disagree, :math:`q = p_A + p_B`. With q known, the p-value would be :math:`f_q(S)`,

.. math::
    f_q(k) = P_q(S \le k) = \sum_{m} \mathrm{Bin}(m; n, q) \,
    P\left(\mathrm{Bin}\left(m, \tfrac{1 + \alpha / q}{2}\right) \le \tfrac{k + m}{2}\right).

A larger difference :math:`p_A - p_B` with the same q makes S larger in distribution, so that the boundary is
the worst case. Of the q, the largest is. The derivative is

.. math::
    \frac{d f_q(k)}{d q} = \frac{n}{2} \left( P(S_{n-1} = k + 1) - P(S_{n-1} = k) \right),

where :math:`S_{n-1}` is S of n - 1 images. For :math:`q \le 1/2` the generating polynomial of D + 1 has real
roots only, so that :math:`S_{n-1} + n - 1` is a sum of 2 (n - 1) independent Bernoulli variables. Such a sum
is unimodal, and the mode of :math:`S_{n-1}` is no lower than :math:`\lfloor (n - 1) \alpha \rfloor` (Darroch
1964). So :math:`f_q(k)` rises with q for each :math:`k < \lfloor (n - 1) \alpha \rfloor`. An upper confidence
bound :math:`\bar q` of q at level :math:`\beta` (Clopper and Pearson) therefore gives a valid p-value (Berger
and Boos 1994),

.. math::
    p = f_{\bar q}(S) + \beta,

and p = 1 where :math:`\bar q > 1/2` or S is not below that number.

What counts in it is the variance of D, which is small where both networks mostly agree. The paper's p-values
of Hoeffding and Bentkus need losses in [0, 1]. For (D + 1) / 2 they know nothing of that variance, and the
one-sided loss 1[D = 1] counts no image that is gained. With 10,000 images of which 1 % are lost and 0.5 %
gained, a loss of at most 1 % is certified at level 0.05 with a probability of 98 % by the test above, of 5 %
by the exact test of the one-sided loss, and of 0 % by theirs for (D + 1) / 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from batchshaping.cdfs.betainc import betainc
from batchshaping.cdfs.betaincinv import betaincinv
from batchshaping.gates.calibration import shift_as_json
from batchshaping.gates.outcomes import Outcome, outcomes

__all__ = ["SHIFTS", "Guarantee", "TriedShift", "described_shift", "guarantee", "p_value_of_loss"]

SHIFTS = tuple(step / 4 for step in range(-24, 25))
"""The shifts that are tested where none are given: from -6 to 6, which no data decided on."""


@dataclass(frozen=True)
class TriedShift:
    """A shift in the sequence.

    Attributes:
        shift: of the threshold.
        multiply_adds: on the calibration set, as a share of those without gates.
        accuracy: on the calibration set.
        lost: how many images are right at the reference, and wrong at this shift.
        gained: how many are wrong at the reference, and right at this shift.
        p_value: of the hypothesis that it loses more than was promised.
    """

    shift: float
    multiply_adds: float
    accuracy: float
    lost: int
    gained: int
    p_value: float


@dataclass(frozen=True)
class Guarantee:
    """A shift of the gates' threshold, with what is promised of it.

    Attributes:
        accuracy_loss: the promise: at this shift the accuracy on new images is at most so much lower than
            at the reference.
        confidence: with this probability, over the choice of the calibration set, the promise holds.
        examples: how many examples that had.
        reference: what the loss is measured against, by default all gates open, whose shift is ``-math.inf``.
        tested: the shifts that were tested, in their order; all of them are certified but the last, where the
            sequence ended early.
    """

    accuracy_loss: float
    confidence: float
    examples: int
    reference: TriedShift
    tested: tuple[TriedShift, ...]

    @property
    def certified(self) -> tuple[TriedShift, ...]:
        """The shifts for which the promise holds, all of them together; none if the first test failed."""
        return tuple(each for each in self.tested if each.p_value <= 1 - self.confidence)

    @property
    def chosen(self) -> TriedShift:
        """The cheapest of them on the calibration set; the reference if there are none."""
        return min((self.reference, *self.certified), key=lambda each: each.multiply_adds)

    @property
    def shift(self) -> float:
        """Of the threshold, for :func:`~batchshaping.gates.shifted.gates_shifted`."""
        return self.chosen.shift

    @property
    def multiply_adds(self) -> float:
        """What is spent at this shift, on the calibration set, as a share of those without gates."""
        return self.chosen.multiply_adds

    @property
    def p_value(self) -> float:
        """Of the hypothesis that this shift breaks the promise; 0 for the reference, which loses nothing."""
        return self.chosen.p_value

    def __str__(self) -> str:
        """What is promised, in a sentence."""
        reference = described_shift(self.reference.shift)
        if self.chosen is self.reference:
            return (
                f"No shift could be certified to lose at most {self.accuracy_loss:.3g} of accuracy with "
                f"confidence {self.confidence:.6g} by {self.examples:,} examples: what remains is the "
                f"network {reference}, at {self.multiply_adds:.1%} of the multiply-adds without gates."
            )
        return (
            f"At shift {self.shift:.6g} the accuracy on new images is at most {self.accuracy_loss:.3g} lower "
            f"than {reference}, with confidence {self.confidence:.6g} (p = {self.p_value:.2g}, "
            f"{self.examples:,} examples), at {self.multiply_adds:.1%} of the multiply-adds without gates."
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON has it, in which infinite shifts are texts."""
        return {
            **asdict(self),
            "reference": _as_json(self.reference),
            "tested": [_as_json(each) for each in self.tested],
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Guarantee:
        """What :meth:`to_dict` was asked of."""
        tested = tuple(_from_json(each) for each in values["tested"])
        return Guarantee(**{**values, "reference": _from_json(values["reference"]), "tested": tested})


def described_shift(shift: float) -> str:
    """A shift in words, to stand after what is said of it.

    Example:
        >>> described_shift(-math.inf), described_shift(0.0), described_shift(1.5)
        ('with all gates open', 'as trained', 'at shift 1.5')
    """
    return {-math.inf: "with all gates open", 0.0: "as trained"}.get(shift, f"at shift {shift:.6g}")


def _as_json(tested: TriedShift) -> dict[str, Any]:
    return {**asdict(tested), "shift": shift_as_json(tested.shift)}


def _from_json(values: Mapping[str, Any]) -> TriedShift:
    return TriedShift(**{**values, "shift": float(values["shift"])})


def guarantee(
    model: nn.Module,
    loader: Iterable[Any],
    accuracy_loss: float = 0.01,
    confidence: float = 0.95,
    shifts: Sequence[float] = SHIFTS,
    *,
    against: float = -math.inf,
) -> Guarantee:
    r"""The cheapest shift of the gates' threshold that loses at most so much accuracy, with a promise.

    .. math::
        P\left( \text{accuracy}(r) - \text{accuracy}(s) \le \alpha \right) \ge 1 - \delta

    on new images, over the choice of the calibration set, with r all gates open or another shift. Shifts are
    tested in their order, from the most expensive one, until one fails (Learn then Test, with a fixed
    sequence). The documentation of the module has the test, and why it is valid.

    Three things make the promise: the images are drawn independently, from where the new ones come from; the
    network was not trained on them, nor chosen by them; and neither were the shifts. So these are a fixed
    grid, or come from other data, such as :func:`~batchshaping.gates.calibration.calibrate` on the training
    images. Quantiles of the logits of the same images would break the promise, and so would choosing among
    several promises made by them.

    Args:
        model: a network with gates or its inference copy, in any mode; it stays as it is.
        loader: the calibration set: batches of images and labels, as a ``DataLoader`` gives them, gone
            through once for eight shifts. The more images, the less is lost to caution: what a shift loses
            must be below the bound by about two of its standard errors.
        accuracy_loss: :math:`\alpha`, the most that may be lost, in (0, 1).
        confidence: :math:`1 - \delta`, in (0, 1).
        shifts: what is tested, ascending; those above the reference. More of them do not weaken the test.
        against: the shift r of the reference: ``-math.inf`` for all gates open, 0 for the network as it was
            trained. Where gates were trained from the start, all of them open may well be less accurate.

    Returns:
        The shift, what it costs, and all that was tested. Where no shift could be certified, it is that of
        the reference.

    Raises:
        ValueError: if a number is out of its range, the shifts are not ascending, or there are no labels or
            no images.

    References:
        Angelopoulos, Bates, Candès, Jordan and Lei, Learn then Test: Calibrating Predictive Algorithms to
        Achieve Risk Control, 2021, https://arxiv.org/abs/2110.01052.
        Berger and Boos, P Values Maximized Over a Confidence Set for the Nuisance Parameter, JASA 1994.
        Darroch, On the Distribution of the Number of Successes in Independent Trials, 1964.

    Example:
        >>> import batchshaping as bs
        >>> network, images = bs.gated_resnet20().eval(), torch.randn(64, 3, 32, 32)
        >>> labels = torch.randint(0, 10, (64,))
        >>> promise = guarantee(network, [(images, labels)], accuracy_loss=0.01)
        >>> promise.shift  # 64 images are too few to promise one in a hundred
        -inf
    """
    for name, value in (("accuracy_loss", accuracy_loss), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be in (0, 1), received {value}")
    if math.isnan(against):
        raise ValueError(f"against must be a shift, received {against}")
    shifts = [float(shift) for shift in shifts]
    if not shifts or not all(low < high for low, high in itertools.pairwise(shifts)):
        raise ValueError(f"shifts must be ascending numbers, one at least, received {shifts}")
    shifts = [shift for shift in shifts if shift > against]
    if not shifts:
        raise ValueError(f"shifts must have one above that of the reference, {against}, received none")
    examples, reference = 0, None
    tested: list[TriedShift] = []
    for expected, outcome, shift in _in_order(model, loader, shifts, against):
        examples = len(expected.shares)
        if reference is None:
            reference = TriedShift(float(against), *_cost_and_accuracy(expected), 0, 0, 0.0)
        before, after = _zeros_and_ones(expected), _zeros_and_ones(outcome)
        lost, gained = int((before > after).sum()), int((before < after).sum())
        p_value = p_value_of_loss(lost, gained, examples, accuracy_loss, level=1 - confidence)
        tested.append(TriedShift(shift, *_cost_and_accuracy(outcome), lost, gained, p_value))
        if p_value > 1 - confidence:
            break
    assert reference is not None
    return Guarantee(accuracy_loss, confidence, examples, reference, tuple(tested))


_AT_ONCE = 8
"""How many shifts are run in one pass: each pass computes the reference once more."""


def _in_order(
    model: nn.Module, loader: Iterable[Any], shifts: Sequence[float], against: float
) -> Iterator[tuple[Outcome, Outcome, float]]:
    """For each shift what happens to the same images at the reference, and at the shift."""
    for first in range(0, len(shifts), _AT_ONCE):
        part = shifts[first : first + _AT_ONCE]
        reference, *others = outcomes(model, loader, [against, *part])
        yield from zip(itertools.repeat(reference), others, part, strict=False)


def _zeros_and_ones(outcome: Outcome) -> Tensor:
    """Whether each example is right."""
    correct = outcome.correct
    if correct is None:
        raise ValueError("loader must give images with their labels, received images alone")
    if not bool(((correct == 0) | (correct == 1)).all()):
        raise ValueError("examples must have one label each, received some that are partly right")
    return correct


def _cost_and_accuracy(outcome: Outcome) -> tuple[float, float]:
    return outcome.multiply_adds, _zeros_and_ones(outcome).mean().item()


def p_value_of_loss(
    lost: int, gained: int, examples: int, accuracy_loss: float, level: float = 0.05
) -> float:
    r"""A p-value of the hypothesis that more than a share of the examples is lost, less those gained.

    Under the hypothesis :math:`p_A - p_B \ge \alpha` it is at most u with a probability of at most u, for
    independent examples and any u. The module's documentation has the formula and the proof.

    Args:
        lost: A, how many examples were right before and are wrong now.
        gained: B, how many were wrong before and are right now.
        examples: n, how many there are.
        accuracy_loss: :math:`\alpha`, in (0, 1).
        level: the level :math:`\delta` that the p-value is to be compared with. A twentieth of it is spent on
            the confidence bound of how often the two disagree.

    Example:
        >>> p_value_of_loss(lost=100, gained=50, examples=10_000, accuracy_loss=0.01) < 0.01
        True
        >>> p_value_of_loss(lost=150, gained=50, examples=10_000, accuracy_loss=0.01)
        1.0
    """
    k, disagreements = lost - gained, lost + gained
    reserve = level / 20
    q = max(_highest_share(disagreements, examples, 1 - reserve), accuracy_loss)
    lowest_mode = math.floor((examples - 1) * accuracy_loss * (1 - 1e-12))  # rounded down at least
    if q > 0.5 or k >= lowest_mode:
        return 1.0
    return min(1.0, _left_tail(k, examples, q, accuracy_loss) + reserve + _ROUNDING)


@lru_cache(maxsize=1024)
def _highest_share(count: int, examples: int, confidence: float) -> float:
    """The upper confidence bound of a share of which a number of examples is known (Clopper and Pearson)."""
    # Kept, since it takes most of the time, and shifts that follow each other often disagree alike.
    if count == examples:
        return 1.0
    a, b = _doubles(count + 1.0, examples - count)
    return float(betaincinv(a, b, *_doubles(confidence)))


_ROUNDING = 1e-9
"""More than the tail is off by in double precision."""


def _left_tail(k: int, n: int, q: float, difference: float) -> float:
    """The probability that lost less gained examples are at most k."""
    # Beyond 12 standard deviations and some there is less than rounding.
    width = 12 * math.sqrt(n * q) + 60
    first, last = max(0, math.floor(n * q - width)), min(n, math.ceil(n * q + width))
    m = torch.arange(first, last + 1, dtype=torch.double, device="cpu")
    log_choices = math.lgamma(n + 1) - torch.lgamma(m + 1) - torch.lgamma(n - m + 1)
    log_mass = log_choices + m * math.log(q) + (n - m) * math.log1p(-q)
    at_most = torch.floor((k + m) / 2)
    inside = (at_most >= 0) & (at_most < m)
    # The probability of at most j of m is a regularized incomplete beta function.
    a, b = (m - at_most).where(inside, 1.0), (at_most + 1).where(inside, 1.0)
    tail = betainc(a, b, *_doubles((1 - difference / q) / 2)).where(inside, (at_most >= m).double())
    return float((log_mass.exp() * tail).sum())


def _doubles(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value, dtype=torch.double, device="cpu") for value in values)
