"""Timing of a run: consecutive steps on the device's timeline, everything else in windows.

A window (evaluation, checkpoint) begins and ends with an idle device. A step begins where the previous work ended and
ends with its own last operation, so the seconds of steps and windows add up to the wall time. The loop never waits for
a busy device: on a GPU the end of a step is read after the next step has been queued.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

Moment = Any
"""A point in time, in the representation of its timeline."""


class DeviceTimeline(Protocol):
    """Timestamps in the order in which a device reaches them, such as CUDA events in a stream."""

    @property
    def lag(self) -> int:
        """Steps to queue before waiting for the end of an earlier one."""

    def mark(self) -> Moment:
        """Return the moment at which all work queued so far is done, without waiting for it."""

    def wait(self, moment: Moment) -> None:
        """Wait until a moment has passed."""

    def seconds(self, begin: Moment, end: Moment) -> float:
        """Return the seconds between two moments that have passed."""


class HostTimeline:
    """DeviceTimeline of the host's clock; each mark synchronizes the device."""

    lag = 0

    def __init__(self, synchronize: Callable[[], None], now: Callable[[], float]) -> None:
        self._synchronize, self._now = synchronize, now

    def mark(self) -> Moment:
        self._synchronize()
        return self._now()

    def wait(self, moment: Moment) -> None:
        """Return at once: every mark has passed."""

    def seconds(self, begin: Moment, end: Moment) -> float:
        return float(end - begin)


@dataclass
class Window:
    """Duration of work outside of steps; 0 until it ends."""

    seconds: float = 0.0
    """Duration in seconds, without compilation."""
    compile_seconds: float = 0.0


@dataclass(frozen=True)
class StepTimes:
    """Duration of one step and its parts in seconds; parts that were not timed are None."""

    step_seconds: float
    """Duration of the step, without compilation."""
    compile_seconds: float
    data_wait_seconds: float | None
    """None if the loading of batches was not timed."""
    forward_seconds: float | None
    backward_seconds: float | None
    optimizer_seconds: float | None


@dataclass
class Stopwatch:
    """Times one step.

    Args:
        split: time forward, backward and optimizer as well, which takes one mark for each.
    """

    timeline: DeviceTimeline
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
        """Time the loading of a batch, as far as the device waits for it.

        A busy device passes both marks at once, so it has not waited. At most two batches are queued on it: a host that
        is ahead sleeps here instead of spinning in a full queue.
        """
        if self.waits:
            self.timeline.wait(self.waits[-1][1])
        begin = self.timeline.mark()
        yield
        self._last = self.timeline.mark()
        self.waits.append((begin, self._last))

    def lap(self, name: str) -> None:
        """Assign the time since the previous lap or batch to the named part of the step."""
        if self.split:
            now = self.timeline.mark()
            self.laps.setdefault(name, []).append((self._last, now))
            self._last = now

    def read(self) -> StepTimes:
        """Wait for the end of the step and return its times."""
        self.timeline.wait(self.end)
        span = self.timeline.seconds(self.begin, self.end)
        # A device with queued work does not wait for all of a compilation on the host.
        compiling = min(self.compile_seconds, span)
        parts = {name: self._sum(pairs) for name, pairs in self.laps.items()}
        return StepTimes(
            step_seconds=span - compiling,
            compile_seconds=compiling,
            data_wait_seconds=self._sum(self.waits) if self.waits else None,
            # A part that contains a compilation would count its time twice.
            forward_seconds=None if compiling else parts.get("forward"),
            backward_seconds=None if compiling else parts.get("backward"),
            optimizer_seconds=None if compiling else parts.get("optimizer"),
        )

    def _sum(self, pairs: list[tuple[Moment, Moment]]) -> float:
        return sum(self.timeline.seconds(begin, end) for begin, end in pairs)


class Clock:
    """Times steps and windows, and counts the seconds since its creation.

    Args:
        synchronize: waits until the device is idle.
        now: a monotonic clock in seconds.
        timeline: of the steps; the host's clock by default.
        compiled_seconds: returns the time this process has spent compiling so far.
    """

    def __init__(
        self,
        synchronize: Callable[[], None],
        now: Callable[[], float] = time.perf_counter,
        timeline: DeviceTimeline | None = None,
        compiled_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._synchronize, self._now = synchronize, now
        self._timeline = timeline if timeline is not None else HostTimeline(synchronize, now)
        self._compiled_seconds = compiled_seconds
        self._step_end: Moment = None
        self._began = now()

    @property
    def lag(self) -> int:
        """Steps to queue before reading the times of an earlier one."""
        return self._timeline.lag

    def elapsed_seconds(self) -> float:
        return self._now() - self._began

    def mark(self) -> Moment:
        """Return the moment at which all work queued so far is done, without waiting for it."""
        return self._timeline.mark()

    def wait(self, moment: Moment) -> None:
        """Wait until a moment has passed."""
        self._timeline.wait(moment)

    @contextmanager
    def window(self) -> Iterator[Window]:
        """Time work outside of steps, such as an evaluation, including its device work."""
        window = Window()
        self._synchronize()
        begin, compiled = self._now(), self._compiled_seconds()
        self._step_end = None  # also if the work fails
        yield window
        self._synchronize()
        window.compile_seconds = self._compiled_seconds() - compiled
        window.seconds = self._now() - begin - window.compile_seconds

    def begin_step(self, split: bool) -> Stopwatch:
        """Begin a step at the end of the previous one, or now if a window came between."""
        begin = self._step_end if self._step_end is not None else self._timeline.mark()
        return Stopwatch(self._timeline, begin, split, self._compiled_seconds())

    def end_step(self, watch: Stopwatch) -> None:
        """End a step whose work has all been queued."""
        watch.compile_seconds = self._compiled_seconds() - watch.compiled_before
        watch.end = self._step_end = self._timeline.mark()
