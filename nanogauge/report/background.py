"""Rewrite the report of a run under way from a background process.

python -m nanogauge.report.background runs/NAME SECONDS

The training loop never waits for this process, and its failure does not affect the run.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from pathlib import Path

from nanogauge.cli import start_module

GPU_SECONDS, CPU_SECONDS = 60.0, 300.0
"""Time between two rewrites; longer beside training on the CPU, which shares its cores."""
_EXIT_SECONDS = 60.0
"""Longest time to wait for the training process to release its run lock after its pipe closed."""


class BackgroundReport:
    """The background process as seen by the training process that started it."""

    def __init__(self, process: subprocess.Popen[bytes] | None) -> None:
        self._process = process

    @classmethod
    def start(cls, folder: Path, seconds: float) -> BackgroundReport:
        """Start rewriting the report of a run folder every `seconds`. Never raises."""
        arguments = (str(folder.resolve()), str(seconds))
        try:
            null = subprocess.DEVNULL
            return cls(start_module("nanogauge.report.background", arguments, null))
        except OSError:
            return cls(None)

    def stop(self) -> None:
        """Kill the process, so that the caller can write the final report."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10.0)


def rewrite_until_parent_exits(folder: Path, seconds: float) -> None:
    """Rewrite the report periodically, and a last time after the training process has died."""
    os.nice(19)
    is_running = True
    has_written = False
    reader = None
    while is_running:
        # Standard input reaches its end when the training process exits, however it dies.
        is_running = not select.select([sys.stdin], [], [], seconds)[0]
        if not is_running and not (has_written and _is_released(folder)):
            return
        # Imported late: a run shorter than `seconds` does not pay for it.
        from nanogauge.analysis.report_model import build_report, claims_of
        from nanogauge.report.html import write_report
        from nanogauge.runlog.reader import LogReader

        reader = reader or LogReader(folder)
        # Any error: the next attempt, or train.py at the end of the run, reports a lasting one.
        with contextlib.suppress(Exception):
            write_report(*build_report(folder, claims_of(folder, None), reader))
            has_written = True


def _is_released(folder: Path) -> bool:
    """Wait until no process holds the run lock; False if one still does, as after a restart."""
    from nanogauge.runlog.lock import is_locked

    deadline = time.monotonic() + _EXIT_SECONDS
    while is_locked(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not is_locked(folder)


if __name__ == "__main__":
    rewrite_until_parent_exits(Path(sys.argv[1]), float(sys.argv[2]))
