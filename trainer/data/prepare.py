"""From texts to token shards: downloaded, tokenised and written at once, and gone on with after any
interruption as if there had been none.

Workers turn units of the source into pieces (worker.py); here the pieces become shards, in the
order of the source. The shards are the same, byte by byte, for any number of workers.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanogauge.errors import BadInput, RunFailed
from trainer.data.documents import Unit
from trainer.data.manifest import (
    START,
    Manifest,
    Origin,
    Position,
    Settings,
    Shard,
    SourceFile,
    Split,
)
from trainer.data.shards import (
    MANIFEST_NAME,
    ShardWriter,
    open_shard,
    read_manifest,
    refuse_filled,
    write_manifest,
)
from trainer.data.sources import Inputs, Planner, open_inputs
from trainer.data.workers import Crew, Piece, is_whole, open_piece, piece_path

_BLOCK_TOKENS = 2**20


class Assembly:
    """Takes pieces from a position on: first the validation documents, then the training tokens."""

    def __init__(self, writer: ShardWriter, start: Position, tokens: int, val_tokens: int) -> None:
        """`tokens` of training, `val_tokens` of validation and the rest of its last document."""
        self._writer = writer
        self.position = start
        """where the next token is"""
        self._targets: dict[Split, int] = {"train": tokens, "val": val_tokens}
        self._consumed: list[Path] = []
        self.documents = 0
        """that this call has put into shards"""
        self.text_bytes = 0.0
        """of text, about, that this call has put into shards"""

    @property
    def left(self) -> int:
        """Tokens that are still needed, about."""
        written = self._writer.tokens
        return sum(max(target - written[split], 0) for split, target in self._targets.items())

    @property
    def reached(self) -> bool:
        """Whether the training tokens are there."""
        return self._writer.tokens["train"] >= self._targets["train"]

    def _split(self) -> Split:
        written = self._writer.tokens
        # The document that reaches the target is kept whole.
        inside = written["val"] > 0 and self.position.token > 0
        short = written["val"] < self._targets["val"]
        return "val" if not written["train"] and (short or inside) else "train"

    def add(self, piece: Piece, unit: tuple[int, int], files: tuple[SourceFile, ...]) -> None:
        """Put the piece of the next unit into shards, as much as is needed of it.

        Args:
            piece: of that unit.
            unit: index of its file, and its own in that file.
            files: those of the source up to it.

        Raises:
            OSError: if a shard cannot be written.
        """
        writer, starts = self._writer, piece.starts
        if unit != (self.position.file, self.position.unit):  # the first one of the next file
            self.position = Position(file=unit[0], unit=unit[1], document=0)
        place = self.position
        first = at = int(starts[place.document]) + place.token if piece.documents else 0
        with piece.path.open("rb") as file:
            while at < piece.tokens and not self.reached:
                split = self._split()
                if writer.begin(split):
                    self._forget()
                end = min(at + min(writer.room, _BLOCK_TOKENS), self._limit(piece, at, split))
                before = self.position
                self.position = self._behind(piece, place, end)
                writer.next = self.position
                writer.source_files = files[: self.position.file + 1]
                begins = int(np.searchsorted(starts, end) - np.searchsorted(starts, at))
                name = files[place.file].name
                self.documents += begins
                if writer.append(split, piece.read(file, at, end), begins, name, before):
                    self._forget()
                at = end
        if at == piece.tokens:
            self.position = Position(file=place.file, unit=place.unit + 1, document=0)
            self._consumed.append(piece.path)
        self.text_bytes += piece.text_bytes * (at - first) / max(piece.tokens, 1)

    def _limit(self, piece: Piece, at: int, split: Split) -> int:
        """Where the tokens of a split end in a piece, at most."""
        missing = max(self._targets[split] - self._writer.tokens[split], 0)
        end = min(at + missing, piece.tokens)
        if split == "train":
            return end
        return int(piece.starts[np.searchsorted(piece.starts, end)])  # the document is kept whole

    def _behind(self, piece: Piece, place: Position, end: int) -> Position:
        if end == piece.tokens:
            return Position(file=place.file, unit=place.unit + 1, document=0)
        document = int(np.searchsorted(piece.starts, end, "right")) - 1
        token = end - int(piece.starts[document])
        return Position(file=place.file, unit=place.unit, document=document, token=token)

    def _forget(self) -> None:
        """Delete pieces of which all is in finished shards."""
        for path in self._consumed:
            path.unlink(missing_ok=True)
        self._consumed.clear()


_NAMES = {
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
class EarlierOutput:
    folder: Path
    manifest: Manifest | None
    """of the folder as it was found"""
    done: bool
    """whether nothing is left to do"""
    shards: tuple[Shard, ...] = ()
    """those that stay"""
    next: Position | None = None
    """where the source goes on behind them"""

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def revision(self) -> str | None:
        return self.manifest.revision if self.manifest is not None else None

    @property
    def unit_bytes(self) -> int:
        """Of the units that `next` counts; 0 if there is none."""
        settings = self.manifest.settings if self.manifest is not None else None
        return settings.unit_bytes if settings is not None else 0

    @property
    def source_files(self) -> tuple[SourceFile, ...]:
        if self.manifest is None or self.next is None:
            return ()
        return self.manifest.source_files[: self.next.file + 1]

    def must_fit(self, origin: Origin) -> None:
        """Refuse another source, tokenizer or settings than those the folder was begun with.

        Raises:
            BadInput: naming what is not the same.
        """
        if self.manifest is None:
            return
        was, now = self.manifest.settings, origin.settings
        assert was is not None and now is not None
        for key in ("tokenizer", "tokenizer_sha256", "dataset", "dataset_config", "revision"):
            self._compare(key, getattr(self.manifest, key), getattr(origin, key))
        for key in ("val_tokens", "shard_tokens", "text_column", "pattern"):
            self._compare(key, getattr(was, key), getattr(now, key))

    def _compare(self, key: str, was: object, now: object) -> None:
        if was != now:
            raise BadInput(
                f"{self.folder} was begun with another {_NAMES[key]} ({was}, not {now}); "
                "give the same again, another --out, or delete that folder."
            )

    def begin(self) -> None:
        """Take out of the manifest what is made anew, and clear away what was half written.

        Raises:
            OSError: if the folder cannot be written.
        """
        if self.manifest is not None and len(self.shards) < len(self.manifest.shards):
            kept = {
                "shards": self.shards,
                "total_tokens": self.tokens,
                "next": self.next,
                "source_files": self.source_files,
                "complete": False,
            }
            write_manifest(self.folder, self.manifest.model_copy(update=kept))
        for path in self.folder.glob("*.tmp"):
            path.unlink()

    def pieces(self, folder: Path, start: Position) -> frozenset[str]:
        """Names of pieces that may be used again; the others are cleared away.

        Those that no manifest tells the source and tokenizer of are among the others.
        """
        kept = set()
        for path in folder.iterdir():
            file, _, unit = path.stem.partition("_")
            if (
                self.manifest is not None
                and path.suffix == ".piece"
                and (int(file), int(unit)) >= (start.file, start.unit)
            ):
                kept.add(path.name)
            else:
                path.unlink()
        return frozenset(kept)


def look_at(folder: Path, tokens: int) -> EarlierOutput:
    """What is in a folder that is to hold so many training tokens.

    Raises:
        BadInput: if it holds shards that a preparation cannot go on with, or damaged ones.
    """
    if not (folder / MANIFEST_NAME).exists():
        refuse_filled(folder)
        return EarlierOutput(folder, None, done=False)
    manifest = read_manifest(folder)
    if manifest.settings is None:
        refuse_filled(folder)
    remedy = f"run: python prepare_fineweb.py --repair {folder}"
    for shard in manifest.shards:
        if open_shard(folder / shard.file, remedy).size != shard.tokens:
            raise BadInput(
                f"{folder / shard.file} has another length than {MANIFEST_NAME} lists; {remedy}"
            )
    shards, following = manifest.shards, manifest.next
    if manifest.complete:
        last = shards[-1] if shards else None
        settings = manifest.settings
        used_up = manifest.tokens("train") < (settings.tokens if settings is not None else 0)
        if used_up or tokens <= manifest.tokens("train") or last is None:
            return EarlierOutput(folder, manifest, True, shards, following)
        if settings is not None and last.tokens < settings.shard_tokens:
            # The last shard was cut at the former target: it is filled from where it begins.
            shards, following = shards[:-1], last.begins
    return EarlierOutput(folder, manifest, False, shards, following)


PIECES = ".pieces"
_BYTES_PER_TOKEN = 4.0  # of text, until it has been measured
_UNITS_AHEAD = 4
"""units a worker may be ahead of the shards, which bounds the pieces on disk"""


@dataclass(frozen=True)
class Order:
    """What to prepare, and where to."""

    out: Path
    tokens: int
    """training tokens"""
    val_tokens: int
    """least validation tokens; the document that reaches them is kept whole"""
    shard_tokens: int
    dataset: str
    """name of a dataset repository on the hub, or a local file or folder"""
    config: str | None = None
    """configuration of that dataset; None for its default"""
    revision: str | None = None
    """commit of that dataset; None for its newest"""
    workers: int = 1
    """processes that tokenise"""
    text_column: str = "text"
    tokenizer: str = "gpt2"
    pattern: str = "gpt2"
    """how words are split, where the tokenizer is a file of ranks"""
    whole_files: bool = False
    """fetch whole files, checked by their sha256, in place of the parts that are read"""


@dataclass(frozen=True)
class Progress:
    documents: int
    tokens: int
    """in shards so far, those of earlier calls among them"""
    new_tokens: int
    """of this call"""
    text_bytes: float
    """of text that this call has turned into tokens, about"""
    left_tokens: int
    retries: int
    """times that something damaged came and was fetched again"""


def crew_of(order: Order) -> Crew:
    """The workers for an order."""
    return Crew(order.workers, order.tokenizer, order.pattern, order.text_column)


def prepare(
    order: Order,
    report: Callable[[Progress], None],
    crew: Crew,
    earlier: EarlierOutput | None = None,
) -> Manifest:
    """Write the shards of an order: first validation, then training, disjoint by document.

    The last training document is cut where the training tokens are reached; there are fewer of
    them where the source ends before. What an earlier, interrupted call has left in the folder is
    gone on with, or what is given as that. `report` is called now and then; the crew is new, and of
    the order.

    Raises:
        BadInput: before anything is written, if the folder cannot be written or holds something
            else, the disk is too small, or there is no such source; and if the source is damaged
            or ends before the training tokens begin.
        RunFailed: if the download breaks off or the disk fills up; what is done stays.
    """
    earlier = earlier or look_at(order.out, order.tokens)
    _check_disk(order, earlier)
    with _folder(order.out):
        vocabulary = crew.vocabulary()
        settings = Settings(
            tokens=order.tokens,
            val_tokens=order.val_tokens,
            shard_tokens=order.shard_tokens,
            text_column=order.text_column,
            unit_bytes=earlier.unit_bytes,
            pattern=order.pattern if order.tokenizer.endswith(".tiktoken") else None,
        )
        origin = Origin(
            tokenizer=order.tokenizer,
            tokenizer_sha256=vocabulary.sha256,
            vocab_size=vocabulary.vocab_size,
            end_of_text=vocabulary.end_of_text,
            dataset=order.dataset,
            dataset_config=order.config or "default",
            revision=order.revision or earlier.revision,
            settings=settings,
        )
        earlier.must_fit(origin)
        if earlier.manifest is not None and earlier.done:
            return earlier.manifest
        inputs = open_inputs(order.dataset, order.config, origin.revision, whole=order.whole_files)
        unit_bytes = earlier.unit_bytes or inputs.unit_bytes
        settings = settings.model_copy(update={"unit_bytes": unit_bytes})
        origin = origin.model_copy(update={"revision": inputs.revision, "settings": settings})
        return _run(order, origin, earlier, inputs, crew, report)


def join_parts(out: Path) -> Manifest:
    """Write one manifest for all prepared folders directly below `out`; validation shards first.

    Raises:
        BadInput: if there are none, or one is damaged, incomplete or of another tokenizer.
    """
    folders = sorted(path.parent for path in out.glob(f"*/{MANIFEST_NAME}"))
    if not folders:
        raise BadInput(f"{out} holds no prepared folders; prepare each part below it first.")
    parts = [read_manifest(folder) for folder in folders]
    tokenizer = ("tokenizer", "tokenizer_sha256", "vocab_size", "end_of_text")
    shards = []
    for folder, part in zip(folders, parts, strict=True):
        if not part.complete:
            raise BadInput(f"{folder} is not complete; run its command again, then join.")
        for key in tokenizer:
            if getattr(part, key) != getattr(parts[0], key):
                raise BadInput(
                    f"{folders[0]} and {folder} do not belong together: their {key} is "
                    f"{getattr(parts[0], key)} and {getattr(part, key)}."
                )
        for shard in part.shards:
            open_shard(folder / shard.file)
            update = {"file": f"{folder.name}/{shard.file}", "begins": None}
            shards.append(shard.model_copy(update=update))
    manifest = Manifest(
        **{key: getattr(parts[0], key) for key in tokenizer},
        dataset=os.path.commonpath([part.dataset for part in parts]),
        dataset_config=parts[0].dataset_config,
        total_tokens=sum(shard.tokens for shard in shards),
        shards=tuple(sorted(shards, key=lambda shard: shard.split != "val")),
        source_files=tuple(file for part in parts for file in part.source_files),
    )
    write_manifest(out, manifest)
    return manifest


def _run(
    order: Order,
    origin: Origin,
    earlier: EarlierOutput,
    inputs: Inputs,
    crew: Crew,
    report: Callable[[Progress], None],
) -> Manifest:
    pieces = order.out / PIECES
    writer = ShardWriter(
        order.out, origin, shard_tokens=order.shard_tokens, finished=earlier.shards
    )
    writer.next, writer.source_files = earlier.next, earlier.source_files
    try:
        earlier.begin()
        if earlier.manifest is None:
            write_manifest(order.out, writer.manifest)  # what a later call must go on with
        pieces.mkdir(exist_ok=True)
        crew.begin(pieces)
        _fill(order, origin, earlier, inputs, crew, writer, report)
        shutil.rmtree(pieces)
    except RunFailed as error:
        raise RunFailed(f"{error}; {_what_stays(order.out, writer.manifest)}") from error
    except BadInput:
        if not writer.manifest.shards:
            shutil.rmtree(pieces, ignore_errors=True)
            (order.out / MANIFEST_NAME).unlink(missing_ok=True)
        raise
    except OSError as error:  # the source's own errors have been named: this is the disk
        raise RunFailed(
            f"cannot write to {order.out}: {error.strerror}; "
            f"{_what_stays(order.out, writer.manifest)}"
        ) from error
    finally:
        with suppress(OSError):
            pieces.rmdir()  # if it is empty
    return writer.manifest


def _fill(
    order: Order,
    origin: Origin,
    earlier: EarlierOutput,
    inputs: Inputs,
    crew: Crew,
    writer: ShardWriter,
    report: Callable[[Progress], None],
) -> None:
    """Take units from the source to the shards until there is nothing left to do."""
    settings = origin.settings
    assert settings is not None
    start = earlier.next or START
    assembly = Assembly(writer, start, order.tokens, order.val_tokens)
    planner = Planner(inputs, start, earlier.source_files, settings.unit_bytes, order.text_column)
    folder = order.out / PIECES
    left = earlier.pieces(folder, start)
    before = sum(writer.tokens.values())
    queue: deque[Unit] = deque()
    ready: set[tuple[int, int]] = set()
    queued_bytes = 0
    ahead = _UNITS_AHEAD * crew.size
    with writer:
        while not assembly.reached:
            written = sum(writer.tokens.values()) - before
            ratio = assembly.text_bytes / written if written else _BYTES_PER_TOKEN
            while crew.has_room and len(queue) < ahead and not crew.failures:
                wanted = assembly.left * ratio - queued_bytes
                try:
                    unit = planner.poll(wanted) if wanted > 0 or not queue else None
                except RunFailed:
                    if not queue:
                        raise
                    unit = None  # what has been fetched is put into shards first
                if unit is None:
                    break
                queue.append(unit)
                queued_bytes += unit.text_bytes
                path = piece_path(folder, unit.file, unit.index)
                if path.name in left and is_whole(path, origin.dtype):
                    ready.add(unit.key)
                else:
                    crew.give(unit)
            if not queue and planner.exhausted:
                break
            if queue and queue[0].key in crew.failures:
                raise crew.failures[queue[0].key]
            if not queue or queue[0].key not in ready:
                ready.update(crew.done(0.5 if crew.busy else 0.005))
            while queue and queue[0].key in ready and not assembly.reached:
                unit = queue.popleft()
                queued_bytes -= unit.text_bytes
                ready.remove(unit.key)
                piece = open_piece(piece_path(folder, unit.file, unit.index), origin.dtype)
                assembly.add(piece, unit.key, tuple(planner.files))
            tokens = sum(writer.tokens.values())
            report(
                Progress(
                    documents=assembly.documents,
                    tokens=tokens,
                    new_tokens=tokens - before,
                    text_bytes=assembly.text_bytes,
                    left_tokens=assembly.left,
                    retries=crew.retries,
                )
            )
        if not writer.tokens["train"]:
            raise BadInput(
                f"{order.dataset} {order.config or ''} ends after {writer.tokens['val']:,} tokens, "
                "which leaves none to train on; give a smaller --val-tokens."
            )


def _what_stays(out: Path, manifest: Manifest) -> str:
    if not manifest.tokens("train"):
        return (
            f"no training shard was finished; run the same command again, which goes on in {out}."
        )
    return (
        f"{len(manifest.shards)} finished shards ({manifest.tokens('train'):,} training tokens) "
        f"stay in {out}: train on those, or run the same command again, which goes on from there."
    )


def _check_disk(order: Order, earlier: EarlierOutput) -> None:
    """Whether the tokens fit, and the pieces of a shard that is being filled."""
    token_bytes = 2 if order.tokenizer in ("gpt2", "r50k_base", "p50k_base", "p50k_edit") else 4
    tokens = order.tokens + order.val_tokens
    pieces = min(order.shard_tokens, tokens) + _UNITS_AHEAD * order.workers * 2**21
    needed_bytes = token_bytes * max(tokens + pieces - earlier.tokens, 0)
    if earlier.done:
        return
    try:
        there = next(path for path in (order.out, *order.out.absolute().parents) if path.exists())
        free_bytes = shutil.disk_usage(there).free
    except OSError as error:
        raise _unwritable(order.out, error) from None
    if needed_bytes > free_bytes:
        raise BadInput(
            f"{tokens:,} tokens need {_size(needed_bytes)}, "
            f"and {order.out} has {_size(free_bytes)} free; make room, give fewer "
            "--tokens, or an --out on another disk."
        )


def _size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _unwritable(out: Path, error: OSError) -> BadInput:
    return BadInput(f"cannot write to {out}: {error.strerror}; give another --out.")


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Make the folder, and hold it so that no other call works in it.

    Raises:
        BadInput: if it cannot be written, or another call works in it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise _unwritable(out, error) from None
    if sys.platform == "win32":
        yield
        return
    import fcntl

    held = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(
                f"another preparation is at work in {out}; wait for it, or give another --out."
            ) from None
        yield
    finally:
        os.close(held)
