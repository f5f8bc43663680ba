"""Short runs in which single writes to the disk fail."""

from __future__ import annotations

import errno
import random
import subprocess
from collections import Counter
from pathlib import Path

from commands import DEMO, TINY, Copy
from demo_runs import damaged, weights

MAX_SECONDS = 60
STEPS = 24
FLAGS = [
    *(str(DEMO), "--force", *TINY, f"--train.max-steps={STEPS}", "--train.eval-every=12"),
    *("--train.grad-accum=1", "--train.eval-batches=1", "--train.checkpoint-every=8"),
]
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
LENGTHS = (1, 20, 1_000_000)
"""consecutive writes that fail: one, some, or all to the end"""


def let_writes_fail(scratch: Path, count: int, seed: int) -> tuple[int, Counter[str], list[str]]:
    """Let writes fail at random places in `count` runs, and resume each.

    Return the writes of a run without failures, how often each exit status came, and what is wrong.
    """
    library = str(scratch / "failing_writes.so")
    source = str(Path(__file__).with_suffix(".c"))
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)

    def train(out: Path, fault: str, *more: str) -> tuple[int, str]:
        out.mkdir(exist_ok=True)
        flags = [f"writes:{fault}", *FLAGS, f"--run.out={out / 'runs'}", *more]
        data = {"XDG_DATA_HOME": str(scratch / "data")}
        with Copy("faulty_train.py", flags, out, data, library) as copy:
            return copy.wait(MAX_SECONDS), copy.result().stderr

    chance, ends, problems = random.Random(seed), Counter[str](), []
    whole = scratch / "whole"
    status, said = train(whole, "0-0-0")
    assert status == 0, said
    writes = int((scratch / "whole.writes").read_text())
    for number in range(count):
        first = chance.randint(1, writes)
        length, error = chance.choice(LENGTHS), chance.choice(ERRORS)
        out = scratch / f"run{number}"
        status, said = train(out, f"{first}-{first + length - 1}-{error}")
        ends[f"exit {status}"] += 1
        wrong = damaged(out / "runs" / "demo")
        if status not in (0, 1, 2) or "Traceback" in said or (status and not said.strip()):
            wrong.append(f"ended with {status}: {said}")
        status, said = train(out, "0-0-0", "--resume=auto")
        if status != 0:
            wrong.append(f"cannot be resumed: {said}")
        elif weights(out / "runs" / "demo", STEPS) != weights(whole / "runs" / "demo", STEPS):
            wrong.append("the final weights differ")
        where = f"write {first}, {length} in a row, {errno.errorcode[error]}: "
        problems += [where + each for each in wrong]
    return writes, ends, problems
