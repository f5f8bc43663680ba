"""The trainer's branch for CUDA with a tiny model, on the stand-in for a card."""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from commands import DEMO, ROOT, TINY, log_lines, rows_of, run, start_run, wait_for_step
from conftest import ON_CUDA, Run, train_tiny, waits

COMPILED = ("--run.compile=true", "--train.eval-every=12")
ABSENT = "energy fan utilization sm_clock memory_clock compute compute_v2 graphics graphics_v2 power_limit"
ABSENT += " event_reasons throttle_reasons"
WSL = "0 cuda_version 13000\n0 self_bytes -1\n" + "".join(f"0 error {call} 3\n" for call in ABSENT.split())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_tiny(tmp_path_factory.mktemp("runs") / "plain")


def test_the_doctor_lets_the_card_train() -> None:
    done = run("plan.py", DEMO, "--doctor", "--json", "--run.device=cuda")
    assert json.loads(done.stdout)["verdict"] != "no-go", done.stdout


KINDS = "run.dtype=bfloat16 run.dtype=float16 optimizer.name=muon run.deterministic=true train.head=plain"


@pytest.mark.parametrize("kind", [*KINDS.split(), "train.checkpointing=full"])
def test_no_step_waits_for_the_device(kind: str, tmp_path: Path) -> None:
    done = train_tiny(tmp_path / "r", "--train.grad-accum=3", "--run.dtype=bfloat16", f"--{kind}")
    assert done.status == 0, done.text
    steps = done.steps()
    assert len(steps) == 11
    for step in steps[1:3]:  # no evaluation or checkpoint
        # The end of the step before, and of the micro-batches before the last two.
        assert waits(step) == ["sync event blocking"] * 3
    assert not done.events("update_skipped")


def test_the_peak_of_a_small_model_is_the_predicted_one(plain: Run) -> None:
    peak, (end,) = plain.rows["peak_allocated_bytes"], plain.lines("end")
    assert peak["prediction"] == "held"
    assert peak["factor"] == pytest.approx(1, abs=0.03)
    lost = end["peak_reserved_bytes"] - end["peak_allocated_bytes"]
    assert end["peak_inactive_bytes"] == lost


def test_the_idle_power_is_measured_before_the_card_is_used(tmp_path: Path) -> None:
    began = time.monotonic()
    done = train_tiny(tmp_path / "r", "--measure.idle-seconds=2.5", "--train.max-steps=1")
    assert done.lines("start")[0]["idle_power_watts"] == pytest.approx(100)
    assert done.first_seconds - began > 2.5


def test_figures_are_read_when_the_device_has_copied_them(tmp_path: Path) -> None:
    done = train_tiny(tmp_path / "r", STANDIN_LAZY="1", STANDIN_US="200")
    assert done.status == 0, done.text
    assert not done.events("update_skipped")
    seconds = [line["step_seconds"] for line in done.lines("step")[1:]]
    assert min(seconds) > 0.2e-3 * 150  # of the device, which makes all launches of a step


@pytest.mark.parametrize("kind", ["kernel", "gemm"])
def test_out_of_memory_outside_of_torchs_allocator_makes_the_micro_batch_smaller(
    kind: str, plain: Run, tmp_path: Path
) -> None:
    """A kernel is loaded at its first launch; cuBLAS asks for a workspace."""
    before = plain.calls[: plain.ends_of_steps()[2]]
    at = sum(call.startswith(kind) for call in before) + 10
    done = train_tiny(tmp_path / "r", STANDIN_FAIL=f"{kind}:{at}-{at + 1}")
    assert done.status == 0, done.text
    assert [event["step"] for event in done.events("out_of_memory")] == [3]
    assert [line["step"] for line in done.lines("step")] == list(range(12))


