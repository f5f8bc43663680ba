"""Non-finite losses, out-of-memory errors, and changes before a resumption."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DEMO, TINY, log_lines, run_in_copy, steps_of, train_tiny
from torch import nn

from nanogauge.config import OptimizerSection
from trainer.checkpoints.checkpoint import meta_bytes
from trainer.step.device import is_out_of_memory
from trainer.step.optimizer import is_half_updated, make_optimizer, update


def train_faulty(fault: str, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Train the tiny model with a fault of faulty_train.py."""
    arguments = [fault, str(DEMO), f"--run.out={out}", *TINY, *more]
    return run_in_copy("faulty_train.py", arguments, out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the log of the tiny run without dropout."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert train_tiny(out, "--model.dropout=0").returncode == 0
    return log_lines(out / "demo")


@pytest.fixture(scope="module")
def after_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny run that stopped after three steps."""
    out = tmp_path_factory.mktemp("after_three")
    assert train_tiny(out, "--rehearse=2").returncode == 0
    return out / "demo"


@pytest.fixture
def rehearsed(after_three: Path, tmp_path: Path) -> Path:
    return shutil.copytree(after_three, tmp_path / "demo")


def events(folder: Path, what: str) -> list[dict[str, Any]]:
    return [line for line in log_lines(folder) if line.get("what") == what]


def test_a_non_finite_update_is_skipped_without_a_trace() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimizerSection())
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        (model(torch.ones(4, 3)).sum() * factor).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update(optimizer, scaler, torch.isfinite(norm))

    def state() -> list[torch.Tensor]:
        moments = [t for s in optimizer.state.values() for t in s.values()]
        return [t.detach().clone() for t in [*model.parameters(), *moments]]

    step(1.0)
    before = state()
    for factor in (float("nan"), float("inf")):
        step(factor)
        assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    step(1.0)
    assert not any(torch.equal(a, b) for a, b in zip(before, state(), strict=True))


def test_a_run_skips_a_few_non_finite_updates(tmp_path: Path) -> None:
    done = train_faulty("nan:5-8", tmp_path)  # of two passes a step: steps 2 and 3
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "demo"
    assert [line["step"] for line in events(folder, "update_skipped")] == [2, 3]
    losses = {line["step"]: line.get("loss") for line in steps_of(folder)}
    assert sorted(losses) == list(range(12))
    assert [step for step, loss in losses.items() if loss is None] == [2, 3]
    saved = [line["step"] for line in log_lines(folder) if line["kind"] == "checkpoint"]
    assert saved == [8, 12]  # none at step 4: the updates before it were skipped
    assert json.loads((folder / "report.json").read_text())["run"]["status"] == "finished"


def test_a_run_rolls_back_after_too_many_non_finite_updates(tmp_path: Path, tiny_run: Path) -> None:
    """It continues from the last checkpoint with the data in another order."""
    done = train_faulty("nan:11-16", tmp_path, "--train.max-skipped=3")  # steps 5, 6 and 7
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "demo"
    (back,) = events(folder, "rollback")
    assert "back to step 4" in back["text"]
    starts = [line for line in log_lines(folder) if line["kind"] == "start"]
    assert [(s["first_step"], s.get("rollbacks")) for s in starts] == [(0, None), (4, 1)]
    steps = [line["step"] for line in steps_of(folder)]
    assert steps == [*range(8), *range(4, 12)]
    first = {line["step"]: line["loss"] for line in steps_of(tiny_run)}
    repeated = {line["step"]: line.get("loss") for line in steps_of(folder)}
    assert [repeated[s] for s in range(4)] == [first[s] for s in range(4)]
    assert repeated[4] != first[4]


def test_a_run_fails_with_a_diagnosis_after_the_last_rollback(tmp_path: Path) -> None:
    more = ("--train.max-skipped=2", "--train.max-rollbacks=1", "--train.max-steps=400")
    done = train_faulty("nan:11-9999", tmp_path, *more)
    assert done.returncode == 1
    (sentence,) = done.stderr.strip().splitlines()
    assert "2 steps in a row (4 to 5)" in sentence
    assert "after 1 rollbacks" in sentence
    assert "--optimizer.learning-rate" in sentence
    folder = tmp_path / "demo"
    assert log_lines(folder)[-1]["status"] == "failed"
    assert (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("fault", "step"), [("room:3", 0), ("late_room:3", 3), ("evaluation_room:3", 0)]
)
def test_out_of_memory_makes_the_micro_batch_smaller(
    tmp_path: Path, undisturbed: list[dict[str, Any]], fault: str, step: int
) -> None:
    """Steps and evaluations keep their tokens, so that losses differ by rounding alone.

    The late error is in the second pass of a step, which is repeated from its first.
    """
    done = train_faulty(fault, tmp_path, "--model.dropout=0")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "demo"
    (event,) = events(folder, "out_of_memory")
    assert event["step"] == step
    assert "from here on it is 2, accumulated over 4 passes" in event["text"]
    assert [line["step"] for line in steps_of(folder)] == list(range(12))
    for kind, key in (("step", "loss"), ("eval", "val_loss")):
        ours = [line[key] for line in log_lines(folder) if line["kind"] == kind]
        theirs = [line[key] for line in undisturbed if line["kind"] == kind]
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_resumed_run_keeps_its_smaller_micro_batch(tmp_path: Path) -> None:
    """Unless another micro-batch is allowed by name."""
    assert train_faulty("room:3", tmp_path, "--model.dropout=0").returncode == 0
    folder = tmp_path / "demo"
    resumed = train_tiny(tmp_path, "--model.dropout=0", "--resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert log_lines(folder)[-2]["kind"] != "step"
    starts = [line for line in log_lines(folder) if line["kind"] == "start"]
    assert starts[-1]["micro_batch"] == 2
    chosen = ("--train.micro-batch=1", "--train.grad-accum=8", "--train.max-steps=14")
    names = ("train.micro_batch", "train.grad_accum", "train.max_steps")
    done = train_tiny(
        tmp_path, "--model.dropout=0", "--resume=auto", *chosen, "--allow-change", *names
    )
    assert done.returncode == 0, done.stderr
    starts = [line for line in log_lines(folder) if line["kind"] == "start"]
    assert starts[-1].get("micro_batch") is None
    changed = events(folder, "changed")[-3:]
    assert changed[0]["text"] == "train.micro_batch was 4 and is 1 from here on."


def test_a_run_fails_if_one_sequence_runs_out_of_memory(tmp_path: Path) -> None:
    done = train_faulty("room:0", tmp_path)
    assert done.returncode == 1
    (sentence,) = done.stderr.strip().splitlines()
    assert "one sequence at a time" in sentence


def test_a_failed_allocation_on_the_cpu_counts_as_out_of_memory() -> None:
    """torch has an error class for CUDA only; on the CPU the message decides."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_an_update_interrupted_between_parameter_groups_is_detected() -> None:
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimizerSection())
    assert not is_half_updated(optimizer)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not is_half_updated(optimizer)
    optimizer.state[model.weight]["step"] += 1
    assert is_half_updated(optimizer)


