"""The difference between a predicted and the actual total, in causes that add up exactly."""

from __future__ import annotations

from nanogauge.claims import Claim, Claims
from nanogauge.config import Config
from nanogauge.quantities import format_seconds
from nanogauge.records import Prediction, Stored
from nanogauge.report.measured import Measurements


class Cause(Stored):
    cause: str
    seconds: float
    why: str


class Attribution(Stored):
    predicted_s: float
    actual_s: float
    parts: list[Cause]
    """adds up to actual_s - predicted_s"""
    reference: str
    """what predicted_s is"""


def attribute(
    prediction: Prediction, measurements: Measurements, config: Config
) -> Attribution | None:
    """Against the analytic prediction; None where the total was not measured or not predicted."""
    planned = prediction.ledger
    if not planned or not _is_whole(measurements):
        return None
    steps = config.train.max_steps
    step = planned["step_s"] / steps
    return _attribution(
        measurements,
        predicted=sum(planned.values()),
        step_seconds=step,
        steps=steps,
        planned=planned,
        reference="analytic prediction",
    )


def attribute_claim(
    claims: Claims | None, measurements: Measurements, config: Config
) -> Attribution | None:
    """Against the middle of the narrowest claimed total, taken as steps and nothing else."""
    totals: list[tuple[float, float, Claim]] = []
    for claim in claims.claim if claims is not None else []:
        if claim.row == "total_seconds" and claim.formula is None and claim.middle is not None:
            totals.append((claim.high - claim.low, claim.middle, claim))
    if not totals or not _is_whole(measurements):
        return None
    _, middle, claim = min(totals, key=lambda t: t[0])
    steps = config.train.max_steps
    return _attribution(
        measurements,
        predicted=middle,
        step_seconds=middle / steps,
        steps=steps,
        planned={},
        reference=f"middle of the claim {claim.key}",
    )


def _is_whole(measurements: Measurements) -> bool:
    """Whether the total and a steady step were measured."""
    return {"total_seconds", "step_seconds"} <= measurements.values.keys()


def _attribution(
    measurements: Measurements,
    predicted: float,
    step_seconds: float,
    steps: int,
    planned: dict[str, float],
    reference: str,
) -> Attribution:
    ledger, done = measurements.ledger, measurements.steps_done
    assert measurements.median_step_seconds is not None
    assert ledger.step_s is not None and ledger.wall_s is not None
    wait = ledger.data_wait_s or 0.0
    steady = measurements.median_step_seconds - wait / done
    causes = [
        Cause(
            cause="steady step",
            seconds=(steady - step_seconds) * done,
            why=f"{format_seconds(steady)} a step instead of {format_seconds(step_seconds)}",
        ),
        Cause(
            cause="number of steps",
            seconds=(done - steps) * step_seconds,
            why=f"{done:,} steps instead of {steps:,}",
        ),
        Cause(
            cause="uneven steps",
            seconds=ledger.step_s - steady * done,
            why="steps slower or faster than the median",
        ),
        Cause(cause="waiting for data", seconds=wait, why="none was predicted"),
    ]
    for key, cause, inside in (
        ("compile_s", "compilation", "the first step"),
        ("eval_s", "evaluation", "the steps"),
        ("checkpoint_s", "checkpoints", "evaluation"),
    ):
        actual, expected = getattr(ledger, key) or 0.0, planned.get(key, 0.0)
        why = f"{format_seconds(actual)} instead of {format_seconds(expected)}"
        if getattr(ledger, key) is None:
            where = inside if ledger.other_s is None else "everything else"
            why = f"not told apart in this log: part of {where}"
        causes.append(Cause(cause=cause, seconds=actual - expected, why=why))
    named = sum(c.seconds for c in causes)
    causes.append(
        Cause(
            cause="everything else",
            seconds=ledger.wall_s - predicted - named,
            why="start-up, logging, text samples"
            if ledger.other_s is not None
            else "this log does not show it",
        )
    )
    return Attribution(
        predicted_s=predicted, actual_s=ledger.wall_s, parts=causes, reference=reference
    )
