"""A run is the same bits each time, whatever interrupts it; real processes, on the CPU."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import DEMO, ROOT, command, log_lines, run, steps_of, wait_for_step

from trainer.step.device import choose_algorithms, seed_rank, set_cublas_workspace

SMALL = [
    "--model.n-layer=1",
    "--model.n-head=2",
    "--model.n-embd=64",
    "--model.block-size=64",
    "--model.dropout=0.1",
    "--train.micro-batch=8",
    "--train.grad-accum=2",
    "--train.max-steps=60",
    "--train.eval-every=30",
    "--train.eval-batches=2",
    "--train.checkpoint-every=5",
]


def small(out: Path, *more: object) -> list[object]:
    return ["train.py", DEMO, f"--run.out={out}", *SMALL, *more]


def train_small(out: Path, *more: object) -> None:
    script, *arguments = small(out, *more)
    done = run(str(script), *arguments)
    assert done.returncode == 0, done.stderr


def weights(folder: Path, step: int) -> str:
    file = folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_killed_and_resumed_compiled_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """kill -9, then --resume auto: losses, dropout and weights are those of an undisturbed run.

    Compiled runs differed in the last bits, killed or not: the gradient of the embedding was added
    up by several threads in whatever order they came.
    """
    flag = "--run.compile=true"
    train_small(tmp_path / "whole", flag)
    out = tmp_path / "killed"
    begun = command(*map(str, small(out, flag)))
    quiet = subprocess.DEVNULL
    with subprocess.Popen(begun, cwd=ROOT, stdout=quiet, stderr=quiet) as process:
        wait_for_step(out / "demo", 12)
        process.kill()
    assert process.returncode == -9, "it was to be killed before its end"
    train_small(out, flag, "--resume=auto")

    whole, killed = tmp_path / "whole" / "demo", out / "demo"
    starts = [line["first_step"] for line in log_lines(killed) if line["kind"] == "start"]
    assert starts[0] == 0
    assert starts[1] >= 5
    before, after = steps_of(whole), {line["step"]: line for line in steps_of(killed)}
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in before] == [after[step][key] for step in range(60)]
    assert weights(whole, 60) == weights(killed, 60)

    # Compilation changes the time of a step, not its loss, and has a time of its own.
    (compiled,) = [line for line in log_lines(whole) if line["kind"] == "compile"]
    assert compiled["mode"] == "compiled"
    assert compiled["seconds"] > 0.1
    train_small(tmp_path / "eager", "--run.compile=false", "--rehearse=1")
    eager = steps_of(tmp_path / "eager" / "demo")[0]["loss"]
    # Dropout draws other numbers in compiled code, so the first loss is near, not equal.
    assert before[0]["loss"] == pytest.approx(eager, abs=0.05)


@pytest.fixture
def _torch_as_it_was() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    state = torch.get_rng_state()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.deterministic = before[1]
    torch.set_rng_state(state)


@pytest.mark.usefixtures("_torch_as_it_was")
def test_a_gpu_is_slowed_down_for_the_same_bits_only_where_that_is_asked_for() -> None:
    """On a processor exactness costs nothing; on a card it is the person's choice."""
    for device, wanted, exact in (
        ("cpu", False, True),
        ("cpu", True, True),
        ("cuda", False, False),
        ("cuda", True, True),
    ):
        choose_algorithms(torch.device(device), wanted)
        assert torch.are_deterministic_algorithms_enabled() is exact, (device, wanted)
        assert torch.backends.cudnn.deterministic is exact, (device, wanted)


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, ":4096:8"), (":4096:2:16:8", ":4096:8"), (":16:8", ":16:8"), (":4096:8", ":4096:8")],
)
def test_cublas_gets_a_workspace_with_one_order_of_its_sums(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    """torch refuses to multiply otherwise; the smaller of the two that NVIDIA names may be kept."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before or "")
    set_cublas_workspace()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == after


@pytest.mark.usefixtures("_torch_as_it_was")
def test_every_rank_and_every_start_draws_other_random_numbers() -> None:
    """Ranks with the same numbers would all drop the same units."""
    drawn = set()
    for seed, rank, step in ((1, 0, 0), (1, 1, 0), (1, 0, 10), (11, 0, 0)):
        for _ in range(2):
            seed_rank(seed, rank, step)
            drawn.add(torch.rand(()).item())
    assert len(drawn) == 4
