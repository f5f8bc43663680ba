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


def is_sampled(step: int, every: int, max_steps: int) -> bool:
    """Whether this evaluation, one of every so many steps, is the first of a quarter of the run."""
    quarter = 4 * step // max_steps
    return step > 0 and quarter > 4 * max(0, (step - 1) // every * every) // max_steps


def sample_text(
    model: Generator,
    encoding: tiktoken.Encoding,
    prompt: str,
    count: int,
    seed: int,
    device: torch.device,
) -> str:
    """A prompt and `count` tokens after it; ids beyond the vocabulary are left out.

    Without a prompt the text begins a document. Call it with the model in eval mode.
    """
    begin = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([begin], device=device)
    made = model.generate(tokens, count, 0.8, generator)[0].tolist()
    known = [t for t in made if t < encoding.n_vocab and t != encoding.eot_token]
    return encoding.decode(known, errors="replace")
