"""Stream documents to token shards: download, tokenize and write concurrently; resumable, with byte-identical output.

Source files are divided into units. Workers tokenize units (workers.py), and this process writes their tokens into
shards in the order of the source, so the shards do not depend on the number of workers.
"""

import fcntl
import math
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from nanogauge.errors import BadInput, RunFailed
from trainer.data.documents import Unit
from trainer.data.manifest import START, Manifest, Origin, Position, Settings, Shard, SourceFile, Split, token_dtype
from trainer.data.shards import (
    MANIFEST_NAME,
    ShardWriter,
    open_split,
    read_manifest,
    refuse_existing_shards,
    write_manifest,
)
from trainer.data.sources import LocalSource, LocatedUnit, TextSource, is_local, open_text_source, units_from
from trainer.data.workers import TokenizedUnit, WorkerPool, tokenize_unit

_BYTES_PER_TOKEN = 4.0  # of text, until it has been measured
_UNITS_AHEAD = 4  # per worker, before the shards; bounds the tokens in memory
VAL_TOKENS = 10_000_000
"""Default number of validation tokens; of a local source a tenth, if that is less."""
VAL_SHARE = 10
_WINDOW_TOKENS = 1025  # of GPT-2's context: fewer validation tokens are no use
_SMALL_SOURCE_BYTES = 2**29  # of text that surely holds fewer than VAL_SHARE * VAL_TOKENS tokens
_FLAGS = {
    "tokenizer": "--tokenizer",
    "tokenizer_sha256": "vocabulary",
    "dataset": "--dataset",
    "dataset_config": "--name",
    "revision": "--revision",
    "val_tokens": "--val-tokens",
    "shard_tokens": "--shard-tokens",
    "text_column": "--text-column",
}


@dataclass(frozen=True)
class PrepareOptions:
    out: Path
    tokens: int
    """Number of training tokens to write."""
    val_tokens: int | None
    """Minimum number of validation tokens; the document that reaches it is kept whole unless it is longer than all of
    them. None: VAL_TOKENS, or a tenth of a local source if that is less."""
    shard_tokens: int
    dataset: str
    """Repository on the hub, or a local file or folder."""
    config: str | None = None
    """Configuration of the dataset; None for its default."""
    revision: str | None = None
    """Commit of the dataset; None for its newest."""
    text_column: str = "text"
    tokenizer: str = "gpt2"
    characters: str | None = None
    """The vocabulary, if the tokenizer is chars; None for others."""


@dataclass(frozen=True)
class Progress:
    documents: int
    """Number of documents written by this process."""
    tokens: int
    """Number of tokens in all shards, including those of earlier processes."""
    new_tokens: int
    """Number of tokens written by this process."""
    text_bytes: float
    """Approximate bytes of text tokenized by this process."""
    left_tokens: float


