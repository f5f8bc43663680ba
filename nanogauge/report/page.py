"""From a report to the page and its Markdown: what the templates show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import jinja2

from nanogauge.quantities import format_seconds, format_value
from nanogauge.report.attribution import Attribution
from nanogauge.report.build import Report, machine_lines
from nanogauge.report.cells import MARKS, Cells, grouped
from nanogauge.report.charts import range_plot, stacked_bar, waterfall
from nanogauge.report.first_screen import (
    WEEKDAY_TIME,
    ZONED,
    counts,
    finish_line,
    headlines,
    how_it_ended,
)
from nanogauge.report.instruments import Instrument
from nanogauge.report.measured import LEDGER_NAMES, Ledger
from nanogauge.report.pictures import pictures
from nanogauge.report.text import fenced, plain_text, unbroken, visible, visible_value
from nanogauge.runfolder import Machine, RunFolder
from nanogauge.runlog import Recorded

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
        loader=jinja2.PackageLoader("nanogauge.report", ""),
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
        "happenings": [
            one.model_copy(update={"text": visible(one.text, _LONGEST_LINE)})
            for one in report.night.happenings[:MOST_LINES]
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
