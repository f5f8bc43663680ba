"""Which charts a run has: what its log holds of loss, time, power, memory and energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from nanogauge.analysis.telemetry import JOULES_PER_KWH, max_or_none, run_peak, sensor_mismatch
from nanogauge.analysis.verdicts import Row
from nanogauge.prediction.energy import cost_of
from nanogauge.quantities import GIB, format_value, mfu
from nanogauge.report.svg import Band, Bar, Chart, Floats, Marks, Second, Series, bars, line_chart
from nanogauge.runlog.history import Recorded, Table
from nanogauge.runspec import RunSpec
from nanogauge.schema import Prediction, Sensor, Stored

_UNITS = ((3600.0, "hours", 7200.0), (60.0, "minutes", 300.0), (1.0, "seconds", 0.0))
"""seconds of each, and of a run that is counted in it at least"""


class Timeline:
    """The x axis of a run: hours where every process has a clock, else the number of the step.

    A short run counts in minutes or seconds. Each process counts from its own start, so that hours
    add up what the earlier ones took; the
    time between two of them, when nothing ran, is not in it.
    """

    def __init__(self, recorded: Recorded) -> None:
        self._firsts = [
            (number, start.first_step)
            for number, starts in enumerate(recorded.processes)
            for start in starts
        ]
        """the process of each start line, and the step that it goes on from"""
        self._of_readings = recorded.processes_of_readings()
        sessions = recorded.session_seconds
        known = [seconds for seconds in sessions if seconds is not None]
        self.has_clock = len(known) == len(sessions)
        self._before = np.cumsum([0.0, *known[:-1]]) if self.has_clock else np.zeros(len(sessions))
        self.seconds, unit = next(u for u in _UNITS if sum(known) >= u[2])[:2]
        """in a unit of the axis"""
        self.title = f"{unit} of the run" if self.has_clock else "step"
        last = [recorded.steps.last("step") or 0, *(float(e.step) for e in recorded.evals)]
        self.end = sum(known) / self.seconds if self.has_clock else max(last)
        """where the run ends, so far"""

    def of_steps(self, steps: Floats, elapsed: Floats) -> Floats:
        """Places of lines that name their step; a step belongs to the last process that made it."""
        if not self.has_clock:
            return steps
        process = np.zeros(len(steps), dtype=np.int64)
        for number, first in self._firsts:
            process[steps >= first] = number
        return self._places(process, elapsed)

    def of_readings(self, elapsed: Floats) -> Floats:
        """Places of all sensor readings of the run, by their clocks.

        Only a log with a clock has such lines.
        """
        return self._places(self._of_readings, elapsed)

    def of_moments(self, moments: Sequence[tuple[int | None, float | None]]) -> Floats:
        """Places of a few lines, each by its step and its clock; those that have neither left out.

        Where one has no clock in a log that has, or no step in one that has none, it has no place.
        """
        told = [
            (step if step is not None else self._firsts[-1][1], elapsed)
            for step, elapsed in moments
            if (elapsed if self.has_clock else step) is not None
        ]
        steps = np.array([step for step, _ in told], dtype=np.float64)
        clocks = np.array([np.nan if at is None else at for _, at in told], dtype=np.float64)
        return self.of_steps(steps, clocks)

    def _places(self, process: npt.NDArray[np.int64], elapsed: Floats) -> Floats:
        return (self._before[process] + elapsed) / self.seconds


def pictures(
    recorded: Recorded, spec: RunSpec, prediction: Prediction, rows: list[Row]
) -> list[Chart]:
    """All charts for which the log has something, in the order in which they are read."""
    timeline = Timeline(recorded)
    steps = recorded.steps
    places = timeline.of_steps(steps.column("step"), steps.column("elapsed_seconds"))
    found = [
        _loss(recorded, spec, timeline, places),
        _step_time(recorded, prediction, rows, timeline, places),
        _utilisation(recorded, spec, prediction, rows, timeline, places),
    ]
    if len(recorded.sensors) and timeline.has_clock:
        hours = timeline.of_readings(recorded.sensors.column("elapsed_seconds"))
        found += [
            _power(recorded, prediction, timeline, hours),
            _clock(recorded.sensors, prediction, timeline, hours),
            _temperature(recorded.sensors, timeline, hours),
            _energy(recorded, spec, prediction, timeline, hours),
        ]
    found.append(_memory(recorded, prediction))
    return [chart for chart in found if chart is not None]


def _known(name: str, x: Floats, y: Floats, style: str = "line") -> Series:
    """A line of the values that are known and have a place."""
    known = ~(np.isnan(x) | np.isnan(y))
    return Series(name, x[known], y[known], style)


def _reading(table: Table[Sensor], field: str, name: str, x: Floats, scale: float = 1.0) -> Series:
    return _known(name, x, table.column(field) / scale)


def _limit(one: Series) -> Series:
    """A line that others are held against: it changes rarely, and its end says enough."""
    return replace(one, style="limit", told=("last",))


def _bands(prediction: Prediction, rows: list[Row], row_id: str, scale: float) -> list[Band]:
    """What was predicted and claimed of a quantity, in the unit of its chart."""
    found = []
    for name, estimates, style in (
        ("predicted", prediction.quantities, "band"),
        ("calibrated", prediction.calibrated, "calband"),
    ):
        estimate = estimates.get(row_id)
        if estimate is not None:
            found.append(Band(name, scale * estimate.low, scale * estimate.high, style))
    claims = [row.claimed for row in rows if row.id == row_id and row.claimed is not None]
    ranges = [(c.low, c.high) for c in claims if c.low is not None and c.high is not None]
    if ranges:
        low, high = min(ranges, key=lambda ends: ends[1] - ends[0])
        name = "claimed" if len(ranges) == 1 else "claimed, the narrowest"
        found.append(Band(name, scale * low, scale * high, "cband"))
    return found


def _loss(recorded: Recorded, spec: RunSpec, timeline: Timeline, places: Floats) -> Chart | None:
    steps = recorded.steps
    evals = [e for e in recorded.evals if e.val_loss is not None]
    at = np.array([e.step for e in evals], dtype=np.float64)
    clocks = np.array([np.nan if e.elapsed_seconds is None else e.elapsed_seconds for e in evals])
    losses = np.array([np.nan if e.val_loss is None else e.val_loss for e in evals])
    tokens = (steps.column("step") + 1) * spec.tokens_per_step
    where = ~np.isnan(places)
    return line_chart(
        "loss",
        "Loss",
        "nats per token",
        timeline.title,
        timeline.end,
        [
            _known("training", places, steps.column("loss")),
            _known("validation", timeline.of_steps(at, clocks), losses, "dots"),
        ],
        top=Second("tokens", places[where], tokens[where]) if where.any() else None,
    )


def _step_time(
    recorded: Recorded,
    prediction: Prediction,
    rows: list[Row],
    timeline: Timeline,
    places: Floats,
) -> Chart | None:
    def marks(name: str, lines: list[tuple[int | None, float | None]], style: str) -> Marks:
        through = style in ("alarm", "compile")
        return Marks(name, timeline.of_moments(lines), style, through)

    again = [c for c in recorded.compiles if c.step is not None]
    alarms = [e for e in recorded.events if e.level == "alarm"]
    return line_chart(
        "step-time",
        "Time per step",
        "s",
        timeline.title,
        timeline.end,
        [_known("step", places, recorded.steps.column("step_seconds"))],
        bands=_bands(prediction, rows, "step_seconds", 1.0),
        marks=[
            marks("evaluations", [_moment(e) for e in recorded.evals], "eval"),
            marks("checkpoints", [_moment(c) for c in recorded.checkpoints], "checkpoint"),
            marks("recompilations", [_moment(c) for c in again], "compile"),
            marks("alarms", [_moment(e) for e in alarms], "alarm"),
        ],
        clamped=True,
    )


def _moment(line: Stored) -> tuple[int | None, float | None]:
    return getattr(line, "step", None), getattr(line, "elapsed_seconds", None)


def _utilisation(
    recorded: Recorded,
    spec: RunSpec,
    prediction: Prediction,
    rows: list[Row],
    timeline: Timeline,
    places: Floats,
) -> Chart | None:
    peak_flops = prediction.peak_flops
    if peak_flops is None:
        return None
    per_step = prediction.quantities["flops_total_palm"].expected / spec.steps
    spans = recorded.steps.column("step_seconds")
    spans = np.where(spans > 0, spans, np.nan)  # a log that was tampered with may hold a 0
    shares = 100 * mfu(per_step, 1.0, peak_flops) / spans
    return line_chart(
        "mfu",
        "MFU (6N + 12LCT)",
        "%",
        timeline.title,
        timeline.end,
        [_known("step", places, shares)],
        bands=_bands(prediction, rows, "mfu_palm", 100.0),
        clamped=True,
        notes=[f"of {prediction.hardware.peak_name}"],
    )


def _power(
    recorded: Recorded, prediction: Prediction, timeline: Timeline, hours: Floats
) -> Chart | None:
    """Of other cards than the run's no prediction is drawn beside it."""
    sensors, others = recorded.sensors, sensor_mismatch(recorded, prediction)
    return line_chart(
        "power",
        "Power of the board",
        "W",
        timeline.title,
        timeline.end,
        [
            _reading(sensors, "power_watts", "mean of each reading", hours),
            _limit(_reading(sensors, "power_limit_watts", "limit", hours)),
        ],
        bands=_bands(prediction, [], "power_watts", 1.0) if others is None else [],
        notes=[] if others is None else [others],
    )


