"""Short runs in which single writes to the disk fail.

As a process of its own it preloads failing_writes.c and imports train.py, then runs each request, a
line of JSON on stdin, in a forked copy. The answer is a line with the exit status (None at the time
limit) and the number of writes.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 60
STEPS = 24
FLAGS = [
    *("configs/demo.toml", "--force", "--run.name=run", "--run.compile=false"),
    *("--model.n-layer=1", "--model.n-head=2", "--model.n-embd=32", "--model.block-size=32"),
    *("--model.dropout=0.1", "--train.micro-batch=4", "--train.grad-accum=1"),
    *(f"--train.max-steps={STEPS}", "--train.eval-every=12", "--train.eval-batches=1"),
    *("--train.checkpoint-every=8", "--wandb.mode=disabled"),
]
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
LENGTHS = (1, 20, 1_000_000)
"""consecutive writes that fail: one, some, or all to the end"""


class Server:
    """A process that runs train.py with failing writes. A context manager."""

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
            cwd=ROOT,
        )

    def train(self, out: Path, *more: str, fault: tuple[int, int, int] | None) -> dict[str, Any]:
        """Train in a folder; `fault` is the first and last write that fail, and the error."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {
            "arguments": [*FLAGS, f"--run.out={out}", *more],
            "folder": str(out),
            "environment": {"XDG_DATA_HOME": str(self._scratch / "data")},
            "stdout": os.devnull,
            "stderr": str(self._scratch / "stderr.txt"),
            "writes": str(self._scratch / "writes.txt"),
            "fault": fault,
        }
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer | {"stderr": (self._scratch / "stderr.txt").read_text()}

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def let_writes_fail(scratch: Path, count: int, seed: int) -> tuple[int, Counter[str], list[str]]:
    """Let writes fail at random places in `count` runs, and resume each.

    Return the writes of a run without failures, how often each exit status came, and what is wrong.
    """
    from slow.runs import damaged, weights  # with torch, which a server imports after train.py

    chance, ends, problems = random.Random(seed), Counter[str](), []
    with Server(scratch) as server:
        whole = scratch / "whole"
        answer = server.train(whole, fault=(-1, -1, 0))
        assert answer["status"] == 0, answer["stderr"]
        writes = answer["writes"]
        for number in range(count):
            first = chance.randint(1, writes)
            length, error = chance.choice(LENGTHS), chance.choice(ERRORS)
            out = scratch / f"run{number}"
            answer = server.train(out, fault=(first, first + length - 1, error))
            status, said = answer["status"], answer["stderr"]
            ends[f"exit {status}"] += 1
            wrong = damaged(out / "run")
            if status not in (0, 1, 2) or "Traceback" in said or (status and not said.strip()):
                wrong.append(f"ended with {status}: {said}")
            answer = server.train(out, "--resume=auto", fault=None)
            if answer["status"] != 0:
                wrong.append(f"cannot be resumed: {answer['stderr']}")
            elif weights(out / "run", STEPS) != weights(whole / "run", STEPS):
                wrong.append("the final weights differ")
            where = f"write {first}, {length} in a row, {errno.errorcode[error]}: "
            problems += [where + each for each in wrong]
    return writes, ends, problems


def serve() -> None:
    """Answer requests from stdin, each in a forked copy of this process."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from train_server import run_command, train, train_in_copy, warm_up

    warm_up()
    shim = ctypes.CDLL(None)
    for line in sys.stdin:
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
        while status is None and time.monotonic() < ends:
            found, code = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if found else None
            time.sleep(0.005)
        if status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        writes = int(Path(request["writes"]).read_text()) if status is not None else 0
        print(json.dumps({"status": status, "writes": writes}), flush=True)


if __name__ == "__main__":
    serve()
