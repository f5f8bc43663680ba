"""report.html, report.md and report.json: what the templates show, and how they are written."""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nanogauge.analysis.consistency import factor_text
from nanogauge.analysis.ledger import LEDGER_NAMES
from nanogauge.analysis.report_model import Report
from nanogauge.analysis.status import projection_text
from nanogauge.analysis.telemetry import JOULES_PER_KWH, mismatched_counts, total_over_processes
from nanogauge.errors import BadInput
from nanogauge.files import make_folder, without_secrets, write_atomic
from nanogauge.quantities import format_range, format_seconds, format_value
from nanogauge.report.cells import MARKS, VERDICTS, Cells, QuantityGroup, group_quantities, group_rows, sort_rows
from nanogauge.report.charts import make_charts
from nanogauge.report.escape import fenced, finalize_html, finalize_markdown, unbroken, visible
from nanogauge.report.svg import NARROW_RANGE_WIDTH, range_plot, stacked_bar, waterfall
from nanogauge.runlog.folder import Machine, RunFolder
from nanogauge.runlog.history import RunHistory, process_began

HEADLINES = {
    "total_seconds": "Time, whole run",
    "step_seconds": "Time per step",
    "mfu_palm": "MFU",
    "val_loss": "Validation loss",
    "peak_allocated_bytes": "Memory of tensors",
    "energy_kwh": "Energy",
}
EXPLAINED = {"mfu_palm": "useful over peak FLOP/s", "val_loss": "cross-entropy per token"}
"""Explanations of headline quantities whose names do not explain them."""
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
"""Mark and word for each state of a run."""
MAX_LINES = 40
"""Alarms, incidents and warnings on a page, of each kind."""
MAX_LINE_CHARACTERS = 1000
MAX_SAMPLES = 12
MAX_SAMPLE_CHARACTERS = 4000
SMALL_SHARE = 1e-3
"""Share of the actual time below which a part of an attribution is shown by name alone."""
_SOURCES = {"nanogpt_log": "nanoGPT log", "build_nanogpt_log": "build-nanogpt log", "wandb_history": "W&B history"}
_SOURCES |= {"watch": "program under nanogauge watch"}
ZONED = "%a %d %b %Y, %H:%M %Z"
WEEKDAY_TIME = "%a %H:%M:%S"


@dataclass(frozen=True)
class Headline:
    """A card of the first screen: one quantity, measured and expected."""

    label: str
    value: str
    """Empty if it was not measured."""
    details: list[tuple[str, str]]
    """Lines below the value: what a range is (claimed, predicted), and the range."""
    verdict: str
    plot: str


def headlines(report: Report, recorded: RunHistory) -> list[Headline]:
    """Return the headline quantities that were measured or predicted."""
    groups = {group.own.row.id: group for group in group_quantities(report.rows)}
    return [
        _headline(report, recorded, groups[row_id])
        for row_id in HEADLINES
        if groups[row_id].own.row.measured or groups[row_id].own.row.analytic
    ]


def _headline(report: Report, recorded: RunHistory, group: QuantityGroup) -> Headline:
    row, cells, run = group.own.row, group.own, report.run
    label, value = HEADLINES[row.id], cells.measured
    details = [("", EXPLAINED[row.id])] if row.id in EXPLAINED else []
    if not value and (so_far := _so_far(row.id, report, recorded)):
        label, value = f"{label.partition(',')[0]} so far", so_far
        if row.id == "total_seconds" and run.projected_total_s is not None:
            total, low, high = run.projected_total_s, run.projected_low_s, run.projected_high_s
            details.append(("projected", projection_text(total, low, high)))
    claims = [c for c in group.cells if c.row.claimed is not None and c.row.claimed.of_this_run]
    ranges = {
        "claimed": " or ".join(c.claimed for c in claims),
        "predicted": cells.predicted,
        "calibrated": cells.calibrated,
    }
    details += [(name, text) for name, text in ranges.items() if text]
    if row.measured is not None and row.measured.predicted_part is not None:
        details.append(("compared:", format_value(row.id, row.measured.predicted_part)))
    if row.id == "step_seconds" and run.tokens_per_second is not None:
        details.append(("", f"{run.tokens_per_second:,.0f} tokens/s"))
    if row.id == "energy_kwh":
        billed = dict.fromkeys(Cells(r).measured for r in report.rows if r.id in ("cost", "co2_grams") and r.measured)
        details += [("", text) for text in billed]
    verdict = row.prediction or ("no claim" if value else "not measured")
    rows = [c.row for c in claims] or [row]
    narrowest = min(rows, key=lambda r: r.claimed.width if r.claimed is not None else math.inf)
    return Headline(label, value, details, verdict, range_plot(narrowest, NARROW_RANGE_WIDTH))


