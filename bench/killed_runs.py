"""A short run, killed -9 again and again, beside the same run undisturbed; for chaos.py."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from nanogauge.errors import RunFailed
from nanogauge.runlog import read_log

ROOT = Path(__file__).parents[1]
STEPS = 6000
SIZE = {
    "model.n-layer": 2,
    "model.n-head": 2,
    "model.n-embd": 64,
    "model.block-size": 64,
    "model.dropout": 0.1,
    "train.micro-batch": 4,
    "train.grad-accum": 2,
    "train.max-steps": STEPS,
    "train.eval-every": 40,
    "train.eval-batches": 4,
    "train.checkpoint-every": 20,
    "wandb.mode": "disabled",
}
LONGEST_LIFE_SECONDS = 2.5
"""after its first line; a process then has made some hundred steps"""


@dataclass
class Killed:
    kills: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    """what the process was doing: as far as its files tell"""
    broken_lines: int = 0
    """lines before the last one that are not whole"""
    failed_starts: list[str] = field(default_factory=list)


def begin(out: Path, name: str, compiled: bool, *more: str) -> subprocess.Popen[str]:
    flags = [f"--{key}={value}" for key, value in SIZE.items()]
    flags += [f"--run.out={out}", f"--run.name={name}", f"--run.compile={str(compiled).lower()}"]
    return subprocess.Popen(
        [sys.executable, "train.py", "configs/demo.toml", *flags, *more],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_again_and_again(out: Path, kills: int, seed: int, compiled: bool) -> Killed:
    """Kill a run so many times at random moments, going on with it each time; then let it end.

    A third of the kills wait for a checkpoint to be in the midst of being written.

    Raises:
        RunFailed: if the run does not end well when it is left alone.
    """
    chance, done = random.Random(seed), Killed()
    folder = out / "killed"
    more = ["--force"]
    log = folder / "log.jsonl"
    while done.kills < kills:
        size = log.stat().st_size if log.exists() else 0
        began = time.time()
        process = begin(out, "killed", compiled, *more)
        while process.poll() is None and not (log.exists() and log.stat().st_size > size):
            time.sleep(0.005)
        if process.poll() is None:
            ends = time.monotonic() + chance.uniform(0, LONGEST_LIFE_SECONDS)
            in_write = chance.random() < 1 / 3
            while process.poll() is None and time.monotonic() < ends:
                time.sleep(0.002)
            while in_write and process.poll() is None and not being_written(folder, began):
                time.sleep(0.0005)
        if process.poll() is not None:
            break  # it came to its end before its time
        process.kill()
        _, said = process.communicate()
        if said:
            done.failed_starts.append(said)
        done.kills += 1
        done.moments[moment(folder, began)] += 1
        done.broken_lines += broken_lines(log)
        more = ["--force", "--resume=auto"]
    process = begin(out, "killed", compiled, *more)
    _, said = process.communicate()
    if process.returncode:
        raise RunFailed(f"the killed run did not come to its end: {said}")
    return done


def being_written(folder: Path, began: float) -> bool:
    """Whether the process of this time of day has a checkpoint on its way to the disk.

    What an earlier one left unfinished lies there until the next is written.
    """
    for path in (folder / "checkpoints").glob(".step_*"):
        with contextlib.suppress(OSError):  # it has been renamed in between
            if path.stat().st_mtime > began:
                return True
    return False


def moment(folder: Path, began: float) -> str:
    """What a killed process was doing, as far as it can be seen."""
    if being_written(folder, began):
        return "checkpoint"
    data = (folder / "log.jsonl").read_bytes()
    if not data.endswith(b"\n"):
        return "log line"
    last = json.loads(data.splitlines()[-1])
    if last["kind"] == "start" or last["kind"] == "event":
        return "start"
    if last["kind"] == "step" and (last["step"] + 1) % SIZE["train.eval-every"] == 0:
        return "evaluation"
    return "step"


def broken_lines(log: Path) -> int:
    """Lines before the last that are no JSON."""
    broken = 0
    for line in log.read_bytes().split(b"\n")[:-1]:
        try:
            json.loads(line)
        except ValueError:
            broken += 1
    return broken


def differences(one: Path, other: Path) -> list[str]:
    """In what two finished runs differ: weights, and the figures of each step and evaluation."""
    found = []
    weights = [
        hashlib.sha256(
            (run / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors").read_bytes()
        ).hexdigest()
        for run in (one, other)
    ]
    if weights[0] != weights[1]:
        found.append("weights")
    logs = [read_log(run) for run in (one, other)]
    losses = [[(s.step, s.loss, s.grad_norm, s.learning_rate) for s in log.steps] for log in logs]
    if losses[0] != losses[1]:
        found.append("steps")
    evals = [[(e.step, e.train_loss, e.val_loss) for e in log.evals] for log in logs]
    if evals[0] != evals[1]:
        found.append("evaluations")
    return found


def undisturbed(out: Path, compiled: bool) -> None:
    """The same run, left alone.

    Raises:
        RunFailed: if it fails.
    """
    process = begin(out, "undisturbed", compiled, "--force")
    _, said = process.communicate()
    if process.returncode:
        raise RunFailed(f"the undisturbed run failed: {said}")
