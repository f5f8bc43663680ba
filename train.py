"""Check, predict, train and report a run, in one command.

python train.py configs/rtx4070_fineweb.toml [--model.n-embd 512 ...] [--resume auto]
torchrun --nproc-per-node 2 train.py ...      # one process per GPU; they share each step

Everything is written to runs/NAME/: the prediction before the first step, a log line per step, checkpoints, and the
report at the end.
"""

import math
import sys
from collections.abc import Sequence

from nanogauge.cli import outlive_terminal, run_command
from trainer.run.supervisor import supervise
from trainer.step.torch_env import keep_pages  # the import sets variables that torch reads

if __name__ == "__main__":
    if "--supervise" in sys.argv[1:]:
        run_command(supervise)  # restarts this file without the flag; needs no torch
    keep_pages()

# isort: split
import torch
from rich.console import Console
from torch import nn

from nanogauge.analysis.report_model import build_report, claims_of
from nanogauge.config import Config
from nanogauge.doctor.preflight import consult
from nanogauge.errors import BadInput, RunFailed
from nanogauge.measure.alarms import Alarm
from nanogauge.quantities import finite
from nanogauge.recorder import Status
from nanogauge.report.background import CPU_SECONDS, GPU_SECONDS, BackgroundReport
from nanogauge.report.html import write_report
from nanogauge.report.terminal import print_report
from nanogauge.runlog.lock import refuse_locked
from nanogauge.schedule import is_evaluated, is_sampled, learning_rate
from nanogauge.schema import Eval
from nanogauge.sinks.mirror import finish_mirrors, start_mirrors
from trainer.calibrate import probe
from trainer.data.dataset import count_tokens
from trainer.data.manifest import Split
from trainer.run.flags import Options, read_command
from trainer.run.recovery import (
    checkpoint_is_due,
    end_by_failure,
    memory_advice,
    roll_back,
    save,
    use_smaller_micro_batch,
)
from trainer.run.session import PendingStep, Session
from trainer.run.signals import Stopped
from trainer.run.startup import average_gradients, compile_session, open_session
from trainer.run.step_records import record_end, record_samples, record_steps, store_final_loss, store_step_time
from trainer.step.device import autocast, is_out_of_memory, set_cublas_workspace, to_host
from trainer.step.distributed import LOST, Ranks, is_reported_by_rank_0, open_ranks, rank_share
from trainer.step.fsdp import full_tensor, refuse_unshardable
from trainer.step.optimizer import set_learning_rate, update


def train(s: Session) -> tuple[Status, str | None]:
    """Train until s.steps.last, a stop request or a failure; return the status and the reason."""
    config, clock, state, steps = s.config, s.recorder.clock, s.state, s.steps
    accumulation, parameters = s.batches.grad_accum, list(state.model.parameters())
    spec, schedule = s.run.folder.spec, s.run.folder.spec.schedule
    assert schedule is not None
    step = steps.done
    while True:
        # 1. Evaluation and checkpoint, each timed separately and outside of every step.
        # stopping: a signal asked any rank to stop. leaving: training ends at this step, for that reason or because it
        # is the last one; a last checkpoint is written before returning.
        stopping = s.ranks.any(s.stop.reason is not None)
        leaving = stopping or step == steps.last
        evaluating = not stopping and step != steps.evaluated and is_evaluated(step, spec)
        saving = checkpoint_is_due(s, step, leaving)
        if evaluating or saving:
            record_steps(s)  # flush pending steps first
        if len(steps.skipped) >= config.train.max_skipped:
            if (reason := roll_back(s)) is not None:
                return "failed", reason
            step = steps.done
            continue
        if evaluating:
            evaluate(s, step)
        if saving and (leaving or not steps.skipped):  # no checkpoint while updates are skipped
            save(s, step, wait=leaving)
        if leaving:
            finished = step == spec.steps == steps.evaluated
            return "finished" if finished else "stopped", s.stop.reason

        # 2. One optimizer step with gradient accumulation. The device always has work queued: the host waits at most
        # until the micro-batch before the last one has ended.
        if evaluating or saving or step == steps.first:
            s.recorder.sensors.power_since_last()  # drop samples taken outside of steps
        watch = clock.begin_step(split=(step - steps.first) % config.measure.split_every == 0)
        rate = learning_rate(step, schedule, spec.steps)
        set_learning_rate(state.optimizer, rate)
        total = torch.zeros((), device=state.device)
        for micro in range(accumulation):
            with watch.waiting():
                tokens, targets = s.batches.batch("train", step, micro)
            with s.ranks.accumulating(last=micro == accumulation - 1):
                with autocast(state.device, state.dtype):
                    loss = state.reduced_loss(tokens, targets) / accumulation
                watch.lap("forward")
                state.loss.backward(state.scaler.scale(loss))
            total += loss.detach()
            watch.lap("backward")
        total = s.ranks.mean(total)
        state.scaler.unscale_(state.optimizer)
        max_norm = config.optimizer.grad_clip or math.inf
        norm = full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm))
        update(state.optimizer, state.scaler, torch.isfinite(total) & torch.isfinite(norm))
        state.optimizer.zero_grad(set_to_none=True)
        watch.lap("optimizer")
        metrics = to_host(torch.stack([total, norm]))
        clock.end_step(watch)

        # 3. Log and show completed steps; on a GPU a step is recorded while the next one runs.
        steps.pending.append(PendingStep(step, rate, metrics, watch))
        record_steps(s, leave=clock.lag)
        step += 1


