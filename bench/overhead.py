"""What the instruments cost: training steps with all of them, against the same steps with none.

python bench/overhead.py [--json] [--blocks 12]

Both loops run in one process on the same model, in turns of a few seconds, and a step is made as
long as `--step-ms`. With instruments it is train.py's own loop: clock, sensors at 10 Hz, run log,
alarms, terminal. Without a card the sensors read a stand-in for the driver (tests/fake_nvml.c).

Wall time on a machine that others use is unsteady, so the processor time that the instruments take
is printed beside it: in the loop's thread, as the difference of both loops where the model is one
number, and in the sampling thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import nanogauge.threads  # noqa: E402, F401  before torch

# isort: split
import torch  # noqa: E402
from results import result  # noqa: E402
from torch import nn  # noqa: E402

import train  # noqa: E402
from nanogauge.admission import watched_cards  # noqa: E402
from nanogauge.cli import Parser, run_command  # noqa: E402
from nanogauge.config import load_config  # noqa: E402
from nanogauge.measure.gpu import open_sensors  # noqa: E402
from nanogauge.schedule import learning_rate  # noqa: E402
from nanogauge.session import Session, open_session  # noqa: E402
from nanogauge.training.device import autocast  # noqa: E402

PEER = "the same steps without instruments"


def bare(s: Session, begin: int, end: int) -> None:
    """The steps alone, as the shortest loop that trains."""
    config, parameters = s.config, list(s.model.parameters())
    schedule = s.folder.spec.schedule
    assert schedule is not None
    for step in range(begin, end):
        for group in s.optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule, config.train.max_steps)
        total = torch.zeros((), device=s.device)
        for micro in range(config.train.grad_accum):
            tokens, targets = s.batches.batch("train", step, micro)
            with autocast(s.device, s.dtype):
                loss = s.loss_of(tokens, targets) / config.train.grad_accum
            s.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        s.scaler.unscale_(s.optimizer)
        nn.utils.clip_grad_norm_(parameters, config.optimizer.grad_clip or math.inf)
        s.scaler.step(s.optimizer)
        s.scaler.update()
        s.optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(total.item()):
            raise ValueError(f"the loss became {total.item()}")


def instrumented(s: Session, begin: int, end: int) -> None:
    """The same steps in train.py's loop, which ends here without a checkpoint."""
    s.steps_done = s.first_step = begin
    s.last_step = end
    with contextlib.redirect_stdout(io.StringIO()):
        _, problem = train.train(s)
    if problem is not None:
        raise ValueError(problem)


def timed(loop: Callable[[Session, int, int], None], s: Session, begin: int, end: int) -> float:
    """Seconds of one step."""
    began = time.perf_counter()
    loop(s, begin, end)
    return (time.perf_counter() - began) / (end - begin)


def thread_seconds(loop: Callable[[Session, int, int], None], s: Session, steps: int) -> float:
    """Processor time of this thread for one step."""
    began = time.thread_time()
    loop(s, 1, 1 + steps)
    return (time.thread_time() - began) / steps


class OneNumber(nn.Module):
    """A model whose step costs next to nothing, so that what is around it can be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.number.sum()


def open_run(folder: Path, name: str, accumulation: int) -> Session:
    """The demo's model, eager, without evaluations and checkpoints, with a card's sensors."""
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
    config = load_config(ROOT / "configs" / "demo.toml", overrides)
    with contextlib.redirect_stdout(io.StringIO()):
        return open_session(config, False, None, None, True)


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("--blocks", type=int, default=12, help="turns of each loop that count")
    parser.add_argument("--step-ms", type=float, default=100.0, help="length of a step")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    given = parser.parse(arguments)
    vars(train)["save"] = lambda *_, **__: None  # nothing is saved
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not torch.cuda.is_available():
            library = folder / "libnvidia-ml.so.1"
            build = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library)]
            subprocess.run([*build, str(ROOT / "tests" / "fake_nvml.c"), "-lm"], check=True)
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        results = measure(folder, given.blocks, given.step_ms / 1e3)
    if given.json:
        print(json.dumps({"bench": "overhead", "results": results}))
        return 0
    for r in results:
        unit = 1.0 if r["id"].endswith("bytes") else 100.0
        shown = " ".join(f"{unit * r[key]:.3f}" for key in ("value", "low", "high"))
        print(f"{r['id']:28} {shown} {'B' if unit == 1 else '%'}  {r['case']}")
    return 0


def measure(folder: Path, blocks: int, step_seconds: float) -> list[dict[str, Any]]:
    """Each result over the blocks."""
    spans = []
    for accumulation in (1, 9):
        s = open_run(folder, f"probe{accumulation}", accumulation)
        s.sensors.close()
        spans.append(min(timed(bare, s, 10 * i, 10 * i + 10) for i in range(6)))
    per_micro_batch = (spans[1] - spans[0]) / 8
    wanted = 1 + round((step_seconds - spans[0]) / per_micro_batch)
    s = open_run(folder, "paired", max(1, wanted))
    cards, hz = watched_cards(s.config, s.device), s.config.measure.power_hz
    log = s.folder.path / "log.jsonl"
    s.sensors.close()
    steps = max(5, round(2.5 / step_seconds))
    wall, sampling, growth = [], [], []
    shown = 0.0
    for block in range(blocks + 1):
        begin = 1 + 2 * block * steps
        without = timed(bare, s, begin, begin + steps)
        s.sensors = open_sensors(cards, hz, s.clock.elapsed_seconds)
        size, began = log.stat().st_size, time.perf_counter()
        with_all = timed(instrumented, s, begin + steps, begin + 2 * steps)
        passed = time.perf_counter() - began
        s.sensors.close()
        if block:
            shown = with_all
            wall.append(with_all / without - 1)
            sampling.append(s.sensors.cpu_seconds / passed)
            growth.append((log.stat().st_size - size) / steps)
    model = OneNumber()
    s.model, s.loss_of = model, model  # type: ignore[assignment]
    s.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    s.batches.batch = lambda *_: (model.number, model.number)  # type: ignore[method-assign]
    s.sensors = open_sensors(cards, hz, s.clock.elapsed_seconds)
    s.batches.grad_accum = 1
    dry = []
    for _ in range(blocks):
        without = thread_seconds(bare, s, 500)
        dry.append((thread_seconds(instrumented, s, 500) - without) / step_seconds)
    s.sensors.close()
    case = f"steps of {1e3 * shown:.0f} ms, sensors at {hz:g} Hz"
    return [
        result("overhead_fraction", f"wall time, {case}", wall, PEER),
        result("loop_cpu_fraction", f"processor time of the loop, of {step_seconds} s", dry, PEER),
        result(
            "sampler_cpu_fraction",
            "processor time of the sampling thread, of a core",
            sampling,
            PEER,
        ),
        result("log_growth_bytes", f"of the log for each step, {case}", growth, PEER),
    ]


if __name__ == "__main__":
    run_command(main)
