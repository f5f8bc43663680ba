"""The peak and bandwidth of this CPU, measured in about two seconds; datasheets do not give them.

The one module of predict/ that imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from nanogauge.records import Hardware

MATMUL_SIZES = (512, 1024, 1536)
COPY_BYTES = 2**27
SECONDS_EACH = 0.35


def measure_cpu(
    name: str, dtype: str, memory_bytes: int | None, process_bytes: int | None
) -> Hardware:
    """This CPU as the hardware of a prediction.

    The peak is the best rate of square matrix products of a few sizes in the run's dtype, on the
    threads torch uses; the bandwidth that of a copy far larger than the caches, read and written.
    """
    torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    rates = {}
    for size in MATMUL_SIZES:
        a, b = (torch.randn(size, size).to(torch_dtype) for _ in range(2))
        out = torch.empty(size, size, dtype=torch_dtype)

        def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        rates[size] = 2 * size**3 / _best_seconds(product)
    size, peak = max(rates.items(), key=lambda item: item[1])
    source, target = torch.ones(COPY_BYTES // 4), torch.ones(COPY_BYTES // 4)
    bandwidth = 2 * COPY_BYTES / _best_seconds(lambda: target.copy_(source))
    threads = torch.get_num_threads()
    return Hardware(
        name=name,
        kind="cpu",
        architecture="cpu",
        peak_flops=peak,
        peak_name=f"{dtype} matrix product of {size} x {size} measured on this CPU with "
        f"{threads} thread{'s' if threads > 1 else ''}: {peak / 1e9:.0f} GFLOP/s",
        matmul_flops=peak,
        memory_bytes=memory_bytes,
        bandwidth_bytes_per_second=bandwidth,
        power_limit_watts=None,
        process_bytes=process_bytes,
        source="measured before the run, nanogauge/predict/calibrate.py",
    )


def _best_seconds(work: Callable[[], object]) -> float:
    """The shortest of several calls within SECONDS_EACH, after one to warm up."""
    work()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < SECONDS_EACH:
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best
