"""A ramp is linear between its ends and constant outside."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchshaping.training.schedules import Ramp

weights = st.floats(-10, 10)


@given(first=weights, last=weights, share=st.floats(0, 1))
def test_a_ramp_is_linear_between_its_ends_and_constant_outside(
    first: float, last: float, share: float
) -> None:
    ramp = Ramp(first, last, begin=0.2, end=0.6)
    assert ramp(0.2 * share) == first
    assert ramp(0.6 + 0.4 * share) == pytest.approx(last)
    assert ramp(0.2 + 0.4 * share) == pytest.approx(first + share * (last - first), abs=1e-9)


@pytest.mark.parametrize(("begin", "end"), [(0.5, 0.5), (0.6, 0.2), (-0.1, 0.5), (0.5, 1.1)])
def test_ends_out_of_order_are_refused(begin: float, end: float) -> None:
    with pytest.raises(ValueError, match=f"received {begin} and {end}"):
        Ramp(1.0, 0.0, begin=begin, end=end)
