"""Faults in the night: losses that are no number, memory that runs out, changed circumstances."""

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
    """The tiny run with a fault that faulty_train.py knows."""
    arguments = [fault, str(DEMO), f"--run.out={out}", *TINY, *more]
    return run_in_copy("faulty_train.py", arguments, out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The log of the tiny run without dropout."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert train_tiny(out, "--model.dropout=0").returncode == 0
    return log_lines(out / "demo")


@pytest.fixture(scope="module")
def after_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run that stopped after three steps."""
    out = tmp_path_factory.mktemp("after_three")
    assert train_tiny(out, "--rehearse=2").returncode == 0
    return out / "demo"


@pytest.fixture
def rehearsed(after_three: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(after_three, tmp_path / "demo")


def events(folder: Path, what: str) -> list[dict[str, Any]]:
    return [line for line in log_lines(folder) if line.get("what") == what]


def test_an_update_that_is_not_finite_is_skipped_and_nothing_of_it_stays() -> None:
    """One bad batch must cost one update: neither weights nor moments may hold what it was."""
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


def test_a_few_bad_updates_are_skipped_and_the_run_goes_on(tmp_path: Path) -> None:
    """Before, the first loss that was no number ended the night."""
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


def test_after_too_many_bad_updates_the_run_goes_back_and_on_with_other_data(
    tmp_path: Path, tiny_run: Path
) -> None:
    """A state that yields no finite loss any more is left for the last good checkpoint, and the
    batches that led there are not met again in the same order.
    """
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
    again = {line["step"]: line.get("loss") for line in steps_of(folder)}
    assert [again[s] for s in range(4)] == [first[s] for s in range(4)]
    assert again[4] != first[4], "the data is to come in another order"


def test_a_run_that_cannot_be_rescued_stops_with_its_diagnosis(tmp_path: Path) -> None:
    """Going back for ever would burn the rest of the night for nothing."""
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
def test_where_memory_runs_out_fewer_sequences_are_taken_at_once(
    tmp_path: Path, undisturbed: list[dict[str, Any]], fault: str, step: int
) -> None:
    """The same tokens make a step and an evaluation, so that losses stay those of the run.

    The late one is in the second pass of a step, the first of which is made again.

    Without dropout a step of 4 x 2 sequences and one of 2 x 4 differ by rounding alone.
    """
    done = train_faulty(fault, tmp_path, "--model.dropout=0")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "demo"
    (told,) = events(folder, "out_of_memory")
    assert told["step"] == step
    assert "from here on it is 2, accumulated over 4 passes" in told["text"]
    assert [line["step"] for line in steps_of(folder)] == list(range(12))
    for kind, key in (("step", "loss"), ("eval", "val_loss")):
        ours = [line[key] for line in log_lines(folder) if line["kind"] == kind]
        theirs = [line[key] for line in undisturbed if line["kind"] == kind]
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_run_that_ran_out_of_memory_resumes_with_what_had_room(tmp_path: Path) -> None:
    """Unless another micro-batch is asked for by name."""
    assert train_faulty("room:3", tmp_path, "--model.dropout=0").returncode == 0
    folder = tmp_path / "demo"
    resumed = train_tiny(tmp_path, "--model.dropout=0", "--resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert log_lines(folder)[-2]["kind"] != "step"
    starts = [line for line in log_lines(folder) if line["kind"] == "start"]
    assert starts[-1]["micro_batch"] == 2, "a resumed run begins with what has room"
    chosen = ("--train.micro-batch=1", "--train.grad-accum=8", "--train.max-steps=14")
    names = ("train.micro_batch", "train.grad_accum", "train.max_steps")
    done = train_tiny(
        tmp_path, "--model.dropout=0", "--resume=auto", *chosen, "--allow-change", *names
    )
    assert done.returncode == 0, done.stderr
    starts = [line for line in log_lines(folder) if line["kind"] == "start"]
    assert starts[-1].get("micro_batch") is None, "what was asked for by name is what is taken"
    changed = events(folder, "changed")[-3:]
    assert changed[0]["text"] == "train.micro_batch was 4 and is 1 from here on."


def test_memory_that_one_sequence_does_not_fit_into_ends_the_run(tmp_path: Path) -> None:
    done = train_faulty("room:0", tmp_path)
    assert done.returncode == 1
    (sentence,) = done.stderr.strip().splitlines()
    assert "one sequence at a time" in sentence


def test_an_allocation_that_fails_on_the_processor_is_memory_that_ran_out() -> None:
    """torch has an error of its own for CUDA alone; everything else is told by its words."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_an_update_that_broke_off_between_its_groups_is_noticed() -> None:
    """To make it once more would update the first group twice."""
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimizerSection())
    assert not is_half_updated(optimizer)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not is_half_updated(optimizer)
    optimizer.state[model.weight]["step"] += 1
    assert is_half_updated(optimizer)


