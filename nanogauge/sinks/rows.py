"""From lines of the run log to what W&B shows: rows of history, the summary, the verdict table.

Every row carries three axes: `step`, `tokens` (trained on so far) and `hours` (over all processes
of the run). A prediction stands beside what was measured of it, in the same row and under the same
last name: perf/step_seconds and predicted/step_seconds, _low, _high. That of a quantity of the
whole run, such as its energy, is where the measured one should come to in the end.

Every reading of the sensors is a row of its own: averaged into the steps it would lose its peaks.
Of the steps, every log_every-th is a row, and each that was measured in more detail.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nanogauge.prediction.flops import MFU_CONVENTIONS
from nanogauge.quantities import (
    format_range,
    format_value,
    joules_per_token,
    mfu,
    tokens_per_second,
)
from nanogauge.runspec import RunSpec
from nanogauge.schema import (
    Checkpoint,
    Compile,
    End,
    Eval,
    LogLine,
    Prediction,
    Sensor,
    Start,
    Step,
)

AXES = ("step", "tokens", "hours")

STEP_KEYS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "step_seconds": "perf/step_seconds",
    "printed_seconds": "perf/printed_seconds",
    "data_wait_seconds": "perf/data_wait_seconds",
    "forward_seconds": "perf/forward_seconds",
    "backward_seconds": "perf/backward_seconds",
    "optimizer_seconds": "perf/optimizer_seconds",
    "power_watts": "gpu/step_power_watts",
    "power_min_watts": "gpu/step_power_min_watts",
    "power_max_watts": "gpu/step_power_max_watts",
    "peak_allocated_bytes": "memory/peak_allocated_bytes",
    "peak_reserved_bytes": "memory/peak_reserved_bytes",
    "peak_host_bytes": "memory/peak_host_bytes",
}
EVAL_KEYS = {
    "train_loss": "eval/train_loss",
    "val_loss": "eval/val_loss",
    "val_bits_per_byte": "eval/val_bits_per_byte",
    "seconds": "eval/seconds",
}
CHECKPOINT_KEYS = {
    "seconds": "checkpoint/seconds",
    "write_seconds": "checkpoint/write_seconds",
    "bytes": "checkpoint/bytes",
}
COMPILE_KEYS = {"seconds": "perf/compile_seconds"}
SENSOR_KEYS = {
    "power_watts": "gpu/power_watts",
    "power_min_watts": "gpu/power_min_watts",
    "power_max_watts": "gpu/power_max_watts",
    "energy_joules": "gpu/energy_joules",
    "integral_joules": "gpu/integral_joules",
    "gap_seconds": "gpu/gap_seconds",
    "power_limit_watts": "gpu/power_limit_watts",
    "temperature_celsius": "gpu/temperature_celsius",
    "fan": "gpu/fan",
    "sm_clock_hz": "gpu/sm_clock_hz",
    "memory_clock_hz": "gpu/memory_clock_hz",
    "utilization": "gpu/utilization",
    "pcie_generation": "gpu/pcie_generation",
    "pcie_width": "gpu/pcie_width",
    "device_used_bytes": "memory/device_used_bytes",
    "process_used_bytes": "memory/process_used_bytes",
    "hottest_card": "gpu/hottest_card",
    "fullest_card": "gpu/fullest_card",
    "slowest_card": "gpu/slowest_card",
}
START_KEYS = {
    "device": "run/device",
    "train_tokens": "data/train_tokens",
    "idle_power_watts": "gpu/idle_power_watts",
    "idle_utilization": "gpu/idle_utilization",
    "sensed_cards": "gpu/sensed_cards",
}
END_KEYS = {
    "status": "run/status",
    "reason": "run/reason",
    "steps": "run/steps",
    "wall_seconds": "run/wall_seconds",
    "peak_allocated_bytes": "memory/peak_allocated_bytes",
    "peak_reserved_bytes": "memory/peak_reserved_bytes",
    "peak_process_bytes": "memory/peak_process_bytes",
    "peak_host_bytes": "memory/peak_host_bytes",
    "peak_inactive_bytes": "memory/peak_inactive_bytes",
    "allocation_retries": "memory/allocation_retries",
}
PREDICTED_KEYS = {
    "perf/step_seconds": "step_seconds",
    "perf/mfu_palm": "mfu_palm",
    "perf/mfu_6n": "mfu_6n",
    "gpu/power_watts": "power_watts",
    "gpu/energy_kwh": "energy_kwh",
    "memory/peak_allocated_bytes": "peak_allocated_bytes",
    "memory/peak_process_bytes": "peak_process_bytes",
    "eval/val_loss": "val_loss",
}
"""measured key -> row id of its prediction"""

VERDICT_COLUMNS = (
    "quantity",
    "claimed",
    "predicted",
    "calibrated",
    "measured",
    "verdict",
    "factor",
    "why",
)


class Rows:
    """Turns the lines of a log, from its first one on, into rows."""

    def __init__(self, spec: RunSpec, prediction: Prediction, log_every: int) -> None:
        self._spec = spec
        self._prediction = prediction
        self._log_every = log_every
        shape, tokens = spec.shape, spec.tokens_per_step
        self._flops = {row: per_token(shape) * tokens for row, per_token in MFU_CONVENTIONS.items()}
        self._step = 0
        self._tokens = 0
        self._seconds_before = 0.0
        """of the processes before this one"""
        self._seconds = 0.0
        self._joules_before = 0.0
        self._joules = 0.0
        self._peak_process_bytes: int | None = None
        self._throttle_keys: set[str] = set()
        self._all_sensed = True

    def row(self, line: LogLine) -> dict[str, float]:
        """The row that a line makes; empty if it makes none."""
        measured: dict[str, float | None]
        if isinstance(line, Start):
            self._resume(line)
        if line.elapsed_seconds is not None:
            self._seconds = line.elapsed_seconds
        at_step: int | None = None
        match line:
            case Step():
                self._step = line.step
                self._tokens = (line.step + 1) * self._spec.tokens_per_step
                detailed = line.forward_seconds is not None or line.peak_host_bytes is not None
                if line.step % self._log_every != 0 and not detailed:
                    return {}
                measured = self._of_step(line)
            case Sensor():
                measured = self._of_sensor(line)
            case Eval():
                at_step, measured = line.step, _renamed(line, EVAL_KEYS)
            case Checkpoint():
                at_step, measured = line.step, _renamed(line, CHECKPOINT_KEYS)
            case Compile():
                measured = _renamed(line, COMPILE_KEYS)
            case _:
                return {}
        row = {key: value for key, value in measured.items() if value is not None}
        for key, row_id in PREDICTED_KEYS.items():
            if key == "gpu/power_watts" and not self._all_sensed:
                continue  # of some of the cards that are predicted
            if key in row and (estimate := self._prediction.best(row_id)) is not None:
                row[f"predicted/{row_id}"] = estimate.expected
                row[f"predicted/{row_id}_low"] = estimate.low
                row[f"predicted/{row_id}_high"] = estimate.high
        return row | self._axes(at_step, line.elapsed_seconds)

    def _resume(self, line: Start) -> None:
        if not line.continues:
            self._seconds_before += self._seconds
            self._seconds = 0.0
            self._joules_before += self._joules
            self._joules = 0.0
            cards = line.sensed_cards or 1
            self._all_sensed = line.ranks is None or cards == line.ranks
        self._step = line.first_step
        self._tokens = line.first_step * self._spec.tokens_per_step

    def _axes(self, updates: int | None, elapsed_seconds: float | None) -> dict[str, float]:
        """Where a row stands: after so many updates, else at the last step seen."""
        step, tokens = self._step, self._tokens
        if updates is not None:
            step, tokens = updates, updates * self._spec.tokens_per_step
        axes: dict[str, float] = {"step": step, "tokens": tokens}
        if elapsed_seconds is not None:
            axes["hours"] = (self._seconds_before + elapsed_seconds) / 3600
        return axes

    def _of_step(self, line: Step) -> dict[str, float | None]:
        row = _renamed(line, STEP_KEYS)
        if self._prediction.hardware.kind == "cpu":
            row["memory/peak_process_bytes"] = line.peak_host_bytes
        seconds = line.step_seconds
        if seconds is None:
            return row
        tokens = line.tokens or self._spec.tokens_per_step
        row["perf/tokens_per_second"] = tokens_per_second(tokens, seconds)
        row["perf/achieved_flops_per_second"] = self._flops["mfu_palm"] / seconds
        peak = self._prediction.peak_flops
        for key, flops in self._flops.items():
            # As in the report: above the peak it is the peak that is wrong, and no share of it.
            if peak is not None and (share := mfu(flops, seconds, peak)) <= 1:
                row[f"perf/{key}"] = share
        if line.power_watts is not None and self._all_sensed:
            row["perf/joules_per_token"] = joules_per_token(line.power_watts * seconds, tokens)
        return row

    def _of_sensor(self, line: Sensor) -> dict[str, float | None]:
        row = _renamed(line, SENSOR_KEYS)
        if line.energy_joules is not None:
            self._joules = line.energy_joules
            row["gpu/energy_from_counter"] = int(line.energy_source == "counter")
            row["gpu/energy_kwh"] = (self._joules_before + self._joules) / 3.6e6
        if line.process_used_bytes is not None:
            highest = max(self._peak_process_bytes or 0, line.process_used_bytes)
            row["memory/peak_process_bytes"] = self._peak_process_bytes = highest
        if line.throttle is not None:
            row["gpu/throttled"] = int(bool(line.throttle))
            now = {f"gpu/throttle_{_slug(reason)}" for reason in line.throttle}
            self._throttle_keys |= now
            row |= {key: int(key in now) for key in self._throttle_keys}
        return row


def summary_of(line: LogLine) -> dict[str, Any]:
    """What a line adds to the summary of the run."""
    match line:
        case Start():
            held = line.other_programs
            added = None if held is None else sum(held.values())
            found = {**_renamed(line, START_KEYS), "memory/other_programs_bytes": added}
            found["run/status"] = "running"
        case Compile():
            found = {"run/mode": line.mode}
        case End():
            found = _renamed(line, END_KEYS)
        case _:
            found = {}
    return {key: value for key, value in found.items() if value is not None}


def final_summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """The final figures of report.json: what was measured, and how often who was right."""
    run = report["run"]
    final: dict[str, Any] = {
        "final/headline": run["headline"],
        "final/predictions_held": run["predictions_held"],
        "final/predictions_judged": run["predictions_judged"],
    }
    for verdict, count in run["verdicts"].items():
        final[f"final/claims_{_slug(verdict)}"] = count
    for row in report["rows"]:
        if row["measured"] is not None:
            final[f"final/{row['id']}"] = row["measured"]["value"]
    return final


def verdict_rows(report: Mapping[str, Any]) -> list[list[Any]]:
    """The rows of report.json under VERDICT_COLUMNS, as a person reads them."""

    def interval(row: Mapping[str, Any], name: str) -> str:
        found = row[name]
        if found is None:
            return ""
        return format_range(row["id"], found["low"], found["high"], _currency(row))

    return [
        [
            row["quantity"],
            row["claimed"]["text"] if row["claimed"] is not None else "",
            interval(row, "analytic"),
            interval(row, "calibrated"),
            format_value(row["id"], row["measured"]["value"], _currency(row))
            if row["measured"] is not None
            else "",
            row["verdict"],
            row["factor"],
            row["why"],
        ]
        for row in report["rows"]
    ]


def _currency(row: Mapping[str, Any]) -> str:
    return str(row["unit"]) if row["id"] == "cost" else ""


def _renamed(line: LogLine, keys: Mapping[str, str]) -> dict[str, Any]:
    return {key: getattr(line, name) for name, key in keys.items()}


def _slug(words: str) -> str:
    """Words as part of a key."""
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")
