"""What the commands do with what is broken: each experiment counts how it ended.

python bench/chaos.py --inputs 10000 [--seed 1] [--only "run log"] [--json]
python bench/chaos.py --kills 100 [--compiled] [--seed 1] [--json]
python bench/chaos.py --writes 100 [--seed 1] [--json]

Inputs: configurations, claims, logs, run folders and shards that are cut, mixed up or made up go to
the real commands, in this process. Each has to end within 10 s, with exit status 0, or with 2 and
one sentence on stderr, and none of the files it was given may have changed. A failure is printed
with its seed: --inputs 1 with that --seed makes it again. In the JSON, an id is a kind and
how it ended, and the value how many did.

Kills: a short run is killed -9 again and again at random moments, a third of them while a
checkpoint is being written, and gone on with each time. In the end its weights and the figures of
its steps and evaluations have to be those of the same run undisturbed, bit by bit, and each line of
its log but the last has to be whole at each kill (killed_runs.py).

Writes: in short runs one write to the run folder, at a random place, fails, or some in a row, or
all from there on: with a full disk, an error of the device, or for want of rights. Each has to end
with exit status 0, or with 1 or 2 and what to do; no file under its own name may be broken; and
gone on with it has to come to the weights of a run in which nothing failed. Needs gcc
(failing_writes.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import FrameType
from typing import Any

from broken import KINDS, OPEN_DATA, SCRIPTS, SECRET, make_originals
from failing_writes import let_writes_fail
from killed_runs import differences, kill_again_and_again, undisturbed
from results import result

import trainer.step.torch_env  # noqa: F401  before torch

# isort: split
import torch

from nanogauge.cli import Parser, run_command
from nanogauge.config import add_config_flags, config_overrides, load_config
from nanogauge.errors import BadInput
from trainer.run.resources import open_data
from trainer.step.distributed import Ranks

ROOT = Path(__file__).parents[1]
MOST_SECONDS = 10
WRITTEN = ("report.html", "report.md", "report.json", "index.html")
"""what a command may write beside the files that it was given, and --out"""


class Hung(BaseException):
    """A command was not done in time; no handler of its errors takes this for one."""


@dataclass
class Outcome:
    """How many inputs of each kind ended in each way; what went wrong is on stderr by then."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest_seconds: dict[str, float] = field(default_factory=dict)
    failures: int = 0


def open_the_data(arguments: Sequence[str]) -> int:
    """train.py up to its data: the configuration, the shards, the first batch of each split."""
    parser = Parser(OPEN_DATA)
    parser.add_argument("config", type=Path)
    add_config_flags(parser)
    given = parser.parse(arguments)
    config = load_config(given.config, config_overrides(given))
    model, train = config.model, config.train
    small = config.model_copy(
        update={
            "model": model.model_copy(update={"block_size": min(model.block_size, 128)}),
            "train": train.model_copy(update={"micro_batch": 2, "grad_accum": 1}),
        }
    )
    _, _, batches = open_data(small, torch.device("cpu"), Ranks())
    for split in ("train", "val"):
        batches.batch(split, 0, 0)
    return 0


def main_of(script: str) -> Callable[[Sequence[str]], int]:
    """The main function of a script of this project; bench/report.py has the name of one."""
    name = f"chaos_{Path(script).stem}"
    spec = spec_from_file_location(name, ROOT / script)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    found: Callable[[Sequence[str]], int] = sys.modules[name].main
    return found


def inputs(count: int, seed: int, only: str | None) -> Outcome:
    """Give `count` broken inputs, of seeds from `seed` on, to the commands that read such."""
    outcome = Outcome()
    commands = {script: main_of(script) for script in SCRIPTS} | {OPEN_DATA: open_the_data}
    names = [only] if only is not None else sorted(KINDS)
    with tempfile.TemporaryDirectory() as scratch:
        originals = Path(scratch) / "originals"
        originals.mkdir()
        make_originals(originals)
        for number in range(seed, seed + count):
            kind = names[number % len(names)]
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                end, problem, seconds = one_input(kind, number, commands, originals, Path(folder))
            outcome.ends[kind, end] += 1
            slowest = max(seconds, outcome.slowest_seconds.get(kind, 0.0))
            outcome.slowest_seconds[kind] = slowest
            if problem is not None:
                outcome.failures += 1
                print(f"seed {number} ({kind}): {problem}", file=sys.stderr, flush=True)
    return outcome


