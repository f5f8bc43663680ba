"""Runs in which every figure is chosen: what the report says of them can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from examples import documented_spec

from nanogauge.hardware import lookup
from nanogauge.predict.prediction import predict
from nanogauge.records import (
    Checkpoint,
    Compile,
    End,
    Eval,
    LogLine,
    Prediction,
    Sensor,
    Start,
    Step,
)
from nanogauge.report.measured import Measurements, measure
from nanogauge.runlog import Recorded
from nanogauge.runspec import RunSpec

GIB = 2**30


@dataclass(frozen=True)
class MadeUp:
    """A run on an RTX 4070, one reading of its sensors a second; seconds, watts, joules, Hz."""

    steps: int = 60
    step: Callable[[int], float] = lambda _: 3.9
    wait: float = 0.0
    evaluation: float = 15.0
    checkpoint: float = 0.0
    compilation: float = 12.0
    died_at: Sequence[tuple[int, int]] = ()
    """pairs of the step after which a process died, and the one that the next went on from"""
    went_back: Collection[int] = ()
    """which of these, by their place, were no death: the process itself went back"""
    gap: float | None = None
    """between two processes; None: no line tells the time of day"""
    start_up: float = 6.0
    watts: float = 190.0
    watt_limit: float = 200.0
    clock_hz: float | None = 2.6e9
    throttled: Callable[[float], tuple[float, list[str]] | None] = lambda _: None
    """of the time: a clock, and the reasons; None while the card is not throttled"""
    clocked: bool = True
    """False: no line has a time, as in another program's log"""
    sensors: bool = True
    scale: dict[str, float] = field(default_factory=dict)
    """factors of fields, applied to every line that has them"""

    @property
    def spec(self) -> RunSpec:
        return replace(documented_spec(), steps=self.steps, eval_every=20, checkpoint_every=20)

    @property
    def prediction(self) -> Prediction:
        return predict(self.spec, lookup("RTX 4070", "bfloat16"))

    def recorded(self) -> Recorded:
        recorded = Recorded()
        for line in self.lines():
            recorded.add(line)
        return recorded

    def measured(self) -> Measurements:
        return measure(self.recorded(), self.spec, self.prediction)

    def lines(self) -> list[LogLine]:
        lines: list[LogLine] = []
        first, began, now = 0, 1.7e9, 0.0
        for place, (died, goes_on) in enumerate([*self.died_at, (self.steps, -1)]):
            lines += self._process(first, died, began, now)
            first, now = goes_on, max(line.elapsed_seconds or 0.0 for line in lines[-2:])
            if place not in self.went_back:
                began, now = began + now + (self.gap or 0.0), 0.0
        return [self._scaled(line) for line in lines]

    def _scaled(self, line: LogLine) -> LogLine:
        changed: dict[str, Any] = {
            name: round(value * self.scale[name])
            if isinstance(value, int)
            else value * self.scale[name]
            for name, value in line
            if name in self.scale and value is not None
        }
        if not self.clocked:
            changed["elapsed_seconds"] = None
            if isinstance(line, Start):
                changed["source"] = "nanogpt_log"
        return line.model_copy(update=changed)

    def _process(self, first: int, last: int, began: float, now: float) -> list[LogLine]:
        continues = True if now else None
        told = now or 0.5
        lines: list[LogLine] = [
            Start(
                elapsed_seconds=told,
                unix_time=None if self.gap is None else began + told,
                continues=continues,
                max_steps=self.steps,
                first_step=first,
                prediction_sha256="",
                device="RTX 4070",
            )
        ]

        def after(took: float, line: type[Any], **values: Any) -> None:
            nonlocal now
            lines.extend(self._readings(now, now + took))
            now += took
            lines.append(line(elapsed_seconds=now, **values))

        if not continues:
            now, seconds = self.start_up, self.compilation
            after(seconds, Compile, seconds=seconds, mode="compiled")
        for step in range(first, last + 1):
            if step % 20 == 0 or step == self.steps:
                seconds = self.evaluation
                after(seconds, Eval, step=step, val_loss=4.0, seconds=seconds)
                if step > first and self.checkpoint:
                    seconds = self.checkpoint
                    after(seconds, Checkpoint, step=step, seconds=seconds)
            if step == last:
                break
            after(
                self.step(step),
                Step,
                step=step,
                loss=4.0,
                step_seconds=self.step(step),
                data_wait_seconds=self.wait,
                peak_allocated_bytes=5 * GIB,
            )
        if last == self.steps:
            after(1.0, End, status="finished", steps=self.steps)
        return lines

    def _readings(self, begin: float, end: float) -> list[LogLine]:
        if not self.sensors:
            return []
        return [self._reading(float(second)) for second in range(int(begin) + 1, int(end) + 1)]

    def _reading(self, now: float) -> Sensor:
        held = self.throttled(now)
        clock_hz, reasons = held if held is not None else (self.clock_hz, [])
        return Sensor(
            elapsed_seconds=now,
            power_watts=self.watts,
            energy_joules=self.watts * now,
            energy_source="counter",
            power_limit_watts=self.watt_limit,
            sm_clock_hz=clock_hz,
            throttle=reasons or (["power cap"] if self.watt_limit < 200 else []),
            process_used_bytes=6 * GIB,
        )
