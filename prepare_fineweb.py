"""Turn FineWeb-Edu, or other texts, into token shards in llm.c's format.

    python prepare_fineweb.py --tokens 3.68e9 --out data/fineweb_edu
    python prepare_fineweb.py --dataset my_texts/ --tokens 1e8 --out data/mine
    python prepare_fineweb.py --pretokenized OWNER/SHARDS --tokens 1e9 --out data/ready
    python prepare_fineweb.py --verify data/fineweb_edu
    python prepare_fineweb.py --stats data/fineweb_edu

After an interruption the same command resumes; with more --tokens it continues from the end.
HF_ENDPOINT (a mirror of the hub), HF_TOKEN, HF_HUB_OFFLINE and proxies apply. See
docs/preparing.md.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from nanogauge.cli import Parser, run_command
from nanogauge.errors import BadInput

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from trainer.data.manifest import Manifest
    from trainer.data.prepare import PrepareOptions, Progress

VALIDATION_TOKENS = 10_000_000
MOST_SHARD_TOKENS = 2**31 - 1
"""The largest token count of a shard's header."""


def main(arguments: Sequence[str]) -> int:
    args = make_parser().parse(arguments)
    if args.verify is not None or args.stats is not None or args.repair is not None:
        from trainer.data.verify import repair, show_stats, verify

        if args.verify is not None:
            return verify(args.verify)
        return (
            show_stats(args.stats) if args.stats is not None else repair(args.repair, args.workers)
        )
    if args.val_tokens is not None and args.val_share is not None:
        raise BadInput("give --val-tokens or --val-share, not both.")
    if args.shard_tokens > MOST_SHARD_TOKENS:
        raise BadInput(f"a shard holds at most {MOST_SHARD_TOKENS:,} tokens; give --shard-tokens.")
    if args.pretokenized is not None:
        from trainer.data.pretokenized import fetch_shards

        manifest = fetch_shards(
            args.pretokenized, args.revision, args.tokenizer, args.tokens, args.out
        )
    else:
        manifest = run_preparation(args)
    train_tokens = manifest.tokens("train")
    if train_tokens < args.tokens:
        print(
            f"The dataset ended before {args.tokens:,} training tokens were reached; "
            f"plan with --data.tokens {train_tokens}."
        )
    print(
        f"{len(manifest.shards)} shards with {train_tokens:,} training tokens and "
        f"{manifest.tokens('val'):,} validation tokens are in {args.out}.\n"
        f"Next: python train.py configs/rtx4070_fineweb.toml --data.path {args.out}"
    )
    return 0


def run_preparation(args: argparse.Namespace) -> Manifest:
    """Download, tokenize and write the shards, with progress on stderr."""
    from trainer.data.workers import WorkerPool, workers_within

    workers = workers_within(args.memory, args.workers)
    if workers < args.workers:
        print(
            f"{workers} workers, not {args.workers}: more may need more than "
            f"{args.memory / 2**30:.1f} GiB of memory (--memory).",
            file=sys.stderr,
        )
    with WorkerPool(workers, args.tokenizer, args.pattern, args.text_column) as pool:
        # The workers load their tokenizer during these imports.
        from trainer.data.prepare import prepare

        options = prepare_options(args, workers)
        with ProgressPrinter(options.tokens + options.val_tokens) as printer:
            return prepare(options, printer.report, pool)


def prepare_options(args: argparse.Namespace, workers: int) -> PrepareOptions:
    from trainer.data.prepare import PrepareOptions

    val_tokens = args.val_tokens or VALIDATION_TOKENS
    if args.val_share is not None:
        val_tokens = max(1, round(args.tokens * args.val_share))
    config = args.name
    if config is None and args.dataset.startswith("HuggingFaceFW/fineweb"):
        config = "sample-10BT"
    return PrepareOptions(
        out=args.out,
        tokens=args.tokens,
        val_tokens=val_tokens,
        shard_tokens=args.shard_tokens,
        dataset=args.dataset,
        config=config,
        revision=args.revision,
        workers=workers,
        text_column=args.text_column,
        tokenizer=args.tokenizer,
        pattern=args.pattern,
        whole_files=args.whole_files,
    )


