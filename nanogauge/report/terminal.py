"""Reports and plans as text for a terminal."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nanogauge.analysis.consistency import Inconsistency
from nanogauge.analysis.report_model import Report
from nanogauge.analysis.verdicts import Row
from nanogauge.prediction.plan import BestPlan, Deadline, Fit, recipe_sentence
from nanogauge.prediction.quality import mark_sentence
from nanogauge.quantities import GIB, Interval, day_and_time, format_range, format_seconds, format_value
from nanogauge.report.cells import MARKS, group_quantities
from nanogauge.report.html import WEEKDAY_TIME
from nanogauge.runspec import RunSpec
from nanogauge.schema import Prediction

VERDICT_STYLES = {"held": "green", "missed": "red", "contradicted": "bold red", "unlikely": "yellow"}
REASONED = ("missed", "unlikely")
"""Verdicts whose reasons stand below the table; contradictions have a list of their own."""


def make_table() -> Table:
    return Table(box=None, pad_edge=False, header_style="dim")


def print_rows(rows: list[Row], columns: Sequence[str], console: Console, planned: bool = False) -> None:
    """Print quantities with the claims about them, and below the reasons for REASONED verdicts.

    In a plan nothing is measured yet, so only claims have a verdict.
    """
    table = make_table()
    for name in ("quantity", *columns, "verdict"):
        table.add_column(name, overflow="fold")
    below: list[Text] = []
    absent: dict[str, list[str]] = {}
    for group in group_quantities(rows):
        for index, cells in enumerate(group.cells):
            row = cells.row
            verdict = f"{cells.judged} {cells.factor}".strip()
            claimed = f"{cells.claimed} ({cells.label})" if cells.label else cells.claimed
            own = {name: "" if index else getattr(group.own, name) for name in columns}
            if "claimed" in own:
                own["claimed"] = claimed
            table.add_row(
                Text("" if index else group.label),
                *map(Text, own.values()),
                Text(
                    verdict if row.claim is not None or not planned else "",
                    style=VERDICT_STYLES.get(cells.verdict, "dim"),
                ),
            )
            if cells.verdict in REASONED:
                below.append(Text(f"{cells.mark} {group.label} {claimed}: {row.why}."))
            elif cells.verdict == "not measured" and row.claim is None and not planned:
                absent.setdefault(row.why, []).append(row.quantity)
    console.print(table)
    for reason, quantities in absent.items():
        names = ", ".join(quantities)
        below.append(Text(f"{MARKS['not measured']} {names}: {reason}.", style="dim"))
    for text in below:
        console.print(text)


def predicted_columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the columns of the analytic and, if there is one, the calibrated prediction."""
    calibrated = any(row.calibrated is not None for row in rows)
    return ("predicted", "calibrated") if calibrated else ("predicted",)


def print_report(report: Report, console: Console, page: Path) -> None:
    """Print the headline, the verdicts, contradictions, alarms, incidents, warnings and where the page is."""
    console.print(Text(report.run.headline, style="bold"))
    console.print()
    print_rows(report.rows, ("claimed", *predicted_columns(report.rows), "measured"), console)
    _print_contradictions(report.inconsistencies, console)
    for alarm in report.alarms:
        words = _event_words(alarm.what, alarm.step)
        console.print(Text(f"‼ {words}: {alarm.text}", style="red"))
    for incident in report.incidents.entries:
        zone, unix = report.run.time_zone, incident.unix_time
        when = "" if unix is None else f"{zone.local(unix):{WEEKDAY_TIME}} "
        words = _event_words(incident.what, incident.step)
        console.print(Text(f"! {when}{words}: {incident.text}", style="yellow"))
    for warning in report.other_warnings():
        console.print(Text(f"! {warning}", style="yellow"))
    print(f"\n{page}  (also .md and .json)", file=console.file)  # in one line, however narrow the terminal


def _event_words(what: str, step: int | None) -> str:
    return what.replace("_", " ") + ("" if step is None else f" at step {step:,}")


def _print_contradictions(findings: list[Inconsistency], console: Console) -> None:
    for title, certain in (("What cannot be true:", True), ("What is unlikely:", False)):
        shown = [finding for finding in findings if finding.certain == certain]
        if shown:
            console.print()
            console.print(Text(title, style="bold"))
        for finding in shown:
            console.print(Text(f"{'‼' if certain else MARKS['unlikely']} {finding.why}"))


