"""A text that the model writes, for the report."""

from __future__ import annotations

from typing import Protocol

import tiktoken
import torch
from torch import Tensor


class Generator(Protocol):
    def generate(
        self, tokens: Tensor, count: int, temperature: float, generator: torch.Generator
    ) -> Tensor: ...


def sample_text(
    model: Generator, encoding: tiktoken.Encoding, count: int, seed: int, device: torch.device
) -> str:
    """Text of `count` tokens from the start of a document; ids beyond the vocabulary are left out.

    Call it with the model in eval mode.
    """
    start = torch.tensor([[encoding.eot_token]], device=device)
    generator = torch.Generator().manual_seed(seed)
    tokens = model.generate(start, count, 0.8, generator)[0].tolist()
    known = [t for t in tokens[1:] if t < encoding.n_vocab and t != encoding.eot_token]
    return encoding.decode(known, errors="replace")
