"""Predict the same run at other settings, with the engine of plan.py.

On the run's own hardware this run calibrates the prediction, and memory is scaled by the measured peak. Another GPU is
predicted without calibration, as the error of one says nothing about another, and compared with this run's own
prediction without calibration.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from nanogauge.analysis.measured import Measurements, finished_run
from nanogauge.hardware import Gpu, all_gpus, find_gpu, from_row, usually_free_bytes
from nanogauge.prediction.calibrated import Calibration
from nanogauge.prediction.loss import FinishedLoss
from nanogauge.prediction.prediction import predict
from nanogauge.prediction.quality import loss_inputs
from nanogauge.prediction.search import (
    Verdict,
    fit_verdict,
    is_expected_to_fit,
    largest_micro_batch,
    memory_of,
    with_micro_batch,
)
from nanogauge.prediction.workload import resolve_dtype, workload_of
from nanogauge.quantities import Interval
from nanogauge.runlog.history import RunHistory
from nanogauge.runspec import RunSpec
from nanogauge.schema import Hardware, Prediction, Stored
from nanogauge.spec_parts import SETTINGS

LOWER_POWER = 0.8
"""Share of the power limit that is compared with it."""


class Scenario(Stored):
    """Prediction of an alternative run."""

    id: str
    label: str
    change: str
    """Flags of plan.py and train.py; empty if nothing changes."""
    step_seconds: Interval
    total_seconds: Interval
    delta_s: float
    """Expected change in duration from repeating this run unchanged; negative if shorter. For another GPU both are
    predicted without calibration."""
    peak_process_bytes: float
    """Expected peak memory of the process."""
    verdict: Verdict | None
    """Whether it fits into memory; None if the size of the memory is unknown."""
    energy_kwh: Interval | None
    """Energy of the boards; None if their power is not predicted."""
    cost: Interval | None
    """Cost in the configured currency; None without a price or an energy."""
    val_loss: Interval | None
    """Final validation loss in nats per token; None if it is not predicted."""
    corrected: bool
    """True if this run's measurements calibrated the prediction."""
    why: str


def what_if(spec: RunSpec, prediction: Prediction, measurements: Measurements, recorded: RunHistory) -> list[Scenario]:
    """Predict up to five variants, first an unchanged repeat; empty without a step time and a shape."""
    step = measurements.values.get("step_seconds")
    if not prediction.ledger or step is None or spec.traced is not None:
        return []
    spec, own = spec.resolved(prediction.dtype, prediction.gpus), prediction.hardware
    if recorded.compiles and recorded.compiles[-1].mode == "eager":
        spec = replace(spec, compile=False)
    on_gpu = own.kind != "cpu"
    run = finished_run(spec, prediction, recorded, measurements)
    # What ran beside it would run beside its repetition.
    run = run.model_copy(update={"others_share": 0.0})
    calibration = Calibration(device=own.name, torch="", threads=None, runs=(run,))
    uncorrected = predict(spec, own).quantities
    slower = step.value / uncorrected["step_seconds"].expected
    peak = measurements.values.get("peak_process_bytes")
    peak_factor = peak.value / memory_of(spec, own).process.expected if peak else 1.0
    loss, losses = measurements.values.get("val_loss"), []
    if loss is not None and measurements.status == "finished" and recorded.starts[-1].is_live:
        losses = [FinishedLoss(loss_inputs(spec), loss.value, spec.name or "")]
    rows: list[Scenario] = []
    for name, label, hardware, wanted, why in _candidates(spec, own, slower):
        here, same_card = hardware is own, hardware.name == own.name
        factor, free = peak_factor if same_card else 1.0, _free_bytes(hardware, recorded)
        usable = math.inf if free is None else free / factor
        other: RunSpec | None = wanted
        if name == "micro_batch":
            other = _with_fitting_micro_batch(wanted, hardware, usable) if free else None
            if other is None or other.micro_batch <= wanted.micro_batch:
                continue
        elif not same_card and not is_expected_to_fit(wanted, hardware, usable):
            other = _with_fitting_micro_batch(wanted, hardware, usable)
        if other is None:
            continue
        predicted = predict(other, hardware, calibration if here else None, losses=losses)
        scale = slower if same_card and not here else 1.0  # no calibration is of another limit
        other_step, total, energy, cost = (
            None if found is None else scale * found
            for found in map(predicted.best, ("step_seconds", "total_seconds", "energy_kwh", "cost"))
        )
        if other_step is None or total is None:
            continue
        unchanged = uncorrected["total_seconds"] if not same_card else rows[0].total_seconds if rows else total
        memory = memory_of(other, hardware).process
        verdict = fit_verdict(memory, usable) if free is not None else None
        if same_card and peak and workload_of(other, on_gpu) == run.workload:
            verdict = "fits"  # it ran
        gpu = "" if same_card else f'--gpu "{hardware.name}" '
        if same_card and not here:
            gpu = f"--power-limit {hardware.power_limit_watts:.0f} "
        rows.append(
            Scenario(
                id=name,
                label=label,
                change=(gpu + _flags(spec, other)).strip(),
                step_seconds=other_step,
                total_seconds=total,
                delta_s=total.expected - unchanged.expected,
                peak_process_bytes=factor * memory.expected,
                verdict=verdict,
                energy_kwh=energy,
                cost=cost,
                corrected=same_card,
                val_loss=predicted.best("val_loss"),
                why=why,
            )
        )
    return rows


