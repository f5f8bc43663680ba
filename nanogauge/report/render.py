"""report.html, report.md and report.json, written aside and renamed; and a terminal's table."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rich.console import Console
from rich.table import Table as TextTable
from rich.text import Text

from nanogauge.consistency import Inconsistency
from nanogauge.errors import BadInput
from nanogauge.quantities import format_range, format_seconds, format_value
from nanogauge.records import Estimate, Step
from nanogauge.report.attribution import Attribution
from nanogauge.report.build import Report, machine_lines
from nanogauge.report.charts import (
    Band,
    Series,
    line_chart,
    range_plot,
    stacked_bar,
    thin,
    waterfall,
)
from nanogauge.report.compare import Row
from nanogauge.report.measured import LEDGER_NAMES, Ledger
from nanogauge.runfolder import RunFolder, make_folder, write_aside
from nanogauge.runlog import Recorded
from nanogauge.table import Table

MARKS = {"held": "✓", "missed": "✕", "contradicted": "‼", "not measured": "○", "no claim": "·"}
WIDE_TERMINAL = 150
COLOURS = {"held": "green", "missed": "red", "contradicted": "bold red"}
SHOWN_FIRST = (
    "total_seconds",
    "step_seconds",
    "first_step_seconds",
    "mfu_palm",
    "mfu_6n",
    "flops_total_6n",
    "flops_total_palm",
    "power_watts",
    "energy_kwh",
    "cost",
    "peak_allocated_bytes",
    "peak_process_bytes",
    "val_loss",
    "quality_vs_gpt2",
)


def in_order(rows: list[Row]) -> list[Row]:
    """As a person asks: how long, how well, how much, and only then what was plain arithmetic."""
    rank = {row_id: index for index, row_id in enumerate(SHOWN_FIRST)}

    def place(row: Row) -> int:
        is_a_sum = row.verdict in ("held", "contradicted") and not (row.measured or row.analytic)
        return len(rank) + 1 if is_a_sum else rank.get(row.id, len(rank))

    return sorted(rows, key=place)


def unbroken(text: str) -> str:
    """A number stays on one line with its unit."""
    return re.sub(r"(?<=\d) (?=(?:s|ms|min|h|d|%|W|kWh|MB|GB|G|nat|USD)\b|%)", "\u00a0", text)


def markdown_cell(text: str) -> str:
    """Text that stays in its cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


class Cells:
    """A row as text, the same words for every form of the report."""

    def __init__(self, row: Row) -> None:
        currency = row.unit if row.id == "cost" else ""
        self.row = row
        self.claimed = row.claimed.text if row.claimed is not None else ""
        self.predicted = _estimate_text(row.id, row.analytic, currency)
        self.calibrated = _estimate_text(row.id, row.calibrated, currency)
        best = row.calibrated or row.analytic
        self.expected = ""
        if best is not None and best.low < best.high:
            self.expected = format_value(row.id, best.expected, currency)
        self.measured = ""
        if row.measured is not None:
            self.measured = format_value(row.id, row.measured.value, currency)
        self.judged_on = "claim" if row.claim is not None else "prediction"
        word = row.verdict
        if row.verdict == "no claim" and row.prediction is not None:
            word = row.prediction  # nobody claimed anything: our own prediction is on trial
        self.verdict = str(word)
        self.mark = MARKS[word]
        self.factor = ""
        if row.factor is not None and abs(row.factor - 1) > 5e-4:
            digits = f"{row.factor:,.0f}" if row.factor >= 100 else f"{row.factor:.3g}"
            self.factor = f"{digits}×"
        self.plot = range_plot(row)


def _estimate_text(row_id: str, estimate: Estimate | None, currency: str) -> str:
    if estimate is None:
        return ""
    return format_range(row_id, estimate.low, estimate.high, currency)