def test_a_changed_configuration_is_refused_unless_allowed_by_name(rehearsed: Path) -> None:
    longer = ("--resume=auto", "--train.max-steps=14")
    refused = train_tiny(rehearsed.parent, *longer)
    assert refused.returncode == 2
    assert "the run has 12, this command 14" in refused.stderr
    misspelt = train_tiny(rehearsed.parent, *longer, "--allow-change", "train.max_step")
    assert misspelt.returncode == 2
    assert "did you mean train.max_steps?" in misspelt.stderr
    allowed = train_tiny(rehearsed.parent, *longer, "--allow-change", "train.max_steps")
    assert allowed.returncode == 0, allowed.stderr
    (event,) = events(rehearsed, "changed")
    assert event["text"] == "train.max_steps was 12 and is 14 from here on."
    assert steps_of(rehearsed)[-1]["step"] == 13


def test_another_version_of_the_code_is_refused_unless_allowed(rehearsed: Path) -> None:
    (checkpoint,) = (rehearsed / "checkpoints").glob("step_*")
    write_meta(checkpoint, code="0" * 64)
    refused = train_tiny(rehearsed.parent, "--resume=auto")
    assert refused.returncode == 2
    assert "another code: the run has 000000000000" in refused.stderr
    allowed = train_tiny(rehearsed.parent, "--resume=auto", "--allow-change", "code")
    assert allowed.returncode == 0, allowed.stderr


def test_a_run_resumed_without_a_checkpoint_starts_with_the_same_weights(rehearsed: Path) -> None:
    """Measuring the device after seeding drew random numbers in the first process alone."""
    shutil.rmtree(rehearsed / "checkpoints")
    assert train_tiny(rehearsed.parent, "--resume=auto").returncode == 0
    losses = [line["loss"] for line in steps_of(rehearsed)]
    assert losses[3:6] == losses[:3]


def test_checkpoints_are_also_due_by_time(tmp_path: Path) -> None:
    more = ("--train.checkpoint-every=10000", "--train.checkpoint-minutes=0.0005")
    done = train_tiny(tmp_path, *more)
    assert done.returncode == 0, done.stderr
    saved = [line["step"] for line in log_lines(tmp_path / "demo") if line["kind"] == "checkpoint"]
    assert len(saved) > 2
    assert saved[-1] == 12


def write_meta(checkpoint: Path, **identity: str) -> None:
    """Change the identity in a checkpoint's meta.json, with a valid digest."""
    path = checkpoint / "meta.json"
    content = json.loads(path.read_text())
    content["run"]["identity"] |= identity
    content.popitem()  # its own digest
    path.write_bytes(meta_bytes(content))
