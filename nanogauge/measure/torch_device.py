"""What torch reports about its device: CUDA events, memory peaks and compile time.

The functions import torch themselves, so that this module loads without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class EventTimeline:
    """Time stamps as CUDA events, read one step late so that the device's queue never runs dry."""

    lag = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.Event:
        import torch

        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def wait(self, moment: torch.Event) -> None:
        moment.synchronize()

    def seconds(self, begin: torch.Event, end: torch.Event) -> float:
        return float(begin.elapsed_time(end)) / 1e3


@dataclass(frozen=True)
class AllocatorPeaks:
    """Peaks of torch's CUDA allocator so far; None on other devices."""

    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    inactive_bytes: int | None = None
    """Bytes reserved but unusable because of fragmentation."""
    retries: int | None = None
    """Number of allocations that succeeded only after cached memory was freed."""


def allocator_peaks(device: torch.device) -> AllocatorPeaks:
    if device.type != "cuda":
        return AllocatorPeaks()
    import torch

    stats = torch.cuda.memory_stats(device)
    return AllocatorPeaks(
        allocated_bytes=stats["allocated_bytes.all.peak"],
        reserved_bytes=stats["reserved_bytes.all.peak"],
        inactive_bytes=stats["inactive_split_bytes.all.peak"],
        retries=stats["num_alloc_retries"],
    )


class CompileTimer:
    """Measures the total time that torch.compile spends compiling in this process.

    A new shape, a changed flag or a first backward pass may trigger compilation during a run;
    dynamo calls back at the start and end of each.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._done_seconds = 0.0
        self._began: float | None = None
        self._listening = False

    def listen(self) -> None:
        """Start measuring; this imports torch's compiler front end, which takes 75 MB of memory."""
        from torch._dynamo.callback import callback_handler

        if self._listening:
            return
        self._listening = True
        callback_handler.register_start_callback(self._on_start)
        callback_handler.register_end_callback(self._on_end)

    def seconds(self) -> float:
        """Return the compile time since listen(), including a compilation in progress."""
        under_way = 0.0 if self._began is None else self._now() - self._began
        return self._done_seconds + under_way

    def _on_start(self, _: object) -> None:
        self._began = self._now()

    def _on_end(self, _: object) -> None:
        self._done_seconds, self._began = self.seconds(), None
