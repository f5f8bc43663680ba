"""The content of a run log in memory: a list or table for each kind of line, and derived facts."""

from __future__ import annotations

import types
import typing
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Annotated, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

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
    Stored,
)

_Record = TypeVar("_Record", bound=Stored)
_NAN = float("nan")
_EXACT = 2**53
"""Largest whole number up to which float64 is exact."""


class Table(Generic[_Record]):
    """Records of one model in order, stored by column.

    A numeric field is a column of float64 with NaN for None. Other fields are stored as codes into a list of distinct
    values.
    """

    def __init__(self, model: type[_Record]) -> None:
        self._model = model
        self._length = 0
        self._numbers: dict[str, array[float]] = {}
        self._whole: set[str] = set()
        self._codes: dict[str, array[int]] = {}
        self._checks: dict[str, TypeAdapter[Any]] = {}
        self._values: list[Any] = [None]
        self._code_of: dict[str, int] = {}
        self._required: list[str] = []
        for name, info in model.model_fields.items():
            kinds = _kinds(info.annotation)
            if name == "kind":
                continue
            if info.is_required():
                self._required.append(name)
            if kinds <= {int, float}:
                self._numbers[name] = array("d")
                if float not in kinds:
                    self._whole.add(name)
            else:
                self._codes[name] = array("q")
                self._checks[name] = TypeAdapter(info.annotation or Any)

    def append(self, record: _Record) -> None:
        self.extend_values([record.__dict__])

    def extend_values(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append records by their fields, ignoring unknown ones; if one is invalid, append none.

        Working by column takes a tenth of the time of appending single records.

        Raises:
            ValueError: if a required field is missing, or a number is non-finite or mistyped.
        """
        columns = [self._column_of(name, [row.get(name) for row in rows]) for name in self._numbers]
        codes = [self._codes_of(name, [row.get(name) for row in rows]) for name in self._codes]
        for column, more in zip(self._numbers.values(), columns, strict=True):
            column.extend(more)
        for coded, more_codes in zip(self._codes.values(), codes, strict=True):
            coded.extend(more_codes)
        self._length += len(rows)

    def _column_of(self, name: str, values: list[Any]) -> array[float]:
        """Check the values of a numeric field, and replace None by NaN."""
        kinds = set(map(type, values))
        if type(None) in kinds:
            if name in self._required:
                raise ValueError(f"{name} is missing")
            values = [_NAN if value is None else value for value in values]
            numbers = [value for value in values if value is not _NAN]
        else:
            numbers = values
        allowed = {int, type(None)} if name in self._whole else {int, float, type(None)}
        if kinds <= allowed and (int not in kinds or _exact(numbers)):
            column = array("d", values)
            if int(np.isfinite(np.frombuffer(column)).sum()) == len(numbers):
                return column
        raise ValueError(f"{name} is no finite number")

    def _codes_of(self, name: str, values: list[Any]) -> array[int]:
        """Return the codes of the values of a field that is not numeric."""
        codes = array("q")
        for value in values:
            if value is None:
                codes.append(0)
                continue
            key = f"{name} {value!r}"
            if key not in self._code_of:
                checked = self._checks[name].validate_python(value)
                self._code_of[key] = len(self._values)
                self._values.append(checked)
            codes.append(self._code_of[key])
        return codes

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """Return a numeric field of all records, NaN for None."""
        return np.frombuffer(self._numbers[name], dtype=np.float64).copy()

    def known(self, name: str) -> npt.NDArray[np.float64]:
        """Return a numeric field of the records in which it is not None."""
        column = self.column(name)
        return column[~np.isnan(column)]

    def codes(self, name: str) -> tuple[npt.NDArray[np.int64], list[Any]]:
        """Return a field that is not numeric: the code of each record, and the values by code."""
        return np.frombuffer(self._codes[name], dtype=np.int64).copy(), self._values

    def distinct(self, name: str) -> list[Any]:
        """Return the distinct values of a field that is not numeric, including None."""
        return [self._values[code] for code in sorted(set(self._codes[name]))]

    def last(self, name: str) -> float | None:
        """Return a numeric field of the newest record; None without a record."""
        if not self._length or isnan(value := self._numbers[name][-1]):
            return None
        return value

    def truncate(self, length: int) -> None:
        """Drop all records but the first `length`."""
        for column in self._numbers.values():
            del column[length:]
        for codes in self._codes.values():
            del codes[length:]
        self._length = min(self._length, length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table | list) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[_Record]:
        return (self._record(index) for index in range(self._length))

    def __getitem__(self, index: int) -> _Record:
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._record(index % self._length)

    def _record(self, index: int) -> _Record:
        values: dict[str, Any] = {}
        for name, column in self._numbers.items():
            value = column[index]
            if not isnan(value):
                values[name] = int(value) if name in self._whole else value
        for name, codes in self._codes.items():
            if codes[index]:
                values[name] = self._values[codes[index]]
        return self._model(**values)


def _exact(numbers: list[Any]) -> bool:
    """Return True if float64 holds all whole numbers among these exactly."""
    return all(type(n) is float or -_EXACT <= n <= _EXACT for n in (min(numbers), max(numbers)))


def _kinds(annotation: Any) -> set[Any]:
    """Return the types that a field may have besides None."""
    if typing.get_origin(annotation) is Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return {kind for part in typing.get_args(annotation) for kind in _kinds(part)}
    return set() if annotation is type(None) else {annotation}


LONGEST_GAP_SECONDS = 366 * 86_400.0
"""Longest plausible time between two processes; a longer or negative one means that a clock was set."""


@dataclass
class Startup:
    """Start-up of a process: the time before its first step."""

    booked_seconds: float = 0.0
    """Evaluation and compilation in it, which the time ledger counts separately."""
    compile_seconds: float = 0.0
    """Compilation in booked_seconds."""
    first_step_began: float | None = None
    """Elapsed seconds of the process; None without a step or a clock in the log."""


@dataclass
class LostWork:
    """Work that a start line discards: everything from its first_step on."""

    steps: int = 0
    seconds: float = 0.0
    """Duration of these steps, evaluations and checkpoints, as far as it is logged."""


@dataclass
class RunHistory:
    """The content of a run log: the lines of each kind in order."""

    starts: list[Start] = field(default_factory=list)
    compiles: list[Compile] = field(default_factory=list)
    steps: Table[Step] = field(default_factory=lambda: Table(Step))
    ranks: Table[Rank] = field(default_factory=lambda: Table(Rank))
    evals: list[Eval] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    sensors: Table[Sensor] = field(default_factory=lambda: Table(Sensor))
    events: list[Event] = field(default_factory=list)
    benchmarks: list[Benchmark] = field(default_factory=list)
    """Newest line for each benchmark name, metric and comparison model."""
    ends: list[End] = field(default_factory=list)
    processes: list[list[Start]] = field(default_factory=list)
    """Start lines of each process: one, and one for each rollback."""
    lost_work: list[LostWork] = field(default_factory=list)
    """Work discarded by each start line."""
    milestones: list[tuple[int, Start | Event | End]] = field(default_factory=list)
    """Start, event and end lines in log order, each with the number of its process."""
    first_sensors: list[int] = field(default_factory=list)
    """Index in `sensors` of the first reading of each process."""
    session_seconds: list[float | None] = field(default_factory=list)
    """Wall time of each process until its last line; None without a clock in the log."""
    startups: list[Startup] = field(default_factory=list)
    """Start-up of each process."""
    end: End | None = None
    """End line of the last process; None if it died or is still running."""
    truncated: bool = False
    """The last line is incomplete: the run died while writing it."""

    @property
    def steps_done(self) -> int:
        """Updates made since step 0."""
        last = self.steps.last("step")
        return self.end.steps if self.end is not None else 0 if last is None else int(last) + 1

    @property
    def lost_steps(self) -> int:
        """Steps that were repeated after resuming from a checkpoint."""
        return sum(lost.steps for lost in self.lost_work)

    @property
    def lost_seconds(self) -> float:
        """Seconds spent on work that was lost and later repeated."""
        return sum(lost.seconds for lost in self.lost_work)

    @property
    def gap_seconds(self) -> list[float | None]:
        """Time between each process's last line and the next process's start.

        None if the log has no time of day, or the system clock was set in between.
        """
        gaps: list[float | None] = []
        for number, starts in enumerate(self.processes[1:], start=1):
            seconds, before = self.session_seconds[number - 1], self.processes[number - 1][-1]
            ended, began = process_began(before), process_began(starts[0])
            gap = None
            if seconds is not None and ended is not None and began is not None:
                gap = began - (ended + seconds)
            plausible = gap is not None and 0 <= gap <= LONGEST_GAP_SECONDS
            gaps.append(gap if plausible else None)
        return gaps

    def add(self, line: LogLine) -> None:
        """Add one line; a repeated step or evaluation replaces the first one."""
        match line:
            case Start():
                self.starts.append(line)
                self.end = None
                if line.continues and self.processes:
                    self.processes[-1].append(line)
                else:
                    self.processes.append([line])
                    self.first_sensors.append(len(self.sensors))
                    self.session_seconds.append(line.elapsed_seconds)
                    self.startups.append(Startup())
                self._discard_from(line.first_step)
            case Compile():
                self.compiles.append(line)
                self._add_to_startup(line)
            case Step():
                self.steps.append(line)
                self._end_startup([vars(line)])
            case Rank():
                self.ranks.append(line)
            case Eval():
                repeated = [e for e in self.evals if e.step == line.step]
                self.lost_work[-1].seconds += sum(e.seconds or 0.0 for e in repeated)
                self.evals = [e for e in self.evals if e.step != line.step] + [line]
                self._add_to_startup(line)
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
            self.milestones.append((len(self.processes) - 1, line))
        self._set_elapsed(line.elapsed_seconds)

    def add_numbers(self, kind: str, rows: Sequence[dict[str, Any]], elapsed_seconds: float | None) -> None:
        """Add many step or sensor lines by their fields; elapsed_seconds is that of the newest.

        Raises:
            ValueError: if one is invalid; then none is added.
        """
        (self.steps if kind == "step" else self.sensors).extend_values(rows)
        if kind == "step":
            self._end_startup(rows)
        self._set_elapsed(elapsed_seconds)

    def _discard_from(self, first_step: int) -> None:
        """Drop the records from a step on, which is repeated; add their time to lost_work."""
        lost = LostWork()
        last = self.steps.last("step")
        if last is not None and last >= first_step:
            lost.steps = int(last) + 1 - first_step
        while (last := self.steps.last("step")) is not None and last >= first_step:
            lost.seconds += self.steps.last("step_seconds") or 0.0
            self.steps.truncate(len(self.steps) - 1)
        lost.seconds += sum(e.seconds or 0.0 for e in self.evals if e.step > first_step)
        lost.seconds += sum(c.seconds or 0.0 for c in self.checkpoints if c.step > first_step)
        self.lost_work.append(lost)
        self.evals = [e for e in self.evals if e.step <= first_step]
        self.checkpoints = [c for c in self.checkpoints if c.step <= first_step]

    def processes_of_readings(self) -> npt.NDArray[np.int64]:
        """Return the number of the process of each sensor reading."""
        return np.searchsorted(self.first_sensors, np.arange(len(self.sensors)), side="right") - 1

    def _add_to_startup(self, line: Compile | Eval) -> None:
        startup = self.startups[-1]
        if startup.first_step_began is None:
            startup.booked_seconds += line.seconds or 0.0
            if isinstance(line, Compile) and line.step is None:
                startup.compile_seconds += line.seconds

    def _end_startup(self, rows: Sequence[Mapping[str, Any]]) -> None:
        startup = self.startups[-1]
        if startup.first_step_began is not None:
            return
        for values in rows:
            ended = values.get("elapsed_seconds")
            if ended is not None:
                startup.first_step_began = ended - (values.get("step_seconds") or 0.0)
                return

    def _set_elapsed(self, elapsed_seconds: float | None) -> None:
        if elapsed_seconds is not None:
            self.session_seconds[-1] = elapsed_seconds


def process_began(start: Start) -> float | None:
    """Return the Unix time of the start of a process; None if the log has no time of day."""
    return None if start.unix_time is None else start.unix_time - (start.elapsed_seconds or 0.0)
