"""--verify and --stats of folders that other programs wrote, without a manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiktoken
from preparing import END_OF_TEXT, TEXTS, prepare_here, refused

pytestmark = pytest.mark.usefixtures("gpt2_tokenizer")

VAL, TRAIN = TEXTS[:20], TEXTS[20:]


def encoded(texts: list[str]) -> list[list[int]]:
    encoding = tiktoken.get_encoding("gpt2")
    return [encoding.encode_ordinary(text) for text in texts]


def nanogpt(folder: Path) -> None:
    """Write the end-of-text token after each document, as its prepare.py does."""
    for split, texts in (("val", VAL), ("train", TRAIN)):
        tokens = [token for document in encoded(texts) for token in (*document, END_OF_TEXT)]
        np.array(tokens, np.uint16).tofile(folder / f"{split}.bin")


def build_nanogpt(folder: Path) -> None:
    """Write it before each document, and split documents between files, as its fineweb.py does."""
    for split, texts in (("val", VAL), ("train", TRAIN)):
        tokens = [token for document in encoded(texts) for token in (END_OF_TEXT, *document)]
        for number, begin in enumerate(range(0, len(tokens), 5000)):
            part = np.array(tokens[begin : begin + 5000], np.uint16)
            np.save(folder / f"edufineweb_{split}_{number:06d}", part)


@pytest.fixture(params=[nanogpt, build_nanogpt])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    request.param(folder)
    return folder


def test_verify_names_what_it_checks_and_what_it_cannot_check(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    highest = max(token for document in encoded(TEXTS) for token in (*document, END_OF_TEXT))
    with monkeypatch.context() as patch:
        patch.setattr("tiktoken.Encoding", None)  # the vocabulary is not needed
        prepare_here(data, "--verify", data)
    output = capsys.readouterr().out
    assert f"the highest token is {highest:,}" in output
    assert f"{len(TEXTS)} tokens are GPT-2's end-of-text token" in output
    assert "Not checked: hashes and the numbers of tokens" in output.splitlines()[-1]

    path = next(path for path in data.iterdir() if "train" in path.name)
    path.write_bytes(path.read_bytes()[:-2] + np.array([END_OF_TEXT + 1], "<u2").tobytes())
    message = refused(data, "--verify", data)
    assert f"{path.name} holds the token 50257, beyond GPT-2's 50,257" in message
    message = refused(data, "--stats", data)
    assert "holds the token 50257" in message and "--verify names the file" in message

    (data / "meta.pkl").touch()
    capsys.readouterr()
    prepare_here(data, "--verify", data)
    output = capsys.readouterr().out
    assert "the highest token is 50,257" in output
    assert "Not checked: whether it is in the vocabulary" in output
    prepare_here(data, "--stats", data)
    output = capsys.readouterr().out
    assert "the tokenizer is unknown" in output and "documents" not in output


def test_stats_find_documents_with_the_end_of_text_token_before_or_after(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_here(data, "--stats", data)
    output = capsys.readouterr().out
    lengths = [len(document) for document in encoded(TEXTS)]
    assert f"{sum(len(text.encode()) for text in TEXTS):,} bytes" in output
    for texts in (VAL, TRAIN):
        tokens = sum(len(document) + 1 for document in encoded(texts))
        assert f"{tokens:,} tokens {len(texts):>12,} documents" in output
    assert f"longest: {max(lengths):,}" in output
    bins = [line.split() for line in output.splitlines() if line.startswith("  up to")]
    assert sum(int(line[-2].replace(",", "")) for line in bins) == len(TEXTS)
    shown = [part.partition("\n")[2] for part in output.split("\n--- a document")[1:]]
    assert 1 <= len(shown) <= 3
    for text in shown:
        beginning = text.rstrip("\n").removesuffix("...")
        assert beginning and any(whole.startswith(beginning) for whole in TEXTS)
