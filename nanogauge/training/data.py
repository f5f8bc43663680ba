"""Batches of token windows, each a pure function of (seed, step, micro-batch): nothing to resume.

Windows are drawn at random, with replacement, over all shards. An evaluation reads the same windows
every time, so that two validation losses differ by the model alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanogauge.errors import BadInput

Split = Literal["train", "val"]
Shards = Sequence[npt.NDArray[np.uint16]]
_STREAM = {"train": 0, "val": 1}
_EVALUATION = 2**31  # a step number of its own for the windows that evaluations read


class Batches:
    """Token windows of two splits, as tensors on a device.

    Args:
        splits: shards of uint16 token ids, memory-mapped or in memory.
        vocab_size: rows of the model's embedding; a token beyond it is refused when it is read.

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
    ) -> None:
        self.micro_batch, self.block_size = micro_batch, block_size
        self.vocab_size, self.seed, self.device = vocab_size, seed, device
        self.shards: dict[Split, Shards] = {}
        self.ends: dict[Split, npt.NDArray[np.int64]] = {}
        for split, shards in splits.items():
            long_enough = [s for s in shards if len(s) > block_size]
            if not long_enough:
                raise BadInput(
                    f"the {split} data has no shard of more than {block_size} tokens; "
                    "prepare more tokens or make model.block_size smaller."
                )
            self.shards[split] = long_enough
            self.ends[split] = np.cumsum([len(s) - block_size for s in long_enough])

    @property
    def train_tokens(self) -> int:
        return sum(len(s) for s in self.shards["train"])

    def batch(self, split: Split, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each micro_batch x block_size int64, targets one token later.

        Raises:
            BadInput: if a token lies beyond the vocabulary.
        """
        generator = np.random.default_rng([self.seed, _STREAM[split], step, micro])
        ends, shards = self.ends[split], self.shards[split]
        windows = []
        for position in generator.integers(0, ends[-1], self.micro_batch):
            index = int(np.searchsorted(ends, position, side="right"))
            begin = int(position - (ends[index - 1] if index else 0))
            windows.append(shards[index][begin : begin + self.block_size + 1])
        tokens = np.stack(windows).astype(np.int64)
        if (highest := int(tokens.max())) >= self.vocab_size:
            raise BadInput(
                f"the {split} data holds the token {highest} but model.vocab_size is "
                f"{self.vocab_size}; set it to the tokenizer's, padded, or prepare the data again."
            )
        both = torch.from_numpy(tokens)
        if self.device.type == "cuda":
            both = both.pin_memory().to(self.device, non_blocking=True)
        else:
            both = both.to(self.device)
        return both[:, :-1], both[:, 1:]

    def evaluation_batch(self, split: Split, index: int) -> tuple[Tensor, Tensor]:
        """The index-th batch of every evaluation."""
        return self.batch(split, _EVALUATION, index)
