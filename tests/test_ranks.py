"""Several processes that share each step, on the CPU with gloo."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import (
    DEMO,
    ROOT,
    log_lines,
    run_in_copy,
    start_ranks,
    steps_of,
    train_ranks,
    wait_for_step,
)
from hypothesis import given
from hypothesis import strategies as st

from nanogauge.errors import BadInput
from trainer.step.distributed import Ranks, rank_share

SMALL = [
    "--run.compile=false",
    "--model.n-layer=1",
    "--model.n-head=2",
    "--model.n-embd=32",
    "--model.block-size=32",
    "--train.micro-batch=4",
    "--train.grad-accum=6",
    "--train.max-steps=12",
    "--train.eval-every=6",
    "--train.eval-batches=5",
    "--train.checkpoint-every=4",
    "--optimizer.learning-rate=1e-3",
]


def small(out: Path, *more: object) -> list[str]:
    return [str(DEMO), f"--run.out={out}", *SMALL, *map(str, more)]


def torchrun(ranks: int, out: Path, *more: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(ROOT / "train.py"), *small(out, *more)]
    return [*launcher, f"--nproc-per-node={ranks}", *script]


def process_of_rank(launcher: int, rank: int) -> int:
    listed = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    (pid,) = (p for p in listed if f"\0RANK={rank}\0" in Path(f"/proc/{p}/environ").read_text())
    return int(pid)


def figures(folder: Path) -> list[float]:
    """Return losses and gradient norms of all steps, then the losses of the evaluations."""
    steps = [line[key] for line in steps_of(folder) for key in ("loss", "grad_norm")]
    evals = [line for line in log_lines(folder) if line["kind"] == "eval"]
    return steps + [line[key] for line in evals for key in ("train_loss", "val_loss")]


def test_a_run_continued_with_another_world_size_has_the_losses_of_one_process(
    tmp_path: Path,
) -> None:
    """Two ranks, one, then three; rank 0 alone logs and prints."""
    whole = run_in_copy("train.py", small(tmp_path / "one"), tmp_path / "one")
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "several"
    first = train_ranks(2, small(out, "--rehearse=3"), out)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("doctor:") == 1
    then = run_in_copy("train.py", small(out, "--rehearse=3", "--resume=auto"), out)
    assert then.returncode == 0, then.stderr
    last = train_ranks(3, small(out, "--resume=auto"), out)
    assert last.returncode == 0, last.stderr
    assert last.stdout.count("report.html") == 1

    one, folder = tmp_path / "one" / "demo", out / "demo"
    assert [line["step"] for line in steps_of(folder)] == list(range(12))
    assert figures(folder) == pytest.approx(figures(one), rel=1e-6)
    lines = log_lines(folder)
    assert [line["ranks"] for line in lines if line["kind"] == "start"] == [2, 1, 3]
    assert [line["step"] for line in lines if line.get("what") == "other_ranks"] == [4, 8]
    assert '"gpus": 2' in (folder / "prediction.json").read_text()


def test_killed_and_resumed_ranks_end_with_the_same_bits(tmp_path: Path) -> None:
    """With three ranks a sum has other last bits if DDP orders its buckets otherwise.

    DDP reorders them after the first backward pass, so a resumed run had another order.
    """
    dropout = "--model.dropout=0.1"
    whole, out = tmp_path / "whole", tmp_path / "killed"
    done = train_ranks(3, small(whole, dropout), whole)
    assert done.returncode == 0, done.stderr
    killed = train_ranks(3, ["kill:21", *small(out, dropout)], out, "faulty_train.py")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = train_ranks(3, small(out, dropout, "--resume=auto"), out)
    assert resumed.returncode == 0, resumed.stderr
    starts = [line["first_step"] for line in log_lines(out / "demo") if line["kind"] == "start"]
    assert starts[0] == 0 and starts[1] >= 4
    before, after = ({s["step"]: s for s in steps_of(each / "demo")} for each in (whole, out))
    for key in ("loss", "grad_norm"):
        assert [after[step][key] for step in range(12)] == [before[step][key] for step in range(12)]


def test_torchrun_ends_the_run_when_a_rank_dies(tmp_path: Path) -> None:
    """One sentence and the log say why."""
    command = torchrun(2, tmp_path, "--train.max-steps=20000")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        wait_for_step(tmp_path / "demo", 3)
        os.kill(process_of_rank(process.pid, 1), signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    (sentence,) = re.findall(r"^train\.py: .*", errors, re.MULTILINE)
    assert "another process of this run has ended" in sentence
    assert log_lines(tmp_path / "demo")[-1]["status"] == "failed"


def test_the_other_ranks_end_when_rank_0_dies(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = start_ranks(2, small(out, "--train.max-steps=20000"), out)
    wait_for_step(out / "demo", 3)
    first.kill()
    done = second.result()
    assert done.returncode == 1
    (sentence,) = re.findall(r"^train\.py: .*", done.stderr, re.MULTILINE)
    assert "another process of this run has ended" in sentence


def test_ranks_that_cannot_share_a_step_are_refused_in_one_sentence(tmp_path: Path) -> None:
    done = train_ranks(2, small(tmp_path / "out", "--train.grad-accum=3"), tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "train.py: 2 processes cannot share the 3 micro-batches of a step equally; "
        "set --train.grad-accum to 2 or 4."
    ]
    assert not (tmp_path / "out").exists()


@given(st.integers(1, 10**6), st.integers(1, 1000))
def test_the_advised_gradient_accumulation_can_be_shared(grad_accum: int, world: int) -> None:
    """It is the nearest below, if there is one, and the nearest above."""
    try:
        assert rank_share(grad_accum, world) * world == grad_accum
    except BadInput as error:
        advised = [int(n) for n in re.findall(r"\d+", str(error).split("--train.grad-accum")[1])]
        assert all(n > 0 and rank_share(n, world) for n in advised)
        assert all(abs(n - grad_accum) < world for n in advised)
        assert len(advised) == (2 if grad_accum > world else 1)


def test_the_collectives_of_a_single_process_do_nothing() -> None:
    with Ranks() as ranks:
        assert ranks.is_first
        assert ranks.any(True)
        assert not ranks.any(False)
        assert ranks.gather({"a": 1}) == [{"a": 1}]
