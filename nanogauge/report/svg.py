"""Inline SVG: line charts over a run, waterfalls, range plots and bars, coloured by style.css.j2.

Every picture has a text alternative with its figures.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from nanogauge.analysis.verdicts import Row
from nanogauge.quantities import format_value
from nanogauge.report.escape import escaped

Floats = npt.NDArray[np.float64]
MAX_BUCKETS = 360
"""Points of a drawn line: about one for each unit of a chart's width."""
SMALLEST, LARGEST = 1e-12, 1e15
"""Magnitudes below SMALLEST count as zero on an axis; every axis ends at LARGEST."""
_ROUND_STEPS = (1, 2, 2.5, 5, 10)

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 22, 36
LANE_HEIGHT = 9
HOVER_COLUMNS = 50
CLIPPED_SHARE = 0.005
"""Share of a long series that may lie beyond either end of a clipped axis."""
MAX_WATERFALL_PARTS = 7
PART_COLOURS = 10
"""Colours that the style sheet has for the parts of a bar."""
RANGE_WIDTH, NARROW_RANGE_WIDTH, RANGE_HEIGHT = 250, 156, 44
_CHARACTER_WIDTH = 6.4


def _svg(width: float, height: float, alternative: str, elements: Iterable[str], style: str = "") -> str:
    css = f'class="{style}" ' if style else ""
    return (
        f'<svg {css}viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escaped(alternative)}">{"".join(elements)}</svg>'
    )


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}"{where}>{escaped(text)}</text>'


def _rect(style: str, x: float, y: float, width: float, height: float, *, rounded: bool = True) -> str:
    radius = ' rx="2"' if rounded else ""
    return f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"{radius}/>'


def _path(style: str, commands: str) -> str:
    return f'<path class="{style}" d="{commands}"/>'


def downsample(x: Floats, y: Floats, most: int = MAX_BUCKETS) -> tuple[Floats, ...]:
    """Split a series into at most `most` buckets, whose extremes keep every spike.

    Return the mean x, and the minimum, median and maximum y of each.
    """
    xs, ys = (np.array_split(values, min(len(y), most)) for values in (x, y))
    of_y = [np.array([f(bucket) for bucket in ys]) for f in (np.min, np.median, np.max)]
    return np.array([bucket.mean() for bucket in xs]), *of_y


@dataclass(frozen=True)
class Axis:
    """Range of an axis with its ticks."""

    low: float
    high: float
    ticks: list[float]
    step: float
    """Distance between two round ticks."""

    def text(self, value: float) -> str:
        """Return the label of a tick, with the decimals that distinguish it from the next one."""
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


def _round_step(span: float, count: int) -> float:
    """Return a round distance that divides a span into about `count` parts."""
    raw = span / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    return next(m * magnitude for m in _ROUND_STEPS if m * magnitude >= raw * (1 - 1e-9))


def round_axis(low: float, high: float, count: int = 4) -> Axis:
    """Return an axis that contains both values and has a round tick at either end.

    A constant series gets a margin of a fifth of its value.
    """
    largest = max(abs(low), abs(high))
    if high - low <= max(1e-3 * largest, SMALLEST):
        margin = 0.2 * largest if largest > SMALLEST else 1.0
        low, high = low - margin, high + margin
    step = _round_step(high - low, count)
    first = math.floor(low / step + 1e-9)
    ticks = [i * step for i in range(first, math.ceil(high / step - 1e-9) + 1)]
    return Axis(ticks[0], ticks[-1], ticks, step)


