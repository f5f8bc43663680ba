"""Process that mirrors a run log to Weights & Biases; no other module imports wandb.

python -m nanogauge.sinks.process runs/NAME --mode online --project NAME

It follows runs/NAME/log.jsonl, so that W&B can neither slow nor stop the training loop. Without a training loop it
sends what the log contains and ends. A row's step in W&B's history follows from its line in the log, so that no row is
sent twice, however often a run is resumed or uploaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import select
import shutil
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from nanogauge.cli import Parser, run_command
from nanogauge.config import TrainSection, load_config
from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import Scrubber, scrubbed, without_secrets, write_atomic
from nanogauge.runlog.folder import CONFIG_TOML, SPEC_NAME, read_spec
from nanogauge.runlog.reader import LOG_NAME, lines_of, read_log
from nanogauge.runspec import RunSpec
from nanogauge.schema import End, Event, LogLine, Prediction
from nanogauge.shell import tool_command
from nanogauge.sinks.mirror import POSITION_NAME
from nanogauge.sinks.mode import Mode
from nanogauge.sinks.rows import AXES, VERDICT_COLUMNS, Rows, final_summary, summary_of, verdict_rows

if TYPE_CHECKING:
    import wandb

_POLL_SECONDS = 0.5
_INIT_SECONDS = 15.0
_LAST_SECONDS = 60
"""Time limit for uploading after the run's process has died."""
_STEPS_PER_LINE = 100
"""W&B takes rows in ascending order only; the gap leaves room for reports that are sent later."""
_FILES_AT_START = (SPEC_NAME, CONFIG_TOML, "prediction.json", "machine.json")
_REPORT = ("report.html", "report.md", "report.json")


class _LogFollower:
    """Lines of a log while it is written, from the first.

    Args:
        path: the log.
        attached_at: size of the log in bytes when the training loop started the mirror; None without a training loop.
    """

    def __init__(self, path: Path, attached_at: int | None) -> None:
        self._path = path
        self._attached_at = attached_at
        self.complete = attached_at is None
        """True once the run's process has confirmed that its log and report are complete."""

    def batches(self) -> Iterator[list[tuple[LogLine, bool]]]:
        """Yield new lines, each with True if this run's process wrote it, until the log ends.

        The log ends where it does now, or when the process that started the mirror confirms or has died.
        """
        offset, ended = 0, self._attached_at is None
        while True:
            batch = []
            with contextlib.suppress(FileNotFoundError), self._path.open("rb") as log:
                log.seek(offset)
                data = log.read()
                whole = data[: data.rfind(b"\n") + 1]
                pieces = whole.split(b"\n")
                for piece, line in zip(pieces, lines_of(whole, self._path), strict=False):
                    assert line is not None
                    is_new = self._attached_at is not None and offset >= self._attached_at
                    batch.append((line, is_new))
                    offset += len(piece) + 1
            yield batch
            if ended:
                return
            # Readable when the run's process confirms, and when it dies of any cause.
            if select.select([sys.stdin], [], [], _POLL_SECONDS)[0]:
                ended, self.complete = True, bool(os.read(sys.stdin.fileno(), 1))


class _Position:
    """History step up to which offline mirrors have sent a run, stored in its folder."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self._path = folder / POSITION_NAME
        self._run_id = run_id
        self.step = 0
        # Without the file, or with that of another run, nothing has been sent.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stored = json.loads(self._path.read_bytes())
            self.step = int(stored["next_place"]) if stored["run_id"] == run_id else 0

    def move(self, step: int) -> None:
        if step > self.step:
            self.step = step
            # If it cannot be stored, a row is sent twice if W&B stays offline.
            with contextlib.suppress(OSError):
                data = json.dumps({"run_id": self._run_id, "next_place": step})
                write_atomic(self._path, data.encode())


def _init_run(
    folder: Path, spec: RunSpec, prediction: Prediction, options: Namespace, run_id: str
) -> tuple[wandb.Run, str]:
    """Start W&B's run, offline if it is not available; return it and the reason for a warning."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to W&B's own maintainers
    import wandb

    def init(actual: Literal["online", "offline"]) -> wandb.Run:
        return wandb.init(
            mode=actual,
            project=options.project,
            name=spec.name or folder.name,
            id=run_id,
            resume="allow",
            dir=".",
            config=scrubbed({**spec.to_dict(), "prediction": _predicted(prediction)}),
            settings=wandb.Settings(
                init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", _INIT_SECONDS)),
                console="off",
                # These would describe this process instead of the training process.
                x_disable_stats=True,
                x_save_requirements=False,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,  # host name, user name, command line
                x_disable_machine_info=True,
            ),
        )

    mode: Mode = options.mode
    if mode == "offline":
        return init("offline"), ""
    try:
        return init("online"), ""
    except wandb.errors.Error as error:
        # W&B's process keeps the id that failed online, and refuses it offline.
        wandb.teardown()
        quiet = mode == "auto" and "No API key" in str(error)
        return init("offline"), "" if quiet else str(error)


