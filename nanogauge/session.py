"""One process's share of a run, set up: data, prediction, model, log, sensors.

Here, as in train.py, everything meets: nothing but train.py and bench/ imports it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from model import GPT
from nanogauge.admission import (
    ALONE,
    Opened,
    begin_state,
    make_alarms,
    open_folder,
    share_folder,
    watched_cards,
)
from nanogauge.calibrations import add_to_calibration
from nanogauge.config import Config
from nanogauge.files import write_atomic
from nanogauge.measure.alarms import Alarms
from nanogauge.measure.clock import Clock, Stopwatch
from nanogauge.measure.gpu import (
    DriverInfo,
    Idle,
    Sensors,
    driver_info,
    measure_idle,
    open_sensors,
)
from nanogauge.measure.memory import reset_peak
from nanogauge.measure.watchdog import Watchdog
from nanogauge.predict.calibration import Calibration, FinishedRun
from nanogauge.predict.workload import workload_of
from nanogauge.present import calibrated_threads
from nanogauge.records import Event, Start
from nanogauge.report.build import CLAIMS_NAME
from nanogauge.report.figures import quantile
from nanogauge.report.measured import steady_seconds
from nanogauge.resume import (
    code_sha256,
    micro_batch_to_use,
    refuse_other_data,
    refuse_other_identity,
)
from nanogauge.rundata import make_batches, open_data, tell_of_data
from nanogauge.runfolder import CONFIG_TOML, RunFolder, write_spec
from nanogauge.runlock import RunLock
from nanogauge.runlog import Recorded, RunLog
from nanogauge.screen import Screen
from nanogauge.sharing import SilentLog, tell_of_other_ranks
from nanogauge.supervise import restart_number
from nanogauge.tracking import new_run_id
from nanogauge.training.building import make_model, make_training
from nanogauge.training.checkpoint import read_meta
from nanogauge.training.checkpoint_writer import Checkpoints
from nanogauge.training.compiling import CompileWatch, Loss
from nanogauge.training.data import Batches
from nanogauge.training.device import (
    EventTimeline,
    choose_device,
    choose_dtype,
    synchronize,
)
from nanogauge.training.exactness import choose_algorithms
from nanogauge.training.loss import TrainingLoss
from nanogauge.training.pretrained import load_pretrained
from nanogauge.training.ranks import Ranks
from nanogauge.training.sources import Source
from nanogauge.training.stopping import Stop

UNSEEN_STEP_SECONDS = 3600.0
"""what the first step of a device without a prediction may take before it counts as hung"""
STEPS_TO_REMEMBER = 20  # fewer steady steps tell little of the next run


@dataclass(frozen=True)
class StepUnderWay:
    """A step whose work was handed to the device."""

    step: int
    learning_rate: float
    figures: torch.Tensor
    """loss and gradient norm, in the host's memory once the step has ended"""
    watch: Stopwatch


@dataclass(frozen=True)
class Earlier:
    """What the processes before this one came to."""

    wall_seconds: float = 0.0
    energy_joules: float | None = None


@dataclass
class Session:
    """What the loop works with."""

    config: Config
    folder: RunFolder
    lock: RunLock | None
    """held until the process ends; rank 0 alone has it"""
    device: torch.device
    dtype: str
    model: GPT
    loss_of: TrainingLoss
    """what the model is trained on, compiled or not"""
    ranks: Ranks
    averaged_loss_of: Loss
    """loss_of, with gradients that are the mean over the ranks"""
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    source: Source
    batches: Batches
    log: RunLog
    clock: Clock
    sensors: Sensors
    alarms: Alarms
    screen: Screen
    stop: Stop
    watchdog: Watchdog
    checkpoints: Checkpoints
    compile_watch: CompileWatch
    identity: Mapping[str, str]
    """what is trained with beside the configuration, as resume.IDENTITY names it"""
    first_step: int
    wandb_id: str
    """of the run in W&B, which a resumption continues"""
    steps_done: int
    """steps since step 0, skipped updates among them"""
    last_step: int
    """the step at which to stop: max_steps, or less in a rehearsal"""
    earlier: Earlier
    rollbacks: int
    """how often the run went back for updates that were not finite, in earlier processes too"""
    evaluated_step: int | None
    """the step of the last evaluation"""
    val_loss: float | None = None
    """of that evaluation, if this process made it"""
    best_val_loss: float | None = None
    """the least of the run"""
    energy_joules: float | None = None
    """of this process so far, from its sensors"""
    saved_step: int = 0
    """of the last checkpoint, or where this process began"""
    saved_seconds: float = 0.0
    """when the last checkpoint began, on the clock"""
    saving: dict[int, float] = field(default_factory=dict)
    """seconds that the loop waited for each checkpoint that is being written"""
    skipped: list[int] = field(default_factory=list)
    """the latest steps whose updates were skipped, one after another"""
    longest_step_seconds: float = UNSEEN_STEP_SECONDS
    """of this process; until there is a step, what one may take by the prediction"""
    log_is_in_trouble: bool = False
    """whether lines of the log wait for room on the disk, which has been told"""
    compiled: bool = False
    eager: bool = False
    """whether compiling was tried and failed, or is not wanted"""
    under_way: deque[StepUnderWay] = field(default_factory=deque)


