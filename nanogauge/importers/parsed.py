"""Steps and evaluations parsed from the log of another program, grouped by process."""

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

from nanogauge.analysis.measured import NOT_IN_LOG
from nanogauge.importers.formats import Format
from nanogauge.quantities import finite
from nanogauge.schema import Eval, Event, LogLine, Step


@dataclass(frozen=True)
class LoggedStep:
    """One optimizer step, from 0; None for what its line does not contain. MFU is a fraction."""

    step: int
    loss: float | None = None
    seconds: float | None = None
    mfu: float | None = None
    tokens_per_second: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    elapsed_seconds: float | None = field(default=None, compare=False)

    def to_line(self, seconds: float | None) -> Step:
        """Return the log line of a step that took `seconds`; None if its printed time includes more."""
        return Step(
            elapsed_seconds=self.elapsed_seconds,
            step=self.step,
            loss=finite(self.loss),
            step_seconds=seconds,
            printed_seconds=self.seconds if seconds != self.seconds else None,
            learning_rate=self.learning_rate,
            grad_norm=finite(self.grad_norm),
        )


@dataclass(frozen=True)
class LoggedEvaluation:
    """One evaluation; None for what its line does not contain."""

    step: int
    """Number of updates before it, which is the number of the step that follows."""
    train_loss: float | None = None
    val_loss: float | None = None
    bits_per_byte: float | None = None
    seconds: float | None = None
    elapsed_seconds: float | None = field(default=None, compare=False)

    def to_line(self, seconds: float | None) -> Eval:
        """Return the log line of an evaluation that took `seconds`."""
        return Eval(
            elapsed_seconds=self.elapsed_seconds,
            step=self.step,
            train_loss=finite(self.train_loss),
            val_loss=finite(self.val_loss),
            val_bits_per_byte=finite(self.bits_per_byte),
            seconds=seconds,
        )


@dataclass
class LoggedProcess:
    """The log of one process of a run."""

    line: int
    """Number of its first line."""
    start_logged: bool
    """True if the log contains its start; a log may begin in the middle of a run."""
    steps: list[LoggedStep] = field(default_factory=list)
    evaluations: list[LoggedEvaluation] = field(default_factory=list)
    checkpoints: set[int] = field(default_factory=set)
    settings: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    """Its configuration as printed: key -> line, name there, value."""
    configuration_printed: bool = False
    """True if the log has the settings that differ from the program's defaults."""
    other_lines: list[LogLine] = field(default_factory=list)
    """Compilations, sensor readings and checkpoints that need no conversion."""
    # By the program's own count:
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    training_seconds: float | None = None
    total_seconds: float | None = None
    made_updates: int | None = None
    accuracy: tuple[int, float] | None = None
    """Last HellaSwag evaluation: number of updates before it, accuracy as a fraction."""

    @property
    def first_step(self) -> int:
        return min(records[0].step for records in (self.steps, self.evaluations) if records)

    @property
    def last_step(self) -> int:
        return max(records[-1].step for records in (self.steps, self.evaluations) if records)

    @property
    def updates(self) -> int:
        """Updates since step 0 at the end of its log."""
        done = self.steps[-1].step + 1 if self.steps else 0
        return max(done, *(e.step for e in self.evaluations[-1:]), self.made_updates or 0)


@dataclass
class ParsedLog:
    """A log file after reading."""

    format: Format
    processes: list[LoggedProcess]
    events: list[Event]
    """Remarks about the file for the report."""


