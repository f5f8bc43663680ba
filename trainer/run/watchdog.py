"""Ends a run that hangs: a driver that does not answer, a disk that is gone, a lock never released.

Such a run uses the night up without a word. A thread looks every few seconds whether the loop gave
a sign of life; after too long a silence it writes down where every thread stands, and ends the
process with status 1, so that --supervise starts it again from its newest checkpoint.

It counts its own looks and reads no clock: a look that comes late, because the machine slept or the
process was stopped (Ctrl-Z), counts as one look, on every system. A call into C that
keeps Python's interpreter lock for ever keeps this thread from running, and is not seen.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

HANG_NAME = "hang.txt"
LONGEST_LOOK_SECONDS = 5.0
LOOKS = 8
"""in the limit, at least: it is kept to within an eighth"""
LAST_WORDS_SECONDS = 30.0
"""for writing all down; where it is the disk that hangs, the process ends without"""
_STDERR = 2


class Watchdog:
    """Watches one loop from a thread of its own.

    Args:
        folder: the run folder; hang.txt is appended to there.
        limit_seconds: the silence that counts as a hang; 0 never does.
        tell: takes one sentence about the hang, in the watching thread, before the process ends.
    """

    def __init__(self, folder: Path, limit_seconds: float, tell: Callable[[str], None]) -> None:
        self._path = folder / HANG_NAME
        self._limit_seconds, self._tell = limit_seconds, tell
        self._look_seconds = min(limit_seconds / LOOKS, LONGEST_LOOK_SECONDS)
        self._beat = [0.0]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, expect_seconds: float = 0.0) -> None:
        """The loop lives; until its next beat it may be silent for so much longer."""
        self._beat = [expect_seconds]

    def start(self) -> None:
        """Watch from now on."""
        if self._limit_seconds > 0:
            self.beat()
            self._thread.start()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _watch(self) -> None:
        heard, silent_seconds = self._beat, 0.0
        while not self._closed.wait(self._look_seconds):
            beat = self._beat
            silent_seconds = 0.0 if beat is not heard else silent_seconds + self._look_seconds
            heard = beat
            if silent_seconds >= self._limit_seconds + beat[0]:
                self._end(silent_seconds)

    def _end(self, silent_seconds: float) -> None:
        """Write down where every thread stands, and end the process; does not return."""
        last_resort = threading.Timer(LAST_WORDS_SECONDS, os._exit, (1,))
        last_resort.daemon = True
        last_resort.start()
        try:
            now = datetime.now().astimezone()
            head = f"{now:%Y-%m-%d %H:%M:%S}: no sign of life for {silent_seconds:.0f} s.\n"
            with contextlib.suppress(OSError):  # and not sys.stderr, which the hung thread may hold
                os.write(_STDERR, f"\n{head}".encode())
                faulthandler.dump_traceback(_STDERR)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(head)
                file.flush()
                faulthandler.dump_traceback(file)
            self._tell(
                f"The run hung: no sign of life for {silent_seconds:.0f} s; "
                f"{HANG_NAME} holds where it stood."
            )
        finally:
            os._exit(1)
