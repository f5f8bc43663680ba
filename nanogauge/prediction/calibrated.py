"""Measurements of one device, and the step time that follows from them.

Evidence, strongest first: a finished run of the same workload; its parts measured by --calibrate
(one layer, and the rest); finished runs of other shapes, as one factor on the analytic step; and
measured rates instead of the datasheet's. docs/prediction.md says how accurate each is.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs
from pydantic import ValidationError

from nanogauge.files import write_atomic
from nanogauge.prediction.constants import FITTED
from nanogauge.prediction.step_time import StepTime, predict_step_time
from nanogauge.prediction.workload import Workload
from nanogauge.quantities import Interval, format_seconds
from nanogauge.schema import Hardware, Stored

RUNS_KEPT = 100
SAME_RUN_TOLERANCE = 0.03  # the documented run: all samples of 20 hours within 0.8 % of each other
PARTS_TOLERANCE = 0.10  # bench/calibrated_cpu.py: 11 of 12 steps of random shapes within 6 %
OTHER_RUN_TOLERANCE = 0.05  # runs of other shapes on one RTX 4070 predict each other within 1-3 %
OTHER_RUN_TOLERANCE_CPU = 0.60
"""Tolerance of a step predicted from other runs on a CPU. Source: bench/calibrated_cpu.py, each
shape predicted by the others: four of six within 6 %, but shapes dominated by the vocabulary head
took 1.4-1.6 times as long."""
COPY = "copy of memory"


class Figure(Stored):
    """One measured rate or time: the median of n repetitions and their middle 80 %."""

    name: str
    value: float
    low: float
    high: float
    n: int
    unit: str
    detail: str


class MeasuredParts(Stored):
    """A step measured in parts, which gives the step time at any depth and accumulation."""

    workload: Workload
    layer_seconds: float
    """Forward and backward of one layer, one micro-batch."""
    rest_seconds: float
    """Forward and backward of everything else: data, embedding, head, loss."""
    layer_update_seconds: float
    """Clipping and optimizer for the weights of one layer."""
    rest_update_seconds: float
    spread: float
    """(90th - 10th percentile) / median of the repetitions."""
    sequences: int
    """Sequences of the measured micro-batch; the seconds are scaled to the workload's."""
    measured_unix: float

    def step_seconds(self, work: Workload) -> float:
        """Return the step time of a workload that differs only in depth and accumulation."""
        layers = work.shape.n_layer
        micro = layers * self.layer_seconds + self.rest_seconds
        update = layers * self.layer_update_seconds + self.rest_update_seconds
        return work.grad_accum * micro + update


class FinishedRun(Stored):
    """The steady step time of a finished run on this device."""

    name: str
    workload: Workload
    step_seconds: float
    """Median time of a steady step."""
    p10_seconds: float
    p90_seconds: float
    n: int
    finished_unix: float


class Calibration(Stored):
    """Everything measured on one device with one torch version."""

    device: str
    torch: str
    threads: int | None
    """Threads that torch computes with; None on a GPU."""
    clock_hz: float | None = None
    """GPU core clock right after the matrix products."""
    created_unix: float
    figures: tuple[Figure, ...] = ()
    parts: tuple[MeasuredParts, ...] = ()
    runs: tuple[FinishedRun, ...] = ()

    def updated(self, newer: Calibration) -> Calibration:
        """Merge both; newer figures and parts replace those of the same name and workload."""
        names = {figure.name for figure in newer.figures}
        measured = {_any_depth(parts.workload) for parts in newer.parts}
        return newer.model_copy(
            update={
                "clock_hz": newer.clock_hz or self.clock_hz,
                "figures": (*(f for f in self.figures if f.name not in names), *newer.figures),
                "parts": (
                    *(p for p in self.parts if _any_depth(p.workload) not in measured),
                    *newer.parts,
                ),
                "runs": (self.runs + newer.runs)[-RUNS_KEPT:],
            }
        )


@dataclass(frozen=True)
class CalibratedStep:
    seconds: Interval
    formula: str
    source: str
    """The measurements used, as a sentence without its full stop."""


def matrix_product_name(dtype: str) -> str:
    """Return the prefix of the names of matrix-product figures in this dtype."""
    return f"{dtype} matrix product"


def calibrated_step(
    work: Workload, hardware: Hardware, calibration: Calibration, analytic: StepTime | None
) -> CalibratedStep | None:
    """Return the step time by the strongest evidence in the calibration; None without evidence."""
    return (
        _from_same_runs(work, calibration)
        or _from_parts(work, calibration)
        or _from_other_runs(work, hardware, calibration, analytic)
        or _from_rates(work, hardware, calibration)
    )


def _from_same_runs(work: Workload, calibration: Calibration) -> CalibratedStep | None:
    runs = [run for run in calibration.runs if run.workload == work]
    if not runs:
        return None
    seconds = statistics.median(run.step_seconds for run in runs)
    return CalibratedStep(
        Interval(
            low=min((1 - SAME_RUN_TOLERANCE) * seconds, *(run.p10_seconds for run in runs)),
            expected=seconds,
            high=max((1 + SAME_RUN_TOLERANCE) * seconds, *(run.p90_seconds for run in runs)),
        ),
        formula=f"median step of {_runs_text(runs)}",
        source=f"the steady step of {_runs_text(runs)}, the same workload on this device",
    )


