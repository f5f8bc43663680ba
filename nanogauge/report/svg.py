"""Charts of a value over the run, as inline SVG coloured by the page's style sheet.

Each chart says in words what it shows: its text alternative holds the first, least, median, most
and last value of every line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from nanogauge.analysis.verdicts import Row
from nanogauge.quantities import format_value
from nanogauge.report.escape import escaped

Floats = npt.NDArray[np.float64]
MOST_STRETCHES = 360
"""about one for each unit of a chart's width"""
SMALLEST, LARGEST = 1e-12, 1e15
"""what an axis takes for nothing, and where every axis ends"""
_ROUND = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Stretches:
    """A long series in equal stretches, each by its place and its lowest, middle and highest."""

    x: Floats
    low: Floats
    middle: Floats
    high: Floats


def stretches(x: Floats, y: Floats, most: int = MOST_STRETCHES) -> Stretches:
    """At most so many stretches of a series, in each of which no value is passed over."""
    size = max(1, math.ceil(len(y) / most))
    whole = len(y) // size * size
    pieces = [y[:whole].reshape(-1, size)]
    places = [x[:whole].reshape(-1, size)]
    if whole < len(y):
        pieces.append(y[None, whole:])
        places.append(x[None, whole:])
    return Stretches(
        np.concatenate([piece.mean(axis=1) for piece in places]),
        np.concatenate([piece.min(axis=1) for piece in pieces]),
        np.concatenate([np.median(piece, axis=1) for piece in pieces]),
        np.concatenate([piece.max(axis=1) for piece in pieces]),
    )


@dataclass(frozen=True)
class Axis:
    """Round numbers from one end to the other."""

    low: float
    high: float
    ticks: list[float]
    step: float

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one."""
        return (value - self.low) / (self.high - self.low)

    def text(self, value: float) -> str:
        """A tick's number, with as many decimals as tell it from the next tick."""
        scale, suffix = 1.0, ""
        largest = max(abs(self.low), abs(self.high))
        for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if largest >= 10 * factor or (largest >= factor and self.step >= factor):
                scale, suffix = factor, letter
                break
        step = self.step / scale
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        steps = value / self.step
        if round(step * 10**decimals, 6) % 1 or abs(steps - round(steps)) > 1e-6:
            decimals += 1  # steps of 2.5, and an end that is no round number
        number = f"{value / scale:.{decimals}f}"
        return "0" if float(number) == 0 else f"{number}{suffix}"


def round_step(span: float, count: int) -> float:
    """A round distance that divides a span into about so many parts."""
    raw = span / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    return next(m * magnitude for m in _ROUND if m * magnitude >= raw * (1 - 1e-9))


def round_axis(low: float, high: float, count: int = 4) -> Axis:
    """An axis that begins and ends with a tick and holds both values.

    A series that does not change is given a fifth of its value on either side, so that its ticks
    are useful.
    """
    largest = max(abs(low), abs(high))
    if high - low <= max(1e-3 * largest, SMALLEST):
        around = 0.2 * largest if largest > SMALLEST else 1.0
        low, high = low - around, high + around
    step = round_step(high - low, count)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks, step)


def exact_axis(low: float, high: float, count: int = 5, apart: float = 0.13) -> Axis:
    """An axis from one value to another, both labelled, with round ticks between them.

    Args:
        apart: the least distance of a tick from the ends, as a share of the axis.
    """
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = round_step(high - low, count)
    inner = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    margin = apart * (high - low)
    between = [i * step for i in inner if low + margin <= i * step <= high - margin]
    return Axis(low, high, [low, *between, high], step)


_WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 22, 36
LANE = 9
CLAMPED_SHARE = 0.005
"""of a long series, how much at either end may lie beyond a clamped axis"""


@dataclass(frozen=True)
class Series:
    """Values over the x axis; both arrays are free of NaN."""

    name: str
    x: Floats
    y: Floats
    style: str = "line"
    """line, limit (a dashed line), or dots"""
    told: tuple[str, ...] = ("first", "least", "median", "most", "last")
    """which figures of it are told in words"""


