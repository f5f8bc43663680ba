"""The SM clock of a run as the sensors saw it, and what time a lower one cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanogauge.analysis.telemetry import sensed_spans, why_absent
from nanogauge.measure.alarms import POWER_CAP
from nanogauge.prediction.step_time import ARITHMETIC
from nanogauge.runlog.history import Recorded
from nanogauge.schema import Prediction

THROTTLING = ("thermal", "brake", "hardware")
"""words of the reasons that are no part of a card's ordinary work: heat, power brake, its own
slow-down. A card at its power limit works as it is meant to"""


@dataclass(frozen=True)
class MeasuredClock:
    hz: float | None
    """median of the readings without throttling; None where there is none"""
    readings: int
    """how many those are"""
    absent: str
    """why there is no clock, where there is none"""
    reasons: tuple[str, ...]
    """of the throttling, in the driver's words"""
    throttled_seconds: float
    lost_seconds: float | None
    """of throttled_seconds, estimated from the clock; None where the clock does not tell"""
    mostly_throttled: bool
    """more than half of the time, so that the median step was throttled too"""
    capped: bool
    """the power limit held the clock down at some time"""


def arithmetic_share(prediction: Prediction) -> float | None:
    """The share of the predicted step that goes with the clock; None where no step is predicted."""
    total = sum(part.value for part in prediction.step_parts)
    if not total:
        return None
    return sum(part.value for part in prediction.step_parts if part.name in ARITHMETIC) / total


def slowed(share: float, reference_hz: float, hz: float) -> float:
    """The share of the time that a lower clock cost: the part that is arithmetic goes with it.

    A step of 1 s at the reference takes 1 - share + share x reference / clock; negative where the
    clock is the higher one.
    """
    return 1 - 1 / (1 - share + share * reference_hz / hz)


def measure_clock(recorded: Recorded, share: float | None) -> MeasuredClock:
    """What the readings say of the clock; share is that of the step which goes with it."""
    sensors = recorded.sensors
    clocks, spans = sensors.column("sm_clock_hz"), sensed_spans(sensors)
    codes, words = sensors.codes("throttle")
    told = {code: words[code] or [] for code in set(codes.tolist()) if code}
    throttling = {
        code: [reason for reason in reasons if any(word in reason for word in THROTTLING)]
        for code, reasons in told.items()
    }
    held = np.isin(codes, [code for code, reasons in throttling.items() if reasons])
    free = clocks[~held & ~np.isnan(clocks)]
    hz = float(np.median(free)) if len(free) else None
    lost: float | None = 0.0
    if held.any():
        lost = None
        slow = held & (clocks > 0)
        if hz is not None and share is not None and slow.any():
            pairs = zip(spans[slow].tolist(), clocks[slow].tolist(), strict=True)
            lost = sum(span * slowed(share, hz, min(clock, hz)) for span, clock in pairs)
    throttled = float(spans[held].sum())
    return MeasuredClock(
        hz=hz,
        readings=len(free),
        absent="not in this log"
        if recorded.starts[0].source != "train"
        else why_absent(recorded, "sm_clock_hz"),
        reasons=tuple(sorted({r for reasons in throttling.values() for r in reasons})),
        throttled_seconds=throttled,
        lost_seconds=lost,
        mostly_throttled=throttled > spans.sum() / 2,
        capped=any(POWER_CAP in reasons for reasons in told.values()),
    )
