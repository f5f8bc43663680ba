"""Additional measured values of the report: speed, step parts, memory, energy, GPU sensors."""

from collections.abc import Callable

import numpy as np

from nanogauge.analysis.ledger import steady_steps
from nanogauge.analysis.measured import Measurements
from nanogauge.analysis.telemetry import (
    JOULES_PER_KWH,
    absence_reason,
    max_or_none,
    run_peak,
    sensed_seconds,
    sensor_mismatch,
    total_over_processes,
)
from nanogauge.prediction.flops import flops_per_token_palm
from nanogauge.quantities import format_seconds
from nanogauge.runlog.history import RunHistory
from nanogauge.runspec import RunSpec
from nanogauge.schema import Prediction, Stored


class Instrument(Stored):
    """A measured value shown in the report that no claim or prediction is compared with."""

    id: str
    quantity: str
    unit: str
    value: float | None
    """Measured value; None if it was not measured, with the reason in `how`."""
    text: str
    """Formatted value."""
    how: str


class _Panel:
    """Builder of the list of instruments."""

    def __init__(self) -> None:
        self.shown: list[Instrument] = []

    def add(self, name: str, label: str, unit: str, value: float | None, text: str, how: str) -> None:
        text = text if value is not None else "not measured"
        self.shown.append(Instrument(id=name, quantity=label, unit=unit, value=value, text=text, how=how))

    def add_bytes(self, name: str, label: str, value: float | None, how: str) -> None:
        self.add(name, label, "B", value, f"{(value or 0) / 1e9:.2f} GB", how)

    def add_kwh(self, name: str, label: str, joules: float | None, how: str) -> None:
        value = None if joules is None else joules / JOULES_PER_KWH
        self.add(name, label, "kWh", value, f"{value or 0:.4g} kWh", how)


def instruments(
    recorded: RunHistory, spec: RunSpec, prediction: Prediction, measurements: Measurements
) -> list[Instrument]:
    """Return the additional measured values of a train.py run; empty for an imported log."""
    if not recorded.starts[0].is_live:
        return []
    panel = _Panel()
    if measurements.median_step_seconds is not None and "mfu_palm" not in spec.absent_rows():
        _add_speed(panel, spec, measurements.median_step_seconds)
    _add_step_parts(panel, recorded)
    _add_ranks(panel, recorded)
    _add_memory(panel, recorded, prediction)
    if prediction.hardware.kind != "cpu" or len(recorded.sensors.known("power_watts")):
        tokens = measurements.steps_done * spec.tokens_per_step
        comparable = sensor_mismatch(recorded, prediction) is None and spec.traced is None
        _add_energy(panel, recorded, tokens if comparable else 0)
        _add_board(panel, recorded)
        _add_throttling(panel, recorded)
    return panel.shown


def _add_speed(panel: _Panel, spec: RunSpec, median: float) -> None:
    shape, tokens = spec.shape, spec.tokens_per_step
    per_token = flops_per_token_palm(shape)
    achieved = per_token * tokens / median
    how = f"{per_token / 1e6:.4g} MFLOP per token (6N + 12LCT) x {tokens:,} tokens / median step"
    panel.add("achieved_flops_palm", "Achieved", "FLOP/s", achieved, f"{achieved / 1e12:.3g} TFLOP/s", how)


