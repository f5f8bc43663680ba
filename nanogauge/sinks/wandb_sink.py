"""Weights & Biases: history, charts with predicted bands, alerts and verdicts; the only importer of wandb.

A row's step in W&B's history is its place, so that no row is sent twice, however often a run is resumed or uploaded.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogauge.errors import RunFailed
from nanogauge.runlog.folder import CONFIG_TOML, SPEC_NAME
from nanogauge.runspec import RunSpec
from nanogauge.schema import Prediction
from nanogauge.shell import tool_command
from nanogauge.sinks.bands import PANELS, Bands
from nanogauge.sinks.mode import Mode
from nanogauge.sinks.rows import AXES, VERDICT_COLUMNS, HistoryRow, run_config, verdict_rows
from nanogauge.sinks.sink import MirrorPosition, Outcome, Severity, Sink

if TYPE_CHECKING:
    import wandb

_INIT_SECONDS = 15.0
_VIEW = "nanogauge"
"""Name of the saved workspace, in W&B's addresses too."""
_NOTES = (
    "Measured curves with their predicted bands: the charts bands/*. Power, clocks and temperatures: gpu/*; memory: "
    "memory/*. The training process reads them itself, so that W&B's System tab is empty."
)
_FILES_AT_START = (SPEC_NAME, CONFIG_TOML, "prediction.json", "machine.json")
_REPORT = ("report.html", "report.md", "report.json")


