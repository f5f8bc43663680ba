"""Describe the device of this machine for a prediction, without torch."""

import time
from collections.abc import Callable

import numpy as np

from nanogauge.hardware import find_gpu, from_properties, from_row
from nanogauge.measure.host import cpu_name, process_bytes, total_memory_bytes
from nanogauge.measure.sensors import driver_info
from nanogauge.schema import Hardware

_MATRIX = 1024
_COPY_BYTES = 2**27
_SECONDS = 0.3


def local_hardware(dtype: str | None = None, device: str | int = 0) -> Hardware:
    """Return an NVIDIA GPU of this machine, or else its CPU, which takes a second.

    A CPU's peak is the best rate of an fp32 matrix product in numpy, and its bandwidth that of a copy larger than the
    caches.

    >>> import nanogauge as ng
    >>> ng.local_hardware().memory_bytes > 1e9
    True

    Args:
        dtype: precision of the matrix products; None for bfloat16 on a GPU, float32 on a CPU.
        device: the GPU, named as for driver_info.
    """
    driver = driver_info(device)
    if driver.name is None or driver.total_bytes is None:
        return _measured_cpu()
    dtype = dtype or "bfloat16"
    limit = driver.power_limit_watts
    gpu = find_gpu(driver.name, driver.total_bytes)
    if gpu is not None:
        return from_row(gpu, dtype, limit)
    return from_properties(driver.name, (0, 0), 0, driver.total_bytes, None, limit, dtype)


def _measured_cpu() -> Hardware:
    peak, bandwidth = _cpu_rates()  # whose arrays are gone when the process is measured
    how = f"fp32 matrix product of {_MATRIX} x {_MATRIX} measured with numpy"
    return cpu_hardware(peak, how, bandwidth, "measured before the run, nanogauge/device.py")


def _cpu_rates() -> tuple[float, float]:
    """Return the FLOP/s of an fp32 matrix product, and the bytes/s of a copy."""
    a = np.ones((_MATRIX, _MATRIX), np.float32)
    product, source = np.empty_like(a), np.ones(_COPY_BYTES // 4, np.float32)
    target = np.empty_like(source)
    peak = 2 * _MATRIX**3 / _fastest(lambda: np.matmul(a, a, out=product))
    return peak, 2 * _COPY_BYTES / _fastest(lambda: np.copyto(target, source))


def cpu_hardware(peak_flops: float | None, how: str, bandwidth: float | None, source: str) -> Hardware:
    """Describe the CPU of this machine, with its peak in FLOP/s and bandwidth in bytes/s.

    `how` says how the peak was measured, `source` who did.
    """
    rate = "" if peak_flops is None else f": {peak_flops / 1e9:.0f} GFLOP/s"
    return Hardware(
        name=cpu_name() or "CPU",
        kind="cpu",
        architecture="cpu",
        peak_flops=peak_flops,
        peak_name=f"{how}{rate}",
        matmul_flops=peak_flops,
        memory_bytes=total_memory_bytes(),
        bandwidth_bytes_per_second=bandwidth,
        power_limit_watts=None,
        process_bytes=process_bytes(),
        source=source,
    )


def _fastest(work: Callable[[], object]) -> float:
    """Return the shortest time of a call in seconds, after a warm-up call."""
    work()
    seconds: list[float] = []
    while sum(seconds) < _SECONDS:
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
