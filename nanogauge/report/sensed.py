"""Memory, power and energy: what the allocator, the driver and the system say of a run."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nanogauge.predict.energy import cost_formula, cost_of
from nanogauge.records import End, Prediction, Rank, Sensor, Step
from nanogauge.report.figures import Measured, quantile
from nanogauge.report.several import other_cards, other_numbers
from nanogauge.runlog import Recorded
from nanogauge.runspec import RunSpec
from nanogauge.table import Table

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
    of_processes = np.split(counts, recorded.first_readings[1:])
    lasts = [known[-1] for known in (c[~np.isnan(c)] for c in of_processes) if len(known)]
    return float(sum(lasts)) if lasts else None


def whose_energy(recorded: Recorded) -> str:
    """Which work the energy is of, where that is more or less than one process without a break."""
    text = ""
    if len(recorded.processes) > 1:
        text += f"; of all {len(recorded.processes)} processes"
    if recorded.lost_steps:
        text += f"; with {recorded.lost_steps:,} steps that were made again"
    ended = {process for process, line in recorded.story if isinstance(line, End)}
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
