"""From a run folder to the report: everything the pages, the table and report.json show."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from nanogauge.analysis.attribution import Attribution, attribute, attribute_claim
from nanogauge.analysis.claims import Claims, Unscored
from nanogauge.analysis.claims import load_claims as read_claims
from nanogauge.analysis.consistency import Inconsistency
from nanogauge.analysis.incidents import SKIPPED, Night, rollbacks, skipped_updates, tell_night
from nanogauge.analysis.instruments import Instrument, instruments
from nanogauge.analysis.ledger import Ledger
from nanogauge.analysis.measured import Measurements, measure
from nanogauge.analysis.status import (
    LastEvent,
    Projection,
    Silence,
    State,
    last_events,
    process_is_there,
    project,
    silence,
    unfinished_headline,
    without_totals,
)
from nanogauge.analysis.verdicts import Row, build_rows, deviation_text
from nanogauge.analysis.what_if import Scenario, what_if
from nanogauge.quantities import (
    QUANTITIES,
    format_range,
    format_seconds,
    format_value,
    tokens_per_second,
)
from nanogauge.runlog.folder import CLAIMS_NAME, Machine, RunFolder, load_with_log
from nanogauge.runlog.history import Recorded
from nanogauge.runlog.reader import LogReader, last_written
from nanogauge.schema import SCHEMA, Prediction, Stored, TimeZone


class RunInfo(Stored):
    name: str
    source: str
    status: str
    steps_done: int
    max_steps: int
    started_unix: float | None
    time_zone: TimeZone = TimeZone()
    """of the machine that trained; UTC where machine.json has none"""
    device: str
    dtype: str
    compiled: bool | None
    """None where the log does not say"""
    tokens_per_second: float | None
    state: State | None
    """of a run without an end in its log: what its silence says at the moment of the report"""
    last_line_age_s: float | None
    """of such a run: how long ago, at that moment, its log was last written to"""
    projected_total_s: float | None
    """of an unfinished run: what it will take at the measured pace"""
    projected_low_s: float | None
    projected_high_s: float | None
    projected_how: str | None
    prediction_sha256: str
    document: str | None
    """whose claims the rows hold"""
    restarts: int
    """processes after the first"""
    lost_steps: int
    """steps that were made again, after a restart or a rollback"""
    skipped_updates: int | None
    """as loss or gradient was not finite, those of lost work included; None where the log is that
    of another program"""
    rollbacks: int | None
    """how often the run went back to a checkpoint, to see its data in another order"""
    verdicts: dict[str, int]
    """how many claims have which verdict"""
    not_measured: int
    """rows without a figure"""
    predictions_held: int
    predictions_judged: int
    """quantities that were both predicted and measured"""
    headline: str


class RaisedAlarm(Stored):
    """What called for somebody in the night."""

    what: str
    step: int | None
    elapsed_seconds: float | None
    """since the process began that raised it"""
    text: str


class Report(Stored):
    run: RunInfo
    rows: list[Row]
    inconsistencies: list[Inconsistency]
    unscored: list[Unscored]
    attribution: Attribution | None
    attribution_of_claim: Attribution | None
    what_if: list[Scenario]
    """the same night at other settings; empty where no step was predicted or measured"""
    time_ledger: Ledger
    instruments: list[Instrument]
    """figures without a row: how the run's time, memory and energy came about"""
    alarms: list[RaisedAlarm]
    night: Night
    """how the run went on after a fault, and what that cost"""
    last_events: list[LastEvent]
    """of a run that has not finished: what it did last"""
    samples: list[str]
    """text that the model generated, as logged"""
    warnings: list[str]

    def other_warnings(self) -> list[str]:
        """Those that the night does not tell of."""
        told = [one.text for one in self.night.happenings]
        return [w for w in self.warnings if not any(text.startswith(w) for text in told)]

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **self.model_dump(mode="json")}


def claims_of(folder: Path, given: Path | None) -> Claims | None:
    """The claims to hold against a run: those given, else those that lie in its folder."""
    path = given or folder / CLAIMS_NAME
    return read_claims(path) if given is not None or path.exists() else None