def _so_far(row_id: str, report: Report, recorded: RunHistory) -> str:
    """Return the time or energy of an unfinished run until now; empty if it is unknown."""
    if report.run.status == "finished":
        return ""
    if row_id == "total_seconds" and report.time_ledger.ran_s is not None:
        return format_seconds(report.time_ledger.ran_s)
    joules = total_over_processes(recorded, "energy_joules")
    if row_id == "energy_kwh" and joules is not None and mismatched_counts(recorded) is None:
        return format_value(row_id, joules / JOULES_PER_KWH)
    return ""


def outcomes(report: Report) -> list[tuple[str, int, str]]:
    """Return each verdict with its number of claims, and which claims about the world these are.

    Claims that arithmetic refutes are listed too. Without claims, count the predictions.
    """
    run = report.run
    if run.document is None:
        held, missed = run.predictions_held, run.predictions_judged - run.predictions_held
        counts = {"held": held, "missed": missed, "not measured": run.not_measured}
        return [(verdict, number, "") for verdict, number in counts.items()]
    found = []
    for verdict in VERDICTS:
        cells = [Cells(r) for r in sort_rows(report.rows) if r.claim and r.verdict == verdict]
        named = [_named(c) for c in cells if c.row.judged_by != "arithmetic" or verdict != "held"]
        if len(named) < len(cells):
            named.append(f"{len(cells) - len(named)} sums and counts")
        if cells:
            found.append((verdict, len(cells), "; ".join(named)))
    return found


def _named(cells: Cells) -> str:
    """Return a claim in a few words, with what was measured instead if it was missed."""
    label = cells.row.quantity.partition(":")[0].partition(",")[0]
    instead = cells.measured if cells.verdict == "missed" else ""
    if cells.verdict == "contradicted" and cells.row.factor:
        instead = f"off by {factor_text(cells.row.factor)}"
    notes = ", ".join(text for text in (cells.label, instead) if text)
    return f"{label} {cells.claimed}" + f" ({notes})" * bool(notes)


def state_line(report: Report, recorded: RunHistory) -> str:
    """Return the run's state with its mark, its progress and the number of restarts."""
    run = report.run
    mark, word = STATES[run.state or run.status]
    done = f"{run.steps_done:,}"
    if run.steps_done < run.max_steps:
        done += f" of {run.max_steps:,}"
    where = f"after {done} steps" if run.status == "finished" else f"at step {done}"
    resumed = len(recorded.processes) - 1
    times = "once" if resumed == 1 else f"{resumed} times"
    return f"{mark} {word} {where}" + (f", resumed {times}" if resumed else "")


def finish_line(report: Report, recorded: RunHistory) -> tuple[str, str, str]:
    """Return label, text and detail of the actual or projected finish.

    It is a date and time, or a duration if the log has no time of day.
    """
    run, ran = report.run, report.time_ledger.ran_s
    began, session = process_began(recorded.starts[-1]), recorded.session_seconds[-1]
    ended = None if began is None or session is None else began + session
    if run.status == "finished":
        if ended is None:
            took = "not in this log" if ran is None else format_seconds(ran)
            return "Took", took, "the log has no time of day"
        return "Finished", f"{run.time_zone.local(ended):{ZONED}}", ""
    if run.projected_total_s is None or ran is None:
        return "Would finish", "not known", "the log has no pace yet"
    total = projection_text(run.projected_total_s, run.projected_low_s, run.projected_high_s)
    if ended is None or run.state not in ("running", "silent"):
        return "Would take", total, "at its pace, if it continued"
    done = f"{run.time_zone.local(ended + run.projected_total_s - ran):{ZONED}}"
    if run.state == "running":
        return "Will finish", done, f"at its pace; {total} in all"
    return "Would finish", done, f"at its pace, if it still runs; {total} in all"


def samples_of(recorded: RunHistory) -> list[tuple[int | None, str]]:
    """Return each sample's step and text; a repeated step keeps only its last sample."""
    samples = {
        event.step: visible(event.text, MAX_SAMPLE_CHARACTERS) for event in recorded.events if event.what == "sample"
    }
    return sorted(samples.items(), key=lambda sample: sample[0] or 0)


def spread(samples: list[tuple[int | None, str]]) -> list[tuple[int | None, str]]:
    """Return at most MAX_SAMPLES samples, evenly spaced, with the first and the last."""
    last, count = len(samples) - 1, min(len(samples), MAX_SAMPLES)
    return [samples[round(i * last / max(count - 1, 1))] for i in range(count)]


def machine_lines(machine: Machine) -> list[tuple[str, str]]:
    """Return the entries of machine.json as label and text, with sizes in GB."""
    lines = []
    for key, value in machine.items():
        match value:
            case dict():
                text = ", ".join(f"{name} {one}" for name, one in value.items())
            case bool():
                text = "yes" if value else "no"
            case int() if key.endswith("bytes"):
                text = f"{value / 1e9:.1f} GB"
            case _:
                text = "not known" if value is None else str(value)
        lines.append((key.removesuffix("_bytes").replace("_", " "), text))
    return lines


