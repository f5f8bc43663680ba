"""Steps and evaluations parsed from the log of another program, grouped by process."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from nanogauge.analysis.measured import NOT_IN_LOG
from nanogauge.errors import BadInput
from nanogauge.importers.text import quoted
from nanogauge.schema import Event, LogLine


@dataclass(frozen=True)
class LoggedStep:
    """One optimizer step; None for what its line does not contain."""

    step: int
    """Number of the step, from 0."""
    loss: float | None = None
    """Training loss in nats; NaN or infinite where the program printed that."""
    seconds: float | None = None
    mfu: float | None = None
    """MFU as a fraction, by the program's own count."""
    tokens_per_second: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    elapsed_seconds: float | None = None
    """Time since the process started."""


@dataclass(frozen=True)
class LoggedEvaluation:
    """One evaluation; None for what its line does not contain."""

    step: int
    """Number of updates before it, which is the number of the step that follows."""
    train_loss: float | None = None
    val_loss: float | None = None
    bits_per_byte: float | None = None
    seconds: float | None = None
    elapsed_seconds: float | None = None


@dataclass
class LoggedProcess:
    """The log of one process of a run."""

    line: int
    """Number of its first line."""
    start_logged: bool
    """True if the log contains its start; a log may begin in the middle of a run."""
    steps: list[LoggedStep] = field(default_factory=list)
    evaluations: list[LoggedEvaluation] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    """Numbers of updates before each checkpoint."""
    settings: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Its configuration as printed: name -> number of the line, value."""
    other_lines: list[LogLine] = field(default_factory=list)
    """Compilations, sensor readings and checkpoints that need no conversion."""
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    training_seconds: float | None = None
    """Training time by the program's own sum."""
    accuracy: tuple[int, float] | None = None
    """Last HellaSwag evaluation: number of updates before it, accuracy as a fraction."""
    unix_time: float | None = None
    """When it started."""

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
        return max(done, *(e.step for e in self.evaluations[-1:]), 0)


@dataclass(frozen=True)
class Format:
    """What the log of one program contains."""

    source: Literal["nanogpt_log", "nanochat_log", "build_nanogpt_log", "wandb_history"]
    program: str
    what: str
    """Description of the file to give, for messages."""
    evaluation_inside: bool
    """True if a step's time includes the evaluation, checkpoint and sampling before it."""
    compilation_inside: bool
    """True if the time of a process's first step includes compilation."""
    note: str
    """Limits of the import, for machine.json."""
    events: Callable[[list[LoggedProcess]], list[Event]]
    """Returns the remarks about a run for its report."""


@dataclass
class ParsedLog:
    """A log file after reading."""

    format: Format
    processes: list[LoggedProcess]
    events: list[Event]
    """Remarks about the file for the report."""
    machine: dict[str, object] = field(default_factory=dict)
    """Entries for machine.json."""


