"""The clock of a run: windows that begin and end with the device idle, on a monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Window:
    """Seconds of something that has ended; 0 until then."""

    seconds: float = 0.0


class Clock:
    """Times what the run does.

    Args:
        synchronize: waits until the device is idle; a window ends only then.
        now: a monotonic clock in seconds.
    """

    def __init__(
        self, synchronize: Callable[[], None], now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._synchronize, self._now = synchronize, now
        self._began = now()

    def elapsed_seconds(self) -> float:
        """Since the clock was made."""
        return self._now() - self._began

    @contextmanager
    def window(self) -> Iterator[Window]:
        """Time what is done inside, device work included.

        Evaluation, checkpoints and steps each stand in a window of their own, so none of them is
        ever booked into another.
        """
        window = Window()
        self._synchronize()
        begin = self._now()
        yield window
        self._synchronize()
        window.seconds = self._now() - begin

    @contextmanager
    def waiting(self, total: Window) -> Iterator[None]:
        """Add the host's time inside to a total, without waiting for the device."""
        begin = self._now()
        yield
        total.seconds += self._now() - begin
