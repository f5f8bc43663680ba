"""Pieces in their order become shards: the same bytes, whoever made the pieces and when."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.data.manifest import Position, SourceFile, Split
from trainer.data.pieces import Piece
from trainer.data.shards import ShardWriter

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
