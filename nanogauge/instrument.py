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

from nanogauge.analysis.report_model import build_report, claims_of
from nanogauge.doctor.machine import capture_environment
from nanogauge.errors import BadInput
from nanogauge.files import make_folder, write_atomic
from nanogauge.local_hardware import local_hardware
from nanogauge.measure.alarms import Alarm, Alarms
from nanogauge.measure.clock import Clock, Moment, StepTimes, Stopwatch
from nanogauge.measure.host import peak_process_bytes, reset_peak
from nanogauge.measure.sensors import PowerSpread, driver_info, measure_idle, open_sensors
from nanogauge.measure.torch_device import AllocatorPeaks, CompileTimer, EventTimeline, allocator_peaks
from nanogauge.prediction.prediction import predict
from nanogauge.quantities import finite
from nanogauge.report.background import GPU_SECONDS, BackgroundReport
from nanogauge.report.html import write_report
from nanogauge.runlog.folder import CLAIMS_NAME, create
from nanogauge.runlog.lock import acquire_lock
from nanogauge.runlog.reader import has_begun
from nanogauge.runlog.writer import RunLog
from nanogauge.runspec import RunSpec
from nanogauge.schema import Checkpoint, Compile, End, Eval, Event, Prediction, Start, Step

_POWER_HZ = 10.0
_IDLE_SECONDS = 2.0
_PEAKS_EVERY = 50  # steps, as in train.py: reading torch's statistics takes time
_OF_A_STEP = ("loss", "learning_rate", "grad_norm")
_OF_AN_EVALUATION = ("train_loss", "val_loss", "val_bits_per_byte")
Phase = Literal["evaluation", "checkpoint", "compilation"]


@dataclass
class _Logged:
    """Values of a step or an evaluation; those on a device are copied without waiting."""

    values: dict[str, SupportsFloat] = field(default_factory=dict)
    copied: Moment = None
    """Moment at which the copies are complete; None without any."""

    def numbers(self, clock: Clock) -> dict[str, float | None]:
        """Return the values as numbers, None if non-finite."""
        if self.copied is not None:
            clock.wait(self.copied)
        return {name: finite(float(value)) for name, value in self.values.items()}


@dataclass
class _PendingStep:
    number: int
    watch: Stopwatch
    logged: _Logged = field(default_factory=_Logged)
    times: StepTimes | None = None
    """None until they are read."""
    power: PowerSpread | None = None


def run(
    name: str,
    spec: RunSpec,
    plan: Prediction | None = None,
    folder: str | Path = "runs",
    claims: str | Path | None = None,
) -> Run:
    """Open the run folder `folder/name`, freeze its prediction and start measuring.

    Use the result in a with statement, whose end writes report.html, report.md and report.json. Under torchrun only
    rank 0 writes.

    Args:
        name: name of the run.
        spec: what the run is.
        plan: its prediction; None to predict it for this machine's device.
        folder: folder of all runs.
        claims: claims file to compare the run with.

    Raises:
        ValueError: if the folder already holds a run.
    """
    path = Path(folder) / name
    if int(os.environ.get("RANK", "0")) > 0:
        return Run(path, spec, None)
    if has_begun(path):
        raise BadInput(f"{path} already holds a run; give this one another name.")
    if plan is None:
        plan = predict(spec, local_hardware(spec.dtype))
    return Run(path, spec, plan, Path(claims) if claims is not None else None)


