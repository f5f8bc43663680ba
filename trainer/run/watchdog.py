"""End a run that hangs, for example on a driver that does not respond or a lost disk.

A thread checks every few seconds for a heartbeat of the loop. After too long without one it writes the stack of every
thread to hang.txt and ends the process with status 1, so that --supervise restarts it from its newest checkpoint.

It counts its checks and reads no clock: a check that is late because the machine slept or the process was stopped
(Ctrl-Z) counts once. A C function that holds Python's interpreter lock for ever also blocks this thread, and is not
detected.
"""

import contextlib
import faulthandler
import os
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

HANG_NAME = "hang.txt"
LONGEST_CHECK_SECONDS = 5.0
CHECKS = 8
"""Minimum number of checks within the time limit, so that a hang is found at most 1/8 late."""
DUMP_SECONDS = 30.0
"""Time for writing hang.txt; if the disk hangs, the process ends without it."""
_STDERR = 2


class Watchdog:
    """Thread that ends the process when the training loop sends no heartbeats.

    Args:
        folder: the run folder; hang.txt is appended to there.
        limit_seconds: time without a heartbeat that counts as a hang; 0 for none.
        log: writes a sentence about the hang to the log before the process ends.
    """

    def __init__(self, folder: Path, limit_seconds: float, log: Callable[[str], None]) -> None:
        self._path = folder / HANG_NAME
        self._limit_seconds, self._log = limit_seconds, log
        self._check_seconds = min(limit_seconds / CHECKS, LONGEST_CHECK_SECONDS)
        self._beat = [0.0]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, expect_seconds: float = 0.0) -> None:
        """Send a heartbeat; the next may come expect_seconds later than the limit allows."""
        self._beat = [expect_seconds]

    def start(self) -> None:
        """Start the thread, unless the limit is 0."""
        if self._limit_seconds > 0:
            self.beat()
            self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()

    def _watch(self) -> None:
        heard, silent_seconds = self._beat, 0.0
        while not self._closed.wait(self._check_seconds):
            beat = self._beat
            silent_seconds = 0.0 if beat is not heard else silent_seconds + self._check_seconds
            heard = beat
            if silent_seconds >= self._limit_seconds + beat[0]:
                self._end(silent_seconds)

    def _end(self, silent_seconds: float) -> None:
        """Write the stacks of all threads to hang.txt and end the process; does not return."""
        last_resort = threading.Timer(DUMP_SECONDS, os._exit, (1,))
        last_resort.daemon = True
        last_resort.start()
        try:
            now = datetime.now().astimezone()
            head = f"{now:%Y-%m-%d %H:%M:%S}: no sign of life for {silent_seconds:.0f} s.\n"
            with contextlib.suppress(OSError):  # not sys.stderr, which the hung thread may lock
                os.write(_STDERR, f"\n{head}".encode())
                faulthandler.dump_traceback(_STDERR)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(head)
                file.flush()
                faulthandler.dump_traceback(file)
            self._log(
                f"The run hung: no sign of life for {silent_seconds:.0f} s; "
                f"{HANG_NAME} holds the stack of every thread."
            )
        finally:
            os._exit(1)
