"""The whole night in one command: checks, prediction, training, report.

python train.py configs/rtx4070_fineweb.toml [--model.n-embd 512 ...] [--resume auto]
torchrun --nproc-per-node 2 train.py ...      # one process for each GPU, which share each step

Everything goes to runs/NAME/: the prediction before the first step, a line of log for every step,
checkpoints, and the report at the end.
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Sequence

from nanogauge.cli import run_command
from nanogauge.supervise import supervise
from nanogauge.threads import keep_pages  # whose import sets what torch reads

if __name__ == "__main__":
    if "--supervise" in sys.argv[1:]:
        run_command(supervise)  # which starts this file again without the flag; it needs no torch
    keep_pages()

# isort: split
import torch
from rich.console import Console
from torch import nn

from nanogauge.config import Config
from nanogauge.errors import BadInput, RunFailed
from nanogauge.preflight import consult
from nanogauge.prepare.manifest import Split
from nanogauge.quantities import finite
from nanogauge.recording import (
    Status,
    log_compilation,
    record_steps,
    write_end,
    write_samples,
)
from nanogauge.records import Eval
from nanogauge.report.build import build_report, claims_of
from nanogauge.report.render import print_report, write_report
from nanogauge.rescue import (
    checkpoint_is_due,
    memory_advice,
    roll_back,
    save,
    use_smaller_micro_batch,
)
from nanogauge.runlock import refuse_held
from nanogauge.schedule import is_evaluated, is_sampled, learning_rate
from nanogauge.session import (
    Session,
    StepUnderWay,
    open_session,
    remember_run,
)
from nanogauge.starting import average_gradients, compile_session
from nanogauge.tracking import Mirror
from nanogauge.train_flags import read_command
from nanogauge.training.device import autocast, is_out_of_memory, to_host
from nanogauge.training.exactness import fix_workspace
from nanogauge.training.optimizer import set_rate, update
from nanogauge.training.ranks import LOST, Ranks, is_told_elsewhere, open_ranks, share_of
from nanogauge.training.sharding import refuse_unshardable, whole
from nanogauge.training.stopping import Stopped


def train(s: Session) -> tuple[Status, str | None]:
    """Train up to last_step, counting steps in s.steps_done; returns how it ended, and why."""
    config, clock, spec = s.config, s.clock, s.folder.spec
    schedule = spec.schedule
    assert schedule is not None
    accumulation, parameters = s.batches.grad_accum, list(s.model.parameters())
    step = s.steps_done
    while True:
        # 1. Evaluation and checkpoint, each in a window of its own: no step contains them.
        stopping = s.ranks.any(s.stop.requested is not None)
        leaving = stopping or step == s.last_step
        evaluating = not stopping and step != s.evaluated_step and is_evaluated(step, spec)
        saving = checkpoint_is_due(s, step, leaving)
        if evaluating or saving:
            record_steps(s)  # all of it, before an evaluation or a checkpoint stands on it
        if len(s.skipped) >= config.train.max_skipped:
            if (reason := roll_back(s)) is not None:
                return "failed", reason
            step = s.steps_done
            continue
        if evaluating:
            evaluate(s, step)
        if saving and (leaving or not s.skipped):  # a state that others are skipped for is not kept
            save(s, step, wait=leaving)
        if leaving:
            finished = step == config.train.max_steps == s.evaluated_step
            return "finished" if finished else "stopped", s.stop.requested

        # 2. One optimizer step over its micro-batches; nothing in it waits for the device.
        if evaluating or saving or step == s.first_step:
            s.sensors.power_since_last()  # what was sampled meanwhile is no step's
        watch = clock.begin_step(split=(step - s.first_step) % config.measure.split_every == 0)
        rate = learning_rate(step, schedule, spec.steps)
        set_rate(s.optimizer, rate)
        total = torch.zeros((), device=s.device)
        for micro in range(accumulation):
            with watch.waiting():
                tokens, targets = s.batches.batch("train", step, micro)
            with s.ranks.accumulating(last=micro == accumulation - 1):
                with autocast(s.device, s.dtype):
                    loss = s.averaged_loss_of(tokens, targets) / accumulation
                watch.lap("forward")
                s.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            watch.lap("backward")
        total = s.ranks.mean(total)
        s.scaler.unscale_(s.optimizer)
        norm = whole(nn.utils.clip_grad_norm_(parameters, config.optimizer.grad_clip or math.inf))
        update(s.optimizer, s.scaler, torch.isfinite(total) & torch.isfinite(norm))
        s.optimizer.zero_grad(set_to_none=True)
        watch.lap("optimizer")
        figures = to_host(torch.stack([total, norm]))
        clock.end_step(watch)

        # 3. The record of it, first on disk, then on the screen: on a GPU while the next one runs.
        s.under_way.append(StepUnderWay(step, rate, figures, watch))
        record_steps(s, leave=clock.lag)
        step += 1


def evaluate(s: Session, step: int) -> None:
    """Log the loss on both splits after so many steps, and now and then what the model writes.

    Nothing is logged if the run was asked to stop meanwhile.
    """
    with s.clock.window() as evaluation:
        train_loss, val_loss = (mean_loss(s, split) for split in ("train", "val"))
    log_compilation(s, step, evaluation.compile_seconds)
    if s.ranks.any(s.stop.requested is not None):
        return  # a resumed run makes up for it
    line = Eval(
        step=step,
        train_loss=finite(train_loss),
        val_loss=finite(val_loss),
        seconds=evaluation.seconds,
    )
    s.log.write(line)
    s.screen.evaluated(line)
    s.evaluated_step, s.val_loss = step, line.val_loss
    if line.val_loss is not None:
        s.best_val_loss = min(line.val_loss, s.best_val_loss or math.inf)
    sampled = is_sampled(step, s.folder.spec)
    if sampled and s.ranks.is_first and line.val_loss is not None:
        write_samples(s, step)


@torch.no_grad()
def mean_loss(s: Session, split: Split) -> float:
    """Over the windows that every evaluation reads of a split, in nats per token.

    The ranks share the batches, and add their losses up in one order, however many they are. No
    number if the run was asked to stop: then the rest is left out. A sharded model takes all ranks
    for each pass: who has no batch left repeats one, which does not count.
    """
    s.model.eval()
    losses = torch.zeros(s.batches.eval_batches, device=s.device)
    together = s.config.train.sharding == "full"
    for index in s.ranks.turns(len(losses), together):
        stopping = s.stop.requested is not None
        if s.ranks.any(stopping) if together else stopping:
            losses += math.nan
            break
        s.watchdog.beat(s.longest_step_seconds)
        tokens, targets = s.batches.evaluation_batch(split, index % len(losses))
        with autocast(s.device, s.dtype):
            loss = s.loss_of(tokens, targets)
        if index < len(losses):
            losses[index] = loss
    s.model.train()
    return float(s.ranks.sum(losses).cpu().double().mean())


def run(s: Session) -> tuple[Status, str | None]:
    """Train, and close the log, however it ended.

    Raises:
        RunFailed: on another rank than 0, if that one failed by itself.
    """
    restartable = None
    with s.log:
        try:
            s.stop.listen()
            s.watchdog.start()
            status, reason = train_within_memory(s)
            if status == "failed":
                restartable = False  # the numbers, or the memory, would come out the same
            elif status == "stopped" and reason is None and s.steps_done < s.last_step:
                reason = "another process of the run was asked to stop"
        except Stopped:
            status, reason = "stopped", s.stop.requested
        except RuntimeError as error:
            if not (s.ranks.is_lost(error) and s.ranks.is_first):
                raise
            status, reason = "failed", LOST
        finally:
            s.watchdog.close()
            s.screen.close()
            s.batches.close()
        write_end(s, status, reason, restartable)
    return status, reason


def train_within_memory(s: Session) -> tuple[Status, str | None]:
    """Train; where memory runs out, with fewer sequences at once."""
    while True:
        try:
            if not (s.compiled or s.eager):
                compile_session(s)
            average_gradients(s)
            s.stop.let_steps_end()
            return train(s)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if s.ranks.world > 1 and s.ranks.is_first:  # the others are in the midst of their step
                return "failed", memory_advice(s)
            if s.ranks.world > 1:
                raise RunFailed(f"{memory_advice(s)}.") from error
        # Behind the handler: what the broken step held is free only when its error is gone.
        if (reason := use_smaller_micro_batch(s)) is not None:
            return "failed", reason


def run_whole(given: Namespace, config: Config, ranks: Ranks) -> int:
    """Checks, prediction, training, report; returns the exit status.

    Raises:
        BadInput: if something is not as the configuration has it.
        RunFailed: if the run failed.
    """
    mirror = None
    try:
        share_of(config.train.grad_accum, ranks.world)
        refuse_unshardable(config, ranks.world)
        if ranks.is_first:
            refuse_held(config.folder)
            consult(config, given.force, ranks.world, ranks.local_world)
        session = open_session(
            config,
            given.resume == "auto",
            given.rehearse,
            given.claims,
            given.force,
            given.allow_change,
            ranks,
        )
        wandb = config.wandb
        if wandb.mode != "disabled" and ranks.is_first:
            every, run_id = config.train.log_every, session.wandb_id
            mirror = Mirror.start(config.folder, wandb.mode, wandb.project, every, run_id)
        status, reason = run(session)
        if not ranks.is_first:
            return 0  # the ranks ended together, and rank 0 says how
        report, folder, recorded = build_report(config.folder, claims_of(config.folder, None))
        paths = write_report(report, folder, recorded)
    except OSError as error:
        raise RunFailed(
            f"{config.folder}: {error.strerror or error}; what was written is kept, "
            "--resume auto goes on from the newest checkpoint."
        ) from error
    finally:
        if mirror is not None:
            warning = mirror.finish(0.0 if session.stop.twice else 10.0)
            if warning is not None:
                print(f"! {warning}", flush=True)  # the report is there, and goes up with the rest
    if status == "finished" and (warning := remember_run(session, recorded)) is not None:
        print(f"! {warning}")
    print()
    print_report(report, Console())
    print(f"\n{paths[-1]}  (also .md and .json)")
    if status == "failed":
        raise RunFailed(f"{reason}; the log and the report up to there are kept.")
    if status == "stopped":
        print(f"Stopped at step {session.steps_done:,}; --resume auto goes on from there.")
        return session.stop.exit_status  # 0 at the end of a rehearsal, which nobody's signal ended
    return 0


def main(arguments: Sequence[str]) -> int:
    try:
        given, config = read_command(arguments, __doc__)
        if config.run.deterministic:
            fix_workspace()
        ranks = open_ranks(config.run.device)
    except BadInput:
        if is_told_elsewhere():
            return 2
        raise
    with ranks:
        return run_whole(given, config, ranks)


if __name__ == "__main__":
    run_command(main)
