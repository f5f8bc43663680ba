"""Control of the process that mirrors a run log to Weights & Biases.

The training loop starts one for the duration of a run (Mirror), report.py for a run that has ended (upload). Neither
waits for W&B beyond a time limit. The process itself is nanogauge.sinks.process.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import string
import subprocess
from pathlib import Path

from nanogauge.cli import start_module
from nanogauge.errors import RunFailed
from nanogauge.runlog.reader import LOG_NAME
from nanogauge.shell import python_command
from nanogauge.sinks.mode import Mode
from nanogauge.waiting import announced

OUTPUT_NAME = "wandb.log"
"""Output of the mirror process and of W&B."""
POSITION_NAME = "wandb.json"
"""File that records how much of the run W&B has."""
_MODULE = "nanogauge.sinks.process"
_UPLOAD_SECONDS = 600.0
_ERROR_PREFIX = "process.py: "
"""Start of the line with which run_command ends a failed process."""
_ROWS_REFUSED = "Fatal error while uploading data"
"""W&B's only message when a server refuses rows."""


def new_run_id() -> str:
    """Return a random W&B run id: eight lower-case letters and digits."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


class Mirror:
    """The mirror process of a run, as the training loop uses it."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes] | None, problem: str) -> None:
        self._folder = folder
        self._process = process
        self._problem = problem

    @classmethod
    def start(cls, folder: Path, mode: Mode, project: str, log_every: int, run_id: str | None = None) -> Mirror:
        """Start mirroring; finish() reports any failure, and this call neither waits nor raises.

        Args:
            folder: a run folder with prediction.json and a start line in its log.
            mode: whether to upload.
            project: the W&B project.
            log_every: mirror every so many steps, and everything else in the log.
            run_id: W&B's id of the run; None for the id in the log.
        """
        log = folder / LOG_NAME
        logged_bytes = log.stat().st_size if log.exists() else 0
        options = [str(folder), f"--mode={mode}", f"--project={project}"]
        options += [f"--log-every={log_every}", f"--attached={logged_bytes}"]
        if run_id is not None:
            options.append(f"--id={run_id}")
        try:
            with (folder / OUTPUT_NAME).open("wb") as output:
                return cls(folder, start_module(_MODULE, options, output, output), "")
        except OSError as error:
            return cls(folder, None, f"The W&B mirror could not be started: {error}.")

    def finish(self, timeout_seconds: float = 10.0) -> str | None:
        """Wait for the rest of the log and the report, both complete; return a warning or None.

        The warning says why not all of the run is in W&B. Never raises.
        """
        if self._process is None:
            return self._problem
        advice = f"{python_command('report.py', '--wandb', self._folder)} uploads the run"
        try:
            with announced("W&B to take the rest of the run", timeout_seconds):
                # Any input means that the log and the report are complete.
                self._process.communicate(b"\n", timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            _kill(self._process)
            return f"{_too_slow(timeout_seconds)}; {advice}."
        try:
            output = (self._folder / OUTPUT_NAME).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            output = f"{_ERROR_PREFIX}the output of the W&B mirror is lost: {error}."
        problem = _problem(self._process.returncode, output)
        return None if problem is None else f"{problem} {advice}."


def upload(folder: Path, mode: Mode, project: str, timeout_seconds: float = _UPLOAD_SECONDS) -> str:
    """Mirror the log and report as they are, and return the run's address in W&B.

    Raises:
        RunFailed: if W&B is not available in this mode, or not in time.
    """
    options = [str(folder), f"--mode={mode}", f"--project={project}"]
    process = start_module(_MODULE, options, subprocess.PIPE, subprocess.PIPE)
    try:
        with announced("W&B to take the run", timeout_seconds):
            address, errors = process.communicate(timeout=timeout_seconds)
    except BaseException as error:
        _kill(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise RunFailed(f"{_too_slow(timeout_seconds)}.") from None
        raise
    problem = _problem(process.returncode, errors.decode(errors="replace"))
    if problem is not None:
        raise RunFailed(problem)
    return address.decode().strip()


def _too_slow(seconds: float) -> str:
    return f"W&B had not taken all of the run after {seconds:.0f} s and was stopped"


def _kill(process: subprocess.Popen[bytes]) -> None:
    # wandb-core has left this group, but watches its parent and ends with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)


def _problem(returncode: int, output: str) -> str | None:
    """Return why a finished mirror process did not send everything; None if it did."""
    if returncode == 0:
        if _ROWS_REFUSED in output:
            return "W&B's server refused the run's rows, so that not all of them are there."
        return None
    errors = [line for line in output.splitlines() if line.startswith(_ERROR_PREFIX)]
    if errors:
        return errors[-1].removeprefix(_ERROR_PREFIX)
    return f"The W&B mirror failed: {(output.strip().splitlines() or ['no output'])[-1]}."
