"""Tokenizers: tiktoken's encodings by name, a local file of ranks, Hugging Face's as an extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import tiktoken
import codecs
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import read_whole

Encoded = npt.NDArray[np.uint32]

_MARK = 0x1F  # a control character: no white space to the engine, and hardly ever in a text
_PATTERN = (
    r"\x1f|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}\x1f]+|\s+"  # as GPT-2's, but \s
)
_SPACES = "\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028"
_SPACES += "\u2029\u202f\u205f\u3000"
_SPACES_UTF8 = tuple(character.encode() for character in _SPACES)


class QuickEncoder:
    """Encodes documents of an encoding of tiktoken's that splits words as GPT-2's does."""

    def __init__(
        self, encoding: tiktoken.Encoding, end_text: str, ordinary: Callable[[str], Encoded]
    ) -> None:
        """`end_text` is the special token each document begins with, `ordinary` the slower way."""
        import tiktoken

        ranks = encoding._mergeable_ranks
        self._marked = tiktoken.Encoding(
            f"{encoding.name} marked",
            pat_str=_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=encoding._special_tokens,
        )
        self._mark_token = ranks[bytes([_MARK])]
        self._end_text = end_text
        self._end_utf8 = end_text.encode()
        self._end_token = encoding._special_tokens[end_text]
        self._ordinary = ordinary

    def documents(self, texts: Sequence[str]) -> Encoded:
        """The tokens of all texts, one after another, each behind the end-of-text token."""
        parts: list[Encoded] = []
        group: list[bytes] = []
        for text in texts:
            data = self._simple(text)
            if data is not None:
                group.append(data)
                continue
            if group:
                parts.append(self._group(group))
                group = []
            parts += [np.array([self._end_token], np.uint32), self._ordinary(text)]
        if group:
            parts.append(self._group(group))
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def _simple(self, text: str) -> bytes | None:
        """A text as UTF-8; None if it has to take the ordinary way."""
        if "\x1f" in text or self._end_text in text:
            return None
        try:
            data = text.encode()
        except UnicodeEncodeError:
            return None
        if len(data) > len(text) and any(space in data for space in _SPACES_UTF8):
            return None
        return data

    def _group(self, group: list[bytes]) -> Encoded:
        joined = np.frombuffer(self._end_utf8 + self._end_utf8.join(group), np.uint8)
        white = ((joined - 9) < 5) | (joined == 32)  # \t \n \v \f \r and the space, modulo 256
        # Where white space is followed by white space, and that by something else in its document.
        last = ~white[2:]
        lengths = np.array([len(data) + len(self._end_utf8) for data in group[:-1]], np.int64)
        last[np.cumsum(lengths) - 2] = False
        last &= white[1:-1]
        last &= white[:-2]
        marked = np.insert(joined, np.flatnonzero(last) + 1, _MARK).tobytes().decode()
        tokens = self._marked.encode_to_numpy(
            marked, allowed_special={self._end_text}, disallowed_special=()
        )
        kept: Encoded = tokens[tokens != self._mark_token]
        return kept


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
"""how these encodings of tiktoken's split words; its other encodings split as one of them"""
SPLITTABLE = frozenset(PATTERNS.values())

PART = 2**18
"""characters that are encoded at once; a shorter text is never cut"""
LONGEST_RUN = 2**20
"""characters after which a run without a safe place is cut anywhere"""

# Letters of scripts that every version of Unicode knows as such: Latin, Greek, Cyrillic, kana,
# CJK ideographs, Hangul. Python's white space is a superset of the tokenizers'.
_LETTER = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0391-\u03a1\u03b1-\u03c9\u0410-\u044f"
_LETTER += "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_SAFE = re.compile(
    rf"(?<=\S)(?= )|(?<=[{_LETTER}])"
    r"(?=[\n\r\t!\"#$%&()*+,\-./:;<=>?@\[\\\]^_`{|}~\u3001\u3002\uff0c\uff01\uff1f\uff1a\uff1b])"
)
_LOOK_BACK = 2**12


def split_safely(
    chunks: Iterable[str], part: int = PART, longest: int = LONGEST_RUN
) -> Iterator[str]:
    """The same text in parts that a splittable tokenizer encodes as it would the whole.

    Args:
        chunks: a text, in pieces of any length.
        part: characters that a part has at least, but for the last.
        longest: characters at which a part without a safe place is cut anywhere.
    """
    held = ""
    for chunk in chunks:
        held += chunk
        while len(held) > part:
            cut = _last_safe(held) or (longest if len(held) >= longest else 0)
            if not cut:
                break  # the next chunk may bring a place
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _last_safe(text: str) -> int:
    """The last place where a text may be cut; 0 if there is none."""
    reach = _LOOK_BACK
    while True:
        begin = max(len(text) - reach, 0)
        # One more character in front, for the look-behind.
        places = [match.start() for match in _SAFE.finditer(text, begin)]
        if places or not begin:
            return places[-1] if places else 0
        reach *= 16