def _from_parts(work: Workload, calibration: Calibration) -> CalibratedStep | None:
    found = [p for p in calibration.parts if _any_depth(p.workload) == _any_depth(work)]
    if not found:
        return None
    (parts,) = found
    seconds, layers = parts.step_seconds(work), work.shape.n_layer
    update = layers * parts.layer_update_seconds + parts.rest_update_seconds
    tolerance = PARTS_TOLERANCE + parts.spread / 2
    of = work.micro_batch
    part = f" with {parts.sequences} of {of} sequences" if parts.sequences < of else ""
    return CalibratedStep(
        Interval(low=seconds / (1 + tolerance), expected=seconds, high=seconds * (1 + tolerance)),
        formula=f"{work.grad_accum} x ({layers} x {format_seconds(parts.layer_seconds)} a layer "
        f"+ {format_seconds(parts.rest_seconds)} for the rest) + update {format_seconds(update)}",
        source=f"a layer, the rest and the update of this shape measured{part} on this device "
        f"on {_date(parts.measured_unix)}, spread {100 * parts.spread:.0f} %",
    )


def _from_other_runs(
    work: Workload, hardware: Hardware, calibration: Calibration, analytic: StepTime | None
) -> CalibratedStep | None:
    """Scale the analytic step by the median ratio of measured to predicted earlier runs."""
    runs = [
        run
        for run in calibration.runs
        if (run.workload.compiled, run.workload.dtype) == (work.compiled, work.dtype)
    ]
    if analytic is None or not runs:
        return None
    factors = []
    for run in runs:
        expected = predict_step_time(run.workload, hardware)
        assert expected is not None, "a device with one predicted workload has them all"
        factors.append(run.step_seconds / expected.seconds)
    factor = statistics.median(factors)
    seconds = factor * analytic.seconds
    on_cpu = hardware.kind == "cpu"
    tolerance = OTHER_RUN_TOLERANCE_CPU if on_cpu else OTHER_RUN_TOLERANCE
    return CalibratedStep(
        Interval(
            low=min(seconds / (1 + tolerance), min(factors) * analytic.seconds),
            expected=seconds,
            high=max(seconds * (1 + tolerance), max(factors) * analytic.seconds),
        ),
        formula=f"{factor:.3f} x the analytic {format_seconds(analytic.seconds)}",
        source=f"{_runs_text(runs)}, of other shapes on this device: {factor:.3f} times the "
        "analytic step",
    )


def _from_rates(
    work: Workload, hardware: Hardware, calibration: Calibration
) -> CalibratedStep | None:
    """Evaluate the analytic model with the measured matrix product and bandwidth."""
    prefix = matrix_product_name(work.dtype)
    products = [f.value for f in calibration.figures if f.name.startswith(prefix)]
    copies = [f.value for f in calibration.figures if f.name == COPY]
    if not products or not copies:
        return None
    # The model multiplies the datasheet's bandwidth by a share.
    share = 1.0 if hardware.kind == "cpu" else FITTED.bandwidth_share
    measured = hardware.model_copy(
        update={"matmul_flops": max(products), "bandwidth_bytes_per_second": copies[0] / share}
    )
    step = predict_step_time(work, measured)
    if step is None:
        return None
    return CalibratedStep(
        step.interval,
        formula=f"the analytic model at {max(products) / 1e12:.3g} TFLOP/s and "
        f"{copies[0] / 1e9:.3g} GB/s",
        source=f"the fastest of {len(products)} matrix products and the memory bandwidth, "
        "measured on this device",
    )


def _any_depth(work: Workload) -> Workload:
    """Return the workload with one layer and no accumulation, to compare all other properties."""
    return replace(work, grad_accum=1, shape=replace(work.shape, n_layer=1))


def _runs_text(runs: Sequence[FinishedRun]) -> str:
    last = runs[-1]
    named = f"{last.name} of {_date(last.finished_unix)}"
    return f"the run {named}" if len(runs) == 1 else f"{len(runs)} runs, the last {named}"


def _date(unix: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(unix))


def path_of(device: str, torch_version: str, threads: int | None) -> Path:
    """Return the path of a device's calibration, which may not exist."""
    computing = f" {threads} threads" if threads is not None else ""
    name = re.sub(r"[^A-Za-z0-9.+]+", "-", f"{device}{computing} torch {torch_version}").strip("-")
    return (
        platformdirs.user_data_path("nanogauge", appauthor=False) / "calibrations" / f"{name}.json"
    )


def load_calibration(
    device: str, torch_version: str, threads: int | None
) -> tuple[Calibration | None, str | None]:
    """Return the calibration of a device, and a warning if its file is damaged; None if absent."""
    path = path_of(device, torch_version, threads)
    try:
        return Calibration.model_validate_json(path.read_bytes()), None
    except FileNotFoundError:
        return None, None
    except (OSError, ValidationError):
        return (
            None,
            f"The calibration {path} is damaged: it is ignored, and the next one replaces it",
        )


def add_to_calibration(newer: Calibration) -> tuple[Calibration, str | None]:
    """Merge newer measurements into the stored calibration and return the result.

    The second value is a warning if the file could not be written.
    """
    known, _ = load_calibration(newer.device, newer.torch, newer.threads)
    together = newer if known is None else known.updated(newer)
    path = path_of(newer.device, newer.torch, newer.threads)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, together.model_dump_json(indent=1).encode())
    except OSError as error:
        return together, f"The calibration {path} could not be written: {error.strerror}"
    return together, None