def open_session(
    config: Config,
    resume: bool,
    rehearse_steps: int | None,
    claims: Path | None,
    force: bool,
    allowed: Collection[str] = (),
    ranks: Ranks = ALONE,
) -> Session:
    """Everything up to the first step; the prediction is on disk before the model exists.

    All ranks do the same, but rank 0 alone opens the run folder, reads sensors and writes.

    Args:
        allowed: what may be another than it was when the run began, by name (resume.py).

    Raises:
        BadInput: if the device, the data or the run folder are not as the configuration has them,
            or if the run cannot fit into the memory that is free and is not forced to try.
        OSError: if the run folder cannot be written.
    """
    device = choose_device(config.run.device)
    compile_watch = CompileWatch()
    clock = Clock(
        partial(synchronize, device),
        timeline=EventTimeline(device) if device.type == "cuda" else None,
        compiled_seconds=compile_watch.seconds,
    )
    dtype = choose_dtype(config.run.dtype, device)
    torch.set_float32_matmul_precision("high")  # TF32 for what is left in fp32 on a GPU
    config, source, batches = open_data(config, device, ranks)
    opening = partial(open_folder, config, device, dtype, resume, force, allowed, ranks)
    opened = share_folder(config, ranks, opening)
    folder = opened.folder
    meta = read_meta(opened.checkpoint) if opened.checkpoint is not None else None
    micro_batch = micro_batch_to_use(config, meta.run if meta is not None else {})
    if opened.rollbacks or micro_batch != config.train.micro_batch:
        batches.close()
        batches = make_batches(config, source, device, ranks, micro_batch, opened.rollbacks)
    if claims is not None and ranks.is_first:
        write_atomic(folder.path / CLAIMS_NAME, claims.read_bytes())
    cards = watched_cards(config, device, ranks)
    card = driver_info(cards[0].device) if cards else None
    idle: Idle | None = None
    if cards and config.measure.idle_seconds > 0:
        idle = measure_idle(cards, config.measure.power_hz, config.measure.idle_seconds)
    ranks.any(False)  # the others wait until then: their cards, too, are to be idle
    sensors = open_sensors(cards, config.measure.power_hz, clock.elapsed_seconds)
    reset_peak()
    # Loads the compiler's front, which the prediction counts: after it was made.
    choose_algorithms(device, config.run.deterministic)
    torch.manual_seed(config.run.seed)  # here: measuring the device drew numbers, resuming did not
    model = make_model(config)
    identity = {
        "code": code_sha256(),
        "torch": torch.__version__,
        "device": device.type,
        "dtype": dtype,
    }
    first_step, changes = 0, opened.changes
    if meta is not None:
        first_step = meta.step
        changes += refuse_other_identity(meta.run["identity"], identity, allowed)
        changes += refuse_other_data(meta.data, batches.position(first_step), allowed)
    elif config.run.init_from is not None:
        load_pretrained(model, config.run.init_from)
    loss_of, optimizer, scaler = make_training(config, model, batches, dtype, ranks)
    exact = begin_state(opened.checkpoint, model, optimizer, scaler, device, config.run.seed, ranks)
    last_step = config.train.max_steps
    if rehearse_steps is not None:
        last_step = min(last_step, first_step + rehearse_steps + 1)
    screen = Screen(
        folder.spec,
        folder.prediction,
        first_step,
        opened.earlier_seconds,
        log_every=config.train.log_every,
        elapsed_seconds=clock.elapsed_seconds,
    )
    screen.plan()
    log = RunLog(folder.path, clock.elapsed_seconds) if ranks.is_first else SilentLog()
    session = Session(
        config=config,
        folder=folder,
        lock=opened.lock,
        device=device,
        dtype=dtype,
        model=model,
        loss_of=loss_of,
        ranks=ranks,
        averaged_loss_of=loss_of,
        optimizer=optimizer,
        scaler=scaler,
        source=source,
        batches=batches,
        log=log,
        clock=clock,
        sensors=sensors,
        alarms=make_alarms(folder.prediction, card),
        screen=screen,
        stop=Stop(),
        watchdog=Watchdog(
            folder.path, 60 * config.measure.hang_minutes, partial(tell_of_hang, log)
        ),
        checkpoints=Checkpoints(folder.path / "checkpoints", config.train.keep_checkpoints),
        compile_watch=compile_watch,
        identity=identity,
        first_step=first_step,
        wandb_id=opened.wandb_id or new_run_id(),
        steps_done=first_step,
        last_step=last_step,
        earlier=Earlier(
            wall_seconds=opened.earlier_seconds or 0.0,
            energy_joules=meta.run.get("energy_joules") if meta else None,
        ),
        rollbacks=opened.rollbacks,
        evaluated_step=first_step if first_step in opened.evaluated else None,
        best_val_loss=meta.run.get("best_val_loss") if meta else None,
        saved_step=first_step,
        saved_seconds=clock.elapsed_seconds(),
        eager=not config.run.compile,
    )
    if (first_step_seconds := folder.prediction.best("first_step_seconds")) is not None:
        session.longest_step_seconds = first_step_seconds.high
    begin_log(session, opened, idle, card, len(cards), changes)
    if not exact:
        tell_of_other_ranks(ranks, first_step, log, screen)
    return session


