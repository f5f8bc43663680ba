"""Build the report's rows: a quantity each, with its claim, prediction, measurement and verdict."""

import math
from typing import Literal

from nanogauge.analysis.claims import Claim, Claims, spec_of_subject
from nanogauge.analysis.consistency import (
    Inconsistency,
    arithmetic_sentence,
    computed_value,
    factor_text,
    inconsistencies,
)
from nanogauge.analysis.ledger import Measured
from nanogauge.analysis.measured import LEAST_VALIDATION_TOKENS, PREDICTED_TASK, QUALITY, Measurements
from nanogauge.errors import BadInput
from nanogauge.hardware import lookup
from nanogauge.prediction.loss import DATASETS, GPT2_124M
from nanogauge.prediction.prediction import predict
from nanogauge.prediction.quality import loss_inputs, quality_at
from nanogauge.quantities import QUANTITIES, Interval, finite, format_value, span_of
from nanogauge.runspec import RunSpec
from nanogauge.schema import Estimate, Prediction, Stored

RowVerdict = Literal["held", "missed", "contradicted", "likely", "unlikely", "not measured", "no claim"]
Judge = Literal["measurement", "configuration", "arithmetic", "limit", "prediction"]


class Claimed(Stored):
    low: float | None
    """Lower end of the range; None if open."""
    high: float | None
    text: str
    """Formatted range."""
    quote: str
    english: str
    reading: str | None
    label: str | None = None
    """Assumption or subject of the claim."""
    of_this_run: bool = True
    """False if the claim is about another run than the reported one."""

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
    judged_by: Judge | None = None
    """What the verdict on the claim stands on; None without a claim or a verdict. Claims judged by arithmetic say
    nothing of the world: they are sums of the document, or follow from settings."""
    prediction: Literal["held", "missed"] | None
    """Verdict on the analytic interval, else on the calibrated one; None without a prediction or measurement."""
    factor: float | None
    """Value or nearest end of the predicted interval over the claimed number or nearest end, 1 inside the range.
    Without a claim, measured over predicted value."""
    why: str


def build_rows(
    claims: Claims | None, spec: RunSpec, prediction: Prediction, measurements: Measurements | None
) -> tuple[list[Row], list[Inconsistency]]:
    """Return a row per claim and per quantity without one, and the claims that cannot be true.

    A quantity also has a row of its own if all claims about it are about other runs. `measurements` is None for a plan,
    which is made before the run.

    Raises:
        BadInput: if a claim's formula has no value, or its subject is no valid run.
    """
    findings = inconsistencies(claims, spec, prediction) if claims is not None else []
    rows: list[Row] = []
    for row_id, quantity in QUANTITIES.items():
        of_row: list[Claim | None] = []
        of_row += [c for c in claims.claim if c.row == row_id] if claims is not None else []
        hidden = quantity.optional and row_id not in prediction.quantities
        if not (hidden or any(c is not None and c.is_about_this_run for c in of_row)):
            of_row.insert(0, None)  # this run's own value
        for claim in of_row:
            if claim is None or claim.about is None:
                rows.append(_row(row_id, claim, spec, prediction, measurements, findings))
            else:
                rows.append(_row(row_id, claim, *_subject(claim, spec, prediction), None, []))
    return rows, findings


def _subject(claim: Claim, spec: RunSpec, prediction: Prediction) -> tuple[RunSpec, Prediction]:
    """Return the run that a claim is about, and its prediction."""
    about, hardware = claim.about or {}, prediction.hardware
    try:
        spec = spec_of_subject(spec.resolved(prediction.dtype, prediction.gpus), about)
    except ValueError as error:
        first = str(error).splitlines()[-1].strip()
        raise BadInput(f"the claim {claim.key} is about no valid run: {first}") from None
    if "gpu" in about:
        hardware = lookup(str(about["gpu"]), prediction.dtype)
    return spec, predict(spec, hardware)


