"""A bad network and a bad hub: tried again, noticed, named; and no more fetched than is needed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from gpt2_vocabulary import gpt2_vocabulary  # noqa: F401  (a fixture)
from hub import REVISION, Hub
from preparing import END_OF_TEXT, hub_of, prepare, prepare_until_a_shard, sentence

from trainer.data.shards import (
    HEADER_BYTES,
    MAGIC,
    MANIFEST_NAME,
    VERSION,
    open_split,
    read_manifest,
)

SIZES = ["--val-tokens", 1500, "--shard-tokens", 2000, "--tokens", "1e6", "--workers", 2]
FAULTS = ["cut", "garbage", "429", "page", "503", "stall", "garbage", "cut"]
SHARDS = "OWNER/ready"


def shards_in(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.bin")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, gpt2_vocabulary: Path) -> Path:  # noqa: F811
    home = tmp_path_factory.mktemp("undisturbed")
    with hub_of() as hub:
        done = prepare(hub, gpt2_vocabulary, home, "--out", "out", *SIZES)
    assert done.returncode == 0, done.stderr
    return home / "out"


@pytest.mark.parametrize("whole", [False, True])
def test_cut_refused_stalled_and_garbled_answers_are_asked_for_again(
    undisturbed: Path,
    gpt2_vocabulary: Path,  # noqa: F811
    tmp_path: Path,
    whole: bool,
) -> None:
    """Whatever the hub does meanwhile, the shards are those of a hub that does nothing wrong."""
    flags = [*SIZES, *(["--whole-files"] if whole else [])]
    with hub_of(faults=FAULTS) as hub:
        done = prepare(hub, gpt2_vocabulary, tmp_path, "--out", "out", *flags)
        assert done.returncode == 0, done.stderr
        assert not hub.faults
    assert shards_in(tmp_path / "out") == shards_in(undisturbed)
    if not whole:
        return
    # What is in the client's cache now is enough without a network.
    offline = prepare(
        *(None, gpt2_vocabulary, tmp_path, "--out", "offline", *SIZES, "--name", "sample-10BT"),
        HF_HUB_OFFLINE="1",
    )
    assert offline.returncode == 0, offline.stderr
    assert shards_in(tmp_path / "offline") == shards_in(undisturbed)


@pytest.mark.parametrize("whole", [False, True])
def test_a_hub_that_sends_nothing_but_garbage_is_named(
    gpt2_vocabulary: Path,  # noqa: F811
    tmp_path: Path,
    whole: bool,
) -> None:
    """Exit status 1, one sentence, and nothing of it in a shard."""
    flags = [*SIZES, *(["--whole-files"] if whole else [])]
    with hub_of(faults=["garbage"] * 200) as hub:
        done = prepare(hub, gpt2_vocabulary, tmp_path, "--out", "out", *flags)
    assert done.returncode == 1, done.stderr
    why = "has not the sha256 that the hub lists" if whole else "is no Parquet file"
    assert "000_00000.parquet" in sentence(done) and why in sentence(done)
    assert not shards_in(tmp_path / "out")


def test_only_what_the_tokens_need_is_fetched(
    gpt2_vocabulary: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """A trial of a few tokens does not download gigabytes."""
    noise = np.random.default_rng(1)
    documents = [[noise.bytes(6000).hex() for _ in range(200)] for _ in range(4)]
    with hub_of(documents) as hub:
        small = ["--val-tokens", 100, "--tokens", 1000]
        done = prepare(hub, gpt2_vocabulary, tmp_path, "--out", "out", *small)
        files = [len(data) for name, data in hub.files.items() if name.startswith("sample")]
    assert done.returncode == 0, done.stderr
    # One unit is the least: here a file fits into one, and of the others only ends are looked at.
    assert hub.served_bytes < 1.5 * files[0] < 0.5 * sum(files)


def ready(train_shards: int = 3, tokens: int = 1000, highest: int = 50256) -> dict[str, bytes]:
    """Shards as llm.c's script writes them, and a file that is none."""
    files = {"README.md": b"# ready shards\n"}
    for number in range(train_shards + 1):
        split = "train" if number else "val"
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = MAGIC, VERSION, tokens
        body = np.random.default_rng(number).integers(0, 50000, tokens).astype("<u2")
        body[0], body[500], body[-1] = END_OF_TEXT, END_OF_TEXT, highest
        files[f"data/edu_{split}_{number:06d}.bin"] = header.tobytes() + body.tobytes()
    return files


