"""Steps at several power limits of a card, as bench/power_sweep.py measured them."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import platformdirs
from pydantic import ValidationError

from nanogauge.files import write_atomic
from nanogauge.quantities import Interval
from nanogauge.records import Stored


class PowerPoint(Stored):
    """Steps at one limit."""

    limit_watts: float
    step_seconds: float
    """mean"""
    watts: float
    """mean that the board drew"""
    joules_per_token: float


class PowerCurve(Stored):
    """Of one card and one model."""

    device: str
    """the card's row in hardware.toml"""
    workload: str
    """what was trained, in words"""
    measured_unix: float
    points: list[PowerPoint]
    """at rising limits, at least two"""

    def holds(self, *limits_watts: float) -> bool:
        """Whether these limits lie between measured ones."""
        ends = self.points[0].limit_watts, self.points[-1].limit_watts
        return all(ends[0] <= limit <= ends[1] for limit in limits_watts)

    def slower(self, lowered: float, limit: float) -> Interval:
        """Time of a step at the lowered limit, over that at the limit."""
        return self._ratio(lowered, limit, lambda point: point.step_seconds)

    def draws(self, lowered: float, limit: float) -> Interval:
        """Power at the lowered limit, over that at the limit."""
        return self._ratio(lowered, limit, lambda point: point.watts)

    def _ratio(self, lowered: float, limit: float, of: Callable[[PowerPoint], float]) -> Interval:
        """On the line between two measured points; the interval is from the one to the other."""
        return self._between(lowered, of) / self._between(limit, of).expected

    def _between(self, limit: float, of: Callable[[PowerPoint], float]) -> Interval:
        assert self.holds(limit)
        limits = [point.limit_watts for point in self.points]
        place = bisect_left(limits, limit)
        above = self.points[place]
        if above.limit_watts == limit:
            return Interval.exact(of(above))
        below = self.points[place - 1]
        share = (limit - below.limit_watts) / (above.limit_watts - below.limit_watts)
        value = of(below) + share * (of(above) - of(below))
        return Interval(min(of(below), of(above)), value, max(of(below), of(above)))


def path_of(device: str) -> Path:
    """Where the curve of a card lies, beside its calibrations, whether there is one or not."""
    name = re.sub(r"[^A-Za-z0-9.+]+", "-", f"{device} power").strip("-")
    data = platformdirs.user_data_path("nanogauge", appauthor=False)
    return data / "calibrations" / f"{name}.json"


def load_power_curve(device: str) -> PowerCurve | None:
    """What was measured of a card; None where nothing was, or its file is damaged."""
    try:
        return PowerCurve.model_validate_json(path_of(device).read_bytes())
    except (OSError, ValidationError):
        return None


def keep_power_curve(curve: PowerCurve) -> Path:
    """Keep a curve in the place of the one before.

    Raises:
        OSError: if it cannot be written.
    """
    path = path_of(curve.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, curve.model_dump_json(indent=1).encode())
    return path
