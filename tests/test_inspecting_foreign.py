"""--verify and --stats of folders that other tools wrote: what can be told without a manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiktoken
from gpt2_vocabulary import gpt2_vocabulary  # noqa: F401  (a fixture)
from preparing import END_OF_TEXT, TEXTS, prepare

from nanogauge.errors import BadInput
from prepare_fineweb import main

NOT_CHECKED = "Not checked: hashes, counts and documents, as no manifest says what they should be."
VAL, TRAIN = TEXTS[:20], TEXTS[20:]


def encoded(texts: list[str]) -> list[list[int]]:
    encoding = tiktoken.get_encoding("gpt2")
    return [encoding.encode_ordinary(text) for text in texts]


def nanogpt(folder: Path) -> None:
    """As its prepare.py does: the end-of-text token stands behind a document."""
    for split, texts in (("val", VAL), ("train", TRAIN)):
        tokens = [token for document in encoded(texts) for token in (*document, END_OF_TEXT)]
        np.array(tokens, np.uint16).tofile(folder / f"{split}.bin")


def build_nanogpt(folder: Path) -> None:
    """As its fineweb.py does: before a document, which may go on in the next file."""
    for split, texts in (("val", VAL), ("train", TRAIN)):
        tokens = [token for document in encoded(texts) for token in (END_OF_TEXT, *document)]
        for number, begin in enumerate(range(0, len(tokens), 5000)):
            part = np.array(tokens[begin : begin + 5000], np.uint16)
            np.save(folder / f"edufineweb_{split}_{number:06d}", part)


@pytest.fixture(params=[nanogpt, build_nanogpt])
def home(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    gpt2_vocabulary: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_vocabulary))
    (tmp_path / "data").mkdir()
    request.param(tmp_path / "data")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints when it succeeds."""
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_verify_checks_what_it_can_and_names_what_it_cannot(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forms, sizes and the range of tokens; without the vocabulary, which it does not need."""
    data = str(home / "data")
    highest = max(token for document in encoded(TEXTS) for token in (*document, END_OF_TEXT))
    with monkeypatch.context() as patch:
        patch.setattr("tiktoken.Encoding", None)
        whole = said(capsys, "--verify", data)
    assert f"the highest token is {highest:,}" in whole
    assert f"{len(TEXTS)} of the tokens are its end of text" in whole
    assert whole.endswith(f"{NOT_CHECKED}\n")

    path = next(path for path in (home / "data").iterdir() if "train" in path.name)
    path.write_bytes(path.read_bytes()[:-2] + np.array([END_OF_TEXT + 1], "<u2").tobytes())
    with pytest.raises(BadInput, match=f"{path.name} holds the token 50257, beyond GPT-2's 50,257"):
        main(["--verify", data])
    with pytest.raises(BadInput, match="holds the token 50257.*--verify names the file"):
        main(["--stats", data])

    (home / "data" / "meta.pkl").touch()
    unknown = said(capsys, "--verify", data)
    assert "the highest token is 50,257" in unknown
    assert "Not checked: whether that is within the vocabulary" in unknown
    shown = said(capsys, "--stats", data)
    assert "nothing tells the tokenizer" in shown and "documents" not in shown


def test_statistics_tell_documents_of_either_habit(
    home: Path,
    gpt2_vocabulary: Path,  # noqa: F811
) -> None:
    """Their lengths are the same whether the end-of-text token is before a document or behind."""
    done = prepare(None, gpt2_vocabulary, home, "--stats", "data")
    assert done.returncode == 0, done.stderr
    lengths = [len(document) for document in encoded(TEXTS)]
    assert f"{sum(len(text.encode()) for text in TEXTS):,} bytes" in done.stdout
    for texts in (VAL, TRAIN):
        tokens = sum(len(document) + 1 for document in encoded(texts))
        assert f"{tokens:,} tokens {len(texts):>12,} documents" in done.stdout
    assert f"longest: {max(lengths):,}" in done.stdout
    bins = [line.split() for line in done.stdout.splitlines() if line.startswith("  up to")]
    assert sum(int(line[-2].replace(",", "")) for line in bins) == len(TEXTS)
    shown = [part.partition("\n")[2] for part in done.stdout.split("\n--- a document")[1:]]
    assert 1 <= len(shown) <= 3
    for text in shown:
        beginning = text.rstrip("\n").removesuffix("...")
        assert beginning and any(whole.startswith(beginning) for whole in TEXTS)
