"""SIGINT and SIGTERM stop a run after its current step; a second one ends it at once."""

from __future__ import annotations

import signal
import time

SAME_REQUEST_SECONDS = 1.0
"""A service manager signals each process of a group, and parents forward the signal: signals within
this time count as one request."""
_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal ended a run before its first step; there is nothing to keep."""


class StopSignal:
    """Request to stop the run, set by a signal."""

    reason: str | None = None
    """Which signal was received; None until then."""
    number: signal.Signals | None = None
    repeated = False
    """Whether a second signal was received: do not wait for anything any more."""

    def __init__(self) -> None:
        self._stepping = False
        self._received_seconds = 0.0

    @property
    def exit_status(self) -> int:
        """130 after SIGINT and 143 after SIGTERM, as in shells; 0 without a signal."""
        return 0 if self.number is None else 128 + self.number

    def listen(self) -> None:
        """Handle SIGINT and SIGTERM: the first raises Stopped until let_steps_end() is called."""
        for number in _NUMBERS:
            signal.signal(number, self._on_signal)

    def let_steps_end(self) -> None:
        """From now on only note the first signal, for the loop to check."""
        self._stepping = True

    def _on_signal(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number = signal.Signals(number)
            self.reason = f"{self.number.name} was received"
            self._received_seconds = now
            if not self._stepping:
                raise Stopped
        elif now - self._received_seconds >= SAME_REQUEST_SECONDS:
            self.repeated = True
            for each in _NUMBERS:
                signal.signal(each, signal.SIG_DFL)  # a third signal ends the process
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
