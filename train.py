"""The whole night in one command: checks, prediction, training, report.

python train.py configs/rtx4070_fineweb.toml [--model.n-embd 512 ...] [--resume auto]

Everything goes to runs/NAME/: the prediction before the first step, a line of log for every step,
checkpoints, and the report at the end.
"""

from __future__ import annotations

import math
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import nanogauge.threads  # noqa: F401  before torch

# isort: split
import torch
from rich.console import Console
from torch import nn

from nanogauge.claims import load_claims
from nanogauge.cli import Parser, run_command
from nanogauge.config import add_config_flags, config_overrides, load_config
from nanogauge.errors import BadInput, RunFailed
from nanogauge.measure.memory import peak_process_bytes
from nanogauge.preflight import consult
from nanogauge.quantities import finite
from nanogauge.recording import log_compilation, record_sensors, record_steps
from nanogauge.records import Checkpoint, End, Eval, Event
from nanogauge.report.build import build_report, claims_of
from nanogauge.report.render import print_report, write_report
from nanogauge.session import Session, StepUnderWay, open_session, remember_run
from nanogauge.tracking import Mirror
from nanogauge.training.checkpoint import save_checkpoint
from nanogauge.training.device import allocator_peaks, autocast, to_host
from nanogauge.training.sampling import is_sampled, sample_text
from nanogauge.training.schedule import learning_rate

SAMPLE_TOKENS = 200
Status = Literal["finished", "stopped", "failed"]


def train(s: Session) -> tuple[Status, str | None]:
    """Train up to last_step, counting updates in s.steps_done; returns how it ended, and why."""
    config, clock = s.config, s.clock
    accumulation, parameters = config.train.grad_accum, list(s.model.parameters())
    step = s.steps_done
    while True:
        # 1. Evaluation and checkpoint, each in a window of its own: no step contains them.
        leaving = step == s.last_step or s.stop.requested is not None
        evaluating = step % config.train.eval_every == 0 or step == config.train.max_steps
        saving = (step % config.train.checkpoint_every == 0 or leaving) and step > s.first_step
        if (evaluating or saving) and (problem := record_steps(s)) is not None:
            return "failed", problem  # before a checkpoint could hold it
        if evaluating:
            with clock.window() as evaluation:
                train_loss, val_loss = evaluate(s)
            line = Eval(
                step=step,
                train_loss=finite(train_loss),
                val_loss=finite(val_loss),
                seconds=evaluation.seconds,
            )
            s.log.write(line)
            log_compilation(s, step, evaluation.compile_seconds)
            s.screen.evaluated(line)
            if is_sampled(step, config.train.eval_every, config.train.max_steps):
                write_samples(s, step)
        if saving:
            save(s, step)
        if leaving:
            status: Status = "finished" if step == config.train.max_steps else "stopped"
            return status, s.stop.requested

        # 2. One optimizer step over grad_accum micro-batches; nothing in it waits for the device.
        if evaluating or saving or step == s.first_step:
            s.sensors.power_since_last()  # what was sampled meanwhile is no step's
        watch = clock.begin_step(split=(step - s.first_step) % config.measure.split_every == 0)
        rate = learning_rate(step, config.optimizer, config.train.max_steps)
        for group in s.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=s.device)
        for micro in range(accumulation):
            with watch.waiting():
                tokens, targets = s.batches.batch("train", step, micro)
            with autocast(s.device, s.dtype):
                loss = s.loss_of(tokens, targets) / accumulation
            watch.lap("forward")
            s.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            watch.lap("backward")
        s.scaler.unscale_(s.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, config.optimizer.grad_clip or math.inf)
        s.scaler.step(s.optimizer)
        s.scaler.update()
        s.optimizer.zero_grad(set_to_none=True)
        watch.lap("optimizer")
        figures = to_host(torch.stack([total, norm]))
        clock.end_step(watch)

        # 3. The record of it, first on disk, then on the screen: on a GPU while the next one runs.
        s.under_way.append(StepUnderWay(step, rate, figures, watch))
        if (problem := record_steps(s, leave=clock.lag)) is not None:
            return "failed", problem
        step += 1


@torch.no_grad()
def evaluate(s: Session) -> tuple[float, float]:
    """Mean loss on the training and on the validation split, in nats per token."""
    s.model.eval()
    means = []
    for split in ("train", "val"):
        total = torch.zeros((), device=s.device)
        for index in range(s.config.train.eval_batches):
            tokens, targets = s.batches.evaluation_batch(split, index)
            with autocast(s.device, s.dtype):
                total += s.loss_of(tokens, targets)
        means.append(total.item() / s.config.train.eval_batches)
    s.model.train()
    return means[0], means[1]


def save(s: Session, step: int) -> None:
    """Write a checkpoint; a failure is told, and costs neither the run nor the previous one."""
    with s.clock.window() as saving:
        try:
            where = s.folder.path / "checkpoints"
            position = s.batches.position(step)
            path, size = save_checkpoint(where, step, s.model, s.optimizer, s.scaler, position)
        except OSError as error:
            text = f"No checkpoint at step {step:,}: {error.strerror}; free space on the disk."
            s.log.write(Event(level="warning", what="checkpoint_failed", step=step, text=text))
            s.screen.say(f"! {text}")
            return
    line = Checkpoint(
        step=step,
        seconds=saving.seconds,
        bytes=size,
        path=str(path.relative_to(s.folder.path)),
    )
    s.log.write(line)
    s.screen.checkpointed(line)


def close(s: Session, status: Status, reason: str | None) -> None:
    """The last lines of the log: what the sensors ended with, the peaks, the end."""
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
        for prompt in s.config.train.prompts or [""]:
            text = sample_text(s.model, encoding, prompt, SAMPLE_TOKENS, s.config.run.seed)
            s.log.write(Event(what="sample", step=step, text=text))


def run(s: Session) -> tuple[Status, str | None]:
    """Train, and close the log, however it ended."""
    with s.log:
        try:
            status, reason = train(s)
        except torch.OutOfMemoryError:
            train_config = s.config.train
            status, reason = (
                "failed",
                f"the GPU ran out of memory; set --train.micro-batch below "
                f"{train_config.micro_batch} and --train.grad-accum higher by as much",
            )
        finally:
            s.screen.close()
            s.batches.close()
        close(s, status, reason)
    return status, reason


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("config", type=Path, help="configuration of the run")
    parser.add_argument("--resume", choices=["auto"], help="go on from the newest checkpoint")
    parser.add_argument("--init-from", dest="run.init_from", default=SUPPRESS, metavar="GPT2")
    parser.add_argument("--rehearse", type=int, metavar="N", help="stop after N steady steps")
    parser.add_argument("--claims", type=Path, help="claims to hold against the run in its report")
    parser.add_argument(
        "--force",
        action="store_true",
        help="start in spite of the doctor, and even where the memory cannot suffice",
    )
    add_config_flags(parser)
    given = parser.parse(arguments)
    if given.rehearse is not None and given.rehearse < 1:
        raise BadInput("--rehearse takes a number of steps above 0.")
    config = load_config(given.config, config_overrides(given))
    if given.claims is not None:
        load_claims(given.claims)
    mirror = None
    try:
        consult(config, given.force)
        session = open_session(
            config, given.resume == "auto", given.rehearse, given.claims, given.force
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
        if mirror is not None and (warning := mirror.finish()) is not None:
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
    return 0 if status == "finished" or given.rehearse is not None else 1


if __name__ == "__main__":
    run_command(main)
