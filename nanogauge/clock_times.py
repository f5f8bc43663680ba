"""Times of day: the next one of that name, and when something ends, as people say it.

All moments are aware of the machine's time zone; durations are added to the seconds since the
epoch, so that a night in which the clocks change has its true length.
"""

from __future__ import annotations

from datetime import datetime, time, timedelta

from nanogauge.errors import BadInput

YEAR_SECONDS = 365.2425 * 86400
FAR_SECONDS = 100 * YEAR_SECONDS  # what ends later needs no clock


def next_time(text: str, after: datetime, flag: str) -> datetime:
    """The first moment after `after` at which the local clock shows this time of day.

    Raises:
        BadInput: if the text is no time of day.
    """
    try:
        wanted = time.fromisoformat(text.zfill(5))  # 8:00 is 08:00
    except ValueError:
        wanted = None
    if wanted is None or wanted.tzinfo is not None or ":" not in text:
        raise BadInput(f"{flag} takes a time of day such as 08:00, not {text!r}.")
    moment = datetime.combine(after.date(), wanted).astimezone()
    if moment <= after:
        moment = datetime.combine(after.date() + timedelta(days=1), wanted).astimezone()
    return moment


def later(start: datetime, seconds: float) -> datetime | None:
    """The local time so many seconds after start; None where it is too far away to have a date."""
    if seconds > FAR_SECONDS:
        return None
    return datetime.fromtimestamp(start.timestamp() + seconds).astimezone()


def day_and_time(moment: datetime | None, now: datetime) -> str:
    """'today 23:10', 'tomorrow 01:24', 'Thu 01:24', or the date where it is a week away."""
    if moment is None:
        return f"in more than {FAR_SECONDS / YEAR_SECONDS:.0f} years"
    days = (moment.date() - now.date()).days
    if days < 2:
        return f"{'tomorrow' if days else 'today'} {moment:%H:%M}"
    return f"{moment:%a %H:%M}" if days < 7 else f"{moment:%Y-%m-%d %H:%M}"