def begin_log(
    s: Session,
    opened: Opened,
    idle: Idle | None,
    card: DriverInfo | None,
    sensed_cards: int,
    changes: list[str],
) -> None:
    """The start line, and what is to be told before the first step."""
    micro = s.batches.micro_batch
    more = {
        "idle_power_watts": idle.power_watts if idle is not None else None,
        "idle_utilization": idle.utilization if idle is not None else None,
        "other_programs": card.others if card is not None else None,
        "sensed_cards": sensed_cards or None,
        "restart": restart_number(),
        "micro_batch": micro if micro != s.config.train.micro_batch else None,
    }
    s.log.write(start_line(s, s.first_step).model_copy(update=more))
    if opened.lock is not None and opened.lock.warning is not None:
        s.log.write(Event(level="warning", what="no_lock", text=opened.lock.warning))
        s.screen.say(f"! {opened.lock.warning}")
    tell_of_data(s.config, s.source, s.batches, s.log, s.screen)
    for text in opened.damaged:
        s.log.write(Event(level="warning", what="checkpoint_damaged", text=text))
    if changes and s.ranks.is_first:
        write_atomic(s.folder.path / CONFIG_TOML, s.config.to_toml().encode())
        write_spec(s.folder.path, s.folder.spec)
    for text in changes:
        s.log.write(Event(level="warning", what="changed", text=text))
        s.screen.say(f"! {text}")


def start_line(s: Session, first_step: int) -> Start:
    """That a process goes on from a step, at its beginning or because it went back."""
    return Start(
        unix_time=time.time(),
        max_steps=s.config.train.max_steps,
        first_step=first_step,
        prediction_sha256=s.folder.prediction_sha256,
        device=s.folder.prediction.hardware.name,
        train_tokens=s.batches.train_tokens,
        wandb_id=s.wandb_id,
        ranks=s.ranks.world,
        rollbacks=s.rollbacks or None,
    )


def tell_of_hang(log: RunLog, text: str) -> None:
    """The last line of a run that hangs, which its watchdog writes."""
    log.write(Event(level="alarm", what="hung", text=text))


def remember_run(s: Session, recorded: Recorded) -> str | None:
    """Keep the steady step of a finished run: the next prediction on this device stands on it.

    Counts the steps of this process alone; one that had to go on without the compilation that was
    asked for was another workload. Returns a warning where the step could not be kept.
    """
    seconds = steady_seconds(recorded, first_step=recorded.starts[-1].first_step)
    if len(seconds) < STEPS_TO_REMEMBER or s.config.run.compile != s.compiled:
        return None
    on_gpu = s.device.type != "cpu"
    run = FinishedRun(
        name=s.config.run.name,
        workload=workload_of(s.config.to_spec(s.dtype, s.ranks.world), on_gpu),
        step_seconds=float(np.median(seconds)),
        p10_seconds=quantile(seconds, 0.1),
        p90_seconds=quantile(seconds, 0.9),
        n=len(seconds),
        finished_unix=time.time(),
    )
    _, warning = add_to_calibration(
        Calibration(
            device=s.folder.prediction.hardware.name,
            torch=torch.__version__,
            threads=calibrated_threads(s.device),
            created_unix=time.time(),
            runs=(run,),
        )
    )
    return warning