def in_chunks(text: str | memoryview, size: int = PART) -> Iterator[str]:
    """A text, or its UTF-8, in chunks of a size that can be held.

    Raises:
        UnicodeDecodeError: if the bytes are no UTF-8.
    """
    if isinstance(text, str):
        for begin in range(0, len(text), size):
            yield text[begin : begin + size]
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    for begin in range(0, len(text), size):
        yield decoder.decode(text[begin : begin + size])
    yield decoder.decode(b"", final=True)


END_OF_TEXT = "<|endoftext|>"
HUGGING_FACE = "hf:"
LARGEST_RANKS_BYTES = 2**27
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
Text = str | memoryview | Iterator[str]
"""a document: as a whole, as UTF-8, or in chunks"""


@dataclass(frozen=True)
class Tokenizer:
    name: str
    """as --tokenizer takes it"""
    vocab_size: int
    """tokens it knows, the end-of-text token among them"""
    end_of_text: int
    sha256: Callable[[], str]
    """of its vocabulary: each token's bytes and number, and the special tokens"""
    encode: Callable[[Sequence[str]], Encoded]
    """documents, each behind the end-of-text token; nothing in a text is a special token"""
    decode: Callable[[Sequence[int]], str]
    token_bytes: Callable[[], npt.NDArray[np.int64] | None]
    """how many bytes of text each token stands for, 0 for special tokens; None where a token's
    bytes depend on its neighbours"""
    splittable: bool
    """whether a long text may be cut at safe places (see splitting.py)"""

    def parts(self, text: Text) -> Iterator[str]:
        """A document of any length in parts whose tokens are, one after another, those of it.

        Raises:
            UnicodeDecodeError: if it is given as bytes that are no UTF-8.
        """
        if isinstance(text, str) and len(text) <= PART:
            return iter((text,))
        chunks = in_chunks(text) if isinstance(text, str | memoryview) else text
        return split_safely(chunks) if self.splittable else iter(("".join(chunks),))


def load_tokenizer(name: str, pattern: str = "gpt2") -> Tokenizer:
    """Load a tokenizer.

    Args:
        name: an encoding of tiktoken ("gpt2"), a file of ranks ("my.tiktoken"), or "hf:" and a
            tokenizer.json or a repository on the hub.
        pattern: for a file of ranks, the encoding whose way of splitting words it takes.

    Raises:
        BadInput: if there is no such tokenizer, it has no end-of-text token, or is damaged.
        RunFailed: if it has to be downloaded and cannot be.
    """
    if name.startswith(HUGGING_FACE):
        return _hugging_face(name)
    return from_encoding(load_encoding(name, pattern), name)


def load_encoding(name: str, pattern: str = "gpt2") -> tiktoken.Encoding:
    """A tokenizer as tiktoken has it; arguments and errors as of `load_tokenizer`."""
    import tiktoken

    if name.startswith(HUGGING_FACE):
        raise BadInput(f"{name} is a tokenizer of Hugging Face's, and here it takes tiktoken's.")
    if Path(name).suffix == ".tiktoken":
        return _from_ranks(Path(name), pattern)
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise BadInput(
            f"there is no tokenizer {name!r}; give one of {known}, a file that ends in .tiktoken, "
            "or hf: and a tokenizer.json."
        )
    try:
        return gpt2_encoding() if name == "gpt2" else tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no network; a download that was cut
        raise RunFailed(
            f"the {name} vocabulary could not be downloaded ({type(error).__name__}); check "
            "the network, or set TIKTOKEN_CACHE_DIR to a folder that holds it."
        ) from error


def gpt2_encoding() -> tiktoken.Encoding:
    """tiktoken.get_encoding("gpt2"), its files read in a tenth of the time.

    tiktoken reads GPT-2's merges a character at a time and holds them against a second file; here
    the first file's sha256, which tiktoken knows, is enough.

    Raises:
        OSError, ValueError: if the file cannot be downloaded, or is not what it should be.
    """
    import tiktoken
    from tiktoken.load import read_file_cached
    from tiktoken_ext import openai_public

    def ranks(vocab_bpe_file: str, vocab_bpe_hash: str, **_: str) -> dict[bytes, int]:
        return ranks_of_merges(read_file_cached(vocab_bpe_file, vocab_bpe_hash).decode())

    names = vars(openai_public) | {"data_gym_to_mergeable_bpe_ranks": ranks}
    described = FunctionType(openai_public.gpt2.__code__, names)()
    return tiktoken.Encoding(**described)


