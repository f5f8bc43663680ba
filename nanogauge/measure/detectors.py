"""Detectors of lasting slow-downs and of loss spikes that ignore noise.

A slow-down is found by comparing the median of the recent steps with the steady median, that of early steps after the
machine has settled. Single outliers do not move a median. The noise of the medians is measured on the run itself: from
the spread of single steps, which is right where steps are independent, and from the medians of successive blocks of
steps, which also contain noise that is correlated over many steps. The largest estimate counts.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence

RECENT_STEPS = 50
STEADY_STEPS = 100
SETTLING_STEPS, SETTLING_SECONDS = 150, 600.0
"""Warm-up, in which the clock of a GPU falls; it ends at whichever limit is reached first."""
MIN_DRIFT = 0.025
"""Smallest change of the median that counts as a slow-down, as a share of the steady median: above the 1-2 % by which
the clock of a GPU falls in its first minutes, even in a run of short steps."""
LASTING_STEPS = 10
"""Consecutive steps for which the medians must differ. By then most of the recent steps are slow, so their median shows
the full size of a sudden slow-down."""
WORSE = 1.10
"""Factor by which steps must become slower before a slow-down is reported again."""
STANDARD_ERRORS = 5
SMALL_BLOCK = 25
BLOCKS = 64
"""Blocks of each size that the noise is estimated from."""
OUTLIERS = 2
"""Largest changes that are not counted as noise: one slow-down changes two blocks at most."""
_SIGMA_OF_MAD = 1.4826  # of a normal distribution
_ERROR_OF_MEDIAN = math.sqrt(math.pi / 2)  # over that of the mean, for a normal distribution
_ERROR_OF_STEPS = _ERROR_OF_MEDIAN * math.sqrt(1 / STEADY_STEPS + 1 / RECENT_STEPS)
_ERROR_OF_HALVES = _ERROR_OF_MEDIAN * math.sqrt(4 / STEADY_STEPS)
_ERROR_OF_SMALL = math.sqrt(SMALL_BLOCK / STEADY_STEPS + SMALL_BLOCK / RECENT_STEPS)


class SlowDownDetector:
    """Finds the steady step time of a run, and slow-downs from it."""

    def __init__(self) -> None:
        self.steady_seconds: float | None = None
        """Median of the early steps, or of later ones that stayed faster; None before there are enough steps."""
        self._steps, self._seconds = 0, 0.0
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.recent_seconds = 0.0
        """Median of the recent steps."""
        self._candidates: list[float] | None = None
        """Step times that may define a new steady step time; None while none are collected."""
        self._blocks = [_Blocks(size) for size in (SMALL_BLOCK, RECENT_STEPS, STEADY_STEPS)]
        self._spread_seconds = 0.0
        self._noise_seconds = 0.0
        self._slower = self._faster = 0
        self._reported_seconds: float | None = None
        self._reported_at = 0

    def add(self, seconds: float) -> bool:
        """Add one steady step; return True for a certain slow-down that is not yet reported."""
        self._steps += 1
        self._seconds += seconds
        self._recent.append(seconds)
        self.recent_seconds = statistics.median(self._recent)
        for blocks in self._blocks:
            blocks.add(seconds)
        if self._steps % SMALL_BLOCK == 0:  # the sizes are multiples of the smallest
            self._measure_noise()
        self._collect_steady(seconds)
        if self.steady_seconds is None:
            return False
        change = self.recent_seconds - self.steady_seconds
        least = max(MIN_DRIFT * self.steady_seconds, self._noise_seconds)
        self._slower = self._slower + 1 if change >= least else 0
        self._faster = self._faster + 1 if change <= -least else 0
        if self._faster >= LASTING_STEPS and self._candidates is None and self._is_certain(change):
            self._candidates = []
        if self._slower < LASTING_STEPS or not self._is_news() or not self._is_certain(change):
            return False
        self._reported_seconds, self._reported_at = self.recent_seconds, self._steps
        return True

    def _is_news(self) -> bool:
        """Return True if this slow-down, or its present size, has not been reported yet."""
        reported, now = self._reported_seconds, self.recent_seconds
        if reported is not None and self._steps - self._reported_at < RECENT_STEPS:
            # The median may still rise to the full size of the slow-down that was reported.
            self._reported_seconds = max(reported, now)
            return False
        return reported is None or now >= WORSE * reported

    def _is_certain(self, change: float) -> bool:
        """Return True if a change also exceeds the noise of the recent steps."""
        return abs(change) >= STANDARD_ERRORS * _ERROR_OF_STEPS * _spread(self._recent)

    def _collect_steady(self, seconds: float) -> None:
        """Update the steady step time: once settled, and again if steps get faster."""
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
        # The half in which the step time changed has a large spread; the other one has not.
        noise = STANDARD_ERRORS * _ERROR_OF_HALVES * min(_spread(first), _spread(second))
        least = max(MIN_DRIFT * statistics.median(first), noise)
        if rise <= -least:
            self._candidates = second  # the machine had not settled yet
            return
        steady = first if rise >= least else self._candidates
        median = statistics.median(steady)
        if self.steady_seconds is None or median < self.steady_seconds:
            self.steady_seconds = median
            self._spread_seconds = _spread(steady)
            if not self._slower:  # a slow-down that still lasts is already reported
                self._reported_seconds = None
            self._measure_noise()
        self._candidates = None

    def _measure_noise(self) -> None:
        """Estimate how much noise alone can separate the two medians."""
        small, recent, steady = (blocks.deviation_seconds for blocks in self._blocks)
        error = max(_ERROR_OF_STEPS * self._spread_seconds, _ERROR_OF_SMALL * small, math.hypot(recent, steady))
        self._noise_seconds = STANDARD_ERRORS * error


class _Blocks:
    """Noise between the medians of successive blocks of steps."""

    def __init__(self, steps: int) -> None:
        self.deviation_seconds = 0.0
        """Standard deviation of a block's median; 0 until there are enough blocks."""
        self._steps = steps
        self._block: list[float] = []
        self._last: float | None = None
        self._changes: deque[float] = deque(maxlen=BLOCKS)

    def add(self, seconds: float) -> None:
        """Add one step. The median change between blocks is drift, not noise."""
        self._block.append(seconds)
        if len(self._block) < self._steps:
            return
        median = statistics.median(self._block)
        if self._last is not None:
            self._changes.append(median - self._last)
            drift = statistics.median(self._changes)
            off = sorted(abs(change - drift) for change in self._changes)[:-OUTLIERS]
            # The variance of a difference is twice that of each of the two.
            self.deviation_seconds = math.sqrt(sum(x * x for x in off) / max(len(off), 1) / 2)
        self._block, self._last = [], median


