"""What fits into a card's memory: the largest micro-batch at the same tokens per step."""

from __future__ import annotations

import math

from nanogauge.config import Config
from nanogauge.predict.memory import predict_memory
from nanogauge.predict.workload import workload_of
from nanogauge.records import Hardware


def largest_micro_batch(config: Config, hardware: Hardware, dtype: str, free: int) -> int | None:
    """The largest micro-batch with the same tokens per step whose expected peak fits into free."""
    sequences = config.train.micro_batch * config.train.grad_accum
    below_root = [d for d in range(1, math.isqrt(sequences) + 1) if sequences % d == 0]
    for micro in sorted({*below_root, *(sequences // d for d in below_root)}, reverse=True):
        train = config.train.model_copy(
            update={"micro_batch": micro, "grad_accum": sequences // micro}
        )
        candidate = config.model_copy(update={"train": train})
        work = workload_of(candidate, dtype, hardware.kind != "cpu")
        if predict_memory(work, hardware).process[1] <= free:
            return micro
    return None
