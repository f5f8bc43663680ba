"""The whole night in one command: checks, prediction, training, report.

python train.py configs/rtx4070_fineweb.toml [--model.n-embd 512 ...] [--resume auto]

Everything goes to runs/NAME/: the prediction before the first step, a line of log for every step,
checkpoints, and the report at the end.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Literal

import nanogauge.threads  # noqa: F401  before torch
from nanogauge.cli import run_command
from nanogauge.supervise import supervise

if __name__ == "__main__" and "--supervise" in sys.argv[1:]:
    run_command(supervise)  # which starts this file again without the flag; it needs no torch

# isort: split
import torch
from rich.console import Console
from torch import nn

from nanogauge.claims import load_claims
from nanogauge.config import config_overrides, load_config
from nanogauge.errors import BadInput, RunFailed
from nanogauge.measure.memory import peak_process_bytes
from nanogauge.preflight import consult
from nanogauge.quantities import finite
from nanogauge.recording import (
    log_compilation,
    record_sensors,
    record_steps,
    write_checkpoints,
)
from nanogauge.records import End, Eval, Event
from nanogauge.report.build import build_report, claims_of
from nanogauge.report.render import print_report, write_report
from nanogauge.rescue import (
    checkpoint_is_due,
    roll_back,
    save,
    use_smaller_micro_batch,
)
from nanogauge.resume import check_names
from nanogauge.runlock import refuse_held
from nanogauge.session import Session, StepUnderWay, compile_session, open_session, remember_run
from nanogauge.tracking import Mirror
from nanogauge.train_flags import train_parser
from nanogauge.training.data import Split
from nanogauge.training.device import allocator_peaks, autocast, is_out_of_memory, to_host
from nanogauge.training.optimizer import update
from nanogauge.training.sampling import is_sampled, sample_text
from nanogauge.training.schedule import learning_rate
from nanogauge.training.stopping import Stopped

SAMPLE_TOKENS = 200
Status = Literal["finished", "stopped", "failed"]


def train(s: Session) -> tuple[Status, str | None]:
    """Train up to last_step, counting steps in s.steps_done; returns how it ended, and why."""
    config, clock = s.config, s.clock
    parameters = list(s.model.parameters())
    step = s.steps_done
    while True:
        # 1. Evaluation and checkpoint, each in a window of its own: no step contains them.
        leaving = step == s.last_step or s.stop.requested is not None
        evaluating = is_evaluated(s, step)
        if evaluating or leaving or checkpoint_is_due(s, step):
            record_steps(s)  # all of it, before an evaluation or a checkpoint stands on it
        if len(s.skipped) >= config.train.max_skipped:
            if (reason := roll_back(s)) is not None:
                return "failed", reason
            step = s.steps_done
            continue
        if evaluating:
            evaluate(s, step)
        if saving := checkpoint_is_due(s, step, leaving):
            save(s, step, wait=leaving)
        if leaving:
            finished = step == config.train.max_steps == s.evaluated_step
            return "finished" if finished else "stopped", s.stop.requested

        # 2. One optimizer step over its micro-batches; nothing in it waits for the device.
        if evaluating or saving or step == s.first_step:
            s.sensors.power_since_last()  # what was sampled meanwhile is no step's
        watch = clock.begin_step(split=(step - s.first_step) % config.measure.split_every == 0)
        rate = learning_rate(step, config.optimizer, config.train.max_steps)
        for group in s.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=s.device)
        for micro in range(s.batches.grad_accum):
            with watch.waiting():
                tokens, targets = s.batches.batch("train", step, micro)
            with autocast(s.device, s.dtype):
                loss = s.loss_of(tokens, targets) / s.batches.grad_accum
            watch.lap("forward")
            s.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            watch.lap("backward")
        s.scaler.unscale_(s.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, config.optimizer.grad_clip or math.inf)
        update(s.optimizer, s.scaler, torch.isfinite(total) & torch.isfinite(norm))
        s.optimizer.zero_grad(set_to_none=True)
        watch.lap("optimizer")
        figures = to_host(torch.stack([total, norm]))
        clock.end_step(watch)

        # 3. The record of it, first on disk, then on the screen: on a GPU while the next one runs.
        s.under_way.append(StepUnderWay(step, rate, figures, watch))
        record_steps(s, leave=clock.lag)
        step += 1


def is_evaluated(s: Session, step: int) -> bool:
    """Whether there is an evaluation here; a run that is to stop leaves it to its resumption."""
    every, last = s.config.train.eval_every, s.config.train.max_steps
    wanted = (step % every == 0 or step == last) and step != s.evaluated_step
    return wanted and s.stop.requested is None


def evaluate(s: Session, step: int) -> None:
    """Log the loss on both splits after so many steps, and now and then what the model writes.

    Nothing is logged if the run was asked to stop meanwhile.
    """
    with s.clock.window() as evaluation:
        train_loss, val_loss = (mean_loss(s, split) for split in ("train", "val"))
    log_compilation(s, step, evaluation.compile_seconds)
    if s.stop.requested is not None:
        return
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
    if is_sampled(step, s.config.train.eval_every, s.config.train.max_steps):
        write_samples(s, step)


@torch.no_grad()
def mean_loss(s: Session, split: Split) -> float:
    """Over the windows that every evaluation reads of a split, in nats per token.

    No number if the run was asked to stop: then the rest is left out.
    """
    s.model.eval()
    total = torch.zeros((), device=s.device)
    for index in range(s.batches.eval_batches):
        if s.stop.requested is not None:
            total += math.nan
            break
        s.watchdog.beat(s.longest_step_seconds)
        tokens, targets = s.batches.evaluation_batch(split, index)
        with autocast(s.device, s.dtype):
            total += s.loss_of(tokens, targets)
    s.model.train()
    return total.item() / s.batches.eval_batches


def close(s: Session, status: Status, reason: str | None, restartable: bool | None) -> None:
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
    """Log what the model writes; without its vocabulary (offline) there is nothing."""
    with s.clock.window():
        try:
            encoding = s.source.encoding()
        except Exception as error:  # a download fails in whatever way its client has
            text = (
                f"No sample of text: the vocabulary could not be loaded ({type(error).__name__})."
            )
            s.log.write(Event(level="warning", what="no_sample", text=text, step=step))
            return
        s.model.eval()
        for prompt in s.config.train.prompts or [""]:
            seed = s.config.run.seed
            text = sample_text(s.model, encoding, prompt, SAMPLE_TOKENS, seed, s.device)
            s.log.write(Event(what="sample", step=step, text=text))
        s.model.train()


def run(s: Session) -> tuple[Status, str | None]:
    """Train, and close the log, however it ended."""
    restartable = None
    with s.log:
        try:
            s.stop.listen()
            s.watchdog.start()
            status, reason = train_within_memory(s)
            if status == "failed":
                restartable = False  # the numbers, or the memory, would come out the same
        except Stopped:
            status, reason = "stopped", s.stop.requested
        finally:
            s.watchdog.close()
            s.screen.close()
            s.batches.close()
        close(s, status, reason, restartable)
    return status, reason


def train_within_memory(s: Session) -> tuple[Status, str | None]:
    """Train; where memory runs out, with fewer sequences at once."""
    while True:
        try:
            if s.loss_of is s.model and not s.eager:
                compile_session(s)
            s.stop.let_steps_end()
            return train(s)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Behind the handler: what the broken step held is free only when its error is gone.
        if (reason := use_smaller_micro_batch(s)) is not None:
            return "failed", reason


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    given = train_parser(__doc__).parse(arguments)
    if given.max_restarts is not None:
        raise BadInput("--max-restarts is for --supervise; give both.")
    if given.rehearse is not None and given.rehearse < 1:
        raise BadInput("--rehearse takes a number of steps above 0.")
    check_names(given.allow_change)
    config = load_config(given.config, config_overrides(given))
    if given.claims is not None:
        load_claims(given.claims)
    mirror = None
    refuse_held(config.folder)
    try:
        consult(config, given.force)
        session = open_session(
            config,
            given.resume == "auto",
            given.rehearse,
            given.claims,
            given.force,
            given.allow_change,
        )
        wandb = config.wandb
        if wandb.mode != "disabled":
            every, run_id = config.train.log_every, session.wandb_id
            mirror = Mirror.start(config.folder, wandb.mode, wandb.project, every, run_id)
        status, reason = run(session)
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


if __name__ == "__main__":
    run_command(main)
