"""prepare_fineweb.py with the hub's real client."""

import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub import REVISION, Hub
from preparing import CONFIG, END_OF_TEXT, REPOSITORY, TEXTS, contents, hub_of, prepare, refused, sentence, texts_of

from trainer.data.shards import MANIFEST_NAME, open_split, read_manifest

pytestmark = pytest.mark.usefixtures("gpt2_tokenizer")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_of() as running:
        yield running


@pytest.mark.parametrize(("tokens", "ended"), [(9_000, False), (1_000_000, True)])
def test_the_shards_decode_to_the_documents_in_order_and_no_document_is_in_both_splits(
    hub: Hub, tmp_path: Path, tokens: int, ended: bool
) -> None:
    out = tmp_path / "data" / "shards"
    sizes = ["--val-tokens", 1500, "--shard-tokens", "2e3", "--workers", 2]
    done = prepare(hub, tmp_path, "--tokens", tokens, "--out", out, *sizes)
    assert done.returncode == 0, done.stderr
    assert f"--data.path {out}" in done.stdout
    assert ("dataset ended before" in done.stdout) is ended
    assert "tokens/s" in done.stderr

    manifest = read_manifest(out)
    assert (manifest.tokenizer, manifest.vocab_size) == ("gpt2", 50257)
    assert (manifest.dataset, manifest.dataset_config) == (REPOSITORY, CONFIG)
    assert manifest.revision == REVISION
    on_disk = sorted(path.name for path in out.iterdir())
    assert on_disk == sorted([MANIFEST_NAME, *(shard.file for shard in manifest.shards)])
    for shard in manifest.shards:
        assert hashlib.sha256((out / shard.file).read_bytes()).hexdigest() == shard.sha256
    assert [s.tokens for s in manifest.shards[1:-1]] == [2000] * (len(manifest.shards) - 2)
    assert manifest.shards[0].file == "fineweb_val_000000.bin"
    assert manifest.shards[1].file == "fineweb_train_000001.bin"

    val, train = (np.concatenate(open_split(out, split)) for split in ("val", "train"))
    assert manifest.total_tokens == val.size + train.size
    val_texts, train_texts = texts_of(val), texts_of(train)
    assert len(val_texts) == manifest.documents("val")
    assert len(train_texts) == manifest.documents("train")
    whole = val_texts + train_texts[:-1]
    assert whole == TEXTS[: len(whole)]
    cut = TEXTS[len(whole)]
    if ended:
        assert len(whole) + 1 == len(TEXTS) and train_texts[-1] == cut
    else:
        assert train.size == tokens and cut.startswith(train_texts[-1].rstrip("\ufffd"))
    last_of_val = np.flatnonzero(val == END_OF_TEXT)[-1]
    assert last_of_val < 1500 <= val.size


def test_a_filled_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    out.mkdir()
    (out / MANIFEST_NAME).write_text("the work of hours")
    (out / "fineweb_val_000000.bin").write_bytes(b"more of it")
    before = contents(out)
    message = refused(tmp_path, "--out", out)
    assert "is damaged" in message and f"delete {out}" in message
    assert contents(out) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1e15"], r"need 2,000,0\d\d\.\d GB, and .* GB free"),
        (["--tokens", "1.5"], "'1.5' is no whole number"),
        (["--tokens", "0"], "'0' is no whole number"),
        (["--token", "1e6"], "did you mean --tokens"),
        (["--tokens", "1e3", "--out", "/dev/null/x"], "cannot write to /dev/null/x: Not a dir"),
        (["--shard-tokens", "3e9"], "a shard holds at most 2,147,483,647 tokens"),
        (["--tokenizer", "gpt5"], "there is no tokenizer 'gpt5'; give one of .*gpt2"),
        (["--tokenizer", "hf:/no.json"], "pip install 'nanogauge.tokenizers.'|cannot load"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_downloaded(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert re.search(message, refused(tmp_path, *arguments))
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.glob("data/*/*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "nobody/nothing"], "nobody/nothing' doesn't exist on the Hub"),
        (["--name", "sample-11BT"], "'sample-11BT' not found. Available: .*'sample-10BT'"),
        (["--val-tokens", "1e6"], "give a smaller --val-tokens"),
    ],
)
def test_a_missing_or_too_small_dataset_is_bad_input(
    hub: Hub, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = prepare(hub, tmp_path, "--tokens", "1e6", "--out", "out", *arguments)
    assert done.returncode == 2, done.stderr
    assert re.search(message, sentence(done)), done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_finished_shards_stay_when_the_hub_dies(tmp_path: Path) -> None:
    chance = random.Random(3)
    documents = [[f"{file} {n} {chance.randbytes(100).hex()}" for n in range(700)] for file in range(3)]
    with hub_of(documents, dies_at="002_00000.parquet") as hub:
        sizes = ["--val-tokens", 500, "--shard-tokens", 1000, "--tokens", "1e6", "--workers", 1]
        done = prepare(hub, tmp_path, "--out", "out", *sizes)
    assert hub.dead.is_set()
    assert done.returncode == 1, done.stderr
    manifest = read_manifest(tmp_path / "out")
    message = sentence(done)
    assert f"{len(manifest.shards)} finished shards" in message and "broke off" in message
    assert "stay in out" in message
    assert len(manifest.shards) >= 3
    assert not list((tmp_path / "out").glob("*.tmp"))
    tokens = open_split(tmp_path / "out", "train")
    assert [shard.size for shard in tokens] == [1000] * (len(manifest.shards) - 1)


def test_without_a_network_the_run_fails_and_writes_nothing(tmp_path: Path) -> None:
    done = prepare(None, tmp_path, "--tokens", "1e6", "--out", "out")
    assert done.returncode == 1, done.stderr
    assert "check the network" in sentence(done)
    assert not list((tmp_path / "out").iterdir())
