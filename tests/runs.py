"""Runs in which every figure is chosen: as records, as a run folder, and as a printed log."""

import json
import math
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from examples import DOCUMENTED, documented_spec

from nanogauge.analysis.measured import Measurements, measure
from nanogauge.hardware import lookup
from nanogauge.importers.described import Given
from nanogauge.importers.import_run import import_log
from nanogauge.prediction import prediction
from nanogauge.prediction.prediction import predict
from nanogauge.runlog.folder import create, load_with_log
from nanogauge.runlog.history import RunHistory
from nanogauge.runlog.reader import LOG_NAME
from nanogauge.runspec import RunSpec
from nanogauge.schema import Checkpoint, Compile, End, Eval, Event, LogLine, Prediction, Sensor, Start, Step

GIB = 2**30
EVERY = 50
"""steps between the evaluations of a run folder that make_folder begins"""
EVALUATION_SECONDS = 15.0
START_SECONDS = 20.0


def spec_of(steps: int, every: int | None = None) -> RunSpec:
    """Return the documented run with another length, and another cadence where one is given."""
    spec = replace(documented_spec(), steps=steps)
    return spec if every is None else replace(spec, eval_every=every, checkpoint_every=every)


@cache
def prediction_of(steps: int, every: int = EVERY) -> tuple[RunSpec, Prediction]:
    spec = spec_of(steps, every)
    return spec, predict(spec, lookup("RTX 4070", "bfloat16"))


@dataclass(frozen=True)
class MadeUp:
    """A run on an RTX 4070, one reading of its sensors a second; seconds, watts, joules, Hz."""

    steps: int = 60
    every: int = 20
    """steps between evaluations, and between checkpoints"""
    step: Callable[[int], float] = lambda _: 3.9
    wait: float = 0.0
    evaluation: float | Callable[[int], float] = EVALUATION_SECONDS
    checkpoint: float = 0.0
    compilation: float = 12.0
    died_at: Sequence[tuple[int, int]] = ()
    """pairs of the step after which a process died, and the one that the next went on from"""
    went_back: Collection[int] = ()
    """which of these, by their place, were no death: the process itself went back"""
    gap: float | None = None
    """between two processes; None: no line tells the time of day"""
    start_up: float = 6.0
    watts: float = 190.0
    watt_limit: float = 200.0
    clock_hz: float | None = 2.6e9
    throttled: Callable[[float], tuple[float, list[str]] | None] = lambda _: None
    """of the time: a clock, and the reasons; None while the card is not throttled"""
    clocked: bool = True
    """False: no line has a time, as in another program's log"""
    sensors: bool = True
    scale: dict[str, float] = field(default_factory=dict)
    """factors of fields, applied to every line that has them"""

    @property
    def spec(self) -> RunSpec:
        return prediction_of(self.steps, self.every)[0]

    @property
    def prediction(self) -> Prediction:
        return prediction_of(self.steps, self.every)[1]

    def recorded(self) -> RunHistory:
        recorded = RunHistory()
        for line in self.lines():
            recorded.add(line)
        return recorded

    def measured(self) -> Measurements:
        return measure(self.recorded(), self.spec, self.prediction)

    def lines(self) -> list[LogLine]:
        lines: list[LogLine] = []
        first, began, now = 0, 1.7e9, 0.0
        for place, (died, goes_on) in enumerate([*self.died_at, (self.steps, -1)]):
            lines += self._process(first, died, began, now)
            first, now = goes_on, max(line.elapsed_seconds or 0.0 for line in lines[-2:])
            if place not in self.went_back:
                began, now = began + now + (self.gap or 0.0), 0.0
        return [self._scaled(line) for line in lines]

    def _scaled(self, line: LogLine) -> LogLine:
        changed: dict[str, Any] = {
            name: round(value * self.scale[name]) if isinstance(value, int) else value * self.scale[name]
            for name, value in line
            if name in self.scale and value is not None
        }
        if not self.clocked:
            changed["elapsed_seconds"] = None
            if isinstance(line, Start):
                changed["source"] = "nanogpt_log"
        return line.model_copy(update=changed)

    def _process(self, first: int, last: int, began: float, now: float) -> list[LogLine]:
        continues = True if now else None
        told = now or 0.5
        lines: list[LogLine] = [
            Start(
                elapsed_seconds=told,
                unix_time=None if self.gap is None else began + told,
                continues=continues,
                max_steps=self.steps,
                first_step=first,
                prediction_sha256="",
                device="RTX 4070",
            )
        ]

        def after(took: float, line: type[Any], **values: Any) -> None:
            nonlocal now
            lines.extend(self._readings(now, now + took))
            now += took
            lines.append(line(elapsed_seconds=now, **values))

        if not continues:
            now, seconds = self.start_up, self.compilation
            after(seconds, Compile, seconds=seconds, mode="compiled")
        for step in range(first, last + 1):
            if step % self.every == 0 or step == self.steps:
                seconds = self.evaluation
                seconds = seconds(step) if callable(seconds) else seconds
                after(seconds, Eval, step=step, val_loss=4.0, seconds=seconds)
                if step > first and self.checkpoint:
                    seconds = self.checkpoint
                    after(seconds, Checkpoint, step=step, seconds=seconds)
            if step == last:
                break
            after(
                self.step(step),
                Step,
                step=step,
                loss=4.0,
                step_seconds=self.step(step),
                data_wait_seconds=self.wait,
                peak_allocated_bytes=5 * GIB,
            )
        if last == self.steps:
            after(1.0, End, status="finished", steps=self.steps)
        return lines

    def _readings(self, begin: float, end: float) -> list[LogLine]:
        if not self.sensors:
            return []
        return [self._reading(float(second)) for second in range(int(begin) + 1, int(end) + 1)]

    def _reading(self, now: float) -> Sensor:
        held = self.throttled(now)
        clock_hz, reasons = held if held is not None else (self.clock_hz, [])
        return Sensor(
            elapsed_seconds=now,
            power_watts=self.watts,
            energy_joules=self.watts * now,
            energy_source="counter",
            power_limit_watts=self.watt_limit,
            sm_clock_hz=clock_hz,
            throttle=reasons or (["power cap"] if self.watt_limit < 200 else []),
            process_used_bytes=6 * GIB,
        )