def _clock(
    sensors: Table[Sensor], prediction: Prediction, timeline: Timeline, hours: Floats
) -> Chart | None:
    codes, words = sensors.codes("throttle")
    held_down = np.isin(codes, [code for code, reasons in enumerate(words) if reasons])
    lines = [_reading(sensors, "sm_clock_hz", "clock", hours, 1e9)]
    if prediction.hardware.boost_clock_hz is not None and len(lines[0].x):
        ends = lines[0].x[[0, -1]]
        boost = np.full(2, prediction.hardware.boost_clock_hz / 1e9)
        lines.append(_limit(Series("boost, of the peak", ends, boost)))
    return line_chart(
        "clock",
        "SM clock",
        "GHz",
        timeline.title,
        timeline.end,
        lines,
        marks=[Marks("throttled readings", hours[held_down & ~np.isnan(hours)], "throttle")],
    )


def _temperature(sensors: Table[Sensor], timeline: Timeline, hours: Floats) -> Chart | None:
    return line_chart(
        "temperature",
        "Temperature",
        "°C",
        timeline.title,
        timeline.end,
        [_reading(sensors, "temperature_celsius", "temperature", hours)],
    )


def _energy(
    recorded: Recorded,
    spec: RunSpec,
    prediction: Prediction,
    timeline: Timeline,
    hours: Floats,
) -> Chart | None:
    joules, process = recorded.sensors.column("energy_joules"), recorded.processes_of_readings()
    known = ~(np.isnan(joules) | np.isnan(hours))
    hours, joules, process = hours[known], joules[known], process[known]
    if not len(joules):
        return None
    anew = np.diff(process, prepend=process[:1]) > 0  # a count that begins at zero
    ended = np.where(anew, np.roll(joules, 1), 0.0)
    kwh = (joules + np.cumsum(ended)) / JOULES_PER_KWH
    cost, notes = None, []
    if (others := sensor_mismatch(recorded, prediction)) is not None:
        notes = [others]
    elif spec.cost.price_per_kwh is not None and kwh[-1] > 0:
        paid = np.array([cost_of(spec.cost, k, timeline.seconds * h) for k, h in _ends(kwh, hours)])
        notes = [f"its cost: {paid[-1]:.2f} {spec.cost.currency}"]
        cost = Second(spec.cost.currency, np.array([kwh[0], kwh[-1]]), paid)
    return line_chart(
        "energy",
        "Energy of the board" + (" and its cost" if cost is not None else ""),
        "kWh",
        timeline.title,
        timeline.end,
        [Series("energy so far", hours, kwh, told=("last",))],
        bands=_bands(prediction, [], "energy_kwh", 1.0) if others is None else [],
        right=cost,
        from_zero=True,
        notes=notes,
    )


