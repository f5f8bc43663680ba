"""Conversion of run log lines to the history rows, summary and verdict table of a dashboard.

Every row has three axes: `step`, `tokens` (trained on so far) and `hours` (over all processes of the run). A prediction
is in the row of its measurement, under the same last name: perf/step_seconds and predicted/step_seconds, _low, _high.

Every sensor reading is a row of its own, because a mean over a step would hide its peaks. A step is a row if it is a
multiple of log_every or has detailed measurements.
"""

import re
from collections.abc import Mapping
from typing import Any

from nanogauge.files import scrubbed
from nanogauge.prediction.flops import MFU_CONVENTIONS
from nanogauge.quantities import format_range, format_value, mfu
from nanogauge.runspec import RunSpec
from nanogauge.schema import Checkpoint, Compile, End, Eval, LogLine, Prediction, Sensor, Start, Step

AXES = ("step", "tokens", "hours")
HistoryRow = dict[str, float]
"""Key -> value at one time, with its step."""


def _keys(namespace: str, *fields: str) -> dict[str, str]:
    return {name: f"{namespace}/{name}" for name in fields}


_POWER = ("power_watts", "power_min_watts", "power_max_watts")
_PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_host_bytes")
_STEP_PARTS = ("forward_seconds", "backward_seconds", "optimizer_seconds")

