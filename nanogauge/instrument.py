"""Measure a training loop of your own: nanogauge.run opens a run folder and writes its report.

    with nanogauge.run("mine", spec=spec) as run:
        for step in range(spec.steps):
            with run.step():
                loss = train_one_step()
            run.log(loss=loss)

Nothing here waits for the device: on a GPU the times and the loss of a step are read while the next step runs. An error
of the sensors or of the report never ends the loop.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, SupportsFloat

from nanogauge.analysis.claims import load_claims
from nanogauge.analysis.report_model import build_report, claims_of
from nanogauge.analysis.verdicts import build_rows
from nanogauge.device import local_hardware
from nanogauge.doctor.machine import capture_environment
from nanogauge.errors import BadInput
from nanogauge.files import make_folder, stays_below, write_atomic
from nanogauge.measure.clock import Clock, Moment, Stopwatch
from nanogauge.measure.gpus import WatchedGpu
from nanogauge.measure.host import reset_peak
from nanogauge.measure.torch_device import CompileTimer, make_clock
from nanogauge.prediction.prediction import predict
from nanogauge.quantities import finite
from nanogauge.recorder import Display, MeasuredStep, Recorder, Status, open_sensing
from nanogauge.report.background import GPU_SECONDS, BackgroundReport
from nanogauge.report.html import write_report
from nanogauge.runlog.folder import CLAIMS_NAME, create
from nanogauge.runlog.lock import acquire_lock
from nanogauge.runlog.reader import has_begun
from nanogauge.runlog.writer import RunLog
from nanogauge.runspec import RunSpec
from nanogauge.schema import Checkpoint, Compile, Eval, Prediction, Start

_POWER_HZ = 10.0
_IDLE_SECONDS = 2.0
_PEAKS_EVERY = 50  # steps, as in train.py: reading the peaks takes time
_OF_A_STEP = ("loss", "learning_rate", "grad_norm")
_OF_AN_EVALUATION = ("train_loss", "val_loss", "val_bits_per_byte")
Phase = Literal["evaluation", "checkpoint", "compilation"]


@dataclass
class _Logged:
    """Values of a step or an evaluation; those on a device are copied without waiting."""

    values: dict[str, SupportsFloat] = field(default_factory=dict)
    copied: Moment = None
    """Moment at which the copies are complete; None without any."""

    def numbers(self, clock: Clock) -> dict[str, float]:
        """Return the values as numbers, once they are copied."""
        if self.copied is not None:
            clock.wait(self.copied)
        return {name: float(value) for name, value in self.values.items()}


@dataclass
class _PendingStep:
    number: int
    watch: Stopwatch
    logged: _Logged = field(default_factory=_Logged)
    measured: MeasuredStep | None = None
    """None until its times are read."""


def run(
    name: str,
    spec: RunSpec | None = None,
    plan: Prediction | None = None,
    folder: str | Path = "runs",
    claims: str | Path | None = None,
) -> Run:
    """Open the run folder `folder/name`, freeze its prediction and start measuring.

    Use the result in a with statement, whose end writes report.html, report.md and report.json. Under torchrun only
    rank 0 writes.

    >>> import nanogauge as ng
    >>> with ng.run("mine") as run:
    ...     for _ in range(3):
    ...         with run.step():
    ...             loss = 3.0
    ...         run.log(loss=loss)
    >>> (run.path / "report.html").exists()
    True

    Args:
        name: name of the run and of its folder.
        spec: what the run is; None if unknown, and then the report says of each row what it needs.
        plan: its prediction; None to predict it for this machine's device.
        folder: folder of all runs.
        claims: claims file to compare the run with.

    Raises:
        ValueError: if the folder already holds a run or is not below `folder`, or the claims cannot be used.
    """
    if not stays_below(name):
        raise BadInput(f"{name!r} is no name of a folder below {folder}; give this run another name.")
    path = Path(folder) / name
    spec = spec or RunSpec.undescribed()
    if int(os.environ.get("RANK", "0")) > 0:
        return Run(path, spec, None)
    if has_begun(path):
        raise BadInput(f"{path} already holds a run; give this one another name.")
    if plan is None:
        plan = predict(spec, local_hardware(spec.dtype))
    if claims is not None:
        build_rows(load_claims(Path(claims)), spec, plan, None)  # raises for claims that cannot be used
    return Run(path, spec, plan, Path(claims) if claims is not None else None)


class Run:
    """A training loop that is being measured; nanogauge.run opens one.

    Without a prediction it writes nothing, as on ranks other than 0.

    >>> import nanogauge as ng
    >>> run = ng.run("evaluated")
    >>> with run.phase("evaluation"):
    ...     run.log(val_loss=3.3)
    >>> run.finish().name
    'report.html'
    """

    def __init__(self, path: Path, spec: RunSpec, plan: Prediction | None, claims: Path | None = None) -> None:
        self.path = path
        self.spec = spec
        self._silent = plan is None
        self._next = 0
        self._pending: deque[_PendingStep] = deque()
        self._evaluation: _Logged | None = None
        if plan is None:
            return
        device = _cuda_device()
        timer = CompileTimer()
        if "torch._dynamo" in sys.modules:
            timer.listen()
        self._clock = clock = make_clock(device, timer.seconds)
        sensing = open_sensing(_gpus(device), _POWER_HZ, _IDLE_SECONDS, clock)
        torch = sys.modules.get("torch")
        threads = torch.get_num_threads() if torch is not None else os.cpu_count() or 1
        machine = capture_environment(plan.hardware.name, sensing.gpu, threads, Path.cwd())
        make_folder(path)
        self._lock = acquire_lock(path)
        sha256 = create(path, spec, machine, plan).prediction_sha256
        if claims is not None:
            write_atomic(path / CLAIMS_NAME, claims.read_bytes())
        reset_peak()
        self._log = RunLog(path, clock.elapsed_seconds)
        self._recorder = Recorder(self._log, Display(), clock, sensing, plan, device)
        start = Start(
            unix_time=time.time(),
            source="library",
            max_steps=spec.steps,
            prediction_sha256=sha256,
            device=plan.hardware.name,
            ranks=spec.world_size,
        )
        self._log.write(start.model_copy(update=sensing.start_fields()))
        self._recorder.standstill.start()
        self._background = BackgroundReport.start(path, GPU_SECONDS)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure one optimizer step: everything between the previous step or phase and its end."""
        if self._silent:
            yield
            return
        self._refuse_nested()
        self._evaluation = None  # of a phase that failed
        pending = _PendingStep(self._next, self._clock.begin_step(split=False))
        self._pending.append(pending)
        try:
            yield
        except BaseException:
            self._pending.pop()
            raise
        self._clock.end_step(pending.watch)
        self._next += 1
        self._record_steps(leave=max(1, self._clock.lag))

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Measure work between steps: "evaluation", "checkpoint" or "compilation".

        It waits for the device before and after. `log` inside an evaluation records its losses.

        Raises:
            ValueError: for another name.
        """
        if name not in ("evaluation", "checkpoint", "compilation"):
            raise ValueError(f"{name} is not a phase: evaluation, checkpoint or compilation")
        if self._silent:
            yield
            return
        self._refuse_nested()
        self._record_steps(leave=1)
        self._evaluation = _Logged() if name == "evaluation" else None
        with self._clock.window() as window:
            if self._pending:  # its loss may still be logged
                self._pending[0].measured = self._recorder.measure_step(self._pending[0].watch)
            yield
        self._record_steps()
        self._recorder.sensors.power_since_last()  # drop samples taken outside of steps
        logged, self._evaluation = self._evaluation, None
        seconds = window.seconds
        if name == "compilation":
            whole = seconds + window.compile_seconds
            self._log.write(Compile(step=self._next or None, seconds=whole, mode="compiled"))
            return
        self._recorder.record_compilation(self._next, window.compile_seconds)
        if logged is not None:
            losses = {loss: finite(value) for loss, value in logged.numbers(self._clock).items()}
            self._log.write(Eval(step=self._next, seconds=seconds, **losses))
        else:
            self._log.write(Checkpoint(step=self._next, seconds=seconds))

    def log(self, **values: SupportsFloat) -> None:
        """Record values of the current or latest step, or of the evaluation that this is in.

        Steps have loss (nats per token), learning_rate and grad_norm; evaluations have train_loss and val_loss (nats
        per token) or val_bits_per_byte. A tensor on a GPU is copied without waiting for it.

        Raises:
            ValueError: for another name, before the first step, or outside of an evaluation.
        """
        if self._silent:
            return
        for name, value in values.items():
            if name in _OF_A_STEP and self._pending:
                logged = self._pending[-1].logged
            elif name in _OF_AN_EVALUATION and self._evaluation is not None:
                logged = self._evaluation
            else:
                raise ValueError(
                    f"{name} cannot be logged here: {', '.join(_OF_A_STEP)} belong inside or after `with run.step()`, "
                    f'{", ".join(_OF_AN_EVALUATION)} inside `with run.phase("evaluation")`'
                )
            tensor = getattr(value, "detach", lambda: None)()
            if tensor is None:
                logged.values[name] = float(value)
            elif tensor.numel() == 1:  # in memory of its own, as the program may write the next value into this one
                logged.values[name] = tensor.to("cpu", non_blocking=True, copy=True)
            else:
                raise ValueError(f"{name} has {tensor.numel():,} values; log one, such as their mean")
            if self._clock.lag:
                logged.copied = self._clock.mark()

    def finish(self, status: Status | None = None, reason: str | None = None) -> Path | None:
        """End the run and write its report; return report.html, None where nothing is written.

        Args:
            status: None for finished if all steps of the spec were made or it has none, else stopped.
            reason: why it stopped or failed.
        """
        if self._silent:
            return None
        self._silent = True
        self._record_steps()
        self._recorder.standstill.close()
        if status is None:
            status = "finished" if self.spec.is_undescribed or self._next >= self.spec.steps else "stopped"
        with self._log:
            self._recorder.record_end(status, self._next, reason, alone=self.spec.world_size == 1)
        self._background.stop()
        self._lock.close()
        try:
            page = write_report(*build_report(self.path, claims_of(self.path, None)))[-1]
            print(f"nanogauge: {page}", file=sys.stderr)
            return page
        except Exception as error:  # the loop's own result must not be lost to a report
            print(f"nanogauge: no report ({error}); `nanogauge report {self.path}` writes it.", file=sys.stderr)
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.finish()
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            self.finish("stopped", type(error).__name__)
        else:
            self.finish("failed", f"{type(error).__name__}: {error}"[:300])

    def _refuse_nested(self) -> None:
        if self._pending and self._pending[-1].watch.end is None:
            raise ValueError("a step or phase cannot begin inside of a step; end that first")

    def _record_steps(self, leave: int = 0) -> None:
        """Log pending steps except the last `leave`, each once the device has completed it."""
        while len(self._pending) > leave:
            pending = self._pending.popleft()
            measured = pending.measured or self._recorder.measure_step(pending.watch)
            values, number = pending.logged.numbers(self._clock), pending.number
            tokens = None if self.spec.unknown else self.spec.tokens_per_step
            memory = number % _PEAKS_EVERY == 0
            self._recorder.record_step(number, measured, values, tokens, first=number == 0, memory=memory)


def _cuda_device() -> Any:
    """Return torch's current CUDA device; None if torch is not imported or sees none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return torch.device("cuda", torch.cuda.current_device())


def _gpus(device: Any) -> list[WatchedGpu]:
    """Return the GPU that torch uses; none without a GPU."""
    if device is None:
        return []
    return [WatchedGpu(str(sys.modules["torch"].cuda.get_device_properties(device).uuid), os.getpid())]
