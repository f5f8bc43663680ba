"""What the tests on the stand-in for a card share: its environment, and runs read from its log."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import DEMO, ROOT, TINY, command, log_lines, rows_of, run
from examples import write_document
from test_shards import ORIGIN

from trainer.data.shards import ShardWriter

CACHE = Path(sys.prefix).parent / "compiled"
ON_CUDA = ("--run.device=cuda", "--measure.idle-seconds=0")
DOCUMENTED = ROOT / "configs" / "rtx4070_fineweb.toml"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "standin" in item.path.parts:
            item.add_marker(pytest.mark.standin)
            if "libcuda.so.1" not in os.environ.get("LD_PRELOAD", ""):
                item.add_marker(pytest.mark.skip(reason="skipped: needs make standin"))


@pytest.fixture(scope="session", autouse=True)
def _driver(tmp_path_factory: pytest.TempPathFactory, _calibrations_of_the_tests: None) -> None:
    script = tmp_path_factory.mktemp("driver") / "script"
    script.write_text("0 cuda_version 13000\n0 self_bytes 1073741824\n")
    os.environ["FAKE_NVML_SCRIPT"] = str(script)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(CACHE)


@dataclass
class Run:
    """A finished command, its run folder and the calls that the stand-in has logged."""

    done: subprocess.CompletedProcess[str]
    folder: Path
    calls: list[str]
    first_seconds: float
    """Time of the first call, as time.monotonic."""

    def __post_init__(self) -> None:
        self.status, self.text = self.done.returncode, self.done.stdout + self.done.stderr

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in log_lines(self.folder) if line["kind"] == kind]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines("event") if line["what"] == name]

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return rows_of(self.folder)

    def ends_of_steps(self) -> list[int]:
        """Return the index of the call of each step that copies loss and norm to the host."""
        return [i for i, call in enumerate(self.calls) if call.startswith("memcpy D2H 8 pinned a")]

    def steps(self) -> list[list[str]]:
        """Return the calls of each step but the first, from one copy of figures to the next."""
        ends = self.ends_of_steps()
        return [self.calls[i:j] for i, j in pairwise(ends)]


def waits(calls: list[str]) -> list[str]:
    return [call for call in calls if call.startswith("sync")]


def train(out: Path, *flags: object, config: Path = DEMO, fresh: bool = False, **variables: str) -> Run:
    """Train on the stand-in in `out`; `fresh` in a new process instead of a forked one."""
    log = out.with_name(f"{out.name}.calls")
    log.unlink(missing_ok=True)
    arguments = [config, f"--run.out={out}", *ON_CUDA, *flags]
    variables = {"STANDIN_LOG": str(log), **variables}
    if not fresh:
        done = run("train.py", *arguments, **variables)
    else:
        words, there = command("train.py", *arguments), {**os.environ, **variables}
        if "XDG_CACHE_HOME" in variables:
            del there["TORCHINDUCTOR_CACHE_DIR"]
        done = subprocess.run(words, cwd=ROOT, env=there, capture_output=True, text=True)  # noqa: PLW1510
    lines = [line.split(" ", 2) for line in log.read_text(errors="replace").splitlines()]
    first = float(lines[0][1]) if lines else math.inf
    return Run(done, out / config.stem, [call for _, _, call in lines], first)


def train_tiny(out: Path, *flags: object, **variables: Any) -> Run:
    return train(out, *TINY, *flags, **variables)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a data set of GPT-2 tokens."""
    folder = tmp_path_factory.mktemp("tokens") / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    with ShardWriter(folder, ORIGIN, shard_tokens=10**7) as writer:
        for split, n in (("val", 300_000), ("train", 900_000)):
            write_document(writer, split, random.integers(0, 50257, n).astype(np.uint16))
    return folder