def encoded(*records: LogLine) -> bytes:
    """Return the lines of a log."""
    dumped = ({"kind": r.kind, **r.model_dump(mode="json", exclude_none=True)} for r in records)
    return b"".join(json.dumps(values).encode() + b"\n" for values in dumped)


def write(folder: Path, data: bytes) -> None:
    """Append to the log of a run."""
    with (folder / LOG_NAME).open("ab") as file:
        file.write(data)


def make_folder(folder: Path, max_steps: int = 1000, name: str = "made", unix_time: float | None = 1.7e9) -> None:
    """Make the folder of a run that is compiled and has made no step."""
    spec, prediction = prediction_of(max_steps)
    made = create(folder, replace(spec, name=name), {"device": "made"}, prediction)
    start = Start(
        elapsed_seconds=1.0,
        unix_time=unix_time,
        max_steps=max_steps,
        prediction_sha256=made.prediction_sha256,
        device="RTX 4070",
    )
    compiled = Compile(elapsed_seconds=START_SECONDS, seconds=12.0, mode="compiled")
    write(folder, encoded(start, compiled))


def steps(
    begin: int,
    end: int,
    step_seconds: Callable[[int], float] = lambda _: 3.9,
    evaluation: float | Callable[[int], float] = EVALUATION_SECONDS,
) -> bytes:
    """Return the lines of these steps, with an evaluation and a checkpoint every EVERY steps."""
    run = MadeUp(
        steps=end,
        every=EVERY,
        step=step_seconds,
        wait=0.001,
        evaluation=evaluation,
        checkpoint=1.0,
        start_up=START_SECONDS - 12.0,
        sensors=False,
    )
    made = (line for line in run.lines() if isinstance(line, Step | Eval | Checkpoint))
    return encoded(*(line for line in made if begin <= line.step < end))


