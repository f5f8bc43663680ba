"""Measurements of one device, and the step time that follows from them.

Evidence, strongest first: finished runs of the same workload and its parts measured by --calibrate (one layer, and the
rest); finished runs of other shapes, each by its likeness; and measured rates instead of the datasheet's.
docs/prediction.md says how accurate each is.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import platformdirs
from pydantic import ValidationError

from nanogauge.files import write_atomic
from nanogauge.prediction.constants import FITTED
from nanogauge.prediction.flops import flops_per_token_executed
from nanogauge.prediction.step_time import StepTime, predict_step_time
from nanogauge.prediction.workload import Workload
from nanogauge.quantities import Interval, format_seconds
from nanogauge.schema import Hardware, Stored

RUNS_KEPT = 100
UNKNOWN_SPREAD = 10.0  # no prior knowledge: a step between microseconds and days

# Standard deviations of the log of a step time.
RUN_SPREAD = 0.02
"""A run's step. Source: the documented run: all samples of 20 hours within 0.8 % of each other."""
PARTS_SPREAD = 0.06
"""A step added up from measured parts. Source: bench/calibrated_cpu.py: 11 of 12 steps of random shapes within 6 %."""
AGE_SPREAD = 0.03
"""Change of a device in a year."""
DISTURBED_WIDTH = 1.5
"""High over low beyond which the evidence about a workload gives way to other runs."""
UNWATCHED_SPREAD = 0.1
"""A run of which it is not known what ran beside it."""

# Standard deviations of the log of measured / analytic step time: common to all workloads of a
# device, of one kind of operation, of one size, and of one workload alone. Source of the last on a CPU: twelve quiet
# steps of random shapes, each predicted by those of the other shapes.
SPREADS_GPU = (0.09, 0.04, 0.04, 0.02)
SPREADS_CPU = (0.2, 0.25, 0.1, 0.06)
LAUNCH_SPREAD = 1.0
"""The time of kernel launches: what Python, autograd and the driver take differs most."""
SIZE_SCALE = 2.1
"""Log of the ratio of FLOPs per micro-batch, 8, beyond which sizes count as different."""
ROBUST_ROUNDS = 10

Array = npt.NDArray[np.float64]


class Rates(Stored):
    """What this device reaches in single operations."""

    dtype: str
    matmul_flops: float
    """Fastest matrix product of the model's shapes in FLOP/s."""
    bandwidth_bytes_per_second: float
    """Bytes read and written by a copy of memory."""


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
    others_share: float | None = None
    """As of a finished run."""

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
    others_share: float | None = None
    """Mean share of the device that other programs used beside the run; None if unknown."""


class Calibration(Stored):
    """Everything measured on one device with one torch version."""

    device: str
    torch: str
    threads: int | None
    """Threads that torch computes with; None on a GPU."""
    rates: tuple[Rates, ...] = ()
    parts: tuple[MeasuredParts, ...] = ()
    runs: tuple[FinishedRun, ...] = ()

    def updated(self, newer: Calibration) -> Calibration:
        """Merge both; newer rates and parts replace those of the same dtype and workload."""
        rated = {rates.dtype for rates in newer.rates}
        measured = {_any_depth(parts.workload) for parts in newer.parts}
        return newer.model_copy(
            update={
                "rates": (*(r for r in self.rates if r.dtype not in rated), *newer.rates),
                "parts": (*(p for p in self.parts if _any_depth(p.workload) not in measured), *newer.parts),
                "runs": (self.runs + newer.runs)[-RUNS_KEPT:],
            }
        )


@dataclass(frozen=True)
class CalibratedStep:
    seconds: Interval
    formula: str
    source: str
    """The measurements used, as a sentence without its full stop."""


def calibrated_step(
    work: Workload, hardware: Hardware, calibration: Calibration, analytic: StepTime | None
) -> CalibratedStep | None:
    """Return the step time by the strongest evidence in the calibration; None without evidence.

    Runs and measured parts of this very workload stand above runs of other shapes, unless they were disturbed, and
    these above rates of single operations.
    """
    rated = _with_rates(work, hardware, calibration)
    if rated is not None:
        analytic = predict_step_time(work, rated)
    own = _from_this_workload(work, calibration)
    if own is not None and _width(own) <= DISTURBED_WIDTH:
        return own
    others = _from_other_runs(work, rated or hardware, calibration, analytic)
    if own is not None and others is not None:
        return min(own, others, key=_width)
    return own or others or _from_rates(rated, analytic)