class ProgressPrinter:
    """Shows progress on stderr: a bar in a terminal, else a line every ten seconds."""

    def __init__(self, total_tokens: int) -> None:
        self._total = total_tokens
        self._last: Progress | None = None
        self._start = time.monotonic()
        self._interval_seconds = 0.2 if sys.stderr.isatty() else 10.0
        self._next = self._start + self._interval_seconds
        self._bar: RichProgress | None = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress

            columns = BarColumn(), TextColumn("{task.description}")
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("opening the dataset", total=total_tokens)

    def report(self, progress: Progress) -> None:
        self._last = progress
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._interval_seconds
            self._show(progress)

    def _show(self, progress: Progress) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        line = format_progress(progress, self._total, seconds)
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.update(self._task, completed=progress.tokens, description=line)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._last is not None:
            self._show(self._last)
        if self._bar is not None:
            self._bar.stop()


def format_progress(progress: Progress, total_tokens: int, seconds: float) -> str:
    """Return one line of progress; the rates are of this process, which has run for `seconds`."""
    from nanogauge.quantities import format_seconds

    rate = progress.new_tokens / seconds
    left = format_seconds(progress.left_tokens / rate) if rate else "unknown time"
    retries = f", {progress.retries} fetched again" if progress.retries else ""
    return (
        f"{progress.tokens:,} of {total_tokens:,} tokens, {rate:,.0f} tokens/s, "
        f"{progress.documents / seconds:,.0f} documents/s, "
        f"{progress.text_bytes / 1e6 / seconds:,.1f} MB/s, {left} left{retries}"
    )


def make_parser() -> Parser:
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    source = parser.add_argument_group("source").add_argument
    source(
        "--dataset",
        default="HuggingFaceFW/fineweb-edu",
        help="dataset on the hub, or a local file or folder of .parquet, .jsonl or .txt "
        "(HuggingFaceFW/fineweb-edu)",
    )
    source("--name", help="configuration of the dataset (FineWeb's sample-10BT, else its default)")
    source("--revision", help="commit of the dataset (its newest)")
    source("--text-column", default="text", help="column, or JSON key, of the text (text)")
    source(
        "--whole-files",
        action="store_true",
        help="download whole files into the hub client's cache and check their sha256",
    )
    source("--pretokenized", metavar="REPO", help="download ready shards from this dataset instead")
    add("--tokens", type=count, default=3_680_000_000, help="training tokens (3.68e9)")
    add("--out", type=Path, default=Path("data/fineweb_edu"), help="folder (data/fineweb_edu)")
    add("--val-tokens", type=count, help="validation tokens (1e7)")
    add("--val-share", type=share, help="validation tokens as a share of the training tokens")
    add("--shard-tokens", type=count, default=100_000_000, help="tokens per shard (1e8)")
    add(
        "--tokenizer",
        default="gpt2",
        help="an encoding of tiktoken, a .tiktoken file, or hf: and a tokenizer.json (gpt2)",
    )
    add("--pattern", default="gpt2", help="pre-tokenization of a .tiktoken file (gpt2)")
    add(
        "--workers",
        type=count,
        default=os.cpu_count() or 1,
        help="processes that tokenize (one per core)",
    )
    add("--memory", type=size, default=size("2GiB"), help="limit of all processes together (2GiB)")
    inspect = parser.add_argument_group("existing shards").add_argument
    inspect("--verify", type=Path, metavar="DIR", help="check headers, counts, hashes and tokens")
    inspect("--repair", type=Path, metavar="DIR", help="rebuild damaged shards from the source")
    inspect("--stats", type=Path, metavar="DIR", help="lengths, compression and a few documents")
    return parser


def count(text: str) -> int:
    """Parse a positive whole number: 3680000000, 3_680_000_000 or 3.68e9."""
    value = _parse_float(text)
    if not (value > 0 and value.is_integer()):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0, such as 3.68e9")
    return int(value)


def share(text: str) -> float:
    """Parse a number between 0 and 1."""
    value = _parse_float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0 and 1, such as 0.003")
    return value


def size(text: str) -> float:
    """Parse a number of bytes: 2GiB, 2.5GB or 2e9."""
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)(GiB|GB|MiB|MB|)", text)
    units = {"GiB": 2.0**30, "GB": 1e9, "MiB": 2.0**20, "MB": 1e6, "": 1.0}
    value = _parse_float(match[1]) * units[match[2]] if match is not None else math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 2GiB")
    return value


def _parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


if __name__ == "__main__":
    run_command(main)
