"""Batches of token windows, each a pure function of (seed, step, micro-batch).

Samples are numbered over the whole run, `micro_batch * grad_accum * world` per step, and the order of windows is a
function of that number: neither gradient accumulation nor world size changes the data of a step. Every evaluation reads
the same windows, spread evenly over all shards.

An epoch is one pass over a grid of windows in its own order.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanogauge.errors import BadInput
from trainer.data.manifest import Split
from trainer.data.shards import Shards

SampleOrder = Literal["permutation", "random"]
SHUFFLE = "numpy's permutation"
"""Name of the order of windows in checkpoints; a run that was begun in another is not resumed."""

BLOCK_BYTES = 2**19  # small batches are read together, as most of their time is call overhead
SCANNED_TOKENS = 2**22
BLOCKS_AHEAD = 2  # prefetched into pinned memory while a GPU works
_STREAM = {"train": 0, "val": 1}


@dataclass(frozen=True)
class _Block:
    """Consecutive batches that were read and copied to the device together."""

    key: tuple[Split, int]
    batches: list[tuple[Tensor, Tensor]]
    highest: list[int]
    """Highest token id of each batch, to be checked against the vocabulary."""

    def batch(self, index: int, vocab_size: int) -> tuple[Tensor, Tensor]:
        if self.highest[index] >= vocab_size:
            raise BadInput(beyond_vocabulary(self.key[0], self.highest[index], "", vocab_size))
        return self.batches[index]


def beyond_vocabulary(split: Split, token: int, where: str, vocab_size: int) -> str:
    """Return a sentence on a token that the model has no row for."""
    return (
        f"the {split} data holds the token {token}{where} but model.vocab_size is {vocab_size}; "
        "set it to the tokenizer's, padded, or prepare the data again."
    )


def find_beyond(splits: Mapping[Split, Shards], vocab_size: int) -> str | None:
    """Read all tokens; return a sentence on the first beyond the vocabulary, None without one."""
    for split, shards in splits.items():
        for shard in shards:
            for begin in range(0, len(shard), SCANNED_TOKENS):
                block = shard[begin : begin + SCANNED_TOKENS]
                if int(block.max()) >= vocab_size:
                    at = int(np.argmax(block >= vocab_size))
                    file = getattr(shard, "filename", None)
                    where = f" at position {begin + at:,}{f' of {file}' if file else ''}"
                    return beyond_vocabulary(split, int(block[at]), where, vocab_size)
    return None


def scan_vocabulary(
    splits: Mapping[Split, Shards], vocab_size: int, seconds: float, fail: Callable[[str], None]
) -> None:
    """Look for tokens beyond the vocabulary, as data without a manifest may hold some.

    What takes longer than `seconds` continues in a thread, which calls `fail` with a sentence.

    Raises:
        BadInput: if one is found before.
    """
    found: Future[str | None] = Future()

    def run() -> None:
        found.set_result(find_beyond(splits, vocab_size))

    threading.Thread(target=run, name="vocabulary", daemon=True).start()
    try:
        sentence = found.result(seconds)
    except TimeoutError:
        found.add_done_callback(lambda done: fail(late) if (late := done.result()) else None)
    else:
        if sentence is not None:
            raise BadInput(sentence)


class Batches:
    """Token windows of two splits, as tensors on a device that must not be modified.

    Args:
        splits: shards of token ids, memory-mapped or in memory.
        micro_batch: number of windows in a batch.
        block_size: number of inputs in a window, which has one more token as the last target. vocab_size: rows of the
        model's embedding; reading a higher token raises BadInput.
        seed: selects the order of the windows.
        device: device that the batches are copied to.
        grad_accum: number of micro-batches per step and rank.
        order: "permutation" sees each window once in an epoch; "random" draws windows with replacement, as nanoGPT
            does, and depends on micro_batch.
        eval_batches: number of micro-batches in an evaluation.
        rank: rank of this process.
        world: number of ranks that share each step.
        fingerprint: identifies the data in checkpoints.
        ahead: number of blocks to prefetch; None is BLOCKS_AHEAD for a GPU and 0 elsewhere, where the thread would
            compete with training for the CPU.
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
        """Number of tokens of each split in shards too short for one window, which are not read."""
        self.grids: dict[Split, Grid] = {}
        self._ends: dict[Split, Int64Array] = {}
        for split, shards in splits.items():
            long_enough = [s for s in shards if len(s) > block_size]
            assert long_enough, "open_run_data refuses such data"
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
        """Return the number of a split's tokens in shards that are long enough for a window."""
        return sum(len(s) for s in self.shards[split])

    def position(self, step: int) -> dict[str, object]:
        """Return the position in the data after `step` steps, and what identifies the data."""
        samples = step * self.grad_accum * self.world * self.micro_batch
        epoch, window = divmod(samples, self.grids["train"].windows)
        in_order = self.order == "permutation"
        return {
            "fingerprint": self.fingerprint,
            "train_tokens": self.tokens("train"),
            "val_tokens": self.tokens("val"),
            "order": SHUFFLE if in_order else self.order,
            "samples": samples,
            "epoch": epoch if in_order else None,
            "window_of_epoch": window if in_order else None,
        }

    def batch(self, split: Split, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (micro_batch x block_size, int64), shifted by one token.

        Raises:
            BadInput: if a token lies beyond the vocabulary.
        """
        assert 0 <= micro < self.grad_accum
        block, index = divmod(step * self.grad_accum + micro, self._per_block)
        if self._held is None or self._held.key != (split, block):
            ahead = self._prefetch if split == "train" else None
            read = ahead.get(block) if ahead is not None else self._make(split, block)
            self._held = self._to_device((split, block), read)
        return self._held.batch(index, self.vocab_size)

    def evaluation_batch(self, split: Split, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the index-th batch of an evaluation."""
        indices = np.arange(index * self.micro_batch, (index + 1) * self.micro_batch)
        of = self.eval_batches * self.micro_batch
        if index == 0:
            self._will_need(split, self.grids[split].spread(np.arange(of), of))
        read = self._read(split, self.grids[split].spread(indices, of))
        return self._to_device((split, index), read).batch(0, self.vocab_size)

    def close(self) -> None:
        """Stop prefetching."""
        if self._prefetch is not None:
            self._prefetch.close()

    def _make(self, split: Split, block: int) -> Tensor:
        """Read a block of this rank's micro-batches; return its windows in host memory.

        Blocks are numbered from the run's first step. The system is advised to read the next one from disk meanwhile.
        """
        windows = {}
        for key in ((split, block), (split, block + 1)):
            located = self._located.get(key)
            if located is None:
                located = self._locate(*key)
                self._will_need(split, located)
            windows[key] = located
        self._located = windows
        return self._read(split, windows[split, block])

    def _locate(self, split: Split, block: int) -> Windows:
        micros = np.arange(block * self._per_block, (block + 1) * self._per_block)
        of_all_ranks = micros * self.world + self.rank
        if self.order == "random":
            drawn = [self._drawn(split, micro) for micro in of_all_ranks.tolist()]
            return np.concatenate([d[0] for d in drawn]), np.concatenate([d[1] for d in drawn])
        samples = of_all_ranks[:, None] * self.micro_batch + np.arange(self.micro_batch)
        return self.grids[split].locate(samples.ravel())

    def _drawn(self, split: Split, micro: int) -> Windows:
        """Return the places of a micro-batch's windows, drawn with replacement from all shards."""
        step, micro = divmod(micro, self.grad_accum * self.world)
        generator = np.random.default_rng([self.seed, _STREAM[split], step, micro])
        ends = self._ends[split]
        positions = generator.integers(0, ends[-1], self.micro_batch)
        shards = np.searchsorted(ends, positions, side="right")
        return shards, positions - np.concatenate(([0], ends))[shards]

    def _will_need(self, split: Split, windows: Windows) -> None:
        """Advise the operating system to read windows of memory-mapped files ahead."""
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
        """Return the tokens of windows as a tensor in host memory, pinned for a GPU."""
        length, shards = self.block_size + 1, self.shards[split]
        # Rows of even length: compiled code is specialised on the alignment of the first batch.
        shape = len(windows[0]), length + length % 2
        both = torch.empty(shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        rows = both.numpy()
        for row, (shard, begin) in enumerate(zip(*(w.tolist() for w in windows), strict=True)):
            rows[row, :length] = shards[shard][begin : begin + length]
        rows[:, length:] = 0
        return both

    def _to_device(self, key: tuple[Split, int], read: Tensor) -> _Block:
        """Copy a block to the device and split it into batches while it is in the CPU's caches."""
        highest = read.numpy().reshape(len(read) // self.micro_batch, -1).max(axis=1)
        on_device = read.to(self.device, non_blocking=self.device.type == "cuda")
        inputs, targets = on_device[:, : self.block_size], on_device[:, 1 : self.block_size + 1]
        cut = zip(*(torch.split(part, self.micro_batch) for part in (inputs, targets)), strict=True)
        return _Block(key, list(cut), highest.tolist())


Int64Array = npt.NDArray[np.int64]
Windows = tuple[Int64Array, Int64Array]
"""Index of the shard, and of the first token in it, for each window."""


@lru_cache(maxsize=4)
def window_order(windows: int, seed: int, epoch: int) -> Int64Array:
    """Return the order of an epoch's windows: a permutation of 0 ... windows - 1."""
    return _frozen_random(seed, epoch, 0).permutation(windows)


def _frozen_random(*seed: int) -> np.random.RandomState:
    """Return a generator whose numbers no version of numpy changes (NEP 19)."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))


@dataclass(frozen=True)
class Grid:
    """Consecutive windows of block_size + 1 tokens over each shard, and their order.

    A window's last token is the first of the next window, so an epoch predicts each token once. The first window of a
    shard begins at one of its first block_size tokens, drawn per epoch, so that text is cut at different places. The
    number of windows is constant. Tokens before the first and after the last window, fewer than 2 x block_size per
    shard, are not predicted in that epoch.
    """

    lengths: Sequence[int]
    """Number of tokens in each shard, all above block_size."""
    block_size: int
    seed: int
    _counts: Int64Array = field(init=False)
    _ends: Int64Array = field(init=False)

    def __post_init__(self) -> None:
        lengths = np.array(self.lengths, dtype=np.int64)
        counts = np.maximum(1, lengths // self.block_size - 1)
        object.__setattr__(self, "_counts", counts)
        object.__setattr__(self, "_ends", np.cumsum(counts))

    @property
    def windows(self) -> int:
        """Number of windows in an epoch."""
        return int(self._ends[-1])

    @property
    def unseen_tokens(self) -> int:
        """Number of tokens that an epoch does not predict; which tokens differs between epochs."""
        return sum(self.lengths) - self.windows * self.block_size

    def begins(self, epoch: int) -> Int64Array:
        """Return the index of the token at which the first window of each shard begins."""
        # A shard shorter than two windows has one window, anywhere in it.
        room = np.array(self.lengths, dtype=np.int64) - self._counts * self.block_size
        begins: Int64Array = _frozen_random(self.seed, epoch, 1).randint(
            np.minimum(room, self.block_size), dtype=np.int64
        )
        return begins

    def locate(self, samples: Int64Array) -> Windows:
        """Return the windows of samples, given by ascending numbers from the run's start."""
        shards, begins = np.empty_like(samples), np.empty_like(samples)
        epochs, positions = np.divmod(samples, self.windows)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            at = epochs == epoch
            shards[at], within = self._place(window_order(self.windows, self.seed, epoch)[positions[at]])
            begins[at] = within + self.begins(epoch)[shards[at]]
        return shards, begins

    def spread(self, indices: Int64Array, of: int) -> Windows:
        """Return the windows at `indices` among `of` windows spread evenly over all shards.

        The first window of a shard begins at its first token. Windows repeat if `of` exceeds the number of windows.
        """
        return self._place((2 * indices + 1) * self.windows // (2 * of))

    def _place(self, windows: Int64Array) -> Windows:
        shard = np.searchsorted(self._ends, windows, side="right")
        within = windows - (self._ends - self._counts)[shard]
        return shard, within * self.block_size


Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """Computes items 0, 1, 2 ... in a thread, up to `depth` items ahead of the last get().

    An item must depend on its number only. An error while computing it is raised by get().
    """

    def __init__(self, make: Callable[[int], Item], depth: int) -> None:
        self._make, self._depth = make, depth
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: deque[tuple[int, Future[Item]]] = deque()

    def get(self, number: int) -> Item:
        """Return the item; if `number` does not follow the last one, discard prefetched items."""
        if self._ahead and self._ahead[0][0] != number:
            self._discard()
        following = self._ahead[-1][0] + 1 if self._ahead else number
        for coming in range(following, number + self._depth + 1):
            self._ahead.append((coming, self._thread.submit(self._make, coming)))
        return self._ahead.popleft()[1].result()

    def close(self) -> None:
        """Stop the thread after its current item."""
        self._discard()
        self._thread.shutdown()

    def _discard(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()
