"""Turn FineWeb-Edu, or other texts, into token shards in llm.c's format.

    python prepare_fineweb.py --tokens 3.68e9 --out data/fineweb_edu
    python prepare_fineweb.py --dataset input.txt --tokenizer chars --out data/mine

After an interruption the same command resumes; with more --tokens it continues from the end. HF_ENDPOINT (a mirror of
the hub), HF_TOKEN, HF_HUB_OFFLINE and proxies apply. See docs/preparing.md.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanogauge.cli import Parser, run_command
from nanogauge.errors import BadInput
from nanogauge.shell import python_command

if TYPE_CHECKING:
    from trainer.data.manifest import Manifest, Shard
    from trainer.data.prepare import Progress

MOST_SHARD_TOKENS = 2**31 - 1
"""Largest token count that fits into the header of a shard."""
OWN_VOCABULARY = 320
"""model.vocab_size of configs/own_text.toml."""
FINEWEB = ("HuggingFaceFW/fineweb-edu", "HuggingFaceFW/fineweb")
TOKENS = 3_680_000_000


def main(arguments: Sequence[str]) -> int:
    args = make_parser().parse(arguments)
    if args.shard_tokens > MOST_SHARD_TOKENS:
        raise BadInput(f"a shard holds at most {MOST_SHARD_TOKENS:,} tokens; give --shard-tokens.")
    manifest = run_preparation(args)
    train_tokens = manifest.tokens("train")
    if args.tokens is not None and train_tokens < args.tokens:
        print(
            f"The dataset ended before {args.tokens:,} training tokens were reached; "
            f"plan with --data.tokens {train_tokens}."
        )
    if _cuts_document(manifest.shards):
        print(
            f"A document was cut: its first part is the end of the {manifest.tokens('val'):,} "
            "validation tokens, the rest is for training. Put <|endoftext|> between documents to "
            "keep them whole."
        )
    print(
        f"{len(manifest.shards)} shards with {train_tokens:,} training tokens and "
        f"{manifest.tokens('val'):,} validation tokens are in {args.out}.\n"
        f"Next: {next_command(manifest, args.out)}"
    )
    return 0


def _cuts_document(shards: Sequence[Shard]) -> bool:
    """Return whether the first training token is inside of a document."""
    first = next((shard.begins for shard in shards if shard.split == "train"), None)
    return first is not None and first.token > 0


def next_command(manifest: Manifest, out: Path) -> str:
    """Return the command that trains on the shards, as a shell takes it."""
    large = manifest.tokenizer in ("gpt2", "r50k_base")
    config = "configs/rtx4070_fineweb.toml" if large else "configs/own_text.toml"
    arguments = [config, "--data.path", str(out)]
    if not large and manifest.vocab_size > OWN_VOCABULARY:
        arguments += ["--model.vocab-size", str(-(-manifest.vocab_size // 64) * 64)]
    return python_command("train.py", *arguments)


def run_preparation(args: argparse.Namespace) -> Manifest:
    """Download, tokenize and write the shards, with progress on stderr."""
    from trainer.data.sources import is_local, read_characters
    from trainer.data.tokenizer import CHARACTERS
    from trainer.data.workers import WorkerPool

    local = is_local(args.dataset)  # before anything is loaded
    characters = None
    if args.tokenizer == CHARACTERS:
        characters = read_characters(args.dataset, args.text_column)
    given = args.tokenizer, characters or ""
    with WorkerPool(args.workers, given) as pool:
        from trainer.data.prepare import PrepareOptions, prepare

        config = args.name
        if config is None and not local and args.dataset in FINEWEB:
            config = "sample-10BT"
        options = PrepareOptions(
            out=args.out,
            tokens=args.tokens or TOKENS,
            val_tokens=args.val_tokens,
            shard_tokens=args.shard_tokens,
            dataset=args.dataset,
            config=config,
            revision=args.revision,
            text_column=args.text_column,
            tokenizer=args.tokenizer,
            characters=characters,
        )
        printer = ProgressPrinter(to_the_end=local and args.tokens is None)
        try:
            return prepare(options, printer.report, pool)
        finally:
            printer.finish()


class ProgressPrinter:
    """Shows progress in a line on stderr: overwritten in a terminal, else every ten seconds."""

    def __init__(self, to_the_end: bool) -> None:
        self._to_the_end = to_the_end
        self._last: Progress | None = None
        self._start = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def report(self, progress: Progress) -> None:
        self._last = progress
        now = time.monotonic()
        if now - self._shown >= (0.2 if self._terminal else 10.0):
            self._shown = now
            self._show(progress, "" if self._terminal else "\n")

    def finish(self) -> None:
        if self._last is not None:
            self._show(self._last, "\n")

    def _show(self, progress: Progress, end: str) -> None:
        line = format_progress(progress, max(time.monotonic() - self._start, 1e-9), self._to_the_end)
        erase = "\r\x1b[K" if self._terminal else ""
        print(erase + line, end=end, file=sys.stderr, flush=True)


def format_progress(progress: Progress, seconds: float, to_the_end: bool) -> str:
    """Return a line of progress; rates are averages over this process's running time, `seconds`.

    With `to_the_end` the number of tokens depends on the source, and is not known.
    """
    from nanogauge.quantities import format_seconds

    rate = progress.new_tokens / seconds
    left = format_seconds(progress.left_tokens / rate) if rate else "unknown time"
    of = "" if to_the_end else f" of {progress.tokens + progress.left_tokens:,}"
    left = "" if to_the_end else f", {left} left"
    return (
        f"{progress.tokens:,}{of} tokens, {rate:,.0f} tokens/s, "
        f"{progress.documents / seconds:,.0f} documents/s, "
        f"{progress.text_bytes / 1e6 / seconds:,.1f} MB/s{left}"
    )


def make_parser() -> Parser:
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    source = parser.add_argument_group("source").add_argument
    source(
        "--dataset",
        default="HuggingFaceFW/fineweb-edu",
        help="dataset on the hub, or a local file or folder of .parquet, .jsonl or .txt (HuggingFaceFW/fineweb-edu)",
    )
    source("--name", help="configuration of the dataset (FineWeb's sample-10BT, else its default)")
    source("--revision", help="commit of the dataset (its newest)")
    source("--text-column", default="text", help="column, or JSON key, of the text (text)")
    add("--tokens", type=count, help="training tokens (3.68e9, or all that there are)")
    add("--out", type=Path, default=Path("data/fineweb_edu"), help="folder (data/fineweb_edu)")
    add("--val-tokens", type=count, help="validation tokens (1e7, or a tenth of local files if that is less)")
    add("--shard-tokens", type=count, default=100_000_000, help="tokens per shard (1e8)")
    add("--tokenizer", default="gpt2", help="bytes, chars, an encoding of tiktoken, or hf: and a tokenizer.json (gpt2)")
    add("--workers", type=count, default=os.cpu_count() or 1, help="processes that tokenize (one per core)")
    return parser


def count(text: str) -> int:
    """Parse a positive whole number: 3680000000, 3_680_000_000, 3.68e9 or 3.68B."""
    powers = {"k": "e3", "m": "e6", "b": "e9", "g": "e9", "t": "e12"}
    last = text[-1:].lower()
    try:
        value = float(text[:-1] + powers[last] if last in powers else text)
    except ValueError:
        value = math.nan
    if not (value > 0 and value.is_integer()):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0, such as 3.68e9")
    return int(value)


if __name__ == "__main__":
    run_command(main)
