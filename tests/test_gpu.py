"""Tests that need a GPU: make gpu-check."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import deque
from pathlib import Path

import pytest
import torch
from commands import DEMO, ROOT, TINY, log_lines, rows_of, run, steps_of, succeed
from test_ranks import torchrun

from nanogauge.measure.clock import Clock, Stopwatch
from nanogauge.measure.sensors import MEASURED, Sensors, driver_info, open_sensors
from nanogauge.measure.torch_device import EventTimeline, allocator_peaks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="skipped: no GPU"),
]


FLAGS = [
    *(*TINY, "--run.device=cuda", "--run.dtype=auto", "--run.compile=true", "--model.n-embd=256"),
    *("--model.block-size=256", "--train.micro-batch=32", "--train.max-steps=400"),
]


def opened_sensors() -> Sensors:
    begin = time.monotonic()
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return open_sensors(uuid, 10.0, lambda: time.monotonic() - begin)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    done = succeed(run("train.py", DEMO, f"--run.out={out}", *FLAGS))
    print(done.stdout)
    return out / "demo"


def test_a_compiled_gpu_run_is_measured_and_its_peak_is_the_predicted_one(trained: Path) -> None:
    rows = rows_of(trained)
    for row in ("step_seconds", "mfu_palm", "peak_allocated_bytes", "peak_process_bytes"):
        assert rows[row]["measured"] is not None, rows[row]["why"]
    peak = rows["peak_allocated_bytes"]
    assert rows["peak_process_bytes"]["measured"]["value"] > peak["measured"]["value"]
    assert peak["analytic"]["low"] <= peak["measured"]["value"] <= peak["analytic"]["high"]
    (mode,) = [line["mode"] for line in log_lines(trained) if line["kind"] == "compile"]
    assert mode == "compiled"
    info = driver_info(str(torch.cuda.get_device_properties(0).uuid))
    if info.power_limit_watts is not None and "power_watts" not in info.absent:
        watts = rows["power_watts"]["measured"]["value"]
        assert 0 < watts <= 1.05 * info.power_limit_watts


def busy(seconds: float) -> None:
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()


def test_the_energy_counter_and_the_integral_of_power_agree() -> None:
    sensors = opened_sensors()
    if "energy_counter" in sensors.absent or "power_watts" in sensors.absent:
        sensors.close()
        pytest.skip(f"skipped: {dict(sensors.absent)}")
    busy(20)
    readings = [r for r in sensors.close() if r.energy_source == "counter"]
    first, last = readings[4], readings[-1]  # a board reports the mean of about a second
    assert first.energy_joules is not None and last.energy_joules is not None
    assert first.integral_joules is not None and last.integral_joules is not None
    counted = last.energy_joules - first.energy_joules
    integral = last.integral_joules - first.integral_joules
    print(f"{counted:.1f} J counted, {integral:.1f} J integrated, {integral / counted:.3f}")
    assert integral == pytest.approx(counted, rel=0.05)
    assert last.gap_seconds in (None, 0)


def test_cuda_events_agree_with_the_host_clock() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    a = torch.randn(4096, 4096, device=device)
    clock = Clock(torch.cuda.synchronize, timeline=EventTimeline(device))
    with clock.window():
        a @ a
    under_way: deque[Stopwatch] = deque()
    total = 0.0
    began = time.perf_counter()
    for index in range(41):
        if index < 40:
            watch = clock.begin_step(split=index % 10 == 0)
            for _ in range(10):
                a @ a
            watch.lap("forward")
            clock.end_step(watch)
            under_way.append(watch)
        while len(under_way) > (clock.lag if index < 40 else 0):
            total += under_way.popleft().read().step_seconds
    passed = time.perf_counter() - began
    print(f"{total:.4f} s by events, {passed:.4f} s by the host")
    assert total == pytest.approx(passed, rel=0.01)


def test_the_driver_counts_the_reserved_memory_and_a_context() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    held = torch.zeros(2**30, dtype=torch.uint8, device=device)
    reserved = allocator_peaks(device).reserved_bytes
    assert reserved is not None and reserved >= held.numel()
    sensors = opened_sensors()
    time.sleep(1.2)
    seen = [r.process_used_bytes for r in sensors.close() if r.process_used_bytes is not None]
    if not seen:
        pytest.skip(f"skipped: {sensors.absent['process_used_bytes']}")
    now = torch.cuda.memory_reserved(device)
    print(f"{seen[-1] / 2**30:.2f} GiB by the driver, {now / 2**30:.2f} reserved")
    assert now < seen[-1] < now + 2**30


def test_each_sensor_has_a_value_or_a_reason() -> None:
    sensors = opened_sensors()
    time.sleep(5.3)
    reading = sensors.close()[-2]
    print(reading, dict(sensors.absent), f"{sensors.cpu_seconds / 5:.3%} of a core")
    for name in MEASURED:
        assert (getattr(reading, name) is None) == (name in sensors.absent), name
    if reading.energy_source == "counter" and reading.integral_joules is not None:
        assert reading.energy_joules == pytest.approx(reading.integral_joules, rel=0.2)


def test_a_calibrated_plan_names_this_gpu_and_its_measurements() -> None:
    done = succeed(
        run("plan.py", DEMO, "--calibrate", "--run.device=cuda", "--run.dtype=auto", "--json")
    )
    rows = {row["id"]: row for row in json.loads(done.stdout)["rows"]}
    step = rows["step_seconds"]["calibrated"]
    assert 0 < step["low"] < step["expected"] < step["high"]
    assert "measured" in step["source"]


def test_a_run_on_a_gpu_resumes(trained: Path) -> None:
    flags = [f"--run.out={trained.parent}", "--resume=auto", *FLAGS]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    succeed(run("train.py", DEMO, *flags, CUDA_VISIBLE_DEVICES=visible))


def run_torchrun(ranks: int, out: Path, *flags: str) -> None:
    command = torchrun(ranks, out, *flags)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="skipped: fewer than two GPUs")
def test_two_gpus_shard_a_model_and_have_the_losses_of_one(tmp_path: Path) -> None:
    """With NCCL, 16 bits, which round, and compiled blocks; then resumed on one GPU."""
    sizes = ["--model.n-layer=4", "--model.n-embd=256", "--model.n-head=4", "--run.compile=true"]
    flags = ["--run.device=cuda", "--run.dtype=bfloat16", *sizes, "--measure.split-every=1"]
    flags += ["--train.max-steps=20"]
    one, two = tmp_path / "one", tmp_path / "two"
    run_torchrun(1, one, *flags)
    run_torchrun(2, two, *flags, "--train.sharding=full", "--rehearse=12")
    peak = rows_of(two / "demo")["peak_allocated_bytes"]
    assert peak["measured"]["value"] < 1.1 * peak["analytic"]["high"]
    run_torchrun(1, two, *flags, "--resume=auto", "--allow-change", "train.sharding")
    losses = [[line["loss"] for line in steps_of(out / "demo")] for out in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
