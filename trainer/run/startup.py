"""Prepare a run up to its first step: run folder, sensors, model, log and compilation."""

from dataclasses import replace
from functools import partial

import torch

from nanogauge.config import Config
from nanogauge.files import write_atomic
from nanogauge.measure.alarms import Alarm
from nanogauge.measure.host import reset_peak
from nanogauge.measure.torch_device import CompileTimer, make_clock
from nanogauge.prediction.calibrated import load_calibration
from nanogauge.prediction.forecast import FinalLoss
from nanogauge.prediction.loss import REPOSITORIES
from nanogauge.prediction.prediction import predict
from nanogauge.quantities import format_range
from nanogauge.recorder import Recorder, Sensing, open_sensing
from nanogauge.runlog.folder import CLAIMS_NAME, CONFIG_TOML, write_spec
from nanogauge.runlog.writer import RunLog, SilentLog
from nanogauge.schema import Compile
from nanogauge.sinks.mirror import new_run_id
from trainer.calibrate import calibrated_threads
from trainer.checkpoints.checkpoint import Meta, load_checkpoint, read_meta
from trainer.checkpoints.checkpoint_writer import CheckpointWriter
from trainer.checkpoints.pretrained import load_pretrained
from trainer.data.dataset import Dataset
from trainer.data.loader import Batches, scan_vocabulary
from trainer.run.flags import Options
from trainer.run.progress import ProgressDisplay
from trainer.run.resources import (
    ALONE,
    OpenedRun,
    describe_order,
    make_batches,
    make_model,
    make_training,
    open_data,
    open_run_folder,
    share_folder,
    watched_gpus,
)
from trainer.run.resume import (
    code_sha256,
    data_differences,
    identity_differences,
    micro_batch_to_use,
    refuse_differences,
)
from trainer.run.session import Checkpoints, ModelState, RunContext, Session, StepProgress
from trainer.run.signals import StopSignal, hangup_warning
from trainer.run.step_records import start_line
from trainer.run.supervisor import restart_number
from trainer.run.watchdog import Watchdog
from trainer.step.compile import compile_loss, persist_compile_cache, run_once, try_compiler
from trainer.step.device import (
    autocast,
    choose_algorithms,
    choose_device,
    choose_dtype,
    reset_allocator_peaks,
    seed_rank,
)
from trainer.step.distributed import Ranks
from trainer.step.loss import LossModule

SCAN_SECONDS = 3.0
"""Time for a look at all tokens before the first step; what takes longer is done beside the run."""
COMPILE_SECONDS = 1800.0
"""Time that compilation may take before the run counts as hung; a slow CPU needs minutes."""


def open_session(config: Config, options: Options, ranks: Ranks = ALONE) -> Session:
    """Set up a run up to its first step; write the prediction before creating the model.

    All ranks call it. Only rank 0 opens the run folder, reads sensors and writes.

    Raises:
        BadInput: if the device, the data, the folder or the checkpoint cannot be used, or the run to resume differs in
            what is not allowed.
        OSError: if the run folder cannot be written.
    """
    device = choose_device(config.run.device)
    dtype = choose_dtype(config.run.dtype, device)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32 on a GPU
    compile_timer = CompileTimer()
    clock = make_clock(device, compile_timer.seconds)
    config, source, batches = open_data(config, device, ranks)
    stop = StopSignal()
    if source.assumed is not None and ranks.is_first:
        scan_vocabulary(source.splits, config.model.vocab_size, SCAN_SECONDS, stop.fail)
    opened = share_folder(config, ranks, lambda: open_run_folder(config, device, dtype, options.resume, ranks))
    config = config.with_head(opened.folder.spec.head)
    meta = read_meta(opened.checkpoint) if opened.checkpoint is not None else None
    batches = resume_batches(config, source, batches, opened, meta, ranks)
    identity = {"code": code_sha256(), "torch": torch.__version__, "device": device.type, "dtype": dtype}
    differences = opened.differences
    if meta is not None:
        differences += identity_differences(meta.run["identity"], identity)
        differences += data_differences(meta.data, batches.position(meta.step))
    changes = refuse_differences(differences, options.allow_change)
    if options.claims is not None and ranks.is_first:
        write_atomic(opened.folder.path / CLAIMS_NAME, options.claims.read_bytes())
    gpus, sampling = watched_gpus(config, device, ranks), config.measure
    sensing = open_sensing(gpus, sampling.power_hz, sampling.idle_seconds, clock)
    ranks.any(False)  # barrier: until then the GPUs of the other ranks have to be idle, too
    reset_peak()
    state = make_state(config, batches, dtype, compile_timer, ranks, pretrained=meta is None)
    same_ranks = restore_state(state, opened, meta, config.run.seed, ranks)
    steps = make_steps(config, opened, meta, options.rehearse)
    folder, prediction = opened.folder, opened.folder.prediction
    display = ProgressDisplay(
        folder.spec,
        prediction,
        steps.first,
        opened.earlier_seconds,
        log_every=config.train.log_every,
        elapsed_seconds=clock.elapsed_seconds,
    )
    log = RunLog(folder.path, clock.elapsed_seconds) if ranks.is_first else SilentLog()
    recorder = Recorder(log, display, clock, sensing, prediction, device)
    display.plan()
    hang_seconds = 60 * config.measure.hang_minutes
    session = Session(
        config=config,
        ranks=ranks,
        run=RunContext(
            folder=folder,
            lock=opened.lock,
            identity=identity,
            wandb_id=opened.wandb_id or new_run_id(),
            earlier_seconds=opened.earlier_seconds or 0.0,
            earlier_joules=meta.run.get("energy_joules") if meta else None,
        ),
        state=state,
        source=source,
        batches=batches,
        steps=steps,
        final_loss=FinalLoss(folder.spec, prediction.best("val_loss"), opened.evaluated),
        recorder=recorder,
        display=display,
        checkpoints=Checkpoints(
            CheckpointWriter(folder.path / "checkpoints", config.train.keep_checkpoints),
            step=steps.first,
            began_seconds=clock.elapsed_seconds(),
        ),
        stop=stop,
        watchdog=Watchdog(folder.path, hang_seconds, lambda text: recorder.record_event("hung", text, "alarm")),
    )
    log_start(session, opened, sensing, changes, same_ranks)
    return session


