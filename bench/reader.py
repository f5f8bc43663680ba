"""Measure the data loader's tokens per second and the share of demo steps that wait for data.

python bench/reader.py [--tokens 400e6] [--folder DIR] [--json]

Micro-batches of the documented run (16 x 1,024) are read from a generated file of random tokens, alternating with
nanoGPT's get_batch on the same file. Before a cold round the file is dropped from the page cache; the bench fails if
the disk was not read then. The demo's share is measured in a run of train.py, without its first steps.
"""

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import Bench, Result, ratios, result, run_script

# isort: split
import numpy as np
import torch
from torch import Tensor

from nanogauge.errors import RunFailed
from trainer.data.loader import BLOCKS_AHEAD, Batches
from trainer.data.manifest import Split
from trainer.data.shards import Shards

PEER = "nanoGPT's get_batch"
DOCUMENTED_TOKENS_PER_SECOND = 134_000
MICRO_BATCH, BLOCK_SIZE, VOCAB_SIZE = 16, 1024, 50_304
BATCHES = 256  # of a round: 4.2 M tokens
SKIPPED_DEMO_STEPS = 20
CPU = torch.device("cpu")

Batch = tuple[Tensor, Tensor]
Loader = Callable[[int], Batch]
OpenLoader = Callable[[int], Loader]
"""opens a loader for a round, so that no round profits from an earlier one's windows"""


def write_tokens(path: Path, tokens: int) -> None:
    """Write random tokens in the format of nanoGPT's train.bin."""
    generator, chunk = np.random.default_rng(0), 10**7
    with path.open("wb") as file:
        for begin in range(0, tokens, chunk):
            count = min(chunk, tokens - begin)
            generator.integers(0, 50_257, count, dtype=np.uint16).tofile(file)
        file.flush()
        os.fsync(file.fileno())


def our_loader(path: Path, ahead: int) -> OpenLoader:
    def open_loader(seed: int) -> Loader:
        shards: dict[Split, Shards] = {"train": [np.memmap(path, dtype="<u2", mode="r")]}
        batches = Batches(shards, MICRO_BATCH, BLOCK_SIZE, VOCAB_SIZE, seed, CPU, ahead=ahead)
        return lambda step: batches.batch("train", step, 0)

    return open_loader


def nanogpt_loader(path: Path) -> OpenLoader:
    """Return get_batch: it maps the file for each batch and draws windows with replacement."""

    def open_loader(seed: int) -> Loader:
        torch.manual_seed(seed)

        def batch(step: int) -> Batch:
            data = np.memmap(path, dtype=np.uint16, mode="r")
            begins = torch.randint(len(data) - BLOCK_SIZE, (MICRO_BATCH,)).tolist()

            def windows(shift: int) -> Tensor:
                cuts = (data[i + shift : i + shift + BLOCK_SIZE] for i in begins)
                return torch.stack([torch.from_numpy(cut.astype(np.int64)) for cut in cuts])

            return windows(0), windows(1)

        return batch

    return open_loader


def bytes_from_disk() -> int:
    """Return the bytes that this process has caused to be read from disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def drop_from_page_cache(path: Path) -> None:
    gc.collect()  # mapped pages stay in memory: release the mappings of earlier rounds
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def tokens_per_second(open_loader: OpenLoader, path: Path, seed: int, cold: bool) -> float:
    """Time one round.

    Raises:
        RunFailed: if a cold round read its tokens from memory.
    """
    if cold:
        drop_from_page_cache(path)
    before = bytes_from_disk()
    began = time.perf_counter()
    batch = open_loader(seed)
    for step in range(BATCHES):
        batch(step)
    seconds = time.perf_counter() - began
    tokens = BATCHES * MICRO_BATCH * BLOCK_SIZE
    if cold and bytes_from_disk() - before < tokens * np.dtype(np.uint16).itemsize:
        raise RunFailed(f"{path} stays in memory: no cold read can be timed; try --folder.")
    return tokens / seconds


def time_loaders(path: Path, rounds: int, states: tuple[str, ...]) -> list[Result]:
    """Time each loader with a cold and a warm page cache."""
    loaders = {
        "in the loop, as on a CPU": our_loader(path, 0),
        "prefetched by a thread, as for a GPU": our_loader(path, BLOCKS_AHEAD),
        PEER: nanogpt_loader(path),
    }
    results = []
    for state in states:
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for number in range(rounds + 1):
            for name, open_loader in loaders.items():
                rate = tokens_per_second(open_loader, path, number, state == "cold")
                if number > 0:
                    rates[name].append(rate)
        for name, mine in rates.items():
            case = f"{name}, {state} page cache"
            margin = [rate / DOCUMENTED_TOKENS_PER_SECOND for rate in mine]
            results.append(result("reader_tokens_per_second", case, mine, None))
            results.append(result("reader_vs_documented_run", case, margin, "134,000 tokens/s"))
            if name != PEER:
                results.append(result("reader_vs_nanogpt", case, ratios(mine, rates[PEER]), PEER))
    return results


def time_demo(steps: int) -> list[Result]:
    """Measure the share of the demo's step time that waits for data."""
    with tempfile.TemporaryDirectory() as out:
        flags = [f"--run.out={out}", f"--train.max-steps={steps}", f"--train.eval-every={steps}"]
        run_script("train.py", "configs/demo.toml", *flags)
        text = (Path(out) / "demo" / "log.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    timed = [line for line in lines if line["kind"] == "step"][SKIPPED_DEMO_STEPS:]
    waits = [line["data_wait_seconds"] for line in timed]
    seconds = [line["step_seconds"] for line in timed]
    shares, share = ratios(waits, seconds), sum(waits) / sum(seconds)
    case = f"demo, steps of {1e3 * statistics.median(seconds):.0f} ms"
    return [
        result("demo_data_wait_share", f"{case}, sum over sum", shares, None, share),
        result("demo_data_wait_share", f"{case}, median step", shares, None),
    ]


def measure(args: Any) -> list[Result]:
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        path = Path(name) / "train.bin"
        write_tokens(path, int(args.tokens))
        # The folder of temporary files may be in memory, where no read is cold.
        states = ("warm",) if args.smallest else ("cold", "warm")
        results = time_loaders(path, args.rounds, states)
    if args.demo_steps > SKIPPED_DEMO_STEPS:
        results += time_demo(args.demo_steps)
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_size("--tokens", 400e6, 5e6, "tokens in the file")
    bench.add_argument("--folder", type=Path, help="folder for the file, on the disk to measure")
    bench.add_size("--rounds", 7, 1, "counted rounds, after one that warms up")
    bench.add_size("--demo-steps", 300, 0, "steps of the demo; 0 for none")
    bench.run(measure)
