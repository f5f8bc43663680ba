"""An hour of training while the GPU driver, W&B and the disk fail at random."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from commands import build_fake_driver, fill_disk, run, small_disk, succeed
from slow.demo_runs import begin, damaged
from wandb_stub import Mood, WandbStub

from nanogauge.analysis.report_model import Report
from nanogauge.runlog.reader import read_log
from trainer.checkpoints.checkpoint import list_checkpoints

SECONDS = 3600
CALLS = [
    *("power_usage", "energy", "temperature", "fan", "sm_clock", "memory_clock", "utilization"),
    *("event_reasons", "pcie_generation", "pcie_width", "memory", "compute", "power_limit"),
]
CODES = (3, 10, 15, 999)
"""not supported, timed out, the GPU is lost, unknown"""
MOODS: tuple[Mood, ...] = ("fine", "slow", "errors", "drops")
KEPT, LOG_EVERY = 2, 50
FLAGS = [
    *("--run.name=soak", "--train.max-steps=100000000", "--train.checkpoint-every=500"),
    *(f"--train.keep-checkpoints={KEPT}", f"--train.log-every={LOG_EVERY}", "--measure.gpu=0"),
    *("--measure.idle-seconds=0", "--wandb.mode=online"),
]
BYTES_PER_HOUR = 20e6
"""growth that an hour may show; a leak of one kilobyte a step is above it"""


def test_an_hour_of_failures_loses_nothing_and_leaks_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "out", "512m") as disk, WandbStub() as server:
        folder = disk / "soak"
        driver = str(tmp_path / "driver.txt")
        environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
        environment |= {"XDG_DATA_HOME": str(tmp_path / "data"), "FAKE_NVML_SCRIPT": driver}
        environment["LD_LIBRARY_PATH"] = str(build_fake_driver(tmp_path))
        (tmp_path / "driver.txt").write_text(failing_driver(random.Random(1)))
        process = begin(f"--run.out={disk}", *FLAGS, **environment)
        try:
            samples = np.array(list(disturb(process, server, disk)))
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate()
        finally:
            process.kill()
        assert process.returncode == 128 + signal.SIGTERM, said
        succeed(run("report.py", "--wandb", folder, **environment))
        uploads = [row for stored in server.runs.values() for row in stored.rows]
        rows = {row["step"] for row in uploads if "train/loss" in row}

        recorded = read_log(folder)
        assert [step.step for step in recorded.steps] == list(range(len(recorded.steps)))
        assert {s.step for s in recorded.steps if s.step % LOG_EVERY == 0} <= rows
        assert all(reading.power_watts != 0 for reading in recorded.sensors)
        assert damaged(folder) == []
        assert len(list_checkpoints(folder / "checkpoints")) <= KEPT + 1
        assert Report.model_validate_json((folder / "report.json").read_bytes()).rows
    for name, column, most in (("bytes", 1, BYTES_PER_HOUR), ("files", 2, 1), ("threads", 3, 1)):
        slope, error = per_hour(samples[:, 0], samples[:, column])
        assert slope - error < most, f"{name} grow by {slope:.1f} +- {error:.1f} an hour"


def failing_driver(chance: random.Random) -> str:
    """Return a script for the fake driver: one failure in eight seconds on average, and a hang."""
    lines, at = [], 20.0
    while at < SECONDS and len(lines) < 900:
        until = at + chance.uniform(0.5, 10)
        error = f"error {chance.choice(CALLS)} {chance.choice(CODES)}"
        lines.append(f"{at:.2f} {'lost' if chance.random() < 0.03 else error} {until:.2f}")
        if len(lines) % 10 == 0:
            lines.append(f"{at:.2f} watts {chance.uniform(20, 200):.0f}")
        at += chance.expovariate(1 / 8)
    hang = chance.uniform(0.3, 0.4) * SECONDS
    return "\n".join([*lines, f"{hang:.2f} hang {hang + 15:.2f}"])


def disturb(
    process: subprocess.Popen[str], server: WandbStub, disk: Path
) -> Iterator[tuple[float, int, int, int]]:
    """Change the server's mood and fill the disk; yield seconds, resident bytes, files, threads."""
    chance, began = random.Random(2), time.monotonic()
    other_mood, fills, filler = 30.0, 60.0, disk / "filler"
    while (now := time.monotonic() - began) < SECONDS:
        assert process.poll() is None, process.communicate()
        if now > other_mood:
            server.mood = chance.choice(MOODS) if server.mood == "fine" else "fine"
            other_mood = now + chance.uniform(5, 40)
        if now > fills:
            fills = now + (chance.uniform(30, 120) if filler.exists() else chance.uniform(2, 10))
            filler.unlink() if filler.exists() else fill_disk(filler)
        if (disk / "soak" / "log.jsonl").exists():
            (disk / "soak" / "log.jsonl").read_bytes()  # a reader beside the writer
            status = Path(f"/proc/{process.pid}/status").read_text()
            numbers = dict(line.split()[:2] for line in status.splitlines() if ":\t" in line)
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            yield now, 1024 * int(numbers["VmRSS:"]), files, int(numbers["Threads:"])
        time.sleep(2)
    filler.unlink(missing_ok=True)
    server.mood = "fine"


def per_hour(seconds: np.ndarray, values: Sequence[float]) -> tuple[float, float]:
    """Return the least-squares slope over the second half, and twice its standard error."""
    half = len(values) // 2
    (slope, _), spread = np.polyfit(seconds[half:] / 3600, values[half:], 1, cov=True)
    return float(slope), 2 * float(np.sqrt(spread[0, 0]))
