"""Memory of this process, as the operating system counts it."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path


def process_bytes() -> int | None:
    """Resident memory now; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize()


def reset_peak() -> None:
    """Let the peak begin anew, so that what came before the run is not in it (Linux alone)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_process_bytes() -> int:
    """Resident memory at its highest since reset_peak, or, off Linux, since the process began."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int | None:
    """Memory that new allocations can have without swapping; None where the system does not tell.

    Source: MemAvailable of /proc/meminfo, the kernel's own estimate (Linux alone).
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
