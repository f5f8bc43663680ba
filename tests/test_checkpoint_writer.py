"""Which checkpoints are on disk after writes that succeed or fail."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Trained, in_a_process, names, write_two
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoints import checkpoint_writer
from trainer.checkpoints.checkpoint import newest_checkpoint, read_meta
from trainer.checkpoints.checkpoint_writer import CheckpointWriter, NotWritten, Written, kept_steps


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with intact checkpoints at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_two(folder)
    return folder


@pytest.mark.parametrize(("call", "step"), [("fsync", 3), ("replace", 2)])
def test_a_process_killed_in_a_write_keeps_earlier_checkpoints(
    two: Path, tmp_path: Path, call: str, step: int
) -> None:
    """Killed before a file is flushed, or before the folder gets its final name.

    The next write removes the rest.
    """
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    killed = in_a_process(
        f"import os, signal\nreally = os.{call}\n"
        "def deadly(first, *rest):\n"
        "    if isinstance(first, int) or '.step_' in str(first):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return really(first, *rest)\n"
        f"os.{call} = deadly\ntrained.save(checkpoints, {step})\n",
        folder,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    newest, damaged = newest_checkpoint(folder)
    assert newest is not None and read_meta(newest).step == 2
    assert damaged == []
    assert any(name.endswith(".tmp") for name in names(folder))
    assert isinstance(Trained().save(CheckpointWriter(folder, keep=3), 3), Written)
    assert names(folder) == ["step_00000001", "step_00000002", "step_00000003"]
    assert newest_checkpoint(folder) == (folder / "step_00000003", [])


@given(
    st.dictionaries(st.integers(0, 99), st.none() | st.floats(0, 9), min_size=1), st.integers(1, 5)
)
def test_the_newest_and_the_best_are_kept(losses: dict[int, float | None], keep: int) -> None:
    """All of the newest, and at most one more with the least loss."""
    kept = kept_steps(losses, keep)
    newest = {step for step in losses if sum(other > step for other in losses) < keep}
    assert newest <= kept
    known = [loss for loss in losses.values() if loss is not None]
    others = kept - newest
    assert len(others) <= 1
    assert all(losses[step] == min(known) for step in others)
    assert not known or min(known) in [losses[step] for step in kept]


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.none() | st.sampled_from([3.0, 2.5, 2.0, float("inf")]), min_size=1, max_size=5),
    st.integers(1, 3),
)
def test_the_disk_holds_what_the_rule_keeps(losses: list[float | None], keep: int) -> None:
    """Also after a restart, by the folders that exist."""
    trained = Trained()
    finite = {n: None if x == float("inf") else x for n, x in enumerate(losses, 1)}
    with tempfile.TemporaryDirectory() as name:
        checkpoints = CheckpointWriter(Path(name), keep)
        there: dict[int, float | None] = {}
        for step, loss in enumerate(losses, 1):
            if step == 3:
                checkpoints = CheckpointWriter(Path(name), keep)
            trained.save(checkpoints, step, loss)
            there[step] = finite[step]
            there = {step: there[step] for step in kept_steps(there, keep)}
        assert names(Path(name)) == [f"step_{step:08d}" for step in sorted(there)]


def test_checkpoints_after_a_rollback_replace_later_ones(two: Path, tmp_path: Path) -> None:
    """A resumed run must not find the later one as the newest; a damaged one does not count."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    os.rename(folder / "step_00000002", folder / "step_00000009")
    shutil.copytree(folder / "step_00000001", folder / "step_00000004")
    (folder / "step_00000004" / "state.pt").write_bytes(b"")
    (folder / "step_00000001_of_mine").mkdir()
    trained = Trained()
    assert isinstance(trained.save(CheckpointWriter(folder, keep=2), 5), Written)
    assert names(folder) == ["step_00000001", "step_00000001_of_mine", "step_00000005"]


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("there", "free", "left"),
    [
        ([1, 2, 3, 4], 1.2, [1, 2, 3, 4]),
        ([1, 2, 3, 4], 0.2, [1, 4]),  # the best, and the newest
        ([1, 4], 0.2, [4]),
        ([1, 4], 0.0, None),  # with the best removed there would still be too little
        ([4], 0.9, None),
    ],
)
def test_a_full_disk_removes_the_oldest_first_and_only_if_that_helps(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    there: list[int],
    free: float,
    left: list[int] | None,
) -> None:
    """What is left when the fifth is written, by how many more fit; None if it is not written."""
    trained, checkpoints = Trained(), CheckpointWriter(tmp_path, keep=4)
    trained.step()
    sizes = [trained.save(checkpoints, step, val_loss=float(step)) for step in there]
    assert isinstance(sizes[0], Written)
    one = sizes[0].bytes
    before = names(tmp_path)
    seen: list[list[str]] = []
    really = checkpoint_writer.write_files

    def usage(folder: Path) -> Usage:
        held = sum(file.stat().st_size for file in folder.rglob("*.*") if file.is_file())
        return Usage(0, 0, max(int((len(there) + free) * one) - held, 0))

    def write_files(*arguments: Any) -> int:
        seen.append([name for name in names(tmp_path) if not name.startswith(".")])
        return really(*arguments)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(checkpoint_writer, "write_files", write_files)
    ended = trained.save(checkpoints, 5, val_loss=9.0)
    if left is None:
        assert isinstance(ended, NotWritten)
        assert re.fullmatch(r"needs 0\.\d MB and 0\.\d MB are free", ended.reason)
        assert names(tmp_path) == before
    else:
        assert isinstance(ended, Written)
        assert seen == [[f"step_{step:08d}" for step in left]]


def test_a_failed_write_keeps_earlier_checkpoints(two: Path, tmp_path: Path) -> None:
    """A limit on file sizes fails the write of the weights, or of the optimizer's state."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    done = in_a_process(
        "from resource import *\n"
        "for kilobytes in (20, 100):\n"
        "    setrlimit(RLIMIT_FSIZE, (kilobytes * 1024, RLIM_INFINITY))\n"
        "    print(trained.save(checkpoints, 3))\n",
        folder,
    )
    failure = "NotWritten(step=3, reason='File too large')\n"
    assert done.stdout == 2 * failure, done.stderr
    assert names(folder) == ["step_00000001", "step_00000002"]
    assert newest_checkpoint(folder) == (folder / "step_00000002", [])
    sizes = {f.name: f.stat().st_size for f in (two / "step_00000002").iterdir()}
    assert 20 * 1024 < sizes["model.safetensors"] < 100 * 1024 < sizes["state.pt"]
