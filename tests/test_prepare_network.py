"""Failing networks and hubs, and how much is downloaded."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from preparing import hub_of, prepare, refused, sentence

pytestmark = pytest.mark.usefixtures("gpt2_tokenizer")

SIZES = ["--val-tokens", 1500, "--shard-tokens", 2000, "--tokens", "1e6", "--workers", 2]
FAULTS = ["cut", "garbage", "429", "page", "503", "stall", "garbage", "cut"]


def shards_in(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.bin")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: None) -> Path:
    home = tmp_path_factory.mktemp("uninterrupted")
    with hub_of() as hub:
        done = prepare(hub, home, "--out", "out", *SIZES)
    assert done.returncode == 0, done.stderr
    return home / "out"


def test_failed_requests_are_retried_and_the_shards_are_the_same(uninterrupted: Path, tmp_path: Path) -> None:
    with hub_of(faults=FAULTS) as hub:
        done = prepare(hub, tmp_path, "--out", "out", *SIZES)
        assert done.returncode == 0, done.stderr
        assert not hub.faults
    assert shards_in(tmp_path / "out") == shards_in(uninterrupted)


def test_without_a_connection_by_the_users_wish_the_folder_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused(tmp_path, "--out", "out")
    assert message == "HF_HUB_OFFLINE is set: give the folder of the files as --dataset."


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])  # in ranges, and as a whole
def test_a_hub_that_sends_only_garbage_is_named(tmp_path: Path, suffix: str) -> None:
    with hub_of(faults=["garbage"] * 200) as hub:
        hub.files = {name.replace(".parquet", suffix): data for name, data in hub.files.items()}
        done = prepare(hub, tmp_path, "--out", "out", *SIZES)
    assert done.returncode == 1, done.stderr
    whole = suffix == ".jsonl"
    reason = "not have the sha256 that the hub lists" if whole else "is not a Parquet file"
    assert f"000_00000{suffix}" in sentence(done) and reason in sentence(done)
    assert not shards_in(tmp_path / "out")


def test_only_what_the_tokens_need_is_fetched(tmp_path: Path) -> None:
    noise = np.random.default_rng(1)
    documents = [[noise.bytes(6000).hex() for _ in range(200)] for _ in range(4)]
    with hub_of(documents) as hub:
        small = ["--val-tokens", 100, "--tokens", 1000]
        done = prepare(hub, tmp_path, "--out", "out", *small)
        files = [len(data) for name, data in hub.files.items() if name.startswith("sample")]
    assert done.returncode == 0, done.stderr
    # At least one unit is fetched, here a whole file; of the others, only the footers.
    assert hub.served_bytes < 1.5 * files[0] < 0.5 * sum(files)
