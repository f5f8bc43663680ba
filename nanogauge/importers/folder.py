"""A run folder like our own, made of a log that another program wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nanogauge import __version__
from nanogauge.claims import Claims
from nanogauge.errors import BadInput
from nanogauge.files import make_folder, sha256_file, write_atomic
from nanogauge.importers.contradictions import refuse_contradictions
from nanogauge.importers.lines import run_lines
from nanogauge.importers.printed import Printed, PrintedSession, runs_of, warning
from nanogauge.records import Event, Prediction
from nanogauge.report.build import CLAIMS_NAME
from nanogauge.report.compare import build_rows
from nanogauge.runfolder import create
from nanogauge.runlog import FILE_NAME, RunLog, read_log
from nanogauge.runspec import RunSpec


def import_log(
    read: Callable[[Path], Printed],
    log_path: Path,
    spec: RunSpec,
    prediction: Prediction,
    claims: Claims | None,
    claims_path: Path | None,
    out: Path,
    run_number: int | None = None,
) -> None:
    """Write out/ from a log; an earlier import there is replaced, a trained run never.

    Args:
        read: the reader of this form of log.
        run_number: which of several runs in the file, from 1; the last where it is None.

    Raises:
        BadInput: if the log or the claims are unusable, the log contradicts the configuration, or
            out holds a run of another origin.
    """
    log = read(log_path)
    run, events = _choose(log, log_path, run_number)
    refuse_contradictions(log_path, run, spec, prediction)
    build_rows(claims, spec, prediction, None)  # a claim that cannot be computed fails here
    max_steps, device = spec.steps, prediction.hardware.name
    compiled = bool(spec.compile)
    run_lines(log.form, run, max_steps, compiled, device, "")
    if (out / FILE_NAME).exists():
        if read_log(out).starts[0].source == "train":
            raise BadInput(f"{out} holds a run that was trained here; choose another --out.")
        make_folder(out)
        (out / FILE_NAME).unlink()
    machine: dict[str, object] = {
        ("device" if prediction.hardware.kind == "cpu" else "gpu"): device,
        "log": log_path.name,
        "log_sha256": sha256_file(log_path),
        "imported_by": f"nanogauge {__version__}",
        "note": log.form.note,
        **log.told,
    }
    spec = spec.resolved(prediction.dtype, prediction.gpus)
    folder = create(out, spec, machine, prediction)
    if claims_path is not None:
        write_atomic(out / CLAIMS_NAME, claims_path.read_bytes())
    lines = run_lines(log.form, run, max_steps, compiled, device, folder.prediction_sha256)
    with RunLog(out) as writer:
        for line in [*lines[:-1], *events, *log.events, lines[-1]]:
            writer.write(line)


def _choose(
    log: Printed, path: Path, run_number: int | None
) -> tuple[list[PrintedSession], list[Event]]:
    """One of the runs in the file, and a warning where there are others."""
    runs = runs_of(log.sessions)
    number = len(runs) if run_number is None else run_number
    if not 1 <= number <= len(runs):
        held = "one run" if len(runs) == 1 else f"{len(runs)} runs"
        raise BadInput(f"{path} holds {held}; there is no --run-number {run_number}.")
    if len(runs) == 1:
        return runs[0], []
    ranges = "; ".join(
        f"{n}: steps {run[0].first:,} to {run[-1].last:,} from line {run[0].line:,} on"
        for n, run in enumerate(runs[-5:], start=max(len(runs) - 4, 1))
    )
    said = (
        f"The log holds {len(runs)} runs ({ranges}). This is number {number}"
        f"{', the last' if number == len(runs) else ''}; --run-number takes another."
    )
    return runs[number - 1], [warning("several_runs", said)]
