"""Beyond one machine: ranks take source files, and their manifests become one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gpt2_vocabulary import gpt2_vocabulary  # noqa: F401  (a fixture)
from preparing import TEXTS, prepare, sentence, texts_of

from nanogauge.prepare.placing import rank_and_world
from nanogauge.prepare.shards import open_split, read_manifest

FLAGS = ["--dataset", "source", "--tokens", "1e6", "--val-tokens", 500, "--shard-tokens", 2000]


@pytest.fixture
def home(
    tmp_path: Path,
    gpt2_vocabulary: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_vocabulary))
    (tmp_path / "source").mkdir()
    for number in range(5):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[number::5]]
        (tmp_path / "source" / f"{number}.jsonl").write_text("".join(lines))
    return tmp_path


def test_the_last_rank_to_finish_joins_all(
    home: Path,
    gpt2_vocabulary: Path,  # noqa: F811
) -> None:
    """As torchrun or SLURM start them, in any order; each document is in one split, once."""
    for rank in (1, 0):
        done = prepare(
            *(None, gpt2_vocabulary, home, *FLAGS, "--out", "out"),
            RANK=str(rank),
            WORLD_SIZE="2",
        )
        assert done.returncode == 0, done.stderr
        assert (home / "out" / "manifest.json").exists() == (rank == 0)
    manifest = read_manifest(home / "out")
    assert [file.name for file in manifest.source_files] == [f"{n}.jsonl" for n in (0, 2, 4, 1, 3)]
    splits = [np.concatenate(open_split(home / "out", split)) for split in ("val", "train")]
    assert sorted(t for split in splits for t in texts_of(split)) == sorted(TEXTS)
    assert manifest.tokens("val") >= 500
    checked = prepare(None, gpt2_vocabulary, home, "--verify", "out")
    assert checked.returncode == 0, checked.stderr


def test_folders_of_several_desktops_are_merged(
    home: Path,
    gpt2_vocabulary: Path,  # noqa: F811
) -> None:
    """Linked where they are merged, and refused if one comes twice or is of something else."""
    for rank in range(2):
        flags = [*FLAGS, "--out", f"desk{rank}", "--rank", rank, "--world", 2]
        assert prepare(None, gpt2_vocabulary, home, *flags).returncode == 0
    folders = [f"desk{rank}/rank_0000{rank}_of_00002" for rank in range(2)]
    twice = prepare(None, None, home, "--merge", folders[0], folders[0], "--out", "both")
    assert twice.returncode == 2 and "two of the folders are of the same part" in sentence(twice)
    done = prepare(None, None, home, "--merge", *folders, "--out", "all")
    assert done.returncode == 0, done.stderr
    splits = [np.concatenate(open_split(home / "all", split)) for split in ("val", "train")]
    assert sorted(t for split in splits for t in texts_of(split)) == sorted(TEXTS)
    assert prepare(None, gpt2_vocabulary, home, "--verify", "all").returncode == 0

    path = home / folders[1] / "manifest.json"
    path.write_text(path.read_text().replace('"dataset": "source"', '"dataset": "another"'))
    other = prepare(None, None, home, "--merge", *folders, "--out", "mixed")
    assert other.returncode == 2 and "do not belong together: their dataset" in sentence(other)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (1, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_ARRAY_TASK_ID": "12",
          "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "4"}, (2, 4)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "3",
          "SLURM_ARRAY_TASK_COUNT": "4"}, (2, 4)),
    ],
)  # fmt: skip
def test_torchrun_and_slurm_tell_the_rank(
    environment: dict[str, str], expected: tuple[int, int]
) -> None:
    assert rank_and_world(None, None, environment) == expected
    assert rank_and_world(1, 2, environment) == (1, 2)
