"""Save checkpoints, roll back after non-finite gradients, reduce the micro-batch to fit memory."""

import hashlib
import traceback
from pathlib import Path

import torch

from nanogauge.errors import BadInput, RunFailed
from nanogauge.measure.alarms import Alarm
from nanogauge.schedule import is_checkpointed
from trainer.checkpoints.checkpoint import load_checkpoint, newest_checkpoint, own_weights, random_state, read_meta
from trainer.run.resources import make_batches, make_loss
from trainer.run.session import Session
from trainer.run.step_records import record_checkpoints, record_steps, start_line
from trainer.step.device import release_memory
from trainer.step.fsdp import join_gather
from trainer.step.optimizer import is_half_updated

LONGEST_WRITE_SECONDS = 1800.0
"""Time that a checkpoint may take on a slow disk before the run counts as hung."""


def checkpoint_is_due(s: Session, step: int, leaving: bool) -> bool:
    """Return True if a checkpoint is due: by step, by time, or because training ends here.

    A collective; all ranks get the same answer.
    """
    train = s.config.train
    waited = s.recorder.clock.elapsed_seconds() - s.checkpoints.began_seconds
    by_time = train.checkpoint_minutes > 0 and s.ranks.any(waited >= 60 * train.checkpoint_minutes)
    due = leaving or by_time or is_checkpointed(step, s.run.folder.spec)
    return due and step != s.checkpoints.step


def save(s: Session, step: int, wait: bool) -> None:
    """Copy the state to host memory and write it in the background; `wait` until it is on disk.

    A collective: rank 0 writes, and gathers the random states and model shards of all ranks.
    """
    state, steps, checkpoints = s.state, s.steps, s.checkpoints
    clock = s.recorder.clock
    random_states = s.ranks.gather(random_state(state.device))
    checkpoints.step, checkpoints.began_seconds = step, clock.elapsed_seconds()
    s.watchdog.beat(LONGEST_WRITE_SECONDS)
    if not s.ranks.is_first:
        join_gather([own_weights(state.model), state.optimizer.state_dict()])
        return
    energy = [j for j in (s.run.earlier_joules, s.recorder.energy_joules) if j is not None]
    with clock.window() as saving:
        checkpoints.writer.begin(
            step,
            state.model,
            state.optimizer,
            state.scaler,
            random_states,
            position=s.batches.position(step),
            run={
                "wandb_id": s.run.wandb_id,
                "prediction_sha256": s.run.folder.prediction_sha256,
                "config_sha256": hashlib.sha256(s.config.to_toml().encode()).hexdigest(),
                "identity": s.run.identity,
                "micro_batch": s.batches.micro_batch,
                "configured_micro_batch": s.config.train.micro_batch,
                "rollbacks": steps.rollbacks,
                "best_val_loss": steps.best_val_loss,
                "tokens": step * s.config.tokens_per_step,
                "wall_seconds": s.run.earlier_seconds + clock.elapsed_seconds(),
                "energy_joules": sum(energy) if energy else None,
            },
            val_loss=steps.val_loss if steps.evaluated == step else None,
        )
        if wait:
            checkpoints.writer.wait()
    asleep = s.recorder.standstill.seconds_within(saving.seconds)
    checkpoints.waited_seconds[step] = saving.seconds - asleep
    record_checkpoints(s)


def end_by_failure(s: Session, error: Exception) -> tuple[str, bool]:
    """Return why a run failed, and whether a restart may help.

    The state before the step is still there if the data was at fault: it is saved.
    """
    if isinstance(error, BadInput):
        record_steps(s)
        if s.ranks.world == 1 and s.checkpoints.step != s.steps.done:
            save(s, s.steps.done, wait=True)
        return str(error).rstrip("."), False
    if isinstance(error, RunFailed):
        return str(error).rstrip("."), True
    traceback.print_exception(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'without a message'}".rstrip("."), True


