"""Interrupted at any moment, damaged or out of room: what is good stays, the rest comes again."""

from __future__ import annotations

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
from gpt2_vocabulary import gpt2_vocabulary  # noqa: F401  (a fixture)
from preparing import (
    command,
    environment,
    parquet,
    prepare,
    prepare_until_a_shard,
    sentence,
)

from nanogauge.errors import BadInput
from trainer.data.shards import MANIFEST_NAME, open_split, read_manifest

KILLS = 6
SIZES = ["--dataset", "texts", "--tokens", 1_600_000, "--val-tokens", 60_000]
SIZES += ["--shard-tokens", 300_000, "--workers", 2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four files of texts, of eight units and more."""
    home = tmp_path_factory.mktemp("home")
    chance = random.Random(5)
    (home / "texts").mkdir()
    words = ["the ", "cell ", "wall ", "\u80fd\u91cf", "\n\n", "energy, ", "1,024 ", "don't "]
    for name in ("a.jsonl", "b.parquet", "c.jsonl", "d.parquet"):
        texts: list[str] = []
        while sum(map(len, texts)) < 2**21:
            texts += [
                "".join(chance.choices(words, k=int(chance.lognormvariate(5, 1))))
                for _ in range(100)
            ]
        if name.endswith(".parquet"):
            (home / "texts" / name).write_bytes(parquet(texts))
        else:
            lines = [json.dumps({"text": text}) + "\n" for text in texts]
            (home / "texts" / name).write_text("".join(lines))
    return home


@pytest.fixture(scope="module")
def undisturbed(home: Path, gpt2_vocabulary: Path) -> Path:  # noqa: F811
    done = prepare(None, gpt2_vocabulary, home, *SIZES, "--out", "whole")
    assert done.returncode == 0, done.stderr
    return home / "whole"


def progress(folder: Path) -> set[str]:
    """Names of what is in a folder and its pieces: they change when there is more."""
    return {path.name for path in folder.rglob("*")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_at_random_moments_and_resumed_the_shards_are_the_same(
    home: Path,
    undisturbed: Path,
    gpt2_vocabulary: Path,  # noqa: F811
) -> None:
    """No document is lost or doubled: every file is byte-identical, the manifest as well."""
    chance = random.Random(11)
    flags = [*SIZES, "--out", "killed"]
    variables = environment(None, gpt2_vocabulary, home)
    killed = 0
    for number in range(KILLS):
        before = progress(home / "killed")
        process = subprocess.Popen(
            command(*flags), env=variables, cwd=home, start_new_session=True, stderr=-3, stdout=-3
        )
        while process.poll() is None and progress(home / "killed") == before:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        if number % 2:
            process.kill()  # the workers are left alone, and must end by themselves
        else:
            os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= KILLS // 2
    done = prepare(None, gpt2_vocabulary, home, *flags)
    assert done.returncode == 0, done.stderr
    assert contents(home / "killed") == contents(undisturbed)
    again = prepare(None, gpt2_vocabulary, home, *flags)
    assert again.returncode == 0 and "1,600,000 training tokens" in again.stdout
    assert contents(home / "killed") == contents(undisturbed)


def test_killed_between_a_shard_and_its_entry_the_preparation_goes_on(
    home: Path,
    undisturbed: Path,
    gpt2_vocabulary: Path,  # noqa: F811
) -> None:
    """A shard in a folder without a manifest was taken for another tool's, and refused."""
    flags = [*SIZES, "--out", "between"]
    prepare_until_a_shard(None, gpt2_vocabulary, home, *flags)
    assert (home / "between" / "fineweb_val_000000.bin").exists()
    with pytest.raises(BadInput, match=r"run the same prepare_fineweb\.py command again"):
        open_split(home / "between", "val")
    other = prepare(None, gpt2_vocabulary, home, *flags, "--dataset", "texts/a.jsonl")
    assert other.returncode == 2
    assert "was begun with another --dataset (texts, not texts/a.jsonl)" in sentence(other)
    done = prepare(None, gpt2_vocabulary, home, *flags)
    assert done.returncode == 0, done.stderr
    assert contents(home / "between") == contents(undisturbed)


def test_pieces_that_no_manifest_tells_the_source_of_are_made_again(
    home: Path,
    undisturbed: Path,
    gpt2_vocabulary: Path,  # noqa: F811
) -> None:
    """Pieces of another source, left by a call that was killed early, became part of the shards."""
    (home / "other").mkdir()
    (home / "other" / "a.jsonl").write_text(json.dumps({"text": "another " * 10**6}) + "\n")
    flags = [*SIZES[2:], "--out", "early"]
    process = subprocess.Popen(
        command("--dataset", "other", *flags),
        env=environment(None, gpt2_vocabulary, home),
        cwd=home,
        start_new_session=True,
    )
    while process.poll() is None and not list(home.glob("early/.pieces/*.piece")):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (home / "early" / MANIFEST_NAME).unlink()
    done = prepare(None, gpt2_vocabulary, home, "--dataset", "texts", *flags)
    assert done.returncode == 0, done.stderr
    assert contents(home / "early") == contents(undisturbed)


def test_more_tokens_go_on_from_the_end_and_are_those_of_one_call(
    home: Path,
    undisturbed: Path,
    gpt2_vocabulary: Path,  # noqa: F811
) -> None:
    """The last shard was cut at the former target: it is filled, and nothing else is done again."""
    flags = [*SIZES, "--out", "less"]
    flags[flags.index(1_600_000)] = 700_000
    assert prepare(None, gpt2_vocabulary, home, *flags).returncode == 0
    assert read_manifest(home / "less").tokens("train") == 700_000
    done = prepare(None, gpt2_vocabulary, home, *SIZES, "--out", "less")
    assert done.returncode == 0, done.stderr
    assert contents(home / "less") == contents(undisturbed)


@pytest.fixture
def damaged(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged, of the undisturbed shards."""
    return Path(shutil.copytree(undisturbed, tmp_path / "damaged"))


@pytest.mark.parametrize("damage", ["a flipped byte", "a truncated shard", "a missing shard"])
def test_a_damaged_shard_is_named_and_made_again_alone(
    home: Path,
    undisturbed: Path,
    damaged: Path,
    gpt2_vocabulary: Path,  # noqa: F811
    damage: str,
) -> None:
    """One sentence with the remedy; the remedy gives the same bytes and touches no other shard."""
    path = damaged / "fineweb_train_000003.bin"
    if damage == "a flipped byte":
        tokens = np.memmap(path, np.uint8, "r+")
        tokens[7777] ^= 1
        tokens.flush()
    elif damage == "a truncated shard":
        os.truncate(path, 40_000)
    else:
        path.unlink()
    others = {p: p.stat().st_mtime_ns for p in damaged.iterdir() if p != path}

    done = prepare(None, gpt2_vocabulary, home, "--verify", damaged)
    assert done.returncode == 2, done.stderr
    said = sentence(done)
    assert f"1 of 7 shards in {damaged} are damaged: {path.name} (" in said
    assert said.endswith(f"run: python prepare_fineweb.py --repair {damaged}")
    assert prepare(None, gpt2_vocabulary, home, "--repair", damaged).returncode == 0
    assert contents(damaged) == contents(undisturbed)
    assert {p: p.stat().st_mtime_ns for p in others} == others
    done = prepare(None, gpt2_vocabulary, home, "--verify", damaged)
    assert done.returncode == 0 and "7 shards with" in done.stdout


def test_a_manifest_of_another_tokenizer_is_refused(
    home: Path,
    damaged: Path,
    gpt2_vocabulary: Path,  # noqa: F811
) -> None:
    """Tokens of two vocabularies in one folder would be noise that nothing notices."""
    path = damaged / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"tokenizer_sha256": "0" * 64, "complete": False}))
    checked = prepare(None, gpt2_vocabulary, home, "--verify", damaged)
    assert checked.returncode == 2
    assert "is of another tokenizer than the gpt2 that is here" in sentence(checked)
    resumed = prepare(None, gpt2_vocabulary, home, *SIZES, "--out", damaged)
    assert resumed.returncode == 2
    assert "was begun with another vocabulary" in sentence(resumed)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shard-tokens", 400_000], "another --shard-tokens (300000, not 400000)"),
        (["--val-tokens", 70_000], "another --val-tokens"),
        (["--dataset", "other.jsonl"], "another --dataset (texts, not other.jsonl)"),
    ],
)
def test_other_settings_than_before_are_refused(
    home: Path,
    undisturbed: Path,
    gpt2_vocabulary: Path,  # noqa: F811
    flags: list[object],
    said: str,
) -> None:
    before = contents(undisturbed)
    done = prepare(None, gpt2_vocabulary, home, *SIZES, "--out", "whole", *flags)
    assert done.returncode == 2, done.stderr
    assert said in sentence(done)
    assert contents(undisturbed) == before


def test_a_source_that_changed_in_between_is_refused(
    home: Path,
    damaged: Path,
    gpt2_vocabulary: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Going on in another file would lose some documents and double others."""
    manifest = json.loads((damaged / MANIFEST_NAME).read_text())
    (damaged / MANIFEST_NAME).write_text(json.dumps(manifest | {"complete": False}))
    shutil.copytree(home / "texts", tmp_path / "texts")
    reached = manifest["source_files"][-1]["name"]
    (tmp_path / "texts" / reached).write_bytes(parquet(["one more"]))
    more = [*SIZES, "--out", damaged, "--tokens", 2_000_000]
    done = prepare(None, gpt2_vocabulary, tmp_path, *more)
    assert done.returncode == 2, done.stderr
    assert reached.endswith(
        ".parquet"
    ) and f"{reached} is not the file that this preparation began with" in sentence(done)
    (tmp_path / "texts" / "0.jsonl").write_text('{"text": "a new one"}\n')
    done = prepare(None, gpt2_vocabulary, tmp_path, *more)
    assert done.returncode == 2 and "has other files than when" in sentence(done)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few shards."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root alone")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_fills_up_is_told_before_and_loses_nothing_if_it_comes_later(
    home: Path,
    undisturbed: Path,
    gpt2_vocabulary: Path,  # noqa: F811
    small_disk: Path,
) -> None:
    """Finished shards stay, and with more room the same command ends with the same bytes."""
    out = small_disk / "out"
    flags = [*SIZES, "--out", out]
    told = prepare(None, gpt2_vocabulary, home, *flags, "--tokens", "1e7")
    assert told.returncode == 2 and re.search(r"need \d\d.\d MB, and .* MB free", sentence(told))
    assert not out.exists()

    # Small shards, so that they seem to fit; what else is written meanwhile fills the disk.
    flags += ["--shard-tokens", 60_000, "--workers", 1, "--tokens", 1_000_000]
    process = subprocess.Popen(
        command(*flags, "--memory", "1GiB"),
        env=environment(None, gpt2_vocabulary, home),
        cwd=home,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (
        (out / MANIFEST_NAME).exists() and read_manifest(out).shards
    ):
        time.sleep(0.002)
    with (small_disk / "other").open("wb") as file, pytest.raises(OSError, match="space"):
        while True:
            file.write(bytes(2**20))
            file.flush()
    _, told_last = process.communicate(timeout=60)
    assert process.returncode == 1, told_last
    said = told_last.strip().splitlines()[-1]
    assert "cannot write to" in said and "No space left on device" in said
    assert "run the same command again" in said and "Traceback" not in told_last
    assert read_manifest(out).tokens("val") >= 60_000
    (small_disk / "other").unlink()
    done = prepare(None, gpt2_vocabulary, home, *flags)
    assert done.returncode == 0, done.stderr
    whole = np.concatenate(open_split(undisturbed, "train"))[:1_000_000]
    assert np.array_equal(np.concatenate(open_split(out, "train")), whole)


def test_two_calls_do_not_work_in_one_folder(
    home: Path,
    gpt2_vocabulary: Path,  # noqa: F811
) -> None:
    """The second is told, and the first is not disturbed."""
    import fcntl

    (home / "held").mkdir()
    held = os.open(home / "held", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    done = prepare(None, gpt2_vocabulary, home, *SIZES, "--out", "held")
    os.close(held)
    assert done.returncode == 2
    assert "another preparation is at work in held" in sentence(done)
