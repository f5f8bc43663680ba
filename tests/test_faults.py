"""Non-finite losses, out-of-memory errors, and changes before a resumption."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from checkpoints import Trained, same
from commands import DEMO, TINY, log_lines, run_in_copy, steps_of, succeed, train_tiny
from torch import nn

from nanogauge.config import OptimizerSection
from trainer.checkpoints.checkpoint import meta_bytes
from trainer.step.device import is_out_of_memory
from trainer.step.optimizer import is_half_updated, make_optimizer, update


def train_faulty(fault: str, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = [fault, str(DEMO), f"--run.out={out}", *TINY, *more]
    return run_in_copy("faulty_train.py", arguments, out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert train_tiny(out, "--model.dropout=0").returncode == 0
    return log_lines(out / "demo")


@pytest.fixture(scope="module")
def after_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("after_three")
    assert train_tiny(out, "--rehearse=2").returncode == 0
    return out / "demo"


@pytest.fixture(scope="module")
def with_less_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that had room for three sequences, from the first step on."""
    out = tmp_path_factory.mktemp("less_memory")
    succeed(train_faulty("room:3", out, "--model.dropout=0"))
    return out / "demo"


@pytest.fixture
def rehearsed(after_three: Path, tmp_path: Path) -> Path:
    return shutil.copytree(after_three, tmp_path / "demo")


def events(folder: Path, what: str) -> list[dict[str, Any]]:
    return [line for line in log_lines(folder) if line.get("what") == what]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_non_finite_update_is_skipped_without_a_trace(name: Literal["adamw", "muon"]) -> None:
    """An update that was interrupted between two parameters is detected."""
    trained = Trained()
    trained.optimizer = make_optimizer(trained.model, OptimizerSection(name=name))

    def step(factor: float) -> None:
        tokens = torch.randint(0, 264, (2, 8))
        (trained.model(tokens, tokens) * factor).backward()
        norm = nn.utils.clip_grad_norm_(trained.model.parameters(), 1.0)
        update(trained.optimizer, trained.scaler, torch.isfinite(norm))
        trained.optimizer.zero_grad()

    step(1.0)
    before = trained.state()
    for factor in (float("nan"), float("inf")):
        step(factor)
        assert same(trained.state(), before)
    step(1.0)
    assert not any(torch.equal(old, trained.state()[key]) for key, old in before.items())
    assert not is_half_updated(trained.optimizer)
    trained.optimizer.state[trained.model.blocks[0].mlp.c_proj.weight]["step"] += 1
    assert is_half_updated(trained.optimizer)


def test_a_run_skips_a_few_non_finite_updates(tmp_path: Path) -> None:
    succeed(train_faulty("nan:5-8", tmp_path))  # of two passes a step: steps 2 and 3
    folder = tmp_path / "demo"
    assert [line["step"] for line in events(folder, "update_skipped")] == [2, 3]
    losses = {line["step"]: line.get("loss") for line in steps_of(folder)}
    assert sorted(losses) == list(range(12))
    assert [step for step, loss in losses.items() if loss is None] == [2, 3]
    saved = [line["step"] for line in log_lines(folder) if line["kind"] == "checkpoint"]
    assert saved == [8, 12]  # none at step 4: the updates before it were skipped
    assert json.loads((folder / "report.json").read_text())["run"]["status"] == "finished"


def test_a_run_rolls_back_after_too_many_non_finite_updates(tmp_path: Path, tiny_run: Path) -> None:
    succeed(train_faulty("nan:11-16", tmp_path, "--train.max-skipped=3"))  # steps 5, 6 and 7
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


@pytest.mark.parametrize(("fault", "step"), [("room:3", 0), ("late_room:3", 3), ("evaluation_room:3", 0)])
def test_out_of_memory_makes_the_micro_batch_smaller(
    tmp_path: Path, undisturbed: list[dict[str, Any]], with_less_memory: Path, fault: str, step: int
) -> None:
    """Steps keep their tokens; a late error in a second pass repeats the step from its first."""
    folder = with_less_memory
    if fault != "room:3":
        succeed(train_faulty(fault, tmp_path, "--model.dropout=0"))
        folder = tmp_path / "demo"
    (event,) = events(folder, "out_of_memory")
    assert event["step"] == step
    assert "from here on it is 2, accumulated over 4 passes" in event["text"]
    assert [line["step"] for line in steps_of(folder)] == list(range(12))
    for kind, key in (("step", "loss"), ("eval", "val_loss")):
        ours = [line[key] for line in log_lines(folder) if line["kind"] == kind]
        theirs = [line[key] for line in undisturbed if line["kind"] == kind]
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_resumed_run_keeps_its_smaller_micro_batch(tmp_path: Path, with_less_memory: Path) -> None:
    folder = shutil.copytree(with_less_memory, tmp_path / "demo")
    succeed(train_tiny(tmp_path, "--model.dropout=0", "--resume=auto"))
    assert log_lines(folder)[-2]["kind"] != "step"
    starts = [line for line in log_lines(folder) if line["kind"] == "start"]
    assert starts[-1]["micro_batch"] == 2
    chosen = ("--train.micro-batch=1", "--train.grad-accum=8", "--train.max-steps=14")
    names = ("train.micro_batch", "train.grad_accum", "train.max_steps")
    resume = ("--model.dropout=0", "--resume=auto", *chosen, "--allow-change", *names)
    succeed(train_tiny(tmp_path, *resume))
    starts = [line for line in log_lines(folder) if line["kind"] == "start"]
    assert starts[-1].get("micro_batch") is None
    changed = events(folder, "changed")[-3:]
    assert changed[0]["text"] == ("Resumed with another train.micro_batch: the run has 4, this command 1.")


