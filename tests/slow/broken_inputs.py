"""Give broken inputs to the commands that read such files, and check how each command ends.

A command must end in time, with exit status 0 and nothing on stderr, or with 2 and one sentence,
and must not change the files it was given. To repeat one: range(seed, seed + 1).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType

import torch
from commands import run_main
from slow.broken import KINDS, OPEN_DATA, SECRET, make_originals

from nanogauge.cli import Parser
from nanogauge.config import add_config_flags, config_overrides, load_config
from trainer.run.resources import open_data
from trainer.step.distributed import Ranks

MOST_SECONDS = 10
WRITTEN = ("report.html", "report.md", "report.json", "index.html")
"""what a command may write beside the given files; --out is the other place"""
QUIET = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
"""warnings that Python does not print by default"""


class Hung(BaseException):
    """Raised at the time limit; no handler of a command catches it."""


def open_the_data(arguments: Sequence[str]) -> int:
    """Do what train.py does up to the first batch of each split."""
    parser = Parser(OPEN_DATA)
    parser.add_argument("config", type=Path)
    add_config_flags(parser)
    given = parser.parse(arguments)
    config = load_config(given.config, config_overrides(given))
    model = config.model.model_copy(update={"block_size": min(config.model.block_size, 128)})
    train = config.train.model_copy(update={"micro_batch": 2, "grad_accum": 1})
    small = config.model_copy(update={"model": model, "train": train})
    _, _, batches = open_data(small, torch.device("cpu"), Ranks())
    for split in ("train", "val"):
        batches.batch(split, 0, 0)
    return 0


def broken_inputs(scratch: Path, seeds: range) -> tuple[Counter[str], list[str]]:
    """Run one command per seed; return how often each exit status came, and the failures."""
    ends: Counter[str] = Counter()
    failures = []
    names = sorted(KINDS)
    originals = scratch / "originals"
    originals.mkdir()
    make_originals(originals)
    for seed in seeds:
        kind = names[seed % len(names)]
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            end, problem = one_input(kind, seed, originals, Path(folder))
        ends[end] += 1
        if problem is not None:
            failures.append(f"seed {seed} ({kind}): {problem}")
    return ends, failures


def one_input(kind: str, seed: int, originals: Path, folder: Path) -> tuple[str, str | None]:
    """Make one input and run its command; return how it ended and what is wrong with that."""
    script, arguments = KINDS[kind](random.Random(f"{kind} {seed}"), originals, folder)
    main = open_the_data if script == OPEN_DATA else import_module(Path(script).stem).main
    (folder / SECRET).write_text(json.dumps({"password": SECRET}))
    before = contents(folder) | contents(originals)
    try:
        with warnings.catch_warnings(record=True) as warned, time_limit():
            warnings.simplefilter("default")
            for category in QUIET:
                warnings.simplefilter("ignore", category)
            done = run_main(main, script, *arguments)
    except BaseException:
        return "traceback", traceback.format_exc()
    end, said = f"exit {done.returncode}", done.stderr + "".join(str(w.message) for w in warned)
    one_sentence = said.count("\n") == 1 and said.endswith("\n") and said[:-1].isprintable()
    if not (done.returncode == 0 and not said) and not (done.returncode == 2 and one_sentence):
        return end, f"{end} with {said[:600]!r}"
    after = contents(folder) | contents(originals)
    changed = sorted(path for path, held in before.items() if after.get(path) != held)
    out = folder / "out"
    stray = sorted(p for p in after.keys() - before.keys() if not Path(p).is_relative_to(out))
    return end, f"changed {changed}, left {stray}" if changed or stray else None


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def give_up(number: int, frame: FrameType | None) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, str]:
    """Return for each path below a folder its hash, the target of its link, or its mode."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path)] = f"link to {path.readlink()}"
        elif not path.is_file():
            found[str(path)] = f"mode {path.lstat().st_mode:o}"
        elif path.name not in WRITTEN:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