class ShardAssembler:
    """Writes tokenized units into shards: first validation documents, then training tokens."""

    def __init__(self, writer: ShardWriter, start: Position, tokens: int, val_tokens: int) -> None:
        """`start` is the position of the first token; see PrepareOptions for the targets.

        Set `val_tokens` before the first `add` if it is 0.
        """
        self._writer = writer
        self.position = start
        """Position of the next token in the source."""
        self._tokens, self.val_tokens = tokens, val_tokens
        self.documents = 0
        """Number of documents written to shards."""
        self.text_bytes = 0.0
        """Approximate bytes of text written to shards."""

    @property
    def left_tokens(self) -> float:
        """Number of tokens still requested; infinite while `val_tokens` is 0."""
        written = self._writer.tokens
        if not self.val_tokens:
            return math.inf
        return max(self._tokens - written["train"], 0) + max(self.val_tokens - written["val"], 0)

    @property
    def done(self) -> bool:
        return self._writer.tokens["train"] >= self._tokens

    def add(self, unit: TokenizedUnit, file: int, index: int, files: tuple[SourceFile, ...]) -> None:
        """Append the next unit to the shards, up to the requested tokens.

        `file` and `index` are its numbers; `files` are the source files up to its own.
        """
        writer, starts, size = self._writer, unit.starts, unit.tokens.size
        if (file, index) != (self.position.file, self.position.unit):  # the first unit of the next file
            self.position = Position(file=file, unit=index, document=0)
        start = self.position
        first = at = int(starts[start.document]) + start.token if starts.size > 1 else 0
        while at < size and not self.done:
            limit = self._end_of_val(starts, at)
            split: Split = "val" if at < limit else "train"
            if split == "train":
                limit = min(at + self._tokens - writer.tokens["train"], size)
            writer.start_split(split)
            end = min(at + writer.room, limit)
            before = self.position
            self.position = self._position_at(starts, start, end)
            writer.next = self.position
            writer.source_files = files[: self.position.file + 1]
            begins = int(np.searchsorted(starts, end) - np.searchsorted(starts, at))
            self.documents += begins
            writer.append(split, unit.tokens[at:end], begins, before)
            at = end
        if at == size:
            self.position = Position(file=file, unit=index + 1, document=0)
        self.text_bytes += unit.text_bytes * (at - first) / max(size, 1)

    def _end_of_val(self, starts: npt.NDArray[np.int64], at: int) -> int:
        """Return the index at or after `at` of the unit's first training token.

        The document that reaches the target is kept whole, unless it is longer than the target. It is then cut there,
        or after a tenth of it or a window if the target is even less.
        """
        written = self._writer.tokens
        missing = max(self.val_tokens - written["val"], 0)
        if written["train"] or (not missing and at in starts):
            return at
        end = min(at + missing, int(starts[-1]))
        index = int(np.searchsorted(starts, end - 1 if missing else at, "right"))
        begin, whole = int(starts[index - 1]), int(starts[index])
        if whole - begin <= self.val_tokens:
            return whole
        least = min(_WINDOW_TOKENS, (whole - begin) // VAL_SHARE) - written["val"]
        return min(max(end, at + least), whole)

    def _position_at(self, starts: npt.NDArray[np.int64], start: Position, token: int) -> Position:
        if token == starts[-1]:
            return Position(file=start.file, unit=start.unit + 1, document=0)
        document = int(np.searchsorted(starts, token, "right")) - 1
        token -= int(starts[document])
        return Position(file=start.file, unit=start.unit, document=document, token=token)


@dataclass(frozen=True)
class ExistingOutput:
    """Output of earlier runs of the command in a folder, from which this run resumes."""

    folder: Path
    manifest: Manifest | None
    done: bool
    """True if all requested tokens are written."""
    ended: bool = False
    """True if the source ended before; nothing is left to do unless it has further files."""
    shards: tuple[Shard, ...] = ()
    """Finished shards to keep."""
    next: Position | None = None
    """Position in the source after the kept shards."""

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def settings(self) -> Settings | None:
        return self.manifest.settings if self.manifest is not None else None

    @property
    def source_files(self) -> tuple[SourceFile, ...]:
        if self.manifest is None or self.next is None:
            return ()
        return self.manifest.source_files[: self.next.file + 1]

    def check_settings(self, origin: Origin) -> None:
        """Raise BadInput if source, tokenizer or settings differ from those of earlier runs."""
        if self.manifest is None:
            return
        was, now = self.manifest.settings, origin.settings
        assert was is not None and now is not None
        for key, flag in _FLAGS.items():
            pair = (self.manifest, origin) if key in Origin.model_fields else (was, now)
            before, after = (getattr(record, key) for record in pair)
            if before != after:
                raise BadInput(
                    f"{self.folder} was begun with another {flag} ({before}, not {after}); "
                    "give the same again, another --out, or delete that folder."
                )


def read_existing(folder: Path, tokens: int) -> ExistingOutput:
    """Return the earlier output in a folder that a run for `tokens` training tokens can keep.

    Raises:
        BadInput: if the folder has damaged shards, or shards that no preparation can resume from.
    """
    manifest = read_manifest(folder) if (folder / MANIFEST_NAME).exists() else None
    settings = manifest.settings if manifest is not None else None
    if manifest is None or settings is None:
        refuse_existing_shards(folder)
        return ExistingOutput(folder, None, done=False)
    for split in get_args(Split):
        open_split(folder, split, allow_empty=True)  # checks the lengths
    shards, following = manifest.shards, manifest.next
    if manifest.complete:
        written = manifest.tokens("train")
        if tokens <= written or not shards:
            return ExistingOutput(folder, manifest, True, False, shards, following)
        if shards[-1].tokens < settings.shard_tokens:
            # The last shard was cut at the former end, so it is rewritten.
            shards, following = shards[:-1], shards[-1].begins
        return ExistingOutput(folder, manifest, False, written < settings.tokens, shards, following)
    return ExistingOutput(folder, manifest, False, False, shards, following)


def prepare(options: PrepareOptions, report: Callable[[Progress], None], pool: WorkerPool) -> Manifest:
    """Write validation shards, then training shards, disjoint by document; resume earlier runs.

    The last training document is cut at the requested tokens. If the source ends earlier, there are fewer training
    tokens.

    Args:
        options: what to prepare.
        report: called regularly with the progress.
        pool: a pool with the tokenizer of the options.

    Raises:
        BadInput: before anything is written, if the folder is not writable or holds something else, the disk is too
            small, or the source does not exist or has changed; later, if the source is damaged or ends before the
            training tokens begin. Finished shards stay listed.
        RunFailed: if a download fails or the disk fills up; finished shards stay.
    """
    existing = read_existing(options.out, options.tokens)
    source: TextSource | None = None
    if is_local(options.dataset):
        source = local = open_text_source(options.dataset, options.config)
        assert isinstance(local, LocalSource)
        if existing.manifest is not None and existing.manifest.dataset == options.dataset:
            local.check(existing.manifest.source_files)
    _check_disk(options, existing, source, token_dtype(pool.tokenizer.vocab_size).itemsize)
    was, val_tokens = existing.settings, options.val_tokens
    if val_tokens is None and was is not None:
        val_tokens = was.val_tokens
    if val_tokens is None:
        small = isinstance(source, LocalSource) and source.text_bytes <= _SMALL_SOURCE_BYTES
        val_tokens = 0 if small else VAL_TOKENS
    with _locked_folder(options.out):
        tokenizer = pool.tokenizer
        assert tokenizer.end_of_text is not None
        settings = Settings(
            tokens=options.tokens,
            val_tokens=val_tokens,
            shard_tokens=options.shard_tokens,
            text_column=options.text_column,
            unit_bytes=was.unit_bytes if was is not None else 0,
        )
        origin = Origin(
            tokenizer=options.tokenizer,
            tokenizer_sha256=tokenizer.sha256(),
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            dataset=options.dataset,
            dataset_config=options.config or "default",
            revision=options.revision or (existing.manifest.revision if existing.manifest is not None else None),
            settings=settings,
            characters=options.characters,
        )
        existing.check_settings(origin)
        if existing.manifest is not None and existing.done:
            return existing.manifest
        source = source or open_text_source(options.dataset, options.config, origin.revision)
        read = existing.manifest.source_files if existing.manifest is not None else ()
        if existing.manifest is not None and existing.ended and len(read) == len(source.names):
            return existing.manifest
        unit_bytes = settings.unit_bytes or source.unit_bytes
        settings = settings.model_copy(update={"unit_bytes": unit_bytes})
        origin = origin.model_copy(update={"revision": source.revision, "settings": settings})
        writer = ShardWriter(options.out, origin, shard_tokens=options.shard_tokens, finished=existing.shards)
        writer.next, writer.source_files = existing.next, existing.source_files
        is_new = existing.manifest is None
        with _failures_described(options.out, writer, is_new):
            for temporary in options.out.glob("*.tmp"):
                temporary.unlink()
            if is_new:
                write_manifest(options.out, writer.manifest)  # what the next run must agree with
            start = existing.next or START
            units = units_from(source, start, existing.source_files, unit_bytes, options.text_column)
            assembler = ShardAssembler(writer, start, options.tokens, val_tokens)
            _write_shards(units, options.text_column, pool, writer, assembler, report)
        return writer.manifest


def _write_shards(
    units: Iterator[LocatedUnit],
    column: str,
    pool: WorkerPool,
    writer: ShardWriter,
    assembler: ShardAssembler,
    report: Callable[[Progress], None],
) -> None:
    """Tokenize units and write them into shards until the requested tokens are written.

    Where the validation tokens are a share of the source, all of it is tokenized first.
    """
    before = sum(writer.tokens.values())

    def needed_bytes() -> float:
        written = sum(writer.tokens.values()) - before
        return assembler.left_tokens * (assembler.text_bytes / written if written else _BYTES_PER_TOKEN)

    tokenized = _tokenize_ahead(units, column, pool, needed_bytes)
    with writer:
        if not assembler.val_tokens:
            source = list(tokenized)
            _choose_val_tokens(sum(tokens.tokens.size for *_, tokens in source), assembler, writer)
            tokenized = iter(source)
        for unit, files, tokens in tokenized:
            assembler.add(tokens, unit.file, unit.index, files)
            total = sum(writer.tokens.values())
            report(
                Progress(
                    documents=assembler.documents,
                    tokens=total,
                    new_tokens=total - before,
                    text_bytes=assembler.text_bytes,
                    left_tokens=assembler.left_tokens,
                )
            )
            if assembler.done:
                break
        if not writer.tokens["train"]:
            total = writer.tokens["val"]
            raise BadInput(
                f"{writer.origin.dataset} ends after {total:,} tokens, which leaves none to train "
                f"on; give a smaller --val-tokens, such as {max(total // VAL_SHARE, 1)}."
            )


def _tokenize_ahead(
    units: Iterator[LocatedUnit], column: str, pool: WorkerPool, needed_bytes: Callable[[], float]
) -> Iterator[tuple[Unit, tuple[SourceFile, ...], TokenizedUnit]]:
    """Yield units in order with their files and tokens; some are submitted ahead, for `needed_bytes` of text at most.

    An error of the source is raised after the units before it.
    """
    queue: deque[tuple[Unit, tuple[SourceFile, ...], Future[TokenizedUnit]]] = deque()
    failure: BadInput | RunFailed | None = None
    ended = False
    while True:
        while not ended and len(queue) < _UNITS_AHEAD * pool.size:
            if queue and needed_bytes() <= sum(unit.text_bytes for unit, *_ in queue):
                break
            try:
                unit, files = next(units)
            except StopIteration:
                ended = True
            except (BadInput, RunFailed) as error:
                ended, failure = True, error
            else:
                queue.append((unit, files, pool.submit(tokenize_unit, unit, column)))
        if not queue:
            break
        unit, files, future = queue.popleft()
        yield unit, files, future.result()
    if failure is not None:
        raise failure


def _choose_val_tokens(source_tokens: int, assembler: ShardAssembler, writer: ShardWriter) -> None:
    """Set the validation tokens to a share of those of the whole source."""
    assembler.val_tokens = max(min(VAL_TOKENS, source_tokens // VAL_SHARE), 1)
    settings = writer.origin.settings
    assert settings is not None
    settings = settings.model_copy(update={"val_tokens": assembler.val_tokens})
    writer.origin = writer.origin.model_copy(update={"settings": settings})


@contextmanager
def _failures_described(out: Path, writer: ShardWriter, is_new: bool) -> Iterator[None]:
    """Convert an OSError, a RunFailed or the end of a worker to a RunFailed that says what stays in `out`."""
    try:
        yield
    except RunFailed as error:
        raise RunFailed(f"{error}; {_what_stays(out, writer.manifest)}") from error
    except BrokenProcessPool as error:
        raise RunFailed(
            f"a worker was killed (was the memory full? --workers 1 needs less); {_what_stays(out, writer.manifest)}"
        ) from error
    except BadInput:
        if is_new and not writer.manifest.shards:
            (out / MANIFEST_NAME).unlink(missing_ok=True)
        raise
    except OSError as error:  # errors of the source are BadInput or RunFailed
        raise RunFailed(f"cannot write to {out}: {error.strerror}; {_what_stays(out, writer.manifest)}") from error


def _what_stays(out: Path, manifest: Manifest) -> str:
    if not manifest.tokens("train"):
        return f"no training shard was finished; run the same command again to resume in {out}."
    return (
        f"{len(manifest.shards)} finished shards ({manifest.tokens('train'):,} training tokens) "
        f"stay in {out}: train on those, or run the same command again to resume."
    )


def _check_disk(options: PrepareOptions, existing: ExistingOutput, source: TextSource | None, token_bytes: int) -> None:
    """Raise BadInput unless the tokens fit on the disk."""
    if existing.done:
        return
    tokens = options.tokens + (options.val_tokens or 0)
    if isinstance(source, LocalSource):
        tokens = min(tokens, 4 * source.text_bytes)  # far fewer are in it
    needed_bytes = token_bytes * max(tokens - existing.tokens, 0)
    try:
        parents = (options.out, *options.out.absolute().parents)
        free_bytes = shutil.disk_usage(next(path for path in parents if path.exists())).free
    except OSError as error:
        raise _not_writable(options.out, error) from None
    if needed_bytes > free_bytes:
        raise BadInput(
            f"{tokens:,} tokens need {_format_size(needed_bytes)}, and {options.out} has "
            f"{_format_size(free_bytes)} free; make room, give fewer --tokens, or an --out on "
            "another disk."
        )


def _format_size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _not_writable(out: Path, error: OSError) -> BadInput:
    return BadInput(f"cannot write to {out}: {error.strerror}; give another --out.")


@contextmanager
def _locked_folder(out: Path) -> Iterator[None]:
    """Create the folder and lock it; raise BadInput if it is not writable, or locked."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise _not_writable(out, error) from None
    descriptor = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"another preparation is running in {out}; wait for it, or give another --out.") from None
        yield
    finally:
        os.close(descriptor)
