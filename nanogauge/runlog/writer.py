"""A file of whole lines that outlives a full disk: what it refuses waits in memory, in order."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from itertools import accumulate, islice
from pathlib import Path

WAITING_BYTES = 64 * 2**20
"""of lines that wait at most"""
THINNED_BYTES = WAITING_BYTES * 7 // 8
"""down to so much expendable lines are dropped, so that not every new line has to look for some"""
LINES_AT_ONCE = 1024


class WholeLines:
    """Appends lines to a file; at each moment it holds the first of them, each of them whole.

    A line that the disk refuses is no error: it waits, each further line tries again, and once
    there is space all that wait are written in their order. Of a line that was written in part, the
    part is cut off. Several threads may append.

    Args:
        path: the file. A line that is cut at its end is removed: it is no line.

    Raises:
        OSError: if it cannot be opened, read or cut.
    """

    def __init__(self, path: Path) -> None:
        self.refused: OSError | None = None
        """why lines wait; None while none does"""
        self.dropped = 0
        """expendable lines that were let go for want of memory, ever"""
        self._lock = threading.Lock()
        self._waiting: deque[tuple[bytes, bool]] = deque()
        self._waiting_bytes = 0
        no_link = getattr(os, "O_NOFOLLOW", 0)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | no_link, 0o644)
        self._size = path.read_bytes().rfind(b"\n") + 1
        self._torn = True
        self._mend()

    def append(self, line: bytes, expendable: bool = False) -> None:
        """Write a line, and before it those that wait; where the disk refuses them, all wait.

        Args:
            line: with its newline, and no other in it.
            expendable: it may be dropped where more than WAITING_BYTES wait.

        Raises:
            OSError: if so much waits that is not expendable. The line is not taken.
        """
        with self._lock:
            self._waiting.append((line, expendable))
            self._waiting_bytes += len(line)
            self._write()
            if self._waiting_bytes > WAITING_BYTES:
                self._thin()
            if self._waiting_bytes > WAITING_BYTES:
                assert self.refused is not None
                self._waiting.pop()
                self._waiting_bytes -= len(line)
                raise self.refused

    def close(self) -> None:
        """Try once more to write what waits, and close the file.

        Raises:
            OSError: if lines are lost, as they still cannot be written, or if the disk fails.
        """
        with self._lock:
            self._write()
            try:
                if self._waiting:
                    assert self.refused is not None
                    why, count = self.refused.strerror, len(self._waiting)
                    text = f"{why}: {count:,} lines of the log could not be written"
                    raise OSError(self.refused.errno, text)
                os.fsync(self._file)
            finally:
                os.close(self._file)

    def _write(self) -> None:
        try:
            while self._waiting:
                self._mend()
                self._write_some()
        except OSError as error:
            self.refused = self.refused or error
        else:
            self.refused = None

    def _write_some(self) -> None:
        """Write the first lines that wait, by one call.

        Raises:
            OSError: if not all of them went into the file.
        """
        lines = [line for line, _ in islice(self._waiting, LINES_AT_ONCE)]
        data = b"".join(lines)
        written = os.write(self._file, data)
        whole = 0
        for end in accumulate(map(len, lines)):
            if end > written:
                break
            whole = end
            self._waiting.popleft()
        self._size += whole
        self._waiting_bytes -= whole
        if written < len(data):
            self._torn = whole < written
            self._mend()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _mend(self) -> None:
        """Cut off what is no whole line."""
        if self._torn:
            os.ftruncate(self._file, self._size)
            self._torn = False

    def _thin(self) -> None:
        """Drop expendable lines, the oldest first."""
        kept: deque[tuple[bytes, bool]] = deque()
        for line, expendable in self._waiting:
            if expendable and self._waiting_bytes > THINNED_BYTES:
                self._waiting_bytes -= len(line)
                self.dropped += 1
            else:
                kept.append((line, expendable))
        self._waiting = kept
