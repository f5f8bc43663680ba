"""Arithmetic of intervals, and times of day on a local clock."""

import time
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogauge.quantities import Interval, day_and_time, mfu, next_time, time_after


def intervals() -> st.SearchStrategy[Interval]:
    return st.tuples(*3 * [st.floats(1e-3, 1e3)]).map(lambda three: Interval(*sorted(three)))


@given(intervals(), intervals(), st.floats(1e-3, 1e3))
def test_interval_arithmetic_combines_ends_and_keeps_their_order(a: Interval, b: Interval, number: float) -> None:
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


@pytest.fixture(autouse=True, scope="module")
def central_europe() -> Iterator[None]:
    """Summer time from the last Sunday of March to the last of October, without a database."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        yield
    time.tzset()


def local(*parts: int) -> datetime:
    return datetime(*parts).astimezone()  # type: ignore[arg-type]


@pytest.mark.parametrize(("evening", "hours"), [((2026, 3, 28), 9), ((2026, 7, 1), 10), ((2026, 10, 24), 11)])
def test_a_night_is_an_hour_shorter_or_longer_when_summer_time_changes(
    evening: tuple[int, int, int], hours: int
) -> None:
    start = next_time("22:00", local(*evening, 20), "--start")
    by = next_time("8:00", start, "--by")
    assert by.timestamp() - start.timestamp() == hours * 3600
    assert time_after(start, hours * 3600) == by


@given(after=st.datetimes(datetime(2000, 1, 1), datetime(2050, 1, 1)), minutes=st.integers(0, 24 * 60 - 1))
def test_the_next_time_of_day_is_ahead_and_within_a_day(after: datetime, minutes: int) -> None:
    """The longest day has 25 hours; a skipped hour is shown one later."""
    text = f"{minutes // 60:02}:{minutes % 60:02}"
    now = after.astimezone()
    found = next_time(text, now, "--by")
    assert timedelta(0) < found - now <= timedelta(hours=25)
    shown = found.hour * 60 + found.minute
    assert (shown - minutes) % (24 * 60) in (0, 60, 24 * 60 - 60)


def test_moments_are_formatted_by_how_many_days_ahead_they_are() -> None:
    now = local(2026, 7, 1, 20, 10)  # a Wednesday
    moments = {
        "today 23:30": local(2026, 7, 1, 23, 30),
        "tomorrow 01:24": local(2026, 7, 2, 1, 24),
        "Mon 07:40": local(2026, 7, 6, 7, 40),
        "2026-07-09 07:40": local(2026, 7, 9, 7, 40),
    }
    assert {day_and_time(moment, now): moment for moment in moments.values()} == moments
    assert day_and_time(time_after(now, 1e12), now) == "in more than 100 years"