class Run:
    """A training loop that is being measured; nanogauge.run opens one.

    Without a prediction it writes nothing, as on ranks other than 0.
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
        self._device = _cuda_device()
        timer = CompileTimer()
        if "torch._dynamo" in sys.modules:
            timer.listen()
        timeline = EventTimeline(self._device) if self._device is not None else None
        self._clock = Clock(self._synchronize, timeline=timeline, compiled_seconds=timer.seconds)
        torch = sys.modules.get("torch")
        gpu = self._gpu()
        driver = driver_info(gpu) if gpu is not None else None
        threads = torch.get_num_threads() if torch is not None else os.cpu_count() or 1
        machine = capture_environment(plan.hardware.name, driver, threads)
        make_folder(path)
        self._lock = acquire_lock(path)
        sha256 = create(path, spec, machine, plan).prediction_sha256
        if claims is not None:
            write_atomic(path / CLAIMS_NAME, claims.read_bytes())
        idle = measure_idle(gpu, _POWER_HZ, _IDLE_SECONDS) if gpu is not None else None
        self._sensors = open_sensors(gpu, _POWER_HZ, self._clock.elapsed_seconds)
        total = plan.best("total_seconds")
        self._alarms = Alarms(
            predicted_total_seconds=(total.low, total.high) if total is not None else None,
            device_bytes=driver.total_bytes if driver is not None else None,
            slowdown_celsius=driver.slowdown_celsius if driver is not None else None,
        )
        reset_peak()
        self._log = RunLog(path, self._clock.elapsed_seconds)
        self._log.write(
            Start(
                unix_time=time.time(),
                source="library",
                max_steps=spec.steps,
                prediction_sha256=sha256,
                device=plan.hardware.name,
                idle_power_watts=idle.power_watts if idle is not None else None,
                idle_utilization=idle.utilization if idle is not None else None,
                ranks=spec.world_size,
                sensed_cards=1 if gpu is not None else None,
            )
        )
        self._background = BackgroundReport.start(path, GPU_SECONDS)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure one optimizer step: everything between the previous step or phase and its end."""
        if self._silent:
            yield
            return
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
        self._record_steps(leave=1)
        self._evaluation = _Logged() if name == "evaluation" else None
        with self._clock.window() as window:
            if self._pending:  # its loss may still be logged
                self._measure(self._pending[0])
            yield
        self._record_steps()
        self._sensors.power_since_last()  # drop samples taken outside of steps
        logged, self._evaluation = self._evaluation, None
        seconds = window.seconds
        if window.compile_seconds > 0 and name != "compilation":
            self._log.write(Compile(step=self._next, seconds=window.compile_seconds, mode="compiled"))
        if logged is not None:
            losses = logged.numbers(self._clock)
            self._log.write(Eval(step=self._next, seconds=seconds, **losses))
        elif name == "checkpoint":
            self._log.write(Checkpoint(step=self._next, seconds=seconds))
        else:
            whole = seconds + window.compile_seconds
            step = self._next or None
            self._log.write(Compile(step=step, seconds=whole, mode="compiled"))

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
                    f"{name} cannot be logged here: {', '.join(_OF_A_STEP)} belong inside or after "
                    f"`with run.step()`, {', '.join(_OF_AN_EVALUATION)} inside "
                    '`with run.phase("evaluation")`'
                )
            detach = getattr(value, "detach", None)
            if detach is not None:
                value = detach().to("cpu", non_blocking=True)  # noqa: PLW2901
            logged.values[name] = value
            if self._clock.lag:
                logged.copied = self._clock.mark()

    def finish(
        self, status: Literal["finished", "stopped", "failed"] | None = None, reason: str | None = None
    ) -> Path | None:
        """End the run and write its report; return report.html, None where nothing is written.

        Args:
            status: None for finished if all steps of the spec were made, else stopped.
            reason: why it stopped or failed.
        """
        if self._silent:
            return None
        self._silent = True
        self._record_steps()
        for reading in self._sensors.close():
            self._log.write(reading)
        self._log_sensors()
        peaks, host_bytes = self._peaks(), peak_process_bytes()
        if status is None:
            status = "finished" if self._next >= self.spec.steps else "stopped"
        with self._log:
            self._log.write(
                End(
                    status=status,
                    steps=self._next,
                    wall_seconds=self._clock.elapsed_seconds(),
                    peak_allocated_bytes=peaks.allocated_bytes,
                    peak_reserved_bytes=peaks.reserved_bytes,
                    peak_inactive_bytes=peaks.inactive_bytes,
                    allocation_retries=peaks.retries,
                    peak_process_bytes=host_bytes if self._device is None else None,
                    peak_host_bytes=host_bytes,
                    reason=reason,
                )
            )
        self._background.stop()
        self._lock.close()
        try:
            return write_report(*build_report(self.path, claims_of(self.path, None)))[-1]
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

    def _measure(self, pending: _PendingStep) -> None:
        """Read the times and power of a step that the device has completed."""
        pending.times = pending.watch.read()
        pending.power = self._sensors.power_since_last()

    def _record_steps(self, leave: int = 0) -> None:
        """Log pending steps except the last `leave`, each once the device has completed it."""
        while len(self._pending) > leave:
            pending = self._pending.popleft()
            if pending.times is None:
                self._measure(pending)
            times, power = pending.times, pending.power
            peaks = self._peaks() if pending.number % _PEAKS_EVERY == 0 else AllocatorPeaks()
            assert times is not None
            if times.compile_seconds > 0:
                self._log.write(Compile(step=pending.number, seconds=times.compile_seconds, mode="compiled"))
            line = Step(
                step=pending.number,
                step_seconds=times.step_seconds,
                tokens=self.spec.tokens_per_step,
                power_watts=power.mean_watts if power is not None else None,
                power_min_watts=power.min_watts if power is not None else None,
                power_max_watts=power.max_watts if power is not None else None,
                peak_allocated_bytes=peaks.allocated_bytes,
                peak_reserved_bytes=peaks.reserved_bytes,
                **pending.logged.numbers(self._clock),
            )
            self._log.write(line)
            self._log_sensors()
            if line.step > 0 and times.compile_seconds == 0:
                self._raise(self._alarms.step(line.step, times.step_seconds, None))

    def _log_sensors(self) -> None:
        for change in self._sensors.changes():
            text = f"{change.text}."
            self._log.write(Event(what="absent", text=text, step=self._next, about=change.field))
        for reading in self._sensors.readings():
            self._log.write(reading)
            self._raise(self._alarms.sensor(reading))

    def _raise(self, alarms: list[Alarm]) -> None:
        for alarm in alarms:
            self._log.write(Event(level=alarm.level, what=alarm.what, text=alarm.text, step=self._next))
            print(f"nanogauge: {alarm.text}", file=sys.stderr)

    def _gpu(self) -> str | None:
        """Return the UUID of the GPU that torch uses, or None."""
        if self._device is None:
            return None
        torch = sys.modules["torch"]
        return str(torch.cuda.get_device_properties(self._device).uuid)

    def _peaks(self) -> AllocatorPeaks:
        return AllocatorPeaks() if self._device is None else allocator_peaks(self._device)

    def _synchronize(self) -> None:
        if self._device is not None:
            sys.modules["torch"].cuda.synchronize(self._device)


def _cuda_device() -> Any:
    """Return torch's current CUDA device; None if torch is not imported or sees none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return torch.device("cuda", torch.cuda.current_device())
