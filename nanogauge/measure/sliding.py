"""The median of the last few values, kept up to date at a cost that a training step never feels."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque


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