def resume_batches(
    config: Config, source: Dataset, batches: Batches, opened: OpenedRun, meta: Meta | None, ranks: Ranks
) -> Batches:
    """Return a loader with the micro-batch and data order in which the run stopped."""
    micro_batch = micro_batch_to_use(config, meta.run if meta is not None else {})
    if not opened.rollbacks and micro_batch == config.train.micro_batch:
        return batches
    batches.close()
    return make_batches(config, source, batches.device, ranks, micro_batch, opened.rollbacks)


def make_state(
    config: Config, batches: Batches, dtype: str, compile_timer: CompileTimer, ranks: Ranks, pretrained: bool
) -> ModelState:
    """Create model, loss and optimizer; with `pretrained`, load the weights of run.init_from."""
    device = batches.device
    # Loads the compiler's front end, whose memory the prediction includes: after the prediction.
    persist_compile_cache(config.run.compile)
    choose_algorithms(device, config.run.deterministic)
    torch.manual_seed(config.run.seed)  # here, as measuring the device draws random numbers
    model = make_model(config)
    if pretrained and config.run.init_from is not None:
        load_pretrained(model, config.run.init_from)
    loss, optimizer, scaler = make_training(config, model, batches, dtype, ranks)
    return ModelState(
        device=device,
        dtype=dtype,
        model=model,
        loss=loss,
        reduced_loss=loss,
        optimizer=optimizer,
        scaler=scaler,
        compile_timer=compile_timer,
        compilation="pending" if config.run.compile else "eager",
    )


def restore_state(state: ModelState, opened: OpenedRun, meta: Meta | None, seed: int, ranks: Ranks) -> bool:
    """Load the checkpoint, if there is one, and the random state of this rank.

    Returns False if the checkpoint has another world size or kind of device. Random states are then reseeded, and
    results differ from those of an uninterrupted run.
    """
    if opened.checkpoint is None or meta is None:
        if ranks.world > 1:
            seed_rank(seed, ranks.rank, 0)
        return True
    parts = state.model, state.optimizer, state.scaler, state.device
    same_ranks = load_checkpoint(opened.checkpoint, *parts, ranks.rank, ranks.world)
    if not same_ranks:
        seed_rank(seed, ranks.rank, meta.step)
    return same_ranks


def make_steps(config: Config, opened: OpenedRun, meta: Meta | None, rehearse_steps: int | None) -> StepProgress:
    """Return the initial progress: first and last step, and counts stored in the checkpoint."""
    first, last = meta.step if meta is not None else 0, config.train.max_steps
    if rehearse_steps is not None:
        last = min(last, first + rehearse_steps + 1)
    steps = StepProgress(
        first=first,
        last=last,
        done=first,
        evaluated=first if first in opened.evaluated else None,
        best_val_loss=meta.run.get("best_val_loss") if meta else None,
        rollbacks=opened.rollbacks,
    )
    predicted = opened.folder.prediction.best("first_step_seconds")
    if predicted is not None:
        steps.longest_seconds = predicted.high
    return steps


