"""What each benchmark prints with --json: a figure over its rounds, and whom it is held against."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def result(name: str, case: str, values: Sequence[float], peer: str | None) -> dict[str, Any]:
    """The median of the rounds, the lowest and the highest; peer is None for a figure by itself."""
    return {
        "id": name,
        "case": case,
        "value": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "n": len(values),
        "peer": peer,
    }
