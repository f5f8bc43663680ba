"""Tokenizers: tiktoken's encodings, a local .tiktoken file, Hugging Face's tokenizers, the bytes of a text, or its
characters.
"""

import base64
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import read_whole
from nanogauge.shell import pip_install
from nanogauge.waiting import announced
from trainer.data.hub import RETRY_LIMIT_SECONDS, refuse_unwritable_cache

Encoded = npt.NDArray[np.uint32]
Text = str | Iterator[str]
"""The text of a document, whole or as an iterator of chunks."""
END_OF_TEXT = "<|endoftext|>"
CACHE_VARIABLE = "TIKTOKEN_CACHE_DIR"
HUGGING_FACE = "hf:"
BYTES, CHARACTERS = "bytes", "chars"
NANOGPT_CHARACTERS = "meta.pkl"
"""Name of the tokenizer of nanoGPT's character data, which has no end-of-text token."""
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""Form of the names of repositories on the hub."""
LARGEST_RANKS_BYTES = 2**27
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")

_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
_O200K = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"""
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
PATTERNS = {"gpt2": _GPT2, "cl100k_base": _CL100K, "o200k_base": _O200K}
"""Pre-tokenization patterns; tiktoken's other encodings use one of them."""
SPLITTABLE = frozenset(PATTERNS.values())
_EACH_CHARACTER = r"[\s\S]"

PART = 2**18
"""Characters encoded at once; a shorter text is never split."""
LONGEST_RUN = 2**20
"""Number of characters without a safe split point after which the text is split anywhere."""

# Letters that every version of Unicode knows as letters: Latin, Greek, Cyrillic, kana, CJK
# ideographs, Hangul. Python's white space is a superset of the tokenizers'.
_LETTER = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0391-\u03a1\u03b1-\u03c9\u0410-\u044f"
_LETTER += "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_SAFE = re.compile(
    rf"(?<=\S)(?= )|(?<=[{_LETTER}])"
    r"(?=[\n\r\t!\"#$%&()*+,\-./:;<=>?@\[\\\]^_`{|}~\u3001\u3002\uff0c\uff01\uff1f\uff1a\uff1b])"
)
_LOOK_BACK = 2**12


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
    encode: Callable[[Sequence[str]], Encoded]
    """Return the tokens of documents, each after an end-of-text token. Special tokens in a text are encoded as ordinary
    text."""
    encode_text: Callable[[str], Encoded]
    """Return the tokens of a text alone; raise BadInput for a character without a token."""
    decode: Callable[[Sequence[int]], str]
    token_bytes: Callable[[], npt.NDArray[np.int64] | None]
    """Return the bytes of text of each token, 0 for special tokens; None if the bytes of a token depend on its
    neighbours."""
    splittable: bool
    """True if a long text may be encoded in parts (see `split_safely`)."""
    library: Any
    """The tiktoken.Encoding or tokenizers.Tokenizer that encodes."""

    def prompt(self, text: str) -> list[int]:
        """Return the tokens of a prompt; "" begins a document.

        Without an end-of-text token, the first character of the vocabulary begins it: in nanoGPT's data the newline, as
        in nanoGPT's sample.py.
        """
        tokens: list[int] = self.encode_text(text).tolist()
        return tokens or [self.end_of_text or 0]

    def parts(self, text: Text) -> Iterator[str]:
        """Yield parts of a document whose tokens, concatenated, are those of the whole document."""
        if isinstance(text, str) and len(text) <= PART:
            return iter((text,))
        chunks = in_chunks(text) if isinstance(text, str) else text
        return split_safely(chunks) if self.splittable else iter(("".join(chunks),))


def load_tokenizer(name: str, pattern: str = "gpt2", characters: str = "") -> Tokenizer:
    """Load a tokenizer.

    Args:
        name: an encoding of tiktoken ("gpt2"), a .tiktoken file, "hf:" and a tokenizer.json or a repository on the hub,
            "bytes", or "chars".
        pattern: encoding whose pre-tokenization a .tiktoken file uses.
        characters: the vocabulary of "chars", in the order of the tokens.

    Raises:
        BadInput: if it does not exist, has no end-of-text token, or is damaged.
        RunFailed: if a download fails.
    """
    if name.startswith(HUGGING_FACE):
        return _load_hugging_face(name)
    return from_encoding(load_encoding(name, pattern, characters), name)


@cache
def byte_encoding() -> tiktoken.Encoding:
    """Return a tokenizer with one token per byte, and 256 for the end of a text.

    Its loss in nats per token is also in nats per byte.
    """
    return _encoding_of_ranks(BYTES, {bytes([i]): i for i in range(256)})


def _encoding_of_ranks(name: str, ranks: dict[bytes, int], end: bool = True) -> tiktoken.Encoding:
    special = {END_OF_TEXT: len(ranks)} if end else {}
    return tiktoken.Encoding(name, pat_str=_EACH_CHARACTER, mergeable_ranks=ranks, special_tokens=special)