def end(status: str, done: int, elapsed_seconds: float) -> bytes:
    values = {"status": status, "steps": done, "elapsed_seconds": elapsed_seconds}
    return encoded(End.model_validate(values))


def event(text: str, level: str = "info") -> bytes:
    return encoded(Event.model_validate({"level": level, "what": "told", "text": text}))


def make_finished(folder: Path, name: str = "made", step_seconds: float = 3.9) -> None:
    make_folder(folder, max_steps=100, name=name)
    write(folder, steps(0, 100, lambda _: step_seconds))
    write(folder, encoded(Eval(step=100, val_loss=3.9, seconds=EVALUATION_SECONDS)))
    write(folder, end("finished", 100, START_SECONDS + 100 * step_seconds + 46.0))


def nanogpt_log(
    iterations: int,
    log_every: int,
    eval_every: int,
    step_ms: Callable[[int], float],
    evaluation_ms: float,
    compile_ms: float,
) -> str:
    """What nanoGPT prints: an iteration's time holds the evaluation and checkpoint in it."""
    lines = []
    for i in range(iterations + 1):  # its loop ends after the iteration numbered max_iters
        loss = 3.52 + 7.35 / (1 + i / 300)
        if i % eval_every == 0:
            lines.append(f"step {i}: train loss {loss:.4f}, val loss {loss:.4f}")
            if i > 0:
                lines.append("saving checkpoint to out")
        if i % log_every == 0:
            time = step_ms(i)
            time += evaluation_ms * (i % eval_every == 0) + compile_ms * (i == 0)
            mfu = 12.5 if i else -100
            lines.append(f"iter {i}: loss {loss:.4f}, time {time:.2f}ms, mfu {mfu:.2f}%")
    return "\n".join(lines) + "\n"


STEP_MS, EVALUATED_MS, FIRST_MS = 3909.8, 19_180.0, 32_025.0


def documented_log(step_ms: float = STEP_MS) -> str:
    """A log with the summary figures of a public run on an RTX 4070, by GitHub user lzwjava.

    20,000 iterations printed every 200, of 3909.8 ms, within 0.3 % of each other; an evaluation (with its checkpoint)
    every 500, which makes an iteration 19,180 ms; 32,025 ms for the first.
    """
    evaluation = EVALUATED_MS - STEP_MS
    return nanogpt_log(
        iterations=20_000,
        log_every=200,
        eval_every=500,
        step_ms=lambda i: step_ms + 5 * math.sin(i) * (i % 500 != 0),
        evaluation_ms=evaluation,
        compile_ms=FIRST_MS - STEP_MS - evaluation,
    )


LOG = nanogpt_log(
    iterations=1000, log_every=100, eval_every=500, step_ms=lambda _: 2000.0, evaluation_ms=9000.0, compile_ms=20_000.0
)


def imported(
    text: str | bytes, max_steps: int = 1000, run_number: int | None = None, name: str = "log.txt"
) -> tuple[RunHistory, Measurements]:
    """Import a log of the documented run with another length, and read back the run folder."""
    given = Given(DOCUMENTED, {"train": {"max_steps": max_steps}}, "RTX 4070")
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / name, Path(folder) / "run"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with patch.object(prediction, "time", SimpleNamespace(time=lambda: 0.0)):
            import_log(path, given, None, out, run_number)
        run, recorded = load_with_log(out)
    return recorded, measure(recorded, run.spec, run.prediction)


def texts(recorded: RunHistory, what: str) -> list[str]:
    """What the events of this kind say."""
    return [event.text for event in recorded.events if event.what == what]
