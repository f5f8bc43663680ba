"""Stream documents to token shards: download, tokenize and write concurrently; resumable, with byte-identical output.

Source files are divided into units. A worker tokenizes a unit into a temporary file, its segment (workers.py). This
process copies the segments into shards in the order of the source, so the shards do not depend on the number of
workers.
"""

import fcntl
import math
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from nanogauge.errors import BadInput, RunFailed
from trainer.data.documents import Unit
from trainer.data.manifest import START, Manifest, Origin, Position, Settings, Shard, SourceFile, Split
from trainer.data.segments import Segment, open_segment, segment_path
from trainer.data.shards import (
    MANIFEST_NAME,
    ShardWriter,
    open_split,
    read_manifest,
    refuse_existing_shards,
    write_manifest,
)
from trainer.data.sources import LocalSource, TextSource, UnitQueue, is_local, open_text_source
from trainer.data.tokenizer import BYTES, CHARACTERS
from trainer.data.workers import UNITS_PER_WORKER, WorkerPool

SEGMENTS = ".segments"
"""Name prefix of the temporary folder for segments, inside the folder of the shards."""
_BLOCK_TOKENS = 2**20
_BYTES_PER_TOKEN = 4.0  # of text, until it has been measured
_UNITS_AHEAD = 4  # per worker, before the shards; bounds the segments on disk
VAL_TOKENS = 10_000_000
"""Default number of validation tokens; of a local source a tenth, if that is less."""
VAL_SHARE = 10
_WINDOW_TOKENS = 1025  # of GPT-2's context: fewer validation tokens are no use
_SMALL_SOURCE_BYTES = 2**29  # of text that surely holds fewer than VAL_SHARE * VAL_TOKENS tokens
_NARROW = ("gpt2", "r50k_base", "p50k_base", "p50k_edit", BYTES, CHARACTERS)
_FLAGS = {
    "tokenizer": "--tokenizer",
    "tokenizer_sha256": "vocabulary",
    "dataset": "--dataset",
    "dataset_config": "--name",
    "revision": "--revision",
    "val_tokens": "--val-tokens",
    "shard_tokens": "--shard-tokens",
    "text_column": "--text-column",
    "pattern": "--pattern",
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
    pattern: str = "gpt2"
    """Encoding whose pre-tokenization a .tiktoken file uses."""
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
    retries: int
    """Number of units that were damaged and fetched again."""


class ShardAssembler:
    """Copies workers' segments into shards: first validation documents, then training tokens."""

    def __init__(self, writer: ShardWriter, start: Position, tokens: int, val_tokens: int) -> None:
        """`start` is the position of the first segment; see PrepareOptions for the targets.

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

    def add(self, segment: Segment, unit: tuple[int, int], files: tuple[SourceFile, ...]) -> None:
        """Append the next unit's segment to the shards, up to the requested tokens.

        `unit` is the `Unit.key` of the segment's unit; `files` are the source files up to the unit's own.
        """
        writer, starts = self._writer, segment.starts
        if unit != (self.position.file, self.position.unit):  # the first unit of the next file
            self.position = Position(file=unit[0], unit=unit[1], document=0)
        start = self.position
        first = at = int(starts[start.document]) + start.token if segment.documents else 0
        with segment.path.open("rb") as file:
            while at < segment.tokens and not self.done:
                limit = self._end_of_val(segment, at)
                split: Split = "val" if at < limit else "train"
                if split == "train":
                    left = self._tokens - writer.tokens["train"]
                    limit = min(at + left, segment.tokens)
                writer.start_split(split)
                end = min(at + min(writer.room, _BLOCK_TOKENS), limit)
                before = self.position
                self.position = self._position_at(segment, start, end)
                writer.next = self.position
                writer.source_files = files[: self.position.file + 1]
                begins = int(np.searchsorted(starts, end) - np.searchsorted(starts, at))
                self.documents += begins
                writer.append(split, segment.read(file, at, end), begins, before)
                at = end
        if at == segment.tokens:
            self.position = Position(file=start.file, unit=start.unit + 1, document=0)
        self.text_bytes += segment.text_bytes * (at - first) / max(segment.tokens, 1)

    def _end_of_val(self, segment: Segment, at: int) -> int:
        """Return the index at or after `at` of the segment's first training token.

        The document that reaches the target is kept whole, unless it is longer than the target. It is then cut there,
        or after a tenth of it or a window if the target is even less.
        """
        written = self._writer.tokens
        missing = max(self.val_tokens - written["val"], 0)
        starts = segment.starts
        if written["train"] or (not missing and at in starts):
            return at
        end = min(at + missing, segment.tokens)
        index = int(np.searchsorted(starts, end - 1 if missing else at, "right"))
        begin, whole = int(starts[index - 1]), int(starts[index])
        if whole - begin <= self.val_tokens:
            return whole
        least = min(_WINDOW_TOKENS, (whole - begin) // VAL_SHARE) - written["val"]
        return min(max(end, at + least), whole)

    def _position_at(self, segment: Segment, start: Position, token: int) -> Position:
        if token == segment.tokens:
            return Position(file=start.file, unit=start.unit + 1, document=0)
        document = int(np.searchsorted(segment.starts, token, "right")) - 1
        token -= int(segment.starts[document])
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
    def revision(self) -> str | None:
        return self.manifest.revision if self.manifest is not None else None

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

    def clean(self) -> None:
        """Delete temporary files."""
        for path in self.folder.glob("*.tmp"):
            path.unlink()


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
        pool: a new pool with the tokenizer and column of the options.

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
    _check_disk(options, existing, pool.size, source)
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
            pattern=options.pattern if options.tokenizer.endswith(".tiktoken") else None,
        )
        origin = Origin(
            tokenizer=options.tokenizer,
            tokenizer_sha256=tokenizer.sha256(),
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            dataset=options.dataset,
            dataset_config=options.config or "default",
            revision=options.revision or existing.revision,
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
        with _segments_folder(options.out, writer, is_new) as segments:
            existing.clean()
            if is_new:
                write_manifest(options.out, writer.manifest)  # what the next run must agree with
            pool.start(segments)
            start = existing.next or START
            units = UnitQueue(source, start, existing.source_files, unit_bytes, options.text_column)
            assembler = ShardAssembler(writer, start, options.tokens, val_tokens)
            _write_shards(segments, units, pool, writer, assembler, report)
        return writer.manifest


def _write_shards(
    folder: Path,
    units: UnitQueue,
    pool: WorkerPool,
    writer: ShardWriter,
    assembler: ShardAssembler,
    report: Callable[[Progress], None],
) -> None:
    """Submit units to the workers and copy the segments into shards until all is written.

    Where the validation tokens are a share of the source, all of it is tokenized first.
    """
    before = sum(writer.tokens.values())
    dtype = writer.manifest.dtype
    queue: deque[Unit] = deque()
    ready: set[tuple[int, int]] = set()
    queued_bytes = 0
    with writer:
        while not assembler.done:
            written = sum(writer.tokens.values()) - before
            ratio = assembler.text_bytes / written if written else _BYTES_PER_TOKEN
            most = _UNITS_AHEAD * pool.size if assembler.val_tokens else math.inf
            while pool.has_room and len(queue) < most and not pool.failures:
                needed = assembler.left_tokens * ratio - queued_bytes
                try:
                    unit = units.poll(needed) if needed > 0 or not queue else None
                except RunFailed:
                    if not queue:
                        raise
                    unit = None  # write the fetched units to shards first
                if unit is None:
                    break
                queue.append(unit)
                queued_bytes += unit.text_bytes
                pool.submit(unit)
            if not queue and units.exhausted:
                break
            awaited = queue[0].key if queue else None
            if not assembler.val_tokens:
                awaited = next((unit.key for unit in queue if unit.key not in ready), awaited)
            if awaited in pool.failures:
                raise pool.failures[awaited]
            if awaited not in ready:
                ready.update(pool.wait_for_units(0.5 if pool.busy else 0.005))
            if not assembler.val_tokens:
                if not units.exhausted or len(ready) < len(queue):
                    continue
                paths = [segment_path(folder, unit.file, unit.index) for unit in queue]
                _choose_val_tokens([open_segment(path, dtype) for path in paths], assembler, writer)
            while queue and queue[0].key in ready and not assembler.done:
                unit = queue.popleft()
                queued_bytes -= unit.text_bytes
                ready.remove(unit.key)
                segment = open_segment(segment_path(folder, unit.file, unit.index), dtype)
                assembler.add(segment, unit.key, tuple(units.files))
                segment.path.unlink()
            tokens = sum(writer.tokens.values())
            report(
                Progress(
                    documents=assembler.documents,
                    tokens=tokens,
                    new_tokens=tokens - before,
                    text_bytes=assembler.text_bytes,
                    left_tokens=assembler.left_tokens,
                    retries=pool.retries,
                )
            )
        if not writer.tokens["train"]:
            tokens = writer.tokens["val"]
            raise BadInput(
                f"{writer.origin.dataset} ends after {tokens:,} tokens, which leaves none to train "
                f"on; give a smaller --val-tokens, such as {max(tokens // VAL_SHARE, 1)}."
            )


def _choose_val_tokens(source: Sequence[Segment], assembler: ShardAssembler, writer: ShardWriter) -> None:
    """Set the validation tokens to a share of those of the whole source."""
    tokens = sum(segment.tokens for segment in source)
    assembler.val_tokens = max(min(VAL_TOKENS, tokens // VAL_SHARE), 1)
    settings = writer.origin.settings
    assert settings is not None
    settings = settings.model_copy(update={"val_tokens": assembler.val_tokens})
    writer.origin = writer.origin.model_copy(update={"settings": settings})


@contextmanager
def _segments_folder(out: Path, writer: ShardWriter, is_new: bool) -> Iterator[Path]:
    """Create a folder for the segments, and delete it afterwards.

    An OSError or RunFailed is converted to a RunFailed whose message says what stays in `out`.
    """
    _delete_segments(out)
    try:
        # Workers of a killed run may still write to its folder.
        yield Path(tempfile.mkdtemp(prefix=SEGMENTS, dir=out))
    except RunFailed as error:
        raise RunFailed(f"{error}; {_what_stays(out, writer.manifest)}") from error
    except BadInput:
        if is_new and not writer.manifest.shards:
            (out / MANIFEST_NAME).unlink(missing_ok=True)
        raise
    except OSError as error:  # errors of the source are BadInput or RunFailed
        raise RunFailed(f"cannot write to {out}: {error.strerror}; {_what_stays(out, writer.manifest)}") from error
    finally:
        _delete_segments(out)


def _delete_segments(out: Path) -> None:
    for folder in out.glob(f"{SEGMENTS}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _what_stays(out: Path, manifest: Manifest) -> str:
    if not manifest.tokens("train"):
        return f"no training shard was finished; run the same command again to resume in {out}."
    return (
        f"{len(manifest.shards)} finished shards ({manifest.tokens('train'):,} training tokens) "
        f"stay in {out}: train on those, or run the same command again to resume."
    )


def _check_disk(options: PrepareOptions, existing: ExistingOutput, workers: int, source: TextSource | None) -> None:
    """Raise BadInput unless the tokens and the segments fit on the disk."""
    if existing.done:
        return
    narrow = options.tokenizer in _NARROW
    tokens = options.tokens + (options.val_tokens or 0)
    if isinstance(source, LocalSource):
        tokens = min(tokens, 4 * source.text_bytes)  # far fewer are in it
    segments = (_UNITS_AHEAD + UNITS_PER_WORKER) * workers * 2**21
    needed_bytes = (2 if narrow else 4) * max(tokens + segments - existing.tokens, 0)
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
