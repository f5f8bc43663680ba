"""Batches of token windows, each a pure function of (seed, step, micro-batch): nothing to resume.

Samples are counted over the whole run, `micro_batch * grad_accum * world` to a step, and the order
of windows (order.py) belongs to that number: how a step is cut into micro-batches, and how many
ranks share it, does not change what it learns from. An evaluation reads the same windows every
time, spread over all its shards, so that two validation losses differ by the model alone.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nanogauge.errors import BadInput
from nanogauge.prepare.manifest import Split
from nanogauge.prepare.pieces import Tokens
from nanogauge.training.order import Grid, Integers, Windows
from nanogauge.training.prefetch import Prefetch

SampleOrder = Literal["permutation", "random"]
Shards = Sequence[Tokens]

BLOCK_BYTES = 2**19  # small batches are read several at a time: most of one's cost is calling
BLOCKS_AHEAD = 2  # that wait in pinned memory while a GPU works
_STREAM = {"train": 0, "val": 1}


@dataclass(frozen=True)
class _Block:
    """Consecutive batches on the device, read at once."""

    key: tuple[Split, int]
    batches: list[tuple[Tensor, Tensor]]
    highest: list[int]
    """token of each batch"""

    def batch(self, index: int, vocab_size: int) -> tuple[Tensor, Tensor]:
        if self.highest[index] >= vocab_size:
            raise BadInput(
                f"the {self.key[0]} data holds the token {self.highest[index]} but "
                f"model.vocab_size is {vocab_size}; set it to the tokenizer's, padded, or prepare "
                "the data again."
            )
        return self.batches[index]


class Batches:
    """Token windows of two splits, as tensors on a device, not to be written to.

    Args:
        splits: shards of token ids, memory-mapped or in memory.
        vocab_size: rows of the model's embedding; a token beyond it is refused when it is read.
        grad_accum: micro-batches of one step on one rank.
        order: "permutation" sees each window once in an epoch; "random" draws windows with
            replacement, as nanoGPT does, and depends on micro_batch.
        eval_batches: micro-batches that an evaluation reads.
        rank, world: which share of each step this process takes.
        fingerprint: tells this data from any other; a checkpoint keeps it.
        ahead: blocks that a thread reads ahead; None is BLOCKS_AHEAD for a GPU and 0 elsewhere,
            where the thread would take its time from the processor that trains.

    Raises:
        BadInput: if a split has no shard that is longer than one window.
    """

    def __init__(
        self,
        splits: dict[Split, Shards],
        micro_batch: int,
        block_size: int,
        vocab_size: int,
        seed: int,
        device: torch.device,
        *,
        grad_accum: int = 1,
        order: SampleOrder = "permutation",
        eval_batches: int = 1,
        rank: int = 0,
        world: int = 1,
        fingerprint: str = "",
        ahead: int | None = None,
    ) -> None:
        assert 0 <= rank < world
        self.micro_batch, self.block_size = micro_batch, block_size
        self.vocab_size, self.seed, self.device = vocab_size, seed, device
        self.grad_accum, self.order, self.eval_batches = grad_accum, order, eval_batches
        self.rank, self.world, self.fingerprint = rank, world, fingerprint
        self.shards: dict[Split, Shards] = {}
        self.short: dict[Split, int] = {}
        """tokens in shards that are too short for a window, which are left out"""
        self.grids: dict[Split, Grid] = {}
        self._ends: dict[Split, Integers] = {}
        for split, shards in splits.items():
            long_enough = [s for s in shards if len(s) > block_size]
            if not long_enough:
                raise BadInput(
                    f"the {split} data has no shard of more than {block_size} tokens; "
                    "prepare more tokens or make model.block_size smaller."
                )
            self.shards[split] = long_enough
            self.short[split] = sum(len(s) for s in shards) - sum(len(s) for s in long_enough)
            self.grids[split] = Grid([len(s) for s in long_enough], block_size, seed)
            self._ends[split] = np.cumsum([len(s) - block_size for s in long_enough])
        most_windows = BLOCK_BYTES // ((block_size + 1) * torch.int64.itemsize)
        an_epoch = min(grid.windows for grid in self.grids.values()) // world
        self._per_block = max(1, min(most_windows, an_epoch) // micro_batch)
        self._located: dict[tuple[Split, int], Windows] = {}
        self._held: _Block | None = None
        if ahead is None:
            ahead = BLOCKS_AHEAD if device.type == "cuda" else 0
        self._prefetch = Prefetch(partial(self._make, "train"), ahead) if ahead > 0 else None

    @property
    def train_tokens(self) -> int:
        return self.tokens("train")

    def tokens(self, split: Split) -> int:
        """Tokens of the shards that windows are taken from."""
        return sum(len(s) for s in self.shards[split])

    def position(self, step: int) -> dict[str, object]:
        """Where a run is after `step` steps, and on which data."""
        samples = step * self.grad_accum * self.world * self.micro_batch
        epoch, window = divmod(samples, self.grids["train"].windows)
        in_order = self.order == "permutation"
        return {
            "fingerprint": self.fingerprint,
            "train_tokens": self.tokens("train"),
            "val_tokens": self.tokens("val"),
            "order": self.order,
            "samples": samples,
            "epoch": epoch if in_order else None,
            "window_of_epoch": window if in_order else None,
        }

    def batch(self, split: Split, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each micro_batch x block_size int64, targets one token later.

        Raises:
            BadInput: if a token lies beyond the vocabulary.
        """
        assert 0 <= micro < self.grad_accum
        block, index = divmod(step * self.grad_accum + micro, self._per_block)
        if self._held is None or self._held.key != (split, block):
            ahead = self._prefetch if split == "train" else None
            read = ahead.get(block) if ahead is not None else self._make(split, block)
            self._held = self._hand_over((split, block), read)
        return self._held.batch(index, self.vocab_size)

    def evaluation_batch(self, split: Split, index: int) -> tuple[Tensor, Tensor]:
        """The index-th batch of every evaluation."""
        indices = np.arange(index * self.micro_batch, (index + 1) * self.micro_batch)
        of = self.eval_batches * self.micro_batch
        if index == 0:
            self._will_need(split, self.grids[split].spread(np.arange(of), of))
        read = self._read(split, self.grids[split].spread(indices, of))
        return self._hand_over((split, index), read).batch(0, self.vocab_size)

    def close(self) -> None:
        """End the thread that makes batches ahead."""
        if self._prefetch is not None:
            self._prefetch.close()

    def _make(self, split: Split, block: int) -> Tensor:
        """The windows of a block of this rank's micro-batches, counted from the run's beginning.

        The next block's are looked up as well, so that the disk can bring them meanwhile.
        """
        windows = {}
        for key in ((split, block), (split, block + 1)):
            known = self._located.get(key)
            if known is None:
                known = self._locate(*key)
                self._will_need(split, known)
            windows[key] = known
        self._located = windows
        return self._read(split, windows[split, block])

    def _locate(self, split: Split, block: int) -> Windows:
        micros = np.arange(block * self._per_block, (block + 1) * self._per_block)
        of_all_ranks = micros * self.world + self.rank
        if self.order == "random":
            drawn = [self._drawn(split, micro) for micro in of_all_ranks.tolist()]
            return np.concatenate([d[0] for d in drawn]), np.concatenate([d[1] for d in drawn])
        per_micro = np.arange(self.micro_batch)
        samples = of_all_ranks[:, None] * self.micro_batch + per_micro
        return self.grids[split].locate(samples.ravel())

    def _drawn(self, split: Split, micro: int) -> Windows:
        """Windows drawn at random, with replacement, from anywhere in any shard."""
        step, micro = divmod(micro, self.grad_accum * self.world)
        generator = np.random.default_rng([self.seed, _STREAM[split], step, micro])
        ends = self._ends[split]
        positions = generator.integers(0, ends[-1], self.micro_batch)
        shards = np.searchsorted(ends, positions, side="right")
        return shards, positions - np.concatenate(([0], ends))[shards]

    def _will_need(self, split: Split, windows: Windows) -> None:
        """Have the system read windows of mapped files while others are worked on."""
        mapped = any(isinstance(shard, np.memmap) for shard in self.shards[split])
        if not mapped or not hasattr(mmap, "MADV_WILLNEED"):
            return
        for shard, begin in zip(*(part.tolist() for part in windows), strict=True):
            tokens = self.shards[split][shard]
            if isinstance(tokens, np.memmap) and isinstance(tokens.base, mmap.mmap):
                first = tokens.offset % mmap.ALLOCATIONGRANULARITY + begin * tokens.itemsize
                aligned = first - first % mmap.PAGESIZE
                length = first + (self.block_size + 1) * tokens.itemsize - aligned
                tokens.base.madvise(mmap.MADV_WILLNEED, aligned, length)

    def _read(self, split: Split, windows: Windows) -> Tensor:
        """Copy windows into a batch, once: into memory that a GPU can fetch it from by itself."""
        length, shards = self.block_size + 1, self.shards[split]
        # Rows of an even length: every batch then lies as compiled code found the first to lie.
        shape = len(windows[0]), length + length % 2
        both = torch.empty(shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        rows = both.numpy()
        for row, (shard, begin) in enumerate(zip(*(w.tolist() for w in windows), strict=True)):
            rows[row, :length] = shards[shard][begin : begin + length]
        rows[:, length:] = 0
        return both

    def _hand_over(self, key: tuple[Split, int], read: Tensor) -> _Block:
        """A block on the device, cut into batches now: after a step all caches are cold."""
        highest = read.numpy().reshape(len(read) // self.micro_batch, -1).max(axis=1)
        there = read.to(self.device, non_blocking=self.device.type == "cuda")
        inputs, targets = there[:, : self.block_size], there[:, 1 : self.block_size + 1]
        cut = zip(*(torch.split(part, self.micro_batch) for part in (inputs, targets)), strict=True)
        return _Block(key, list(cut), highest.tolist())