def byte_letters() -> list[str]:
    """The letter that stands for each byte: itself where it prints, else one from U+0100 on.

    Source: openai/gpt-2, src/encoder.py (bytes_to_unicode).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def ranks_of_merges(merges: str) -> dict[bytes, int]:
    """The number of each token, from the lines of GPT-2's vocab.bpe.

    A line is the two tokens that make a third one, in letters; single bytes come first, in the
    order of theirs.
    """
    letters = byte_letters()
    bytes_of: dict[int, int | None] = {ord(letter): byte for byte, letter in enumerate(letters)}
    bytes_of[ord(" ")] = None
    bytes_of[ord("\n")] = 0x100  # no byte, so that it divides the tokens from each other
    _, _, lines = merges.rstrip("\n").partition("\n")
    tokens = [token.encode("latin-1") for token in lines.translate(bytes_of).split("\u0100")]
    single = [bytes([byte]) for byte in sorted(range(256), key=letters.__getitem__)]
    return {token: rank for rank, token in enumerate([*single, *tokens])}


def from_encoding(encoding: tiktoken.Encoding, name: str) -> Tokenizer:
    """A tokenizer of tiktoken's, as this project uses it."""
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    if END_OF_TEXT not in special:
        raise BadInput(f"the tokenizer {name} has no {END_OF_TEXT}, with which a document begins.")

    def ordinary(text: str) -> Encoded:
        try:
            return encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair, which tiktoken replaces as well
            mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return encoding.encode_to_numpy(mended, disallowed_special=())

    encode: Callable[[Sequence[str]], Encoded]
    if encoding._pat_str == PATTERNS["gpt2"]:
        encode = QuickEncoder(encoding, END_OF_TEXT, ordinary).documents
    else:
        encode = one_by_one(ordinary, special[END_OF_TEXT])

    def token_bytes() -> npt.NDArray[np.int64]:
        lengths = np.zeros(encoding.n_vocab, np.int64)
        lengths[list(ranks.values())] = [len(token) for token in ranks]
        return lengths

    return Tokenizer(
        name=name,
        vocab_size=encoding.n_vocab,
        end_of_text=special[END_OF_TEXT],
        sha256=lambda: _digest(ranks, special),
        encode=encode,
        decode=encoding.decode,
        token_bytes=token_bytes,
        splittable=encoding._pat_str in SPLITTABLE,
    )


def one_by_one(ordinary: Callable[[str], Encoded], end: int) -> Callable[[Sequence[str]], Encoded]:
    """Encode documents where a tokenizer takes one text at a time."""

    def encode(texts: Sequence[str]) -> Encoded:
        first = np.array([end], np.uint32)
        parts = [part for text in texts for part in (first, ordinary(text))]
        return np.concatenate(parts)

    return encode


def _digest(ranks: Mapping[bytes, int], special: Mapping[str, int]) -> str:
    tokens = sorted(ranks, key=ranks.__getitem__)
    digest = hashlib.sha256(np.fromiter(map(ranks.__getitem__, tokens), "<u4").tobytes())
    digest.update(np.fromiter(map(len, tokens), "<u4").tobytes())
    digest.update(b"".join(tokens))
    digest.update(repr(sorted(special.items())).encode())
    return digest.hexdigest()


def _from_ranks(path: Path, pattern: str) -> tiktoken.Encoding:
    import base64

    import tiktoken

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
            f"{path} is no file of ranks: each line is a token in base64, a space and its number."
        ) from None
    if len(set(ranks.values())) < len(lines) or any(bytes([i]) not in ranks for i in range(256)):
        raise BadInput(
            f"{path} is no whole vocabulary: a byte is missing, or a number comes twice."
        )
    return tiktoken.Encoding(
        path.stem,
        pat_str=PATTERNS[pattern],
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: max(ranks.values()) + 1},
    )


def _hugging_face(name: str) -> Tokenizer:
    try:
        import tokenizers  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise BadInput(
            f"{name} needs Hugging Face's tokenizers, which are not installed: "
            "pip install 'nanogauge[tokenizers]'."
        ) from None
    where = name.removeprefix(HUGGING_FACE)
    try:
        path = Path(where)
        loaded = (
            tokenizers.Tokenizer.from_file(str(path))
            if path.exists()
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
    size = max(vocabulary.values()) + 1  # some leave numbers out, so their count is less

    loaded.encode_special_tokens = True  # in a text they are letters like any others
    if end in loaded.encode(loaded.id_to_token(end), add_special_tokens=False).ids:
        raise BadInput(
            f"the tokenizer {name} takes {loaded.id_to_token(end)} in a text for the end of one; "
            "mark it as special among the added_tokens of its tokenizer.json."
        )

    def ordinary(text: str) -> Encoded:
        return np.array(loaded.encode(text, add_special_tokens=False).ids, np.uint32)

    def token_bytes() -> npt.NDArray[np.int64] | None:
        if type(loaded.decoder).__name__ != "ByteLevel":
            return None
        lengths = np.zeros(size, np.int64)  # such a token is written with a letter for each byte
        lengths[list(vocabulary.values())] = [len(token) for token in vocabulary]
        added = loaded.get_added_tokens_decoder()
        lengths[list(added)] = [
            0 if token.special else len(token.content.encode()) for token in added.values()
        ]
        return lengths

    return Tokenizer(
        name=name,
        vocab_size=size,
        end_of_text=end,
        sha256=lambda: hashlib.sha256(loaded.to_str().encode()).hexdigest(),
        encode=one_by_one(ordinary, end),
        decode=lambda tokens: str(loaded.decode(list(tokens), skip_special_tokens=False)),
        token_bytes=token_bytes,
        splittable=False,
    )
