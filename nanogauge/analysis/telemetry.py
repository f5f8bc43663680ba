"""Memory, power, energy and clock figures from the sensor, rank and end lines of a log."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanogauge.analysis.ledger import Measured
from nanogauge.measure.alarms import POWER_CAP
from nanogauge.prediction.energy import BILLED, billed, billing_formula
from nanogauge.prediction.step_time import ARITHMETIC
from nanogauge.runlog.history import RunHistory, Table
from nanogauge.runspec import RunSpec
from nanogauge.schema import End, Prediction, Rank, Sensor, Step

JOULES_PER_KWH = 3.6e6
IMPORTED = "not in this log"


def sensor_mismatch(recorded: RunHistory, prediction: Prediction) -> str | None:
    """Return why the sensor readings do not cover the run's GPUs; None if they do."""
    counts = mismatched_counts(recorded)
    if prediction.hardware.kind == "cpu" or counts is None:
        return None
    sensed, ranks = counts
    return f"the sensors cover {sensed} GPU{'s' * (sensed > 1)}, and {ranks} trained"


def mismatched_counts(recorded: RunHistory) -> tuple[int, int] | None:
    """Return (GPUs with sensors, ranks) of the first process where they differ, or None."""
    for starts in recorded.processes:
        ranks, sensed = starts[0].ranks, starts[0].sensed_cards or 1
        if ranks is not None and sensed != ranks:
            return sensed, ranks
    return None


def _world_size_mismatch(recorded: RunHistory, prediction: Prediction) -> str | None:
    """Return why the measured mean power is not comparable with the prediction; None if it is."""
    counts = [starts[0].ranks for starts in recorded.processes]
    if all(n is None or n == prediction.gpus for n in counts):
        return None
    shown = ", ".join(str(n) for n in counts if n is not None)
    return f"the processes of the run trained on {shown} GPUs, not all on {prediction.gpus}"


def memory_figures(recorded: RunHistory, prediction: Prediction) -> tuple[dict[str, Measured], dict[str, str]]:
    """Return the memory peaks by row id, and the reasons for missing ones."""
    on_cpu = prediction.hardware.kind == "cpu"
    fullest = ", of the fullest rank" if len(recorded.ranks) else ""
    sources = {
        "peak_allocated_bytes": (
            run_peak(recorded, "peak_allocated_bytes"),
            f"torch's allocator, at its highest{fullest}",
        ),
        "peak_process_bytes": (
            run_peak(recorded, "peak_host_bytes"),
            f"resident memory of the process, at its highest{fullest}",
        )
        if on_cpu
        else (
            max_or_none(recorded.sensors.known("process_used_bytes")),
            "this process's memory on the card as the driver sees it, at its highest sample",
        ),
    }
    values: dict[str, Measured] = {}
    missing: dict[str, str] = {}
    for row, (value, how) in sources.items():
        if value is not None:
            values[row] = Measured(value=value, how=how)
        elif on_cpu and row == "peak_allocated_bytes":
            missing[row] = "no GPU"
        elif not recorded.starts[0].is_live:
            missing[row] = IMPORTED
        elif row == "peak_process_bytes":
            missing[row] = absence_reason(recorded, "process_used_bytes")
        else:
            missing[row] = "no step has ended yet" if recorded.end is None else "not reported"
    return values, missing


def max_or_none(values: npt.NDArray[np.float64]) -> int | None:
    return int(values.max()) if len(values) else None


def run_peak(recorded: RunHistory, name: str) -> int | None:
    """Return the highest value of a peak field in all step, rank and end lines, or None."""
    peaks = [getattr(end, name) for end in recorded.ends]
    if name in Step.model_fields:
        peaks.append(max_or_none(recorded.steps.known(name)))
    if name in Rank.model_fields:
        peaks.append(max_or_none(recorded.ranks.known(name)))
    return max((peak for peak in peaks if peak is not None), default=None)


def absence_reason(recorded: RunHistory, name: str) -> str:
    """Return the newest logged reason why a sensor field is missing."""
    about = (name, "driver", "gpu")
    reasons = [e.text for e in recorded.events if e.what == "absent" and e.about in about]
    if reasons:
        return reasons[-1].partition(": ")[2].rstrip(".") or reasons[-1]
    if len(recorded.sensors):
        return "the driver did not give it"
    return "no sensor reading is in the log" + ("" if recorded.end else " yet")


