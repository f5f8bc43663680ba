"""Several plans for a terminal: one line each, the shortest run first."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nanogauge.prediction.compare_configs import Planned
from nanogauge.quantities import (
    GIB,
    Interval,
    day_and_time,
    format_range,
    format_seconds,
    format_value,
)

UNKNOWN = "not known"
_COLUMNS = (
    *("time", "between", "peak VRAM", "memory", "energy", "cost", "tokens"),
    *("tokens per parameter", "tokens/s", "finish"),
)


def print_plans(plans: Sequence[Planned], device: str, gpus: int, now: datetime) -> None:
    """Print the table, as wide as it is: nothing in it is cut."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("configuration", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, no_wrap=True, justify="right")
    for plan in plans:
        table.add_row(plan.config, *_cells(plan, now))
    wide = Console(width=1000)
    console = Console(width=max(wide.measure(table).maximum, 80))
    several = f"{gpus} x " if gpus > 1 else ""
    console.print(Text(f"{len(plans)} configurations on {several}{device}", style="bold"))
    console.print(table)
    free = sorted({plan.free_bytes for plan in plans})
    told = " or ".join(f"{size / GIB:.1f}" for size in free)
    each = " on each" if gpus > 1 else ""
    console.print(Text(f"Memory: {told} GiB are free{each}.", style="dim"))
    for plan in plans:
        if plan.recipe is not None:
            console.print(Text(f"{plan.config}: {plan.recipe}", style="dim"))


def _cells(plan: Planned, now: datetime) -> list[str]:
    total, speed, finish = plan.total_seconds, plan.tokens_per_second, plan.finish
    between = "" if total is None else format_range("total_seconds", total.low, total.high)
    return [
        UNKNOWN if total is None else format_seconds(total.expected),
        between,
        f"{plan.peak_process_bytes.expected / GIB:.1f} GiB",
        plan.verdict,
        _value("energy_kwh", plan.energy_kwh),
        _value("cost", plan.cost, plan.currency),
        format_value("tokens_total", plan.tokens),
        f"{plan.tokens_per_parameter:.3g}",
        UNKNOWN if speed is None else f"{speed.expected:,.0f}",
        UNKNOWN if finish is None else day_and_time(finish.expected, now),
    ]


def _value(row_id: str, interval: Interval | None, currency: str = "") -> str:
    return UNKNOWN if interval is None else format_value(row_id, interval.expected, currency)
