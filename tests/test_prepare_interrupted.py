"""Preparations that are killed, damaged or out of disk space, and resumed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from preparing import command, contents, environment, parquet, prepare_here, prepare_until_a_shard, refused

from nanogauge.errors import BadInput
from trainer.data.shards import MANIFEST_NAME, open_split, read_manifest

pytestmark = pytest.mark.usefixtures("gpt2_tokenizer")

KILLS = 4
SIZES = ["--dataset", "texts", "--tokens", 1_600_000, "--val-tokens", 60_000]
SIZES += ["--shard-tokens", 300_000, "--workers", 2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four files of texts, each of eight units or more."""
    home = tmp_path_factory.mktemp("home")
    chance = random.Random(5)
    (home / "texts").mkdir()
    words = ["the ", "cell ", "wall ", "\u80fd\u91cf", "\n\n", "energy, ", "1,024 ", "don't "]
    for name in ("a.jsonl", "b.parquet", "c.jsonl", "d.parquet"):
        texts: list[str] = []
        while sum(map(len, texts)) < 2**21:
            texts += ["".join(chance.choices(words, k=int(chance.lognormvariate(5, 1)))) for _ in range(100)]
        if name.endswith(".parquet"):
            (home / "texts" / name).write_bytes(parquet(texts))
        else:
            lines = [json.dumps({"text": text}) + "\n" for text in texts]
            (home / "texts" / name).write_text("".join(lines))
    return home


@pytest.fixture(scope="module")
def uninterrupted(home: Path, gpt2_tokenizer: None) -> Path:
    prepare_here(home, *SIZES, "--out", "whole")
    return home / "whole"


@pytest.fixture
def copy(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of the uninterrupted shards, to be damaged."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "copy"))


def test_shards_are_identical_after_kills_at_random_moments(home: Path, uninterrupted: Path) -> None:
    def files() -> set[str]:
        return {path.name for path in (home / "killed").rglob("*")}

    chance = random.Random(11)
    flags = [*SIZES, "--out", "killed"]
    killed = 0
    for number in range(KILLS):
        before = files()
        process = subprocess.Popen(
            command(*flags),
            env=environment(None, home),
            cwd=home,
            start_new_session=True,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        while process.poll() is None and files() == before:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        if number % 2:
            process.kill()  # the workers must end by themselves
        else:
            os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= KILLS // 2
    for _ in range(2):  # the second call finds nothing to do
        prepare_here(home, *flags)
        assert contents(home / "killed") == contents(uninterrupted)


def test_a_preparation_resumes_after_a_kill_before_the_first_shard_is_listed(home: Path, uninterrupted: Path) -> None:
    flags = [*SIZES, "--out", "between"]
    prepare_until_a_shard(None, home, *flags)
    assert (home / "between" / "fineweb_val_000000.bin").exists()
    with pytest.raises(BadInput, match=r"run the same prepare_fineweb\.py command again"):
        open_split(home / "between", "val")
    message = refused(home, *flags, "--dataset", "texts/a.jsonl")
    assert "was begun with another --dataset (texts, not texts/a.jsonl)" in message
    prepare_here(home, *flags)
    assert contents(home / "between") == contents(uninterrupted)


def test_more_tokens_extend_the_shards(home: Path, uninterrupted: Path) -> None:
    """The last shard was cut at the former target, so it is rewritten."""
    prepare_here(home, *SIZES, "--out", "less", "--tokens", 700_000)
    assert read_manifest(home / "less").tokens("train") == 700_000
    prepare_here(home, *SIZES, "--out", "less")
    assert contents(home / "less") == contents(uninterrupted)


def test_a_manifest_of_another_tokenizer_is_refused(home: Path, copy: Path) -> None:
    path = copy / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"tokenizer_sha256": "0" * 64, "complete": False}))
    assert "was begun with another vocabulary" in refused(home, *SIZES, "--out", copy)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard-tokens", 400_000], "another --shard-tokens (300000, not 400000)"),
        (["--val-tokens", 70_000], "another --val-tokens"),
        (["--dataset", "texts/a.jsonl"], "another --dataset (texts, not texts/a.jsonl)"),
    ],
)
def test_other_settings_than_before_are_refused(
    home: Path, uninterrupted: Path, flags: list[object], message: str
) -> None:
    before = contents(uninterrupted)
    assert message in refused(home, *SIZES, "--out", "whole", *flags)
    assert contents(uninterrupted) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few shards."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_predicted_and_keeps_the_finished_shards(
    home: Path, uninterrupted: Path, small_disk: Path
) -> None:
    out = small_disk / "out"
    flags = [*SIZES, "--out", out]
    assert re.search(r"need \d\d.\d MB, and .* MB free", refused(home, *flags, "--tokens", "3e7"))
    assert not out.exists()

    # The shards seem to fit; another file fills the disk meanwhile.
    flags += ["--shard-tokens", 60_000, "--workers", 1, "--tokens", 1_000_000]
    process = subprocess.Popen(
        command(*flags), env=environment(None, home), cwd=home, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not ((out / MANIFEST_NAME).exists() and read_manifest(out).shards):
        time.sleep(0.002)
    with (small_disk / "other").open("wb") as file, pytest.raises(OSError, match="space"):
        while True:
            file.write(bytes(2**20))
            file.flush()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    message = errors.strip().splitlines()[-1]
    assert "cannot write to" in message and "No space left on device" in message
    assert "run the same command again" in message and "Traceback" not in errors
    assert read_manifest(out).tokens("val") >= 60_000
    (small_disk / "other").unlink()
    prepare_here(home, *flags)
    whole = np.concatenate(open_split(uninterrupted, "train"))[:1_000_000]
    assert np.array_equal(np.concatenate(open_split(out, "train")), whole)


def test_a_folder_is_locked_against_a_second_preparation(home: Path) -> None:
    import fcntl

    (home / "locked").mkdir()
    descriptor = os.open(home / "locked", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    message = refused(home, *SIZES, "--out", "locked")
    os.close(descriptor)
    assert "another preparation is running in locked" in message