class Collector:
    """Collect the records of a log in order and group them by process.

    A process begins where step numbers fall back, or after a line that a program prints at its
    start. A record equal to the one before is a repeated line, not a repeated step.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._processes: list[LoggedProcess] = []
        self._damaged: tuple[int, str] | None = None
        self._settings: dict[str, tuple[int, str]] = {}
        self._start_line: int | None = None
        self._resumed = False
        self._previous: LoggedStep | LoggedEvaluation | None = None
        self._early_lines: list[LogLine] = []

    def begin_process(self, line: int, resumed: bool = False, restarted: bool = False) -> None:
        """Record a line that a program prints before its first step.

        Args:
            line: its number.
            resumed: the line says that a run is resumed.
            restarted: the process that printed the last such lines has ended without a step.
        """
        self._refuse_damage()
        if self._start_line is None or restarted:
            self._start_line, self._settings, self._resumed = line, {}, False
        self._resumed |= resumed

    def add_setting(self, line: int, name: str, value: str) -> None:
        """Record a configuration value that was printed before the first step."""
        self._settings[name] = (line, value)

    def add_step(self, line: int, record: LoggedStep) -> None:
        process = self._process_of(line, record)
        if process is not None:
            process.steps.append(record)

    def add_evaluation(self, line: int, record: LoggedEvaluation) -> None:
        process = self._process_of(line, record)
        if process is not None:
            process.evaluations.append(record)

    def add_line(self, line: LogLine) -> None:
        """Record a line that needs no conversion; before any step it is the next process's."""
        (self._early_lines if self.current is None else self.current.other_lines).append(line)

    def add_checkpoint(self) -> None:
        """Record a checkpoint at the position of the last evaluation."""
        if self.current is not None and self.current.evaluations:
            step = self.current.evaluations[-1].step
            if step not in self.current.checkpoints[-1:]:
                self.current.checkpoints.append(step)

    def mark_damaged(self, line: int, text: str) -> None:
        """Record a cut or damaged line.

        Raises:
            BadInput: if there was one before; only the last line of a log may be damaged.
        """
        self._refuse_damage()
        self._damaged = (line, text)

    @property
    def current(self) -> LoggedProcess | None:
        """The process of the last record; None before the first record of a process."""
        return self._processes[-1] if self._processes and self._start_line is None else None

    def finish(
        self, format: Format, too_long: list[int], example: str, steps_needed: bool = True
    ) -> ParsedLog:
        """Return the collected processes.

        Raises:
            BadInput: if there is no step.
        """
        if not any(p.steps or not steps_needed for p in self._processes):
            raise BadInput(
                f"{self._path} is no {format.program} log: it has no line like '{example}'."
            )
        events = []
        if self._damaged is not None:
            line, text = self._damaged
            message = f"Line {line:,}, the last of the log, is cut and left out: {quoted(text)}."
            events.append(warning("cut_line", message))
        if too_long:
            numbers = ", ".join(f"{n:,}" for n in too_long[:5])
            more = " and others" if len(too_long) > 5 else ""
            message = f"Skipped, too long for a line of a training log: line {numbers}{more}."
            events.append(warning("long_line", message))
        return ParsedLog(format, self._processes, events)

    def _process_of(self, line: int, record: LoggedStep | LoggedEvaluation) -> LoggedProcess | None:
        """Return the process that logged a record; None for a repeated line."""
        self._refuse_damage()
        start_line, settings, resumed = self._start_line, self._settings, self._resumed
        self._start_line, self._settings, self._resumed = None, {}, False
        process = self._processes[-1] if self._processes else None
        if process is not None:
            if start_line is None and self._previous == record:
                return None
            is_step = isinstance(record, LoggedStep)
            # The evaluation numbered k comes before step k, so that either may follow the other.
            earlier = [s.step for s in process.steps[-1:]]
            earlier += [e.step - is_step for e in process.evaluations[-1:]]
            # Numbers that rise after a start: delayed output of another rank.
            if record.step > max(earlier) and not resumed:
                self._previous = record
                return process
        process = LoggedProcess(
            line=line if start_line is None else start_line,
            start_logged=process is not None or start_line is not None or record.step == 0,
            settings=settings,
            other_lines=self._early_lines,
        )
        self._early_lines = []
        self._processes.append(process)
        self._previous = record
        return process

    def _refuse_damage(self) -> None:
        if self._damaged is not None:
            line, text = self._damaged
            raise BadInput(
                f"line {line} of {self._path} is cut or damaged ({quoted(text)}); "
                "remove it, or give the whole log."
            )


def warning(what: str, text: str, about: str | None = None) -> Event:
    return Event(level="warning", what=what, text=text, about=about)


def not_in_log(row: str, reason: str) -> Event:
    """Return an event with the reason why a report row has no measurement."""
    return Event(what=NOT_IN_LOG, about=row, text=f"not in this log: {reason}")


def parse_number(text: str) -> float:
    """Return a printed number; commas group its digits.

    Raises:
        ValueError: if it is no number or overflows a float.
    """
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
