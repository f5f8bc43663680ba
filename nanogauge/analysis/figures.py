"""A measured figure, and the quantile that its spread is told in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nanogauge.schema import Stored


class Measured(Stored):
    value: float
    p10: float | None = None
    p90: float | None = None
    n: int | None = None
    how: str


def quantile(values: npt.NDArray[np.float64], share: float) -> float:
    """The value below which this share lies, by linear interpolation."""
    return float(np.quantile(values, share))
