"""What keeps a run alive: checkpoints, the way back to one, and less at once where memory runs out.

Here, as in train.py, everything meets: nothing but train.py imports it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from nanogauge.measure.alarms import Alarm
from nanogauge.recording import raise_alarm, record_steps, write_checkpoints
from nanogauge.records import Event
from nanogauge.rundata import make_batches
from nanogauge.schedule import is_checkpointed
from nanogauge.session import Session, start_line
from nanogauge.training.building import make_loss
from nanogauge.training.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    own_weights,
    random_state,
    read_meta,
)
from nanogauge.training.device import release_memory
from nanogauge.training.optimizer import half_updated
from nanogauge.training.sharding import give_parts

LONGEST_WRITE_SECONDS = 1800.0
"""what a slow disk may take for a checkpoint before the run counts as hung"""


def checkpoint_is_due(s: Session, step: int, leaving: bool) -> bool:
    """Whether a checkpoint is to be made at this step: by its number, by the time, or as the last.

    All ranks are of one mind about it.
    """
    minutes = s.config.train.checkpoint_minutes
    waited = s.clock.elapsed_seconds() - s.saved_seconds
    by_time = minutes > 0 and s.ranks.any(waited >= 60 * minutes)
    due = leaving or by_time or is_checkpointed(step, s.folder.spec)
    return due and step != s.saved_step


def save(s: Session, step: int, wait: bool) -> None:
    """Begin a checkpoint; the loop waits for its copy in memory, or until it is on disk.

    Rank 0 writes it, with the random states of all, and their parts of a model that is sharded.
    """
    random_states = s.ranks.gather(random_state(s.device))
    s.saved_step, s.saved_seconds = step, s.clock.elapsed_seconds()
    s.watchdog.beat(LONGEST_WRITE_SECONDS)
    if not s.ranks.is_first:
        give_parts([own_weights(s.model), s.optimizer.state_dict()])  # as rank 0 asks for them
        return
    known = [j for j in (s.earlier.energy_joules, s.energy_joules) if j is not None]
    with s.clock.window() as saving:
        s.checkpoints.begin(
            step,
            s.model,
            s.optimizer,
            s.scaler,
            random_states,
            position=s.batches.position(step),
            run={
                "wandb_id": s.wandb_id,
                "prediction_sha256": s.folder.prediction_sha256,
                "config_sha256": hashlib.sha256(s.config.to_toml().encode()).hexdigest(),
                "identity": s.identity,
                "micro_batch": s.batches.micro_batch,
                "configured_micro_batch": s.config.train.micro_batch,
                "rollbacks": s.rollbacks,
                "best_val_loss": s.best_val_loss,
                "tokens": step * s.config.tokens_per_step,
                "wall_seconds": s.earlier.wall_seconds + s.clock.elapsed_seconds(),
                "energy_joules": sum(known) if known else None,
            },
            val_loss=s.val_loss if s.evaluated_step == step else None,
        )
        if wait:
            s.checkpoints.wait()
    s.saving[step] = saving.seconds
    write_checkpoints(s)


def roll_back(s: Session) -> str | None:
    """Go back to the newest intact checkpoint, and on with the data in another order.

    Returns why the run has to end instead, if it has to.
    """
    skipped = list(s.skipped)
    record_steps(s)  # on a GPU one more is under way
    first, last = skipped[0], skipped[-1]
    trouble = (
        f"the loss or the gradient was not finite in {len(skipped)} steps in a row "
        f"({first:,} to {last:,}), whose updates were skipped"
    )
    advice = (
        "set a lower --optimizer.learning-rate or a longer --optimizer.warmup-steps, or look at "
        "the data there"
    )
    most = s.config.train.max_rollbacks
    if s.rollbacks >= most:
        times = f", after going back {s.rollbacks} times" if s.rollbacks else ""
        return f"{trouble}{times}; {advice}"
    s.checkpoints.wait()
    write_checkpoints(s)
    found: Path | None = None
    damaged: list[str] = []
    if s.ranks.is_first:
        found, damaged = newest_checkpoint(s.folder.path / "checkpoints")
    told = s.ranks.gather(str(found or ""))[0]
    checkpoint = Path(told) if told else None
    if checkpoint is None:
        return f"{trouble}, and there is no checkpoint to go back to; {advice}"
    with s.clock.window():
        meta = read_meta(checkpoint)
        state = s.model, s.optimizer, s.scaler, s.device
        load_checkpoint(checkpoint, *state, s.ranks.rank, s.ranks.world)
        s.rollbacks += 1
        s.batches.close()
        micro = s.batches.micro_batch
        s.batches = make_batches(s.config, s.source, s.device, s.ranks, micro, s.rollbacks)
    for text in damaged:
        s.log.write(Event(level="warning", what="checkpoint_damaged", text=text))
    text = (
        f"{trouble[0].upper()}{trouble[1:]}: the run goes back to step {meta.step:,} and on with "
        f"its data in another order ({s.rollbacks} of at most {most} times)."
    )
    raise_alarm(s, Alarm("rollback", text, "val_loss"), last)
    s.log.write(start_line(s, meta.step).model_copy(update={"continues": True}))
    s.skipped.clear()
    s.steps_done = s.evaluated_step = s.saved_step = meta.step
    s.val_loss = None
    return None


def use_smaller_micro_batch(s: Session) -> str | None:
    """After memory ran out: fewer sequences in one pass, in more passes, for the same step.

    Returns why the run has to end instead, if it has to.
    """
    record_steps(s)  # those before the one that was broken off
    micro = s.batches.micro_batch
    samples = micro * s.batches.grad_accum
    smaller = max((n for n in range(1, micro) if samples % n == 0), default=None)
    if smaller is None:
        return "memory ran out with one sequence at a time; make the model or its context smaller"
    if half_updated(s.optimizer):
        return (
            f"memory ran out in the midst of an update at step {s.steps_done:,}; "
            f"go on with --resume auto --train.micro-batch {smaller} "
            f"--train.grad-accum {samples // smaller} "
            "--allow-change train.micro_batch train.grad_accum"
        )
    s.optimizer.zero_grad(set_to_none=True)
    s.batches.close()
    s.batches = make_batches(s.config, s.source, s.device, s.ranks, smaller, s.rollbacks)
    s.loss_of = s.averaged_loss_of = make_loss(s.config, s.model, s.batches, s.dtype, s.ranks)
    s.compiled = False  # it will be again, for the new shape
    release_memory(s.device)
    text = (
        f"Memory ran out with {micro} sequences in one pass at step {s.steps_done:,}: from here on "
        f"it is {smaller}, in {samples // smaller} passes, for the same tokens a step; "
        "a step takes longer by that."
    )
    raise_alarm(s, Alarm("out_of_memory", text, "step_seconds", "warning"), s.steps_done)
    return None


def memory_advice(s: Session) -> str:
    """What to do where memory ran out and several processes train, of which one cannot go on."""
    micro, passes = s.batches.micro_batch, s.batches.grad_accum * s.ranks.world
    return (
        f"memory ran out with {micro} sequences in one pass of process {s.ranks.rank}; go on with "
        f"--resume auto, a smaller --train.micro-batch than {micro}, a --train.grad-accum that is "
        f"larger than {passes} by as much, and --allow-change train.micro_batch train.grad_accum"
    )