def _add_step_parts(panel: _Panel, recorded: RunHistory) -> None:
    steps, steady = recorded.steps, steady_steps(recorded)
    durations = steps.column("step_seconds")
    for name in ("forward", "backward", "optimizer"):
        split = steady & ~np.isnan(steps.column(f"{name}_seconds"))
        if not split.any():
            continue
        seconds = steps.column(f"{name}_seconds")[split]
        share = float(seconds.sum() / durations[split].sum())
        median = float(np.median(seconds))
        text = f"{format_seconds(median)} ({_percent(share)})"
        how = f"median of {len(seconds):,} steps that timed their parts"
        panel.add(f"{name}_seconds", f"{name.capitalize()} of a step", "s", median, text, how)
    waits = steps.column("data_wait_seconds")
    waited = steady & ~np.isnan(waits)
    if waited.any():
        share = float(waits[waited].sum() / durations[waited].sum())
        text, how = f"{100 * share:.2g} %", "wait of the device for its batches and their copy"
        panel.add("data_wait_share", "Waiting for data, of a step", "1", share, text, how)
    if not recorded.starts[0].logs_all:
        return
    recompiled = [c.seconds for c in recorded.compiles if c.step is not None]
    count, took = len(recompiled), f", {format_seconds(sum(recompiled))}" if recompiled else ""
    how = "as the compiler reports them"
    panel.add("recompilations", "Recompilations", "1", count, f"{count}{took}", how)


def _add_ranks(panel: _Panel, recorded: RunHistory) -> None:
    """Add the median of the worst rank for each field of the per-rank log lines.

    The first step of each process warms up and is excluded if there are others.
    """
    ranks, steps = recorded.ranks.column("rank"), recorded.ranks.column("step")
    for name, label in (
        ("step_seconds", "Step of the slowest rank"),
        ("forward_seconds", "Forward passes of the slowest rank, without waiting for others"),
        ("data_wait_seconds", "Waiting for data, of the rank that waits longest"),
        ("peak_allocated_bytes", "VRAM, peak of tensors, of the fullest rank"),
        ("peak_host_bytes", "Memory on the host, peak, of the fullest rank"),
    ):
        values = recorded.ranks.column(name)
        selected = ~np.isnan(values)
        warm = selected & ~np.isin(steps, [start.first_step for start in recorded.starts])
        if warm.any():
            selected = warm
        by_rank = {int(rank): values[selected & (ranks == rank)] for rank in set(ranks[selected])}
        medians = {rank: float(np.median(of_rank)) for rank, of_rank in by_rank.items()}
        if not any(medians.values()):
            continue
        worst = max(medians, key=lambda rank: medians[rank])
        value, count = medians[worst], min(len(of_rank) for of_rank in by_rank.values())
        unit = "B" if name.endswith("bytes") else "s"
        size = f"{value / 1e9:.2f} GB" if unit == "B" else format_seconds(value)
        spread = 100 * (value - min(medians.values())) / value
        text = f"{size}, rank {worst}; the least is {spread:.2g} % lower"
        how = f"medians of {count:,} step{'s' * (count > 1)} of each rank"
        panel.add(f"rank_{name}", label, unit, value, text, how)


def _add_memory(panel: _Panel, recorded: RunHistory, prediction: Prediction) -> None:
    if prediction.hardware.kind != "cpu":
        reserved = run_peak(recorded, "peak_reserved_bytes")
        panel.add_bytes("peak_reserved_bytes", "VRAM, peak reserved", reserved, "torch's allocator")
    used = max_or_none(recorded.sensors.known("device_used_bytes"))
    if used is not None or prediction.hardware.kind != "cpu":
        fullest = ", of the fullest" * bool(len(recorded.sensors.known("fullest_card")))
        how = "as the driver sees it, other programs included"
        how = how if used is not None else absence_reason(recorded, "device_used_bytes")
        label = f"VRAM in use, whole card, peak{fullest}"
        panel.add_bytes("peak_device_bytes", label, used, how)
    if others := recorded.starts[-1].other_programs:
        programs = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in others.items())
        label = "VRAM of other programs, at the start"
        panel.add_bytes("other_programs_bytes", label, sum(others.values()), programs)
    label, how = "Memory of the process on the host, peak", "resident memory of the process"
    panel.add_bytes("peak_host_bytes", label, run_peak(recorded, "peak_host_bytes"), how)
    if (seconds := run_peak(recorded, "cpu_seconds")) is not None:
        text, how = format_seconds(seconds), "of the program and its children, all threads together"
        panel.add("cpu_seconds", "Processor time", "s", seconds, text, how)


