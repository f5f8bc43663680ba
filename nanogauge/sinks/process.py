"""The process that mirrors a run log to Weights & Biases: the only place that imports wandb.

python -m nanogauge.sinks.process runs/NAME [--mode online]

It follows runs/NAME/log.jsonl, so that nothing W&B does can slow the training loop or stop it, and
whatever it misses is still in the log. Without a training loop it takes what the log holds and
ends. A row's place in W&B's history follows from its line in the log: what W&B has already is
recognised there and not sent twice, however often a run is resumed or uploaded.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from nanogauge.cli import Parser, run_command
from nanogauge.config import TrainSection, WandbSection, load_config
from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import Scrubber, scrubbed, without_secrets, write_atomic
from nanogauge.runlog.folder import CONFIG_TOML, SPEC_NAME, read_spec
from nanogauge.runlog.reader import FILE_NAME, lines_of, read_log
from nanogauge.runspec import RunSpec
from nanogauge.schema import End, Event, LogLine, Prediction
from nanogauge.sinks.mirror import POSITION_NAME, Mode
from nanogauge.sinks.rows import (
    AXES,
    VERDICT_COLUMNS,
    Rows,
    final_summary,
    summary_of,
    verdict_rows,
)

if TYPE_CHECKING:
    import wandb

_POLL_SECONDS = 0.5
_INIT_SECONDS = 15.0
_LAST_SECONDS = 60
"""how long a mirror whose run has died may still upload"""
_PLACES_PER_LINE = 100
"""W&B takes rows in growing order alone; the gap leaves room for the report, sent again later"""
_WRITTEN_BEFORE = (SPEC_NAME, CONFIG_TOML, "prediction.json", "machine.json")
_REPORT = ("report.html", "report.md", "report.json")


class _Log:
    """The lines of a log as they are written, from its first one on."""

    def __init__(self, path: Path, attached_at: int | None) -> None:
        self._path = path
        self._attached_at = attached_at
        self.complete = attached_at is None
        """the run's process has said so, of its report too; it never does if it died"""

    def batches(self) -> Iterator[list[tuple[LogLine, bool]]]:
        """Lines as they come, each with whether it is new.

        Where the run's own process attached the mirror, new is what comes after the first
        `attached_at` bytes, and lines come until that process says that the log is complete, or is
        gone. Otherwise they end where the log does now, and none is new.
        """
        attached_at = self._attached_at
        offset, over = 0, attached_at is None
        while True:
            batch = []
            with contextlib.suppress(FileNotFoundError), self._path.open("rb") as log:
                log.seek(offset)
                data = log.read()
                whole = data[: data.rfind(b"\n") + 1]
                pieces = whole.split(b"\n")
                for piece, line in zip(pieces, lines_of(whole, self._path), strict=False):
                    assert line is not None
                    batch.append(
                        (line, self._attached_at is not None and offset >= self._attached_at)
                    )
                    offset += len(piece) + 1
            yield batch
            if over:
                return
            # Readable on a word from the run's process, and at its death by any cause.
            if select.select([sys.stdin], [], [], _POLL_SECONDS)[0]:
                over, self.complete = True, bool(os.read(sys.stdin.fileno(), 1))


class _Position:
    """How far the mirrors of a run came so far, for one that cannot ask W&B."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self._path = folder / POSITION_NAME
        self._run_id = run_id
        self.place = 0
        # Without the file, or where it is of another run, nothing was mirrored.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(self._path.read_bytes())
            self.place = int(known["next_place"]) if known["run_id"] == run_id else 0

    def move(self, place: int) -> None:
        if place <= self.place:
            return
        self.place = place
        # What cannot be noted costs nothing now, and a row sent twice if W&B stays offline.
        with contextlib.suppress(OSError):
            data = json.dumps({"run_id": self._run_id, "next_place": place})
            write_atomic(self._path, data.encode())


def _begin(
    folder: Path, spec: RunSpec, prediction: Prediction, mode: Mode, project: str, run_id: str
) -> tuple[wandb.Run, str]:
    """Begin W&B's run, offline if it cannot be had online; why so, where that was not asked for."""
    import wandb

    def begin(actual: Literal["online", "offline"]) -> wandb.Run:
        return wandb.init(
            mode=actual,
            project=project,
            name=spec.name or folder.name,
            id=run_id,
            resume="allow",
            dir=".",
            config=scrubbed({**spec.to_dict(), "prediction": _predicted(prediction)}),
            settings=wandb.Settings(
                init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", _INIT_SECONDS)),
                console="off",
                # They would describe this process, not the one that trains.
                x_disable_stats=True,
                x_save_requirements=False,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,  # the machine's name, the user's, the command line
                x_disable_machine_info=True,
            ),
        )

    if mode == "offline" or (mode == "auto" and os.environ.get("WANDB_MODE") == "offline"):
        return begin("offline"), ""
    try:
        return begin("online"), ""
    except wandb.errors.Error as error:
        # Its own process holds on to an id that could not be had online, and refuses it offline.
        wandb.teardown()
        quiet = mode == "auto" and "No API key" in str(error)
        return begin("offline"), "" if quiet else str(error)


