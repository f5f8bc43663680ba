"""What an earlier call has left in the folder, and whether this one may go on with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanogauge.errors import BadInput
from trainer.data.manifest import Manifest, Origin, Position, Shard, SourceFile
from trainer.data.shards import (
    MANIFEST_NAME,
    open_shard,
    read_manifest,
    refuse_filled,
    write_manifest,
)

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