def test_a_run_fails_if_one_sequence_runs_out_of_memory(tmp_path: Path) -> None:
    done = train_faulty("room:0", tmp_path)
    assert done.returncode == 1
    (sentence,) = done.stderr.strip().splitlines()
    assert "one sequence at a time" in sentence
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)  # torch has an error class for CUDA only: here the message decides
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_another_configuration_or_code_is_refused_unless_allowed_by_name(rehearsed: Path) -> None:
    (checkpoint,) = (rehearsed / "checkpoints").glob("step_*")
    content = json.loads((checkpoint / "meta.json").read_text())
    content["run"]["identity"]["code"] = "0" * 64
    content.popitem()  # its own digest
    (checkpoint / "meta.json").write_bytes(meta_bytes(content))
    refused = train_tiny(rehearsed.parent, "--resume=auto")
    assert refused.returncode == 2
    assert "another code: the run has 000000000000" in refused.stderr
    longer = ("--resume=auto", "--train.max-steps=14")
    refused = train_tiny(rehearsed.parent, *longer)
    assert refused.returncode == 2
    assert "the run has 12, this command 14" in refused.stderr
    misspelt = train_tiny(rehearsed.parent, *longer, "--allow-change", "train.max_step")
    assert misspelt.returncode == 2
    assert "did you mean train.max_steps?" in misspelt.stderr
    succeed(train_tiny(rehearsed.parent, *longer, "--allow-change", "code", "train.max_steps"))
    changed, _ = (event["text"] for event in events(rehearsed, "changed"))
    assert changed == "Resumed with another train.max_steps: the run has 12, this command 14."
    assert steps_of(rehearsed)[-1]["step"] == 13


def test_a_run_resumed_without_a_checkpoint_starts_with_the_same_weights(rehearsed: Path) -> None:
    """Measuring the device after seeding drew random numbers in the first process alone."""
    shutil.rmtree(rehearsed / "checkpoints")
    assert train_tiny(rehearsed.parent, "--resume=auto").returncode == 0
    losses = [line["loss"] for line in steps_of(rehearsed)]
    assert losses[3:6] == losses[:3]


def test_checkpoints_are_also_due_by_time(tmp_path: Path) -> None:
    flags = ("--train.checkpoint-every=10000", "--train.checkpoint-minutes=0.0005")
    succeed(train_tiny(tmp_path, *flags))
    saved = [line["step"] for line in log_lines(tmp_path / "demo") if line["kind"] == "checkpoint"]
    assert len(saved) > 2
    assert saved[-1] == 12


def test_a_bug_leaves_an_end_line_a_report_and_its_traceback(tmp_path: Path) -> None:
    done = train_faulty("bug:7", tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr
    end = log_lines(tmp_path / "demo")[-1]
    assert (end["status"], end["steps"], end["restartable"]) == ("failed", 3, True)
    assert end["reason"] == "KeyError: 'forgotten'" and (tmp_path / "demo/report.html").exists()


@pytest.mark.parametrize(
    ("fault", "split"),
    [("late_scan:0", "train"), ("late_scan:0", "val"), ("late_scan:4", "val"), ("no_scan:", "train")],
)
def test_a_token_beyond_the_vocabulary_is_found_before_step_0_or_ends_the_run_with_a_checkpoint(
    tmp_path: Path, fault: str, split: str
) -> None:
    for name in ("train", "val"):
        tokens = np.arange(30_000, dtype=np.uint16) % 250
        tokens[15_000 if name == split else 0] = 999 if name == split else 0
        tokens.tofile(tmp_path / f"{name}.bin")
    (tmp_path / "meta.pkl").touch()
    data = ["--data.embedded=false", f"--data.path={tmp_path}", "--train.max-steps=20000"]
    done = train_faulty(fault, tmp_path, *data, "--train.eval-batches=1")
    place = f" at position 15,000 of {tmp_path}/{split}.bin"
    sentence = f"the {split} data holds the token 999{place if 'late' in fault else ''} but"
    assert sentence in done.stderr and "Traceback" not in done.stderr
    early = fault == "late_scan:0"
    assert done.returncode == (2 if early else 1)
    assert (tmp_path / "demo").exists() != early
    if not early:
        end = log_lines(tmp_path / "demo")[-1]
        assert (end["status"], end["restartable"]) == ("failed", False)
        assert sentence in end["reason"] and (tmp_path / "demo/report.html").exists()
        assert (tmp_path / f"demo/checkpoints/step_{end['steps']:08d}").is_dir()
