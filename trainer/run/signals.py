"""SIGINT, SIGTERM and SIGHUP stop a run after its current step; a second one ends it at once."""

import os
import signal
import sys
import time
from collections.abc import Mapping

SAME_REQUEST_SECONDS = 1.0
"""Signals within this time count as one request: a service manager signals each process of a group, and parents forward
the signal."""
_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_OUTLIVES_SSH = ("TMUX", "STY", "ZELLIJ", "SLURM_JOB_ID", "INVOCATION_ID")
"""Variables of tmux, screen, zellij, Slurm and systemd, whose processes survive a dropped ssh."""


class Stopped(BaseException):
    """Raised when a signal arrives before the first step, when there is nothing to save."""


class StopSignal:
    """Request to stop the run, set by a signal, or by a thread that found a fault."""

    reason: str | None = None
    """Sentence that names the signal or the fault; None before there is one."""
    failed = False
    """Whether a fault was found, so that the run has failed."""
    number: signal.Signals | None = None
    repeated = False
    """Whether a second signal was received; the process then exits without waiting for uploads."""

    def __init__(self) -> None:
        self._stepping = False
        self._received_seconds = 0.0

    @property
    def exit_status(self) -> int:
        """Exit status for the process: 128 and the number of the signal, 0 without one."""
        return 0 if self.number is None else 128 + self.number

    def listen(self) -> None:
        """Handle the signals; until let_steps_end() is called, the first raises Stopped.

        An ignored SIGHUP (nohup) remains ignored.
        """
        for number in _NUMBERS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def fail(self, reason: str) -> None:
        """End the run after its current step as failed; may be called by any thread."""
        if self.reason is None:
            self.failed, self.reason = True, reason

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
        elif number != signal.SIGHUP and now - self._received_seconds >= SAME_REQUEST_SECONDS:
            self.repeated = True
            for each in _NUMBERS:
                signal.signal(each, signal.SIG_DFL)  # a third signal ends the process
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)


def hangup_warning(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return a warning if a dropped connection would stop the run, else None."""
    remote = "SSH_CONNECTION" in environment and sys.stdin is not None and sys.stdin.isatty()
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    if not remote or ignored or any(environment.get(name) for name in _OUTLIVES_SSH):
        return None
    return (
        "Started over ssh: if the connection drops, the run stops with a checkpoint. Within tmux "
        "or screen, or after nohup, it continues."
    )
