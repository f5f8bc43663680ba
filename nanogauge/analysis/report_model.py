"""Build the report of a run folder: all that the pages, the terminal and report.json show."""

import time
from collections import Counter
from pathlib import Path
from typing import Any, get_args

from pydantic import ConfigDict, Field

from nanogauge.analysis.attribution import Attribution, attribute
from nanogauge.analysis.claims import Claims, Unscored, load_claims
from nanogauge.analysis.consistency import Inconsistency
from nanogauge.analysis.incidents import UPDATE_SKIPPED, Incidents, list_incidents, rollbacks, skipped_updates
from nanogauge.analysis.instruments import Instrument, instruments
from nanogauge.analysis.ledger import Ledger
from nanogauge.analysis.measured import NON_FINITE, Measurements, measure
from nanogauge.analysis.status import (
    Liveness,
    Projection,
    ShownEvent,
    State,
    judge_liveness,
    last_events,
    project_total,
    unfinished_headline,
    without_totals,
)
from nanogauge.analysis.verdicts import Row, RowVerdict, build_rows, deviation_text
from nanogauge.analysis.what_if import Scenario, what_if
from nanogauge.quantities import QUANTITIES, format_range, format_seconds, format_value
from nanogauge.runlog.folder import CLAIMS_NAME, RunFolder, load_with_log
from nanogauge.runlog.history import RunHistory
from nanogauge.runlog.lock import is_locked
from nanogauge.runlog.reader import LogReader, last_written
from nanogauge.schema import SCHEMA, Prediction, Start, Stored, TimeZone


class RunInfo(Stored):
    name: str
    source: str
    status: str
    steps_done: int
    max_steps: int
    started_unix: float | None
    time_zone: TimeZone = TimeZone()
    """Time zone of the machine that trained; UTC if machine.json has none."""
    device: str
    dtype: str
    compiled: bool | None
    """None if the log does not say."""
    tokens_per_second: float | None
    state: State | None
    """Liveness of a run whose log has no end line, when the report was made."""
    last_line_age_s: float | None
    """Seconds since the last log line of a run without an end line."""
    projected_total_s: float | None
    """Total time of an unfinished run at the measured pace."""
    projected_low_s: float | None
    projected_high_s: float | None
    projected_how: str | None
    prediction_sha256: str
    prediction_made: str = "before step 0"
    """When the prediction was made, and what of it this very run served to fit."""
    document: str | None
    """Title of the document whose claims are compared."""
    restarts: int
    """Processes after the first."""
    lost_steps: int
    """Steps done again after a restart or a rollback."""
    skipped_updates: int | None
    """Updates skipped for a non-finite loss or gradient; None for an imported log."""
    rollbacks: int | None
    """Rollbacks to a checkpoint; None for an imported log."""
    verdicts: dict[str, int]
    """Number of claims by verdict."""
    sums: dict[str, int] = Field(default_factory=dict)
    """Number of the claims that arithmetic alone judges, by verdict; `verdicts` includes them."""
    not_measured: int
    """Rows without a measured value."""
    predictions_held: int
    predictions_judged: int
    """Quantities that were both predicted and measured."""
    headline: str


class Report(Stored):
    model_config = ConfigDict(populate_by_name=True)

    run: RunInfo
    rows: list[Row]
    inconsistencies: list[Inconsistency]
    unscored: list[Unscored]
    attribution: Attribution | None
    attribution_of_claim: Attribution | None
    what_if: list[Scenario]
    """Predictions of this run at other settings; empty if no step time is known."""
    time_ledger: Ledger
    instruments: list[Instrument]
    """Additional measured values that have no report row."""
    alarms: list[ShownEvent]
    incidents: Incidents = Field(alias="night")
    """Faults that the run recovered from."""
    last_events: list[ShownEvent]
    """Last events of an unfinished run."""
    samples: list[str]
    """Text that the model generated."""
    warnings: list[str]

    def other_warnings(self) -> list[str]:
        """Return the warnings that are not listed as incidents."""
        shown = [entry.text for entry in self.incidents.entries]
        return [w for w in self.warnings if not any(text.startswith(w) for text in shown)]

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **self.model_dump(mode="json", by_alias=True)}


def claims_of(folder: Path, given: Path | None) -> Claims | None:
    """Load the given claims file, or else the one in the run folder; None without either."""
    path = given or folder / CLAIMS_NAME
    return load_claims(path) if given is not None or path.exists() else None


