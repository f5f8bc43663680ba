"""What a person sees while a run goes on: plain lines, as good in a terminal as in a file."""

from __future__ import annotations

import statistics
import time
from collections import deque

from nanogauge.config import Config
from nanogauge.predict.flops import flops_per_token_palm
from nanogauge.predict.workload import shape_of
from nanogauge.quantities import (
    format_range,
    format_seconds,
    format_value,
    mfu,
    tokens_per_second,
)
from nanogauge.records import Eval, Prediction, Sensor, Step

GO_AFTER_STEPS = 30
_SHOWN_ROWS = (
    "parameters",
    "tokens_total",
    "data_epochs",
    "flops_total_palm",
    "step_seconds",
    "mfu_palm",
    "total_seconds",
    "peak_process_bytes",
    "energy_kwh",
    "cost",
)


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def clock_time(seconds_from_now: float) -> str:
    """A time of day, with the date where it is not today."""
    then = time.localtime(time.time() + seconds_from_now)
    today = time.localtime()[:3] == then[:3]
    return time.strftime("%H:%M" if today else "%a %H:%M", then)


class Screen:
    """Prints the plan, a line every log_every steps, and go or no-go after 30 steady steps."""

    def __init__(self, config: Config, prediction: Prediction, first_step: int) -> None:
        self._config, self._prediction = config, prediction
        self._first = first_step
        self._times: deque[float] = deque(maxlen=100)
        self._steady_steps = 0
        self._eval_seconds = 0.0
        self._power_watts: float | None = None

    def plan(self) -> None:
        """The prediction, before the first step."""
        print(f"{self._config.run.name} on {self._prediction.hardware.name}")
        print(f"  peak: {self._prediction.hardware.peak_name}")
        for row in _SHOWN_ROWS:
            if (e := self._prediction.best(row)) is not None:
                text = format_range(row, e.low, e.high, self._config.cost.currency)
                print(f"  {row.replace('_', ' '):22} {text}")
        total = self._prediction.best("total_seconds")
        if total is not None and self._first == 0:
            low, high = clock_time(total.low), clock_time(total.high)
            print(f"  finish at about        {clock_time(total.expected)} ({low} to {high})")
        if (step := self._prediction.calibrated.get("step_seconds")) is not None:
            print(f"  times stand on {step.source}")
        for note in self._prediction.notes:
            print(f"  ! {note}")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def sensor(self, reading: Sensor) -> None:
        self._power_watts = reading.power_watts

    def evaluated(self, line: Eval) -> None:
        self._eval_seconds = line.seconds or 0.0
        self.say(
            f"step {line.step:>7,}  evaluation: train {_loss(line.train_loss)}, "
            f"validation {_loss(line.val_loss)}  ({format_seconds(self._eval_seconds)})"
        )

    def step(self, line: Step) -> None:
        """Count a step; print it if it is its turn."""
        assert line.step_seconds is not None
        if line.step > self._first:
            self._times.append(line.step_seconds)
            self._steady_steps += 1
        if line.step % self._config.train.log_every == 0 and line.loss is not None:
            self._print_step(line.step, line.loss, line.step_seconds)
        if self._steady_steps == GO_AFTER_STEPS:
            self.say(self.go_or_no_go(line.step, line.elapsed_seconds or 0.0))

    def _print_step(self, step: int, loss: float, seconds: float) -> None:
        per_step = self._config.tokens_per_step
        pace = statistics.median(self._times) if self._times else seconds
        parts = [
            f"step {step:>7,}/{self._config.train.max_steps:,}",
            f"loss {loss:.4f}",
            format_seconds(pace),
            f"{tokens_per_second(per_step, pace):,.0f} tokens/s",
        ]
        peak = self._prediction.peak_flops
        if peak is not None:
            flops = flops_per_token_palm(shape_of(self._config.model)) * per_step
            parts.append(f"MFU {100 * mfu(flops, pace, peak):.1f} %")
        if self._power_watts is not None:
            parts.append(f"{self._power_watts:.0f} W")
        left = self.seconds_left(step, pace)
        parts.append(f"{format_seconds(left)} left, done {clock_time(left)}")
        self.say("  ".join(parts))

    def seconds_left(self, step: int, pace: float) -> float:
        """Steps and evaluations that are still to come, at the measured pace."""
        train = self._config.train
        evaluations = (train.max_steps - 1) // train.eval_every - step // train.eval_every + 1
        return (train.max_steps - step - 1) * pace + evaluations * self._eval_seconds

    def go_or_no_go(self, step: int, elapsed_seconds: float) -> str:
        """The projected time of the whole run against the predicted interval."""
        pace = statistics.median(self._times)
        left = self.seconds_left(step, pace)
        finish = f"done {clock_time(left)}"
        total = self._prediction.quantities.get("total_seconds")
        if total is None or self._first > 0:
            return f"At {format_value('step_seconds', pace)} a step: {finish}."
        projected = elapsed_seconds + left
        interval = format_range("total_seconds", total.low, total.high)
        inside = total.low <= projected <= total.high
        return (
            f"{'Go' if inside else 'No-go'}: at {format_value('step_seconds', pace)} a step "
            f"the run takes {format_seconds(projected)}, {finish}; "
            f"{'inside' if inside else 'outside'} the predicted {interval}."
        )
