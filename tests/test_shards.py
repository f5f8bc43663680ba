"""Writing and reading token shards."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from examples import write_document

from nanogauge.errors import BadInput
from trainer.data.manifest import Manifest, Origin
from trainer.data.shards import HEADER_BYTES, MANIFEST_NAME, ShardWriter, open_shard, open_split, refuse_existing_shards

ORIGIN = Origin(tokenizer="gpt2", vocab_size=50257, end_of_text=50256, dataset="some/texts", dataset_config="all")


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


SHARD = "fineweb_train_000001.bin"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda folder: (folder / MANIFEST_NAME).unlink(),
    "a truncated manifest": lambda folder: os.truncate(folder / MANIFEST_NAME, 100),
    "a manifest whose total is wrong": lambda folder: (folder / MANIFEST_NAME).write_text(
        (folder / MANIFEST_NAME).read_text().replace('"total_tokens": 12', '"total_tokens": 13')
    ),
    "a missing shard": lambda folder: (folder / SHARD).unlink(),
    "a truncated shard": lambda folder: os.truncate(folder / SHARD, HEADER_BYTES + 9),
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
