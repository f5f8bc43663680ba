"""Record one process of a run: its steps, sensors, alarms and end, in the run log and on a display."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nanogauge.measure.alarms import Alarm, Alarms
from nanogauge.measure.clock import Clock, StepTimes, Stopwatch
from nanogauge.measure.gpus import WatchedGpu
from nanogauge.measure.host import ProcessorWatch, peak_process_bytes
from nanogauge.measure.sensors import DriverInfo, Idle, PowerSpread, Sensors, driver_info, measure_idle, open_sensors
from nanogauge.measure.standstill import StandstillWatch
from nanogauge.measure.torch_device import allocator_peaks
from nanogauge.quantities import finite, format_seconds
from nanogauge.runlog.writer import RunLog
from nanogauge.schema import Compile, End, Event, Prediction, Sensor, Step

Level = Literal["info", "warning", "alarm"]
Status = Literal["finished", "stopped", "failed"]


class Display:
    """Shows messages and alarms on standard error, and no steps."""

    def say(self, text: str) -> None:
        print(f"nanogauge: {text}", file=sys.stderr)

    def alarm(self, text: str) -> None:
        self.say(f"ALARM: {text}")

    def sensor(self, reading: Sensor) -> None:
        """Show a sensor reading."""

    def step(self, line: Step) -> None:
        """Show a completed step."""


@dataclass(frozen=True)
class Sensing:
    """The sensors that a process reads, and the power and utilization of idle GPUs."""

    sensors: Sensors
    gpu: DriverInfo | None
    """Driver data of the first GPU; None without GPUs."""
    idle: Idle | None
    """Power and utilization of the GPUs before the run; None if not measured."""
    gpus: int
    """Number of GPUs whose sensors are read."""

    def start_fields(self) -> dict[str, Any]:
        """Return the fields of a start line that describe the GPUs before the run."""
        return {
            "idle_power_watts": self.idle.power_watts if self.idle is not None else None,
            "idle_utilization": self.idle.utilization if self.idle is not None else None,
            "other_programs": self.gpu.others if self.gpu is not None else None,
            "sensed_cards": self.gpus or None,
        }


def open_sensing(gpus: list[WatchedGpu], hz: float, idle_seconds: float, clock: Clock) -> Sensing:
    """Measure the GPUs for `idle_seconds` while they are idle, then sample their sensors at `hz`."""
    gpu = driver_info(gpus[0].device) if gpus else None
    idle = measure_idle(gpus, hz, idle_seconds) if gpus and idle_seconds > 0 else None
    return Sensing(open_sensors(gpus, hz, clock.elapsed_seconds), gpu, idle, len(gpus))


@dataclass(frozen=True)
class MeasuredStep:
    """Times and power of a step that the device has completed."""

    times: StepTimes
    power: PowerSpread | None
    """None without power samples."""


class Recorder:
    """Measures steps, and writes steps, events and sensor readings to the log and shows them.

    Args:
        prediction: gives the alarms their thresholds, together with the GPU's limits.
        device: the torch.device that trains; None without torch.
    """

    def __init__(
        self, log: RunLog, display: Display, clock: Clock, sensing: Sensing, prediction: Prediction, device: Any
    ) -> None:
        self.log, self.display, self.clock, self.sensors = log, display, clock, sensing.sensors
        total, gpu = prediction.best("total_seconds"), sensing.gpu
        self.alarms = Alarms(
            predicted_total_seconds=(total.low, total.high) if total is not None else None,
            device_bytes=gpu.total_bytes if gpu is not None else None,
            slowdown_celsius=gpu.slowdown_celsius if gpu is not None else None,
        )
        self.standstill = StandstillWatch()
        self.energy_joules: float | None = None
        """Energy of this process so far, from its sensors; None without a reading."""
        self._device = device
        self._processor = ProcessorWatch()  # what other programs use of it after the first step

    def record_event(
        self, what: str, text: str, level: Level = "info", step: int | None = None, about: str | None = None
    ) -> None:
        """Write an event to the log only."""
        self.log.write(Event(level=level, what=what, text=text, step=step, about=about))

    def report(
        self, what: str, text: str, level: Level = "info", step: int | None = None, about: str | None = None
    ) -> None:
        """Write an event to the log and show it."""
        self.record_event(what, text, level, step, about)
        if level == "alarm":
            self.display.alarm(text)
        else:
            self.display.say(text if level == "info" else f"! {text}")

    def raise_alarm(self, alarm: Alarm, step: int | None) -> None:
        """Write an alarm or warning to the log and show it."""
        self.report(alarm.what, alarm.text, alarm.level, step, alarm.about)

    def record_standstills(self, step: int) -> None:
        """Log that the process stood still since the last call, in or before this step."""
        for event in self.standstill.new():
            self.log.write(event.model_copy(update={"step": step}))
            self.display.say(f"! {event.text}")

    def record_compilation(self, step: int, seconds: float) -> None:
        """Log the time of a compilation at this step, as it is not part of the step's time."""
        if seconds > 0:
            self.log.write(Compile(step=step, seconds=seconds, mode="compiled"))
            self.display.say(f"compiled at step {step:,}: {format_seconds(seconds)}")

    def record_sensors(self, step: int) -> None:
        """Log sensor readings since the last call and lost sensors, and raise alarms on them."""
        for change in self.sensors.changes():
            if change.midway:
                self.report("absent", f"{change.text}.", "warning", step, change.field)
            else:
                self.record_event("absent", f"{change.text}.", "info", step, change.field)
        for reading in self.sensors.readings():
            self.log.write(reading)
            self.display.sensor(reading)
            if reading.energy_joules is not None:
                self.energy_joules = reading.energy_joules
            for alarm in self.alarms.sensor(reading):
                self.raise_alarm(alarm, step)

    def measure_step(self, watch: Stopwatch) -> MeasuredStep:
        """Wait until the device has completed a step; return its times and power."""
        times = watch.read()
        if asleep := self.standstill.seconds_within(times.step_seconds):
            net = times.step_seconds - asleep
            wait = times.data_wait_seconds
            times = StepTimes(net, times.compile_seconds, None if wait is None else min(wait, net), None, None, None)
        return MeasuredStep(times, self.sensors.power_since_last())

    def record_step(
        self, step: int, done: MeasuredStep, values: Mapping[str, float], tokens: int | None, first: bool, memory: bool
    ) -> Step:
        """Log and show a completed step and the sensor readings, raise alarms; return its line.

        Args:
            values: its loss (mean in nats per token), grad_norm and learning_rate, which may be absent or non-finite.
            tokens: tokens of the step; None if unknown.
            first: the step is the first of this process, which no alarm compares with others.
            memory: read the peaks of memory as well, which takes time.
        """
        times, power = done.times, done.power
        self.record_standstills(step)
        if first:
            self._processor = ProcessorWatch()  # the processes that compiled were this run's
        for alarm in self.alarms.loss(step, values["loss"]) if "loss" in values else ():
            self.raise_alarm(alarm, step)
        self.record_compilation(step, times.compile_seconds)
        peaks = allocator_peaks(self._device) if memory else {}
        line = Step(
            step=step,
            step_seconds=times.step_seconds,
            data_wait_seconds=times.data_wait_seconds,
            forward_seconds=times.forward_seconds,
            backward_seconds=times.backward_seconds,
            optimizer_seconds=times.optimizer_seconds,
            tokens=tokens,
            power_watts=power.mean_watts if power is not None else None,
            power_min_watts=power.min_watts if power is not None else None,
            power_max_watts=power.max_watts if power is not None else None,
            peak_allocated_bytes=peaks.get("peak_allocated_bytes"),
            peak_reserved_bytes=peaks.get("peak_reserved_bytes"),
            peak_host_bytes=peak_process_bytes() if memory else None,
            **{name: finite(value) for name, value in values.items()},
        )
        self.log.write(line)
        self.display.step(line)
        self.record_sensors(step)
        if not first and times.compile_seconds == 0:
            for alarm in self.alarms.step(step, times.step_seconds, times.data_wait_seconds):
                self.raise_alarm(alarm, step)
        return line

    def record_end(
        self, status: Status, steps: int, reason: str | None, restartable: bool | None = None, alone: bool = True
    ) -> None:
        """Log the last sensor readings, the memory peaks and the end after `steps` updates.

        Args:
            reason: why the run stopped or failed.
            restartable: whether a restart may succeed; None if the run did not fail.
            alone: no other process of this machine belongs to the run, so all others are other programs.
        """
        self.record_standstills(steps)
        for reading in self.sensors.close():
            self.log.write(reading)
        self.record_sensors(steps)
        host_bytes = peak_process_bytes()
        self.log.write(
            End(
                status=status,
                steps=steps,
                wall_seconds=self.clock.elapsed_seconds(),
                peak_process_bytes=host_bytes if self._device is None or self._device.type == "cpu" else None,
                peak_host_bytes=host_bytes,
                others_processor_share=self._processor.others_share() if alone else None,
                reason=reason,
                restartable=restartable,
                **allocator_peaks(self._device),
            )
        )
