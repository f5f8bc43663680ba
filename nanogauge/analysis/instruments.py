"""What the instruments saw beside the rows: each figure with how it came about, or why it did not.

These stand below the rows in every form of the report: nobody claims them and no prediction is
judged by them, but they explain the ones that are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nanogauge.analysis.ledger import steady
from nanogauge.analysis.measured import Measurements
from nanogauge.analysis.telemetry import (
    JOULES_PER_KWH,
    highest,
    other_cards,
    peak,
    rank_figures,
    sensed_seconds,
    total_over_processes,
    why_absent,
)
from nanogauge.prediction.flops import (
    flops_per_token_6n,
    flops_per_token_causal,
    flops_per_token_palm,
)
from nanogauge.quantities import GIB, format_seconds, joules_per_token, mfu
from nanogauge.runlog.history import Recorded
from nanogauge.runspec import RunSpec
from nanogauge.schema import Prediction, Stored


class Instrument(Stored):
    id: str
    quantity: str
    unit: str
    value: float | None
    """None where it was not measured; how then says why"""
    text: str
    """the value as a person reads it"""
    how: str


class _Panel:
    """Collects the figures of one run."""

    def __init__(self) -> None:
        self.shown: list[Instrument] = []

    def add(
        self, name: str, label: str, unit: str, value: float | None, text: str, how: str
    ) -> None:
        shown = text if value is not None else "not measured"
        self.shown.append(
            Instrument(id=name, quantity=label, unit=unit, value=value, text=shown, how=how)
        )


def instruments(
    recorded: Recorded, spec: RunSpec, prediction: Prediction, found: Measurements
) -> list[Instrument]:
    """Every figure that the log has beside the rows; empty for a log of another program."""
    if recorded.starts[0].source != "train":
        return []
    panel = _Panel()
    _speed(panel, recorded, spec, prediction, found.median_step_seconds)
    _parts_of_a_step(panel, recorded)
    for figure in rank_figures(recorded):
        panel.add(*figure)
    _memory(panel, recorded, prediction)
    on_a_gpu = prediction.hardware.kind != "cpu" or len(recorded.sensors.known("power_watts")) > 0
    if on_a_gpu:
        _energy(panel, recorded, spec, prediction, found)
        _board(panel, recorded)
    return panel.shown


def _speed(
    panel: _Panel, recorded: Recorded, spec: RunSpec, prediction: Prediction, median: float | None
) -> None:
    if median is None:
        return
    shape = spec.shape
    per_step = spec.tokens_per_step
    peak_flops, boost_hz = prediction.peak_flops, prediction.hardware.boost_clock_hz
    clocks = recorded.sensors.known("sm_clock_hz")
    for name, label, per_token in (
        ("palm", "6N + 12LCT", float(flops_per_token_palm(shape))),
        ("6n", "6N", float(flops_per_token_6n(shape))),
        ("causal", "6N + 6LCT, causal", flops_per_token_causal(shape)),
    ):
        flops = per_token * per_step
        panel.add(
            f"achieved_flops_{name}",
            f"Achieved ({label})",
            "FLOP/s",
            flops / median,
            f"{flops / median / 1e12:.3g} TFLOP/s",
            f"{per_token / 1e6:.4g} MFLOP per token x {per_step:,} tokens / median step",
        )
        if peak_flops is None:
            continue
        if name == "causal":
            share = mfu(flops, median, peak_flops)
            panel.add(
                "mfu_causal",
                f"MFU ({label})",
                "1",
                share,
                f"{100 * share:.3g} %",
                f"of {peak_flops / 1e12:.3g} TFLOP/s; {prediction.hardware.peak_name}",
            )
        if len(clocks) and boost_hz is not None:
            clock_hz = float(np.median(clocks))
            at_clock = peak_flops * clock_hz / boost_hz
            share = mfu(flops, median, at_clock)
            panel.add(
                f"mfu_{name}_at_clock",
                f"MFU at the measured clock ({label})",
                "1",
                share,
                f"{100 * share:.3g} %",
                f"of {at_clock / 1e12:.3g} TFLOP/s at the median SM clock of "
                f"{clock_hz / 1e9:.3f} GHz instead of {boost_hz / 1e9:.3f}",
            )


def _parts_of_a_step(panel: _Panel, recorded: Recorded) -> None:
    steps, wanted = recorded.steps, steady(recorded)
    spans = steps.column("step_seconds")
    for name in ("forward", "backward", "optimizer"):
        split = wanted & ~np.isnan(steps.column(f"{name}_seconds"))
        if not split.any():
            continue
        seconds = steps.column(f"{name}_seconds")[split]
        share = float(seconds.sum() / spans[split].sum())
        middle = float(np.median(seconds))
        panel.add(
            f"{name}_seconds",
            f"{name.capitalize()} of a step",
            "s",
            middle,
            f"{format_seconds(middle)} ({100 * share:.0f} %)",
            f"median of {len(seconds):,} steps that timed their parts",
        )
    waits = steps.column("data_wait_seconds")
    waited = wanted & ~np.isnan(waits)
    if waited.any():
        share = float(waits[waited].sum() / spans[waited].sum())
        panel.add(
            "data_wait_share",
            "Waiting for data, of a step",
            "1",
            share,
            f"{100 * share:.2g} %",
            "how long the device waited for its batches, their copy included",
        )
    again = [c for c in recorded.compiles if c.step is not None]
    seconds_again = sum(c.seconds for c in again)
    panel.add(
        "recompilations",
        "Compilations in the middle of the run",
        "1",
        len(again),
        f"{len(again)}" + (f", {format_seconds(seconds_again)}" if again else ""),
        "counted by the compiler's own announcements",
    )


def _memory(panel: _Panel, recorded: Recorded, prediction: Prediction) -> None:
    def size(name: str, label: str, value: float | None, how: str) -> None:
        text = "" if value is None else f"{value / GIB:.2f} GiB"
        panel.add(name, label, "B", value, text, how)

    if prediction.hardware.kind != "cpu":
        reserved = peak(recorded, "peak_reserved_bytes")
        size("peak_reserved_bytes", "VRAM, peak reserved", reserved, "torch's allocator")
        inactive = peak(recorded, "peak_inactive_bytes")
        size(
            "peak_inactive_bytes",
            "VRAM lost to fragmentation, peak",
            inactive,
            "reserved and free, in pieces of blocks that are in use"
            if inactive is not None
            else "it stands in the end line alone",
        )
        retries = peak(recorded, "allocation_retries")
        panel.add(
            "allocation_retries",
            "Allocation retries",
            "1",
            retries,
            f"{retries}",
            "how often the allocator gave back what it kept and tried again"
            if retries is not None
            else "it stands in the end line alone",
        )
    used = highest(recorded.sensors.known("device_used_bytes"))
    several = bool(len(recorded.sensors.known("fullest_card")))
    if used is not None or prediction.hardware.kind != "cpu":
        size(
            "peak_device_bytes",
            "VRAM in use, whole card, peak" + (", of the fullest" if several else ""),
            used,
            "as the driver sees it, other programs included"
            if used is not None
            else why_absent(recorded, "device_used_bytes"),
        )
    others = recorded.starts[-1].other_programs
    if others:
        named = ", ".join(f"{name} {held / GIB:.2f} GiB" for name, held in others.items())
        size(
            "other_programs_bytes",
            "VRAM of other programs, at the start",
            sum(others.values()),
            named,
        )
    size(
        "peak_host_bytes",
        "Memory of the process on the host, peak",
        peak(recorded, "peak_host_bytes"),
        "resident memory, as the operating system counts it",
    )


def _energy(
    panel: _Panel,
    recorded: Recorded,
    spec: RunSpec,
    prediction: Prediction,
    found: Measurements,
) -> None:
    sensors = recorded.sensors

    def kwh(name: str, label: str, joules: float | None, how: str) -> float | None:
        value = None if joules is None else joules / JOULES_PER_KWH
        text = "" if value is None else f"{value:.4g} kWh"
        panel.add(name, label, "kWh", value, text, how)
        return value

    absent = why_absent(recorded, "power_watts")
    cards = recorded.starts[0].sensed_cards or 1
    boards = "the board" if cards == 1 else f"{cards} boards"
    counted = None
    if "integral" not in sensors.distinct("energy_source"):
        counted = total_over_processes(recorded, "energy_joules")
    integral = total_over_processes(recorded, "integral_joules")
    gaps = total_over_processes(recorded, "gap_seconds") or 0.0
    kwh(
        "energy_counter_kwh",
        "Energy by the driver's counter",
        counted,
        why_absent(recorded, "energy_counter") if counted is None else f"{boards} alone",
    )
    how = absent
    if integral is not None:
        how = f"samples of power added up; {gaps:.1f} s without samples are left out"
        if counted:
            how += f"; {100 * (integral / counted - 1):+.2g} % against the counter"
    kwh("energy_integral_kwh", "Energy by integration", integral, how)
    joules = counted if counted is not None else integral
    idle = [(s.idle_power_watts, s.idle_utilization) for s in recorded.starts]
    watts = idle[-1][0]
    busy = (idle[-1][1] or 0.0) > 0.05
    panel.add(
        "idle_power_watts",
        "Power of the idle board",
        "W",
        watts,
        f"{watts:.3g} W" if watts is not None else "",
        f"just before the run; another program kept it {100 * (idle[-1][1] or 0):.0f} % busy, so "
        "it was not idle"
        if busy
        else ("mean just before the run" if watts is not None else absent),
    )
    if joules is not None and watts is not None:
        seconds = total_over_processes(recorded, "elapsed_seconds") or 0.0
        kwh(
            "energy_marginal_kwh",
            "Energy beyond idling",
            joules - watts * seconds,
            f"energy less {watts:.3g} W of an idle board for as long",
        )
    tokens = found.steps_done * spec.tokens_per_step
    if joules is not None and tokens and other_cards(recorded, prediction) is None:
        per_token = joules_per_token(joules, tokens)
        how = f"energy of {boards} / {tokens:,} tokens, evaluation and compilation included"
        if recorded.lost_steps:
            how += ", and the steps that were made again"
        panel.add("joules_per_token", "Energy per token", "J", per_token, f"{per_token:.3g} J", how)
        per_million = per_token * 1e6 / 3600
        panel.add(
            "wh_per_million_tokens",
            "Energy per million tokens",
            "Wh",
            per_million,
            f"{per_million:.3g} Wh",
            how,
        )


def _board(panel: _Panel, recorded: Recorded) -> None:
    worst = {"sm_clock_hz": "slowest_card", "temperature_celsius": "hottest_card"}

    def spread(name: str, field: str, label: str, unit: str, show: Callable[[float], str]) -> None:
        values = recorded.sensors.known(field)
        if not len(values):
            panel.add(name, label, unit, None, "", why_absent(recorded, field))
            return
        middle = float(np.median(values))
        how = (
            f"median of {len(values):,} readings; {show(float(values.min()))} to "
            f"{show(float(values.max()))}"
        )
        cards = recorded.sensors.known(worst[field]) if field in worst else np.empty(0)
        if len(cards):
            which, counts = np.unique(cards.astype(int), return_counts=True)
            often, share = which[counts.argmax()], counts.max() / len(cards)
            kind = worst[field].removesuffix("_card")
            how += f"; of the {kind} card, {100 * share:.0f} % of the time that of rank {often}"
        panel.add(name, label, unit, middle, show(middle), how)

    spread("sm_clock_hz", "sm_clock_hz", "SM clock", "Hz", lambda v: f"{v / 1e9:.3f} GHz")
    spread(
        "memory_clock_hz", "memory_clock_hz", "Memory clock", "Hz", lambda v: f"{v / 1e9:.3f} GHz"
    )
    spread(
        "temperature_celsius", "temperature_celsius", "Temperature", "°C", lambda v: f"{v:.0f} °C"
    )
    spread("fan", "fan", "Fan", "1", lambda v: f"{100 * v:.0f} %")
    spread("utilization", "utilization", "Utilisation", "1", lambda v: f"{100 * v:.0f} %")
    spread("power_limit_watts", "power_limit_watts", "Power limit", "W", lambda v: f"{v:.0f} W")
    spread("pcie_generation", "pcie_generation", "PCIe generation", "1", lambda v: f"{v:.0f}")
    spread("pcie_width", "pcie_width", "PCIe lanes", "1", lambda v: f"x{v:.0f}")
    codes, words = recorded.sensors.codes("throttle")
    told = [words[code] for code in set(codes.tolist()) if words[code] is not None]
    if not told:
        panel.add("throttled_seconds", "Throttled", "s", None, "", why_absent(recorded, "throttle"))
        return

    def throttled(by: str | None) -> float:
        """Seconds in which the clock was held down by this reason, or by any."""
        wanted = [i for i, w in enumerate(words) if w and (by is None or by in w)]
        return sensed_seconds(recorded.sensors, np.isin(codes, wanted))

    reasons = sorted({reason for reasons in told for reason in reasons})
    seconds = throttled(None)
    how = ", ".join(f"{reason} {format_seconds(throttled(reason))}" for reason in reasons)
    panel.add(
        "throttled_seconds",
        "Throttled",
        "s",
        seconds,
        format_seconds(seconds),
        how or f"in none of {int((codes > 0).sum()):,} readings",
    )