def _predicted(prediction: Prediction) -> dict[str, Any]:
    fields = {"low", "expected", "high", "unit"}

    def plain(name: str) -> dict[str, Any]:
        estimate = prediction.best(name)
        assert estimate is not None
        return estimate.model_dump(include=fields)

    names = [*prediction.quantities, *prediction.calibrated]
    return {
        "hardware": prediction.hardware.model_dump(),
        **{name: plain(name) for name in dict.fromkeys(names)},
    }


def _run_id(folder: Path) -> str:
    """W&B's id of a run: that in its log, else one that follows from its first start.

    Raises:
        BadInput: if the log is damaged or empty.
    """
    starts = read_log(folder).starts
    known = [start.wandb_id for start in starts if start.wandb_id is not None]
    if known:
        return known[-1]
    first = f"{starts[0].prediction_sha256} {starts[0].unix_time}"
    return hashlib.sha256(first.encode()).hexdigest()[:8]


def _mirror(run: wandb.Run, log: _Log, rows: Rows, position: _Position, folder: Path) -> str | None:
    """Send every line that W&B lacks, and the report; returns how the run ended, if it did."""
    for axis in AXES:
        run.define_metric(axis, hidden=True)
    run.define_metric("*", step_metric="step")
    _send_files(run, folder, _WRITTEN_BEFORE)
    first = position.place if run.offline else run.starting_step
    place, status = 0, None
    for batch in log.batches():
        for line, new in batch:
            row, summary = rows.row(line), summary_of(line)
            status = line.status if isinstance(line, End) else None
            if row and place >= first:
                run.log(row, step=place, commit=True)
            if summary:
                run.summary.update(summary)
            if new and isinstance(line, Event) and line.level != "info":
                level = "ERROR" if line.level == "alarm" else "WARN"
                run.alert(title=line.what[:63], text=line.text, level=level)
            place += _PLACES_PER_LINE
        position.move(place)
    if status is None:
        run.summary["run/status"] = "unfinished"
    if log.complete:
        _send_report(run, folder, max(place, first))
        position.move(max(place, first) + 1)
    return status


def _send_report(run: wandb.Run, folder: Path, place: int) -> None:
    """The verdict table, the page and the final figures; what there is not is noted."""
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
        shown = {"report/verdicts": table, "report/page": wandb.Html(page, inject=False)}
        run.log(shown, step=place, commit=True)


def _send_files(run: wandb.Run, folder: Path, names: Sequence[str]) -> None:
    """Copies, not links: an offline run may be carried elsewhere before it is uploaded."""
    for name in names:
        try:
            copy = shutil.copyfile(folder / name, Path(run.dir) / name)
        except OSError as error:
            print(f"The run is mirrored without {name}: {error.strerror}.", file=sys.stderr)
        else:
            run.save(copy, base_path=run.dir, policy="now")


def _keep_private(folder: Path) -> None:
    """Let what this process and W&B write name neither a key nor the home folder."""
    os.chdir(folder)  # of which W&B then writes as of "."
    sys.stdout, sys.stderr = Scrubber(sys.stdout), Scrubber(sys.stderr)
    made = logging.getLogRecordFactory()

    def private(*arguments: Any, **more: Any) -> logging.LogRecord:
        record = made(*arguments, **more)
        record.msg, record.args = without_secrets(record.getMessage()), None
        return record

    logging.setLogRecordFactory(private)


