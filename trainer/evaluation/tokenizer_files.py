"""A tokenizer of tiktoken's as the files that Hugging Face's transformers read.

They are GPT-2's: a byte-level vocabulary and the merges that lead to it. tiktoken keeps no merges,
but ranks give them: a token's two parts are what merging its bytes in the order of rank comes to
just before the token itself. Source: tiktoken, tiktoken/_educational.py (bpe_encode).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from nanogauge.prepare.splitting import PATTERNS
from nanogauge.prepare.tokenizer import END_OF_TEXT, byte_letters

if TYPE_CHECKING:
    import tiktoken


def tokenizer_files(encoding: tiktoken.Encoding, block_size: int) -> dict[str, bytes] | None:
    """Names and contents of the files; None where they cannot say what the tokenizer does.

    That is where it splits words in another way than GPT-2's (single bytes have no merges, and may
    be split in any), or knows a token that no merge leads to.
    """
    ranks = encoding._mergeable_ranks
    if encoding._pat_str != PATTERNS["gpt2"] and len(ranks) > 256:
        return None
    letters = byte_letters()
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            parts = parts_of(token, ranks)
            if parts is None:
                return None
            merges.append(" ".join("".join(letters[b] for b in part) for part in parts))
    vocabulary = vocabulary_of(encoding)
    special = {
        "id": encoding.eot_token,
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": {**level, "use_regex": True},
        "post_processor": {**level, "use_regex": True},
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    told = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "model_max_length": block_size,
        **names,
    }
    return {
        "vocab.json": _json(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "tokenizer.json": _json(whole),
        "tokenizer_config.json": _json(told),
        "special_tokens_map.json": _json(names),
    }


def vocabulary_of(encoding: tiktoken.Encoding) -> dict[str, int]:
    """The contents of vocab.json: each token, its bytes as letters, and its number."""
    letters = byte_letters()
    ranks = encoding._mergeable_ranks
    written = {"".join(letters[b] for b in token): rank for token, rank in ranks.items()}
    return {**written, END_OF_TEXT: encoding.eot_token}


def parts_of(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes] | None:
    """The two tokens whose merge makes a token; None where merges stop before."""
    parts = [bytes([byte]) for byte in token]
    own = ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, own) for a, b in pairwise(parts)]
        least = min(pairs)
        if least == own:
            return None
        at = pairs.index(least)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()
