"""Tokenizing in parts and in batches gives the tokens of tiktoken's encode_ordinary."""

from unittest import mock

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.tokenizer import (
    PATTERNS,
    SPLITTABLE,
    Tokenizer,
    from_encoding,
    gpt2_encoding,
    in_chunks,
    split_safely,
)

# Texts that the patterns distinguish: cases, contractions, digits, marks, kinds of white space.
PARTS = [" ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1c", "\x85", "\u00a0", "\u2028", "\u3000", "a"]
PARTS += ["B", "word", "Word", "don't", "'s", "'S", "I'LL", "'", "1", "123", "4567", "\u00bd", "."]
PARTS += ["...", "!?/", "/", "_", "-", "\u80fd", "\u91cf", "\uff0c", "\u3002", "\u00e9", "e\u0301"]
PARTS += ["\U0001f30d", "\x1f", "\u00df", "\u01c5", "\u0e01\u0e34", "\u200b", "\ufeff"]
PARTS += ["<|endoftext|>"]
texts = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=40).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
)


@pytest.fixture(scope="module")
def encodings(gpt2_tokenizer: None) -> dict[str, tiktoken.Encoding]:
    """GPT-2's vocabulary with each of the patterns."""
    ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    special = {"<|endoftext|>": 50256}
    return {
        name: tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        for name, pattern in PATTERNS.items()
    }


@pytest.fixture(scope="module")
def tokenizers(encodings: dict[str, tiktoken.Encoding]) -> dict[str, Tokenizer]:
    return {name: from_encoding(encoding, name) for name, encoding in encodings.items()}


def test_gpt2_encoding_equals_tiktokens(gpt2_tokenizer: None) -> None:
    ours, theirs = gpt2_encoding(), tiktoken.get_encoding("gpt2")
    assert ours._mergeable_ranks == theirs._mergeable_ranks
    assert ours._special_tokens == theirs._special_tokens
    assert (ours._pat_str, ours.n_vocab) == (theirs._pat_str, theirs.n_vocab)


@settings(max_examples=100, deadline=None)
@given(text=texts, part=st.integers(1, 9), chunk=st.integers(1, 12))
def test_the_parts_have_the_tokens_of_the_whole(
    encodings: dict[str, tiktoken.Encoding], text: str, part: int, chunk: int
) -> None:
    parts = list(split_safely(in_chunks(text, chunk), part, longest=10**9))
    assert "".join(parts) == text
    for encoding in encodings.values():
        tokens = [token for each in parts for token in encoding.encode_ordinary(each)]
        assert tokens == encoding.encode_ordinary(text)


def test_texts_of_words_are_split() -> None:
    english, chinese = "some words, and more of them " * 50, "\u80fd\u91cf\uff0c" * 400
    for text in (english, chinese, english.replace(" ", "\n")):
        parts = list(split_safely(in_chunks(text, 64), 100, longest=10**9))
        assert len(parts) > 5 and max(map(len, parts)) < 300


def test_a_run_without_a_safe_split_point_is_split_at_its_limit() -> None:
    parts = list(split_safely(in_chunks("x" * 1000, 16), 32, longest=100))
    assert "".join(parts) == "x" * 1000
    assert max(map(len, parts)) < 120


def test_the_patterns_are_those_of_the_installed_tiktoken() -> None:
    """A changed pattern would turn off splitting."""
    from tiktoken_ext import openai_public

    loaders = ("data_gym_to_mergeable_bpe_ranks", "load_tiktoken_bpe")
    no_ranks = {loader: lambda *_, **__: {} for loader in loaders}
    with mock.patch.multiple(openai_public, **no_ranks):
        patterns = {n: make()["pat_str"] for n, make in openai_public.ENCODING_CONSTRUCTORS.items()}
    assert set(patterns.values()) == SPLITTABLE
    assert {name: patterns[name] for name in PATTERNS} == PATTERNS


def test_a_lone_surrogate_is_replaced_as_encode_ordinary_does(encodings: dict[str, tiktoken.Encoding]) -> None:
    """encode_to_numpy refuses it."""
    tokenizer = from_encoding(encodings["gpt2"], "gpt2")
    text = "a \ud83c half"
    assert tokenizer.encode([text]).tolist() == [50256, *encodings["gpt2"].encode_ordinary(text)]


@settings(max_examples=100, deadline=None)
@given(documents=st.lists(texts, min_size=1, max_size=6))
def test_batches_have_the_tokens_of_encode_ordinary(
    encodings: dict[str, tiktoken.Encoding], tokenizers: dict[str, Tokenizer], documents: list[str]
) -> None:
    """Including the mark, unusual white space and special tokens."""
    for name, encoding in encodings.items():
        expected: list[int] = []
        for text in documents:
            expected += [50256, *encoding.encode_ordinary(text)]
        assert tokenizers[name].encode(documents).tolist() == expected
