"""One process's share of a run, set up: data, prediction, model, log, sensors.

Here, as in train.py, everything meets: nothing but train.py and bench/ imports it.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from model import GPT
from nanogauge.calibrations import add_to_calibration, load_calibration
from nanogauge.config import Config
from nanogauge.errors import BadInput
from nanogauge.measure.alarms import Alarms
from nanogauge.measure.clock import Clock, Stopwatch
from nanogauge.measure.environment import capture_environment
from nanogauge.measure.gpu import (
    DriverInfo,
    Idle,
    Sensors,
    driver_info,
    measure_idle,
    open_sensors,
)
from nanogauge.measure.memory import available_bytes, process_bytes, reset_peak
from nanogauge.predict.calibration import Calibration, FinishedRun
from nanogauge.predict.fit import fit_verdict, largest_micro_batch, memory_of, with_micro_batch
from nanogauge.predict.memory import CUDA_CONTEXT_BYTES
from nanogauge.predict.prediction import predict
from nanogauge.predict.workload import workload_of
from nanogauge.present import calibrated_threads, describe_hardware
from nanogauge.records import Compile, Event, Prediction, Start
from nanogauge.report.build import CLAIMS_NAME
from nanogauge.report.figures import quantile
from nanogauge.report.measured import steady_seconds
from nanogauge.resume import refuse_changes, refuse_other_data
from nanogauge.rundata import open_data, tell_of_data
from nanogauge.runfolder import RunFolder, create, load_with_log, write_aside
from nanogauge.runlog import FILE_NAME, Recorded, RunLog
from nanogauge.screen import Screen
from nanogauge.tracking import new_run_id
from nanogauge.training.checkpoint import data_position, load_checkpoint, newest_checkpoint
from nanogauge.training.compiling import CompileWatch, Loss, compile_model
from nanogauge.training.data import Batches
from nanogauge.training.device import (
    EventTimeline,
    autocast,
    choose_device,
    choose_dtype,
    synchronize,
)
from nanogauge.training.optimizer import make_optimizer
from nanogauge.training.pretrained import load_pretrained
from nanogauge.training.sources import Source
from nanogauge.training.stopping import Stop

STEPS_TO_REMEMBER = 20  # fewer steady steps tell little of the next run


@dataclass(frozen=True)
class StepUnderWay:
    """A step whose work was handed to the device."""

    step: int
    learning_rate: float
    figures: torch.Tensor
    """loss and gradient norm, in the host's memory once the step has ended"""
    watch: Stopwatch


@dataclass
class Session:
    """What the loop works with."""

    config: Config
    folder: RunFolder
    device: torch.device
    dtype: str
    model: GPT
    loss_of: Loss
    """the compiled model, or the model itself"""
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
    first_step: int
    wandb_id: str
    """of the run in W&B, which a resumption continues"""
    steps_done: int
    """updates since step 0"""
    last_step: int
    """the step at which to stop: max_steps, or less in a rehearsal"""
    under_way: deque[StepUnderWay] = field(default_factory=deque)


def open_session(
    config: Config,
    resume: bool,
    rehearse_steps: int | None,
    claims: Path | None,
    force: bool,
) -> Session:
    """Everything up to the first step; the prediction is on disk before the model exists.

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
    torch.manual_seed(config.run.seed)
    torch.set_float32_matmul_precision("high")  # TF32 for what is left in fp32 on a GPU
    config, source, batches = open_data(config, device)
    folder, recorded, checkpoint, damaged = open_folder(config, device, dtype, resume, force)
    before, wandb_id = None, new_run_id()
    if recorded is not None:
        before = sum(seconds or 0.0 for seconds in recorded.session_seconds)
        known = [start.wandb_id for start in recorded.starts if start.wandb_id is not None]
        wandb_id = known[-1] if known else wandb_id
    if claims is not None:
        write_aside(folder.path / CLAIMS_NAME, claims.read_bytes())
    gpu = watched_gpu(config, device)
    card = driver_info(gpu) if gpu is not None else None
    idle: Idle | None = None
    if gpu is not None and config.measure.idle_seconds > 0:
        idle = measure_idle(gpu, config.measure.power_hz, config.measure.idle_seconds)
    sensors = open_sensors(gpu, config.measure.power_hz, clock.elapsed_seconds)
    reset_peak()
    model = GPT(config.model).to(device)
    optimizer = make_optimizer(model, config.optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    first_step = 0
    if checkpoint is not None:
        first_step = load_checkpoint(checkpoint, model, optimizer, scaler, device)
        refuse_other_data(data_position(checkpoint), batches.position(first_step))
    elif config.run.init_from is not None:
        load_pretrained(model, config.run.init_from)
    last_step = config.train.max_steps
    if rehearse_steps is not None:
        last_step = min(last_step, first_step + rehearse_steps + 1)
    screen = Screen(
        config,
        folder.prediction,
        first_step,
        before,
        elapsed_seconds=clock.elapsed_seconds,
    )
    screen.plan()
    stop = Stop()
    stop.listen()
    log = RunLog(folder.path, clock.elapsed_seconds)
    log.write(
        Start(
            unix_time=time.time(),
            max_steps=config.train.max_steps,
            first_step=first_step,
            prediction_sha256=folder.prediction_sha256,
            device=folder.prediction.hardware.name,
            train_tokens=batches.train_tokens,
            idle_power_watts=idle.power_watts if idle is not None else None,
            idle_utilization=idle.utilization if idle is not None else None,
            other_programs=card.others if card is not None else None,
            wandb_id=wandb_id,
        )
    )
    tell_of_data(config, source, batches, log, screen)
    for text in damaged:
        log.write(Event(level="warning", what="checkpoint_damaged", text=text))
    session = Session(
        config=config,
        folder=folder,
        device=device,
        dtype=dtype,
        model=model,
        loss_of=model,
        optimizer=optimizer,
        scaler=scaler,
        source=source,
        batches=batches,
        log=log,
        clock=clock,
        sensors=sensors,
        alarms=make_alarms(folder.prediction, card),
        screen=screen,
        stop=stop,
        first_step=first_step,
        wandb_id=wandb_id,
        steps_done=first_step,
        last_step=last_step,
    )
    if config.run.compile:
        compile_watch.listen()
        compile_session(session)
    return session


def open_folder(
    config: Config, device: torch.device, dtype: str, resume: bool, force: bool
) -> tuple[RunFolder, Recorded | None, Path | None, list[str]]:
    """A new run folder with its frozen prediction, or the one to resume, its log and checkpoint.

    Also a sentence for each damaged checkpoint that was passed over.

    Raises:
        BadInput: if a folder cannot be used, or the run does not fit and is not forced.
    """
    if resume and (config.folder / FILE_NAME).exists():
        folder, recorded = load_with_log(config.folder)
        refuse_changes(folder.config, config)
        if not force:
            refuse_too_large(config, folder.prediction, free_bytes(device), resumed=True)
        checkpoint, damaged = newest_checkpoint(config.folder / "checkpoints")
        return folder, recorded, checkpoint, damaged
    hardware, driver = describe_hardware(device, dtype)
    calibration, warning = load_calibration(
        hardware.name, torch.__version__, calibrated_threads(device)
    )
    prediction = predict(config, hardware, dtype, calibration=calibration)
    if not force:
        refuse_too_large(config, prediction, free_bytes(device), resumed=False)
    if warning is not None:
        notes = [*prediction.notes, warning]
        prediction = prediction.model_copy(update={"notes": notes})
    machine = capture_environment(hardware.name, driver, torch.get_num_threads())
    return create(config.folder, config, machine, prediction), None, None, []


def free_bytes(device: torch.device) -> int | None:
    """What this process can come to hold: what is free, and what it holds already.

    None where the system does not tell.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)  # makes the context, which is held from then on
        return int(free) + CUDA_CONTEXT_BYTES
    available, held = available_bytes(), process_bytes()
    return None if available is None or held is None else available + held


