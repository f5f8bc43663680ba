"""Weights, gradients and moments sharded over the ranks, on the CPU with gloo."""

import copy
import gc
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import DEMO, log_lines, run_here, run_in_copy, succeed, train_ranks
from examples import CPU
from test_ranks import small
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from model import GPT
from nanogauge.config import ModelSection, OptimizerSection, shape_of
from nanogauge.prediction.memory import predict_memory
from nanogauge.prediction.workload import Workload
from trainer.step.fsdp import ShardedLoss, full_tensor
from trainer.step.optimizer import make_optimizer, update

CHANGED = ["--allow-change", "train.sharding"]
NO_DROPOUT = "--model.dropout=0"
SMALL_VOCABULARY = {"n_layer": 4, "n_embd": 256, "vocab_size": 512, "block_size": 16}
UNTIED = {"n_layer": 3, "n_embd": 64, "vocab_size": 8192, "block_size": 16, "tied_head": False}
FIGURES = {"step": ("loss", "grad_norm"), "eval": ("train_loss", "val_loss")}


def figures(folder: Path) -> list[dict[tuple[str, int], list[float]]]:
    """Return the steps and evaluations that each process of a run logged."""
    processes: list[dict[tuple[str, int], list[float]]] = []
    for line in log_lines(folder):
        kind = line["kind"]
        if kind == "start":
            processes.append({})
        if kind in FIGURES:
            processes[-1][kind, line["step"]] = [line[key] for key in FIGURES[kind]]
    return processes


def test_a_run_continued_with_or_without_sharding_has_the_losses_of_one_process(tmp_path: Path) -> None:
    """One process, two that shard the model and are killed, two again, then one."""
    one, out = tmp_path / "one", tmp_path / "several"
    succeed(run_in_copy("train.py", small(one, NO_DROPOUT), one))
    succeed(run_in_copy("train.py", small(out, NO_DROPOUT, "--rehearse=1"), out))
    resumed = small(out, NO_DROPOUT, *CHANGED, "--resume=auto")
    sharded = [*resumed, "--train.sharding=full"]
    killed = train_ranks(2, ["kill:17", *sharded], out, "faulty_train.py")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    succeed(train_ranks(2, [*sharded, "--rehearse=5"], out))
    sampled = run_here("sample.py", out / "demo", "--prompt=The import ", "--tokens=5")
    assert sampled.stdout.startswith("The import "), sampled.stderr
    succeed(run_in_copy("train.py", resumed, out))

    (expected,) = figures(one / "demo")
    several = figures(out / "demo")
    assert len(several) == 4
    twice = several[1].keys() & several[2].keys()
    assert twice
    assert all(several[1][key] == several[2][key] for key in twice)
    assert {key for process in several for key in process} == expected.keys()
    for process in several:
        for key, values in process.items():
            assert values == pytest.approx(expected[key], rel=1e-6), key
    begun_by = [line["ranks"] for line in log_lines(out / "demo") if line["kind"] == "start"]
    assert begun_by == [1, 2, 2, 1]


def test_two_ranks_have_the_gradients_of_one_process_and_skip_together(tmp_path: Path) -> None:
    """Each holds half; a gradient that is non-finite on one rank is skipped by both."""
    file = tmp_path / "measured.json"
    succeed(train_ranks(2, [str(file)], file, "sharded.py"))
    measured = json.loads(file.read_text())
    assert measured["failure"] == "ValueError: no compiler"
    assert len(measured["distances"]) == 4
    assert max(measured["distances"].values()) < 1e-6, measured["distances"]
    for what in ("weights", "gradients", "moments"):
        assert sum(measured[what]) == pytest.approx(1), what
        assert measured[what] == pytest.approx([0.5, 0.5], abs=0.001), what  # 265 rows
    skipped, made = measured["norms"]
    assert skipped == [float("inf"), float("inf")]
    assert made[0] == made[1] > 0
    skipped, made = measured["changed"]
    assert not any(skipped) and all(made)


