"""What a program printed of its steps and evaluations, process by process, whatever its form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from nanogauge.errors import BadInput
from nanogauge.importers.text import shown
from nanogauge.schema import Event, LogLine


@dataclass(frozen=True)
class Iteration:
    """One step, as printed; a figure that the line does not have is None."""

    number: int
    """from 0"""
    loss: float | None = None
    """nan or infinite where the program printed that"""
    seconds: float | None = None
    mfu: float | None = None
    """a fraction"""
    tokens_per_second: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    elapsed_seconds: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """An evaluation before step `number`, which is after so many updates."""

    number: int
    train_loss: float | None = None
    val_loss: float | None = None
    bits_per_byte: float | None = None
    seconds: float | None = None
    elapsed_seconds: float | None = None


@dataclass
class PrintedSession:
    """What one process printed."""

    line: int
    """number of its first line"""
    started: bool
    """its start is in the log; a log may also begin in the middle of a run"""
    iterations: list[Iteration] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    settings: dict[str, tuple[int, str]] = field(default_factory=dict)
    """what it printed of its configuration: name -> number of the line, value as printed"""
    others: list[LogLine] = field(default_factory=list)
    """readings that are lines of ours already"""
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    training_seconds: float | None = None
    """what the program itself has added up, in its own way"""
    accuracy: tuple[int, float] | None = None
    """the last HellaSwag test: after so many updates, share of right answers"""
    unix_time: float | None = None
    """when it began"""

    @property
    def first(self) -> int:
        """The first step it worked on."""
        return min(entries[0].number for entries in (self.iterations, self.evaluations) if entries)

    @property
    def steps(self) -> int:
        """Updates made since step 0 when it ended, as far as it printed."""
        after = self.iterations[-1].number + 1 if self.iterations else 0
        return max(after, *(e.number for e in self.evaluations[-1:]), 0)

    @property
    def last(self) -> int:
        """The last number it printed."""
        return max(e[-1].number for e in (self.iterations, self.evaluations) if e)


@dataclass(frozen=True)
class Form:
    """What is peculiar to a program's log."""

    source: Literal["nanogpt_log", "nanochat_log", "build_nanogpt_log", "wandb_history"]
    program: str
    what: str
    """what file to give, in words"""
    evaluation_inside: bool
    """a printed time holds the evaluation, checkpoint and sampling before the step"""
    compilation_inside: bool
    """the time of a process's first step holds compilation"""
    note: str
    """for machine.json: on what the import stands"""
    events: Callable[[list[PrintedSession]], list[Event]]
    """what is to be said of a run"""


@dataclass
class Printed:
    """A log, read: the processes that wrote it, and what is to be said of the file."""

    form: Form
    sessions: list[PrintedSession]
    events: list[Event]
    told: dict[str, object] = field(default_factory=dict)
    """for machine.json"""