def _mark_as_synced(folder: Path, run_id: str) -> None:
    """Offline folders of a run that is online now: `wandb sync` would send their rows again."""
    for path in folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"):
        path.with_name(f"{path.name}.synced").touch()


def _planned(folder: Path) -> tuple[RunSpec, Prediction]:
    try:
        text = (folder / "prediction.json").read_text(encoding="utf-8")
        prediction = Prediction.model_validate_json(text)
    except (OSError, ValidationError):
        raise BadInput(
            f"{folder} holds no readable prediction.json; give a run's folder."
        ) from None
    return read_spec(folder, prediction), prediction


def _configured(folder: Path) -> tuple[str, int]:
    """Return project and log_every of config.toml, or the defaults where there is none."""
    if not (folder / CONFIG_TOML).exists():
        return WandbSection().project, TrainSection.model_fields["log_every"].default
    config = load_config(folder / CONFIG_TOML)
    return config.wandb.project, config.train.log_every


def main(arguments: Sequence[str]) -> int:
    """Mirror one run folder; prints where W&B has it.

    Raises:
        BadInput: if the folder holds no configuration, prediction or undamaged log.
        RunFailed: if the run is not in W&B, or only offline where it was to be online.
    """
    parser = Parser("Mirror the log of a run to Weights & Biases.")
    parser.add_argument("folder", type=Path, help="folder of the run")
    parser.add_argument("--mode", choices=("auto", "online", "offline"), default="auto")
    parser.add_argument("--project", help="W&B project; that of config.toml where not given")
    parser.add_argument("--id", help="W&B's id of the run; that in the log where not given")
    parser.add_argument(
        "--log-every", type=int, help="mirror every so many steps (train.log_every)"
    )
    parser.add_argument(
        "--attached",
        type=int,
        metavar="BYTES",
        help="for train.py: the size of the log at its start; standard input ends with the run",
    )
    options = parser.parse(arguments)
    folder: Path = options.folder.resolve()
    spec, prediction = _planned(folder)
    project, log_every = _configured(folder)
    project = options.project or project
    log_every = log_every if options.log_every is None else options.log_every
    if log_every < 1:
        raise BadInput(f"--log-every must be at least 1, not {log_every}.")
    run_id = options.id or _run_id(folder)
    _keep_private(folder)
    if options.attached is not None:
        os.nice(10)  # the loop comes first
    try:
        run, offline_because = _begin(folder, spec, prediction, options.mode, project, run_id)
        log = _Log(folder / FILE_NAME, options.attached)
        rows, position = Rows(spec, prediction, log_every), _Position(folder, run_id)
        status = _mirror(run, log, rows, position, folder)
        if not log.complete:
            # Nobody waits for a mirror whose run has died; the kernel ends it even inside W&B.
            signal.alarm(_LAST_SECONDS)
        run.finish(exit_code=0 if status in ("finished", "stopped") else 1)
    except BadInput:
        raise
    except ImportError as error:
        raise RunFailed(f"W&B cannot be used ({error}); the run is in its log alone.") from None
    except Exception as error:
        # What W&B raises when its own process dies or hangs is not documented, and of many types.
        traceback.print_exc()
        raise RunFailed(
            f"W&B failed before the end of the run: {type(error).__name__} {error}."
        ) from None
    kept = Path(run.settings.sync_dir).resolve()
    warnings = []
    if offline_because:
        warnings.append(
            f"W&B could not be had online ({offline_because.splitlines()[0].rstrip('.')}), so the "
            f"run is mirrored offline: wandb sync {kept} uploads it."
        )
    if not kept.is_relative_to(folder):
        warnings.append(f"W&B cannot write to {folder} and keeps its files of the run in {kept}.")
    if warnings:
        raise RunFailed(" ".join(warnings))
    if not run.offline:
        _mark_as_synced(folder, run_id)
    print(f"{kept}, which `wandb sync` uploads" if run.offline else run.url)
    return 0


if __name__ == "__main__":
    try:
        run_command(main)
    except SystemExit as done:
        # Everything is written by now; W&B's exit hook would go on waiting for a silent server.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(done.code or 0))
