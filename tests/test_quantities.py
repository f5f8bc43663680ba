"""Arithmetic of intervals: the ends stay in order and are those of the numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nanogauge.quantities import Interval, mfu


def intervals() -> st.SearchStrategy[Interval]:
    values = st.tuples(*3 * [st.floats(1e-3, 1e3)])
    return values.map(lambda three: Interval(*sorted(three)))


@given(intervals(), intervals(), st.floats(1e-3, 1e3))
def test_arithmetic_is_done_end_by_end_and_keeps_their_order(
    a: Interval, b: Interval, number: float
) -> None:
    results = [a + b, a * b, a / number, number / a, a - number, number * a, sum([a, b])]
    results += [a.scaled(number), mfu(number, a, 2.0)]
    for r in results:
        slack = 1e-9 * abs(r.expected)  # of rounding
        assert r.low - slack <= r.expected <= r.high + slack
    assert results[0] == Interval(a.low + b.low, a.expected + b.expected, a.high + b.high)
    assert results[6] == results[0]
    assert (number / a).low == number / a.high
    assert a.scaled(number).expected == number
    assert a.contains(a.expected) and not a.contains(a.high + 1)
