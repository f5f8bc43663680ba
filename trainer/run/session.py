"""State of one process of a run, which the training loop passes to its helpers."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from model import GPT
from nanogauge.config import Config
from nanogauge.measure.clock import Stopwatch
from nanogauge.measure.torch_device import CompileTimer
from nanogauge.prediction.forecast import FinalLoss
from nanogauge.recorder import Recorder
from nanogauge.runlog.folder import RunFolder
from nanogauge.runlog.lock import RunLock
from trainer.checkpoints.checkpoint_writer import CheckpointWriter
from trainer.data.dataset import Dataset
from trainer.data.loader import Batches
from trainer.run.progress import ProgressDisplay
from trainer.run.signals import StopSignal
from trainer.run.watchdog import Watchdog
from trainer.step.compile import LossFunction
from trainer.step.distributed import Ranks
from trainer.step.loss import TrainingLoss

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
    """Model, optimizer and loss, with their device and dtype."""

    device: torch.device
    dtype: str
    model: GPT
    loss: TrainingLoss
    """Loss of a micro-batch, compiled or eager."""
    reduced_loss: LossFunction
    """The training loss wrapped so that backward() averages gradients over the ranks."""
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    compile_timer: CompileTimer
    compilation: Literal["pending", "compiled", "eager"]
    """Whether the loss is compiled; "eager" if compilation failed or is switched off."""


@dataclass(frozen=True)
class PendingStep:
    """A step that was queued on the device and not yet recorded."""

    step: int
    learning_rate: float
    metrics: torch.Tensor
    """Loss and gradient norm (2), in host memory; valid once the device has finished the step."""
    watch: Stopwatch


@dataclass
class StepProgress:
    """Range of steps of this process, and steps and evaluations completed so far."""

    first: int
    """Step at which this process began."""
    last: int
    """Step before which to stop: max_steps, or fewer in a rehearsal."""
    done: int
    """Number of recorded steps of the run, including those whose update was skipped."""
    evaluated: int | None
    """Step of the last evaluation; None before the first."""
    best_val_loss: float | None
    """Lowest validation loss of the run; None before the first evaluation."""
    rollbacks: int
    """Number of rollbacks after non-finite gradients, earlier processes included."""
    val_loss: float | None = None
    """Last validation loss in this process; None without an evaluation or after a rollback."""
    pending: deque[PendingStep] = field(default_factory=deque)
    log_problem_raised: bool = False
    """Whether the current problem of writing the log, such as a full disk, has raised its alarm."""
    skipped: list[int] = field(default_factory=list)
    """Latest consecutive steps whose updates were skipped as loss or gradients were non-finite."""
    longest_seconds: float = FIRST_STEP_SECONDS
    """Longest step of this process in seconds; before the first step, a predicted upper bound."""


@dataclass
class Checkpoints:
    """The checkpoint writer, and step and time of the last checkpoint."""

    writer: CheckpointWriter
    step: int
    """Step of the last checkpoint, or the first step of this process."""
    began_seconds: float
    """Time at which the last checkpoint began, in seconds since the process's start."""
    waited_seconds: dict[int, float] = field(default_factory=dict)
    """Seconds that the loop waited for each checkpoint still being written, by step."""


@dataclass
class Session:
    """State of this process's run, passed to all functions of the training loop."""

    config: Config
    ranks: Ranks
    run: RunContext
    state: ModelState
    source: Dataset
    batches: Batches
    steps: StepProgress
    final_loss: FinalLoss
    recorder: Recorder
    display: ProgressDisplay
    checkpoints: Checkpoints
    stop: StopSignal
    watchdog: Watchdog
