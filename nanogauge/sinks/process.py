"""Process that mirrors a run log to one sink: W&B, trackio or a webhook.

python -m nanogauge.sinks.process wandb runs/NAME --mode online --project NAME

It follows runs/NAME/log.jsonl, so that no sink can slow or stop the training loop. Without a training loop it sends
what the log contains and ends. The place of a row follows from its line in the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from nanogauge.cli import Parser, run_command
from nanogauge.config import load_config
from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import Scrubber, without_secrets
from nanogauge.runlog.folder import CONFIG_TOML, load
from nanogauge.runlog.reader import LOG_NAME, lines_of, read_log
from nanogauge.schema import End, Event, LogLine, Start
from nanogauge.sinks.rows import HistoryRow, Rows, final_summary, summary_of
from nanogauge.sinks.sink import TITLES, Severity, Sink

_SINKS = {
    "wandb": "nanogauge.sinks.wandb_sink:WandbSink",
    "trackio": "nanogauge.sinks.trackio_sink:TrackioSink",
    "webhook": "nanogauge.sinks.webhook:Webhook",
}
"""Each imports its own packages, which may be absent."""
_LOG_EVERY = 10
"""For a run of another program."""
_POLL_SECONDS = 0.5
_LAST_SECONDS = 60
"""Time limit for sending the rest after the run's process has died."""
_PLACES_PER_LINE = 100
"""W&B takes rows in ascending order only; the gap leaves room for charts, and for reports that are sent later."""


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


def _mirror(sink: Sink, log: _LogFollower, rows: Rows, folder: Path) -> str:
    """Send all lines of a log and the report; return the address of the run."""
    place, status = 0, None
    for batch in log.batches():
        new_rows: list[tuple[int, HistoryRow]] = []
        summary: dict[str, Any] = {}
        alerts: list[tuple[Severity, str, str]] = []
        for line, is_new in batch:
            if row := rows.row(line):
                new_rows.append((place, row))
            place += _PLACES_PER_LINE
            summary |= summary_of(line)
            match line:
                case Start():
                    status = None
                case End():
                    status = line.status
                case Event(level="warning" | "alarm" as level) if is_new:
                    alerts.append((level, line.what, line.text))
        if new_rows:
            sink.rows(new_rows)
        if summary:
            sink.summary(summary)
        for alert in alerts:
            sink.alert(*alert)
    if status is None:
        sink.summary({"run/status": "unfinished"})
    if not log.complete:
        # The run's process has died: the alarm ends this one even inside the sink's package.
        signal.alarm(_LAST_SECONDS)
    report = _read_report(folder) if log.complete else None
    if report is not None:
        sink.summary(final_summary(report))
    return sink.end(status, report)


def _read_report(folder: Path) -> dict[str, Any] | None:
    try:
        report: dict[str, Any] = json.loads((folder / "report.json").read_bytes())
    except (OSError, ValueError) as error:
        print(f"The run is mirrored without its report: {error}.", file=sys.stderr)
        return None
    return report


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


def _keep_private() -> None:
    """Remove keys and the home folder from all that this process and its sink write."""
    sys.stdout, sys.stderr = Scrubber(sys.stdout), Scrubber(sys.stderr)
    factory = logging.getLogRecordFactory()

    def private(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = factory(*arguments, **options)
        record.msg, record.args = without_secrets(record.getMessage()), None
        return record

    logging.setLogRecordFactory(private)


def main(arguments: Sequence[str]) -> int:
    """Mirror one run folder to one sink and print the run's address there.

    Raises:
        BadInput: if the folder is not that of a run or the log is damaged.
        RunFailed: if the sink does not have all of the run, or W&B is offline where online was asked for.
    """
    parser = Parser("Mirror the log of a run to W&B, trackio or a webhook.")
    parser.add_argument("sink", choices=tuple(TITLES), help="where to")
    parser.add_argument("folder", type=Path, help="folder of the run")
    parser.add_argument("--mode", choices=("auto", "online", "offline"), default="auto", help="of W&B")
    parser.add_argument("--project", default="nanogauge", help="project of W&B or trackio")
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
    run = load(folder)
    options.id = options.id or _run_id(folder)
    log_every = options.log_every or _LOG_EVERY
    if options.log_every is None and run.config_toml is not None:
        log_every = load_config(folder / CONFIG_TOML).train.log_every
    rows = Rows(run.spec, run.prediction, log_every)
    _keep_private()
    if options.attached is not None:
        os.nice(10)  # give way to the training loop
    log, title = _LogFollower(folder / LOG_NAME, options.attached), TITLES[options.sink]
    try:
        sink: Sink = resolve_name(_SINKS[options.sink])(options)
        sink.begin(folder, run.spec, run.prediction)
        print(_mirror(sink, log, rows, folder))
    except (BadInput, RunFailed):
        raise
    except ImportError as error:
        raise RunFailed(f"{title} cannot be used ({error}); the run is in its log alone.") from None
    except Exception as error:
        # The packages raise many undocumented types, as when W&B's own process dies or hangs.
        traceback.print_exc()
        raise RunFailed(f"{title} failed before the end of the run: {type(error).__name__} {error}.") from None
    return 0


if __name__ == "__main__":
    try:
        run_command(main)
    except SystemExit as exit_request:
        # Skip W&B's exit hook, which would wait for a silent server.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(exit_request.code or 0))
