"""Build the report's rows: a quantity each, with its claim, prediction, measurement and verdict."""

from __future__ import annotations

import math
from typing import Literal

from nanogauge.analysis.claims import Claim, Claims
from nanogauge.analysis.consistency import (
    Inconsistency,
    arithmetic_sentence,
    computed_value,
    inconsistencies,
    range_text,
)
from nanogauge.analysis.ledger import LEDGER_NAMES, Ledger, Measured
from nanogauge.analysis.measured import Measurements
from nanogauge.quantities import QUANTITIES, finite, format_range, format_seconds, format_value
from nanogauge.runspec import RunSpec
from nanogauge.schema import Estimate, Prediction, Stored

RowVerdict = Literal["held", "missed", "contradicted", "not measured", "no claim"]


class Claimed(Stored):
    low: float | None
    """Lower end of the range; None if open."""
    high: float | None
    text: str
    """Formatted range."""
    quote: str
    english: str
    reading: str | None

    @property
    def width(self) -> float:
        """Width of the range; infinite if an end is open."""
        return math.inf if self.low is None or self.high is None else self.high - self.low


class Row(Stored):
    id: str
    claim: str | None
    """Key of the claim; None without one."""
    quantity: str
    unit: str
    claimed: Claimed | None
    analytic: Estimate | None
    calibrated: Estimate | None
    """Prediction from measurements on the device before the run."""
    measured: Measured | None
    verdict: RowVerdict
    """Verdict on the claim."""
    prediction: Literal["held", "missed"] | None
    """Verdict on the analytic interval; None without a prediction or measurement."""
    factor: float | None
    """Measured or computed value over the claimed number or nearest end, 1 inside the range.
    Without a claim, measured over predicted value."""
    why: str


def build_rows(
    claims: Claims | None, spec: RunSpec, prediction: Prediction, measurements: Measurements | None
) -> tuple[list[Row], list[Inconsistency]]:
    """Return a row per claim and per unclaimed quantity, and the claims that cannot be true.

    `measurements` is None for a plan, which is made before the run.
    """
    findings = inconsistencies(claims, spec, prediction) if claims is not None else []
    rows: list[Row] = []
    for row_id in QUANTITIES:
        of_row: list[Claim | None] = []
        of_row += [c for c in claims.claim if c.row == row_id] if claims is not None else []
        for claim in of_row or [None]:
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
        # The formula describes another run, which this one says nothing about.
        analytic = calibrated = measured = None
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
            reasons += _counter_evidence(claim, findings, measurements)
    inside = None
    if analytic is not None and measured is not None:
        slack = 1e-3 * abs(analytic.expected) if QUANTITIES[row_id].exact else 0.0
        inside = analytic.low - slack <= measured.value <= analytic.high + slack
    label, unit = _label(row_id, prediction), QUANTITIES[row_id].unit
    return Row(
        id=row_id,
        claim=claim.key if claim is not None else None,
        quantity=f"{label}: {claim.label}" if claim is not None and claim.label else label,
        unit=spec.cost.currency if unit == "currency" else unit,
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
    """Return the row's label; with several GPUs it says if the value is per GPU or for all."""
    quantity, gpus = QUANTITIES[row_id], prediction.gpus
    if gpus == 1 or quantity.of_gpus is None:
        return quantity.label
    each = "each of" if quantity.of_gpus == "each" else "all"
    them = "processes" if prediction.hardware.kind == "cpu" else "GPUs"
    return f"{quantity.label}, {each} {gpus} {them}"


def _claimed(claim: Claim | None, currency: str) -> Claimed | None:
    if claim is None:
        return None
    return Claimed(
        low=finite(claim.low),
        high=finite(claim.high),
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
    """Format a deviation: '12 % above', '1.97 times'."""
    ratio = value / reference
    if ratio == 0:
        return "nothing of"
    if 0.67 < ratio < 1.5:
        return f"{abs(ratio - 1) * 100:.2g} % {'above' if ratio > 1 else 'below'}"
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.3g} times"


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
    exact = analytic.low == analytic.high
    if exact and math.isclose(measured.value, analytic.expected, rel_tol=1e-3):
        return "as the configuration has it"
    deviation = deviation_text(measured.value, analytic.expected)
    expected = format_value(row_id, analytic.expected)
    if exact:
        return f"{deviation} the planned {expected}"
    where = "inside" if analytic.contains(measured.value) else "outside"
    interval = format_range(row_id, analytic.low, analytic.high)
    return f"{deviation} the expected {expected}, {where} the predicted {interval}"


def _context(
    row_id: str, measured: Measured | None, measurements: Measurements | None
) -> list[str]:
    """Return remarks on a measured value: its spread, parts or origin, and notes from the log."""
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
    """Format the non-negligible parts of the wall time."""
    parts = {name: getattr(ledger, key) for key, name in LEDGER_NAMES.items()}
    return ", ".join(
        f"{format_seconds(value)} of {name}"
        for name, value in parts.items()
        if value is not None and value > 1e-4 * (ledger.wall_s or 0.0)
    )


def _counter_evidence(
    claim: Claim, findings: list[Inconsistency], measurements: Measurements | None
) -> list[str]:
    """Return the first inconsistency that concerns the claim, and its published reference."""
    texts = [f.why.rstrip(".") for f in findings if f.ids[0] == claim.key][:1]
    reference = claim.reference
    if reference is None or measurements is None or reference.row not in measurements.values:
        return texts
    row, value = reference.row, measurements.values[reference.row].value
    text = (
        f"{QUANTITIES[row].label.lower()} {format_value(row, value)} against {reference.text} "
        f"{format_value(row, reference.value)} ({reference.source})"
    )
    return [*texts, text + " does not support it" * (value > reference.value)]
