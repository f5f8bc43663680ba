"""Several runs side by side: each quantity predicted and measured, and whether predictions improve.

The prediction is each run's own, frozen before it began; claims are left to the report of one run.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from markupsafe import Markup
from rich.console import Console
from rich.table import Table as TextTable
from rich.text import Text

from nanogauge.analysis.report_model import Report, build_report
from nanogauge.errors import BadInput
from nanogauge.files import make_folder, without_secrets, write_atomic
from nanogauge.quantities import QUANTITIES, format_range, format_value
from nanogauge.report.cells import MARKS, in_order
from nanogauge.report.html import templates
from nanogauge.report.terminal import COLOURS
from nanogauge.schema import SCHEMA, Estimate, Stored, TimeZone

NAME = "comparison"
BAR_WIDTH, BAR_HEIGHT = 140, 14
_TIMES = ("total_seconds", "step_seconds")
"""the trends that are told in words"""
FULL_BAR = 0.5
"""the error at which a bar is as long as it can be"""


class Side(Stored):
    """One run of the comparison."""

    label: str
    """its name, or where several share one its folder"""
    folder: str
    device: str
    status: str
    state: str | None
    started_unix: float | None
    time_zone: TimeZone
    """of the machine that trained"""
    steps_done: int
    max_steps: int
    headline: str


class Cell(Stored):
    """One quantity of one run."""

    analytic: Estimate | None
    calibrated: Estimate | None
    measured: float | None
    prediction: str | None
    """held or missed, as in the run's own report: whether it lies in the analytic interval"""
    factor: float | None
    """measured over the analytic expectation"""
    factor_calibrated: float | None


class ComparedRow(Stored):
    id: str
    quantity: str
    unit: str
    cells: list[Cell]
    """of the runs, in their order"""


class Trend(Stored):
    """How far off one prediction was in run after run."""

    id: str
    basis: str
    """analytic or calibrated"""
    errors: list[float | None]
    """(measured - expected) / expected, of the runs in their order"""


class Comparison(Stored):
    runs: list[Side]
    """in the order in which they began; those that do not say when come last, as given"""
    rows: list[ComparedRow]
    trends: list[Trend]

    def to_json(self) -> dict[str, object]:
        return {"schema": SCHEMA, **self.model_dump(mode="json")}


def printable(text: str) -> str:
    """The text without characters that steer a terminal, or are half of one."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Read the runs and put them into the order in which they began.

    Raises:
        BadInput: if one of them cannot be read.
    """
    reports = [(folder, build_report(folder, None)[0]) for folder in folders]
    reports.sort(key=lambda told: told[1].run.started_unix or float("inf"))
    names = Counter(report.run.name for _, report in reports)
    sides = [_side(folder, report, names) for folder, report in reports]
    rows = _rows([report for _, report in reports])
    return Comparison(runs=sides, rows=rows, trends=_trends(rows))


def _side(folder: Path, report: Report, names: Counter[str]) -> Side:
    run = report.run
    return Side(
        label=printable(run.name if names[run.name] == 1 else str(folder)),
        folder=printable(str(folder)),
        device=printable(run.device),
        status=run.status,
        state=run.state,
        started_unix=run.started_unix,
        time_zone=run.time_zone,
        steps_done=run.steps_done,
        max_steps=run.max_steps,
        headline=printable(run.headline),
    )


def _rows(reports: list[Report]) -> list[ComparedRow]:
    """A row for each quantity that any run predicted or measured, but for plain sums all share."""
    result = []
    for first in in_order(reports[0].rows):
        found = [next(row for row in report.rows if row.id == first.id) for report in reports]
        cells = []
        for row in found:
            measured = row.measured.value if row.measured is not None else None
            cells.append(
                Cell(
                    analytic=row.analytic,
                    calibrated=row.calibrated,
                    measured=measured,
                    prediction=row.prediction,
                    factor=_factor(measured, row.analytic),
                    factor_calibrated=_factor(measured, row.calibrated),
                )
            )
        told = any(c.analytic is not None or c.measured is not None for c in cells)
        figures = {c.measured for c in cells if c.measured is not None}
        same = len(figures) <= 1 and QUANTITIES[first.id].exact
        if told and not same:
            result.append(
                ComparedRow(id=first.id, quantity=first.quantity, unit=first.unit, cells=cells)
            )
    return result


def _factor(measured: float | None, estimate: Estimate | None) -> float | None:
    if measured is None or estimate is None or estimate.expected == 0:
        return None
    return measured / estimate.expected


def _trends(rows: list[ComparedRow]) -> list[Trend]:
    """The errors of each prediction that at least two runs can be held against."""
    trends = []
    for row in rows:
        if QUANTITIES[row.id].exact:
            continue
        for basis, factors in (
            ("analytic", [c.factor for c in row.cells]),
            ("calibrated", [c.factor_calibrated for c in row.cells]),
        ):
            errors = [None if factor is None else factor - 1 for factor in factors]
            if sum(error is not None for error in errors) >= 2:
                trends.append(Trend(id=row.id, basis=basis, errors=errors))
    return trends


