"""An hour of training while everything around it fails at random: what grows, and what is lost.

python bench/soak.py [--minutes 60] [--seed 1] [--json]

The demo's model trains beside a stand-in for the GPU driver whose calls fail, whose card is lost
and which hangs; its W&B server is slow, answers with errors or cuts connections; its disk is filled
by another program again and again (only where this may mount a file system), and a third one reads
its log all the time. Printed: the growth of memory, files and threads of the training process over
the second half of the time, with twice its standard error; and what is missing afterwards of steps,
checkpoints, rows in W&B and the report. Exit status 1 if anything is. Needs gcc.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from commands import build_fake_driver  # type: ignore[import-not-found]  # noqa: E402
from results import result  # noqa: E402
from wandb_stub import Mood, WandbStub  # type: ignore[import-not-found]  # noqa: E402

from nanogauge.cli import Parser, run_command  # noqa: E402
from nanogauge.errors import RunFailed  # noqa: E402
from nanogauge.report.build import Report  # noqa: E402
from nanogauge.runlog import read_log  # noqa: E402
from trainer.checkpoints.checkpoint import intact_meta, list_checkpoints  # noqa: E402

CALLS = [
    "power_usage",
    "energy",
    "temperature",
    "fan",
    "sm_clock",
    "memory_clock",
    "utilization",
    "event_reasons",
    "pcie_generation",
    "pcie_width",
    "memory",
    "compute",
    "power_limit",
]
CODES = (3, 10, 15, 999)
"""not supported, timed out, the GPU is lost, unknown"""
MOODS: tuple[Mood, ...] = ("fine", "slow", "errors", "drops")
DISK_MEGABYTES = 512
KEPT = 2
LOG_EVERY = 50
FLAGS = [
    "--run.name=soak",
    "--train.max-steps=100000000",
    "--train.checkpoint-every=500",
    f"--train.keep-checkpoints={KEPT}",
    f"--train.log-every={LOG_EVERY}",
    "--measure.gpu=0",
    "--measure.idle-seconds=0",
    "--wandb.mode=online",
    "--force",
]


@dataclass
class Watched:
    """What was seen of the training process, and what was done to it."""

    seconds: list[float] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    rows: set[int] = field(default_factory=set)
    """steps whose loss W&B had after report.py --wandb"""

    def sample(self, pid: int, seconds: float) -> None:
        status = Path(f"/proc/{pid}/status").read_text()
        numbers = dict(line.split()[:2] for line in status.splitlines() if len(line.split()) > 1)
        self.seconds.append(seconds)
        self.resident_bytes.append(1024 * int(numbers["VmRSS:"]))
        self.threads.append(int(numbers["Threads:"]))
        self.files.append(len(os.listdir(f"/proc/{pid}/fd")))

    def per_hour(self, values: Sequence[float]) -> tuple[float, float]:
        """The slope over the second half, by least squares, and twice its standard error."""
        half = len(values) // 2
        hours = np.array(self.seconds[half:]) / 3600
        (slope, _), spread = np.polyfit(hours, np.array(values[half:], float), 1, cov=True)
        return float(slope), 2 * float(np.sqrt(spread[0, 0]))


def failing_driver(chance: random.Random, seconds: float, done: Counter[str]) -> str:
    """A script for the stand-in of the driver: something fails about every eight seconds."""
    lines: list[str] = []
    at = 20.0
    while at < seconds and len(lines) < 900:
        until = at + chance.uniform(0.5, 10)
        kind = chance.random()
        if kind < 0.03:
            lines.append(f"{at:.2f} lost {until:.2f}")
            done["card lost"] += 1
        else:
            lines.append(
                f"{at:.2f} error {chance.choice(CALLS)} {chance.choice(CODES)} {until:.2f}"
            )
            done["driver errors"] += 1
        if len(lines) % 10 == 0:
            lines.append(f"{at:.2f} watts {chance.uniform(20, 200):.0f}")
        at += chance.expovariate(1 / 8)
    hang = chance.uniform(0.3, 0.4) * seconds
    done["driver hangs"] += 1
    return "\n".join([*lines, f"{hang:.2f} hang {hang + 15:.2f}"])


def train_amid_failures(scratch: Path, out: Path, minutes: float, seed: int, full: bool) -> Watched:
    """Train for so long, then ask to stop; the stub's rows are checked as long as it is there.

    Raises:
        RunFailed: if training ends in another way than by being stopped.
    """
    chance, watched = random.Random(seed), Watched()
    script = scratch / "driver.txt"
    script.write_text(failing_driver(chance, 60 * minutes, watched.done))
    driver = scratch / "driver"
    driver.mkdir()
    with WandbStub() as stub, ExitStack() as stack:
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(build_fake_driver(driver)),
            "FAKE_NVML_SCRIPT": str(script),
            "WANDB_BASE_URL": stub.url,
            "WANDB_API_KEY": "a" * 40,
            "XDG_DATA_HOME": str(scratch / "data"),
        }
        process = subprocess.Popen(
            [sys.executable, "train.py", "configs/demo.toml", *FLAGS, f"--run.out={out}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        stack.callback(process.kill)
        began = time.monotonic()
        log, filler = out / "soak" / "log.jsonl", out / "filler"
        other_mood, fills = 30.0, 60.0
        while process.poll() is None and (now := time.monotonic() - began) < 60 * minutes:
            if now > other_mood:
                stub.mood = chance.choice(MOODS) if stub.mood == "fine" else "fine"
                other_mood = now + chance.uniform(5, 40)
                watched.done[f"W&B {stub.mood}"] += 1
            if full and now > fills:
                if filler.exists():
                    filler.unlink()
                    fills = now + chance.uniform(30, 120)
                else:
                    fill(filler)
                    watched.done["disk filled"] += 1
                    fills = now + chance.uniform(2, 10)
            if log.exists():
                log.read_bytes()
                watched.sample(process.pid, now)
            time.sleep(2)
        filler.unlink(missing_ok=True)
        stub.mood = "fine"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
        if process.returncode != 128 + signal.SIGTERM:
            raise RunFailed(f"training ended with exit status {process.returncode}: {said}")
        in_time = rows_of(stub)
        upload = [sys.executable, "report.py", "--wandb", str(out / "soak")]
        subprocess.run(upload, cwd=ROOT, env=environment, capture_output=True, check=False)
        watched.rows = rows_of(stub)
        watched.done["W&B rows that came with report.py --wandb"] = len(watched.rows - in_time)
    return watched


def rows_of(stub: WandbStub) -> set[int]:
    """The steps whose loss the server has."""
    return {row["step"] for run in stub.runs.values() for row in run.rows if "train/loss" in row}


def fill(path: Path) -> None:
    """Write zeros until there is no room."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 2**20):
                pass
        except OSError:
            return


