"""Control of the processes that mirror a run log to W&B, trackio and a webhook.

The training loop starts one for each sink for the duration of a run (start_mirrors), report.py one for a run that has
ended (upload). None waits for a sink beyond a time limit. The process itself is nanogauge.sinks.process.
"""

from __future__ import annotations

import contextlib
import math
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
    problems = [(mirror.finish(timeout_seconds, until), mirror.advice) for mirror in mirrors]
    return [f"{problem}{advice}" for problem, advice in problems if problem is not None]


class Mirror:
    """A mirror process of a run.

    Starting it neither waits nor raises; finish() returns any failure.

    Args:
        sink: where to.
        folder: a run folder with prediction.json and a start line in its log.
        options: flags of the process.
        variables: environment variables that it needs besides those of this process.
        attached: follow the log until it is complete; False to send what it holds.
    """

    def __init__(
        self,
        sink: SinkName,
        folder: Path,
        options: Sequence[str],
        variables: Mapping[str, str] = {},
        attached: bool = True,
    ) -> None:
        command = [sink, str(folder), *options]
        retry = f"{interpreter()} -m {_MODULE} {shlex.join(command)}"
        retry = python_command("report.py", "--wandb", folder) if sink == "wandb" else retry
        self.advice = f" {retry} uploads the run." if sink != "webhook" else ""
        self.output = folder / (f"{sink}.log" if attached else "upload.log")
        """What the process and its sink's package print; a run that is uploaded may also be mirrored just now."""
        self._title = TITLES[sink]
        self._process: subprocess.Popen[bytes] | None = None
        self._problem = ""
        log = folder / LOG_NAME
        if attached:
            command.append(f"--attached={log.stat().st_size if log.exists() else 0}")
        try:
            with self.output.open("wb") as output:
                self._process = start_module(_MODULE, command, output, variables)
        except OSError as error:
            self._problem = f"The mirror to {self._title} could not be started: {error}."

    def confirm(self) -> None:
        """Let an attached process end: the log and the report are complete."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended already
                self._process.stdin.write(b"\n")
                self._process.stdin.close()

    def finish(self, limit_seconds: float, until: float = math.inf) -> str | None:
        """Wait for the end of the process and return why not all of the run is there, or None.

        It is stopped after limit_seconds, or when time.monotonic() is `until`.
        """
        if self._process is None:
            return self._problem
        left_seconds = min(limit_seconds, max(0.0, until - time.monotonic()))
        try:
            with announced(f"{self._title} to take the run", left_seconds):
                self._process.wait(left_seconds)
        except BaseException as error:
            _kill(self._process)
            if isinstance(error, subprocess.TimeoutExpired):
                return f"{self._title} had not taken all of the run after {limit_seconds:.0f} s and was stopped."
            raise
        try:
            output = self.output.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            return f"The output of the mirror to {self._title} is lost: {error}."
        if self._process.returncode == 0:
            refused = "W&B's server refused the run's rows, so that not all of them are there."
            return refused if _ROWS_REFUSED in output else None
        lines = output.strip().splitlines() or ["no output"]
        errors = [line.removeprefix(_ERROR_PREFIX) for line in lines if line.startswith(_ERROR_PREFIX)]
        return errors[-1] if errors else f"The mirror to {self._title} failed: {lines[-1]}."


def upload(folder: Path, mode: Mode, project: str, timeout_seconds: float = _UPLOAD_SECONDS) -> str:
    """Mirror the log and report as they are to W&B, and return the run's address there.

    Raises:
        RunFailed: if W&B is not available in this mode, or not in time.
    """
    mirror = Mirror("wandb", folder, [f"--mode={mode}", f"--project={project}"], attached=False)
    if (problem := mirror.finish(timeout_seconds)) is not None:
        raise RunFailed(problem)
    return mirror.output.read_text(encoding="utf-8", errors="replace").splitlines()[-1]


def _kill(process: subprocess.Popen[bytes]) -> None:
    # wandb-core has left this group, but watches its parent and ends with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