def _add_energy(panel: _Panel, recorded: RunHistory, tokens: int) -> None:
    """Add energy figures; those per token only if `tokens` is not 0."""
    absent = absence_reason(recorded, "power_watts")
    cards = recorded.starts[0].sensed_cards or 1
    boards = "the board" if cards == 1 else f"{cards} boards"
    counted = None
    if "integral" not in recorded.sensors.distinct("energy_source"):
        counted = total_over_processes(recorded, "energy_joules")
    integral = total_over_processes(recorded, "integral_joules")
    how = absence_reason(recorded, "energy_counter") if counted is None else f"{boards} alone"
    panel.add_kwh("energy_counter_kwh", "Energy by the driver's counter", counted, how)
    how = absent
    if integral is not None:
        gaps = total_over_processes(recorded, "gap_seconds") or 0.0
        how = f"sampled power, integrated over time; {gaps:.1f} s without samples are left out"
        if counted:
            how += f"; {100 * (integral / counted - 1):+.2g} % against the counter"
    panel.add_kwh("energy_integral_kwh", "Energy by integration", integral, how)
    joules = counted if counted is not None else integral
    start = recorded.starts[-1]
    watts, busy = start.idle_power_watts, start.idle_utilization or 0.0
    how = absent if watts is None else "mean just before the run"
    if busy > 0.05:
        how += f"; another program kept it {100 * busy:.0f} % busy, so it was not idle"
    text = f"{watts:.3g} W" if watts is not None else ""
    panel.add("idle_power_watts", "Power of the idle board", "W", watts, text, how)
    if joules is not None and tokens:
        per_token = joules / tokens
        how = f"energy of {boards} / {tokens:,} tokens, evaluation and compilation included"
        if recorded.lost_steps:
            how += ", and repeated steps"
        panel.add("joules_per_token", "Energy per token", "J", per_token, f"{per_token:.3g} J", how)


def _gigahertz(hz: float) -> str:
    return f"{hz / 1e9:.3f} GHz"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


_BOARD: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("sm_clock_hz", "SM clock", "Hz", _gigahertz),
    ("memory_clock_hz", "Memory clock", "Hz", _gigahertz),
    ("temperature_celsius", "Temperature", "°C", "{:.0f} °C".format),
    ("fan", "Fan", "1", _percent),
    ("utilization", "Utilisation", "1", _percent),
    ("power_limit_watts", "Power limit", "W", "{:.0f} W".format),
)


def _add_board(panel: _Panel, recorded: RunHistory) -> None:
    """Add the median and range of each GPU sensor field."""
    for field, label, unit, show in _BOARD:
        values = recorded.sensors.known(field)
        if not len(values):
            panel.add(field, label, unit, None, "", absence_reason(recorded, field))
            continue
        median, low, high = (float(f(values)) for f in (np.median, np.min, np.max))
        how = f"median of {len(values):,} readings; {show(low)} to {show(high)}"
        panel.add(field, label, unit, median, show(median), how)


def _add_throttling(panel: _Panel, recorded: RunHistory) -> None:
    codes, values = recorded.sensors.codes("throttle")
    logged = [values[code] for code in set(codes.tolist()) if values[code] is not None]
    absent = None if logged else absence_reason(recorded, "throttle")

    def seconds_of(reason: str | None) -> float:
        """Return the seconds throttled for `reason`, or for any reason if it is None."""
        matching = [i for i, v in enumerate(values) if v and (reason is None or reason in v)]
        return sensed_seconds(recorded.sensors, np.isin(codes, matching))

    reasons = sorted({reason for found in logged for reason in found})
    how = ", ".join(f"{reason} {format_seconds(seconds_of(reason))}" for reason in reasons)
    how = absent or how or f"in none of {int((codes > 0).sum()):,} readings"
    seconds = None if absent else seconds_of(None)
    panel.add("throttled_seconds", "Throttled", "s", seconds, format_seconds(seconds or 0.0), how)
