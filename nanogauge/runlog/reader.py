"""Reading log.jsonl: one JSON object per line, the first key "kind".

A run that is killed leaves complete lines, and at most one incomplete line at the end.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from nanogauge.errors import BadInput
from nanogauge.files import open_regular
from nanogauge.runlog.history import RunHistory
from nanogauge.schema import LogLine, Start

LOG_NAME = "log.jsonl"
MAX_LINE_BYTES = 2**24
"""The longest line of a run is a text sample."""
BLOCK_LINES = 4096
"""Step and sensor lines that are parsed together."""
_LINE: TypeAdapter[LogLine] = TypeAdapter(LogLine)


def lines_of(data: bytes, path: Path) -> Iterator[LogLine | None]:
    """Parse the bytes of a log; an incomplete last line yields None.

    Raises:
        BadInput: for any other damaged line, with its number.
    """
    *pieces, rest = data.split(b"\n")
    for number, piece in enumerate(pieces, start=1):
        try:
            yield _LINE.validate_json(piece)
        except ValidationError:
            raise _damaged(number, path) from None
    if rest:
        yield None


def _damaged(number: int, path: Path) -> BadInput:
    return BadInput(
        f"line {number} of {path} is damaged; restore the file, or remove that line to report on the others."
    )


class LogReader:
    """Reads the log of a run folder, and on further calls only what was appended.

    A log that was replaced or shortened is read from its beginning.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG_NAME
        self._begin()

    def _begin(self) -> None:
        self._recorded = RunHistory()
        self._lines = 0
        self._offset = 0
        self._first = self._last = b""
        self._block = _Block(self._recorded, self._path)

    def read(self) -> RunHistory:
        """Return the content of the log up to its last complete line."""
        try:
            with open_regular(self._path) as file:
                if not self._is_same(file):
                    self._begin()
                    file.seek(0)
                self._read_new(file)
                self._block.flush()
        except BadInput:
            self._begin()  # the tables lack the lines of the block
            raise
        except FileNotFoundError:
            raise BadInput(
                f"{self._path.parent} is not a run folder: it has no {LOG_NAME}; give the folder of a run."
            ) from None
        except OSError as error:
            raise BadInput(f"cannot read {self._path}: {error.strerror}.") from None
        if not self._recorded.starts:
            raise BadInput(f"{self._path} has no complete line: the run had not begun yet.")
        return self._recorded

    def _is_same(self, file: BinaryIO) -> bool:
        """Return True if the file is the log read so far, and seek to its first new byte.

        Its first line contains the hash of the run's prediction.
        """
        begins = file.read(len(self._first)) == self._first
        file.seek(self._offset - len(self._last))
        return begins and file.read(len(self._last)) == self._last

    def _read_new(self, file: BinaryIO) -> None:
        self._recorded.truncated = False
        while piece := file.readline(MAX_LINE_BYTES):
            if not piece.endswith(b"\n"):
                if len(piece) == MAX_LINE_BYTES:
                    raise _damaged(self._lines + 1, self._path)
                self._recorded.truncated = True
                return
            self._block.add(piece, self._lines + 1)
            self._lines += 1
            self._offset += len(piece)
            self._first = self._first or piece
            self._last = piece


def read_log(folder: Path) -> RunHistory:
    """Read the log of a run folder."""
    return LogReader(folder).read()


def has_begun(folder: Path) -> bool:
    """Return True if there is a log with a complete line.

    Raises:
        OSError: if there is a log that cannot be read.
    """
    try:
        with (folder / LOG_NAME).open("rb") as file:
            return file.readline(MAX_LINE_BYTES).endswith(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return False


def last_written(folder: Path) -> float:
    """Return the modification time of the log in Unix time; 0 without a log."""
    try:
        return (folder / LOG_NAME).stat().st_mtime
    except OSError:
        return 0.0


class _Block:
    """Adds lines to a history, the frequent step and sensor lines many at a time."""

    def __init__(self, recorded: RunHistory, path: Path) -> None:
        self._recorded = recorded
        self._path = path
        self._pending: dict[str, list[tuple[int, dict[str, Any]]]] = {"step": [], "sensor": []}
        self._count = 0
        self._elapsed: float | None = None

    def add(self, piece: bytes, number: int) -> None:
        """Parse one line.

        Raises:
            BadInput: if it or a pending line is damaged, or the first one is no start line.
        """
        try:
            values = from_json(piece, allow_inf_nan=False, cache_strings="keys")
            kind = str(values.get("kind")) if isinstance(values, dict) else ""
            line = None if kind in self._pending else _LINE.validate_json(piece)
        except ValueError:
            self.flush()  # the error names the first damaged line
            raise _damaged(number, self._path) from None
        if not self._recorded.starts and not isinstance(line, Start):
            raise BadInput(f"{self._path} does not begin with a start line; it is no log of a run.")
        if line is not None:
            self.flush()
            self._recorded.add(line)
            return
        self._pending[kind].append((number, values))
        self._elapsed = values.get("elapsed_seconds", self._elapsed)
        self._count += 1
        if self._count == BLOCK_LINES:
            self.flush()

    def flush(self) -> None:
        """Add the pending lines."""
        refused: list[int] = []
        for kind, pending in self._pending.items():
            if not pending:
                continue
            try:
                self._recorded.add_numbers(kind, [values for _, values in pending], self._elapsed)
            except ValueError:
                refused.append(self._first_damaged(kind))
            pending.clear()
        if refused:
            raise _damaged(min(refused), self._path)
        self._count, self._elapsed = 0, None

    def _first_damaged(self, kind: str) -> int:
        for number, values in self._pending[kind]:
            try:
                self._recorded.add_numbers(kind, [values], None)
            except ValueError:
                return number
        raise AssertionError("a block is refused for one of its lines")
