"""Finds a training loss that leaves its course upwards, and lets no noise pass for that.

The course is the median of the recent losses, its noise their median absolute deviation: neither is
moved by a few bad batches. A loss that falls steeply has a large deviation, so that nothing is told
in the first steps of a training, when nothing is steady.
"""

from __future__ import annotations

import statistics

from nanogauge.measure.sliding import SlidingMedian

COURSE_STEPS = 50
"""that the course is made of; before there are so many nothing is judged"""
DEVIATIONS = 10.0
"""standard deviations of one loss; 50 losses give a deviation that is up to a half too small"""
LEAST_RISE = 0.05
"""of the loss itself: what is less is no spike, however smooth the course was"""
_LASTING_STEPS = 3
"""in a row: a single batch of odd text is none"""
RECOVERED_STEPS = 10
"""in a row on the course again, before another spike is one"""
_SIGMA_OF_MAD = 1.4826  # of a normal distribution


class LossSpike:
    """The course of one run's training loss, and whether it has left it.

    While the loss is above, the course stays as it was: a run that does not come back has told it
    once, and is never taken for one that has.
    """

    def __init__(self) -> None:
        self._step = -1
        self._begin()

    def _begin(self) -> None:
        self._course = SlidingMedian(COURSE_STEPS)
        self._above = self._back = 0
        self._told = False

    @property
    def course(self) -> float:
        """The loss as it was before, in nats per token; there must have been one."""
        return self._course.median

    def add(self, step: int, loss: float) -> bool:
        """Take in the finite loss of a step; True where it has left its course and nobody was told.

        A step that was made before belongs to a run that went back: its course begins anew.
        """
        if step <= self._step:
            self._begin()
        self._step = step
        if not self._course.full or not self._is_above(loss):
            self._course.add(loss)
            self._above, self._back = 0, self._back + 1
            self._told &= self._back < RECOVERED_STEPS
            return False
        self._above, self._back = self._above + 1, 0
        if self._told or self._above < _LASTING_STEPS:
            return False
        self._told = True
        return True

    def _is_above(self, loss: float) -> bool:
        middle = self._course.median
        rise = loss - middle
        if rise < LEAST_RISE * abs(middle):
            return False
        values = self._course.values()
        deviation = statistics.median(abs(value - middle) for value in values)
        return rise >= DEVIATIONS * _SIGMA_OF_MAD * deviation