@pytest.mark.parametrize(("when", "at"), [("evaluation", 4), ("step", 16)])
def test_out_of_memory_in_torchs_allocator_makes_the_micro_batch_smaller(when: str, at: int, tmp_path: Path) -> None:
    """The allocator tries twice."""
    larger = ("--model.block-size=256", "--model.n-embd=256", "--train.micro-batch=32")
    done = train_tiny(tmp_path / "r", *larger, STANDIN_FAIL=f"malloc:{at}-{at + 2}")
    assert done.status == 0, done.text
    assert len(done.events("out_of_memory")) == 1
    lines = [line["kind"] for line in log_lines(done.folder) if line.get("step") == 0]
    assert ("eval" in lines[: lines.index("event")]) == (when == "step")


@pytest.mark.parametrize("kind", ["malloc:2-4", "module:2-3"])
def test_out_of_memory_in_compilation_makes_the_micro_batch_smaller(kind: str, tmp_path: Path) -> None:
    """And not the run eager, nor a dimension symbolic; XDG_CACHE_HOME: nothing is compiled yet."""
    flags = (*COMPILED, "--run.dtype=bfloat16")
    logs = {"TORCH_LOGS": "recompiles,dynamic", "XDG_CACHE_HOME": str(tmp_path)}
    done = train_tiny(tmp_path / "r", *flags, fresh=True, STANDIN_FAIL=kind, **logs)
    assert done.status == 0, done.text
    assert len(done.events("out_of_memory")) == 1
    assert [line["mode"] for line in done.lines("compile")] == ["compiled"]
    assert "size mismatch" not in done.text and "create_symbol" not in done.text
    assert "Not enough SMs" not in done.text
    assert list((tmp_path / "nanogauge" / "compiled").rglob("*.cubin"))


def test_a_tuned_run_ends(tmp_path: Path) -> None:
    """Long kernels: torch then times each candidate a few times only."""
    flags = ("--run.compile=true", "--run.tune=true", "--run.dtype=bfloat16")
    done = train_tiny(tmp_path / "r", *flags, "--train.max-steps=3", STANDIN_US="1000")
    assert done.status == 0, done.text
    assert [line["mode"] for line in done.lines("compile")] == ["compiled"]


def test_after_non_finite_steps_the_run_rolls_back(tmp_path: Path) -> None:
    done = train_tiny(tmp_path / "r", "--train.max-steps=24", STANDIN_FAIL="figures:7-17")
    assert done.status == 0, done.text
    assert [event["step"] for event in done.events("rollback")] == [15]
    assert done.lines("end")[0]["steps"] == 24


def test_a_run_that_is_never_finite_fails_with_advice(tmp_path: Path) -> None:
    done = train_tiny(tmp_path / "r", STANDIN_FAIL="figures:1-99")
    assert done.status == 1
    assert "no checkpoint to roll back to; set a lower --optimizer.learning-rate" in done.text


def test_a_killed_run_resumes_and_a_finished_one_adds_nothing(tmp_path: Path) -> None:
    out = tmp_path / "r"
    with start_run(out, *ON_CUDA) as process:
        wait_for_step(out / "demo", 30)
        process.kill()
    done = train_tiny(out, "--train.max-steps=20000", "--resume=auto", "--rehearse=5")
    assert done.status == 0, done.text
    first = done.lines("start")[1]["first_step"]
    assert first >= 24 and first % 4 == 0
    last = done.lines("end")[-1]["steps"]
    flags = [f"--train.max-steps={last}", "--allow-change", "train.max_steps"]
    assert train_tiny(out, "--resume=auto", *flags).status == 0
    assert done.lines("end")[-1]["steps"] == last


def test_a_resumed_run_keeps_its_head_where_none_is_given(tmp_path: Path) -> None:
    begun = train_tiny(tmp_path / "r", "--train.head=plain", "--rehearse=5")
    resumed = train_tiny(tmp_path / "r", "--resume=auto")
    assert resumed.status == 0, resumed.text
    assert [json.loads((run.folder / "spec.json").read_text())["head"] for run in (begun, resumed)] == ["plain"] * 2


