"""Report rows as text: the words, marks and groups that HTML, Markdown and terminal share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nanogauge.analysis.verdicts import Row
from nanogauge.quantities import QUANTITIES, format_range, format_value
from nanogauge.schema import Estimate

MARKS = {
    "held": "✓",
    "missed": "✕",
    "contradicted": "‼",
    "likely": "≈",
    "unlikely": "≉",
    "not measured": "○",
    "no claim": "·",
}
VERDICTS = tuple(verdict for verdict in MARKS if verdict != "no claim")
GROUPS = {
    "Time": ("total_seconds", "step_seconds", "first_step_seconds", "compile_share"),
    "Speed": ("mfu_palm", "mfu_6n", "speedup_after_warmup"),
    "Memory": ("peak_allocated_bytes", "peak_process_bytes", "weights_bytes"),
    "Energy": ("power_watts", "energy_kwh", "cost", "co2_grams"),
    "Quality": ("val_loss", "quality_vs_gpt2", "dataset"),
    "Counts": (
        *("flops_total_6n", "flops_total_palm", "flops_total_traced", "tokens_per_step", "tokens_total", "data_epochs"),
        *("parameters", "parameters_total", "setting"),
    ),
}
_ORDER = [row_id for ids in GROUPS.values() for row_id in ids]


def sort_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in the order of GROUPS; of one quantity, sums and other runs come last."""

    def place(row: Row) -> tuple[int, bool, bool]:
        other = row.claimed is not None and not row.claimed.of_this_run
        return _ORDER.index(row.id), other, row.judged_by == "arithmetic"

    return sorted(rows, key=place)


class Cells:
    """The cells of one row as text; an absent value is an empty string."""

    def __init__(self, row: Row) -> None:
        currency = row.unit if row.id == "cost" else ""
        self.row = row
        self.claimed = row.claimed.text if row.claimed is not None else ""
        self.label = (row.claimed.label or "") if row.claimed is not None else ""
        self.predicted = range_cell(row.id, row.analytic, currency)
        self.calibrated = range_cell(row.id, row.calibrated, currency)
        self.expected_analytic = _expected_cell(row.id, row.analytic, currency)
        self.expected_calibrated = _expected_cell(row.id, row.calibrated, currency)
        self.expected = _expected_cell(row.id, row.calibrated or row.analytic, currency)
        self.measured = value_cell(row.id, row.measured.value if row.measured is not None else None, currency)
        is_of_prediction = row.verdict == "no claim" and row.prediction is not None
        self.verdict = str(row.prediction if is_of_prediction else row.verdict)
        self.mark = MARKS[self.verdict]
        self.judged = f"{self.mark} {self.verdict}" + " (prediction)" * is_of_prediction
        self.why = row.why.removeprefix("not measured: ")
        self.quote = row.claimed.quote if row.claimed is not None else ""
        self.english = row.claimed.english if row.claimed is not None else ""
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
class QuantityGroup:
    """One quantity of the run, with the claims about it."""

    label: str
    own: Cells
    """Its prediction and measurement; those of a claim about another run are in its reason."""
    cells: list[Cells]
    """The claims, or the row itself if there are none."""

    @property
    def how(self) -> str:
        """How it was measured; empty if it was not, or follows from the configuration."""
        row = self.own.row
        return row.measured.how if row.measured and not QUANTITIES[row.id].exact else ""


@dataclass(frozen=True)
class Group:
    """Quantities on one subject."""

    name: str
    quantities: list[QuantityGroup]


def group_quantities(rows: Iterable[Row]) -> list[QuantityGroup]:
    """Return the rows by quantity, in the order of sort_rows."""
    by_id: dict[str, list[Row]] = {}
    for row in sort_rows(list(rows)):
        by_id.setdefault(row.id, []).append(row)
    found = []
    for of_id in by_id.values():
        own = next((r for r in of_id if r.claimed is None or r.claimed.of_this_run), of_id[0])
        claimed = [row for row in of_id if row.claim is not None] or of_id
        label = own.quantity.partition(": ")[0]
        cells = [Cells(row) for row in claimed]
        _drop_repetitions(cells)
        found.append(QuantityGroup(label, Cells(own), cells))
    return found


def _drop_repetitions(cells: list[Cells]) -> None:
    """Remove quotations, and beginnings of reasons, that an earlier claim has already."""
    for index, cell in enumerate(cells):
        for earlier in cells[:index]:
            if earlier.quote == cell.quote:
                cell.quote = cell.english = ""
            if earlier.row.why and cell.row.why.startswith(earlier.row.why):
                cell.why = cell.row.why.removeprefix(earlier.row.why).lstrip(",; ")


def group_rows(rows: Sequence[Row]) -> list[Group]:
    """Return the quantities in groups, none of them empty."""
    quantities = group_quantities(rows)
    groups = [Group(name, [q for q in quantities if q.own.row.id in ids]) for name, ids in GROUPS.items()]
    return [group for group in groups if group.quantities]