def _width(step: CalibratedStep) -> float:
    return step.seconds.high / step.seconds.low


def _from_this_workload(work: Workload, calibration: Calibration) -> CalibratedStep | None:
    """Combine finished runs of the workload with its measured parts, each by its accuracy."""
    runs = [run for run in calibration.runs if run.workload == work]
    measured = [p for p in calibration.parts if _any_depth(p.workload) == _any_depth(work)]
    if not runs and not measured:
        return None
    newest = max((run.finished_unix for run in runs), default=0.0)
    logs = [math.log(run.step_seconds) for run in runs]
    noise = [_noise(run, newest) for run in runs]
    texts, formulas = [], []
    if runs:
        texts.append(f"the steady step of {_runs_text(runs)}, the same workload")
        formulas.append(f"the step of {_runs_text(runs)}")
    for parts in measured:
        logs.append(math.log(parts.step_seconds(work)))
        spread = math.hypot(PARTS_SPREAD, parts.spread / 4)
        noise.append(_disturbed(parts.others_share, spread))
        texts.append(
            f"a layer, the rest and the update of this shape measured "
            f"on {_date(parts.measured_unix)}, spread {100 * parts.spread:.0f} %"
        )
        formulas.append(
            f"{work.grad_accum} x ({work.shape.n_layer} x {format_seconds(parts.layer_seconds)} a "
            f"layer + {format_seconds(parts.rest_seconds)} for the rest) + the update"
        )
    alike = np.full((len(logs) + 1, len(logs) + 1), UNKNOWN_SPREAD**2)
    centre = logs[0]
    log, spread = _combined(np.array(logs) - centre, noise, alike)
    return CalibratedStep(
        _interval(math.exp(log + centre), spread),
        formula=" and ".join(formulas),
        source=f"{' and '.join(texts)}, on this device",
    )


def _from_other_runs(
    work: Workload, hardware: Hardware, calibration: Calibration, analytic: StepTime | None
) -> CalibratedStep | None:
    """Scale the analytic step by the ratio of measured to predicted time in runs alike.

    The ratios are a Gaussian process over workloads: a run counts by its likeness, and far from all runs the prediction
    is the analytic one with its own interval.
    """
    runs = [
        run for run in calibration.runs if (run.workload.compiled, run.workload.dtype) == (work.compiled, work.dtype)
    ]
    if analytic is None or not runs:
        return None
    steps = []
    for run in runs:
        step = predict_step_time(run.workload, hardware)
        assert step is not None, "a device with one predicted workload has them all"
        steps.append(step)
    logs = [math.log(run.step_seconds / s.seconds) for run, s in zip(runs, steps, strict=True)]
    newest = max(run.finished_unix for run in runs)
    covariance = _likeness([*(run.workload for run in runs), work], [*steps, analytic], hardware.kind == "cpu")
    log, spread = _combined(np.array(logs), [_noise(run, newest) for run in runs], covariance)
    factor = math.exp(log)
    return CalibratedStep(
        _interval(factor * analytic.seconds, spread),
        formula=f"{factor:.3f} x the analytic {format_seconds(analytic.seconds)}",
        source=f"{_runs_text(runs)}, on this device, of other shapes, each by its likeness: "
        f"{factor:.3f} times the analytic step",
    )


def _likeness(works: Sequence[Workload], steps: Sequence[StepTime], on_cpu: bool) -> Array:
    """Return the prior covariance of the logs of measured / analytic step time.

    An error is common to the device, or of a kind of operation, in proportion to its share of the step, or of a size,
    FLOPs of a micro-batch, or of this workload alone.
    """
    common, by_part, by_size, alone = SPREADS_CPU if on_cpu else SPREADS_GPU
    names = sorted({part.name for step in steps for part in step.parts})
    shares = np.array([[sum(p.value for p in s.parts if p.name == n) / s.seconds for n in names] for s in steps])
    spreads = np.array([LAUNCH_SPREAD if n == "launching kernels" else by_part for n in names])
    sizes = np.log([work.tokens * flops_per_token_executed(work.shape) for work in works])
    near = np.exp(-0.5 * ((sizes[:, None] - sizes[None, :]) / SIZE_SCALE) ** 2)
    weighted = shares * spreads
    one = alone**2 * np.eye(len(works))
    return np.asarray(common**2 + weighted @ weighted.T + by_size**2 * near + one)


