"""From a report to the page and its Markdown: what the templates show."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jinja2

from nanogauge.analysis.attribution import Attribution
from nanogauge.analysis.instruments import Instrument
from nanogauge.analysis.ledger import LEDGER_NAMES, Ledger
from nanogauge.analysis.report_model import Report, RunInfo, machine_lines
from nanogauge.analysis.telemetry import JOULES_PER_KWH, mismatched_counts, total_over_processes
from nanogauge.analysis.verdicts import Row
from nanogauge.errors import BadInput
from nanogauge.files import make_folder, without_secrets, write_atomic
from nanogauge.quantities import (
    format_range,
    format_seconds,
    format_value,
)
from nanogauge.report.cells import MARKS, VERDICTS, Cells, grouped
from nanogauge.report.charts import pictures
from nanogauge.report.escape import fenced, plain_text, unbroken, visible, visible_value
from nanogauge.report.svg import NARROW_RANGE, range_plot, stacked_bar, waterfall
from nanogauge.runlog.folder import Machine, RunFolder
from nanogauge.runlog.history import Recorded, process_began

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
    if row_id == "energy_kwh" and joules is not None and mismatched_counts(recorded) is None:
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


Thing = TypeVar("Thing")

SOURCES = {
    "nanogpt_log": "nanoGPT log",
    "build_nanogpt_log": "build-nanogpt log",
    "wandb_history": "W&B history",
}
MOST_LINES = 40
_LONGEST_LINE = 1000
"""of alarms and of warnings: how many a page shows, and how much of each"""
MOST_SAMPLES = 12
LONGEST_SAMPLE = 4000
_MACHINE_GROUPS = {
    "Machine": ("device", "gpu", "cpu", "torch_threads", "memory", "os", "time_zone"),
    "Code": ("git", "command", "nanogauge"),
    "Import": ("log", "imported", "note"),
}
_INSTRUMENT_GROUPS = {
    "Speed": ("achieved", "mfu"),
    "Parts of a step": ("forward", "backward", "optimizer", "data_wait", "recompilations"),
    "Memory": ("peak_", "allocation", "other_programs"),
    "Energy": ("energy", "idle", "joules", "wh_"),
}
_BOARD = "The board"


@dataclass(frozen=True)
class Sample:
    """Text that the model wrote at one moment of its training."""

    step: int | None
    text: str


def render_html(report: Report, run: RunFolder, recorded: Recorded) -> str:
    """The page of a run: one file that loads nothing."""
    return templates().get_template("report.html.j2").render(_context(report, run, recorded))


def render_markdown(report: Report, run: RunFolder, recorded: Recorded) -> str:
    """The same as GitHub's Markdown, for an issue or a terminal."""
    return (
        templates(plain=True).get_template("report.md.j2").render(_context(report, run, recorded))
    )


