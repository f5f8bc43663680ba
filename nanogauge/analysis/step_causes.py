"""Why the steps took longer or shorter than expected: clock, efficiency, throttling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nanogauge.analysis.advice import Advice
from nanogauge.analysis.clocks import slowed
from nanogauge.prediction.step_time import counted_clock_hz
from nanogauge.quantities import format_seconds
from nanogauge.schema import Hardware, Stored


class Cause(Stored):
    cause: str
    seconds: float
    why: str
    advice: str | None = None
    """what to change, and what it would have saved; None where that is too little, or nothing"""


@dataclass(frozen=True)
class Expected:
    """A total that somebody expected, and the steps in it."""

    total_seconds: float
    step_seconds: float
    steps: int
    reference: str
    """whose it is, in words"""
    planned: dict[str, float]
    """expected seconds of the other parts of the ledger"""
    clock: tuple[float, str] | None
    """Hz that are counted with, and what they are in words; None where nobody says"""


def counted_clock(hardware: Hardware) -> tuple[float, str] | None:
    """The clock that the prediction counts with, and what it is."""
    hz, boost = counted_clock_hz(hardware), hardware.boost_clock_hz
    if hz is None or boost is None:
        return None
    if hz == boost:
        return hz, f"the {hz / 1e9:.3f} GHz of the datasheet"
    return hz, (
        f"{hz / 1e9:.3f} GHz, the lowest clock at which the card can do the matrix products that "
        f"are counted with, {hz / boost:.2f} of the peak at the datasheet's {boost / 1e9:.3f} GHz"
    )


def step_causes(expected: Expected, advice: Advice) -> Iterator[Cause]:
    """The steps without waiting for data; adds up to how much longer they took than expected."""
    found, clock = advice.measurements, advice.clock
    ledger, done = found.ledger, found.steps_done
    assert found.median_step_seconds is not None and ledger.step_s is not None
    even = found.median_step_seconds * done - (ledger.data_wait_s or 0.0)
    uneven = ledger.step_s - even
    lost = min(clock.lost_seconds or 0.0, ledger.step_s)
    if clock.mostly_throttled and lost:  # the median step was slowed, too
        even, uneven = ledger.step_s - lost, 0.0
    else:  # the steps themselves tell what was lost at most
        lost = min(lost, max(uneven, 0.0))
        uneven -= lost
    yield from _steady(expected, advice, even)
    yield Cause(
        cause="number of steps",
        seconds=(done - expected.steps) * expected.step_seconds,
        why=f"{done:,} steps instead of {expected.steps:,}",
    )
    yield Cause(
        cause="uneven steps",
        seconds=uneven,
        why="steps slower or faster than the median" + (", throttling aside" if lost else ""),
    )
    yield Cause(
        cause="throttling", seconds=lost, why=_throttled(advice), advice=advice.throttling(lost)
    )


def _steady(expected: Expected, advice: Advice, even: float) -> Iterator[Cause]:
    """The even steps against the expected ones: the clock, and what is left."""
    done = advice.measurements.steps_done
    left = even - expected.step_seconds * done
    took = (
        f"{format_seconds(even / done)} a step instead of {format_seconds(expected.step_seconds)}"
    )
    clock, share = advice.clock, advice.share
    told = advice.power_limit() or advice.micro_batch()
    if expected.clock is None:
        yield Cause(cause="steady step", seconds=left, why=took, advice=told)
        return
    if clock.hz is None or share is None:
        yield Cause(
            cause="step: clock and efficiency",
            seconds=left,
            why=f"{took}; the clock was not measured ({clock.absent}), so the two are not told "
            "apart",
            advice=told,
        )
        return
    counted_hz, words = expected.clock
    seconds = slowed(share, counted_hz, clock.hz) * even
    yield Cause(
        cause="step: clock",
        seconds=seconds,
        why=f"the SM clock was {clock.hz / 1e9:.3f} GHz (median of {clock.readings:,} readings) "
        f"instead of {words}; {100 * share:.0f} % of the step is arithmetic, which goes with it",
        advice=advice.power_limit(),
    )
    yield Cause(
        cause="step: efficiency",
        seconds=left - seconds,
        why=f"{took}; at the clock that is counted with it would have been "
        f"{format_seconds((even - seconds) / done)}",
        advice=advice.micro_batch(),
    )


def _throttled(advice: Advice) -> str:
    clock = advice.clock
    if not clock.throttled_seconds:
        codes, _ = advice.recorded.sensors.codes("throttle")
        return "in no reading" if codes.any() else f"not measured ({clock.absent})"
    held = f"{', '.join(clock.reasons)} in {format_seconds(clock.throttled_seconds)} of readings"
    if clock.lost_seconds is None:
        return f"{held}; what it cost is not known, as no reading shows the clock without it"
    return (
        f"{held}; estimated from the clock, with which the arithmetic goes, and no more than the "
        "uneven steps lost"
        if not clock.mostly_throttled
        else f"{held}; estimated from the clock, with which the arithmetic goes"
    )