def _waterfalls(report: Report) -> list[dict[str, Any]]:
    """Return each attribution as a picture, with its parts and the names of the smallest ones."""
    waterfalls = []
    for one in (report.attribution_of_claim, report.attribution):
        if one is not None:
            begin = "claimed" if "claim" in one.reference else "predicted"
            parts = [(part.cause, part.seconds) for part in one.parts]
            least = SMALL_SHARE * one.actual_s
            waterfalls.append(
                {
                    "attribution": one,
                    "svg": waterfall((begin, one.predicted_s), parts, "actual"),
                    "parts": [p for p in one.parts if abs(p.seconds) >= least],
                    "least_seconds": least,
                    "smaller": [p.cause for p in one.parts if abs(p.seconds) < least],
                }
            )
    return waterfalls


def _context(report: Report, run: RunFolder, recorded: RunHistory) -> dict[str, Any]:
    """Return the variables of both templates."""
    ledger, zone, prediction = report.time_ledger, report.run.time_zone, run.prediction
    known = {name: getattr(ledger, key) for key, name in LEDGER_NAMES.items()}
    parts = [(name, seconds) for name, seconds in known.items() if (seconds or 0) > 0]
    started = report.run.started_unix
    samples, warnings = samples_of(recorded), report.other_warnings()
    return {
        "r": report,
        "state": state_line(report, recorded),
        "finish": finish_line(report, recorded),
        "started": None if started is None else f"{zone.local(started):{ZONED}}",
        "headlines": headlines(report, recorded),
        "judged": "claims" if report.run.document is not None else "predictions",
        "outcomes": outcomes(report),
        "marks": MARKS,
        "alarms": report.alarms[:MAX_LINES],
        "warnings": warnings[:MAX_LINES],
        "warnings_left_out": max(0, len(warnings) - MAX_LINES),
        "incidents": report.incidents.entries[:MAX_LINES],
        "groups": group_rows(report.rows),
        "calibrated": any(row.calibrated is not None for row in report.rows),
        "impossible": [f for f in report.inconsistencies if f.certain],
        "doubtful": [f for f in report.inconsistencies if not f.certain],
        "charts": make_charts(recorded, run.spec, prediction, report.rows),
        "waterfalls": _waterfalls(report),
        "advice": [
            (part.cause, part.advice)
            for part in (report.attribution.parts if report.attribution is not None else ())
            if part.advice is not None
        ],
        "ledger": [(name, seconds, seconds / ledger.wall_s) for name, seconds in parts] if ledger.wall_s else [],
        "ledger_bar": stacked_bar(parts),
        "missing_parts": [name for name, seconds in known.items() if seconds is None],
        "samples": spread(samples),
        "samples_left_out": max(0, len(samples) - MAX_SAMPLES),
        "memory_parts": [
            (part.name, format_value("peak_process_bytes", part.value), part.formula)
            for part in prediction.memory_parts
        ],
        "step_parts": [
            (part.name, format_seconds(part.value), part.formula) for part in prediction.step_parts if part.value > 0
        ],
        "prediction": prediction,
        "frozen": f"{zone.local(prediction.created_unix):{ZONED}}",
        "instruments": report.instruments,
        "machine": machine_lines(run.machine),
        "currency": run.spec.cost.currency,
        "config": run.config_toml or run.spec.to_json().decode(),
        "clock": lambda unix: f"{zone.local(unix):{WEEKDAY_TIME}}",
    }


@cache
def templates(plain: bool = False) -> jinja2.Environment:
    """Return the environment of the HTML templates, or of the Markdown one if plain."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=not plain,
        finalize=finalize_markdown if plain else finalize_html,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "unbroken": lambda text: unbroken(visible(text)),
        "short": lambda text: visible(text, MAX_LINE_CHARACTERS),
        "seconds": format_seconds,
        "signed": lambda s: Markup(f"{'+' if s > 0 else ''}{format_seconds(s)}"),
        "span": lambda seconds: format_range("total_seconds", seconds.low, seconds.high),
        "plot": range_plot,
        "words": lambda name: name.replace("_", " "),
        "program": lambda source: _SOURCES.get(source, source.replace("_", " ")),
        "fenced": fenced,
    }
    return environment


def render_html(report: Report, run: RunFolder, recorded: RunHistory) -> str:
    """Render the page of a run as a single file without external resources."""
    return templates().get_template("report.html.j2").render(_context(report, run, recorded))


def render_markdown(report: Report, run: RunFolder, recorded: RunHistory) -> str:
    """Render the report as Markdown of GitHub's dialect."""
    template = templates(plain=True).get_template("report.md.j2")
    return template.render(_context(report, run, recorded))


def render_report(report: Report, run: RunFolder, recorded: RunHistory) -> dict[str, str]:
    """Render report.json, report.md and report.html; return the texts by file name."""
    contents = {
        "report.json": json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False),
        "report.md": render_markdown(report, run, recorded),
        "report.html": render_html(report, run, recorded),
    }
    return {name: without_secrets(text) for name, text in contents.items()}


def write_report(report: Report, run: RunFolder, recorded: RunHistory) -> list[Path]:
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
        raise BadInput(f"cannot write to {run.path}: {error.strerror}.") from None
    return [run.path / name for name in contents]
