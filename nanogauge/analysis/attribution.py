"""Attribute the difference between the predicted and the actual duration of a run to causes.

The parts add up exactly. A cause may carry advice: a change and the time it would have saved in this run.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from nanogauge.analysis.claims import Claims
from nanogauge.analysis.measured import Measurements
from nanogauge.analysis.telemetry import arithmetic_share, clock_loss, measure_clock
from nanogauge.prediction.step_time import counted_clock_hz
from nanogauge.quantities import format_seconds
from nanogauge.runlog.history import RunHistory
from nanogauge.runspec import RunSpec
from nanogauge.schema import Hardware, Prediction, Stored

MIN_SAVED_SHARE = 0.0025
"""Smallest loss that has an advice, as a fraction of the run's time."""
REMEDIES = {"brake": "a sufficient power supply and cables", "thermal": "more air for the card"}
"""Word in the reason for throttling -> advice."""


class Cause(Stored):
    cause: str
    seconds: float
    why: str
    advice: str | None = None
    """Suggested change, which would have saved the seconds; None without one."""


class Attribution(Stored):
    predicted_s: float
    actual_s: float
    """Total time during which a process of the run was alive, in seconds."""
    parts: list[Cause]
    """Causes and their seconds, which add up to actual_s - predicted_s."""
    reference: str
    """Description of the prediction or claim that predicted_s comes from."""


@dataclass(frozen=True)
class _Reference:
    """Expected duration of the run, from the prediction or a claim, as the reference."""

    name: str
    total_seconds: float
    step_seconds: float
    ledger: dict[str, float]
    """Expected seconds of the ledger parts other than steps."""
    clock: tuple[float, str] | None
    """Assumed SM clock in Hz and its description; None for a claim, which states no clock."""


def attribute(
    prediction: Prediction,
    measurements: Measurements,
    spec: RunSpec,
    recorded: RunHistory,
    claims: Claims | None = None,
) -> Attribution | None:
    """Attribute the difference between the measured and the expected total time to causes.

    Expected is the prediction, or with `claims` the middle of the narrowest claimed total, counted as if all of it were
    steps. None if the measured or the expected total is missing.
    """
    reference = _predicted(prediction, spec) if claims is None else _claimed(claims, spec)
    if reference is None or not {"total_seconds", "step_seconds"} <= measurements.values.keys():
        return None
    return _Attributor(reference, prediction, measurements, spec, recorded).result()


def _predicted(prediction: Prediction, spec: RunSpec) -> _Reference | None:
    if not prediction.ledger:
        return None
    return _Reference(
        name="analytic prediction",
        total_seconds=sum(prediction.ledger.values()),
        step_seconds=prediction.ledger["step_s"] / spec.steps,
        ledger=prediction.ledger,
        clock=_assumed_clock(prediction.hardware),
    )


def _claimed(claims: Claims, spec: RunSpec) -> _Reference | None:
    totals = [
        (claim.high - claim.low, claim.middle, claim.key)
        for claim in claims.claim
        if claim.row == "total_seconds" and claim.is_about_this_run and claim.middle is not None
    ]
    if not totals:
        return None
    _, middle, _ = min(totals)
    return _Reference("middle of the claimed total", middle, middle / spec.steps, {}, None)


def _assumed_clock(hardware: Hardware) -> tuple[float, str] | None:
    """Return the SM clock that the prediction assumes, and its description."""
    hz, boost = counted_clock_hz(hardware), hardware.boost_clock_hz
    if hz is None or boost is None:
        return None
    if hz == boost:
        return hz, f"the {hz / 1e9:.3f} GHz of the datasheet"
    return hz, (
        f"the assumed {hz / 1e9:.3f} GHz, the lowest clock that explains the measured matrix "
        f"products: {hz / boost:.2f} of the datasheet's {boost / 1e9:.3f} GHz"
    )


