"""Datasets of other programs and our own, their fingerprints, and training on them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import DEMO, TINY, log_lines, run, train_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogauge.errors import BadInput
from trainer.data.dataset import Dataset, open_folder
from trainer.data.manifest import Origin
from trainer.data.shards import ShardWriter, open_shard

TRAIN = np.arange(500, dtype=np.uint16)
VAL = np.arange(100, 160, dtype=np.uint16)
OFFLINE = {"TIKTOKEN_CACHE_DIR": "/nonexistent", "HTTPS_PROXY": "http://127.0.0.1:9"}


def shard(tokens: np.ndarray, magic: int = 20240520, version: int = 1) -> bytes:
    """Return a file as llm.c writes it."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, tokens.size
    return header.tobytes() + tokens.tobytes()


def nanogpt(folder: Path) -> None:
    TRAIN.tofile(folder / "train.bin")
    VAL.tofile(folder / "val.bin")


def build_nanogpt(folder: Path) -> None:
    np.save(folder / "edufineweb_val_000000", VAL)
    np.save(folder / "edufineweb_train_000001", TRAIN[:300])
    np.save(folder / "edufineweb_train_000002", TRAIN[300:])


def modded_nanogpt(folder: Path) -> None:
    (folder / "fineweb_val_000000.bin").write_bytes(shard(VAL))
    (folder / "fineweb_train_000001.bin").write_bytes(shard(TRAIN[:300]))
    (folder / "fineweb_train_000002.bin").write_bytes(shard(TRAIN[300:]))


def llama_3(folder: Path) -> None:
    wide = {"train": TRAIN.astype(np.uint32), "val": VAL.astype(np.uint32)}
    for split, tokens in wide.items():
        (folder / f"tiny_shakespeare_{split}.bin").write_bytes(shard(tokens, 20240801, 7))


def characters(folder: Path) -> None:
    nanogpt(folder)
    (folder / "meta.pkl").write_bytes(b"not read")


FORMS: dict[str, tuple[Callable[[Path], None], str, str | None]] = {
    "nanoGPT": (nanogpt, "nanoGPT's raw uint16", "gpt2"),
    "nanoGPT, characters": (characters, "nanoGPT's raw uint16", None),
    "build-nanogpt": (build_nanogpt, "build-nanogpt's NumPy arrays", "gpt2"),
    "modded-nanogpt": (modded_nanogpt, "llm.c's shards", "gpt2"),
    "llm.c, Llama 3": (llama_3, "llm.c's shards", None),
}


@pytest.mark.parametrize("name", FORMS)
def test_files_of_other_programs_are_memory_mapped(tmp_path: Path, name: str) -> None:
    write, form, tokenizer = FORMS[name]
    write(tmp_path)
    opened = open_folder(tmp_path)
    assert np.concatenate(opened.splits["train"]).tolist() == TRAIN.tolist()
    assert np.concatenate(opened.splits["val"]).tolist() == VAL.tolist()
    assert all(isinstance(s, np.memmap) for shards in opened.splits.values() for s in shards)
    assert (opened.tokenizer, opened.vocab_size) == (tokenizer, None)
    assert opened.assumed is not None
    for fact in (form, "no manifest", "500 train", "60 val", "no hashes"):
        assert fact in opened.assumed
    assert ("GPT-2 tokenizer assumed" in opened.assumed) == (tokenizer is not None)
    if tokenizer is None:
        with pytest.raises(BadInput, match="does not name its tokenizer"):
            opened.encoding()


def test_a_file_without_a_split_in_its_name_is_ignored_and_named(tmp_path: Path) -> None:
    modded_nanogpt(tmp_path)
    (tmp_path / "hellaswag_test.bin").write_bytes(b"anything")
    opened = open_folder(tmp_path)
    assert opened.tokens("train") == 500
    assert opened.assumed is not None and "ignored" in opened.assumed
    assert "hellaswag_test.bin" in opened.assumed


def half_a_token(folder: Path) -> None:
    nanogpt(folder)
    (folder / "train.bin").write_bytes(b"123")


