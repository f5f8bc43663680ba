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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from results import Bench, Result, ratios, result, run_script

# isort: split
import numpy as np
import torch
from torch import Tensor

from nanogauge.errors import RunFailed
from trainer.data.loader import BLOCKS_AHEAD, Batches

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


def time_readers(path: Path, rounds: int, states: tuple[str, ...]) -> list[Result]:
    """Each reader's tokens/s warm and cold, and what they are of its peer's and of the run's."""
    peer = Reader(PEER, nanogpts(path))
    readers = [
        Reader("in the loop, as on a processor", ours(path, 0)),
        Reader("by a thread ahead, as for a GPU", ours(path, BLOCKS_AHEAD)),
        peer,
    ]
    results = []
    for state in states:
        rates: dict[str, list[float]] = {reader.name: [] for reader in readers}
        for number in range(rounds + 1):
            for reader in readers:
                rate = tokens_per_second(reader, path, number, state == "cold")
                if number > 0:
                    rates[reader.name].append(rate)
        for reader in readers:
            mine = rates[reader.name]
            case = f"{reader.name}, {state} page cache"
            needed = [rate / DOCUMENTED_TOKENS_PER_SECOND for rate in mine]
            results.append(result("reader_tokens_per_second", case, mine, None))
            results.append(result("reader_vs_documented_run", case, needed, "134,000 tokens/s"))
            if reader is not peer:
                results.append(result("reader_vs_nanogpt", case, ratios(mine, rates[PEER]), PEER))
    return results


def time_demo(steps: int) -> list[Result]:
    """The share of the demo's steps in which they wait for data, in all and step by step."""
    with tempfile.TemporaryDirectory() as out:
        flags = [f"--run.out={out}", f"--train.max-steps={steps}", f"--train.eval-every={steps}"]
        run_script("train.py", "configs/demo.toml", *flags)
        text = (Path(out) / "demo" / "log.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    timed = [line for line in lines if line["kind"] == "step"][STARTING_STEPS:]
    waits = [line["data_wait_seconds"] for line in timed]
    seconds = [line["step_seconds"] for line in timed]
    shares, share = ratios(waits, seconds), sum(waits) / sum(seconds)
    case = f"demo, steps of {1e3 * statistics.median(seconds):.0f} ms"
    return [
        result("demo_data_wait_share", f"{case}, sum over sum", shares, None, share),
        result("demo_data_wait_share", f"{case}, median step", shares, None),
    ]


def measure(given: Any) -> list[Result]:
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        path = Path(name) / "train.bin"
        make_file(path, int(given.tokens))
        # A small file may lie in a folder that is kept in memory.
        results = time_readers(
            path, given.rounds, ("warm",) if given.smallest else ("cold", "warm")
        )
    if given.demo_steps > STARTING_STEPS:
        results += time_demo(given.demo_steps)
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_size("--tokens", 400e6, 5e6, "tokens in the file")
    bench.add_argument("--folder", type=Path, help="where to make the file, on the disk to time")
    bench.add_size("--rounds", 7, 1, "rounds that count, after one more")
    bench.add_size("--demo-steps", 300, 0, "steps of the demo; 0 for none")
    bench.run(measure)