class WandbSink(Sink):
    """Sends to W&B's server, or to its offline folder."""

    def __init__(self, options: Namespace) -> None:
        self._mode: Mode = options.mode
        self._project: str = options.project
        self._run_id: str = options.id
        self._bands = Bands()
        self._next_place = 0
        self._charted_place = -1
        """_next_place when charts were last sent."""

    def begin(self, folder: Path, spec: RunSpec, prediction: Prediction) -> None:
        self._folder = folder
        os.chdir(folder)  # so that W&B writes "." instead of its path
        self._position = MirrorPosition(folder, "wandb", self._run_id)
        run, self._offline_reason = self._init(spec.name or folder.name, run_config(spec, prediction))
        self._run = run
        self._first = self._position.place if run.offline else run.starting_step
        if not run.resumed:
            run.notes = _NOTES
        for axis in AXES:
            run.define_metric(axis, hidden=True)
        run.define_metric("*", step_metric="step")
        self._send_files(_FILES_AT_START)
        if not run.offline and find_spec("wandb_workspaces") is not None:
            # Five requests, during which rows are sent as well.
            threading.Thread(target=_save_workspace, args=(run,), daemon=True).start()

    def _init(self, name: str, config: dict[str, Any]) -> tuple[wandb.Run, str]:
        """Start W&B's run, offline if it is not available; return it and the reason for a warning."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to W&B's own maintainers
        import wandb

        settings = wandb.Settings(
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", _INIT_SECONDS)),
            console="off",
            # These would describe this process instead of the training process.
            x_disable_stats=True,
            x_save_requirements=False,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,  # host name, user name, command line
            x_disable_machine_info=True,
        )
        start = partial(
            wandb.init,
            project=self._project,
            name=name,
            id=self._run_id,
            config=config,
            settings=settings,
            resume="allow",
            dir=".",
        )
        if self._mode == "offline":
            return start(mode="offline"), ""
        try:
            return start(mode="online"), ""
        except wandb.errors.Error as error:
            # W&B's process keeps the id that failed online, and refuses it offline.
            wandb.teardown()
            quiet = self._mode == "auto" and "No API key" in str(error)
            return start(mode="offline"), "" if quiet else str(error)

    def rows(self, rows: Sequence[tuple[int, HistoryRow]]) -> None:
        evaluated = False
        for place, row in rows:
            self._bands.add(row)
            self._next_place = place + 2  # the charts may follow
            if place >= self._first:
                self._run.log(row, step=place, commit=True)
                evaluated |= any(key.startswith("eval/") for key in row)
        if evaluated:
            self._run.log(self._charts(), step=self._next_place - 1, commit=True)
            self._charted_place = self._next_place
        self._position.move(self._next_place)

    def _charts(self) -> dict[str, Any]:
        """Return the charts of all panels that have points."""
        import wandb

        charts = {}
        for name, panel in PANELS.items():
            if lines := self._bands.lines(panel):
                labels, xs, ys = zip(*lines, strict=True)
                title = f"{panel.title} ({panel.unit})"
                charts[f"bands/{name}"] = wandb.plot.line_series(xs, ys, labels, title, "step")
        return charts

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def alert(self, level: Severity, title: str, text: str) -> None:
        self._run.alert(title=title[:63], text=text, level="ERROR" if level == "alarm" else "WARN")

    def end(self, status: Outcome | None, report: Mapping[str, Any] | None) -> str:
        """Send the report; a run without one keeps that of an earlier process."""
        run = self._run
        if report is not None:
            self._send_report(report)
        run.finish(exit_code=0 if status in ("finished", "stopped") else 1)
        stored_at = Path(run.settings.sync_dir).resolve()
        warnings = []
        if self._offline_reason:
            warnings.append(
                f"W&B is not available online ({self._offline_reason.splitlines()[0].rstrip('.')}), so the "
                f"run is mirrored offline: {tool_command('wandb', 'sync', stored_at)} uploads it."
            )
        if not stored_at.is_relative_to(self._folder):
            warnings.append(f"W&B cannot write to {self._folder} and keeps its files of the run in {stored_at}.")
        if warnings:
            raise RunFailed(" ".join(warnings))
        if run.offline:
            return f"{stored_at}, which `{tool_command('wandb', 'sync')}` uploads"
        # `wandb sync` would append the rows of offline folders to those of this upload.
        for path in self._folder.glob(f"wandb/offline-run-*-{self._run_id}/run-{self._run_id}.wandb"):
            path.with_name(f"{path.name}.synced").touch()
        return str(run.url)

    def _send_report(self, report: Mapping[str, Any]) -> None:
        """Send the verdict table, the page and the last charts."""
        import wandb

        self._send_files(_REPORT)
        row = self._charts() if self._charted_place != self._next_place else {}
        row["report/verdicts"] = wandb.Table(columns=list(VERDICT_COLUMNS), data=verdict_rows(report))
        with (self._folder / "report.html").open(encoding="utf-8") as page:
            row["report/page"] = wandb.Html(page, inject=False)
        place = max(self._next_place, self._first)
        self._run.log(row, step=place, commit=True)
        self._position.move(place + 1)

    def _send_files(self, names: Sequence[str]) -> None:
        """Send copies, not links, so that an offline run can be moved before it is uploaded."""
        for name in names:
            try:
                copy = shutil.copyfile(self._folder / name, Path(self._run.dir) / name)
            except OSError as error:
                print(f"The run is mirrored without {name}: {error.strerror}.", file=sys.stderr)
            else:
                self._run.save(copy, base_path=self._run.dir, policy="now")


def _save_workspace(run: wandb.Run) -> None:
    """Save a workspace of the bands in a project that has none; one that exists is the user's to change."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws

        try:
            ws.Workspace.from_url(f"{run.project_url}?nw={_VIEW}")
        except ValueError:  # there is none
            panels = [wr.LinePlot(title=p.title, x="step", y=[*p.measured, *p.predicted]) for p in PANELS.values()]
            section = ws.Section(name="Measured and predicted", panels=panels, is_open=True)
            workspace = ws.Workspace(run.entity, run.project, name=_VIEW, sections=[section], auto_generate_panels=True)
            workspace._internal_name = f"nw-{_VIEW}-v"
            workspace.save()
    except Exception as error:
        # An optional package that may not suit this version of W&B: the run is mirrored without the workspace.
        print(f"W&B saved no workspace: {type(error).__name__} {error}.", file=sys.stderr)