def test_ready_shards_are_fetched_as_many_as_needed_and_checked(
    gpt2_vocabulary: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The bytes are the hub's, the manifest counts them, and a fault is tried again."""
    files = ready()
    flags = ["--pretokenized", SHARDS, "--tokens", 1500, "--out", "out"]
    with Hub(SHARDS, files, faults=["garbage", "503", "cut"]) as hub:
        done = prepare(hub, gpt2_vocabulary, tmp_path, *flags)
        assert done.returncode == 0, done.stderr
        more = prepare(hub, gpt2_vocabulary, tmp_path, *flags[:-3], 3000, "--out", "out")
        assert more.returncode == 0 and "shard 1 of 1" in more.stderr
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.dataset, manifest.revision, manifest.complete) == (SHARDS, REVISION, True)
    assert [shard.documents for shard in manifest.shards] == [3, 3, 3, 3]
    assert manifest.tokens("train") == 3000 and manifest.tokens("val") == 1000
    for name, data in files.items():
        if name.endswith(".bin"):
            assert (tmp_path / "out" / Path(name).name).read_bytes() == data
    checked = prepare(None, gpt2_vocabulary, tmp_path, "--verify", "out")
    assert checked.returncode == 0, checked.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir())[-1] == MANIFEST_NAME


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"data/val.bin": b"junk", "data/t.bin": b"junk"}, "val.bin is no token shard"),
        ({"README.md": b"nothing"}, "has no .bin files for training and for validation"),
        (ready(highest=50257), "holds the token 50257, beyond the vocabulary of gpt2"),
        (
            {name: data[:-2] for name, data in ready().items()},
            "header counts 1,000 tokens and the file holds 999",
        ),
    ],
)
def test_ready_shards_that_are_none_are_refused(
    gpt2_vocabulary: Path,  # noqa: F811
    tmp_path: Path,
    files: dict[str, bytes],
    said: str,
) -> None:
    with Hub(SHARDS, files) as hub:
        flags = ["--pretokenized", SHARDS, "--tokens", 1500, "--out", "out"]
        done = prepare(hub, gpt2_vocabulary, tmp_path, *flags)
    assert done.returncode == 2, done.stderr
    assert said in sentence(done)
    assert not shards_in(tmp_path / "out")


def test_a_fetch_of_ready_shards_that_breaks_off_goes_on(
    gpt2_vocabulary: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """What is there stays, and is not fetched again."""
    flags = ["--pretokenized", SHARDS, "--tokens", 3000, "--out", "out"]
    with Hub(SHARDS, ready()) as hub:
        hub.good_answers = 2
        done = prepare(hub, gpt2_vocabulary, tmp_path, *flags)
        assert done.returncode == 1, done.stderr
        assert "2 shards stay in out" in sentence(done)
        hub.good_answers = None
        before = hub.served_bytes
        done = prepare(hub, gpt2_vocabulary, tmp_path, *flags)
        assert done.returncode == 0, done.stderr
        assert hub.served_bytes - before < 3 * (HEADER_BYTES + 2 * 1000)
    assert len(open_split(tmp_path / "out", "train")) == 3


def test_ready_shards_go_on_after_a_kill_before_the_first_was_listed(
    gpt2_vocabulary: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    flags = ["--pretokenized", SHARDS, "--tokens", 3000, "--out", "out"]
    with Hub(SHARDS, ready()) as hub:
        prepare_until_a_shard(hub, gpt2_vocabulary, tmp_path, *flags)
        assert shards_in(tmp_path / "out")
        done = prepare(hub, gpt2_vocabulary, tmp_path, *flags)
        assert done.returncode == 0, done.stderr
    assert len(open_split(tmp_path / "out", "train")) == 3
