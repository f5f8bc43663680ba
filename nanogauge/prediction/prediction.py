"""Predict a run: every quantity with its interval, formula and source."""

import time
from collections.abc import Sequence
from dataclasses import replace

from nanogauge.errors import BadInput
from nanogauge.hardware import auto_dtype, lookup
from nanogauge.prediction.calibrated import CalibratedStep, Calibration, calibrated_step
from nanogauge.prediction.energy import predict_energy
from nanogauge.prediction.flops import MFU_CONVENTIONS, count_parameters, flops_per_token_6n, flops_per_token_palm
from nanogauge.prediction.loss import FinishedLoss
from nanogauge.prediction.memory import Memory
from nanogauge.prediction.overheads import (
    FIRST_STEP_EXTRA_SECONDS,
    START_UP_SECONDS,
    compile_seconds,
    state_bytes,
    waiting_seconds,
)
from nanogauge.prediction.quality import predict_quality
from nanogauge.prediction.search import memory_of
from nanogauge.prediction.step_time import StepTime, predict_step_time
from nanogauge.prediction.traced import hidden_workspaces, traced_quantities, traced_step_time
from nanogauge.prediction.workload import resolve_dtype, workload_of
from nanogauge.quantities import QUANTITIES, Interval, mfu
from nanogauge.runspec import RunSpec
from nanogauge.schedule import checkpoints, evaluations
from nanogauge.schema import Estimate, Hardware, Part, Prediction
from nanogauge.spec_parts import Shape


def predict(
    spec: RunSpec,
    hardware: Hardware | None = None,
    calibration: Calibration | None = None,
    *,
    gpu: str | None = None,
    losses: Sequence[FinishedLoss] = (),
) -> Prediction:
    """Predict every quantity of a run; `unpredicted` gives the reason for each missing one.

    Memory is per GPU. With a calibration of this hardware, `calibrated` holds the times predicted a second time, from
    its measurements.

    >>> import nanogauge as ng
    >>> spec = ng.RunSpec.gpt(n_layer=12, n_embd=768, n_head=12, context=1024, vocabulary=50304,
    ...                       micro_batch=8, grad_accum=64, steps=2000)
    >>> plan = ng.predict(spec, gpu="RTX 4070")
    >>> plan["step_seconds"].low < plan["step_seconds"].expected < plan["step_seconds"].high
    True
    >>> plan.fits(free_gib=11)
    True

    Args:
        spec: the run.
        hardware: the device, as local_hardware and lookup return it.
        calibration: measurements of this device.
        gpu: name of a row of hardware.toml, in place of `hardware`.
        losses: finished runs, of which one on the same data calibrates the loss.

    Raises:
        ValueError: without a device, for an unknown one, or if the GPUs cannot share the micro-batches equally.
    """
    if gpu is not None:
        spec = replace(spec, dtype=spec.dtype or auto_dtype(gpu))
        hardware = lookup(gpu, resolve_dtype(spec, on_gpu=True))
    if hardware is None:
        raise BadInput('name the device: predict(spec, gpu="RTX 4070")')
    traced = spec.traced
    quality, calibrated, unpredicted, notes = predict_quality(spec, losses)
    quantities = quality | (_exact_quantities(spec) if traced is None else traced_quantities(spec, traced))
    unpredicted["speedup_after_warmup"] = "it follows from the first and the steady step"
    if spec.unique_tokens is None and "data_epochs" not in quantities:
        unpredicted["data_epochs"] = "data.tokens is not given and there is no data to count yet"
    unpredicted |= spec.absent_rows()
    on_gpu, gpus = hardware.kind != "cpu", spec.world_size
    work = workload_of(spec, on_gpu)
    memory = memory_of(spec, hardware)
    if traced is not None:
        step = traced_step_time(spec, traced, hardware)
        notes += hidden_workspaces(traced)
    else:
        step = predict_step_time(work, hardware) if spec.compile is not None else None
    ledger: dict[str, float] = {}
    parts: list[Part] = []
    if step is None:
        reason = "the peak, bandwidth or class of this device is not known"
        if spec.compile is None:
            reason = "it is not known whether the model is compiled"
        timed = ("first_step_seconds", "step_seconds", "total_seconds", "mfu_palm", "mfu_6n")
        unpredicted |= dict.fromkeys(timed, reason)
    else:
        times, ledger = _times(spec, hardware, step)
        quantities |= times
        if "total_seconds" not in times:
            reason = "it is not known how often the run evaluates and writes checkpoints"
            unpredicted["total_seconds"] = reason
        parts = step.parts
    known = None
    if calibration is not None and traced is None:
        known = calibrated_step(work, hardware, calibration, step)
        if known is not None:
            calibrated = _calibrated(spec, hardware, step, known) | calibrated
    if step is not None and known is None:
        notes += [f"Step time on {hardware.name}: {caveat}." for caveat in step.caveats]
    quantities |= _memory_estimates(memory, hardware)
    if not on_gpu:
        unpredicted["peak_allocated_bytes"] = "no GPU"
    energy, why_not = predict_energy(spec.cost, hardware, quantities.get("total_seconds"), gpus)
    quantities |= energy
    unpredicted |= why_not
    prediction = Prediction(
        created_unix=time.time(),
        hardware=hardware,
        gpus=gpus,
        dtype=resolve_dtype(spec, on_gpu),
        quantities={row: quantities[row] for row in QUANTITIES if row in quantities and row not in unpredicted},
        unpredicted=unpredicted,
        calibrated=calibrated,
        step_parts=parts,
        memory_parts=memory.parts,
        ledger=ledger,
        notes=notes,
    )
    return _of_known(spec, prediction) if spec.unknown and traced is None else prediction


