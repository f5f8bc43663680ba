"""What torch reports about its device: CUDA events, memory peaks and compile time.

The functions import torch themselves, so that this module loads without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from nanogauge.measure.clock import Clock

if TYPE_CHECKING:
    import torch


class EventTimeline:
    """Time stamps as CUDA events, read one step late so that the device's queue never runs dry.

    The events are blocking: a thread that waits for one sleeps.
    """

    lag = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        import torch

        # torch.Event would ignore `blocking`.
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, moment: torch.cuda.Event) -> None:
        moment.synchronize()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(begin.elapsed_time(end)) / 1e3


def make_clock(device: torch.device | None, compiled_seconds: Callable[[], float]) -> Clock:
    """Return the clock that times steps: with CUDA events on a GPU, else the host's clock."""

    def synchronize() -> None:
        if device is not None and device.type != "cpu":
            import torch

            torch.accelerator.synchronize(device)

    timeline = EventTimeline(device) if device is not None and device.type == "cuda" else None
    return Clock(synchronize, timeline=timeline, compiled_seconds=compiled_seconds)


def allocator_peaks(device: torch.device | None) -> dict[str, int]:
    """Return the peaks of torch's CUDA allocator so far, by their names in an end line; empty elsewhere.

    peak_inactive_bytes are reserved beyond the allocated ones, at the peaks of both: lost to fragmentation.
    allocation_retries counts allocations that succeeded only after cached memory was freed.
    """
    if device is None or device.type != "cuda":
        return {}
    import torch

    stats = torch.cuda.memory_stats(device)
    allocated, reserved = (stats[f"{kind}_bytes.all.peak"] for kind in ("allocated", "reserved"))
    return {
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": reserved,
        "peak_inactive_bytes": reserved - allocated,
        "allocation_retries": stats["num_alloc_retries"],
    }


class CompileTimer:
    """Measures the total time that torch.compile spends compiling in this process.

    A new shape, a changed flag or a first backward pass may trigger compilation during a run; dynamo calls back at the
    start and end of each.
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
