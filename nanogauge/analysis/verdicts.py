"""Rows of the report: what was claimed, what was predicted, what was measured, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from nanogauge.analysis.claims import Claim, Claims
from nanogauge.analysis.consistency import (
    Inconsistency,
    arithmetic_sentence,
    computed_value,
    factor_text,
    inconsistencies,
    range_text,
)
from nanogauge.analysis.figures import Measured
from nanogauge.analysis.ledger import LEDGER_NAMES, Ledger
from nanogauge.analysis.measured import Measurements
from nanogauge.quantities import QUANTITIES, format_range, format_seconds, format_value
from nanogauge.runspec import RunSpec
from nanogauge.schema import Estimate, Prediction, Stored

RowVerdict = Literal["held", "missed", "contradicted", "not measured", "no claim"]


class Claimed(Stored):
    low: float | None
    """None where the range is open at this end"""
    high: float | None
    text: str
    """the claim as a person reads it"""
    quote: str
    english: str
    reading: str | None


class Row(Stored):
    id: str
    claim: str | None
    """the claim's key"""
    quantity: str
    unit: str
    claimed: Claimed | None
    analytic: Estimate | None
    calibrated: Estimate | None
    """from measurements on the device, made before the run"""
    measured: Measured | None
    verdict: RowVerdict
    """on the claim"""
    prediction: Literal["held", "missed"] | None
    """whether the measured figure lies in the analytic interval; None where either is absent"""
    factor: float | None
    """measured (or computed) over the claimed number or the nearest end of its range, 1 inside it;
    without a claim, measured over the analytic expectation"""
    why: str


def build_rows(
    claims: Claims | None,
    spec: RunSpec,
    prediction: Prediction,
    measurements: Measurements | None,
) -> tuple[list[Row], list[Inconsistency]]:
    """One row per claim, and one for each quantity without a claim; and what cannot be true.

    Without measurements (a plan) every measured field is None.
    """
    findings = inconsistencies(claims, spec, prediction) if claims is not None else []
    rows: list[Row] = []
    for row_id in QUANTITIES:
        about = [c for c in claims.claim if c.row == row_id] if claims is not None else []
        candidates: Sequence[Claim | None] = about or [None]
        for claim in candidates:
            rows.append(_row(row_id, claim, spec, prediction, measurements, findings))
    return rows, findings


def _row(
    row_id: str,
    claim: Claim | None,
    spec: RunSpec,
    prediction: Prediction,
    measurements: Measurements | None,
    findings: list[Inconsistency],
) -> Row:
    analytic, calibrated = prediction.quantities.get(row_id), prediction.calibrated.get(row_id)
    measured = measurements.values.get(row_id) if measurements is not None else None
    if claim is not None and claim.formula is not None and not QUANTITIES[row_id].exact:
        analytic = calibrated = measured = (
            None  # a sum about some other run: this one is no answer to it
        )
    verdict: RowVerdict
    factor: float | None
    if claim is None:
        verdict = "no claim" if measured is not None else "not measured"
        factor = measured.value / analytic.expected if measured and analytic else None
        reasons = [_against_prediction(row_id, analytic, measured, measurements, prediction)]
    else:
        computed = computed_value(claim, spec, prediction)
        if computed is not None:
            verdict = "held" if claim.holds(computed) else "contradicted"
            factor = claim.factor(computed)
            reasons = [arithmetic_sentence(claim, computed, prediction)]
        elif measured is not None:
            verdict = "held" if claim.holds(measured.value) else "missed"
            factor = claim.factor(measured.value)
            reasons = [_against_claim(claim, measured, factor)]
        else:
            verdict, factor = "not measured", None
            reasons = [_not_measured(row_id, measurements)]
            if analytic is not None and measurements is not None:
                predicted = format_range(row_id, analytic.low, analytic.high, spec.cost.currency)
                reasons.append(f"predicted {predicted}")
        if computed is None:
            reasons += _context(row_id, measured, measurements)
            reasons += _what_speaks_against(claim, findings, measurements)
    inside = None
    if analytic is not None and measured is not None:
        slack = 1e-3 * abs(analytic.expected) if QUANTITIES[row_id].exact else 0.0
        inside = analytic.low - slack <= measured.value <= analytic.high + slack
    quantity = QUANTITIES[row_id]
    return Row(
        id=row_id,
        claim=claim.key if claim is not None else None,
        quantity=": ".join(
            filter(None, (_label(row_id, prediction), claim.label if claim else None))
        ),
        unit=spec.cost.currency if quantity.unit == "currency" else quantity.unit,
        claimed=_claimed(claim, spec.cost.currency),
        analytic=analytic,
        calibrated=calibrated,
        measured=measured,
        verdict=verdict,
        prediction=None if inside is None else ("held" if inside else "missed"),
        factor=factor,
        why="; ".join(r for r in reasons if r),
    )