@cache
def templates(plain: bool = False) -> jinja2.Environment:
    """The pages as templates, or the plain text; whatever is put into one is text in it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=not plain,
        finalize=plain_text if plain else visible_value,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "unbroken": lambda text: unbroken(visible(text)),
        "seconds": format_seconds,
        "plot": range_plot,
        "words": lambda name: name.replace("_", " "),
        "program": lambda source: SOURCES.get(source, source.replace("_", " ")),
        "fenced": fenced,
    }
    return environment


def _context(report: Report, run: RunFolder, recorded: Recorded) -> dict[str, Any]:
    ledger = _ledger_parts(report.time_ledger)
    wall, ran, gap = (getattr(report.time_ledger, f"{name}_s") for name in ("wall", "ran", "gap"))
    mark, ended = how_it_ended(report, recorded)
    counted, numbers = counts(report)
    started, zone = report.run.started_unix, report.run.time_zone
    prediction = run.prediction
    samples, warnings = samples_of(recorded), report.other_warnings()
    return {
        "r": report,
        "state": {"mark": mark, "text": ended},
        "finish": finish_line(report, recorded),
        "started": None if started is None else f"{zone.local(started):{ZONED}}",
        "headlines": headlines(report, recorded),
        "counted": counted,
        "counts": numbers,
        "marks": MARKS,
        "alarms": [
            alarm.model_copy(update={"text": visible(alarm.text, _LONGEST_LINE)})
            for alarm in report.alarms[:MOST_LINES]
        ],
        "warnings": [visible(text, _LONGEST_LINE) for text in warnings[:MOST_LINES]],
        "warnings_left_out": max(0, len(warnings) - MOST_LINES),
        "incidents": [
            one.model_copy(update={"text": visible(one.text, _LONGEST_LINE)})
            for one in report.incidents.entries[:MOST_LINES]
        ],
        "groups": grouped(report.rows),
        "calibrated": any(row.calibrated is not None for row in report.rows),
        "hows": _hows(report),
        "charts": pictures(recorded, run.spec, prediction, report.rows),
        "waterfalls": _waterfalls(report),
        "advice": _advice(report),
        "ledger": [(name, format_seconds(v), v / wall) for name, v in ledger if wall],
        "ledger_bar": stacked_bar(ledger),
        "wall": format_seconds(wall) if wall is not None else None,
        "ran": format_seconds(ran) if ran is not None else None,
        "gap": format_seconds(gap) if gap else None,
        "missing_parts": [
            name for key, name in LEDGER_NAMES.items() if getattr(report.time_ledger, key) is None
        ],
        "samples": spread(samples),
        "samples_left_out": max(0, len(samples) - MOST_SAMPLES),
        "memory_parts": [
            (part.name, format_value("peak_process_bytes", part.value), part.formula)
            for part in prediction.memory_parts
        ],
        "step_parts": [
            (part.name, format_seconds(part.value), part.formula)
            for part in prediction.step_parts
            if part.value > 0
        ],
        "prediction": prediction,
        "frozen": f"{zone.local(prediction.created_unix):{ZONED}}",
        "instruments": instrument_groups(report.instruments),
        "machine": machine_groups(run.machine),
        "currency": run.spec.cost.currency,
        "config": run.config_toml or run.spec.to_json().decode(),
        "clock": lambda unix: f"{zone.local(unix):{WEEKDAY_TIME}}",
    }


def _ledger_parts(ledger: Ledger) -> list[tuple[str, float]]:
    """The parts of the wall time that are known and more than nothing."""
    return [
        (name, value)
        for key, name in LEDGER_NAMES.items()
        if (value := getattr(ledger, key)) is not None and value > 0
    ]


def _hows(report: Report) -> list[tuple[str, str, str]]:
    """Each measured quantity once, however many claims there are about it."""
    found: dict[str, tuple[str, str, str]] = {}
    for row in report.rows:
        if row.measured is not None:
            label = row.quantity.partition(": ")[0]
            found.setdefault(row.id, (label, Cells(row).measured, row.measured.how))
    return list(found.values())


def _waterfalls(report: Report) -> list[tuple[str, str, Attribution]]:
    result = []
    for attribution in (report.attribution_of_claim, report.attribution):
        if attribution is not None:
            parts = [(part.cause, part.seconds) for part in attribution.parts]
            begin = "claimed" if "claim" in attribution.reference else "predicted"
            picture = waterfall((begin, attribution.predicted_s), parts, "actual")
            result.append((attribution.reference, picture, attribution))
    return result


def _advice(report: Report) -> list[tuple[str, str]]:
    """What to change, each once, with the cause it is about."""
    found: dict[str, str] = {}
    for attribution in (report.attribution, report.attribution_of_claim):
        for part in attribution.parts if attribution is not None else ():
            if part.advice is not None:
                found.setdefault(part.advice, part.cause)
    return [(cause, advice) for advice, cause in found.items()]


def samples_of(recorded: Recorded) -> list[Sample]:
    """What the model wrote, by step; what a resumed run wrote again replaces the first time."""
    found: dict[int | None, Sample] = {}
    for event in recorded.events:
        if event.what == "sample":
            found.pop(event.step, None)
            found[event.step] = Sample(event.step, visible(event.text, LONGEST_SAMPLE))
    return sorted(found.values(), key=lambda sample: sample.step or 0)


def spread(samples: list[Sample]) -> list[Sample]:
    """So many of them as a page shows, from the first to the last, equally far apart."""
    if len(samples) <= MOST_SAMPLES:
        return samples
    last = len(samples) - 1
    return [samples[round(i * last / (MOST_SAMPLES - 1))] for i in range(MOST_SAMPLES)]


def instrument_groups(shown: list[Instrument]) -> list[tuple[str, list[Instrument]]]:
    """Figures without a row by what they are about; what belongs nowhere else, to the board."""
    return _in_groups(shown, lambda one: one.id, _INSTRUMENT_GROUPS, _BOARD)


def machine_groups(machine: Machine) -> list[tuple[str, list[tuple[str, str]]]]:
    """machine.json by what its lines are about; what belongs nowhere else, to the software."""
    readable: Machine = {
        key: f"{value / 2**30:.1f} GiB" if key.endswith("bytes") and type(value) is int else value
        for key, value in machine.items()
    }
    keys = iter(readable)
    lines = [(next(keys), line) for line in machine_lines(readable)]
    groups = _in_groups(lines, lambda one: one[0], _MACHINE_GROUPS, "Software")
    return [(name, [(k.removesuffix(" bytes"), v) for _, (k, v) in ones]) for name, ones in groups]


def _in_groups(
    things: list[Thing], key: Callable[[Thing], str], groups: dict[str, tuple[str, ...]], rest: str
) -> list[tuple[str, list[Thing]]]:
    """Things by the beginning of their key, in the order of the groups; none is left out."""
    found: dict[str, list[Thing]] = {name: [] for name in (*groups, rest)}
    for thing in things:
        names = (name for name, begins in groups.items() if key(thing).startswith(begins))
        found[next(names, rest)].append(thing)
    return [(name, members) for name, members in found.items() if members]


def render_report(report: Report, run: RunFolder, recorded: Recorded) -> dict[str, str]:
    """Return the report in its three forms by file name, with secrets removed."""
    contents = {
        "report.json": json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False),
        "report.md": render_markdown(report, run, recorded),
        "report.html": render_html(report, run, recorded),
    }
    return {name: without_secrets(text) for name, text in contents.items()}


def write_report(report: Report, run: RunFolder, recorded: Recorded) -> list[Path]:
    """Write the three files into the run folder and return their paths.

    Raises:
        BadInput: if the folder is not writable or its disk is full.
    """
    make_folder(run.path)
    contents = render_report(report, run, recorded)
    try:
        for name, text in contents.items():
            write_atomic(run.path / name, text.encode())
    except OSError as error:
        raise BadInput(f"cannot write the report to {run.path}: {error.strerror}.") from None
    return [run.path / name for name in contents]
