"""Comparison of several runs: each quantity predicted and measured, and the trend of the error.

Predictions are those frozen before each run. Claims are left to the report of one run.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from nanogauge.analysis.report_model import Report, RunInfo, build_report
from nanogauge.files import without_secrets
from nanogauge.quantities import QUANTITIES
from nanogauge.report.cells import MARKS, range_cell, sort_rows, value_cell
from nanogauge.report.escape import printable
from nanogauge.report.html import date_and_time, templates, write_texts
from nanogauge.report.terminal import VERDICT_STYLES, make_table
from nanogauge.schema import SCHEMA, Estimate, Stored, TimeZone

NAME = "comparison"
_BAR_WIDTH, _BAR_HEIGHT = 140, 14
_FULL_BAR = 0.5
"""Relative error at which a bar has its full length."""
_TRENDS_IN_WORDS = ("total_seconds", "step_seconds")


class ComparedRun(Stored):
    label: str
    """Name of the run, or its folder if several have the same name."""
    folder: str
    device: str
    status: str
    state: str | None
    started_unix: float | None
    time_zone: TimeZone
    """Time zone of the machine that trained."""
    steps_done: int
    max_steps: int
    headline: str


class ComparedCell(Stored):
    """One quantity of one run."""

    analytic: Estimate | None
    calibrated: Estimate | None
    measured: float | None
    prediction: str | None
    """Verdict on the analytic interval: held or missed; None if there is nothing to judge."""
    factor: float | None
    """Measured over the analytic expectation."""
    factor_calibrated: float | None
    """Measured over the calibrated expectation."""


class ComparedRow(Stored):
    id: str
    quantity: str
    unit: str
    cells: list[ComparedCell]
    """One for each run, in their order."""


class Trend(Stored):
    """Relative error of one prediction, run by run."""

    id: str
    basis: str
    """analytic or calibrated."""
    errors: list[float | None]
    """(measured - expected) / expected of each run; None if either is absent."""


class Comparison(Stored):
    runs: list[ComparedRun]
    """In order of their start; runs without a start time come last."""
    rows: list[ComparedRow]
    trends: list[Trend]

    def to_json(self) -> dict[str, object]:
        return {"schema": SCHEMA, **self.model_dump(mode="json")}


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Read the run folders and compare their reports.

    Raises:
        BadInput: if one of them cannot be read.
    """
    reports = [(folder, build_report(folder, None)[0]) for folder in folders]
    reports.sort(key=lambda pair: pair[1].run.started_unix or float("inf"))
    names = Counter(report.run.name for _, report in reports)
    runs = [_compared_run(folder, report, names) for folder, report in reports]
    rows = _rows([report for _, report in reports])
    return Comparison(runs=runs, rows=rows, trends=_trends(rows))


def _compared_run(folder: Path, report: Report, names: Counter[str]) -> ComparedRun:
    name = report.run.name
    return ComparedRun(
        label=printable(name if names[name] == 1 else str(folder)),
        folder=printable(str(folder)),
        **run_fields(report.run),
    )


def run_fields(run: RunInfo) -> dict[str, Any]:
    """Return the fields of a run that the comparison and the start page share."""
    names = {"status", "state", "started_unix", "time_zone", "steps_done", "max_steps"}
    texts = {"device": printable(run.device), "headline": printable(run.headline)}
    return {**run.model_dump(include=names), **texts}


def _rows(reports: list[Report]) -> list[ComparedRow]:
    """Return the quantities that any run predicted or measured, without equal exact ones."""
    rows = []
    for first in sort_rows(reports[0].rows):
        cells = []
        for report in reports:
            row = next(row for row in report.rows if row.id == first.id)
            measured = row.measured.value if row.measured is not None else None
            cells.append(
                ComparedCell(
                    analytic=row.analytic,
                    calibrated=row.calibrated,
                    measured=measured,
                    prediction=row.prediction,
                    factor=_factor(measured, row.analytic),
                    factor_calibrated=_factor(measured, row.calibrated),
                )
            )
        is_known = any(c.analytic is not None or c.measured is not None for c in cells)
        values = {c.measured for c in cells if c.measured is not None}
        if is_known and not (QUANTITIES[first.id].exact and len(values) <= 1):
            rows.append(
                ComparedRow(id=first.id, quantity=first.quantity, unit=first.unit, cells=cells)
            )
    return rows


