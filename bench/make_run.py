"""Write the folder of a GPU run that never was: every kind of line, from a seed.

python bench/make_run.py STEPS FOLDER [--sensors 72000] [--until STEP]

The benchmark of reports and the tests of the pages read such folders. --until leaves out all that
comes after a step, as of a run that died there.
"""

from __future__ import annotations

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
from nanogauge.runlog.reader import FILE_NAME

ROOT = Path(__file__).parents[1]
SEED = 20_000
GIB = 2**30
STEP_SECONDS, EVALUATION_SECONDS, COMPILE_SECONDS, START_SECONDS = 3.9, 15.3, 12.8, 6.0
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


def make_run(folder: Path, steps: int, sensors: int, until: int | None = None) -> None:
    """Write a run folder; a step in a thousand is slow, and all that a chart can mark is there."""
    overrides: dict[str, dict[str, object]] = {
        "train": {"max_steps": steps},
        "cost": {"price_per_kwh": 0.15},
    }
    config = load_config(ROOT / "configs" / "rtx4070_fineweb.toml", overrides)
    spec = config.to_spec()
    prediction = predict(spec, lookup("RTX 4070", "bfloat16"))
    made = create(folder, spec, MACHINE, prediction, config.to_toml())
    start = {
        "elapsed_seconds": START_SECONDS,
        "unix_time": 1.7642e9,
        "max_steps": steps,
        "prediction_sha256": made.prediction_sha256,
        "device": "RTX 4070",
        "idle_power_watts": 12.0,
    }
    with (folder / FILE_NAME).open("w", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "start", **start}) + "\n")
        for kind, values in _lines(config, sensors, until if until is not None else steps):
            file.write(json.dumps({"kind": kind, **values}, ensure_ascii=False) + "\n")


def _lines(config: Config, sensors: int, until: int) -> Iterator[tuple[str, Fields]]:
    """All lines after the first one; each is stamped with the clock as it then is."""
    chance = random.Random(SEED)
    steps = config.train.max_steps
    every = steps * (STEP_SECONDS + EVALUATION_SECONDS / config.train.eval_every) / max(sensors, 1)
    clock, joules, read = START_SECONDS + COMPILE_SECONDS, 0.0, START_SECONDS
    yield "compile", _at(clock, seconds=COMPILE_SECONDS, mode="compiled")
    for step in range(min(until, steps)):
        if step % config.train.eval_every == 0:
            clock += EVALUATION_SECONDS
            yield from _evaluation(clock, step, chance)
        if step == steps // 3:
            clock += 9.0
            yield "compile", _at(clock, step=step, seconds=9.0, mode="compiled")
        seconds = (
            STEP_SECONDS + chance.gauss(0, 0.01) + (25 * chance.random()) * (step % 997 == 996)
        )
        clock += seconds
        yield "step", _step(config, clock, step, seconds, chance)
        if step == steps // 2:
            text = f"step {step:,} took four times the median: something else used the card"
            yield "event", _at(clock, level="alarm", what="slow_step", step=step, text=text)
        while sensors and read + every < clock:
            read += every
            watts = 190 + chance.gauss(0, 2)
            joules += watts * every
            yield "sensor", _reading(read, watts, joules, chance)
    if until < steps:
        return
    clock += EVALUATION_SECONDS
    yield from _evaluation(clock, steps, chance)
    text = "the data came late in 12 steps"
    yield "event", _at(clock, level="warning", what="data_wait", text=text)
    ended = {"peak_allocated_bytes": int(5.4 * GIB), "peak_reserved_bytes": int(6.1 * GIB)}
    yield "end", _at(clock, status="finished", steps=steps, wall_seconds=clock, **ended)


def _at(clock: float, **values: Any) -> Fields:
    return {"elapsed_seconds": round(clock, 6), **values}


def _loss(step: int) -> float:
    return 3.5 + 7.4 / (1 + step / 300)


def _evaluation(clock: float, step: int, chance: random.Random) -> Iterator[tuple[str, Fields]]:
    loss = _loss(step) + chance.gauss(0, 0.01)
    times = {"seconds": EVALUATION_SECONDS}
    yield "eval", _at(clock, step=step, train_loss=loss - 0.02, val_loss=loss, **times)
    if step:
        yield "checkpoint", _at(clock, step=step, seconds=0.8, bytes=491_000_000)
    words = [
        "a",
        "model",
        "of",
        "few",
        "weights",
        "writes",
        "what",
        "it",
        "has",
        "read",
        "so",
        "far",
    ]
    text = "\n\n".join(f"{p} {' '.join(chance.choices(words, k=40))}." for p in PROMPTS)
    yield "event", _at(clock, what="sample", step=step, text=text)


def _step(config: Config, clock: float, step: int, seconds: float, chance: random.Random) -> Fields:
    watts = 190 + chance.gauss(0, 2)
    values = _at(
        clock,
        step=step,
        loss=round(_loss(step) + chance.gauss(0, 0.05), 6),
        step_seconds=round(seconds, 7),
        data_wait_seconds=0.001,
        learning_rate=1e-3,
        grad_norm=round(0.4 + chance.random() / 5, 5),
        tokens=config.tokens_per_step,
        power_watts=round(watts, 3),
        power_min_watts=round(watts - 8, 3),
        power_max_watts=round(watts + 8, 3),
    )
    if step % config.measure.split_every == 0:
        values |= {"forward_seconds": 1.2, "backward_seconds": 2.6, "optimizer_seconds": 0.01}
        values |= {"peak_allocated_bytes": int(5.4 * GIB), "peak_reserved_bytes": int(6.1 * GIB)}
        values |= {"peak_host_bytes": 2 * GIB}
    return values


def _reading(clock: float, watts: float, joules: float, chance: random.Random) -> Fields:
    warm = 1 - math.exp(-clock / 600)
    throttled = chance.random() < 0.02
    return _at(
        clock,
        power_watts=round(watts, 3),
        power_min_watts=round(watts - 5, 3),
        power_max_watts=round(watts + 9, 3),
        energy_joules=round(joules, 3),
        energy_source="counter",
        integral_joules=round(joules * 1.002, 3),
        power_limit_watts=200.0,
        temperature_celsius=round(38 + 30 * warm + chance.random()),
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
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("steps", type=int, help="steps of the whole run")
    parser.add_argument("folder", type=Path, help="run folder to make")
    parser.add_argument("--sensors", type=int, default=72_000, help="readings of the sensors")
    parser.add_argument("--until", type=int, help="the step at which the run died")
    given = parser.parse(arguments)
    make_run(given.folder, given.steps, given.sensors, given.until)
    return 0


if __name__ == "__main__":
    run_command(main)
