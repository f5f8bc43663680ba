"""Memory, power and energy: what the allocator, the driver and the system say of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanogauge.analysis.figures import Measured, quantile
from nanogauge.measure.alarms import POWER_CAP
from nanogauge.prediction.energy import cost_formula, cost_of
from nanogauge.prediction.step_time import ARITHMETIC
from nanogauge.quantities import format_seconds
from nanogauge.runlog.history import Recorded, Table
from nanogauge.runspec import RunSpec
from nanogauge.schema import End, Prediction, Rank, Sensor, Step


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


JOULES_PER_KWH = 3.6e6
IMPORTED = "not in this log"


def memory_figures(
    recorded: Recorded, prediction: Prediction
) -> tuple[dict[str, Measured], dict[str, str]]:
    """The peaks that have a row of their own, and why one is absent."""
    on_cpu = prediction.hardware.kind == "cpu"
    fullest = ", of the fullest rank" if len(recorded.ranks) else ""
    ways = {
        "peak_allocated_bytes": (
            peak(recorded, "peak_allocated_bytes"),
            f"torch's allocator, at its highest{fullest}",
        ),
        "peak_process_bytes": (
            peak(recorded, "peak_host_bytes"),
            f"resident memory of the process, at its highest{fullest}",
        )
        if on_cpu
        else (
            highest(recorded.sensors.known("process_used_bytes")),
            "this process's memory on the card as the driver sees it, at its highest sample",
        ),
    }
    values: dict[str, Measured] = {}
    missing: dict[str, str] = {}
    for row, (value, how) in ways.items():
        if value is not None:
            values[row] = Measured(value=value, how=how)
        elif on_cpu and row == "peak_allocated_bytes":
            missing[row] = "no GPU"
        elif recorded.starts[0].source != "train":
            missing[row] = IMPORTED
        elif row == "peak_process_bytes":
            missing[row] = why_absent(recorded, "process_used_bytes")
        else:
            missing[row] = "no step has ended yet" if recorded.end is None else "not reported"
    return values, missing


def highest(values: npt.NDArray[np.float64]) -> int | None:
    """The highest of some sizes; None where there is none."""
    return int(values.max()) if len(values) else None


def peak(recorded: Recorded, name: str) -> int | None:
    """The highest of a peak over all processes, by step, rank and end lines; None if none tells."""
    told = [getattr(end, name) for end in recorded.ends]
    if name in Step.model_fields:
        told.append(highest(recorded.steps.known(name)))
    if name in Rank.model_fields:
        told.append(highest(recorded.ranks.known(name)))
    return max((value for value in told if value is not None), default=None)


def why_absent(recorded: Recorded, name: str) -> str:
    """Why a sensor's number is not in the log, as the log last said of it or of all of the card."""
    about = (name, "driver", "gpu")
    told = [e.text for e in recorded.events if e.what == "absent" and e.about in about]
    if told:
        return told[-1].partition(": ")[2].rstrip(".") or told[-1]
    if len(recorded.sensors):
        return "the driver did not give it"
    return "no sensor reading is in the log" + ("" if recorded.end else " yet")


