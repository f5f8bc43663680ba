"""The order in which windows of tokens are seen: a function of their number, never an array.

An epoch is one pass over a grid of windows, in an order of its own. `permute` is the
generalized-Feistel cipher with cycle walking of Black and Rogaway, "Ciphers with Arbitrary Finite
Domains" (CT-RSA 2002); its round function is the finaliser of SplitMix64 (Steele, Lea and Flood,
"Fast Splittable Pseudorandom Number Generators", OOPSLA 2014). Neither depends on the version of a
library: a run that is resumed after an upgrade goes on in the same order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
Integers = npt.NDArray[np.int64]
Windows = tuple[Integers, Integers]
"""the shard and the first token of each"""
_Words = npt.NDArray[np.uint64]


def permute(n: int, seed: int, epoch: int, positions: Integers) -> Integers:
    """The values at some positions of a permutation of 0 ... n - 1, one for each seed and epoch.

    Takes memory for the positions alone, whatever n is.
    """
    # A domain of rows x columns, the smallest near-square one that holds n: it is left for a value
    # beyond n once in about sqrt(n) times, and walked on until one below n turns up.
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    keys = _keys(seed, epoch, "order")
    values = positions.astype(np.uint64)
    beyond = slice(None)
    walking = values
    while walking.size:
        walking = _encipher(walking, np.uint64(rows), np.uint64(columns), keys)
        values[beyond] = walking
        beyond = np.flatnonzero(values >= n)  # type: ignore[assignment]
        walking = values[beyond]
    return values.astype(np.int64)


def _encipher(values: _Words, rows: np.uint64, columns: np.uint64, keys: _Words) -> _Words:
    """Rounds that shift the row by a function of the column, then the column by one of the row."""
    row, column = np.divmod(values, columns)
    for key in keys.reshape(-1, 2):
        row = (row + _mixed(column ^ key[0]) % rows) % rows
        column = (column + _mixed(row ^ key[1]) % columns) % columns
    return row * columns + column


def _mixed(words: _Words) -> _Words:
    """SplitMix64's finaliser: each bit of a word bears on all bits of the result."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _keys(seed: int, epoch: int, purpose: str) -> _Words:
    text = f"{seed} {epoch} {purpose}".encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=8 * _ROUNDS).digest(), dtype="<u8")


@dataclass(frozen=True)
class Grid:
    """Windows of block_size + 1 tokens, laid end to end over each shard, and the order of them.

    A window's last token is the next one's first, so each token is predicted once. In each epoch
    the grid of a shard begins at another of its first block_size tokens, so that the cuts between
    windows fall elsewhere; the number of windows stays the same, and what lies before and behind
    the grid, fewer than 2 x block_size tokens of a shard, is not predicted in that epoch.

    Args:
        lengths: tokens of each shard, each more than block_size.
    """

    lengths: Sequence[int]
    block_size: int
    seed: int
    _counts: Integers = field(init=False)
    _ends: Integers = field(init=False)

    def __post_init__(self) -> None:
        lengths = np.array(self.lengths, dtype=np.int64)
        counts = np.maximum(1, lengths // self.block_size - 1)
        object.__setattr__(self, "_counts", counts)
        object.__setattr__(self, "_ends", np.cumsum(counts))

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return int(self._ends[-1])

    @property
    def unseen_tokens(self) -> int:
        """Tokens that are not predicted in an epoch; which ones, the next epoch draws anew."""
        return sum(self.lengths) - self.windows * self.block_size

    def begins(self, epoch: int) -> Integers:
        """The token of each shard at which its grid begins."""
        # A shard shorter than two windows has one, and begins where there is room for it.
        room = np.array(self.lengths, dtype=np.int64) - self._counts * self.block_size
        choices = np.minimum(room, self.block_size).astype(np.uint64)
        shards = np.arange(len(self.lengths), dtype=np.uint64)
        key = _keys(self.seed, epoch, "begins")
        drawn: _Words = _mixed(_mixed(shards ^ key[0]) ^ key[1]) % choices
        return drawn.astype(np.int64)

    def locate(self, samples: Integers) -> Windows:
        """The windows of samples, in ascending order, counted from the beginning of the run."""
        shards, begins = np.empty_like(samples), np.empty_like(samples)
        epochs, positions = np.divmod(samples, self.windows)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            at = epochs == epoch
            order = permute(self.windows, self.seed, epoch, positions[at])
            shards[at], within = self._place(order)
            begins[at] = within + self.begins(epoch)[shards[at]]
        return shards, begins

    def spread(self, indices: Integers, of: int) -> Windows:
        """Some of `of` windows that lie evenly over all shards.

        The grid is the one that begins with each shard's first token. Of more windows than there
        are, some are the same.
        """
        return self._place((2 * indices + 1) * self.windows // (2 * of))

    def _place(self, windows: Integers) -> Windows:
        shard = np.searchsorted(self._ends, windows, side="right")
        within = windows - (self._ends - self._counts)[shard]
        return shard, within * self.block_size