def roll_back(s: Session) -> str | None:
    """Load the newest intact checkpoint and continue from there with the data in another order.

    Returns None if training can continue, else the reason for ending the run.
    """
    steps = s.steps
    skipped = list(steps.skipped)
    record_steps(s)  # on a GPU one more step is pending
    first, last = skipped[0], skipped[-1]
    problem = (
        f"the loss or the gradient was not finite in {len(skipped)} steps in a row "
        f"({first:,} to {last:,}), whose updates were skipped"
    )
    advice = "set a lower --optimizer.learning-rate or a longer --optimizer.warmup-steps, or look at the data there"
    most = s.config.train.max_rollbacks
    if steps.rollbacks >= most:
        times = f", after {steps.rollbacks} rollbacks" if steps.rollbacks else ""
        return f"{problem}{times}; {advice}"
    s.checkpoints.writer.wait()
    record_checkpoints(s)
    newest: Path | None = None
    damaged: list[str] = []
    if s.ranks.is_first:
        newest, damaged = newest_checkpoint(s.run.folder.path / "checkpoints")
    name = s.ranks.gather(str(newest or ""))[0]
    if not name:
        return f"{problem}, and there is no checkpoint to roll back to; {advice}"
    checkpoint = Path(name)
    with s.recorder.clock.window():
        meta = read_meta(checkpoint)
        state = s.state.model, s.state.optimizer, s.state.scaler, s.state.device
        load_checkpoint(checkpoint, *state, s.ranks.rank, s.ranks.world)
        steps.rollbacks += 1
        _replace_batches(s, s.batches.micro_batch)
    for text in damaged:
        s.recorder.record_event("checkpoint_damaged", text, "warning")
    text = (
        f"{problem[0].upper()}{problem[1:]}: the run rolls back to step {meta.step:,} and "
        f"continues with its data in another order (rollback {steps.rollbacks} of at most {most})."
    )
    s.recorder.raise_alarm(Alarm("rollback", text, "val_loss"), last)
    s.recorder.log.write(start_line(s, meta.step).model_copy(update={"continues": True}))
    steps.skipped.clear()
    steps.done = steps.evaluated = s.checkpoints.step = meta.step
    steps.val_loss = None
    return None


def use_smaller_micro_batch(s: Session) -> str | None:
    """After an out-of-memory error, use a smaller micro-batch and more gradient accumulation.

    Returns None if training can continue, else the reason for ending the run.
    """
    record_steps(s)  # those before the step that failed
    state, step = s.state, s.steps.done
    micro = s.batches.micro_batch
    samples = micro * s.batches.grad_accum
    smaller = max((n for n in range(1, micro) if samples % n == 0), default=None)
    if smaller is None:
        return "memory ran out with one sequence at a time; make the model or its context smaller"
    if is_half_updated(state.optimizer):
        return (
            f"memory ran out in the midst of an update at step {step:,}; "
            f"continue with --resume auto --train.micro-batch {smaller} "
            f"--train.grad-accum {samples // smaller} "
            "--allow-change train.micro_batch train.grad_accum"
        )
    state.optimizer.zero_grad(set_to_none=True)
    _replace_batches(s, smaller)
    state.loss = state.reduced_loss = make_loss(s.config, state.model, s.batches, state.dtype, s.ranks)
    if state.compilation == "compiled":
        state.compilation = "pending"  # to be compiled for the new shape
    if state.compilation == "pending":
        torch._dynamo.reset()  # else dynamo would see two sizes and make the batch symbolic
    release_memory(state.device)
    text = (
        f"Memory ran out with a micro-batch of {micro} at step {step:,}: from here on it is "
        f"{smaller}, accumulated over {samples // smaller} passes, for the same tokens per step; "
        "a step takes longer by that."
    )
    s.recorder.raise_alarm(Alarm("out_of_memory", text, "step_seconds", "warning"), step)
    return None


def _replace_batches(s: Session, micro_batch: int) -> None:
    s.batches.close()
    s.batches = make_batches(s.config, s.source, s.state.device, s.ranks, micro_batch, s.steps.rollbacks)


def memory_advice(s: Session) -> str:
    """Return an error message for a multi-rank run out of memory, with the setting to change."""
    micro, passes = s.batches.micro_batch, s.batches.grad_accum * s.ranks.world
    return (
        f"memory ran out with a micro-batch of {micro} in process {s.ranks.rank}; continue with "
        f"--resume auto, a smaller --train.micro-batch than {micro}, a --train.grad-accum that is "
        f"larger than {passes} by as much, and --allow-change train.micro_batch train.grad_accum"
    )