# Field of a log line -> key of the history.
STEP_KEYS = {
    **_keys("train", "loss", "learning_rate", "grad_norm"),
    **_keys("perf", "step_seconds", "printed_seconds", "data_wait_seconds", *_STEP_PARTS),
    **{name: f"gpu/step_{name}" for name in _POWER},
    **_keys("memory", *_PEAKS),
}
EVAL_KEYS = {
    **_keys("eval", "train_loss", "val_loss", "val_bits_per_byte", "seconds"),
    **{name: f"eval/forecast_{name}" for name in ("final", "final_low", "final_high")},
}
CHECKPOINT_KEYS = _keys("checkpoint", "seconds", "write_seconds", "bytes")
COMPILE_KEYS = {"seconds": "perf/compile_seconds"}
SENSOR_KEYS = {
    **_keys("gpu", *_POWER, "power_limit_watts", "energy_joules", "integral_joules", "gap_seconds"),
    **_keys("gpu", "temperature_celsius", "fan", "sm_clock_hz", "memory_clock_hz", "utilization"),
    **_keys("gpu", "pcie_generation", "pcie_width", "hottest_card", "fullest_card", "slowest_card"),
    **_keys("memory", "device_used_bytes", "process_used_bytes"),
}
START_KEYS = {
    "device": "run/device",
    "train_tokens": "data/train_tokens",
    **_keys("gpu", "idle_power_watts", "idle_utilization", "sensed_cards"),
}
END_KEYS = {
    **_keys("run", "status", "reason", "steps", "wall_seconds", "cpu_seconds", "others_processor_share"),
    **_keys("memory", *_PEAKS, "peak_process_bytes", "peak_inactive_bytes", "allocation_retries"),
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
"""Key of a measurement -> row id of its prediction."""

VERDICT_COLUMNS = ("quantity", "claimed", "predicted", "calibrated", "measured", "verdict", "factor", "why")


class Rows:
    """Converter of log lines, passed in order from the first, to rows of the history."""

    def __init__(self, spec: RunSpec, prediction: Prediction, log_every: int) -> None:
        self._spec = spec
        self._prediction = prediction
        self._log_every = log_every
        shape, tokens = spec.shape, spec.tokens_per_step
        self._flops = {row: per_token(shape) * tokens for row, per_token in MFU_CONVENTIONS.items()}
        self._step = 0
        self._tokens = 0
        self._seconds = self._joules = 0.0
        """Time and energy of the current process."""
        self._seconds_before = self._joules_before = 0.0
        """Time and energy of all earlier processes."""
        self._peak_process_bytes: int | None = None
        self._throttle_keys: set[str] = set()
        self._all_sensed = True

    def row(self, line: LogLine) -> HistoryRow:
        """Return the row of a log line; empty if the line has none.

        Call it once per line, in order: it updates the running step, tokens and time.
        """
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
                continue  # only some of the predicted GPUs
            if key in row and (estimate := self._prediction.best(row_id)) is not None:
                row[f"predicted/{row_id}"] = estimate.expected
                row[f"predicted/{row_id}_low"] = estimate.low
                row[f"predicted/{row_id}_high"] = estimate.high
        return row | self._axes(at_step, line.elapsed_seconds)

    def _resume(self, line: Start) -> None:
        if not line.continues:
            self._seconds_before += self._seconds
            self._joules_before += self._joules
            self._seconds = self._joules = 0.0
            self._all_sensed = line.ranks is None or (line.sensed_cards or 1) == line.ranks
        self._step = line.first_step
        self._tokens = line.first_step * self._spec.tokens_per_step

    def _axes(self, updates: int | None, elapsed_seconds: float | None) -> dict[str, float]:
        """Return the axes of a row after `updates` updates, or after the last step's if None."""
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
        row["perf/tokens_per_second"] = tokens / seconds
        row["perf/achieved_flops_per_second"] = self._flops["mfu_palm"] / seconds
        peak = self._prediction.peak_flops
        for key, flops in self._flops.items():
            # As in the report: an MFU above 1 means that the peak is wrong.
            if peak is not None and (fraction := mfu(flops, seconds, peak)) <= 1:
                row[f"perf/{key}"] = fraction
        if line.power_watts is not None and self._all_sensed:
            row["perf/joules_per_token"] = line.power_watts * seconds / tokens
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
            active = {f"gpu/throttle_{_slug(reason)}" for reason in line.throttle}
            self._throttle_keys |= active
            row |= {key: int(key in active) for key in self._throttle_keys}
        return row


def summary_of(line: LogLine) -> dict[str, Any]:
    """Return the entries of a line for the summary of the run."""
    match line:
        case Start():
            others = line.other_programs
            others_bytes = None if others is None else sum(others.values())
            entries = _renamed(line, START_KEYS)
            entries |= {"run/status": "running", "memory/other_programs_bytes": others_bytes}
        case Compile():
            entries = {"run/mode": line.mode}
        case End():
            entries = _renamed(line, END_KEYS)
        case _:
            entries = {}
    return {key: value for key, value in entries.items() if value is not None}


def final_summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the measurements of report.json and the counts of its verdicts."""
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
    """Return the rows of report.json as cells of VERDICT_COLUMNS, formatted."""

    def interval(row: Mapping[str, Any], name: str) -> str:
        if (found := row[name]) is None:
            return ""
        return format_range(row["id"], found["low"], found["high"], _currency(row))

    return [
        [
            row["quantity"],
            row["claimed"]["text"] if row["claimed"] is not None else "",
            interval(row, "analytic"),
            interval(row, "calibrated"),
            format_value(row["id"], row["measured"]["value"], _currency(row)) if row["measured"] is not None else "",
            row["verdict"],
            float(f"{row['factor']:.4g}") if row["factor"] is not None else None,
            row["why"],
        ]
        for row in report["rows"]
    ]


def run_config(spec: RunSpec, prediction: Prediction) -> dict[str, Any]:
    """Return the spec, the hardware and the best estimate of each quantity, without secrets."""
    predicted: dict[str, Any] = {"hardware": prediction.hardware.model_dump()}
    for name in (*prediction.quantities, *prediction.calibrated):
        predicted[name] = prediction[name].model_dump(include={"low", "expected", "high", "unit"})
    return scrubbed({**spec.to_dict(), "prediction": predicted})


def _currency(row: Mapping[str, Any]) -> str:
    return str(row["unit"]) if row["id"] == "cost" else ""


def _renamed(line: LogLine, keys: Mapping[str, str]) -> dict[str, Any]:
    return {key: getattr(line, name) for name, key in keys.items()}


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")
