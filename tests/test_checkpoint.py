"""Checkpoints: damage is detected, each is a snapshot, and a failed write keeps earlier ones."""

import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import CPU, WIDE, Trained, in_a_process, names, same, write_two
from examples import CPU as PROCESSOR
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogauge.config import shape_of
from nanogauge.prediction.memory import predict_memory
from nanogauge.prediction.workload import Workload
from trainer.checkpoints import checkpoint_writer
from trainer.checkpoints.checkpoint import RandomState, newest_checkpoint, random_state, read_meta
from trainer.checkpoints.checkpoint_writer import CheckpointWriter, NotWritten, Written


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write_two(folder)
    return folder


def test_a_checkpoint_restores_every_bit(tmp_path: Path) -> None:
    trained = Trained()
    trained.step()
    written = trained.save(CheckpointWriter(tmp_path, keep=1), 7, val_loss=3.5)
    assert isinstance(written, Written)
    assert written.path == tmp_path / "step_00000007"
    assert written.bytes == sum(file.stat().st_size for file in written.path.iterdir())
    before, numbers = trained.state(), torch.rand(5)
    fresh = Trained()
    assert fresh.load(written.path)
    assert same(fresh.state(), before)
    assert torch.equal(torch.rand(5), numbers)
    assert fresh.model.lm_head.weight is fresh.model.embedding.weight
    meta = read_meta(written.path)
    assert (meta.step, meta.val_loss) == (7, 3.5)
    assert (meta.data, meta.run) == ({"samples": 56}, {"wandb_id": "é", "best": 3.25})
    weights = {k: v for k, v in before.items() if k in dict(fresh.model.named_parameters())}
    by_the_library = safetensors.torch.save(weights)
    assert (written.path / "model.safetensors").read_bytes() == by_the_library


def test_random_states_are_restored_per_rank_for_the_same_world_size(tmp_path: Path) -> None:
    states: list[RandomState] = []
    expected = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(random_state(CPU))
        expected.append(torch.rand(3))
    trained, checkpoints = Trained(), CheckpointWriter(tmp_path, keep=1)
    trained.begin(checkpoints, 1, random_states=states)
    checkpoints.wait()
    path, _ = newest_checkpoint(tmp_path)
    assert path is not None
    for rank in (0, 1):
        assert trained.load(path, rank, world=2)
        assert torch.equal(torch.rand(3), expected[rank])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert not trained.load(path, 0, world=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "meta.json"])
def test_any_damage_to_a_file_is_detected(two: Path, tmp_path: Path, name: str) -> None:
    """Truncated, extended or with one bit flipped: the checkpoint before it is used."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    file, source = folder / "step_00000002" / name, random.Random(name)
    data = file.read_bytes()
    damaged = [data[: source.randrange(len(data))] for _ in range(50)]
    for bit in source.sample(range(8 * len(data)), 50):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    damaged += [data + b"\n", data.replace(b"\n", b"\r\n", 1) + b" ", b""]
    for content in damaged:
        file.write_bytes(content)
        warning = f"the checkpoint {file.parent} is damaged and was skipped"
        assert newest_checkpoint(folder) == (folder / "step_00000001", [warning])
    file.write_bytes(data)
    assert newest_checkpoint(folder) == (folder / "step_00000002", [])


def test_a_checkpoint_is_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps made while it is written change nothing, and the next one reuses its memory."""
    trained = Trained()
    trained.step()
    checkpoints = CheckpointWriter(tmp_path, keep=2)
    torch.manual_seed(5)
    expected = trained.state()
    really = checkpoint_writer.write_files
    places: list[set[int]] = []

    def held_up(folder: Path, weights: dict[str, torch.Tensor], *rest: object) -> int:
        trained.step()
        trained.step()
        places.append({weight.data_ptr() for weight in weights.values()})
        return really(folder, weights, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_writer, "write_files", held_up)
    trained.begin(checkpoints, 1)
    checkpoints.wait()
    assert isinstance(*checkpoints.done(), Written)
    assert not same(trained.state(), expected)
    fresh = Trained()
    assert fresh.load(tmp_path / "step_00000001")
    assert same(fresh.state(), expected)
    trained.save(checkpoints, 2)
    assert places[0] == places[1]