def test_a_changed_run_is_refused_unless_the_change_is_allowed_by_name(rehearsed: Path) -> None:
    """A horizon that moves changes the schedule: the user should not find out in the morning."""
    longer = ("--resume=auto", "--train.max-steps=14")
    refused = train_tiny(rehearsed.parent, *longer)
    assert refused.returncode == 2
    assert "the run has 12, this command 14" in refused.stderr
    misspelt = train_tiny(rehearsed.parent, *longer, "--allow-change", "train.max_step")
    assert misspelt.returncode == 2
    assert "did you mean train.max_steps?" in misspelt.stderr
    allowed = train_tiny(rehearsed.parent, *longer, "--allow-change", "train.max_steps")
    assert allowed.returncode == 0, allowed.stderr
    (told,) = events(rehearsed, "changed")
    assert told["text"] == "train.max_steps was 12 and is 14 from here on."
    assert steps_of(rehearsed)[-1]["step"] == 13


def test_another_version_of_the_code_is_refused_unless_allowed(rehearsed: Path) -> None:
    """What was updated in the middle of a run may compute something else."""
    (checkpoint,) = (rehearsed / "checkpoints").glob("step_*")
    write_meta(checkpoint, code="0" * 64)
    refused = train_tiny(rehearsed.parent, "--resume=auto")
    assert refused.returncode == 2
    assert "another code: the run has 000000000000" in refused.stderr
    allowed = train_tiny(rehearsed.parent, "--resume=auto", "--allow-change", "code")
    assert allowed.returncode == 0, allowed.stderr


def test_a_run_that_died_before_its_first_checkpoint_begins_with_the_same_weights(
    rehearsed: Path,
) -> None:
    """A new run measured its device after it was seeded, which drew random numbers: gone on with
    from step 0 it had other weights. Found by killing runs at random.
    """
    shutil.rmtree(rehearsed / "checkpoints")
    assert train_tiny(rehearsed.parent, "--resume=auto").returncode == 0
    losses = [line["loss"] for line in steps_of(rehearsed)]
    assert losses[3:6] == losses[:3]


def test_a_checkpoint_is_made_by_the_clock_too(tmp_path: Path) -> None:
    """500 steps of a large model may take half the night."""
    more = ("--train.checkpoint-every=10000", "--train.checkpoint-minutes=0.0005")
    done = train_tiny(tmp_path, *more)
    assert done.returncode == 0, done.stderr
    saved = [line["step"] for line in log_lines(tmp_path / "demo") if line["kind"] == "checkpoint"]
    assert len(saved) > 2
    assert saved[-1] == 12


def write_meta(checkpoint: Path, **identity: str) -> None:
    """Change what a checkpoint says of what it was trained with, as one who made it would."""
    path = checkpoint / "meta.json"
    content = json.loads(path.read_text())
    content["run"]["identity"] |= identity
    content.popitem()  # its own digest
    path.write_bytes(meta_bytes(content))