def energy_figures(
    recorded: Recorded, spec: RunSpec, prediction: Prediction, ran_seconds: float | None
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Power, energy and cost of all processes, and why one is absent.

    Args:
        recorded: the log.
        config: whose tariff is paid.
        prediction: of which GPUs power and energy are to be.
        ran_seconds: for how long processes ran, and the rest of the machine drew power for them.
    """
    rows = ("power_watts", "energy_kwh", "cost")
    trained_here = recorded.starts[0].source == "train"
    if not trained_here and not len(recorded.sensors):
        return {}, dict.fromkeys(rows, IMPORTED)
    if len(recorded.sensors) and (why := other_cards(recorded, prediction)) is not None:
        return {}, dict.fromkeys(rows, why)
    values: dict[str, Measured] = {}
    missing = dict.fromkeys(rows, why_absent(recorded, "power_watts"))
    watts = recorded.sensors.known("power_watts")
    cards = recorded.starts[0].sensed_cards or 1
    boards = "the board" if cards == 1 else f"the {cards} boards"
    power = "the board's power" if cards == 1 else f"the power of {cards} boards together"
    if len(watts) and (why := other_numbers(recorded, prediction)) is not None:
        missing["power_watts"] = why
    elif len(watts):
        values["power_watts"] = Measured(
            value=float(watts.mean()),
            p10=quantile(watts, 0.1),
            p90=quantile(watts, 0.9),
            n=len(watts),
            how=f"mean of {power} as the driver reports it, "
            + ("one reading a second" if trained_here else "at the steps that are in the log"),
        )
    joules = total_over_processes(recorded, "energy_joules")
    if joules is not None:
        sources = {name for name in recorded.sensors.distinct("energy_source") if name is not None}
        names = {"counter": "the driver's energy counter", "integral": "power integrated over time"}
        source = " and ".join(names[name] for name in sorted(sources))
        kwh = joules / JOULES_PER_KWH
        values["energy_kwh"] = Measured(
            value=kwh,
            how=f"{source}; {boards} alone, not the machine at the wall{whose_energy(recorded)}",
        )
        if spec.cost.price_per_kwh is None:
            missing["cost"] = "cost.price_per_kwh is not given"
        elif ran_seconds is None and spec.cost.machine_watts:
            missing["cost"] = "the time, for which the rest of the machine draws, is not known"
        else:
            paid = cost_of(spec.cost, kwh, ran_seconds or 0.0)
            values["cost"] = Measured(value=paid, how=cost_formula(spec.cost))
    return values, missing


def total_over_processes(recorded: Recorded, name: str) -> float | None:
    """The sum of a count that begins at zero in each process; None where no reading has it."""
    counts = recorded.sensors.column(name)
    of_processes = np.split(counts, recorded.first_sensors[1:])
    lasts = [known[-1] for known in (c[~np.isnan(c)] for c in of_processes) if len(known)]
    return float(sum(lasts)) if lasts else None


def whose_energy(recorded: Recorded) -> str:
    """Which work the energy is of, where that is more or less than one process without a break."""
    text = ""
    if len(recorded.processes) > 1:
        text += f"; of all {len(recorded.processes)} processes"
    if recorded.lost_steps:
        text += f"; with {recorded.lost_steps:,} steps that were made again"
    ended = {process for process, line in recorded.milestones if isinstance(line, End)}
    died = sum(process not in ended for process in range(len(recorded.processes) - 1))
    if died:
        whose = "a process" if died == 1 else f"{died} processes"
        text += f"; what {whose} without an end in the log used after the last reading is not in it"
    return text


def sensed_spans(sensors: Table[Sensor]) -> npt.NDArray[np.float64]:
    """Seconds that each reading speaks of: the time since the one before it.

    One after a gap, the first of a process, and one without a time speak of one second alone.
    """
    spans = np.diff(sensors.column("elapsed_seconds"), prepend=0.0)
    spans[~((spans > 0) & (spans <= 1.5))] = 1.0
    return spans


def sensed_seconds(sensors: Table[Sensor], holds: npt.NDArray[np.bool_]) -> float:
    """For how long a condition held."""
    return float(sensed_spans(sensors)[holds].sum())


THROTTLING = ("thermal", "brake", "hardware")
"""words of the reasons that are no part of a card's ordinary work: heat, power brake, its own
slow-down. A card at its power limit works as it is meant to"""


@dataclass(frozen=True)
class MeasuredClock:
    hz: float | None
    """median of the readings without throttling; None where there is none"""
    readings: int
    """how many those are"""
    absent: str
    """why there is no clock, where there is none"""
    reasons: tuple[str, ...]
    """of the throttling, in the driver's words"""
    throttled_seconds: float
    lost_seconds: float | None
    """of throttled_seconds, estimated from the clock; None where the clock does not tell"""
    mostly_throttled: bool
    """more than half of the time, so that the median step was throttled too"""
    capped: bool
    """the power limit held the clock down at some time"""


def arithmetic_share(prediction: Prediction) -> float | None:
    """The share of the predicted step that goes with the clock; None where no step is predicted."""
    total = sum(part.value for part in prediction.step_parts)
    if not total:
        return None
    return sum(part.value for part in prediction.step_parts if part.name in ARITHMETIC) / total


def slowed(share: float, reference_hz: float, hz: float) -> float:
    """The share of the time that a lower clock cost: the part that is arithmetic goes with it.

    A step of 1 s at the reference takes 1 - share + share x reference / clock; negative where the
    clock is the higher one.
    """
    return 1 - 1 / (1 - share + share * reference_hz / hz)


def measure_clock(recorded: Recorded, share: float | None) -> MeasuredClock:
    """What the readings say of the clock; share is that of the step which goes with it."""
    sensors = recorded.sensors
    clocks, spans = sensors.column("sm_clock_hz"), sensed_spans(sensors)
    codes, words = sensors.codes("throttle")
    told = {code: words[code] or [] for code in set(codes.tolist()) if code}
    throttling = {
        code: [reason for reason in reasons if any(word in reason for word in THROTTLING)]
        for code, reasons in told.items()
    }
    held = np.isin(codes, [code for code, reasons in throttling.items() if reasons])
    free = clocks[~held & ~np.isnan(clocks)]
    hz = float(np.median(free)) if len(free) else None
    lost: float | None = 0.0
    if held.any():
        lost = None
        slow = held & (clocks > 0)
        if hz is not None and share is not None and slow.any():
            pairs = zip(spans[slow].tolist(), clocks[slow].tolist(), strict=True)
            lost = sum(span * slowed(share, hz, min(clock, hz)) for span, clock in pairs)
    throttled = float(spans[held].sum())
    return MeasuredClock(
        hz=hz,
        readings=len(free),
        absent="not in this log"
        if recorded.starts[0].source != "train"
        else why_absent(recorded, "sm_clock_hz"),
        reasons=tuple(sorted({r for reasons in throttling.values() for r in reasons})),
        throttled_seconds=throttled,
        lost_seconds=lost,
        mostly_throttled=throttled > spans.sum() / 2,
        capped=any(POWER_CAP in reasons for reasons in told.values()),
    )
