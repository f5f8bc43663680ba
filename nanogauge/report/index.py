"""The start page of a folder of runs: what each was, how it ended, and where its report lies."""

from __future__ import annotations

import os
import time
from pathlib import Path
from urllib.parse import quote

from nanogauge.analysis.report_model import build_report, claims_of
from nanogauge.doctor.machine import local_time_zone
from nanogauge.errors import BadInput
from nanogauge.files import without_secrets, write_atomic
from nanogauge.quantities import format_range, format_seconds
from nanogauge.report.cells import MARKS
from nanogauge.report.compare_runs import date_and_time, printable
from nanogauge.report.html import templates
from nanogauge.runlog.reader import FILE_NAME, last_written
from nanogauge.schema import SCHEMA, Estimate, Stored, TimeZone

INDEX_NAME = "index.html"
REPORT_NAME = "report.html"
_SIGNS = {FILE_NAME, "prediction.json", "machine.json"}
"""a folder that holds one of them is, or was to be, that of a run"""


class Entry(Stored):
    folder: str
    """below the indexed one"""
    name: str
    report: str | None
    """the address of its report.html from the index; None where there is none yet"""
    log_written_unix: float | None
    """None where there is no log"""
    problem: str | None
    """why the run cannot be read; all that follows is then None"""
    device: str | None = None
    started_unix: float | None = None
    time_zone: TimeZone = TimeZone()
    """of the machine that trained"""
    status: str | None = None
    state: str | None = None
    steps_done: int | None = None
    max_steps: int | None = None
    headline: str | None = None
    predicted_total: Estimate | None = None
    """the calibrated one where there is one"""
    actual_total_s: float | None = None
    """of a finished run"""
    projected_total_s: float | None = None
    projected_low_s: float | None = None
    projected_high_s: float | None = None
    prediction: str | None = None
    """held or missed, of the total"""

    @property
    def began_unix(self) -> float:
        """When it began, or where it does not say was last heard of."""
        return self.started_unix or self.log_written_unix or 0.0


def find_runs(root: Path) -> list[Path]:
    """Every run folder below root, also a broken one; none inside another.

    Raises:
        BadInput: if root is no folder, or itself one of a run.
    """
    if not root.is_dir():
        raise BadInput(f"there is no folder {root}; give the one in which the runs lie.")
    if _SIGNS & set(os.listdir(root)):
        raise BadInput(f"{root} is the folder of one run; --index takes the folder around it.")
    found = []
    for where, folders, files in os.walk(root):
        if _SIGNS & set(files):
            found.append(Path(where))
            folders.clear()
        else:
            folders[:] = sorted(name for name in folders if not name.startswith("."))
    return found


def make_index(root: Path) -> list[Entry]:
    """What there is to say of every run below root, the newest first.

    Raises:
        BadInput: as find_runs.
    """
    entries = [_entry(root, folder) for folder in find_runs(root)]
    return sorted(entries, key=lambda entry: entry.began_unix, reverse=True)


def _entry(root: Path, folder: Path) -> Entry:
    below = folder.relative_to(root)
    report = None
    if (folder / REPORT_NAME).is_file():
        report = "./" + quote(os.fsencode(below / REPORT_NAME))
    shown = printable(os.fsencode(below).decode(errors="replace"))
    known = {"folder": shown, "report": report, "log_written_unix": last_written(folder) or None}
    try:
        built, _, _ = build_report(folder, claims_of(folder, None))
    except BadInput as error:
        return Entry(name=shown, problem=printable(str(error)), **known)
    except Exception as error:  # one broken run must not hide the others
        text = f"it cannot be reported: {type(error).__name__}: {error}."
        return Entry(name=shown, problem=printable(text), **known)
    run = built.run
    total = next(row for row in built.rows if row.id == "total_seconds")
    return Entry(
        name=printable(run.name),
        problem=None,
        device=printable(run.device),
        started_unix=run.started_unix,
        time_zone=run.time_zone,
        status=run.status,
        state=run.state,
        steps_done=run.steps_done,
        max_steps=run.max_steps,
        headline=printable(run.headline),
        predicted_total=total.calibrated or total.analytic,
        actual_total_s=total.measured.value if total.measured is not None else None,
        projected_total_s=run.projected_total_s,
        projected_low_s=run.projected_low_s,
        projected_high_s=run.projected_high_s,
        prediction=total.prediction,
        **known,
    )


def index_json(entries: list[Entry]) -> dict[str, object]:
    return {"schema": SCHEMA, "runs": [entry.model_dump(mode="json") for entry in entries]}


def write_index(entries: list[Entry], root: Path) -> Path:
    """Write index.html into the folder of the runs and return its path.

    Raises:
        BadInput: if it cannot be written.
    """
    name = printable(os.fsencode(root.resolve().name).decode(errors="replace")) or "/"
    html = (
        templates()
        .get_template("index.html.j2")
        .render(
            folder=name,
            made=date_and_time(time.time(), local_time_zone()),
            entries=[_shown(entry) for entry in entries],
        )
    )
    path = root / INDEX_NAME
    try:
        write_atomic(path, without_secrets(html).encode())
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}.") from None
    return path


def _shown(entry: Entry) -> dict[str, str | None]:
    """An entry as a person reads it."""
    predicted, actual = entry.predicted_total, ""
    if entry.actual_total_s is not None:
        actual = format_seconds(entry.actual_total_s)
    elif entry.projected_low_s is not None and entry.projected_high_s is not None:
        projected = format_range("total_seconds", entry.projected_low_s, entry.projected_high_s)
        actual = f"{projected} projected"
    return {
        "folder": entry.folder,
        "name": entry.name,
        "report": entry.report,
        "problem": entry.problem,
        "device": entry.device,
        "when": date_and_time(entry.started_unix, entry.time_zone)
        or (
            f"log of {date_and_time(entry.log_written_unix, entry.time_zone)}"
            if entry.log_written_unix
            else ""
        ),
        "status": entry.state or entry.status,
        "steps": f"{entry.steps_done or 0:,} of {entry.max_steps or 0:,} steps",
        "predicted": ""
        if predicted is None
        else format_range("total_seconds", predicted.low, predicted.high),
        "actual": actual,
        "verdict": entry.prediction,
        "mark": MARKS[entry.prediction] if entry.prediction is not None else "",
        "headline": entry.headline,
    }
