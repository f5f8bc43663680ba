"""Times of day on a local clock, also in the nights in which it is changed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogauge.quantities import day_and_time, later, next_time


@pytest.fixture(autouse=True, scope="module")
def central_europe() -> Iterator[None]:
    """Summer time from the last Sunday of March to that of October; needs no time zone database."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        yield
    time.tzset()


def local(*parts: int) -> datetime:
    return datetime(*parts).astimezone()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("evening", "hours"), [((2026, 3, 28), 9), ((2026, 7, 1), 10), ((2026, 10, 24), 11)]
)
def test_a_night_is_as_long_as_it_is(evening: tuple[int, int, int], hours: int) -> None:
    """From 22:00 to 08:00 are 9 hours where summer begins, and 11 where it ends."""
    start = next_time("22:00", local(*evening, 20), "--start")
    by = next_time("8:00", start, "--by")
    assert by.timestamp() - start.timestamp() == hours * 3600
    assert later(start, hours * 3600) == by


@given(
    after=st.datetimes(datetime(2000, 1, 1), datetime(2050, 1, 1)),
    minutes=st.integers(0, 24 * 60 - 1),
)
def test_the_next_time_of_day_is_ahead_and_within_a_day(after: datetime, minutes: int) -> None:
    """A day of 25 hours is the longest; an hour that the clock leaves out is shown one later."""
    text = f"{minutes // 60:02}:{minutes % 60:02}"
    now = after.astimezone()
    found = next_time(text, now, "--by")
    assert timedelta(0) < found - now <= timedelta(hours=25)
    shown = found.hour * 60 + found.minute
    assert (shown - minutes) % (24 * 60) in (0, 60, 24 * 60 - 60)


def test_days_are_named_as_people_name_them() -> None:
    now = local(2026, 7, 1, 20, 10)  # a Wednesday
    named = {
        "today 23:30": local(2026, 7, 1, 23, 30),
        "tomorrow 01:24": local(2026, 7, 2, 1, 24),
        "Mon 07:40": local(2026, 7, 6, 7, 40),
        "2026-07-09 07:40": local(2026, 7, 9, 7, 40),
    }
    assert {day_and_time(moment, now): moment for moment in named.values()} == named
    assert day_and_time(later(now, 1e12), now) == "in more than 100 years"