def load_encoding(name: str, pattern: str = "gpt2", characters: str = "") -> tiktoken.Encoding:
    """Load a tiktoken encoding; arguments and errors as for `load_tokenizer`."""
    if name == BYTES:
        return byte_encoding()
    if name in (CHARACTERS, NANOGPT_CHARACTERS):
        if not characters:
            raise BadInput(f"the tokenizer {name} is in the run's data; bring it back.")
        ranks = {character.encode(): token for token, character in enumerate(characters)}
        return _encoding_of_ranks(name, ranks, end=name == CHARACTERS)
    if Path(name).suffix == ".tiktoken":
        return _load_ranks(Path(name), pattern)
    if name not in tiktoken.list_encoding_names():
        known = ", ".join((BYTES, CHARACTERS, *tiktoken.list_encoding_names()))
        raise BadInput(
            f"there is no tokenizer {name!r}; give one of {known}, a file that ends in .tiktoken, "
            "or hf: and a tokenizer.json."
        )
    try:
        with announced(f"the download of {name}'s vocabulary", RETRY_LIMIT_SECONDS):
            return gpt2_encoding() if name == "gpt2" else tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no network, or a truncated download
        if folder := os.environ.get(CACHE_VARIABLE):
            refuse_unwritable_cache(folder, CACHE_VARIABLE)
        raise RunFailed(
            f"the {name} vocabulary could not be downloaded ({type(error).__name__}); check "
            f"the network, or set {CACHE_VARIABLE} to a folder that holds it."
        ) from error


def gpt2_encoding() -> tiktoken.Encoding:
    """Return tiktoken.get_encoding("gpt2"), loaded in a tenth of the time.

    tiktoken reads GPT-2's merges character by character and compares them with a second file. The sha256 of the first
    file, which tiktoken has, is enough.

    Raises:
        OSError, ValueError: if the file cannot be downloaded, or its hash differs.
    """
    from tiktoken.load import read_file_cached
    from tiktoken_ext import openai_public

    def load_ranks(vocab_bpe_file: str, vocab_bpe_hash: str, **_: str) -> dict[bytes, int]:
        return ranks_of_merges(read_file_cached(vocab_bpe_file, vocab_bpe_hash).decode())

    names = vars(openai_public) | {"data_gym_to_mergeable_bpe_ranks": load_ranks}
    arguments = FunctionType(openai_public.gpt2.__code__, names)()
    return tiktoken.Encoding(**arguments)


def bytes_to_unicode() -> list[str]:
    """Return the letter that stands for each byte: itself if printable, else one from U+0100 on.

    Source: openai/gpt-2, src/encoder.py (bytes_to_unicode).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def ranks_of_merges(merges: str) -> dict[bytes, int]:
    """Return the rank of each token from GPT-2's vocab.bpe.

    The ranks begin with the single bytes, in the order of their letters. Each line of the file is a merge of two
    tokens, written in letters.
    """
    letters = bytes_to_unicode()
    bytes_of: dict[int, int | None] = {ord(letter): byte for byte, letter in enumerate(letters)}
    bytes_of[ord(" ")] = None
    bytes_of[ord("\n")] = 0x100  # not a byte, so it separates the tokens
    _, _, lines = merges.rstrip("\n").partition("\n")
    tokens = [token.encode("latin-1") for token in lines.translate(bytes_of).split("\u0100")]
    single = [bytes([byte]) for byte in sorted(range(256), key=letters.__getitem__)]
    return {token: rank for rank, token in enumerate([*single, *tokens])}


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

    fast = encoding._pat_str == PATTERNS["gpt2"]
    return Tokenizer(
        name=name,
        vocab_size=encoding.n_vocab,
        end_of_text=end,
        sha256=lambda: _hash_vocabulary(ranks, special),
        encode=FastGPT2Encoder(encoding, encode_text).encode if fast else _encode_each(encode_text, end),
        encode_text=encode_text,
        decode=decode,
        token_bytes=token_bytes,
        splittable=encoding._pat_str in SPLITTABLE or encoding._pat_str == _EACH_CHARACTER,
        library=encoding,
    )


def without_surrogates(text: str) -> str:
    """Return a text with lone surrogates replaced, as tiktoken's encode_ordinary does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _encode_each(encode_text: Callable[[str], Encoded], end: int | None) -> Callable[[Sequence[str]], Encoded]:
    """Return a function that encodes several documents, from one that encodes a text."""
    end_token = np.array([] if end is None else [end], np.uint32)

    def encode(texts: Sequence[str]) -> Encoded:
        return np.concatenate([part for text in texts for part in (end_token, encode_text(text))])

    return encode


def _hash_vocabulary(ranks: Mapping[bytes, int], special: Mapping[str, int]) -> str:
    tokens = sorted(ranks, key=ranks.__getitem__)
    digest = hashlib.sha256(np.fromiter(map(ranks.__getitem__, tokens), "<u4").tobytes())
    digest.update(np.fromiter(map(len, tokens), "<u4").tobytes())
    digest.update(b"".join(tokens))
    digest.update(repr(sorted(special.items())).encode())
    return digest.hexdigest()


