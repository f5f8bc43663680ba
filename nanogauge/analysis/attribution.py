"""Attribute the difference between the predicted and the actual duration of a run to causes.

The parts add up exactly. A cause may carry advice: a change and the time it would have saved in
this run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanogauge.analysis.claims import Claims
from nanogauge.analysis.measured import Measurements
from nanogauge.analysis.telemetry import arithmetic_share, clock_loss, measure_clock
from nanogauge.analysis.what_if import Scenario
from nanogauge.hardware import find_gpu
from nanogauge.prediction.overheads import compile_seconds
from nanogauge.prediction.step_time import counted_clock_hz
from nanogauge.quantities import format_seconds
from nanogauge.runlog.history import RunHistory
from nanogauge.runspec import EMBEDDED_TEXT, RunSpec
from nanogauge.schedule import checkpoints, evaluations
from nanogauge.schema import Hardware, Prediction, Stored

MIN_SAVED_SHARE = 0.0025
"""Smallest saving that is shown as advice, as a fraction of the run's time."""


class Cause(Stored):
    cause: str
    seconds: float
    why: str
    advice: str | None = None
    """Suggested change and the time it would have saved; None without advice worth showing."""


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
    scenarios: Sequence[Scenario] = (),
    claims: Claims | None = None,
) -> Attribution | None:
    """Attribute the difference between the measured and the expected total time to causes.

    Expected is the prediction, or with `claims` the middle of the narrowest claimed total, counted
    as if all of it were steps. None if the measured or the expected total is missing.
    """
    reference = _predicted(prediction, spec) if claims is None else _claimed(claims, spec)
    if reference is None or not {"total_seconds", "step_seconds"} <= measurements.values.keys():
        return None
    return _Attributor(reference, prediction, measurements, spec, recorded, scenarios).result()


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
        if claim.row == "total_seconds" and claim.formula is None and claim.middle is not None
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
    scenarios: Sequence[Scenario]

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
            advice=self._throttling_advice(lost),
        )

    def _steady_causes(self, steady: float) -> Iterator[Cause]:
        """Split the deviation of the steady steps into SM clock and efficiency."""
        done, expected, clock = self.measurements.steps_done, self.reference, self.clock
        difference = steady - expected.step_seconds * done
        took = (
            f"{format_seconds(steady / done)} a step instead of "
            f"{format_seconds(expected.step_seconds)}"
        )
        if expected.clock is None or clock.hz is None or self.share is None:
            advice = self._power_limit_advice() or self._micro_batch_advice()
            cause = "steady step"
            if expected.clock is not None:
                cause = "step: clock and efficiency"
                took += f"; the clock was not measured ({clock.absent}), so they are not separated"
            yield Cause(cause=cause, seconds=difference, why=took, advice=advice)
            return
        assumed_hz, words = expected.clock
        seconds = clock_loss(self.share, assumed_hz, clock.hz) * steady
        yield Cause(
            cause="step: clock",
            seconds=seconds,
            why=f"the SM clock was {clock.hz / 1e9:.3f} GHz (median of {clock.readings:,} "
            f"readings) instead of {words}; {100 * self.share:.0f} % of the step is arithmetic, "
            "which scales with it",
            advice=self._power_limit_advice(),
        )
        yield Cause(
            cause="step: efficiency",
            seconds=difference - seconds,
            why=f"{took}; at the assumed clock it would have been "
            f"{format_seconds((steady - seconds) / done)}",
            advice=self._micro_batch_advice(),
        )

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
            advice=self._data_advice(),
        )
        for key, cause, container, advice, elsewhere in (
            ("compile_s", "compilation", "the first step", self._compile_advice(), recompiled),
            ("eval_s", "evaluation", "the steps", self._evaluation_advice(), 0.0),
            ("checkpoint_s", "checkpoints", "evaluation", self._checkpoint_advice(), 0.0),
        ):
            measured = getattr(ledger, key)
            actual = (measured or 0.0) - elsewhere
            expected = self.reference.ledger.get(key, 0.0)
            why = f"{format_seconds(actual)} instead of {format_seconds(expected)}"
            if measured is None:
                where = container if ledger.other_s is None else "everything else"
                why = f"part of {where} in this log"
            yield Cause(cause=cause, seconds=actual - expected, why=why, advice=advice)
        yield Cause(
            cause="restarts and lost work",
            seconds=(ledger.lost_s or 0.0) + (ledger.startup_s or 0.0) + recompiled,
            why=self._restart_reason(),
            advice=self._restart_advice(),
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

    def _if_worth(self, seconds: float, text: str) -> str | None:
        return text if seconds >= MIN_SAVED_SHARE * self.ran_seconds else None

    def _evaluation_advice(self) -> str | None:
        """Suggest evaluating half as often; None if that saves too little."""
        spent, done = self.ledger.eval_s, len(self.recorded.evals)
        if not spent or not done:
            return None
        every = self.spec.eval_every or 0
        fewer = evaluations(self.spec) - evaluations(replace(self.spec, eval_every=2 * every))
        saved = fewer * spent / done
        text = (
            f"evaluation every {2 * every:,} steps instead of {every:,} saves "
            f"{format_seconds(saved)}"
        )
        return self._if_worth(saved, text)

    def _checkpoint_advice(self) -> str | None:
        """Suggest half as many checkpoints; None if this run lost work or that saves too little."""
        if not self.ledger.checkpoint_s or self.recorded.lost_steps:
            return None
        every = self.spec.checkpoint_every or 0
        fewer = checkpoints(self.spec) - checkpoints(replace(self.spec, checkpoint_every=2 * every))
        saved = fewer * self._seconds_per_checkpoint()
        return self._if_worth(
            saved,
            f"a checkpoint every {2 * every:,} steps instead of {every:,} saves "
            f"{format_seconds(saved)}, and a run that dies loses twice as much",
        )

    def _seconds_per_checkpoint(self) -> float:
        timed = sum(line.seconds is not None for line in self.recorded.checkpoints)
        return (self.ledger.checkpoint_s or 0.0) / max(timed, 1)

    def _restart_advice(self) -> str | None:
        """Return advice to write twice as many checkpoints, which halves the lost work."""
        lost, every = self.ledger.lost_s or 0.0, self.spec.checkpoint_every or 0
        if not self.recorded.lost_steps or every < 2:
            return None
        more = checkpoints(replace(self.spec, checkpoint_every=every // 2)) - checkpoints(self.spec)
        overhead = more * self._seconds_per_checkpoint()
        saved = lost / 2 - overhead
        return self._if_worth(
            saved,
            f"a checkpoint every {every // 2:,} steps instead of {every:,} would have saved about "
            f"{format_seconds(saved)}: half of the repeated work, less {format_seconds(overhead)} "
            "of more checkpoints",
        )

    def _data_advice(self) -> str | None:
        if self.spec.dataset == EMBEDDED_TEXT:  # in memory
            return None
        waited = self.ledger.data_wait_s or 0.0
        return self._if_worth(
            waited, f"reading the shards from a faster disk saves up to {format_seconds(waited)}"
        )

    def _compile_advice(self) -> str | None:
        """Return advice to use the compiler cache; the predicted low end assumes a warm cache."""
        spent = (self.ledger.compile_s or 0.0) - self.recompile_seconds
        predicted = compile_seconds(self.spec, self.prediction.hardware)
        if not predicted.expected:
            return None
        saved = (1 - predicted.low / predicted.expected) * spent
        return self._if_worth(
            saved,
            f"the compiler cache (docs/install.md) saves up to {format_seconds(saved)} when this "
            "model is trained again",
        )

    def _throttling_advice(self, lost: float) -> str | None:
        reasons = " ".join(self.clock.reasons)
        if "brake" in reasons:
            change = "a sufficient power supply and cables (power brake)"
        elif "thermal" in reasons:
            change = "more air for the card"
        else:
            change = "finding out why (nvidia-smi -q -d PERFORMANCE)"
        return self._if_worth(lost, f"{change} saves about {format_seconds(lost)}")

    def _power_limit_advice(self) -> str | None:
        """Return advice to raise a lowered power limit, if the clock was below the assumed one."""
        limits = self.recorded.sensors.known("power_limit_watts")
        gpu = find_gpu(self.prediction.hardware.name)
        hz, assumed = self.clock.hz, counted_clock_hz(self.prediction.hardware)
        default = gpu.power_watts if gpu is not None else None
        if gpu is None or default is None or "Laptop" in gpu.name:
            return None  # the maker of a laptop sets its limit
        if hz is None or assumed is None or self.share is None or hz >= assumed:
            return None
        if not len(limits) or not self.clock.capped:
            return None
        limit = float(np.median(limits)) / (self.recorded.starts[-1].sensed_cards or 1)
        if limit > default - 1:
            return None
        saved = clock_loss(self.share, assumed, hz) * self.step_seconds
        return self._if_worth(
            saved,
            f"the power limit of {limit:.0f} W is below the card's own {default:.0f} W: raising it "
            f"saves at most {format_seconds(saved)}, if the clock then rises from "
            f"{hz / 1e9:.3f} to {assumed / 1e9:.3f} GHz",
        )

    def _micro_batch_advice(self) -> str | None:
        """Return advice to use a larger micro-batch, if it surely fits and should be faster."""
        by_id = {scenario.id: scenario for scenario in self.scenarios}
        larger = by_id.get("micro_batch")
        if larger is None or larger.verdict != "fits":
            return None
        saved = by_id["again"].step_seconds.expected - larger.step_seconds.expected
        saved *= self.spec.steps
        return self._if_worth(
            saved, f"{larger.label} ({larger.change}) saves about {format_seconds(saved)}"
        )
