"""Measure the overhead of measurement: training steps with it against the same steps without.

python bench/overhead.py [--json] [--blocks 12]

Both loops alternate in one process on the same model, in blocks of a few seconds. Gradient accumulation makes a step as
long as --step-ms. The measured loop is train.py's own: clock, sensors at 10 Hz, run log, alarms, terminal. Without a
GPU the sensors read a stand-in for the driver (tests/fake_nvml.c).

A loop of the user's own with nanogauge.run is measured step by step beside the same loop without it, and the start of
a process that imports nanogauge and predicts.

Wall time needs an idle machine. The CPU time of measurement is therefore printed too: that of the loop's thread, as the
difference of both loops on a model of one number, and that of the sampling thread.
"""

import contextlib
import ctypes
import io
import math
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import ROOT, Bench, Result, result, run_script

# isort: split
import torch
from torch import nn

import nanogauge as ng
import train
from nanogauge.config import load_config
from nanogauge.measure.sensors import open_sensors
from nanogauge.schedule import learning_rate
from trainer.run.flags import Options
from trainer.run.resources import watched_gpus
from trainer.run.session import Session
from trainer.run.startup import open_session
from trainer.step.device import autocast

PEER = "the same steps without measurement"


def bare(s: Session, begin: int, end: int) -> None:
    """Train without measurement."""
    config, state = s.config, s.state
    parameters = list(state.model.parameters())
    schedule = s.run.folder.spec.schedule
    assert schedule is not None
    for step in range(begin, end):
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule, config.train.max_steps)
        total = torch.zeros((), device=state.device)
        for micro in range(config.train.grad_accum):
            tokens, targets = s.batches.batch("train", step, micro)
            with autocast(state.device, state.dtype):
                loss = state.loss(tokens, targets) / config.train.grad_accum
            state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(parameters, config.optimizer.grad_clip or math.inf)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(total.item()):
            raise ValueError(f"the loss became {total.item()}")


def measured(s: Session, begin: int, end: int) -> None:
    """Train the same steps in train.py's loop."""
    s.steps.done = s.steps.first = begin
    s.steps.last = end
    with contextlib.redirect_stdout(io.StringIO()):
        _, problem = train.train(s)
    if problem is not None:
        raise ValueError(problem)


def timed(loop: Callable[[Session, int, int], None], s: Session, begin: int, end: int) -> float:
    """Return the wall time of a step in seconds."""
    began = time.perf_counter()
    loop(s, begin, end)
    return (time.perf_counter() - began) / (end - begin)


def thread_seconds(loop: Callable[[Session, int, int], None], s: Session, steps: int) -> float:
    """Return the CPU time of a step in this thread, in seconds."""
    began = time.thread_time()
    loop(s, 1, 1 + steps)
    return (time.thread_time() - began) / steps


class OneNumber(nn.Module):
    """A model of one parameter: its step time is almost all overhead."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.number.sum()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]


def open_run(folder: Path, name: str, accumulation: int, smallest: bool) -> Session:
    """Open a run of the demo, eager, without evaluations and checkpoints, with GPU sensors."""
    on_gpu = torch.cuda.is_available()
    overrides: dict[str, dict[str, object]] = {
        "run": {"name": name, "out": str(folder), "compile": False},
        "train": {
            "grad_accum": accumulation,
            "max_steps": 10**9,
            "eval_every": 10**9,
            "eval_batches": 1,
            "checkpoint_every": 10**9,
            "log_every": 10,
        },
        "measure": {"gpu": "auto" if on_gpu else "0", "idle_seconds": 0},
    }
    overrides["run"]["device"] = "auto" if on_gpu else "cpu"
    if smallest:
        overrides["model"] = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32}
    config = load_config(ROOT / "configs" / "demo.toml", overrides)
    with contextlib.redirect_stdout(io.StringIO()):
        return open_session(config, Options(force=True))


def measure_library(folder: Path, args: Any) -> list[Result]:
    """Time steps of a loop of the user's own, in turn with the same steps without it; and its start."""
    step_seconds, loss, blocks = args.step_ms / 1e3, torch.tensor(3.0), args.blocks
    wall, cpu = [], []
    with ng.run("own", folder=folder) as run:

        def step(recording: bool) -> tuple[float, float]:
            began = time.perf_counter(), time.thread_time()
            with run.step() if recording else contextlib.nullcontext():
                time.sleep(step_seconds)  # the host waits for its device
            if recording:
                run.log(loss=loss)
            return time.perf_counter() - began[0], time.thread_time() - began[1]

        for _ in range(blocks):
            pairs = [(step(False), step(True)) for _ in range(max(5, round(args.block_seconds / step_seconds)))]
            without, recorded = (
                [sum(column) for column in zip(*each, strict=True)] for each in zip(*pairs, strict=True)
            )
            wall.append(recorded[0] / without[0] - 1)
            cpu.append((recorded[1] - without[1]) / without[0])
    spec = "ng.RunSpec.from_toml('configs/demo.toml')"
    starts = []
    for name, call in (("import", ""), ("import and predict", f"ng.predict({spec}, gpu='RTX 4070'); ")):
        code = f"import nanogauge as ng, sys, time; {call}assert 'torch' not in sys.modules; print(time.process_time())"
        seconds = [
            float(run_script("-c", code)) - float(run_script("-c", "import time; print(time.process_time())"))
            for _ in range(blocks)
        ]
        starts.append(result("start_cpu_seconds", f"CPU time of {name}, without torch", seconds, None))
    case = f"with nanogauge.run, steps of {args.step_ms:g} ms"
    return [
        result("library_overhead_fraction", f"wall time {case}", wall, PEER),
        result("library_cpu_fraction", f"CPU time of the loop {case}", cpu, PEER),
        *starts,
    ]


