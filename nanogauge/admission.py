"""Whether a run may begin, or go on, here: its folder, its memory, and what watches over it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from nanogauge.calibrations import load_calibration
from nanogauge.config import Config, load_config
from nanogauge.errors import BadInput
from nanogauge.files import make_folder
from nanogauge.measure.alarms import Alarms
from nanogauge.measure.cards import Watched
from nanogauge.measure.environment import capture_environment
from nanogauge.measure.gpu import DriverInfo, driver_info
from nanogauge.measure.machine import free_memory
from nanogauge.predict.fit import fit_verdict, largest_micro_batch, memory_of, with_micro_batch
from nanogauge.predict.prediction import predict
from nanogauge.present import calibrated_threads, describe_hardware
from nanogauge.records import FreeMemory, Hardware, Prediction
from nanogauge.resume import refuse_changes
from nanogauge.runfolder import CONFIG_TOML, RunFolder, create, load_with_log
from nanogauge.runlock import RunLock, hold
from nanogauge.runlog import has_begun
from nanogauge.runspec import RunSpec
from nanogauge.training.checkpoint import load_checkpoint, newest_checkpoint, read_meta
from nanogauge.training.exactness import seed_rank
from nanogauge.training.ranks import Ranks

ALONE = Ranks()


@dataclass(frozen=True)
class Opened:
    """A run folder, and what is there of the run."""

    folder: RunFolder
    lock: RunLock | None
    """taken before anything in the folder was written; rank 0 alone has it"""
    checkpoint: Path | None = None
    """the newest intact one"""
    damaged: list[str] = field(default_factory=list)
    """a sentence for each damaged checkpoint that was passed over"""
    changes: list[str] = field(default_factory=list)
    """a sentence for each allowed difference from the configuration that the run has"""
    earlier_seconds: float | None = None
    """wall time of the earlier processes; None where there are none"""
    wandb_id: str | None = None
    rollbacks: int = 0
    evaluated: frozenset[int] = frozenset()
    """the steps whose evaluation the log holds"""


def open_folder(
    config: Config,
    device: torch.device,
    dtype: str,
    resume: bool,
    force: bool,
    allowed: Collection[str] = (),
    ranks: Ranks = ALONE,
) -> Opened:
    """A new run folder with its frozen prediction, or the one to resume, its log and checkpoint.

    Its lock is taken before anything in it is written.

    Args:
        allowed: keys of the configuration that may be others than when the run began.

    Raises:
        BadInput: if a folder cannot be used, or the run does not fit and is not forced.
    """
    if resume and has_begun(config.folder):
        lock = hold(config.folder)
        folder, recorded = load_with_log(config.folder)
        changes = refuse_changes(load_config(config.folder / CONFIG_TOML), config, allowed)
        if not force:
            hardware = folder.prediction.hardware
            free = _free_memory(hardware, device, ranks)
            refuse_too_large(config.to_spec(dtype, ranks.world), hardware, free, resumed=True)
        checkpoint, damaged = newest_checkpoint(config.folder / "checkpoints")
        spec = config.to_spec(dtype, folder.prediction.gpus)
        ids = [start.wandb_id for start in recorded.starts if start.wandb_id is not None]
        return Opened(
            replace(folder, spec=spec, config_toml=config.to_toml()),
            lock,
            checkpoint,
            damaged,
            changes,
            earlier_seconds=sum(seconds or 0.0 for seconds in recorded.session_seconds),
            wandb_id=ids[-1] if ids else None,
            rollbacks=max(start.rollbacks or 0 for start in recorded.starts),
            evaluated=frozenset(e.step for e in recorded.evals),
        )
    hardware, driver = describe_hardware(device, dtype)
    calibration, warning = load_calibration(
        hardware.name, torch.__version__, calibrated_threads(device)
    )
    spec = config.to_spec(dtype, ranks.world)
    prediction = predict(spec, hardware, calibration)
    if not force:
        refuse_too_large(spec, hardware, _free_memory(hardware, device, ranks), resumed=False)
    if warning is not None:
        notes = [*prediction.notes, warning]
        prediction = prediction.model_copy(update={"notes": notes})
    machine = capture_environment(hardware.name, driver, torch.get_num_threads())
    make_folder(config.folder)
    lock = hold(config.folder)
    folder = create(config.folder, spec, machine, prediction, config.to_toml())
    return Opened(folder, lock)


def share_folder(config: Config, ranks: Ranks, open_it: Callable[[], Opened]) -> Opened:
    """Open the run folder on rank 0, and tell the others what they need of it.

    All of them read the checkpoint: on several machines the folder must be on a shared disk.
    """
    if ranks.world == 1:
        return open_it()
    opened, told = None, None
    if ranks.is_first:
        opened = open_it()
        told = {
            "prediction": opened.folder.prediction.model_dump_json(),
            "sha256": opened.folder.prediction_sha256,
            "checkpoint": str(opened.checkpoint or ""),
            "rollbacks": opened.rollbacks,
            "evaluated": list(opened.evaluated),
        }
    told = ranks.gather(told)[0]
    if opened is not None:
        return opened
    assert told is not None
    prediction = Prediction.model_validate_json(str(told["prediction"]))
    spec = config.to_spec(prediction.dtype, prediction.gpus)
    evaluated, rollbacks = told["evaluated"], told["rollbacks"]
    assert isinstance(evaluated, list)
    assert isinstance(rollbacks, int)
    return Opened(
        RunFolder(config.folder, spec, {}, prediction, str(told["sha256"])),
        None,
        Path(str(told["checkpoint"])) if told["checkpoint"] else None,
        rollbacks=rollbacks,
        evaluated=frozenset(evaluated),
    )


def begin_state(
    checkpoint: Path | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    seed: int,
    ranks: Ranks,
) -> bool:
    """Bring a rank to the state it begins with, its random numbers included.

    Returns whether a run that was not disturbed would go on as this one does: with another number
    of ranks than the checkpoint's, random numbers are begun anew.
    """
    if checkpoint is None:
        if ranks.world > 1:
            seed_rank(seed, ranks.rank, 0)
        return True
    exact = load_checkpoint(checkpoint, model, optimizer, scaler, device, ranks.rank, ranks.world)
    if not exact:
        seed_rank(seed, ranks.rank, read_meta(checkpoint).step)
    return exact


def _free_memory(hardware: Hardware, device: torch.device, ranks: Ranks) -> FreeMemory | None:
    cards = []
    if device.type == "cuda":
        cards = [driver_info(str(torch.cuda.get_device_properties(device).uuid))]
    return free_memory(hardware, cards, processes=ranks.local_world)


def refuse_too_large(
    spec: RunSpec, hardware: Hardware, free: FreeMemory | None, resumed: bool
) -> None:
    """Refuse a run of which not even the low end of its peak fits into the free memory.

    Raises:
        BadInput: saying what it needs, what is free, and which micro-batch fits instead.
    """
    peak = memory_of(spec, hardware).process
    if free is None or fit_verdict(peak, free.bytes) != "does not fit":
        return
    need = f"about {peak.expected / 2**30:.1f} GiB"
    micro = largest_micro_batch(spec, hardware, free.bytes)
    if resumed:
        advice = "free some"
    elif micro is None:
        advice = "no micro-batch fits: free some, or make the model smaller (--model.n-layer, ...)"
    else:
        accumulation = with_micro_batch(spec, micro).grad_accum
        advice = (
            f"the largest micro-batch that is expected to fit at the same tokens per step is "
            f"{micro}: --train.micro-batch {micro} --train.grad-accum {accumulation}"
        )
    raise BadInput(
        f"this run needs {need} of memory and {free.bytes / 2**30:.1f} GiB are free; {advice}, "
        "or try all the same with --force."
    )


def make_alarms(prediction: Prediction, card: DriverInfo | None) -> Alarms:
    """What calls for somebody in the night, by what this run and this card are expected to do."""
    total = prediction.best("total_seconds")
    return Alarms(
        predicted_total_seconds=(total.low, total.high) if total is not None else None,
        device_bytes=card.total_bytes if card is not None else None,
        slowdown_celsius=card.slowdown_celsius if card is not None else None,
    )


def watched_cards(config: Config, device: torch.device, ranks: Ranks = ALONE) -> list[Watched]:
    """Whose sensors this rank reads: rank 0 those of all ranks on its machine, the others none.

    All ranks must call it. torchrun numbers the ranks of a machine one after another, so that the
    first `local_world` of them are those beside rank 0.
    """
    named = config.measure.gpu
    if named == "none" or (named == "auto" and device.type != "cuda"):
        return []
    if named != "auto":
        names = [name.strip() for name in named.split(",")]
        cards = [Watched(int(name) if name.isdecimal() else name) for name in names]
        return cards if ranks.is_first else []
    mine = [str(torch.cuda.get_device_properties(device).uuid), str(os.getpid())]
    told = ranks.gather(mine)[: ranks.local_world]
    return [Watched(uuid, int(pid)) for uuid, pid in told] if ranks.is_first else []
