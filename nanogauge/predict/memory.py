"""Bytes at the peak, by component: what tensors allocate, and what the process holds.

First version: activations and logits by constants per element, which published runs gave to within
about 10-20 %; see docs/prediction.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanogauge.predict.parameters import count_parameters
from nanogauge.predict.workload import Workload
from nanogauge.records import Hardware, Part

CUDA_CONTEXT_BYTES = int(0.35 * 2**30)
RESERVED_OVER_ALLOCATED = (1.05, 1.15, 1.35)  # low, expected, high
COMPILER_BYTES = int(0.2e9)  # of the host process, once torch.compile has run


@dataclass(frozen=True)
class Memory:
    parts: list[Part]
    """of the expected peak that tensors allocate"""
    process: tuple[float, float, float]
    """low, expected and high bytes of the process at its peak"""
    low: float
    high: float
    """the interval of the peak allocated, as factors"""

    @property
    def allocated(self) -> float:
        return sum(part.value for part in self.parts)


def predict_memory(work: Workload, hardware: Hardware) -> Memory:
    """Peak memory of training on this device; on a CPU the process's resident memory."""
    shape, compiled = work.shape, work.compiled
    total = count_parameters(shape).total
    n = work.tokens
    half_precision = work.element_bytes == 2
    per_activation = (29 if compiled else 45) * (1 if half_precision else 2)
    per_logit = (5.4 if compiled else 11.5) if half_precision else (8.0 if compiled else 16.0)
    parts = [
        Part(name="weights", value=4 * total, formula="4 B per parameter (fp32)"),
        Part(name="gradients", value=4 * total, formula="4 B per parameter"),
        Part(name="AdamW moments", value=8 * total, formula="8 B per parameter"),
        Part(
            name="activations",
            value=n * shape.layers * shape.width * per_activation,
            formula=f"{per_activation} B x tokens x layers x width",
        ),
        Part(
            name="logits and loss",
            value=n * shape.vocabulary * per_logit,
            formula=f"{per_logit} B x tokens x vocabulary",
        ),
    ]
    if half_precision:
        copies = Part(name="16-bit copies", value=2 * total, formula="2 B per parameter")
        parts.insert(3, copies)
    allocated = sum(part.value for part in parts)
    if hardware.kind == "cpu":
        before = hardware.process_bytes or 0
        rest = before + (COMPILER_BYTES if compiled else 0)
        process = (before + 0.8 * allocated, rest + allocated, 1.5 * rest + 1.5 * allocated)
    else:
        low, expected, high = RESERVED_OVER_ALLOCATED
        process = (
            0.8 * allocated * low + CUDA_CONTEXT_BYTES,
            allocated * expected + CUDA_CONTEXT_BYTES,
            1.25 * allocated * high + CUDA_CONTEXT_BYTES,
        )
    return Memory(parts, process, 0.8, 1.25)