@dataclass(frozen=True)
class Band:
    """A range of values that was claimed or predicted."""

    name: str
    low: float
    high: float
    style: str


@dataclass(frozen=True)
class Marks:
    """Moments of the run: in a lane of their own below the chart, or as lines through it."""

    name: str
    x: Floats
    style: str
    through: bool = False


@dataclass(frozen=True)
class Second:
    """A second axis: values that go with places on the first one of its direction."""

    title: str
    at: Floats
    """places, ascending"""
    values: Floats


@dataclass(frozen=True)
class Chart:
    """A picture with what stands around it."""

    id: str
    title: str
    svg: str
    legend: list[tuple[str, str]]
    """style and name of each line, band and mark"""
    figures: list[str]
    """each line in numbers"""
    notes: list[str]
    labelled: bool = False
    """the picture itself names all figures"""


def in_figures(one: Series, unit: str) -> str:
    """A line in numbers: what a reader who does not see it needs, and others like to have."""
    figures = {
        "first": one.y[0],
        "least": one.y.min(),
        "median": np.median(one.y),
        "most": one.y.max(),
        "last": one.y[-1],
    }
    told = ", ".join(f"{name} {four_digits(float(figures[name]))}" for name in one.told)
    return f"{one.name}: {told} {unit}".rstrip()


def four_digits(value: float) -> str:
    """A number with four significant digits, or all before its point, without an exponent."""
    if value == 0:
        return "0"
    if not SMALLEST < abs(value) < LARGEST:
        return f"{value:.3e}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def line_chart(
    name: str,
    title: str,
    unit: str,
    x_title: str,
    x_end: float,
    series: Sequence[Series],
    *,
    bands: Sequence[Band] = (),
    marks: Sequence[Marks] = (),
    top: Second | None = None,
    right: Second | None = None,
    clamped: bool = False,
    from_zero: bool = False,
    notes: Sequence[str] = (),
) -> Chart | None:
    """Draw lines over the run; None where there is nothing to draw.

    Args:
        name: the id of the chart in its page.
        x_end: where the run ends on the x axis, which is the same for all its charts.
        unit: of the values, as the y axis and the text alternative have it.
        clamped: the axis may leave out rare values far from all others; they are marked at its end.
        from_zero: the y axis begins at zero.
    """
    series = [one for one in series if len(one.x)]
    if not series:
        return None
    marks = [mark for mark in marks if len(mark.x)]
    x_axis = _x_axis(series, x_end)
    y_low, y_high = _range(series, bands, clamped)
    y_axis = round_axis(0.0 if from_zero else y_low, y_high)
    lanes = [mark for mark in marks if not mark.through]
    frame = _Frame(x_axis, y_axis, top is not None, right is not None, len(lanes))
    out = [frame.band(band) for band in bands]
    out += frame.axes(unit, x_title)
    out += frame.seconds(top, right)
    beyond = 0
    for one in series:
        drawn, outside = frame.series(one)
        out += drawn
        beyond += outside
    out += [line for mark in marks if mark.through for line in frame.through(mark)]
    out += [frame.lane(number, mark) for number, mark in enumerate(lanes)]
    figures = [in_figures(one, unit) for one in series]
    told = list(notes)
    if beyond:
        told.append(f"{beyond:,} beyond the axis, marked at its end")
    spoken = [f"{title}, over {x_title} {_ends(x_axis)}.", *(f"{f}." for f in figures)]
    spoken += [f"{b.name}: {four_digits(b.low)} to {four_digits(b.high)} {unit}." for b in bands]
    spoken += [f"{mark.name}: {len(mark.x):,}." for mark in marks]
    spoken += [f"{note}." for note in told]
    alone = len(series) + len(bands) + len(marks) == 1
    legend = [] if alone else [(one.style, one.name) for one in series]
    legend += [(band.style, band.name) for band in bands]
    legend += [(mark.style, f"{mark.name} ({len(mark.x):,})") for mark in marks]
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {frame.height}" role="img" '
        f'aria-label="{escaped(" ".join(spoken))}">{"".join(out)}</svg>'
    )
    return Chart(name, title, svg, legend, figures, told)


