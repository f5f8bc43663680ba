"""The append-only record of a run: nothing else writes or reads log.jsonl.

One JSON object a line, the first key "kind". Each line is written by one call, so that a run that
is killed leaves whole lines, and at most one cut line at the very end.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from pydantic import TypeAdapter, ValidationError

from nanogauge.errors import BadInput
from nanogauge.records import Checkpoint, Compile, End, Eval, Event, LogLine, Sensor, Start, Step

FILE_NAME = "log.jsonl"
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
class Recorded:
    """A run log, read: each kind of line in the order in which it was written."""

    starts: list[Start] = field(default_factory=list)
    compiles: list[Compile] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    evals: list[Eval] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    sensors: list[Sensor] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    session_seconds: list[float | None] = field(default_factory=list)
    """wall time of each process up to its last line; None where the log has no clock"""
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
                self.steps = [s for s in self.steps if s.step < line.first_step]
                self.evals = [e for e in self.evals if e.step <= line.first_step]
            case Compile():
                self.compiles.append(line)
            case Step():
                self.steps.append(line)
            case Eval():
                self.evals = [e for e in self.evals if e.step != line.step] + [line]
            case Checkpoint():
                self.checkpoints.append(line)
            case Sensor():
                self.sensors.append(line)
            case Event():
                self.events.append(line)
            case End():
                self.ends.append(line)
                self.end = line
        if line.elapsed_seconds is not None:
            self.session_seconds[-1] = line.elapsed_seconds


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
            raise BadInput(
                f"line {number} of {path} is damaged; "
                "restore the file, or remove that line to report on the others."
            ) from None


def read_log(folder: Path) -> Recorded:
    """Read the log of a run folder.

    Raises:
        BadInput: if there is no log, it is empty, a line is damaged, or it does not begin with a
            start line.
    """
    path = folder / FILE_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadInput(
            f"{folder} is not a run folder: it has no {FILE_NAME}; give the folder of a run."
        ) from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}.") from None
    recorded = Recorded()
    for line in lines_of(data, path):
        if line is None:
            recorded.cut = True
        elif not recorded.starts and not isinstance(line, Start):
            raise BadInput(f"{path} does not begin with a start line; it is no log of a run.")
        else:
            recorded.add(line)
    if not recorded.starts:
        raise BadInput(f"{path} holds no whole line; the run died before it began.")
    return recorded
