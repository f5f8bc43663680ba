"""The charts of a run: loss, step time, MFU, power, clock and temperature."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from nanogauge.analysis.telemetry import sensor_mismatch
from nanogauge.analysis.verdicts import Row
from nanogauge.quantities import mfu
from nanogauge.report.svg import Band, Chart, Floats, Marks, Series, line_chart
from nanogauge.runlog.history import RunHistory
from nanogauge.runspec import RunSpec
from nanogauge.schema import Checkpoint, Compile, Eval, Event, Prediction

_UNITS = ((3600.0, "hours", 7200.0), (60.0, "minutes", 300.0), (1.0, "seconds", 0.0))
"""Seconds in each unit, its name, and the shortest run in seconds that it is used for."""


class Timeline:
    """The x axis of a run: time if every process has a clock, else the step number.

    Each process counts from its own start. The time of a resumed run is the sum over its processes, without the gaps
    between them.
    """

    def __init__(self, recorded: RunHistory) -> None:
        self._first_steps = [
            (process, start.first_step) for process, starts in enumerate(recorded.processes) for start in starts
        ]
        self._process_of_readings = recorded.processes_of_readings()
        sessions = recorded.session_seconds
        known = [seconds for seconds in sessions if seconds is not None]
        self.has_clock = len(known) == len(sessions)
        self._before = np.cumsum([0.0, *known[:-1]]) if self.has_clock else np.zeros(len(sessions))
        self.seconds, unit = next(u for u in _UNITS if sum(known) >= u[2])[:2]
        """Length of the axis unit in seconds."""
        last = [recorded.steps.last("step") or 0, *(float(e.step) for e in recorded.evals)]
        self.axis = ("step", max(last))
        """Title of the x axis, and its value at the end of the run."""
        if self.has_clock:
            self.axis = (f"{unit} of the run", sum(known) / self.seconds)

    def x_of_steps(self, steps: Floats, elapsed: Floats) -> Floats:
        """Return the positions of steps; a repeated step belongs to its last process."""
        if not self.has_clock:
            return steps
        process = np.zeros(len(steps), dtype=np.int64)
        for number, first in self._first_steps:
            process[steps >= first] = number
        return self._x(process, elapsed)

    def x_of_readings(self, elapsed: Floats) -> Floats:
        """Return the positions of all sensor readings; requires that every process has a clock."""
        return self._x(self._process_of_readings, elapsed)

    def x_of_lines(self, lines: Sequence[Checkpoint | Compile | Eval | Event]) -> Floats:
        """Return the positions of log lines; a line without the axis's quantity has none."""
        known = [
            (self._first_steps[-1][1] if line.step is None else line.step, line.elapsed_seconds)
            for line in lines
            if (line.elapsed_seconds if self.has_clock else line.step) is not None
        ]
        steps = np.array([step for step, _ in known], dtype=np.float64)
        return self.x_of_steps(steps, _floats([elapsed for _, elapsed in known]))

    def _x(self, process: npt.NDArray[np.int64], elapsed: Floats) -> Floats:
        return (self._before[process] + elapsed) / self.seconds


def make_charts(recorded: RunHistory, spec: RunSpec, prediction: Prediction, rows: list[Row]) -> list[Chart]:
    """Return the charts for which the log has data, in reading order."""
    run = _Run(recorded, spec, prediction, rows, Timeline(recorded))
    charts = [run.loss(), run.step_time(), run.mfu()]
    if len(recorded.sensors) and run.timeline.has_clock:
        charts += [run.power(), run.clock(), run.temperature()]
    return [chart for chart in charts if chart is not None]


