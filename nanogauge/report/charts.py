"""Charts as inline SVG, coloured by the page's style sheet, so that they follow light and dark.

A long series is drawn by the smallest and largest value of each stretch of it: no spike is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from nanogauge.report.compare import Row

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 560, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 26
MOST_POINTS = 1000
MOST_PARTS = 5


def thin(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points, with the lowest and the highest of every stretch kept."""
    if len(points) <= most:
        return list(points)
    stretches = most // 2
    bounds = [round(i * len(points) / stretches) for i in range(stretches + 1)]
    kept: list[tuple[float, float]] = []
    for begin, end in pairwise(bounds):
        indices = range(begin, end)
        lowest = min(indices, key=lambda i: points[i][1])
        highest = max(indices, key=lambda i: points[i][1])
        kept += [points[i] for i in sorted({lowest, highest})]
    return kept


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between low and high, about `count` of them."""
    raw = (high - low) / count
    magnitude: float = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:.6g}"


@dataclass(frozen=True)
class Series:
    points: Points
    style: str
    """line or dots"""


@dataclass(frozen=True)
class Band:
    low: float
    high: float
    style: str


def line_chart(series: Sequence[Series], title: str, bands: Sequence[Band] = ()) -> str:
    """A chart of values over steps; empty where there are no points."""
    everything = [p for s in series for p in s.points]
    if not everything:
        return ""
    xs, ys = [p[0] for p in everything], [p[1] for p in everything]
    y_low = min([*ys, *(b.low for b in bands)])
    y_high = max([*ys, *(b.high for b in bands)])
    pad = 0.06 * (y_high - y_low) or 0.1 * abs(y_high) or 1.0
    y_low, y_high = (0.0 if 0 <= y_low <= pad else y_low - pad), y_high + pad
    x_low, x_high = min(xs), max(xs)
    x_high = x_high if x_high > x_low else x_low + 1

    def x_of(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for band in bands:
        top, bottom = y_of(band.high), y_of(band.low)
        out.append(
            f'<rect class="{band.style}" x="{LEFT}" y="{top:.1f}" width="{WIDTH - LEFT - RIGHT}" '
            f'height="{max(bottom - top, 1):.1f}"/>'
        )
    for value in ticks(y_low, y_high):
        y = y_of(value)
        out.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        out.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
            f"{_number(value)}</text>"
        )
    for value in ticks(x_low, x_high, 5):
        anchor = "end" if x_of(value) > WIDTH - 20 else "middle"
        out.append(
            f'<text class="tick" x="{x_of(value):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">'
            f"{_number(value)}</text>"
        )
    for one in series:
        points = [(x_of(x), y_of(y)) for x, y in thin(one.points)]
        if one.style == "dots":
            out += [f'<circle class="dots" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points]
        elif points:
            path = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
            out.append(f'<path class="{one.style}" d="{path}"/>')
    return "".join([*out, "</svg>"])


def waterfall(begin: tuple[str, float], parts: Sequence[tuple[str, float]], end: str) -> str:
    """From one total to another through parts that add up, all in the unit that is drawn."""
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
    top = max(levels) * 1.15
    columns = len(shown) + 2
    pitch = (WIDTH - 20) / columns
    width = min(70.0, pitch - 12)

    def y_of(value: float) -> float:
        return 170 - value / top * 140

    spoken = ", ".join(f"{name} {value:+.2f} {unit}" for name, value in shown)
    total = levels[-1]
    out = [
        f'<svg viewBox="0 0 {WIDTH} 206" role="img" aria-label="From {levels[0]:.3g} {unit} '
        f'({escape(begin[0])}) to {total:.3g} {unit} ({escape(end)}): {escape(spoken)}">'
    ]
    bars = [(begin[0], 0.0, levels[0], "tot", f"{levels[0]:.3g} {unit}")]
    for (name, value), (before, after) in zip(shown, pairwise(levels), strict=True):
        label = f"{value:+.2f} {unit}" if abs(value) >= 0.005 else f"{value:+.1g} {unit}"
        bars.append((name, before, after, "add" if value > 0 else "sub", label))
    bars.append((end, 0.0, total, "tot", f"{total:.3g} {unit}"))
    for column, (name, low, high, style, label) in enumerate(bars):
        x = 10 + column * pitch + (pitch - width) / 2
        upper, lower = y_of(max(low, high)), y_of(min(low, high))
        out.append(
            f'<rect class="{style}" x="{x:.1f}" y="{upper:.1f}" width="{width:.1f}" '
            f'height="{max(lower - upper, 1.5):.1f}" rx="2"/>'
        )
        middle = x + width / 2
        lines = [(label, upper - 5, "lab")]
        lines += [(word, 186 + 12 * row, "tick") for row, word in enumerate(_two_lines(name))]
        for text, y, css in lines:
            out.append(
                f'<text class="{css}" x="{middle:.1f}" y="{y:.1f}" text-anchor="middle">'
                f"{escape(text)}</text>"
            )
    return "".join([*out, "</svg>"])


def _two_lines(name: str) -> list[str]:
    """A name on at most two lines, broken at its first space."""
    return name.split(" ", 1)


def range_plot(row: Row) -> str:
    """Claimed and predicted ranges and the measured figure of a row, on one axis from zero."""
    claimed = (row.claimed.low, row.claimed.high) if row.claimed is not None else (None, None)
    analytic = row.analytic
    measured = row.measured.value if row.measured is not None else None
    numbers = [*claimed, measured]
    numbers += [analytic.low, analytic.high] if analytic is not None else []
    known = [v for v in numbers if v is not None]
    if not known or max(known) <= 0:
        return ""
    top = max(known) * 1.08
    nothing = "nothing"
    label = (
        f"claimed {'nothing' if row.claimed is None else claimed}, predicted "
        f"{nothing if analytic is None else (analytic.low, analytic.high)}, measured "
        f"{nothing if measured is None else measured}"
    )

    def x_of(value: float) -> float:
        return 6 + value / top * 238

    out = [
        f'<svg class="range" viewBox="0 0 250 34" role="img" aria-label="{escape(label)}">'
        '<line class="axis" x1="6" x2="244" y1="17" y2="17"/>'
    ]

    def bar(low: float, high: float, y: int, css: str) -> None:
        x, width = x_of(low), max(x_of(high) - x_of(low), 3.0)
        out.append(
            f'<rect class="{css}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="9" rx="2"/>'
        )

    if row.claimed is not None:
        low, high = claimed
        bar(low if low is not None else 0.0, high if high is not None else top, 5, "claim")
    if analytic is not None:
        bar(analytic.low, analytic.high, 20, "pred")
        x = x_of(analytic.expected)
        out.append(f'<line class="predmid" x1="{x:.1f}" x2="{x:.1f}" y1="19" y2="30"/>')
    if measured is not None:
        x = x_of(measured)
        out.append(f'<line class="meas" x1="{x:.1f}" x2="{x:.1f}" y1="1" y2="33"/>')
        out.append(f'<circle class="meas" cx="{x:.1f}" cy="17" r="4"/>')
    return "".join([*out, "</svg>"])


def stacked_bar(parts: Sequence[tuple[str, float]]) -> str:
    """One bar of the wall time, split into its parts in seconds."""
    total = sum(value for _, value in parts)
    if total <= 0:
        return ""
    spoken = ", ".join(f"{name} {100 * value / total:.3g} %" for name, value in parts)
    out = [f'<svg viewBox="0 0 560 26" role="img" aria-label="{escape(spoken)}">']
    x = 0.0
    for index, (name, value) in enumerate(parts):
        width = value / total * 560
        out.append(
            f'<rect class="s{index}" x="{x:.2f}" y="2" width="{max(width, 0.6):.2f}" height="22">'
            f"<title>{escape(name)}</title></rect>"
        )
        x += width
    return "".join([*out, "</svg>"])
