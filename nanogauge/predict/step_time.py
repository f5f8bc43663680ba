"""Seconds of one optimizer step: a roofline per kind of operation, added up.

n is the tokens of a micro-batch, C the width, L the layers, T the context, V the vocabulary.
The ceiling of the matrix products is what somebody measured on such a card, or the class's share of
its peak. docs/prediction.md derives the constants and names their sources and their errors.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanogauge.predict.flops import forward_flops_per_token
from nanogauge.predict.parameters import count_parameters
from nanogauge.predict.workload import Workload
from nanogauge.records import Hardware, Part


@dataclass(frozen=True)
class Efficiency:
    """What a class of devices reaches; see docs/prediction.md."""

    ceiling_of_peak: float
    """a large matrix product over the peak, where none was measured on the card itself"""
    products: float
    """matrix products in a model's shapes over that ceiling"""
    attention: float
    """causal flash attention over that ceiling"""
    exposed_traffic: float
    """share of the matrix products' memory traffic that is not hidden behind arithmetic"""
    low: float
    high: float
    """the interval, as factors of the expected time"""
    caveat: str | None = None


_UNVALIDATED = "no published run of this class has been predicted yet: the interval is a guess"
EFFICIENCY = {
    "ada": Efficiency(1.03, 0.915, 0.80, 0.33, 0.78, 1.28),
    "blackwell": Efficiency(1.03, 0.915, 0.80, 0.33, 0.70, 1.40, _UNVALIDATED),
    "ampere": Efficiency(
        1.03, 0.915, 0.80, 0.33, 0.78, 1.60, "runs on GeForce 30 took 28-40 % longer than predicted"
    ),
    "a100": Efficiency(0.84, 0.915, 0.37, 0.70, 0.78, 1.28),
    "hopper": Efficiency(0.80, 0.915, 0.21, 0.70, 0.78, 1.28),
    "turing": Efficiency(0.65, 0.80, 0.25, 0.70, 0.60, 1.80, _UNVALIDATED),
    "volta": Efficiency(0.75, 0.80, 0.25, 0.70, 0.60, 1.80, _UNVALIDATED),
    "cpu": Efficiency(1.0, 0.72, 0.28, 0.0, 0.60, 1.70, "CPUs differ much in small operations"),
}
BANDWIDTH_SHARE = 0.85  # reachable share of a datasheet's memory bandwidth


@dataclass(frozen=True)
class StepTime:
    parts: list[Part]
    """seconds of one optimizer step, by kind of operation"""
    eval_batch_seconds: float
    """forward pass of one micro-batch"""
    low: float
    high: float
    caveat: str | None

    @property
    def seconds(self) -> float:
        return sum(part.value for part in self.parts)


def predict_step_time(work: Workload, hardware: Hardware) -> StepTime | None:
    """The expected step on this device; None where its peak, bandwidth or class is not known."""
    efficiency = EFFICIENCY.get(hardware.architecture)
    peak, datasheet = hardware.peak_flops, hardware.bandwidth_bytes_per_second
    if efficiency is None or peak is None or datasheet is None:
        return None
    shape, compiled = work.shape, work.compiled
    on_cpu = hardware.kind == "cpu"
    n = work.tokens
    width, layers = shape.width, shape.layers
    element = work.element_bytes
    wide = element / 2  # the traffic constants below are for 16-bit activations

    ceiling = hardware.matmul_flops or efficiency.ceiling_of_peak * peak
    bandwidth = datasheet if on_cpu else BANDWIDTH_SHARE * datasheet
    forward = forward_flops_per_token(shape)
    block_products = sum(v for k, v in forward.items() if k not in ("attention", "vocabulary head"))

    # 1. Matrix products of the blocks: forward once, backward twice; the traffic is that of the
    #    inputs and outputs, 16 C values a token and layer, three times.
    traffic = 3 * 16 * n * layers * width * element
    products = 3 * n * block_products / (ceiling * efficiency.products)
    products += efficiency.exposed_traffic * traffic / bandwidth
    # 2. Causal flash attention: half of the full scores, 2 products forward and 5 backward.
    dropout = 1.08 if work.dropout else 1.0
    half = 1 + 128 / shape.context  # tiles on the diagonal are computed in full
    attention_flops = 7 * n * shape.context * width * layers * half * dropout
    attention = attention_flops / (ceiling * efficiency.attention)
    # 3. The vocabulary head, and 4. softmax and loss over n x V logits.
    head = 3 * n * forward["vocabulary head"] / (ceiling * efficiency.products)
    loss = n * shape.vocabulary * (8 if compiled else 32) * wide / bandwidth
    # 5. Norms, activation, residuals, dropout: bytes per token, layer and unit of width.
    bytes_each = (116 + 10 * bool(work.dropout)) if compiled else (338 + 40 * bool(work.dropout))
    elementwise = n * layers * width * bytes_each * wide / bandwidth
    # 6. Weights, once a micro-batch: cast to 16 bits and gradients accumulated.
    total = count_parameters(shape).total
    weights = total * 16 / bandwidth
    # 7. AdamW reads and writes weights, gradients and two moments, once a step.
    optimizer = total * 30 / bandwidth
    # 8. A floor for launching kernels, where they are too small to hide it.
    launches = (28 * layers + 40) if compiled else (150 * layers + 40)
    launch_seconds = launches * (12e-6 if on_cpu else 7e-6)

    busy = products + attention + head + loss + elementwise + weights
    idle = launch_seconds if on_cpu else max(0.0, launch_seconds - busy)
    micro = {
        "matrix products of the blocks": (products, "6 n 12C^2 L / ceiling + exposed traffic"),
        "attention": (attention, "7 n T C L (1 + 128/T) / ceiling"),
        "vocabulary head": (head, "6 n C V / ceiling"),
        "softmax and loss": (loss, "n V bytes / bandwidth"),
        "norms and elementwise": (elementwise, "n L C bytes / bandwidth"),
        "weights and gradients": (weights, "16 B per parameter / bandwidth"),
        "launching kernels": (idle, "kernels x time of a launch, where it is not hidden"),
    }
    accumulation = work.grad_accum
    parts = [
        Part(name=name, value=accumulation * seconds, formula=f"{accumulation} x {formula}")
        for name, (seconds, formula) in micro.items()
    ]
    parts.append(Part(name="optimizer", value=optimizer, formula="30 B per parameter / bandwidth"))
    forward_work = (products + head + elementwise) / 3 + 2 / 7 * attention + loss / 2
    launching = launch_seconds / 3
    forward_only = forward_work + launching if on_cpu else max(forward_work, launching)
    return StepTime(parts, forward_only, efficiency.low, efficiency.high, efficiency.caveat)
