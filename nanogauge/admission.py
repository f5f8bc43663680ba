"""Whether a run may begin, or go on, here: its folder, its memory, and what watches over it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanogauge.calibrations import load_calibration
from nanogauge.config import Config
from nanogauge.errors import BadInput
from nanogauge.measure.alarms import Alarms
from nanogauge.measure.environment import capture_environment
from nanogauge.measure.gpu import DriverInfo
from nanogauge.measure.memory import available_bytes, process_bytes
from nanogauge.predict.fit import fit_verdict, largest_micro_batch, memory_of, with_micro_batch
from nanogauge.predict.memory import CUDA_CONTEXT_BYTES
from nanogauge.predict.prediction import predict
from nanogauge.present import calibrated_threads, describe_hardware
from nanogauge.records import Prediction
from nanogauge.resume import refuse_changes
from nanogauge.runfolder import RunFolder, create, load_with_log, make_folder
from nanogauge.runlock import RunLock, hold
from nanogauge.runlog import Recorded, has_begun
from nanogauge.training.checkpoint import Meta, newest_checkpoint, read_meta


@dataclass(frozen=True)
class Opened:
    """A run folder, and what is there of the run."""

    folder: RunFolder
    lock: RunLock
    """taken before anything in the folder was written"""
    recorded: Recorded | None = None
    """the log so far; None for a new run"""
    checkpoint: Path | None = None
    """the newest intact one"""
    meta: Meta | None = None
    """of that checkpoint"""
    damaged: list[str] = field(default_factory=list)
    """a sentence for each damaged checkpoint that was passed over"""
    changes: list[str] = field(default_factory=list)
    """a sentence for each allowed difference from the configuration that the run has"""

    @property
    def earlier_seconds(self) -> float | None:
        """Wall time of the earlier processes; None where there are none."""
        if self.recorded is None:
            return None
        return sum(seconds or 0.0 for seconds in self.recorded.session_seconds)

    def last(self, name: str, otherwise: Any) -> Any:
        """A field of the newest start line that has it."""
        starts = self.recorded.starts if self.recorded is not None else []
        known = [value for start in starts if (value := getattr(start, name)) is not None]
        return known[-1] if known else otherwise

    def evaluated(self, step: int) -> bool:
        """Whether the log holds the evaluation at this step."""
        return self.recorded is not None and any(e.step == step for e in self.recorded.evals)


def open_folder(
    config: Config,
    device: torch.device,
    dtype: str,
    resume: bool,
    force: bool,
    allowed: Collection[str] = (),
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
        changes = refuse_changes(folder.config, config, allowed)
        if not force:
            refuse_too_large(config, folder.prediction, free_bytes(device), resumed=True)
        checkpoint, damaged = newest_checkpoint(config.folder / "checkpoints")
        meta = read_meta(checkpoint) if checkpoint is not None else None
        return Opened(folder, lock, recorded, checkpoint, meta, damaged, changes)
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
    make_folder(config.folder)
    lock = hold(config.folder)
    return Opened(create(config.folder, config, machine, prediction), lock)


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
