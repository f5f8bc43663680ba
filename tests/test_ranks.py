"""Several processes that share each step, on the CPU with gloo."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import DEMO, ROOT, log_lines, run_in_copy, start_ranks, steps_of, succeed, train_ranks, wait_for_step
from hypothesis import given
from hypothesis import strategies as st

from nanogauge.errors import BadInput
from trainer.step.distributed import rank_share

SMALL = [
    *("--run.compile=false", "--model.n-layer=1", "--model.n-head=2", "--model.n-embd=32"),
    *("--model.block-size=32", "--train.micro-batch=4", "--train.grad-accum=6"),
    *("--train.max-steps=12", "--train.eval-every=6", "--train.eval-batches=5"),
    *("--train.checkpoint-every=4", "--optimizer.learning-rate=1e-3"),
]


def small(out: Path, *more: object) -> list[str]:
    return [str(DEMO), f"--run.out={out}", *SMALL, *map(str, more)]


def torchrun(ranks: int, out: Path, *more: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(ROOT / "train.py"), *small(out, *more)]
    return [*launcher, f"--nproc-per-node={ranks}", *script]


def figures(folder: Path) -> list[float]:
    """Return losses and gradient norms of all steps, then the losses of the evaluations."""
    steps = [line[key] for line in steps_of(folder) for key in ("loss", "grad_norm")]
    evals = [line for line in log_lines(folder) if line["kind"] == "eval"]
    return steps + [line[key] for line in evals for key in ("train_loss", "val_loss")]


def test_a_run_continued_with_another_world_size_has_the_losses_of_one_process(tmp_path: Path) -> None:
    succeed(run_in_copy("train.py", small(tmp_path / "one"), tmp_path / "one"))
    out = tmp_path / "several"
    first = succeed(train_ranks(2, small(out, "--rehearse=3"), out))
    assert first.stdout.count("doctor:") == 1
    succeed(run_in_copy("train.py", small(out, "--rehearse=3", "--resume=auto"), out))
    last = succeed(train_ranks(3, small(out, "--resume=auto"), out))
    assert last.stdout.count("report.html") == 1

    one, folder = tmp_path / "one" / "demo", out / "demo"
    assert [line["step"] for line in steps_of(folder)] == list(range(12))
    assert figures(folder) == pytest.approx(figures(one), rel=1e-6)
    lines = log_lines(folder)
    assert [line["ranks"] for line in lines if line["kind"] == "start"] == [2, 1, 3]
    assert [line["step"] for line in lines if line.get("what") == "other_ranks"] == [4, 8]
    assert '"gpus": 2' in (folder / "prediction.json").read_text()


def test_killed_and_resumed_ranks_end_with_the_same_bits(tmp_path: Path) -> None:
    """DDP reorders its buckets after the first backward pass; a resumed run had another order."""
    dropout = "--model.dropout=0.1"
    whole, out = tmp_path / "whole", tmp_path / "killed"
    succeed(train_ranks(3, small(whole, dropout), whole))
    killed = train_ranks(3, ["kill:21", *small(out, dropout)], out, "faulty_train.py")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    succeed(train_ranks(3, small(out, dropout, "--resume=auto"), out))
    starts = [line["first_step"] for line in log_lines(out / "demo") if line["kind"] == "start"]
    assert starts[0] == 0 and starts[1] >= 4
    before, after = ({s["step"]: s for s in steps_of(each / "demo")} for each in (whole, out))
    for key in ("loss", "grad_norm"):
        assert [after[step][key] for step in range(12)] == [before[step][key] for step in range(12)]


def test_torchrun_ends_the_run_when_a_rank_dies(tmp_path: Path) -> None:
    command = torchrun(2, tmp_path, "--train.max-steps=20000")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        wait_for_step(tmp_path / "demo", 3)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = {Path(f"/proc/{pid}/environ").read_text(): int(pid) for pid in children}
        (second,) = (pid for variables, pid in ranks.items() if "\0RANK=1\0" in variables)
        os.kill(second, signal.SIGKILL)
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
        "train.py: 2 processes cannot share the 3 micro-batches of a step equally; set --train.grad-accum to 2 or 4."
    ]
    assert not (tmp_path / "out").exists()


@given(st.integers(1, 10**6), st.integers(1, 1000))
def test_the_advised_gradient_accumulation_can_be_shared(grad_accum: int, world: int) -> None:
    try:
        assert rank_share(grad_accum, world) * world == grad_accum
    except BadInput as error:
        advised = [int(n) for n in re.findall(r"\d+", str(error).split("--train.grad-accum")[1])]
        assert all(n > 0 and rank_share(n, world) for n in advised)
        assert all(abs(n - grad_accum) < world for n in advised)
        assert len(advised) == (2 if grad_accum > world else 1)
