"""The difference between a predicted and the actual total, in causes that add up exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanogauge.analysis.claims import Claim, Claims
from nanogauge.analysis.measured import Measurements
from nanogauge.analysis.telemetry import MeasuredClock, arithmetic_share, measure_clock, slowed
from nanogauge.analysis.what_if import Scenario
from nanogauge.hardware import find_gpu
from nanogauge.prediction.overheads import compile_seconds
from nanogauge.prediction.step_time import counted_clock_hz
from nanogauge.quantities import format_seconds
from nanogauge.runlog.history import Recorded
from nanogauge.runspec import EMBEDDED_TEXT, RunSpec
from nanogauge.schedule import checkpoints, evaluations
from nanogauge.schema import Hardware, Prediction, Stored

WORTH = 0.0025
"""of the run's time: what saves less is not worth a sentence"""


@dataclass(frozen=True)
class Advice:
    """On one run; each piece is None where nothing is to be changed, or too little saved."""

    spec: RunSpec
    prediction: Prediction
    measurements: Measurements
    recorded: Recorded
    clock: MeasuredClock
    share: float | None
    """of the step that goes with the clock"""
    scenarios: Sequence[Scenario]

    def _worth(self, seconds: float, text: str) -> str | None:
        ran_seconds = self.measurements.ledger.ran_s
        assert ran_seconds is not None
        return text if seconds >= WORTH * ran_seconds else None

    def evaluation(self) -> str | None:
        """Half as often; and as well, half as long."""
        spent, done = self.measurements.ledger.eval_s, len(self.recorded.evals)
        if not spent or not done:
            return None
        every, batches = self.spec.eval_every or 0, self.spec.eval_batches or 0
        fewer = evaluations(self.spec) - evaluations(replace(self.spec, eval_every=2 * every))
        saved = fewer * spent / done
        text = (
            f"evaluation every {2 * every:,} steps instead of {every:,} saves "
            f"{format_seconds(saved)}"
        )
        if batches > 1:
            half = spent * (batches - batches // 2) / batches
            text += f"; {batches // 2:,} batches instead of {batches:,} save {format_seconds(half)}"
        return self._worth(saved, text)

    def checkpoints(self) -> str | None:
        """Half as many, unless this very run needed them."""
        spent = self.measurements.ledger.checkpoint_s
        if not spent or self.recorded.lost_steps:
            return None
        every = self.spec.checkpoint_every or 0
        planned = checkpoints(self.spec)
        kept = checkpoints(replace(self.spec, checkpoint_every=2 * every))
        saved = (planned - kept) * self._checkpoint_seconds()
        return self._worth(
            saved,
            f"a checkpoint every {2 * every:,} steps instead of {every:,} saves "
            f"{format_seconds(saved)}, and a run that dies loses twice as much",
        )

    def _checkpoint_seconds(self) -> float:
        written = sum(line.seconds is not None for line in self.recorded.checkpoints)
        return (self.measurements.ledger.checkpoint_s or 0.0) / max(written, 1)

    def restarts(self) -> str | None:
        """Half the work is lost with twice the checkpoints, which have their price."""
        lost, every = self.measurements.ledger.lost_s or 0.0, self.spec.checkpoint_every or 0
        if not self.recorded.lost_steps or every < 2:
            return None
        more = checkpoints(replace(self.spec, checkpoint_every=every // 2))
        price = (more - checkpoints(self.spec)) * self._checkpoint_seconds()
        saved = lost / 2 - price
        return self._worth(
            saved,
            f"a checkpoint every {every // 2:,} steps instead of {every:,} would have saved about "
            f"{format_seconds(saved)}: half of what was made again, less {format_seconds(price)} "
            "of more checkpoints",
        )

    def data(self) -> str | None:
        """None of text that is in memory, which no disk makes faster."""
        if self.spec.dataset == EMBEDDED_TEXT:
            return None
        waited = self.measurements.ledger.data_wait_s or 0.0
        return self._worth(
            waited,
            f"reading the shards from a faster disk saves up to {format_seconds(waited)}",
        )

    def compilation(self) -> str | None:
        """What a compiler saves that finds its own results of an earlier run."""
        again = sum(startup.compile_seconds for startup in self.recorded.startups[1:])
        spent = (self.measurements.ledger.compile_s or 0.0) - again
        predicted = compile_seconds(self.spec, self.prediction.hardware)
        if not predicted.expected:
            return None
        saved = (1 - predicted.low / predicted.expected) * spent  # low is from a warm cache
        return self._worth(
            saved,
            f"what was compiled is kept (docs/install.md): it saves up to {format_seconds(saved)} "
            "when this model is trained again",
        )

    def throttling(self, lost: float) -> str | None:
        """On what held the clock down, where the steps lost so many seconds by it."""
        words = " ".join(self.clock.reasons)
        if "brake" in words:
            what = "a power supply and cables that hold (power brake)"
        elif "thermal" in words:
            what = "more air for the card"
        else:
            what = "finding out why (nvidia-smi -q -d PERFORMANCE)"
        return self._worth(lost, f"{what} saves about {format_seconds(lost)}")

    def power_limit(self) -> str | None:
        """Where it was set below the card's own, and the clock was below the one counted with."""
        limits = self.recorded.sensors.known("power_limit_watts")
        row, counted = (
            find_gpu(self.prediction.hardware.name),
            counted_clock_hz(self.prediction.hardware),
        )
        hz, own = self.clock.hz, row.power_watts if row is not None else None
        laptop = row is not None and "Laptop" in row.name  # its limit is the maker's
        if hz is None or counted is None or own is None or self.share is None or laptop:
            return None
        if not len(limits) or not self.clock.capped or hz >= counted:
            return None
        limit = float(np.median(limits)) / (self.recorded.starts[-1].sensed_cards or 1)
        if limit > own - 1:
            return None
        saved = slowed(self.share, counted, hz) * (self.measurements.ledger.step_s or 0.0)
        return self._worth(
            saved,
            f"the power limit of {limit:.0f} W is below the card's own {own:.0f} W: raising it "
            f"saves at most {format_seconds(saved)}, if the clock then rises from "
            f"{hz / 1e9:.3f} to {counted / 1e9:.3f} GHz",
        )

    def micro_batch(self) -> str | None:
        """The larger micro-batch, if it is sure to fit and its steps are expected to be shorter."""
        steps = {s.id: s.step_seconds.expected for s in self.scenarios}
        larger = next((s for s in self.scenarios if s.id == "micro_batch"), None)
        if larger is None or larger.verdict != "fits":
            return None
        saved = (steps["again"] - steps["micro_batch"]) * self.spec.steps
        return self._worth(
            saved, f"{larger.label} ({larger.change}) saves about {format_seconds(saved)}"
        )


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


class Attribution(Stored):
    predicted_s: float
    actual_s: float
    """the time in which a process ran"""
    parts: list[Cause]
    """adds up to actual_s - predicted_s"""
    reference: str
    """what predicted_s is"""


def attribute(
    prediction: Prediction,
    measurements: Measurements,
    spec: RunSpec,
    recorded: Recorded,
    scenarios: Sequence[Scenario] = (),
) -> Attribution | None:
    """Against the analytic prediction; None where the total was not measured or not predicted."""
    planned = prediction.ledger
    if not planned or not _is_whole(measurements):
        return None
    steps = spec.steps
    expected = Expected(
        total_seconds=sum(planned.values()),
        step_seconds=planned["step_s"] / steps,
        steps=steps,
        reference="analytic prediction",
        planned=planned,
        clock=counted_clock(prediction.hardware),
    )
    return _attribution(expected, _advice(prediction, measurements, spec, recorded, scenarios))


def attribute_claim(
    claims: Claims | None,
    prediction: Prediction,
    measurements: Measurements,
    spec: RunSpec,
    recorded: Recorded,
    scenarios: Sequence[Scenario] = (),
) -> Attribution | None:
    """Against the middle of the narrowest claimed total, taken as steps and nothing else."""
    totals: list[tuple[float, float, Claim]] = []
    for claim in claims.claim if claims is not None else []:
        if claim.row == "total_seconds" and claim.formula is None and claim.middle is not None:
            totals.append((claim.high - claim.low, claim.middle, claim))
    if claims is None or not totals or not _is_whole(measurements):
        return None
    _, middle, claim = min(totals, key=lambda t: t[0])
    steps = spec.steps
    expected = Expected(
        total_seconds=middle,
        step_seconds=middle / steps,
        steps=steps,
        reference=f"middle of the claim {claim.key}",
        planned={},
        clock=None,
    )
    return _attribution(expected, _advice(prediction, measurements, spec, recorded, scenarios))


def _is_whole(measurements: Measurements) -> bool:
    """Whether the total and a steady step were measured."""
    return {"total_seconds", "step_seconds"} <= measurements.values.keys()


def _advice(
    prediction: Prediction,
    measurements: Measurements,
    spec: RunSpec,
    recorded: Recorded,
    scenarios: Sequence[Scenario],
) -> Advice:
    share = arithmetic_share(prediction)
    return Advice(
        spec=spec,
        prediction=prediction,
        measurements=measurements,
        recorded=recorded,
        clock=measure_clock(recorded, share),
        share=share,
        scenarios=scenarios,
    )


def _attribution(expected: Expected, advice: Advice) -> Attribution:
    ledger = advice.measurements.ledger
    assert ledger.ran_s is not None
    causes = [*step_causes(expected, advice), *_other_causes(expected, advice)]
    named = sum(cause.seconds for cause in causes)
    causes.append(
        Cause(
            cause="everything else",
            seconds=ledger.ran_s - expected.total_seconds - named,
            why="start-up, logging, text samples"
            if ledger.other_s is not None
            else "this log does not show it",
        )
    )
    return Attribution(
        predicted_s=expected.total_seconds,
        actual_s=ledger.ran_s,
        parts=causes,
        reference=expected.reference,
    )


def _other_causes(expected: Expected, advice: Advice) -> Iterator[Cause]:
    """Whatever is no step."""
    ledger, recorded = advice.measurements.ledger, advice.recorded
    yield Cause(
        cause="waiting for data",
        seconds=ledger.data_wait_s or 0.0,
        why="none was predicted"
        if ledger.data_wait_s is not None
        else "not told apart in this log: part of the steps",
        advice=advice.data(),
    )
    compiled_again = sum(startup.compile_seconds for startup in recorded.startups[1:])
    for key, cause, inside, told, more in (
        ("compile_s", "compilation", "the first step", advice.compilation(), compiled_again),
        ("eval_s", "evaluation", "the steps", advice.evaluation(), 0.0),
        ("checkpoint_s", "checkpoints", "evaluation", advice.checkpoints(), 0.0),
    ):
        actual = (getattr(ledger, key) or 0.0) - more
        wanted = expected.planned.get(key, 0.0)
        why = f"{format_seconds(actual)} instead of {format_seconds(wanted)}"
        if getattr(ledger, key) is None:
            where = inside if ledger.other_s is None else "everything else"
            why = f"not told apart in this log: part of {where}"
        yield Cause(cause=cause, seconds=actual - wanted, why=why, advice=told)
    lost, startup = ledger.lost_s or 0.0, ledger.startup_s or 0.0
    yield Cause(
        cause="restarts and lost work",
        seconds=lost + startup + compiled_again,
        why=_restarts(advice, compiled_again),
        advice=advice.restarts(),
    )


def _restarts(advice: Advice, compiled_again: float) -> str:
    ledger, recorded = advice.measurements.ledger, advice.recorded
    later, back = len(recorded.processes) - 1, len(recorded.starts) - len(recorded.processes)
    if not later and not back:
        return "it was one process"
    resumed = " and ".join(
        f"{what} once" if count == 1 else f"{what} {count} times"
        for what, count in (("resumed", later), ("gone back", back))
        if count
    )
    if ledger.lost_s is None or ledger.startup_s is None:
        return f"{resumed}; this log does not tell what that took"
    return (
        f"{resumed}: {format_seconds(ledger.lost_s)} of work was made again "
        f"({recorded.lost_steps:,} steps), starting again took {format_seconds(ledger.startup_s)} "
        f"and compilation {format_seconds(compiled_again)}; what a process did after its last "
        "line is not known, and stands in the time when none ran"
    )