def test_as_in_wsl_each_number_is_absent_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "script").write_text(WSL)
    done = train_tiny(tmp_path / "r", FAKE_NVML_SCRIPT=str(tmp_path / "script"))
    assert done.status == 0, done.text
    assert done.rows["energy_kwh"]["measured"]["value"] > 0
    process = done.rows["peak_process_bytes"]
    assert process["measured"] is None and "the driver does not" in process["why"]


def test_an_old_driver_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("0 cuda_version 12040\n")
    variables = {"STANDIN_DRIVER": "12040", "FAKE_NVML_SCRIPT": str(tmp_path / "script")}
    done = train_tiny(tmp_path / "r", **variables)
    assert done.status == 2
    assert "12.4" in done.done.stderr and done.done.stderr.count("\n") == 1


def test_a_calibration_needs_no_clock_from_the_driver(tmp_path: Path) -> None:
    (tmp_path / "script").write_text(WSL)
    flags = ("--calibrate", "--json", "--run.compile=false", "--run.dtype=bfloat16", *ON_CUDA[:1])
    done = run("plan.py", DEMO, *flags, FAKE_NVML_SCRIPT=str(tmp_path / "script"))
    assert done.returncode == 0, done.stderr
    step = next(r for r in json.loads(done.stdout)["rows"] if r["id"] == "step_seconds")
    assert "measured" in step["calibrated"]["source"]


def test_text_is_sampled_on_the_card(plain: Run) -> None:
    done = run("sample.py", plain.folder, "--prompt=A", "--tokens=5")
    assert done.returncode == 0 and done.stdout, done.stderr


def test_gpu_check_measures_each_variant_and_writes_a_page(tmp_path: Path) -> None:
    flat = DEMO.read_text().replace("compile = true", "compile = false")
    (tmp_path / "demo.toml").write_text(flat)
    code = "import sys, gpu_check as g; g.TIMED_SECONDS = g.IDLE_SECONDS = 0.2; sys.exit(g.main())"
    words = [sys.executable, "-c", code, "speed", "--config", str(tmp_path / "demo.toml")]
    path = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(words, cwd=tmp_path, env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    speed = json.loads((tmp_path / "gpu-check.json").read_text())["speed"]
    assert len(speed["variants"]) == 8 and speed["idle_watts"] == pytest.approx(100)
    first = speed["variants"][0]["step_seconds"]
    assert first["measured"] > 0 < first["low"] < first["high"]
    assert "| head in 2 chunks | " in (tmp_path / "gpu-check.md").read_text()


def test_nanogauge_run_waits_only_for_the_step_before(tmp_path: Path) -> None:
    """A loop of the user's own queues a step, then reads the end and the loss of the one before."""
    code = f"""
import torch, nanogauge as ng
square = torch.ones(64, 64, device="cuda")
with ng.run("own", folder={str(tmp_path)!r}) as run:
    for _ in range(8):
        with run.step():
            loss = (square @ square).mean()
        run.log(loss=loss)
"""
    log = tmp_path / "calls"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "STANDIN_LOG": str(log)}, check=True)
    calls = [line.split(" ", 2)[2].split(" ")[0] for line in log.read_text(errors="replace").splitlines()]
    ends = [i for i, call in enumerate(calls) if call == "memcpy"]
    between = [calls[i:j] for i, j in pairwise(ends[1:])]
    assert between == [["memcpy", "gemm", "kernel", "sync", "sync"]] * 6
    steps = [line for line in log_lines(tmp_path / "own") if line["kind"] == "step"]
    assert len(steps) == 8 and steps[0]["peak_allocated_bytes"] > 0 and steps[0]["power_watts"] == 100


def test_a_watched_program_has_the_power_and_memory_of_its_card(tmp_path: Path) -> None:
    words = [
        "-m",
        "nanogauge",
        "watch",
        "--out",
        tmp_path / "w",
        "--",
        sys.executable,
        "train.py",
        DEMO,
        *TINY,
        *ON_CUDA,
    ]
    done = subprocess.run([sys.executable, *words, f"--run.out={tmp_path}"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "w")
    assert rows["power_watts"]["measured"]["value"] > 0 and rows["peak_process_bytes"]["measured"]["value"] > 2**30 / 2
