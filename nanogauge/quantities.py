"""Quantities of a run: their row ids and units, intervals, MFU, and formatting for people.

A row id names a quantity and its row in the report. Data is in SI units; people see hours, GB and kWh.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from nanogauge.errors import BadInput
from nanogauge.files import package_table

GIB = 2**30


class Interval(BaseModel):
    """An uncertain value; low == expected == high if it is exact.

    Arithmetic combines low with low and high with high, as if all errors were fully correlated.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    low: float
    expected: float
    high: float

    def __init__(self, low: float, expected: float, high: float, **more: object) -> None:
        super().__init__(low=low, expected=expected, high=high, **more)

    @classmethod
    def exact(cls, value: float) -> Interval:
        return Interval(value, value, value)

    def __add__(self, other: Interval | float) -> Interval:
        other = _as_interval(other)
        return Interval(self.low + other.low, self.expected + other.expected, self.high + other.high)

    __radd__ = __add__

    def __sub__(self, number: float) -> Interval:
        return self + -number

    def __mul__(self, other: Interval | float) -> Interval:
        """Return the product with a non-negative factor."""
        other = _as_interval(other)
        return Interval(self.low * other.low, self.expected * other.expected, self.high * other.high)

    __rmul__ = __mul__

    def __truediv__(self, number: float) -> Interval:
        return self.map(lambda value: value / number)

    def __rtruediv__(self, number: float) -> Interval:
        return self.map(lambda value: number / value)

    def map(self, function: Callable[[float], float]) -> Interval:
        """Apply a monotonic function to all three values."""
        one, other = function(self.low), function(self.high)
        return Interval(min(one, other), function(self.expected), max(one, other))

    def scaled(self, expected: float) -> Interval:
        """Return an interval of the same relative width around another expected value."""
        return Interval(expected * self.low / self.expected, expected, expected * self.high / self.expected)

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high


def _as_interval(value: Interval | float) -> Interval:
    return value if isinstance(value, Interval) else Interval.exact(value)


@dataclass(frozen=True)
class Quantity:
    id: str
    label: str
    unit: str
    """Unit of stored values."""
    exact: bool = False
    """True if the configuration determines the value."""
    of_gpus: Literal["each", "all"] | None = None
    """With several GPUs, whether the value is per GPU or of all; None if GPUs do not matter."""
    optional: bool = False
    """True if a report has a row of it only for a claim or a prediction."""


_TABLES = package_table("quantities.toml")
QUANTITIES = {row_id: Quantity(row_id, **fields) for row_id, fields in _TABLES["quantity"].items()}
UNITS: dict[str, dict[str, float]] = _TABLES["units"]
"""Unit in the data -> units that a claim may use -> factor."""


def finite(value: float | None) -> float | None:
    """Return the value, or None if it is non-finite, which JSON cannot express."""
    return value if value is not None and math.isfinite(value) else None


Seconds = TypeVar("Seconds", float, Interval)


def mfu(flops: float, seconds: Seconds, peak_flops: float) -> Seconds:
    """Return the model FLOPs utilization; recomputed FLOPs do not count.

    Source: Chowdhery et al., PaLM (2022), appendix B.
    """
    return flops / seconds / peak_flops


def format_digits(value: float, significant: int = 3) -> str:
    """Format a number to significant digits, with thousands separators and without exponent."""
    if value == 0:
        return "0"
    decimals = significant - 1 - math.floor(math.log10(abs(value)))
    text = f"{round(value, decimals):,.{max(decimals, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_seconds(seconds: float) -> str:
    if abs(seconds) >= 2 * 3600:
        return f"{format_digits(seconds / 3600)} h"
    if abs(seconds) >= 300:
        return f"{format_digits(seconds / 60)} min"
    if abs(seconds) >= 0.1 or seconds == 0:
        return f"{format_digits(seconds)} s"
    return f"{format_digits(seconds * 1e3)} ms"


def format_value(row_id: str, value: float, currency: str = "") -> str:
    """Format a value with its unit for people."""
    match QUANTITIES[row_id].unit:
        case "s":
            return format_seconds(value)
        case "B":
            return f"{format_digits(value / 1e9)} GB" if value >= 1e9 else f"{format_digits(value / 1e6)} MB"
        case "FLOP":
            return f"{value:.3e} FLOP".replace("e+", "e")
        case "tokens":
            return f"{format_digits(value / 1e9, 5)} billion" if value >= 1e9 else f"{value:,.0f}"
        case "kWh" if value < 0.1:
            return f"{format_digits(value * 1e3)} Wh"
        case "nat":
            return f"{value:.3f} nat"
        case "g" if value >= 1000:
            return f"{format_digits(value / 1000)} kg"
        case "W" | "kWh" | "g" as unit:
            return f"{format_digits(value)} {unit}"
        case "currency":
            return f"{value:.2f} {currency}".rstrip()
        case _:
            if row_id.startswith("mfu") or row_id == "compile_share":
                return f"{format_digits(100 * value)} %"
            if row_id.startswith("parameters"):
                return f"{value:,.0f}"
            return format_digits(value, 4)


def format_range(row_id: str, low: float, high: float, currency: str = "") -> str:
    """Format a range for people, with a common unit once and equal ends as one number."""
    return span_of(*(format_value(row_id, v, currency) for v in (low, high)))


def span_of(low: str, high: str) -> str:
    """Join two formatted values to a range, with a common unit once and equal ends as one."""
    if low == high:
        return low
    low_number, _, low_unit = low.partition(" ")
    return f"{low_number}–{high}" if low_unit == high.partition(" ")[2] else f"{low} – {high}"


YEAR_SECONDS = 365.2425 * 86400
FAR_SECONDS = 100 * YEAR_SECONDS
"""Time from now beyond which no date is shown."""


def next_time(text: str, after: datetime, flag: str) -> datetime:
    """Return the first moment after `after` at which the local clock shows a time of day."""
    try:
        clock = time.fromisoformat(text.zfill(5))  # 8:00 is 08:00
    except ValueError:
        clock = None
    if clock is None or clock.tzinfo is not None or ":" not in text:
        raise BadInput(f"{flag} takes a time of day such as 08:00, not {text!r}.")
    moment = datetime.combine(after.date(), clock).astimezone()
    if moment <= after:
        moment = datetime.combine(after.date() + timedelta(days=1), clock).astimezone()
    return moment


def time_after(start: datetime, seconds: float) -> datetime | None:
    """Return the local time `seconds` after `start`; None beyond FAR_SECONDS."""
    if seconds > FAR_SECONDS:
        return None
    return datetime.fromtimestamp(start.timestamp() + seconds).astimezone()


def day_and_time(moment: datetime | None, now: datetime) -> str:
    """Format a moment as 'today 23:10', 'tomorrow 01:24', 'Thu 01:24', or with its date."""
    if moment is None:
        return f"in more than {FAR_SECONDS / YEAR_SECONDS:.0f} years"
    days = (moment.date() - now.date()).days
    if days < 2:
        return f"{'tomorrow' if days else 'today'} {moment:%H:%M}"
    return f"{moment:%a %H:%M}" if days < 7 else f"{moment:%Y-%m-%d %H:%M}"