def _ends(kwh: Floats, hours: Floats) -> list[tuple[float, float]]:
    return [(float(kwh[place]), float(hours[place])) for place in (0, -1)]


def _memory(recorded: Recorded, prediction: Prediction) -> Chart | None:
    """The predicted peak in its parts, and every peak that somebody measured."""
    predicted = prediction.quantities.get("peak_allocated_bytes")
    rows: list[Bar] = []
    legend = []
    if predicted is not None and prediction.memory_parts:
        parts = sorted(prediction.memory_parts, key=lambda part: -part.value)
        total = sum(part.value for part in parts)
        legend = [(f"s{i}", f"{p.name} {p.value / GIB:.2f} GiB") for i, p in enumerate(parts)]
        rows.append(
            Bar(
                "predicted, tensors at the peak",
                f"{total / GIB:.2f} GiB",
                [(part.name, part.value) for part in parts],
                (predicted.low, predicted.high),
            )
        )
    sensors = recorded.sensors
    on_cpu = prediction.hardware.kind == "cpu"
    if on_cpu:  # a card that is watched beside the processor has another memory
        measured = [("measured, the process in main memory", run_peak(recorded, "peak_host_bytes"))]
    else:
        measured = [
            ("measured, tensors (allocated)", run_peak(recorded, "peak_allocated_bytes")),
            (
                "measured, kept by the allocator (reserved)",
                run_peak(recorded, "peak_reserved_bytes"),
            ),
            (
                "measured, this process on the card",
                max_or_none(sensors.known("process_used_bytes")),
            ),
            ("measured, whole card", max_or_none(sensors.known("device_used_bytes"))),
        ]
    for name, size in measured:
        if size is not None:
            rows.append(Bar(name, f"{size / GIB:.2f} GiB", [(name, float(size))]))
    if not rows:
        return None
    whole = prediction.hardware.memory_bytes
    where = "the machine" if on_cpu else "the card"
    limit = (f"{whole / GIB:.3g} GiB: {where}", float(whole)) if whole is not None else None
    figures = [f"{row.name}: {row.text}" for row in rows]
    notes = []
    if predicted is not None:
        low, high = (
            format_value("peak_allocated_bytes", end) for end in (predicted.low, predicted.high)
        )
        notes.append(f"the whisker is the predicted interval, {low} to {high}")
    title = "Memory at its peak"
    picture = bars(title, rows, limit)
    return Chart("memory", title, picture, legend, figures, notes, labelled=True)
