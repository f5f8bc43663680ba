"""Run folders with logs that were written rather than trained: of any length, cut anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from examples import documented_spec

from nanogauge.hardware import lookup
from nanogauge.predict.prediction import predict
from nanogauge.records import Prediction
from nanogauge.runfolder import create
from nanogauge.runlog import FILE_NAME
from nanogauge.runspec import RunSpec

EVERY = 50
EVALUATION_SECONDS = 15.0
START_SECONDS = 20.0


@cache
def prediction_of(steps: int) -> tuple[RunSpec, Prediction]:
    spec = replace(documented_spec(), steps=steps, eval_every=EVERY, checkpoint_every=EVERY)
    return spec, predict(spec, lookup("RTX 4070", "bfloat16"))


def make_folder(
    folder: Path, max_steps: int = 1000, name: str = "made", unix_time: float | None = 1.7e9
) -> None:
    """A run that has begun: everything but steps."""
    spec, prediction = prediction_of(max_steps)
    made = create(folder, replace(spec, name=name), {"device": "made"}, prediction)
    start = {
        "kind": "start",
        "elapsed_seconds": 1.0,
        "unix_time": unix_time,
        "max_steps": max_steps,
        "prediction_sha256": made.prediction_sha256,
        "device": "RTX 4070",
    }
    compiled = {
        "kind": "compile",
        "elapsed_seconds": START_SECONDS,
        "seconds": 12.0,
        "mode": "compiled",
    }
    write(folder, lines([start, compiled]))


def steps(
    begin: int,
    end: int,
    step_seconds: Callable[[int], float] = lambda _: 3.9,
    evaluation_seconds: Callable[[int], float] = lambda _: EVALUATION_SECONDS,
) -> bytes:
    """The lines of these steps, with an evaluation and a checkpoint every EVERY steps."""
    elapsed, made = START_SECONDS, []
    for step in range(end):
        if step % EVERY == 0:
            seconds = evaluation_seconds(step)
            elapsed += seconds
            evaluation = {"kind": "eval", "val_loss": 4.0, "seconds": seconds}
            made.append({**evaluation, "elapsed_seconds": elapsed, "step": step})
            if step > 0:
                elapsed += 1.0
                saved = {"kind": "checkpoint", "seconds": 1.0}
                made.append({**saved, "elapsed_seconds": elapsed, "step": step})
        elapsed += step_seconds(step)
        line = {"kind": "step", "elapsed_seconds": elapsed, "step": step, "loss": 4.5}
        made.append({**line, "step_seconds": step_seconds(step), "data_wait_seconds": 0.001})
    return lines([line for line in made if line["step"] >= begin])


def end(status: str, done: int, elapsed_seconds: float) -> bytes:
    line = {"kind": "end", "status": status, "steps": done, "elapsed_seconds": elapsed_seconds}
    return lines([line])


def event(text: str, level: str = "info") -> bytes:
    return lines([{"kind": "event", "level": level, "what": "told", "text": text}])


def lines(values: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def write(folder: Path, data: bytes) -> None:
    """Append to the log of a run, as its process does."""
    with (folder / FILE_NAME).open("ab") as file:
        file.write(data)


def make_finished(folder: Path, name: str = "made", step_seconds: float = 3.9) -> None:
    make_folder(folder, max_steps=100, name=name)
    write(folder, steps(0, 100, lambda _: step_seconds))
    last = json.dumps({"kind": "eval", "step": 100, "val_loss": 3.9, "seconds": 15.0})
    write(folder, last.encode() + b"\n")
    write(folder, end("finished", 100, START_SECONDS + 100 * step_seconds + 46.0))