class Collector:
    """Takes the records of a log in their order and cuts them into processes.

    A process begins where the numbers fall back, and after what a program prints at its start. The
    same record twice in a row was printed twice, not made twice.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sessions: list[PrintedSession] = []
        self._damaged: tuple[int, str] | None = None
        self._settings: dict[str, tuple[int, str]] = {}
        self._begins: int | None = None
        self._resumed = False
        self._last: Iteration | Evaluation | None = None
        self._early: list[LogLine] = []

    def begin(self, line: int, resumed: bool = False, anew: bool = False) -> None:
        """A line that a program prints at its start.

        Args:
            line: its number.
            resumed: it says that a run goes on.
            anew: it comes before those that were seen: the process that printed them is gone.
        """
        self._refuse_damage()
        if self._begins is None or anew:
            self._begins, self._settings, self._resumed = line, {}, False
        self._resumed |= resumed

    def setting(self, line: int, name: str, value: str) -> None:
        """What a program prints of its configuration before its first step."""
        self._settings[name] = (line, value)

    def iteration(self, line: int, entry: Iteration) -> None:
        session = self._session(line, entry)
        if session is not None:
            session.iterations.append(entry)

    def evaluation(self, line: int, entry: Evaluation) -> None:
        session = self._session(line, entry)
        if session is not None:
            session.evaluations.append(entry)

    def other(self, line: LogLine) -> None:
        """A line of our own form; before the first step of a process it is that process's."""
        (self._early if self.current is None else self.current.others).append(line)

    def checkpoint(self) -> None:
        """One that follows an evaluation."""
        if self.current is not None and self.current.evaluations:
            step = self.current.evaluations[-1].number
            if step not in self.current.checkpoints[-1:]:
                self.current.checkpoints.append(step)

    def damage(self, line: int, text: str) -> None:
        """A line that is cut or damaged; only the last of a log may be."""
        self._refuse_damage()
        self._damaged = (line, text)

    @property
    def current(self) -> PrintedSession | None:
        """The process that printed the last record; None where none did, or the next has begun."""
        return self._sessions[-1] if self._sessions and self._begins is None else None

    def finish(
        self, form: Form, too_long: list[int], example: str, steps_needed: bool = True
    ) -> Printed:
        """All that was collected.

        Raises:
            BadInput: if no step was.
        """
        if not any(s.iterations or not steps_needed for s in self._sessions):
            raise BadInput(
                f"{self._path} is no {form.program} log: it has no line like '{example}'."
            )
        events = []
        if self._damaged is not None:
            line, text = self._damaged
            said = f"Line {line:,}, the last of the log, is cut and left out: {shown(text)}."
            events.append(warning("cut_line", said))
        if too_long:
            numbers = ", ".join(f"{n:,}" for n in too_long[:5])
            more = " and others" if len(too_long) > 5 else ""
            said = f"Passed over, too long to be a line of a training log: line {numbers}{more}."
            events.append(warning("long_line", said))
        return Printed(form, self._sessions, events)

    def _session(self, line: int, entry: Iteration | Evaluation) -> PrintedSession | None:
        """The process that printed this; None where the same was printed just before."""
        self._refuse_damage()
        begins, settings, resumed = self._begins, self._settings, self._resumed
        self._begins, self._settings, self._resumed = None, {}, False
        session = self._sessions[-1] if self._sessions else None
        if session is not None:
            step = isinstance(entry, Iteration)
            same = (session.iterations if step else session.evaluations)[-1:]
            if begins is None and self._last == entry:
                return None
            # The evaluation of step k comes before step k: either may bear the number k.
            behind = [e.number for e in same]
            behind += [e.number - 1 for e in session.evaluations[-1:] if step]
            behind += [e.number for e in session.iterations[-1:] if not step]
            # Numbers that rise after a start: another rank's words, which came out late.
            if entry.number > max(behind) and not resumed:
                self._last = entry
                return session
        session = PrintedSession(
            line=line if begins is None else begins,
            started=session is not None or begins is not None or entry.number == 0,
            settings=settings,
            others=self._early,
        )
        self._early = []
        self._sessions.append(session)
        self._last = entry
        return session

    def _refuse_damage(self) -> None:
        if self._damaged is not None:
            line, text = self._damaged
            raise BadInput(
                f"line {line} of {self._path} is cut or damaged ({shown(text)}); "
                "remove it, or give the whole log."
            )


def warning(what: str, text: str, about: str | None = None) -> Event:
    return Event(level="warning", what=what, text=text, about=about)


def number_of(text: str) -> float:
    """A figure that was printed; commas group its digits.

    Raises:
        ValueError: if it is none, or too large to be one.
    """
    value = float(text.replace(",", ""))
    if math.isinf(value) and "inf" not in text.lower():
        raise ValueError
    return value


def seconds_of(text: str, unit_seconds: float = 1.0) -> float:
    """A time that was printed.

    Raises:
        ValueError: if it is not above 0: no step takes no time.
    """
    value = number_of(text) * unit_seconds
    if not 0 < value < math.inf:
        raise ValueError
    return value


def runs_of(sessions: list[PrintedSession]) -> list[list[PrintedSession]]:
    """The processes of each run: one that begins at step 0 begins a run, others resume it."""
    runs: list[list[PrintedSession]] = []
    for session in sessions:
        if not (session.iterations or session.evaluations):
            continue
        if not runs or session.first == 0:
            runs.append([])
        runs[-1].append(session)
    return [run for run in runs if any(session.iterations for session in run)] or runs[-1:]


def spacing_of(sessions: list[PrintedSession]) -> int | None:
    """The usual distance of the steps that were printed; None where there are too few."""
    between = Counter[int]()
    for session in sessions:
        numbers = [entry.number for entry in session.iterations]
        between.update(b - a for a, b in pairwise(numbers))
    return between.most_common(1)[0][0] if between.total() > 2 else None


def clocked(run: list[PrintedSession]) -> bool:
    """Whether records say when they were made."""
    clocks = [e.elapsed_seconds for session in run for e in session.iterations]
    clocks += [e.elapsed_seconds for session in run for e in session.evaluations]
    return any(clock is not None for clock in clocks)
