"""Tests that need a GPU: make gpu-check."""

import math
import subprocess
import time
from collections import deque
from pathlib import Path
from typing import Literal
from unittest import mock

import pytest
import torch
from commands import DEMO, ROOT, TINY, log_lines, rows_of, run, steps_of, succeed
from test_ranks import torchrun
from torch import Tensor, nn

from model import GPT
from nanogauge.config import ModelSection, OptimizerSection
from nanogauge.measure.clock import Clock, Stopwatch
from nanogauge.measure.sensors import Sensors, driver_info, open_sensors
from nanogauge.measure.torch_device import EventTimeline, allocator_peaks
from nanogauge.schema import Sensor
from trainer.step.device import autocast
from trainer.step.loss import TrainingLoss
from trainer.step.optimizer import make_optimizer, update

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="skipped: no GPU")]


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


SHAPE = ModelSection(n_layer=2, n_head=2, n_embd=128, block_size=128, vocab_size=5000)
CUDA = torch.device("cuda")


def loss_and_gradients(
    head: Literal["plain", "chunked"], dtype: str, compiled: bool, cap: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients of 16 sequences in two micro-batches, the head in 3 chunks."""
    torch.manual_seed(1)
    model = GPT(SHAPE.model_copy(update={"logit_softcap": cap})).to(CUDA)
    loss = TrainingLoss(model, head, 2, CUDA)
    if compiled:
        torch._dynamo.reset()
        loss.compile()
    values, scale = [], 2.0**12 if dtype == "float16" else 1.0
    with mock.patch("trainer.step.loss.chunk_tokens", return_value=384):
        for tokens, targets in torch.randint(5000, (2, 2, 8, 128), device=CUDA):
            with autocast(CUDA, dtype):
                values.append(loss(tokens, targets) / 2)
            (scale * values[-1]).backward()
    gradients = {name: p.grad / scale for name, p in model.named_parameters()}
    return torch.stack(values).sum().detach(), gradients


@pytest.mark.parametrize("cap", [0.0, 15.0])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-4), ("bfloat16", 2e-2), ("float16", 4e-3)])
def test_the_chunked_head_has_the_plain_heads_loss_and_gradients(
    dtype: str, error: float, compiled: bool, cap: float
) -> None:
    """Against the plain head, eager in fp32."""
    loss, gradients = loss_and_gradients("plain", "float32", False, cap)
    found, theirs = loss_and_gradients("chunked", dtype, compiled, cap)
    assert float(found) == pytest.approx(float(loss), rel=error)
    for name, gradient in gradients.items():
        off = float((theirs[name] - gradient).norm() / gradient.norm())
        print(f"{off:.2e} {name}")
        assert off < error, name


def train_on(device: str, out: Path, *flags: str) -> list[float]:
    done = run("train.py", DEMO, f"--run.out={out}", *TINY, f"--run.device={device}", *flags)
    assert done.returncode == 0, done.stderr
    return [line["loss"] for line in steps_of(out / "demo")]


def test_the_losses_are_those_of_the_cpu(tmp_path: Path) -> None:
    flags = ("--train.max-steps=60", "--model.dropout=0", "--run.dtype=float32")
    losses = [train_on(device, tmp_path / device, *flags) for device in ("cuda", "cpu")]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


@pytest.mark.parametrize(
    "flags",
    [
        ["--run.dtype=float16"],
        ["--optimizer.name=muon", "--run.dtype=bfloat16", "--run.compile=true"],
        ["--run.deterministic=true"],
        ["--train.checkpointing=full", "--run.compile=true"],
    ],
    ids=lambda flags: flags[0].removeprefix("--"),
)
def test_the_loss_falls(flags: list[str], tmp_path: Path) -> None:
    losses = train_on("cuda", tmp_path, "--train.max-steps=60", *flags)
    assert None not in losses
    assert losses[-1] < losses[0] - 0.3


def test_a_resumed_run_has_the_losses_of_an_undisturbed_one(tmp_path: Path) -> None:
    exact = ("--run.deterministic=true", "--train.max-steps=24")
    whole = train_on("cuda", tmp_path / "whole", *exact)
    train_on("cuda", tmp_path / "parts", *exact, "--rehearse=10")
    assert train_on("cuda", tmp_path / "parts", *exact, "--resume=auto") == whole


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_non_finite_gradient_leaves_every_weight_as_it_was(name: Literal["adamw", "muon"], scaled: bool) -> None:
    """And the step synchronizes the host with the device nowhere."""
    model = GPT(SHAPE).to(CUDA)
    optimizer = make_optimizer(model, OptimizerSection(name=name))
    scaler = torch.amp.GradScaler("cuda", enabled=scaled)
    tokens, targets = torch.randint(5000, (2, 8, 128), device=CUDA)
    loss = TrainingLoss(model, "chunked", 1, CUDA)
    for factor in (1.0, math.nan):
        before = [p.detach().clone() for p in model.parameters()]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with autocast(CUDA, "float16" if scaled else "bfloat16"):
                value = loss(tokens, targets)
            scaler.scale(value).backward()
            model.blocks[0].mlp.c_proj.weight.grad.mul_(factor)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
            update(optimizer, scaler, torch.isfinite(norm))
            optimizer.zero_grad(set_to_none=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        same = [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
        assert not any(same) if factor == 1.0 else all(same)


def test_out_of_memory_makes_the_micro_batch_smaller_and_no_shape_symbolic(tmp_path: Path) -> None:
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(0, free - 2**31), dtype=torch.uint8, device=CUDA)
    flags = [f"--run.out={tmp_path}", *FLAGS, "--force", "--train.max-steps=20"]
    large = ["--model.block-size=1024", "--model.n-layer=4", "--train.micro-batch=128"]
    logs = {"TORCH_LOGS": "recompiles,dynamic"}
    done = succeed(run("train.py", DEMO, *flags, *large, "--train.grad-accum=1", **logs))
    del held
    assert "Memory ran out" in done.stdout
    assert "size mismatch" not in done.stderr and "create_symbol" not in done.stderr


def busy(seconds: float) -> None:
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()


def test_the_energy_counter_and_the_integral_of_power_agree() -> None:
    sensors = opened_sensors()
    if {"energy_counter", "power_watts"} & sensors.reasons().keys():
        sensors.close()
        pytest.skip(f"skipped: {sensors.reasons()}")
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
    reserved = allocator_peaks(device)["peak_reserved_bytes"]
    assert reserved is not None and reserved >= held.numel()
    sensors = opened_sensors()
    time.sleep(1.2)
    seen = [r.process_used_bytes for r in sensors.close() if r.process_used_bytes is not None]
    if not seen:
        pytest.skip(f"skipped: {sensors.reasons()['process_used_bytes']}")
    now = torch.cuda.memory_reserved(device)
    print(f"{seen[-1] / 2**30:.2f} GiB by the driver, {now / 2**30:.2f} reserved")
    assert now < seen[-1] < now + 2**30


def test_each_sensor_has_a_value_or_a_reason() -> None:
    sensors = opened_sensors()
    time.sleep(5.3)
    reading = sensors.close()[-2]
    print(reading, sensors.reasons(), f"{sensors.cpu_seconds / 5:.3%} of a core")
    computed = {
        "power_min_watts",
        "power_max_watts",
        "energy_joules",
        "energy_source",
        "integral_joules",
        "gap_seconds",
    }
    computed |= {"hottest_card", "fullest_card", "slowest_card"}
    for name in Sensor.model_fields.keys() - computed:
        assert (getattr(reading, name) is None) == (name in sensors.reasons()), name
    if reading.energy_source == "counter" and reading.integral_joules is not None:
        assert reading.energy_joules == pytest.approx(reading.integral_joules, rel=0.2)


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