def print_plan(
    spec: RunSpec,
    prediction: Prediction,
    rows: list[Row],
    findings: list[Inconsistency],
    fit: Fit,
    deadline: Deadline,
    now: datetime,
) -> None:
    """Print a plan: the predicted rows, whether it fits, when it ends, and how a step is spent."""
    console = Console()
    several = f"{prediction.gpus} x " if prediction.gpus > 1 else ""
    console.print(Text(f"{spec.name} on {several}{prediction.hardware.name}", style="bold"))
    console.print(Text(prediction.hardware.peak_name, style="dim"))
    console.print(Text(recipe_sentence(spec), style="dim"))
    console.print()
    shown = [row for row in rows if (row.claimed, row.analytic, row.calibrated) != (None, None, None)]
    print_rows(shown, ("expected", *predicted_columns(rows), "claimed"), console, planned=True)
    console.print()
    console.print(Text(_fit_sentence(spec, prediction, fit)))
    console.print(Text(_deadline_sentence(prediction, deadline, now)))
    if (took := deadline.preparation_seconds) is not None:
        about = f"{format_seconds(took.expected)} ({format_range('total_seconds', took.low, took.high)})"
        text = f"These times exclude data preparation: {spec.dataset} is missing, and preparing its tokens takes about"
        console.print(Text(f"{text} {about} before the run."))
    loss = prediction.best("val_loss")
    if loss is None:
        console.print(Text(f"Validation loss: not predicted: {prediction.unpredicted['val_loss']}."))
    elif (mark := mark_sentence(spec.dataset, loss)) is not None:
        console.print(Text(mark))
    if prediction.step_parts:
        parts = ", ".join(f"{p.name} {format_seconds(p.value)}" for p in prediction.step_parts if p.value)
        console.print(Text(f"One step: {parts}.", style="dim"))
    if (step := prediction.calibrated.get("step_seconds")) is not None:
        console.print(Text(f"Calibrated by {step.source}: {step.formula}.", style="dim"))
    for note in prediction.notes:
        console.print(Text(f"! {note}", style="yellow"))
    _print_contradictions(findings, console)


def print_best(plan: BestPlan, spec: RunSpec, device: str) -> None:
    """Print the best runs of a time beside the given model and the 20-tokens rule."""
    console, hours = Console(), format_seconds(plan.seconds)
    how = "even if it is as slow as predicted" if plan.sure else "expected"
    console.print(Text(f"Lowest predicted loss of {hours} on {device} (end: {how})", style="bold"))
    console.print(Text(recipe_sentence(spec), style="dim"))
    table = make_table()
    columns = ("", "layers", "width", "parameters", "tokens", "a parameter", "steps")
    for column in (*columns, "micro-batch", "loss", "between", "time", "memory"):
        table.add_column(column, no_wrap=True)
    for name, model in plan.runs.items():
        loss = model.val_loss
        table.add_row(
            name,
            *(f"{size:,}" for size in (model.n_layer, model.n_embd)),
            f"{model.parameters / 1e6:.3g} M" if model.parameters < 1e9 else f"{model.parameters / 1e9:.3g} G",
            format_value("tokens_total", model.tokens),
            f"{model.tokens / model.parameters:.3g}",
            f"{model.max_steps:,}",
            str(model.micro_batch),
            _value("val_loss", loss),
            "" if loss is None else format_range("val_loss", loss.low, loss.high),
            _value("total_seconds", model.total_seconds),
            f"{model.peak_process_bytes.expected / GIB:.1f} GiB",
        )
    Console(width=max(console.width, 140)).print(table)
    best = plan.runs.get("best", plan.runs["as given"])
    if (mark := mark_sentence(spec.dataset, best.val_loss)) is not None:
        console.print(Text(mark))
    console.print(Text("Predicted, not measured; the interval is that of a recipe that works."))
    for note in plan.notes:
        console.print(Text(f"! {note}", style="yellow"))


def _fit_sentence(spec: RunSpec, prediction: Prediction, fit: Fit) -> str:
    peak = prediction.quantities["peak_process_bytes"]
    low, expected, high, free = (f"{size / GIB:.1f}" for size in (peak.low, peak.expected, peak.high, fit.free_bytes))
    largest, sure = fit.largest_micro_batch, fit.largest_sure_micro_batch
    if largest is None:
        advice = "No micro-batch is expected to fit: make the model smaller"
    elif largest == sure:
        advice = f"The largest micro-batch that fits at the same tokens per step is {largest}"
    else:
        advice = (
            f"At the same tokens per step a micro-batch of {largest} is expected to fit, {sure or 'none'} is sure to"
        )
    faster = ""
    if fit.faster is not None:
        flags, step = fit.faster
        faster = f" The same training is predicted to take {1 - step:.1%} less with {flags}."
    each = " on each GPU" if prediction.gpus > 1 else ""
    return (
        f"Memory: {fit.verdict}: about {expected} ({low}-{high}) of {free} GiB free{each} "
        f"({fit.free_source}) at micro-batch {spec.micro_batch}. {advice}.{faster}"
    )


def _deadline_sentence(prediction: Prediction, deadline: Deadline, now: datetime) -> str:
    """Return when the run ends."""
    finish = deadline.finish
    if finish is None:
        return f"Finish: not known: {prediction.unpredicted['total_seconds']}."
    start = day_and_time(deadline.start, now) if deadline.start > now else "now"
    between = f", between {day_and_time(finish.low, now)} and {day_and_time(finish.high, now)}"
    return f"Finish: {day_and_time(finish.expected, now)}{between if finish.expected else ''}, if it starts {start}."


def _value(row_id: str, interval: Interval | None) -> str:
    return "not known" if interval is None else format_value(row_id, interval.expected)