def exact_axis(low: float, high: float, count: int = 5) -> Axis:
    """Return an axis that ends at both values, each labelled, with round ticks between them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = _round_step(high - low, count)
    multiples = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    margin = 0.13 * (high - low)  # room for the labels of the ends
    between = [i * step for i in multiples if low + margin <= i * step <= high - margin]
    return Axis(low, high, [low, *between, high], step)


@dataclass(frozen=True)
class Series:
    """Values over the x axis; neither array contains NaN."""

    name: str
    x: Floats
    y: Floats
    style: str = "line"
    """line, limit (a dashed line) or dots"""

    def in_words(self, unit: str) -> str:
        """Return the statistics of the series as text."""
        values = {
            "first": self.y[0],
            "min": self.y.min(),
            "median": np.median(self.y),
            "max": self.y.max(),
            "last": self.y[-1],
        }
        figures = ", ".join(f"{name} {format_number(float(v))}" for name, v in values.items())
        return f"{self.name}: {figures} {unit}".rstrip()


@dataclass(frozen=True)
class Band:
    """Claimed or predicted range of the charted value."""

    name: str
    low: float
    high: float
    style: str


@dataclass(frozen=True)
class Marks:
    """Moments of the run, drawn in a lane below the chart."""

    name: str
    x: Floats
    style: str


@dataclass(frozen=True)
class Chart:
    """A picture with its title, legend and figures."""

    id: str
    title: str
    svg: str
    legend: list[tuple[str, str]]
    """Style and name of each line, band and mark."""
    figures: list[str]
    """Statistics of each line as text."""
    notes: list[str]


def format_number(value: float) -> str:
    """Format a number with four significant digits and no exponent."""
    if value == 0:
        return "0"
    if not SMALLEST < abs(value) < LARGEST:
        return f"{value:.3e}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def line_chart(
    heading: tuple[str, str, str],
    x_axis: tuple[str, float],
    series: Sequence[Series],
    *,
    bands: Sequence[Band] = (),
    marks: Sequence[Marks] = (),
    clipped: bool = False,
    from_zero: bool = False,
    notes: Sequence[str] = (),
) -> Chart | None:
    """Draw series over the run; return None if all are empty.

    Args:
        heading: id of the chart, its title, and the unit of the y axis.
        x_axis: its title, and the end of the run on it.
        clipped: leave rare outliers out of the y axis, and mark them at its end.
    """
    series = [one for one in series if len(one.x)]
    if not series:
        return None
    marks = [mark for mark in marks if len(mark.x)]
    (chart_id, title, unit), (x_title, x_end) = heading, x_axis
    x_low = min(float(one.x.min()) for one in series)
    x = exact_axis(0.0 if 0 <= x_low < 0.5 * x_end else x_low, x_end)
    y_low, y_high = _y_range(series, bands, clipped)
    y = round_axis(0.0 if from_zero else y_low, y_high)
    plot = _Plot(x, y, len(marks))
    out = [plot.band(band) for band in bands]
    out += plot.axes(unit, x_title)
    outliers = 0
    for one in series:
        elements, beyond = plot.series(one)
        out += elements
        outliers += beyond
    out += [plot.lane(number, mark) for number, mark in enumerate(marks)]
    out += plot.values_on_hover(series, unit, x_title)
    figures = [one.in_words(unit) for one in series]
    notes = list(notes)
    if outliers:
        notes.append(f"{outliers:,} beyond the axis, marked at its end")
    words = [f"{title}, over {x_title} {x.text(x.low)} to {x.text(x.high)}."]
    words += [f"{figure}." for figure in figures]
    words += [f"{b.name}: {format_number(b.low)} to {format_number(b.high)} {unit}." for b in bands]
    words += [f"{mark.name}: {len(mark.x):,}." for mark in marks]
    words += [f"{note}." for note in notes]
    is_alone = len(series) + len(bands) + len(marks) == 1
    legend = [] if is_alone else [(one.style, one.name) for one in series]
    legend += [(band.style, band.name) for band in bands]
    legend += [(mark.style, f"{mark.name} ({len(mark.x):,})") for mark in marks]
    return Chart(chart_id, title, _svg(WIDTH, plot.height, " ".join(words), out), legend, figures, notes)


def _y_range(series: Sequence[Series], bands: Sequence[Band], clipped: bool) -> tuple[float, float]:
    """Return the range of all values and of the bands near them; without outliers if clipped."""
    low = min(float(one.y.min()) for one in series)
    high = max(float(one.y.max()) for one in series)
    if clipped:
        quantiles = [np.quantile(one.y, (CLIPPED_SHARE, 1 - CLIPPED_SHARE)) for one in series]
        low_quantile = float(min(q[0] for q in quantiles))
        high_quantile = float(max(q[1] for q in quantiles))
        low = low_quantile if low < 0.6 * low_quantile else low
        high = high_quantile if high > 1.5 * high_quantile else high
    near = [b for b in bands if b.high > low / 4 and b.low < 4 * high]
    low, high = min([low, *(b.low for b in near)]), max([high, *(b.high for b in near)])
    return min(max(low, -LARGEST), LARGEST), max(min(high, LARGEST), -LARGEST)


class _Plot:
    """Coordinates and SVG elements of a line chart."""

    def __init__(self, x: Axis, y: Axis, lanes: int) -> None:
        self.x, self.y = x, y
        self.left, self.right, self.above, self.below = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
        self.height = HEIGHT + LANE_HEIGHT * lanes + 4 * (lanes > 0)

    def x_of(self, values: Floats) -> Floats:
        share = (values - self.x.low) / (self.x.high - self.x.low)
        return self.left + share * (self.right - self.left)

    def y_of(self, values: Floats) -> Floats:
        share = (values - self.y.low) / (self.y.high - self.y.low)
        return self.below - np.clip(share, 0, 1) * (self.below - self.above)

    def band(self, band: Band) -> str:
        upper, lower = self.y_of(np.array([band.high, band.low]))
        height, width = max(lower - upper, 1.5), self.right - self.left
        return _rect(band.style, self.left, upper, width, height, rounded=False)

    def axes(self, unit: str, x_title: str) -> list[str]:
        out = [_text(self.left - 40, self.above - 9, unit, "unit")]
        for value, y in zip(self.y.ticks, self.y_of(np.array(self.y.ticks)), strict=True):
            out.append(_path("grid", f"M{self.left},{y:.1f}H{self.right}"))
            out.append(_text(self.left - 6, y + 4, self.y.text(value), "tick", "end"))
        label_y = self.height - BOTTOM + 15
        for value, x in zip(self.x.ticks, self.x_of(np.array(self.x.ticks)), strict=True):
            out.append(_path("axis", f"M{x:.1f},{self.below}v4"))
            place, anchor = (x, "middle") if value < self.x.high else (self.right + 4, "end")
            out.append(_text(place, label_y, self.x.text(value), "tick", anchor))
        middle = (self.left + self.right) / 2
        return [*out, _text(middle, self.height - 5, x_title, "unit", "middle")]

    def series(self, one: Series) -> tuple[list[str], int]:
        """Return the elements of a line or of dots, and the number of values beyond the y axis."""
        as_dots = one.style == "dots" and len(one.x) <= MAX_BUCKETS
        if as_dots or len(one.x) == 1:
            points = zip(self.x_of(one.x), self.y_of(one.y), strict=True)
            out = [f'<circle class="dots" cx="{x:.1f}" cy="{y:.1f}" r="1.9"/>' for x, y in points]
        else:
            out = self._line(one)
        slack = 1e-9 * (self.y.high - self.y.low)
        outliers = 0
        for beyond, y, tip in (
            (one.y > self.y.high + slack, self.above, -5),
            (one.y < self.y.low - slack, self.below, 5),
        ):
            outliers += int(beyond.sum())
            for x in _thinned(self.x_of(one.x[beyond]), 5):
                out.append(_path("beyond", f"M{x - 2.5:.1f},{y}h5l-2.5,{tip}z"))
        return out, outliers

    def _line(self, one: Series) -> list[str]:
        """Return a line; for a long series its medians, with the area between its extremes."""
        x, low, median, high = downsample(one.x, one.y)
        xs = self.x_of(x)
        line = _path(one.style, f"M{_points(xs, self.y_of(median))}")
        if len(x) == len(one.x):
            return [line]
        upper = _points(xs, self.y_of(high))
        lower = _points(xs[::-1], self.y_of(low)[::-1])
        return [_path("area", f"M{upper} {lower}z"), line]

    def values_on_hover(self, series: Sequence[Series], unit: str, x_title: str) -> list[str]:
        """Return invisible columns whose titles, shown on hover, have the values there."""
        columns = min(HOVER_COLUMNS, max(len(one.x) for one in series))
        width, out = (self.right - self.left) / columns, []
        for column in range(columns):
            x = self.x.low + (column + 0.5) / columns * (self.x.high - self.x.low)
            nearest = [int(np.abs(one.x - x).argmin()) for one in series]
            shown = (
                f"{one.name} {format_number(float(one.y[i]))} {unit}" for one, i in zip(series, nearest, strict=True)
            )
            at = format_number(float(series[0].x[nearest[0]]))
            title = f"<title>{escaped(f'{x_title} {at}: ' + ', '.join(shown))}</title>"
            left = self.left + column * width
            rect = _rect("hover", left, self.above, width, self.below - self.above, rounded=False)
            out.append(rect.replace("/>", f">{title}</rect>"))
        return out

    def lane(self, number: int, mark: Marks) -> str:
        y = self.below + 4 + LANE_HEIGHT * number
        strokes = (f"M{x:.1f},{y}v{LANE_HEIGHT - 3}" for x in _thinned(self.x_of(mark.x), 2))
        return _path(mark.style, "".join(strokes))


def _points(xs: Floats, ys: Floats) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))


def _thinned(positions: Floats, distance: float) -> list[float]:
    """Return one position per interval of length `distance`."""
    if not len(positions):
        return []
    _, first = np.unique(np.round(positions / distance), return_index=True)
    return [float(position) for position in positions[first]]


def waterfall(begin: tuple[str, float], parts: Sequence[tuple[str, float]], end: str) -> str:
    """Draw how parts in seconds lead from one total to another.

    The axis begins near the smaller total, so that small parts are visible. All but the largest parts are merged.
    """
    unit, scale = ("h", 3600.0) if begin[1] >= 7200 else ("s", 1.0)
    largest = sorted(parts, key=lambda part: -abs(part[1]))[:MAX_WATERFALL_PARTS]
    shown = [
        (name, seconds / scale)
        for name, seconds in parts
        if (name, seconds) in largest and abs(seconds) >= 5e-4 * begin[1]
    ]
    rest = sum(seconds for _, seconds in parts) / scale - sum(value for _, value in shown)
    if abs(rest) > 1e-9:
        shown.append(("rest", rest))
    levels = [begin[1] / scale]
    for _, value in shown:
        levels.append(levels[-1] + value)
    left, right = 168.0, 350.0
    spread = (max(levels) - min(levels)) or 0.1 * max(levels)
    low = max(0.0, min(levels) - 1.2 * spread)

    def x_of(value: float) -> float:
        return left + (value - low) / (max(levels) - low) * (right - left)

    begin_style = "claim" if begin[0] == "claimed" else "pred"
    rows = [(begin[0], left, x_of(levels[0]), begin_style, f"{levels[0]:.3g} {unit}")]
    for (name, value), (before, after) in zip(shown, pairwise(levels), strict=True):
        label = f"{value:+.2f} {unit}" if abs(value) >= 0.005 else f"{value:+.1g} {unit}"
        rows.append((name, x_of(before), x_of(after), "add" if value > 0 else "sub", label))
    rows.append((end, left, x_of(levels[-1]), "bar", f"{levels[-1]:.3g} {unit}"))
    pitch = 25
    out = []
    for index, (name, start, stop, style, label) in enumerate(rows):
        y = 4 + pitch * index
        out.append(_rect(style, min(start, stop), y, max(abs(stop - start), 1.5), 16))
        if start == left and low > 0:  # the axis is cut, and with it the bar of a total
            out.append(_path("cut", f"M{left + 8},{y - 2}l-4,20m5,-20l-4,20"))
        if index + 1 < len(rows):
            out.append(_path("grid", f"M{stop:.1f},{y + 16}v{pitch - 16}"))
        out.append(_text(left - 8, y + 12, name, "tick", "end"))
        out.append(_text(max(start, stop) + 6, y + 12, label, "lab"))
    words = ", ".join(f"{name} {value:+.2f} {unit}" for name, value in shown)
    alternative = f"From {levels[0]:.3g} {unit} ({begin[0]}) to {levels[-1]:.3g} {unit} ({end}): {words}"
    return _svg(WIDTH, pitch * len(rows) + 6, alternative, out)


def range_plot(row: Row, width: int = RANGE_WIDTH) -> str:
    """Draw a row's claimed and predicted ranges and its measured value on one axis from zero."""
    claimed, estimates = row.claimed, (row.analytic, row.calibrated)
    measured = row.measured.value if row.measured is not None else None
    values = [measured] + ([claimed.low, claimed.high] if claimed is not None else [])
    values += [end for e in estimates if e is not None for end in (e.low, e.high)]
    known = [value for value in values if value is not None]
    if not known or max(known) <= 0:
        return ""
    top = round_axis(0.0, max(known), 5).high
    currency = row.unit if row.id == "cost" else ""

    def formatted(value: float) -> str:
        return format_value(row.id, value, currency)

    left, right = 5.0, width - 5.0

    def x_of(value: float) -> float:
        return left + max(value, 0.0) / top * (right - left)

    out = [
        _path("axis", f"M{left},27V30H{right}V27"),
        _text(left - 4, 41, "0", "tick"),
        _text(right + 4, 41, formatted(top), "tick", "end"),
    ]

    def bar(low: float, high: float, y: int, height: int, style: str) -> None:
        length = max(x_of(high) - x_of(low), 3.0)
        out.append(_rect(style, min(x_of(low), right - length), y, length, height))

    words = [f"{row.quantity}, on an axis from 0 to {formatted(top)}"]
    if claimed is not None:
        words.append(f"claimed {claimed.text}")
        bar(claimed.low or 0.0, top if claimed.high is None else claimed.high, 3, 9, "claim")
    for estimate, name, y, height, style in (
        (row.analytic, "predicted", 16, 9, "pred"),
        (row.calibrated, "calibrated", 18, 5, "cal"),
    ):
        if estimate is not None:
            words.append(f"{name} {formatted(estimate.low)} to {formatted(estimate.high)}")
            bar(estimate.low, estimate.high, y, height, style)
    best = row.calibrated or row.analytic
    if best is not None and best.low < best.high:
        out.append(_path("mid", f"M{x_of(best.expected):.1f},15V26"))
    if measured is not None:
        x = x_of(measured)
        out.append(_path("meas", f"M{x:.1f},0V30"))
        out.append(f'<circle class="meas" cx="{x:.1f}" cy="14" r="3.6"/>')
    words.append("not measured" if measured is None else f"measured {formatted(measured)}")
    return _svg(width, RANGE_HEIGHT, "; ".join(words), out, "range")


def stacked_bar(parts: Sequence[tuple[str, float]]) -> str:
    """Draw one bar split into its parts, each named if there is room; empty without parts."""
    total = sum(value for _, value in parts)
    if total <= 0:
        return ""
    out, x = [], 0.0
    for index, (name, value) in enumerate(parts):
        width = max(value * WIDTH / total, 0.6)
        out.append(_rect(f"s{index % PART_COLOURS}", x, 2, width, 30, rounded=False))
        if width > _CHARACTER_WIDTH * len(name) + 10:
            out.append(_text(x + 6, 21, name, "on"))
        x += width
    words = ", ".join(f"{name} {100 * value / total:.3g} %" for name, value in parts)
    return _svg(WIDTH, 34, words, out)
