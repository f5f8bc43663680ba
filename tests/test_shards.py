"""Shards on disk: what is read is what was written, and damage is refused with what to do."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogauge.errors import BadInput
from trainer.data.manifest import Manifest, Origin, Split
from trainer.data.shards import (
    HEADER_BYTES,
    MANIFEST_NAME,
    ShardWriter,
    open_shard,
    open_split,
    read_manifest,
    refuse_filled,
)

ORIGIN = Origin(
    tokenizer="gpt2",
    vocab_size=50257,
    end_of_text=50256,
    dataset="some/texts",
    dataset_config="all",
)


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=12), max_size=12),
    val_documents=st.integers(0, 12),
    shard_tokens=st.integers(1, 15),
)
def test_any_documents_come_back_from_shards_of_any_size(
    documents: list[list[int]], val_documents: int, shard_tokens: int
) -> None:
    """The shards of a split, one after another, are its documents, one after another."""
    splits: dict[Split, list[list[int]]] = {
        "val": documents[:val_documents],
        "train": documents[val_documents:],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ShardWriter(folder, ORIGIN, shard_tokens=shard_tokens) as writer:
            for split, of_split in splits.items():
                for document in of_split:
                    writer.write(split, np.array(document, dtype=np.uint16))
        for split, of_split in splits.items():
            expected = [token for document in of_split for token in document]
            if not expected:
                with pytest.raises(BadInput):
                    open_split(folder, split)
                continue
            shards = open_split(folder, split)
            assert np.concatenate(shards).tolist() == expected
            assert {shard.size for shard in shards[:-1]} <= {shard_tokens}
            assert read_manifest(folder).documents(split) == len(of_split)
            assert not shards[0].flags.writeable
        assert not list(folder.glob("*.tmp"))


def _write(folder: Path, train: int = 8) -> Manifest:
    """A val shard of 4 tokens and training shards of 5."""
    with ShardWriter(folder, ORIGIN, shard_tokens=5) as writer:
        writer.write("val", np.arange(4, dtype=np.uint16))
        writer.write("train", np.arange(train, dtype=np.uint16))
    return writer.manifest


def test_an_error_while_writing_keeps_the_finished_shards_and_drops_the_open_one(
    tmp_path: Path,
) -> None:
    """A folder is usable at every moment: what the manifest lists is there, and nothing else."""
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, ORIGIN, shard_tokens=5) as writer:
        writer.write("val", np.arange(4, dtype=np.uint16))
        writer.write("train", np.arange(8, dtype=np.uint16))
        raise KeyboardInterrupt
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {MANIFEST_NAME, "fineweb_val_000000.bin", "fineweb_train_000001.bin"}
    assert np.concatenate(open_split(tmp_path, "train")).tolist() == [0, 1, 2, 3, 4]


def _edit(path: Path, number: int, value: int) -> None:
    """Put another number into a shard's header."""
    header = np.memmap(path, dtype="<i4", mode="r+", shape=(256,))
    header[number] = value
    header.flush()


SHARD = "fineweb_train_000001.bin"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "no folder": shutil.rmtree,
    "no manifest": lambda folder: (folder / MANIFEST_NAME).unlink(),
    "a cut manifest": lambda folder: os.truncate(folder / MANIFEST_NAME, 100),
    "a manifest whose total is wrong": lambda folder: (folder / MANIFEST_NAME).write_text(
        (folder / MANIFEST_NAME).read_text().replace('"total_tokens": 12', '"total_tokens": 13')
    ),
    "a missing shard": lambda folder: (folder / SHARD).unlink(),
    "a cut shard": lambda folder: os.truncate(folder / SHARD, HEADER_BYTES + 9),
    "a cut header": lambda folder: os.truncate(folder / SHARD, 401),
    "an empty shard": lambda folder: os.truncate(folder / SHARD, 0),
    "a wrong magic number": lambda folder: _edit(folder / SHARD, 0, 20240521),
    "another version": lambda folder: _edit(folder / SHARD, 1, 2),
    "a shard of another manifest": lambda folder: (folder / SHARD).write_bytes(
        (folder / "fineweb_train_000002.bin").read_bytes()
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_what_to_do(tmp_path: Path, damage: str) -> None:
    """Never train on half a shard, or on bytes that are no tokens."""
    folder = tmp_path / "shards"
    folder.mkdir()
    _write(folder)
    DAMAGES[damage](folder)
    with pytest.raises(BadInput, match="run: python prepare_fineweb.py --out") as caught:
        open_split(folder, "train")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_training_tokens_is_refused(tmp_path: Path) -> None:
    """A preparation that stopped after the validation shard has nothing to train on."""
    with ShardWriter(tmp_path, ORIGIN, shard_tokens=5) as writer:
        writer.write("val", np.arange(4, dtype=np.uint16))
    with pytest.raises(BadInput, match="no train tokens"):
        open_split(tmp_path, "train")


def test_a_shard_is_what_llm_c_reads(tmp_path: Path) -> None:
    """The header is llm.c's: 256 int32, of which magic, version and count are set."""
    _write(tmp_path)
    data = (tmp_path / SHARD).read_bytes()
    assert np.frombuffer(data[:1024], "<i4").tolist() == [20240520, 1, 5] + [0] * 253
    assert np.frombuffer(data[1024:], "<u2").tolist() == [0, 1, 2, 3, 4]
    assert open_shard(tmp_path / SHARD).tolist() == [0, 1, 2, 3, 4]


def test_shards_of_another_tool_are_not_overwritten(tmp_path: Path) -> None:
    """llm.c's own script writes files of the same names, without a manifest."""
    (tmp_path / SHARD).write_bytes(b"precious")
    with pytest.raises(BadInput, match=SHARD):
        refuse_filled(tmp_path)
