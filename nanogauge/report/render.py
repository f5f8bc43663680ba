"""report.html, report.md and report.json, written aside and renamed; and a terminal's table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as TextTable
from rich.text import Text

from nanogauge.consistency import Inconsistency
from nanogauge.errors import BadInput
from nanogauge.files import make_folder, without_secrets, write_atomic
from nanogauge.report.build import Report
from nanogauge.report.cells import MARKS, Cells, in_order
from nanogauge.report.compare import Row
from nanogauge.report.first_screen import WEEKDAY_TIME
from nanogauge.report.page import render_html, render_markdown
from nanogauge.runfolder import RunFolder
from nanogauge.runlog import Recorded

__all__ = [
    "COLOURS",
    "predicted_columns",
    "print_findings",
    "print_report",
    "print_rows",
    "render_html",
    "render_report",
    "write_report",
]

WIDE_TERMINAL = 150
COLOURS = {"held": "green", "missed": "red", "contradicted": "bold red"}


def render_report(report: Report, run: RunFolder, recorded: Recorded) -> dict[str, str]:
    """The report in its three forms, by the name of the file."""
    return {
        "report.json": json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False),
        "report.md": render_markdown(report, run, recorded),
        "report.html": render_html(report, run, recorded),
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
            write_atomic(run.path / name, without_secrets(text).encode())
    except OSError as error:
        raise BadInput(f"cannot write the report to {run.path}: {error.strerror}.") from None
    return [run.path / name for name in contents]


def print_rows(
    rows: list[Row], columns: Sequence[str], console: Console, planned: bool = False
) -> None:
    """Rows for a terminal: with the reasons beside them where it is wide, else below.

    In a plan nothing is measured yet, so that only claims have a verdict.
    """
    wide = console.width >= WIDE_TERMINAL
    table = TextTable(box=None, pad_edge=False, header_style="dim")
    for name in ("quantity", *columns, "verdict", *(["why"] if wide else [])):
        table.add_column(name, no_wrap=wide and name not in ("quantity", "why"), overflow="fold")
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
    for one in report.night.happenings:
        when = (
            ""
            if one.unix_time is None
            else f"{report.run.time_zone.local(one.unix_time):{WEEKDAY_TIME}} "
        )
        where = f" at step {one.step:,}" if one.step is not None else ""
        told = f"! {when}{one.what.replace('_', ' ')}{where}: {one.text}"
        console.print(Text(told, style="yellow"))
    for warning in report.other_warnings():
        console.print(Text(f"! {warning}", style="yellow"))


def print_findings(findings: list[Inconsistency], console: Console) -> None:
    if findings:
        console.print()
        console.print(Text("What cannot be true:", style="bold"))
    for finding in findings:
        console.print(Text(f"‼ {finding.why}"))
