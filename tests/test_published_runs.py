"""Published runs: read without guesses, predicted within the bars, skipped with a reason."""

import csv
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from commands import run
from examples import SHARED, needs_shared

from bench.published_runs import COLUMNS, PublishedRun, read_runs
from nanogauge.prediction.flops import count_parameters
from nanogauge.prediction.memory import predict_memory
from nanogauge.prediction.step_time import predict_step_time

BENCH = "bench/validate_predictions.py"
RUNS = [SHARED / "data" / name for name in ("runs_dev.csv", "runs_dev2.csv")]
needs_runs = needs_shared("data/runs_dev2.csv")

GPT2 = {
    "id": "gpt2",
    "source": "someone/nanoGPT",
    "gpu": "RTX 4090 24GB (350W limit)",
    "n_gpus": "1",
    "precision": "bf16 autocast",
    "compile": "yes",
    "flash_attn": "yes (SDPA)",
    "n_layer": "12",
    "n_head": "12",
    "n_embd": "768",
    "block_size": "1024",
    "vocab_size": "50304",
    "micro_batch": "16",
    "grad_accum": "4",
    "world": "1",
    "activation_ckpt": "no",
    "optimizer": "AdamW fused",
    "iter_ms": "600",
    "confidence": "high",
}


def table(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / "runs.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS.split())
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_one(folder: Path, **changed: str) -> PublishedRun:
    runs, _, skipped = read_runs(table(folder, GPT2 | changed))
    assert not skipped, skipped
    return runs[0]


@cache
def validated() -> dict[str, dict[str, Any]]:
    done = run(BENCH, *map(str, RUNS), "--json")
    assert done.returncode == 0, done.stderr
    return {result["id"]: result for result in json.loads(done.stdout)["results"]}


@needs_runs
def test_the_published_runs_are_predicted_within_the_bars() -> None:
    found = {name: result["value"] for name, result in validated().items()}
    assert found["step_time_median_error"] <= 0.05
    assert found["step_time_p90_error"] <= 0.19
    assert found["step_time_coverage"] >= 0.85
    assert found["step_time_interval_width"] <= 1.6
    assert found["step_time_median_error_left_out"] <= 0.08
    assert found["step_time_p90_error_left_out"] <= 0.19
    assert 0.88 <= found["step_time_coverage_left_out"] <= 0.95
    assert found["step_time_interval_width_left_out"] <= 1.6
    assert found["step_time_median_error_class_left_out"] <= 0.08
    assert found["memory_median_error"] <= 0.06
    assert found["power_coverage"] == 1
    assert validated()["step_time_median_error"]["n"] >= 70
    assert found["step_time_median_error"] < found["one_mfu_median_error"] / 2


@needs_runs
def test_two_models_on_one_gpu_predict_each_other_within_three_percent() -> None:
    runs = {run.id: run for run in read_runs(RUNS[0])[0]}
    ratios = []
    for name in ("owner-4070-gpt-d384-drop0.1", "owner-4070-nanochat-d12"):
        step = predict_step_time(runs[name].work, runs[name].hardware)
        assert step is not None and runs[name].step_seconds is not None
        ratios.append(runs[name].step_seconds / step.seconds)
    assert max(ratios) / min(ratios) <= 1.03
    assert ratios[0] == pytest.approx(1, abs=0.08)


def test_columns_and_notes_become_a_workload(tmp_path: Path) -> None:
    plain = read_one(tmp_path)
    assert plain.complete
    assert plain.step_seconds == 0.6
    assert plain.hardware.name == "RTX 4090"
    assert plain.hardware.power_limit_watts == 350
    assert count_parameters(plain.work.shape).without_positions == 123_587_328
    llama = read_one(
        tmp_path,
        source_detail="Llama-style: 8q/4kv heads, SwiGLU, untied, dropout 0.1; window pattern SSL",
        n_head="8",
        params_m="150",
        optimizer="Muon(sharded)+AdamW",
        precision="bf16",
        world="4",
        gpu="H100 80GB HBM3 (SXM)",
        flash_attn="FA3",
    )
    shape = llama.work.shape
    assert (shape.n_kv_head, shape.mlp_matrices, shape.tied_head) == (4, 3, False)
    assert count_parameters(shape).total == pytest.approx(150e6, rel=0.01)
    assert shape.attended == pytest.approx(2 / 3)
    assert not shape.position_table
    assert llama.work.dropout == 0.1
    assert (llama.work.optimizer, llama.work.sharding) == ("muon", "optimizer")
    assert (llama.work.attention, llama.work.program.wide_residual) == ("flash3", False)
    assert llama.work.tokens_per_step == 16 * 1024 * 4 * 4


def test_the_step_time_is_read_from_any_published_figure(tmp_path: Path) -> None:
    tokens = 16 * 1024 * 4
    assert read_one(tmp_path, iter_ms="", tokens_per_sec="100000").step_seconds == tokens / 100_000
    total = "total_training_time: total_training_time 1000 s / 500 steps"
    assert read_one(tmp_path, iter_ms="", source_detail=total).step_seconds == 2
    assert read_one(tmp_path, iter_ms="", quote="AdamW ... 112.1-112.4 ms").step_seconds == pytest.approx(0.1121)
    flops = 6 * 123_587_328 + 12 * 12 * 768 * 1024
    by_mfu = read_one(tmp_path, iter_ms="", mfu_logged="30", mfu_peak_used_tflops="312")
    assert by_mfu.step_seconds == pytest.approx(flops * tokens / (0.3 * 312e12))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"gpu": "RTX 9999"}, "no card 'RTX 9999'"),
        ({"n_layer": ""}, "n_layer is not given"),
        ({"micro_batch": ""}, "micro_batch is not given"),
        ({"iter_ms": ""}, "neither a time nor a peak"),
        ({"iter_ms": "...", "quote": "took ... ms"}, "neither a time nor a peak"),
        ({"precision": "fp4"}, "fp4"),
        ({"optimizer": "SOAP"}, "SOAP"),
        ({"source_detail": "BERT fine-tuning"}, "encoder"),
        ({"source_detail": "tp-2"}, "tensor or pipeline"),
        ({"source_detail": "8 experts"}, "mixture"),
        ({"gpu": "T4"}, "bfloat16"),
        ({"n_head": "7"}, "multiple"),
    ],
)
def test_a_row_that_cannot_be_predicted_is_named_with_its_reason(
    tmp_path: Path, changed: dict[str, str], reason: str
) -> None:
    runs, _, skipped = read_runs(table(tmp_path, GPT2, GPT2 | {"id": "other"} | changed))
    assert [run.id for run in runs] == ["gpt2"]
    assert skipped[0].id == "other"
    assert reason in skipped[0].reason