def _row(
    row_id: str,
    claim: Claim | None,
    spec: RunSpec,
    prediction: Prediction,
    measurements: Measurements | None,
    findings: list[Inconsistency],
) -> Row:
    analytic, calibrated = prediction.quantities.get(row_id), prediction.calibrated.get(row_id)
    analytic = analytic or _of_first_step(row_id, prediction)
    measured = measurements.values.get(row_id) if measurements is not None else None
    if claim is not None and not (claim.is_about_this_run or claim.about is not None):
        # The formula describes another run, which this one says nothing about.
        analytic = calibrated = measured = None
    predicted = analytic or calibrated
    verdict: RowVerdict
    judged_by: Judge | None = None
    factor: float | None
    if claim is None:
        verdict = "no claim" if measured is not None else "not measured"
        factor = measured.predictable / predicted.expected if measured and predicted else None
        why = _against_prediction(row_id, predicted, measured, measurements, prediction)
    else:
        by_loss = quality_by_loss(spec, measurements) if row_id == QUALITY else None
        estimate = by_loss or calibrated or analytic
        verdict, judged_by, factor, why = _judge(claim, spec, prediction, measurements, measured, estimate, findings)
    inside = None
    alike = measured is not None and (row_id != QUALITY or PREDICTED_TASK in measured.how)
    if predicted is not None and measured is not None and alike:
        slack = 1e-3 * abs(predicted.expected) if QUANTITIES[row_id].exact else 0.0
        inside = predicted.low - slack <= measured.predictable <= predicted.high + slack
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
        judged_by=judged_by,
        prediction=None if inside is None else ("held" if inside else "missed"),
        factor=factor,
        why=why,
    )


def _of_first_step(row_id: str, prediction: Prediction) -> Estimate | None:
    """Return what the predicted first step says of the rows that compare it with the others."""
    first, step = prediction.best("first_step_seconds"), prediction.best("step_seconds")
    if first is None or step is None or row_id not in ("speedup_after_warmup", "compile_share"):
        return None
    ratio, formula = first / step.expected, "first step / steady step"
    if row_id == "compile_share":
        ratio, formula = (1 / ratio).map(lambda share: max(1 - share, 0.0)), "1 - step / first step"
    return Estimate.of(row_id, ratio, formula, first.source)


def quality_by_loss(spec: RunSpec, measurements: Measurements | None) -> Estimate | None:
    """Return the score that the measured loss stands for; None without a comparable loss.

    It is the loss of the training split if the validation set is small or of unknown size.
    """
    mark = GPT2_124M.get(spec.dataset or "")
    if mark is None or measurements is None or "val_loss" not in measurements.values:
        return None
    loss, split = measurements.values["val_loss"].value, "validation"
    if (spec.validation_tokens or 0) < LEAST_VALIDATION_TOKENS:
        if measurements.train_loss is None:
            return None
        loss, split = measurements.train_loss, "train-split"
    score = quality_at(loss_inputs(spec), Interval.exact(loss))
    if not isinstance(score, Estimate):
        return None
    compared = f"{split} loss {loss:.3f} on {spec.dataset}, GPT-2 124M's {mark.loss:.3f}"
    return score.model_copy(update={"formula": f"{compared}; {score.formula}"})


_Verdict = tuple[RowVerdict, Judge | None, float | None, str]