def pickled(folder: Path) -> None:
    build_nanogpt(folder)
    np.save(folder / "edufineweb_train_000002", np.array([{"a": 1}]), allow_pickle=True)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no validation set": (lambda f: [nanogpt(f), (f / "val.bin").unlink()], "no file with val"),
    "half a token": (half_a_token, "3 bytes"),
    "an empty file": (lambda f: [nanogpt(f), os.truncate(f / "val.bin", 0)], "0 bytes"),
    "a truncated shard": (
        lambda f: [modded_nanogpt(f), os.truncate(f / "fineweb_train_000002.bin", 1100)],
        "damaged",
    ),
    "a shard whose header is damaged": (
        lambda f: [
            modded_nanogpt(f),
            (f / "fineweb_train_000002.bin").write_bytes(shard(TRAIN, 20240521)),
        ],
        "mixes",
    ),
    "a version that is not known": (
        lambda f: [
            modded_nanogpt(f),
            (f / "fineweb_train_000002.bin").write_bytes(shard(TRAIN, version=3)),
        ],
        "version 3",
    ),
    "floats": (lambda f: [build_nanogpt(f), np.save(f / "val", np.ones(9))], "float64"),
    "two dimensions": (
        lambda f: [build_nanogpt(f), np.save(f / "val", VAL.reshape(2, 30))],
        "shape",
    ),
    "pickled objects": (pickled, "cannot read"),
    "no array": (lambda f: [build_nanogpt(f), (f / "val.npy").write_bytes(b"PK")], "cannot read"),
    "a folder of that name": (lambda f: [nanogpt(f), (f / "val_2.bin").mkdir()], "cannot read"),
    "nothing": (lambda f: None, "no token shards"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_files_are_refused_without_advice_to_delete_them(tmp_path: Path, name: str) -> None:
    damage, message = REFUSED[name]
    damage(tmp_path)
    with pytest.raises(BadInput, match=message) as refused:
        open_folder(tmp_path)
    sentence = str(refused.value)
    assert "\n" not in sentence and "delete" not in sentence
    assert str(tmp_path) in sentence


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([("<u2", 1), ("<u4", 2)]),
    st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=600),
)
def test_a_shard_of_either_version_reads_back(
    tmp_path_factory: pytest.TempPathFactory, kind: tuple[str, int], tokens: list[int]
) -> None:
    layout, version = kind
    path = tmp_path_factory.getbasetemp() / "one.bin"
    data = shard(np.array(tokens, dtype=layout), version=version)
    path.write_bytes(data)
    assert open_shard(path).tolist() == tokens
    path.write_bytes(data[:-1])
    with pytest.raises(BadInput, match="damaged"):
        open_shard(path)


def test_the_fingerprint_identifies_the_data_wherever_it_is(tmp_path: Path) -> None:
    prints = []
    for name, (write, _, _) in FORMS.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        prints.append(open_folder(tmp_path / name).fingerprint)
    assert len(set(prints)) == len(prints) - 1  # meta.pkl is no token
    shutil.copytree(tmp_path / "nanoGPT", tmp_path / "moved")
    assert open_folder(tmp_path / "moved").fingerprint == prints[0]
    TRAIN[::-1].tofile(tmp_path / "moved" / "train.bin")
    assert open_folder(tmp_path / "moved").fingerprint != prints[0]
    assert write_ours(tmp_path / "a", 0).fingerprint == write_ours(tmp_path / "b", 0).fingerprint
    assert write_ours(tmp_path / "a", 0).fingerprint != write_ours(tmp_path / "c", 1).fingerprint
    assert write_ours(tmp_path / "a", 0).assumed is None


def write_ours(folder: Path, first: int) -> Dataset:
    """Write a validation shard and 2,000 training tokens, and open the folder."""
    if not folder.exists():
        folder.mkdir()
        origin = Origin(
            tokenizer="gpt2",
            vocab_size=264,
            end_of_text=256,
            dataset="made by the test",
            dataset_config="none",
        )
        with ShardWriter(folder, origin, shard_tokens=1500) as writer:
            writer.write("val", np.full(300, 7, dtype=np.uint16))
            writer.write("train", np.full(2000, first, dtype=np.uint16))
    return open_folder(folder)


def test_a_run_trains_on_nanogpts_files_and_logs_what_it_assumed(tmp_path: Path) -> None:
    data = tmp_path / "shakespeare"
    data.mkdir()
    (np.arange(4000) % 250).astype(np.uint16).tofile(data / "train.bin")
    (np.arange(1000) % 250).astype(np.uint16).tofile(data / "val.bin")
    flags = ["--data.embedded=false", f"--data.path={data}", "--train.max-steps=2"]
    done = train_tiny(tmp_path, *flags, **OFFLINE)
    assert done.returncode == 0, done.stderr
    assert "nanoGPT's raw uint16" in done.stdout
    events = {line["what"]: line for line in log_lines(tmp_path / "demo") if "what" in line}
    assert "GPT-2 tokenizer assumed" in events["data_assumed"]["text"]
    assert "32 tokens of 124 windows, once each" in events["data_order"]["text"]
    assert "32 of the 4,000 training tokens" in events["data_order"]["text"]


def test_a_resumption_on_other_data_is_refused(tmp_path: Path) -> None:
    """The path and the number of tokens are the same."""
    write_ours(tmp_path / "data", 1)
    flags = ["--data.embedded=false", f"--data.path={tmp_path / 'data'}", "--train.max-steps=4"]
    done = train_tiny(tmp_path, *flags, **OFFLINE)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "data")
    write_ours(tmp_path / "data", 2)
    more = [*flags, "--resume=auto", "--run.compile=false"]
    refused = run("train.py", DEMO, f"--run.out={tmp_path}", *TINY, *more, **OFFLINE)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "cannot resume on other data" in refused.stderr
