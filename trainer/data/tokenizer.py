"""Tokenizers: tiktoken's encodings, Hugging Face's tokenizers, the bytes of a text, or its
characters.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken

from nanogauge.errors import BadInput, RunFailed
from nanogauge.shell import pip_install
from nanogauge.waiting import announced
from trainer.data.hub import RETRY_LIMIT_SECONDS, refuse_unwritable_cache

Encoded = npt.NDArray[np.uint32]
END_OF_TEXT = "<|endoftext|>"
CACHE_VARIABLE = "TIKTOKEN_CACHE_DIR"
HUGGING_FACE = "hf:"
BYTES, CHARACTERS = "bytes", "chars"
NANOGPT_CHARACTERS = "meta.pkl"
"""Name of the tokenizer of nanoGPT's character data, which has no end-of-text token."""
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""Form of the names of repositories on the hub."""
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")

_EACH_CHARACTER = r"[\s\S]"


@dataclass(frozen=True)
class Tokenizer:
    name: str
    """Value of --tokenizer."""
    vocab_size: int
    """Number of tokens, including the end-of-text token."""
    end_of_text: int | None
    """Token that each document begins with; None in nanoGPT's character data."""
    sha256: Callable[[], str]
    """Return the hash of the vocabulary: bytes and id of each token, and the special tokens."""
    encode_text: Callable[[str], Encoded]
    """Return the tokens of a text; raise BadInput for a character without a token. Special tokens in a text are encoded
    as ordinary text."""
    decode: Callable[[Sequence[int]], str]
    token_bytes: Callable[[], npt.NDArray[np.int64] | None]
    """Return the bytes of text of each token, 0 for special tokens; None if the bytes of a token depend on its
    neighbours."""
    library: Any
    """The tiktoken.Encoding or tokenizers.Tokenizer that encodes."""

    def encode(self, document: str) -> Encoded:
        """Return the tokens of a document, which begin with the end-of-text token."""
        assert self.end_of_text is not None
        return np.concatenate([[np.uint32(self.end_of_text)], self.encode_text(document)])

    def prompt(self, text: str) -> list[int]:
        """Return the tokens of a prompt; "" begins a document.

        Without an end-of-text token, the first character of the vocabulary begins it: in nanoGPT's data the newline, as
        in nanoGPT's sample.py.
        """
        tokens: list[int] = self.encode_text(text).tolist()
        return tokens or [self.end_of_text or 0]


def load_tokenizer(name: str, characters: str = "") -> Tokenizer:
    """Load a tokenizer.

    Args:
        name: an encoding of tiktoken ("gpt2"), "hf:" and a tokenizer.json or a repository on the hub, "bytes", or
            "chars".
        characters: the vocabulary of "chars", in the order of the tokens.

    Raises:
        BadInput: if it does not exist, has no end-of-text token, or is damaged.
        RunFailed: if a download fails.
    """
    if name.startswith(HUGGING_FACE):
        return _load_hugging_face(name)
    return from_encoding(load_encoding(name, characters), name)


@cache
def byte_encoding() -> tiktoken.Encoding:
    """Return a tokenizer with one token per byte, and 256 for the end of a text.

    Its loss in nats per token is also in nats per byte.
    """
    return _encoding_of_ranks(BYTES, {bytes([i]): i for i in range(256)})


def _encoding_of_ranks(name: str, ranks: dict[bytes, int], end: bool = True) -> tiktoken.Encoding:
    special = {END_OF_TEXT: len(ranks)} if end else {}
    return tiktoken.Encoding(name, pat_str=_EACH_CHARACTER, mergeable_ranks=ranks, special_tokens=special)


def load_encoding(name: str, characters: str = "") -> tiktoken.Encoding:
    """Load a tiktoken encoding; arguments and errors as for `load_tokenizer`."""
    if name == BYTES:
        return byte_encoding()
    if name in (CHARACTERS, NANOGPT_CHARACTERS):
        if not characters:
            raise BadInput(f"the tokenizer {name} is in the run's data; bring it back.")
        ranks = {character.encode(): token for token, character in enumerate(characters)}
        return _encoding_of_ranks(name, ranks, end=name == CHARACTERS)
    if name not in tiktoken.list_encoding_names():
        known = ", ".join((BYTES, CHARACTERS, *tiktoken.list_encoding_names()))
        raise BadInput(f"there is no tokenizer {name!r}; give one of {known}, or hf: and a tokenizer.json.")
    try:
        with announced(f"the download of {name}'s vocabulary", RETRY_LIMIT_SECONDS):
            return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no network, or a truncated download
        if folder := os.environ.get(CACHE_VARIABLE):
            refuse_unwritable_cache(folder, CACHE_VARIABLE)
        raise RunFailed(
            f"the {name} vocabulary could not be downloaded ({type(error).__name__}); check "
            f"the network, or set {CACHE_VARIABLE} to a folder that holds it."
        ) from error