def evaluate(s: Session, step: int) -> None:
    """Evaluate the loss on both splits and log it, at some steps with generated texts.

    Nothing is logged if a stop is requested meanwhile, as the resumed run repeats the evaluation.
    """
    steps, recorder = s.steps, s.recorder
    with recorder.clock.window() as evaluation:
        train_loss, val_loss = (mean_loss(s, split) for split in ("train", "val"))
    recorder.record_compilation(step, evaluation.compile_seconds)
    if s.ranks.any(s.stop.reason is not None):
        return
    line = Eval(
        step=step,
        train_loss=finite(train_loss),
        val_loss=finite(val_loss),
        seconds=evaluation.seconds - recorder.standstill.seconds_within(evaluation.seconds),
    )
    line, departure = s.final_loss.evaluated(line)
    recorder.record_standstills(step)
    recorder.log.write(line)
    s.display.evaluated(line)
    if departure is not None:
        recorder.raise_alarm(Alarm("loss_off_plan", departure, "val_loss"), step)
    steps.evaluated, steps.val_loss = step, line.val_loss
    if line.val_loss is None:
        return
    steps.best_val_loss = min(line.val_loss, steps.best_val_loss or math.inf)
    if s.ranks.is_first and is_sampled(step, s.run.folder.spec):
        record_samples(s, step)


@torch.no_grad()
def mean_loss(s: Session, split: Split) -> float:
    """Return the mean loss over the evaluation windows of a split, in nats per token.

    The batches are divided among the ranks; the order of the sum does not depend on the world size. If a stop is
    requested, the remaining batches are skipped and NaN is returned. With a sharded model every forward pass is a
    collective, so ranks without remaining batches repeat one and discard its loss.
    """
    state = s.state
    state.model.eval()
    losses = torch.zeros(s.batches.eval_batches, device=state.device)
    together = s.config.train.sharding == "full"
    for index in s.ranks.turns(len(losses), together):
        stopping = s.stop.reason is not None
        if s.ranks.any(stopping) if together else stopping:
            losses += math.nan
            break
        s.watchdog.beat(s.steps.longest_seconds)
        tokens, targets = s.batches.evaluation_batch(split, index % len(losses))
        with autocast(state.device, state.dtype):
            loss = state.loss(tokens, targets)
        if index < len(losses):
            losses[index] = loss
    state.model.train()
    return float(s.ranks.sum(losses).cpu().double().mean())