def one_input(
    kind: str,
    seed: int,
    commands: Mapping[str, Callable[[Sequence[str]], int]],
    originals: Path,
    folder: Path,
) -> tuple[str, str | None, float]:
    """Make one input and run its command; how it ended, what is wrong with that, the seconds."""
    script, arguments = KINDS[kind](random.Random(f"{kind} {seed}"), originals, folder)
    (folder / SECRET).write_text(json.dumps({"password": SECRET}))
    before = contents(folder) | contents(originals)
    said, began = io.StringIO(), time.perf_counter()
    end, problem = "traceback", None
    sys.argv = [script, *arguments]
    try:
        with in_time(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            run_command(commands[script])
    except SystemExit as ended:
        end = f"exit {ended.code}"
        problem = wrong_with(ended.code, said.getvalue())
    except Hung:
        end, problem = "hung", f"not done after {MOST_SECONDS} s"
    except BaseException:
        problem = traceback.format_exc()
    seconds = time.perf_counter() - began
    after = contents(folder) | contents(originals)
    harmed = sorted(path for path, held in before.items() if after.get(path) != held)
    stray = sorted(path for path in after.keys() - before.keys() if is_stray(Path(path), folder))
    if problem is None and (harmed or stray):
        end, problem = "harm", f"changed {harmed}, left {stray}"
    return end, problem, seconds


def wrong_with(code: object, said: str) -> str | None:
    """What is wrong with an exit status and what stands on stderr; None if nothing is."""
    if code == 0 and not said:
        return None
    one_sentence = said.count("\n") == 1 and said.endswith("\n") and said[:-1].isprintable()
    if code == 2 and one_sentence:
        return None
    return f"exit status {code} with {said[:600]!r}"


def is_stray(path: Path, folder: Path) -> bool:
    return path.name not in WRITTEN and not path.is_relative_to(folder / "out")


@contextlib.contextmanager
def in_time() -> Iterator[None]:
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
    """What each path below a folder is: the hash of a file, where a link leads, another kind."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path)] = f"link to {path.readlink()}"
        elif path.is_file():
            if path.name not in WRITTEN:
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = f"mode {path.lstat().st_mode:o}"
    return found


def print_outcome(outcome: Outcome) -> None:
    for kind, seconds in sorted(outcome.slowest_seconds.items()):
        ends = {end: n for (of, end), n in sorted(outcome.ends.items()) if of == kind}
        told = ", ".join(f"{n:,} {end}" for end, n in ends.items())
        print(f"{kind:24} {told}; the slowest took {seconds:.2f} s")


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    counts = [result(end, kind, [n], None) for (kind, end), n in sorted(outcome.ends.items())]
    slowest = sorted(outcome.slowest_seconds.items())
    return counts + [result("slowest_seconds", kind, [value], None) for kind, value in slowest]


def kills(count: int, seed: int, compiled: bool, as_json: bool) -> int:
    """Kill a run so many times; 1 if it came to anything else than the undisturbed one."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        undisturbed(out, compiled)
        killed = kill_again_and_again(out, count, seed, compiled)
        found = differences(out / "undisturbed", out / "killed")
    case = "compiled" if compiled else "eager"
    values = {
        "kills": killed.kills,
        **{f"killed in a {moment}": n for moment, n in sorted(killed.moments.items())},
        "broken_lines": killed.broken_lines,
        "failed_starts": len(killed.failed_starts),
        "differences": len(found),
    }
    if as_json:
        results = [result(name, case, [n], "the run undisturbed") for name, n in values.items()]
        print(json.dumps({"bench": "chaos", "results": results}))
    else:
        print("\n".join(f"{name:32} {n:,}" for name, n in values.items()))
    for said in (*killed.failed_starts, *found):
        print(said, file=sys.stderr)
    return 1 if found or killed.broken_lines or killed.failed_starts else 0


def writes(count: int, seed: int, as_json: bool) -> int:
    """Let writes fail in so many runs; 1 if one of them went wrong."""
    with tempfile.TemporaryDirectory() as scratch:
        failed = let_writes_fail(Path(scratch), count, seed)
    values = {
        "writes_of_a_run": failed.writes,
        **dict(sorted(failed.ends.items())),
        "went_wrong": len(failed.wrong),
    }
    if as_json:
        results = [result(name, "writes", [n], "no write fails") for name, n in values.items()]
        print(json.dumps({"bench": "chaos", "results": results}))
    else:
        print("\n".join(f"{name:36} {n:,}" for name, n in values.items()))
    for said in failed.wrong:
        print(said, file=sys.stderr)
    return 1 if failed.wrong else 0


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("--inputs", type=int, metavar="N", help="broken inputs to give")
    parser.add_argument("--kills", type=int, metavar="N", help="times to kill a run")
    parser.add_argument("--writes", type=int, metavar="N", help="runs in which writes fail")
    parser.add_argument("--compiled", action="store_true", help="kill a compiled run")
    parser.add_argument("--seed", type=int, default=1, help="of the first input, or of the kills")
    parser.add_argument("--only", choices=sorted(KINDS), help="inputs of this kind alone")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    given = parser.parse(arguments)
    if sum(each is not None for each in (given.inputs, given.kills, given.writes)) != 1:
        raise BadInput("say which experiment: --inputs 10000, --kills 100 or --writes 100.")
    if given.writes is not None:
        return writes(given.writes, given.seed, given.json)
    if given.kills is not None:
        return kills(given.kills, given.seed, given.compiled, given.json)
    outcome = inputs(given.inputs, given.seed, given.only)
    if given.json:
        print(json.dumps({"bench": "chaos", "results": rows(outcome)}))
    else:
        print_outcome(outcome)
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    run_command(main)
