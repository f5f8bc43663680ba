"""What a run log holds, read: each kind of line by itself, and what follows from their order."""

from __future__ import annotations

import types
import typing
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Annotated, Any, Generic, TypeVar, overload

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
_MOST = 2**53


class Table(Sequence[_Record], Generic[_Record]):
    """Records of one model, in the order in which they came.

    A field that holds numbers is a column of float64, in which NaN stands for None: no record holds
    a NaN. Whole numbers are exact up to 2**53. The values of any other field are kept as they are,
    each distinct one once.
    """

    def __init__(self, model: type[_Record]) -> None:
        self._model = model
        self._length = 0
        self._numbers: dict[str, array[float]] = {}
        self._whole: set[str] = set()
        self._others: dict[str, array[int]] = {}
        self._checks: dict[str, TypeAdapter[Any]] = {}
        self._values: list[Any] = [None]
        self._codes: dict[str, int] = {}
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
                self._others[name] = array("q")
                self._checks[name] = TypeAdapter(info.annotation or Any)

    def append(self, record: _Record) -> None:
        self.append_values(record.__dict__)

    def append_values(self, values: Mapping[str, Any]) -> None:
        """Append a record by its fields; names that are none are passed over.

        Raises:
            ValueError: if a required field is missing, or one that holds a number holds none.
        """
        self.extend_values([values])

    def extend_values(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append many records by their fields, all of them or, where one is refused, none.

        A field at a time, which costs a tenth of what a record at a time does.

        Raises:
            ValueError: as append_values.
        """
        columns = [self._column_of(name, [row.get(name) for row in rows]) for name in self._numbers]
        codes = [self._codes_of(name, [row.get(name) for row in rows]) for name in self._others]
        for known, more in zip(self._numbers.values(), columns, strict=True):
            known.extend(more)
        for other, coded in zip(self._others.values(), codes, strict=True):
            other.extend(coded)
        self._length += len(rows)

    def _column_of(self, name: str, values: list[Any]) -> array[float]:
        """The values of a field of numbers, NaN for None."""
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
        """For each value of a field that holds no numbers its place in the list of values."""
        codes = array("q")
        for value in values:
            if value is None:
                codes.append(0)
                continue
            key = f"{name} {value!r}"
            if key not in self._codes:
                checked = self._checks[name].validate_python(value)
                self._codes[key] = len(self._values)
                self._values.append(checked)
            codes.append(self._codes[key])
        return codes

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """All values of a field of numbers, NaN where a record has none."""
        return np.frombuffer(self._numbers[name], dtype=np.float64).copy()

    def known(self, name: str) -> npt.NDArray[np.float64]:
        """The values of a field of numbers, without those that are None."""
        column = self.column(name)
        return column[~np.isnan(column)]

    def codes(self, name: str) -> tuple[npt.NDArray[np.int64], list[Any]]:
        """A field that holds no numbers: for each record the place of its value in a list."""
        return np.frombuffer(self._others[name], dtype=np.int64).copy(), self._values

    def distinct(self, name: str) -> list[Any]:
        """The different values of a field that holds no numbers; None among them if it occurs."""
        return [self._values[code] for code in sorted(set(self._others[name]))]

    def last(self, name: str) -> float | None:
        """A number of the newest record; None where it has none, or there is no record."""
        if not self._length or isnan(value := self._numbers[name][-1]):
            return None
        return value

    def cut(self, length: int) -> None:
        """Forget the records after the first so many."""
        for column in self._numbers.values():
            del column[length:]
        for codes in self._others.values():
            del codes[length:]
        self._length = min(self._length, length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table | list) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # it grows

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[_Record]:
        return (self._record(index) for index in range(self._length))

    @overload
    def __getitem__(self, index: int) -> _Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[_Record]: ...

    def __getitem__(self, index: int | slice) -> _Record | list[_Record]:
        if isinstance(index, slice):
            return [self._record(i) for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._record(index % self._length)

    def _record(self, index: int) -> _Record:
        values: dict[str, Any] = {}
        for name, column in self._numbers.items():
            value = column[index]
            if not isnan(value):
                values[name] = int(value) if name in self._whole else value
        for name, codes in self._others.items():
            if codes[index]:
                values[name] = self._values[codes[index]]
        return self._model(**values)


def _exact(numbers: list[Any]) -> bool:
    """Whether a column of float64 holds them exactly, where they are whole."""
    return all(type(n) is float or -_MOST <= n <= _MOST for n in (min(numbers), max(numbers)))


def _kinds(annotation: Any) -> set[Any]:
    """The types of a field that may be None, without None."""
    if typing.get_origin(annotation) is Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return {kind for part in typing.get_args(annotation) for kind in _kinds(part)}
    return set() if annotation is type(None) else {annotation}


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
