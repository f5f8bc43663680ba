"""machine.json: what a run ran on and with. No host name, user name or home path enters it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from nanogauge import __version__
from nanogauge.files import without_secrets
from nanogauge.measure.gpu import DriverInfo
from nanogauge.records import TimeZone

PACKAGES = ("torch", "numpy", "triton", "tiktoken", "datasets", "wandb", "nvidia-ml-py")


def capture_environment(
    device: str, driver: DriverInfo | None, torch_threads: int
) -> dict[str, object]:
    """Names and versions; None where something is not there or does not tell.

    Args:
        device: the device's own name.
        driver: what NVML says of it; None where the run uses no NVIDIA GPU.
        torch_threads: threads that torch computes with on the CPU.
    """
    return {
        "device": device,
        "gpu_driver": driver.driver_version if driver is not None else None,
        "gpu_memory_bytes": driver.total_bytes if driver is not None else None,
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch_threads,
        "memory_bytes": total_memory_bytes(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "nanogauge": __version__,
        **{package: _version(package) for package in PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if (status := _git("status", "--porcelain")) is None else bool(status),
        "time_zone": local_time_zone().model_dump(),
        "command": without_secrets(" ".join(sys.argv)),
    }


def local_time_zone() -> TimeZone:
    """Return the time zone of this machine with its present offset."""
    now = time.localtime()
    return TimeZone(name=now.tm_zone, utc_offset_seconds=now.tm_gmtoff)


def total_memory_bytes() -> int | None:
    """The machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def cpu_name() -> str | None:
    """The processor's name; None where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """The answer of git about the checkout this file lies in; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