def build_report(
    folder: Path,
    claims: Claims | None,
    reader: LogReader | None = None,
    now_unix: float | None = None,
) -> tuple[Report, RunFolder, Recorded]:
    """Read a run folder and compare.

    Args:
        folder: the run folder.
        claims: what to hold against the run.
        reader: one that has read a part of this run's log already, so that it need not read again.
        now_unix: the moment of the report; only that of a run without an end depends on it.

    Raises:
        BadInput: if the folder, its log, or a claim is unusable.
    """
    now = time.time() if now_unix is None else now_unix
    alive = process_is_there(folder)  # before its log: it may end meanwhile
    written = last_written(folder)
    run, recorded = load_with_log(folder, reader)
    spec, prediction = run.spec, run.prediction
    measurements = without_totals(measure(recorded, spec, prediction), spec)
    rows, findings = build_rows(claims, spec, prediction, measurements)
    scenarios = what_if(spec, prediction, measurements, recorded)
    attribution = attribute(prediction, measurements, spec, recorded, scenarios)
    of_claim = attribute_claim(claims, prediction, measurements, spec, recorded, scenarios)
    quiet = silence(recorded, prediction, written, now, alive)
    finished = measurements.status == "finished"
    projection = None if finished else project(recorded, spec, prediction, measurements)
    headline = (
        _headline(claims, rows, measurements, attribution, prediction)
        if finished
        else unfinished_headline(
            measurements, spec, prediction, quiet, projection, run.time_zone.local(now)
        )
    )
    info = _run_info(run, recorded, claims, rows, measurements, quiet, projection, headline)
    report = Report(
        run=info,
        rows=rows,
        inconsistencies=[*findings, *impossible(measurements)],
        unscored=claims.unscored if claims is not None else [],
        attribution=attribution,
        attribution_of_claim=of_claim,
        what_if=scenarios,
        time_ledger=measurements.ledger,
        instruments=instruments(recorded, spec, prediction, measurements),
        alarms=[
            RaisedAlarm(what=e.what, step=e.step, elapsed_seconds=e.elapsed_seconds, text=e.text)
            for e in recorded.events
            if e.level == "alarm"
        ],
        night=tell_night(recorded),
        last_events=[] if finished else last_events(recorded, measurements),
        samples=[e.text for e in recorded.events if e.what == "sample"],
        warnings=_warnings(recorded, prediction, quiet),
    )
    return report, run, recorded


def impossible(measurements: Measurements) -> list[Inconsistency]:
    """Figures of this run that cannot be true: more than the peak."""
    return [
        Inconsistency(ids=[row], why=f"{QUANTITIES[row].label}: {measurements.missing[row]}")
        for row in measurements.refused
    ]


def _run_info(
    run: RunFolder,
    recorded: Recorded,
    claims: Claims | None,
    rows: list[Row],
    measurements: Measurements,
    quiet: Silence | None,
    projection: Projection | None,
    headline: str,
) -> RunInfo:
    spec, median = run.spec, measurements.median_step_seconds
    start = recorded.starts[0]
    predictions = {row.id: row.prediction for row in rows if row.prediction is not None}
    return RunInfo(
        name=spec.name or run.path.name,
        source=start.source,
        status=measurements.status,
        steps_done=measurements.steps_done,
        max_steps=spec.steps,
        started_unix=start.unix_time,
        time_zone=run.time_zone,
        device=start.device,
        dtype=run.prediction.dtype,
        compiled=recorded.compiles[-1].mode == "compiled" if recorded.compiles else None,
        tokens_per_second=tokens_per_second(spec.tokens_per_step, median) if median else None,
        state=quiet.state if quiet is not None else None,
        last_line_age_s=quiet.last_line_age_s if quiet is not None else None,
        projected_total_s=projection.total_s if projection is not None else None,
        projected_low_s=projection.low_s if projection is not None else None,
        projected_high_s=projection.high_s if projection is not None else None,
        projected_how=projection.how if projection is not None else None,
        prediction_sha256=run.prediction_sha256,
        document=claims.document.title if claims is not None else None,
        restarts=len(recorded.processes) - 1,
        lost_steps=recorded.lost_steps,
        skipped_updates=skipped_updates(recorded) if start.source == "train" else None,
        rollbacks=rollbacks(recorded) if start.source == "train" else None,
        verdicts=dict(Counter(row.verdict for row in rows if row.claim is not None)),
        not_measured=sum(row.verdict == "not measured" for row in rows),
        predictions_held=sum(judged == "held" for judged in predictions.values()),
        predictions_judged=len(predictions),
        headline=headline,
    )