def _label(row_id: str, prediction: Prediction) -> str:
    """What the row is about; of several GPUs or processes, whether of each or of all."""
    quantity, gpus = QUANTITIES[row_id], prediction.gpus
    if gpus == 1 or quantity.of_gpus is None:
        return quantity.label
    each = "each of" if quantity.of_gpus == "each" else "all"
    them = "processes" if prediction.hardware.kind == "cpu" else "GPUs"
    return f"{quantity.label}, {each} {gpus} {them}"


def _claimed(claim: Claim | None, currency: str) -> Claimed | None:
    if claim is None:
        return None
    low, high = (v if math.isfinite(v) else None for v in (claim.low, claim.high))
    return Claimed(
        low=low,
        high=high,
        text=range_text(claim, currency),
        quote=claim.quote,
        english=claim.english,
        reading=claim.reading,
    )


def _not_measured(row_id: str, measurements: Measurements | None) -> str:
    if measurements is None:
        return ""
    return f"not measured: {measurements.missing[row_id]}"


def deviation_text(value: float, reference: float) -> str:
    """How far a value lies above or below a reference: '12 % above', '1.97 times below'."""
    ratio = value / reference
    if ratio == 0:
        return "nothing of"
    if 0.67 < ratio < 1.5:
        return f"{abs(ratio - 1) * 100:.2g} % {'above' if ratio > 1 else 'below'}"
    return factor_text(ratio) + (" above" if ratio > 1 else " below")


def _against_claim(claim: Claim, measured: Measured, factor: float | None) -> str:
    text = format_value(claim.row, measured.value)
    if claim.holds(measured.value):
        return f"{text} lies within {range_text(claim)}" if claim.value is None else text
    end = claim.low if measured.value < claim.low else claim.high
    if factor is None or factor <= 0:
        return f"{text}, not {range_text(claim)}"
    which = "the lower end" if measured.value < claim.low else "the upper end"
    return f"{deviation_text(measured.value, end)} {which} of {range_text(claim)}"


def _against_prediction(
    row_id: str,
    analytic: Estimate | None,
    measured: Measured | None,
    measurements: Measurements | None,
    prediction: Prediction,
) -> str:
    if measured is None:
        return _not_measured(row_id, measurements)
    if analytic is None:
        return f"not predicted: {prediction.unpredicted.get(row_id, 'it was not frozen')}"
    if analytic.low == analytic.high:
        same = math.isclose(measured.value, analytic.expected, rel_tol=1e-3)
        return (
            "as the configuration has it"
            if same
            else (
                f"{deviation_text(measured.value, analytic.expected)} the planned "
                f"{format_value(row_id, analytic.expected)}"
            )
        )
    off = deviation_text(measured.value, analytic.expected)
    held = analytic.low <= measured.value <= analytic.high
    interval = format_range(row_id, analytic.low, analytic.high)
    return (
        f"{off} the expected {format_value(row_id, analytic.expected)}, "
        f"{'inside' if held else 'outside'} the predicted {interval}"
    )


def _context(
    row_id: str, measured: Measured | None, measurements: Measurements | None
) -> list[str]:
    """What the reader should know beside the figure: its spread, its parts, its origin."""
    if measured is None or measurements is None:
        return []
    match row_id:
        case "step_seconds" if measured.p10 is not None and measured.p90 is not None:
            spread = 100 * (measured.p90 - measured.p10) / measured.value
            text = f"{spread:.2g}" if spread < 10 else f"{spread:.0f}"
            return [f"the middle 80 % of {measured.n:,} steps lie {text} % apart"]
        case "total_seconds":
            return [ledger_sentence(measurements.ledger)]
        case "first_step_seconds":
            return [measured.how]
        case "mfu_palm" | "mfu_6n":
            achieved, _, _ = measured.how.partition(";")
            return [achieved, *measurements.notes.get(row_id, [])]
        case _:
            return measurements.notes.get(row_id, [])


def ledger_sentence(ledger: Ledger) -> str:
    """The parts of the wall time that are not nothing, in words."""
    parts = {name: getattr(ledger, key) for key, name in LEDGER_NAMES.items()}
    return ", ".join(
        f"{format_seconds(value)} of {name}"
        for name, value in parts.items()
        if value is not None and value > 1e-4 * (ledger.wall_s or 0.0)
    )


def _what_speaks_against(
    claim: Claim, findings: list[Inconsistency], measurements: Measurements | None
) -> list[str]:
    """The first finding about the claim, and the published figure that bears on it."""
    texts = [f.why.rstrip(".") for f in findings if f.ids[0] == claim.key][:1]
    reference = claim.reference
    if reference is not None:
        seen = measurements.values.get(reference.row) if measurements is not None else None
        label = QUANTITIES[reference.row].label.lower()
        if seen is not None:
            texts.append(
                f"{label} {format_value(reference.row, seen.value)} against {reference.text} "
                f"{format_value(reference.row, reference.value)} ({reference.source})"
                + (" does not support it" if seen.value > reference.value else "")
            )
    return texts
