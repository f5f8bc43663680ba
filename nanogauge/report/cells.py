"""Report rows as text: the words, marks and groups that HTML, Markdown and terminal share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nanogauge.analysis.verdicts import Row
from nanogauge.quantities import QUANTITIES, format_range, format_value
from nanogauge.schema import Estimate

MARKS = {"held": "✓", "missed": "✕", "contradicted": "‼", "not measured": "○", "no claim": "·"}
VERDICTS = ("held", "missed", "contradicted", "not measured")
GROUPS = {
    "Time": ("total_seconds", "step_seconds", "first_step_seconds"),
    "Speed": ("mfu_palm", "mfu_6n", "speedup_after_warmup"),
    "Memory": ("peak_allocated_bytes", "peak_process_bytes"),
    "Energy": ("power_watts", "energy_kwh", "cost"),
    "Quality": ("val_loss", "quality_vs_gpt2"),
}
_ARITHMETIC = "Arithmetic"
"""Group of the rows that follow from the configuration or from other claims."""
_ORDER = (
    *("total_seconds", "step_seconds", "first_step_seconds", "mfu_palm", "mfu_6n"),
    *("flops_total_6n", "flops_total_palm", "power_watts", "energy_kwh", "cost"),
    *("peak_allocated_bytes", "peak_process_bytes", "val_loss", "quality_vs_gpt2"),
)


def _is_sum(row: Row) -> bool:
    """Return True if the claim was judged by arithmetic alone, as it is about another run."""
    return row.verdict in ("held", "contradicted") and not (row.measured or row.analytic)


def sort_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the quantities most often asked for first and plain arithmetic last."""

    def place(row: Row) -> int:
        if _is_sum(row):
            return len(_ORDER) + 1
        return _ORDER.index(row.id) if row.id in _ORDER else len(_ORDER)

    return sorted(rows, key=place)


class Cells:
    """The cells of one row as text; an absent value is an empty string."""

    def __init__(self, row: Row) -> None:
        currency = row.unit if row.id == "cost" else ""
        self.row = row
        self.claimed = row.claimed.text if row.claimed is not None else ""
        self.predicted = range_cell(row.id, row.analytic, currency)
        self.calibrated = range_cell(row.id, row.calibrated, currency)
        self.expected_analytic = _expected_cell(row.id, row.analytic, currency)
        self.expected_calibrated = _expected_cell(row.id, row.calibrated, currency)
        self.expected = _expected_cell(row.id, row.calibrated or row.analytic, currency)
        self.measured = value_cell(
            row.id, row.measured.value if row.measured is not None else None, currency
        )
        is_of_prediction = row.verdict == "no claim" and row.prediction is not None
        self.verdict = str(row.prediction if is_of_prediction else row.verdict)
        self.mark = MARKS[self.verdict]
        self.why = row.why.removeprefix("not measured: ")
        self.judged_on = "prediction" if row.claim is None else "claim"
        self.factor = ""
        if row.factor is not None and abs(row.factor - 1) > 5e-4:
            digits = f"{row.factor:,.0f}" if row.factor >= 100 else f"{row.factor:.3g}"
            self.factor = f"{digits}×"


def value_cell(row_id: str, value: float | None, currency: str) -> str:
    return "" if value is None else format_value(row_id, value, currency)


def range_cell(row_id: str, estimate: Estimate | None, currency: str) -> str:
    return "" if estimate is None else format_range(row_id, estimate.low, estimate.high, currency)


def _expected_cell(row_id: str, estimate: Estimate | None, currency: str) -> str:
    """Return the expected value as text; empty if the interval is a single number."""
    if estimate is None or estimate.low >= estimate.high:
        return ""
    return format_value(row_id, estimate.expected, currency)


@dataclass(frozen=True)
class Group:
    """Rows on one subject."""

    name: str
    cells: list[Cells]

    @property
    def counts(self) -> list[tuple[str, int]]:
        """Each verdict with its number of rows."""
        counter = Counter(cell.verdict for cell in self.cells)
        return [(verdict, counter[verdict]) for verdict in VERDICTS if counter[verdict]]


def group_rows(rows: Sequence[Row]) -> list[Group]:
    """Return all rows in groups, none of them empty."""
    names = {row_id: name for name, ids in GROUPS.items() for row_id in ids}
    members: dict[str, list[Cells]] = {name: [] for name in (*GROUPS, _ARITHMETIC)}
    for row in sort_rows(rows):
        exact = QUANTITIES[row.id].exact or _is_sum(row)
        members[_ARITHMETIC if exact else names[row.id]].append(Cells(row))
    return [Group(name, cells) for name, cells in members.items() if cells]