def _predicted(prediction: Prediction) -> dict[str, Any]:
    """Return the hardware and the best estimate of each quantity, for W&B's configuration."""
    predicted: dict[str, Any] = {"hardware": prediction.hardware.model_dump()}
    for name in (*prediction.quantities, *prediction.calibrated):
        estimate = prediction.best(name)
        assert estimate is not None
        predicted[name] = estimate.model_dump(include={"low", "expected", "high", "unit"})
    return predicted


def _run_id(folder: Path) -> str:
    """Return W&B's id in the log, or one that is derived from the first start.

    Raises:
        BadInput: if the log is damaged or empty.
    """
    starts = read_log(folder).starts
    logged = [start.wandb_id for start in starts if start.wandb_id is not None]
    if logged:
        return logged[-1]
    first = f"{starts[0].prediction_sha256} {starts[0].unix_time}"
    return hashlib.sha256(first.encode()).hexdigest()[:8]


def _mirror(run: wandb.Run, log: _LogFollower, rows: Rows, position: _Position, folder: Path) -> str | None:
    """Send the lines that W&B lacks, and the report; return the run's final status, if any."""
    for axis in AXES:
        run.define_metric(axis, hidden=True)
    run.define_metric("*", step_metric="step")
    _send_files(run, folder, _FILES_AT_START)
    first = position.step if run.offline else run.starting_step
    step, status = 0, None
    for batch in log.batches():
        for line, is_new in batch:
            row, summary = rows.row(line), summary_of(line)
            status = line.status if isinstance(line, End) else None
            if row and step >= first:
                run.log(row, step=step, commit=True)
            if summary:
                run.summary.update(summary)
            if is_new and isinstance(line, Event) and line.level != "info":
                level = "ERROR" if line.level == "alarm" else "WARN"
                run.alert(title=line.what[:63], text=line.text, level=level)
            step += _STEPS_PER_LINE
        position.move(step)
    if status is None:
        run.summary["run/status"] = "unfinished"
    if log.complete:
        _send_report(run, folder, max(step, first))
        position.move(max(step, first) + 1)
    return status


def _send_report(run: wandb.Run, folder: Path, step: int) -> None:
    """Send the verdict table, the page and the final figures; print what is missing."""
    import wandb

    _send_files(run, folder, _REPORT)
    try:
        report = json.loads((folder / "report.json").read_bytes())
        page = (folder / "report.html").open(encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"The run is mirrored without its report: {error}.", file=sys.stderr)
        return
    run.summary.update(final_summary(report))
    table = wandb.Table(columns=list(VERDICT_COLUMNS), data=verdict_rows(report))
    with page:
        row = {"report/verdicts": table, "report/page": wandb.Html(page, inject=False)}
        run.log(row, step=step, commit=True)


def _send_files(run: wandb.Run, folder: Path, names: Sequence[str]) -> None:
    """Send copies, not links, so that an offline run can be moved before it is uploaded."""
    for name in names:
        try:
            copy = shutil.copyfile(folder / name, Path(run.dir) / name)
        except OSError as error:
            print(f"The run is mirrored without {name}: {error.strerror}.", file=sys.stderr)
        else:
            run.save(copy, base_path=run.dir, policy="now")


