"""Rows as people read them: the words, marks and groups that every form of the report shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nanogauge.analysis.verdicts import Row
from nanogauge.quantities import QUANTITIES, format_range, format_value
from nanogauge.schema import Estimate

MARKS = {"held": "✓", "missed": "✕", "contradicted": "‼", "not measured": "○", "no claim": "·"}
VERDICTS = ("held", "missed", "contradicted", "not measured")
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
GROUPS = {
    "Time": ("total_seconds", "step_seconds", "first_step_seconds"),
    "Speed": ("mfu_palm", "mfu_6n", "speedup_after_warmup"),
    "Memory": ("peak_allocated_bytes", "peak_process_bytes"),
    "Energy": ("power_watts", "energy_kwh", "cost"),
    "Quality": ("val_loss", "quality_vs_gpt2"),
}
_ARITHMETIC = "Arithmetic"
"""the group of what follows from the configuration, or from other numbers, alone"""


def is_sum(row: Row) -> bool:
    """Whether a row's claim is about some other run, and judged by arithmetic alone."""
    return row.verdict in ("held", "contradicted") and not (row.measured or row.analytic)


def in_order(rows: list[Row]) -> list[Row]:
    """As a person asks: how long, how well, how much, and only then what was plain arithmetic."""
    rank = {row_id: index for index, row_id in enumerate(SHOWN_FIRST)}

    def place(row: Row) -> int:
        return len(rank) + 1 if is_sum(row) else rank.get(row.id, len(rank))

    return sorted(rows, key=place)


class Cells:
    """A row as text, the same words for every form of the report."""

    def __init__(self, row: Row) -> None:
        currency = row.unit if row.id == "cost" else ""
        self.row = row
        self.claimed = row.claimed.text if row.claimed is not None else ""
        self.predicted = _estimate_text(row.id, row.analytic, currency)
        self.calibrated = _estimate_text(row.id, row.calibrated, currency)
        self.expected_analytic = _expected_text(row.id, row.analytic, currency)
        self.expected_calibrated = _expected_text(row.id, row.calibrated, currency)
        best = row.calibrated or row.analytic
        self.expected = _expected_text(row.id, best, currency)
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


def _estimate_text(row_id: str, estimate: Estimate | None, currency: str) -> str:
    if estimate is None:
        return ""
    return format_range(row_id, estimate.low, estimate.high, currency)


def _expected_text(row_id: str, estimate: Estimate | None, currency: str) -> str:
    """What is expected; empty where the estimate is that one number."""
    if estimate is None or estimate.low >= estimate.high:
        return ""
    return format_value(row_id, estimate.expected, currency)


@dataclass(frozen=True)
class Group:
    """Rows about one thing."""

    name: str
    cells: list[Cells]

    @property
    def counts(self) -> list[tuple[str, int]]:
        """How many of its rows have which verdict."""
        found = Counter(cell.verdict for cell in self.cells)
        return [(verdict, found[verdict]) for verdict in VERDICTS if found[verdict]]


def grouped(rows: Sequence[Row]) -> list[Group]:
    """The rows by what they are about, none left out and no group empty."""
    names = {row_id: name for name, ids in GROUPS.items() for row_id in ids}
    members: dict[str, list[Cells]] = {name: [] for name in (*GROUPS, _ARITHMETIC)}
    for row in in_order(list(rows)):
        exact = QUANTITIES[row.id].exact or is_sum(row)
        members[_ARITHMETIC if exact else names[row.id]].append(Cells(row))
    return [Group(name, cells) for name, cells in members.items() if cells]
