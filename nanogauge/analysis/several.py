"""Runs of several processes: whose power was measured, and how far the processes are apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanogauge.quantities import format_seconds
from nanogauge.runlog.history import Recorded
from nanogauge.schema import Prediction


def other_cards(recorded: Recorded, prediction: Prediction) -> str | None:
    """Why power and energy in the log are not those of the run's GPUs; None where they are."""
    if prediction.hardware.kind == "cpu" or (numbers := sensed_others(recorded)) is None:
        return None
    cards, ranks = numbers
    these = "GPU" if cards == 1 else "GPUs"
    return f"the sensors that were read are those of {cards} {these}, and {ranks} trained"


def sensed_others(recorded: Recorded) -> tuple[int, int] | None:
    """How many cards were sensed and how many ranks trained, where these are not as many."""
    for begins in recorded.processes:
        ranks, cards = begins[0].ranks, begins[0].sensed_cards or 1
        if ranks is not None and cards != ranks:
            return cards, ranks
    return None


def other_numbers(recorded: Recorded, prediction: Prediction) -> str | None:
    """Why a mean over the run is not one over as many GPUs as predicted; None where it is."""
    numbers = [begins[0].ranks for begins in recorded.processes]
    if all(n is None or n == prediction.gpus for n in numbers):
        return None
    told = ", ".join(str(n) for n in numbers if n is not None)
    return f"the processes of the run trained on {told} GPUs, not all on {prediction.gpus}"


@dataclass(frozen=True)
class Apart:
    """One figure of all ranks, each rank's median over the steps that tell it."""

    worst_rank: int
    worst: float
    least: float
    steps: int
    """that each of them told, or fewer"""

    @property
    def spread(self) -> float:
        """How far the ranks are apart, as a share of the worst one's."""
        return (self.worst - self.least) / self.worst if self.worst else 0.0


def apart(recorded: Recorded, name: str) -> Apart | None:
    """A field of the rank lines, of the rank where it is highest; None where it is not told.

    The first step of each process, which warms up, is left out where there are others.
    """
    ranks, steps = recorded.ranks.column("rank"), recorded.ranks.column("step")
    values = recorded.ranks.column(name)
    known = ~np.isnan(values)
    later = known & ~np.isin(steps, [start.first_step for start in recorded.starts])
    if later.any():
        known = later
    if not known.any():
        return None
    medians = {int(rank): _median(values, known & (ranks == rank)) for rank in set(ranks[known])}
    worst = max(medians, key=lambda rank: medians[rank])
    counts = [int((known & (ranks == rank)).sum()) for rank in medians]
    return Apart(worst, medians[worst], min(medians.values()), min(counts))


def _median(values: npt.NDArray[np.float64], wanted: npt.NDArray[np.bool_]) -> float:
    return float(np.median(values[wanted]))


def rank_figures(recorded: Recorded) -> list[tuple[str, str, str, float, str, str]]:
    """What the rank lines say, as the arguments of an instrument; empty for a single process."""
    found: list[tuple[str, str, str, float, str, str]] = []
    for name, label, how in (
        (
            "step_seconds",
            "Step of the slowest rank",
            "a step ends for all at once, so that these differ little",
        ),
        (
            "forward_seconds",
            "Forward passes of the slowest rank",
            "in these no rank waits for another: the others wait for the slowest afterwards",
        ),
        ("data_wait_seconds", "Waiting for data, of the rank that waits longest", ""),
        ("peak_allocated_bytes", "VRAM, peak of tensors, of the fullest rank", ""),
        ("peak_host_bytes", "Memory on the host, peak, of the fullest rank", ""),
    ):
        figure = apart(recorded, name)
        if figure is None or not figure.worst:
            continue
        unit = "B" if name.endswith("bytes") else "s"
        size = f"{figure.worst / 2**30:.2f} GiB" if unit == "B" else format_seconds(figure.worst)
        text = f"{size}, rank {figure.worst_rank}; the least is {100 * figure.spread:.2g} % lower"
        steps = f"medians of {figure.steps:,} step{'s' if figure.steps > 1 else ''} of each rank"
        found.append(
            (f"rank_{name}", label, unit, figure.worst, text, "; ".join(filter(None, (steps, how))))
        )
    return found
