"""Finds a lasting slow-down in the times of steady steps, and lets no noise pass for one.

Two medians are compared: that of the recent steps, and that of early ones, from when the machine
has settled. Half of the recent steps must be slow before their median moves, so single spikes move
nothing. How far apart two medians of one steady machine lie is measured on this very run: from the
spread of single steps, which is right where steps are independent, and from the medians of
successive blocks of steps, which also see noise that lasts for many steps. The largest counts.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence


class SlidingMedian:
    """The last `size` values, in the order in which they came and by size."""

    def __init__(self, size: int) -> None:
        self._arrived: deque[float] = deque()
        self._sorted: list[float] = []
        self._size = size

    def __len__(self) -> int:
        return len(self._arrived)

    def add(self, value: float) -> None:
        """Take in a finite value, and let the oldest go once there are more than `size`."""
        self._arrived.append(value)
        insort(self._sorted, value)
        if len(self._arrived) > self._size:
            del self._sorted[bisect_left(self._sorted, self._arrived.popleft())]

    @property
    def full(self) -> bool:
        return len(self._arrived) == self._size

    @property
    def median(self) -> float:
        """Of the values that are there; at least one must be."""
        middle = len(self._sorted) // 2
        if len(self._sorted) % 2:
            return self._sorted[middle]
        return (self._sorted[middle - 1] + self._sorted[middle]) / 2

    def values(self) -> list[float]:
        """By size, the least first."""
        return list(self._sorted)


RECENT_STEPS = 50
STEADY_STEPS = 100
SETTLING_STEPS, SETTLING_SECONDS = 150, 600.0
"""a card warms up and its clock falls for some minutes; what is over first, steps or seconds"""
LEAST_DRIFT = 0.02
LASTING_STEPS = 10
"""in a row that the medians must be apart; by then most of the recent steps are slow, so that
their median tells the whole of a slow-down that came at once"""
WORSE = 1.10
"""a slow-down is told once, and again only when steps take so much longer than was told"""
STANDARD_ERRORS = 5
SMALL_BLOCK = 25
BLOCKS = 64
"""of each size, that the noise is measured on"""
LEFT_OUT = 2
"""largest changes that do not count as noise: one slow-down changes two blocks at most"""
_SIGMA_OF_MAD = 1.4826  # of a normal distribution
_ERROR_OF_MEDIAN = math.sqrt(math.pi / 2)  # over that of the mean, for a normal distribution
_ERROR_OF_STEPS = _ERROR_OF_MEDIAN * math.sqrt(1 / STEADY_STEPS + 1 / RECENT_STEPS)
_ERROR_OF_HALVES = _ERROR_OF_MEDIAN * math.sqrt(4 / STEADY_STEPS)
_ERROR_OF_SMALL = math.sqrt(SMALL_BLOCK / STEADY_STEPS + SMALL_BLOCK / RECENT_STEPS)


class SlowDown:
    """The steady step time of a run, and whether it is lost."""

    def __init__(self) -> None:
        self.steady_seconds: float | None = None
        """median of the early steps; None before there are enough. Where steps become faster, and
        stay so, their median takes its place"""
        self._steps, self._seconds = 0, 0.0
        self._recent = SlidingMedian(RECENT_STEPS)
        self._candidates: list[float] | None = None
        """step times that may become the steady ones; None while none are gathered"""
        self._blocks = [_Blocks(size) for size in (SMALL_BLOCK, RECENT_STEPS, STEADY_STEPS)]
        self._spread_seconds = 0.0
        self._noise_seconds = 0.0
        self._slower = self._faster = 0
        self._told_seconds: float | None = None
        self._told_at = 0

    @property
    def recent_seconds(self) -> float:
        """Median of the recent steps."""
        return self._recent.median

    def add(self, seconds: float) -> bool:
        """Take in one steady step; True where a slow-down is certain that was not told yet."""
        self._steps += 1
        self._seconds += seconds
        self._recent.add(seconds)
        for blocks in self._blocks:
            blocks.add(seconds)
        if self._steps % SMALL_BLOCK == 0:  # the sizes are multiples of the smallest
            self._measure_noise()
        self._gather(seconds)
        if self.steady_seconds is None:
            return False
        change = self._recent.median - self.steady_seconds
        least = max(LEAST_DRIFT * self.steady_seconds, self._noise_seconds)
        self._slower = self._slower + 1 if change >= least else 0
        self._faster = self._faster + 1 if change <= -least else 0
        if self._faster >= LASTING_STEPS and self._candidates is None and self._is_certain(change):
            self._candidates = []
        if self._slower < LASTING_STEPS or not self._is_news() or not self._is_certain(change):
            return False
        self._told_seconds, self._told_at = self._recent.median, self._steps
        return True

    def _is_news(self) -> bool:
        """Whether this slow-down, or how bad it is, was not told yet."""
        told, now = self._told_seconds, self._recent.median
        if told is not None and self._steps - self._told_at < RECENT_STEPS:
            # The median may still climb to the whole of what was told.
            self._told_seconds = max(told, now)
            return False
        return told is None or now >= WORSE * told

    def _is_certain(self, change: float) -> bool:
        """Whether a change is beyond the noise of the recent steps, too."""
        spread = _spread(self._recent.values())
        return abs(change) >= STANDARD_ERRORS * _ERROR_OF_STEPS * spread

    def _gather(self, seconds: float) -> None:
        """Gather the steady steps: the first after the machine settled, or faster ones later."""
        if self._candidates is None:
            settled = self._steps >= SETTLING_STEPS or self._seconds >= SETTLING_SECONDS
            if self.steady_seconds is None and settled:
                self._candidates = []
            return
        self._candidates.append(seconds)
        if len(self._candidates) < STEADY_STEPS:
            return
        first, second = self._candidates[: STEADY_STEPS // 2], self._candidates[STEADY_STEPS // 2 :]
        rise = statistics.median(second) - statistics.median(first)
        # A half in which the pace changed has a large spread; the other one does not.
        noise = STANDARD_ERRORS * _ERROR_OF_HALVES * min(_spread(first), _spread(second))
        least = max(LEAST_DRIFT * statistics.median(first), noise)
        if rise <= -least:
            self._candidates = second  # the machine had not settled yet
            return
        steady = first if rise >= least else self._candidates
        median = statistics.median(steady)
        if self.steady_seconds is None or median < self.steady_seconds:
            self.steady_seconds = median
            self._spread_seconds = _spread(steady)
            if not self._slower:  # else what goes on was told already
                self._told_seconds = None
            self._measure_noise()
        self._candidates = None

    def _measure_noise(self) -> None:
        """How far apart noise alone can bring the two medians."""
        small, recent, steady = (blocks.deviation_seconds for blocks in self._blocks)
        error = max(
            _ERROR_OF_STEPS * self._spread_seconds,
            _ERROR_OF_SMALL * small,
            math.hypot(recent, steady),
        )
        self._noise_seconds = STANDARD_ERRORS * error


class _Blocks:
    """How much the medians of successive blocks of steps differ by noise."""

    def __init__(self, steps: int) -> None:
        self.deviation_seconds = 0.0
        """standard deviation of a block's median; 0 until there are enough blocks"""
        self._steps = steps
        self._block: list[float] = []
        self._last: float | None = None
        self._changes: deque[float] = deque(maxlen=BLOCKS)

    def add(self, seconds: float) -> None:
        """Take in one step. Only what differs from the usual change is noise: a drift is none."""
        self._block.append(seconds)
        if len(self._block) < self._steps:
            return
        median = statistics.median(self._block)
        if self._last is not None:
            self._changes.append(median - self._last)
            drift = statistics.median(self._changes)
            off = sorted(abs(change - drift) for change in self._changes)[:-LEFT_OUT]
            # The variance of a difference is twice that of each of the two.
            self.deviation_seconds = math.sqrt(sum(x * x for x in off) / max(len(off), 1) / 2)
        self._block, self._last = [], median


def _spread(values: Sequence[float]) -> float:
    """Standard deviation of one value, from the median absolute deviation."""
    middle = statistics.median(values)
    return _SIGMA_OF_MAD * statistics.median(abs(value - middle) for value in values)


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
