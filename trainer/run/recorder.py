"""From the loop to the log: each step that has ended, what the sensors read meanwhile, alarms."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Literal

from nanogauge.measure.alarms import Alarm
from nanogauge.measure.memory import peak_process_bytes
from nanogauge.quantities import finite, format_seconds
from nanogauge.records import Checkpoint, Compile, End, Event, LogLine, Rank, Step
from nanogauge.runlog import RunLog
from trainer.checkpoints.checkpoint_writer import Written
from trainer.evaluation.generation import sample_text
from trainer.run.progress import Screen
from trainer.run.session import Session
from trainer.step.device import AllocatorPeaks, allocator_peaks
from trainer.step.distributed import Ranks

SAMPLE_TOKENS = 200
Status = Literal["finished", "stopped", "failed"]


def record_steps(s: Session, leave: int = 0) -> None:
    """Log the steps that were handed to the device, but for the last `leave` of them.

    Waits until each has ended. A step whose loss or gradient was no finite number made no update;
    those of one after another are in `s.skipped`.
    """
    s.watchdog.beat(2 * s.longest_step_seconds)
    write_checkpoints(s)
    if s.log.problem is not None and not s.log_is_in_trouble:
        raise_alarm(s, Alarm("disk_full", s.log.problem), s.steps_done)
    s.log_is_in_trouble = s.log.problem is not None
    while len(s.under_way) > leave:
        done = s.under_way.popleft()
        times = done.watch.read()
        if done.step == s.first_step:  # instead of what was predicted
            s.longest_step_seconds = 0.0
        s.longest_step_seconds = max(s.longest_step_seconds, times.step_seconds)
        loss, norm = done.figures.tolist()
        for alarm in s.alarms.loss(done.step, loss):
            raise_alarm(s, alarm, done.step)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        log_compilation(s, done.step, times.compile_seconds)
        power = s.sensors.power_since_last()
        peaks = allocator_peaks(s.device) if done.watch.split else AllocatorPeaks()
        line = Step(
            step=done.step,
            loss=finite(loss),
            step_seconds=times.step_seconds,
            data_wait_seconds=times.data_wait_seconds,
            forward_seconds=times.forward_seconds,
            backward_seconds=times.backward_seconds,
            optimizer_seconds=times.optimizer_seconds,
            learning_rate=done.learning_rate,
            grad_norm=finite(norm),
            tokens=s.config.tokens_per_step,
            power_watts=power.mean_watts if power is not None else None,
            power_min_watts=power.min_watts if power is not None else None,
            power_max_watts=power.max_watts if power is not None else None,
            peak_allocated_bytes=peaks.allocated_bytes,
            peak_reserved_bytes=peaks.reserved_bytes,
            peak_host_bytes=peak_process_bytes() if done.watch.split else None,
        )
        s.log.write(line)
        if done.watch.split:
            record_ranks(s, line)
        s.steps_done = done.step + 1
        if skipped:
            s.skipped.append(done.step)
            text = f"The update was skipped: the loss is {loss}, the gradient's norm {norm}."
            event = Event(level="warning", what="update_skipped", step=done.step, text=text)
            s.log.write(event)
        else:
            s.skipped.clear()
        s.screen.step(line)
        record_sensors(s, done.step)
        if done.step > s.first_step and times.compile_seconds == 0:
            alarms = s.alarms.step(done.step, times.step_seconds, times.data_wait_seconds)
            total = s.screen.projected_total_seconds(done.step, s.clock.elapsed_seconds())
            if total is not None:
                alarms += s.alarms.projected(total)
            for alarm in alarms:
                raise_alarm(s, alarm, done.step)


def record_ranks(s: Session, line: Step) -> None:
    """Where several processes share a step: how long each took, and what it holds.

    All of them come here after the same steps. On a GPU the next step runs meanwhile.
    """
    if s.ranks.world == 1:
        return
    mine = line.model_dump(include=set(Rank.model_fields) - {"kind", "rank", "elapsed_seconds"})
    for rank, told in enumerate(s.ranks.gather(mine)):
        s.log.write(Rank(rank=rank, **told))


def write_checkpoints(s: Session) -> None:
    """Log the checkpoints that have come to the disk since the last time, or have not."""
    for done in s.checkpoints.done():
        seconds = s.saving.pop(done.step, None)
        if isinstance(done, Written):
            line = Checkpoint(
                step=done.step,
                seconds=seconds,
                write_seconds=done.write_seconds,
                bytes=done.bytes,
                path=str(done.path.relative_to(s.folder.path)),
            )
            s.log.write(line)
            s.screen.checkpointed(line)
            continue
        text = (
            f"No checkpoint at step {done.step:,}: {done.reason}; training goes on, free space on "
            "the disk."
        )
        raise_alarm(s, Alarm("checkpoint_failed", text), done.step)


def record_sensors(s: Session, step: int) -> None:
    """Log what the sensors read since the last time, and what became of them."""
    for change in s.sensors.changes():
        level: Literal["info", "warning"] = "warning" if change.midway else "info"
        text = f"{change.text}."
        s.log.write(Event(level=level, what="absent", text=text, step=step, about=change.field))
        if change.midway:
            s.screen.say(f"! {text}")
    for reading in s.sensors.readings():
        s.log.write(reading)
        s.screen.sensor(reading)
        if reading.energy_joules is not None:
            s.energy_joules = reading.energy_joules
        for alarm in s.alarms.sensor(reading):
            raise_alarm(s, alarm, step)


def raise_alarm(s: Session, alarm: Alarm, step: int | None) -> None:
    """Tell of something worth reading or being woken for: in the log, and on the screen."""
    s.log.write(
        Event(level=alarm.level, what=alarm.what, text=alarm.text, step=step, about=alarm.about)
    )
    if alarm.level == "alarm":
        s.screen.alarm(alarm.text)
    else:
        s.screen.say(f"! {alarm.text}")


def log_compilation(s: Session, step: int, seconds: float) -> None:
    """A compilation in the middle of the run is booked as such, whatever it interrupted."""
    if seconds > 0:
        s.log.write(Compile(step=step, seconds=seconds, mode="compiled"))
        s.screen.say(f"compiled again at step {step:,}: {format_seconds(seconds)}")


def write_end(s: Session, status: Status, reason: str | None, restartable: bool | None) -> None:
    """The last lines of the log: what is still on its way to the disk, what the sensors ended with,
    the peaks, the end.
    """
    s.checkpoints.wait()
    write_checkpoints(s)
    for reading in s.sensors.close():
        s.log.write(reading)
    record_sensors(s, s.steps_done)  # what it ended with
    peaks, host_bytes = allocator_peaks(s.device), peak_process_bytes()
    s.log.write(
        End(
            status=status,
            steps=s.steps_done,
            wall_seconds=s.clock.elapsed_seconds(),
            peak_allocated_bytes=peaks.allocated_bytes,
            peak_reserved_bytes=peaks.reserved_bytes,
            peak_inactive_bytes=peaks.inactive_bytes,
            allocation_retries=peaks.retries,
            peak_process_bytes=host_bytes if s.device.type == "cpu" else None,
            peak_host_bytes=host_bytes,
            reason=reason,
            restartable=restartable,
        )
    )


def write_samples(s: Session, step: int) -> None:
    """Log what the model writes; without its vocabulary (offline) there is nothing.

    Nor is there where the model is sharded: each token would take all ranks, and all weights on
    their way between them.
    """
    if s.config.train.sharding == "full":
        text = (
            "No sample of text: the model is divided among the processes; sample.py writes one "
            "from a checkpoint."
        )
        s.log.write(Event(what="no_sample", text=text, step=step))
        return
    with s.clock.window():
        try:
            encoding = s.source.encoding()
        except Exception as error:  # a download fails in whatever way its client has
            text = (
                f"No sample of text: the vocabulary could not be loaded ({type(error).__name__})."
            )
            s.log.write(Event(level="warning", what="no_sample", text=text, step=step))
            return
        for prompt in s.config.train.prompts or [""]:
            text = sample_text(s.model, encoding, prompt, SAMPLE_TOKENS, s.config.run.seed)
            s.log.write(Event(what="sample", step=step, text=text))


class SilentLog(RunLog):
    """The log of a rank that writes none."""

    def __init__(self) -> None:
        """Open nothing."""

    def write(self, line: LogLine) -> None:
        """Rank 0 writes a line for all."""

    @property
    def problem(self) -> str | None:
        """Nothing that it did not write can be missing."""
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """There is nothing to close."""


def tell_of_other_ranks(ranks: Ranks, step: int, log: RunLog, screen: Screen) -> None:
    """That a resumed run is not bit by bit what it would have become."""
    text = (
        f"The checkpoint is of another number of processes than the {ranks.world} that go on with "
        "it: sums have another order, and dropout draws other random numbers, those of run.seed, "
        "the rank and this step."
    )
    log.write(Event(what="other_ranks", step=step, text=text))
    screen.say(text)