def _x_axis(series: Sequence[Series], end: float) -> Axis:
    low = min(float(one.x.min()) for one in series)
    near_zero = 0 <= low < 0.5 * end
    return exact_axis(0.0 if near_zero else low, end)


def _ends(axis: Axis) -> str:
    return f"{axis.text(axis.low)} to {axis.text(axis.high)}"


def _range(series: Sequence[Series], bands: Sequence[Band], clamped: bool) -> tuple[float, float]:
    """What the y axis has to hold: all values, or those that are not rare and far away."""
    low = min(float(one.y.min()) for one in series)
    high = max(float(one.y.max()) for one in series)
    if clamped:
        near = [np.quantile(one.y, (CLAMPED_SHARE, 1 - CLAMPED_SHARE)) for one in series]
        near_low, near_high = float(min(n[0] for n in near)), float(max(n[1] for n in near))
        low = near_low if low < 0.6 * near_low else low
        high = near_high if high > 1.5 * near_high else high
    held = [b for b in bands if b.high > low / 4 and b.low < 4 * high]
    low, high = min([low, *(b.low for b in held)]), max([high, *(b.high for b in held)])
    return min(max(low, -LARGEST), LARGEST), max(min(high, LARGEST), -LARGEST)


class _Frame:
    """Where things lie in a picture."""

    def __init__(self, x: Axis, y: Axis, top: bool, right: bool, lanes: int) -> None:
        self.x, self.y = x, y
        self.left, self.right = LEFT, _WIDTH - (RIGHT + 32 * right)
        self.above = TOP + 22 * top
        self.below = HEIGHT - BOTTOM
        self.lanes = self.below + 4
        self.height = HEIGHT + LANE * lanes + 4 * (lanes > 0)
        self.tick_y = self.height - BOTTOM + 15

    def x_of(self, values: Floats) -> Floats:
        return self.left + (values - self.x.low) / (self.x.high - self.x.low) * (
            self.right - self.left
        )

    def y_of(self, values: Floats) -> Floats:
        share = (values - self.y.low) / (self.y.high - self.y.low)
        return self.below - np.clip(share, 0, 1) * (self.below - self.above)

    def band(self, band: Band) -> str:
        upper, lower = self.y_of(np.array([band.high, band.low]))
        height = max(lower - upper, 1.5)
        return (
            f'<rect class="{band.style}" x="{self.left}" y="{upper:.1f}" '
            f'width="{self.right - self.left}" height="{height:.1f}"/>'
        )

    def axes(self, unit: str, x_title: str) -> list[str]:
        out = [_text(self.left - 40, self.above - 9, unit, "unit")]
        for value in self.y.ticks:
            y = float(self.y_of(np.array([value]))[0])
            out.append(
                f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            out.append(_text(self.left - 6, y + 4, self.y.text(value), "tick", "end"))
        for value, place in zip(self.x.ticks, self.x_of(np.array(self.x.ticks)), strict=True):
            at_end = value == self.x.high
            out.append(
                f'<line class="axis" x1="{place:.1f}" x2="{place:.1f}" '
                f'y1="{self.below}" y2="{self.below + 4}"/>'
            )
            x = self.right + 4 if at_end else float(place)
            out.append(_text(x, self.tick_y, self.x.text(value), "tick", _anchor(at_end)))
        middle = (self.left + self.right) / 2
        return [*out, _text(middle, self.height - 5, x_title, "unit", "middle")]

    def seconds(self, top: Second | None, right: Second | None) -> list[str]:
        out: list[str] = []
        if top is not None:
            for value, place in _second_ticks(top, self.x):
                x = float(self.x_of(np.array([place]))[0])
                edge = self.above
                tick = f'x1="{x:.1f}" x2="{x:.1f}" y1="{edge - 4}" y2="{edge}"'
                out.append(f'<line class="axis" {tick}/>')
                anchor = "end" if x > self.right - 16 else "middle"
                out.append(_text(x, edge - 7, value, "tick", anchor))
            out.append(_text(self.right, self.above - 24, top.title, "unit", "end"))
        if right is not None:
            for value, place in _second_ticks(right, self.y):
                y = float(self.y_of(np.array([place]))[0])
                out.append(_text(self.right + 5, y + 4, value, "tick"))
            out.append(_text(_WIDTH, self.above - 9, right.title, "unit", "end"))
        return out

    def series(self, one: Series) -> tuple[list[str], int]:
        """A line or dots, and how many values lie beyond the axis."""
        dotted = one.style == "dots" and len(one.x) <= MOST_STRETCHES
        if dotted or len(one.x) == 1:
            points = zip(self.x_of(one.x), self.y_of(one.y), strict=True)
            out = [f'<circle class="dots" cx="{x:.1f}" cy="{y:.1f}" r="1.9"/>' for x, y in points]
        else:
            out = self._line(one)
        slack = 1e-9 * (self.y.high - self.y.low)
        outside = 0
        for beyond, y, tip in (
            (one.y > self.y.high + slack, self.above, -5),
            (one.y < self.y.low - slack, self.below, 5),
        ):
            outside += int(beyond.sum())
            for x in _apart(self.x_of(one.x[beyond]), 5):
                out.append(f'<path class="beyond" d="M{x - 2.5:.1f},{y}h5l-2.5,{tip}z"/>')
        return out, outside

    def _line(self, one: Series) -> list[str]:
        """A line; of a long series its middle, before an area from its lowest to its highest."""
        drawn = stretches(one.x, one.y)
        xs = self.x_of(drawn.x)
        line = f'<path class="{one.style}" d="M{_points(xs, self.y_of(drawn.middle))}"/>'
        if len(drawn.x) == len(one.x):
            return [line]
        there = _points(xs, self.y_of(drawn.high))
        back = _points(xs[::-1], self.y_of(drawn.low)[::-1])
        return [f'<path class="area" d="M{there} {back}z"/>', line]

    def lane(self, number: int, mark: Marks) -> str:
        y = self.lanes + LANE * number
        strokes = "".join(f"M{x:.1f},{y}v{LANE - 3}" for x in _apart(self.x_of(mark.x), 2))
        return f'<path class="{mark.style}" d="{strokes}"/>'

    def through(self, mark: Marks) -> list[str]:
        out = []
        for x in _apart(self.x_of(mark.x), 2):
            out.append(f'<path class="{mark.style}" d="M{x:.1f},{self.above}V{self.below}"/>')
            tip = f"M{x - 4:.1f},{self.above - 6}h8l-4,6z"
            out.append(f'<path class="{mark.style} tip" d="{tip}"/>')
        return out


def _points(xs: Floats, ys: Floats) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))


def _apart(places: Floats, least: float) -> list[float]:
    """One place for all that lie within so many units of each other."""
    if not len(places):
        return []
    _, first = np.unique(np.round(places / least), return_index=True)
    return [float(place) for place in places[first]]


def _second_ticks(second: Second, axis: Axis) -> list[tuple[str, float]]:
    """Round values of a second axis, each with its place on the first."""
    low, high = float(second.values[0]), float(second.values[-1])
    if high <= low:
        return []
    step = round_step(high - low, 4)
    scale = Axis(low, high, [], step)
    values = np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step
    places = np.interp(values, second.values, second.at)
    inside = (places >= axis.low) & (places <= axis.high)
    ticks = zip(values[inside], places[inside], strict=True)
    return [(scale.text(float(value)), float(place)) for value, place in ticks]


def _anchor(at_end: bool) -> str:
    return "end" if at_end else "middle"


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}"{where}>{escaped(text)}</text>'


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