def _judge(
    claim: Claim,
    spec: RunSpec,
    prediction: Prediction,
    measurements: Measurements | None,
    measured: Measured | None,
    estimate: Estimate | None,
    findings: list[Inconsistency],
) -> _Verdict:
    """Return the verdict on a claim, what it stands on, its factor and its reason.

    Arithmetic comes first, then the measurement, then limits of the hardware, then the prediction.
    """
    if claim.says is not None:
        return _judge_name(claim, spec)
    computed = computed_value(claim, spec, prediction)
    if computed is not None:
        sentence = arithmetic_sentence(claim, computed, spec, prediction)
        verdict: RowVerdict = "held" if claim.holds(computed) else "contradicted"
        return verdict, "arithmetic", claim.factor(computed), sentence
    currency = spec.cost.currency
    if measured is not None:
        factor = claim.factor(measured.value)
        reasons = [_against_claim(claim, measured.value, "", currency)]
        reasons += measurements.notes.get(claim.row, []) if measurements is not None else []
        verdict = "held" if claim.holds(measured.value) else "missed"
        return verdict, "measurement", factor, "; ".join(r for r in reasons if r)
    limit = prediction.hardware.memory_bytes
    ended = measurements is not None and measurements.status == "finished"
    upper = claim.row == "peak_process_bytes" and math.isinf(claim.low)
    if ended and upper and limit is not None and claim.high >= limit:
        why = "the run reached its end, so its peak fitted into the memory"
        return "held", "measurement", 1.0, why
    for finding in findings:
        if finding.ids == [claim.key] and finding.certain and finding.whole:
            return "contradicted", "limit", None, finding.why.rstrip(".")
    if estimate is not None:
        near = min(max(claim.low, estimate.low), estimate.high)
        verdict = "likely" if claim.holds(near) else "unlikely"
        interval = span_of(*(claim.text(end, currency) for end in (estimate.low, estimate.high)))
        why = _against_claim(claim, near, interval, currency)
        why = estimate.formula if claim.row == QUALITY else why
        return verdict, "prediction", claim.factor(near), why
    unsaid = spec.unsaid(*spec.unknown)
    reason = measurements.missing.get(claim.row, unsaid) if measurements is not None else ""
    return "not measured", None, None, reason or prediction.unpredicted.get(claim.row, "")


def _judge_name(claim: Claim, spec: RunSpec) -> _Verdict:
    """Judge the claimed name of the data set by the configuration or the log."""
    if spec.dataset not in DATASETS:
        return "not measured", None, None, "neither the log nor the configuration names the data"
    held = claim.says == spec.dataset
    why = "as the configuration has it" if held else f"the configuration has {spec.dataset}"
    return ("held" if held else "missed"), "configuration", None, why


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
        text=claim.range_text(currency),
        quote=claim.quote,
        english=claim.english,
        reading=claim.reading,
        label=claim.label,
        of_this_run=claim.is_about_this_run,
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


def _against_claim(claim: Claim, value: float, interval: str, currency: str) -> str:
    """Compare a claim with a measured value, or with the nearest value of a predicted interval."""
    if claim.holds(value):
        return f"our prediction is {interval}" if interval else ""
    claimed, factor = claim.range_text(currency), claim.factor(value)
    if factor is None or factor <= 0:
        return f"our prediction is {interval}" if interval else f"not {claimed}"
    below = value < claim.low
    end, which = (claim.low, "lower") if below else (claim.high, "upper")
    if interval and below:
        return f"at least {factor_text(end / value)} our {interval}"
    if interval:
        return f"our {interval} are at least {factor_text(value / end)} that"
    if claim.value is None:
        return f"{deviation_text(value, end)} the {which} end"
    return f"{deviation_text(value, claim.value)} the claim"


def _against_prediction(
    row_id: str,
    predicted: Estimate | None,
    measured: Measured | None,
    measurements: Measurements | None,
    prediction: Prediction,
) -> str:
    if measured is None:
        return _not_measured(row_id, measurements)
    if predicted is None:
        return f"not predicted: {prediction.unpredicted.get(row_id, 'it was not frozen')}"
    exact = predicted.low == predicted.high
    if exact and math.isclose(measured.predictable, predicted.expected, rel_tol=1e-3):
        return "as the configuration has it"
    deviation = deviation_text(measured.predictable, predicted.expected)
    expected = format_value(row_id, predicted.expected)
    if exact:
        return f"{deviation} the planned {expected}"
    return f"{deviation} the expected {expected}"
