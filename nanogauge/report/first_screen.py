"""The first screen of a page: how the run ended, when, and its headline numbers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from nanogauge.quantities import format_range, format_seconds, format_value
from nanogauge.report.build import Report
from nanogauge.report.cells import MARKS, VERDICTS, Cells
from nanogauge.report.charts import NARROW_RANGE, range_plot
from nanogauge.report.compare import OF_THE_WHOLE_RUN, Row
from nanogauge.runlog import Recorded

HEADLINES = {
    "total_seconds": "Time, whole run",
    "step_seconds": "Time per step",
    "mfu_palm": "MFU",
    "val_loss": "Validation loss",
    "peak_allocated_bytes": "Memory of tensors",
    "energy_kwh": "Energy",
}
STATUS = {
    "finished": ("✓", "Finished"),
    "stopped": ("■", "Stopped"),
    "failed": ("✕", "Failed"),
    "unfinished": ("…", "Died, or still running,"),
}
ZONED = "%a %d %b %Y, %H:%M %Z"
LAST_EVENTS = 6


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


def headlines(report: Report) -> list[Headline]:
    """The headline numbers that were measured or predicted, in the order of HEADLINES."""
    found = []
    for row_id, label in HEADLINES.items():
        rows = [row for row in report.rows if row.id == row_id]
        about = [row for row in rows if row.measured or row.analytic]
        if about:
            found.append(_headline(report, label, about))
    return found


def _headline(report: Report, label: str, rows: Sequence[Row]) -> Headline:
    first, run = Cells(rows[0]), report.run
    value, said = first.measured, []
    unfinished = run.status != "finished"
    if unfinished and rows[0].id == "total_seconds" and run.projected_total_s is not None:
        label, value = "Time so far", format_seconds(report.time_ledger.wall_s)
        said.append(("projected", format_seconds(run.projected_total_s)))
    elif unfinished and value and rows[0].id in OF_THE_WHOLE_RUN:
        label += " so far"
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


def local_time(unix: float) -> str:
    """A moment by the clock of the machine that makes the page, with its zone."""
    return time.strftime(ZONED, time.localtime(unix))


def ended_unix(recorded: Recorded) -> float | None:
    """When the last line was written; None where the log does not tell the time of day."""
    start, session = recorded.starts[-1], recorded.session_seconds[-1]
    if start.unix_time is None or session is None:
        return None
    return start.unix_time + session - (start.elapsed_seconds or 0.0)


def how_it_ended(report: Report, recorded: Recorded) -> tuple[str, str]:
    """The mark of the run's state, and in words how far it came."""
    run = report.run
    mark, word = STATUS[run.status]
    done = f"{run.steps_done:,}"
    if run.steps_done < run.max_steps:
        done += f" of {run.max_steps:,}"
    joint = "after" if run.status == "finished" else "at step"
    steps = " steps" if run.status == "finished" else ""
    resumed = len(recorded.starts) - 1
    again = f", resumed {resumed} times" if resumed > 1 else ", resumed once" if resumed else ""
    return mark, f"{word} {joint} {done}{steps}{again}"


@dataclass(frozen=True)
class Finish:
    """When the run finished, or will."""

    label: str
    text: str
    detail: str = ""


def finish_line(report: Report, recorded: Recorded) -> Finish:
    """When the run finished, or will at its pace, as far as the log tells."""
    run, ended = report.run, ended_unix(recorded)
    if run.status == "finished":
        if ended is None:
            took = format_seconds(report.time_ledger.wall_s)
            return Finish("Took", took, "the log names no time of day")
        return Finish("Finished", local_time(ended))
    if run.projected_total_s is None:
        return Finish("Would finish", "not known", "before the first steady step")
    left = run.projected_total_s - report.time_ledger.wall_s
    total = f"{format_seconds(run.projected_total_s)} in all"
    interval = _projected_interval(report)
    if ended is None or run.status != "unfinished":
        return Finish("Would take", total, interval)
    detail = f"if it is still running; {total}" + (f", {interval}" if interval else "")
    return Finish("Would finish", local_time(ended + left), detail)


def _projected_interval(report: Report) -> str:
    """The total at the pace of the fast and of the slow steps."""
    run = report.run
    step = next((r.measured for r in report.rows if r.id == "step_seconds" and r.measured), None)
    if step is None or step.p10 is None or step.p90 is None:
        return ""
    left = run.max_steps - run.steps_done
    low, high = (report.time_ledger.wall_s + left * pace for pace in (step.p10, step.p90))
    interval = format_range("total_seconds", low, high)
    return f"{interval} at the pace of the middle 80 % of its steps"


def last_words(report: Report, recorded: Recorded) -> list[str]:
    """What the log of a run that did not finish tells last, newest first."""
    if report.run.status == "finished":
        return []
    told: list[tuple[float, str]] = []
    for evaluation in recorded.evals[-1:]:
        loss = evaluation.val_loss
        text = "was not finite" if loss is None else f"{loss:.4f}"
        told.append(
            (
                evaluation.elapsed_seconds or 0,
                f"validation loss {text} after step {evaluation.step:,}",
            )
        )
    for checkpoint in recorded.checkpoints[-1:]:
        told.append((checkpoint.elapsed_seconds or 0, f"checkpoint after step {checkpoint.step:,}"))
    for event in [e for e in recorded.events if e.what not in ("sample", "absent")][-LAST_EVENTS:]:
        told.append((event.elapsed_seconds or 0, f"{event.what.replace('_', ' ')}: {event.text}"))
    for step in recorded.steps[-1:]:
        seconds = "" if step.step_seconds is None else f", {format_seconds(step.step_seconds)}"
        told.append((step.elapsed_seconds or 0, f"step {step.step:,}{seconds}"))
    ordered = sorted(told, key=lambda one: -one[0])
    return [f"{format_seconds(at)}: {text}" if at else text for at, text in ordered]
