"""How many tokens a second the reader brings, and for how much of a step the demo waits for them.

python bench/reader.py [--tokens 400e6] [--folder DIR] [--json]

Micro-batches of the documented run, 16 x 1,024, of shards of random tokens that are made for this,
beside nanoGPT's get_batch on the same file; rounds are interleaved. Before a cold round the files
are dropped from the page cache, and a round that was then not read from the disk does not count.
Figures are medians over the rounds, with the lowest and highest. The share of the demo is that of
a run of train.py, start-up apart.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import trainer.step.torch_env  # noqa: F401, E402  before torch

# isort: split
import torch  # noqa: E402
from results import result  # noqa: E402
from torch import Tensor  # noqa: E402

from nanogauge.cli import Parser, run_command  # noqa: E402
from nanogauge.errors import RunFailed  # noqa: E402
from trainer.data.loader import BLOCKS_AHEAD, Batches  # noqa: E402

PEER = "nanoGPT's get_batch"
DOCUMENTED_TOKENS_PER_SECOND = 134_000
MICRO_BATCH, BLOCK_SIZE, VOCAB_SIZE = 16, 1024, 50_304
BATCHES = 256  # of a round: 4.2 M tokens
STARTING_STEPS = 20  # of the demo, which do not count
CPU = torch.device("cpu")

Batch = tuple[Tensor, Tensor]


class Reader(NamedTuple):
    name: str
    open: Callable[[int], Callable[[int], Batch]]
    """by round, so that none reads what another has brought"""


def make_file(path: Path, tokens: int) -> None:
    """Random tokens on the disk, as nanoGPT's train.bin."""
    generator, at_a_time = np.random.default_rng(0), 10**7
    with path.open("wb") as file:
        for begin in range(0, tokens, at_a_time):
            count = min(at_a_time, tokens - begin)
            generator.integers(0, 50_257, count, dtype=np.uint16).tofile(file)
        file.flush()
        os.fsync(file.fileno())


def ours(path: Path, ahead: int) -> Callable[[int], Callable[[int], Batch]]:
    def open_it(number: int) -> Callable[[int], Batch]:
        tokens = np.memmap(path, dtype="<u2", mode="r")
        batches = Batches(
            {"train": [tokens]}, MICRO_BATCH, BLOCK_SIZE, VOCAB_SIZE, number, CPU, ahead=ahead
        )
        return lambda step: batches.batch("train", step, 0)

    return open_it


def nanogpts(path: Path) -> Callable[[int], Callable[[int], Batch]]:
    """Its scheme: the file mapped anew for each batch, windows drawn with replacement."""

    def open_it(number: int) -> Callable[[int], Batch]:
        torch.manual_seed(number)

        def batch(step: int) -> Batch:
            data = np.memmap(path, dtype=np.uint16, mode="r")
            begins = torch.randint(len(data) - BLOCK_SIZE, (MICRO_BATCH,)).tolist()
            x, y = (
                torch.stack(
                    [torch.from_numpy(data[i : i + BLOCK_SIZE].astype(np.int64)) for i in part]
                )
                for part in (begins, [i + 1 for i in begins])
            )
            return x, y

        return batch

    return open_it


def bytes_from_disk() -> int:
    """That this process has had to be read so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def drop(path: Path) -> None:
    """Make the system forget the pages of a file; it keeps those that are mapped."""
    gc.collect()  # the mappings of earlier rounds
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def tokens_per_second(reader: Reader, path: Path, number: int, cold: bool) -> float:
    """Of one round.

    Raises:
        RunFailed: if a cold round found its tokens in memory.
    """
    if cold:
        drop(path)
    before = bytes_from_disk()
    began = time.perf_counter()
    batch = reader.open(number)
    for step in range(BATCHES):
        batch(step)
    seconds = time.perf_counter() - began
    tokens = BATCHES * MICRO_BATCH * BLOCK_SIZE
    if cold and bytes_from_disk() - before < tokens * np.dtype(np.uint16).itemsize:
        raise RunFailed(f"{path} stays in memory: no cold reading can be timed; try --folder.")
    return tokens / seconds


def time_readers(path: Path, rounds: int) -> list[dict[str, object]]:
    """Each reader's tokens/s warm and cold, and what they are of its peer's and of the run's."""
    peer = Reader(PEER, nanogpts(path))
    readers = [
        Reader("in the loop, as on a processor", ours(path, 0)),
        Reader("by a thread ahead, as for a GPU", ours(path, BLOCKS_AHEAD)),
        peer,
    ]
    results: list[dict[str, object]] = []
    for cold in (True, False):
        rates: dict[str, list[float]] = {reader.name: [] for reader in readers}
        for number in range(rounds + 1):
            for reader in readers:
                rate = tokens_per_second(reader, path, number, cold)
                if number > 0:
                    rates[reader.name].append(rate)
        for reader in readers:
            mine, state = rates[reader.name], "cold" if cold else "warm"
            case = f"{reader.name}, {state} page cache"
            ratios = [a / b for a, b in zip(mine, rates[PEER], strict=True)]
            needed = [rate / DOCUMENTED_TOKENS_PER_SECOND for rate in mine]
            results.append(result("reader_tokens_per_second", case, mine, None))
            results.append(result("reader_vs_documented_run", case, needed, "134,000 tokens/s"))
            if reader is not peer:
                results.append(result("reader_vs_nanogpt", case, ratios, PEER))
    return results


def time_demo(steps: int) -> list[dict[str, object]]:
    """The share of the demo's steps in which they wait for data, in all and step by step."""
    with tempfile.TemporaryDirectory() as out:
        flags = [f"--run.out={out}", f"--train.max-steps={steps}", f"--train.eval-every={steps}"]
        command = [sys.executable, "train.py", "configs/demo.toml", *flags]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        text = (Path(out) / "demo" / "log.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    timed = [line for line in lines if line["kind"] == "step"][STARTING_STEPS:]
    waits = [line["data_wait_seconds"] for line in timed]
    seconds = [line["step_seconds"] for line in timed]
    share = sum(waits) / sum(seconds)
    shares = [wait / second for wait, second in zip(waits, seconds, strict=True)]
    case = f"demo, steps of {1e3 * statistics.median(seconds):.0f} ms"
    of_all = {"value": share, "low": min(shares), "high": max(shares), "n": len(shares)}
    return [
        {"id": "demo_data_wait_share", "case": f"{case}, sum over sum", **of_all, "peer": None},
        result("demo_data_wait_share", f"{case}, median step", shares, None),
    ]


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("--tokens", type=float, default=400e6, help="tokens in the file")
    parser.add_argument("--folder", type=Path, help="where to make the file, on the disk to time")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count, after one more")
    parser.add_argument("--demo-steps", type=int, default=300, help="steps of the demo; 0 for none")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    given = parser.parse(arguments)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        path = Path(name) / "train.bin"
        make_file(path, int(given.tokens))
        results = time_readers(path, given.rounds)
    if given.demo_steps > STARTING_STEPS:
        results += time_demo(given.demo_steps)
    if given.json:
        print(json.dumps({"bench": "reader", "results": results}))
        return 0
    for r in results:
        print(f"{r['id']:26} {r['case']:55} {r['value']:.4g} ({r['low']:.4g}-{r['high']:.4g})")
    return 0


if __name__ == "__main__":
    run_command(main)
