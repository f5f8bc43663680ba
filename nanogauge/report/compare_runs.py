"""Comparison of several runs: each quantity as predicted before the run and as measured."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from nanogauge.analysis.report_model import Report, build_report
from nanogauge.analysis.verdicts import Row
from nanogauge.quantities import QUANTITIES, format_value
from nanogauge.report.cells import Cells, sort_rows
from nanogauge.report.escape import printable
from nanogauge.report.terminal import VERDICT_STYLES, make_table
from nanogauge.schema import SCHEMA
from nanogauge.spec_parts import SETTINGS


class Comparison:
    """Reports of several runs in order of their start; those without a start time come last."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Read the run folders.

        Raises:
            BadInput: if one of them cannot be read.
        """
        built = [build_report(folder, None)[:2] for folder in folders]
        built.sort(key=lambda pair: pair[0].run.started_unix or float("inf"))
        names = Counter(report.run.name for report, _ in built)
        self.reports = [report for report, _ in built]
        self.specs = [folder.spec for _, folder in built]
        self.labels = [
            printable(report.run.name if names[report.run.name] == 1 else str(folder.path)) for report, folder in built
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

    def changes(self) -> list[str]:
        """Return three lines for each run after the first: settings, step time and loss."""
        lines = []
        for n in range(1, len(self.reports)):
            both = self.specs[0], self.specs[n]
            pairs = {key: [spec.setting(key) for spec in both] for key in SETTINGS}
            changed = [f"{key} {old} -> {new}" for key, (old, new) in pairs.items() if old != new]
            settings = ", ".join(changed) or "the same settings"
            lines.append(f"{self.labels[n]} against {self.labels[0]}: {settings}")
            lines += [self._change(row_id, n) for row_id in ("step_seconds", "val_loss")]
        return lines

    def _change(self, row_id: str, n: int) -> str:
        """Compare a quantity with the first run; noise is the p10 to p90 of that run's steps."""
        rows = next((rows for rows in self.rows if rows[0].id == row_id), None)
        old, new = (rows[0].measured, rows[n].measured) if rows is not None else (None, None)
        label = f"  {QUANTITIES[row_id].label}: "
        if old is None or new is None:
            return f"{label}not measured in both"
        values = [format_value(row_id, one.value) for one in (old, new)]
        text = f"{label}{values[0]} -> {values[1]}, {100 * (new.value / old.value - 1):+.1f} %"
        if old.p10 is None or old.p90 is None:
            return text
        how = "within" if old.p10 <= new.value <= old.p90 else "more than"
        return f"{text}, {how} the noise of single steps"

    def show(self, console: Console) -> None:
        """Print what changed, then each quantity with one line for every run."""
        for line in self.changes():
            console.print(Text(line), soft_wrap=True)
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
    """Return the rows to compare; omit exact quantities that are equal in all runs."""
    columns = [sort_rows(report.rows) for report in reports]
    found = []
    for rows in (list(of_all) for of_all in zip(*columns, strict=True)):
        values = {row.measured.value for row in rows if row.measured is not None}
        is_known = any(row.analytic or row.measured for row in rows)
        if is_known and not (QUANTITIES[rows[0].id].exact and len(values) <= 1):
            found.append(rows)
    return found
