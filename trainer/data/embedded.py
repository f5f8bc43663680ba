"""The demo's text: the help topics that ship with Python, about 465,000 characters of English."""

from __future__ import annotations

from functools import cache
from pydoc_data.topics import topics

import numpy as np
import numpy.typing as npt
import tiktoken

_END_OF_TEXT = 256
VALIDATION_EVERY = 8  # every eighth topic, in alphabetical order, is held back


@cache
def byte_encoding() -> tiktoken.Encoding:
    """One token per byte, and 256 for the end of a text: nats per token are nats per byte."""
    return tiktoken.Encoding(
        "bytes",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": _END_OF_TEXT},
    )


def embedded_tokens() -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """Training and validation tokens; no topic is in both, each begins with end-of-text."""
    encoding = byte_encoding()
    parts: tuple[list[int], list[int]] = ([], [])
    for index, name in enumerate(sorted(topics)):
        held_back = index % VALIDATION_EVERY == VALIDATION_EVERY - 1
        parts[held_back].append(_END_OF_TEXT)
        parts[held_back].extend(encoding.encode_ordinary(topics[name]))
    train, validation = (np.array(p, dtype=np.uint16) for p in parts)
    return train, validation
