"""The progress of a run on standard output: its prediction, and a line for some of the steps."""

import statistics
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime

from nanogauge.prediction.flops import flops_per_token_palm
from nanogauge.quantities import Interval, format_range, format_seconds, format_value, mfu, time_after
from nanogauge.recorder import Display
from nanogauge.runspec import RunSpec
from nanogauge.schedule import checkpoints, evaluations
from nanogauge.schema import Checkpoint, Eval, Prediction, Sensor, Step

GO_AFTER_STEPS = 30
PACE_STEPS = 100
"""Number of latest steps whose median step time is shown."""
LINE_SECONDS = 2.0
"""Minimum time between two lines about steps."""
_SHOWN_ROWS = (
    *("parameters", "tokens_total", "data_epochs", "flops_total_palm", "step_seconds", "mfu_palm", "total_seconds"),
    *("peak_process_bytes", "energy_kwh", "cost", "co2_grams"),
)


def clock_times(now: datetime, *seconds: float) -> list[str]:
    """Format local times of day, given in seconds after now; name the day where it changes."""
    day, texts = now.date(), []
    for moment in (time_after(now, s) for s in seconds):
        if moment is None:
            texts.append("in more than 100 years")
            continue
        far = abs((moment.date() - now.date()).days) >= 7
        name = "" if moment.date() == day else f"{moment:%Y-%m-%d} " if far else f"{moment:%a} "
        texts.append(f"{name}{moment:%H:%M}")
        day = moment.date()
    return texts


