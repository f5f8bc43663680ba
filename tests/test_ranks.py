"""Several processes that share each step, started as torchrun starts them, on the CPU with gloo."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import DEMO, ROOT, log_lines, run, steps_of, wait_for_step
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
    "--train.max-steps=20",
    "--train.eval-every=10",
    "--train.eval-batches=5",
    "--train.checkpoint-every=5",
    "--optimizer.learning-rate=1e-3",
]


def torchrun(ranks: int, out: Path, *more: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(ROOT / "train.py"), str(DEMO), f"--run.out={out}", *SMALL, *map(str, more)]
    return [*launcher, f"--nproc-per-node={ranks}", *script]


def train_ranks(ranks: int, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        torchrun(ranks, out, *more), cwd=ROOT, capture_output=True, text=True, check=False
    )


def begin_endless(ranks: int, out: Path, *more: object) -> subprocess.Popen[str]:
    """A run whose first 20 steps are those of SMALL, and which would take minutes."""
    endless = ("--train.max-steps=20000", "--optimizer.decay-steps=20", *more)
    arguments = torchrun(ranks, out, *endless)
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def pids(launcher: int) -> dict[int, int]:
    """The process of each rank."""
    listed = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {}
    for pid in map(int, listed):
        environment = Path(f"/proc/{pid}/environ").read_text()
        if (rank := re.search(r"\0RANK=(\d+)\0", environment)) is not None:
            found[int(rank[1])] = pid
    return found


def figures(folder: Path) -> list[float]:
    """Losses and gradient norms of all steps, then the losses of the evaluations."""
    steps = [line[key] for line in steps_of(folder) for key in ("loss", "grad_norm")]
    evals = [line for line in log_lines(folder) if line["kind"] == "eval"]
    return steps + [line[key] for line in evals for key in ("train_loss", "val_loss")]


def test_ranks_learn_what_one_process_learns_and_go_on_for_each_other(tmp_path: Path) -> None:
    """A step is the same micro-batches, however many share it: two, one, then three go on as one.

    Rank 0 alone writes and prints: each step is logged once, each line is printed once.
    """
    whole = run("train.py", DEMO, f"--run.out={tmp_path / 'one'}", *SMALL)
    assert whole.returncode == 0, whole.stderr
    several = tmp_path / "several"
    first = train_ranks(2, several, "--rehearse=6")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("doctor:") == 1
    then = run("train.py", DEMO, f"--run.out={several}", *SMALL, "--rehearse=6", "--resume=auto")
    assert then.returncode == 0, then.stderr
    last = train_ranks(3, several, "--resume=auto")
    assert last.returncode == 0, last.stderr
    assert last.stdout.count("report.html") == 1

    one, folder = tmp_path / "one" / "demo", several / "demo"
    assert [line["step"] for line in steps_of(folder)] == list(range(20))
    assert figures(folder) == pytest.approx(figures(one), rel=1e-6)
    lines = log_lines(folder)
    assert [line["ranks"] for line in lines if line["kind"] == "start"] == [2, 1, 3]
    told = [line["step"] for line in lines if line.get("what") == "other_ranks"]
    assert told == [7, 14]
    prediction = (folder / "prediction.json").read_text()
    assert '"gpus": 2' in prediction


def test_killed_and_resumed_ranks_end_with_the_same_bits(tmp_path: Path) -> None:
    """With three ranks the order in which gradients lie in DDP's buckets shows in the last bits.

    It changes after the first backward pass: a resumed run had another order than a whole one.
    """
    dropout = "--model.dropout=0.1"
    whole = train_ranks(3, tmp_path / "whole", dropout)
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    with begin_endless(3, out, dropout) as process:
        wait_for_step(out / "demo", 7)
        for pid in [*pids(process.pid).values(), process.pid]:
            os.kill(pid, signal.SIGKILL)
    with begin_endless(3, out, dropout, "--resume=auto") as process:
        wait_for_step(out / "demo", 19, process=2)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert log_lines(out / "demo")[-1]["status"] == "stopped"
    before = {line["step"]: line for line in steps_of(tmp_path / "whole" / "demo")}
    after = {line["step"]: line for line in steps_of(out / "demo")}
    starts = [line["first_step"] for line in log_lines(out / "demo") if line["kind"] == "start"]
    assert starts[1] >= 5
    for key in ("loss", "grad_norm"):
        assert [after[step][key] for step in range(20)] == [before[step][key] for step in range(20)]


@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_do_not_wait_for_a_rank_that_died(tmp_path: Path, killed: int) -> None:
    """One sentence says what happened, and where rank 0 lives the log says it as well."""
    with begin_endless(2, tmp_path) as process:
        wait_for_step(tmp_path / "demo", 3)
        os.kill(pids(process.pid)[killed], signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    sentences = re.findall(r"^train\.py: .*", errors, re.MULTILINE)
    assert len(sentences) == 1, errors
    assert "another process of this run has ended" in sentences[0]
    if killed == 1:
        assert log_lines(tmp_path / "demo")[-1]["status"] == "failed"


def test_ranks_that_cannot_share_a_step_are_refused_in_one_sentence(tmp_path: Path) -> None:
    """The mistake is the same for all of them, and is told once."""
    done = train_ranks(2, tmp_path, "--train.grad-accum=3")
    sentences = re.findall(r"^train\.py: .*", done.stderr, re.MULTILINE)
    assert sentences == [
        "train.py: 2 processes cannot share the 3 micro-batches of a step equally; "
        "set --train.grad-accum to 2 or 4."
    ]
    assert not (tmp_path / "demo").exists()


@given(st.integers(1, 10**6), st.integers(1, 1000))
def test_the_accumulations_that_are_advised_can_be_shared(grad_accum: int, world: int) -> None:
    """The nearest below and above, where there is one below."""
    try:
        assert rank_share(grad_accum, world) * world == grad_accum
    except BadInput as error:
        advised = [int(n) for n in re.findall(r"\d+", str(error).split("--train.grad-accum")[1])]
        assert all(n > 0 and rank_share(n, world) for n in advised)
        assert all(abs(n - grad_accum) < world for n in advised)
        assert len(advised) == (2 if grad_accum > world else 1)


def test_one_process_is_told_nothing_and_waits_for_nobody() -> None:
    """Without torchrun all of it costs a call."""
    with Ranks() as ranks:
        assert ranks.is_first
        assert ranks.any(True)
        assert not ranks.any(False)
        assert ranks.gather({"a": 1}) == [{"a": 1}]