def _floats(values: Sequence[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _series(name: str, x: Floats, y: Floats, style: str = "line") -> Series:
    """Return a series of the points whose coordinates are both known."""
    known = ~(np.isnan(x) | np.isnan(y))
    return Series(name, x[known], y[known], style)


@dataclass(frozen=True)
class _Run:
    """The data of a run that its line charts are drawn from."""

    recorded: RunHistory
    spec: RunSpec
    prediction: Prediction
    rows: list[Row]
    timeline: Timeline

    @cached_property
    def x_of_steps(self) -> Floats:
        steps = self.recorded.steps
        return self.timeline.x_of_steps(steps.column("step"), steps.column("elapsed_seconds"))

    @cached_property
    def x_of_readings(self) -> Floats:
        return self.timeline.x_of_readings(self.recorded.sensors.column("elapsed_seconds"))

    def sensor(self, field: str, name: str, scale: float = 1.0) -> Series:
        return _series(name, self.x_of_readings, self.recorded.sensors.column(field) / scale)

    def bands(self, row_id: str, scale: float = 1.0) -> list[Band]:
        """Return the predicted intervals of a quantity and its narrowest claim."""
        bands = []
        for name, estimates, style in (
            ("predicted", self.prediction.quantities, "band"),
            ("calibrated", self.prediction.calibrated, "calband"),
        ):
            estimate = estimates.get(row_id)
            if estimate is not None:
                bands.append(Band(name, scale * estimate.low, scale * estimate.high, style))
        claims = [row.claimed for row in self.rows if row.id == row_id and row.claimed is not None]
        ranges = [(c.low, c.high) for c in claims if c.of_this_run and c.low is not None and c.high is not None]
        if ranges:
            low, high = min(ranges, key=lambda ends: ends[1] - ends[0])
            name = "claimed" if len(ranges) == 1 else "claimed, the narrowest"
            bands.append(Band(name, scale * low, scale * high, "cband"))
        return bands

    def loss(self) -> Chart | None:
        steps, evals = self.recorded.steps, self.recorded.evals
        x = self.x_of_steps
        evals = [e for e in evals if e.val_loss is not None]
        eval_x = self.timeline.x_of_steps(_floats([e.step for e in evals]), _floats([e.elapsed_seconds for e in evals]))
        validation = _series("validation", eval_x, _floats([e.val_loss for e in evals]), "dots")
        forecast = _series("forecast of the end", eval_x, _floats([e.final for e in evals]), "dots")
        return line_chart(
            ("loss", "Loss", "nats per token"),
            self.timeline.axis,
            [_series("training", x, steps.column("loss")), validation, forecast],
            bands=self.bands("val_loss"),
        )

    def step_time(self) -> Chart | None:
        recorded, x_of = self.recorded, self.timeline.x_of_lines
        recompilations = x_of([c for c in recorded.compiles if c.step is not None])
        alarms = x_of([e for e in recorded.events if e.level == "alarm"])
        return line_chart(
            ("step-time", "Time per step", "s"),
            self.timeline.axis,
            [_series("step", self.x_of_steps, recorded.steps.column("step_seconds"))],
            bands=self.bands("step_seconds"),
            marks=[
                Marks("evaluations", x_of(recorded.evals), "eval"),
                Marks("checkpoints", x_of(recorded.checkpoints), "checkpoint"),
                Marks("recompilations", recompilations, "compile"),
                Marks("alarms", alarms, "alarm"),
            ],
            clipped=True,
        )

    def mfu(self) -> Chart | None:
        peak_flops = self.prediction.peak_flops
        if peak_flops is None or "flops_total_palm" not in self.prediction.quantities:
            return None
        per_step = self.prediction.quantities["flops_total_palm"].expected / self.spec.steps
        seconds = self.recorded.steps.column("step_seconds")
        seconds = np.where(seconds > 0, seconds, np.nan)  # an edited log may hold a 0
        return line_chart(
            ("mfu", "MFU (6N + 12LCT)", "%"),
            self.timeline.axis,
            [_series("step", self.x_of_steps, 100 * mfu(per_step, 1.0, peak_flops) / seconds)],
            bands=self.bands("mfu_palm", 100.0),
            clipped=True,
        )

    def power(self) -> Chart | None:
        others = sensor_mismatch(self.recorded, self.prediction)
        return line_chart(
            ("power", "Power of the board", "W"),
            self.timeline.axis,
            [
                self.sensor("power_watts", "mean of each reading"),
                replace(self.sensor("power_limit_watts", "limit"), style="limit"),
            ],
            # The prediction is of the run's own GPUs.
            bands=self.bands("power_watts") if others is None else [],
            notes=[] if others is None else [others],
        )

    def clock(self) -> Chart | None:
        codes, reasons = self.recorded.sensors.codes("throttle")
        throttled = np.isin(codes, [code for code, named in enumerate(reasons) if named])
        x = self.x_of_readings
        return line_chart(
            ("clock", "SM clock", "GHz"),
            self.timeline.axis,
            [self.sensor("sm_clock_hz", "clock", 1e9)],
            marks=[Marks("throttled readings", x[throttled & ~np.isnan(x)], "throttle")],
        )

    def temperature(self) -> Chart | None:
        series = [self.sensor("temperature_celsius", "temperature")]
        return line_chart(("temperature", "Temperature", "°C"), self.timeline.axis, series)
