"""The clock of a run: steps back to back on the device's own timeline, all else in windows.

A window (evaluation, checkpoint) begins and ends with the device idle. A step begins where the
work before it ended and ends with its own last operation, so the seconds of steps and windows add
up to the time that passed, and nothing has to wait for a device that is still busy: on a GPU the
end of a step is read when the next one has been handed over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

Moment = Any
"""a moment on a timeline, which alone knows what it is"""


class _DeviceTimeline(Protocol):
    """Moments in the order in which a device comes by them."""

    @property
    def lag(self) -> int:
        """How many more steps are handed over before the end of one is awaited."""

    def mark(self) -> Moment:
        """The moment at which all that was asked of the device so far is done; does not wait."""

    def wait(self, moment: Moment) -> None:
        """Until that moment has passed."""

    def seconds(self, begin: Moment, end: Moment) -> float:
        """Between two moments that have passed."""


class HostTimeline:
    """Moments of the host's clock, at each of which the device is idle."""

    lag = 0

    def __init__(self, synchronize: Callable[[], None], now: Callable[[], float]) -> None:
        self._synchronize, self._now = synchronize, now

    def mark(self) -> Moment:
        self._synchronize()
        return self._now()

    def wait(self, moment: Moment) -> None:
        """A moment of the past has passed."""

    def seconds(self, begin: Moment, end: Moment) -> float:
        return float(end - begin)


@dataclass
class Window:
    """Seconds of something that has ended; 0 until then."""

    seconds: float = 0.0
    """without compilation"""
    compile_seconds: float = 0.0


@dataclass(frozen=True)
class StepTimes:
    """One step, in seconds; its parts are None where they were not timed."""

    step_seconds: float
    """without compilation"""
    compile_seconds: float
    data_wait_seconds: float
    forward_seconds: float | None
    backward_seconds: float | None
    optimizer_seconds: float | None


@dataclass
class Stopwatch:
    """Follows one step.

    Args:
        split: whether forward, backward and optimizer are timed, which takes a mark for each.
    """

    timeline: _DeviceTimeline
    begin: Moment
    split: bool
    compiled_before: float
    end: Moment = None
    compile_seconds: float = 0.0
    waits: list[tuple[Moment, Moment]] = field(default_factory=list)
    laps: dict[str, list[tuple[Moment, Moment]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last = self.begin

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done inside brings a batch; it counts as far as the device waits for it.

        A device that is still busy comes by both marks at once, and has waited for nothing.
        """
        begin = self.timeline.mark()
        yield
        self._last = self.timeline.mark()
        self.waits.append((begin, self._last))

    def lap(self, name: str) -> None:
        """All since the lap or the batch before is this part of the step."""
        if self.split:
            now = self.timeline.mark()
            self.laps.setdefault(name, []).append((self._last, now))
            self._last = now

    def read(self) -> StepTimes:
        """Wait for the end of the step, and tell its times."""
        self.timeline.wait(self.end)
        span = self.timeline.seconds(self.begin, self.end)
        # A device that still had work while the host compiled did not wait for all of it.
        compiling = min(self.compile_seconds, span)
        parts = {name: self._sum(pairs) for name, pairs in self.laps.items()}
        return StepTimes(
            step_seconds=span - compiling,
            compile_seconds=compiling,
            data_wait_seconds=self._sum(self.waits),
            # What was compiled in the midst of a part would be booked twice.
            forward_seconds=None if compiling else parts.get("forward"),
            backward_seconds=None if compiling else parts.get("backward"),
            optimizer_seconds=None if compiling else parts.get("optimizer"),
        )

    def _sum(self, pairs: list[tuple[Moment, Moment]]) -> float:
        return sum(self.timeline.seconds(begin, end) for begin, end in pairs)


class Clock:
    """Times what the run does.

    Args:
        synchronize: waits until the device is idle; a window ends only then.
        now: a monotonic clock in seconds.
        timeline: where steps are timed; the host's clock where none is given.
        compiled_seconds: how long the process has compiled so far.
    """

    def __init__(
        self,
        synchronize: Callable[[], None],
        now: Callable[[], float] = time.perf_counter,
        timeline: _DeviceTimeline | None = None,
        compiled_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._synchronize, self._now = synchronize, now
        self._timeline = timeline if timeline is not None else HostTimeline(synchronize, now)
        self._compiled_seconds = compiled_seconds
        self._step_end: Moment = None
        self._began = now()

    @property
    def lag(self) -> int:
        """How many steps may be under way before the first of them is read."""
        return self._timeline.lag

    def elapsed_seconds(self) -> float:
        """Since the clock was made."""
        return self._now() - self._began

    @contextmanager
    def window(self) -> Iterator[Window]:
        """Time what is done inside, device work included.

        Evaluation, checkpoints and start-up each stand in a window of their own, so none of them
        is ever booked into a step or another window.
        """
        window = Window()
        self._synchronize()
        begin, compiled = self._now(), self._compiled_seconds()
        yield window
        self._synchronize()
        window.compile_seconds = self._compiled_seconds() - compiled
        window.seconds = self._now() - begin - window.compile_seconds
        self._step_end = None

    def begin_step(self, split: bool) -> Stopwatch:
        """A step begins where the one before it ended, or now if something else came between."""
        begin = self._step_end if self._step_end is not None else self._timeline.mark()
        return Stopwatch(self._timeline, begin, split, self._compiled_seconds())

    def end_step(self, watch: Stopwatch) -> None:
        """All that belongs to the step was asked of the device."""
        watch.compile_seconds = self._compiled_seconds() - watch.compiled_before
        watch.end = self._step_end = self._timeline.mark()