def _of_known(spec: RunSpec, prediction: Prediction) -> Prediction:
    """Return the rows that follow exactly from the known settings alone."""
    absent, reason = spec.absent_rows(), spec.unsaid(*spec.unknown)
    exact = {row for row, q in QUANTITIES.items() if q.exact and row not in absent}
    known = {row: quantity for row, quantity in prediction.quantities.items() if row in exact}
    unpredicted = dict.fromkeys(QUANTITIES.keys() - known.keys(), reason)
    empty: dict[str, object] = {key: [] for key in ("step_parts", "memory_parts", "notes")}
    empty |= {"quantities": known, "unpredicted": unpredicted, "calibrated": {}, "ledger": {}}
    return prediction.model_copy(update=empty)


def parameter_formula(shape: Shape) -> str:
    """Return the formula of the parameters without position embeddings."""
    if not shape.norm_weights:
        return "12 L C^2 + V C" + " + 9 L C of biases" * shape.bias
    return "L (12 C^2 + 2 C) + V C + C" + " + 9 L C + (2 L + 1) C of biases" * shape.bias


def _exact_quantities(spec: RunSpec) -> dict[str, Estimate]:
    shape = spec.shape
    counted = count_parameters(shape)
    per_step, steps = spec.tokens_per_step, spec.steps
    tokens = per_step * steps
    flops_6n, flops_palm = flops_per_token_6n(shape), flops_per_token_palm(shape)
    sizes = f"{spec.micro_batch} x {shape.context} x {spec.grad_accum}"
    head = "tied" if shape.tied_head else "counted, the embedding is only looked up"
    tables = " + T C" * shape.position_table + " + V C" * (not shape.tied_head)
    exact: dict[str, tuple[float, str, str]] = {
        "tokens_per_step": (per_step, sizes, "micro-batch x context x accumulation"),
        "tokens_total": (tokens, f"{per_step:,} x {steps:,}", "tokens per step x steps"),
        "parameters": (counted.without_positions, parameter_formula(shape), f"model.py; the vocabulary head is {head}"),
        "parameters_total": (counted.total, f"N{tables}", "model.py"),
        "flops_total_6n": (flops_6n * tokens, "6 N x tokens, N without position embeddings", "Kaplan et al. 2020"),
        "flops_total_palm": (flops_palm * tokens, "(6 N + 12 L C T) x tokens", "Chowdhery et al. 2022, appendix B"),
        "weights_bytes": (2 * counted.total, "2 B x parameters; the master weights take twice that", "model.py"),
    }
    if spec.unique_tokens is not None:
        passes, how = tokens / spec.unique_tokens, f"{tokens:,} / {spec.unique_tokens:,}"
        exact["data_epochs"] = (passes, how, "tokens of the run / unique tokens (data.tokens)")
    return {
        row: Estimate.of(row, Interval.exact(value), formula, source) for row, (value, formula, source) in exact.items()
    }


