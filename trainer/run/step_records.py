"""Log completed steps, written checkpoints, generated samples and the end of the run."""

import math
import time

import numpy as np
import torch

from nanogauge.analysis.ledger import steady_seconds
from nanogauge.errors import BadInput
from nanogauge.measure.alarms import Alarm
from nanogauge.measure.clock import StepTimes
from nanogauge.measure.host import ProcessorWatch, peak_process_bytes
from nanogauge.measure.torch_device import AllocatorPeaks, allocator_peaks
from nanogauge.prediction.calibrated import Calibration, FinishedRun, add_to_calibration
from nanogauge.prediction.loss import FinishedLoss
from nanogauge.prediction.quality import loss_inputs, store_loss
from nanogauge.prediction.workload import workload_of
from nanogauge.quantities import finite
from nanogauge.runlog.history import RunHistory
from nanogauge.schema import Checkpoint, End, Rank, Start, Step
from trainer.calibrate import calibrated_threads
from trainer.checkpoints.checkpoint_writer import Written
from trainer.evaluation.generation import sample_text
from trainer.run.session import PendingStep, Session, Status

SAMPLE_TOKENS = 200
STEPS_TO_STORE = 20
"""Minimum number of steady-state steps for a run's step time to be stored."""


def start_line(s: Session, first_step: int) -> Start:
    """Return the log line for starting, resuming or rolling back to `first_step`."""
    return Start(
        unix_time=time.time(),
        max_steps=s.config.train.max_steps,
        first_step=first_step,
        prediction_sha256=s.run.folder.prediction_sha256,
        device=s.run.folder.prediction.hardware.name,
        train_tokens=s.batches.train_tokens,
        wandb_id=s.run.wandb_id,
        ranks=s.ranks.world,
        rollbacks=s.steps.rollbacks or None,
    )


def record_steps(s: Session, leave: int = 0) -> None:
    """Log pending steps except the last `leave`, each once the device has completed it.

    If the loss or gradient norm of a step is non-finite, its update was skipped. The latest consecutive skipped steps
    are stored in `s.steps.skipped`.
    """
    recorder, steps = s.recorder, s.steps
    s.watchdog.beat(2 * steps.longest_seconds)
    record_checkpoints(s)
    problem = recorder.log.problem
    if problem is not None and not recorder.log_problem_raised:
        recorder.raise_alarm(Alarm("disk_full", problem), steps.done)
    recorder.log_problem_raised = problem is not None
    while len(steps.pending) > leave:
        record_step(s, steps.pending.popleft())


def record_step(s: Session, pending: PendingStep) -> None:
    """Wait until the device has completed a step; log it, show it and raise its alarms."""
    recorder, steps, step = s.recorder, s.steps, pending.step
    times = pending.watch.read()
    if asleep := recorder.standstill.seconds_within(times.step_seconds):
        net = times.step_seconds - asleep
        data_wait = min(times.data_wait_seconds, net)
        times = StepTimes(net, times.compile_seconds, data_wait, None, None, None)
    recorder.log_standstills(step)
    if step == steps.first:
        steps.longest_seconds = 0.0  # it replaces the prediction
        recorder.processor = ProcessorWatch()  # the processes that compiled were this run's
    steps.longest_seconds = max(steps.longest_seconds, times.step_seconds)
    loss, norm = pending.metrics.tolist()
    for alarm in recorder.alarms.loss(step, loss):
        recorder.raise_alarm(alarm, step)
    recorder.log_compilation(step, times.compile_seconds)
    power = recorder.sensors.power_since_last()
    split = pending.watch.split
    peaks = allocator_peaks(s.state.device) if split else AllocatorPeaks()
    line = Step(
        step=step,
        loss=finite(loss),
        step_seconds=times.step_seconds,
        data_wait_seconds=times.data_wait_seconds,
        forward_seconds=times.forward_seconds,
        backward_seconds=times.backward_seconds,
        optimizer_seconds=times.optimizer_seconds,
        learning_rate=pending.learning_rate,
        grad_norm=finite(norm),
        tokens=s.config.tokens_per_step,
        power_watts=power.mean_watts if power is not None else None,
        power_min_watts=power.min_watts if power is not None else None,
        power_max_watts=power.max_watts if power is not None else None,
        peak_allocated_bytes=peaks.allocated_bytes,
        peak_reserved_bytes=peaks.reserved_bytes,
        peak_host_bytes=peak_process_bytes() if split else None,
    )
    recorder.log.write(line)
    if split:
        record_ranks(s, line)
    steps.done = step + 1
    if math.isfinite(loss) and math.isfinite(norm):
        steps.skipped.clear()
    else:
        steps.skipped.append(step)
        text = f"The update was skipped: the loss is {loss}, the gradient's norm {norm}."
        recorder.log_event("update_skipped", text, "warning", step)
    recorder.display.step(line)
    recorder.log_sensors(step)
    if step > steps.first and times.compile_seconds == 0:
        alarms = recorder.alarms.step(step, times.step_seconds, times.data_wait_seconds)
        elapsed_seconds = recorder.clock.elapsed_seconds()
        total = recorder.display.projected_total_seconds(step, elapsed_seconds)
        if total is not None:
            alarms += recorder.alarms.projected(total)
        for alarm in alarms:
            recorder.raise_alarm(alarm, step)


