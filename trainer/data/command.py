"""What prepare_fineweb.py does with its arguments, and what it shows meanwhile."""

from __future__ import annotations

import argparse
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from nanogauge.errors import BadInput
from trainer.data.workers import Crew, workers_within

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from trainer.data.prepare import Order, Progress

VALIDATION_TOKENS = 10_000_000
MOST_SHARD_TOKENS = 2**31 - 1
"""what the count in a shard's header can say"""


def prepare_command(given: argparse.Namespace) -> int:
    """Prepare, or fetch ready shards; the exit status.

    Raises:
        BadInput, RunFailed: as `prepare`, or `fetch_shards`.
    """
    if given.val_tokens is not None and given.val_share is not None:
        raise BadInput("give --val-tokens or --val-share, not both.")
    if given.shard_tokens > MOST_SHARD_TOKENS:
        raise BadInput(f"a shard holds at most {MOST_SHARD_TOKENS:,} tokens; give --shard-tokens.")
    if given.pretokenized is not None:
        from trainer.data.pretokenized import fetch_command

        return fetch_command(
            given.pretokenized, given.revision, given.tokenizer, given.tokens, given.out
        )
    workers = workers_within(given.memory, given.workers)
    if workers < given.workers:
        print(
            f"{workers} workers, not {given.workers}: more may need more than "
            f"{given.memory / 2**30:.1f} GiB of memory (--memory).",
            file=sys.stderr,
        )
    with Crew(workers, given.tokenizer, given.pattern, given.text_column) as crew:
        # What follows is imported while the workers load their tokenizer.
        from trainer.data.prepare import prepare

        order = order_of(given, workers)
        with Live(order.tokens + order.val_tokens) as live:
            manifest = prepare(order, live.report, crew)
    train_tokens = manifest.tokens("train")
    if train_tokens < order.tokens:
        print(
            f"The dataset ended before {order.tokens:,} training tokens were reached; "
            f"plan with --data.tokens {train_tokens}."
        )
    print(
        f"{len(manifest.shards)} shards with {train_tokens:,} training tokens and "
        f"{manifest.tokens('val'):,} validation tokens are in {order.out}."
    )
    print(f"Next: python train.py configs/rtx4070_fineweb.toml --data.path {given.out}")
    return 0


def order_of(given: argparse.Namespace, workers: int) -> Order:
    """Return the order that the arguments describe."""
    from trainer.data.prepare import Order

    val_tokens = given.val_tokens or VALIDATION_TOKENS
    if given.val_share is not None:
        val_tokens = max(1, round(given.tokens * given.val_share))
    name = given.name
    if name is None and given.dataset.startswith("HuggingFaceFW/fineweb"):
        name = "sample-10BT"
    return Order(
        out=given.out,
        tokens=given.tokens,
        val_tokens=val_tokens,
        shard_tokens=given.shard_tokens,
        dataset=given.dataset,
        config=name,
        revision=given.revision,
        workers=workers,
        text_column=given.text_column,
        tokenizer=given.tokenizer,
        pattern=given.pattern,
        whole_files=given.whole_files,
    )


class Live:
    """Progress on stderr: a bar in a terminal, else a line now and then. A context manager."""

    def __init__(self, total_tokens: int) -> None:
        self._total = total_tokens
        self._last: Progress | None = None
        self._began = time.monotonic()
        self._every_seconds = 0.2 if sys.stderr.isatty() else 10.0
        self._next = self._began + self._every_seconds
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = BarColumn(), TextColumn("{task.description}")
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("opening the dataset", total=total_tokens)

    def report(self, progress: Progress) -> None:
        self._last = progress
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._every_seconds
            self._show()

    def _show(self) -> None:
        assert self._last is not None
        line = line_of(self._last, self._total, max(time.monotonic() - self._began, 1e-9))
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.update(self._task, completed=self._last.tokens, description=line)

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
            self._show()
        if self._bar is not None:
            self._bar.stop()


def line_of(progress: Progress, total_tokens: int, seconds: float) -> str:
    """What is there and how fast it comes; the rates and what is left are of this call."""
    from nanogauge.quantities import format_seconds

    rate = progress.new_tokens / seconds
    left = format_seconds(progress.left_tokens / rate) if rate else "unknown time"
    again = f", {progress.retries} fetched again" if progress.retries else ""
    return (
        f"{progress.tokens:,} of {total_tokens:,} tokens, {rate:,.0f} tokens/s, "
        f"{progress.documents / seconds:,.0f} documents/s, "
        f"{progress.text_bytes / 1e6 / seconds:,.1f} MB/s, {left} left{again}"
    )