class ProgressDisplay(Display):
    """Shows prediction and progress; after 30 steps in the steady state, also go or no-go.

    Args:
        spec: specification of the run: model, steps, batch sizes.
        log_every: number of steps between lines.
        prediction: the frozen prediction.
        first_step: 0, or the step at which a resumed run continues.
        elapsed_before_seconds: wall time of earlier processes; None if unknown, which disables the comparison with the
            prediction.
        elapsed_seconds: returns the time since this process began; the default counts from now. wall: returns the time
        in seconds since the epoch.
    """

    def __init__(
        self,
        spec: RunSpec,
        prediction: Prediction,
        first_step: int,
        elapsed_before_seconds: float | None = None,
        *,
        log_every: int = 1,
        elapsed_seconds: Callable[[], float] | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._spec, self._prediction = spec, prediction
        self._first, self._log_every = first_step, log_every
        self._before_seconds = 0.0 if first_step == 0 else elapsed_before_seconds
        made = time.monotonic()
        self._elapsed = elapsed_seconds or (lambda: time.monotonic() - made)
        self._wall = wall
        self._began_unix = wall() - self._elapsed()

        self._pace: deque[float] = deque(maxlen=PACE_STEPS)
        self._steady_steps = 0
        ledger = prediction.ledger  # until they are measured
        self._eval_seconds = ledger.get("eval_s", 0.0) / max(evaluations(spec), 1)
        self._checkpoint_seconds = ledger.get("checkpoint_s", 0.0) / max(checkpoints(spec), 1)
        self._reading = Sensor()
        self._host_bytes: int | None = None
        self._shown_at = float("-inf")
        self._hidden: Step | None = None
        """The last step, if it has not been shown; else None."""

    def plan(self) -> None:
        """Show the prediction, before the first step."""
        self.say(f"{self._spec.name} on {self._prediction.hardware.name}")
        self.say(f"  peak: {self._prediction.hardware.peak_name}")
        for row in _SHOWN_ROWS:
            if (e := self._prediction.best(row)) is not None:
                text = format_range(row, e.low, e.high, self._spec.cost.currency)
                self.say(f"  {row.replace('_', ' '):22} {text}")
        if (predicted := self._seconds_to_predicted_finish()) is not None:
            ends = (predicted.expected, predicted.low, predicted.high)
            expected, low, high = clock_times(self._now(), *ends)
            self.say(f"  finish at about        {expected} ({low} to {high})")
        if (step := self._prediction.calibrated.get("step_seconds")) is not None:
            self.say(f"  times are based on {step.source}")
        for note in self._prediction.notes:
            self.say(f"  ! {note}")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def sensor(self, reading: Sensor) -> None:
        """Store a reading, to be shown with the next step."""
        self._reading = reading

    def evaluated(self, line: Eval) -> None:
        self._eval_seconds = line.seconds or 0.0
        self.say(
            f"step {line.step:>7,}  evaluation: train {_loss(line.train_loss)}, "
            f"validation {_loss(line.val_loss)}{_forecast(line)}  "
            f"({format_seconds(self._eval_seconds)})"
        )

    def checkpointed(self, line: Checkpoint) -> None:
        self._checkpoint_seconds = line.seconds or 0.0
        size = "" if line.bytes is None else f", {line.bytes / 1e6:,.0f} MB"
        took = format_seconds(self._checkpoint_seconds)
        self.say(f"step {line.step:>7,}  checkpoint  ({took}{size})")

    def step(self, line: Step) -> None:
        """Count a step; show it if enough steps and time have passed since the last one shown."""
        assert line.step_seconds is not None
        if line.step > self._first:
            self._pace.append(line.step_seconds)
            self._steady_steps += 1
        if line.peak_host_bytes is not None:
            self._host_bytes = line.peak_host_bytes
        now = self._elapsed()
        due = line.step % self._log_every == 0 and now - self._shown_at >= LINE_SECONDS
        self._hidden = line
        if due or line.step in (self._first, self._spec.steps - 1):
            self._show(line)
            self._shown_at = now
        if self._steady_steps == GO_AFTER_STEPS and line.step > self._first:
            self.say(self.go_or_no_go(line.step, now))

    def close(self) -> None:
        """Show the last step; say() still works afterwards."""
        if self._hidden is not None:
            self._show(self._hidden)

    def seconds_left(self, step: int, pace_seconds: float) -> float:
        """Return the time from `step` to the end of the run, with evaluations and checkpoints."""
        left = (self._spec.steps - step - 1) * pace_seconds
        left += evaluations(self._spec, first=step + 1) * self._eval_seconds
        left += checkpoints(self._spec, first=step + 1) * self._checkpoint_seconds
        return left

    def projected_total_seconds(self, step: int, elapsed_seconds: float) -> float | None:
        """Return the projected wall time of the whole run in seconds, earlier processes included.

        Returns None before the steady state, or if the time of earlier processes is unknown.

        Args:
            step: the last step.
            elapsed_seconds: since this process began.
        """
        if self._before_seconds is None or not len(self._pace):
            return None
        left = self.seconds_left(step, statistics.median(self._pace))
        return self._before_seconds + elapsed_seconds + left

    def go_or_no_go(self, step: int, elapsed_seconds: float) -> str:
        """Return a sentence that compares the run's projected time with the predicted interval."""
        pace = statistics.median(self._pace)
        step_text = f"{format_value('step_seconds', pace)} a step"
        (finish,) = clock_times(self._now(), self.seconds_left(step, pace))
        total = self._prediction.best("total_seconds")
        projected = self.projected_total_seconds(step, elapsed_seconds)
        if total is None or projected is None:
            return f"At {step_text}: finish {finish}."
        interval = format_range("total_seconds", total.low, total.high)
        inside = total.contains(projected)
        return (
            f"{'Go' if inside else 'No-go'}: at {step_text} the run takes "
            f"{format_seconds(projected)}, finish {finish}; "
            f"{'inside' if inside else 'outside'} the predicted {interval}."
        )

    def _show(self, line: Step) -> None:
        self._hidden = None
        pace = statistics.median(self._pace) if len(self._pace) else line.step_seconds
        assert pace is not None
        total = self._spec.steps
        speed = [f"loss {_loss(line.loss)}", f"{format_seconds(pace)} a step", *self._speed(pace)]
        finish = self._finish(self.seconds_left(line.step, pace))
        shown = [f"step {line.step:>7,}/{total:,}", *speed, *self._machine(), ", ".join(finish)]
        self.say("  ".join(shown))

    def _speed(self, pace_seconds: float) -> list[str]:
        per_step = self._spec.tokens_per_step
        flops = flops_per_token_palm(self._spec.shape) * per_step
        rate = flops / pace_seconds / 1e12
        parts = [
            f"{per_step / pace_seconds:,.0f} tokens/s",
            f"{rate:,.0f} TFLOP/s" if rate >= 100 else f"{rate:.3g} TFLOP/s",
        ]
        peak = self._prediction.peak_flops
        if peak is not None:
            parts.append(f"MFU {100 * mfu(flops, pace_seconds, peak):.1f} %")
        return parts

    def _machine(self) -> list[str]:
        """Return the latest sensor readings as short texts."""
        r, parts = self._reading, []
        if r.power_watts is not None:
            parts.append(f"{r.power_watts:.0f} W")
        if r.process_used_bytes is not None:
            parts.append(f"process {r.process_used_bytes / 2**30:.1f} GiB")
        if r.device_used_bytes is not None:
            hardware = self._prediction.hardware  # a GPU may be watched while training on a CPU
            card = hardware.memory_bytes if hardware.kind != "cpu" else None
            of = "" if card is None else f" of {card / 2**30:.1f}"
            parts.append(f"card {r.device_used_bytes / 2**30:.1f}{of} GiB")
        elif r.process_used_bytes is None and self._host_bytes is not None:
            parts.append(f"{self._host_bytes / 2**30:.2f} GiB at most")
        if r.temperature_celsius is not None:
            parts.append(f"{r.temperature_celsius:.0f} °C")
        if r.energy_joules is not None:
            since = "" if self._first == 0 else " since it was resumed"
            kwh = r.energy_joules / 3.6e6
            parts.append((f"{1e3 * kwh:.2f} Wh" if kwh < 0.1 else f"{kwh:.3g} kWh") + since)
        return parts

    def _finish(self, left_seconds: float) -> list[str]:
        """Return texts on the time left, the projected finish and the predicted one, if known."""
        left = f"{format_seconds(left_seconds)} left"
        predicted = self._seconds_to_predicted_finish()
        if predicted is None:
            return [left, f"finish {clock_times(self._now(), left_seconds)[0]}"]
        finish, expected, low, high = clock_times(
            self._now(), left_seconds, predicted.expected, predicted.low, predicted.high
        )
        return [left, f"finish {finish}", f"predicted {expected} ({low} to {high})"]

    def _seconds_to_predicted_finish(self) -> Interval | None:
        """Return the seconds until the predicted finish: expected, earliest and latest."""
        total = self._prediction.best("total_seconds")
        if total is None or self._before_seconds is None:
            return None
        return total - (self._before_seconds + self._wall() - self._began_unix)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._wall()).astimezone()


def _forecast(line: Eval) -> str:
    if line.final is None:
        return ""
    return f", final {line.final:.3f} ({line.final_low:.3f}-{line.final_high:.3f})"


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
