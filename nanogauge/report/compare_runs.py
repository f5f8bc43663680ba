"""Comparison of several runs: each quantity as predicted before the run and as measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from nanogauge.analysis.report_model import Report, build_report
from nanogauge.quantities import QUANTITIES
from nanogauge.report.cells import MARKS, range_cell, sort_rows, value_cell
from nanogauge.report.escape import printable
from nanogauge.report.terminal import VERDICT_STYLES, make_table
from nanogauge.schema import SCHEMA, Estimate, Stored, TimeZone


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


class ComparedRow(Stored):
    id: str
    quantity: str
    unit: str
    cells: list[ComparedCell]
    """One for each run, in their order."""


class Comparison(Stored):
    runs: list[ComparedRun]
    """In order of their start; runs without a start time come last."""
    rows: list[ComparedRow]

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
    return Comparison(runs=runs, rows=_rows([report for _, report in reports]))


def _compared_run(folder: Path, report: Report, names: Counter[str]) -> ComparedRun:
    run = report.run
    kept = {"status", "state", "started_unix", "time_zone", "steps_done", "max_steps"}
    return ComparedRun(
        label=printable(run.name if names[run.name] == 1 else str(folder)),
        folder=printable(str(folder)),
        device=printable(run.device),
        headline=printable(run.headline),
        **run.model_dump(include=kept),
    )


def _rows(reports: list[Report]) -> list[ComparedRow]:
    """Return the quantities that any run predicted or measured, without equal exact ones."""
    rows = []
    for first in sort_rows(reports[0].rows):
        cells = []
        for report in reports:
            row = next(row for row in report.rows if row.id == first.id)
            measured = row.measured.value if row.measured is not None else None
            analytic = row.analytic
            factor = None
            if measured is not None and analytic is not None and analytic.expected:
                factor = measured / analytic.expected
            cells.append(
                ComparedCell(
                    analytic=analytic,
                    calibrated=row.calibrated,
                    measured=measured,
                    prediction=row.prediction,
                    factor=factor,
                )
            )
        is_known = any(c.analytic is not None or c.measured is not None for c in cells)
        values = {c.measured for c in cells if c.measured is not None}
        if is_known and not (QUANTITIES[first.id].exact and len(values) <= 1):
            rows.append(
                ComparedRow(id=first.id, quantity=first.quantity, unit=first.unit, cells=cells)
            )
    return rows


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print each quantity with one line for every run."""
    table = make_table()
    for name in ("quantity", "run", "predicted", "measured", "verdict"):
        table.add_column(name, overflow="fold")
    for row in comparison.rows:
        currency = row.unit if row.id == "cost" else ""
        for index, (run, cell) in enumerate(zip(comparison.runs, row.cells, strict=True)):
            measured, verdict = value_cell(row.id, cell.measured, currency), cell.prediction or ""
            factor = "" if cell.factor is None else f"{cell.factor:.3g}×"
            words = f"{MARKS.get(verdict, '')} {verdict} {factor}".strip()
            table.add_row(
                Text("" if index else row.quantity),
                Text(run.label),
                Text(range_cell(row.id, cell.analytic, currency)),
                Text(measured or "not measured", style="" if measured else "dim"),
                Text(words, style=VERDICT_STYLES.get(verdict, "")),
            )
    console.print(table)