def test_assumptions_are_listed(tmp_path: Path) -> None:
    run = read_one(tmp_path, precision="", compile="", flash_attn="", optimizer="")
    assert len(run.assumed) == 4
    assert run.work.compiled and run.work.attention == "flash"


def test_the_bench_works_on_any_such_table_and_refuses_others(tmp_path: Path) -> None:
    mixed = str(table(tmp_path, GPT2, GPT2 | {"id": "x", "gpu": "Abacus"}))
    done = run(BENCH, mixed, "--json")
    assert done.returncode == 0, done.stderr
    found = {result["id"]: result for result in json.loads(done.stdout)["results"]}
    assert found["rows_predicted"]["value"] == found["rows_skipped"]["value"] == 1
    assert found["step_time_median_error"]["value"] < 0.5
    assert found["memory_median_error"]["value"] is None
    assert "skipped: x: no card 'Abacus'" in run(BENCH, mixed).stdout
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for path in (other, tmp_path / "missing.csv", tmp_path):
        refused = run(BENCH, str(path))
        assert refused.returncode == 2
        assert str(path) in refused.stderr and "Traceback" not in refused.stderr


def test_the_same_model_refers_to_an_earlier_row_of_its_source(tmp_path: Path) -> None:
    first = GPT2 | {"source_detail": "8q/4kv heads hd64, MLP 2x ReLU2", "n_head": "8", "n_embd": "512"}
    second = first | {"id": "longer", "source_detail": "same model, other batch"}
    runs, _, _ = read_runs(table(tmp_path, first, second))
    assert runs[0].work.shape == runs[1].work.shape
    assert (runs[1].work.shape.n_kv_head, runs[1].work.shape.mlp_width) == (4, 1024)
    other, _, _ = read_runs(table(tmp_path, first, second | {"source": "someone else"}))
    assert other[1].work.shape.n_kv_head == 8


def test_a_row_that_leaves_out_compilation_is_read_by_its_memory(tmp_path: Path) -> None:
    """Without torch.compile the loss holds three tensors of logits in fp32."""
    compiled, eager = (
        predict_memory(replace(read_one(tmp_path).work, compiled=c), read_one(tmp_path).hardware) for c in (True, False)
    )
    for memory, expected in ((compiled, True), (eager, False)):
        run_ = read_one(tmp_path, compile="", peak_vram_mib=str(memory.allocated.expected / 2**20))
        assert run_.work.compiled is expected and "compile (yes)" in run_.assumed


def fitted_factors(*paths: Path) -> dict[str, float]:
    done = run("bench/fitting.py", *map(str, paths))
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(.+): x ([\d.]+) \+-", done.stdout, re.M)
    return {name: float(factor) for name, factor in found}


@needs_runs
def test_slow_runs_move_their_card_most_and_its_class_less(tmp_path: Path) -> None:
    """Other classes hardly move: one odd source does not define a class."""
    with RUNS[1].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["id"].startswith("mc-a40"):
            row["iter_ms"] = str(1.2 * float(row["iter_ms"]))
    before, after = fitted_factors(*RUNS), fitted_factors(RUNS[0], table(tmp_path, *rows))
    moved = {name: after[name] / before[name] - 1 for name in before}
    assert moved["A40"] > 0.05
    assert moved["A40"] > moved["ampere professional"] > 0
    assert abs(moved["hopper"]) < 0.02 and abs(moved["RTX 4070"]) < 0.02