def missing(folder: Path, watched: Watched) -> dict[str, int]:
    """What a run that lost nothing would have, and this one has not."""
    recorded = read_log(folder)
    mirrored = {step.step for step in recorded.steps if step.step % LOG_EVERY == 0}
    checkpoints = list_checkpoints(folder / "checkpoints")
    report = Report.model_validate_json((folder / "report.json").read_bytes())
    power = [reading.power_watts for reading in recorded.sensors]
    return {
        "steps_lost": sum(s.step != i for i, s in enumerate(recorded.steps)),
        "checkpoints_damaged": sum(intact_meta(path) is None for path in checkpoints),
        "checkpoints_beyond_the_rule": max(0, len(checkpoints) - KEPT - 1),
        "wandb_rows_lost": len(mirrored - watched.rows),
        "readings_of_zero": sum(watts == 0 for watts in power),
        "report_without_steps": int(not report.rows),
    }


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="of training")
    parser.add_argument("--seed", type=int, default=1, help="of what fails when")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    given = parser.parse(arguments)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        out = scratch / "out"
        out.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "tmpfs", str(out)]
        full = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        try:
            watched = train_amid_failures(scratch, out, given.minutes, given.seed, full)
            lost = missing(out / "soak", watched)
            steps = len(read_log(out / "soak").steps)
        finally:
            if full:
                subprocess.run(["umount", "-l", str(out)], check=True)
    report(watched, lost, steps, given.json)
    return 1 if any(lost.values()) else 0


def report(watched: Watched, lost: dict[str, int], steps: int, as_json: bool) -> None:
    case = f"{watched.seconds[-1] / 60:.0f} min"
    results = [result("steps", case, [steps], None)]
    growing: dict[str, tuple[Sequence[float], float]] = {
        "resident_bytes": (watched.resident_bytes, 1e6),
        "files": (watched.files, 1),
        "threads": (watched.threads, 1),
    }
    for name, (values, unit) in growing.items():
        slope, error = watched.per_hour(values)
        results.append(result(name, case, values, None))
        results.append(
            result(f"{name}_per_hour", case, [slope - error, slope, slope + error], None)
        )
        if not as_json:
            shown = (values[len(values) // 2], values[-1], max(values), slope, error)
            half, last, most, by, around = (value / unit for value in shown)
            print(
                f"{name:16} {half:.0f} after half the time, {last:.0f} at its end, {most:.0f} at "
                f"most; {by:+.2f} +- {around:.2f} an hour" + " (MB)" * (unit > 1)
            )
    results += [result(name, case, [count], None) for name, count in lost.items()]
    if as_json:
        print(json.dumps({"bench": "soak", "results": results}))
        return
    print(f"{steps:,} steps in {case}; " + ", ".join(f"{n} {k}" for k, n in watched.done.items()))
    print("\n".join(f"{name:28} {count}" for name, count in lost.items()))


if __name__ == "__main__":
    run_command(main)