def test_what_cannot_be_sharded_is_refused_in_one_sentence(tmp_path: Path) -> None:
    alone = run_here("train.py", DEMO, f"--run.out={tmp_path}", "--train.sharding=full")
    assert alone.returncode == 2
    (sentence,) = re.findall(r"^train\.py: .*", alone.stderr, re.MULTILINE)
    assert "torchrun --nproc-per-node N" in sentence
    muon = ["--optimizer.name=muon", "--train.sharding=full", "--gpus=2", "--gpu=RTX 4070"]
    planned = run_here("plan.py", DEMO, *muon)
    assert planned.returncode == 2
    assert "muon needs whole matrices" in planned.stderr
    assert len(planned.stderr.splitlines()) == 1
    assert not (tmp_path / "demo").exists()


def test_a_sharded_plan_takes_less_memory_and_more_time() -> None:
    """A model of 1.5 B parameters fits on two GPUs of 24 GB only if it is sharded."""
    found = {}
    for sharding in ("none", "full"):
        model = ["--model.n-layer=48", "--model.n-head=25", "--model.n-embd=1600"]
        cards = ["--gpu=RTX 4090", "--gpus=2", f"--train.sharding={sharding}", "--json"]
        sizes = ["--model.vocab-size=50304", "--model.block-size=1024", "--train.micro-batch=1"]
        done = succeed(run_here("plan.py", DEMO, *model, *sizes, "--train.grad-accum=16", *cards))
        found[sharding] = json.loads(done.stdout)
    rows = {s: {row["id"]: row["analytic"] for row in plan["rows"]} for s, plan in found.items()}
    peaks = {s: of["peak_allocated_bytes"]["expected"] for s, of in rows.items()}
    state = 16 * rows["full"]["parameters_total"]["expected"]  # weights, gradients, moments
    assert peaks["none"] - peaks["full"] > 0.5 * state
    assert found["none"]["fit"]["verdict"] == "does not fit"
    assert found["full"]["fit"]["verdict"] != "does not fit"
    seconds = {s: of["step_seconds"]["expected"] for s, of in rows.items()}
    assert seconds["full"] > seconds["none"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("ranks", "section", "micro_batch", "grad_accum", "checkpointing"),
    [
        (2, {"n_layer": 4, "n_embd": 64, "vocab_size": 512, "block_size": 64}, 4, 1, "none"),
        (2, {"n_layer": 4, "n_embd": 128, "vocab_size": 1024, "block_size": 32}, 4, 2, "full"),
        (8, SMALL_VOCABULARY, 2, 2, "none"),
        (8, SMALL_VOCABULARY, 2, 1, "full"),
        (2, {"n_layer": 3, "n_embd": 64, "vocab_size": 8192, "block_size": 16}, 2, 1, "full"),
        (8, UNTIED, 2, 1, "none"),
    ],
)
def test_the_peak_of_a_rank_is_what_the_allocator_measures(
    ranks: int, section: dict[str, Any], micro_batch: int, grad_accum: int, checkpointing: Any
) -> None:
    """torch's fake process group has no threads whose allocations the profiler would miss."""
    gc.collect()  # otherwise memory of earlier tests is freed during this one
    model = GPT(ModelSection(n_head=4, **section))
    model.recompute = checkpointing == "full"
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            copied = copy.deepcopy(model)  # so that its weights are recorded
            loss = ShardedLoss(copied, "chunked", grad_accum, torch.device("cpu"), "float32")
            optimizer = make_optimizer(copied, OptimizerSection())
            tokens = torch.randint(section["vocab_size"], (micro_batch, section["block_size"]))
            with torch.profiler.record_function("steps"):
                for _ in range(2):
                    for _ in range(grad_accum):
                        (loss(tokens, tokens) / grad_accum).backward()  # type: ignore[no-untyped-call]
                    full_tensor(torch.nn.utils.clip_grad_norm_(copied.parameters(), 1.0))
                    update(optimizer, scaler, torch.tensor(True))
                    optimizer.zero_grad(set_to_none=True)
    finally:
        dist.destroy_process_group()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    begin = next(e.start_ns() for e in events if e.name() == "steps")
    now = highest = 0
    for event in (e for e in events if e.name() == "[memory]"):
        now += event.nbytes()
        if event.start_ns() > begin:
            highest = max(highest, now)
    how: dict[str, Any] = {"dtype": "float32", "compiled": False, "checkpointing": checkpointing}
    how |= {"head": "chunked", "gpus": ranks, "sharding": "full"}
    work = Workload(shape_of(model.config), micro_batch, grad_accum, **how)
    assert predict_memory(work, CPU).allocated.expected == pytest.approx(highest, rel=0.05)
