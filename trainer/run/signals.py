"""SIGINT and SIGTERM stop a run after its current step; a second one ends it at once."""

from __future__ import annotations

import signal
import time

SAME_REQUEST_SECONDS = 1.0
"""Signals within this time count as one request: a service manager signals each process of a group,
and parents forward the signal."""
_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """Raised when a signal arrives before the first step, when there is nothing to save."""


class StopSignal:
    """Request to stop the run, set by SIGINT or SIGTERM."""

    reason: str | None = None
    """Sentence that names the received signal; None before one is received."""
    number: signal.Signals | None = None
    repeated = False
    """Whether a second signal was received; the process then exits without waiting for uploads."""

    def __init__(self) -> None:
        self._stepping = False
        self._received_seconds = 0.0

    @property
    def exit_status(self) -> int:
        """Exit status for the process: 130 after SIGINT, 143 after SIGTERM, 0 without a signal."""
        return 0 if self.number is None else 128 + self.number

    def listen(self) -> None:
        """Handle SIGINT and SIGTERM; until let_steps_end() is called, the first raises Stopped."""
        for number in _NUMBERS:
            signal.signal(number, self._on_signal)

    def let_steps_end(self) -> None:
        """From now on store the first signal in `reason`, so that the loop stops after its step."""
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