def _factor(measured: float | None, estimate: Estimate | None) -> float | None:
    if measured is None or estimate is None or estimate.expected == 0:
        return None
    return measured / estimate.expected


def _trends(rows: list[ComparedRow]) -> list[Trend]:
    """Return the errors of each prediction that at least two runs measured."""
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
    """Describe each trend of a time by its first and last error."""
    sentences = []
    for trend in comparison.trends:
        if trend.id not in _TRENDS_IN_WORDS:
            continue
        known = [
            (error, run.label)
            for error, run in zip(trend.errors, comparison.runs, strict=True)
            if error is not None
        ]
        (first, earliest), (last, newest) = known[0], known[-1]
        smaller = sum(abs(after) < abs(before) for (before, _), (after, _) in pairwise(known))
        sentences.append(
            f"{QUANTITIES[trend.id].label} ({trend.basis} prediction): error {_percent(first)} in "
            f"{earliest}, {_percent(last)} in {newest}; smaller than in the run before in "
            f"{smaller} of {len(known) - 1}."
        )
    return sentences


def _percent(error: float) -> str:
    return f"{100 * error:+.3g} %"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print each quantity with one line for every run, and the trends below."""
    table = make_table()
    for name in ("quantity", "run", "predicted", "measured", "verdict"):
        table.add_column(name, overflow="fold")
    for row in comparison.rows:
        for index, (run, cell) in enumerate(zip(comparison.runs, row.cells, strict=True)):
            text = _cell_text(row, cell)
            table.add_row(
                Text("" if index else row.quantity),
                Text(run.label),
                Text(text["predicted"]),
                Text(text["measured"] or "not measured", style="" if text["measured"] else "dim"),
                Text(
                    f"{text['mark']} {text['verdict']} {text['factor']}".strip(),
                    style=VERDICT_STYLES.get(text["verdict"], ""),
                ),
            )
    console.print(table)
    console.print()
    for sentence in trend_sentences(comparison):
        console.print(Text(sentence))


def _cell_text(row: ComparedRow, cell: ComparedCell) -> dict[str, str]:
    currency = row.unit if row.id == "cost" else ""
    return {
        "measured": value_cell(row.id, cell.measured, currency),
        "predicted": range_cell(row.id, cell.analytic, currency),
        "calibrated": range_cell(row.id, cell.calibrated, currency),
        "verdict": cell.prediction or "",
        "mark": MARKS.get(cell.prediction or "", ""),
        "factor": "" if cell.factor is None else f"{cell.factor:.3g}×",
    }


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """Write comparison.json and comparison.html into a folder and return their paths.

    Raises:
        BadInput: if they cannot be written.
    """
    labels = {row.id: row.quantity for row in comparison.rows}
    html = (
        templates()
        .get_template("side_by_side.html.j2")
        .render(
            runs=[(run, date_and_time(run.started_unix, run.time_zone)) for run in comparison.runs],
            rows=[
                {"quantity": row.quantity, "cells": [_cell_text(row, cell) for cell in row.cells]}
                for row in comparison.rows
            ],
            trends=[
                {
                    "quantity": labels[trend.id],
                    "basis": trend.basis,
                    "cells": [
                        ("", "") if e is None else (_percent(e), _bar(e)) for e in trend.errors
                    ],
                }
                for trend in comparison.trends
            ],
            sentences=trend_sentences(comparison),
        )
    )
    text = json.dumps(comparison.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    contents = {f"{NAME}.json": text, f"{NAME}.html": html}
    return write_texts(out, {name: without_secrets(text) for name, text in contents.items()})


def _bar(error: float) -> Markup:
    """Draw a relative error as a bar to the left or right of zero; its number stands beside it."""
    middle = _BAR_WIDTH / 2
    length = min(abs(error) / _FULL_BAR, 1.0) * middle
    return Markup(
        '<svg viewBox="0 0 {w} {h}" aria-hidden="true">'
        '<rect class="err" x="{x:.1f}" y="3" width="{l:.1f}" height="8"/>'
        '<line class="zero" x1="{m}" x2="{m}" y1="0" y2="{h}"/></svg>'
    ).format(w=_BAR_WIDTH, h=_BAR_HEIGHT, x=middle - length * (error <= 0), l=length, m=middle)


def common_parent(folders: Sequence[Path]) -> Path:
    """Return the deepest folder that contains all of the runs."""
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
