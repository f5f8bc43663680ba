"""Interface of the destinations to which a run log is mirrored."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nanogauge.files import write_atomic
from nanogauge.runspec import RunSpec
from nanogauge.schema import Prediction
from nanogauge.sinks.rows import HistoryRow

SinkName = Literal["wandb", "trackio", "webhook"]
TITLES: dict[SinkName, str] = {"wandb": "W&B", "trackio": "trackio", "webhook": "Webhook"}
Severity = Literal["warning", "alarm"]
Outcome = Literal["finished", "stopped", "failed"]


class Sink:
    """A destination. The mirror process makes these five calls, and each may raise any exception or never return."""

    def begin(self, folder: Path, spec: RunSpec, prediction: Prediction) -> None:
        """Connect, before anything is sent."""

    def rows(self, rows: Sequence[tuple[int, HistoryRow]]) -> None:
        """Send one or more rows of the history, each with its place, which follows from its line in the log.

        Places ascend. A process that resumes a run begins with the first row again; the sink skips what it has.
        """

    def summary(self, values: Mapping[str, Any]) -> None:
        """Update figures of the whole run."""

    def alert(self, level: Severity, title: str, text: str) -> None:
        """Report an event of the process that the mirror belongs to."""

    def end(self, status: Outcome | None, report: Mapping[str, Any] | None) -> str:
        """Send the rest and return the run's address.

        Args:
            status: outcome of the run; None if its process died or is still running.
            report: report.json; None if the run's process died before the report was complete.

        Raises:
            RunFailed: if not all of the run is there.
        """
        raise NotImplementedError


class MirrorPosition:
    """Place up to which a run has been sent, stored in its folder for a sink that cannot report it."""

    def __init__(self, folder: Path, sink: SinkName, run_id: str) -> None:
        self._path = folder / f"{sink}.json"
        self._run_id = run_id
        self.place = 0
        # Without the file, or with that of another run, nothing has been sent.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stored = json.loads(self._path.read_bytes())
            self.place = int(stored["next_place"]) if stored["run_id"] == run_id else 0

    def move(self, place: int) -> None:
        if place > self.place:
            self.place = place
            # If it cannot be stored, the next process sends rows twice.
            with contextlib.suppress(OSError):
                data = json.dumps({"run_id": self._run_id, "next_place": place})
                write_atomic(self._path, data.encode())