def record_ranks(s: Session, line: Step) -> None:
    """Log the step time and memory of each rank; do nothing in a single-rank run.

    A collective: all ranks call it for the same step. On a GPU the next step runs meanwhile.
    """
    if s.ranks.world == 1:
        return
    own = line.model_dump(include=set(Rank.model_fields) - {"kind", "rank", "elapsed_seconds"})
    for rank, fields in enumerate(s.ranks.gather(own)):
        s.recorder.log.write(Rank(rank=rank, **fields))


def record_checkpoints(s: Session) -> None:
    """Log the checkpoints that were written, or failed, since the last call."""
    for done in s.checkpoints.writer.done():
        seconds = s.checkpoints.waited_seconds.pop(done.step, None)
        if isinstance(done, Written):
            line = Checkpoint(
                step=done.step,
                seconds=seconds,
                write_seconds=done.write_seconds,
                bytes=done.bytes,
                path=str(done.path.relative_to(s.run.folder.path)),
            )
            s.recorder.log.write(line)
            s.recorder.display.checkpointed(line)
            continue
        text = f"No checkpoint at step {done.step:,}: {done.reason}; training continues, free space on the disk."
        s.recorder.raise_alarm(Alarm("checkpoint_failed", text), done.step)


def record_samples(s: Session, step: int) -> None:
    """Generate texts and log them; if that is not possible, log the reason.

    A sharded model generates no texts, as each token would gather all weights on all ranks.
    """
    recorder = s.recorder
    if s.config.train.sharding == "full":
        text = "No sample of text: the model is sharded over the processes; sample.py generates one from a checkpoint."
        recorder.log_event("no_sample", text, step=step)
        return
    with recorder.clock.window():
        try:
            tokenizer = s.source.load_tokenizer()
            prompts = s.config.train.prompts or [""]
            for prompt in prompts:
                tokenizer.prompt(prompt)  # raises for a character that has no token
        except BadInput as error:
            recorder.log_event("no_sample", f"No sample of text: {error}", "warning", step)
            return
        except Exception as error:  # the clients of a download raise many types
            text = f"No sample of text: the vocabulary could not be loaded ({type(error).__name__})."
            recorder.log_event("no_sample", text, "warning", step)
            return
        for prompt in prompts:
            text = sample_text(s.state.model, tokenizer, prompt, SAMPLE_TOKENS, s.config.run.seed)
            recorder.log_event("sample", text, step=step)


def record_end(s: Session, status: Status, reason: str | None, restartable: bool | None) -> None:
    """Wait for checkpoints; log them, the last sensor readings, memory peaks and the end line."""
    s.checkpoints.writer.wait()
    record_checkpoints(s)
    s.recorder.log_standstills(s.steps.done)
    s.recorder.close_sensors(s.steps.done)
    device = s.state.device
    peaks, host_bytes = allocator_peaks(device), peak_process_bytes()
    s.recorder.log.write(
        End(
            status=status,
            steps=s.steps.done,
            wall_seconds=s.recorder.clock.elapsed_seconds(),
            peak_allocated_bytes=peaks.allocated_bytes,
            peak_reserved_bytes=peaks.reserved_bytes,
            peak_inactive_bytes=peaks.inactive_bytes,
            allocation_retries=peaks.retries,
            peak_process_bytes=host_bytes if device.type == "cpu" else None,
            peak_host_bytes=host_bytes,
            others_processor_share=s.recorder.processor.others_share()
            if s.ranks.world == 1
            else None,  # other ranks of this machine would count as other programs
            reason=reason,
            restartable=restartable,
        )
    )


def store_final_loss(s: Session) -> str | None:
    """Store the final loss of a finished run, which calibrates the next prediction on its data.

    Returns a warning if the loss could not be stored.
    """
    if s.steps.val_loss is None or s.steps.done < STEPS_TO_STORE:
        return None
    inputs = loss_inputs(s.run.folder.spec)
    return store_loss(FinishedLoss(inputs, s.steps.val_loss, s.config.run.name))


def store_step_time(s: Session, recorded: RunHistory) -> str | None:
    """Store the steady step time of a finished run, on which the next prediction is based.

    Only the steps of this process count. A run that fell back to eager mode is another workload and is not stored.
    Returns a warning if the step time could not be stored.
    """
    seconds = steady_seconds(recorded, first_step=recorded.starts[-1].first_step)
    as_configured = s.config.run.compile == (s.state.compilation == "compiled")
    if len(seconds) < STEPS_TO_STORE or not as_configured:
        return None
    device = s.state.device
    run = FinishedRun(
        name=s.config.run.name,
        workload=workload_of(s.run.folder.spec, device.type != "cpu"),
        step_seconds=float(np.median(seconds)),
        p10_seconds=float(np.quantile(seconds, 0.1)),
        p90_seconds=float(np.quantile(seconds, 0.9)),
        n=len(seconds),
        finished_unix=time.time(),
        others_share=recorded.ends[-1].others_processor_share
        if device.type == "cpu"
        else recorded.starts[-1].idle_utilization,
    )
    _, warning = add_to_calibration(
        Calibration(
            device=s.run.folder.prediction.hardware.name,
            torch=torch.__version__,
            threads=calibrated_threads(device),
            runs=(run,),
        )
    )
    return warning