def from_encoding(encoding: tiktoken.Encoding, name: str) -> Tokenizer:
    """Return a tiktoken encoding as a Tokenizer; raise BadInput if it has no end-of-text token."""
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    end = special.get(END_OF_TEXT)
    if end is None and name != NANOGPT_CHARACTERS:
        raise BadInput(f"the tokenizer {name} has no {END_OF_TEXT}, with which a document begins.")
    of_characters = name in (CHARACTERS, NANOGPT_CHARACTERS)
    known = {token.decode() for token in ranks} if of_characters else set()

    def encode_text(text: str) -> Encoded:
        text = without_surrogates(text)
        if of_characters and (unknown := sorted(set(text) - known)):
            raise BadInput(
                f"the text that the tokenizer {name} was made of has no {', '.join(unknown[:10])}; "
                "leave these characters out."
            )
        return encoding.encode_to_numpy(text, disallowed_special=())

    def token_bytes() -> npt.NDArray[np.int64]:
        lengths = np.zeros(encoding.n_vocab, np.int64)
        lengths[list(ranks.values())] = [len(token) for token in ranks]
        return lengths

    def decode(tokens: Sequence[int]) -> str:
        return encoding.decode([token for token in tokens if token < encoding.n_vocab])

    return Tokenizer(
        name=name,
        vocab_size=encoding.n_vocab,
        end_of_text=end,
        sha256=lambda: _hash_vocabulary(ranks, special),
        encode_text=encode_text,
        decode=decode,
        token_bytes=token_bytes,
        library=encoding,
    )


def without_surrogates(text: str) -> str:
    """Return a text with lone surrogates replaced, as tiktoken's encode_ordinary does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _hash_vocabulary(ranks: Mapping[bytes, int], special: Mapping[str, int]) -> str:
    tokens = sorted(ranks, key=ranks.__getitem__)
    digest = hashlib.sha256(np.fromiter(map(ranks.__getitem__, tokens), "<u4").tobytes())
    digest.update(np.fromiter(map(len, tokens), "<u4").tobytes())
    digest.update(b"".join(tokens))
    digest.update(repr(sorted(special.items())).encode())
    return digest.hexdigest()


def _load_hugging_face(name: str) -> Tokenizer:
    try:
        import tokenizers  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise BadInput(
            f"{name} needs Hugging Face's tokenizers, which are not installed: {pip_install('nanogauge[tokenizers]')}."
        ) from None
    where = name.removeprefix(HUGGING_FACE)
    if not Path(where).exists() and (where.endswith(".json") or not HUB_NAME.fullmatch(where)):
        raise BadInput(f"cannot load the tokenizer {where}: there is no file of that name here.")
    try:
        loaded = (
            tokenizers.Tokenizer.from_file(where)
            if Path(where).exists()
            else tokenizers.Tokenizer.from_pretrained(where)
        )
    except Exception as error:  # the library raises bare exceptions
        first = str(error).partition("\n")[0]
        raise BadInput(f"cannot load the tokenizer {where}: {first}.") from None
    return _from_hugging_face(loaded, name)


def _from_hugging_face(loaded: Any, name: str) -> Tokenizer:
    end = next((t for e in _END_NAMES if (t := loaded.token_to_id(e)) is not None), None)
    if end is None:
        raise BadInput(f"the tokenizer {name} has no end-of-text token ({', '.join(_END_NAMES)}).")
    vocabulary: dict[str, int] = loaded.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values()) + 1  # some vocabularies skip ids

    loaded.encode_special_tokens = True  # in a text they are ordinary text
    if end in loaded.encode(loaded.id_to_token(end), add_special_tokens=False).ids:
        raise BadInput(
            f"the tokenizer {name} encodes {loaded.id_to_token(end)} in a text as its end; "
            "mark it as special among the added_tokens of its tokenizer.json."
        )

    def encode_text(text: str) -> Encoded:
        return np.array(loaded.encode(text, add_special_tokens=False).ids, np.uint32)

    def token_bytes() -> npt.NDArray[np.int64] | None:
        if type(loaded.decoder).__name__ != "ByteLevel":
            return None
        lengths = np.zeros(size, np.int64)  # a byte-level token has one letter per byte
        lengths[list(vocabulary.values())] = [len(token) for token in vocabulary]
        added = loaded.get_added_tokens_decoder()
        lengths[list(added)] = [0 if token.special else len(token.content.encode()) for token in added.values()]
        return lengths

    return Tokenizer(
        name=name,
        vocab_size=size,
        end_of_text=end,
        sha256=lambda: hashlib.sha256(loaded.to_str().encode()).hexdigest(),
        encode_text=encode_text,
        decode=lambda tokens: str(loaded.decode(list(tokens), skip_special_tokens=False)),
        token_bytes=token_bytes,
        library=loaded,
    )