def build_report(
    folder: Path, claims: Claims | None, reader: LogReader | None = None, now_unix: float | None = None
) -> tuple[Report, RunFolder, RunHistory]:
    """Read a run folder and build its report.

    Args:
        reader: reader that has already read a part of this log.
        now_unix: time of the report; it changes only the report of a run without an end line.

    Raises:
        BadInput: if the folder, its log, or a claim is unusable.
    """
    now = time.time() if now_unix is None else now_unix
    lock_held = is_locked(folder)  # before reading the log: the run may end in between
    written = last_written(folder)
    run, recorded = load_with_log(folder, reader)
    spec, prediction = run.spec, run.prediction
    measurements = without_totals(measure(recorded, spec, prediction), spec)
    rows, findings = build_rows(claims, spec, prediction, measurements)
    scenarios = what_if(spec, prediction, measurements, recorded)
    attribution = attribute(prediction, measurements, spec, recorded)
    of_claim = None
    if claims is not None:
        of_claim = attribute(prediction, measurements, spec, recorded, claims)
    liveness = judge_liveness(recorded, prediction, written, now, lock_held)
    finished = measurements.status == "finished"
    unbounded = finished or spec.is_undescribed
    projection = None if unbounded else project_total(recorded, spec, prediction, measurements)
    headline = (
        _headline(rows, measurements, attribution, prediction)
        if finished
        else unfinished_headline(measurements, spec, prediction, liveness, projection, run.time_zone.local(now))
    )
    headline = " ".join([*(e.text for e in recorded.events if e.what == NON_FINITE), headline])
    info = _run_info(run, recorded, claims, rows, measurements, liveness, projection, headline)
    impossible = [
        Inconsistency(ids=[row], why=f"{QUANTITIES[row].label}: {measurements.missing[row]}")
        for row in measurements.refused
    ]
    report = Report(
        run=info,
        rows=rows,
        inconsistencies=[*findings, *impossible],
        unscored=claims.unscored if claims is not None else [],
        attribution=attribution,
        attribution_of_claim=of_claim,
        what_if=scenarios,
        time_ledger=measurements.ledger,
        instruments=instruments(recorded, spec, prediction, measurements),
        alarms=[
            ShownEvent(what=e.what, step=e.step, elapsed_seconds=e.elapsed_seconds, text=e.text)
            for e in recorded.events
            if e.level == "alarm"
        ],
        incidents=list_incidents(recorded),
        last_events=[] if finished else last_events(recorded, measurements),
        samples=[e.text for e in recorded.events if e.what == "sample"],
        warnings=_warnings(recorded, prediction, liveness),
    )
    return report, run, recorded


def _run_info(
    run: RunFolder,
    recorded: RunHistory,
    claims: Claims | None,
    rows: list[Row],
    measurements: Measurements,
    liveness: Liveness | None,
    projection: Projection | None,
    headline: str,
) -> RunInfo:
    spec, median = run.spec, measurements.median_step_seconds
    start, claimed = recorded.starts[0], [row for row in rows if row.claim is not None]
    predictions = {row.id: row.prediction for row in rows if row.prediction is not None}
    return RunInfo(
        name=spec.name or run.path.name,
        source=start.source,
        status=measurements.status,
        steps_done=measurements.steps_done,
        max_steps=measurements.steps_done if spec.is_undescribed else spec.steps,
        started_unix=start.unix_time,
        time_zone=run.time_zone,
        device=start.device,
        dtype=run.prediction.dtype,
        compiled=recorded.compiles[-1].mode == "compiled" if recorded.compiles else None,
        tokens_per_second=(
            spec.tokens_per_step / median if median and "tokens_per_step" not in spec.absent_rows() else None
        ),
        state=liveness and liveness.state,
        last_line_age_s=liveness and liveness.last_line_age_s,
        projected_total_s=projection and projection.total_s,
        projected_low_s=projection and projection.low_s,
        projected_high_s=projection and projection.high_s,
        projected_how=projection and projection.how,
        prediction_sha256=run.prediction_sha256,
        prediction_made=_prediction_made(start, run),
        document=claims.document.title if claims is not None else None,
        restarts=len(recorded.processes) - 1,
        lost_steps=recorded.lost_steps,
        skipped_updates=skipped_updates(recorded) if start.source == "train" else None,
        rollbacks=rollbacks(recorded) if start.source == "train" else None,
        verdicts=dict(Counter(row.verdict for row in claimed)),
        sums=dict(Counter(row.verdict for row in claimed if row.judged_by == "arithmetic")),
        not_measured=sum(row.verdict == "not measured" for row in rows),
        predictions_held=sum(judged == "held" for judged in predictions.values()),
        predictions_judged=len(predictions),
        headline=headline,
    )


def _warnings(recorded: RunHistory, prediction: Prediction, liveness: Liveness | None) -> list[str]:
    events = [e for e in recorded.events if e.level == "warning" and e.what != UPDATE_SKIPPED]
    texts = [e.text for e in events] + prediction.notes
    running = liveness is not None and liveness.state == "running"
    if recorded.truncated and not running:
        texts.append("The last line of the log is cut: the run died, or the disk was full.")
    return texts


