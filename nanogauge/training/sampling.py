"""A text that the model writes, for the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import tiktoken
import torch

from model import GPT
from nanogauge.training.generation import Choice, generate


def sample_text(model: GPT, encoding: tiktoken.Encoding, prompt: str, count: int, seed: int) -> str:
    """A prompt and up to `count` tokens after it, as far as the model goes on with that text.

    Without a prompt the text begins a document.
    """
    begin = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    generator = torch.Generator().manual_seed(seed)
    made = generate(model, begin, count, Choice(), generator, encoding.eot_token)
    return prompt + encoding.decode(list(known_tokens(made, encoding)), errors="replace")


def known_tokens(tokens: Iterable[int], encoding: tiktoken.Encoding) -> Iterator[int]:
    """Those that stand for text: rows that pad the embedding have no text, and may be drawn."""
    return (token for token in tokens if token < encoding.n_vocab)
