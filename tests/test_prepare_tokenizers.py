"""Hugging Face tokenizers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preparing import TEXTS, prepare_here, refused

from trainer.data.shards import open_split, read_manifest
from trainer.data.tokenizer import load_tokenizer

tokenizers = pytest.importorskip(
    "tokenizers", reason="needs Hugging Face's tokenizers: pip install 'nanogauge[tokenizers]'"
)
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    """A byte-level tokenizer.json, like those of GPT-2 and Llama 3, with a few merges."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END, "<|pad|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    return described


@pytest.mark.parametrize("padded", [False, True])
def test_shards_of_a_tokenizer_json_decode_to_the_texts(
    tmp_path: Path, described: dict[str, Any], padded: bool
) -> None:
    """Special tokens in a text are ordinary text, and a vocabulary may skip ids."""
    vocabulary = described["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    if padded:
        model = described["model"] | {"vocab": vocabulary | {last: 70_000}}
        described = described | {"model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    texts = [*TEXTS, f"not the end: {END} and no padding: <|pad|>", last.replace("\u0120", " ")]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines)
    flags = ["--dataset", "texts.jsonl", "--tokenizer", "hf:tokenizer.json", "--out", "out"]
    prepare_here(tmp_path, *flags, "--val-tokens", 500, "--shard-tokens", 4000, "--workers", 2)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.vocab_size == (70_001 if padded else len(vocabulary))
    splits = [np.concatenate(open_split(tmp_path / "out", split)) for split in ("val", "train")]
    assert splits[0].dtype == (np.uint32 if padded else np.uint16)
    header = np.frombuffer((tmp_path / "out" / manifest.shards[0].file).read_bytes()[:8], "<i4")
    assert header.tolist() == ([20240801, 7] if padded else [20240520, 1])
    tokens = np.concatenate(splits)
    assert max(tokens) == (70_000 if padded else vocabulary[last])
    starts = np.flatnonzero(tokens == manifest.end_of_text)
    assert manifest.end_of_text == vocabulary[END] and starts[0] == 0
    loaded = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    documents = [part[1:].tolist() for part in np.split(tokens, starts[1:])]
    assert [loaded.decode(part, skip_special_tokens=False) for part in documents] == texts

    size = sum(len(text.encode()) for text in texts)
    lengths = load_tokenizer(f"hf:{tmp_path / 'tokenizer.json'}").token_bytes()
    assert lengths is not None and lengths[tokens].sum() == size


def test_an_end_of_text_token_that_is_not_special_is_refused(tmp_path: Path, described: dict[str, Any]) -> None:
    """It would be found in texts too, and split documents."""
    added = [token | {"special": False} for token in described["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(described | {"added_tokens": added}))
    (tmp_path / "texts.txt").write_text("a text")
    flags = ["--dataset", "texts.txt", "--tokenizer", "hf:tokenizer.json", "--out", "out"]
    assert f"encodes {END} in a text as its end" in refused(tmp_path, *flags)


def test_bytes_are_not_counted_for_a_tokenizer_whose_tokens_have_no_fixed_bytes(tmp_path: Path) -> None:
    """Metaspace drops the space of a text's first token."""
    words = {END: 0, "<unk>": 1, "\u2581the": 2, "\u2581cell": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.save(str(tmp_path / "words.json"))
    loaded = load_tokenizer(f"hf:{tmp_path / 'words.json'}")
    assert loaded.token_bytes() is None
    assert loaded.decode(loaded.encode_text("the cell").tolist()) == "the cell"