def trend_sentences(comparison: Comparison) -> list[str]:
    """From how far off the first run was to how far the newest is."""
    sentences = []
    for trend in comparison.trends:
        if trend.id not in _TIMES:
            continue
        known = [
            (error, side.label)
            for error, side in zip(trend.errors, comparison.runs, strict=True)
            if error is not None
        ]
        (first, earliest), (last, newest) = known[0], known[-1]
        closer = sum(abs(after) < abs(before) for (before, _), (after, _) in pairwise(known))
        sentences.append(
            f"{QUANTITIES[trend.id].label} ({trend.basis} prediction): {_percent(first)} in "
            f"{earliest}, {_percent(last)} in {newest}; nearer than in the run before in {closer} "
            f"of {len(known) - 1}."
        )
    return sentences


def _percent(error: float) -> str:
    return f"{100 * error:+.3g} %"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Each quantity with a line for every run, and the trend below."""
    table = TextTable(box=None, pad_edge=False, header_style="dim")
    for name in ("quantity", "run", "predicted", "measured", "verdict"):
        table.add_column(name, overflow="fold")
    for row in comparison.rows:
        for index, (side, cell) in enumerate(zip(comparison.runs, row.cells, strict=True)):
            shown = _CellText(row, cell)
            verdict = f"{shown.mark} {shown.verdict} {shown.factor}" if shown.verdict else ""
            table.add_row(
                Text("" if index else row.quantity),
                Text(side.label),
                Text(shown.predicted),
                Text(shown.measured or "not measured", style="" if shown.measured else "dim"),
                Text(verdict, style=COLOURS.get(shown.verdict, "")),
            )
    console.print(table)
    console.print()
    for sentence in trend_sentences(comparison):
        console.print(Text(sentence))


class _CellText:
    """A cell as a person reads it."""

    def __init__(self, row: ComparedRow, cell: Cell) -> None:
        currency = row.unit if row.id == "cost" else ""
        self.measured = ""
        if cell.measured is not None:
            self.measured = format_value(row.id, cell.measured, currency)
        self.predicted, self.calibrated = (
            "" if e is None else format_range(row.id, e.low, e.high, currency)
            for e in (cell.analytic, cell.calibrated)
        )
        self.verdict = cell.prediction or ""
        self.mark = MARKS.get(self.verdict, "")
        self.factor = "" if cell.factor is None else f"{cell.factor:.3g}×"


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """Write comparison.html and comparison.json into a folder and return their paths.

    Raises:
        BadInput: if it cannot be written.
    """
    make_folder(out)
    page = templates().get_template("side_by_side.html.j2")
    labels = {row.id: row.quantity for row in comparison.rows}
    html = page.render(
        runs=[(side, date_and_time(side.started_unix, side.time_zone)) for side in comparison.runs],
        rows=[
            {"quantity": row.quantity, "cells": [_CellText(row, cell) for cell in row.cells]}
            for row in comparison.rows
        ],
        trends=[
            {
                "quantity": labels[trend.id],
                "basis": trend.basis,
                "cells": [("", "") if e is None else (_percent(e), _bar(e)) for e in trend.errors],
            }
            for trend in comparison.trends
        ],
        sentences=trend_sentences(comparison),
    )
    told = json.dumps(comparison.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    paths = [out / f"{NAME}.json", out / f"{NAME}.html"]
    try:
        for path, text in zip(paths, (told, html), strict=True):
            write_atomic(path, without_secrets(text).encode())
    except OSError as error:
        raise BadInput(f"cannot write to {out}: {error.strerror}; give another --out.") from None
    return paths


def date_and_time(unix: float | None, zone: TimeZone) -> str:
    """Return a moment as date and time of day; empty where it is not known or has no date."""
    try:
        return f"{zone.local(unix):%Y-%m-%d %H:%M}" if unix is not None else ""
    except (OverflowError, ValueError, OSError):
        return ""


def _bar(error: float) -> Markup:
    """The error as a bar from the middle, which is none; the figure stands beside it as text."""
    middle = BAR_WIDTH / 2
    length = min(abs(error) / FULL_BAR, 1.0) * middle
    begin = middle if error > 0 else middle - length
    return Markup(
        '<svg viewBox="0 0 {w} {h}" aria-hidden="true">'
        '<rect class="err" x="{x:.1f}" y="3" width="{l:.1f}" height="8"/>'
        '<line class="zero" x1="{m}" x2="{m}" y1="0" y2="{h}"/></svg>'
    ).format(w=BAR_WIDTH, h=BAR_HEIGHT, x=begin, l=length, m=middle)


def common_parent(folders: Sequence[Path]) -> Path:
    """The folder in which all of the runs lie."""
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
