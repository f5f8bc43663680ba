"""Charts of a value over the run, as inline SVG coloured by the page's style sheet.

Each chart says in words what it shows: its text alternative holds the first, least, median, most
and last value of every line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanogauge.report.escape import escaped
from nanogauge.report.scale import (
    LARGEST,
    MOST_STRETCHES,
    SMALLEST,
    Axis,
    Floats,
    exact_axis,
    round_axis,
    round_step,
    stretches,
)

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
