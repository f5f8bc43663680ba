"""When something happened in a run: at which hour of its work, over all its processes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nanogauge.report.scale import Floats
from nanogauge.runlog.history import Recorded

_UNITS = ((3600.0, "hours", 7200.0), (60.0, "minutes", 300.0), (1.0, "seconds", 0.0))
"""seconds of each, and of a run that is counted in it at least"""


class Timeline:
    """The x axis of a run: hours where every process has a clock, else the number of the step.

    A short run counts in minutes or seconds. Each process counts from its own start, so that hours
    add up what the earlier ones took; the
    time between two of them, when nothing ran, is not in it.
    """

    def __init__(self, recorded: Recorded) -> None:
        self._firsts = [
            (number, start.first_step)
            for number, starts in enumerate(recorded.processes)
            for start in starts
        ]
        """the process of each start line, and the step that it goes on from"""
        self._of_readings = recorded.processes_of_readings()
        sessions = recorded.session_seconds
        known = [seconds for seconds in sessions if seconds is not None]
        self.has_clock = len(known) == len(sessions)
        self._before = np.cumsum([0.0, *known[:-1]]) if self.has_clock else np.zeros(len(sessions))
        self.seconds, unit = next(u for u in _UNITS if sum(known) >= u[2])[:2]
        """in a unit of the axis"""
        self.title = f"{unit} of the run" if self.has_clock else "step"
        last = [recorded.steps.last("step") or 0, *(float(e.step) for e in recorded.evals)]
        self.end = sum(known) / self.seconds if self.has_clock else max(last)
        """where the run ends, so far"""

    def of_steps(self, steps: Floats, elapsed: Floats) -> Floats:
        """Places of lines that name their step; a step belongs to the last process that made it."""
        if not self.has_clock:
            return steps
        process = np.zeros(len(steps), dtype=np.int64)
        for number, first in self._firsts:
            process[steps >= first] = number
        return self._places(process, elapsed)

    def of_readings(self, elapsed: Floats) -> Floats:
        """Places of all sensor readings of the run, by their clocks.

        Only a log with a clock has such lines.
        """
        return self._places(self._of_readings, elapsed)

    def of_moments(self, moments: Sequence[tuple[int | None, float | None]]) -> Floats:
        """Places of a few lines, each by its step and its clock; those that have neither left out.

        Where one has no clock in a log that has, or no step in one that has none, it has no place.
        """
        told = [
            (step if step is not None else self._firsts[-1][1], elapsed)
            for step, elapsed in moments
            if (elapsed if self.has_clock else step) is not None
        ]
        steps = np.array([step for step, _ in told], dtype=np.float64)
        clocks = np.array([np.nan if at is None else at for _, at in told], dtype=np.float64)
        return self.of_steps(steps, clocks)

    def _places(self, process: npt.NDArray[np.int64], elapsed: Floats) -> Floats:
        return (self._before[process] + elapsed) / self.seconds
