"""Folders of tokens that other tools wrote are trained on, and what was assumed of them is told."""

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

from nanogauge.config import DataSection
from nanogauge.errors import BadInput
from trainer.data.dataset import OpenedFolder, open_dataset, open_source
from trainer.data.manifest import Origin
from trainer.data.shards import ShardWriter, open_shard

TRAIN = np.arange(500, dtype=np.uint16)
VAL = np.arange(100, 160, dtype=np.uint16)


def shard(tokens: np.ndarray, magic: int = 20240520, version: int = 1) -> bytes:
    """A file as llm.c writes it."""
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
    "nanoGPT": (nanogpt, "raw uint16 as nanoGPT's", "gpt2"),
    "nanoGPT, characters": (characters, "raw uint16 as nanoGPT's", None),
    "build-nanogpt": (build_nanogpt, "NumPy arrays as build-nanogpt's", "gpt2"),
    "modded-nanogpt": (modded_nanogpt, "shards as llm.c's", "gpt2"),
    "llm.c, Llama 3": (llama_3, "shards as llm.c's", None),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_files_of_other_tools_are_read_as_they_are(tmp_path: Path, name: str) -> None:
    """No conversion, no second copy on the disk; and what no manifest tells is not invented."""
    write, form, tokenizer = FORMS[name]
    write(tmp_path)
    opened = open_dataset(tmp_path)
    assert np.concatenate(opened.splits["train"]).tolist() == TRAIN.tolist()
    assert np.concatenate(opened.splits["val"]).tolist() == VAL.tolist()
    assert all(isinstance(s, np.memmap) for shards in opened.splits.values() for s in shards)
    assert (opened.tokenizer, opened.vocab_size) == (tokenizer, None)
    assert opened.assumed is not None
    for told in (form, "no manifest", "500 train", "60 val", "without hashes"):
        assert told in opened.assumed
    assert ("assumed to be GPT-2's" in opened.assumed) == (tokenizer is not None)
    source = open_source(DataSection(path=str(tmp_path)))
    if tokenizer is None:
        with pytest.raises(BadInput, match="names its tokenizer"):
            source.encoding()


def test_a_file_whose_name_tells_no_split_is_left_out_and_named(tmp_path: Path) -> None:
    """Such as a test set: to train on it would spoil it, and to be silent would puzzle."""
    modded_nanogpt(tmp_path)
    (tmp_path / "hellaswag_test.bin").write_bytes(b"anything")
    opened = open_dataset(tmp_path)
    assert opened.tokens("train") == 500
    assert opened.assumed is not None and "left out" in opened.assumed
    assert "hellaswag_test.bin" in opened.assumed


def _odd(folder: Path) -> None:
    nanogpt(folder)
    (folder / "train.bin").write_bytes(b"123")


def _pickled(folder: Path) -> None:
    build_nanogpt(folder)
    np.save(folder / "edufineweb_train_000002", np.array([{"a": 1}]), allow_pickle=True)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no validation set": (lambda f: [nanogpt(f), (f / "val.bin").unlink()], "no file with val"),
    "half a token": (_odd, "3 bytes"),
    "an empty file": (lambda f: [nanogpt(f), os.truncate(f / "val.bin", 0)], "0 bytes"),
    "a cut shard": (
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
    "rows of rows": (
        lambda f: [build_nanogpt(f), np.save(f / "val", VAL.reshape(2, 30))],
        "shape",
    ),
    "pickled objects": (_pickled, "cannot read"),
    "no array": (lambda f: [build_nanogpt(f), (f / "val.npy").write_bytes(b"PK")], "cannot read"),
    "a folder of that name": (lambda f: [nanogpt(f), (f / "val_2.bin").mkdir()], "cannot read"),
    "nothing": (lambda f: None, "no token shards"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_tokens_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    """And never with the advice to delete what another tool took a day to make."""
    break_it, told = REFUSED[name]
    break_it(tmp_path)
    with pytest.raises(BadInput, match=told) as refused:
        open_dataset(tmp_path)
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
    """Version 1 holds uint16, version 2 uint32: the count must fit the size in each."""
    layout, version = kind
    path = tmp_path_factory.getbasetemp() / "one.bin"
    data = shard(np.array(tokens, dtype=layout), version=version)
    path.write_bytes(data)
    assert open_shard(path).tolist() == tokens
    path.write_bytes(data[:-1])
    with pytest.raises(BadInput, match="damaged"):
        open_shard(path)


def test_the_fingerprint_tells_data_apart_and_survives_a_move(tmp_path: Path) -> None:
    """By the manifest's hashes where there is one; without, by names, sizes and both ends."""
    prints = []
    for name, (write, _, _) in FORMS.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        prints.append(open_dataset(tmp_path / name).fingerprint)
    assert len(set(prints)) == len(prints) - 1  # meta.pkl is no token
    shutil.copytree(tmp_path / "nanoGPT", tmp_path / "moved")
    assert open_dataset(tmp_path / "moved").fingerprint == prints[0]
    TRAIN[::-1].tofile(tmp_path / "moved" / "train.bin")
    assert open_dataset(tmp_path / "moved").fingerprint != prints[0]
    assert write_ours(tmp_path / "a", 0).fingerprint == write_ours(tmp_path / "b", 0).fingerprint
    assert write_ours(tmp_path / "a", 0).fingerprint != write_ours(tmp_path / "c", 1).fingerprint
    assert write_ours(tmp_path / "a", 0).assumed is None


def write_ours(folder: Path, first: int) -> OpenedFolder:
    """A folder with a manifest, of a validation shard and 2,000 training tokens; opened."""
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
    return open_dataset(folder)


def test_a_run_trains_on_nanogpts_files_and_says_what_it_assumed(tmp_path: Path) -> None:
    """From nanoGPT's data folder to a loss without preparing anything; the doctor reads it too."""
    data = tmp_path / "shakespeare"
    data.mkdir()
    (np.arange(4000) % 250).astype(np.uint16).tofile(data / "train.bin")
    (np.arange(1000) % 250).astype(np.uint16).tofile(data / "val.bin")
    flags = ["--data.embedded=false", f"--data.path={data}", "--train.max-steps=2"]
    offline = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "none"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = train_tiny(tmp_path, *flags, **offline)
    assert done.returncode == 0, done.stderr
    assert "raw uint16 as nanoGPT's" in done.stdout
    events = {line["what"]: line for line in log_lines(tmp_path / "demo") if "what" in line}
    assert "assumed to be GPT-2's" in events["data_assumed"]["text"]
    assert "32 tokens of 124 windows, once each" in events["data_order"]["text"]
    assert "32 of the 4,000 training tokens" in events["data_order"]["text"]


def test_a_resumption_on_other_data_is_refused(tmp_path: Path) -> None:
    """The same path and the same number of tokens, but other ones: the shards were made again."""
    write_ours(tmp_path / "data", 1)
    flags = ["--data.embedded=false", f"--data.path={tmp_path / 'data'}", "--train.max-steps=4"]
    offline = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "none"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = train_tiny(tmp_path, *flags, **offline)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "data")
    write_ours(tmp_path / "data", 2)
    more = [*flags, "--resume=auto", "--run.compile=false"]
    refused = run("train.py", DEMO, f"--run.out={tmp_path}", *TINY, *more, **offline)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "cannot resume on other data" in refused.stderr
