"""The append-only record of a run: nothing else writes or reads log.jsonl.

One JSON object a line, the first key "kind". A run that is killed leaves whole lines, and at most
one cut line at the very end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from nanogauge.errors import BadInput
from nanogauge.files import open_regular, scrubbed
from nanogauge.runlog.history import Recorded
from nanogauge.runlog.writer import WholeLines
from nanogauge.schema import End, Event, LogLine, Sensor, Start

__all__ = [
    "FILE_NAME",
    "LogReader",
    "Recorded",
    "RunLog",
    "last_written",
    "lines_of",
    "read_log",
]

FILE_NAME = "log.jsonl"
LONGEST_LINE = 2**24
"""bytes; the longest that a run writes is a sample of text"""
BLOCK_LINES = 4096
"""steps and sensor readings that are filed together"""
_LINE: TypeAdapter[LogLine] = TypeAdapter(LogLine)


class RunLog:
    """Writes the log of one run; a context manager.

    A full disk is no end of a run: its lines wait in memory, up to 64 MiB of them, and are written
    in their order once there is space. Beyond that sensor readings are dropped, the oldest first,
    and an event says how many.

    Args:
        folder: the run folder.
        elapsed_seconds: the clock that stamps each line which has no time of its own; without it
            lines stay without one, as in an imported log.

    Raises:
        OSError: if the file cannot be opened; on leaving, if lines could not be written to the end.
    """

    def __init__(self, folder: Path, elapsed_seconds: Callable[[], float] | None = None) -> None:
        self._elapsed_seconds = elapsed_seconds
        self._lines = WholeLines(folder / FILE_NAME)
        self._dropped_told = 0

    @property
    def problem(self) -> str | None:
        """A sentence while lines wait, the same one until they are written; else None."""
        refused = self._lines.refused
        if refused is None:
            return None
        return (
            f"{FILE_NAME} cannot be written ({refused.strerror}): its lines wait in memory, and "
            "are lost if the run ends before; free space on its disk."
        )

    def write(self, line: LogLine) -> None:
        """Append one line; when this returns the operating system has it, or there is a problem.

        Raises:
            OSError: if more than 64 MiB wait, none of them sensor readings.
        """
        if line.elapsed_seconds is None and self._elapsed_seconds is not None:
            line = line.model_copy(update={"elapsed_seconds": self._elapsed_seconds()})
        values = {"kind": line.kind, **line.model_dump(mode="json", exclude_none=True)}
        if isinstance(line, Start | Event | End):  # the kinds with words in them, which are few
            values = scrubbed(values)
        data = json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._lines.append(data, expendable=isinstance(line, Sensor))
        dropped = self._lines.dropped - self._dropped_told
        if dropped and self._lines.refused is None:
            self._dropped_told += dropped
            text = (
                f"While the disk refused the log, {dropped:,} sensor readings were dropped for "
                "want of memory: power, clock and temperature have a gap."
            )
            self.write(Event(level="warning", what="readings_dropped", text=text))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lines.close()


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
            with open_regular(self._path) as file:
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


def has_begun(folder: Path) -> bool:
    """Whether a log is there with a whole line; a run that died before it wrote one left nothing.

    Raises:
        OSError: if there is a log that cannot be read.
    """
    try:
        with (folder / FILE_NAME).open("rb") as file:
            return file.readline(LONGEST_LINE).endswith(b"\n")
    except FileNotFoundError:
        return False


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