def _load_ranks(path: Path, pattern: str) -> tiktoken.Encoding:
    if pattern not in PATTERNS:
        raise BadInput(f"there is no --pattern {pattern!r}; give one of {', '.join(PATTERNS)}.")
    try:
        data = read_whole(path, LARGEST_RANKS_BYTES)
        lines = [line.split() for line in data.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except OSError as error:
        raise BadInput(f"cannot read the tokenizer {path}: {error.strerror}.") from None
    except ValueError:
        raise BadInput(
            f"{path} is not a .tiktoken file: each line is a token in base64, a space and its rank."
        ) from None
    if len(set(ranks.values())) < len(lines) or any(bytes([i]) not in ranks for i in range(256)):
        raise BadInput(f"{path} is not a whole vocabulary: a byte is missing, or a rank occurs twice.")
    return tiktoken.Encoding(
        path.stem,
        pat_str=PATTERNS[pattern],
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: max(ranks.values()) + 1},
    )


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
        encode=_encode_each(encode_text, end),
        encode_text=encode_text,
        decode=lambda tokens: str(loaded.decode(list(tokens), skip_special_tokens=False)),
        token_bytes=token_bytes,
        splittable=False,
        library=loaded,
    )


def split_safely(chunks: Iterable[str], part: int = PART, longest: int = LONGEST_RUN) -> Iterator[str]:
    """Yield parts of a text, cut where a splittable tokenizer always begins a new token.

    Args:
        chunks: the text, in chunks of any length.
        part: minimum number of characters in a part, except in the last.
        longest: number of characters at which a part without a safe split point is cut anywhere.
    """
    buffer = ""
    for chunk in chunks:
        buffer += chunk
        while len(buffer) > part:
            cut = _last_safe(buffer) or (longest if len(buffer) >= longest else 0)
            if not cut:
                break  # the next chunk may have a safe split point
            yield buffer[:cut]
            buffer = buffer[cut:]
    if buffer:
        yield buffer


def _last_safe(text: str) -> int:
    """Return the last safe split point of a text, or 0."""
    reach = _LOOK_BACK
    while True:
        begin = max(len(text) - reach, 0)
        places = [match.start() for match in _SAFE.finditer(text, begin)]
        if places or not begin:
            return places[-1] if places else 0
        reach *= 16


def in_chunks(text: str, size: int = PART) -> Iterator[str]:
    return (text[begin : begin + size] for begin in range(0, len(text), size))


_MARK = 0x1F  # a control character: not white space, and rare in texts
_PATTERN = r"\x1f|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}\x1f]+|\s+"  # GPT-2's with \s+
_SPACES = "\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028"
_SPACES += "\u2029\u202f\u205f\u3000"
_SPACES_UTF8 = tuple(character.encode() for character in _SPACES)


class FastGPT2Encoder:
    """Encodes batches of documents for encodings with GPT-2's pre-tokenization pattern.

    GPT-2's pattern leaves the last white-space character before a word to that word, by a slow look-ahead. Here that
    character is preceded by a mark, so that a pattern without look-ahead finds the same words; the tokens of the marks
    are removed.
    """

    def __init__(self, encoding: tiktoken.Encoding, encode_text: Callable[[str], Encoded]) -> None:
        """`encode_text` encodes the texts that cannot be marked."""
        ranks = encoding._mergeable_ranks
        self._marked = tiktoken.Encoding(
            f"{encoding.name} marked", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=encoding._special_tokens
        )
        self._mark_token = ranks[bytes([_MARK])]
        self._end_token = np.array([encoding._special_tokens[END_OF_TEXT]], np.uint32)
        self._encode_text = encode_text

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the tokens of all texts, each after an end-of-text token."""
        parts: list[Encoded] = []
        group: list[bytes] = []
        for text in texts:
            data = self._markable(text)
            if data is not None:
                group.append(data)
                continue
            if group:
                parts.append(self._encode_group(group))
                group = []
            parts += [self._end_token, self._encode_text(text)]
        if group:
            parts.append(self._encode_group(group))
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def _markable(self, text: str) -> bytes | None:
        """Return a text as UTF-8; None if it holds the mark, END_OF_TEXT or unusual white space."""
        if "\x1f" in text or END_OF_TEXT in text:
            return None
        try:
            data = text.encode()
        except UnicodeEncodeError:
            return None
        if len(data) > len(text) and any(space in data for space in _SPACES_UTF8):
            return None
        return data

    def _encode_group(self, group: list[bytes]) -> Encoded:
        end = END_OF_TEXT.encode()
        joined = np.frombuffer(end + end.join(group), np.uint8)
        white = ((joined - 9) < 5) | (joined == 32)  # \t \n \v \f \r and the space, modulo 256
        # Two white-space characters followed by something else in the same document.
        last = ~white[2:]
        lengths = np.array([len(data) + len(end) for data in group[:-1]], np.int64)
        last[np.cumsum(lengths) - 2] = False
        last &= white[1:-1]
        last &= white[:-2]
        marked = np.insert(joined, np.flatnonzero(last) + 1, _MARK).tobytes().decode()
        tokens = self._marked.encode_to_numpy(marked, allowed_special={END_OF_TEXT}, disallowed_special=())
        kept: Encoded = tokens[tokens != self._mark_token]
        return kept
