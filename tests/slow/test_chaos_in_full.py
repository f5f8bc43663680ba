"""A hundred kills, a hundred runs with failing writes, and ten thousand broken inputs."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

import pytest
from slow.broken_inputs import broken_inputs
from slow.demo_runs import begin, damaged, weights
from slow.failing_writes import let_writes_fail

from nanogauge.runlog.reader import read_log

KILLS = 100
STEPS = 6000
FLAGS = [
    *("--model.n-layer=2", "--model.n-head=2", "--model.n-embd=64", "--model.block-size=64"),
    *("--model.dropout=0.1", "--train.micro-batch=4", "--train.grad-accum=2"),
    *(f"--train.max-steps={STEPS}", "--train.eval-every=40", "--train.eval-batches=4"),
    *("--train.checkpoint-every=20", "--wandb.mode=disabled"),
]
LONGEST_LIFE_SECONDS = 2.5
"""after the first new line of the log: some hundred steps"""


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_run_killed_again_and_again_has_the_bits_of_the_undisturbed_one(
    tmp_path: Path, compiled: str
) -> None:
    flags = [f"--run.out={tmp_path}", f"--run.compile={compiled}", *FLAGS]
    finish("--run.name=undisturbed", *flags)
    killed = ["--run.name=killed", *flags]
    chance, folder = random.Random(1), tmp_path / "killed"
    for kill in range(KILLS):
        resumed = ["--resume=auto"] if kill else []
        assert kill_once(folder, chance, *killed, *resumed), f"it ended before kill {kill}"
        assert not [name for name in damaged(folder) if name.startswith("log.jsonl")]
    finish("--resume=auto", *killed)

    folders = (tmp_path / "undisturbed", folder)
    assert len({weights(each, STEPS) for each in folders}) == 1
    logs = [read_log(each) for each in folders]
    steps = [[(s.step, s.loss, s.grad_norm, s.learning_rate) for s in log.steps] for log in logs]
    assert steps[0] == steps[1]
    evals = [[(e.step, e.train_loss, e.val_loss) for e in log.evals] for log in logs]
    assert evals[0] == evals[1]


def finish(*flags: str) -> None:
    process = begin(*flags)
    _, said = process.communicate()
    assert process.returncode == 0, said


def kill_once(folder: Path, chance: random.Random, *flags: str) -> bool:
    """Kill a run, one time in three in a checkpoint; return False if it ended before."""

    def writes_checkpoint() -> bool:
        for path in (folder / "checkpoints").glob(".step_*"):
            with contextlib.suppress(OSError):  # it was renamed in between
                if path.stat().st_mtime > began:
                    return True
        return False

    log = folder / "log.jsonl"
    size = log.stat().st_size if log.exists() else 0
    began = time.time()
    process = begin(*flags)
    while process.poll() is None and not (log.exists() and log.stat().st_size > size):
        time.sleep(0.005)
    ends = time.monotonic() + chance.uniform(0, LONGEST_LIFE_SECONDS)
    in_checkpoint = chance.random() < 1 / 3
    while process.poll() is None and time.monotonic() < ends:
        time.sleep(0.002)
    while in_checkpoint and process.poll() is None and not writes_checkpoint():
        time.sleep(0.0005)
    alive = process.poll() is None
    process.kill()
    _, said = process.communicate()
    assert not said, said
    return alive


def test_ten_thousand_broken_inputs_end_with_a_report_or_one_sentence(tmp_path: Path) -> None:
    _, failures = broken_inputs(tmp_path, range(1, 10_001))
    assert not failures, "\n".join(failures)


def test_a_hundred_runs_with_failing_writes_resume_to_the_same_weights(tmp_path: Path) -> None:
    _, _, problems = let_writes_fail(tmp_path, 100, seed=1)
    assert not problems, "\n".join(problems)