def _keep_private(folder: Path) -> None:
    """Remove keys and the home folder from all that this process and W&B write."""
    os.chdir(folder)  # so that W&B writes "." instead of its path
    sys.stdout, sys.stderr = Scrubber(sys.stdout), Scrubber(sys.stderr)
    factory = logging.getLogRecordFactory()

    def private(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = factory(*arguments, **options)
        record.msg, record.args = without_secrets(record.getMessage()), None
        return record

    logging.setLogRecordFactory(private)


def _mark_as_synced(folder: Path, run_id: str) -> None:
    """Keep `wandb sync` from sending the rows of offline folders again after an upload."""
    for path in folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"):
        path.with_name(f"{path.name}.synced").touch()


def _read_folder(folder: Path) -> tuple[RunSpec, Prediction, int]:
    """Return spec, prediction and log interval of a run folder.

    Raises:
        BadInput: if the folder has no readable prediction, spec or configuration.
    """
    try:
        text = (folder / "prediction.json").read_text(encoding="utf-8")
        prediction = Prediction.model_validate_json(text)
    except (OSError, ValidationError):
        raise BadInput(f"{folder} holds no readable prediction.json; give a run's folder.") from None
    log_every = TrainSection.model_fields["log_every"].default
    if (folder / CONFIG_TOML).exists():
        log_every = load_config(folder / CONFIG_TOML).train.log_every
    return read_spec(folder, prediction), prediction, log_every


def main(arguments: Sequence[str]) -> int:
    """Mirror one run folder and print its address in W&B.

    Raises:
        BadInput: if the folder has no readable prediction or the log is damaged.
        RunFailed: if the run is not in W&B, or offline where online was asked for.
    """
    parser = Parser("Mirror the log of a run to Weights & Biases.")
    parser.add_argument("folder", type=Path, help="folder of the run")
    parser.add_argument("--mode", choices=("auto", "online", "offline"), required=True)
    parser.add_argument("--project", required=True, help="W&B project")
    parser.add_argument("--id", help="W&B's id of the run (default: that in the log)")
    parser.add_argument("--log-every", type=int, help="mirror every so many steps (default: train.log_every)")
    parser.add_argument(
        "--attached",
        type=int,
        metavar="BYTES",
        help="for train.py: the size of the log at its start; standard input ends with the run",
    )
    options = parser.parse(arguments)
    folder: Path = options.folder.resolve()
    spec, prediction, log_every = _read_folder(folder)
    run_id = options.id or _run_id(folder)
    _keep_private(folder)
    if options.attached is not None:
        os.nice(10)  # give way to the training loop
    try:
        run, offline_reason = _init_run(folder, spec, prediction, options, run_id)
        log = _LogFollower(folder / LOG_NAME, options.attached)
        rows = Rows(spec, prediction, options.log_every or log_every)
        position = _Position(folder, run_id)
        status = _mirror(run, log, rows, position, folder)
        if not log.complete:
            # The run's process has died: the alarm ends this one even inside W&B.
            signal.alarm(_LAST_SECONDS)
        run.finish(exit_code=0 if status in ("finished", "stopped") else 1)
    except BadInput:
        raise
    except ImportError as error:
        raise RunFailed(f"W&B cannot be used ({error}); the run is in its log alone.") from None
    except Exception as error:
        # W&B raises many undocumented types when its own process dies or hangs.
        traceback.print_exc()
        raise RunFailed(f"W&B failed before the end of the run: {type(error).__name__} {error}.") from None
    stored_at = Path(run.settings.sync_dir).resolve()
    warnings = []
    if offline_reason:
        warnings.append(
            f"W&B is not available online ({offline_reason.splitlines()[0].rstrip('.')}), so the "
            f"run is mirrored offline: {tool_command('wandb', 'sync', stored_at)} uploads it."
        )
    if not stored_at.is_relative_to(folder):
        warnings.append(f"W&B cannot write to {folder} and keeps its files of the run in {stored_at}.")
    if warnings:
        raise RunFailed(" ".join(warnings))
    if not run.offline:
        _mark_as_synced(folder, run_id)
    sync = tool_command("wandb", "sync")
    print(f"{stored_at}, which `{sync}` uploads" if run.offline else run.url)
    return 0


if __name__ == "__main__":
    try:
        run_command(main)
    except SystemExit as exit_request:
        # Skip W&B's exit hook, which would wait for a silent server.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(exit_request.code or 0))