@dataclass
class _Attributor:
    """Compute the causes and advice for one reference."""

    reference: _Reference
    prediction: Prediction
    measurements: Measurements
    spec: RunSpec
    recorded: RunHistory

    def __post_init__(self) -> None:
        self.ledger = self.measurements.ledger
        self.ran_seconds = self.ledger.ran_s or 0.0
        self.step_seconds = self.ledger.step_s or 0.0
        self.share = arithmetic_share(self.prediction)
        self.clock = measure_clock(self.recorded, self.share)
        self.recompile_seconds = sum(s.compile_seconds for s in self.recorded.startups[1:])

    def result(self) -> Attribution:
        causes = [*self._step_causes(), *self._other_causes()]
        rest = self.ran_seconds - self.reference.total_seconds - sum(c.seconds for c in causes)
        named = self.ledger.other_s is not None
        why = "start-up, logging, text samples" if named else "this log does not show it"
        causes.append(Cause(cause="everything else", seconds=rest, why=why))
        return Attribution(
            predicted_s=self.reference.total_seconds,
            actual_s=self.ran_seconds,
            parts=causes,
            reference=self.reference.name,
        )

    def _step_causes(self) -> Iterator[Cause]:
        """Yield the causes within the steps, except waiting for data."""
        done, median = self.measurements.steps_done, self.measurements.median_step_seconds
        assert median is not None
        steady = median * done - (self.ledger.data_wait_s or 0.0)
        uneven = self.step_seconds - steady
        lost = min(self.clock.lost_seconds or 0.0, self.step_seconds)
        if self.clock.mostly_throttled and lost:
            steady, uneven = self.step_seconds - lost, 0.0
        else:  # throttling cannot have cost more than the slow steps took beyond the median
            lost = min(lost, max(uneven, 0.0))
            uneven -= lost
        yield from self._steady_causes(steady)
        steps = self.spec.steps
        yield Cause(
            cause="number of steps",
            seconds=(done - steps) * self.reference.step_seconds,
            why=f"{done:,} steps instead of {steps:,}",
        )
        why = "steps slower or faster than the median" + (", throttling aside" if lost else "")
        yield Cause(cause="uneven steps", seconds=uneven, why=why)
        yield Cause(
            cause="throttling",
            seconds=lost,
            why=self._throttling_reason(),
            advice=self._remedy() if lost >= MIN_SAVED_SHARE * self.ran_seconds else None,
        )

    def _steady_causes(self, steady: float) -> Iterator[Cause]:
        """Split the deviation of the steady steps into SM clock and efficiency."""
        done, expected, clock = self.measurements.steps_done, self.reference, self.clock
        difference = steady - expected.step_seconds * done
        took = f"{format_seconds(steady / done)} a step instead of {format_seconds(expected.step_seconds)}"
        if expected.clock is None or clock.hz is None or self.share is None:
            cause = "steady step"
            if expected.clock is not None:
                cause = "step: clock and efficiency"
                took += f"; the clock was not measured ({clock.absent}), so they are not separated"
            yield Cause(cause=cause, seconds=difference, why=took)
            return
        assumed_hz, words = expected.clock
        seconds = clock_loss(self.share, assumed_hz, clock.hz) * steady
        yield Cause(
            cause="step: clock",
            seconds=seconds,
            why=f"the SM clock was {clock.hz / 1e9:.3f} GHz (median of {clock.readings:,} "
            f"readings) instead of {words}; {100 * self.share:.0f} % of the step is arithmetic, "
            "which scales with it",
        )
        yield Cause(
            cause="step: efficiency",
            seconds=difference - seconds,
            why=f"{took}; at the assumed clock it would have been {format_seconds((steady - seconds) / done)}",
        )

    def _remedy(self) -> str | None:
        reasons = " ".join(self.clock.reasons)
        return next((remedy for word, remedy in REMEDIES.items() if word in reasons), None)

    def _throttling_reason(self) -> str:
        clock = self.clock
        if not clock.throttled_seconds:
            codes, _ = self.recorded.sensors.codes("throttle")
            return "in no reading" if codes.any() else f"not measured ({clock.absent})"
        why = f"{', '.join(clock.reasons)} in {format_seconds(clock.throttled_seconds)} of readings"
        if clock.lost_seconds is None:
            return f"{why}; its cost is not known, as no reading shows the clock without it"
        why += "; estimated from the clock, with which the arithmetic scales"
        return why if clock.mostly_throttled else f"{why}, at most what the uneven steps lost"

    def _other_causes(self) -> Iterator[Cause]:
        ledger, recompiled = self.ledger, self.recompile_seconds
        waited = ledger.data_wait_s
        yield Cause(
            cause="waiting for data",
            seconds=waited or 0.0,
            why="none was predicted" if waited is not None else "part of the steps in this log",
        )
        for key, cause, container, elsewhere in (
            ("compile_s", "compilation", "the first step", recompiled),
            ("eval_s", "evaluation", "the steps", 0.0),
            ("checkpoint_s", "checkpoints", "evaluation", 0.0),
        ):
            measured = getattr(ledger, key)
            actual = (measured or 0.0) - elsewhere
            expected = self.reference.ledger.get(key, 0.0)
            why = f"{format_seconds(actual)} instead of {format_seconds(expected)}"
            if measured is None:
                where = container if ledger.other_s is None else "everything else"
                why = f"part of {where} in this log"
            yield Cause(cause=cause, seconds=actual - expected, why=why)
        yield Cause(
            cause="restarts and lost work",
            seconds=(ledger.lost_s or 0.0) + (ledger.startup_s or 0.0) + recompiled,
            why=self._restart_reason(),
        )

    def _restart_reason(self) -> str:
        ledger, recorded = self.ledger, self.recorded
        restarts = len(recorded.processes) - 1
        rollbacks = len(recorded.starts) - len(recorded.processes)
        if not restarts and not rollbacks:
            return "it was one process"
        counted = " and ".join(
            f"{what} once" if count == 1 else f"{what} {count} times"
            for what, count in (("resumed", restarts), ("rolled back", rollbacks))
            if count
        )
        if ledger.lost_s is None or ledger.startup_s is None:
            return f"{counted}; this log has no time for it"
        return (
            f"{counted}: {format_seconds(ledger.lost_s)} of repeated work "
            f"({recorded.lost_steps:,} steps), {format_seconds(ledger.startup_s)} to restart and "
            f"{format_seconds(self.recompile_seconds)} of compilation; the time of a process after "
            "its last line is not known and counts as time in which none ran"
        )
