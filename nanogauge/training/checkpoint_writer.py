"""Checkpoints in the background: the loop waits for a copy in memory, a thread writes it.

A checkpoint takes its name once it is whole and on the disk; older ones are removed after that.
"""

from __future__ import annotations

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
from torch import nn

from nanogauge.files import sync_folder
from nanogauge.quantities import finite
from nanogauge.training.checkpoint import (
    REPLACED,
    Meta,
    RandomState,
    intact_meta,
    list_checkpoints,
    own_weights,
    read_meta,
    step_of,
)
from nanogauge.training.checkpoint_files import write_files
from nanogauge.training.host_copy import HostCopy

_BYTES_PER_TENSOR, _BYTES_BESIDE = 512, 2**13
"""of headers and padding in the files; twice what was found with 37 and with 301 tensors"""


@dataclass(frozen=True)
class Written:
    """A checkpoint that is whole and on the disk."""

    step: int
    path: Path
    bytes: int
    write_seconds: float
    """from its copy in memory to its name on the disk"""


@dataclass(frozen=True)
class NotWritten:
    """A checkpoint that failed; those before it stay."""

    step: int
    reason: str
    """as the system says it ("No space left on device"), or what is missing"""


def kept_steps(val_losses: Mapping[int, float | None], keep: int, best: bool = True) -> set[int]:
    """Of the checkpoints at these steps: the newest `keep`, and that with the least loss.

    Args:
        val_losses: by step; None where there was no evaluation.
        keep: how many of the newest, 1 at least.
        best: False leaves the one with the least loss out.
    """
    newest = set(sorted(val_losses)[-keep:])
    known = [(loss, -step) for step, loss in val_losses.items() if loss is not None]
    return newest | {-min(known)[1]} if best and known else newest


class Checkpoints:
    """The checkpoints of a run, one written at a time, by one process."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._ended: SimpleQueue[Written | NotWritten] = SimpleQueue()
        self._bug: BaseException | None = None
        self._known: dict[Path, Meta | None] = {}
        """what was found out about the checkpoints that are there; None for damaged ones"""

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
        """Copy the state after `step` updates, and have it written; done() tells how that went.

        Waits for an earlier checkpoint to be written, as its copy lies where this one goes.

        Args:
            step: updates that were made.
            model: its weights are copied, as is the state of optimizer and scaler.
            optimizer: of these weights.
            scaler: of the loss.
            random_states: one of each rank.
            position: in the data, for meta.json, as is the next.
            run: what else is to be kept; both in words of JSON.
            val_loss: nats per token of an evaluation at this very step; None without one.
        """
        self.wait()
        device = next(model.parameters()).device
        state = {
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "random": list(random_states),
        }
        copied = self._copy.take({"weights": own_weights(model), "state": state}, device)
        loss = finite(val_loss) if val_loss is not None else None
        content = {"step": step, "data": position, "run": run, "val_loss": loss}
        content = json.loads(json.dumps(content))  # as it is now, whatever becomes of the mappings
        arguments = (step, copied, content, time.perf_counter())
        self._thread = threading.Thread(target=self._work, args=arguments, name="checkpoint")
        self._thread.start()

    def done(self) -> list[Written | NotWritten]:
        """What has ended since the last call; does not wait."""
        self._raise_bug()
        ended = []
        while not self._ended.empty():
            ended.append(self._ended.get())
        return ended

    def wait(self) -> None:
        """Until the write under way, if there is one, has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise_bug()

    def _raise_bug(self) -> None:
        if self._bug is not None:
            bug, self._bug = self._bug, None
            raise bug

    def _work(self, step: int, copied: Any, content: dict[str, object], copied_at: float) -> None:
        try:
            self._ended.put(self._write(step, copied, content, copied_at))
        except OSError as error:
            self._ended.put(NotWritten(step, error.strerror or str(error)))
        except BaseException as error:  # a bug, which the loop raises
            self._bug = error

    def _write(
        self, step: int, copied: Any, content: dict[str, object], copied_at: float
    ) -> Written | NotWritten:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._tidy_up()
        text_bytes = len(json.dumps(content, indent=1))
        needed = self._copy.bytes + _BYTES_PER_TENSOR * self._copy.tensors + text_bytes
        if (missing := self._make_room(step, needed + _BYTES_BESIDE)) is not None:
            return NotWritten(step, missing)
        final = self._folder / f"step_{step:08d}"
        aside = self._folder / f".{final.name}.tmp"
        aside.mkdir()
        try:
            size = write_files(aside, copied["weights"], copied["state"], content)
            # One of the same step is there where the run went back and came by here again.
            replaced = final.with_name(final.name + REPLACED)
            self._known.pop(final, None)
            if final.exists():
                os.replace(final, replaced)
            os.replace(aside, final)
            sync_folder(self._folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        seconds = time.perf_counter() - copied_at
        self._known[final] = read_meta(final)
        with contextlib.suppress(OSError):  # the next write tries again
            if replaced.exists():
                self._remove(replaced)
            self._keep_only(self._kept(step, self._keep, best=True))
        return Written(step, final, size, seconds)

    def _tidy_up(self) -> None:
        """Remove what a killed process left."""
        for path in self._folder.glob(".step_*.tmp"):
            shutil.rmtree(path)
        for path in self._folder.glob(f"step_*{REPLACED}"):
            final = path.with_name(path.name.removesuffix(REPLACED))
            if final.exists():
                self._remove(path)
            else:
                os.replace(path, final)

    def _make_room(self, step: int, needed: int) -> str | None:
        """See that so many bytes are free, if need be at the cost of all but the newest checkpoint.

        Removes nothing where that would not do. Returns what is missing.
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
        """The intact checkpoints that the rule keeps.

        Those of later steps than this one count only where there are no others: the run has gone
        back behind them, and their course is left.
        """
        intact: dict[int, Path] = {}
        val_losses: dict[int, float | None] = {}
        for path in list_checkpoints(self._folder):
            if path not in self._known:
                self._known[path] = intact_meta(path)
            if (meta := self._known[path]) is not None:
                intact[step_of(path)], val_losses[step_of(path)] = path, meta.val_loss
        on_course = {at: loss for at, loss in val_losses.items() if at <= step}
        return {intact[at] for at in kept_steps(on_course or val_losses, keep, best)}

    def _keep_only(self, kept: set[Path]) -> None:
        for path in list_checkpoints(self._folder):
            if path not in kept:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Take its name first: a checkpoint that is half removed is no damaged one."""
        nameless = path.with_name(f".{path.name}.tmp")
        os.replace(path, nameless)
        self._known.pop(path, None)
        shutil.rmtree(nameless)


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"
