"""Recording of one process: its log, display, clock, sensors and alarms."""

from dataclasses import dataclass, field
from typing import Literal

from nanogauge.measure.alarms import Alarm, Alarms
from nanogauge.measure.clock import Clock
from nanogauge.measure.host import ProcessorWatch
from nanogauge.measure.sensors import Sensors
from nanogauge.measure.standstill import StandstillWatch
from nanogauge.quantities import format_seconds
from nanogauge.runlog.writer import RunLog
from nanogauge.schema import Compile, Event, LogLine
from trainer.run.progress import ProgressDisplay

Level = Literal["info", "warning", "alarm"]


class SilentLog(RunLog):
    """The log of a rank other than 0, which discards its lines."""

    def __init__(self) -> None:
        """Open no file."""

    def write(self, line: LogLine) -> None:
        """Discard the line: rank 0 writes one for all ranks."""

    @property
    def problem(self) -> str | None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close no file."""


@dataclass
class Recorder:
    """Writes events and sensor readings to the log and shows them."""

    log: RunLog
    display: ProgressDisplay
    clock: Clock
    sensors: Sensors
    alarms: Alarms
    standstill: StandstillWatch
    energy_joules: float | None = None
    """Energy of this process so far, from its sensors; None without a reading."""
    processor: ProcessorWatch = field(default_factory=ProcessorWatch)
    """Watches what other programs use of the processor after the first step."""
    log_problem_raised: bool = False
    """Whether the current problem of writing the log, such as a full disk, has raised its alarm."""

    def log_event(
        self, what: str, text: str, level: Level = "info", step: int | None = None, about: str | None = None
    ) -> None:
        """Write an event to the log only."""
        self.log.write(Event(level=level, what=what, text=text, step=step, about=about))

    def report(
        self, what: str, text: str, level: Level = "info", step: int | None = None, about: str | None = None
    ) -> None:
        """Write an event to the log and show it."""
        self.log_event(what, text, level, step, about)
        if level == "alarm":
            self.display.alarm(text)
        else:
            self.display.say(text if level == "info" else f"! {text}")

    def raise_alarm(self, alarm: Alarm, step: int | None) -> None:
        """Write an alarm or warning to the log and show it."""
        self.report(alarm.what, alarm.text, alarm.level, step, alarm.about)

    def log_standstills(self, step: int) -> None:
        """Log that the process stood still since the last call, in or before this step."""
        for event in self.standstill.new():
            self.log.write(event.model_copy(update={"step": step}))
            self.display.say(f"! {event.text}")

    def log_compilation(self, step: int, seconds: float) -> None:
        """Log the time of a recompilation at this step, as it is not part of the step's time."""
        if seconds > 0:
            self.log.write(Compile(step=step, seconds=seconds, mode="compiled"))
            self.display.say(f"recompiled at step {step:,}: {format_seconds(seconds)}")

    def log_sensors(self, step: int) -> None:
        """Log sensor readings since the last call and lost sensors, and raise alarms on them."""
        for change in self.sensors.changes():
            if change.midway:
                self.report("absent", f"{change.text}.", "warning", step, change.field)
            else:
                self.log_event("absent", f"{change.text}.", "info", step, change.field)
        for reading in self.sensors.readings():
            self.log.write(reading)
            self.display.sensor(reading)
            if reading.energy_joules is not None:
                self.energy_joules = reading.energy_joules
            for alarm in self.alarms.sensor(reading):
                self.raise_alarm(alarm, step)

    def close_sensors(self, step: int) -> None:
        """Stop reading the sensors and log the last readings."""
        for reading in self.sensors.close():
            self.log.write(reading)
        self.log_sensors(step)