def _memory_estimates(memory: Memory, hardware: Hardware) -> dict[str, Estimate]:
    """Return the peak of the process and, on a GPU, that of the tensors."""
    source = "docs/prediction.md"
    if hardware.kind == "cpu":
        formula = "resident memory before the model + libraries and compiler + tensors + copy for checkpoints"
        return {"peak_process_bytes": Estimate.of("peak_process_bytes", memory.process, formula, source)}
    at_peak = f"at {memory.moment}: " + " + ".join(f"{p.name} ({p.formula})" for p in memory.parts)
    counted = f"counted from what torch keeps, {source}"
    formula = "what the allocator reserves + CUDA context (0.29-0.67 GB)"
    return {
        "peak_allocated_bytes": Estimate.of("peak_allocated_bytes", memory.allocated, at_peak, counted),
        "peak_process_bytes": Estimate.of("peak_process_bytes", memory.process, formula, source),
    }


def _times(spec: RunSpec, hardware: Hardware, step: StepTime) -> tuple[dict[str, Estimate], dict[str, float]]:
    steps, gpus = spec.steps, spec.world_size
    eval_one = 2 * (spec.eval_batches or 0) * step.eval_batch_seconds
    evals = evaluations(spec)
    compiling = compile_seconds(spec, hardware)
    saving = waiting_seconds(state_bytes(spec), checkpoints(spec))
    ledger = {
        "compile_s": compiling.expected,
        "step_s": steps * step.seconds,
        "eval_s": evals * eval_one,
        "checkpoint_s": saving.expected,
        "other_s": START_UP_SECONDS.expected,
    }
    device_work = step.factor * (ledger["step_s"] + ledger["eval_s"])
    assert hardware.peak_flops is not None
    peak = gpus * hardware.peak_flops
    source = "roofline per kind of operation, docs/prediction.md"

    first = compiling + step.interval + FIRST_STEP_EXTRA_SECONDS
    estimated = {
        "first_step_seconds": (first, "compilation + one step + first allocations"),
        "step_seconds": (step.interval, " + ".join(f"{p.name} {p.value:.3g} s" for p in step.parts)),
        "total_seconds": (
            device_work + compiling + saving + START_UP_SECONDS,
            f"{steps:,} steps + {evals} evaluations of {eval_one:.3g} s{' on one GPU' * (gpus > 1)} + compilation "
            f"+ {checkpoints(spec)} copies for checkpoints, the last written + start-up",
        ),
    }
    of_peak = f"{f'{gpus} x ' * (gpus > 1)}peak; {hardware.peak_name}"
    for row, per_token in MFU_CONVENTIONS.items():
        flops = per_token(spec.shape) * spec.tokens_per_step
        reached = mfu(flops, step.interval, peak)
        possible = Interval(reached.low, reached.expected, min(reached.high, 1.0))
        estimated[row] = (possible, f"FLOPs per step / step time / {of_peak}")
    if None in (spec.eval_every, spec.eval_batches, spec.checkpoint_every):
        del estimated["total_seconds"]
    return {row: Estimate.of(row, *of_row, source) for row, of_row in estimated.items()}, ledger


def _calibrated(spec: RunSpec, hardware: Hardware, step: StepTime | None, known: CalibratedStep) -> dict[str, Estimate]:
    """Return the calibrated step time and the quantities derived from it.

    Evaluations are scaled by the same factor as the step. An MFU above 100 % means that the peak is wrong, and is left
    out.
    """
    seconds, source = known.seconds, known.source
    row = {"step_seconds": Estimate.of("step_seconds", seconds, known.formula, source)}
    if step is None:
        return row
    factor = seconds.expected / step.seconds
    scaled = replace(
        step,
        parts=[p.model_copy(update={"value": factor * p.value}) for p in step.parts],
        eval_batch_seconds=factor * step.eval_batch_seconds,
        factor=seconds.scaled(1.0),
    )
    times, _ = _times(spec, hardware, scaled)
    possible = {r: e for r, e in times.items() if e.expected <= e.high}
    paid, _ = predict_energy(spec.cost, hardware, possible.get("total_seconds"), spec.world_size)
    energy = {r: e for r, e in paid.items() if r != "power_watts"}
    found = {r: e.model_copy(update={"source": source}) for r, e in possible.items()}
    return found | row | energy
