"""The difference between a predicted and the actual total, in causes that add up exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nanogauge.claims import Claim, Claims
from nanogauge.quantities import format_seconds
from nanogauge.records import Prediction, Stored
from nanogauge.report.advice import Advice
from nanogauge.report.clocks import arithmetic_share, measure_clock
from nanogauge.report.measured import Measurements
from nanogauge.report.step_causes import (
    Cause,
    Expected,
    counted_clock,
    step_causes,
)
from nanogauge.report.what_if import Scenario
from nanogauge.runlog import Recorded
from nanogauge.runspec import RunSpec


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
