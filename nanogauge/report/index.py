"""Start page of a folder of runs: the device, start, state, time and report of each."""

from __future__ import annotations

import os
import time
from pathlib import Path
from urllib.parse import quote

from nanogauge.analysis.report_model import build_report, claims_of
from nanogauge.doctor.machine import local_time_zone
from nanogauge.errors import BadInput
from nanogauge.files import without_secrets
from nanogauge.quantities import format_range, format_seconds
from nanogauge.report.cells import MARKS, range_cell
from nanogauge.report.compare_runs import run_fields
from nanogauge.report.escape import printable
from nanogauge.report.html import date_and_time, templates, write_texts
from nanogauge.runlog.reader import FILE_NAME, last_written
from nanogauge.schema import SCHEMA, Estimate, Stored, TimeZone

REPORT_NAME = "report.html"
_RUN_FILES = {FILE_NAME, "prediction.json", "machine.json"}
"""A folder with one of these files is a run folder, perhaps a broken one."""


class Entry(Stored):
    folder: str
    """Path below the indexed folder."""
    name: str
    report: str | None
    """Relative address of its report.html; None if it has none yet."""
    log_written_unix: float | None
    """None if it has no log."""
    problem: str | None
    """Reason why the run cannot be read; all later fields are None then."""
    device: str | None = None
    started_unix: float | None = None
    time_zone: TimeZone = TimeZone()
    """Time zone of the machine that trained."""
    status: str | None = None
    state: str | None = None
    steps_done: int | None = None
    max_steps: int | None = None
    headline: str | None = None
    predicted_total: Estimate | None = None
    """Calibrated prediction of the time if there is one, else the analytic one."""
    actual_total_s: float | None = None
    """Time of a finished run."""
    projected_total_s: float | None = None
    projected_low_s: float | None = None
    projected_high_s: float | None = None
    prediction: str | None = None
    """Verdict on the predicted time: held or missed."""


def find_runs(root: Path) -> list[Path]:
    """Return every run folder below root, broken ones included; none inside another.

    Raises:
        BadInput: if root is not a folder, or is a run folder itself.
    """
    if not root.is_dir():
        raise BadInput(f"there is no folder {root}; give the one that contains the runs.")
    if _RUN_FILES & set(os.listdir(root)):
        raise BadInput(f"{root} is the folder of one run; --index takes the folder around it.")
    runs = []
    for path, folders, files in os.walk(root):
        if _RUN_FILES & set(files):
            runs.append(Path(path))
            folders.clear()
        else:
            folders[:] = sorted(name for name in folders if not name.startswith("."))
    return runs


def make_index(root: Path) -> list[Entry]:
    """Return an entry for every run below root, the newest first.

    Raises:
        BadInput: as find_runs.
    """
    entries = [_entry(root, folder) for folder in find_runs(root)]
    return sorted(entries, key=lambda e: e.started_unix or e.log_written_unix or 0.0, reverse=True)


def _printable_path(path: Path | str) -> str:
    return printable(os.fsencode(path).decode(errors="replace"))


def _entry(root: Path, folder: Path) -> Entry:
    path = folder.relative_to(root)
    has_report = (folder / REPORT_NAME).is_file()
    known = {
        "folder": _printable_path(path),
        "report": "./" + quote(os.fsencode(path / REPORT_NAME)) if has_report else None,
        "log_written_unix": last_written(folder) or None,
    }
    try:
        report, _, _ = build_report(folder, claims_of(folder, None))
    except Exception as error:  # one broken run must not hide the others
        problem = str(error)
        if not isinstance(error, BadInput):
            problem = f"it cannot be reported: {type(error).__name__}: {error}."
        return Entry(name=_printable_path(path), problem=printable(problem), **known)
    run = report.run
    total = next(row for row in report.rows if row.id == "total_seconds")
    return Entry(
        name=printable(run.name),
        problem=None,
        predicted_total=total.calibrated or total.analytic,
        actual_total_s=total.measured.value if total.measured is not None else None,
        projected_total_s=run.projected_total_s,
        projected_low_s=run.projected_low_s,
        projected_high_s=run.projected_high_s,
        prediction=total.prediction,
        **known,
        **run_fields(run),
    )


def index_json(entries: list[Entry]) -> dict[str, object]:
    return {"schema": SCHEMA, "runs": [entry.model_dump(mode="json") for entry in entries]}


def write_index(entries: list[Entry], root: Path) -> Path:
    """Write index.html into the folder of the runs and return its path.

    Raises:
        BadInput: if it cannot be written.
    """
    html = (
        templates()
        .get_template("index.html.j2")
        .render(
            folder=_printable_path(root.resolve().name) or "/",
            made=date_and_time(time.time(), local_time_zone()),
            entries=[_entry_text(entry) for entry in entries],
        )
    )
    return write_texts(root, {"index.html": without_secrets(html)})[0]


def _entry_text(entry: Entry) -> dict[str, object]:
    """Return the cells of an entry on the page."""
    actual = ""
    if entry.actual_total_s is not None:
        actual = format_seconds(entry.actual_total_s)
    elif entry.projected_low_s is not None and entry.projected_high_s is not None:
        projected = format_range("total_seconds", entry.projected_low_s, entry.projected_high_s)
        actual = f"{projected} projected"
    when = date_and_time(entry.started_unix, entry.time_zone)
    if not when and entry.log_written_unix:
        when = f"log of {date_and_time(entry.log_written_unix, entry.time_zone)}"
    return {
        "entry": entry,
        "when": when,
        "status": entry.state or entry.status,
        "steps": f"{entry.steps_done or 0:,} of {entry.max_steps or 0:,} steps",
        "predicted": range_cell("total_seconds", entry.predicted_total, ""),
        "actual": actual,
        "verdict": entry.prediction,
        "mark": MARKS.get(entry.prediction or "", ""),
    }
