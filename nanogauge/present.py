"""The device that is present: what to predict for, and its calibration."""

from __future__ import annotations

import sys

import nanogauge.threads  # noqa: F401  before torch

# isort: split
import torch

from nanogauge.calibrations import add_to_calibration
from nanogauge.config import Config
from nanogauge.errors import BadInput
from nanogauge.hardware import find_gpu, from_properties, from_row
from nanogauge.measure.environment import cpu_name, total_memory_bytes
from nanogauge.measure.gpu import DriverInfo, driver_info
from nanogauge.measure.memory import process_bytes
from nanogauge.predict.calibrate import measure_cpu, measure_device
from nanogauge.predict.calibration import Calibration
from nanogauge.records import Hardware
from nanogauge.training.device import choose_device, choose_dtype


def describe_hardware(device: torch.device, dtype: str) -> tuple[Hardware, DriverInfo | None]:
    """What to predict for: the GPU's row, else its own properties, else this CPU, measured."""
    if device.type == "cuda":
        told = torch.cuda.get_device_properties(device)
        driver = driver_info(str(told.uuid))
        gpu = find_gpu(told.name, told.total_memory)
        if gpu is not None:
            return from_row(gpu, dtype, driver.power_limit_watts), driver
        # Two transfers a clock; a driver that does not tell the clock gives 0.
        bandwidth = 2 * told.memory_clock_rate * 1e3 * told.memory_bus_width / 8
        hardware = from_properties(
            told.name,
            (told.major, told.minor),
            told.multi_processor_count,
            told.total_memory,
            driver.max_sm_clock_hz,
            driver.power_limit_watts,
            dtype,
            bandwidth or None,
        )
        return hardware, driver
    if device.type == "mps":
        memory = total_memory_bytes() or 0
        return from_properties("Apple GPU", (0, 0), 0, memory, None, None, dtype), None
    return this_processor(dtype), None


def this_processor(dtype: str) -> Hardware:
    """The CPU of this machine, measured in about two seconds."""
    return measure_cpu(cpu_name() or "CPU", dtype, total_memory_bytes(), process_bytes())


def calibrated_threads(device: torch.device) -> int | None:
    """The threads that a calibration of this device depends on; None on a GPU."""
    return torch.get_num_threads() if device.type == "cpu" else None


def calibrate(config: Config, gpu: str | None) -> tuple[Hardware, str, Calibration, str | None]:
    """Measure the device of this configuration and keep the figures, in under a minute.

    Returns the device, the dtype of a run on it, all that is known of it, and a warning where the
    figures could not be kept.

    Args:
        gpu: the card that a plan was asked for, if one was.

    Raises:
        BadInput: if that card is not the one that is present, or the device cannot run this.
    """
    device = choose_device(config.run.device)
    dtype = choose_dtype(config.run.dtype, device)
    hardware, _ = describe_hardware(device, dtype)
    row = find_gpu(gpu) if gpu is not None else None
    if gpu is not None and (row is None or row.name != hardware.name):
        raise BadInput(
            f"--calibrate measures the device that is here, {hardware.name}, not {gpu!r}; "
            "leave out --gpu, or plan for that card without --calibrate."
        )
    print(f"measuring {hardware.name} for up to a minute ...", file=sys.stderr, flush=True)
    known, warning = add_to_calibration(measure_device(config, device, dtype, hardware.name))
    return hardware, dtype, known, warning
