"""Time outside of the steps: start-up, compilation, checkpoints, data preparation."""

from dataclasses import replace

from nanogauge.prediction.memory import training_state
from nanogauge.prediction.workload import workload_of
from nanogauge.quantities import Interval
from nanogauge.runspec import RunSpec
from nanogauge.schema import Hardware

FIRST_COPY_BYTES_PER_SECOND = Interval(0.4e9, 3.0e9, 10.0e9)
"""First copy of a checkpoint, which also allocates its memory. Measured on two CPU cores: 4.6e9; page-locked memory for
a GPU is slower and was not measured."""

COPY_BYTES_PER_SECOND = Interval(1.5e9, 8.0e9, 20.0e9)
"""Later copies. Measured on two CPU cores: 10e9; PCIe 4.0 carries 6e9 (x4) to 25e9."""

WRITE_BYTES_PER_SECOND = Interval(0.1e9, 0.4e9, 1.0e9)
"""Hash, write and fsync. Measured on two CPU cores: 0.13e9 to 0.46e9; the hash alone 1.4e9."""


def state_bytes(spec: RunSpec) -> int:
    """Return the bytes of a checkpoint: each weight and its optimizer moments in fp32."""
    if spec.traced is not None:
        return sum(size for name, size in spec.traced.peak if name in ("weights", "AdamW moments"))
    state = training_state(workload_of(replace(spec, world_size=1, dtype="float32"), on_gpu=False))
    return int(state.weights + state.moments)


def waiting_seconds(bytes_each: float, count: int) -> Interval:
    """Return the time training waits for the copy of each checkpoint and the write of the last."""
    if not count:
        return Interval.exact(0.0)
    copies = 1 / FIRST_COPY_BYTES_PER_SECOND + (count - 1) / COPY_BYTES_PER_SECOND
    return bytes_each * (copies + 1 / WRITE_BYTES_PER_SECOND)


# Tokens per second read, tokenized and written. bench/prepare.py measured 33 to 37 MB of text per second with two
# workers; web text has about 4.5 bytes per token. Low is a quarter of that, on a busy machine; high is four workers.
TOKENS_PER_SECOND = Interval(2.0e6, 8.0e6, 16.0e6)
# Parquet bytes per GPT-2 token: FineWeb's data set card gives sample-10BT as 27.6 GB.
SOURCE_BYTES_PER_TOKEN = 2.76
LINE_BYTES_PER_SECOND = Interval(50e6 / 8, 100e6 / 8, 1e9 / 8)
"""Home connections of 50, 100 and 1,000 Mbit/s."""


def preparation_seconds(tokens: int) -> Interval:
    """Return the time of the slower of download and tokenization, which overlap."""
    working = tokens / TOKENS_PER_SECOND
    download = tokens * SOURCE_BYTES_PER_TOKEN / LINE_BYTES_PER_SECOND
    return Interval(
        max(working.low, download.low), max(working.expected, download.expected), max(working.high, download.high)
    )


FIRST_STEP_EXTRA_SECONDS = Interval(0.0, 0.2, 3.0)  # allocations, libraries loaded on first use
START_UP_SECONDS = Interval(3.0, 7.0, 30.0)  # imports, data, first allocation; 6 s for the demo


def compile_seconds(spec: RunSpec, hardware: Hardware) -> Interval:
    """Return the time until the compiled model runs.

    GPU: fitted to 12.8 s for 12 layers on an RTX 4070 (one run). CPU: one block is compiled
    for all layers, in 14.8, 14.9 and 15.3 s with 1, 4 and 12 layers on two cores of a Xeon. The low end is a warm
    compiler cache: 2.4-2.7 s on that CPU.
    """
    if not spec.compile:
        return Interval.exact(0.0)
    expected = 16 if hardware.kind == "cpu" else 8 + 0.4 * spec.shape.n_layer
    if spec.tuned and hardware.kind != "cpu":  # an estimate: twenty candidates for each product
        expected += 120
    return Interval(0.1 * expected, expected, 4 * expected)