def test_an_exception_in_the_writer_thread_is_raised_in_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise KeyError("a bug")

    trained, checkpoints = Trained(), CheckpointWriter(tmp_path, keep=1)
    monkeypatch.setattr(checkpoint_writer, "write_files", broken)
    trained.begin(checkpoints, 1)
    with pytest.raises(KeyError, match="a bug"):
        checkpoints.wait()
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is reset, and the heap trimmed")
def test_the_copy_takes_the_predicted_memory(tmp_path: Path) -> None:
    """12 B per parameter from the first checkpoint on, and nothing more while one is written."""
    done = in_a_process(
        "import ctypes, json\n"
        "from nanogauge.measure.host import peak_process_bytes, process_bytes, reset_peak\n"
        "trained.save(checkpoints, 1)\n"  # loads what writing needs
        "trained, checkpoints = Trained(WIDE), CheckpointWriter(Path(sys.argv[1]), keep=1)\n"
        "trained.step()\n"
        "held = []\n"
        "ctypes.CDLL(None).malloc_trim(0)\n"  # what was taken for gradients
        "for step in (2, 3):\n"
        "    reset_peak()\n"
        "    held.append(process_bytes())\n"
        "    trained.save(checkpoints, step)\n"
        "    held.append(peak_process_bytes())\n"
        "print(json.dumps(held))\n",
        tmp_path,
    )
    before, first, again, second = json.loads(done.stdout)
    work = Workload(shape_of(WIDE), micro_batch=2, grad_accum=1, dtype="float32", compiled=False)
    plain, copied = (predict_memory(work, PROCESSOR, when) for when in ("never", "in training"))
    copy = copied.allocated.expected - plain.allocated.expected
    assert copy == pytest.approx(first - before, rel=0.1)
    assert second - again < 0.05 * (first - before)
    last = predict_memory(work, PROCESSOR, "at the end")
    assert plain.allocated.low <= last.allocated.low <= copied.allocated.low


@pytest.mark.parametrize(("call", "step"), [("fsync", 3), ("replace", 2)])
def test_a_process_killed_in_a_write_keeps_earlier_checkpoints(two: Path, tmp_path: Path, call: str, step: int) -> None:
    """Killed before a file is flushed, or before the folder gets its final name."""
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


@settings(max_examples=10, deadline=None)
@given(st.lists(st.none() | st.sampled_from([3.0, 2.5, 2.0, float("inf")]), min_size=1, max_size=5), st.integers(1, 3))
def test_the_newest_and_the_best_are_kept(losses: list[float | None], keep: int) -> None:
    """All of the newest, and at most one more with the least loss; also after a restart."""
    trained = Trained()
    finite = {n: None if x == float("inf") else x for n, x in enumerate(losses, 1)}
    known: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for step, loss in enumerate(losses, 1):
            if step in (1, 3):
                checkpoints = CheckpointWriter(Path(name), keep)
            trained.save(checkpoints, step, loss)
            kept = {int(folder.removeprefix("step_")) for folder in names(Path(name))}
            newest = set(range(max(step - keep, 0) + 1, step + 1))
            known += [value for value in [finite[step]] if value is not None]
            assert newest <= kept and len(kept - newest) <= 1
            assert all(finite[old] == min(known) for old in kept - newest)
            assert not known or min(known) in [finite[each] for each in kept]


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[int], free: float, left: Any
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

    def usage(folder: Path) -> SimpleNamespace:
        held = sum(file.stat().st_size for file in folder.rglob("*.*") if file.is_file())
        return SimpleNamespace(free=max(int((len(there) + free) * one) - held, 0))

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
