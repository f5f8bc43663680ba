"""Background checkpoint writer: the loop waits for a copy in memory, a thread writes it to disk.

A checkpoint is renamed to its final name once it is complete and synced; older ones are removed after that.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from nanogauge.files import sync_folder
from nanogauge.quantities import finite
from trainer.checkpoints.checkpoint import (
    REPLACED,
    Meta,
    RandomState,
    intact_meta,
    list_checkpoints,
    own_weights,
    read_meta,
    step_of,
    write_files,
)
from trainer.step.device import synchronize
from trainer.step.fsdp import full_tensor

_BYTES_PER_TENSOR, _BYTES_EXTRA = 512, 2**13
"""Upper bounds of file headers and padding; twice the sizes measured with 37 and 301 tensors."""


@dataclass(frozen=True)
class Written:
    """Outcome of a checkpoint that is complete and on disk."""

    step: int
    path: Path
    bytes: int
    write_seconds: float
    """Time from the end of the copy in memory to the final rename."""


@dataclass(frozen=True)
class NotWritten:
    """Outcome of a checkpoint that could not be written; earlier checkpoints are kept."""

    step: int
    reason: str
    """The operating system's error message, or how much disk space is missing."""


def kept_steps(val_losses: Mapping[int, float | None], keep: int, best: bool = True) -> set[int]:
    """Return the steps of the newest `keep` checkpoints and of the one with the lowest loss.

    Args:
        val_losses: validation loss of each checkpoint, by step; None without an evaluation. keep: number of newest
        checkpoints to keep, at least 1.
        best: also keep the checkpoint with the lowest validation loss.
    """
    newest = set(sorted(val_losses)[-keep:])
    losses = [(loss, -step) for step, loss in val_losses.items() if loss is not None]
    return newest | {-min(losses)[1]} if best and losses else newest


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._ended: SimpleQueue[Written | NotWritten] = SimpleQueue()
        self._error: BaseException | None = None
        self._metas: dict[Path, Meta | None] = {}
        """Parsed meta.json of each checkpoint on disk; None if the checkpoint is damaged."""

    def begin(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        random_states: Sequence[RandomState],
        *,
        position: Mapping[str, object],
        run: Mapping[str, object],
        val_loss: float | None,
    ) -> None:
        """Copy the state after `step` steps and start writing it; done() later returns the outcome.

        Waits first for an earlier checkpoint to reach the disk, as both use one host buffer.

        Args:
            step: number of steps made.
            model: model whose weights are copied.
            optimizer: optimizer whose state is copied.
            scaler: gradient scaler whose state is copied.
            random_states: random state of each rank, by rank.
            position: Batches.position(step), JSON values for meta.json.
            run: state of the run that is not a tensor, JSON values for meta.json.
            val_loss: validation loss at this step in nats per token; None without an evaluation.
        """
        self.wait()
        device = next(model.parameters()).device
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "random": list(random_states)}
        copied = self._copy.take({"weights": own_weights(model), "state": state}, device)
        loss = finite(val_loss) if val_loss is not None else None
        content = {"step": step, "data": position, "run": run, "val_loss": loss}
        content = json.loads(json.dumps(content))  # a snapshot: the caller may modify the mappings
        arguments = (step, copied, content, time.perf_counter())
        self._thread = threading.Thread(target=self._work, args=arguments, name="checkpoint")
        self._thread.start()

    def done(self) -> list[Written | NotWritten]:
        """Return the outcomes of checkpoints that ended since the last call, without waiting."""
        self._raise_error()
        ended = []
        while not self._ended.empty():
            ended.append(self._ended.get())
        return ended

    def wait(self) -> None:
        """Wait for the write in progress, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self, step: int, copied: Any, content: dict[str, object], copied_at: float) -> None:
        try:
            self._ended.put(self._write(step, copied, content, copied_at))
        except OSError as error:
            self._ended.put(NotWritten(step, error.strerror or str(error)))
        except BaseException as error:  # re-raised in the loop
            self._error = error

    def _write(self, step: int, copied: Any, content: dict[str, object], copied_at: float) -> Written | NotWritten:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._tidy_up()
        text_bytes = len(json.dumps(content, indent=1))
        needed = self._copy.bytes + _BYTES_PER_TENSOR * self._copy.tensors + text_bytes
        if (missing := self._make_room(step, needed + _BYTES_EXTRA)) is not None:
            return NotWritten(step, missing)
        final = self._folder / f"step_{step:08d}"
        aside = self._folder / f".{final.name}.tmp"
        aside.mkdir()
        try:
            size = write_files(aside, copied["weights"], copied["state"], content)
            # One of the same step exists if the run rolled back and passed this step before.
            replaced = final.with_name(final.name + REPLACED)
            self._metas.pop(final, None)
            if final.exists():
                os.replace(final, replaced)
            os.replace(aside, final)
            sync_folder(self._folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        seconds = time.perf_counter() - copied_at
        self._metas[final] = read_meta(final)
        with contextlib.suppress(OSError):  # the next write tries again
            if replaced.exists():
                self._remove(replaced)
            self._keep_only(self._kept(step, self._keep, best=True))
        return Written(step, final, size, seconds)

    def _tidy_up(self) -> None:
        """Remove incomplete checkpoints left by a killed process."""
        for path in self._folder.glob(".step_*.tmp"):
            shutil.rmtree(path)
        for path in self._folder.glob(f"step_*{REPLACED}"):
            final = path.with_name(path.name.removesuffix(REPLACED))
            if final.exists():
                self._remove(path)
            else:
                os.replace(path, final)

    def _make_room(self, step: int, needed: int) -> str | None:
        """Free space for a checkpoint, if necessary by removing all but the newest.

        Returns None if there is room; else removes nothing and returns a text on the missing space.
        """
        for keep, best in ((self._keep, True), (1, True), (1, False)):
            free = shutil.disk_usage(self._folder).free
            if needed <= free:
                return None
            kept = self._kept(step, keep, best)
            others = [path for path in list_checkpoints(self._folder) if path not in kept]
            if needed <= free + sum(_bytes_in(path) for path in others):
                self._keep_only(kept)
        free = shutil.disk_usage(self._folder).free
        if needed <= free:
            return None
        return f"needs {_megabytes(needed)} and {_megabytes(free)} are free"

    def _kept(self, step: int, keep: int, best: bool) -> set[Path]:
        """Return the intact checkpoints to keep when `step` is written; see kept_steps.

        Checkpoints of later steps, written before a rollback, count only if there are no others.
        """
        intact: dict[int, Path] = {}
        val_losses: dict[int, float | None] = {}
        for path in list_checkpoints(self._folder):
            if path not in self._metas:
                self._metas[path] = intact_meta(path)
            if (meta := self._metas[path]) is not None:
                intact[step_of(path)], val_losses[step_of(path)] = path, meta.val_loss
        earlier = {at: loss for at, loss in val_losses.items() if at <= step}
        return {intact[at] for at in kept_steps(earlier or val_losses, keep, best)}

    def _keep_only(self, kept: set[Path]) -> None:
        for path in list_checkpoints(self._folder):
            if path not in kept:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Delete a checkpoint; rename it first, as a half-deleted one would count as damaged."""
        nameless = path.with_name(f".{path.name}.tmp")
        os.replace(path, nameless)
        self._metas.pop(path, None)
        shutil.rmtree(nameless)


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


class HostCopy:
    """Host buffers that receive the tensors of a nested state dict and are reused.

    They are pinned for a CUDA device; torch rounds each pinned buffer up to a power of two.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    @property
    def tensors(self) -> int:
        return len(self._buffers)

    def take(self, state: Mapping[str, object], device: torch.device) -> Any:
        """Copy a state of mappings, lists, tensors and plain values, and wait for the copy.

        Returns the same nesting with host tensors, which the next call overwrites. Sharded tensors are gathered, for
        which the other ranks call join_gather meanwhile.
        """
        copied = self._copy(state, ())
        synchronize(device)
        return copied

    def _copy(self, value: object, path: tuple[object, ...]) -> object:
        if isinstance(value, Tensor):
            gathered = full_tensor(value)
            return self._buffer(gathered, path).copy_(gathered, non_blocking=True)
        if isinstance(value, Mapping):
            return {key: self._copy(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, (*path, i)) for i, item in enumerate(value))
        assert value is None or isinstance(value, bool | int | float | str), path
        return value

    def _buffer(self, tensor: Tensor, path: tuple[object, ...]) -> Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            pinned = tensor.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[path] = buffer
        return buffer