def _combined(logs: Array, noise: Sequence[tuple[float, float]], covariance: Array) -> tuple[float, float]:
    """Return mean and standard deviation of the last variable of a Gaussian prior, given the rest.

    A measurement that the others contradict, by more than two standard deviations, counts as less accurate, and the
    interval is widened by what remains unexplained.

    Args:
        logs: the measurements of all but the last variable.
        noise: for each the mean and the standard deviation of its error.
        covariance: prior covariance of all.
    """
    y = logs - np.array([bias for bias, _ in noise])
    stated = np.array([spread**2 for _, spread in noise])
    prior, to_last, last = covariance[:-1, :-1], covariance[:-1, -1], covariance[-1, -1]
    expected = 1 / np.diag(np.linalg.inv(prior + np.diag(stated)))
    variance = stated + np.ptp(y) ** 2  # none is trusted at first, so that a majority emerges
    for _ in range(ROBUST_ROUNDS if len(y) > 1 else 0):
        inverse = np.linalg.inv(prior + np.diag(variance))
        left_out = (inverse @ y) / np.diag(inverse)  # each, less its prediction by the others
        variance = stated + np.maximum(0.0, left_out**2 - 4 * expected)
    inverse = np.linalg.inv(prior + np.diag(variance))
    mean = to_last @ inverse @ y
    spread = math.sqrt(max(last - to_last @ inverse @ to_last, 0.0))
    surprise = math.sqrt(max(1.0, float(y @ inverse @ y) / len(y)))
    alike = to_last**2 / (last * np.diag(prior))
    contradiction = alike @ np.sqrt(variance - stated) / (1 + alike.sum())
    return float(mean), math.hypot(surprise * spread, contradiction)


def _noise(run: FinishedRun, newest_unix: float) -> tuple[float, float]:
    """Return mean and standard deviation of the log of a run's step over an undisturbed one."""
    days = (newest_unix - run.finished_unix) / 86400
    own = math.log(run.p90_seconds / run.p10_seconds) / 2.56
    spread = math.hypot(RUN_SPREAD, own / 2, AGE_SPREAD * math.sqrt(days / 365))
    return _disturbed(run.others_share, spread)


def _disturbed(others_share: float | None, spread: float) -> tuple[float, float]:
    """Add to a measurement's spread what other programs did: nothing, all they could, or between.

    Returns mean and standard deviation of the log of measured / undisturbed time.
    """
    if others_share is None:
        return 0.0, math.hypot(spread, UNWATCHED_SPREAD)
    most = -math.log(1 - min(others_share, 0.95))
    return most / 2, math.hypot(spread, most / math.sqrt(12))


def _interval(seconds: float, spread: float) -> Interval:
    factor = math.exp(1.645 * spread)  # nine in ten of a normal distribution
    return Interval(seconds / factor, seconds, seconds * factor)


def _with_rates(work: Workload, hardware: Hardware, calibration: Calibration) -> Hardware | None:
    """Return the hardware at the rates measured in this dtype; None if they were not measured."""
    for rates in calibration.rates:
        if rates.dtype == work.dtype:
            # The model multiplies the datasheet's bandwidth by a share.
            share = 1.0 if hardware.kind == "cpu" else FITTED.bandwidth_share
            bandwidth = rates.bandwidth_bytes_per_second / share
            rated = {"matmul_flops": rates.matmul_flops, "bandwidth_bytes_per_second": bandwidth}
            return hardware.model_copy(update=rated)
    return None


def _from_rates(rated: Hardware | None, step: StepTime | None) -> CalibratedStep | None:
    if rated is None or step is None:
        return None
    return CalibratedStep(
        step.interval,
        formula="the analytic model at the measured rates",
        source="the fastest matrix product and the memory bandwidth, measured on this device",
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
    return platformdirs.user_data_path("nanogauge", appauthor=False) / "calibrations" / f"{name}.json"


def load_calibration(device: str, torch_version: str, threads: int | None) -> tuple[Calibration | None, str | None]:
    """Return the calibration of a device, and a warning if its file is damaged; None if absent."""
    path = path_of(device, torch_version, threads)
    try:
        return Calibration.model_validate_json(path.read_bytes()), None
    except FileNotFoundError:
        return None, None
    except (OSError, ValidationError):
        return (None, f"The calibration {path} is damaged: it is ignored, and the next one replaces it")


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
