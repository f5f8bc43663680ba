"""Ctrl-C and SIGTERM ask a run to end after the step it is in; a second one ends it at once."""

from __future__ import annotations

import signal


class Stop:
    """Whether somebody asked the run to stop."""

    requested: str | None = None

    def listen(self) -> None:
        """Take over SIGINT and SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = f"{signal.Signals(number).name} was received"