def energy_figures(
    recorded: RunHistory, spec: RunSpec, prediction: Prediction, ran_seconds: float | None
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Return power, energy, cost and CO2 of all processes by row id, and reasons for missing ones."""
    rows = ("power_watts", "energy_kwh", *BILLED)
    trained_here = recorded.starts[0].is_live
    if not trained_here and not len(recorded.sensors):
        return {}, dict.fromkeys(rows, IMPORTED)
    if len(recorded.sensors) and (why := sensor_mismatch(recorded, prediction)) is not None:
        return {}, dict.fromkeys(rows, why)
    values: dict[str, Measured] = {}
    missing = dict.fromkeys(rows, absence_reason(recorded, "power_watts"))
    watts = recorded.sensors.known("power_watts")
    gpus = recorded.starts[0].sensed_cards or 1
    if len(watts) and (why := _world_size_mismatch(recorded, prediction)) is not None:
        missing["power_watts"] = why
    elif len(watts):
        power = "the board's power" if gpus == 1 else f"the power of {gpus} boards together"
        values["power_watts"] = Measured(
            value=float(watts.mean()),
            p10=float(np.quantile(watts, 0.1)),
            p90=float(np.quantile(watts, 0.9)),
            n=len(watts),
            how=f"mean of {power} as the driver reports it, "
            + ("one reading a second" if trained_here else "at the steps that are in the log"),
        )
    joules = total_over_processes(recorded, "energy_joules")
    if joules is not None:
        names = {"counter": "the driver's energy counter", "integral": "power integrated over time"}
        used = {name for name in recorded.sensors.distinct("energy_source") if name is not None}
        source = " and ".join(names[name] for name in sorted(used))
        boards = "the board" if gpus == 1 else f"the {gpus} boards"
        kwh = joules / JOULES_PER_KWH
        values["energy_kwh"] = Measured(
            value=kwh, how=f"{source}; {boards} alone, not the machine at the wall{_energy_scope(recorded)}"
        )
        for row, rate in BILLED.items():
            if getattr(spec.cost, rate) is None:
                missing[row] = f"cost.{rate} is not given"
            elif ran_seconds is None and spec.cost.machine_watts:
                missing[row] = "the time, for which the rest of the machine draws, is not known"
            else:
                value = billed(spec.cost, row, kwh, ran_seconds or 0.0)
                values[row] = Measured(value=value, how=billing_formula(spec.cost, row))
    return values, missing


def total_over_processes(recorded: RunHistory, name: str) -> float | None:
    """Sum the last reading of a counter that restarts with each process; None without readings."""
    by_process = np.split(recorded.sensors.column(name), recorded.first_sensors[1:])
    last = [known[-1] for known in (c[~np.isnan(c)] for c in by_process) if len(known)]
    return float(sum(last)) if last else None


def _energy_scope(recorded: RunHistory) -> str:
    """Return a text on what the measured energy of a run with restarts includes and omits."""
    text = ""
    if len(recorded.processes) > 1:
        text += f"; of all {len(recorded.processes)} processes"
    if recorded.lost_steps:
        text += f"; with {recorded.lost_steps:,} repeated steps"
    ended = {process for process, line in recorded.milestones if isinstance(line, End)}
    died = sum(process not in ended for process in range(len(recorded.processes) - 1))
    if died:
        owner = "a process" if died == 1 else f"{died} processes"
        text += f"; excludes what {owner} without an end line used after the last reading"
    return text


def _reading_seconds(sensors: Table[Sensor]) -> npt.NDArray[np.float64]:
    """Return the seconds each reading covers: since the previous one, or 1 if that is unknown."""
    seconds = np.diff(sensors.column("elapsed_seconds"), prepend=0.0)
    seconds[~((seconds > 0) & (seconds <= 1.5))] = 1.0
    return seconds


def sensed_seconds(sensors: Table[Sensor], selected: npt.NDArray[np.bool_]) -> float:
    """Return the total time that the selected readings cover."""
    return float(_reading_seconds(sensors)[selected].sum())


THROTTLING = ("thermal", "brake", "hardware")
"""Words in throttle reasons that count as throttling; a power cap is normal operation."""


@dataclass(frozen=True)
class MeasuredClock:
    """SM clock and throttling of a run."""

    hz: float | None
    """Median of the readings without throttling; None without such readings."""
    readings: int
    """Number of readings behind `hz`."""
    absent: str
    """Reason for a missing clock."""
    reasons: tuple[str, ...]
    """Reasons for throttling, in the driver's words."""
    throttled_seconds: float
    lost_seconds: float | None
    """Part of throttled_seconds lost to the lower clock; None if it cannot be estimated."""
    mostly_throttled: bool
    """Throttled for more than half of the time, so that the median step was throttled too."""
    capped: bool
    """Whether the power limit lowered the clock at any time."""


def arithmetic_share(prediction: Prediction) -> float | None:
    """Return the fraction of the predicted step that scales with the SM clock; None if unknown."""
    total = sum(part.value for part in prediction.step_parts)
    if not total:
        return None
    return sum(part.value for part in prediction.step_parts if part.name in ARITHMETIC) / total


def clock_loss(share: float, reference_hz: float, hz: float) -> float:
    """Return the fraction of the time lost to an SM clock below the reference; negative if above.

    A step of 1 s at the reference takes 1 - share + share x reference / clock.
    """
    return 1 - 1 / (1 - share + share * reference_hz / hz)


def measure_clock(recorded: RunHistory, share: float | None) -> MeasuredClock:
    """Summarize SM clock and throttling; `share` is the clock-bound fraction of a step."""
    sensors = recorded.sensors
    clocks, seconds = sensors.column("sm_clock_hz"), _reading_seconds(sensors)
    codes, values = sensors.codes("throttle")
    reasons_of = {code: values[code] or [] for code in set(codes.tolist()) if code}
    throttling = {
        code: [reason for reason in reasons if any(word in reason for word in THROTTLING)]
        for code, reasons in reasons_of.items()
    }
    throttled = np.isin(codes, [code for code, reasons in throttling.items() if reasons])
    free = clocks[~throttled & ~np.isnan(clocks)]
    hz = float(np.median(free)) if len(free) else None
    lost: float | None = 0.0
    if throttled.any():
        lost = None
        slow = throttled & (clocks > 0)
        if hz is not None and share is not None and slow.any():
            pairs = zip(seconds[slow].tolist(), clocks[slow].tolist(), strict=True)
            lost = sum(span * clock_loss(share, hz, min(clock, hz)) for span, clock in pairs)
    throttled_seconds = float(seconds[throttled].sum())
    imported = not recorded.starts[0].is_live
    return MeasuredClock(
        hz=hz,
        readings=len(free),
        absent=IMPORTED if imported else absence_reason(recorded, "sm_clock_hz"),
        reasons=tuple(sorted({r for reasons in throttling.values() for r in reasons})),
        throttled_seconds=throttled_seconds,
        lost_seconds=lost,
        mostly_throttled=throttled_seconds > seconds.sum() / 2,
        capped=any(POWER_CAP in reasons for reasons in reasons_of.values()),
    )