def run(args: Any) -> list[Result]:
    vars(train)["save"] = lambda *_, **__: None  # no checkpoint at the end of a block
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not torch.cuda.is_available():
            library = folder / "libnvidia-ml.so.1"
            build = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library)]
            subprocess.run([*build, str(ROOT / "tests" / "fake_nvml.c"), "-lm"], check=True)
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        return measure(folder, args) + measure_library(folder, args)


def measure(folder: Path, args: Any) -> list[Result]:
    """Choose the gradient accumulation for the step length, then time both loops in turn."""
    blocks, step_seconds, dry_steps = args.blocks, args.step_ms / 1e3, args.steps
    spans = []
    for accumulation in (1, 9):
        s = open_run(folder, f"probe{accumulation}", accumulation, args.smallest)
        s.recorder.sensors.close()
        spans.append(min(timed(bare, s, 10 * i, 10 * i + 10) for i in range(min(6, blocks))))
    per_micro_batch = (spans[1] - spans[0]) / 8
    accumulation = 1 + round((step_seconds - spans[0]) / per_micro_batch)
    s = open_run(folder, "paired", max(1, accumulation), args.smallest)
    gpus, hz = watched_gpus(s.config, s.state.device), s.config.measure.power_hz
    log = s.run.folder.path / "log.jsonl"
    s.recorder.sensors.close()
    steps = max(5, round(args.block_seconds / step_seconds))
    wall, sampling, growth = [], [], []
    shown = 0.0
    for block in range(blocks + 1):
        begin = 1 + 2 * block * steps
        without = timed(bare, s, begin, begin + steps)
        s.recorder.sensors = open_sensors(gpus, hz, s.recorder.clock.elapsed_seconds)
        size, began = log.stat().st_size, time.perf_counter()
        with_all = timed(measured, s, begin + steps, begin + 2 * steps)
        passed = time.perf_counter() - began
        s.recorder.sensors.close()
        if block:
            shown = with_all
            wall.append(with_all / without - 1)
            sampling.append(s.recorder.sensors.cpu_seconds / passed)
            growth.append((log.stat().st_size - size) / steps)
    model = OneNumber()
    s.state.model, s.state.loss = model, model  # type: ignore[assignment]
    s.state.reduced_loss = model
    s.state.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    s.batches.batch = lambda *_: (model.number, model.number)  # type: ignore[method-assign]
    s.recorder.sensors = open_sensors(gpus, hz, s.recorder.clock.elapsed_seconds)
    s.batches.grad_accum = 1
    dry = []
    for _ in range(blocks):
        without = thread_seconds(bare, s, dry_steps)
        dry.append((thread_seconds(measured, s, dry_steps) - without) / step_seconds)
    s.recorder.sensors.close()
    case = f"steps of {1e3 * shown:.0f} ms, sensors at {hz:g} Hz"
    return [
        result("overhead_fraction", f"wall time, {case}", wall, PEER),
        result("loop_cpu_fraction", f"CPU time of the loop, of {step_seconds} s", dry, PEER),
        result("sampler_cpu_fraction", "CPU time of the sampling thread, of a core", sampling, PEER),
        result("log_growth_bytes", f"log bytes per step, {case}", growth, PEER),
    ]


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_size("--blocks", 12, 1, "counted blocks of each loop, after one that warms up")
    bench.add_size("--step-ms", 100.0, 10.0, "length of a step in ms")
    bench.add_size("--block-seconds", 2.5, 0.05, "length of a block in s")
    bench.add_size("--steps", 500, 20, "steps per block of the CPU time measurement")
    bench.run(run)
