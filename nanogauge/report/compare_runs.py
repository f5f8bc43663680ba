"""Comparison of several runs: each quantity as predicted before the run and as measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from nanogauge.analysis.report_model import Report, build_report
from nanogauge.analysis.verdicts import Row
from nanogauge.quantities import QUANTITIES
from nanogauge.report.cells import Cells, sort_rows
from nanogauge.report.escape import printable
from nanogauge.report.terminal import VERDICT_STYLES, make_table
from nanogauge.schema import SCHEMA


class Comparison:
    """Reports of several runs in order of their start; those without a start time come last."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Read the run folders.

        Raises:
            BadInput: if one of them cannot be read.
        """
        reports = [(folder, build_report(folder, None)[0]) for folder in folders]
        reports.sort(key=lambda pair: pair[1].run.started_unix or float("inf"))
        names = Counter(report.run.name for _, report in reports)
        self.reports = [report for _, report in reports]
        self.labels = [
            printable(report.run.name if names[report.run.name] == 1 else str(folder))
            for folder, report in reports
        ]
        """Name of each run, or its folder if several have the same name."""
        self.rows = _rows(self.reports)
        """One row of each run for every quantity."""

    def to_json(self) -> dict[str, Any]:
        runs = zip(self.labels, self.reports, strict=True)
        return {
            "schema": SCHEMA,
            "runs": [{"label": name, **one.run.model_dump(mode="json")} for name, one in runs],
            "rows": [[row.model_dump(mode="json") for row in rows] for rows in self.rows],
        }

    def show(self, console: Console) -> None:
        """Print each quantity with one line for every run."""
        table = make_table()
        for name in ("quantity", "run", "predicted", "measured", "verdict"):
            table.add_column(name, overflow="fold")
        for rows in self.rows:
            for index, (label, row) in enumerate(zip(self.labels, rows, strict=True)):
                cells = Cells(row)
                verdict = f"{cells.mark} {cells.verdict} {cells.factor}".strip()
                table.add_row(
                    "" if index else Text(row.quantity),
                    Text(label),
                    Text(cells.predicted),
                    Text(cells.measured),
                    Text(verdict, style=VERDICT_STYLES.get(cells.verdict, "dim")),
                )
        console.print(table)


def _rows(reports: list[Report]) -> list[list[Row]]:
    """Return the quantities predicted or measured by any run, less those equal by configuration."""
    columns = [sort_rows(report.rows) for report in reports]
    found = []
    for rows in (list(of_all) for of_all in zip(*columns, strict=True)):
        values = {row.measured.value for row in rows if row.measured is not None}
        is_known = any(row.analytic or row.measured for row in rows)
        if is_known and not (QUANTITIES[rows[0].id].exact and len(values) <= 1):
            found.append(rows)
    return found
