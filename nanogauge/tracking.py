"""Weights & Biases: a best-effort mirror of the run log, in a process of its own.

The process follows runs/NAME/log.jsonl, so that nothing W&B does can slow the training loop or
stop it, and whatever it misses is still in the log. It can be started again, for a run that goes
on or one that has ended: python -m nanogauge.tracking runs/NAME --mode online
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from nanogauge.cli import Parser, run_command
from nanogauge.config import Config, load_config
from nanogauge.errors import BadInput, RunFailed
from nanogauge.quantities import mfu, tokens_per_second
from nanogauge.records import (
    Checkpoint,
    Compile,
    End,
    Eval,
    Event,
    LogLine,
    Prediction,
    Sensor,
    Start,
    Step,
)
from nanogauge.runlog import FILE_NAME, lines_of

if TYPE_CHECKING:
    import wandb

Mode = Literal["auto", "online", "offline"]

OUTPUT_NAME = "wandb.log"
_POLL_SECONDS = 0.5
_INIT_SECONDS = 15.0
_LAST_SECONDS = 60
"""how long a mirror whose run has ended may still upload"""
_COMPARED = ("step_seconds", "mfu_palm", "power_watts", "peak_process_bytes", "val_loss")
"""row ids drawn as constants beside what is measured"""
_SENSOR_KEYS = {
    "power_watts": "gpu/power_watts",
    "energy_joules": "gpu/energy_joules",
    "power_limit_watts": "gpu/power_limit_watts",
    "temperature_celsius": "gpu/temperature_celsius",
    "sm_clock_hz": "gpu/sm_clock_hz",
    "utilization": "gpu/utilization",
    "device_used_bytes": "memory/device_used_bytes",
    "process_used_bytes": "memory/process_used_bytes",
}


class Mirror:
    """The mirror's process, as the training loop holds it."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes] | None, problem: str) -> None:
        self._folder = folder
        self._process = process
        self._problem = problem

    @classmethod
    def start(cls, folder: Path, mode: Mode, project: str, log_every: int) -> Mirror:
        """Start to mirror a run whose folder holds config.toml and prediction.json.

        Every `log_every`-th step goes to W&B, and every evaluation. Does not wait for W&B and
        never raises: what goes wrong is told by finish().
        """
        log = folder / FILE_NAME
        known_bytes = log.stat().st_size if log.exists() else 0
        command = [sys.executable, "-P", "-m", "nanogauge.tracking", str(folder.resolve())]
        command += [f"--mode={mode}", f"--project={project}", f"--log-every={log_every}"]
        command += [f"--attached={known_bytes}"]
        # The package need not be installed, nor the current folder be the one it lies in.
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        try:
            with (folder / OUTPUT_NAME).open("wb") as output:
                # A session of its own: Ctrl-C is for the loop, which then ends the log as it likes.
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            return cls(folder, None, f"the W&B mirror could not be started: {error}.")
        return cls(folder, process, "")

    def finish(self, timeout_seconds: float = 10.0) -> str | None:
        """Let the mirror come to the end of the log, for so long at most.

        Returns a sentence of warning when not all of the run is in W&B, else None. Never raises.
        """
        if self._process is None:
            return self._problem
        again = f"python -m nanogauge.tracking {self._folder} mirrors the run again"
        try:
            # Whatever comes down the pipe says that the log is complete.
            self._process.communicate(b"\n", timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            # wandb-core has left this group, but watches its parent and ends with it.
            os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            return (
                f"W&B had not taken all of the run after {timeout_seconds:.0f} s and was stopped; "
                f"{again}."
            )
        if self._process.returncode == 0:
            return None
        try:
            output = (self._folder / OUTPUT_NAME).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            output = f"tracking.py: the W&B mirror failed, and its words are lost: {error}."
        said = [line for line in output.splitlines() if line.startswith("tracking.py: ")]
        if said:
            return said[-1].removeprefix("tracking.py: ")
        return f"the W&B mirror failed, see {self._folder / OUTPUT_NAME}; {again}."


class _Follower:
    """Turns the lines of a log into W&B's rows."""

    def __init__(self, run: wandb.Run, prediction: Prediction, log_every: int) -> None:
        self._run = run
        self._prediction = prediction
        self._log_every = log_every
        self._step_flops: float | None = None
        self._sensor: Sensor | None = None
        expected = {name: prediction.quantities.get(name) for name in _COMPARED}
        self._predicted = {
            f"predicted/{name}": estimate.expected
            for name, estimate in expected.items()
            if estimate
        }

    def take(self, line: LogLine, alert: bool) -> None:
        """Mirror one line; a warning is sent as an alert where that is wanted."""
        match line:
            case Start():
                # The prediction was made for the first start; a run may go on for longer.
                flops = self._prediction.quantities.get("flops_total_palm")
                if self._step_flops is None and flops is not None:
                    self._step_flops = flops.expected / line.max_steps
            case Step():
                if line.step % self._log_every == 0:
                    self._log(line, self._step_row(line))
            case Sensor():
                self._sensor = line
            case Eval():
                row = {"train_loss": line.train_loss, "val_loss": line.val_loss}
                row["seconds"] = line.seconds
                self._log(line, {f"eval/{key}": value for key, value in row.items()})
            case Checkpoint():
                row = {"checkpoint/seconds": line.seconds, "checkpoint/bytes": line.bytes}
                self._log(line, row)
            case Compile():
                self._run.summary["perf/compile_seconds"] = line.seconds
            case Event():
                if alert and line.level == "warning":
                    self._run.alert(title=line.what[:63], text=line.text, level="WARN")
            case End():
                for name in ("allocated", "reserved", "process"):
                    key = f"peak_{name}_bytes"
                    self._run.summary[f"memory/{key}"] = getattr(line, key)
                self._run.summary["run/status"] = line.status
                self._run.summary["run/wall_seconds"] = line.wall_seconds

    def _step_row(self, line: Step) -> dict[str, float | None]:
        row: dict[str, float | None] = {
            "train/loss": line.loss,
            "train/learning_rate": line.learning_rate,
            "train/grad_norm": line.grad_norm,
            "perf/step_seconds": line.step_seconds,
            "perf/data_wait_seconds": line.data_wait_seconds,
        }
        if line.step_seconds is not None:
            if line.tokens is not None:
                speed = tokens_per_second(line.tokens, line.step_seconds)
                row["perf/tokens_per_second"] = speed
            peak_flops = self._prediction.peak_flops
            if self._step_flops is not None and peak_flops is not None:
                row["perf/mfu_palm"] = mfu(self._step_flops, line.step_seconds, peak_flops)
        if self._sensor is not None:
            row |= {key: getattr(self._sensor, name) for name, key in _SENSOR_KEYS.items()}
            self._sensor = None  # a reading is shown once, at the step that followed it
        return row | self._predicted

    def _log(self, line: Step | Eval | Checkpoint, row: dict[str, Any]) -> None:
        row["run/elapsed_seconds"] = line.elapsed_seconds
        measured = {key: value for key, value in row.items() if value is not None}
        self._run.log({**measured, "step": line.step})


def _follow(path: Path, attached_at: int | None) -> Iterator[tuple[LogLine, bool]]:
    """The lines of a log as they are written, each with whether it is new.

    Ends with the end line, if no other line follows it. Where the run's own process attached the
    mirror, new is what comes after the first `attached_at` bytes, only a new end line counts, and
    it also ends once that process says that the log is complete, or is gone.
    """
    offset, over, ended = 0, False, False
    while True:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as log:
            log.seek(offset)
            data = log.read()
            whole = data[: data.rfind(b"\n") + 1]
            for piece, line in zip(whole.split(b"\n"), lines_of(whole, path), strict=False):
                assert line is not None
                new = attached_at is not None and offset >= attached_at
                ended = isinstance(line, End) and (new or attached_at is None)
                yield line, new
                offset += len(piece) + 1
        if over or ended:
            return
        if attached_at is None:
            time.sleep(_POLL_SECONDS)
        else:
            # Readable on a word from the run's process, and at its death by any cause.
            over = bool(select.select([sys.stdin], [], [], _POLL_SECONDS)[0])


def _begin(
    folder: Path, config: Config, prediction: Prediction, mode: Mode, project: str
) -> tuple[wandb.Run, str]:
    """Begin W&B's run, offline if it cannot be had online; why so, where that was not asked for."""
    import wandb

    def begin(actual: Literal["online", "offline"]) -> wandb.Run:
        return wandb.init(
            mode=actual,
            project=project,
            name=config.run.name,
            dir=folder,
            config={**config.model_dump(), "prediction": _predicted(prediction)},
            settings=wandb.Settings(
                init_timeout=_INIT_SECONDS,
                console="off",
                # They would describe this process, not the one that trains.
                x_disable_stats=True,
                x_save_requirements=False,
                disable_git=True,
                disable_code=True,
            ),
        )

    if mode == "offline":
        return begin("offline"), ""
    try:
        return begin("online"), ""
    except wandb.errors.UsageError as error:  # no key
        return begin("offline"), "" if mode == "auto" else str(error)
    except wandb.errors.Error as error:
        return begin("offline"), str(error)


def _predicted(prediction: Prediction) -> dict[str, Any]:
    fields = {"low", "expected", "high", "unit"}
    quantities = prediction.quantities.items()
    return {
        "hardware": prediction.hardware.model_dump(),
        **{name: estimate.model_dump(include=fields) for name, estimate in quantities},
    }


def main(arguments: Sequence[str]) -> int:
    """Mirror one run folder.

    Raises:
        BadInput: if the folder holds no configuration, prediction or undamaged log.
        RunFailed: if the run is not in W&B, or only offline where it was to be online.
    """
    parser = Parser("Mirror the log of a run to Weights & Biases, to its end.")
    parser.add_argument("folder", type=Path, help="folder of the run")
    parser.add_argument("--mode", choices=("auto", "online", "offline"), default="auto")
    parser.add_argument("--project", help="W&B project; that of config.toml where not given")
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
    folder: Path = options.folder
    config = load_config(folder / "config.toml")
    try:
        text = (folder / "prediction.json").read_text(encoding="utf-8")
        prediction = Prediction.model_validate_json(text)
    except (OSError, ValidationError):
        raise BadInput(
            f"{folder} holds no readable prediction.json; give a run's folder."
        ) from None
    log_every = config.train.log_every if options.log_every is None else options.log_every
    if log_every < 1:
        raise BadInput(f"--log-every must be at least 1, not {log_every}.")

    if options.attached is not None:
        os.nice(10)  # the loop comes first
    project = options.project or config.wandb.project
    try:
        run, offline_because = _begin(folder, config, prediction, options.mode, project)
        run.define_metric("*", step_metric="step")
        follower = _Follower(run, prediction, log_every)
        for line, new in _follow(folder / FILE_NAME, options.attached):
            follower.take(line, alert=new)
        if options.attached is not None:
            # Nobody waits for a mirror whose run has died; the kernel ends it even inside W&B.
            signal.alarm(_LAST_SECONDS)
        run.finish()
    except BadInput:
        raise
    except Exception as error:
        # What W&B raises when its own process dies or hangs is not documented, and of many types.
        traceback.print_exc()
        raise RunFailed(
            f"W&B failed before the end of the run: {type(error).__name__} {error}."
        ) from None
    if offline_because:
        raise RunFailed(
            f"W&B could not be had online ({offline_because.splitlines()[0].rstrip('.')}), so the "
            f"run is mirrored offline: wandb sync {run.settings.sync_dir} uploads it."
        )
    return 0


if __name__ == "__main__":
    try:
        run_command(main)
    except SystemExit as done:
        # Everything is written by now; W&B's exit hook would go on waiting for a silent server.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(done.code or 0))