def _warnings(recorded: Recorded, prediction: Prediction, quiet: Silence | None) -> list[str]:
    events = [e for e in recorded.events if e.level == "warning" and e.what != SKIPPED]
    texts = [e.text for e in events] + prediction.notes
    being_written = quiet is not None and quiet.state == "running"
    if recorded.truncated and not being_written:
        texts.append("The last line of the log is cut: the run died, or the disk was full.")
    return texts


def _headline(
    claims: Claims | None,
    rows: list[Row],
    measurements: Measurements,
    attribution: Attribution | None,
    prediction: Prediction,
) -> str:
    """The judgement on a finished run, in one or two sentences."""
    device = "processor" if prediction.hardware.kind == "cpu" else "card"
    ledger, done = measurements.ledger, measurements.steps_done
    if "total_seconds" not in measurements.values:
        reason = measurements.missing["total_seconds"]
        return f"Finished after {done:,} steps; how long it took is not measured: {reason}."
    assert ledger.ran_s is not None
    actual = format_seconds(ledger.ran_s)
    total = _narrowest(claims, rows, "total_seconds")
    if total is None or total.claimed is None:
        return _headline_of_prediction(actual, rows, attribution)
    claimed = total.claimed.text
    if total.verdict == "held":
        return f"{actual}, as claimed ({claimed})."
    text = f"{actual}, not {claimed}"
    step = _narrowest(claims, rows, "step_seconds")
    if step is not None and step.claimed and step.measured and step.verdict == "missed":
        text += (
            f": every step took {format_value('step_seconds', step.measured.value)} "
            f"instead of {step.claimed.text}"
        )
    share = next((r.measured for r in rows if r.id == "mfu_palm" and r.measured), None)
    if share is None:
        return text + "."
    text += f". The {device} worked at {format_value('mfu_palm', share.value)} of its peak"
    own = next(r for r in rows if r.id == "step_seconds")
    slower = total.factor is not None and total.factor > 1
    if own.prediction == "held" and slower:
        text += f", as this hardware does: the estimate was too low, not the {device} too slow"
    return text + "."


def _headline_of_prediction(actual: str, rows: list[Row], attribution: Attribution | None) -> str:
    total = next(r for r in rows if r.id == "total_seconds")
    if total.analytic is None or total.measured is None:
        return f"{actual}; there was no prediction of the time."
    interval = format_range("total_seconds", total.analytic.low, total.analytic.high)
    off = deviation_text(total.measured.value, total.analytic.expected)
    text = (
        f"{actual}, {'inside' if total.prediction == 'held' else 'outside'} the predicted "
        f"{interval}: {off} the expected "
        f"{format_value('total_seconds', total.analytic.expected)}"
    )
    if attribution is None:
        return f"{text}."
    largest = max(attribution.parts, key=lambda part: abs(part.seconds))
    sign = "-" if largest.seconds < 0 else "+"
    difference = sign + format_seconds(abs(largest.seconds))
    return (
        f"{text}. The largest part of the difference: {largest.cause}, {difference} "
        f"({largest.why})."
    )


def _narrowest(claims: Claims | None, rows: list[Row], row_id: str) -> Row | None:
    """The row of the most specific claim about the run itself."""
    sums = {c.key for c in claims.claim if c.formula is not None} if claims is not None else set()
    widths: list[tuple[float, int]] = []
    for index, row in enumerate(rows):
        if row.id == row_id and row.claimed is not None and row.claim not in sums:
            low, high = row.claimed.low, row.claimed.high
            widths.append((float("inf") if low is None or high is None else high - low, index))
    return rows[min(widths)[1]] if widths else None


def machine_lines(machine: Machine) -> list[tuple[str, str]]:
    """machine.json as lines for a person."""
    lines: list[tuple[str, str]] = []
    for key, value in machine.items():
        name = key.replace("_", " ")
        if isinstance(value, dict):
            text = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, bool):
            text = "yes" if value else "no"
        else:
            text = "not known" if value is None else str(value)
        lines.append((name, text))
    return lines


def report_schema() -> dict[str, Any]:
    """Return the JSON Schema of Report.to_json; keys it does not name may be added later."""
    schema = Report.model_json_schema(mode="serialization")
    version = {"const": SCHEMA, "description": "goes up when a key changes its meaning or goes"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "report.json of nanogauge",
        "description": "Prediction and actual of one training run. SI units: s, B, W, FLOP; energy "
        "in kWh; MFU and other ratios as fractions.",
        "type": "object",
        "properties": {"schema": version, **schema["properties"]},
        "required": ["schema", *schema["required"]],
        "$defs": schema["$defs"],
    }