def refuse_too_large(
    config: Config, prediction: Prediction, free: int | None, resumed: bool
) -> None:
    """Refuse a run of which not even the low end of its peak fits into the free memory.

    Raises:
        BadInput: saying what it needs, what is free, and which micro-batch fits instead.
    """
    hardware, dtype = prediction.hardware, prediction.dtype
    memory = memory_of(config, hardware, dtype)
    if free is None or fit_verdict(memory, free) != "does not fit":
        return
    need = f"about {memory.process[1] / 2**30:.1f} GiB"
    micro = largest_micro_batch(config, hardware, dtype, free)
    if resumed:
        advice = "free some"
    elif micro is None:
        advice = "no micro-batch fits: free some, or make the model smaller (--model.n-layer, ...)"
    else:
        accumulation = with_micro_batch(config, micro).train.grad_accum
        advice = (
            f"the largest micro-batch that is expected to fit at the same tokens per step is "
            f"{micro}: --train.micro-batch {micro} --train.grad-accum {accumulation}"
        )
    raise BadInput(
        f"this run needs {need} of memory and {free / 2**30:.1f} GiB are free; {advice}, "
        "or try all the same with --force."
    )


def compile_session(s: Session) -> None:
    """Compile, in a window of its own; where that fails the model stays as it is, loudly."""
    s.screen.say("compiling ...")
    with s.clock.window() as compiling:
        tokens, targets = s.batches.batch("train", 0, 0)
        context = partial(autocast, s.device, s.dtype)
        s.loss_of, failure = compile_model(s.model, tokens, targets, context)
    mode: Literal["compiled", "eager"] = "compiled" if failure is None else "eager"
    s.log.write(Compile(seconds=compiling.seconds + compiling.compile_seconds, mode=mode))
    if failure is not None:
        text = f"torch.compile failed, training goes on without it, slower: {failure}"
        s.log.write(Event(level="warning", what="compile_failed", text=text))
        s.screen.say(f"! {text}")


def make_alarms(prediction: Prediction, card: DriverInfo | None) -> Alarms:
    """What calls for somebody in the night, by what this run and this card are expected to do."""
    total = prediction.best("total_seconds")
    return Alarms(
        predicted_total_seconds=(total.low, total.high) if total is not None else None,
        device_bytes=card.total_bytes if card is not None else None,
        slowdown_celsius=card.slowdown_celsius if card is not None else None,
    )


def watched_gpu(config: Config, device: torch.device) -> str | int | None:
    """Whose sensors are read: as open_sensors names it; None for no GPU's."""
    match config.measure.gpu:
        case "none":
            return None
        case "auto":
            if device.type != "cuda":
                return None
            return str(torch.cuda.get_device_properties(device).uuid)
        case name:
            return int(name) if name.isdecimal() else name


def remember_run(s: Session, recorded: Recorded) -> str | None:
    """Keep the steady step of a finished run: the next prediction on this device stands on it.

    Counts the steps of this process alone; one that had to go on without the compilation that was
    asked for was another workload. Returns a warning where the step could not be kept.
    """
    seconds = steady_seconds(recorded, first_step=recorded.starts[-1].first_step)
    if len(seconds) < STEPS_TO_REMEMBER or (s.config.run.compile and s.loss_of is s.model):
        return None
    run = FinishedRun(
        name=s.config.run.name,
        workload=workload_of(s.config, s.dtype, on_gpu=s.device.type != "cpu"),
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
