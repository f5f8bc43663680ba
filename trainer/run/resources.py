"""Open what a run needs: its folder, data, free memory, monitored GPUs, model and optimizer."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch

from model import GPT
from nanogauge.config import Config, load_config
from nanogauge.doctor.machine import capture_environment, free_memory
from nanogauge.files import make_folder
from nanogauge.measure.gpus import WatchedGpu
from nanogauge.prediction.calibrated import load_calibration
from nanogauge.prediction.loss import REPOSITORIES
from nanogauge.prediction.prediction import predict
from nanogauge.prediction.quality import load_losses
from nanogauge.prediction.search import choose_head
from nanogauge.runlog.folder import CONFIG_TOML, RunFolder, create, load_with_log
from nanogauge.runlog.lock import RunLock, acquire_lock
from nanogauge.runlog.reader import has_begun
from nanogauge.runspec import RunSpec
from nanogauge.schema import Prediction
from nanogauge.spec_parts import Head
from trainer.calibrate import calibrated_threads, describe_hardware
from trainer.checkpoints.checkpoint import newest_checkpoint
from trainer.data.dataset import Dataset, open_run_data
from trainer.data.loader import Batches
from trainer.run.resume import Difference, config_differences
from trainer.step.distributed import Ranks, rank_share
from trainer.step.fsdp import ShardedLoss
from trainer.step.loss import TrainingLoss
from trainer.step.optimizer import make_optimizer

ALONE = Ranks()
INITIAL_SCALE = 2.0**12
ROLLBACK_SEED = 1_000_003
"""Added to the seed for each rollback, so that the run continues with another order of the data."""


@dataclass(frozen=True)
class OpenedRun:
    """A run folder and the state of the run in it."""

    folder: RunFolder
    lock: RunLock | None
    """Lock of the run folder, taken before writing there; None on ranks other than 0."""
    checkpoint: Path | None = None
    """The newest intact checkpoint; None for a new run."""
    damaged: list[str] = field(default_factory=list)
    """A sentence for each damaged checkpoint that was skipped."""
    differences: list[Difference] = field(default_factory=list)
    """Differences from the run's earlier configuration."""
    earlier_seconds: float | None = None
    """Wall time of the earlier processes; None for a new run."""
    wandb_id: str | None = None
    rollbacks: int = 0
    evaluated: Mapping[int, float] = field(default_factory=dict)
    """Step -> validation loss of each evaluation in the log; NaN if non-finite."""


def open_run_folder(config: Config, device: torch.device, dtype: str, resume: bool, ranks: Ranks = ALONE) -> OpenedRun:
    """Create a run folder with its frozen prediction, or open the one to resume.

    Raises:
        BadInput: if the folder cannot be used.
    """
    if resume and has_begun(config.folder):
        return _open_to_resume(config)
    hardware, driver = describe_hardware(device, dtype)
    calibration, warning = load_calibration(hardware.name, torch.__version__, calibrated_threads(device))
    free, spec = free_memory(hardware), RunSpec.from_config(config, dtype, ranks.world)
    config = config.with_head(choose_head(spec, hardware, free.bytes if free is not None else 0))
    spec = replace(spec, head=config.head)
    prediction = predict(spec, hardware, calibration, losses=load_losses())
    if warning is not None:
        notes = [*prediction.notes, warning]
        prediction = prediction.model_copy(update={"notes": notes})
    machine = capture_environment(hardware.name, driver, torch.get_num_threads(), Path(__file__).parent)
    make_folder(config.folder)
    lock = acquire_lock(config.folder)
    folder = create(config.folder, spec, machine, prediction, config.to_toml())
    return OpenedRun(folder, lock)


def _open_to_resume(config: Config) -> OpenedRun:
    lock = acquire_lock(config.folder)
    folder, recorded = load_with_log(config.folder)
    old = load_config(config.folder / CONFIG_TOML)
    config = config.with_head(old.head)
    differences = config_differences(old, config)
    checkpoint, damaged = newest_checkpoint(config.folder / "checkpoints")
    ids = [start.wandb_id for start in recorded.starts if start.wandb_id is not None]
    spec = RunSpec.from_config(config, folder.prediction.dtype, folder.prediction.gpus)
    return OpenedRun(
        replace(folder, spec=spec, config_toml=config.to_toml()),
        lock,
        checkpoint,
        damaged,
        differences,
        earlier_seconds=sum(seconds or 0.0 for seconds in recorded.session_seconds),
        wandb_id=ids[-1] if ids else None,
        rollbacks=max(start.rollbacks or 0 for start in recorded.starts),
        evaluated={e.step: e.val_loss or math.nan for e in recorded.evals},
    )


def share_folder(config: Config, ranks: Ranks, open_folder: Callable[[], OpenedRun]) -> OpenedRun:
    """Call `open_folder` on rank 0 only; send its prediction, checkpoint and counts to all ranks.

    A collective. Each rank reads the checkpoint itself, so several machines need a shared disk.
    """
    if ranks.world == 1:
        return open_folder()
    opened, sent = None, None
    if ranks.is_first:
        opened = open_folder()
        sent = {
            "prediction": opened.folder.prediction.model_dump_json(),
            "sha256": opened.folder.prediction_sha256,
            "checkpoint": str(opened.checkpoint or ""),
            "rollbacks": opened.rollbacks,
            "head": opened.folder.spec.head,
            "evaluated": dict(opened.evaluated),
        }
    received = ranks.gather(sent)[0]
    if opened is not None:
        return opened
    assert received is not None
    prediction = Prediction.model_validate_json(str(received["prediction"]))
    evaluated, rollbacks = received["evaluated"], received["rollbacks"]
    assert isinstance(evaluated, dict)
    assert isinstance(rollbacks, int)
    config = config.with_head(cast(Head, received["head"]))
    spec = RunSpec.from_config(config, prediction.dtype, prediction.gpus)
    return OpenedRun(
        RunFolder(config.folder, spec, {}, prediction, str(received["sha256"])),
        None,
        Path(str(received["checkpoint"])) if received["checkpoint"] else None,
        rollbacks=rollbacks,
        evaluated=evaluated,
    )


