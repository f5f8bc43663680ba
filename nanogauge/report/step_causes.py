"""Why the steps took longer or shorter than expected: FLOPs, clock, efficiency, throttling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nanogauge.claims import Claim, Claims
from nanogauge.config import Config
from nanogauge.consistency import computed_value
from nanogauge.predict.step_time import counted_clock_hz
from nanogauge.quantities import format_seconds
from nanogauge.records import Hardware, Prediction, Stored
from nanogauge.report.advice import Advice
from nanogauge.report.clocks import slowed


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
    flops_left_out: tuple[float, str] | None = None
    """FLOPs that the step has, over those that were counted for it; and who says so"""


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


def flops_left_out(
    claims: Claims, config: Config, prediction: Prediction
) -> tuple[float, str] | None:
    """6N + 12LCT over 6N, where the claims count 6N and nothing else; None where they do not tell.

    A count that is claimed is the claims' own only if it is right about this run.
    """

    def counted(row: str) -> list[Claim]:
        right = []
        for claim in claims.claim:
            value = computed_value(claim, config, prediction) if claim.row == row else None
            if value is not None and claim.holds(value):
                right.append(claim)
        return right

    plain = counted("flops_total_6n")
    if not plain or counted("flops_total_palm"):
        return None
    whole, part = (
        prediction.quantities[row].expected for row in ("flops_total_palm", "flops_total_6n")
    )
    return whole / part, f"{plain[0].key} counts 6N"


def step_causes(expected: Expected, advice: Advice) -> Iterator[Cause]:
    """The steps without waiting for data; adds up to how much longer they took than expected."""
    found, clock = advice.measurements, advice.clock
    ledger, done = found.ledger, found.steps_done
    assert found.median_step_seconds is not None
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
    """The even steps against the expected ones: FLOPs, clock, and what is left."""
    done = advice.measurements.steps_done
    left = even - expected.step_seconds * done
    took = (
        f"{format_seconds(even / done)} a step instead of {format_seconds(expected.step_seconds)}"
    )
    if expected.flops_left_out is not None:
        ratio, who = expected.flops_left_out
        seconds = (ratio - 1) * expected.step_seconds * done
        flops = advice.prediction.quantities["flops_total_6n"].expected
        rate = flops / expected.total_seconds
        left -= seconds
        yield Cause(
            cause="step: FLOPs counted",
            seconds=seconds,
            why=f"{who}; if the claimed time stands on that count, its rate is {rate / 1e12:.3g} "
            f"TFLOP/s, at which attention's 12LCT, {100 * (ratio - 1):.3g} % more FLOPs, need this",
        )
    clock, share = advice.clock, advice.share
    if expected.clock is None or clock.hz is None or share is None:
        reason = f"the clock was not measured ({clock.absent})"
        if expected.clock is None:
            reason = f"the {expected.reference} counts with no clock"
        yield Cause(
            cause="step: clock and efficiency",
            seconds=left,
            why=f"{took}; {reason}, so the two are not told apart",
            advice=advice.power_limit() or advice.micro_batch(),
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
