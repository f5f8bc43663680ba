"""Ctrl-C and SIGTERM ask a run to end after the step it is in; a second one ends it at once."""

from __future__ import annotations

import signal
import time

ONE_REQUEST_SECONDS = 1.0
"""a service manager sends a signal to each of its processes, and those pass it on: what comes again
within so long is the same request"""
_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal ended the start of a run, of which nothing can be kept."""


class Stop:
    """Whether somebody asked the run to stop."""

    requested: str | None = None
    number: signal.Signals | None = None
    twice = False
    """whether it was asked for again: nothing is waited for any more"""

    def __init__(self) -> None:
        self._stepping = False
        self._asked_seconds = 0.0

    @property
    def exit_status(self) -> int:
        """130 after SIGINT and 143 after SIGTERM, as shells have it; 0 if nobody asked."""
        return 0 if self.number is None else 128 + self.number

    def listen(self) -> None:
        """Take over SIGINT and SIGTERM: until let_steps_end() the first one raises Stopped."""
        for number in _NUMBERS:
            signal.signal(number, self._on_signal)

    def let_steps_end(self) -> None:
        """From now on the first signal is only noted, for the loop to look at."""
        self._stepping = True

    def _on_signal(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number = signal.Signals(number)
            self.requested = f"{self.number.name} was received"
            self._asked_seconds = now
            if not self._stepping:
                raise Stopped
        elif now - self._asked_seconds >= ONE_REQUEST_SECONDS:
            self.twice = True
            for each in _NUMBERS:
                signal.signal(each, signal.SIG_DFL)  # a third one need not come by here
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