def watched_gpus(config: Config, device: torch.device, ranks: Ranks = ALONE) -> list[WatchedGpu]:
    """Return the GPUs whose sensors this rank reads: on rank 0 those of its machine, else none.

    A collective. torchrun numbers the ranks of a machine consecutively, so the first `local_world` ranks are those on
    rank 0's machine.
    """
    named = config.measure.gpu
    if named == "none" or (named == "auto" and device.type != "cuda"):
        return []
    if named != "auto":
        names = [name.strip() for name in named.split(",")]
        gpus = [WatchedGpu(int(name) if name.isdecimal() else name) for name in names]
        return gpus if ranks.is_first else []
    own = [str(torch.cuda.get_device_properties(device).uuid), str(os.getpid())]
    on_machine = ranks.gather(own)[: ranks.local_world]
    return [WatchedGpu(uuid, int(pid)) for uuid, pid in on_machine] if ranks.is_first else []


def make_model(config: Config) -> GPT:
    """Initialise the model in host memory."""
    model = GPT(config.model)
    model.recompute = config.train.checkpointing == "full"
    return model


def make_loss(config: Config, model: GPT, batches: Batches, dtype: str, ranks: Ranks) -> TrainingLoss:
    """Return the training loss; moves the model, or this rank's shard of it, to the device."""
    head, accumulation, device = config.head, batches.grad_accum, batches.device
    if config.train.sharding == "full":
        return ShardedLoss(model, head, accumulation, device, dtype)
    alone, tune = ranks.world == 1, config.run.tune
    return TrainingLoss(model.to(device), head, accumulation, device, alone, tune)


def make_training(
    config: Config, model: GPT, batches: Batches, dtype: str, ranks: Ranks
) -> tuple[TrainingLoss, torch.optim.AdamW, torch.amp.GradScaler]:
    """Return training loss, optimizer and gradient scaler; only float16 enables the scaler."""
    loss = make_loss(config, model, batches, dtype, ranks)  # may shard the parameters: first
    # torch's initial scale, 2^16, may overflow in more steps in a row than a rollback waits for.
    scaler = torch.amp.GradScaler(batches.device.type, INITIAL_SCALE, enabled=dtype == "float16")
    return loss, make_optimizer(model, config.optimizer), scaler


def open_data(config: Config, device: torch.device, ranks: Ranks) -> tuple[Config, Dataset, Batches]:
    """Open the data; return the configuration with the data's counts and name, data and batches.

    Raises:
        BadInput: as `open_run_data`, or if the world size does not divide the accumulation.
    """
    source = open_run_data(config)
    batches = make_batches(config, source, device, ranks)
    present = {
        "tokens": batches.train_tokens,
        "val_tokens": source.tokens("val"),
        "dataset": REPOSITORIES.get(source.repository or ""),
    }
    missing = {key: value for key, value in present.items() if getattr(config.data, key) is None}
    data = config.data.model_copy(update=missing)
    return config.model_copy(update={"data": data}), source, batches


def make_batches(
    config: Config,
    source: Dataset,
    device: torch.device,
    ranks: Ranks,
    micro_batch: int | None = None,
    rollbacks: int = 0,
) -> Batches:
    """Return the loader of this rank's batches.

    Args:
        micro_batch: replaces the configured one if that does not fit into memory. It divides the sequences per step;
            steps and evaluations read the same windows with either.
        rollbacks: number of rollbacks so far; each count selects another order of training data.

    Raises:
        BadInput: as for open_data.
    """
    train, model = config.train, config.model
    micro_batch = micro_batch or train.micro_batch
    samples = train.micro_batch * train.grad_accum
    evaluated = train.micro_batch * train.eval_batches
    assert samples % micro_batch == 0
    return Batches(
        source.splits,
        micro_batch,
        model.block_size,
        model.vocab_size,
        config.run.seed + rollbacks * ROLLBACK_SEED,
        device,
        grad_accum=rank_share(samples // micro_batch, ranks.world),
        order=config.data.order,
        eval_batches=-(-evaluated // micro_batch),
        rank=ranks.rank,
        world=ranks.world,
        fingerprint=source.fingerprint,
    )


def describe_order(batches: Batches) -> str:
    """Return a sentence on the length of an epoch and the tokens that it leaves out."""
    grid, block = batches.grids["train"], batches.block_size
    if batches.order == "random":
        text = f"Windows of {block:,} tokens are drawn from the training data with replacement."
    else:
        unseen = grid.unseen_tokens
        text = (
            f"An epoch predicts the {block:,} tokens of {grid.windows:,} windows, once each; "
            f"{unseen:,} of the {batches.train_tokens:,} training tokens "
            f"({unseen / batches.train_tokens:.2%}) are in no window, different ones in each epoch."
        )
    if short := batches.short["train"]:
        text += f" {short:,} more tokens are in shards too short for a window and never seen."
    return text
