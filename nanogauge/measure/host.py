"""The host: its processor, its memory, and the resident memory of this process.

Values that the operating system does not report are None.
"""

import os
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path


def cpu_name() -> str | None:
    return _proc_field("cpuinfo", "model name") or platform.processor() or None


def total_memory_bytes() -> int | None:
    with suppress(ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def available_bytes() -> int | None:
    """Return the memory that can be allocated without swapping (Linux only).

    Source: MemAvailable of /proc/meminfo, the kernel's own estimate.
    """
    return _proc_bytes("meminfo", "MemAvailable")


def process_bytes(pid: int | str = "self") -> int | None:
    """Return the current resident memory of a process, by default this one."""
    with suppress(OSError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    return None


def process_tree(root: int) -> list[int]:
    """Return the number of a process and those of its descendants (Linux; elsewhere only its own)."""
    tree = [root]
    for pid in tree:  # which grows meanwhile
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):
                tree += map(int, children.read_text().split())
    return tree


def reset_peak() -> None:
    """Reset the peak of peak_process_bytes to the current resident memory (Linux only)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_process_bytes() -> int:
    """Return the peak resident memory since reset_peak, or off Linux since the process began."""
    if (peak := _proc_bytes("self/status", "VmHWM")) is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class ProcessorWatch:
    """The share of the processor that other programs use, from the creation of the watch on."""

    def __init__(self) -> None:
        self._before = _processor_seconds()

    def others_share(self) -> float | None:
        """Return their mean share of all cores; None off Linux."""
        now = _processor_seconds()
        if self._before is None or now is None:
            return None
        all_cores, busy, own = (b - a for a, b in zip(self._before, now, strict=True))
        return min(1.0, max(0.0, busy - own) / all_cores) if all_cores > 0 else None


def _processor_seconds() -> tuple[float, float, float] | None:
    """Return seconds of all cores, those that were not idle, and those of this process."""
    with suppress(OSError):
        line = Path("/proc/stat").read_text().partition("\n")[0]
        # user, nice, system, idle, iowait, irq, softirq, steal; the guests' are part of user's.
        ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in line.split()[1:9]]
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], sum(os.times()[:4])
    return None


def _proc_field(file: str, name: str) -> str | None:
    """Return the first value of this name in a file of /proc."""
    with suppress(OSError):
        for line in Path("/proc", file).read_text().splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return None


def _proc_bytes(file: str, name: str) -> int | None:
    value = _proc_field(file, name)
    return None if value is None else int(value.split()[0]) * 1024
