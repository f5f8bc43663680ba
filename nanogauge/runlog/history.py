"""What a run log holds, read: each kind of line by itself, and what follows from their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nanogauge.runlog.table import Table
from nanogauge.schema import (
    Benchmark,
    Checkpoint,
    Compile,
    End,
    Eval,
    Event,
    LogLine,
    Rank,
    Sensor,
    Start,
    Step,
)

LONGEST_GAP_SECONDS = 366 * 86_400.0
"""between two processes; what the clocks say beyond it, or below nothing, is a clock that was set
"""


@dataclass
class Startup:
    """A process up to its first step."""

    booked_seconds: float = 0.0
    """evaluation and compilation in it, which have a time of their own"""
    compile_seconds: float = 0.0
    """of these: compilation"""
    first_step_began: float | None = None
    """on the clock of the process; None where it made no step, or the log has no clock"""


@dataclass
class LostWork:
    """What a start line undid: work from the step on that it names, which is made again."""

    steps: int = 0
    seconds: float = 0.0
    """of these steps, and of evaluations and checkpoints, as far as they have a time"""


@dataclass
class Recorded:
    """A run log, read: each kind of line in the order in which it was written."""

    starts: list[Start] = field(default_factory=list)
    compiles: list[Compile] = field(default_factory=list)
    steps: Table[Step] = field(default_factory=lambda: Table(Step))
    ranks: Table[Rank] = field(default_factory=lambda: Table(Rank))
    evals: list[Eval] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    sensors: Table[Sensor] = field(default_factory=lambda: Table(Sensor))
    events: list[Event] = field(default_factory=list)
    benchmarks: list[Benchmark] = field(default_factory=list)
    """the newest of each name, metric and model that was held against it"""
    ends: list[End] = field(default_factory=list)
    processes: list[list[Start]] = field(default_factory=list)
    """the start lines of each process: one, and one more for each time it went back by itself"""
    losses: list[LostWork] = field(default_factory=list)
    """of each start line"""
    story: list[tuple[int, Start | Event | End]] = field(default_factory=list)
    """these lines in the order of the log, each with the number of its process"""
    first_readings: list[int] = field(default_factory=list)
    """where in sensors the readings of each process begin"""
    session_seconds: list[float | None] = field(default_factory=list)
    """wall time of each process up to its last line; None where the log has no clock"""
    startups: list[Startup] = field(default_factory=list)
    """of each process"""
    end: End | None = None
    """how the last process ended; None where it died, or is still running"""
    cut: bool = False
    """the last line was cut in the middle: the run died while it wrote it"""

    @property
    def lost_steps(self) -> int:
        """Steps that were made again, from the checkpoint at which the run went on."""
        return sum(loss.steps for loss in self.losses)

    @property
    def lost_seconds(self) -> float:
        """Of all that was made again: of the lines that were made first."""
        return sum(loss.seconds for loss in self.losses)

    @property
    def gap_seconds(self) -> list[float | None]:
        """Between each process and the next: from its last line until the clock of the next began.

        None where the log does not tell the time of day, or where the clock that tells it was set
        meanwhile, so that the next process began before the last one ended, or a year later.
        """
        gaps: list[float | None] = []
        for number, starts in enumerate(self.processes[1:], start=1):
            seconds, before = self.session_seconds[number - 1], self.processes[number - 1][-1]
            ended, began = process_began(before), process_began(starts[0])
            gap = None
            if seconds is not None and ended is not None and began is not None:
                gap = began - (ended + seconds)
            known = gap is not None and 0 <= gap <= LONGEST_GAP_SECONDS
            gaps.append(gap if known else None)
        return gaps

    def add(self, line: LogLine) -> None:
        """File one line under its kind; a step or evaluation done again replaces the first one."""
        match line:
            case Start():
                self.starts.append(line)
                self.end = None
                if line.continues and self.processes:
                    self.processes[-1].append(line)
                else:
                    self.processes.append([line])
                    self.first_readings.append(len(self.sensors))
                    self.session_seconds.append(line.elapsed_seconds)
                    self.startups.append(Startup())
                self._go_back_to(line.first_step)
            case Compile():
                self.compiles.append(line)
                self._booked(line)
            case Step():
                self.steps.append(line)
                self._stepped([vars(line)])
            case Rank():
                self.ranks.append(line)
            case Eval():
                again = [e for e in self.evals if e.step == line.step]
                self.losses[-1].seconds += sum(e.seconds or 0.0 for e in again)
                self.evals = [e for e in self.evals if e.step != line.step] + [line]
                self._booked(line)
            case Checkpoint():
                self.checkpoints.append(line)
            case Sensor():
                self.sensors.append(line)
            case Event():
                self.events.append(line)
            case Benchmark():
                key = line.name, line.metric, line.against
                kept = [b for b in self.benchmarks if (b.name, b.metric, b.against) != key]
                self.benchmarks = [*kept, line]
            case End():
                self.ends.append(line)
                self.end = line
        if isinstance(line, Start | Event | End):
            self.story.append((len(self.processes) - 1, line))
        self._passed(line.elapsed_seconds)

    def add_numbers(
        self, kind: str, rows: Sequence[dict[str, Any]], elapsed_seconds: float | None
    ) -> None:
        """File lines of a kind that comes by the thousand, by their fields alone.

        Args:
            kind: step or sensor.
            rows: the fields of each.
            elapsed_seconds: of the newest line that has any.

        Raises:
            ValueError: if one of them does not make such a line; then none is filed.
        """
        table = self.steps if kind == "step" else self.sensors
        table.extend_values(rows)
        if kind == "step":
            self._stepped(rows)
        self._passed(elapsed_seconds)

    def _go_back_to(self, first_step: int) -> None:
        """Forget what is made again from this step on, but for the time it took."""
        loss = LostWork()
        last = self.steps.last("step")
        if last is not None and last >= first_step:
            loss.steps = int(last) + 1 - first_step
        while (last := self.steps.last("step")) is not None and last >= first_step:
            loss.seconds += self.steps.last("step_seconds") or 0.0
            self.steps.cut(len(self.steps) - 1)
        loss.seconds += sum(e.seconds or 0.0 for e in self.evals if e.step > first_step)
        loss.seconds += sum(c.seconds or 0.0 for c in self.checkpoints if c.step > first_step)
        self.losses.append(loss)
        self.evals = [e for e in self.evals if e.step <= first_step]
        self.checkpoints = [c for c in self.checkpoints if c.step <= first_step]

    def processes_of_readings(self) -> npt.NDArray[np.int64]:
        """Of each sensor reading the number of its process, (readings,)."""
        places = np.arange(len(self.sensors))
        return np.searchsorted(self.first_readings, places, side="right") - 1

    def _booked(self, line: Compile | Eval) -> None:
        startup = self.startups[-1]
        if startup.first_step_began is None:
            startup.booked_seconds += line.seconds or 0.0
            if isinstance(line, Compile) and line.step is None:
                startup.compile_seconds += line.seconds

    def _stepped(self, rows: Sequence[Mapping[str, Any]]) -> None:
        startup = self.startups[-1]
        if startup.first_step_began is not None:
            return
        for values in rows:
            ended = values.get("elapsed_seconds")
            if ended is not None:
                startup.first_step_began = ended - (values.get("step_seconds") or 0.0)
                return

    def _passed(self, elapsed_seconds: float | None) -> None:
        if elapsed_seconds is not None:
            self.session_seconds[-1] = elapsed_seconds


def process_began(start: Start) -> float | None:
    """When the clock of a start line's process stood at zero, in seconds since 1970.

    None where the log does not tell the time of day.
    """
    return None if start.unix_time is None else start.unix_time - (start.elapsed_seconds or 0.0)
