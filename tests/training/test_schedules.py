"""A ramp is linear between its ends and constant outside; the factors of the learning rate fall from 1."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchshaping.training.schedules import Cosine, Ramp, Steps

weights = st.floats(-10, 10)
shares = st.floats(0, 1)


@given(first=weights, last=weights, share=shares)
def test_a_ramp_is_linear_between_its_ends_and_constant_outside(
    first: float, last: float, share: float
) -> None:
    ramp = Ramp(first, last, begin=0.2, end=0.6)
    assert ramp(0.2 * share) == first
    assert ramp(0.6 + 0.4 * share) == pytest.approx(last)
    assert ramp(0.2 + 0.4 * share) == pytest.approx(first + share * (last - first), abs=1e-9)


@pytest.mark.parametrize(
    ("begin", "end"), [(0.5, 0.5), (0.6, 0.2), (-0.1, 0.5), (0.5, 1.1), (math.nan, 0.5), (0.5, math.nan)]
)
def test_ends_out_of_order_are_refused(begin: float, end: float) -> None:
    with pytest.raises(ValueError, match=f"received {begin} and {end}"):
        Ramp(1.0, 0.0, begin=begin, end=end)


@given(milestones=st.lists(shares).map(tuple), progress=shares)
def test_steps_fall_by_ten_at_each_milestone_in_any_order(
    milestones: tuple[float, ...], progress: float
) -> None:
    passed = len([milestone for milestone in milestones if milestone <= progress])
    assert Steps(milestones)(progress) == pytest.approx(10.0**-passed)
    assert Steps(milestones)(progress) == Steps(milestones[::-1])(progress)


@given(one=shares, other=shares)
def test_a_cosine_falls_from_1_to_0_and_is_odd_around_the_middle(one: float, other: float) -> None:
    cosine = Cosine()
    assert (cosine(0.0), cosine(0.5), cosine(1.0), cosine(1.5)) == pytest.approx((1, 0.5, 0, 0))
    assert cosine(one) + cosine(1 - one) == pytest.approx(1)
    assert (one <= other) <= (cosine(one) >= cosine(other))
