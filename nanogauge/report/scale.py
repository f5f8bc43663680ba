"""The scales of a chart: round ticks, numbers on them, and long series made short.

A long series is drawn by the lowest and highest value of each stretch of it: no spike is lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
MOST_STRETCHES = 360
"""about one for each unit of a chart's width"""
SMALLEST, LARGEST = 1e-12, 1e15
"""what an axis takes for nothing, and where every axis ends"""
_ROUND = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Stretches:
    """A long series in equal stretches, each by its place and its lowest, middle and highest."""

    x: Floats
    low: Floats
    middle: Floats
    high: Floats


def stretches(x: Floats, y: Floats, most: int = MOST_STRETCHES) -> Stretches:
    """At most so many stretches of a series, in each of which no value is passed over."""
    size = max(1, math.ceil(len(y) / most))
    whole = len(y) // size * size
    pieces = [y[:whole].reshape(-1, size)]
    places = [x[:whole].reshape(-1, size)]
    if whole < len(y):
        pieces.append(y[None, whole:])
        places.append(x[None, whole:])
    return Stretches(
        np.concatenate([piece.mean(axis=1) for piece in places]),
        np.concatenate([piece.min(axis=1) for piece in pieces]),
        np.concatenate([np.median(piece, axis=1) for piece in pieces]),
        np.concatenate([piece.max(axis=1) for piece in pieces]),
    )


@dataclass(frozen=True)
class Axis:
    """Round numbers from one end to the other."""

    low: float
    high: float
    ticks: list[float]
    step: float

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one."""
        return (value - self.low) / (self.high - self.low)

    def text(self, value: float) -> str:
        """A tick's number, with as many decimals as tell it from the next tick."""
        scale, suffix = 1.0, ""
        largest = max(abs(self.low), abs(self.high))
        for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if largest >= 10 * factor or (largest >= factor and self.step >= factor):
                scale, suffix = factor, letter
                break
        step = self.step / scale
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        steps = value / self.step
        if round(step * 10**decimals, 6) % 1 or abs(steps - round(steps)) > 1e-6:
            decimals += 1  # steps of 2.5, and an end that is no round number
        number = f"{value / scale:.{decimals}f}"
        return "0" if float(number) == 0 else f"{number}{suffix}"


def round_step(span: float, count: int) -> float:
    """A round distance that divides a span into about so many parts."""
    raw = span / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    return next(m * magnitude for m in _ROUND if m * magnitude >= raw * (1 - 1e-9))


def round_axis(low: float, high: float, count: int = 4) -> Axis:
    """An axis that begins and ends with a tick and holds both values.

    A series that does not change is given a fifth of its value on either side, so that its ticks
    are useful.
    """
    largest = max(abs(low), abs(high))
    if high - low <= max(1e-3 * largest, SMALLEST):
        around = 0.2 * largest if largest > SMALLEST else 1.0
        low, high = low - around, high + around
    step = round_step(high - low, count)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks, step)


def exact_axis(low: float, high: float, count: int = 5, apart: float = 0.13) -> Axis:
    """An axis from one value to another, both labelled, with round ticks between them.

    Args:
        apart: the least distance of a tick from the ends, as a share of the axis.
    """
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = round_step(high - low, count)
    inner = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    margin = apart * (high - low)
    between = [i * step for i in inner if low + margin <= i * step <= high - margin]
    return Axis(low, high, [low, *between, high], step)
