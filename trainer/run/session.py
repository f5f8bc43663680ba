"""The state of one process of a run, in parts that each have one reason to change."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from model import GPT
from nanogauge.config import Config
from nanogauge.measure.clock import Stopwatch
from nanogauge.runlog.folder import RunFolder
from nanogauge.runlog.lock import RunLock
from trainer.checkpoints.checkpoint_writer import CheckpointWriter
from trainer.data.dataset import Dataset
from trainer.data.loader import Batches
from trainer.run.recorder import Recorder
from trainer.run.signals import StopSignal
from trainer.run.watchdog import Watchdog
from trainer.step.compile import CompileTimer, LossFunction
from trainer.step.distributed import Ranks
from trainer.step.loss import TrainingLoss

Status = Literal["finished", "stopped", "failed"]
FIRST_STEP_SECONDS = 3600.0
"""Time that the first step may take before it counts as hung, if there is no prediction."""


@dataclass(frozen=True)
class RunContext:
    """The run that this process belongs to: its folder, identity and earlier processes."""

    folder: RunFolder
    lock: RunLock | None
    """Held until the process ends; None on ranks other than 0."""
    identity: Mapping[str, str]
    """Code, torch, device and dtype, as resume.IDENTITY names them."""
    wandb_id: str
    """Id of the run in W&B, which a resumed run continues."""
    earlier_seconds: float = 0.0
    """Wall time of the earlier processes."""
    earlier_joules: float | None = None
    """Energy of the earlier processes; None if it is not known."""


@dataclass
class ModelState:
    """What is trained, on which device, and how."""

    device: torch.device
    dtype: str
    model: GPT
    loss: TrainingLoss
    """Loss of a micro-batch, compiled or eager."""
    reduced_loss: LossFunction
    """The loss whose gradients are averaged over the ranks."""
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    compile_timer: CompileTimer
    compilation: Literal["pending", "compiled", "eager"]
    """Eager if compilation failed or is switched off."""


@dataclass(frozen=True)
class PendingStep:
    """A step that was queued on the device and not yet recorded."""

    step: int
    learning_rate: float
    metrics: torch.Tensor
    """Loss and gradient norm, in host memory once the step has ended."""
    watch: Stopwatch


@dataclass
class StepProgress:
    """Which steps and evaluations were done."""

    first: int
    """Step at which this process began."""
    last: int
    """Step at which to stop: max_steps, or fewer in a rehearsal."""
    done: int
    """Recorded steps since step 0, including skipped updates."""
    evaluated: int | None
    """Step of the last evaluation; None before the first."""
    best_val_loss: float | None
    """Lowest validation loss of the run; None before the first evaluation."""
    rollbacks: int
    """Rollbacks of the run after non-finite gradients, earlier processes included."""
    val_loss: float | None = None
    """Validation loss of the last evaluation; None if another process made it."""
    pending: deque[PendingStep] = field(default_factory=deque)
    skipped: list[int] = field(default_factory=list)
    """The latest consecutive steps whose updates were skipped."""
    longest_seconds: float = FIRST_STEP_SECONDS
    """Longest step of this process; before the first, the high end of its prediction."""


@dataclass
class Checkpoints:
    """The checkpoint writer and when the last checkpoint began."""

    writer: CheckpointWriter
    step: int
    """Step of the last checkpoint, or where this process began."""
    began_seconds: float
    """When the last checkpoint began, on the clock."""
    waited_seconds: dict[int, float] = field(default_factory=dict)
    """Time that the loop waited for each checkpoint that is being written, by step."""


@dataclass
class Session:
    """Everything that the training loop uses."""

    config: Config
    ranks: Ranks
    run: RunContext
    state: ModelState
    source: Dataset
    batches: Batches
    steps: StepProgress
    recorder: Recorder
    checkpoints: Checkpoints
    stop: StopSignal
    watchdog: Watchdog