def templates() -> jinja2.Environment:
    """The pages as templates; whatever is put into one of HTML is text in it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nanogauge.report", ""),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "unbroken": unbroken,
        "cell": markdown_cell,
        "seconds": format_seconds,
    }
    return environment


def render_report(report: Report, run: RunFolder, recorded: Recorded) -> dict[str, str]:
    """The report in its three forms, by the name of the file."""
    context, environment = _context(report, run, recorded), templates()
    return {
        "report.json": json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False),
        "report.md": environment.get_template("report.md.j2").render(context),
        "report.html": environment.get_template("report.html.j2").render(context),
    }


def write_report(report: Report, run: RunFolder, recorded: Recorded) -> list[Path]:
    """Write the three files into the run folder and return their paths.

    Raises:
        BadInput: if the folder is not writable or its disk is full.
    """
    make_folder(run.path)
    contents = render_report(report, run, recorded)
    try:
        for name, text in contents.items():
            write_aside(run.path / name, text.encode())
    except OSError as error:
        raise BadInput(f"cannot write the report to {run.path}: {error.strerror}.") from None
    return [run.path / name for name in contents]


def _context(report: Report, run: RunFolder, recorded: Recorded) -> dict[str, Any]:
    estimates = run.prediction.quantities
    step = estimates.get("step_seconds")
    share = estimates.get("mfu_palm")
    times = points(recorded.steps, "step_seconds")
    peak = run.prediction.peak_flops
    per_step = estimates["flops_total_palm"].expected / report.run.max_steps
    utilisation = [(n, 100 * per_step / s / peak) for n, s in times] if peak is not None else []
    losses = points(recorded.steps, "loss")
    validation = [(float(e.step), e.val_loss) for e in recorded.evals if e.val_loss is not None]
    middle = [seconds for _, seconds in times]
    first_is_apart = len(middle) > 20 and middle[0] > 3 * sorted(middle)[len(middle) // 2]
    steady = times[1:] if first_is_apart else times
    bands = {
        row_id: _claimed_bands(report.rows, row_id, scale)
        for row_id, scale in (("step_seconds", 1.0), ("mfu_palm", 100.0))
    }
    charts = {
        "loss": line_chart([Series(losses, "line"), Series(validation, "dots")], "Loss over steps"),
        "step": line_chart(
            [Series(steady, "line")],
            "Seconds per step",
            [*([Band(step.low, step.high, "band")] if step else []), *bands["step_seconds"]],
        ),
        "mfu": line_chart(
            [Series(utilisation[1:] if first_is_apart else utilisation, "line")],
            "MFU in percent",
            [
                *([Band(100 * share.low, 100 * share.high, "band")] if share else []),
                *bands["mfu_palm"],
            ],
        ),
    }
    ledger = [
        (name, value)
        for key, name in LEDGER_NAMES.items()
        if (value := getattr(report.time_ledger, key)) is not None and value > 0
    ]
    wall = report.time_ledger.wall_s
    hows = {  # several claims may share a quantity; what was measured is one
        row.quantity: (Cells(row).measured, row.measured.how)
        for row in report.rows
        if row.measured is not None
    }
    started = report.run.started_unix
    return {
        "r": report,
        "cells": [Cells(row) for row in in_order(report.rows)],
        "hows": [(quantity, *told) for quantity, told in hows.items()],
        "cards": _cards(report),
        "charts": charts,
        "first_is_apart": first_is_apart,
        "claimed_bands": bool(bands["step_seconds"]),
        "thinned": len(thin(losses)) < len(losses),
        "waterfalls": _waterfalls(report),
        "ledger": [(name, format_seconds(v), v / wall) for name, v in ledger if wall],
        "ledger_bar": stacked_bar(ledger),
        "wall": format_seconds(wall) if wall is not None else "not in this log",
        "missing_parts": _missing_parts(report.time_ledger),
        "memory_parts": [
            (part.name, format_value("peak_process_bytes", part.value), part.formula)
            for part in run.prediction.memory_parts
        ],
        "step_parts": [
            (part.name, format_seconds(part.value), part.formula)
            for part in run.prediction.step_parts
            if part.value > 0
        ],
        "hardware": run.prediction.hardware,
        "machine": machine_lines(run.machine),
        "config": run.config.to_toml(),
        "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(started)) if started else None,
    }


def points(steps: Table[Step], name: str) -> list[tuple[float, float]]:
    """A figure of the steps that have it, over the number of the step."""
    values = steps.column(name)
    known = ~np.isnan(values)
    return list(zip(steps.column("step")[known].tolist(), values[known].tolist(), strict=True))


def _claimed_bands(rows: list[Row], row_id: str, scale: float) -> list[Band]:
    """The claimed ranges with two ends, in the unit of the chart."""
    claims = [row.claimed for row in rows if row.id == row_id and row.claimed is not None]
    return [
        Band(scale * claim.low, scale * claim.high, "cband")
        for claim in claims
        if claim.low is not None and claim.high is not None
    ]


def _missing_parts(ledger: Ledger) -> list[str]:
    return [name for key, name in LEDGER_NAMES.items() if getattr(ledger, key) is None]


def _waterfalls(report: Report) -> list[tuple[str, str, Attribution]]:
    result = []
    for attribution in (report.attribution_of_claim, report.attribution):
        if attribution is not None:
            parts = [(part.cause, part.seconds) for part in attribution.parts]
            begin = "claimed" if "claim" in attribution.reference else "predicted"
            picture = waterfall((begin, attribution.predicted_s), parts, "actual")
            result.append((attribution.reference, picture, attribution))
    return result


def _cards(report: Report) -> list[tuple[str, str]]:
    """The headline numbers, each with what was said of it."""
    cards: list[tuple[str, str]] = []
    for row_id in ("total_seconds", "step_seconds", "mfu_palm", "val_loss"):
        rows = [row for row in report.rows if row.id == row_id]
        measured = next((row.measured for row in rows if row.measured is not None), None)
        if measured is None:
            continue
        said = []
        cells = [Cells(row) for row in rows if row.claim and row.measured]
        if cells:
            said.append(f"claimed {' or '.join(c.claimed for c in cells)}")
        if rows[0].analytic is not None:
            said.append(f"predicted {Cells(rows[0]).predicted}")
        if row_id == "step_seconds" and report.run.tokens_per_second is not None:
            said.append(f"{report.run.tokens_per_second:,.0f} tokens/s")
        label = rows[0].quantity
        text = f"{label}: {', '.join(said)}" if said else label
        cards.append((format_value(row_id, measured.value), text))
    return cards


def print_rows(
    rows: list[Row], columns: Sequence[str], console: Console, planned: bool = False
) -> None:
    """Rows for a terminal: with the reasons beside them where it is wide, else below.

    In a plan nothing is measured yet, so that only claims have a verdict.
    """
    wide = console.width >= WIDE_TERMINAL
    table = TextTable(box=None, pad_edge=False, header_style="dim")
    for name in ("quantity", *columns, "verdict", *(["why"] if wide else [])):
        table.add_column(name, no_wrap=name not in ("quantity", "why"), overflow="fold")
    below: list[Text] = []
    absent: dict[str, list[str]] = {}
    for row in rows:
        cells = Cells(row)
        judged = row.claim is not None or not planned
        style = COLOURS.get(cells.verdict, "dim")
        word = f"{cells.mark} {cells.verdict} {cells.factor}"
        verdict = Text(word if judged else "", style=style)
        values = [Text(getattr(cells, name)) for name in columns]
        why = [Text(row.why, style="dim")] if wide else []
        table.add_row(Text(row.quantity), *values, verdict, *why)
        if not wide and cells.verdict in ("missed", "contradicted"):
            below.append(Text(f"{cells.mark} {row.quantity}: {row.why}."))
        elif not wide and cells.verdict == "not measured" and row.claim is None and not planned:
            absent.setdefault(row.why, []).append(row.quantity)
    console.print(table)
    for reason, quantities in absent.items():
        names = ", ".join(quantities)
        below.append(Text(f"{MARKS['not measured']} {names}: {reason}.", style="dim"))
    for text in below:
        console.print(text)


def predicted_columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """The analytic prediction, and beside it the calibrated one where there is any."""
    calibrated = any(row.calibrated is not None for row in rows)
    return ("predicted", "calibrated") if calibrated else ("predicted",)


def print_report(report: Report, console: Console) -> None:
    """The judgement, the verdicts and what cannot be true, for a terminal."""
    console.print(Text(report.run.headline, style="bold"))
    console.print()
    columns = ("claimed", *predicted_columns(report.rows), "measured")
    print_rows(in_order(report.rows), columns, console)
    print_findings(report.inconsistencies, console)
    for alarm in report.alarms:
        where = f" at step {alarm.step:,}" if alarm.step is not None else ""
        console.print(Text(f"‼ {alarm.what.replace('_', ' ')}{where}: {alarm.text}", style="red"))
    for warning in report.warnings:
        console.print(Text(f"! {warning}", style="yellow"))


def print_findings(findings: list[Inconsistency], console: Console) -> None:
    if findings:
        console.print()
        console.print(Text("What cannot be true:", style="bold"))
    for finding in findings:
        console.print(Text(f"‼ {finding.why}"))
