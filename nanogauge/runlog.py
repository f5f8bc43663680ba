"""The append-only record of a run: nothing else writes or reads log.jsonl.

One JSON object a line, the first key "kind". Each line is written by one call, so that a run that
is killed leaves whole lines, and at most one cut line at the very end.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from nanogauge.errors import BadInput
from nanogauge.records import (
    Benchmark,
    Checkpoint,
    Compile,
    End,
    Eval,
    Event,
    LogLine,
    Sensor,
    Start,
    Step,
)
from nanogauge.table import Table

FILE_NAME = "log.jsonl"
LONGEST_LINE = 2**24
"""bytes; the longest that a run writes is a sample of text"""
BLOCK_LINES = 4096
"""steps and sensor readings that are filed together"""
_LINE: TypeAdapter[LogLine] = TypeAdapter(LogLine)


class RunLog:
    """Writes the log of one run; a context manager.

    Args:
        folder: the run folder.
        elapsed_seconds: the clock that stamps each line which has no time of its own; without it
            lines stay without one, as in an imported log.
    """

    def __init__(self, folder: Path, elapsed_seconds: Callable[[], float] | None = None) -> None:
        self._elapsed_seconds = elapsed_seconds
        path = folder / FILE_NAME
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        whole = path.read_bytes().rfind(b"\n") + 1
        os.ftruncate(self._descriptor, whole)  # a line cut by a crash is no record

    def write(self, line: LogLine) -> None:
        """Append one line; the operating system has it when this returns.

        Raises:
            OSError: if the disk is full or the file cannot be written.
        """
        if line.elapsed_seconds is None and self._elapsed_seconds is not None:
            line = line.model_copy(update={"elapsed_seconds": self._elapsed_seconds()})
        values = {"kind": line.kind, **line.model_dump(mode="json", exclude_none=True)}
        data = json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if os.write(self._descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, "the disk is full: a log line could not be written whole")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.fsync(self._descriptor)
        os.close(self._descriptor)


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
class Recorded:
    """A run log, read: each kind of line in the order in which it was written."""

    starts: list[Start] = field(default_factory=list)
    compiles: list[Compile] = field(default_factory=list)
    steps: Table[Step] = field(default_factory=lambda: Table(Step))
    evals: list[Eval] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    sensors: Table[Sensor] = field(default_factory=lambda: Table(Sensor))
    events: list[Event] = field(default_factory=list)
    benchmarks: list[Benchmark] = field(default_factory=list)
    """the newest of each name, metric and model that was held against it"""
    ends: list[End] = field(default_factory=list)
    session_seconds: list[float | None] = field(default_factory=list)
    """wall time of each process up to its last line; None where the log has no clock"""
    startups: list[Startup] = field(default_factory=list)
    """of each process"""
    lost_steps: int = 0
    """steps that a later process made again, from the checkpoint it went on from"""
    lost_seconds: float = 0.0
    """of these steps, and of evaluations and checkpoints done again: of the lines that were made
    first, as far as they have a time"""
    end: End | None = None
    """how the last process ended; None where it died, or is still running"""
    cut: bool = False
    """the last line was cut in the middle: the run died while it wrote it"""

    def add(self, line: LogLine) -> None:
        """File one line under its kind; a step or evaluation done again replaces the first one."""
        match line:
            case Start():
                self.starts.append(line)
                self.end = None
                self.session_seconds.append(line.elapsed_seconds)
                self.startups.append(Startup())
                self._go_back_to(line.first_step)
            case Compile():
                self.compiles.append(line)
                self._booked(line)
            case Step():
                self.steps.append(line)
                self._stepped([vars(line)])
            case Eval():
                again = [e for e in self.evals if e.step == line.step]
                self.lost_seconds += sum(e.seconds or 0.0 for e in again)
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
        last = self.steps.last("step")
        if last is not None and last >= first_step:
            self.lost_steps += int(last) + 1 - first_step
        while (last := self.steps.last("step")) is not None and last >= first_step:
            self.lost_seconds += self.steps.last("step_seconds") or 0.0
            self.steps.cut(len(self.steps) - 1)
        self.lost_seconds += sum(e.seconds or 0.0 for e in self.evals if e.step > first_step)
        self.lost_seconds += sum(c.seconds or 0.0 for c in self.checkpoints if c.step > first_step)
        self.evals = [e for e in self.evals if e.step <= first_step]
        self.checkpoints = [c for c in self.checkpoints if c.step <= first_step]

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


def lines_of(data: bytes, path: Path) -> Iterator[LogLine | None]:
    """Parse the bytes of a log; a last line without its newline yields None.

    Raises:
        BadInput: for a line that is damaged in any other way, with its number.
    """
    pieces = data.split(b"\n")
    for number, piece in enumerate(pieces, start=1):
        if number == len(pieces):
            if piece:
                yield None
            return
        try:
            yield _LINE.validate_json(piece)
        except ValidationError:
            raise _damaged(number, path) from None


def _damaged(number: int, path: Path) -> BadInput:
    return BadInput(
        f"line {number} of {path} is damaged; "
        "restore the file, or remove that line to report on the others."
    )


class LogReader:
    """Reads the log of a run folder, and later only what was appended since.

    A log that was replaced or shortened meanwhile is read from its beginning again.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._begin()

    def _begin(self) -> None:
        self._recorded = Recorded()
        self._lines = 0
        self._offset = 0
        self._first = self._last = b""
        self._block = _Block(self._recorded, self._path)

    def read(self) -> Recorded:
        """All that is in the log by now; a last line that is not whole yet is no part of it.

        Raises:
            BadInput: if there is no log, it holds no whole line, a line is damaged, or it does not
                begin with a start line.
        """
        try:
            with self._path.open("rb") as file:
                if not self._is_the_same(file):
                    self._begin()
                    file.seek(0)
                self._read_on(file)
                self._block.file()
        except BadInput:
            self._begin()  # what was read of the block is not in the tables
            raise
        except FileNotFoundError:
            raise BadInput(
                f"{self._path.parent} is not a run folder: it has no {FILE_NAME}; "
                "give the folder of a run."
            ) from None
        except OSError as error:
            raise BadInput(f"cannot read {self._path}: {error.strerror}.") from None
        if not self._recorded.starts:
            raise BadInput(f"{self._path} holds no whole line: the run had not begun yet.")
        return self._recorded

    def _is_the_same(self, file: BinaryIO) -> bool:
        """Whether the log is the one that was read so far; leaves the file where reading goes on.

        Its first line holds the hash of the run's prediction.
        """
        begins = file.read(len(self._first)) == self._first
        file.seek(self._offset - len(self._last))
        return begins and file.read(len(self._last)) == self._last

    def _read_on(self, file: BinaryIO) -> None:
        self._recorded.cut = False
        while piece := file.readline(LONGEST_LINE):
            if not piece.endswith(b"\n"):
                if len(piece) == LONGEST_LINE:
                    raise _damaged(self._lines + 1, self._path)
                self._recorded.cut = True
                return
            self._block.take(piece, self._lines + 1)
            self._lines += 1
            self._offset += len(piece)
            self._first = self._first or piece
            self._last = piece


