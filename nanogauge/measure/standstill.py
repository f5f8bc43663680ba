"""Notice standstills: the process was stopped or paused, the machine slept, a clock jumped.

A thread wakes twice a second. If its next wake-up is seconds late and the process used no CPU time meanwhile, nothing
of it ran. While a machine sleeps, the clock that measures the run stands still too; CLOCK_BOOTTIME, or CLOCK_MONOTONIC
where there is none, counts on.
"""

import threading
import time
from collections.abc import Callable

from nanogauge.quantities import format_seconds
from nanogauge.schema import Event

TICK_SECONDS = 0.5
LEAST_SECONDS = 3.0
"""Shortest standstill that is noticed; a busy machine delays a wake-up by less."""
MOST_CPU_SHARE = 0.5
"""CPU time per second, of all threads, above which the process was busy and not still."""
_MOST_DURATIONS = 3
_EPOCH_STEP_SECONDS = 30.0  # smaller changes of the time of day are corrections


def _awake_or_asleep() -> float:
    clock = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))
    return time.perf_counter() if clock is None else time.clock_gettime(clock)


class StandstillWatch:
    """Thread that notices standstills; the arguments are clocks in seconds.

    Args:
        now: the clock that measures the run.
        uptime: a clock that continues while the machine sleeps.
        wall: seconds since the epoch.
        cpu: CPU time of this process.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.perf_counter,
        uptime: Callable[[], float] = _awake_or_asleep,
        wall: Callable[[], float] = time.time,
        cpu: Callable[[], float] = time.process_time,
    ) -> None:
        self._clocks = now, uptime, wall, cpu
        self._lock = threading.Lock()
        self._last = self._read()
        self._new: list[Event] = []
        self._unassigned: list[tuple[float, int]] = []
        """Seconds of standstills, and the number of durations that did not contain them."""
        self._closed = threading.Event()

    def start(self) -> None:
        self._last = self._read()
        threading.Thread(target=self._tick, name="standstill", daemon=True).start()

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()

    def _tick(self) -> None:
        while not self._closed.wait(TICK_SECONDS):
            self.check()

    def _read(self) -> tuple[float, float, float, float]:
        now, uptime, wall, cpu = self._clocks
        return now(), uptime(), wall(), cpu()

    def check(self) -> None:
        """Compare the clocks with the last check, by whichever thread."""
        with self._lock:
            last, self._last = self._last, self._read()
            ran, up, wall, cpu = (b - a for a, b in zip(last, self._last, strict=True))
            slept = up - ran
            if slept >= LEAST_SECONDS:
                self._add("slept", self._span(slept, "the machine slept"), slept)
            elif abs(wall - up) >= _EPOCH_STEP_SECONDS:
                ahead = "forward" if wall > up else "back"
                text = f"The time of day was set {ahead} by {format_seconds(abs(wall - up))}."
                self._add("clock_changed", text, None)
            still = ran - TICK_SECONDS / 2  # it began between two wake-ups
            if still >= LEAST_SECONDS and cpu < MOST_CPU_SHARE * ran:
                why = "the process was stopped (Ctrl-Z, SIGSTOP), or the machine paused"
                self._add("suspended", self._span(still, why), still)
                self._unassigned.append((still, 0))

    def _add(self, what: str, text: str, seconds: float | None) -> None:
        self._new.append(Event(level="warning", what=what, text=text, seconds=seconds))

    def _span(self, seconds: float, why: str) -> str:
        times = (time.localtime(moment) for moment in (self._last[2] - seconds, self._last[2]))
        begin, end = (time.strftime("%H:%M:%S", moment) for moment in times)
        return f"Asleep from {begin} to {end} ({format_seconds(seconds)}): {why}."

    def new(self) -> list[Event]:
        """Return events since the last call: suspended, slept, clock_changed."""
        self.check()
        with self._lock:
            found, self._new = self._new, []
        return found

    def seconds_within(self, seconds: float) -> float:
        """Return how much of a duration that has just been measured the process stood still.

        Each standstill is part of one duration, the first that is longer; on a GPU, a step is measured one or two steps
        later.
        """
        self.check()
        with self._lock:
            inside, others = 0.0, []
            for still, durations in self._unassigned:
                if inside + still <= seconds:
                    inside += still
                elif durations < _MOST_DURATIONS:
                    others.append((still, durations + 1))
            self._unassigned = others
        return inside
