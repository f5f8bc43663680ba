"""trackio: a local dashboard with the rows, alerts and verdicts that W&B has; the only importer of trackio."""

import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanogauge.errors import RunFailed
from nanogauge.runspec import RunSpec
from nanogauge.schema import Prediction
from nanogauge.shell import tool_command
from nanogauge.sinks.rows import VERDICT_COLUMNS, HistoryRow, run_config, verdict_rows
from nanogauge.sinks.sink import MirrorPosition, Outcome, Severity, Sink


class TrackioSink(Sink):
    """Writes to trackio's local folder, or to the Space or server that trackio's own variables name."""

    def __init__(self, options: Namespace) -> None:
        self._project: str = options.project
        self._run_id: str = options.id
        self._summary: dict[str, Any] = {}
        self._step = 0

    def begin(self, folder: Path, spec: RunSpec, prediction: Prediction) -> None:
        import trackio

        # trackio warns of what it cannot send, and raises nothing.
        self._warnings = warnings.catch_warnings(record=True, action="always", category=UserWarning)
        self._problems = self._warnings.__enter__()
        self._position = MirrorPosition(folder, "trackio", self._run_id)
        self._run = trackio.init(
            self._project,
            name=f"{spec.name or folder.name}-{self._run_id}",
            resume="allow",
            config=run_config(spec, prediction),
            embed=False,
            auto_log_gpu=False,  # these would describe this process
            auto_log_cpu=False,
        )

    def rows(self, rows: Sequence[tuple[int, HistoryRow]]) -> None:
        for place, row in rows:
            self._step = int(row["step"])
            if place >= self._position.place:
                self._run.log({key: value for key, value in row.items() if key != "step"}, step=self._step)
        self._position.move(rows[-1][0] + 1)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._summary |= values

    def alert(self, level: Severity, title: str, text: str) -> None:
        from trackio import AlertLevel

        self._run.alert(title, text, level=AlertLevel.ERROR if level == "alarm" else AlertLevel.WARN)

    def end(self, status: Outcome | None, report: Mapping[str, Any] | None) -> str:
        """Send the summary, which trackio has no place for, and the verdicts as the last row."""
        from trackio import Table

        last = dict(self._summary)
        if report is not None:
            last["report/verdicts"] = Table(columns=list(VERDICT_COLUMNS), data=verdict_rows(report))
        self._run.log(last, step=self._step)
        self._run.finish()
        if self._problems:
            raise RunFailed(f"trackio did not take all of the run: {self._problems[0].message}")
        return f"trackio's project {self._project}, which `{tool_command('trackio', 'show')}` shows"
