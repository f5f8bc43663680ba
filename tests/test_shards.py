"""Writing and reading token shards."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from examples import write_document
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
    refuse_existing_shards,
)

ORIGIN = Origin(tokenizer="gpt2", vocab_size=50257, end_of_text=50256, dataset="some/texts", dataset_config="all")


@settings(max_examples=10, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=12), max_size=12),
    val_documents=st.integers(0, 12),
    shard_tokens=st.integers(1, 15),
)
def test_any_documents_come_back_from_shards_of_any_size(
    documents: list[list[int]], val_documents: int, shard_tokens: int
) -> None:
    splits: dict[Split, list[list[int]]] = {"val": documents[:val_documents], "train": documents[val_documents:]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ShardWriter(folder, ORIGIN, shard_tokens=shard_tokens) as writer:
            for split, of_split in splits.items():
                for document in of_split:
                    write_document(writer, split, np.array(document, dtype=np.uint16))
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


def write_shards(folder: Path, train: int = 8) -> Manifest:
    """Write a validation shard of 4 tokens and training shards of 5."""
    with ShardWriter(folder, ORIGIN, shard_tokens=5) as writer:
        write_document(writer, "val", np.arange(4, dtype=np.uint16))
        write_document(writer, "train", np.arange(train, dtype=np.uint16))
    return writer.manifest


def test_an_error_keeps_the_finished_shards_and_discards_the_open_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, ORIGIN, shard_tokens=5) as writer:
        write_document(writer, "val", np.arange(4, dtype=np.uint16))
        write_document(writer, "train", np.arange(8, dtype=np.uint16))
        raise KeyboardInterrupt
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {MANIFEST_NAME, "fineweb_val_000000.bin", "fineweb_train_000001.bin"}
    assert np.concatenate(open_split(tmp_path, "train")).tolist() == [0, 1, 2, 3, 4]


def edit_header(path: Path, number: int, value: int) -> None:
    header = np.memmap(path, dtype="<i4", mode="r+", shape=(256,))
    header[number] = value
    header.flush()


SHARD = "fineweb_train_000001.bin"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "no folder": shutil.rmtree,
    "no manifest": lambda folder: (folder / MANIFEST_NAME).unlink(),
    "a truncated manifest": lambda folder: os.truncate(folder / MANIFEST_NAME, 100),
    "a manifest whose total is wrong": lambda folder: (folder / MANIFEST_NAME).write_text(
        (folder / MANIFEST_NAME).read_text().replace('"total_tokens": 12', '"total_tokens": 13')
    ),
    "a missing shard": lambda folder: (folder / SHARD).unlink(),
    "a truncated shard": lambda folder: os.truncate(folder / SHARD, HEADER_BYTES + 9),
    "a truncated header": lambda folder: os.truncate(folder / SHARD, 401),
    "an empty shard": lambda folder: os.truncate(folder / SHARD, 0),
    "a wrong magic number": lambda folder: edit_header(folder / SHARD, 0, 20240521),
    "another version": lambda folder: edit_header(folder / SHARD, 1, 2),
    "a shard of another manifest": lambda folder: (folder / SHARD).write_bytes(
        (folder / "fineweb_train_000002.bin").read_bytes()
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_what_to_do(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shards(folder)
    DAMAGES[damage](folder)
    with pytest.raises(BadInput, match="run: .*python prepare_fineweb.py --out") as caught:
        open_split(folder, "train")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_shard_has_the_header_of_llm_c(tmp_path: Path) -> None:
    write_shards(tmp_path)
    data = (tmp_path / SHARD).read_bytes()
    assert np.frombuffer(data[:1024], "<i4").tolist() == [20240520, 1, 5] + [0] * 253
    assert np.frombuffer(data[1024:], "<u2").tolist() == [0, 1, 2, 3, 4]
    assert open_shard(tmp_path / SHARD).tolist() == [0, 1, 2, 3, 4]


def test_shards_of_another_program_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / SHARD).write_bytes(b"precious")
    with pytest.raises(BadInput, match=SHARD):
        refuse_existing_shards(tmp_path)