def read_log(folder: Path) -> Recorded:
    """Read the log of a run folder.

    Raises:
        BadInput: as LogReader.read.
    """
    return LogReader(folder).read()


def last_written(folder: Path) -> float:
    """When the log was last written to, in seconds since 1970; 0 where there is none."""
    try:
        return (folder / FILE_NAME).stat().st_mtime
    except OSError:
        return 0.0


class _Block:
    """Files the lines of a log: steps and sensor readings, of which there are many, together."""

    def __init__(self, recorded: Recorded, path: Path) -> None:
        self._recorded = recorded
        self._path = path
        self._waiting: dict[str, list[tuple[int, dict[str, Any]]]] = {"step": [], "sensor": []}
        self._count = 0
        self._elapsed: float | None = None

    def take(self, piece: bytes, number: int) -> None:
        """Read one line.

        Raises:
            BadInput: if it, or one that waits, is damaged, or the first one is no start line.
        """
        try:
            values = from_json(piece, allow_inf_nan=False, cache_strings="keys")
            kind = str(values.get("kind")) if isinstance(values, dict) else ""
            line = None if kind in self._waiting else _LINE.validate_json(piece)
        except ValueError:
            self.file()  # of two damaged lines, the first is named
            raise _damaged(number, self._path) from None
        if not self._recorded.starts and not isinstance(line, Start):
            raise BadInput(f"{self._path} does not begin with a start line; it is no log of a run.")
        if line is not None:
            self.file()
            self._recorded.add(line)
            return
        self._waiting[kind].append((number, values))
        self._elapsed = values.get("elapsed_seconds", self._elapsed)
        self._count += 1
        if self._count == BLOCK_LINES:
            self.file()

    def file(self) -> None:
        """File the lines that wait.

        Raises:
            BadInput: if one of them is damaged, with its number.
        """
        refused: list[int] = []
        for kind, waiting in self._waiting.items():
            if not waiting:
                continue
            try:
                rows = [values for _, values in waiting]
                self._recorded.add_numbers(kind, rows, self._elapsed)
            except ValueError:
                refused.append(self._first_damaged(kind))
            waiting.clear()
        if refused:
            raise _damaged(min(refused), self._path)
        self._count, self._elapsed = 0, None

    def _first_damaged(self, kind: str) -> int:
        """Of a block that is refused, the line that is to blame."""
        for number, values in self._waiting[kind]:
            try:
                self._recorded.add_numbers(kind, [values], None)
            except ValueError:
                return number
        raise AssertionError("a block is refused for one of its lines")
