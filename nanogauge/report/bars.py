"""Bars as inline SVG, coloured by the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from nanogauge.analysis.verdicts import Row
from nanogauge.quantities import format_value
from nanogauge.report.escape import escaped
from nanogauge.report.scale import round_axis

WIDTH = 420
MOST_PARTS = 7
_COLOURS = 9
"""of the style sheet, one for each part of a ledger"""
RANGE_WIDTH, NARROW_RANGE, RANGE_HEIGHT = 250, 156, 44
_GLYPH = 6.4
"""about the width of a character of a label"""


def waterfall(begin: tuple[str, float], parts: Sequence[tuple[str, float]], end: str) -> str:
    """From one total to another through parts that add up, all in the unit that is drawn.

    The axis begins near the smaller total, so that the parts are seen; the totals are longer.
    """
    unit, scale = ("h", 3600.0) if begin[1] >= 7200 else ("s", 1.0)
    largest = sorted(parts, key=lambda part: -abs(part[1]))[:MOST_PARTS]
    least = 5e-4 * begin[1]
    shown = [
        (name, value / scale)
        for name, value in parts
        if (name, value) in largest and abs(value) >= least
    ]
    rest = sum(v for _, v in parts) / scale - sum(v for _, v in shown)
    if abs(rest) > 1e-9:
        shown.append(("rest", rest))
    levels = [begin[1] / scale]
    for _, value in shown:
        levels.append(levels[-1] + value)
    total = levels[-1]
    bars: list[tuple[str, float | None, float, str, str]] = []
    from_whom = "claim" if begin[0] == "claimed" else "pred"
    bars.append((begin[0], None, levels[0], from_whom, f"{levels[0]:.3g} {unit}"))
    for (name, value), (lower, upper) in zip(shown, pairwise(levels), strict=True):
        label = f"{value:+.2f} {unit}" if abs(value) >= 0.005 else f"{value:+.1g} {unit}"
        bars.append((name, lower, upper, "add" if value > 0 else "sub", label))
    bars.append((end, None, total, "bar", f"{total:.3g} {unit}"))

    spread = (max(levels) - min(levels)) or 0.1 * max(levels)
    left, right = 168.0, 350.0
    low = max(0.0, min(levels) - 1.2 * spread)
    high = max(levels)

    def x_of(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    spoken = ", ".join(f"{name} {value:+.2f} {unit}" for name, value in shown)
    pitch = 25
    height = pitch * len(bars) + 6
    out = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="From {levels[0]:.3g} {unit} '
        f'({escaped(begin[0])}) to {total:.3g} {unit} ({escaped(end)}): {escaped(spoken)}">'
    ]
    for row, (name, before, after, style, label) in enumerate(bars):
        y = 4 + pitch * row
        ends = sorted((left if before is None else x_of(before), x_of(after)))
        width = max(ends[1] - ends[0], 1.5)
        out.append(
            f'<rect class="{style}" x="{ends[0]:.1f}" y="{y}" width="{width:.1f}" height="16" '
            'rx="2"/>'
        )
        if before is None and low > 0:  # the axis is cut, and so are the bars that reach its end
            out.append(f'<path class="cut" d="M{left + 8},{y - 2}l-4,20m5,-20l-4,20"/>')
        if row + 1 < len(bars):
            x = x_of(after)
            out.append(
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{y + 16}" y2="{y + pitch}"/>'
            )
        out.append(
            f'<text class="tick" x="{left - 8}" y="{y + 12}" text-anchor="end">'
            f"{escaped(name)}</text>"
        )
        out.append(f'<text class="lab" x="{ends[1] + 6:.1f}" y="{y + 12}">{label}</text>')
    return "".join([*out, "</svg>"])


def range_plot(row: Row, width: int = RANGE_WIDTH) -> str:
    """Claimed and predicted ranges and the measured figure of a row, on one axis from zero."""
    claimed = (row.claimed.low, row.claimed.high) if row.claimed is not None else (None, None)
    analytic, calibrated = row.analytic, row.calibrated
    measured = row.measured.value if row.measured is not None else None
    numbers = [*claimed, measured]
    numbers += [end for e in (analytic, calibrated) if e is not None for end in (e.low, e.high)]
    known = [v for v in numbers if v is not None]
    if not known or max(known) <= 0:
        return ""
    top = round_axis(0.0, max(known), 5).high
    currency = row.unit if row.id == "cost" else ""

    def said(value: float) -> str:
        return format_value(row.id, value, currency)

    label = [f"{row.quantity}, on an axis from 0 to {said(top)}"]
    if row.claimed is not None:
        label.append(f"claimed {row.claimed.text}")
    for name, estimate in (("predicted", analytic), ("calibrated", calibrated)):
        if estimate is not None:
            label.append(f"{name} {said(estimate.low)} to {said(estimate.high)}")
    label.append("not measured" if measured is None else f"measured {said(measured)}")
    left, right = 5.0, width - 5.0

    def x_of(value: float) -> float:
        return left + max(value, 0.0) / top * (right - left)

    out = [
        f'<svg class="range" viewBox="0 0 {width} {RANGE_HEIGHT}" role="img" '
        f'aria-label="{escaped("; ".join(label))}">'
        f'<path class="axis" d="M{left},27V30H{right}V27"/>'
        f'<text class="tick" x="{left - 4}" y="41">0</text>'
        f'<text class="tick" x="{right + 4}" y="41" text-anchor="end">{escaped(said(top))}</text>'
    ]

    def bar(low: float, high: float, y: int, height: int, css: str) -> None:
        long = max(x_of(high) - x_of(low), 3.0)
        x = min(x_of(low), right - long)
        out.append(
            f'<rect class="{css}" x="{x:.1f}" y="{y}" width="{long:.1f}" height="{height}" rx="2"/>'
        )

    if row.claimed is not None:
        low, high = claimed
        bar(low if low is not None else 0.0, high if high is not None else top, 3, 9, "claim")
    if analytic is not None:
        bar(analytic.low, analytic.high, 16, 9, "pred")
    if calibrated is not None:
        bar(calibrated.low, calibrated.high, 18, 5, "cal")
    best = calibrated or analytic
    if best is not None and best.low < best.high:
        x = x_of(best.expected)
        out.append(f'<path class="mid" d="M{x:.1f},15V26"/>')
    if measured is not None:
        x = x_of(measured)
        out.append(f'<path class="meas" d="M{x:.1f},0V30"/>')
        out.append(f'<circle class="meas" cx="{x:.1f}" cy="14" r="3.6"/>')
    return "".join([*out, "</svg>"])


def stacked_bar(parts: Sequence[tuple[str, float]]) -> str:
    """One bar split into its parts, named where there is room; empty without parts."""
    total = sum(value for _, value in parts)
    if total <= 0:
        return ""
    spoken = ", ".join(f"{name} {100 * value / total:.3g} %" for name, value in parts)
    return (
        f'<svg viewBox="0 0 {WIDTH} 34" role="img" aria-label="{escaped(spoken)}">'
        f"{_stacked(parts, 0.0, WIDTH / total, 2, 30)}</svg>"
    )


def _stacked(
    parts: Sequence[tuple[str, float]], x: float, scale: float, y: float, height: float
) -> str:
    out = []
    for index, (name, value) in enumerate(parts):
        width = max(value * scale, 0.6)
        out.append(
            f'<rect class="s{index % _COLOURS}" x="{x:.2f}" y="{y}" width="{width:.2f}" '
            f'height="{height}"/>'
        )
        if width > _GLYPH * len(name) + 10:
            out.append(
                f'<text class="on" x="{x + 6:.1f}" y="{y + height / 2 + 4:.1f}">'
                f"{escaped(name)}</text>"
            )
        x += width
    return "".join(out)


@dataclass(frozen=True)
class Bar:
    """A row of bars on a common axis: one in parts, or one alone."""

    name: str
    text: str
    parts: Sequence[tuple[str, float]]
    range: tuple[float, float] | None = None
    """an interval, drawn below the parts"""


def bars(title: str, rows: Sequence[Bar], limit: tuple[str, float] | None) -> str:
    """Rows of bars from zero, and a limit that they are to stay below."""
    totals = [sum(value for _, value in row.parts) for row in rows]
    ends = [row.range[1] for row in rows if row.range is not None]
    high = max([*totals, *ends, *([limit[1]] if limit is not None else [])])
    scale = (WIDTH - 12) / high
    pitch, bottom = 46, 46 * len(rows) + 4
    told = [f"{row.name} {row.text}" for row in rows]
    told += [f"{limit[0]}"] if limit is not None else []
    out = [
        f'<svg viewBox="0 0 {WIDTH} {bottom + 20}" role="img" '
        f'aria-label="{escaped(title + ": " + "; ".join(told))}">'
    ]
    for number, row in enumerate(rows):
        y = pitch * number
        out.append(f'<text class="tick" x="0" y="{y + 13}">{escaped(row.name)}</text>')
        end = totals[number] * scale
        inside = end + _GLYPH * len(row.text) + 14 > (limit[1] * scale if limit else WIDTH)
        style, x, anchor = ("in", end - 6, "end") if inside else ("lab", end + 6, "start")
        value = (
            f'<text class="{style}" x="{x:.1f}" y="{y + 32}" text-anchor="{anchor}">'
            f"{escaped(row.text)}</text>"
        )
        if len(row.parts) > 1:
            out.append(_stacked(row.parts, 0, scale, y + 19, 18))
        else:
            width = max(totals[number] * scale, 1)
            out.append(f'<rect class="bar" x="0" y="{y + 19}" width="{width:.1f}" height="18"/>')
        out.append(value)
        if row.range is not None:
            x, end = row.range[0] * scale, row.range[1] * scale
            out.append(f'<path class="whisker" d="M{x:.1f},{y + 38}v5m0,-2.5H{end:.1f}m0,-2.5v5"/>')
    if limit is not None:
        x = limit[1] * scale
        out.append(f'<path class="limit" d="M{x:.1f},17V{bottom}"/>')
        out.append(
            f'<text class="tick" x="{x + 4:.1f}" y="{bottom + 14}" text-anchor="end">'
            f"{escaped(limit[0])}</text>"
        )
    return "".join([*out, "</svg>"])
