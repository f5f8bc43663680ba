"""How well a model predicts given tokens: the loss of each, and of an ending.

Shapes in comments: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model import GPT
from trainer.step.device import autocast


@dataclass(frozen=True)
class Scorer:
    """A model in eval mode, and the arithmetic of its matrix products."""

    model: GPT
    dtype: str

    @torch.inference_mode()
    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss of each target, in nats, fp32: B T, of tokens and targets B T."""
        with autocast(tokens.device, self.dtype):
            logits = self.model.logits(self.model.hidden(tokens))
        flat = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return flat.view(targets.shape)

    def ending_losses(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> tuple[list[float], list[float]]:
        """Of each context and its ending: sum and mean of the losses of the ending's tokens.

        A context that does not fit into the block with its ending loses its beginning.

        Args:
            rows: context and ending, at least one token each.
        """
        block = self.model.config.block_size
        cut = [[*context, *ending][-block - 1 :] for context, ending in rows]
        width = max(map(len, cut)) - 1
        device = self.model.embedding.weight.device
        tokens = torch.zeros((len(rows), width), dtype=torch.long)
        targets = torch.zeros_like(tokens)
        counted = torch.zeros((len(rows), width))
        for i, (row, (_, ending)) in enumerate(zip(cut, rows, strict=True)):
            tokens[i, : len(row) - 1] = torch.tensor(row[:-1])
            targets[i, : len(row) - 1] = torch.tensor(row[1:])
            counted[i, max(0, len(row) - 1 - len(ending)) : len(row) - 1] = 1
        losses = self.losses(tokens.to(device), targets.to(device)).cpu() * counted
        sums = losses.sum(dim=1)
        return sums.tolist(), (sums / counted.sum(dim=1)).tolist()
