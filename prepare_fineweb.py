"""Turn FineWeb-Edu into token shards: streamed from the Hugging Face hub, tokenised with GPT-2's
vocabulary, written as llm.c writes them.

    python prepare_fineweb.py --tokens 3.68e9 --out data/fineweb_edu

HF_ENDPOINT (a mirror of the hub) and HF_TOKEN (a higher rate limit) are honoured.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from nanogauge.cli import Parser, run_command
from nanogauge.prepare.fineweb import Order, prepare
from nanogauge.quantities import format_seconds, tokens_per_second


def main(arguments: Sequence[str]) -> int:
    parser = Parser(__doc__ or "")
    parser.add_argument(
        "--tokens", type=count, default=3_680_000_000, help="training tokens (3.68e9)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("data/fineweb_edu"),
        help="folder for the shards (data/fineweb_edu)",
    )
    parser.add_argument(
        "--dataset",
        default="HuggingFaceFW/fineweb-edu",
        help="dataset on the hub, or a local folder (HuggingFaceFW/fineweb-edu)",
    )
    parser.add_argument(
        "--name", default="sample-10BT", help="configuration of the dataset (sample-10BT)"
    )
    parser.add_argument(
        "--val-tokens", type=count, default=10_000_000, help="validation tokens (1e7)"
    )
    parser.add_argument(
        "--shard-tokens", type=count, default=100_000_000, help="tokens of one shard (1e8)"
    )
    parser.add_argument(
        "--workers",
        type=count,
        default=os.cpu_count() or 1,
        help="threads that tokenise (one for each core)",
    )
    given = parser.parse(arguments)
    order = Order(
        out=given.out,
        tokens=given.tokens,
        val_tokens=given.val_tokens,
        shard_tokens=given.shard_tokens,
        dataset=given.dataset,
        config=given.name,
        workers=given.workers,
    )
    with Live(order.tokens + order.val_tokens) as live:
        manifest = prepare(order, live.report)
    train_tokens = manifest.tokens("train")
    if train_tokens < order.tokens:
        print(
            f"The dataset ended before {order.tokens:,} training tokens were reached; "
            f"plan with --data.tokens {train_tokens}."
        )
    print(
        f"{len(manifest.shards)} shards with {train_tokens:,} training tokens and "
        f"{manifest.tokens('val'):,} validation tokens are in {order.out}.\n"
        f"Next: python train.py configs/rtx4070_fineweb.toml --data.path {order.out}"
    )
    return 0


def count(text: str) -> int:
    """A whole number above zero, as people write it: 3680000000, 3_680_000_000 or 3.68e9."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and value.is_integer()):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0, such as 3.68e9")
    return int(value)


class Live:
    """Progress on stderr: a bar in a terminal, else a line now and then. A context manager."""

    def __init__(self, total_tokens: int) -> None:
        self._total = total_tokens
        self._documents = 0
        self._tokens = 0
        self._began = time.monotonic()
        self._next = 0.0
        self._bar: Progress | None = None
        self._every_seconds = 10.0
        if sys.stderr.isatty():
            columns = BarColumn(), TextColumn("{task.description}")
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("opening the dataset", total=total_tokens)
            self._every_seconds = 0.2

    def report(self, documents: int, tokens: int) -> None:
        self._documents, self._tokens = documents, tokens
        now = time.monotonic()
        if documents == 1:
            self._began = now
            self._next = now + self._every_seconds
        elif now >= self._next:
            self._next = now + self._every_seconds
            self._show()

    def _show(self) -> None:
        rate = tokens_per_second(self._tokens, max(time.monotonic() - self._began, 1e-9))
        left_seconds = max(self._total - self._tokens, 0) / rate
        line = (
            f"{self._documents:,} documents, {self._tokens:,} of {self._total:,} tokens, "
            f"{rate:,.0f} tokens/s, {format_seconds(left_seconds)} left"
        )
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.update(self._task, completed=self._tokens, description=line)

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
        if self._tokens:
            self._show()
        if self._bar is not None:
            self._bar.stop()


if __name__ == "__main__":
    run_command(main)
