"""Control of the processes that mirror a run log to W&B, trackio and a webhook.

The training loop starts one for each sink for the duration of a run (start_mirrors), report.py one for a run that has
ended (upload). None waits for a sink beyond a time limit. The process itself is nanogauge.sinks.process.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import signal
import string
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanogauge.cli import start_module
from nanogauge.config import Config
from nanogauge.errors import RunFailed
from nanogauge.files import ALERTS_VARIABLE
from nanogauge.runlog.reader import LOG_NAME
from nanogauge.shell import interpreter, python_command
from nanogauge.sinks.mode import Mode
from nanogauge.sinks.sink import TITLES, SinkName
from nanogauge.waiting import announced

_MODULE = "nanogauge.sinks.process"
_UPLOAD_SECONDS = 600.0
_ERROR_PREFIX = "process.py: "
"""Start of the line with which run_command ends a failed process."""
_ROWS_REFUSED = "Fatal error while uploading data"
"""W&B's only message when a server refuses rows."""


def new_run_id() -> str:
    """Return a random W&B run id: eight lower-case letters and digits."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def start_mirrors(config: Config, run_id: str) -> list[Mirror]:
    """Start a process for each sink of the configuration."""
    wandb, project = config.wandb, config.trackio.project
    shared = [f"--id={run_id}", f"--log-every={config.train.log_every}"]
    mirrors = []
    if wandb.mode != "disabled":
        options = [f"--mode={wandb.mode}", f"--project={wandb.project}", *shared]
        mirrors.append(Mirror("wandb", config.folder, options))
    if project is not None:
        mirrors.append(Mirror("trackio", config.folder, [f"--project={project}", *shared]))
    if url := config.alerts.url or os.environ.get(ALERTS_VARIABLE):
        mirrors.append(Mirror("webhook", config.folder, [], {ALERTS_VARIABLE: url}))
    return mirrors


def finish_mirrors(mirrors: Sequence[Mirror], timeout_seconds: float = 10.0) -> list[str]:
    """Wait for the mirrors of a complete log and report; return a warning for each that failed.

    The time limit is that of all together. Never raises.
    """
    until = time.monotonic() + timeout_seconds
    for mirror in mirrors:
        mirror.confirm()
    warnings = [mirror.finish(until, timeout_seconds) for mirror in mirrors]
    return [warning for warning in warnings if warning is not None]


class Mirror:
    """The mirror process of a run for one sink, as the training loop uses it."""

    def __init__(self, sink: SinkName, folder: Path, options: Sequence[str], variables: Mapping[str, str] = {}) -> None:
        """Start mirroring; finish() reports any failure, and this call neither waits nor raises.

        Args:
            sink: where to.
            folder: a run folder with prediction.json and a start line in its log.
            options: flags of the process.
            variables: environment variables that it needs besides those of this process.
        """
        command = [sink, str(folder), *options]
        self._title = TITLES[sink]
        self._output = output_of(folder, sink)
        self._problem = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._advice = f" {interpreter()} -m {_MODULE} {shlex.join(command)} uploads the run."
        if sink == "wandb":
            self._advice = f" {python_command('report.py', '--wandb', folder)} uploads the run."
        elif sink == "webhook":
            self._advice = ""
        log = folder / LOG_NAME
        logged_bytes = log.stat().st_size if log.exists() else 0
        try:
            with self._output.open("wb") as output:
                self._process = start_module(
                    _MODULE, [*command, f"--attached={logged_bytes}"], output, output, variables
                )
        except OSError as error:
            self._problem = f"The mirror to {self._title} could not be started: {error}."

    def confirm(self) -> None:
        """Let the process end by itself: the log and the report are complete."""
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended already
                self._process.stdin.write(b"\n")
                self._process.stdin.close()

    def finish(self, until: float, limit_seconds: float) -> str | None:
        """Wait until time.monotonic() is `until`; return why not all of the run is there, or None."""
        if self._process is None:
            return self._problem
        left_seconds = max(0.0, until - time.monotonic())
        try:
            with announced(f"{self._title} to take the rest of the run", left_seconds):
                self._process.wait(left_seconds)
        except subprocess.TimeoutExpired:
            _kill(self._process)
            return f"{_too_slow(self._title, limit_seconds)}.{self._advice}"
        try:
            output = self._output.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            output = f"{_ERROR_PREFIX}the output of the mirror to {self._title} is lost: {error}."
        problem = _problem(self._process.returncode, output, self._title)
        return None if problem is None else f"{problem}{self._advice}"


def output_of(folder: Path, sink: SinkName) -> Path:
    """Return the file with the output of the mirror process and of its sink's package."""
    return folder / f"{sink}.log"


def upload(folder: Path, mode: Mode, project: str, timeout_seconds: float = _UPLOAD_SECONDS) -> str:
    """Mirror the log and report as they are to W&B, and return the run's address there.

    Raises:
        RunFailed: if W&B is not available in this mode, or not in time.
    """
    options = ["wandb", str(folder), f"--mode={mode}", f"--project={project}"]
    process = start_module(_MODULE, options, subprocess.PIPE, subprocess.PIPE)
    try:
        with announced("W&B to take the run", timeout_seconds):
            address, errors = process.communicate(timeout=timeout_seconds)
    except BaseException as error:
        _kill(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise RunFailed(f"{_too_slow('W&B', timeout_seconds)}.") from None
        raise
    problem = _problem(process.returncode, errors.decode(errors="replace"), "W&B")
    if problem is not None:
        raise RunFailed(problem)
    return address.decode().strip()


def _too_slow(title: str, seconds: float) -> str:
    return f"{title} had not taken all of the run after {seconds:.0f} s and was stopped"


def _kill(process: subprocess.Popen[bytes]) -> None:
    # wandb-core has left this group, but watches its parent and ends with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)


def _problem(returncode: int, output: str, title: str) -> str | None:
    """Return why a finished mirror process did not send everything; None if it did."""
    if returncode == 0:
        if _ROWS_REFUSED in output:
            return "W&B's server refused the run's rows, so that not all of them are there."
        return None
    errors = [line for line in output.splitlines() if line.startswith(_ERROR_PREFIX)]
    if errors:
        return errors[-1].removeprefix(_ERROR_PREFIX)
    return f"The mirror to {title} failed: {(output.strip().splitlines() or ['no output'])[-1]}."