def run(s: Session) -> tuple[Status, str | None]:
    """Train with signal handling and watchdog, then log the end; return status and reason.

    Raises:
        RunFailed: on ranks other than 0 that ran out of memory.
    """
    restartable = None
    with s.recorder.log:
        try:
            s.stop.listen()
            s.watchdog.start()
            s.recorder.standstill.start()
            status, reason = train_within_memory(s)
            if s.stop.failed:
                status = "failed"
            if status == "failed":
                restartable = False  # a restart would fail again
            elif status == "stopped" and reason is None and s.steps.done < s.steps.last:
                reason = "another process of the run was asked to stop"
        except Stopped:
            status, reason = "stopped", s.stop.reason
        except Exception as error:
            if not s.ranks.is_first:
                raise
            status, reason = "failed", LOST
            if not s.ranks.is_lost(error):
                reason, restartable = end_by_failure(s, error)
        finally:
            s.watchdog.close()
            s.recorder.standstill.close()
            s.display.close()
            s.batches.close()
        record_end(s, status, reason, restartable)
    return status, reason


def train_within_memory(s: Session) -> tuple[Status, str | None]:
    """Compile and train; after an out-of-memory error, retry with a smaller micro-batch.

    Only a single rank can retry; with several ranks the run fails. Returns status and reason.
    """
    while True:
        try:
            if s.state.compilation == "pending":
                compile_session(s)
            average_gradients(s)
            s.stop.let_steps_end()
            return train(s)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if s.ranks.world > 1 and s.ranks.is_first:  # others cannot retry in mid-step
                return "failed", memory_advice(s)
            if s.ranks.world > 1:
                raise RunFailed(f"{memory_advice(s)}.") from error
        # Outside of the handler: the failed step's memory is freed together with its error.
        if (reason := use_smaller_micro_batch(s)) is not None:
            return "failed", reason


def run_whole(options: Options, config: Config, ranks: Ranks) -> int:
    """Check, predict, train and report; return the exit status.

    Raises:
        BadInput: if the configuration, the machine or the run folder is not as required. RunFailed: if the run failed.
    """
    mirrors = []
    try:
        rank_share(config.train.grad_accum, ranks.world)
        refuse_unshardable(config, ranks.world)
        if ranks.is_first:
            refuse_locked(config.folder)
            device = probe(config.run)
            consult(config, device, count_tokens, options.force, ranks.world, ranks.local_world)
        session = open_session(config, options, ranks)
        if ranks.is_first:
            mirrors = start_mirrors(config, session.run.wandb_id)
            seconds = CPU_SECONDS if session.state.device.type == "cpu" else GPU_SECONDS
            background = BackgroundReport.start(config.folder, seconds)
        status, reason = run(session)
        if not ranks.is_first:
            return 0  # rank 0 reports the outcome for all ranks
        background.stop()
        report, folder, recorded = build_report(config.folder, claims_of(config.folder, None))
        paths = write_report(report, folder, recorded)
    except OSError as error:
        what = f"{error.filename or config.folder}: {error.strerror or error}"
        raise RunFailed(
            f"{what}; what was written is kept, --resume auto continues from the newest checkpoint."
        ) from error
    finally:
        if mirrors:
            for problem in finish_mirrors(mirrors, 0.0 if session.stop.repeated else 10.0):
                print(f"! {problem}", flush=True)  # the report is written, and uploaded as well
    if status == "finished":
        for warning in (store_step_time(session, recorded), store_final_loss(session)):
            if warning is not None:
                print(f"! {warning}")
    print()
    print_report(report, Console(), paths[-1])
    if status == "failed":
        raise RunFailed(f"{reason}; the log and the report up to there are kept.")
    if status == "stopped":
        print(f"Stopped at step {session.steps.done:,}; --resume auto continues from there.")
        return session.stop.exit_status  # 0 at the end of a rehearsal, without a signal
    return 0


def main(arguments: Sequence[str]) -> int:
    outlive_terminal()
    try:
        options, config = read_command(arguments, __doc__)
        if config.run.deterministic:
            set_cublas_workspace()
        ranks = open_ranks(config.run.device)
    except BadInput:
        if is_reported_by_rank_0():
            return 2
        raise
    with ranks:
        return run_whole(options, config, ranks)


if __name__ == "__main__":
    run_command(main)
