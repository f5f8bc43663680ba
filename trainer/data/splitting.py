"""Cutting a long text where a tokenizer cuts it anyway, so that it needs no memory as a whole.

GPT-2's tokenizer and its successors first split a text into words with a regular expression, then
encode each word by itself. Wherever one word ends and the next begins whatever stands around,
the text can be encoded in two parts and gives the same tokens. For the patterns of `SPLITTABLE`
that holds

* before a space that follows anything but white space: only a word's first character is a space,
  and the rules for white space look ahead to the next character that is none, which is never on
  the other side of such a cut;
* before a punctuation mark or a line's end that follows a letter: no word goes on from a letter
  to one of these. (The apostrophe is left out: in "don't" one pattern goes on.)

A run without such a place, of LONGEST_RUN characters and more, is no language: it is cut where it
stands, and only there the tokens may differ from those of the whole.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator

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
