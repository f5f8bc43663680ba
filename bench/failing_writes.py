"""Short runs of which single writes to the disk fail; for chaos.py.

As a process of its own it has failing_writes.c before the C library and train.py imported, and runs
each request, a line of JSON on stdin, in a copy of itself. The answer is a line with the exit
status (None: it did not end in time) and how many writes there were.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from killed_runs import broken_lines  # noqa: E402

MOST_SECONDS = 60
STEPS = 24
SIZE = {
    "model.n-layer": 1,
    "model.n-head": 2,
    "model.n-embd": 32,
    "model.block-size": 32,
    "model.dropout": 0.1,
    "train.micro-batch": 4,
    "train.grad-accum": 1,
    "train.max-steps": STEPS,
    "train.eval-every": 12,
    "train.eval-batches": 1,
    "train.checkpoint-every": 8,
    "run.compile": "false",
    "wandb.mode": "disabled",
}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
LENGTHS = (1, 20, 1_000_000)
"""writes in a row that fail: one, some, or all from there on"""


@dataclass
class Failed:
    """How runs ended of which writes failed."""

    ends: Counter[str] = field(default_factory=Counter)
    """by the exit status, and by how many writes failed"""
    writes: int = 0
    """of a run in which none fails"""
    wrong: list[str] = field(default_factory=list)


class Server:
    """A process that runs train.py, with writes that fail."""

    def __init__(self, scratch: Path) -> None:
        library = scratch / "failing_writes.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        pipe = subprocess.PIPE
        self._scratch = scratch
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "LD_PRELOAD": str(library)},
            stdin=pipe,
            stdout=pipe,
            text=True,
        )

    def train(self, out: Path, *more: str, fault: list[int] | None = None) -> dict[str, Any]:
        """Train in a folder; fault is the first and the last write that fail, and the error."""
        assert self._process.stdin is not None and self._process.stdout is not None
        flags = [f"--{key}={value}" for key, value in SIZE.items()]
        request = {
            "arguments": ["configs/demo.toml", *flags, f"--run.out={out}", "--run.name=run", *more],
            "folder": str(out),
            "environment": {"XDG_DATA_HOME": str(self._scratch / "data")},
            "stdout": os.devnull,
            "stderr": str(self._scratch / "said.txt"),
            "writes": str(self._scratch / "writes.txt"),
            "fault": fault,
        }
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        answer["said"] = (self._scratch / "said.txt").read_text()
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def served(scratch: Path) -> Iterator[Server]:
    server = Server(scratch)
    try:
        yield server
    finally:
        server.close()


def let_writes_fail(scratch: Path, count: int, seed: int) -> Failed:
    """Let a write fail in so many short runs, at a random place, and go on with each afterwards."""
    chance, failed = random.Random(seed), Failed()
    with served(scratch) as server:
        whole = scratch / "whole"
        answer = server.train(whole, "--force", fault=[-1, -1, 0])
        assert answer["status"] == 0, answer["said"]
        failed.writes = answer["writes"]
        for number in range(count):
            first = chance.randint(1, failed.writes)
            length, error = chance.choice(LENGTHS), chance.choice(ERRORS)
            out = scratch / f"run{number}"
            answer = server.train(out, "--force", fault=[first, first + length - 1, error])
            ended = "hung" if answer["status"] is None else f"exit {answer['status']}"
            writes = "one write" if length == 1 else f"{min(length, failed.writes):,} writes"
            failed.ends[f"{ended} after {writes} failed"] += 1
            told = f"write {first}, {length} in a row, {errno.errorcode[error]}: "
            wrong = ended_wrongly(answer) or harmed(out / "run")
            failed.wrong += [told + each for each in wrong]
            answer = server.train(out, "--force", "--resume=auto")
            if answer["status"] != 0:
                failed.wrong.append(f"{told}cannot be gone on with: {answer['said']}")
            elif weights(out / "run") != weights(whole / "run"):
                failed.wrong.append(f"{told}other weights in the end")
    return failed


def ended_wrongly(answer: dict[str, Any]) -> list[str]:
    """What a run must not do where a write fails: hang, crash, or fail without one sentence."""
    status, said = answer["status"], answer["said"]
    if status is None:
        return ["hung"]
    if status == 0:
        return [] if "Traceback" not in said else [f"a traceback: {said}"]
    lines = said.strip().splitlines()
    if status not in (1, 2) or "Traceback" in said or not lines:
        return [f"ended with {status}: {said}"]
    return []


def harmed(folder: Path) -> list[str]:
    """Files that are there under their own name, but not whole."""
    from trainer.checkpoints.checkpoint import intact_meta, list_checkpoints

    log, found = folder / "log.jsonl", []
    if log.exists() and (broken := broken_lines(log)):
        found.append(f"{broken} lines of the log are broken")
    for path in list_checkpoints(folder / "checkpoints"):
        if intact_meta(path) is None:
            found.append(f"{path.name} is damaged")
    for name in ("prediction.json", "report.json"):
        if (folder / name).exists():
            try:
                json.loads((folder / name).read_bytes())
            except ValueError:
                found.append(f"{name} is broken")
    return found


def weights(folder: Path) -> bytes:
    return (folder / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors").read_bytes()


def serve(requests: IO[str]) -> None:
    """Answer requests, each in a copy of this process."""
    from train_server import run_command, train, train_in_copy  # type: ignore[import-not-found]

    shim = ctypes.CDLL(None)
    for line in requests:
        request = json.loads(line)

        def work(request: dict[str, Any] = request) -> None:
            os.setsid()
            if request["fault"] is not None:
                first, last, error = (ctypes.c_long(n) for n in request["fault"])
                shim.fail_writes(request["folder"].encode(), first, last, error)
            try:
                run_command(train.main)
            finally:
                Path(request["writes"]).write_text(str(shim.writes_seen()))

        child = train_in_copy(request, work)
        status, ends = None, time.monotonic() + MOST_SECONDS
        while time.monotonic() < ends:
            found, code = os.waitpid(child, os.WNOHANG)
            if found:
                status = os.waitstatus_to_exitcode(code)
                break
            time.sleep(0.005)
        else:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        writes = int(Path(request["writes"]).read_text()) if status is not None else 0
        print(json.dumps({"status": status, "writes": writes}), flush=True)


if __name__ == "__main__":
    os.chdir(ROOT)
    serve(sys.stdin)
