"""Failing networks and hubs, ready shards, and how much is downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hub import REVISION, Hub
from huggingface_hub import constants
from preparing import (
    END_OF_TEXT,
    hub_of,
    prepare,
    prepare_here,
    prepare_until_a_shard,
    refused,
    sentence,
)

from nanogauge.errors import RunFailed
from trainer.data.shards import (
    HEADER_BYTES,
    MAGIC,
    MANIFEST_NAME,
    VERSION,
    open_split,
    read_manifest,
)

pytestmark = pytest.mark.usefixtures("gpt2_tokenizer")

SIZES = ["--val-tokens", 1500, "--shard-tokens", 2000, "--tokens", "1e6", "--workers", 2]
FAULTS = ["cut", "garbage", "429", "page", "503", "stall", "garbage", "cut"]
SHARDS = "OWNER/ready"


def shards_in(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.bin")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: None) -> Path:
    home = tmp_path_factory.mktemp("uninterrupted")
    with hub_of() as hub:
        done = prepare(hub, home, "--out", "out", *SIZES)
    assert done.returncode == 0, done.stderr
    return home / "out"


@pytest.mark.parametrize("whole", [False, True])
def test_failed_requests_are_retried_and_the_shards_are_the_same(
    uninterrupted: Path, tmp_path: Path, whole: bool
) -> None:
    flags = [*SIZES, *(["--whole-files"] if whole else [])]
    with hub_of(faults=FAULTS) as hub:
        done = prepare(hub, tmp_path, "--out", "out", *flags)
        assert done.returncode == 0, done.stderr
        assert not hub.faults
    assert shards_in(tmp_path / "out") == shards_in(uninterrupted)
    if not whole:
        return
    # The client's cache is now enough without a network.
    offline = ["--out", "offline", *SIZES, "--name", "sample-10BT"]
    done = prepare(None, tmp_path, *offline, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert shards_in(tmp_path / "offline") == shards_in(uninterrupted)


@pytest.mark.parametrize("whole", [False, True])
def test_a_hub_that_sends_only_garbage_is_named(tmp_path: Path, whole: bool) -> None:
    flags = [*SIZES, *(["--whole-files"] if whole else [])]
    with hub_of(faults=["garbage"] * 200) as hub:
        done = prepare(hub, tmp_path, "--out", "out", *flags)
    assert done.returncode == 1, done.stderr
    reason = "not have the sha256 that the hub lists" if whole else "is not a Parquet file"
    assert "000_00000.parquet" in sentence(done) and reason in sentence(done)
    assert not shards_in(tmp_path / "out")


def test_only_what_the_tokens_need_is_fetched(
    tmp_path: Path,
) -> None:
    noise = np.random.default_rng(1)
    documents = [[noise.bytes(6000).hex() for _ in range(200)] for _ in range(4)]
    with hub_of(documents) as hub:
        small = ["--val-tokens", 100, "--tokens", 1000]
        done = prepare(hub, tmp_path, "--out", "out", *small)
        files = [len(data) for name, data in hub.files.items() if name.startswith("sample")]
    assert done.returncode == 0, done.stderr
    # At least one unit is fetched, here a whole file; of the others, only the footers.
    assert hub.served_bytes < 1.5 * files[0] < 0.5 * sum(files)


def ready(train_shards: int = 3, tokens: int = 1000, highest: int = 50256) -> dict[str, bytes]:
    """Return shards as llm.c's script writes them, and a file that is not a shard."""
    files = {"README.md": b"# ready shards\n"}
    for number in range(train_shards + 1):
        split = "train" if number else "val"
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = MAGIC, VERSION, tokens
        body = np.random.default_rng(number).integers(0, 50000, tokens).astype("<u2")
        body[0], body[500], body[-1] = END_OF_TEXT, END_OF_TEXT, highest
        files[f"data/edu_{split}_{number:06d}.bin"] = header.tobytes() + body.tobytes()
    return files


@pytest.fixture
def ready_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    """Return a function that makes a hub with ready shards, which this process's client uses."""
    monkeypatch.setattr("trainer.data.hub.time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def make(files: dict[str, bytes], faults: Sequence[str] = ()) -> Hub:
        hub = Hub(SHARDS, files, faults=faults)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return hub

    return make


def flags(tokens: int) -> list[object]:
    return ["--pretokenized", SHARDS, "--tokens", tokens, "--out", "out"]


def test_the_needed_ready_shards_are_fetched_and_checked(
    ready_hub: Callable[..., Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ready()
    with ready_hub(files, faults=["garbage", "503", "cut"]):
        prepare_here(tmp_path, *flags(1500))
        prepare_here(tmp_path, *flags(3000))
    assert "shard 1 of 1" in capsys.readouterr().err
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.dataset, manifest.revision, manifest.complete) == (SHARDS, REVISION, True)
    assert [shard.documents for shard in manifest.shards] == [3, 3, 3, 3]
    assert manifest.tokens("train") == 3000 and manifest.tokens("val") == 1000
    for name, data in files.items():
        if name.endswith(".bin"):
            assert (tmp_path / "out" / Path(name).name).read_bytes() == data
    prepare_here(tmp_path, "--verify", "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir())[-1] == MANIFEST_NAME


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"data/val.bin": b"junk", "data/t.bin": b"junk"}, "val.bin is not a token shard"),
        ({"README.md": b"nothing"}, "has no .bin files for training and for validation"),
        (ready(highest=50257), "holds the token 50257, beyond the vocabulary of gpt2"),
        (
            {name: data[:-2] for name, data in ready().items()},
            "header counts 1,000 tokens and the file holds 999",
        ),
    ],
)
def test_invalid_ready_shards_are_refused(
    ready_hub: Callable[..., Hub], tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    with ready_hub(files):
        assert message in refused(tmp_path, *flags(1500))
    assert not shards_in(tmp_path / "out")


def test_an_interrupted_download_of_ready_shards_resumes(
    ready_hub: Callable[..., Hub], tmp_path: Path
) -> None:
    with ready_hub(ready()) as hub:
        hub.good_answers = 2
        with pytest.raises(RunFailed, match="2 shards stay in out"):
            prepare_here(tmp_path, *flags(3000))
        hub.good_answers = None
        before = hub.served_bytes
        prepare_here(tmp_path, *flags(3000))
        assert hub.served_bytes - before < 3 * (HEADER_BYTES + 2 * 1000)
    assert len(open_split(tmp_path / "out", "train")) == 3


def test_a_download_of_ready_shards_resumes_after_a_kill_before_the_first_is_listed(
    ready_hub: Callable[..., Hub], tmp_path: Path
) -> None:
    with ready_hub(ready()) as hub:
        prepare_until_a_shard(hub, tmp_path, *flags(3000))
        assert shards_in(tmp_path / "out")
        prepare_here(tmp_path, *flags(3000))
    assert len(open_split(tmp_path / "out", "train")) == 3
