"""Predict what a trace of any module says: its peak memory, and its step time as a roofline of each operation."""

from nanogauge.prediction.constants import FITTED
from nanogauge.prediction.memory import EAGER_RESERVED, Memory, peak_memory
from nanogauge.prediction.step_time import StepTime, device_rates, interval_factor
from nanogauge.prediction.workload import FORMULAS, workload_of
from nanogauge.quantities import Interval
from nanogauge.runspec import RunSpec
from nanogauge.schema import Estimate, Hardware, Part
from nanogauge.spec_parts import Traced

WIDER = Interval(1 / 1.5, 1.0, 1.5)
"""Factor by which the interval of a traced step is wider than that of a GPT's. Source: 11 models of transformers on one
core of a CPU took 1.04 to 1.9 times the prediction, median 1.2; on a GPU it is a guess."""


def traced_memory(traced: Traced, hardware: Hardware) -> Memory:
    """Return the predicted peak memory on a device."""
    parts = [Part(name=name, value=size, formula=FORMULAS["trace"][name]) for name, size in traced.peak if size]
    return peak_memory(parts, traced.moment, hardware, EAGER_RESERVED)


def hidden_workspaces(traced: Traced) -> list[str]:
    """Return a sentence for each operation whose memory the trace does not show."""
    hiding = {name for name, *_ in traced.micro_batch if name in ("mkldnn_rnn_layer", "_cudnn_rnn")}
    return [f"Memory: what {name} keeps for the backward pass is not counted." for name in sorted(hiding)]


def traced_step_time(spec: RunSpec, traced: Traced, hardware: Hardware) -> StepTime | None:
    """Predict the step time on a device; None if its peak, bandwidth or class is unknown."""
    on_cpu = hardware.kind == "cpu"
    work = workload_of(spec, not on_cpu)
    device = device_rates(work, hardware, FITTED)
    if device is None:
        return None
    rate = device.ceiling * device.products
    seconds = dict.fromkeys(("matrix products", "other operations", "launching kernels", "optimizer"), 0.0)
    for operations, times in ((traced.micro_batch, work.grad_accum), (traced.update, 1)):
        busy = launches = 0.0
        for _, flops, moved_bytes, calls in operations:
            took = calls * max(flops / rate, moved_bytes / device.bandwidth)
            name = "matrix products" if flops else "other operations"
            seconds[name if operations is traced.micro_batch else "optimizer"] += times * took
            busy += took
            launches += calls * device.launch_seconds
        seconds["launching kernels"] += times * (launches if on_cpu else max(0.0, launches - busy))
    parts = [Part(name=name, value=value, formula=FORMULAS["trace"][name]) for name, value in seconds.items()]
    forward = sum(part.value for part in parts[:3]) / work.grad_accum / 3
    share = seconds["launching kernels"] / sum(seconds.values())
    factor, caveats = interval_factor(work, hardware, FITTED, 0.0 if on_cpu else share)
    caveats += ("the interval is wider, as each operation was counted and none was measured",)
    caveats += ("what devices exchange was not traced",) * (work.gpus > 1)
    return StepTime(parts, forward, factor * WIDER, caveats)


def traced_quantities(spec: RunSpec, traced: Traced) -> dict[str, Estimate]:
    """Return the quantities that the trace determines."""
    per_step, source = traced.flops * spec.grad_accum, "trace on tensors without values"
    exact = {
        "parameters_total": (traced.parameters, "counted"),
        "flops_total_traced": (per_step * spec.steps, f"{per_step:.4g} x {spec.steps:,}, forward and backward"),
        "weights_bytes": (2 * traced.parameters, "2 B x parameters"),
    }
    return {row: Estimate.of(row, Interval.exact(value), how, source) for row, (value, how) in exact.items()}