def log_start(s: Session, opened: OpenedRun, sensing: Sensing, changes: list[str], same_ranks: bool) -> None:
    """Log the start line and all warnings that the user should see before the first step."""
    micro, recorder = s.batches.micro_batch, s.recorder
    fields = sensing.start_fields() | {
        "restart": restart_number(),
        "micro_batch": micro if micro != s.config.train.micro_batch else None,
    }
    recorder.log.write(start_line(s, s.steps.first).model_copy(update=fields))
    if opened.lock is not None and opened.lock.warning is not None:
        recorder.report("no_lock", opened.lock.warning, "warning")
    if (warning := hangup_warning()) is not None:
        recorder.report("over_ssh", warning)
    log_data(s)
    for text in opened.damaged:
        recorder.record_event("checkpoint_damaged", text, "warning")
    if changes and s.ranks.is_first:
        write_atomic(s.run.folder.path / CONFIG_TOML, s.config.to_toml().encode())
        write_spec(s.run.folder.path, s.run.folder.spec)
    for text in changes:
        recorder.report("changed", text, "warning")
    if not same_ranks:
        text = (
            f"The checkpoint has another world size than the {s.ranks.world} processes that "
            "continue from it: sums have another order, and dropout draws other random numbers, "
            "those of run.seed, the rank and this step."
        )
        recorder.report("other_ranks", text, step=s.steps.first)


def log_data(s: Session) -> None:
    """Log the order of the data, assumptions about it, and what differs from the plan's data."""
    if s.source.assumed is not None:
        s.recorder.report("data_assumed", s.source.assumed)
    s.recorder.record_event("data_order", describe_order(s.batches))
    planned, present = s.config.data.tokens, s.batches.train_tokens
    if planned is not None and not 0.99 < present / planned < 1.01:
        text = (
            f"The data holds {present:,} training tokens, not the {planned:,} of data.tokens: the "
            "passes over it are not those that were predicted."
        )
        s.recorder.report("data_size", text, "warning")
    named, actual = s.config.data.dataset, REPOSITORIES.get(s.source.repository or "")
    if actual is not None and named != actual:
        text = f"The data is {actual} by its manifest, not {named}: the predicted loss is for {named}."
        s.recorder.report("data_name", text, "warning")


def compile_session(s: Session) -> None:
    """Compile the model and time it separately; on failure, warn and fall back to eager mode."""
    state, ranks = s.state, s.ranks
    s.display.say("compiling ...")
    state.compile_timer.listen()
    s.watchdog.beat(COMPILE_SECONDS)
    with s.recorder.clock.window() as compiling:
        tokens, targets = s.batches.batch("train", 0, 0)
        context = partial(autocast, state.device, state.dtype)
        failure = None
        if s.config.train.sharding == "full":
            failure = _first_failure(ranks, try_compiler(state.device))
        if failure is None:
            own_failure = compile_loss(state.model, state.loss, tokens, targets, context)
            if (failure := _first_failure(ranks, own_failure)) is not None:
                state.loss.undo_compile()
    state.compilation = "compiled" if failure is None else "eager"
    reset_allocator_peaks(state.device)
    seconds = compiling.seconds + compiling.compile_seconds
    seconds -= s.recorder.standstill.seconds_within(seconds)
    s.recorder.log.write(Compile(seconds=seconds, mode=state.compilation))
    if failure is not None:
        text = f"torch.compile failed, training continues without it: {failure}"
        hardware = s.run.folder.prediction.hardware
        calibration, _ = load_calibration(hardware.name, torch.__version__, calibrated_threads(state.device))
        spec = replace(s.run.folder.spec, compile=False)
        total = predict(spec, hardware, calibration).best("total_seconds")
        if total is not None:
            takes = format_range("total_seconds", total.low, total.high)
            text = f"{text.rstrip('.')}. Without it the whole run takes {takes}."
        s.recorder.raise_alarm(Alarm("compile_failed", text, level="warning"), None)


def _first_failure(ranks: Ranks, failure: str | None) -> str | None:
    """Return the failure of the lowest rank that has one, else None; a collective."""
    return next((each for each in ranks.gather(failure) if each is not None), None)


def average_gradients(s: Session) -> None:
    """Wrap the loss in DDP as state.reduced_loss, which averages gradients over the ranks."""
    if s.ranks.world == 1 or s.config.train.sharding == "full":
        return  # one rank, or FSDP averages them
    state = s.state
    tokens, targets = s.batches.batch("train", 0, 0)
    context, accumulation = partial(autocast, state.device, state.dtype), s.batches.grad_accum
    with s.recorder.clock.window():
        state.reduced_loss = s.ranks.wrap(
            LossModule(state.model, state.loss),
            lambda loss: run_once(state.model, loss, accumulation, tokens, targets, context),
        )
    reset_allocator_peaks(state.device)