class Collector:
    """Collect the records of a log in order and group them by process.

    A process begins where step numbers fall back, or after a line that a program prints at its start. A record equal to
    the one before is a repeated line, not a repeated step.
    """

    def __init__(self) -> None:
        self.processes: list[LoggedProcess] = []
        self.left_out: list[int] = []
        """Numbers of cut and damaged lines."""
        self._next: LoggedProcess | None = None
        """What was printed before the first step of the next process."""
        self._resumed = False
        self._previous: LoggedStep | LoggedEvaluation | None = None

    @property
    def current(self) -> LoggedProcess | None:
        """The process of the last record; None before the first record of a process."""
        return self.processes[-1] if self.processes and self._next is None else None

    def begin_process(self, line: int, resumed: bool = False, restarted: bool = False) -> None:
        """Record a line that a program prints before its first step.

        `restarted`: the process that printed the last such lines has ended without a step.
        """
        if self._next is None or restarted:
            self._next, self._resumed = LoggedProcess(line, start_logged=True), False
        self._resumed |= resumed

    def add_setting(self, line: int, key: str, name: str, value: str, of_configuration: bool = False) -> None:
        """Record a value that was printed before the first step, perhaps of the configuration."""
        assert self._next is not None
        self._next.settings[key] = (line, name, value)
        self._next.configuration_printed |= of_configuration

    def add_line(self, line: LogLine) -> None:
        """Record a line that needs no conversion; before any step it is the next process's."""
        if self.current is None and self._next is None:
            self._next = LoggedProcess(0, start_logged=False)
        process = self.current or self._next
        assert process is not None
        process.other_lines.append(line)

    def add(self, line: int, record: LoggedStep | LoggedEvaluation) -> None:
        """Record a step or an evaluation."""
        begun, resumed = self._next, self._resumed
        process = self.processes[-1] if self.processes else None
        previous, self._previous = self._previous, record
        if begun is None and previous and previous.step == record.step and previous == record:
            return
        is_step = isinstance(record, LoggedStep)
        if process is not None:
            # The evaluation numbered k comes before step k, so that either may follow the other.
            earlier = [s.step for s in process.steps[-1:]]
            earlier += [e.step - is_step for e in process.evaluations[-1:]]
        # Numbers that rise after a start: delayed output of another rank.
        if process is None or record.step <= max(earlier, default=-1) or resumed:
            known = process is not None or record.step == 0
            process = begun or LoggedProcess(line, start_logged=known)
            process.start_logged |= known
            process.line = process.line or line
            self.processes.append(process)
        (process.steps if is_step else process.evaluations).append(record)  # type: ignore[arg-type]
        self._next, self._resumed = None, False

    def remove(self, line: int, record: LoggedStep | LoggedEvaluation) -> None:
        """Remove the last record, whose line is cut."""
        process = self.processes[-1]
        for records in (process.steps, process.evaluations):
            if records and records[-1] is record:
                del records[-1]
                self.left_out.append(line)

    def finish(self, format: Format, too_long: list[int]) -> ParsedLog:
        """Return the collected processes."""
        events = []
        for what, numbers, why in (
            ("cut_line", self.left_out, "Left out, cut or damaged"),
            ("long_line", too_long, "Skipped, too long for a line of a training log"),
        ):
            if numbers:
                listed = ", ".join(f"{n:,}" for n in numbers[:5])
                more = f" and {len(numbers) - 5:,} more" if len(numbers) > 5 else ""
                events.append(warning(what, f"{why}: line {listed}{more}."))
        return ParsedLog(format, self.processes, events)


def warning(what: str, text: str, about: str | None = None) -> Event:
    return Event(level="warning", what=what, text=text, about=about)


def not_in_log(row: str, reason: str) -> Event:
    """Return an event with the reason why a report row has no measurement."""
    return Event(what=NOT_IN_LOG, about=row, text=f"not in this log: {reason}")


def parse_number(text: str) -> float:
    """Return a printed number; ValueError if it is none or too large. Commas group its digits."""
    value = float(text.replace(",", ""))
    if math.isinf(value) and "inf" not in text.lower():
        raise ValueError
    return value


def split_runs(processes: list[LoggedProcess]) -> list[list[LoggedProcess]]:
    """Group processes by run: one that starts at step 0 starts a run, the others resume it."""
    runs: list[list[LoggedProcess]] = []
    for process in processes:
        if not (process.steps or process.evaluations):
            continue
        if not runs or process.first_step == 0:
            runs.append([])
        runs[-1].append(process)
    return [run for run in runs if any(process.steps for process in run)] or runs[-1:]


def log_interval(run: list[LoggedProcess]) -> int | None:
    """Return the usual difference of successive step numbers; None for fewer than four steps."""
    differences = Counter[int]()
    for process in run:
        differences.update(b.step - a.step for a, b in pairwise(process.steps))
    return differences.most_common(1)[0][0] if differences.total() > 2 else None


def has_clock(run: list[LoggedProcess]) -> bool:
    """Return True if a record has the time since the start."""
    clocks = [s.elapsed_seconds for process in run for s in process.steps]
    clocks += [e.elapsed_seconds for process in run for e in process.evaluations]
    return any(clock is not None for clock in clocks)