def _spread(values: Sequence[float]) -> float:
    """Estimate the standard deviation from the median absolute deviation."""
    middle = statistics.median(values)
    return _SIGMA_OF_MAD * statistics.median(abs(value - middle) for value in values)


BASELINE_STEPS = 50
"""Losses whose median is the baseline of a spike; with fewer no spike is reported."""
DEVIATIONS = 10.0
"""Rise of a spike in standard deviations of one loss, which 50 losses may underestimate by half."""
MIN_RISE = 0.05
"""Smallest rise of a spike as a share of the loss, however smooth the losses before it are."""
SPIKE_STEPS = 3
"""Consecutive losses above the baseline that make a spike; one odd batch makes none."""
RECOVERED_STEPS = 10
"""Consecutive losses back at the baseline before another spike is reported."""


class LossSpikeDetector:
    """Finds spikes of the training loss.

    The baseline is frozen during a spike, so a run that diverges is reported once and never counts as recovered.
    """

    def __init__(self) -> None:
        self._step = -1
        self._begin()

    def _begin(self) -> None:
        self._baseline: deque[float] = deque(maxlen=BASELINE_STEPS)
        self._above = self._back = 0
        self._reported = False

    @property
    def baseline(self) -> float:
        """Median loss before the spike in nats per token; requires at least one loss."""
        return statistics.median(self._baseline)

    def add(self, step: int, loss: float) -> bool:
        """Add the finite loss of a step; return True for a spike that is not yet reported.

        An earlier step follows a rollback of the run and begins a new baseline.
        """
        if step <= self._step:
            self._begin()
        self._step = step
        if len(self._baseline) < BASELINE_STEPS or not self._is_above(loss):
            self._baseline.append(loss)
            self._above, self._back = 0, self._back + 1
            self._reported &= self._back < RECOVERED_STEPS
            return False
        self._above, self._back = self._above + 1, 0
        if self._reported or self._above < SPIKE_STEPS:
            return False
        self._reported = True
        return True

    def _is_above(self, loss: float) -> bool:
        rise = loss - self.baseline
        if rise < MIN_RISE * abs(self.baseline):
            return False
        return rise >= DEVIATIONS * _spread(self._baseline)
