"""Weights & Biases: a best-effort mirror of the run log, in a process of its own.

Here is that process as those hold it who start it: the training loop for the time of a run
(Mirror), report.py for a run that has ended (upload). What it does is in tracking_process.py.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import string
import subprocess
from pathlib import Path
from typing import Literal

from nanogauge.cli import start_module
from nanogauge.errors import RunFailed
from nanogauge.runlog.reader import FILE_NAME

Mode = Literal["auto", "online", "offline"]

OUTPUT_NAME = "wandb.log"
"""what the mirror's process and W&B print"""
POSITION_NAME = "wandb.json"
"""how far the run is mirrored"""
_MODULE = "nanogauge.sinks.process"
_UPLOAD_SECONDS = 600.0
_SPEAKER = "tracking_process.py: "
"""begins the sentence with which the process ends when something went wrong"""
_GIVEN_UP = "Fatal error while uploading data"
"""what W&B prints, and nothing more, when a server refuses its rows"""


def new_run_id() -> str:
    """An id for a new run, such as W&B takes: eight lower-case letters and digits."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


class Mirror:
    """The mirror's process, as the training loop holds it."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes] | None, problem: str) -> None:
        self._folder = folder
        self._process = process
        self._problem = problem

    @classmethod
    def start(
        cls, folder: Path, mode: Mode, project: str, log_every: int, run_id: str | None = None
    ) -> Mirror:
        """Start to mirror a run whose folder holds config.toml, prediction.json and a start line.

        Every `log_every`-th step goes to W&B, and all else that is logged. A run that is resumed
        goes on under the `run_id` that it had; without one it is that of the log. Does not wait
        for W&B and never raises: what goes wrong is told by finish().
        """
        log = folder / FILE_NAME
        known_bytes = log.stat().st_size if log.exists() else 0
        options = [str(folder), f"--mode={mode}", f"--project={project}"]
        options += [f"--log-every={log_every}", f"--attached={known_bytes}"]
        if run_id is not None:
            options.append(f"--id={run_id}")
        try:
            with (folder / OUTPUT_NAME).open("wb") as output:
                return cls(folder, start_module(_MODULE, options, output, output), "")
        except OSError as error:
            return cls(folder, None, f"The W&B mirror could not be started: {error}.")

    def finish(self, timeout_seconds: float = 10.0) -> str | None:
        """Let the mirror take the rest of the log and the report, for so long at most.

        Both are complete by now. Returns a sentence of warning when not all of the run is in W&B,
        else None. Never raises.
        """
        if self._process is None:
            return self._problem
        again = f"python report.py --wandb {self._folder} uploads the run"
        try:
            # Whatever comes down the pipe says that the log and the report are complete.
            self._process.communicate(b"\n", timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            _kill(self._process)
            return (
                f"W&B had not taken all of the run after {timeout_seconds:.0f} s and was stopped; "
                f"{again}."
            )
        try:
            output = (self._folder / OUTPUT_NAME).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            output = f"{_SPEAKER}the W&B mirror's words are lost: {error}."
        problem = _problem(self._process.returncode, output)
        return None if problem is None else f"{problem} {again}."


def upload(folder: Path, mode: Mode, project: str, timeout_seconds: float = _UPLOAD_SECONDS) -> str:
    """Mirror a run as its log and report have it now; returns where W&B has it.

    Raises:
        RunFailed: if W&B could not be had as asked for, or not in time.
    """
    options = [str(folder), f"--mode={mode}", f"--project={project}"]
    process = start_module(_MODULE, options, subprocess.PIPE, subprocess.PIPE)
    try:
        said, output = process.communicate(timeout=timeout_seconds)
    except BaseException as error:
        _kill(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise RunFailed(
                f"W&B had not taken all of the run after {timeout_seconds:.0f} s and was stopped."
            ) from None
        raise
    problem = _problem(process.returncode, output.decode(errors="replace"))
    if problem is not None:
        raise RunFailed(problem)
    return said.decode().strip()


def _kill(process: subprocess.Popen[bytes]) -> None:
    # wandb-core has left this group, but watches its parent and ends with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)


def _problem(returncode: int, output: str) -> str | None:
    """The sentence that says why a process that has ended did not do all; None if it did."""
    said = [line for line in output.splitlines() if line.startswith(_SPEAKER)]
    if returncode == 0:
        if _GIVEN_UP in output:
            return "W&B's server refused the run's rows, so that not all of them are there."
        return None
    if said:
        return said[-1].removeprefix(_SPEAKER)
    return f"The W&B mirror failed: {(output.strip().splitlines() or ['it said nothing'])[-1]}."
