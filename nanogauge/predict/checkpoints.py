"""What checkpoints cost a run: the seconds that the loop waits for them."""

from __future__ import annotations

from dataclasses import replace

from nanogauge.predict.training_state import training_state
from nanogauge.predict.workload import workload_of
from nanogauge.quantities import Interval
from nanogauge.runspec import RunSpec

FIRST_COPY_BYTES_PER_SECOND = Interval(0.4e9, 3.0e9, 10.0e9)
"""Slow to fast: the first copy goes into memory that is only now allocated. Measured on two cores
of a CPU: 4.6e9; page-locking memory for a GPU is slower, and was not measured."""

COPY_BYTES_PER_SECOND = Interval(1.5e9, 8.0e9, 20.0e9)
"""Of every other copy. Measured there: 10e9; PCIe 4.0 carries 6e9 (four lanes) to 25e9."""

WRITE_BYTES_PER_SECOND = Interval(0.1e9, 0.4e9, 1.0e9)
"""Hashed, written and flushed. Measured there: 0.13e9 to 0.46e9; the hash alone goes at 1.4e9."""


def state_bytes(spec: RunSpec) -> int:
    """Of a checkpoint: each weight and its moments in fp32."""
    state = training_state(workload_of(replace(spec, world_size=1, dtype="float32"), on_gpu=False))
    return int(state.weights + state.moments)


def waiting_seconds(bytes_each: float, count: int) -> Interval:
    """Return the time the loop waits for the copy of each checkpoint and the write of the last."""
    if not count:
        return Interval.exact(0.0)
    copies = 1 / FIRST_COPY_BYTES_PER_SECOND + (count - 1) / COPY_BYTES_PER_SECOND
    return bytes_each * (copies + 1 / WRITE_BYTES_PER_SECOND)
