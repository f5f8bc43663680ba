"""One process's share of a run, set up: data, prediction, model, log, sensors.

Here, as in train.py, everything meets: nothing but train.py and bench/ imports it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from model import GPT
from nanogauge.config import Config
from nanogauge.errors import BadInput
from nanogauge.hardware import find_gpu, from_properties, from_row
from nanogauge.measure.clock import Clock
from nanogauge.measure.environment import capture_environment, cpu_name, total_memory_bytes
from nanogauge.measure.gpu import DriverInfo, NullSensors, Sensors, driver_info, open_sensors
from nanogauge.measure.memory import available_bytes, process_bytes, reset_peak
from nanogauge.predict.calibrate import measure_cpu
from nanogauge.predict.fit import fit_verdict, largest_micro_batch, memory_of, with_micro_batch
from nanogauge.predict.memory import CUDA_CONTEXT_BYTES
from nanogauge.predict.prediction import predict
from nanogauge.records import Compile, Event, Hardware, Prediction, Start
from nanogauge.report.build import CLAIMS_NAME
from nanogauge.resume import refuse_changes
from nanogauge.runfolder import RunFolder, create, load_with_log, write_aside
from nanogauge.runlog import FILE_NAME, RunLog
from nanogauge.screen import Screen
from nanogauge.training.checkpoint import load_checkpoint, newest_checkpoint
from nanogauge.training.compiling import Loss, compile_model
from nanogauge.training.data import Batches
from nanogauge.training.device import autocast, choose_device, choose_dtype, synchronize
from nanogauge.training.optimizer import make_optimizer
from nanogauge.training.sources import Source, open_source
from nanogauge.training.stopping import Stop


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
    screen: Screen
    stop: Stop
    first_step: int
    steps_done: int
    """updates since step 0"""
    last_step: int
    """the step at which to stop: max_steps, or less in a rehearsal"""


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
    clock = Clock(partial(synchronize, device))
    dtype = choose_dtype(config.run.dtype, device)
    torch.manual_seed(config.run.seed)
    torch.set_float32_matmul_precision("high")  # TF32 for what is left in fp32 on a GPU
    config, source, batches = open_data(config, device)
    folder, checkpoint, damaged = open_folder(config, device, dtype, resume, force)
    if claims is not None:
        write_aside(folder.path / CLAIMS_NAME, claims.read_bytes())
    reset_peak()
    model = GPT(config.model).to(device)
    optimizer = make_optimizer(model, config.optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    first_step = 0
    if checkpoint is not None:
        first_step = load_checkpoint(checkpoint, model, optimizer, scaler, device)
    last_step = config.train.max_steps
    if rehearse_steps is not None:
        last_step = min(last_step, first_step + rehearse_steps + 1)
    screen = Screen(config, folder.prediction, first_step)
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
        )
    )
    planned = config.data.tokens
    if planned is not None and not 0.99 < batches.train_tokens / planned < 1.01:
        text = (
            f"The data holds {batches.train_tokens:,} training tokens, not the {planned:,} of "
            "data.tokens: the passes over it are not those that were predicted."
        )
        log.write(Event(level="warning", what="data_size", text=text))
        screen.say(f"! {text}")
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
        sensors=open_gpu_sensors(device, config, clock),
        screen=screen,
        stop=stop,
        first_step=first_step,
        steps_done=first_step,
        last_step=last_step,
    )
    if config.run.compile:
        compile_session(session)
    return session


def describe_hardware(device: torch.device, dtype: str) -> tuple[Hardware, DriverInfo | None]:
    """What to predict for: the GPU's row, else its own properties, else this CPU, measured."""
    if device.type == "cuda":
        told = torch.cuda.get_device_properties(device)
        driver = driver_info(str(told.uuid))
        gpu = find_gpu(told.name, told.total_memory)
        if gpu is not None:
            return from_row(gpu, dtype, driver.power_limit_watts), driver
        # Two transfers a clock; a driver that does not tell the clock gives 0.
        bandwidth = 2 * told.memory_clock_rate * 1e3 * told.memory_bus_width / 8
        hardware = from_properties(
            told.name,
            (told.major, told.minor),
            told.multi_processor_count,
            told.total_memory,
            driver.max_sm_clock_hz,
            driver.power_limit_watts,
            dtype,
            bandwidth or None,
        )
        return hardware, driver
    if device.type == "mps":
        memory = total_memory_bytes() or 0
        return from_properties("Apple GPU", (0, 0), 0, memory, None, None, dtype), None
    return measure_cpu(cpu_name() or "CPU", dtype, total_memory_bytes(), process_bytes()), None


def open_folder(
    config: Config, device: torch.device, dtype: str, resume: bool, force: bool
) -> tuple[RunFolder, Path | None, list[str]]:
    """A new run folder with its frozen prediction, or the one to resume and its checkpoint.

    Raises:
        BadInput: if a folder cannot be used, or the run does not fit and is not forced.
    """
    if resume and (config.folder / FILE_NAME).exists():
        folder, _ = load_with_log(config.folder)
        refuse_changes(folder.config, config)
        if not force:
            refuse_too_large(config, folder.prediction, free_bytes(device), resumed=True)
        checkpoint, damaged = newest_checkpoint(config.folder / "checkpoints")
        return folder, checkpoint, damaged
    hardware, driver = describe_hardware(device, dtype)
    prediction = predict(config, hardware, dtype)
    if not force:
        refuse_too_large(config, prediction, free_bytes(device), resumed=False)
    machine = capture_environment(hardware.name, driver, torch.get_num_threads())
    return create(config.folder, config, machine, prediction), None, []


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


def open_data(config: Config, device: torch.device) -> tuple[Config, Source, Batches]:
    """The data, and the configuration with its number of tokens where none was given.

    Raises:
        BadInput: if there is none, or its tokenizer has more tokens than the model.
    """
    source = open_source(config.data)
    train, model = config.train, config.model
    if source.vocab_size > model.vocab_size:
        raise BadInput(
            f"the data's tokenizer has {source.vocab_size:,} tokens but model.vocab_size is "
            f"{model.vocab_size:,}; set it to that, padded to a multiple of 64."
        )
    batches = Batches(
        source.splits,
        train.micro_batch,
        model.block_size,
        model.vocab_size,
        config.run.seed,
        device,
    )
    if config.data.tokens is None:
        data = config.data.model_copy(update={"tokens": batches.train_tokens})
        config = config.model_copy(update={"data": data})
    return config, source, batches


def compile_session(s: Session) -> None:
    """Compile, in a window of its own; where that fails the model stays as it is, loudly."""
    s.screen.say("compiling ...")
    with s.clock.window() as compiling:
        tokens, targets = s.batches.batch("train", 0, 0)
        context = partial(autocast, s.device, s.dtype)
        s.loss_of, failure = compile_model(s.model, tokens, targets, context)
    mode: Literal["compiled", "eager"] = "compiled" if failure is None else "eager"
    s.log.write(Compile(seconds=compiling.seconds, mode=mode))
    if failure is not None:
        text = f"torch.compile failed, training goes on without it, slower: {failure}"
        s.log.write(Event(level="warning", what="compile_failed", text=text))
        s.screen.say(f"! {text}")


def open_gpu_sensors(device: torch.device, config: Config, clock: Clock) -> Sensors:
    """The sensors of a CUDA device; null sensors elsewhere."""
    if device.type != "cuda":
        return NullSensors("no GPU")
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return open_sensors(uuid, config.measure.power_hz, clock.elapsed_seconds)
