"""Writing log.jsonl: one JSON object per line, append-only, robust against a full disk."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import deque
from collections.abc import Callable
from itertools import accumulate, islice
from pathlib import Path

from nanogauge.files import scrubbed
from nanogauge.runlog.reader import LOG_NAME
from nanogauge.schema import End, Event, LogLine, Start

MAX_PENDING_BYTES = 256 * 2**20
"""Limit for the lines that wait in memory while the disk is full: those of days."""
LINES_AT_ONCE = 1024


class RunLog:
    """Writes the log of one run; a context manager.

    While the disk is full lines wait in memory, up to 256 MiB, and are written in order once there is space.

    Args:
        folder: the run folder.
        elapsed_seconds: clock for the lines without a time; None to leave them without, as in an imported log.

    Raises:
        OSError: if the file cannot be opened, or on exit if lines could not be written.
    """

    def __init__(self, folder: Path, elapsed_seconds: Callable[[], float] | None = None) -> None:
        self._elapsed_seconds = elapsed_seconds
        self._lines = LineFile(folder / LOG_NAME)

    @property
    def problem(self) -> str | None:
        """A sentence while lines wait for space on the disk, else None."""
        refused = self._lines.refused
        if refused is None:
            return None
        return (
            f"{LOG_NAME} cannot be written ({refused.strerror}): its lines wait in memory, and "
            "are lost if the run ends before; free space on its disk."
        )

    def write(self, line: LogLine) -> None:
        """Append a line: pass it to the operating system, or queue it while there is a problem.

        Raises:
            OSError: if more than 256 MiB are queued.
        """
        if line.elapsed_seconds is None and self._elapsed_seconds is not None:
            line = line.model_copy(update={"elapsed_seconds": self._elapsed_seconds()})
        values = {"kind": line.kind, **line.model_dump(mode="json", exclude_none=True)}
        if isinstance(line, Start | Event | End):  # the only kinds with free text
            values = scrubbed(values)
        data = json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._lines.append(data)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._lines.close()


class SilentLog(RunLog):
    """The log of a rank other than 0, which discards its lines."""

    def __init__(self) -> None:
        """Open no file."""

    def write(self, line: LogLine) -> None:
        """Discard the line: rank 0 writes one for all ranks."""

    @property
    def problem(self) -> str | None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close no file."""


class LineFile:
    """Appends lines to a file, which at every moment holds a prefix of them, each complete.

    A line that the disk refuses is queued; each further line retries, and once there is space all are written in order.
    The written part of an incomplete line is cut off. Thread-safe.

    Args:
        path: the file; an incomplete last line in it is removed.

    Raises:
        OSError: if it cannot be opened, read or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.refused: OSError | None = None
        """Why lines are queued; None while none are."""
        self._lock = threading.Lock()
        self._queue: deque[bytes] = deque()
        self._queue_bytes = 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
        self._size = path.read_bytes().rfind(b"\n") + 1
        self._torn = True
        self._cut_torn_line()

    def append(self, line: bytes) -> None:
        """Write a line, which ends with its only newline, after those in the queue, or queue it.

        Raises:
            OSError: if the queue is full; this line is not queued.
        """
        with self._lock:
            self._queue.append(line)
            self._queue_bytes += len(line)
            self._write()
            if self._queue_bytes > MAX_PENDING_BYTES:
                assert self.refused is not None
                self._queue.pop()
                self._queue_bytes -= len(line)
                raise self.refused

    def close(self) -> None:
        """Retry the queue once and close the file.

        Raises:
            OSError: if lines of the queue are lost, or the disk fails.
        """
        with self._lock:
            self._write()
            try:
                if self._queue:
                    assert self.refused is not None
                    why, count = self.refused.strerror, len(self._queue)
                    raise OSError(self.refused.errno, f"{why}: {count:,} lines of the log could not be written")
                os.fsync(self._file)
            finally:
                os.close(self._file)

    def _write(self) -> None:
        try:
            while self._queue:
                self._cut_torn_line()
                self._write_some()
        except OSError as error:
            self.refused = self.refused or error
        else:
            self.refused = None

    def _write_some(self) -> None:
        """Write the first lines of the queue by one call; raise OSError unless all are written."""
        lines = list(islice(self._queue, LINES_AT_ONCE))
        data = b"".join(lines)
        written = os.write(self._file, data)
        complete = 0
        for end in accumulate(map(len, lines)):
            if end > written:
                break
            complete = end
            self._queue.popleft()
        self._size += complete
        self._queue_bytes -= complete
        if written < len(data):
            self._torn = complete < written
            self._cut_torn_line()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _cut_torn_line(self) -> None:
        if self._torn:
            os.ftruncate(self._file, self._size)
            self._torn = False
