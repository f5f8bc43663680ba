"""Runs that a test begins, waits for and ends."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from commands import DEMO, ROOT, TINY, command


def start(out: Path, *more: object) -> subprocess.Popen[bytes]:
    """Begin a tiny run that would take minutes."""
    arguments = ["train.py", DEMO, f"--run.out={out}", *TINY, "--train.max-steps=20000", *more]
    return subprocess.Popen(
        command(*map(str, arguments)),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for_step(folder: Path, step: int, process: int = 1) -> None:
    """Until the first, second ... process of a run has logged this step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (folder / "log.jsonl").exists():
            sessions = (folder / "log.jsonl").read_text().split('"kind": "start"')
            if len(sessions) > process and f'"step": {step},' in sessions[process]:
                return
        time.sleep(0.002)  # steps take some 10 ms
    raise AssertionError(f"step {step} was not reached")