_FITTED_ON = {
    ("nanogpt_log", "RTX 4070", 12, 384, 16): "constants were fitted on this run's compilation, "
    "step time and loss, so their agreement is no success"
}
"""Source of a log, device, layers, width and micro-batch -> what the run served to fit."""


def _prediction_made(start: Start, run: RunFolder) -> str:
    seconds = run.prediction.created_unix - (start.unix_time or 0.0)
    if start.logs_all or (start.source == "watch" and seconds < 0):
        return "before step 0"
    if start.source == "watch":
        return f"{format_seconds(seconds)} after the start, from what was printed by then"
    spec, shape = run.spec, run.spec.shape
    key = (start.source, start.device, shape.n_layer, shape.n_embd, spec.micro_batch)
    fitted = f"; {_FITTED_ON[key]}" if key in _FITTED_ON else ""
    return f"after the run, from its log{fitted}"


def _headline(
    rows: list[Row], measurements: Measurements, attribution: Attribution | None, prediction: Prediction
) -> str:
    """Return a few sentences that judge a finished run and the claims about it."""
    device = "processor" if prediction.hardware.kind == "cpu" else "card"
    ledger, done = measurements.ledger, measurements.steps_done
    if "total_seconds" not in measurements.values:
        reason = measurements.missing["total_seconds"]
        return f"Finished after {done:,} steps; how long it took is not measured: {reason}."
    assert ledger.ran_s is not None
    actual = format_seconds(ledger.ran_s)
    total = _narrowest(rows, "total_seconds")
    if total is None or total.claimed is None:
        return _headline_of_prediction(actual, rows, attribution)
    as_claimed = total.verdict == "held"
    text = f"{actual}, {'as claimed: ' if as_claimed else 'not '}{total.claimed.text}"
    steps = _step_comparison(rows)
    text += f": {steps}." if steps and not as_claimed else "."
    mfu = next((r.measured for r in rows if r.id == "mfu_palm" and r.measured), None)
    predicted = next(r for r in rows if r.id == "step_seconds").prediction
    if mfu is not None and not as_claimed:
        reached = f"{format_value('mfu_palm', mfu.value)} of its peak"
        if predicted == "held" and total.factor is not None and total.factor > 1:
            text += f" At {reached} the {device} was not slow; the estimate was."
        else:
            text += f" The {device} worked at {reached}."
    return f"{text} {_claims_counted(rows)}"


def _step_comparison(rows: list[Row]) -> str:
    """Compare the measured step with its claims: inside one, above or below another."""
    judged = [r for r in rows if r.id == "step_seconds" and r.judged_by == "measurement"]
    words = []
    for row in sorted(judged, key=lambda r: r.verdict):
        assert row.claimed is not None and row.factor is not None
        where = "inside" if row.verdict == "held" else "above" if row.factor > 1 else "below"
        words.append(f"{where} the claimed {row.claimed.text}")
    if not words or judged[0].measured is None:
        return ""
    took = f"a step took {format_value('step_seconds', judged[0].measured.value)}"
    return f"{took}, {' but '.join(words)}"


def _claims_counted(rows: list[Row]) -> str:
    """Count the claims about the world by verdict, and apart from them the sums."""
    claimed = [row for row in rows if row.claim is not None]
    world = Counter(row.verdict for row in claimed if row.judged_by != "arithmetic")
    sums = Counter(row.verdict for row in claimed if row.judged_by == "arithmetic")
    counted = ", ".join(f"{world[v]} {v}" for v in get_args(RowVerdict) if world[v])
    text = f"Of {world.total()} claim{'s' * (world.total() != 1)} about the world: {counted}"
    wrong = sums["contradicted"]
    return f"{text}; of {sums.total()} sums {wrong} cannot be true." if sums else f"{text}."


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
    difference = ("-" if largest.seconds < 0 else "+") + format_seconds(abs(largest.seconds))
    return f"{text}. The largest part of the difference: {largest.cause}, {difference} ({largest.why})."


def _narrowest(rows: list[Row], row_id: str) -> Row | None:
    """Return the row with the narrowest claimed range of a quantity that was measured."""
    claimed = [
        (row.claimed.width, index)
        for index, row in enumerate(rows)
        if row.id == row_id and row.claimed is not None and row.judged_by == "measurement"
    ]
    return rows[min(claimed)[1]] if claimed else None


def report_schema() -> dict[str, Any]:
    """Return the JSON Schema of report.json; later versions may add keys."""
    schema = Report.model_json_schema(mode="serialization")
    version = {"const": SCHEMA, "description": "incremented when a key changes or is removed"}
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
