"""Generate the run folder of a GPU run, with every kind of log line, from a fixed seed.

python bench/make_run.py STEPS FOLDER [--sensors 72000] [--until STEP]

bench/report.py and the tests of the pages read it. --until drops all lines after a step, like a run that crashed there.
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanogauge.cli import Parser, run_command
from nanogauge.config import Config, load_config
from nanogauge.hardware import lookup
from nanogauge.prediction.prediction import predict
from nanogauge.runlog.folder import create
from nanogauge.runlog.reader import LOG_NAME
from nanogauge.runspec import RunSpec

ROOT = Path(__file__).parents[1]
SEED = 20_000
GIB = 2**30
STEP_SECONDS, EVALUATION_SECONDS, COMPILE_SECONDS, START_SECONDS = 3.9, 15.3, 12.8, 6.0
PEAKS = {"peak_allocated_bytes": int(5.4 * GIB), "peak_reserved_bytes": int(6.1 * GIB)}
Fields = dict[str, Any]

MACHINE = {
    "device": "NVIDIA GeForce RTX 4070",
    "gpu_driver": "570.00",
    "gpu_memory_bytes": 12 * GIB,
    "cpu": "a processor",
    "cpu_cores": 16,
    "torch_threads": 8,
    "memory_bytes": 32 * GIB,
    "os": "Linux 6.1",
    "python": "3.11.7",
    "nanogauge": "0.1.0",
    "torch": "2.13.0",
    "numpy": "2.4.6",
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "git_dirty": True,
    "command": "train.py configs/rtx4070_fineweb.toml",
}
PROMPTS = ("The meaning of life is", "In the year 2050,")
WORDS = ["a", "model", "of", "few", "weights", "writes", "what", "it", "has", "read", "so", "far"]


def make_run(folder: Path, steps: int, sensors: int, until: int | None = None) -> None:
    """Write a run folder with everything that a chart marks; one step in a thousand is slow."""
    overrides: dict[str, dict[str, object]] = {"train": {"max_steps": steps}, "cost": {"price_per_kwh": 0.15}}
    config = load_config(ROOT / "configs" / "rtx4070_fineweb.toml", overrides)
    spec = RunSpec.from_config(config)
    prediction = predict(spec, lookup("RTX 4070", "bfloat16"))
    run_folder = create(folder, spec, MACHINE, prediction, config.to_toml())
    start = {
        "elapsed_seconds": START_SECONDS,
        "unix_time": 1.7642e9,
        "max_steps": steps,
        "prediction_sha256": run_folder.prediction_sha256,
        "device": "RTX 4070",
        "idle_power_watts": 12.0,
    }
    with (folder / LOG_NAME).open("w", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "start", **start}) + "\n")
        for kind, values in _lines(config, sensors, steps if until is None else until):
            file.write(json.dumps({"kind": kind, **values}, ensure_ascii=False) + "\n")


def _lines(config: Config, sensors: int, until: int) -> Iterator[tuple[str, Fields]]:
    """Yield all lines after the first in the order of their clock."""
    rng = random.Random(SEED)
    steps = config.train.max_steps
    every = steps * (STEP_SECONDS + EVALUATION_SECONDS / config.train.eval_every) / max(sensors, 1)
    clock, joules, read = START_SECONDS + COMPILE_SECONDS, 0.0, START_SECONDS
    yield "compile", _at(clock, seconds=COMPILE_SECONDS, mode="compiled")
    for step in range(min(until, steps)):
        if step % config.train.eval_every == 0:
            clock += EVALUATION_SECONDS
            yield from _evaluation(clock, step, rng)
        if step == steps // 3:
            clock += 9.0
            yield "compile", _at(clock, step=step, seconds=9.0, mode="compiled")
        seconds = STEP_SECONDS + rng.gauss(0, 0.01) + (25 * rng.random()) * (step % 997 == 996)
        clock += seconds
        yield "step", _step(config, clock, step, seconds, rng)
        if step == steps // 2:
            text = f"step {step:,} took four times the median: another program used the GPU"
            yield "event", _at(clock, level="alarm", what="slow_step", step=step, text=text)
        while sensors and read + every < clock:
            read += every
            watts = 190 + rng.gauss(0, 2)
            joules += watts * every
            yield "sensor", _reading(read, watts, joules, rng)
    if until < steps:
        return
    clock += EVALUATION_SECONDS
    yield from _evaluation(clock, steps, rng)
    text = "the data came late in 12 steps"
    yield "event", _at(clock, level="warning", what="data_wait", text=text)
    yield "end", _at(clock, status="finished", steps=steps, wall_seconds=clock, **PEAKS)


def _at(clock: float, **values: Any) -> Fields:
    return {"elapsed_seconds": round(clock, 6), **values}


def _loss(step: int) -> float:
    return 3.5 + 7.4 / (1 + step / 300)


def _evaluation(clock: float, step: int, rng: random.Random) -> Iterator[tuple[str, Fields]]:
    loss = _loss(step) + rng.gauss(0, 0.01)
    times = {"seconds": EVALUATION_SECONDS}
    yield "eval", _at(clock, step=step, train_loss=loss - 0.02, val_loss=loss, **times)
    if step:
        yield "checkpoint", _at(clock, step=step, seconds=0.8, bytes=491_000_000)
    text = "\n\n".join(f"{p} {' '.join(rng.choices(WORDS, k=40))}." for p in PROMPTS)
    yield "event", _at(clock, what="sample", step=step, text=text)


def _step(config: Config, clock: float, step: int, seconds: float, rng: random.Random) -> Fields:
    watts = 190 + rng.gauss(0, 2)
    values = _at(
        clock,
        step=step,
        loss=round(_loss(step) + rng.gauss(0, 0.05), 6),
        step_seconds=round(seconds, 7),
        data_wait_seconds=0.001,
        learning_rate=1e-3,
        grad_norm=round(0.4 + rng.random() / 5, 5),
        tokens=config.tokens_per_step,
        power_watts=round(watts, 3),
        power_min_watts=round(watts - 8, 3),
        power_max_watts=round(watts + 8, 3),
    )
    if step % config.measure.split_every == 0:
        values |= {"forward_seconds": 1.2, "backward_seconds": 2.6, "optimizer_seconds": 0.01}
        values |= PEAKS | {"peak_host_bytes": 2 * GIB}
    return values


def _reading(clock: float, watts: float, joules: float, rng: random.Random) -> Fields:
    warm = 1 - math.exp(-clock / 600)
    throttled = rng.random() < 0.02
    return _at(
        clock,
        power_watts=round(watts, 3),
        power_min_watts=round(watts - 5, 3),
        power_max_watts=round(watts + 9, 3),
        energy_joules=round(joules, 3),
        energy_source="counter",
        integral_joules=round(joules * 1.002, 3),
        power_limit_watts=200.0,
        temperature_celsius=round(38 + 30 * warm + rng.random()),
        fan=0.5,
        sm_clock_hz=2.61e9 - 1.5e8 * throttled - 3e7 * round(2 * warm),
        memory_clock_hz=10.5e9,
        utilization=0.99,
        throttle=["power cap"] if throttled else [],
        pcie_generation=4,
        pcie_width=16,
        device_used_bytes=int(7.2 * GIB),
        process_used_bytes=int(6.6 * GIB),
    )


def main(arguments: Sequence[str]) -> int:
    parser = Parser(__doc__ or "")
    parser.add_argument("steps", type=int, help="steps of the whole run")
    parser.add_argument("folder", type=Path, help="run folder to write")
    parser.add_argument("--sensors", type=int, default=72_000, help="number of sensor readings")
    parser.add_argument("--until", type=int, help="step at which the run crashed")
    args = parser.parse(arguments)
    make_run(args.folder, args.steps, args.sensors, args.until)
    return 0


if __name__ == "__main__":
    run_command(main)
