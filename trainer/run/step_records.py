"""Log completed steps, written checkpoints, generated samples and the end of the run."""

import math
import time

import numpy as np
import torch

from nanogauge.analysis.ledger import steady_seconds
from nanogauge.errors import BadInput
from nanogauge.measure.alarms import Alarm
from nanogauge.prediction.calibrated import Calibration, FinishedRun, add_to_calibration
from nanogauge.prediction.loss import FinishedLoss
from nanogauge.prediction.quality import loss_inputs, store_loss
from nanogauge.prediction.workload import workload_of
from nanogauge.recorder import Status
from nanogauge.runlog.history import RunHistory
from nanogauge.schema import Checkpoint, Rank, Start, Step
from trainer.calibrate import calibrated_threads
from trainer.checkpoints.checkpoint_writer import Written
from trainer.evaluation.generation import sample_text
from trainer.run.session import PendingStep, Session

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
    if problem is not None and not steps.log_problem_raised:
        recorder.raise_alarm(Alarm("disk_full", problem), steps.done)
    steps.log_problem_raised = problem is not None
    while len(steps.pending) > leave:
        record_step(s, steps.pending.popleft())


def record_step(s: Session, pending: PendingStep) -> None:
    """Wait until the device has completed a step; log it, show it and raise its alarms."""
    recorder, steps, step = s.recorder, s.steps, pending.step
    measured = recorder.measure_step(pending.watch)
    first, seconds = step == steps.first, measured.times.step_seconds
    steps.longest_seconds = seconds if first else max(steps.longest_seconds, seconds)  # the first replaces a prediction
    loss, norm = pending.metrics.tolist()
    values = {"loss": loss, "grad_norm": norm, "learning_rate": pending.learning_rate}
    line = recorder.record_step(step, measured, values, s.config.tokens_per_step, first, memory=pending.watch.split)
    if pending.watch.split:
        record_ranks(s, line)
    steps.done = step + 1
    if math.isfinite(loss) and math.isfinite(norm):
        steps.skipped.clear()
    else:
        steps.skipped.append(step)
        text = f"The update was skipped: the loss is {loss}, the gradient's norm {norm}."
        recorder.record_event("update_skipped", text, "warning", step)
    total = s.display.projected_total_seconds(step, recorder.clock.elapsed_seconds())
    if total is not None and not first and measured.times.compile_seconds == 0:
        for alarm in recorder.alarms.projected(total):
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
            s.display.checkpointed(line)
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
        recorder.record_event("no_sample", text, step=step)
        return
    with recorder.clock.window():
        try:
            tokenizer = s.source.load_tokenizer()
            prompts = s.config.train.prompts or [""]
            for prompt in prompts:
                tokenizer.prompt(prompt)  # raises for a character that has no token
        except BadInput as error:
            recorder.record_event("no_sample", f"No sample of text: {error}", "warning", step)
            return
        except Exception as error:  # the clients of a download raise many types
            text = f"No sample of text: the vocabulary could not be loaded ({type(error).__name__})."
            recorder.record_event("no_sample", text, "warning", step)
            return
        for prompt in prompts:
            text = sample_text(s.state.model, tokenizer, prompt, SAMPLE_TOKENS, s.config.run.seed)
            recorder.record_event("sample", text, step=step)


def record_end(s: Session, status: Status, reason: str | None, restartable: bool | None) -> None:
    """Wait for checkpoints; log them, the last sensor readings, memory peaks and the end line."""
    s.checkpoints.writer.wait()
    record_checkpoints(s)
    # With several ranks, the others of this machine would count as other programs.
    s.recorder.record_end(status, s.steps.done, reason, restartable, alone=s.ranks.world == 1)


def store_final_loss(s: Session) -> str | None:
    """Store the final loss of a finished run, which calibrates the next prediction on its data.

    Returns a warning if the loss could not be stored.
    """
    if not s.steps.val_loss or s.steps.done < STEPS_TO_STORE:  # a loss of 0 gives no ratio
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
