"""The first screen of a page: how the run ended, when, and its headline numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanogauge.quantities import format_range, format_seconds, format_value
from nanogauge.recorded import process_began
from nanogauge.report.build import Report, RunInfo
from nanogauge.report.cells import MARKS, VERDICTS, Cells
from nanogauge.report.charts import NARROW_RANGE, range_plot
from nanogauge.report.compare import Row
from nanogauge.report.sensed import JOULES_PER_KWH, total_over_processes
from nanogauge.report.several import sensed_others
from nanogauge.runlog import Recorded

HEADLINES = {
    "total_seconds": "Time, whole run",
    "step_seconds": "Time per step",
    "mfu_palm": "MFU",
    "val_loss": "Validation loss",
    "peak_allocated_bytes": "Memory of tensors",
    "energy_kwh": "Energy",
}
STATES = {
    "finished": ("✓", "Finished"),
    "stopped": ("■", "Stopped"),
    "failed": ("✕", "Failed"),
    "unfinished": ("…", "The log ends"),
    "running": ("▶", "Running,"),
    "silent": ("?", "Silent"),
    "hung": ("?", "Hangs"),
    "died": ("✕", "Died"),
}
ZONED = "%a %d %b %Y, %H:%M %Z"
WEEKDAY_TIME = "%a %H:%M:%S"


@dataclass(frozen=True)
class Headline:
    """A number that people ask for, beside what was said of it."""

    label: str
    value: str
    """empty where it was not measured"""
    said: list[tuple[str, str]]
    """claimed, predicted, ...: what, and the range"""
    verdict: str
    mark: str
    plot: str


@dataclass(frozen=True)
class Count:
    verdict: str
    mark: str
    number: int


def headlines(report: Report, recorded: Recorded) -> list[Headline]:
    """The headline numbers that were measured or predicted, in the order of HEADLINES."""
    found = []
    for row_id, label in HEADLINES.items():
        rows = [row for row in report.rows if row.id == row_id]
        about = [row for row in rows if row.measured or row.analytic]
        if about:
            found.append(_headline(report, recorded, label, about))
    return found


def _so_far(row_id: str, report: Report, recorded: Recorded) -> str:
    """Of a run that has not finished, what it took until now; empty where that is not known."""
    if report.run.status == "finished":
        return ""
    if row_id == "total_seconds" and report.time_ledger.ran_s is not None:
        return format_seconds(report.time_ledger.ran_s)
    joules = total_over_processes(recorded, "energy_joules")
    if row_id == "energy_kwh" and joules is not None and sensed_others(recorded) is None:
        return format_value(row_id, joules / JOULES_PER_KWH)
    return ""


def _projected(run: RunInfo) -> str:
    """What the whole run would take, with its interval where that reads different."""
    assert run.projected_total_s is not None
    text = format_seconds(run.projected_total_s)
    if run.projected_low_s is None or run.projected_high_s is None:
        return text
    interval = format_range("total_seconds", run.projected_low_s, run.projected_high_s)
    return text if interval == text else f"{text} ({interval})"


def _headline(report: Report, recorded: Recorded, label: str, rows: Sequence[Row]) -> Headline:
    first, run = Cells(rows[0]), report.run
    value, said = first.measured, []
    so_far = _so_far(rows[0].id, report, recorded) if not value else ""
    if so_far:
        label, value = f"{label.partition(',')[0]} so far", so_far
    if so_far and rows[0].id == "total_seconds" and run.projected_total_s is not None:
        said.append(("projected", _projected(run)))
    claims = [Cells(row) for row in rows if row.claim is not None]
    if claims:
        said.append(("claimed", " or ".join(cells.claimed for cells in claims)))
    if first.predicted:
        said.append(("predicted", first.predicted))
    if first.calibrated:
        said.append(("calibrated", first.calibrated))
    if rows[0].id == "step_seconds" and run.tokens_per_second is not None:
        said.append(("", f"{run.tokens_per_second:,.0f} tokens/s"))
    if rows[0].id == "energy_kwh":
        cost = next((r.measured for r in report.rows if r.id == "cost" and r.measured), None)
        if cost is not None:
            unit = next(r.unit for r in report.rows if r.id == "cost")
            said.append(("", format_value("cost", cost.value, unit)))
    narrowest = min(rows, key=_width)
    judged = rows[0].prediction or ("no claim" if value else "not measured")
    return Headline(label, value, said, judged, MARKS[judged], range_plot(narrowest, NARROW_RANGE))


def _width(row: Row) -> float:
    """How wide a claim is; one with an open end, or none, is wider than all others."""
    claimed = row.claimed
    if claimed is None or claimed.low is None or claimed.high is None:
        return float("inf")
    return claimed.high - claimed.low


def counts(report: Report) -> tuple[str, list[Count]]:
    """What is counted, and how many of it held, missed and so on."""
    run = report.run
    if run.document is not None:
        found = [Count(v, MARKS[v], run.verdicts.get(v, 0)) for v in VERDICTS]
        return "claims", found
    missed = run.predictions_judged - run.predictions_held
    numbers = {"held": run.predictions_held, "missed": missed, "not measured": run.not_measured}
    return "predictions", [Count(v, MARKS[v], number) for v, number in numbers.items()]


def ended_unix(recorded: Recorded) -> float | None:
    """When the last line was written; None where the log does not tell the time of day."""
    began, session = process_began(recorded.starts[-1]), recorded.session_seconds[-1]
    return None if began is None or session is None else began + session


def how_it_ended(report: Report, recorded: Recorded) -> tuple[str, str]:
    """The mark of the run's state, and in words how far it came."""
    run = report.run
    mark, word = STATES[run.state or run.status]
    done = f"{run.steps_done:,}"
    if run.steps_done < run.max_steps:
        done += f" of {run.max_steps:,}"
    text = f"{word} after {done} steps" if run.status == "finished" else f"{word} at step {done}"
    resumed = len(recorded.processes) - 1
    if resumed:
        text += ", resumed once" if resumed == 1 else f", resumed {resumed} times"
    return mark, text


@dataclass(frozen=True)
class FinishLine:
    """When the run finished, or will."""

    label: str
    text: str
    detail: str = ""


def finish_line(report: Report, recorded: Recorded) -> FinishLine:
    """When the run finished, or will at its pace, as far as the log tells."""
    run, ran, ended = report.run, report.time_ledger.ran_s, ended_unix(recorded)
    if run.status == "finished":
        if ended is None:
            took = "not in this log" if ran is None else format_seconds(ran)
            return FinishLine("Took", took, "the log names no time of day")
        return FinishLine("Finished", f"{run.time_zone.local(ended):{ZONED}}")
    if run.projected_total_s is None or ran is None:
        return FinishLine("Would finish", "not known", "no pace is in the log yet")
    total = _projected(run)
    if ended is None or run.state not in ("running", "silent"):
        return FinishLine("Would take", total, "at its pace, if it went on")
    label = "Will finish" if run.state == "running" else "Would finish"
    doubt = "" if run.state == "running" else ", if it still runs"
    done = f"{run.time_zone.local(ended + run.projected_total_s - ran):{ZONED}}"
    return FinishLine(label, done, f"at its pace{doubt}; {total} in all")