def _candidates(spec: RunSpec, own: Hardware, slower: float) -> Iterator[tuple[str, str, Hardware, RunSpec, str]]:
    """Yield id, label, hardware, spec and reason of each variant to predict."""
    why = f"a step took {slower:.3f} times what is predicted; without restarts and slow steps"
    yield "again", "the same again", own, spec, why
    why = "the same tokens a step in fewer micro-batches: weights and gradients move less often"
    yield "micro_batch", "a larger micro-batch", own, spec, why
    if spec.eval_every:
        yield "evaluations", "half as many evaluations", own, replace(spec, eval_every=2 * spec.eval_every), ""
    if own.power_limit_watts is not None:
        limit = LOWER_POWER * own.power_limit_watts
        limited = own.model_copy(update={"power_limit_watts": limit})
        why = "the clock follows the power by the model of docs/prediction.md"
        yield "power_limit", f"{100 * LOWER_POWER:.0f} % of the power limit", limited, spec, why
    why = f"before and after without correction: the error on the {own.name} says nothing of another card"
    dtype = resolve_dtype(spec, own.kind != "cpu")
    if (gpu := faster_gpu(own, dtype)) is not None:
        name = "card_" + gpu.name.lower().replace(" ", "_")
        yield name, gpu.name, from_row(gpu, dtype), spec, why


def faster_gpu(hardware: Hardware, dtype: str) -> Gpu | None:
    """Return the next faster GPU of the same family; None if there is none."""
    own = find_gpu(hardware.name, hardware.memory_bytes)
    if own is None or (peak := own.peak_flops(dtype)) is None:
        return None
    faster = [
        gpu
        for gpu in all_gpus()
        if (gpu.architecture, gpu.kind) == (own.architecture, own.kind)
        and ("Laptop" in gpu.name) == ("Laptop" in own.name)
        and (gpu.peak_flops(dtype) or 0) > peak
    ]
    return min(faster, key=lambda gpu: (gpu.peak_flops(dtype) or 0, -(gpu.memory_gib or 0)), default=None)


def _free_bytes(hardware: Hardware, recorded: RunHistory) -> float | None:
    """Return the memory that was free when the run started, or the usual free memory if unknown."""
    total, start = hardware.memory_bytes, recorded.starts[-1]
    same_gpu = hardware.kind != "cpu" and hardware.name == start.device
    if same_gpu and total is not None and start.other_programs is not None:
        return total - sum(start.other_programs.values())
    return usually_free_bytes(hardware)


def _with_fitting_micro_batch(spec: RunSpec, hardware: Hardware, free: float) -> RunSpec | None:
    """Use the largest micro-batch that is sure to fit, or expected to if that is larger than now.

    Keep the tokens per step, and at least those per evaluation. None if no micro-batch fits.
    """
    micro = largest_micro_batch(spec, hardware, free, "high") or 0
    if micro <= spec.micro_batch:
        micro = largest_micro_batch(spec, hardware, free) or 0
    if not micro:
        return None
    sequences = (spec.eval_batches or 0) * spec.micro_batch
    return replace(with_micro_batch(spec, micro), eval_batches=math.ceil(sequences / micro))


def _flags(before: RunSpec, after: RunSpec) -> str:
    """Return the flags that turn one configuration into the other."""
    changed = ((key, after.setting(key)) for key in SETTINGS if after.setting(key) != before.setting(key))
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in changed)
